"""What varies with |D|: the memorization ratio of runs and EMM; the noise level at which the optimum collapses."""

import os
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource
from tqdm import tqdm

from dnnlib import EasyDict
from dnnlib.cli import Float, report_errors
from dnnlib.images import left_out_sentence
from dnnlib.locks import file_lock
from dnnlib.util import check_file, check_folder, printable
from memorization.curve.agreement import (
    AGREEMENT_COLUMNS,
    agreement_record,
    compare_networks,
    open_network,
    read_agreement_csv,
)
from memorization.curve.compare import compare_runs, comparison_record, write_distances
from memorization.curve.effects import EFFECT_COLUMNS, effect_lines, effect_rows, effects
from memorization.curve.figures import (
    agreement_figure,
    agreements_figure,
    curve_figure,
    timescales_figure,
    trajectory_figure,
)
from memorization.curve.files import (
    read_curve_csv,
    read_timescales_csv,
    read_trajectory_csv,
    runs_table,
    write_curve_csv,
    write_curve_json,
    write_json,
    write_record,
    write_trajectory_csv,
)
from memorization.curve.lines import (
    AXES,
    INTERPOLATIONS,
    REPLICATES,
    Line,
    Trajectory,
    curve_lines,
    line_notes,
    trajectories,
)
from memorization.curve.quality import MEASURES, quality_notes, run_quality
from memorization.curve.tables import write_csv
from memorization.curve.timescales import (
    LEVEL,
    RUN_COLUMNS,
    TIMESCALE_COLUMNS,
    TOLERANCE,
    Timescales,
    run_rows,
    slope_text,
    timescale_record,
    timescale_rows,
)
from memorization.curve.timescales import timescales as find_timescales
from memorization.measure.posterior import posterior_curves
from memorization.measure.quality import Measure
from memorization.origins import ONE_RUN_COLUMNS, ORIGIN_COLUMNS, origin_table, origins, run_row, run_table
from memorization.plots import check_format, collapse_curve
from memorization.records import format_int_list, jsonl_path
from memorization.report.folder import read_runs_folder
from memorization.report.report import only_factor, write_report
from memorization.runs import LOG, OTHER_MEASUREMENTS, RUN_FOLDERS, Run, find_runs, other_measurements, read_run
from memorization.search.design import MIN_RUNS
from memorization.search.executors import Executor, LocalExecutor, SubmititExecutor, visible_gpus
from memorization.search.job import EXIT_STOPPED
from memorization.search.learning_rate import read_training
from memorization.search.search import (
    LOCK,
    PLAN,
    Plan,
    Range,
    Search,
    SearchSpec,
    choose_subset,
    describe_result,
    digest_source,
)
from memorization.selection import Selection, select_runs
from torch_utils import distributed
from training.options import batch_option, device_option, sampler_options, seeds_option

_runs_argument = click.argument("runs", metavar="RUN_OR_FOLDER...", nargs=-1, required=True)
_some_runs_argument = click.argument("runs", metavar="RUN_OR_FOLDER...", nargs=-1)
_by_option = click.option(
    "--by", help="One line per value of this key of the options, or of the dataset  [default: one line]", metavar="KEY"
)
_level_option = click.option(
    "--level", help="Ratio that defines EMM, 1 - epsilon", metavar="FLOAT", type=float, default=0.9, show_default=True
)
_FRACTION = Float(min=0, max=1, min_open=True, max_open=True)
_seed_sd_option = click.option(
    "--seed-sd",
    help="Spread between training seeds, standard deviation of logit R_mem  [default: from the runs]",
    metavar="FLOAT",
    type=Float(min=0),
)
_keep_option = click.option(
    "--keep",
    help="A run folder that counts although it would be left out (stopped, other images or epochs, the same network "
    "as another); several allowed; all: every one",
    metavar="DIR|all",
    multiple=True,
)
_title_option = click.option("--title", help="Title of the figure", metavar="TEXT")
_quality_option = click.option(
    "--quality",
    help="Measure of quality to take  [default: the first that was measured]",
    metavar="|".join(MEASURES),
    type=click.Choice(list(MEASURES)),
)


def _x_option(default: str) -> Callable:
    return click.option(
        "--x", "axis", help="What counts the time", metavar="|".join(AXES), type=click.Choice(AXES), default=default,
        show_default=True,
    )  # fmt: skip


@click.group(context_settings=dict(max_content_width=120))
def main() -> None:
    """Compare runs and optima over the size of their training sets."""


@main.command()
@_some_runs_argument
@_by_option
@click.option(
    "--against",
    help="Also by how much each line differs from this one, as a table and OUT-effects.csv",
    metavar="VALUE",
)
@click.option("--from-csv", help="Draw the CSV of a curve again, without runs", metavar="FILE")
@click.option(
    "--out", help="Figure; CSV and JSON lie beside it", metavar="FILE", default="curve.png", show_default=True
)
@_level_option
@_seed_sd_option
@click.option(
    "--interpolation",
    help="How EMM is read: off a fit on the logit scale, or off straight lines in log |D|, as published figures are",
    metavar="logit|linear",
    type=click.Choice(INTERPOLATIONS),
    default="logit",
    show_default=True,
)
@_keep_option
@_title_option
@report_errors
def curve(
    runs: tuple[str, ...],
    by: str | None,
    against: str | None,
    from_csv: str | None,
    out: str,
    level: float,
    seed_sd: float | None,
    interpolation: str,
    keep: tuple[str, ...],
    title: str | None,
) -> None:
    """Draw R_mem over |D| of all measured runs at or below the given folders, and estimate EMM.

    A run counts with the highest ratio over its snapshots; runs of one size, which should differ in the seed
    alone, are averaged. Runs that are no seeds of one setting are left out, and named: those that were stopped, are on
    other images, were trained for another number of epochs, or are the same network as another. A run and the one
    that it continues are one. EMM is the largest |D| at which the ratio is still --level, read off a falling curve
    that is fitted to all sizes, with a 95 % interval over images and seeds. How much seeds differ is taken from sizes
    with several runs, from other lines, or from --seed-sd; where it is not known, the interval is that of the images
    only, and says so. "below" and "at least" say that the sizes do not reach far enough.

    KEY is any option of train.py (arch, num_channels, cond, weight_decay, ...) or other key of
    training_options.json, of the dataset (num_classes, channels, keys of its dataset.json, dataset: its name), or
    folder: the folder that the run folder lies in.

    Examples:

    \b
    # Draw the curve of all runs in a folder
    python emm.py curve training-runs --out=figures/basic.png

    \b
    # A line for each width of the network
    python emm.py curve training-runs --by=num_channels --out=figures/width.png

    \b
    # And by how much R_mem and EMM of each width differ from those of 128 channels, with intervals
    python emm.py curve training-runs --by=num_channels --against=128 --out=figures/width.png

    \b
    # That figure again from its table, with the same --by and --title; no runs are needed
    python emm.py curve --from-csv=figures/width.csv --by=num_channels --out=again.png
    """  # noqa: D301
    check_format(out)
    if bool(runs) == (from_csv is not None):
        raise click.UsageError("Give either runs, or the table of a curve by --from-csv.")
    if against is not None and by is None:
        raise click.UsageError("--against compares the lines of a factor; say which with --by.")
    if from_csv is not None:
        refuse_beside_table(("level", "seed_sd", "interpolation", "keep", "against"), "--by, --title and --out")
        if len(lines := read_curve_csv(from_csv)) > 1 and by is None:
            raise click.UsageError(f'"{from_csv}" has {len(lines)} lines; say --by, the factor that they are of.')
        notes = line_notes(lines, by)
        for note in notes:
            tell(f"Note: {note}.")
        if notes:
            tell("Note: options that a note names are for a curve that is drawn from its runs.")
        print_curves(lines, by)
        curve_figure(lines, out, by=by, title=title)
        click.echo(f"Figure: {out}")
        return
    table, record = Path(out).with_suffix(".csv"), Path(out).with_suffix(".json")
    differences = Path(out).with_name(f"{Path(out).stem}-effects.csv") if against is not None else None
    for path in (table, record, *([differences] if differences else [])):
        check_file(path)
    measured, left_out = read_runs(runs)
    selection = selected(measured, by, keep, left_out)
    lines, notes = curve_lines(selection.runs, by, level=level, seed_sd=seed_sd, interpolation=interpolation)
    notes += [*line_notes(lines, by), *selection.remarks]
    for line in lines:
        warn_about(line.differing, line.name and f"{by} = {line.name}")
    if any(run.adaptive for run in selection.runs):
        notes.append("some ratios are of adaptive measurements, which stop early: sure on the side of their bar only")
    found = effects(lines, against) if against is not None else []
    for note in notes:
        tell(f"Note: {note}.")

    print_curves(lines, by)
    if found:
        click.echo("\n".join(effect_lines(found, by)))
    curve_figure(lines, out, by=by, title=title)
    write_curve_csv(lines, table)
    rows = effect_rows(found)
    if differences is not None:
        write_csv(EFFECT_COLUMNS, rows, differences)
    write_curve_json(
        lines, record, by=by, replicates=REPLICATES, command=sys.argv, notes=notes, left_out=left_out,
        kept=as_text(selection.kept), joined=as_text(selection.joined), counts=left_out_counts(left_out, selection),
        effects=[dict(zip(EFFECT_COLUMNS, row)) for row in rows],
    )  # fmt: skip
    click.echo(f"Figure: {out}\nTable:  {table}\nRecord: {record}")
    if differences is not None:
        click.echo(f"Effects: {differences}")
    click.echo(left_out_sentence(left_out_counts(left_out, selection)))


@main.command()
@_some_runs_argument
@_by_option
@click.option("--from-csv", help="Draw the CSV of a trajectory again, without runs", metavar="FILE")
@click.option("--per-run", help="One line per run, also where runs differ in the seed alone", is_flag=True)
@_x_option("epochs")
@click.option("--log", help="Logarithmic time axis", is_flag=True)
@_quality_option
@click.option(
    "--out", help="Figure; CSV and JSON lie beside it", metavar="FILE", default="trajectory.png", show_default=True
)
@_level_option
@_keep_option
@_title_option
@report_errors
def trajectory(
    runs: tuple[str, ...],
    by: str | None,
    from_csv: str | None,
    per_run: bool,
    axis: str,
    log: bool,
    quality: str | None,
    out: str,
    level: float,
    keep: tuple[str, ...],
    title: str | None,
) -> None:
    """Draw R_mem and, where it was measured, quality over the training, a line for each |D| and each value of --by.

    Runs of one |D| and value, which should differ in the seed alone, are averaged. The band is the 95 % interval
    of a single run, and reaches from the lowest to the highest of several. Runs that are no seeds of one setting are
    left out, as by curve; --per-run, which averages none, draws all of them.

    Examples:

    \b
    # How memorization grows, for each |D|
    python emm.py trajectory training-runs --out=figures/epochs.png

    \b
    # Memorization beside quality (mem_ratio.py --quality), over the steps
    python emm.py trajectory training-runs --x=steps --log --out=figures/clocks.png

    \b
    # With and without labels
    python emm.py trajectory training-runs --by=cond --out=figures/labels.png

    \b
    # A figure again from its table, with the same --log and --title; no runs are needed
    python emm.py trajectory --from-csv=figures/labels.csv --out=again.png
    """  # noqa: D301
    check_format(out)
    if bool(runs) == (from_csv is not None):
        raise click.UsageError("Give either runs, or the table of a trajectory by --from-csv.")
    if from_csv is not None:
        refuse_beside_table(("by", "per_run", "axis", "quality", "level", "keep"), "--log, --title and --out")
        read = read_trajectory_csv(from_csv)
        measure = MEASURES.get(read.measure)
        print_trajectories(read.trajectories, measure)
        trajectory_figure(
            read.trajectories, out, level=read.level, log=log, title=title, floor=read.heldout,
            quality=None if measure is None else measure.label,
        )  # fmt: skip
        click.echo(f"Figure: {out}")
        return
    table, record = Path(out).with_suffix(".csv"), Path(out).with_suffix(".json")
    for path in (table, record):
        check_file(path)
    if not 0 < level <= 1:
        raise ValueError(f"The level of EMM must lie between 0 and 1, not {level}; 0.9 is usual.")
    measured, left_out = read_runs(runs)
    selection = selected(measured, by, keep, left_out, averaged=not per_run)
    qualities = {run.path: run_quality(run, quality) for run in selection.runs}
    known = [q for q in qualities.values() if q is not None]
    if quality is not None and not known:
        raise ValueError(f"{quality} was measured of none of these runs; see mem_ratio.py --quality.")
    if len({q.measure for q in known}) > 1:
        raise ValueError("The runs have different measures of quality; choose one that all have with --quality.")
    lines, notes = trajectories(
        selection.runs, by, per_run=per_run, axis=axis,
        quality=lambda run: () if (found := qualities[run.path]) is None else found.points,
    )  # fmt: skip
    notes += quality_notes(list(qualities.values()))
    for line in lines:
        warn_about(line.differing, line.name)
    for note in [*notes, *selection.remarks]:
        tell(f"Note: {note}.")

    measure = MEASURES[known[0].measure] if known else None
    print_trajectories(lines, measure)
    floors = {q.heldout for q in known}
    floor = floors.pop() if len(floors) == 1 else None
    label = None if measure is None else measure.label
    trajectory_figure(lines, out, level=level, log=log, title=title, quality=label, floor=floor)
    write_trajectory_csv(lines, table, level=level, measure=measure.name if measure else "", heldout=floor)
    counts = left_out_counts(left_out, selection)
    write_record(
        record, by=by, command=sys.argv, notes=[*notes, *selection.remarks], left_out=left_out, counts=counts,
        kept=as_text(selection.kept), joined=as_text(selection.joined),
    )  # fmt: skip
    click.echo(f"Figure: {out}\nTable:  {table}\nRecord: {record}\n{left_out_sentence(counts)}")


@main.command()
@_some_runs_argument
@_by_option
@click.option("--from-csv", help="Draw the CSVs of this command again, without runs", metavar="FILE")
@_x_option("steps")
@click.option(
    "--level", help="R_mem at which memorization has begun: tau_mem", metavar="FLOAT", type=_FRACTION, default=LEVEL,
    show_default=True,
)  # fmt: skip
@click.option(
    "--tolerance", help="Quality is reached this close to its best, as a share of the best: tau_gen", metavar="FLOAT",
    type=Float(min=0, min_open=True), default=TOLERANCE, show_default=True,
)  # fmt: skip
@_quality_option
@click.option(
    "--out", help="Figure; CSV and JSON lie beside it", metavar="FILE", default="timescales.png", show_default=True
)
@_keep_option
@_title_option
@report_errors
def timescales(
    runs: tuple[str, ...],
    by: str | None,
    from_csv: str | None,
    axis: str,
    level: float,
    tolerance: float,
    quality: str | None,
    out: str,
    keep: tuple[str, ...],
    title: str | None,
) -> None:
    """When do models become good, and when do they begin to copy? tau_gen and tau_mem per |D|, and how they grow.

    tau_gen is the first time at which the quality (mem_ratio.py --quality) is within --tolerance of its best, tau_mem
    the first at which R_mem reaches --level, between snapshots by a monotone curve. Intervals are over training seeds
    where some |D| has several runs, else over images only, and say so; a time that is not reached is a bound. The
    slope is that of log time on log |D|: 1 for tau_mem and 0 for tau_gen in Bonnaire et al. 2025. The figure has both
    times over |D|, and R_mem over time / |D|, on which the curves fall onto one another where the slope is 1.

    Examples:

    \b
    # All runs of a study
    python emm.py timescales training-runs --out=figures/timescales.png

    \b
    # Another bar of memorization, and the coverage of the held-out images as quality
    python emm.py timescales training-runs --level=0.5 --quality=coverage

    \b
    # The figure again from its tables (timescales.csv, and timescales-runs.csv beside it)
    python emm.py timescales --from-csv=figures/timescales.csv --out=again.png
    """  # noqa: D301
    check_format(out)
    if bool(runs) == (from_csv is not None):
        raise click.UsageError("Give either runs, or the table of this command by --from-csv.")
    if from_csv is not None:
        refuse_beside_table(("by", "axis", "level", "tolerance", "quality", "keep"), "--title and --out")
        found = read_timescales_csv(from_csv)
        print_timescales(found, None)
        timescales_figure(found, out, title=title)
        click.echo(f"Figure: {out}")
        return
    table, record = Path(out).with_suffix(".csv"), Path(out).with_suffix(".json")
    courses = runs_table(table)
    for path in (table, courses, record):
        check_file(path)
    measured, left_out = read_runs(runs)
    selection = selected(measured, by, keep, left_out)
    found, notes = find_timescales(selection.runs, by, axis=axis, level=level, tolerance=tolerance, measure=quality)
    if quality is not None and not any(t.gen for t in found):
        raise ValueError(f"{quality} was measured of none of these runs; see mem_ratio.py --quality.")
    if not any(t.gen for t in found):
        notes.append("no quality was measured, and there is no tau_gen; see mem_ratio.py --quality")
    notes += selection.remarks
    for note in notes:
        tell(f"Note: {note}.")
    print_timescales(found, by)
    timescales_figure(found, out, title=title)
    write_csv(TIMESCALE_COLUMNS, timescale_rows(found), table)
    write_csv(RUN_COLUMNS, run_rows(found), courses)
    counts = left_out_counts(left_out, selection)
    write_record(
        record, by=by, command=sys.argv, notes=notes, left_out=left_out, counts=counts,
        kept=as_text(selection.kept), joined=as_text(selection.joined),
        lines=[timescale_record(t) for t in found],
    )  # fmt: skip
    click.echo(f"Figure: {out}\nTable:  {table}\nRuns:   {courses}\nRecord: {record}\n{left_out_sentence(counts)}")


@main.command()
@click.argument("runs", metavar="RUN_A RUN_B", nargs=2)
@click.option("--kimg", help="Both at this snapshot  [default: each at its highest]", metavar="INT", type=int)
@click.option("--confidence", help="Of the interval", metavar="FLOAT", type=_FRACTION, default=0.95, show_default=True)
@click.option("--out", help="JSON of the comparison", metavar="FILE", default="compare.json", show_default=True)
@click.option("--csv", "table", help="Also a CSV of the distances of every image, one per run, beside it", is_flag=True)
@report_errors
def compare(runs: tuple[str, str], kimg: int | None, confidence: float, out: str, table: bool) -> None:
    """By how much two measured runs differ in R_mem, and whether that can be chance.

    The interval and the test are about the two networks: images of the same seeds, which begin with the same
    noise, are compared pair by pair (McNemar's exact test), others as independent draws (Fisher's). What another
    training seed would do, one run of each cannot say; train several and draw them with emm.py curve.

    Example:

    \b
    # Two widths on the same images
    python emm.py compare training-runs/00000-narrow training-runs/00001-wide --out=width.json --csv
    """
    check_file(out)
    tables = [Path(out).with_name(f"{Path(out).stem}-{letter}.csv") for letter in "ab"] if table else []
    for path in tables:
        check_file(path)
    found = compare_runs(*(read_run(run) for run in runs), kimg=kimg, confidence=confidence)
    for letter, side in zip("AB", found.sides):
        n, k = side.record["num_samples"], side.record["num_memorized"]
        click.echo(
            f"{letter}  {100 * k / n:6.2f} %  {k:,} of {n:,} images, kimg {side.record['kimg']}  {side.run.path}"
        )
    d = found.difference
    click.echo(
        f"A - B  {100 * d.value:+.2f} points, {100 * d.confidence:g} % interval "
        f"[{100 * d.low:+.2f}, {100 * d.high:+.2f}]"
        f"{' of pairs' if d.paired else ''}, p = {d.p_value:.2g} ({d.test})"
    )
    for note in found.notes:
        click.echo(printable(f"Note: {note}."))
    for side, path in zip(found.sides, tables):
        write_distances(side, path)
        click.echo(f"Table:  {path}")
    write_json(comparison_record(found) | {"command": sys.argv}, out)
    click.echo(f"Record: {out}")


@main.command()
@click.argument("runs", metavar="RUN_A RUN_B...", nargs=-1)
@click.option("--from-csv", help="Draw the CSV of several pairs again, without runs", metavar="FILE")
@click.option("--kimg", help="All at this snapshot  [default: the last of each]", metavar="INT", type=int)
@seeds_option("0-255")
@batch_option
@click.option("--allow-common", help="Images may be in both training sets: they are noted", is_flag=True)
@click.option(
    "--out", help="Figure; CSV and JSON lie beside it", metavar="FILE", default="agreement.png", show_default=True
)
@sampler_options
@device_option
@_title_option
@report_errors
def agreement(
    runs: tuple[str, ...],
    from_csv: str | None,
    kimg: int | None,
    seeds: list[int],
    batch: int,
    allow_common: bool,
    out: str,
    device: str,
    title: str | None,
    **sampler_kwargs: Any,
) -> None:
    """Do two networks that were trained on different images make the same images of the same latents?

    Both are sampled with the same seeds. Printed is the median distance between their images, that to the nearest
    training image of each, and the difference of the two with a 95 % interval: above 0, each network is nearer to what
    it was trained on than to the other network. Several pairs, RUN_A RUN_B RUN_A RUN_B ..., are drawn over |D|.

    Examples:

    \b
    # Two halves of a set
    python dataset_tool.py --source=digits --dest=a.zip --split=0/2
    python dataset_tool.py --source=digits --dest=b.zip --split=1/2
    python train.py --data=a.zip --outdir=runs/a --nosubdir --seed=1 ...
    python train.py --data=b.zip --outdir=runs/b --nosubdir --seed=2 ...
    python emm.py agreement runs/a runs/b

    \b
    # The figure of several pairs again from its table
    python emm.py agreement --from-csv=figures/agreement.csv --out=again.png
    """  # noqa: D301
    if bool(runs) == (from_csv is not None):
        raise click.UsageError("Give either pairs of runs, or the table of this command by --from-csv.")
    if len(runs) % 2:
        raise click.UsageError("Name pairs of runs: RUN_A RUN_B, or RUN_A RUN_B RUN_A RUN_B ...")
    check_format(out)
    heading = f"{'|D|':>8} {'between':>8} {'own':>7} {'other':>7} {'between - own':>14}  {'95 % interval':<18} cosine"
    if from_csv is not None:
        refuse_beside_table(("kimg", "seeds", "batch", "allow_common", "device", *sampler_kwargs), "--title and --out")
        rows = read_agreement_csv(from_csv)
        if len(rows) == 1:
            raise ValueError(f'"{from_csv}" is of one pair, whose figure shows images; draw it from its runs.')
        click.echo("\n".join([heading, *map(agreement_line, rows)]))
        agreements_figure(rows, out, title=title)
        click.echo(f"Figure: {out}")
        return
    table, record = Path(out).with_suffix(".csv"), Path(out).with_suffix(".json")
    for path in (table, record):
        check_file(path)
    target = distributed.init(device)
    found = []
    try:
        click.echo(heading)
        for pair in zip(runs[::2], runs[1::2]):
            networks = [open_network(run, kimg, target) for run in pair]
            f = compare_networks(
                *networks, seeds, batch=batch, sampler_kwargs=sampler_kwargs, device=target, allow_common=allow_common
            )
            found.append(f)
            click.echo(agreement_line(f.row))
    finally:
        distributed.shutdown()
    for note in dict.fromkeys(note for f in found for note in f.notes):
        tell(f"Note: {note}.")
    if len(found) == 1:
        agreement_figure(found[0], out, title=title)
    else:
        agreements_figure([f.row for f in found], out, title=title)
    write_csv(AGREEMENT_COLUMNS, [f.row.values() for f in found], table)
    sampler = {key: str(v) if v == float("inf") else v for key, v in sampler_kwargs.items() if v is not None}
    write_record(
        record, command=sys.argv, pairs=[agreement_record(f) for f in found], seeds=format_int_list(seeds),
        sampler=sampler,
    )  # fmt: skip
    click.echo(f"Figure: {out}\nTable:  {table}\nRecord: {record}\n{left_out_sentence({})}")


@main.command()
@click.argument("traces", metavar="TRACE...", nargs=-1, required=True)
@click.option("--out", help="Figure", metavar="FILE", default="collapse.png", show_default=True)
@click.option("--title", help="Title of the figure", metavar="TEXT")
@report_errors
def collapse(traces: tuple[str, ...], out: str, title: str | None) -> None:
    """Draw how many training images the optimum still averages, over the noise level, for several |D|.

    TRACE is a CSV of generate_optim.py --trace. The posterior counts as collapsed onto one image where the
    median effective number (exp of the entropy) over the seeds first falls below 2.

    Example:

    \b
    # Two sizes
    python generate_optim.py --network=digits-100.zip --outdir=out --trace=100.csv
    python generate_optim.py --network=digits.zip --outdir=out --trace=all.csv
    python emm.py collapse 100.csv all.csv --out=collapse.png
    """
    check_format(out)
    curves = posterior_curves(traces)
    click.echo(f"{'|D|':>8} {'seeds':>6} {'sigma of collapse':>18}  quartiles of the seeds")
    for c in curves:
        median, first, third = ("never" if s is None else format(s, ".3f") for s in (c.collapse, *c.collapse_quartiles))
        click.echo(f"{c.size:>8} {c.seeds:>6} {median:>18}  {first} to {third}")
    collapse_curve(curves, out, title=title)
    click.echo(f"Figure: {out}")


@main.command()
@click.argument("folder", metavar="DIR")
@click.option("--out", help="The page  [default: DIR/report.html]", metavar="FILE")
@click.option(
    "--by", help="One curve per value of this key, as for curve  [default: the one that differs]", metavar="KEY"
)
@_level_option
@_seed_sd_option
@_keep_option
@click.option("--title", help="Title of the page", metavar="TEXT")
@report_errors
def report(
    folder: str,
    out: str | None,
    by: str | None,
    level: float,
    seed_sd: float | None,
    keep: tuple[str, ...],
    title: str | None,
) -> None:
    """Write a study as one HTML page: all that lies in the run folders at and below DIR.

    The page holds EMM, curves, runs, training, decisions of a search, pictures (PNG files in DIR and in its run
    folders), options, versions, and the commands that repeat each run. It needs no other file and no network.
    Runs that cannot be read, or do not count (as by curve), are listed with the reason.

    Example:

    \b
    # A study of the width of the network
    python emm.py report training-runs --by=num_channels --title="Width, CIFAR-10"
    """  # noqa: D301
    path = Path(out) if out is not None else Path(folder) / "report.html"
    check_file(path, "--out")
    found = read_runs_folder(folder)
    if by is None:
        by = only_factor(found)
    found = found.select(by, keep)
    for name, reason in found.left_out.items():
        tell(f"Left out: {name} ({reason}).")
    for note in found.notes:
        tell(f"Note: {note}.")
    given = {"out": out, "by": by, "title": title, "level": f"{level:g}", "seed-sd": seed_sd}
    command = ["python", "emm.py", "report", folder, *(f"--{k}={v}" for k, v in given.items() if v is not None)]
    command += [f"--keep={path}" for path in keep]
    write_report(found, path, by=by, level=level, seed_sd=seed_sd, title=title, command=command)
    click.echo(f"{len(found.runs)} runs, {path.stat().st_size / 2**20:.1f} MiB\nReport: {path}")
    click.echo(left_out_sentence(found.left_out_counts()))


@main.command(name="runs")
@click.argument("folders", metavar="RUN_OR_FOLDER...", nargs=-1, required=True)
@click.option(
    "--per-run", help="One line per run: |D|, seed, learning rate, loss, images memorized, commit", is_flag=True
)
@click.option("--out", help="The table as CSV, too", metavar="FILE")
@report_errors
def list_origins(folders: tuple[str, ...], per_run: bool, out: str | None) -> None:
    """What runs were made with, and how long they took: commit, machine, torch, threads, time.

    One line for each of the given folders and each way in which the runs at and below it were trained. Training is the
    time of all sessions of the runs, with what train.py measured on the way; measuring is that of mem_ratio.py for
    generating and comparing images, without --gap and --quality. Runs that were trained and not measured (to choose a
    learning rate, say) count, too, and are said. A commit that ends in -dirty had changes that were
    not committed.

    With --per-run each run has a line of its own, under each of the folders below which it lies: |D|, training seed,
    learning rate, epochs so far, training loss (mean of the ticks of the last quarter), how many of its images the
    snapshot that memorizes most has copied, and what is particular about that ratio (adaptive, another reference, one
    class). The CSV has images seen, machine and seconds, too. What is not recorded, or not measured, is "-", and empty
    in the CSV.

    Examples:

    \b
    # All factors of a study
    python emm.py runs studies/small/* --out=origins.csv
    # The counts of every run
    python emm.py runs studies/small/* --per-run --out=runs.csv
    """  # noqa: D301
    if out is not None:
        check_file(out, "--out")
    found: list[tuple[str, Run]] = []
    left_out: dict[str, str] = {}
    for folder in folders:
        paths, missing = find_runs([folder])
        for path in [*paths, *missing]:
            try:
                if path in missing and os.path.lexists(jsonl_path(path / LOG)):  # measured, and not to be read
                    raise ValueError(missing[path])
                run = read_run(path) if path not in missing else read_training(path)
                if run.seconds is None and path in missing:  # nothing was trained
                    raise ValueError(missing[path])
            except (ValueError, OSError) as err:
                left_out[str(path)] = str(err).rstrip(".")
            else:
                found.append((folder, run))
    for path, reason in left_out.items():
        tell(f"Left out: {path} ({reason}).")
    if not found:
        raise click.ClickException("No run found; train with train.py and measure with mem_ratio.py.")
    if per_run:
        rows = [run_row(folder, run) for folder, run in found]
        columns, lines = ONE_RUN_COLUMNS, run_table(rows)
    else:
        table = origins(found)
        rows, columns, lines = [origin.row() for origin in table], ORIGIN_COLUMNS, origin_table(table)
    click.echo("\n".join(lines))
    if out is not None:
        write_csv(columns, rows, out)
        click.echo(f"Table: {out}")
    click.echo(left_out_sentence({RUN_FOLDERS: len(left_out)}))


@main.command(context_settings=dict(max_content_width=120))
# What is searched.
@click.option(
    "--source", help="Images to take the training sets from, see dataset_tool.py", metavar="PATH", required=True
)
@click.option("--outdir", help="Folder of the search", metavar="DIR", required=True)
@click.option("--low", help="Smallest |D|", metavar="INT", type=click.IntRange(min=2), required=True)
@click.option("--high", help="Largest |D|", metavar="INT", type=click.IntRange(min=3), required=True)
@click.option(
    "--tolerance",
    help="The search ends when the ends of the interval of EMM have at most this quotient",
    metavar="FLOAT",
    type=Float(min=1.001),
    default=1.2,
    show_default=True,
)
@click.option(
    "--confidence",
    help="Of that interval, over images and training seeds",
    metavar="FLOAT",
    type=_FRACTION,
    default=0.9,
    show_default=True,
)
@click.option(
    "--max-runs", help="Or with as many runs", metavar="INT", type=click.IntRange(min=1), default=40, show_default=True
)
@click.option("--expand", help="Go on beyond --low and --high where EMM is not between them", is_flag=True)
@click.option(
    "--level",
    help="Ratio that defines EMM, 1 - epsilon",
    metavar="FLOAT",
    type=_FRACTION,
    default=0.9,
    show_default=True,
)
@click.option(
    "--subset",
    help="As many images of each class, or the first of all  [default: balanced if there are classes]",
    metavar="balanced|first",
    type=click.Choice(["balanced", "first"]),
)
# How each run is measured.
@seeds_option("0-9999")
@click.option(
    "--measure",
    help="Further options of mem_ratio.py, for example '--batch=256 --steps=40'",
    metavar="OPTIONS",
    default="",
)
# Where the runs run.
@click.option(
    "--executor",
    help="This machine, or Slurm; submitit-local tries out the latter here",
    metavar="local|slurm|submitit-local",
    type=click.Choice(["local", "slurm", "submitit-local"]),
    default="local",
    show_default=True,
)
@click.option("--jobs", help="Runs at a time", metavar="INT", type=click.IntRange(min=1), default=1, show_default=True)
@click.option(
    "--nproc", help="Processes per run", metavar="INT", type=click.IntRange(min=1), default=1, show_default=True
)
@device_option
@click.option("--partition", help="Slurm: partition", metavar="NAME")
@click.option("--gpus", help="Slurm: GPUs per run  [default: --nproc]", metavar="INT", type=click.IntRange(min=0))
@click.option(
    "--time",
    "minutes",
    help="Slurm: time limit; a run that needs longer is queued again",
    metavar="MINUTES",
    type=click.IntRange(min=1),
    default=1440,
    show_default=True,
)
@click.option(
    "--slurm",
    help="Slurm: any other option, for example account=me; several allowed",
    metavar="KEY=VALUE",
    multiple=True,
)
@click.option("-n", "--dry-run", help="Only say what would be trained", is_flag=True)
@click.argument("train_options", metavar="[-- TRAIN_OPTIONS...]", nargs=-1, type=click.UNPROCESSED)
@report_errors
def search(**kwargs: Any) -> None:
    """Find EMM: train and measure runs of the sizes that tell most of it, until its interval is narrow enough.

    Each run has a training seed and latents of its own (the first those of --seeds, the next as many after them), is
    trained with train.py and TRAIN_OPTIONS, and measured with mem_ratio.py. After each, a curve is fitted to all, with
    the spread between seeds; the next size is the one that makes EMM more certain by the most per training image. DIR
    holds plan.json (every decision), runs/ (run folders), data/ (training sets) and jobs/ (commands and logs).
    Interrupted, the same command goes on where it was; range, tolerance, confidence and where the runs run may then be
    others.

    Examples:

    \b
    # Handwritten digits on a laptop
    python emm.py search --source=digits --outdir=digits-search --low=8 --high=128 --seeds=0-999 --device=cpu \\
        -- --num-channels=16 --cres=1,2 --num-blocks=1 --attn-resolutions=4 --dropout=0 --augment=0 --batch=16 \\
        --lr=1e-2 --ema=4 --ema_mode=mode1 --duration=60

    \b
    # CIFAR-10 on a cluster, three runs at a time on 8 GPUs each
    python emm.py search --source=cifar-10-python.tar.gz --outdir=cifar10-search --low=500 --high=8000 \\
        --executor=slurm --jobs=3 --nproc=8 --partition=gpu --measure=--batch=512 \\
        -- --precond=vp --num-blocks=2 --augment=0 --window-size=0 --lr=2e-4 --duration=2000
    """  # noqa: D301
    opts = EasyDict(kwargs)
    if opts.low >= opts.high:
        raise click.UsageError(f"--low={opts.low} is not less than --high={opts.high}.")
    spec = search_spec(opts)
    if opts.high > spec.largest:
        kind = "class-balanced " if spec.subset == "balanced" else ""
        raise click.UsageError(f"--high={opts.high}: {opts.source} has {kind}training sets of {spec.largest} at most.")
    where = Range(
        opts.low, opts.high, opts.tolerance, opts.confidence, opts.max_runs, jobs=opts.jobs, expand=opts.expand
    )
    if opts.dry_run:
        print_plan(Search(spec, where, Plan(spec.outdir / PLAN, spec.settings()), executor=None), opts)
        click.echo("Nothing is trained: --dry-run.")
        return
    parameters = slurm_parameters(opts)
    check_folder(spec.outdir)
    with file_lock(spec.outdir / LOCK, wait=False) as mine:
        if not mine:
            raise ValueError(f'Another search is at work in "{spec.outdir}"; wait for it or stop it.')
        plan = Plan(spec.outdir / PLAN, spec.settings())
        with SearchBar() as bar:
            executor = search_executor(opts, spec, parameters)
            work = Search(spec, where, plan, executor, report=bar.write, progress=bar.show)
            print_plan(work, opts)
            bar.start(work)
            try:
                emm = work.run()
            except KeyboardInterrupt:
                bar.write(f"Stopped after {work.trained_kimg():g} kimg; the same command goes on.")
                sys.exit(EXIT_STOPPED)
    for line in describe_result(emm, plan.result):
        click.echo(line)
    images, grid = sum(decision["images"] for decision in plan.decisions), plan.result["grid"]
    click.echo(
        f"Spent:   {work.trained_kimg():g} kimg of training in {len(plan.decisions)} runs; {images} images generated"
    )
    if grid is not None:
        click.echo(
            f"Grid:    |D| = {', '.join(map(str, grid['sizes']))} with {grid['runs_per_size']} runs each would be as "
            f"precise, by the fitted curve, and take {grid['kimg']:g} kimg"
        )
    click.echo(f"Plan:    {plan.path}\nCurve:   python emm.py curve {shlex.quote(opts.outdir)}")
    click.echo(left_out_sentence(plan.result["left_out"]))


def read_runs(paths: Sequence[str]) -> tuple[list[Run], dict[str, str]]:
    """The measured runs at and below the paths, and {folder: reason} of those left out, which are reported."""
    found, left_out = find_runs(paths)
    only = not found and len(left_out) == 1  # the error says it
    for folder, reason in () if only else left_out.items():
        tell(f"Left out: {folder} ({reason}).")
    if not found:
        why = "".join(f": {folder} ({reason})" for folder, reason in left_out.items()) if only else ""
        raise ValueError(f"No measured run found{why}; train with train.py and measure with mem_ratio.py.")
    points = []
    for run in found:
        try:
            points.append(read_run(run))
        except (ValueError, OSError) as err:
            if len(found) == 1:
                raise
            left_out[run] = str(err)
            tell(f"Left out: {run} ({err})")
    if not points:
        raise click.ClickException("None of the measured runs can be read.")
    return points, {str(folder): reason for folder, reason in left_out.items()}


def selected(
    runs: Sequence[Run], by: str | None, keep: Sequence[str], left_out: dict[str, str], *, averaged: bool = True
) -> Selection:
    """The runs that count; the others are reported, and added to `left_out`."""
    selection = select_runs(runs, by, keep=keep, averaged=averaged)
    for folder, reason in as_text(selection.left_out).items():
        tell(f"Left out: {folder} is {reason}; --keep={shlex.quote(folder)} takes it all the same.")
        left_out[folder] = reason
    return selection


def left_out_counts(left_out: dict[str, str], selection: Selection) -> dict[str, int]:
    """What was left out of a curve or trajectory, by what it is."""
    return {RUN_FOLDERS: len(left_out), OTHER_MEASUREMENTS: other_measurements(selection.runs)}


def as_text(reasons: dict[Path, str]) -> dict[str, str]:
    return {str(folder): reason for folder, reason in reasons.items()}


def tell(text: str) -> None:
    """A line of stderr, in which names of folders may hold anything."""
    click.echo(printable(text), err=True)


def warn_about(differing: Sequence[str], line: str) -> None:
    if differing:
        where = f"the runs of {line}" if line else "these runs"
        tell(f"Note: {where} differ in more than |D| and seed: {', '.join(differing)}.")


def print_curves(lines: Sequence[Line], by: str | None) -> None:
    """The points of all lines in one table, and EMM of each."""
    width = max(len(by), *(len(printable(line.name)) for line in lines)) if by else 0

    def left(text: str) -> str:
        return f"{printable(text):<{width}} " if by else ""

    click.echo(f"{left(by)}{'|D|':>8} {'epochs':>10} {'R_mem %':>9}  {'95 % interval':<16} {'runs':>4}")
    for line in lines:
        for p in line.points:
            interval = f"[{100 * p.ci_low:.1f}, {100 * p.ci_high:.1f}]"
            row = f"{p.size:>8} {p.epochs:>10.0f} {100 * p.ratio:>9.2f}  {interval:<16} {p.runs:>4}"
            click.echo(left(line.name) + row)
    for line in lines:
        spread = f"  (sd between seeds {line.seed_sd:.2f} of logit R_mem)" if line.seed_sd is not None else ""
        click.echo(f"{left(line.name)}{line.emm}  {line.emm_interval}{spread}")


def print_trajectories(lines: Sequence[Trajectory], measure: Measure | None) -> None:
    """How each line ends, where it is highest, and where the quality is best."""
    axis, width = lines[0].axis, max(4, *(len(printable(line.name)) for line in lines))
    where = axis if axis != "epochs" else "epoch"
    more = f"  {'best ' + measure.name:>15}  at {where}" if measure is not None else ""
    click.echo(f"{'line':<{width}} {'runs':>4} {axis:>10} {'R_mem % at the end':>19} {'highest':>8}  at {where}{more}")
    for line in lines:
        best = int(line.ratio.argmax())
        row = (
            f"{printable(line.name):<{width}} {line.num_runs:>4} {line.time[-1]:>10.0f} {100 * line.ratio[-1]:>19.2f} "
            f"{100 * line.ratio[best]:>8.2f}  {line.time[best]:.0f}"
        )
        if line.quality is not None and measure is not None:
            value = line.quality.value
            best = int(value.argmin() if measure.lower_is_better else value.argmax())
            row = f"{row:<{width + 56}} {value[best]:>14.4g}  {line.quality.time[best]:.0f}"
        click.echo(row)


def agreement_line(row: dict[str, Any]) -> str:
    """A pair of networks (`Agreement.row`), below the heading of agreement."""
    interval = f"[{row['ci_low']:+.1f}, {row['ci_high']:+.1f}]"
    return (
        f"{row['size_a']:>8} {row['between']:>8.1f} {row['own']:>7.1f} {row['other']:>7.1f} "
        f"{row['difference']:>+14.1f}  {interval:<18} {row['cosine_centred']:.3f}"
    )


def refuse_beside_table(names: Sequence[str], allowed: str) -> None:
    """Options that say what to compute have no say where a table is drawn again, and the figure needs a name."""
    given = click.get_current_context().get_parameter_source
    if any(given(name) is not ParameterSource.DEFAULT for name in names):
        raise click.UsageError(f"--from-csv draws a table as it is: only {allowed} go with it.")
    if given("out") is ParameterSource.DEFAULT:
        raise click.UsageError("--from-csv needs --out, the figure to draw.")


def print_timescales(found: Sequence[Timescales], by: str | None) -> None:
    """A row per |D| and clock, then the slopes."""
    for t in found:
        if t.name:
            click.echo(printable(f"{by} = {t.name}" if by else t.name))
        what = f"tau_mem: R_mem {100 * t.level:g} %"
        if t.measure is not None:
            what = f"tau_gen: {t.measure} within {100 * t.tolerance:g} % of its best; {what}"
        click.echo(f"{what}; time in {t.axis}")
        click.echo(f"{'|D|':>8} {'':<8} {'time':>16}  {'95 % interval':<34} runs")
        for clock in t.clocks:
            for s in clock.sizes:
                interval = "bound" if s.reached < s.num_runs else f"[{s.low}, {s.high}]"
                interval += " images only" if s.images_only else ""
                click.echo(f"{s.size:>8} {clock.name:<8} {str(s.time):>16}  {interval:<34} {s.num_runs}")
        for clock in t.clocks:
            click.echo(slope_text(clock))


# ----------------------------------------------------------------------------
# Search.


def search_spec(opts: EasyDict) -> SearchSpec:
    """What the options say to search; those that train.py or mem_ratio.py would refuse are refused here."""
    import mem_ratio
    import train

    own = ["outdir", "data", "device", "nosubdir", "overwrite", "desc", "resume", "dry_run", "show_options"]
    own += ["total_kimg", "total_steps"]  # a search compares sizes at the same number of epochs
    training = passed_on(train.main, ["--outdir=.", "--data=."], opts.train_options, own, "TRAIN_OPTIONS")
    try:
        measure = tuple(shlex.split(opts.measure))
    except ValueError as err:
        raise click.UsageError(f"--measure: {err}.") from None
    own = ["expdir", "network", "knn_ref", "log", "seeds", "bar", "confidence", "until_above", "watch", "device"]
    passed_on(mem_ratio.main, [], measure, own, "--measure")
    subset, largest = choose_subset(opts.source, opts.subset or "auto")
    return SearchSpec(
        outdir=Path(os.path.realpath(opts.outdir)), source=opts.source, subset=subset, largest=largest,
        source_sha256=digest_source(opts.source),
        train_options=opts.train_options, duration=training["duration"], seed=training["seed"] or 0,
        measure_options=measure, seeds=format_int_list(opts.seeds), images=len(opts.seeds), level=opts.level,
        nproc=opts.nproc, device=opts.device,
    )  # fmt: skip


def passed_on(
    command: click.Command,
    required: Sequence[str],  # stand-ins for options that it cannot do without
    words: Sequence[str],  # what the user passes on to it
    own: Sequence[str],  # names of the options that are not the user's to give
    where: str,  # what an error message calls the words
) -> dict[str, Any]:
    """The options that `command` would see; a UsageError if it would refuse them, or one is of those in `own`."""
    try:
        options = command.make_context(command.name, [*required, *words]).params
        alone = command.make_context(command.name, list(required)).params
    except click.ClickException as err:
        raise click.UsageError(f"{where}: {err.format_message()}") from None
    for name in own:
        if options[name] != alone[name]:
            flag = next(option.opts[-1] for option in command.params if option.name == name)
            raise click.UsageError(f"{where}: {flag} is set by the search itself; leave it out there.")
    return options


def search_executor(opts: EasyDict, spec: SearchSpec, parameters: dict[str, Any]) -> Executor:
    if opts.executor == "local":
        return LocalExecutor(visible_gpus() if opts.device in ("auto", "cuda") else (), opts.nproc)
    return SubmititExecutor(spec.outdir / "jobs" / "submitit", opts.executor.removeprefix("submitit-"), parameters)


def slurm_parameters(opts: EasyDict) -> dict[str, Any]:
    """What submitit is told of the options."""
    parameters = dict(name="emm-search", timeout_min=opts.minutes, slurm_partition=opts.partition)
    parameters["gpus_per_node"] = opts.gpus if opts.gpus is not None else opts.nproc * (opts.device != "cpu")
    for text in opts.slurm:
        key, equals, value = text.partition("=")
        if not key or not equals:
            raise click.UsageError(f'--slurm: "{text}" is not KEY=VALUE.')
        parameters[f"slurm_{key}"] = int(value) if value.isdigit() else value
    return parameters


def print_plan(work: Search, opts: EasyDict) -> None:
    """What is searched, what is known, and what it may cost."""
    known, kimg = work.plan.decisions, work.spec.kimg
    drawn = f"{'class-balanced' if work.spec.subset == 'balanced' else 'the first'} images of {opts.source}"
    click.echo(
        f"Search:  EMM at {100 * opts.level:g} % from |D| = {work.low} to {work.high} ({drawn}), until the ends of its "
        f"{100 * opts.confidence:g} % interval are within a factor of {opts.tolerance:g}"
    )
    if known:
        click.echo(f"Known:   {len(known)} runs are finished, with {work.trained_kimg():g} kimg of training")
    if work.plan.started or work.next_sizes():
        click.echo(
            f"Expect:  {MIN_RUNS} to {opts.max_runs} runs in all, the more the more seeds differ, most near EMM; "
            f"each {kimg(work.low):g} (|D| = {work.low}) to {kimg(work.high):g} kimg (|D| = {work.high}) of training, "
            f"and {len(opts.seeds)} images per snapshot"
        )
    else:
        click.echo("Expect:  nothing is left to train" + (" within this range" if opts.expand else ""))
    click.echo(f"Logs:    {work.spec.outdir / 'jobs'}")


class SearchBar:
    """One line of progress: the training of a search so far; other lines are written above it."""

    def __enter__(self) -> "SearchBar":
        self._bar = None
        return self

    def __exit__(self, *exc_info: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def start(self, work: Search) -> None:
        done = work.trained_kimg()
        self._work = work
        self._bar = tqdm(
            total=None, initial=done, unit="kimg", leave=False, disable=None,
            bar_format="{n:.1f} kimg [{elapsed}{postfix}]",
        )  # fmt: skip

    def write(self, text: str) -> None:
        tqdm.write(text, file=sys.stdout)
        sys.stdout.flush()

    def show(self, working: Sequence[str]) -> None:
        """Take what each run at work is doing."""
        if not self._bar.disable:
            self._bar.n = self._work.trained_kimg()
            self._bar.set_postfix_str(", ".join(working))


if __name__ == "__main__":
    main()
