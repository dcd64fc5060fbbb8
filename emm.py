"""What varies with |D|: the memorization ratio of runs and EMM; the noise level at which the optimum collapses."""

import csv
from collections.abc import Sequence
from pathlib import Path

import click

from dnnlib.cli import report_errors
from dnnlib.util import atomic_write
from memorization.collapse import posterior_curves
from memorization.emm import CurvePoint, curve_points, differing_options, emm_estimate, find_runs, run_point
from memorization.plots import check_format, collapse_curve, emm_curve

COLUMNS = ("size", "epochs", "ratio", "ci_low", "ci_high", "num_memorized", "num_samples", "runs")


@click.group(context_settings=dict(max_content_width=120))
def main() -> None:
    """Compare runs and optima over the size of their training sets."""


@main.command()
@click.argument("runs", metavar="RUN_OR_FOLDER...", nargs=-1, required=True)
@click.option("--out", help="Figure; the CSV lies beside it", metavar="FILE", default="curve.png", show_default=True)
@click.option(
    "--level", help="Ratio that defines EMM, 1 - epsilon", metavar="FLOAT", type=float, default=0.9, show_default=True
)
@click.option("--title", help="Title of the figure", metavar="TEXT")
@report_errors
def curve(runs: tuple[str, ...], out: str, level: float, title: str | None) -> None:
    """Draw R_mem over |D| of all measured runs at or below the given folders, and estimate EMM.

    A run counts with the highest ratio over its snapshots; runs of one size are pooled. EMM is the
    largest |D| at which the ratio is still --level, interpolated in log |D|.

    Example:

    \b
    # Draw the curve of all runs in a folder
    python emm.py curve training-runs --out=figures/basic.png
    """
    check_format(out)
    found, left_out = find_runs(runs)
    for folder, reason in left_out.items():
        click.echo(f"Left out: {folder} ({reason}).", err=True)
    if not found:
        raise click.ClickException("No measured run found; train with train.py and measure with mem_ratio.py.")

    measured = [run_point(run) for run in found]
    points = curve_points(measured)
    emm = emm_estimate([p.size for p in points], [p.ratio for p in points], level)
    if names := differing_options(measured):
        click.echo(f"Note: these runs differ in more than |D| and seed: {', '.join(names)}.", err=True)

    print_table(points)
    click.echo(str(emm))
    table = Path(out).with_suffix(".csv")
    write_csv(points, table)
    emm_curve(points, out, emm=emm, title=title)
    click.echo(f"Figure: {out}\nTable:  {table}")


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


def print_table(points: Sequence[CurvePoint]) -> None:
    click.echo(f"{'|D|':>8} {'epochs':>10} {'R_mem %':>9}  {'95 % interval':<16} {'runs':>4}")
    for p in points:
        low, high = p.interval
        interval = f"[{100 * low:.1f}, {100 * high:.1f}]"
        click.echo(f"{p.size:>8} {p.epochs:>10.0f} {100 * p.ratio:>9.2f}  {interval:<16} {p.runs:>4}")


def write_csv(points: Sequence[CurvePoint], path: Path) -> None:
    with atomic_write(path, "w") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COLUMNS)
        for p in points:
            writer.writerow([p.size, p.epochs, p.ratio, *p.interval, p.num_memorized, p.num_samples, p.runs])


if __name__ == "__main__":
    main()
