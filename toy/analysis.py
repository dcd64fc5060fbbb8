"""What a two-moons study says: when groups are memorized, whether outliers come later, and two uses of that."""

from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from scipy.stats import rankdata

from memorization.stats.timing import (
    Answer,
    RiseFits,
    Timing,
    above_zero,
    pooled_shares,
    sign_flips,
    timing_test,
)  # fmt: skip
from toy.data import DUPLICATE, GROUPS, INLIER, OUTLIER
from toy.measure import neighbour_distance
from toy.study import Curves, Result, share

_FINAL = 0.1  # share of the evaluations, at the end, whose mean is the final value
_REPLICATES = 10_000  # of the bootstrap
_FEWEST = 4  # evaluations from the first one at which both groups are at chance; fewer show no rise
_FITS = 500  # of the bootstrap of fitted curves


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
    total = result.memorized[repeat].sum(axis=1) / result.generated
    distance = result.distance[repeat]
    return EarlyStop(
        epoch=int(result.epochs[at]) if len(above) else None,
        memorized=float(total[at]), memorized_end=float(total[-1]),
        distance=float(distance[at]), distance_end=float(distance[-1]), distance_best=float(distance.min()),
    )  # fmt: skip


def timings(curves: Curves) -> dict[str, Timing]:
    """When duplicates and outliers are memorized against inliers; see `memorization.stats.timing`.

    By shares, and outliers without held-out ones by counts, for then every point near the cluster is memorized by
    chance. By shares a group that does not end beyond chance, by more than 2 standard errors over repeats, has not
    risen, and evaluations count from the first one at which both groups have come up to chance: what a share rises
    below that is no memorization.
    """
    flips = sign_flips(curves.repeats)
    groups = {g: (curves.memorized[:, :, g], curves.nearest[:, :, g]) for g in range(len(GROUPS))}
    chance = {g: (curves.chance[:, g], curves.chance_nearest[:, g]) for g in range(len(GROUPS))}
    return {
        GROUPS[g]: _timing(curves.epochs, groups[g], groups[INLIER], chance[g], chance[INLIER], flips, shares)
        for g, shares in _questions(curves)
    }


def false_positives(result: Result) -> dict[str, Counter[Answer]]:
    """How often each answer is given when inliers stand for duplicates and for outliers, of `RELABELINGS` drawings.

    The answers "later" and "earlier" are wrong there. The other inliers are the reference, in the same networks.
    """
    flips = sign_flips(len(result.data))
    chance = result.chance[:, INLIER], result.chance_nearest[:, INLIER]
    inliers = np.stack([result.memorized[:, :, INLIER], result.nearest[:, :, INLIER]], axis=-1)  # [R, E, 2]
    found = {}
    for i, (g, shares) in enumerate(_questions(result.curves())):
        answers: Counter[Answer] = Counter()
        for k in range(result.relabeled.shape[3]):
            drawn = result.relabeled[:, :, i, k]
            group, others = (tuple(np.moveaxis(counts, -1, 0)) for counts in (drawn, inliers - drawn))
            answers[_timing(result.epochs, group, others, chance, chance, flips, shares).answer] += 1
        found[GROUPS[g]] = answers
    return found


def _questions(curves: Curves) -> list[tuple[int, bool]]:
    """The groups that are compared with inliers, in the order of `Result.relabeled`, and whether by shares."""
    return [(DUPLICATE, True), (OUTLIER, curves.in_shares)]


_Counts = tuple[np.ndarray, np.ndarray]  # memorized and all points near a group


def _timing(
    epochs: np.ndarray, group: _Counts, reference: _Counts, chance: _Counts, reference_chance: _Counts,
    flips: np.ndarray, shares: bool,
) -> Timing:  # fmt: skip
    """`timing_test` of counts [R, E] with chance counts [R]."""
    if not shares:
        return timing_test(epochs, (group[0], None), (reference[0], None), flips)
    if not group[1].any():
        return Timing("none")
    if not _beyond_chance(reference, reference_chance):
        return Timing("reference not risen")
    if not _beyond_chance(group, chance):
        return Timing("not risen")
    reached = _up_to_chance(group, chance) & _up_to_chance(reference, reference_chance)
    first = int(reached.argmax())
    if len(reached) - first < _FEWEST:
        return Timing("not risen")
    group, reference = (tuple(counts[:, first:] for counts in part) for part in (group, reference))
    return timing_test(epochs[first:], group, reference, flips)


def _up_to_chance(counts: _Counts, chance: _Counts) -> np.ndarray:
    """At which evaluations the pooled share has come up to that of fresh draws, bool [E].

    Points that a network draws far from all data are memorized more rarely than by chance, since both distances are
    alike; what the share rises until it has learned where the data are is no memorization.
    """
    shares = pooled_shares(*counts).mean(axis=0)
    return shares >= chance[0].sum() / max(chance[1].sum(), 1)


def _beyond_chance(counts: _Counts, chance: _Counts) -> bool:
    """Whether the share of the last tenth of the evaluations is above that of fresh draws, over repeats."""
    end = [np.stack([_final(row).sum() for row in part])[:, None] for part in counts]
    over = pooled_shares(*end) - pooled_shares(*(part[:, None] for part in chance))
    return above_zero(over[:, 0])


def half_of_rise(epochs: np.ndarray, memorized: np.ndarray, nearest: np.ndarray | None) -> tuple[float, float, float]:
    """Epoch of half the rise of the curve pooled over repeats, with its percentile bootstrap interval over repeats.

    By the fit of `memorization.stats.timing`: nearer to the truth than where a noisy curve first crosses a level,
    which is early in small groups. NaN if there is nothing, infinite if it falls.

    Parameters
    ----------
    epochs : [E]
    memorized, nearest : counts [R, E]; the curve is their share, or without the latter the count
    """
    if not memorized.any():
        return (float("nan"),) * 3
    curves = memorized.astype(float) if nearest is None else pooled_shares(memorized, nearest)
    fits = RiseFits(epochs, np.ones(len(epochs)) if nearest is None else nearest.mean(axis=0))
    repeats = len(curves)
    draws = np.random.default_rng(0).multinomial(repeats, np.full(repeats, 1 / repeats), size=_FITS) / repeats
    halves = np.array([fit.half for fit in fits.best(np.concatenate([curves.mean(axis=0)[None], draws @ curves]))])
    low, high = np.quantile(halves[1:], [0.025, 0.975], method="inverted_cdf")
    return float(halves[0]), float(low), float(high)


def _never_memorized(result: Result, group: int) -> float:
    """Share of the training points of a group that no evaluation found memorized, mean over repeats."""
    first = np.concatenate([first[data.group == group] for first, data in zip(result.first, result.data)])
    return float(np.mean(first == 0)) if len(first) else float("nan")


def summarize(result: Result) -> dict[str, Any]:
    """All answers of a study, JSON-ready; None stands for what is not defined.

    With held-out outliers "published" holds those of the same networks without them.
    """
    curves, last = result.curves(), result.memorized[:, -1]  # [R, 3]
    by_group = {}
    for g, name in enumerate(GROUPS):
        by_group[name] = dict(
            training_points=result.data[0].sizes()[g],
            points=result.data[0].originals()[g],
            fraction=curves.fraction(last)[:, g].mean(),
            per_point=curves.per_point(last)[:, g].mean(),
            chance_per_point=curves.per_point(result.chance)[:, g].mean(),
            share=share(last.sum(axis=0), result.nearest[:, -1].sum(axis=0))[g],
            chance_share=share(result.chance.sum(axis=0), result.chance_nearest.sum(axis=0))[g],
            optimum_share=share(result.optimum.sum(axis=0), result.optimum_nearest.sum(axis=0))[g],
            optimum_per_point=curves.per_point(result.optimum)[:, g].mean(),
            never_memorized=_never_memorized(result, g),
            half=half_of_rise(result.epochs, result.memorized[:, :, g], result.nearest[:, :, g]),
            half_count=half_of_rise(result.epochs, result.memorized[:, :, g], None),
        )  # fmt: skip
    detected = detection(result)
    undefined = max(int(np.isnan(values).sum()) for values in detected.values())
    stops = [early_stop(result, r) for r in range(len(result.data))]
    stopped = [stop.epoch for stop in stops if stop.epoch is not None]
    return _plain(dict(
        repeats=len(result.data), epochs=result.epochs[-1], generated=result.generated,
        memorized=curves.fraction(last.sum(axis=1)).mean(), groups=by_group,
        outliers_by="share" if curves.in_shares else "count",
        timing={name: asdict(timing) for name, timing in timings(curves).items()},
        false_positives=false_positives(result),
        auroc={name: median_interval(values) for name, values in detected.items()},
        early_stop=dict(
            repeats_stopped=len(stopped), epoch=np.median(stopped) if stopped else None,
            **{key: np.mean([getattr(stop, key) for stop in stops])
               for key in ("memorized", "memorized_end", "distance", "distance_end", "distance_best")},
        ),
        left_out={"repeats without an AUROC": undefined} if undefined else {},
        **({} if result.published is None else dict(published=summarize(result.published))),
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
