"""What runs were made with, and how long they took: commit, machine, torch, threads, seconds."""

import contextlib
import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dnnlib.util import format_time, printable
from memorization.runs import Run
from memorization.search.learning_rate import last_loss
from training.run.sessions import KEYS, recorded_sessions

ORIGIN_COLUMNS = (
    "folder", *KEYS, "runs", "training_sec", "runs_without_time", "measurements", "measuring_sec",
    "measurements_without_time", "runs_not_measured",
)  # fmt: skip
# Of one run. `nimg`, `epochs`: images and epochs of training so far; `loss`: mean of the ticks of its last quarter;
# `snapshot_nimg` and what follows: the measured snapshot that memorizes most, for which the run stands on a curve;
# `ratio_of`: what is particular about that measurement, "adaptive" (it ended as soon as a side of a bar was clear),
# "other reference" (not the training set), "class 3"; empty for the ratio of all images against the training set.
ONE_RUN_COLUMNS = (
    "folder", "run", "size", "seed", "lr", "nimg", "epochs", "loss", "snapshot_nimg", "num_memorized", "num_samples",
    "ratio", "ratio_of", *KEYS, "training_sec", "measuring_sec",
)  # fmt: skip
UNKNOWN = "not recorded"


@dataclass
class Origin:
    """Runs of one folder that were trained with the same: their number and times."""

    folder: str  # as it was given
    made_with: tuple[str, ...]  # of KEYS, as text; several values of a run that was resumed elsewhere: "A, then B"
    runs: list[Run] = field(default_factory=list)

    @property
    def training(self) -> list[float]:
        """Seconds of each run, over all its sessions; of those alone that record it."""
        return [run.seconds for run in self.runs if run.seconds is not None]

    @property
    def measurements(self) -> list[dict[str, Any]]:
        return [record for run in self.runs for record in run.records]

    @property
    def unmeasured(self) -> int:
        """Runs that were trained and not measured, as those of which a learning rate was chosen."""
        return sum(not run.records for run in self.runs)

    @property
    def measuring(self) -> list[float]:
        """Seconds of generating and comparing the images of each measurement; of those alone that record it."""
        return _measuring(self.measurements)

    def row(self) -> list[Any]:
        """Of ORIGIN_COLUMNS."""
        train, measure = self.training, self.measuring
        return [
            self.folder, *self.made_with, len(self.runs), round(sum(train), 1), len(self.runs) - len(train),
            len(self.measurements), round(sum(measure), 1), len(self.measurements) - len(measure),
            self.unmeasured,
        ]  # fmt: skip


def origins(runs: Iterable[tuple[str, Run]]) -> list[Origin]:
    """Group (folder as given, run) by folder and by what the runs were trained with, in the order of their coming."""
    found: dict[tuple, Origin] = {}
    for folder, run in runs:
        sessions = recorded_sessions(run.options)
        made_with = tuple(_values([session.get(key) for session in sessions]) for key in KEYS)
        found.setdefault((folder, made_with), Origin(folder, made_with)).runs.append(run)
    return list(found.values())


def run_row(folder: str, run: Run) -> list[Any]:
    """Of ONE_RUN_COLUMNS, for a run at or below `folder`, as that was given. What is not recorded is None."""
    nimg = 1000 * run.statistics[-1]["Progress/kimg"] if run.statistics else None
    nimg = round(nimg) if nimg is not None and math.isfinite(nimg) else None
    loss = None
    with contextlib.suppress(ValueError):  # it recorded none there
        loss = last_loss(run)
    measured = [run.nimg, run.num_memorized, run.num_samples, run.ratio, _ratio_of(run)] if run.counted else [None] * 5
    if not run.options["total_nimg"]:  # of another program, of whose training nothing is known
        measured[0] = None
    sessions = recorded_sessions(run.options)
    times = _measuring(run.records)
    seconds = round(sum(times), 1) if times and len(times) == len(run.records) else None
    return [
        folder, Path(os.path.relpath(run.path, folder)).as_posix(), run.size, _number(run.options.get("seed")),
        _number(run.command.get("lr")), nimg, nimg and nimg / run.size, loss, *measured,
        *(_values([session.get(key) for session in sessions]) for key in KEYS),
        run.seconds and round(run.seconds, 1), seconds,
    ]  # fmt: skip


def run_table(rows: Sequence[Sequence[Any]]) -> list[str]:
    """The lines of a table of `run_row` for people to read, without what is long and the same for most."""
    shown = "folder run size seed lr epochs loss num_memorized num_samples ratio ratio_of commit".split()
    where = [ONE_RUN_COLUMNS.index(name) for name in shown]
    cells = [[_cell(row[i]) for i in where] for row in rows]
    return _columns([["|D|" if name == "size" else name for name in shown], *cells])


def _ratio_of(run: Run) -> str | None:
    of_class = run.best_record.get("class")
    kinds = {
        "adaptive": run.adaptive,
        "other reference": run.other_reference,
        f"class {of_class}": of_class is not None,
    }
    return ", ".join(name for name, holds in kinds.items() if holds) or None


def _number(value: Any) -> int | float | None:
    """A recorded number; None for what is none, from damaged files."""
    return value if type(value) in (int, float) and abs(value) < 1 << 64 else None


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1000 else f"{value:.0f}"
    return printable(str(value))


def _measuring(records: Iterable[dict[str, Any]]) -> list[float]:
    seconds = (record.get("seconds") for record in records)
    return [float(s) for s in seconds if isinstance(s, int | float) and math.isfinite(s)]


def _values(values: Sequence[Any]) -> str:
    """What the sessions of a run had, each value once where it follows itself."""
    texts = [UNKNOWN if value is None else str(value) for value in values]
    return ", then ".join(text for i, text in enumerate(texts) if i == 0 or text != texts[i - 1])


def origin_table(found: Sequence[Origin]) -> list[str]:
    """The lines of a table for people to read."""
    head = ["folder", *KEYS, "runs", "training", "measuring"]
    rows = [head]
    for origin in found:
        times = _time(origin.training, len(origin.runs)), _time(origin.measuring, len(origin.measurements))
        count = str(len(origin.runs)) + (f" ({origin.unmeasured} not measured)" if origin.unmeasured else "")
        rows.append([origin.folder, *origin.made_with, count, *times])
    return _columns(rows)


def _columns(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]


def _time(seconds: Sequence[float], of: int) -> str:
    if not seconds:
        return UNKNOWN
    return format_time(sum(seconds)) + (f" ({len(seconds)} of {of} recorded)" if len(seconds) < of else "")
