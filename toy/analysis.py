"""What a two-moons study says: when groups are memorized, whether outliers come later, and two uses of that."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.stats import rankdata

from toy.data import DUPLICATE, GROUPS, INLIER, OUTLIER
from toy.measure import neighbour_distance
from toy.study import Result, share

_FINAL = 0.1  # share of the evaluations, at the end, whose mean is the final value
_REPLICATES = 10_000  # of bootstrap and random sign flips
_EXACT = 16  # repeats up to which all sign flips are tried


def half_epoch(epochs: np.ndarray, curve: np.ndarray, floor: float = 0.0, least: float = 0.0) -> float:
    """Epoch at which a curve has first come half of the way from `floor` to its final value.

    Between evaluations the curve is taken as straight, and before the first one as unknown: what is there already
    counts at the first evaluation. The final value is the mean of the last tenth of the evaluations.

    Parameters
    ----------
    epochs, curve : [E], ascending epochs and values there
    least : final value from which on the curve counts as risen

    Returns
    -------
    float; infinite if the final value is not above `floor` and `least`
    """
    final = _final(curve).mean()
    if not final > max(floor, least):
        return float("inf")
    target = floor + (final - floor) / 2
    i = int(np.argmax(curve >= target))
    if i == 0:
        return float(epochs[0])
    step = (target - curve[i - 1]) / (curve[i] - curve[i - 1])
    return float(epochs[i - 1] + step * (epochs[i] - epochs[i - 1]))


def _final(values: np.ndarray) -> np.ndarray:
    """The last tenth of the evaluations, at least one; [E] -> [last]."""
    return values[-max(1, round(_FINAL * len(values))) :]


def median_interval(values: np.ndarray, confidence: float = 0.95) -> tuple[float, float, float]:
    """Median of one number per repeat, with its percentile bootstrap interval over repeats; NaN ones are left out."""
    values = values[~np.isnan(values)]
    if not len(values):
        return (float("nan"),) * 3
    draws = np.random.default_rng(0).choice(values, size=[_REPLICATES, len(values)])
    tail = (1 - confidence) / 2
    low, high = np.quantile(_median(draws, axis=1), [tail, 1 - tail], method="inverted_cdf")
    return float(_median(values, axis=0)), float(low), float(high)


def _median(values: np.ndarray, axis: int) -> np.ndarray:
    """The median; the lower one of two, so that infinite values are never averaged."""
    return np.quantile(values, 0.5, axis=axis, method="inverted_cdf")


def sign_flip_test(differences: np.ndarray) -> float:
    """One-sided p-value of "the mean difference is above 0", paired over repeats.

    If the two members of each pair could be exchanged, each difference would as likely have the other sign. The
    p-value is the share of sign patterns with a mean at least as large: of all of them up to 16 repeats, of 10,000
    random ones and the observed one beyond. The smallest possible value is 1 / 2^repeats. NaN ones are left out.
    """
    differences = differences[~np.isnan(differences)]
    count = len(differences)
    if not count:
        return float("nan")
    if count <= _EXACT:
        signs = 1 - 2 * ((np.arange(2**count)[:, None] >> np.arange(count)) & 1)
    else:
        signs = np.random.default_rng(0).choice([-1, 1], size=[_REPLICATES, count])
        signs = np.concatenate([signs, np.ones([1, count], dtype=int)])
    means = signs @ differences
    return float(np.mean(means >= differences.sum() - 1e-12 * np.abs(differences).sum()))


def auroc(scores: np.ndarray, positive: np.ndarray) -> float:
    """Probability that a positive has a higher score than a negative, ties counted half; NaN without one of the two."""
    positives = int(positive.sum())
    negatives = len(positive) - positives
    if not positives or not negatives:
        return float("nan")
    return float((rankdata(scores)[positive].sum() - positives * (positives + 1) / 2) / (positives * negatives))


def detection(result: Result) -> dict[str, np.ndarray]:
    """AUROC of two detectors of outliers, float64 [R] each.

    "first epoch" ranks training points by the epoch of their first memorization, never as the latest; "distance" by the
    distance of the 10th nearest training point.
    """
    rows = {"first epoch": [], "distance": []}
    for data, first in zip(result.data, result.first):
        outlier = data.group == OUTLIER
        rows["first epoch"].append(auroc(np.where(first == 0, np.inf, first), outlier))
        rows["distance"].append(auroc(neighbour_distance(data.train), outlier))
    return {name: np.array(values) for name, values in rows.items()}


@dataclass(frozen=True)
class EarlyStop:
    """What comes of ending the training of one repeat when known outliers begin to be memorized."""

    epoch: int | None  # None: they never are
    memorized: float  # fraction of all generated points that are memorized, there (or at the end)
    memorized_end: float  # and at the end
    distance: float  # distance to the true distribution, there
    distance_end: float  # at the end
    distance_best: float  # at the best epoch


def early_stop(result: Result, repeat: int) -> EarlyStop:
    """Stop at the first evaluation at which outliers are memorized significantly more often than by chance.

    That is by more than 3 standard deviations of a binomial count, among the points generated near outliers. Without
    held-out outliers in the test set all of them are memorized by chance, and this never happens.
    """
    chance = share(result.chance.sum(axis=0), result.chance_nearest.sum(axis=0))[OUTLIER]
    near = result.nearest[repeat, :, OUTLIER]
    deviation = np.sqrt(near * chance * (1 - chance))
    above = np.flatnonzero(result.memorized[repeat, :, OUTLIER] > near * chance + 3 * deviation)
    at = int(above[0]) if len(above) else -1
    total = result.fraction(result.memorized[repeat].sum(axis=1))
    distance = result.distance[repeat]
    return EarlyStop(
        epoch=int(result.epochs[at]) if len(above) else None,
        memorized=float(total[at]), memorized_end=float(total[-1]),
        distance=float(distance[at]), distance_end=float(distance[-1]), distance_best=float(distance.min()),
    )  # fmt: skip


def half_epochs(result: Result, above_chance: bool) -> np.ndarray:
    """`half_epoch` of each repeat and group, float64 [R, 3]; NaN where it means nothing.

    Of memorized points, from 0 on; or with `above_chance` of the share of memorized points among those generated near
    the group, from the share that fresh draws have (over all repeats): how often a group is generated then plays no
    part. The share counts as risen if it ends more than 2 standard deviations of a binomial share above chance. Where
    chance is 100 %, as for outliers without held-out ones, nothing can rise.
    """
    found = np.full(result.chance.shape, np.nan)
    chance = share(result.chance.sum(axis=0), result.chance_nearest.sum(axis=0))  # [3]
    for r, g in np.ndindex(found.shape):
        memorized, nearest = result.memorized[r, :, g], result.nearest[r, :, g]
        if not result.data[r].sizes()[g]:
            continue
        if not above_chance:
            found[r, g] = half_epoch(result.epochs, memorized.astype(float))
        elif chance[g] < 1:
            deviation = np.sqrt(chance[g] * (1 - chance[g]) / max(_final(nearest).sum(), 1))
            curve = share(memorized, nearest)
            found[r, g] = half_epoch(result.epochs, curve, chance[g], chance[g] + 2 * deviation)
    return found


def _never_memorized(result: Result, group: int) -> float:
    """Share of the training points of a group that no evaluation found memorized, mean over repeats."""
    first = np.concatenate([first[data.group == group] for first, data in zip(result.first, result.data)])
    return float(np.mean(first == 0)) if len(first) else float("nan")


def summarize(result: Result) -> dict[str, Any]:
    """All answers of a study, JSON-ready; None stands for what is not defined."""
    last = result.memorized[:, -1]  # [R, 3]
    by_group = {}
    halves = {name: half_epochs(result, above) for name, above in (("half", False), ("half_above_chance", True))}
    for g, name in enumerate(GROUPS):
        by_group[name] = dict(
            training_points=result.data[0].sizes()[g],
            points=result.data[0].originals()[g],
            fraction=result.fraction(last)[:, g].mean(),
            per_point=result.per_point(last)[:, g].mean(),
            chance_per_point=result.per_point(result.chance)[:, g].mean(),
            share=share(last.sum(axis=0), result.nearest[:, -1].sum(axis=0))[g],
            chance_share=share(result.chance.sum(axis=0), result.chance_nearest.sum(axis=0))[g],
            optimum_share=share(result.optimum.sum(axis=0), result.optimum_nearest.sum(axis=0))[g],
            optimum_per_point=result.per_point(result.optimum)[:, g].mean(),
            never_memorized=_never_memorized(result, g),
            **{key: median_interval(values[:, g]) for key, values in halves.items()},
        )  # fmt: skip
    censored = {key: np.minimum(values, result.epochs[-1]) for key, values in halves.items()}  # "never yet": at least
    tests = {
        key: dict(
            outliers_later=sign_flip_test(values[:, OUTLIER] - values[:, INLIER]),
            duplicates_earlier=sign_flip_test(values[:, INLIER] - values[:, DUPLICATE]),
        )
        for key, values in censored.items()
    }
    stops = [early_stop(result, r) for r in range(len(result.data))]
    stopped = [stop.epoch for stop in stops if stop.epoch is not None]
    return _plain(dict(
        repeats=len(result.data), epochs=result.epochs[-1], generated=result.generated,
        memorized=result.fraction(last.sum(axis=1)).mean(), groups=by_group, p_values=tests,
        auroc={name: median_interval(values) for name, values in detection(result).items()},
        early_stop=dict(
            repeats_stopped=len(stopped), epoch=np.median(stopped) if stopped else None,
            **{key: np.mean([getattr(stop, key) for stop in stops])
               for key in ("memorized", "memorized_end", "distance", "distance_end", "distance_best")},
        ),
    ))  # fmt: skip


def _plain(value: Any) -> Any:
    """numpy numbers as Python's; NaN as None, infinite as "inf"."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not np.isfinite(value):
        return None if np.isnan(value) else "inf"
    return value
