"""Figures of the study: R_mem over |D| with EMM, R_mem and quality over the training, the two clocks over |D|."""

import os
import textwrap
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from dnnlib.util import printable
from memorization.curve.agreement import Agreement
from memorization.curve.lines import Line, Trajectory
from memorization.curve.timescales import Timescales
from memorization.plots import check_format, quiet, save_figure

_GREY, _RED = "#6e6e6e", "#c8372d"
# Okabe & Ito's colours for all kinds of colour vision, dark and light in turn, so that neighbours differ in grey.
_COLORS = ("#0072B2", "#E69F00", "#007A5A", "#CC79A7", "#8C3B00", "#56B4E9", "#000000", "#B5A300", "#7A4FA3")
_MARKERS = "osD^vPX*h"
_WIDTH = 5.6  # inches
_DASHES = ("-", (0, (6, 1.5)), (0, (6, 1.5, 1.5, 1.5)), (0, (3, 1.2)))
_STEPS = 16  # of a drawn line from point to point
_R_MEM = r"memorization ratio $\mathcal{R}_\mathrm{mem}$ (%)"


def curve_figure(
    lines: Sequence[Line],
    path: str | os.PathLike,
    *,
    by: str | None = None,  # title of the legend: the factor
    title: str | None = None,
) -> None:
    """Draw R_mem in % over |D| on a logarithmic axis, a line per value, with intervals, the level and EMM.

    Several lines of one and the same |D| are drawn over their values instead. From size to size a line is straight as
    EMM is read: in logit R_mem over log |D|, or in R_mem. Where EMM is, a dotted line leads down from the level; the
    drawn line passes there if the fit passes through its points. Of a single line EMM stands above the figure, of
    several in the legend. The suffix of `path` chooses the format (png, pdf, svg, ...); the file appears complete or
    not at all.

    Raises
    ------
    ValueError
        If there are no lines, or the suffix is no format that can be drawn.

    References
    ----------
    Gu et al., "On Memorization in Diffusion Models", 2023, Figures 2 to 6.
    """
    if not lines:
        raise ValueError("There are no lines to draw; measure at least one run first.")
    check_format(path)
    several = len(lines) > 1
    if several and len({p.size for line in lines for p in line.points}) == 1:
        _over_values(lines, path, by, title)
        return
    labels = [_label(f"{line.name}:  {line.emm.place}  {line.emm_interval}") for line in lines]
    fig = _figure(labels)
    ax = fig.subplots()
    sizes = np.unique([p.size for line in lines for p in line.points]).astype(float)
    low, high = sizes.min(), sizes.max()
    margin = (high / low) ** 0.06 if high > low else 1.5
    ax.set_xscale("log")
    ax.set_xlim(low / margin, high * margin)
    ticks = readable_ticks(sizes)
    ax.set_xticks(ticks, [format_size(s) for s in ticks])
    ax.xaxis.set_minor_locator(NullLocator())
    _ratio_axis(ax, "number of training images |D|")
    level = 100 * lines[0].emm.level
    _level_line(ax, level)

    for line, label, style in zip(lines, labels, line_styles([line.value for line in lines])):
        sizes, ratio = _path(line)
        error = np.zeros((2, len(sizes)))  # down and up
        error[:, ::_STEPS] = np.abs(np.array([p.interval for p in line.points]).T - ratio[::_STEPS])
        ax.errorbar(
            sizes, 100 * ratio, yerr=100 * error, errorevery=_STEPS, markevery=_STEPS, capsize=2.5, elinewidth=1.1,
            linewidth=1.6, zorder=3, label=label, **style,
        )  # fmt: skip
        if line.emm.verdict == "at":
            color = style["color"] if several else _RED
            ax.plot([line.emm.size] * 2, [-3, level], color=color, linestyle=":", linewidth=1.4, zorder=2)
            if not several:
                ax.plot(line.emm.size, level, color=_RED, marker="D", markersize=6, markeredgecolor="white", zorder=4)
    if several:
        interval = f" [{100 * lines[0].confidence:g} %]" if not any(line.images_only for line in lines) else ""
        name = f"{by}:  EMM ({level:g} %){interval}" if by else None
        _legend(fig, name)
    else:
        ax.set_title(f"{lines[0].emm}  {lines[0].emm_interval}", loc="right", color=_RED, fontsize=10)
        title = title or (f"{by} = {lines[0].name}" if by else None)
    _title(fig, ax, title, beside_legend=several)
    save_figure(fig, path)


def _path(line: Line) -> tuple[np.ndarray, np.ndarray]:
    """|D| and R_mem from point to point, each followed by _STEPS - 1 between it and the next, straight as EMM is read.

    A ratio of 0 or 1 has no finite logit; between the points half an image stands for none, of the most images that
    any point has. Between equal ratios the line is level.
    """
    number = np.arange(_STEPS * (len(line.points) - 1) + 1) / _STEPS
    known = np.arange(len(line.points))
    ratio, samples = np.array([[p.ratio, p.num_samples] for p in line.points], dtype=float).T
    sizes = np.exp(np.interp(number, known, np.log([p.size for p in line.points])))
    if line.interpolation == "linear":
        return sizes, np.interp(number, known, ratio)
    inside = ratio[(0 < ratio) & (ratio < 1)]
    half = max(min([0.5 / samples.max(), *inside, *(1 - inside)]), 1e-15)
    bounded = np.clip(ratio, half, 1 - half)
    path = 1 / (1 + np.exp(-np.interp(number, known, np.log(bounded / (1 - bounded)))))
    path[::_STEPS] = ratio
    level = np.repeat(ratio[1:] == ratio[:-1], _STEPS)
    path[:-1][level] = np.repeat(ratio[:-1], _STEPS)[level]
    return sizes, path


def _over_values(lines: Sequence[Line], path: str | os.PathLike, by: str | None, title: str | None) -> None:
    """R_mem of each line, all at one |D|, over the values of the factor in their order."""
    fig = _figure([])
    ax = fig.subplots()
    names, points = [line.name for line in lines], [line.points[0] for line in lines]
    factor = f"{by}, " if by and by != "folder" else ""
    known = "; intervals of the images only" if any(line.images_only for line in lines) else ""
    _ratio_axis(ax, f"{factor}|D| = {points[0].size}{known}")
    _level_line(ax, 100 * lines[0].emm.level)
    ratio = 100 * np.array([p.ratio for p in points])
    error = np.abs(100 * np.array([p.interval for p in points]).T - ratio)  # [2, values], down and up
    ax.errorbar(
        range(len(lines)), ratio, yerr=error, fmt="o", color=_COLORS[0], capsize=3, elinewidth=1.1, zorder=3
    )  # fmt: skip
    ax.set_xlim(-0.6, len(lines) - 0.4)
    slanted = len(lines) * max(map(len, names)) > 60
    ax.set_xticks(
        range(len(lines)), [textwrap.fill(printable(name), 18) for name in names], rotation=30 if slanted else 0,
        ha="right" if slanted else "center", parse_math=False,
    )  # fmt: skip
    if title:
        ax.set_title(textwrap.fill(title, 52), fontsize=11)
    save_figure(fig, path)


def trajectory_figure(
    trajectories: Sequence[Trajectory],
    path: str | os.PathLike,
    *,
    level: float | None = 0.9,  # drawn as a line; None: not drawn
    log: bool = False,  # logarithmic time
    quality: str | None = None,  # label of the axis of the quality
    floor: float | None = None,  # quality of held-out images themselves, drawn as a line
    title: str | None = None,
) -> None:
    """Draw R_mem in % over the training, a line and a band per trajectory; see `Trajectory` for the band.

    Where quality was measured, and has a label, it is drawn on a panel below, over the same time.

    Raises
    ------
    ValueError
        If there are no trajectories, or the suffix of `path` is no format that can be drawn.

    References
    ----------
    Gu et al., "On Memorization in Diffusion Models", 2023, Figures 1c and 5c.
    Bonnaire et al., "Why Diffusion Models Don't Memorize", 2025.
    """
    if not trajectories:
        raise ValueError("There are no trajectories to draw; measure at least one run first.")
    check_format(path)
    several = len(trajectories) > 1
    two = quality is not None and any(t.quality is not None for t in trajectories)
    fig = _figure([t.name for t in trajectories])
    if two:
        width, height = fig.get_size_inches()
        fig.set_size_inches(width, height + 2.4)
    axes = fig.subplots(1 + two, sharex=True, squeeze=False)[:, 0]
    ax = axes[0]
    name = {"epochs": "training epochs", "kimg": "training images seen (thousands)", "steps": "training steps"}
    _ratio_axis(ax, "" if two else name[trajectories[0].axis])
    if log:
        ax.set_xscale("log")
    ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: format_size(x)))
    if level is not None:
        _level_line(ax, 100 * level)
    values = [t.value if len({t.size for t in trajectories}) == 1 else t.size for t in trajectories]
    for t, style in zip(trajectories, line_styles(values)):
        _band(ax, t.time, 100 * t.ratio, 100 * t.low, 100 * t.high, style, _label(t.name))
        if two and t.quality is not None:
            _band(axes[1], t.quality.time, t.quality.value, t.quality.low, t.quality.high, style, None)
    if two:
        _quality_axis(axes[1], name[trajectories[0].axis], quality, floor, trajectories)
    if not log and all(len(t.time) == 1 for t in trajectories):
        ax.set_xlim(0, 1.1 * max(t.time[-1] for t in trajectories))  # not the little by which they differ
    if several:
        _legend(fig, None)
    else:
        ax.set_title(trajectories[0].name, loc="right", fontsize=10)
    _title(fig, ax, title, beside_legend=several)
    save_figure(fig, path)


def _band(
    ax: Axes, time: np.ndarray, value: np.ndarray, low: np.ndarray, high: np.ndarray, style: dict, name: str | None
) -> None:
    style = style if len(time) <= 30 else dict(style, markevery=len(time) // 15)  # more markers would hide the line
    if len(time) == 1:  # one snapshot is a point with its interval, no course over the training
        error = np.maximum(np.array([value - low, high - value]), 0)
        ax.errorbar(time, value, yerr=error, capsize=2.5, label=name, zorder=3, **dict(style, linestyle="none"))
        return
    ax.plot(time, value, linewidth=1.6, label=name, zorder=3, **style)
    ax.fill_between(time, low, high, color=style["color"], alpha=0.18, linewidth=0, zorder=2)


def _log_numbers(ax: Axes) -> None:
    """1, 2, 5, 10, ... as numbers on a logarithmic vertical axis."""
    ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda y, _: format_size(y)))
    ax.yaxis.set_minor_locator(NullLocator())


def _quality_axis(ax: Axes, x: str, label: str, floor: float | None, trajectories: Sequence[Trajectory]) -> None:
    values = np.concatenate([t.quality.value for t in trajectories if t.quality is not None])
    if values.min() > 0 and values.max() > 20 * values.min():
        ax.set_yscale("log")
        _log_numbers(ax)
    if floor is not None:
        ax.axhline(floor, color=_GREY, linestyle=":", linewidth=1, zorder=1)
        ax.annotate(
            "held-out", (1, floor), xycoords=("axes fraction", "data"), xytext=(3, 0), textcoords="offset points",
            va="center", ha="left", fontsize=8, color=_GREY,
        )  # fmt: skip
    ax.set_xlabel(x)
    ax.set_ylabel(label)
    quiet(ax)


def timescales_figure(found: Sequence[Timescales], path: str | os.PathLike, *, title: str | None = None) -> None:
    """Left the two times over |D| with their fitted powers, right R_mem over time / |D|; a row per value of a factor.

    Hollow markers are bounds: not reached, or reached before the first snapshot; so are ends of intervals with an
    arrow. Thin lines on the right are runs.

    Raises
    ------
    ValueError
        If there is nothing to draw, or the suffix of `path` is no format that can be drawn.
    """
    if not found:
        raise ValueError("There are no times to draw; measure at least one run first.")
    check_format(path)
    fig = Figure(figsize=(8.6, 3.6 * len(found) + (0.3 if title else 0)), dpi=200, layout="constrained")
    for t, (left, right) in zip(found, fig.subplots(len(found), 2, squeeze=False)):
        for clock in t.clocks:
            style = dict(color="#0072B2", marker="o") if clock.name == "tau_mem" else dict(color="#E69F00", marker="s")
            name = rf"$\tau_\mathrm{{{clock.name[4:]}}}$"
            for s in clock.sizes:
                face = style["color"] if s.reached == s.num_runs else "white"
                error = np.abs(np.array([[s.time.value - s.low.value], [s.high.value - s.time.value]]))
                left.errorbar(
                    s.size, s.time.value, yerr=error, capsize=2.5, markerfacecolor=face, linestyle="none", zorder=3,
                    markersize=6, **style,
                )  # fmt: skip
                for end, verdict, arrow in ((s.low, "at most", "v"), (s.high, "beyond", "^")):
                    if end.verdict == verdict:
                        left.plot(s.size, end.value, arrow, color=style["color"], markersize=5)
            label = name
            if clock.slope is not None:
                x = np.array([clock.sizes[0].size, clock.sizes[-1].size], dtype=np.float64)
                left.plot(x, np.exp(clock.slope.constant) * x**clock.slope.value, color=style["color"], linewidth=1.2)
                interval = "" if np.isnan(clock.slope.low) else f" [{clock.slope.low:.2f}, {clock.slope.high:.2f}]"
                label += rf" $\sim |D|^{{{clock.slope.value:.2f}}}${interval}"
            left.plot([], [], label=label, linewidth=1.2, **style)
        if any(end.verdict != "at" for clock in t.clocks for s in clock.sizes for end in (s.time, s.low, s.high)):
            left.plot([], [], "^", color="0.4", markerfacecolor="white", label="hollow, or an arrow: a bound")
        left.set_xscale("log")
        left.set_yscale("log")
        _log_numbers(left)
        sizes = np.array(sorted(t.curves), dtype=np.float64)
        left.set_xticks(readable_ticks(sizes) if len(sizes) > 1 else sizes, None)
        left.xaxis.set_major_formatter(FuncFormatter(lambda x, _: format_size(x)))
        left.xaxis.set_minor_locator(NullLocator())
        left.set_xlabel("number of training images |D|")
        left.set_ylabel(f"time ({t.axis})")
        left.legend(frameon=False, fontsize=8, title=t.name or None, title_fontsize=8)
        _ratio_axis(right, rf"time / |D| ({t.axis} per training image)")
        right.set_xscale("log")
        _level_line(right, 100 * t.level)
        for (size, curves), style in zip(sorted(t.curves.items()), line_styles(sorted(t.curves))):
            for i, (time, ratio) in enumerate(curves):
                label = f"|D| = {size}" if i == 0 else None
                right.plot(time / size, 100 * ratio, linewidth=1.2, label=label, **dict(style, markersize=3.5))
        right.legend(frameon=False, fontsize=8)
        for ax in (left, right):
            quiet(ax)
    if title:
        fig.suptitle(title, fontsize=11)
    save_figure(fig, path)


def line_styles(values: Sequence[Any]) -> list[dict[str, Any]]:
    """Colour, marker and dashes of each line, for matplotlib: no two alike up to 36 lines.

    Ascending numbers take one scale from dark to light, other values separate colours.
    """
    numbers = len(values) > 3 and all(isinstance(v, int | float) and not isinstance(v, bool) for v in values)
    styles = []
    for i in range(len(values)):
        color = _COLORS[i % len(_COLORS)]
        if numbers:
            color = colormaps["viridis"](0.88 * i / (len(values) - 1))
        dashes = _DASHES[(i if not numbers else i // len(_MARKERS)) % len(_DASHES)]
        styles.append(dict(color=color, marker=_MARKERS[i % len(_MARKERS)], linestyle=dashes, markersize=5))
    return styles


def _figure(labels: Sequence[str]) -> Figure:
    """A figure with room for a legend below it, in inches; a single line needs none."""
    rows = -(-len(labels) // _columns(labels)) if len(labels) > 1 else 0
    return Figure(figsize=(_WIDTH, 3.6 + (0.3 + 0.17 * rows if rows else 0)), dpi=200, layout="constrained")


def _columns(labels: Sequence[str]) -> int:
    """Columns of a legend that is no wider than the figure."""
    return max(1, min(4, int(_WIDTH / (0.75 + 0.062 * max(map(len, labels))))))


def _level_line(ax: Axes, level: float) -> None:
    """The level of EMM, in %, with its number."""
    ax.axhline(level, color=_GREY, linestyle="--", linewidth=1, zorder=1)
    ax.annotate(
        f"{level:g} %", (1, level), xycoords=("axes fraction", "data"), xytext=(3, 0), textcoords="offset points",
        va="center", ha="left", fontsize=8, color=_GREY,
    )  # fmt: skip


def _ratio_axis(ax: Axes, x: str) -> None:
    ax.set_ylim(-3, 105)
    ax.set_xlabel(x)
    ax.set_ylabel(_R_MEM)
    quiet(ax)


def _title(fig: Figure, ax: Axes, title: str | None, beside_legend: bool) -> None:
    """Above the figure, or above the axes alone, where a legend stands beside them."""
    if title and beside_legend:
        ax.set_title(textwrap.fill(title, 52), fontsize=11)
    elif title:
        fig.suptitle(title, fontsize=11)


def _label(text: str) -> str:
    """For a legend, which leaves out what begins with an underscore."""
    return f" {text}" if text.startswith("_") else text


def _legend(fig: Figure, title: str | None) -> None:
    labels = fig.axes[0].get_legend_handles_labels()[1]
    fig.legend(
        loc="outside lower center", frameon=False, fontsize=8, title=title, title_fontsize=8, alignment="left",
        handlelength=3.2, ncols=_columns(labels),
    )  # fmt: skip


def readable_ticks(sizes: np.ndarray) -> list[float]:
    """All sizes, or as many as fit beside each other on a logarithmic axis."""
    ticks, span = [], np.log(sizes.max() / sizes.min())
    for size in np.sort(sizes):
        if not ticks or np.log(size / ticks[-1]) >= 0.07 * span:
            ticks.append(float(size))
    return ticks


def format_size(size: float) -> str:
    """1500 -> "1.5k"."""
    return f"{size / 1000:g}k" if abs(size) >= 1000 else f"{size:g}"


_PAIR = {"between": "#0072B2", "own": "#C8372D", "other": "#6e6e6e"}


_PAIR_LABELS = {"between": "between the two networks", "own": "to the nearest own training image",
                "other": "between different latents"}  # fmt: skip


def agreement_figure(found: Agreement, path: str | os.PathLike, *, title: str | None = None) -> None:
    """Of one pair of networks: images for equal latents above, the distributions of the distances below.

    Raises
    ------
    ValueError
        If the suffix of `path` is no format that can be drawn.
    """
    check_format(path)
    fig = Figure(figsize=(6.9, 5.4), dpi=200, layout="constrained")
    top, ax = fig.subplots(2, 1, height_ratios=(1, 1.25))
    _latent_grid(top, found)
    distances = {"between": found.between, "own": np.concatenate(found.own), "other": found.other}
    bins = np.linspace(0, max(x.max() for x in distances.values()) or 1, 41)
    for name, x in distances.items():
        weights = np.full(len(x), 100 / len(x))
        ax.hist(
            x, bins, weights=weights, histtype="stepfilled", color=_PAIR[name], alpha=0.45, label=_PAIR_LABELS[name]
        )
    ax.set_xlabel("distance (root mean square of pixels, 0 to 255)")
    ax.set_ylabel("pairs of images (%)")
    _finish_agreement(fig, [ax], path, title)


def agreements_figure(rows: Sequence[dict[str, Any]], path: str | os.PathLike, *, title: str | None = None) -> None:
    """Of several pairs (`Agreement.row`): medians of the distances with the quartiles, and of the cosine, over |D|.

    Raises
    ------
    ValueError
        If there is no pair, or the suffix of `path` is no format that can be drawn.
    """
    if not rows:
        raise ValueError("There is no pair of networks to draw.")
    check_format(path)
    fig = Figure(figsize=(8.6, 3.6), dpi=200, layout="constrained")
    ax, right = fig.subplots(1, 2)
    rows = sorted(rows, key=lambda row: row["size_a"])
    sizes = np.array([row["size_a"] for row in rows], dtype=np.float64)

    def draw(to: Axes, name: str, colour: str, marker: str, label: str | None = None) -> None:
        low, median, high = (np.array([row[key] for row in rows]) for key in (f"{name}_q1", name, f"{name}_q3"))
        to.plot(sizes, median, color=colour, marker=marker, label=label)
        to.fill_between(sizes, low, high, color=colour, alpha=0.15, linewidth=0)

    for (name, label), marker in zip(_PAIR_LABELS.items(), "osD"):
        draw(ax, name, _PAIR[name], marker, label)
    draw(right, "cosine_centred", _PAIR["between"], "o")
    draw(right, "cosine_other_centred", _PAIR["other"], "o")
    ax.set_ylabel("distance (RMS of pixels, 0 to 255)")
    ax.set_ylim(0, None)
    right.set_ylabel("cosine, mean training image subtracted", fontsize=9)
    for each_ax in (ax, right):
        each_ax.set_xscale("log")
        each_ax.set_xticks(readable_ticks(sizes) if len(set(sizes)) > 1 else sizes[:1])
        each_ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: format_size(x)))
        each_ax.xaxis.set_minor_locator(NullLocator())
        each_ax.set_xlabel("training images of each network |D|")
    _finish_agreement(fig, [ax, right], path, title)


def _finish_agreement(fig: Figure, axes: Sequence[Axes], path: str | os.PathLike, title: str | None) -> None:
    for ax in axes:
        quiet(ax)
    fig.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", frameon=False, fontsize=8, ncols=3)
    if title:
        fig.suptitle(title, fontsize=11)
    save_figure(fig, path)


def _latent_grid(ax: Axes, found: Agreement, columns: int = 12) -> None:
    """Rows: nearest training image of A, image of A, image of B, nearest training image of B."""
    (a, b), n = found.networks, min(columns, len(found.seeds))
    rows = [a.images[found.nearest[0][:n]], found.images[0][:n], found.images[1][:n], b.images[found.nearest[1][:n]]]
    height, width = rows[0].shape[2:]
    canvas = np.full([4 * (height + 1), n * (width + 1), 3], 255, dtype=np.uint8)
    for r, row in enumerate(rows):
        for c, image in enumerate(row):
            y, x = r * (height + 1), c * (width + 1)
            canvas[y : y + height, x : x + width] = np.moveaxis(image, 0, -1)
    ax.imshow(canvas, interpolation="nearest")
    ax.set_xticks([])
    ax.set_yticks(
        [(r + 0.5) * (height + 1) for r in range(4)], ["nearest of A", "network A", "network B", "nearest of B"]
    )
    ax.tick_params(length=0, labelsize=8)
    ax.spines[:].set_visible(False)
