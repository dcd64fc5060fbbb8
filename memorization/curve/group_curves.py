"""Memorization by group of training images over the training of runs: who is memorized first, who last?

Beside a group's curve stand what counts as a copy by chance (`memorization.measure.held_out`), and the copies that the
optimum of the training set makes, which replays nothing but training images.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from memorization.measure.controls import find_optimum
from memorization.records import images_seen, jsonl_path
from memorization.runs import LOG, Run, by_settings
from memorization.stats.intervals import poisson_interval, ratio_interval, wilson_interval
from memorization.stats.timing import Answer, RiseFits, Timing, strata_test

_Z = 1.959964  # two-sided 95 % quantile of a normal number
FEWEST_SEEDS = 3  # from here on an interval is over training seeds
_COUNTS = ("num_memorized", "num_nearest", "num_replayed", "num_training")
_CONTROL = ("num_within", "held_images", "held_counted", "held_copied")


@dataclass(frozen=True)
class GroupPoint:
    """One group at one snapshot, or by the optimum (kimg and epochs are infinite)."""

    kimg: float
    epochs: float
    num_memorized: int  # generated images that copy a training image of the group
    num_nearest: int  # generated images whose nearest training image is in the group
    num_replayed: int  # training images of the group that were copied
    num_training: int  # training images of the group
    num_samples: int  # generated images
    total: int  # training images of all groups
    # Of `memorization.measure.held_out`, where it was measured:
    num_within: int | None = None  # copies no further from their image than the criterion allows for an inlier
    held_images: int | None = None  # held-out images of the group
    held_counted: int | None = None  # copies of these
    held_copied: int | None = None  # those with one at least
    radius: tuple[float, float, float] | None = None  # of its training images: median, smallest, largest
    held_radius: float | None = None  # of its held-out images: median

    @property
    def share(self) -> float:
        """Copies per training image of the group, over generated images per training image of all groups.

        It compares groups of different size: 1 for all groups when every generated image is a copy and every
        training image is copied equally often, 2 for a group that is copied twice as often as that.
        """
        return self._scale(self.num_memorized / self.num_samples)

    @property
    def interval(self) -> tuple[float, float]:
        """95 % interval of the share: Wilson's of num_memorized / num_samples."""
        low, high = wilson_interval(self.num_memorized, self.num_samples)
        return self._scale(low), self._scale(high)

    @property
    def ratio(self) -> float:
        """Memorized images among those nearest to the group; NaN if there are none."""
        return self.num_memorized / self.num_nearest if self.num_nearest else float("nan")

    @property
    def copied(self) -> float:
        """Fraction of the training images of the group that are copied at least once."""
        return self.num_replayed / self.num_training

    @property
    def held_share(self) -> float | None:
        """The share, of held-out images of the group: what counts as copied by chance. None: not measured."""
        return self._held(self.held_counted)

    @property
    def held_interval(self) -> tuple[float, float] | None:
        """Its 95 % interval, of a Poisson count."""
        if self.held_share is None:
            return None
        low, high = poisson_interval(self.held_counted)
        return self._held(low), self._held(high)

    def _scale(self, fraction: float) -> float:
        return fraction * self.total / self.num_training

    def _held(self, count: float | None) -> float | None:
        return None if not self.held_images else count / self.num_samples * self.total / self.held_images


Curves = dict[str, list[GroupPoint]]  # group -> its points in the order of training


@dataclass(frozen=True)
class GroupRun:
    """The groups of a measured run."""

    size: int  # |D|, copies of training images included
    curves: Curves
    optimum: dict[str, GroupPoint] = field(default_factory=dict)  # by group; empty: not measured

    @property
    def epochs(self) -> float:
        """When it was measured last."""
        return next(iter(self.curves.values()))[-1].epochs


@dataclass(frozen=True)
class Estimate:
    """A number with its 95 % interval."""

    value: float
    low: float
    high: float
    over: str  # "seeds" or "images": what the interval knows of


# ----------------------------------------------------------------------------
# From records.


def group_records(run: Run) -> list[dict[str, Any]]:
    """The records of a run that `group_run` is made of, in the order of training.

    Of several ways in which the snapshots were measured (seeds, reference, ...) the one with the most snapshots
    counts, of equal ones the last; of several records at one time (one snapshot under two names) the last.

    Raises
    ------
    ValueError
        If the run was not measured against a reference with groups.
    """
    ways = by_settings(r for r in run.records if r.get("groups") and r.get("kimg") is not None)
    if not ways:
        raise ValueError(
            f'"{jsonl_path(run.path / LOG)}" has no groups; make the set with dataset_utils/dataset_inject.py and '
            "measure the run with it."
        )
    by_time = [{record["kimg"]: record for record in way} for way in ways]
    return [record for _, record in sorted(max(reversed(by_time), key=len).items())]


def group_run(run: Run) -> GroupRun:
    """The groups of a measured run.

    Raises
    ------
    ValueError
        As of `group_records`, or if records lack their counts.
    """
    records = group_records(run)
    curves: Curves = {}
    try:
        for record in records:
            for name, point in _points(record, record["kimg"], images_seen(record) / run.size).items():
                curves.setdefault(name, []).append(point)
        best = find_optimum(run, records[-1])
        return GroupRun(run.size, curves, {} if best is None else _points(best, float("inf"), float("inf")))
    except (KeyError, TypeError, AttributeError, IndexError, ZeroDivisionError):
        path = jsonl_path(run.path / LOG)
        raise ValueError(f'"{path}" has groups without their counts; measure the run again.') from None


def _points(record: dict[str, Any], kimg: float, epochs: float) -> dict[str, GroupPoint]:
    """The groups of one record."""
    total = sum(row["num_training"] for row in record["groups"].values())
    control = record.get("held_out")
    points = {}
    for name, row in record["groups"].items():
        more: dict[str, Any] = {}
        if control:
            own, held = control["training"][name], control["groups"].get(name)
            more = {"num_within": own["num_within"], "radius": tuple(own["radius"])}
            if held is not None:
                more |= {f"held_{key}": held[f"num_{key}"] for key in ("images", "counted", "copied")}
                more["held_radius"] = held["radius"][0]
        counts = {key: row[key] for key in _COUNTS}
        point = GroupPoint(kimg, epochs, **counts, num_samples=record["num_samples"], total=total, **more)
        _ = point.interval, point.held_interval  # refuses counts that are none
        points[name] = point
    return points


def other_measurements(run: Run) -> int:
    """How many records of a run `group_run` leaves out."""
    return len(run.records) - len(group_records(run))


# ----------------------------------------------------------------------------
# Several runs.


def by_size(runs: Iterable[GroupRun]) -> dict[int, list[GroupRun]]:
    """The runs of each |D|, ascending."""
    found: dict[int, list[GroupRun]] = {}
    for run in sorted(runs, key=lambda run: run.size):
        found.setdefault(run.size, []).append(run)
    return found


def at_common_snapshots(runs: Sequence[GroupRun]) -> tuple[list[GroupRun], int]:
    """The runs with those snapshots alone that all runs of their |D| have, and how many that leaves out.

    A run that was interrupted has one more, of the moment at which it was. Runs that do not end at the same snapshot
    stay as they are, for `pooled` to refuse: the end is what is told of them.
    """
    found, left_out = [], 0
    for some in by_size(runs).values():
        times = [{p.kimg for points in run.curves.values() for p in points} for run in some]
        together = len({max(own, default=0) for own in times}) == 1
        common = set.intersection(*times) if together else set.union(*times)
        left_out += sum(len(own - common) for own in times)
        for run in some:
            curves = {name: [p for p in points if p.kimg in common] for name, points in run.curves.items()}
            found.append(replace(run, curves=curves))
    return found, left_out


def pooled(runs: Sequence[GroupRun]) -> Curves:
    """The curves of several runs that differ in their seeds, as those of one: all counts are added.

    Raises
    ------
    ValueError
        If the runs have other groups, sizes or snapshots.
    """
    first = runs[0]
    shapes = [
        [(name, [(p.kimg, p.num_training) for p in points]) for name, points in sorted(run.curves.items())]
        for run in runs
    ]
    if any(shape != shapes[0] for shape in shapes[1:]):
        raise ValueError(
            f"Runs with |D| = {first.size} are drawn together if they have the same groups, of the same sizes, at the "
            "same snapshots; these have not."
        )
    return {
        name: [_sum([run.curves[name][i] for run in runs]) for i in range(len(points))]
        for name, points in first.curves.items()
    }


def _sum(points: Sequence[GroupPoint]) -> GroupPoint:
    sums: dict[str, Any] = {
        key: sum(getattr(p, key) for p in points) for key in (*_COUNTS, "num_samples", "total")
    }  # fmt: skip
    for key in _CONTROL:
        values = [getattr(p, key) for p in points]
        sums[key] = None if None in values else sum(values)
    return replace(points[0], **sums)


def share_over_seeds(points: Sequence[GroupPoint]) -> Estimate:
    """Share of a group at the same snapshot of several runs: over their seeds from 3 runs on, else of their images.

    The interval over seeds is Student's, of the logarithm. Runs are sampled from the same latents, as a rule, and copy
    in part the same training images from them; so the binomial error of the images of one run is added, as if all had
    it together.
    """
    whole = _sum(points)
    rates = np.array([p.num_memorized / p.num_samples for p in points])
    if len(points) < FEWEST_SEEDS or not rates.std() > 0:
        return Estimate(whole.share, *whole.interval, "images")
    factor = _factor(rates, _common_error(whole.num_memorized, whole.num_samples, len(points)))
    return Estimate(whole.share, whole.share / factor, whole.share * factor, "seeds")


def to_optimum(runs: Sequence[GroupRun], name: str) -> dict[str, Estimate] | None:
    """How much of what the optimum does the networks do at the end: `copies` per image, and images `copied`.

    Both are ratios of the networks' rate to that of the optimum of the same training set, generated from as many seeds.
    From 3 runs on the interval is Student's over seeds, of the logarithm, with the binomial error of the optimum's
    copies and, of copies, that of `share_over_seeds`; with fewer, or where runs do not differ or a count is 0,
    Koopman's score interval of the two counts, which knows of images only. Both take networks and optimum as
    independent, though they start from the same latents. None where the optimum of a run was not measured.
    """
    if not all(name in run.optimum for run in runs):
        return None
    ends, optima = [run.curves[name][-1] for run in runs], [run.optimum[name] for run in runs]
    if len(set(optima)) == 1:
        optima = optima[:1]  # of one training set: the same images
    end, optimum = _sum(ends), _sum(optima)
    counts = {
        "copies": [(p.num_memorized, p.num_samples) for p in (*ends, end, optimum)],
        "copied": [(p.num_replayed, p.num_training) for p in (*ends, end, optimum)],
    }
    common = _common_error(end.num_memorized, end.num_samples, len(runs))
    return {key: _relative(*pairs, common=common if key == "copies" else 0.0) for key, pairs in counts.items()}


def _relative(*pairs: tuple[int, int], common: float) -> Estimate:
    """(successes, n) of each run, of all together, and of the optimum -> the ratio of the last two.

    `common` is the relative variance of what the runs have in common.
    """
    *each, (k, n), (best, total) = pairs
    value = float("nan") if best == 0 else k / n / (best / total)
    rates = np.array([successes / size for successes, size in each])
    if len(each) < FEWEST_SEEDS or not rates.std() > 0 or 0 in (k, best):
        return Estimate(value, *ratio_interval(k, n, best, total), "images")
    factor = _factor(rates, common + (1 - best / total) / best)
    return Estimate(value, value / factor, value * factor, "seeds")


def _common_error(memorized: int, samples: int, runs: int) -> float:
    """Relative variance of a rate by the images of one of several runs, whose counts are given together."""
    return (1 - memorized / samples) / memorized * runs if memorized else 0.0


def _factor(rates: np.ndarray, variance: float) -> float:
    """By what the mean of the rates of runs is multiplied and divided; `variance` is a further relative one, known.

    Both parts as half widths of the logarithm, Student's and normal, added in squares.
    """
    students = _t(len(rates)) ** 2 * rates.var(ddof=1) / len(rates) / rates.mean() ** 2
    return float(np.exp((students + _Z**2 * variance) ** 0.5))


def _t(count: int) -> float:
    """Two-sided 95 % quantile of Student's t of the mean of so many."""
    from scipy.special import stdtrit

    return float(stdtrit(count - 1, 0.975))


# ----------------------------------------------------------------------------
# Timing.


def half_epoch(points: Sequence[GroupPoint]) -> float | None:
    """The epochs at half of the rise that fits the share best; see `memorization.stats.timing`.

    None if the curve does not rise. If it still rises at the end, that is half of what was seen.
    """
    points = [p for p in points if p.epochs > 0]
    if not points:
        return None
    epochs = np.array([p.epochs for p in points])
    fit = RiseFits(epochs, np.ones(len(epochs))).best(np.array([[p.share for p in points]]))[0]
    return fit.half if fit.level > 0 else None


def group_timing(runs: Sequence[GroupRun], group: str) -> tuple[Timing, dict[int, Answer | int]]:
    """Whether a group is copied later or earlier than the inliers, by the test of `memorization.stats.timing`.

    The units are runs with seeds of their own. Runs of one |D| have the same groups and snapshots, and a fit of their
    own; runs of several |D| are tested together (`strata_test`). The curves are the copies per generated image over the
    epochs, images seen per training image. The images of a group are the same in all runs of a |D|, so that the answer
    is about these images.

    Returns
    -------
    The answer, and for each |D| with the group how many runs count, or why none does.
    """
    strata, sizes = [], []
    for size, some in by_size(runs).items():
        if all(name in run.curves for run in some for name in ("inlier", group)):
            epochs = np.array([p.epochs for p in some[0].curves[group]])
            trained = epochs > 0
            counts = [
                np.array([[p.num_memorized / p.num_samples for p in run.curves[name]] for run in some])[:, trained]
                for name in (group, "inlier")
            ]
            if trained.any():
                strata.append((epochs[trained], (counts[0], None), (counts[1], None)))
                sizes.append(size)
    timing, units = strata_test(strata)
    return timing, dict(zip(sizes, units))
