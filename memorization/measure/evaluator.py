"""Measuring the snapshots of a run one after the other: what is known is kept, what cannot be read is left out."""

import contextlib
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import torch

from dnnlib.locks import file_lock
from memorization.measure.gap import GapMeter
from memorization.measure.progress import Progress
from memorization.measure.ratio import Measurement, check_network, check_reference, check_seeds, measure_network
from memorization.measure.results import Reference, Task, find_results, lacks_results
from memorization.measure.subjects import Subject, load_together
from memorization.records import (
    find_record,
    jsonl_path,
    make_record,
    make_settings,
    read_rows,
    read_trajectory,
    remove_partial,
    rows_path,
    update_record,
    write_measurement,
    write_partial,
)
from memorization.stats.sequential import SequentialTest, rounds
from torch_utils import distributed as dist
from training.generation import PngWriter
from training.precision import Denoiser, own_precision, prepare_denoiser

_RETRY = 1.0  # seconds until a snapshot that another process measures is looked at again


class Unreadable(ValueError):
    """A snapshot that cannot be measured: damaged, of an unknown kind, or of other images than the reference."""


class Evaluator:
    """Measures snapshots, and keeps the results in `log` and beside it. All ranks make the same calls.

    Parameters
    ----------
    log : mem_traj.log
    reference : training images
    task : what to measure on every snapshot
    describe : (record, note at the end of the first line) -> the lines that report it
    open_meter : (network, header of its snapshot) -> what measures the gap, too; called once, for the first snapshot
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
        outdir: Path | None = None,
        subdirs: bool = False,
        remeasure: bool = False,
        quiet: bool = False,
    ):
        check_seeds(task.seeds)
        check_reference(reference.images)
        for criterion in [*task.criteria, *task.feature_criteria]:
            criterion.check(len(reference.images))
        self.log, self.reference, self.task, self.describe = log, reference, task, describe
        self.outdir, self.subdirs, self.remeasure = outdir, subdirs, remeasure
        self.meter: GapMeter | None = None
        self._open_meter = open_meter
        self.records: dict[str, dict[str, Any]] = {}
        self.subjects: dict[str, Subject] = {}
        self.left_out: dict[str, str] = {}
        self.progress = Progress(len(task.seeds), quiet)
        self._told: set[str] = set()
        self._compiled: Denoiser | None = None
        self._loaded: tuple[Subject, torch.nn.Module, dict[str, Any]] | None = None

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
        rows = self._all_rows(subject, record)
        return rows if rows is not None else self._generate(subject, self._seeds(record))

    def images(self, subject: Subject, count: int) -> Measurement:
        """The first images of a snapshot, with their distances; nothing is written."""
        return self._generate(subject, sorted(self.task.seeds)[:count], keep_images=True)

    # ------------------------------------------------------------------------
    # One snapshot.

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
        settings = self._settings(subject)
        if self.meter is None and self._open_meter is not None:
            self.meter = self._open_meter(*self._load(subject))
        record = self._known(settings)
        if record is not None and not self._lacks_gap(record) and not lacks_results(record, self.task, self.reference):
            return record, False
        if record is None:
            self._load(subject)  # what cannot be read leaves no files
        with self._claim(subject, settings) as mine:
            if not mine:
                return None
            record = self._known(settings)  # another process may have finished it just before
            measured = record is None
            if measured or lacks_results(record, self.task, self.reference):
                rows = None if measured else self._all_rows(subject, record)
                if rows is None:
                    measured = True
                    record = self._measure(subject, settings)
                else:
                    results = find_results(rows, self.task, self.reference)
                    record = dist.on_rank0(update_record, self.log, record, **results)
            if self._lacks_gap(record):
                record = dist.on_rank0(update_record, self.log, record, gap=measure_gap(self, subject))
            return record, measured

    def _settings(self, subject: Subject) -> dict[str, Any]:
        try:
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
                adaptive=self.task.adaptive,
                precision=self._precision(subject),
                compile=self.task.compile,
            )
        except OSError as err:
            raise Unreadable(str(err)) from err

    def _known(self, settings: dict[str, Any]) -> dict[str, Any] | None:
        """The record with these settings, unless all is to be measured anew."""
        if self.remeasure or self.outdir is not None:
            return None
        return dist.on_rank0(self._find, settings)

    def _find(self, settings: dict[str, Any]) -> dict[str, Any] | None:
        jsonl = jsonl_path(self.log)
        return find_record(read_trajectory(jsonl, report=self._tell_once), settings) if jsonl.exists() else None

    def _tell_once(self, text: str, file: IO[str] | None = None) -> None:
        if text not in self._told:
            self.progress.write(text, file or sys.stderr)
        self._told.add(text)

    def _lacks_gap(self, record: dict[str, Any]) -> bool:
        return self.meter is not None and (self.remeasure or not self.meter.holds(record))

    @contextlib.contextmanager
    def _claim(self, subject: Subject, settings: dict[str, Any]) -> Iterator[bool]:
        """Keep other processes from measuring the same; False if one of them is doing it."""
        path = rows_path(self.log, subject.name, settings).with_suffix(".lock")
        with contextlib.ExitStack() as stack:
            yield dist.on_rank0(lambda: stack.enter_context(file_lock(path, wait=False)))

    # ------------------------------------------------------------------------
    # Its images.

    def _seeds(self, record: dict[str, Any]) -> list[int]:
        """The seeds that were measured for a record; a sequential test leaves out the last ones."""
        return sorted(self.task.seeds)[: record["num_samples"]]

    def _all_rows(self, subject: Subject, record: dict[str, Any]) -> Measurement | None:
        """The rows behind a record, if they are on disk."""
        seeds = self._seeds(record)
        rows = self._stored(subject, record, seeds)
        return rows if rows is not None and rows.num_samples == len(seeds) else None

    def _stored(self, subject: Subject, settings: dict[str, Any], seeds: Sequence[int]) -> Measurement | None:
        columns = self.task.arrays(self.reference.features)
        return dist.on_rank0(read_rows, self.log, subject.name, settings, seeds, columns)

    def _load(self, subject: Subject) -> tuple[torch.nn.Module, dict[str, Any]]:
        """The network, and the header of its snapshot; the last one is held."""
        if self._loaded is None or self._loaded[0] is not subject:  # its file may have been written again
            self._loaded = None  # free the memory first
            try:
                net, header = load_together(subject)
                check_network(net, self.reference.images.shape[1:], self.task.class_idx)
            except ValueError as err:
                raise Unreadable(str(err)) from err
            self._loaded = (subject, self._prepare(net), header)
        return self._loaded[1:]

    def _prepare(self, net: torch.nn.Module) -> torch.nn.Module:
        """The network as it is to compute. It is compiled once: the next snapshot hands over its weights."""
        if self._compiled is not None and self._compiled.take(net):
            return self._compiled
        prepared = prepare_denoiser(net, self.task.precision, self.task.compile)
        self._compiled = prepared if self.task.compile else None
        return prepared

    def _precision(self, subject: Subject) -> str:
        """The precision that counts; on CUDA the snapshot itself may say so (`use_fp16`)."""
        if self.task.precision is not None or subject.optimum is not None or self.reference.device.type != "cuda":
            return self.task.precision or "fp32"
        return own_precision(self._load(subject)[0], self.reference.device)

    def _measure(self, subject: Subject, settings: dict[str, Any]) -> dict[str, Any]:
        """Measure a snapshot, going on with what an interrupted command has left, and write the results."""
        outdir = self.outdir / subject.name if self.outdir is not None else None
        anew = self.remeasure or outdir is not None
        start = None if anew else self._stored(subject, settings, self.task.seeds)
        test = SequentialTest(self.task.bar, self.task.confidence) if self.task.bar is not None else None
        measured = measure_snapshot(self, subject, settings, start=start, test=test, outdir=outdir)
        entries = find_results(measured, self.task, self.reference)
        if test is not None:
            low, high = test.interval()
            entries |= {"ci_low": low, "ci_high": high, "confidence": test.confidence, "interval": "time-uniform"}
            entries["sequential"] = test.summary()
        record = make_record(measured, subject.kimg, settings, **entries)
        record = dist.on_rank0(write_measurement, self.log, measured, subject.path, subject.name, record, images=outdir)
        dist.on_rank0(remove_partial, self.log, subject.name, settings)
        return record

    def _generate(self, subject: Subject, seeds: Sequence[int], **how: Any) -> Measurement:
        task, (net, _) = self.task, self._load(subject)
        return measure_network(
            net, self.reference.pixels, seeds, batch=task.batch, class_idx=task.class_idx,
            sampler_kwargs=task.sampler_kwargs, **how,
        )  # fmt: skip


def measure_snapshot(
    evaluator: Evaluator,
    subject: Subject,
    settings: dict[str, Any],
    *,
    start: Measurement | None = None,  # rows that need not be measured
    test: SequentialTest | None = None,  # ends the measurement when it has its verdict
    outdir: Path | None = None,  # folder for PNGs
) -> Measurement:
    """`measure_network` on a snapshot, with progress, PNGs, a file of the rows so far, and a sequential test."""
    task, progress = evaluator.task, evaluator.progress
    total = len(task.seeds)
    looks = set() if test is None else set(_cumulate(rounds(total)))

    def on_batch(batch_seeds: list[int], images: torch.Tensor) -> None:
        if writer is not None:
            writer.save(batch_seeds, images)
        progress.batch(len(batch_seeds))

    def on_rows(rows: Measurement) -> bool:
        progress.rows(rows.num_samples, rows.ratio)
        if test is not None and rows.num_samples in looks:
            verdict = test.update(rows.num_memorized - test.successes, rows.num_samples - test.n)
            if dist.broadcast(verdict) is not None:  # machines could round differently
                return True
        if rows.num_samples < total and outdir is None:
            dist.on_rank0(write_partial, evaluator.log, rows, subject.name, settings)
        return False

    with PngWriter(outdir, evaluator.subdirs) if outdir is not None else contextlib.nullcontext() as writer:
        return evaluator._generate(
            subject, task.seeds, columns=task.pixel_columns, features=evaluator.reference.features,
            feature_columns=task.feature_columns, on_batch=on_batch, start=start, stops=looks, on_rows=on_rows,
        )  # fmt: skip


def measure_gap(evaluator: Evaluator, subject: Subject) -> dict[str, Any]:
    """`GapMeter.measure` on a snapshot."""
    evaluator.progress.doing(f"{subject.name} gap")
    return evaluator.meter.measure(evaluator._load(subject)[0])


def _cumulate(sizes: Sequence[int]) -> list[int]:
    total, sums = 0, []
    for size in sizes:
        total += size
        sums.append(total)
    return sums
