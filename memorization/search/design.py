"""Which training-set sizes to train next, so that few training images tell where R_mem falls below the level.

The first run is in the middle of the range in log |D|. From its ratio, and the slope that curves usually have, the next
one follows a little beyond where EMM seems to be, until EMM is bracketed within a factor of two. Then the runs so far
are fitted (`memorization.stats.crossing`), and the next run goes to the size that adds most to the precision of EMM
(1 / variance, averaged over where the crossing may lie) per training image, as if the information of one run there were
added: a greedy step of a c-optimal design with costs. Precision and not its logarithm, since it is precision that the
search has to gather: the logarithm prefers cheap runs far from EMM for their share in a variance that is still large.
A size may come again, with another seed. The search is over when the interval is as narrow as asked for.

References
----------
Chaloner & Larntz, "Optimal Bayesian design applied to logistic regression experiments", J. Stat. Plan. Inf. 21, 1989.
Wu, "Efficient sequential designs with binary data", JASA 80, 1985.
"""

import math
from collections.abc import Mapping, Sequence

import numpy as np
from scipy.special import expit, logit

from memorization.stats.crossing import TAUS, Crossing, fit_crossing

MIN_RUNS = 8  # fewer say too little of the spread between seeds to stop on it
_NO_SPREAD = 0.1  # prior mass of tau = 0, beside a density of one for any other tau
_SLOPE, _SLOPE_SD = -3.0, 1.0  # of logit R_mem over log |D|; helps to choose sizes, and has no part in the interval
_TAU, _OMEGA = 0.1, 0.06  # spread and departure that a choice of sizes reckons with at least
_BRACKET = 2.0  # quotient of sizes down to which EMM is bracketed before the fit chooses
_BEYOND = 1.3  # quotient by which the next size lies at least beyond the known side


def bracket(above: Mapping[int, bool]) -> tuple[int | None, int | None]:
    """The largest size at or above the level, and the next larger one below it; None where there is none."""
    low = max((size for size, is_above in above.items() if is_above), default=None)
    high = min((size for size, is_above in above.items() if not is_above and (low is None or size > low)), default=None)
    return low, high


def next_sizes(
    runs: Sequence[tuple[int, float, int]],
    low: int,
    high: int,
    *,
    level: float = 0.9,
    images: int = 10_000,
    count: int = 1,
    fitted: Crossing | None = None,
) -> list[int]:
    """Sizes of the next `count` runs, ascending; some may be equal.

    Parameters
    ----------
    runs : |D|, memorized and all images of each finished run.
    low, high : range in which EMM is looked for.
    level : 1 - epsilon.
    images : that a run will be measured with.
    count : runs to choose at once.
    fitted : fit of `runs`, if it is at hand.
    """
    a, b = bracket(sides(runs, level))
    first = _first_sizes(runs, a, b, low, high, level, count)
    if first:
        return first
    if a is None or b is None:  # is EMM outside? One run does not tell.
        return [low if a is None else high] * count
    return _most_telling(fitted or fit(runs, level), runs, candidates(low, high), level, images, count)


def sides(runs: Sequence[tuple[int, float, int]], level: float) -> dict[int, bool]:
    """For each size whether the mean ratio of its runs is at or above the level."""
    ratios: dict[int, list[float]] = {}
    for size, memorized, samples in runs:
        ratios.setdefault(size, []).append(memorized / samples)
    return {size: float(np.mean(found)) >= level for size, found in ratios.items()}


def fit(runs: Sequence[tuple[int, float, int]], level: float) -> Crossing:
    """The crossing of the runs of a search."""
    return fit_together(*np.array(runs, dtype=np.float64).T, level)


def fit_together(sizes: np.ndarray, memorized: np.ndarray, samples: np.ndarray, level: float) -> Crossing:
    """The same of several searches: |D|, memorized and all images of each run, [N], or [B, N] of B searches.

    The prior of the spread between seeds is flat, since runs that end where it looks small make it look too small, but
    for some mass at no spread, without which an interval of few runs is too wide there (docs/search.md).
    """
    width = np.gradient(TAUS)
    prior = np.log(np.where(TAUS == 0, _NO_SPREAD, width) / width)
    return fit_crossing(sizes, memorized, samples, level, tau_scale=math.inf, log_prior=prior)


def grid_of_same_precision(
    emm: float, slope: float, tau: float, low: int, high: int, *, level: float, images: int, sd: float
) -> tuple[list[int], int]:
    """A grid of sizes, each twice the one before, and the runs per size that it needs for the same precision.

    Parameters
    ----------
    emm, slope, tau : of the fitted curve: where it crosses, its slope in log |D| there, the spread between seeds.
    low, high : range of the grid.
    images : per run.
    sd : standard deviation of log EMM to be reached.
    """
    steps = max(math.ceil(math.log2(high / low) - 1e-9), 1)
    sizes = [round(low * (high / low) ** (i / steps)) for i in range(steps + 1)]
    x = np.log(sizes) - math.log(emm)
    eta = logit(level) + slope * x
    w = 1 / (1 / (images * expit(eta) * expit(-eta)) + tau**2)
    one = (w * x**2).sum() / (w.sum() * (w * x**2).sum() - (w * x).sum() ** 2) / slope**2
    return sizes, max(math.ceil(one / sd**2), 2)  # at least two, or nothing is known of the seeds


def candidates(low: int, high: int) -> np.ndarray:
    """Sizes that a search tries: from `low` to `high`, about a tenth apart."""
    steps = max(math.ceil(math.log(high / low) / math.log(1.1)), 1)
    return np.unique(np.rint(low * (high / low) ** (np.arange(steps + 1) / steps)).astype(int))


def _first_sizes(
    runs: Sequence[tuple[int, float, int]], a: int | None, b: int | None, low: int, high: int, level: float, count: int
) -> list[int]:
    """Sizes of the first part of the search; [] when EMM is bracketed within `_BRACKET`, or an end was passed.

    One run tells, with the usual slope, about where EMM is; the next lies a little beyond, and at most halfway to the
    end of the range, which costs most and says least where it is far off.
    """
    if a is None and b is None:
        return _between(low, high, count)
    if a is not None and b is not None:
        return [] if b <= a * _BRACKET else _between(a, b, count)
    end, known = (low, b) if a is None else (high, a)
    if (a is None and b <= low) or (b is None and a >= high):
        return []
    if count > 1:
        return sorted({end, *_between(*sorted((known, end)), count - 1)})
    ratio = np.mean([(k + 0.5) / (n + 1) for size, k, n in runs if size == known])
    way = abs(math.log(end / known))  # to the end of the range
    guess = abs(logit(level) - logit(ratio)) / -_SLOPE  # to where the usual curve crosses
    step = max(guess, math.log(_BEYOND))
    if step > way / 2:
        step = way / 2 if way > math.log(_BRACKET) else way
    size = round(known * math.exp(math.copysign(step, end - known)))
    return [size if low < size < high and size != known else end]


def _between(low: int, high: int, count: int) -> list[int]:
    """At most `count` whole numbers strictly between, equally far apart in log; `low` where there is none."""
    spaced = (low * (high / low) ** (i / (count + 1)) for i in range(1, count + 1))
    return sorted({min(max(round(size), low + 1), high - 1) for size in spaced}) if high - low > 1 else [low]


def _most_telling(
    fitted: Crossing, runs: Sequence[tuple[int, float, int]], sizes: np.ndarray, level: float, images: int, count: int
) -> list[int]:
    """Greedy choice by the variance of the crossing per training image; see the module."""
    bar, centre = logit(level), fitted.log_sizes.mean()
    weight = np.exp(fitted.log_weight[0])
    tau = max(float(weight @ fitted.tau), _TAU)
    a, b = weight @ fitted.beta[0]
    b = (b / 0.25 + _SLOPE / _SLOPE_SD**2) / (1 / 0.25 + 1 / _SLOPE_SD**2) if b > -1 else b
    x = np.log(sizes) - centre
    below = np.maximum.accumulate(fitted.below(np.log(sizes)))
    crossings = np.interp([0.1, 0.5, 0.9], below + 1e-9 * np.arange(len(sizes)), x)

    def information(at: np.ndarray, n: np.ndarray | float) -> np.ndarray:
        """Of a run, about the curve there: [len(crossings), len(at)]."""
        eta = bar + b * (at - crossings[:, None])
        d = expit(eta) * expit(-eta)
        return 1 / (1 / (n * d) + tau**2 + (_OMEGA * (eta - bar)) ** 2)

    size, _, samples = np.array(runs, dtype=np.float64).T
    known = np.log(size) - centre
    w = information(known, samples)
    moments = np.stack([w.sum(1), (w * known).sum(1), (w * known**2).sum(1) + 1 / _SLOPE_SD**2])  # [3, crossings]

    def variance(s0: np.ndarray, s1: np.ndarray, s2: np.ndarray) -> np.ndarray:
        c = crossings if s0.ndim == 1 else crossings[:, None]
        return (s2 - 2 * c * s1 + c**2 * s0) / (s0 * s2 - s1**2)

    chosen, w_new = [], information(x, images)
    for _ in range(count):
        now = variance(*moments)
        then = variance(*(m[:, None] + w_new * x**i for i, m in enumerate(moments)))
        gain = (1 / then - 1 / now[:, None]).mean(axis=0) / sizes
        best = int(gain.argmax())
        chosen.append(int(sizes[best]))
        moments = moments + w_new[:, best] * np.stack([np.full(len(crossings), x[best] ** i) for i in range(3)])
    return sorted(chosen)
