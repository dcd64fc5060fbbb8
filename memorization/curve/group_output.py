"""Groups over the training of runs, for people: tables on the screen, a figure, and a CSV that both come from again."""

import math
import os
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from matplotlib.figure import Figure

from memorization.curve.group_curves import (
    Curves,
    Estimate,
    GroupPoint,
    GroupRun,
    by_size,
    half_epoch,
    pooled,
    share_over_seeds,
    to_optimum,
)
from memorization.curve.tables import count, read_csv, reading_table, write_csv
from memorization.plots import check_format, quiet, save_figure

_COLORS = {"inlier": "#0072B2", "duplicate": "#007A5A", "outlier": "#D55E00"}
_OTHER = ("#CC79A7", "#8C3B00", "#56B4E9", "#000000", "#B5A300")
_COUNTS = ("num_memorized", "num_nearest", "num_training", "num_replayed", "num_samples")
_CONTROL = ("num_within", "held_images", "held_counted", "held_copied")
_RADIUS = ("radius", "radius_low", "radius_high")
COLUMNS = (
    "size", "run", "group", "kimg", "epochs", "share", "share_low", "share_high", "ratio", *_COUNTS,
    "held_share", "held_share_low", "held_share_high", *_CONTROL, *_RADIUS, "held_radius",
)  # fmt: skip


# ----------------------------------------------------------------------------
# Tables on the screen.


def describe_runs(runs: Sequence[GroupRun]) -> list[str]:
    """How the groups end, and what they are compared with: lines, by |D|."""
    lines = []
    for size, some in by_size(runs).items():
        curves = pooled(some)
        images = sum(points[0].num_training for points in some[0].curves.values())
        lines.append(
            f"|D| = {size} ({images} in the reference), {len(some)} run{'s' * (len(some) > 1)}, "
            f"{some[0].epochs:.0f} epochs"
        )
        lines += _ends(some, curves)
        ends = {name: points[-1] for name, points in curves.items()}
        if any(end.held_images for end in ends.values()):
            lines += _by_chance(some, ends)
        if all(run.optimum for run in some):
            lines += _of_the_optimum(some)
        if any(end.radius for end in ends.values()):
            lines += _radii(ends)
    return lines


def _ends(runs: Sequence[GroupRun], curves: Curves) -> list[str]:
    shares = {name: share_over_seeds([run.curves[name][-1] for run in runs]) for name in curves}
    over = " and ".join(sorted({share.over for share in shares.values()}, reverse=True))
    lines = [
        f"{'group':<12} {'images':>6} {'copied':>7} {'share':>6}  {f'95 %, {over}':<22} {'half its rise at epoch':>22}"
    ]
    for name, points in curves.items():
        share, number = shares[name], runs[0].curves[name][-1].num_training
        interval, copied = f"[{share.low:.2f}, {share.high:.2f}]", f"{100 * points[-1].copied:.0f} %"
        lines.append(f"{name:<12} {number:>6} {copied:>7} {share.value:>6.2f}  {interval:<22} {_reached(points):>22}")
    return lines


def _reached(points: Sequence[GroupPoint]) -> str:
    """The epoch of half the rise; one at the end is only known not to be before."""
    half = half_epoch(points)
    if half is None:
        return "not yet"
    return f"{half:.0f}" if half < 0.999 * points[-1].epochs else f"not before {half:.0f}"


def _by_chance(runs: Sequence[GroupRun], ends: dict[str, GroupPoint]) -> list[str]:
    """Copies of held-out images."""
    lines = [f"{'held-out':<12} {'images':>6} {'copied':>7} {'share':>6}  95 %, images"]
    for name, end in ends.items():
        if end.held_images:
            low, high = end.held_interval
            number, copied = runs[0].curves[name][-1].held_images, f"{100 * end.held_copied / end.held_images:.0f} %"
            lines.append(f"{name:<12} {number:>6} {copied:>7} {end.held_share:>6.3f}  [{low:.3f}, {high:.3f}]")
    return lines


def _of_the_optimum(runs: Sequence[GroupRun]) -> list[str]:
    """The optimum, and what the networks reach of it."""
    lines = [
        f"{'optimum':<12} {'':>6} {'copied':>7} {'share':>6}  {'of its share':<28} of the images that it copies"
    ]  # fmt: skip
    for name, best in runs[0].optimum.items():
        found = to_optimum(runs, name)
        if found is not None and name in runs[0].curves:
            cells = [_estimate(found[key]) for key in ("copies", "copied")]
            line = f"{name:<12} {'':>6} {f'{100 * best.copied:.0f} %':>7} {best.share:>6.2f}  {cells[0]:<28} {cells[1]}"
            lines.append(line)
    return lines


def _estimate(found: Estimate) -> str:
    if math.isnan(found.value):
        return "-"
    return f"{found.value:.3f} [{found.low:.3f}, {found.high:.3f}] {found.over}"


def _radii(ends: dict[str, GroupPoint]) -> list[str]:
    """How far from an image of each group another one still counts as its copy."""
    inlier = ends.get("inlier") or next(iter(ends.values()))
    lines = ["Counts as a copy up to this far from an image (RMS of 0 to 255, median [range] over its group):"]
    for name, end in ends.items():
        if end.radius is None:
            continue
        median, low, high = end.radius
        line = f"  {name:<12} {median:6.2f} [{low:.2f}, {high:.2f}]"
        if end is not inlier:
            line += f", {median / inlier.radius[0]:.2f} times that of inliers" if inlier.radius[0] else ""
        if end.held_radius is not None:
            line += f"; held-out ones {end.held_radius:.2f}"
        if end.num_within is not None and end is not inlier:
            line += f"; {end.num_within} of {end.num_memorized} copies are within that of inliers"
        lines.append(line)
    return lines


def summary(runs: Sequence[GroupRun]) -> list[dict[str, Any]]:
    """What `describe_runs` says, as numbers for a record: an entry per |D|, with its groups at the end of training."""
    entries = []
    for size, some in by_size(runs).items():
        groups = {}
        for name, points in pooled(some).items():
            end, relative = points[-1], to_optimum(some, name)
            groups[name] = {
                "num_training": some[0].curves[name][-1].num_training,
                "copied": end.copied,
                "share": asdict(share_over_seeds([run.curves[name][-1] for run in some])),
                "half_epoch": half_epoch(points),
                "held_out_share": None if not end.held_images else [end.held_share, *end.held_interval],
                "optimum_share": some[0].optimum[name].share if relative else None,
                "of_the_optimum": {key: asdict(found) for key, found in relative.items()} if relative else None,
                "radius": end.radius,
                "held_out_radius": end.held_radius,
                "copies_within_the_radius_of_inliers": end.num_within,
                "copies": end.num_memorized,
            }  # fmt: skip
        entries.append({"size": size, "runs": len(some), "epochs": some[0].epochs, "groups": groups})
    return entries


# ----------------------------------------------------------------------------
# The table.


def write_group_runs(runs: Sequence[GroupRun], path: str | os.PathLike) -> None:
    """Write a CSV with a row per run, group and snapshot, see `GroupPoint`; where epochs are inf, it is the optimum."""
    rows = []
    for number, run in enumerate(runs, start=1):
        optimum = {name: [point] for name, point in run.optimum.items()}
        for curves in (run.curves, optimum):
            for name, points in curves.items():
                for p in points:
                    counts = [getattr(p, key) for key in _COUNTS]
                    control = [getattr(p, key) for key in _CONTROL]
                    held = [p.held_share, *(p.held_interval or (None, None))]
                    radii = [*(p.radius or (None,) * 3), p.held_radius]
                    values = [p.kimg, p.epochs, p.share, *p.interval, p.ratio, *counts, *held, *control, *radii]
                    rows.append([run.size, number, name, *("" if v is None else v for v in values)])
    write_csv(COLUMNS, rows, path)


def read_group_runs(path: str | os.PathLike) -> list[GroupRun]:
    """The runs from what `write_group_runs` has written.

    Raises
    ------
    ValueError
        If the file is no such table.
    OSError
        If it cannot be read.
    """
    runs: dict[tuple[int, int], GroupRun] = {}
    with reading_table(path, "outlier_study.py images"):
        rows = read_csv(path)
        for row in rows:
            if (key := (count(row["size"]), count(row["run"]))) not in runs:
                runs[key] = GroupRun(key[0], {}, {})
                mine = [r for r in rows if (r["size"], r["run"]) == (row["size"], row["run"])]
                total = sum({r["group"]: count(r["num_training"]) for r in mine}.values())
            point, run = _point(row, total), runs[key]
            if math.isinf(point.epochs):
                run.optimum[row["group"]] = point
            else:
                points = run.curves.setdefault(row["group"], [])
                if points and point.kimg <= points[-1].kimg:
                    raise ValueError("snapshots that do not ascend")
                points.append(point)
        if not runs or not all(run.curves for run in runs.values()):
            raise ValueError("no rows")
        return list(runs.values())


def _point(row: dict[str, str], total: int) -> GroupPoint:
    counts = {name: count(row[name]) for name in _COUNTS}
    control = {name: count(row[name]) if row[name] else None for name in _CONTROL}
    radius = tuple(float(row[name]) for name in _RADIUS) if row["radius"] else None
    held_radius = float(row["held_radius"]) if row["held_radius"] else None
    kimg, epochs = float(row["kimg"]), float(row["epochs"])
    point = GroupPoint(
        kimg, epochs, total=total, radius=radius, held_radius=held_radius, **counts, **control
    )  # fmt: skip
    _ = point.interval, point.held_interval  # refuses counts that are none
    held = [row[name] == "" for name in ("held_images", "held_counted", "held_copied")]
    if not 0 <= kimg or not 0 <= epochs or point.num_replayed > point.num_training or len(set(held)) > 1:
        raise ValueError("counts that are none")
    if point.held_images is not None and point.held_copied > point.held_images:
        raise ValueError("counts that are none")
    return point


# ----------------------------------------------------------------------------
# The figure.


def group_figure(runs: Sequence[GroupRun], path: str | os.PathLike, *, title: str | None = None) -> None:
    """Draw the share of each group over the epochs, and the fraction of its images that are copied; a row per |D|.

    A single run has its 95 % band; of several thin lines are the runs, the thick one is their mean. Dashed: the
    optimum. Dotted: held-out images of the group, what counts as copied by chance.

    Raises
    ------
    ValueError
        If there are no groups, or the suffix of `path` is no format that can be drawn.
    """
    strata = by_size(runs)
    if not any(run.curves for run in runs):
        raise ValueError("There are no groups to draw.")
    check_format(path)
    fig = Figure(figsize=(9.0, 3.2 * len(strata) + 0.4), dpi=200, layout="constrained")
    axes = fig.subplots(len(strata), 2, squeeze=False)
    names = list(dict.fromkeys(name for run in runs for name in run.curves))
    others = iter(_OTHER * len(names))
    colors = {name: _COLORS.get(name) or next(others) for name in names}
    controlled = compared = False
    for (left, right), (size, some) in zip(axes, strata.items()):
        for name, points in pooled(some).items():
            color, epochs = colors[name], [p.epochs for p in points]
            each = [run.curves[name] for run in some]
            style = dict(color=color, markersize=3, linewidth=1.6)
            left.plot(epochs, [p.share for p in points], "o-", label=f"{name} ({each[0][0].num_training})", **style)
            right.plot(epochs, [100 * p.copied for p in points], "o-", **style)
            if len(some) == 1:
                left.fill_between(epochs, *zip(*(p.interval for p in points)), color=color, alpha=0.15, linewidth=0)
            else:
                for one in each:
                    left.plot(epochs, [p.share for p in one], color=color, linewidth=0.6, alpha=0.6)
                    right.plot(epochs, [100 * p.copied for p in one], color=color, linewidth=0.6, alpha=0.6)
            if all(p.held_images for p in points):
                left.plot(epochs, [p.held_share for p in points], ":", color=color, linewidth=1.4)
                right.plot(
                    epochs, [100 * p.held_copied / p.held_images for p in points], ":", color=color, linewidth=1.4
                )
                controlled = True
            if name in some[0].optimum:
                left.axhline(some[0].optimum[name].share, linestyle="--", color=color, linewidth=1.0)
                right.axhline(100 * some[0].optimum[name].copied, linestyle="--", color=color, linewidth=1.0)
                compared = True
        runs_text = f", {len(some)} runs" if len(some) > 1 else ""
        left.set_title(f"|D| = {size}{runs_text}", fontsize=10, loc="left")
        left.set_ylabel("copies per training image,\nrelative to the mean at 100 %")
        right.set_ylabel("training images copied\nat least once (%)")
        for ax in (left, right):
            ax.set_xlabel("training epochs")
            ax.set_ylim(bottom=0)
            quiet(ax)
        left.legend(
            frameon=True,
            framealpha=0.85,
            edgecolor="none",
            fontsize=8,
            title="group (training images)",
            title_fontsize=8,
        )
    if compared:
        axes[0][1].plot([], [], "--", color="0.4", label="optimum of the training set")
    if controlled:
        axes[0][1].plot([], [], ":", color="0.4", label="held-out images of the group")
    if compared or controlled:
        fig.legend(
            *axes[0][1].get_legend_handles_labels(), frameon=False, fontsize=8, ncols=2, loc="outside lower center"
        )
    if title:
        fig.suptitle(title, fontsize=11)
    save_figure(fig, path)
