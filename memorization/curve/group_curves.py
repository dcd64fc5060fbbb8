"""Memorization by group of training images over the training of a run: who is memorized first, who last?"""

import csv
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from matplotlib.figure import Figure

from dnnlib.util import atomic_write
from memorization.plots import check_format, save_figure
from memorization.records import images_seen, jsonl_path
from memorization.runs import LOG, Run, by_settings
from memorization.stats.intervals import wilson_interval
from memorization.stats.timing import RiseFits, Timing, timing_test

_COLORS = {"inlier": "#0072B2", "duplicate": "#007A5A", "outlier": "#D55E00"}
_OTHER = ("#CC79A7", "#8C3B00", "#56B4E9", "#000000", "#B5A300")
COLUMNS = (
    "group", "kimg", "epochs", "share", "share_low", "share_high", "ratio", "num_memorized", "num_nearest",
    "num_training", "num_replayed", "num_samples",
)  # fmt: skip


@dataclass(frozen=True)
class GroupPoint:
    """One group at one snapshot."""

    kimg: float
    epochs: float
    num_memorized: int  # generated images that copy a training image of the group
    num_nearest: int  # generated images whose nearest training image is in the group
    num_replayed: int  # training images of the group that were copied
    num_training: int  # training images of the group
    num_samples: int  # generated images
    total: int  # training images of all groups

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

    def _scale(self, fraction: float) -> float:
        return fraction * self.total / self.num_training


def group_curves(run: Run) -> dict[str, list[GroupPoint]]:
    """The groups of a measured run: name -> points in the order of training.

    Of several ways in which the snapshots were measured (seeds, reference, ...) the one with the most snapshots
    counts, of equal ones the last.

    Raises
    ------
    ValueError
        If the run was not measured against a reference with groups.
    """
    path = jsonl_path(run.path / LOG)
    ways = by_settings(r for r in run.records if r.get("groups") and r.get("kimg") is not None)
    if not ways:
        raise ValueError(
            f'"{path}" has no groups; make the set with dataset_utils/dataset_inject.py and measure the run with it.'
        )
    records = max(reversed(ways), key=len)
    curves: dict[str, list[GroupPoint]] = {}
    try:
        for record in sorted(records, key=lambda r: r["kimg"]):
            total = sum(row["num_training"] for row in record["groups"].values())
            for name, row in record["groups"].items():
                counts = {key: row[key] for key in ("num_memorized", "num_nearest", "num_replayed", "num_training")}
                epochs = images_seen(record) / run.size
                point = GroupPoint(record["kimg"], epochs, **counts, num_samples=record["num_samples"], total=total)
                _ = point.interval  # refuses counts that are none
                curves.setdefault(name, []).append(point)
    except (KeyError, TypeError, AttributeError, ZeroDivisionError):
        raise ValueError(f'"{path}" has groups without their counts; measure the run again.') from None
    return curves


def other_measurements(run: Run) -> int:
    """How many records of a run `group_curves` leaves out."""
    curves = group_curves(run)
    return len(run.records) - len(next(iter(curves.values())))


def pooled(runs: Sequence[dict[str, list[GroupPoint]]]) -> dict[str, list[GroupPoint]]:
    """The curves of several runs that differ in their seeds, as those of one: all counts are added.

    Raises
    ------
    ValueError
        If the runs have other groups, sizes or snapshots.
    """
    first, *others = runs
    shapes = [
        [(name, [(p.kimg, p.num_training) for p in points]) for name, points in sorted(run.items())] for run in runs
    ]
    if any(shape != shapes[0] for shape in shapes[1:]):
        raise ValueError("Runs are drawn together that have the same groups, of the same sizes, at the same snapshots.")
    names = ("num_memorized", "num_nearest", "num_replayed", "num_training", "num_samples", "total")
    return {
        name: [
            replace(p, **{key: sum(getattr(run[name][i], key) for run in runs) for key in names})
            for i, p in enumerate(points)
        ]
        for name, points in first.items()
    }


def half_epoch(points: Sequence[GroupPoint]) -> float | None:
    """The epochs at half of the rise that fits the share best; see `memorization.stats.timing`.

    None if the curve does not rise. If it still rises at the end, that is half of what was seen.
    """
    epochs = np.array([p.epochs for p in points])
    fit = RiseFits(epochs, np.ones(len(epochs))).best(np.array([[p.share for p in points]]))[0]
    return fit.half if fit.level > 0 else None


def group_timing(runs: Sequence[dict[str, list[GroupPoint]]], group: str) -> Timing:
    """Whether a group is copied later or earlier than the inliers, by the test of `memorization.stats.timing`.

    The units are runs with seeds of their own, each with the same groups and snapshots; the curves are the copies per
    generated image. The images of a group are the same in all runs, so that the answer is about these images.
    """
    if not all(name in run for run in runs for name in ("inlier", group)):
        return Timing("none")
    counts = [
        np.array([[p.num_memorized / p.num_samples for p in run[name]] for run in runs]) for name in (group, "inlier")
    ]
    return timing_test(np.array([p.epochs for p in runs[0][group]]), (counts[0], None), (counts[1], None))


def write_group_curves(curves: dict[str, list[GroupPoint]], path: str | os.PathLike) -> None:
    """Write a CSV with a row per group and snapshot; see `GroupPoint`."""
    with atomic_write(path, "w") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COLUMNS)
        for name, points in curves.items():
            for p in points:
                values = (p.num_memorized, p.num_nearest, p.num_training, p.num_replayed, p.num_samples)
                writer.writerow([name, p.kimg, p.epochs, p.share, *p.interval, p.ratio, *values])


def read_group_curves(path: str | os.PathLike) -> dict[str, list[GroupPoint]]:
    """The curves from what `write_group_curves` has written.

    Raises
    ------
    ValueError
        If the file is no such table.
    OSError
        If it cannot be read.
    """
    counts = ("num_memorized", "num_nearest", "num_replayed", "num_training", "num_samples")
    curves: dict[str, list[GroupPoint]] = {}
    try:
        with open(path, newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        sizes = {row["group"]: int(row["num_training"]) for row in rows}
        for row in rows:
            numbers = {name: int(row[name]) for name in counts}
            point = GroupPoint(float(row["kimg"]), float(row["epochs"]), **numbers, total=sum(sizes.values()))
            _ = point.interval  # refuses counts that are none
            curves.setdefault(row["group"], []).append(point)
        if not curves:
            raise ValueError("no rows")
    except (ValueError, KeyError, TypeError, ZeroDivisionError, csv.Error) as err:
        raise ValueError(f'"{path}" is no table of groups over the training of a run.') from err
    return curves


def group_figure(curves: dict[str, list[GroupPoint]], path: str | os.PathLike, *, title: str | None = None) -> None:
    """Draw the share of each group over the epochs, with 95 % bands, and the fraction of its images that are copied.

    Raises
    ------
    ValueError
        If there are no groups, or the suffix of `path` is no format that can be drawn.
    """
    if not curves:
        raise ValueError("There are no groups to draw.")
    check_format(path)
    fig = Figure(figsize=(9.0, 3.6), dpi=200, layout="constrained")
    left, right = fig.subplots(1, 2)
    others = iter(_OTHER * len(curves))
    for name, points in curves.items():
        color = _COLORS.get(name) or next(others)
        epochs = [p.epochs for p in points]
        label = f"{name} ({points[-1].num_training})"
        left.plot(epochs, [p.share for p in points], "o-", color=color, markersize=3, label=label)
        left.fill_between(epochs, *zip(*(p.interval for p in points)), color=color, alpha=0.15, linewidth=0)
        copied = [100 * p.num_replayed / p.num_training for p in points]
        right.plot(epochs, copied, "o-", color=color, markersize=3, label=label)
    left.set_ylabel("copies per training image,\nrelative to the mean at 100 %")
    right.set_ylabel("training images copied\nat least once (%)")
    for ax in (left, right):
        ax.set_xlabel("training epochs")
        ax.set_ylim(bottom=0)
        ax.grid(color="0.92", linewidth=0.8)
        ax.set_axisbelow(True)
        ax.spines[["top", "right"]].set_visible(False)
    left.legend(frameon=False, fontsize=9, title="group (training images)", title_fontsize=9)
    if title:
        fig.suptitle(title, fontsize=11)
    save_figure(fig, path)
