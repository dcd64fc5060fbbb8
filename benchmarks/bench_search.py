"""What emm.py search finds and costs: simulated searches whose EMM is known.

The ratio of a run is drawn as in bench_emm_interval.py: around a curve that is logistic in log |D|, seeds differing by
N(0, tau^2) on the logit scale, then that many images. The search is the program's own, but for the training. A grid as
precise has the sizes from the low to the high end, each twice the one before, and the least number of runs per size (at
least two) at which the median length of its interval, by the same fit, is that of the searches.
"""

import math

import click
import numpy as np
from scipy.special import expit, logit

from memorization.search.design import MIN_RUNS, fit, next_sizes
from memorization.stats.crossing import fit_crossing
from memorization.stats.simulation import mean_crossing

LEVEL = 0.9
RANGES = {"8 to 128": (8, 128, 31, 2.66), "500 to 8000": (500, 8000, 1054, 2.9)}  # low, high, EMM, slope


def search(
    name: str, tau: float, images: int, rng: np.random.Generator, *, tolerance: float, confidence: float, max_runs: int
) -> tuple[float, float, list[tuple[int, float, int]]]:
    """One search: the ends of the interval of log EMM, and its runs."""
    low, high, emm, slope = RANGES[name]
    runs: list[tuple[int, float, int]] = []
    while True:
        fitted = fit(runs, LEVEL) if runs else None
        if len(runs) >= MIN_RUNS:
            ends = [float(end[0]) for end in fitted.interval(confidence)]
            if ends[1] - ends[0] <= math.log(tolerance) or len(runs) >= max_runs:
                return *ends, runs
        (size,) = next_sizes(runs, low, high, level=LEVEL, images=images, fitted=fitted)
        p = expit(logit(LEVEL) - slope * math.log(size / emm) + tau * rng.normal())
        runs.append((size, int(rng.binomial(images, p)), images))


def truth(name: str, tau: float) -> float:
    """log of the true EMM."""
    _, _, emm, slope = RANGES[name]
    return mean_crossing(lambda x: logit(LEVEL) - slope * (x - math.log(emm)), tau)


def grid(name: str, tau: float, images: int, length: float, confidence: float, studies: int = 40) -> tuple[int, int]:
    """Runs per size that a grid needs, and |D| summed over all its runs."""
    low, high, emm, slope = RANGES[name]
    sizes = low * 2.0 ** np.arange(round(math.log2(high / low)) + 1)
    rng = np.random.default_rng(0)
    for runs in range(2, 100):
        size = np.repeat(sizes, runs)
        eta = logit(LEVEL) - slope * np.log(size / emm)
        k = rng.binomial(images, expit(eta + tau * rng.normal(size=(studies, len(size)))))
        ends = fit_crossing(size, k, np.full(k.shape, images), LEVEL).interval(confidence)
        if np.median(ends[1] - ends[0]) <= length:
            break
    return runs, int(size.sum())


@click.command()
@click.option("--searches", help="Simulated searches of each kind", metavar="INT", type=int, default=300)
@click.option("--images", help="Images of each run; several allowed", multiple=True, type=int, default=(1000, 10_000))
@click.option("--tolerance", help="Of the search", type=float, default=1.2)
@click.option("--confidence", help="Of the interval", type=float, default=0.9)
@click.option("--max-runs", help="Of a search", type=int, default=40)
@click.option("--tau", "taus", help="Spread between seeds; several allowed", multiple=True, type=float)
def main(
    searches: int, images: tuple[int, ...], tolerance: float, confidence: float, max_runs: int, taus: tuple[float, ...]
) -> None:
    """Print how often the interval of a search holds EMM, its runs, and its training images beside those of a grid."""
    click.echo(
        "| range | images | tau | covers % | median length | runs | images of the grid's | grid: runs per size |"
    )
    click.echo("| --- " * 8 + "|")
    for name in RANGES:
        for n in images:
            for tau in taus or (0, 0.1, 0.2, 0.3, 0.5):
                rng = np.random.default_rng(0)
                options = dict(tolerance=tolerance, confidence=confidence, max_runs=max_runs)
                found = [search(name, tau, n, rng, **options) for _ in range(searches)]
                covered = np.mean([low <= truth(name, tau) <= high for low, high, _ in found])
                length = float(np.median([high - low for low, high, _ in found]))
                cost = np.mean([sum(size for size, *_ in runs) for *_, runs in found])
                count, whole = grid(name, tau, n, length, confidence)
                number = np.mean([len(runs) for *_, runs in found])
                click.echo(
                    f"| {name} | {n} | {tau:g} | {100 * covered:.1f} | {length:.3f} | {number:.1f} | "
                    f"{100 * cost / whole:.0f} % | {count} |"
                )


if __name__ == "__main__":
    main()
