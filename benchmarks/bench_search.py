"""What emm.py search finds and costs: simulated searches whose EMM is known.

The ratio of a run is drawn as in bench_emm_interval.py: around a curve that is logistic in log |D|, seeds differing by
N(0, tau^2) on the logit scale, then that many images. The search is the program's own, but for the training; all
searches of a kind go on together, one run each, so that their fits are one. A grid as precise has the sizes from the
low to the high end, each twice the one before, and the least number of runs per size (at least two) at which the median
length of its interval is that of the searches; its interval is the one of `emm.py curve`.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import click
import numpy as np
from scipy.special import expit, logit

from memorization.search.design import MIN_RUNS, fit_together, next_sizes
from memorization.stats.crossing import fit_crossing
from memorization.stats.simulation import mean_crossing

LEVEL = 0.9


@dataclass(frozen=True)
class Curve:
    """logit R_mem is a line in log |D|, and where it is searched."""

    low: int
    high: int
    emm: float
    slope: float

    def logits(self, sizes: np.ndarray) -> np.ndarray:
        return logit(LEVEL) - self.slope * np.log(sizes / self.emm)

    def truth(self, tau: float) -> float:
        """log of the true EMM."""
        return mean_crossing(lambda x: logit(LEVEL) - self.slope * (x - math.log(self.emm)), tau)

    def __str__(self) -> str:
        return f"{self.low} to {self.high}: EMM {self.emm:g}, slope {self.slope:g}"


CURVES = [Curve(8, 128, 31, 2.66), Curve(500, 8000, 1054, 2.9)]
OTHERS = [Curve(8, 128, 20, 1.8), Curve(8, 128, 55, 4), Curve(500, 8000, 2900, 2.2), Curve(1000, 16000, 5000, 3.5)]


@dataclass(frozen=True)
class Found:
    """What simulated searches of one kind ended with."""

    low: np.ndarray  # float [B], ends of the intervals of log EMM
    high: np.ndarray
    runs: np.ndarray  # int [B], how many
    images: np.ndarray  # int [B], |D| summed over all runs: the training images, per epoch

    def covers(self, truth: float) -> float:
        return float(((self.low <= truth) & (truth <= self.high)).mean())

    def length(self) -> float:
        return float(np.median(self.high - self.low))


def search(
    curve: Curve,
    tau: float,
    images: int,
    searches: int,
    *,
    tolerance: float = 1.2,
    confidence: float = 0.9,
    max_runs: int = 40,
    seed: int = 0,
    on_run: Callable[[int, int, int], object] = lambda *run: None,
) -> Found:
    """Simulate that many searches; `on_run` is told of each run: its search, |D| and memorized images."""
    rng = np.random.default_rng(seed)
    sizes, counts = np.zeros((searches, max_runs)), np.zeros((searches, max_runs))
    low, high, runs = np.zeros(searches), np.zeros(searches), np.zeros(searches, dtype=int)
    active = np.arange(searches)
    for n in range(max_runs + 1):
        size, k = sizes[active, :n], counts[active, :n]
        fitted = fit_together(size, k, np.full(k.shape, images), LEVEL) if n else None
        if n >= MIN_RUNS:
            ends = fitted.interval(confidence)
            over = (ends[1] - ends[0] <= math.log(tolerance)) | (n == max_runs)
            low[active[over]], high[active[over]], runs[active[over]] = ends[0][over], ends[1][over], n
        else:
            over = np.zeros(len(active), dtype=bool)
        going = np.flatnonzero(~over)
        if not going.size:
            break
        for j in going:
            known = [(int(s), m, images) for s, m in zip(size[j], k[j])]
            row = fitted.row(int(j)) if n else None
            (sizes[active[j], n],) = next_sizes(known, curve.low, curve.high, level=LEVEL, images=images, fitted=row)
        active = active[going]
        p = expit(curve.logits(sizes[active, n]) + tau * rng.normal(size=len(active)))
        counts[active, n] = rng.binomial(images, p)
        for j in active:
            on_run(int(j), int(sizes[j, n]), int(counts[j, n]))
    return Found(low, high, runs, sizes.sum(axis=1).astype(int))


def grid(
    curve: Curve, tau: float, images: int, length: float, confidence: float = 0.9, studies: int = 40
) -> tuple[int, int]:
    """Runs per size that a grid needs, and |D| summed over all its runs."""
    sizes = curve.low * 2.0 ** np.arange(round(math.log2(curve.high / curve.low)) + 1)
    rng = np.random.default_rng(0)
    for runs in range(2, 100):
        size = np.repeat(sizes, runs)
        k = rng.binomial(images, expit(curve.logits(size) + tau * rng.normal(size=(studies, len(size)))))
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
@click.option("--other-curves", help="Other crossings, slopes and ranges instead", is_flag=True)
def main(
    searches: int,
    images: tuple[int, ...],
    tolerance: float,
    confidence: float,
    max_runs: int,
    taus: tuple[float, ...],
    other_curves: bool,
) -> None:
    """Print how often the interval of a search holds EMM, its runs, and its training images beside those of a grid."""
    click.echo(
        "| range and curve | images | tau | covers % | median length | runs | images of the grid's | grid: runs |"
    )
    click.echo("| --- " * 8 + "|")
    for curve in OTHERS if other_curves else CURVES:
        for n in images:
            for tau in taus or (0, 0.1, 0.2, 0.3, 0.5):
                options = dict(tolerance=tolerance, confidence=confidence, max_runs=max_runs)
                found = search(curve, tau, n, searches, **options)
                runs, whole = grid(curve, tau, n, found.length(), confidence)
                click.echo(
                    f"| {curve} | {n} | {tau:g} | {100 * found.covers(curve.truth(tau)):.1f} | {found.length():.3f} | "
                    f"{found.runs.mean():.1f} | {100 * found.images.mean() / whole:.0f} % | {runs} |"
                )


if __name__ == "__main__":
    main()
