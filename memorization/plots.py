"""Figures: generated images above their nearest training images, the gap to the optimum, and the collapse of its
posterior. Curves over |D| are in `curve_plots`."""

import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import ListedColormap, Normalize
from matplotlib.figure import Figure  # without pyplot: no backend, no global state, nothing to close
from matplotlib.lines import Line2D
from matplotlib.mathtext import MathTextParser
from matplotlib.patches import Rectangle
from matplotlib.text import Text
from matplotlib.ticker import LogLocator

from dnnlib.util import atomic_write, check_file, printable
from memorization.measure.criteria import CRITERIA, THRESHOLD, memorized
from memorization.measure.posterior import LEVEL, PosteriorCurve

_RED, _GREY = "#c8372d", "#6e6e6e"


def neighbour_grid(
    generated: np.ndarray,  # uint8 [n, C, H, W]
    neighbours: np.ndarray,  # uint8 [n, C, H, W], nearest training image of each
    path: str | os.PathLike,
    *,
    distance: np.ndarray,  # float [n, 2], to the two nearest training images
    columns: int = 16,
    title: str | None = None,
) -> None:
    """Draw generated images, each above its nearest training image, sorted by d1/d2.

    Memorized ones are framed; the number below a pair is d1/d2. Small images are enlarged pixel by
    pixel, without smoothing. The suffix of `path` chooses the format.

    Raises
    ------
    ValueError
        If there are no images, the shapes do not fit together, or the suffix is no format.
    """
    distance = np.asarray(distance, dtype=np.float64)
    if generated.ndim != 4 or generated.shape != neighbours.shape or not len(generated):
        raise ValueError(
            f"A grid needs as many neighbours as generated images, [n, C, H, W] with n >= 1, "
            f"not {list(generated.shape)} and {list(neighbours.shape)}."
        )
    if distance.shape != (len(generated), 2):
        raise ValueError(f"A grid needs distances [{len(generated)}, 2], not {list(distance.shape)}.")
    check_format(path)
    flags = memorized(distance)
    with np.errstate(invalid="ignore"):
        quotient = distance[:, 0] / distance[:, 1]  # NaN (0/0) sorts last
    order = np.argsort(quotient, kind="stable")

    columns = min(columns, len(order))
    bands = -(-len(order) // columns)
    height, width = generated.shape[2:]
    scale = max(1, 64 // max(height, width))  # 8x8 becomes 64x64
    cell_h, cell_w, gap, text = height * scale, width * scale, 8, 22
    band_h = 2 * cell_h + gap // 2 + text
    canvas = np.full((bands * band_h + (bands - 1) * gap, columns * (cell_w + gap) + gap, 3), 255, dtype=np.uint8)

    # Margins, in pixels of the canvas: names of the rows left, title above.
    left, top, bottom, dpi = 84, 34, 8, 100
    fig_w, fig_h = canvas.shape[1] + left, canvas.shape[0] + top + bottom
    fig_w = max(fig_w, 620)  # room for the title
    fig = Figure(figsize=(fig_w / dpi, fig_h / dpi), dpi=dpi)
    ax = fig.add_axes(
        (left / fig_w, bottom / fig_h, canvas.shape[1] / fig_w, canvas.shape[0] / fig_h), xticks=[], yticks=[]
    )
    ax.set_axis_off()
    for place, i in enumerate(order):
        band, column = divmod(place, columns)
        y, x = band * (band_h + gap), gap + column * (cell_w + gap)
        for image, y0 in ((generated[i], y), (neighbours[i], y + cell_h + gap // 2)):
            canvas[y0 : y0 + cell_h, x : x + cell_w] = _enlarge(image, scale)
        if flags[i]:
            size = (cell_w + 3, 2 * cell_h + gap // 2 + 3)
            ax.add_patch(Rectangle((x - 2, y - 2), *size, fill=False, edgecolor=_RED, linewidth=2, clip_on=False))
        label = quotient_text(quotient[i], flags[i])
        color = _RED if flags[i] else _GREY
        ax.text(x + cell_w / 2, y + band_h - text / 2 + 2, label, ha="center", va="center", fontsize=8, color=color)
    ax.imshow(canvas, interpolation="nearest", extent=(-0.5, canvas.shape[1] - 0.5, canvas.shape[0] - 0.5, -0.5))
    for band in range(bands):
        y = band * (band_h + gap)
        rows = [("generated", y + cell_h / 2), ("nearest", y + 1.5 * cell_h + gap // 2)]
        for name, middle in rows + [(r"$d_1/d_2$", y + band_h - text / 2 + 2)]:
            ax.text(0, middle, name, ha="right", va="center", fontsize=9, color="0.2")
    caption = f"{int(flags.sum())} of {len(flags)} memorized (framed: $d_1/d_2$ < 1/3)"
    caption = f"{title}: {caption}" if title else caption
    fig.text((left + gap) / fig_w, 1 - top / 2 / fig_h, caption, ha="left", va="center", fontsize=10)
    save_figure(fig, path)


def quotient_text(quotient: float, is_memorized: bool) -> str:
    """d1/d2 with two digits, or as many as it takes to lie on its side of 1/3: 0.334 is not memorized, 0.33 is."""
    if np.isnan(quotient):
        return "0/0"
    for digits in (2, 3, 4):
        text = f"{quotient:.{digits}f}"
        if digits == 2 and abs(quotient - THRESHOLD) < 0.005:
            continue  # both sides would be 0.33
        if (float(text) < THRESHOLD) == is_memorized:
            return text
    return "1/3"


def ratio_histogram(
    distance: np.ndarray,  # float [n, >= 2], to the nearest training images
    path: str | os.PathLike,
    *,
    thresholds: Sequence[float] = (THRESHOLD,),  # of d1/d2; the first colours the memorized part
    title: str | None = None,
) -> None:
    """Draw the distribution of d1/d2 with the thresholds, and say which fraction of the images lies below each.

    Where d1 = d2 = 0 the quotient is undefined: such images cannot be drawn and lie below no threshold, but count
    in the fractions, and the figure says how many there are. The suffix of `path` chooses the format.

    Raises
    ------
    ValueError
        If there are no images, fewer than two columns or no thresholds, a threshold is not positive, or the suffix
        is no format.
    """
    quotient = CRITERIA["ratio"].score(distance)
    if not quotient.size:
        raise ValueError("There are no images whose d1/d2 could be drawn; measure at least one.")
    if not len(thresholds) or not all(0 < t < np.inf for t in thresholds):
        raise ValueError(f"A histogram of d1/d2 needs positive thresholds, at least one, not {list(thresholds)}.")
    check_format(path)
    defined = quotient[~np.isnan(quotient)]
    below = defined < thresholds[0]

    fig = Figure(figsize=(6.0, 3.8), dpi=200, layout="constrained")
    ax = fig.subplots()
    parts = [defined[below], defined[~below]]
    weights = [np.full(part.size, 100 / quotient.size) for part in parts]
    bins = np.linspace(0, 1, 61)  # 1/3 is an edge
    ax.hist(parts, bins=bins, weights=weights, stacked=True, color=[_RED, "#9db4cf"], edgecolor="white", linewidth=0.3)
    ax.set_xlim(0, 1)
    ax.set_ylim(0, None if defined.size else 1)
    ax.set_xlabel("distance to the nearest / to the second nearest training image, $d_1/d_2$")
    ax.set_ylabel("generated images (%)")
    ax.spines[["top", "right"]].set_visible(False)
    if undefined := quotient.size - defined.size:
        note = f"{undefined} of {quotient.size} images, with $d_1 = d_2 = 0$, are not drawn"
        ax.set_title(note, loc="right", fontsize=8, color=_GREY)

    # Thresholds: lines in the figure, fractions below it.
    styles = ["--", ":", "-.", (0, (6, 2, 1, 2, 1, 2)), (0, (1, 3)), (0, (8, 4))]
    for i, threshold in enumerate(thresholds):
        name = "1/3" if threshold == THRESHOLD else f"{threshold:g}"
        label = rf"$d_1/d_2$ < {name}: {100 * (defined < threshold).sum() / quotient.size:.1f} %"
        line = dict(color=_RED if i == 0 else "0.2", linestyle=styles[i % len(styles)], linewidth=1.4, label=label)
        ax.axvline(threshold, **line)
    fig.legend(frameon=False, fontsize=9, ncols=3, loc="outside lower center")
    count = f"{quotient.size:,} images"
    fig.suptitle(f"{title}, {count}" if title else count, fontsize=11)
    save_figure(fig, path)


def gap_curves(
    records: Sequence[dict[str, Any]],  # of the trajectory; those without a gap are left out
    path: str | os.PathLike,
    *,
    title: str | None = None,
) -> None:
    """Draw the gap to the optimum over sigma, both logarithmic, a line per snapshot; held-out images dashed.

    The colour is the training time in kimg, dark = late. Bands are +- 2 standard errors. Dotted is sigma^2, the gap
    of a denoiser that returns its input, while D* returns the training image.

    Raises
    ------
    ValueError
        If no record has a gap, or the suffix of `path` is no format that can be drawn.
    """
    records, kimg, norm, colors = _by_time(records, "mean")
    check_format(path)
    fig = Figure(figsize=(6.0, 4.0), dpi=200, layout="constrained")
    ax = fig.subplots()
    _log_axes(ax, r"noise level $\sigma$", r"gap: mean $\|D_\theta - D^*\|^2$ per pixel")
    limits = []
    for record, time in zip(records, kimg):
        gap = record["gap"]
        for prefix, style in [("", "-"), ("holdout_", "--")]:
            if prefix + "mean" not in gap:
                continue
            sigma = np.array(gap["sigma"], dtype=float)
            mean = np.array(gap[prefix + "mean"], dtype=float)  # None becomes NaN
            mean[mean <= 0] = np.nan  # the optimum itself
            limits += [0.5 * mean[mean > 0], 2 * mean[mean > 0]]
            error = 2 * np.nan_to_num(np.array(gap[prefix + "stderr"], dtype=float))
            color = colors(norm(time))
            ax.plot(sigma, mean, style, color=color, linewidth=1.5)
            ax.fill_between(sigma, np.maximum(mean - error, mean * 1e-3), mean + error, color=color, alpha=0.15, lw=0)
    ax.plot(sigma, sigma**2, ":", color=_GREY, linewidth=1.2, zorder=0)
    limits = np.concatenate(limits)
    if limits.size:
        ax.set_ylim(limits.min(), limits.max())
    legend = {"training images": "-", "held-out images": "--", r"$\sigma^2$, of a net that returns its input": ":"}
    if not any("holdout_mean" in r["gap"] for r in records):
        del legend["held-out images"]
    lines = [Line2D([], [], color=_GREY if style == ":" else "0.2", linestyle=style) for style in legend.values()]
    fig.legend(lines, legend, frameon=False, fontsize=8, ncols=3, loc="outside lower center")
    if len(set(kimg)) > 1:
        fig.colorbar(ScalarMappable(norm, colors), ax=ax, label="training images seen (thousands)")
    if title:
        ax.set_title(title, fontsize=11)
    save_figure(fig, path)


def loss_curves(
    records: Sequence[dict[str, Any]],  # of the trajectory; those without a gap are left out
    path: str | os.PathLike,
    *,
    title: str | None = None,
) -> None:
    """Draw the denoising loss over sigma, a line per snapshot, and the share of it that training images are spared.

    Left, logarithmic: the loss on training and (dashed) held-out images, bands +- 2 standard errors; dotted, that of D*
    on the same images, of the last snapshot. Right, where there are held-out images: the loss on held-out less that on
    training images, with its 95 % interval, by the loss on held-out images: 0 = no difference, 1 = training images
    are known by heart. The colour is the training time in kimg, dark = late.

    Raises
    ------
    ValueError
        If no record has a loss, or the suffix of `path` is no format that can be drawn.
    """
    records, kimg, norm, colors = _by_time(records, "loss")
    check_format(path)
    both = any("loss_gap" in record["gap"] for record in records)
    fig = Figure(figsize=(10.0 if both else 6.0, 4.0), dpi=200, layout="constrained")
    axes = np.atleast_1d(fig.subplots(1, 2 if both else 1))
    _log_axes(axes[0], r"noise level $\sigma$", r"denoising loss: mean $\|D_\theta - y\|^2$ per pixel")
    if both:
        _log_axes(axes[1], r"noise level $\sigma$", "1 - training loss / held-out loss")
        axes[1].set_yscale("linear")
        axes[1].axhline(0, color=_GREY, linewidth=1, zorder=0)
    for record, time in zip(records, kimg):
        gap, color = record["gap"], colors(norm(time))
        sigma = np.array(gap["sigma"], dtype=float)
        loss = {key: np.array(gap[key], dtype=float) for key in ("loss", "holdout_loss") if key in gap}
        for (key, mean), style in zip(loss.items(), ("-", "--")):
            error = 2 * np.nan_to_num(np.array(gap[f"{key}_stderr"], dtype=float))
            axes[0].plot(sigma, mean, style, color=color, linewidth=1.5)
            low = np.maximum(mean - error, mean * 1e-3)
            axes[0].fill_between(sigma, low, mean + error, color=color, alpha=0.15, lw=0)
        if record is records[-1]:
            for key, width in (("optimum_loss", 1.2), ("holdout_optimum_loss", 2.0)):
                best = np.array(gap.get(key, []), dtype=float)
                if best.size:
                    seen = best > 0.1 * np.nanmin(loss["loss"])  # below, D* has training images by heart
                    axes[0].plot(sigma[seen], best[seen], ":", color=_GREY, linewidth=width)
        if "loss_gap" in gap:
            difference, low, high = (
                np.array(gap[key], dtype=float) / loss["holdout_loss"]
                for key in ("loss_gap", "loss_gap_low", "loss_gap_high")
            )
            axes[1].plot(sigma, difference, color=color, linewidth=1.5)
            axes[1].fill_between(sigma, low, high, color=color, alpha=0.15, lw=0)
    legend = {"training images": ("-", 1.5, "0.2"), "held-out images": ("--", 1.5, "0.2")}
    legend |= {"optimum, training images": (":", 1.2, _GREY), "optimum, held-out images": (":", 2.0, _GREY)}
    if not both:
        legend = {name: how for name, how in legend.items() if "held-out" not in name}
    lines = [Line2D([], [], color=color, linestyle=style, linewidth=width) for style, width, color in legend.values()]
    fig.legend(lines, legend, frameon=False, fontsize=8, ncols=4, loc="outside lower center")
    if len(set(kimg)) > 1:
        fig.colorbar(ScalarMappable(norm, colors), ax=axes[-1], label="training images seen (thousands)")
    if title:
        fig.suptitle(title, fontsize=11)
    save_figure(fig, path)


def _by_time(
    records: Sequence[dict[str, Any]], key: str
) -> tuple[list[dict[str, Any]], list[float], Normalize, ListedColormap]:
    """Records whose gap has `key`, by their time; the times, and the colours of times."""
    records = sorted((r for r in records if key in (r.get("gap") or {})), key=lambda r: r["kimg"] or 0)
    if not records:
        raise ValueError("There is no gap to draw; measure it with mem_ratio.py --gap=N.")
    kimg = [r["kimg"] or 0 for r in records]
    norm = Normalize(min(kimg) if len(set(kimg)) > 1 else 0, max(*kimg, 1))
    colors = ListedColormap(colormaps["viridis_r"](np.linspace(0.12, 1, 256)))  # the lightest would not be seen
    return records, kimg, norm, colors


def collapse_curve(curves: Sequence[PosteriorCurve], path: str | os.PathLike, *, title: str | None = None) -> None:
    """Draw the median effective number of training images over sigma, falling as a sampler goes, a line per |D|.

    Bands reach from the first to the third quartile of the seeds; a diamond marks where the posterior has
    collapsed onto one image. Lower noise levels, where one image has all the weight, are left out.

    Raises
    ------
    ValueError
        If there are no curves, or the suffix of `path` is no format that can be drawn.
    """
    if not curves:
        raise ValueError("There are no curves to draw; trace at least one optimum first.")
    check_format(path)
    fig = Figure(figsize=(6.0, 4.0), dpi=200, layout="constrained")
    ax = fig.subplots()
    _log_axes(ax, r"noise level $\sigma$", "effective number of training images")
    last = min(curve.sigma[curve.high > 1.01].min(initial=curve.sigma[0]) for curve in curves)
    for i, curve in enumerate(curves):
        color = colormaps["viridis"](0.85 * (1 - i / max(len(curves) - 1, 1)))
        label = "never" if curve.collapse is None else rf"$\sigma$ = {curve.collapse:.2f}"
        ax.plot(curve.sigma, curve.median, color=color, linewidth=1.6, label=f"|D| = {curve.size:,}: {label}")
        ax.fill_between(curve.sigma, curve.low, curve.high, color=color, alpha=0.18, linewidth=0)
        if curve.collapse is not None:
            ax.plot(
                curve.collapse, LEVEL, "D", color=color, markersize=5.5, markeredgecolor="white", markeredgewidth=0.7,
                zorder=4,
            )  # fmt: skip
    ax.axhline(LEVEL, color=_GREY, linestyle=":", linewidth=1, zorder=0)
    ax.set_xlim(max(curve.sigma[0] for curve in curves) * 1.2, last / 3)
    ax.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    ax.xaxis.set_major_formatter("{x:g}")
    ax.legend(frameon=False, fontsize=9, title="collapse onto one image", title_fontsize=9)
    if title:
        ax.set_title(title, fontsize=11)
    save_figure(fig, path)


def _log_axes(ax: Axes, x: str, y: str) -> None:
    ax.set_xscale("log")
    ax.set_yscale("log")
    ax.set_xlabel(x)
    ax.set_ylabel(y)
    quiet(ax)


def quiet(ax: Axes) -> None:
    """How all axes of the project look: a light grid behind the data, no frame above and on the right."""
    ax.grid(color="0.92", linewidth=0.8)
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)


def check_format(path: str | os.PathLike) -> None:
    """Raise ValueError if the suffix of `path` is no format that can be drawn, OSError if `path` cannot be written."""
    suffix = Path(path).suffix.lower().lstrip(".")
    formats = ("png", "pdf", "svg", "jpg", "jpeg", "webp")
    if suffix not in formats:
        raise ValueError(f'"{path}" does not say a format for the figure; end it in one of .{", .".join(formats)}.')
    check_file(path)


def _enlarge(image: np.ndarray, scale: int) -> np.ndarray:
    """uint8 [C, H, W] -> [H*scale, W*scale, 3]; grayscale becomes gray."""
    image = np.moveaxis(image, 0, -1)
    image = image[..., :3] if image.shape[-1] >= 3 else image[..., :1].repeat(3, axis=-1)
    return image.repeat(scale, axis=0).repeat(scale, axis=1)


def save_figure(fig: Figure, path: str | os.PathLike) -> None:
    """Write a figure in the format that the suffix of `path` names, complete or not at all.

    Names of folders may hold anything: what cannot be printed is drawn as escapes, and dollars that enclose no formula
    as they are.
    """
    for text in fig.findobj(Text):
        text.set_text("\n".join(map(printable, text.get_text().split("\n"))))
        if "$" in text.get_text():
            try:
                MathTextParser("path").parse(text.get_text())
            except (ValueError, RecursionError):
                text.set_parse_math(False)
    buffer = io.BytesIO()
    fig.savefig(buffer, format=Path(path).suffix.lower().lstrip("."), dpi=fig.dpi)
    with atomic_write(path) as file:
        file.write(buffer.getvalue())
