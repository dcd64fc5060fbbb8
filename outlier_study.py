"""Are outliers memorized last, and duplicates first? The two-moons study."""

import dataclasses
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import click

from dnnlib.cli import Float, report_errors
from dnnlib.images import left_out_sentence
from dnnlib.util import check_file, check_folder
from memorization.curve.files import write_record
from memorization.curve.group_curves import (
    GroupRun,
    at_common_snapshots,
    group_records,
    group_run,
    group_timing,
    other_measurements,
)
from memorization.curve.group_output import describe_runs, group_figure, read_group_runs, summary, write_group_runs
from memorization.measure.controls import measure_held_out, measure_optimum
from memorization.plots import check_format, save_figure
from memorization.runs import OTHER_MEASUREMENTS, read_run
from memorization.stats.intervals import wilson_interval
from torch_utils import distributed as dist
from toy.analysis import summarize, timings
from toy.figures import memorization_figure, points_figure
from toy.files import read_summary, read_table, write_points, write_summary, write_table
from toy.study import PRESETS, Curves, run_study
from training.options import batch_option, device_option

EXIT_STOPPED = 75  # as of train.py: a signal ended the run, and the same command goes on

NULL = "null"  # folder of the negative control, in that of its study
PUBLISHED = "memorized-published"  # table and figure without the held-out outliers of the test set

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
@click.option("--out", help="Folder of the study; with --from-csv the figure", metavar="DIR", required=True)
@click.option("--from-csv", help="Draw the table of a study again, without training", metavar="FILE")
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
@click.option(
    "--null", help="Negative control in DIR/null: draw outliers and duplicates as inliers are drawn", is_flag=True
)  # fmt: skip
@click.option("--title", help="Title of the figure", metavar="TEXT")
@device_option
@report_errors
def moons(
    preset: str, out: str, from_csv: str | None, null: bool, title: str | None, device: str, **overrides: Any
) -> None:  # fmt: skip
    """Train small diffusion models on two moons with outliers and duplicates, and see when each group is memorized.

    All repeats train at once. At the end of the epochs of the schedule each generates as many points as its training
    set holds; one is memorized when its nearest training point is closer than its nearest test point by --ratio, and
    counts for the group of that training point.

    Each answer comes with its false positives: how often the same test, of the same networks, answers when inliers
    drawn at random stand for the group. --null trains on such data, too.

    With --test-outliers the points are measured a second time as published, without the held-out outliers: the same
    networks answer both ways.

    Ctrl-C leaves a state in the folder; the same command goes on from it.

    Examples:

    \b
    # See it work
    python outlier_study.py moons --preset=quick --out=studies/quick

    \b
    # Its negative control, in studies/quick/null; the first command then shows its answers, too
    python outlier_study.py moons --preset=quick --out=studies/quick --null

    \b
    # The first published setting, with held-out outliers in the test set, measured at 40 epochs
    python outlier_study.py moons --preset=fig1 --test-outliers --eval-schedule=log --out=studies/fig1

    \b
    # Its figure again from its table
    python outlier_study.py moons --from-csv=studies/fig1/memorized.csv --out=fig1.png
    """  # noqa: D301
    given = {name: value for name, value in overrides.items() if value is not None}
    if from_csv is not None:
        if given or null:
            raise click.UsageError("--from-csv draws a table as it is; leave out the options of a study.")
        _draw_table(read_table(from_csv), Path(out), title)
        return
    check_folder(out)
    target = dist.init(device)
    settings = dataclasses.replace(PRESETS[preset], **given, null=null)
    folder = Path(out) / NULL if null else Path(out)
    result = run_study(settings, folder, target)
    if result is None:
        click.echo(f'Stopped; the state is in "{folder}". The same command goes on from there.', err=True)
        sys.exit(EXIT_STOPPED)
    summary = summarize(result)
    tables = {"memorized": result} | ({} if result.published is None else {PUBLISHED: result.published})
    for name, measured in tables.items():
        write_table(measured, folder / f"{name}.csv")
        save_figure(memorization_figure(measured.curves(), title), folder / f"{name}.png")
    write_points(result, folder / "first-epoch.npz")
    write_summary(summary, folder / "summary.json")
    save_figure(points_figure(result), folder / "points.png")
    control = None if null else read_summary(folder / NULL, dataclasses.replace(settings, null=True))
    _print(summary, control)
    if control is None and not null:
        click.echo("Negative control: not run; the same command with --null runs it, and this one then shows it.")
    figures = [*(folder / f"{name}.png" for name in tables), folder / "points.png"]
    click.echo(f"Figures: {', '.join(map(str, figures))}")
    click.echo(
        f"Tables:  {', '.join(str(folder / f'{name}.csv') for name in tables)}; "
        f"each training point: {folder / 'first-epoch.npz'}"
    )
    click.echo(f"Record:  {folder / 'summary.json'}, {folder / 'options.json'}")
    click.echo(left_out_sentence(summary["left_out"]))


def _draw_table(curves: Curves, figure: Path, title: str | None) -> None:
    """The figure of a study from its table, and its answers; their false positives need the study."""
    check_format(figure)
    save_figure(memorization_figure(curves, title), figure)
    for group, timing in timings(curves).items():
        expected = "later" if group == "outlier" else "earlier"
        by_count = group == "outlier" and not curves.in_shares
        said = _said(dataclasses.asdict(timing), group, expected, curves.repeats, "repeats", by_count)
        click.echo(f"{group.capitalize()}s {expected}? {said}")
    click.echo(f"Figure: {figure}")


def _print(summary: dict[str, Any], control: dict[str, Any] | None) -> None:
    """The answers, for people; `control` is the summary of the negative control."""
    click.echo(
        f"{summary['repeats']} repeats, {summary['epochs']} epochs, {summary['generated']} points generated: "
        f"{100 * summary['memorized']:.1f} % memorized at the end"
    )
    click.echo(
        f"{'':<10} {'memorized per training point':^27}  {'near the group, %':^27}  {'epoch of half the rise':^24}"
    )
    click.echo(
        f"{'group':<10} {'end':>7} {'chance':>9} {'optimum':>9}  {'end':>7} {'chance':>9} {'optimum':>9}  "
        f"{'of the share':<22} of the count"
    )
    for name, row in summary["groups"].items():
        point = [_cell(row[f"{key}per_point"]) for key in ("", "chance_", "optimum_")]
        near = [_cell(row[f"{key}share"], 1, 100) for key in ("", "chance_", "optimum_")]
        click.echo(
            f"{name:<10} {point[0]:>7} {point[1]:>9} {point[2]:>9}  {near[0]:>7} {near[1]:>9} {near[2]:>9}  "
            f"{_interval(row['half']):<22} {_interval(row['half_count'])}"
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
    for line in _verdicts(summary):
        click.echo(line)
    if "published" in summary:
        published = summary["published"]
        outlier, stop = published["groups"]["outlier"], published["early_stop"]
        click.echo("As published, the same points against the test set without its outliers:")
        click.echo(
            f"  {100 * published['memorized']:.1f} % memorized at the end; of the points near outliers "
            f"{_cell(outlier['share'], 1, 100)} % (chance {_cell(outlier['chance_share'], 1, 100)}); AUROC of the "
            f"first memorized epoch {_interval(published['auroc']['first epoch'], 3)}; {stop['repeats_stopped']} of "
            f"{published['repeats']} repeats would stop"
        )
        for line in _verdicts(published):
            click.echo(f"  {line}")
    if control is not None:
        click.echo("Negative control, labels without meaning in networks of their own:")
        for line in _verdicts(control):
            click.echo(f"  {line}")


def _verdicts(summary: dict[str, Any]) -> list[str]:
    """The sentences that answer the questions of the study, each with its false positives."""
    lines = []
    for group, expected in (("outlier", "later"), ("duplicate", "earlier")):
        timing, by = summary["timing"][group], summary["outliers_by"] if group == "outlier" else "share"
        said = _said(timing, group, expected, summary["repeats"], "repeats", by == "count")
        answer = timing["answer"]
        if by == "count" and answer != "none":
            said += " By counts: without held-out outliers (--test-outliers) that is when points are generated there."
        lines.append(f"{group.capitalize()}s {expected}? {said}")
        if answer != "none":
            lines.append(f"  {_false_positives(summary['false_positives'][group], group)}")
    return lines


def _said(timing: dict[str, Any], group: str, expected: str, count: int, units: str, by_count: bool = False) -> str:
    """The answer for one group; `count` is the number of units of the test."""
    answer = timing["answer"]
    if timing["p_later"] is None:
        risen = "memorized points near inliers are more by the end" if by_count else "inliers are memorized by the end"
        reason = {
            "none": "there are none",
            "not risen": f"{risen}, {group}s not clearly; that is neither late nor early",
            "reference not risen": "not even inliers are memorized beyond chance; more epochs may do it",
        }
        return f"Cannot be told: {reason[answer]}."
    if count < 6:
        return f"Cannot be told: it takes at least 6 {units}, and there are {count}."
    p = min(1.0, 2 * min(timing["p_later"], timing["p_earlier"]))
    said = "Yes" if answer == expected else "Not shown" if answer == "not shown" else f"No, {answer}"
    return f"{said} (two-sided p = {p:.4f})."


def _false_positives(answers: dict[str, int], group: str) -> str:
    """How often the test answers where there is nothing to find."""
    total = sum(answers.values())
    wrong = answers.get("later", 0) + answers.get("earlier", 0)
    untold = total - wrong - answers.get("not shown", 0)
    low, high = wilson_interval(wrong, total)
    return (
        f"False positives: {wrong} of {total} random relabelings of inliers as {group}s "
        f"({100 * wrong / total:.1f} % [{100 * low:.1f}, {100 * high:.1f}]); {untold} cannot be told."
    )


@main.command()
@click.argument("runs", metavar="RUN...", nargs=-1)
@click.option("--from-csv", help="Draw the table of a figure again, without runs", metavar="FILE")
@click.option(
    "--out", help="Figure; CSV and JSON lie beside it  [default: groups.png in the first RUN]", metavar="FILE"
)
@click.option(
    "--held-out", help="Count copies of these images, too, by group: a control, of dataset_inject.py --held-out",
    metavar="ZIP|DIR",
)  # fmt: skip
@click.option("--optimum", help="Compare with the optimum of the training set, measured as the run was", is_flag=True)
@click.option("--title", help="Title of the figure", metavar="TEXT")
@batch_option
@device_option
@report_errors
def images(
    runs: tuple[str, ...],
    from_csv: str | None,
    out: str | None,
    held_out: str | None,
    optimum: bool,
    title: str | None,
    batch: int,
    device: str,
) -> None:
    """Draw the memorization of each group of training images over the training of a network.

    Several runs that differ in their seeds are drawn together, and those of each |D| in a row of their own; from 6 on
    they can show that a group is copied later or earlier than the inliers.

    RUN is a folder of train.py on a set of dataset_utils/dataset_inject.py, measured by mem_ratio.py against a
    reference with groups. Exact duplicates are at the same distance and so are never memorized by d1/d2: measure
    with --unique, so that each image is compared with once.

    --held-out=CONTROL says what of the copies of a group is chance: images that were drawn as the group was, and that
    training never saw, are added to the reference one by one, and what then counts as a copy of them is counted. It
    also says how far apart the images of each group are: the more isolated an image, the less d1/d2 asks of its copies.

    --optimum compares the end with the optimum of the training set, which replays nothing but training images, from the
    same seeds.

    Both are noted in the run, and are shown from then on. Give runs of several |D| their --held-out one |D| at a time,
    and then all of them without.

    Example:

    \b
    python dataset_utils/dataset_inject.py --source=digits --max-images=60 --dest=set.zip \\
        --duplicates=6 --copies=4 --outliers=6 --outliers-inverted --held-out=control.zip
    python train.py --outdir=RUN --nosubdir --data=set.zip ...
    python mem_ratio.py --expdir=RUN --knn-ref=set.zip --unique --seeds=0-999 --held-out=control.zip
    python outlier_study.py images RUN --optimum
    """
    if bool(runs) == (from_csv is not None):
        raise click.UsageError("Give either runs, or a table by --from-csv.")
    if from_csv is not None and out is None:
        raise click.UsageError("--from-csv needs --out, the figure.")
    if from_csv is not None and (held_out is not None or optimum):
        raise click.UsageError("--from-csv draws a table as it is; leave out --held-out and --optimum.")
    figure = Path(out) if out is not None else Path(runs[0]) / "groups.png"
    check_format(figure)
    if from_csv is not None:
        each = read_group_runs(from_csv)
        _print_groups(each)
        group_figure(each, figure, title=title)
        click.echo(f"Figure: {figure}")
        return
    check_file(figure, "--out")
    overlaps: dict[str, Counter[str]] = {}  # of each training set with the held-out images
    if held_out is not None or optimum:
        target = dist.init(device)
        for run in map(read_run, runs):
            records = group_records(run)
            if held_out is not None:
                trained_on = str(run.options["dataset_kwargs"].get("path"))
                overlaps[trained_on] = Counter(measure_held_out(run, records, held_out, target, batch))
            if optimum:
                measure_optimum(run, records[-1], target, batch)
    measured = [read_run(run) for run in runs]
    each, other_times = at_common_snapshots([group_run(run) for run in measured])
    answers = _print_groups(each)
    group_figure(each, figure, title=title)
    counts = dict(sum(overlaps.values(), Counter()))
    counts[OTHER_MEASUREMENTS] = sum(map(other_measurements, measured))
    counts["snapshots that not all runs of their |D| have"] = other_times
    write_group_runs(each, figure.with_suffix(".csv"))
    write_record(
        figure.with_suffix(".json"), command=sys.argv, counts=counts, runs=list(map(str, runs)), sizes=summary(each),
        answers=answers,
    )  # fmt: skip
    click.echo(f"Figure: {figure}\nTable:  {figure.with_suffix('.csv')}\nRecord: {figure.with_suffix('.json')}")
    click.echo(left_out_sentence(counts))


def _print_groups(runs: list[GroupRun]) -> dict[str, str]:
    """How the groups end, and whether some come later or earlier; return these answers."""
    for line in describe_runs(runs):
        click.echo(line)
    answers = {}
    for name, expected in (("outlier", "later"), ("duplicate", "earlier")):
        if any(name in run.curves for run in runs):
            timing, units = group_timing(runs, name)
            count = sum(number for number in units.values() if isinstance(number, int))
            lacking = [size for size, number in units.items() if not isinstance(number, int)]
            said = _said(dataclasses.asdict(timing), name, expected, count, "runs")
            if count and lacking:
                said += (
                    f" Without |D| = {', '.join(map(str, lacking))}, where {name}s or inliers have not clearly risen."
                )
            if count and len(units) - len(lacking) > 1:
                said += f" Of {count} runs, each against its own inliers, with the curve of its |D|."
            answers[f"{name}s {expected}"] = said
            click.echo(f"{name.capitalize()}s {expected}? {said}")
    return answers


def _cell(value: float | str | None, digits: int = 3, factor: float = 1) -> str:
    if value is None:
        return "-"
    return "never" if value == "inf" else f"{factor * value:.{digits}f}"


def _interval(values: list[float | str | None], digits: int = 1) -> str:
    median, low, high = (_cell(value, digits) for value in values)
    return f"{median} [{low}, {high}]"


if __name__ == "__main__":
    main()
