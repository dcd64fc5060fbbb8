"""Which learning rate a network takes, by its training loss alone.

    python -m memorization.search.learning_rate RUN...    prints the rate; the losses go to stderr

The RUNs differ in --lr alone, apart from how they were run (--compile, --workers, ...). The rule: the rate whose loss,
averaged over the last quarter of the training, is the lowest. A run whose loss was not finite there, or that ended by
it, is out. R_mem is not looked at, and need not have been measured: a factor whose values want different rates is
compared at the rate that trains each best, not at the one that memorizes most.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import click

from dnnlib.cli import report_errors
from memorization.runs import HOW_RUN, OPTIONS, Run, read_options
from memorization.search.job import LENGTHS
from training.run.state import has_diverged, read_run_state

LAST = 0.25  # of the training: what the loss is averaged over
_FREE = {"lr", "outdir", "resume", "desc"} | HOW_RUN  # options in which the runs may differ


@dataclass(frozen=True)
class Rate:
    """A learning rate that was tried."""

    value: float
    loss: float | None  # mean over the last quarter of the training; None: the loss was not finite


def read_training(path: Path) -> Run:
    """A run that need not have been measured.

    Raises
    ------
    OSError, ValueError
        If the folder is none of train.py.
    """
    options = read_options(path)
    if not isinstance(options.get("command"), dict):
        raise ValueError(f'"{path / OPTIONS}" does not say with which options the run was trained; train it anew.')
    return Run(path, options, state=read_run_state(path))


def try_rates(runs: Sequence[Run]) -> list[Rate]:
    """What was tried, by ascending rate.

    Raises
    ------
    ValueError
        If a run has not ended, says no rate or has no loss; if two have the same rate, or differ in more than that.
    """
    found = {}
    for run in runs:
        lost, rate = has_diverged(run.state), run.command.get("lr")
        if not (lost or (run.state or {}).get("state") == "complete") or not isinstance(rate, int | float):
            raise ValueError(f'"{run.path}" is no run that has ended and says its --lr; train it to its end.')
        if others := sorted(k for k in run.command.keys() | runs[0].command.keys() if _differs(k, run, runs[0])):
            raise ValueError(
                f'"{run.path}" and "{runs[0].path}" differ in {", ".join(others)}; they may in --lr alone.'
            )
        if rate in found:
            raise ValueError(f"Two runs have the learning rate {rate:g}; name one of each.")
        found[rate] = Rate(rate, None if lost else last_loss(run))
    return [found[rate] for rate in sorted(found)]


def _differs(key: str, a: Run, b: Run) -> bool:
    if key in LENGTHS and (has_diverged(a.state) or has_diverged(b.state)):
        return False  # one that has diverged does not go on where the others do
    return key not in _FREE and a.command.get(key) != b.command.get(key)


def last_loss(run: Run) -> float | None:
    """Mean training loss over the last quarter of a run, of the ticks in it; None if it was not finite in one of them.

    Raises
    ------
    ValueError
        If the run recorded no loss there.
    """
    statistics = run.statistics
    ticks = [entry for entry in statistics if entry["Progress/kimg"] > (1 - LAST) * statistics[-1]["Progress/kimg"]]
    if any(entry.get("Loss/not_finite") for entry in ticks):
        return None
    last = [entry["Loss/loss"] for entry in ticks if "Loss/loss" in entry]
    if not last:
        raise ValueError(f'"{run.path}" has no loss from the last quarter of its training; lower --tick.')
    return sum(last) / len(last)


def best_rate(rates: Sequence[Rate]) -> Rate:
    """The rate with the lowest loss; of equal ones the lower rate.

    Raises
    ------
    ValueError
        If no run has a finite loss.
    """
    finite = [rate for rate in rates if rate.loss is not None]
    if not finite:
        raise ValueError("With none of these learning rates the loss stayed finite; try lower ones.")
    return min(finite, key=lambda rate: (rate.loss, rate.value))


@click.command()
@click.argument("runs", metavar="RUN...", nargs=-1, required=True, type=click.Path(path_type=Path))
@report_errors
def main(runs: tuple[Path, ...]) -> None:
    """Print the learning rate of the RUN with the lowest training loss over the last quarter of its training."""
    rates = try_rates([read_training(path) for path in runs])
    best = best_rate(rates)
    tried = ", ".join(f"{r.value:g}: " + ("not finite" if r.loss is None else f"{r.loss:.4f}") for r in rates)
    edge = "; the end of what was tried" if len(rates) > 1 and best in (rates[0], rates[-1]) else ""
    print(f"learning rate {best.value:g}{edge} (training loss, last quarter: {tried})", file=sys.stderr)
    print(f"{best.value:g}")


if __name__ == "__main__":
    main()
