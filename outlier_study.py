"""Are outliers memorized last, and duplicates first? The two-moons study."""

import dataclasses
import sys
from pathlib import Path
from typing import Any

import click

from dnnlib.cli import Float, report_errors
from dnnlib.util import check_folder
from memorization.curve.group_curves import group_curves, group_figure, half_epoch, write_group_curves
from memorization.plots import check_format, save_figure
from memorization.runs import read_run
from torch_utils import distributed as dist
from toy.analysis import summarize
from toy.figures import memorization_figure, points_figure
from toy.files import write_points, write_summary, write_table
from toy.study import PRESETS, run_study
from training.options import device_option

EXIT_STOPPED = 75  # as of train.py: a signal ended the run, and the same command goes on

_COUNT = click.IntRange(min=0, max=10**7)
_POSITIVE = click.IntRange(min=1, max=10**7)
_REPEATS = click.IntRange(min=1, max=10_000)
_LENGTH = Float(min=0)


class _DefaultCommand(click.Group):
    """`outlier_study.py --preset=...` without a command is `outlier_study.py moons --preset=...`."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if args and args[0].startswith("-") and args[0] not in self.get_help_option_names(ctx):
            args = ["moons", *args]
        return super().parse_args(ctx, args)


@click.group(cls=_DefaultCommand, context_settings=dict(max_content_width=120))
def main() -> None:
    """Are outliers memorized last, and duplicates first?"""


def _setting(flag: str, help: str, metavar: str, type: Any) -> Any:
    """An option that overrides a number of the preset."""
    return click.option(flag, help=f"{help}  [default: the preset's]", metavar=metavar, type=type, default=None)


@main.command()
@click.option(
    "--preset", help="Published setting, or a small one", metavar="|".join(PRESETS), type=click.Choice(list(PRESETS)),
    default="quick", show_default=True,
)  # fmt: skip
@click.option("--out", help="Folder of the study", metavar="DIR", required=True)
@_setting("--points", "Points of the two moons", "INT", click.IntRange(min=2, max=10**7))
@_setting("--outliers", "Outliers, a cluster 2 standard deviations from the mean", "INT", _COUNT)
@_setting("--duplicates", "Copies of randomly chosen points", "INT", _COUNT)
@_setting("--jitter", "Standard deviation of what is added to copies; 0 = exact copies", "FLOAT", _LENGTH)
@_setting("--noise", "Noise of the moons, in their radii", "FLOAT", _LENGTH)
@_setting("--spread", "Standard deviation of the cluster of outliers", "FLOAT", _LENGTH)
@_setting(
    "--test-outliers/--no-test-outliers", "Put as many held-out outliers of the cluster into the test set", None, None
)  # fmt: skip
@_setting("--epochs", "Epochs of training", "INT", _POSITIVE)
@_setting("--repeats", "Networks, each with data of its own", "INT", _REPEATS)
@_setting(
    "--ratio", "Memorized: the nearest training point is nearer than the nearest test point by this", "FLOAT",
    Float(min=1),
)  # fmt: skip
@_setting(
    "--eval-schedule", "linear: measure every --eval-every epochs; log: --evaluations times, in geometric steps",
    "linear|log", click.Choice(["linear", "log"]),
)  # fmt: skip
@_setting("--eval-every", "Epochs from one evaluation to the next", "INT", _POSITIVE)
@_setting("--evaluations", "Evaluations of the logarithmic schedule, at most", "INT", _POSITIVE)
@_setting("--optimum-points", "Points of the theoretical optimum in each repeat; 0 = leave it out", "INT", _COUNT)
@_setting("--seed", "Seed of the first repeat; the others count on", "INT", _COUNT)
@click.option("--title", help="Title of the figure", metavar="TEXT")
@device_option
@report_errors
def moons(preset: str, out: str, title: str | None, device: str, **overrides: Any) -> None:
    """Train small diffusion models on two moons with outliers and duplicates, and see when each group is memorized.

    All repeats train at once. At the epochs of the schedule each generates as many points as its training set
    holds; one is memorized when its nearest training point is closer than its nearest test point by --ratio, and
    counts for the group of that training point.

    Ctrl-C leaves a state in the folder; the same command goes on from it.

    Examples:

    \b
    # See it work
    python outlier_study.py moons --preset=quick --out=studies/quick

    \b
    # The first published setting, with held-out outliers in the test set, measured at 40 epochs
    python outlier_study.py moons --preset=fig1 --test-outliers --eval-schedule=log --out=studies/fig1
    """  # noqa: D301
    check_folder(out)
    target = dist.init(device)
    given = {name: value for name, value in overrides.items() if value is not None}
    settings = dataclasses.replace(PRESETS[preset], **given)
    folder = Path(out)
    result = run_study(settings, folder, target)
    if result is None:
        click.echo(f'Stopped; the state is in "{folder}". The same command goes on from there.', err=True)
        sys.exit(EXIT_STOPPED)
    summary = summarize(result)
    write_table(result, folder / "memorized.csv")
    write_points(result, folder / "first-epoch.npz")
    write_summary(summary, folder / "summary.json")
    save_figure(memorization_figure(result, title), folder / "memorized.png")
    save_figure(points_figure(result), folder / "points.png")
    _print(summary, settings.test_outliers)
    click.echo(f"Figures: {folder / 'memorized.png'}, {folder / 'points.png'}")
    click.echo(f"Table:   {folder / 'memorized.csv'}; each training point: {folder / 'first-epoch.npz'}")
    click.echo(f"Record:  {folder / 'summary.json'}, {folder / 'options.json'}")


def _print(summary: dict[str, Any], test_outliers: bool) -> None:
    """The answers, for people."""
    click.echo(
        f"{summary['repeats']} repeats, {summary['epochs']} epochs, {summary['generated']} points generated: "
        f"{100 * summary['memorized']:.1f} % memorized at the end"
    )
    click.echo(
        f"{'':<10} {'memorized per training point':^27}  {'near the group, %':^27}  {'half of the final':^21}  "
        "half of the"
    )
    click.echo(
        f"{'group':<10} {'end':>7} {'chance':>9} {'optimum':>9}  {'end':>7} {'chance':>9} {'optimum':>9}  "
        f"{'count at epoch':^21}  rise of the share"
    )
    for name, row in summary["groups"].items():
        point = [_cell(row[f"{key}per_point"]) for key in ("", "chance_", "optimum_")]
        near = [_cell(row[f"{key}share"], 1, 100) for key in ("", "chance_", "optimum_")]
        click.echo(
            f"{name:<10} {point[0]:>7} {point[1]:>9} {point[2]:>9}  {near[0]:>7} {near[1]:>9} {near[2]:>9}  "
            f"{_interval(row['half']):^21}  {_interval(row['half_above_chance'])}"
        )
    for key, kind in (("half", "final count"), ("half_above_chance", "rise above chance")):
        p = summary["p_values"][key]
        click.echo(
            f"Half the {kind}: outliers later than inliers p = {_cell(p['outliers_later'], 4)}, duplicates earlier "
            f"p = {_cell(p['duplicates_earlier'], 4)} (sign flips over repeats, one-sided)"
        )
    auroc = summary["auroc"]
    click.echo(
        f"Outlier detection, AUROC: first memorized epoch {_interval(auroc['first epoch'], 3)}, distance of the 10th "
        f"neighbour {_interval(auroc['distance'], 3)}"
    )
    stop = summary["early_stop"]
    if stop["repeats_stopped"]:
        click.echo(
            f"Stop when outliers begin to be memorized: {stop['repeats_stopped']} of {summary['repeats']} repeats, at "
            f"epoch {stop['epoch']:g} (median); memorized {100 * stop['memorized']:.1f} % instead of "
            f"{100 * stop['memorized_end']:.1f} %, distance to the truth {stop['distance']:.3f} instead of "
            f"{stop['distance_end']:.3f} (best {stop['distance_best']:.3f})"
        )
    else:
        click.echo("Stop when outliers begin to be memorized: no repeat would have stopped.")
    click.echo(_verdict(summary, test_outliers))


def _verdict(summary: dict[str, Any], test_outliers: bool) -> str:
    """The sentence that answers the question of the study."""
    p = summary["p_values"]["half_above_chance" if test_outliers else "half"]["outliers_later"]
    if p is None:
        return "Outliers later? Cannot be told: there are none."
    if test_outliers and summary["groups"]["inlier"]["half_above_chance"][0] == "inf":
        return "Outliers later? Cannot be told: not even inliers are memorized beyond chance; more epochs may do it."
    if p < 0.05:
        return f"Outliers later? Yes (p = {p:.4f})."
    return f"Outliers later? This run does not show it (p = {p:.4f})."


@main.command()
@click.argument("run", metavar="RUN")
@click.option("--out", help="Figure; the CSV lies beside it  [default: RUN/groups.png]", metavar="FILE")
@click.option("--title", help="Title of the figure", metavar="TEXT")
@report_errors
def images(run: str, out: str | None, title: str | None) -> None:
    """Draw the memorization of each group of training images over the training of a network.

    RUN is a folder of train.py on a set of dataset_utils/dataset_inject.py, measured by mem_ratio.py against a
    reference with groups. Exact duplicates are at the same distance and so are never memorized by d1/d2: measure
    against the same set made with --copies=0, in which the duplicated images are marked but there once.

    Example:

    \b
    python dataset_utils/dataset_inject.py --source=digits --max-images=60 --dest=set.zip \\
        --duplicates=6 --copies=4 --outliers=6 --outliers-inverted
    python dataset_utils/dataset_inject.py --source=digits --max-images=60 --dest=reference.zip \\
        --duplicates=6 --copies=0 --outliers=6 --outliers-inverted
    python train.py --outdir=RUN --nosubdir --data=set.zip ...
    python mem_ratio.py --expdir=RUN --knn-ref=reference.zip --seeds=0-999
    python outlier_study.py images RUN
    """
    figure = Path(out) if out is not None else Path(run) / "groups.png"
    check_format(figure)
    curves = group_curves(read_run(run))
    click.echo(f"{'group':<12} {'images':>6} {'copied':>7} {'share':>6}  {'95 % interval':<14} {'half at epoch':>13}")
    for name, points in curves.items():
        last, half = points[-1], half_epoch(points)
        low, high = last.interval
        reached = "never" if half is None else f"{half:.0f}"
        copied = f"{100 * last.num_replayed / last.num_training:.0f} %"
        interval = f"[{low:.2f}, {high:.2f}]"
        click.echo(f"{name:<12} {last.num_training:>6} {copied:>7} {last.share:>6.2f}  {interval:<14} {reached:>13}")
    group_figure(curves, figure, title=title)
    write_group_curves(curves, figure.with_suffix(".csv"))
    click.echo(f"Figure: {figure}\nTable:  {figure.with_suffix('.csv')}")


def _cell(value: float | str | None, digits: int = 3, factor: float = 1) -> str:
    if value is None:
        return "-"
    return "never" if value == "inf" else f"{factor * value:.{digits}f}"


def _interval(values: list[float | str | None], digits: int = 1) -> str:
    median, low, high = (_cell(value, digits) for value in values)
    return f"{median} [{low}, {high}]"


if __name__ == "__main__":
    main()
