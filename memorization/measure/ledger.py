"""The results of a measuring command on disk, for all ranks: rank 0 reads and writes, and tells the others."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from dnnlib.locks import file_lock
from memorization.measure.ratio import Measurement
from memorization.measure.results import Reference, Task
from memorization.measure.subjects import Subject
from memorization.records import (
    find_record,
    jsonl_path,
    make_settings,
    read_records,
    read_rows,
    remove_partial,
    rows_path,
    update_record,
    write_measurement,
    write_partial,
)
from torch_utils import distributed as dist


class Ledger:
    """Finds, claims and writes the record of a snapshot and the rows behind it. All ranks make the same calls.

    Parameters
    ----------
    log : mem_traj.log
    task : what is measured
    reference : training images
    warn : is told of an incomplete line, on rank 0
    """

    def __init__(self, log: Path, task: Task, reference: Reference, warn: Callable[[str], Any]):
        self.log, self.task, self.reference, self.warn = log, task, reference, warn

    def settings(self, subject: Subject, precision: str) -> dict[str, Any]:
        """What is known of the record of a snapshot before it is measured; see `make_settings`.

        Raises
        ------
        OSError
            If the snapshot cannot be read.
        """
        return dist.on_rank0(
            make_settings,
            subject.path,
            self.task.seeds,
            reference_path=self.reference.path,
            reference_size=len(self.reference.images),
            reference_sha256=self.reference.sha256,
            class_idx=self.task.class_idx,
            sampler_kwargs=self.task.sampler_kwargs,
            optimum=subject.optimum,
            adaptive=self.task.adaptive(subject.error_share),
            precision=precision,
            compile=self.task.compile,
            source=subject.source,
            all_classes=self.task.all_classes,
            labels=dict(self.task.labels),
        )

    def find(self, settings: dict[str, Any]) -> dict[str, Any] | None:
        """The record with these settings, or None."""

        def find() -> dict[str, Any] | None:
            jsonl = jsonl_path(self.log)
            return find_record(read_records(jsonl, report=self.warn), settings) if jsonl.exists() else None

        return dist.on_rank0(find)

    @contextlib.contextmanager
    def claim(self, subject: Subject, settings: dict[str, Any]) -> Iterator[bool]:
        """Keep other processes from measuring the same; False if one of them is doing it."""
        path = rows_path(self.log, subject.name, settings).with_suffix(".lock")
        with contextlib.ExitStack() as stack:
            yield dist.on_rank0(lambda: stack.enter_context(file_lock(path, wait=False)))

    def rows(self, subject: Subject, settings: dict[str, Any], seeds: Sequence[int]) -> Measurement | None:
        """Those rows of `seeds` that are on disk, or None."""
        columns = self.task.arrays(self.reference.features)
        return dist.on_rank0(read_rows, self.log, subject.name, settings, seeds, columns)

    def all_rows(self, subject: Subject, record: dict[str, Any]) -> Measurement | None:
        """The rows behind a record, if they are all on disk."""
        seeds = self.task.measured_seeds(record)
        rows = self.rows(subject, record, seeds)
        return rows if rows is not None and rows.num_samples == len(seeds) else None

    def partial(self, subject: Subject, settings: dict[str, Any], rows: Measurement) -> None:
        """Keep the rows so far, so that the measurement can go on after an interruption."""
        dist.on_rank0(write_partial, self.log, rows, subject.name, settings)

    def write(self, subject: Subject, record: dict[str, Any], rows: Measurement, images: Path | None) -> dict[str, Any]:
        """Write a finished measurement, and return its record; `images` is the folder of its PNGs."""
        record = dist.on_rank0(write_measurement, self.log, rows, subject.path, subject.name, record, images=images)
        dist.on_rank0(remove_partial, self.log, subject.name, record)
        return record

    def update(self, record: dict[str, Any], **results: Any) -> dict[str, Any]:
        """Write further results into a record, and return it."""
        return dist.on_rank0(update_record, self.log, record, **results)
