"""Measuring the snapshots of a run one after the other: what is known is kept, what cannot be read is left out."""

import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import IO, Any

import torch

from memorization.measure.gap import GapMeter
from memorization.measure.held_out import HeldOutControl
from memorization.measure.ledger import Ledger
from memorization.measure.meter import SnapshotMeter, Unreadable
from memorization.measure.progress import Progress
from memorization.measure.quality_meter import QualityMeter
from memorization.measure.ratio import Measurement
from memorization.measure.results import Reference, Task, find_results, lacks_results
from memorization.measure.subjects import Subject
from memorization.records import make_record
from torch_utils.machine import machine_name

_RETRY = 1.0  # seconds until a snapshot that another process measures is looked at again


class Evaluator:
    """Measures snapshots, and keeps the results in `log` and beside it. All ranks make the same calls.

    Parameters
    ----------
    log : mem_traj.log
    reference : training images
    task : what to measure on every snapshot
    describe : (record, note at the end of the first line) -> the lines that report it
    open_meter : (network, header of its snapshot) -> what measures the gap, too; called once, for the first snapshot
    quality : what measures the quality of the images, too
    control : what counts the copies of held-out images, too
    outdir : folder for PNGs, with a folder per snapshot; the images are then made anew
    subdirs : put every 1000 seeds into a folder of their own
    remeasure : measure again what is known
    quiet : no progress bar, even on a terminal

    Attributes
    ----------
    records : of the snapshots measured so far, by name
    subjects : these snapshots, by name
    left_out : why a snapshot could not be measured, by name

    Raises
    ------
    ValueError
        If there are no seeds or one appears twice, or the reference is too small for what is asked.
    """

    def __init__(
        self,
        log: Path,
        reference: Reference,
        task: Task,
        describe: Callable[[dict[str, Any], str], str],
        *,
        open_meter: Callable[[torch.nn.Module, dict[str, Any]], GapMeter] | None = None,
        quality: QualityMeter | None = None,
        control: HeldOutControl | None = None,
        outdir: Path | None = None,
        subdirs: bool = False,
        remeasure: bool = False,
        quiet: bool = False,
    ):
        self.progress = Progress(len(task.seeds), quiet)
        self.meter = SnapshotMeter(reference, task, self.progress, open_meter, quality, control)
        self.ledger = Ledger(log, task, reference, self._tell_once)
        self.reference, self.task, self.describe = reference, task, describe
        self.outdir, self.subdirs, self.remeasure = outdir, subdirs, remeasure
        self.records: dict[str, dict[str, Any]] = {}
        self.subjects: dict[str, Subject] = {}
        self.left_out: dict[str, str] = {}
        self._told: set[str] = set()

    def run(self, subjects: Iterable[Subject]) -> None:
        """Measure these snapshots; those that another process is measuring come last."""
        busy = []
        if isinstance(subjects, Sequence):
            self.progress.expect(len(subjects))
        with self.progress:
            for count, subject in enumerate(subjects, start=1):
                self.progress.expect(count)
                if not self._visit(subject):
                    busy.append(subject)
            for subject in busy:
                self.progress.doing(f"{subject.name} (another process is at it)")
                while not self._visit(subject):
                    time.sleep(_RETRY)

    def wait(self, run_dir: str) -> None:
        """Say that there is nothing to measure yet."""
        self.progress.doing("waiting for snapshots")
        self._tell_once(f'Waiting for snapshots in "{run_dir}".', sys.stdout)

    def best(self) -> Subject:
        """The snapshot with the highest ratio; of equal ones the first that was measured.

        Raises
        ------
        ValueError
            If none could be measured.
        """
        if not self.records:
            name, reason = next(iter(self.left_out.items()))
            raise ValueError(f"No snapshot could be measured; {name}: {reason}")
        return self.subjects[max(self.records, key=lambda name: self.records[name]["ratio"])]

    def rows(self, subject: Subject) -> Measurement:
        """The distances behind the record of a snapshot, measured again if they are no longer on disk."""
        record = self.records[subject.name]
        rows = self.ledger.all_rows(subject, record)
        return rows if rows is not None else self.meter.generate(subject, self.task.measured_seeds(record))

    def images(self, subject: Subject, count: int) -> Measurement:
        """The first images of a snapshot, with their distances; nothing is written."""
        return self.meter.generate(subject, sorted(self.task.seeds)[:count], keep_images=True)

    def _visit(self, subject: Subject) -> bool:
        """Measure one snapshot, and report; False if another process is doing it."""
        self.progress.doing(subject.name)
        try:
            result = self._evaluate(subject)
        except Unreadable as err:
            self.left_out[subject.name] = str(err)
            text = f"{subject.name}: left out. {err}"
        else:
            if result is None:
                return False
            record, measured = result
            self.records[subject.name], self.subjects[subject.name] = record, subject
            text = self.describe(record, "" if measured else "  (measured before)")
        self.progress.end()
        self.progress.write(text)
        return True

    def _evaluate(self, subject: Subject) -> tuple[dict[str, Any], bool] | None:
        """The record of one snapshot, and whether it was measured just now; None if another process is doing it."""
        try:
            settings = self.ledger.settings(subject, self.meter.precision(subject))
        except OSError as err:
            raise Unreadable(str(err)) from err
        self.meter.open_gap(subject)
        record = self._known(settings)
        if record is None:
            self.meter.load(subject)  # what cannot be read leaves no files
        elif not self._lacks_results(record) and not self._lacks_more(record):
            return record, False
        with self.ledger.claim(subject, settings) as mine:
            if not mine:
                return None
            record = self._known(settings)  # another process may have finished it just before
            rows = None
            if record is not None and self._lacks_results(record):
                rows = self.ledger.all_rows(subject, record)
                if rows is None:  # no longer on disk
                    record = None
            measured = record is None
            if measured:
                record = self._measure(subject, settings)
            elif rows is not None:
                record = self.ledger.update(record, **find_results(rows, self.task, self.reference))
            if self.meter.lacks_gap(record, self.remeasure):
                record = self.ledger.update(record, gap=self.meter.measure_gap(subject))
            if self.meter.lacks_quality(record, self.remeasure):
                record = self.ledger.update(record, quality=self.meter.measure_quality(subject, record))
            if self.meter.lacks_held_out(record, self.remeasure):
                record = self.ledger.update(record, held_out=self.meter.measure_held_out(subject, record))
            self.meter.forget_images()
            return record, measured

    def _known(self, settings: dict[str, Any]) -> dict[str, Any] | None:
        """The record with these settings, unless all is to be measured anew."""
        return None if self.remeasure or self.outdir is not None else self.ledger.find(settings)

    def _lacks_more(self, record: dict[str, Any]) -> bool:
        lacks = (self.meter.lacks_gap, self.meter.lacks_quality, self.meter.lacks_held_out)
        return any(lack(record, self.remeasure) for lack in lacks)

    def _lacks_results(self, record: dict[str, Any]) -> bool:
        return lacks_results(record, self.task, self.reference)

    def _measure(self, subject: Subject, settings: dict[str, Any]) -> dict[str, Any]:
        """Measure a snapshot, going on with what an interrupted command has left, and write the results."""
        began = time.perf_counter()
        images, start, keep = None, None, None
        if self.outdir is not None:
            images = self.outdir / subject.name
        else:
            start = None if self.remeasure else self.ledger.rows(subject, settings, self.task.seeds)

            def keep(rows: Measurement) -> None:
                self.ledger.partial(subject, settings, rows)

        rows, entries = self.meter.measure(subject, start=start, keep=keep, images=images, subdirs=self.subdirs)
        entries = find_results(rows, self.task, self.reference) | entries
        entries["machine"] = machine_name(self.reference.device)
        if start is None:  # else an interrupted command has spent a part of the time
            entries["seconds"] = round(time.perf_counter() - began, 3)
        if (nimg := self.meter.load(subject)[1].get("nimg")) is not None:
            entries["nimg"] = nimg  # exactly, where `kimg` is the whole number in the name of the file
        return self.ledger.write(subject, make_record(rows, subject.kimg, settings, **entries), rows, images)

    def _tell_once(self, text: str, file: IO[str] | None = None) -> None:
        if text not in self._told:
            self.progress.write(text, file or sys.stderr)
        self._told.add(text)
