"""How often the interval of EMM holds the true EMM: simulated studies whose curve is known.

The runs of a study have ratios that differ by N(0, tau^2) on the logit scale around a curve over log |D|; of each run n
images are generated. The true EMM is where the mean ratio over all seeds is 90 %. Printed are the share of studies
whose interval holds it, in %, and the median length of the interval in log |D| (0.1 is about 10 %).
"""

from collections.abc import Callable

import click
import numpy as np
from scipy.interpolate import PchipInterpolator
from scipy.special import expit, logit

from memorization.curve.emm import emm_at, missed_gap
from memorization.stats.crossing import fit_crossing
from memorization.stats.simulation import mean_crossing

LEVEL = 0.9


def _logistic(emm: float, slope: float) -> Callable[[np.ndarray], np.ndarray]:
    return lambda x: logit(LEVEL) - slope * (x - np.log(emm))


def _published(sizes: list[float], percent: list[float]) -> Callable[[np.ndarray], np.ndarray]:
    """A monotone curve through ratios read off published figures (Gu et al. 2023, Figures 2 and 5)."""
    return PchipInterpolator(np.log(sizes), logit(np.array(percent) / 100))


_BASIC, _COND = [500, 1000, 2000, 3000, 4000, 5000], [1000, 2000, 3000, 4000, 5000]
_LOW = [1000, 2000, 4000, 8000, 16000]
GRIDS = {  # sizes, and logit R_mem over log |D|
    "8 to 128": ([8, 16, 32, 64, 128], _logistic(31, 2.66)),
    "published": (_BASIC, _logistic(1054, 2.9)),
}
OTHERS = {
    "published, between": (_BASIC, _logistic(1450, 2.9)),
    "CIFAR-10, 32x32": (_BASIC, _published(_BASIC, [99, 92, 61, 35, 17, 9])),
    "CIFAR-10, 16x16": (_LOW, _published(_LOW, [99.9, 99.5, 95, 60, 11])),  # the figure says 100 at 1000
    "CIFAR-10, labels": (_COND, _published(_COND, [96.5, 79.5, 55.5, 37.5, 23])),
}


def curve(name: str) -> tuple[list[int], Callable[[np.ndarray], np.ndarray]]:
    return (GRIDS | OTHERS)[name]


def true_crossing(name: str, tau: float) -> float:
    """log of the true EMM of a curve of this module."""
    sizes, shape = curve(name)
    return mean_crossing(shape, tau, LEVEL, sizes[0], sizes[-1])


def draw(
    name: str, seeds: int, tau: float, images: int, studies: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """|D| of each run [N], memorized and all images of each run in each study [B, N]."""
    sizes, shape = curve(name)
    size = np.repeat(np.array(sizes, dtype=np.float64), seeds)
    p = expit(shape(np.log(size)) + tau * rng.normal(size=(studies, len(size))))
    return size, rng.binomial(images, p), np.full(p.shape, images)


def coverage(
    name: str, seeds: int, tau: float, images: int, *, studies: int, seed: int = 0, seed_sd: float | None = None
) -> tuple[float, float]:
    """Share of the studies whose 95 % interval holds the truth, and the median length in log |D|."""
    size, counts, samples = draw(name, seeds, tau, images, studies, np.random.default_rng(seed))
    low, high = fit_crossing(size, counts, samples, LEVEL, seed_sd=seed_sd).interval(0.95)
    truth = true_crossing(name, tau)
    return float(((low <= truth) & (truth <= high)).mean()), float(np.median(high - low))


def missed_gaps(name: str, seeds: int, tau: float, images: int, *, studies: int, seed: int = 0) -> tuple[float, float]:
    """How often emm.py curve notes that the fit misses the gap of the ratios, of lines whose EMM may lie anywhere.

    Returns the share of studies, and how far the true EMM then is from the nearest size, in the median of log |D|.
    """
    sizes, shape = curve(name)
    rng, found = np.random.default_rng(seed), []
    moved = rng.uniform(np.log(sizes[0]), np.log(sizes[-1]), studies) - true_crossing(name, 0)
    size = np.repeat(np.array(sizes, dtype=np.float64), seeds)
    p = expit(shape(np.log(size) - moved[:, None]) + tau * rng.normal(size=(studies, len(size))))
    counts = rng.binomial(images, p)
    fitted = fit_crossing(size, counts, np.full(p.shape, images), LEVEL).quantile(0.5)
    for ratios, log_emm, shift in zip((counts / images).reshape(studies, -1, seeds).mean(axis=2), fitted, moved):
        if missed_gap(sizes, ratios, emm_at(np.array(sizes), log_emm, LEVEL)):
            found.append(np.abs(np.log(sizes) - shift - true_crossing(name, 0)).min())
    return len(found) / studies, float(np.median(found)) if found else float("nan")


@click.command()
@click.option("--studies", help="Simulated studies of each", metavar="INT", type=click.IntRange(min=1), default=500)
@click.option("--images", help="Images of each run; several allowed", multiple=True, type=int, default=(1000, 10_000))
@click.option("--other-curves", help="Also a crossing between sizes, and published curves", is_flag=True)
@click.option("--gaps", help="Instead: how often the fit misses the gap of the ratios, with EMM anywhere", is_flag=True)
def main(studies: int, images: tuple[int, ...], other_curves: bool, gaps: bool) -> None:
    """Print coverage in % and median length of nominal 95 % intervals, for runs per size and spreads of seeds."""
    taus = (0, 0.1, 0.2, 0.3, 0.5)
    find = missed_gaps if gaps else coverage
    click.echo("| curve | images | runs per size | " + " | ".join(f"tau {tau:g}" for tau in taus) + " |")
    click.echo("| --- " * (3 + len(taus)) + "|")
    for name in GRIDS | (OTHERS if other_curves else {}):
        for n in images:
            for seeds in (2, 3, 5):
                cells = [find(name, seeds, tau, n, studies=studies) for tau in taus]
                text = " | ".join(f"{100 * covered:.1f} ({length:.3f})" for covered, length in cells)
                click.echo(f"| {name} | {n} | {seeds} | {text} |")


if __name__ == "__main__":
    main()
