"""What runs were made with, and how long they took: commit, machine, torch, threads, seconds."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from dnnlib.util import format_time
from memorization.runs import Run
from training.run.sessions import KEYS, recorded_sessions

ORIGIN_COLUMNS = (
    "folder", *KEYS, "runs", "training_sec", "runs_without_time", "measurements", "measuring_sec",
    "measurements_without_time", "runs_not_measured",
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
        seconds = (record.get("seconds") for record in self.measurements)
        return [float(s) for s in seconds if isinstance(s, int | float) and math.isfinite(s)]

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
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]


def _time(seconds: Sequence[float], of: int) -> str:
    if not seconds:
        return UNKNOWN
    return format_time(sum(seconds)) + (f" ({len(seconds)} of {of} recorded)" if len(seconds) < of else "")
