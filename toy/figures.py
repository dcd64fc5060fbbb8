"""Figures of the two-moons study."""

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure  # without pyplot: no backend, no global state, nothing to close

from memorization.plots import quiet
from toy.data import GROUPS
from toy.study import Curves, Result, share

_COLORS = dict(inlier="#3b6fb6", duplicate="#d9822b", outlier="#c8372d")
_GREY = "#6e6e6e"


def memorization_figure(curves: Curves, title: str | None = None) -> Figure:
    """Memorized points by group over epochs: of all generated points, per training point, and of those near the group.

    Lines are means over repeats, bands reach from the lowest to the highest repeat. Dashed: the theoretical optimum.
    Dotted: fresh draws of the true distribution, what is called memorized by chance.
    """
    fig = Figure(figsize=(14.0, 4.2), dpi=160, layout="constrained")
    axes = fig.subplots(1, 3)
    counts = (curves.memorized, curves.nearest)
    references = (curves.chance, curves.chance_nearest, curves.optimum, curves.optimum_nearest)
    means = [np.broadcast_to(values.mean(axis=0), values.shape) for values in references]  # a share is of pooled points
    chance, optimum = means[:2], means[2:]
    views = [
        (lambda memorized, nearest: 100 * curves.fraction(memorized), "memorized, % of all generated points"),
        (lambda memorized, nearest: curves.per_point(memorized), "memorized points per training point"),
        (
            lambda memorized, nearest: 100 * share(memorized, nearest),
            "memorized, % of points near the group",
        ),
    ]
    for ax, (view, label) in zip(axes, views):
        for g, name in enumerate(GROUPS):
            if not curves.sizes[g]:
                continue
            color, lines = _COLORS[name], view(*counts)[..., g]  # [R, E]
            ax.plot(curves.epochs, lines.mean(axis=0), color=color, linewidth=1.6, label=f"{name}s")
            ax.fill_between(curves.epochs, lines.min(axis=0), lines.max(axis=0), color=color, alpha=0.15, linewidth=0)
            if len(curves.epochs) == 1:
                ax.plot(curves.epochs, lines.mean(axis=0), "o", color=color)
            ax.axhline(view(*chance)[:, g].mean(), color=color, linestyle=":", linewidth=1.2)
            if not np.isnan(optimum[0]).any():
                ax.axhline(view(*optimum)[:, g].mean(), color=color, linestyle="--", linewidth=1.2)
        _epoch_axis(ax, curves)
        ax.set_ylabel(label)
        ax.set_ylim(bottom=0)
    axes[0].plot([], [], "--", color=_GREY, label="theoretical optimum")
    axes[0].plot([], [], ":", color=_GREY, label="by chance (fresh draws)")
    fig.legend(*axes[0].get_legend_handles_labels(), frameon=False, fontsize=9, ncols=5, loc="outside lower center")
    if title:
        fig.suptitle(title, fontsize=11)
    return fig


def points_figure(result: Result) -> Figure:
    """Repeat 0: its training points by group, the points generated last, and when each training point was memorized."""
    data, first = result.data[0], result.first[0]
    fig = Figure(figsize=(12.0, 4.0), dpi=160, layout="constrained")
    axes = fig.subplots(1, 3, sharex=True, sharey=True)
    size = float(np.clip(8000 / len(data.train), 0.6, 14))
    for g, name in enumerate(GROUPS):
        rows = data.group == g
        axes[0].scatter(*data.train[rows].T, s=size, color=_COLORS[name], linewidths=0, label=f"{name}s")
    axes[0].legend(frameon=False, fontsize=9, markerscale=max(1.0, (14 / size) ** 0.5))
    axes[0].set_title("training points", fontsize=11)
    axes[1].scatter(*result.last.T, s=size, color="0.25", linewidths=0)
    axes[1].set_title(f"generated at epoch {result.epochs[-1]}", fontsize=11)
    never = first == 0
    axes[2].scatter(*data.train[never].T, s=size, color="0.75", linewidths=0)
    norm = "log" if (first > 0).any() and result.epochs[-1] > 20 else "linear"
    drawn = axes[2].scatter(*data.train[~never].T, s=size, c=first[~never], cmap="viridis_r", norm=norm, linewidths=0)
    fig.colorbar(drawn, ax=axes[2], label="epoch")
    axes[2].set_title("first memorized at epoch (grey: never)", fontsize=11)
    low, high = data.train.min(axis=0) - 0.5, data.train.max(axis=0) + 0.5
    for ax in axes:
        ax.set_aspect("equal")
        ax.set_xlim(low[0], high[0])
        ax.set_ylim(low[1], high[1])
        ax.spines[["top", "right"]].set_visible(False)
    return fig


def _epoch_axis(ax: Axes, curves: Curves) -> None:
    if len(set(np.diff(curves.epochs))) > 1:  # not in even steps
        ax.set_xscale("log")
        ax.xaxis.set_major_formatter("{x:g}")
    ax.set_xlabel("epochs trained")
    quiet(ax)
