"""Measuring one snapshot: its network as it is to compute, its images, and their nearest training images."""

import contextlib
from collections.abc import Callable, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import torch

from memorization.measure.gap import GapMeter
from memorization.measure.held_out import HeldOutControl
from memorization.measure.progress import Progress
from memorization.measure.quality_meter import QualityMeter
from memorization.measure.ratio import (
    Measurement,
    check_network,
    check_reference,
    check_seeds,
    made_images,
    measure_network,
)
from memorization.measure.results import Reference, Task
from memorization.measure.subjects import Subject, load_together
from memorization.stats.sequential import SequentialTest, rounds
from torch_utils import distributed as dist
from training.generation import PngWriter, draw_all_classes, split_seeds
from training.precision import Denoiser, own_precision, prepare_denoiser


class Unreadable(ValueError):
    """A snapshot that cannot be measured: damaged, of an unknown kind, or of other images than the reference."""


class SnapshotMeter:
    """Measures a task on one snapshot after the other. All ranks make the same calls.

    Parameters
    ----------
    reference : training images
    task : what to measure
    progress : is told of batches and rows
    open_gap : (network, header of its snapshot) -> what measures the gap, too; called once, for the first snapshot
    quality : what measures the quality of the images, too
    control : what counts the copies of held-out images, too

    Raises
    ------
    ValueError
        If there are no seeds or one appears twice, or the reference is too small for what is asked.
    """

    def __init__(
        self,
        reference: Reference,
        task: Task,
        progress: Progress,
        open_gap: Callable[[torch.nn.Module, dict[str, Any]], GapMeter] | None = None,
        quality: QualityMeter | None = None,
        control: HeldOutControl | None = None,
    ):
        check_seeds(task.seeds)
        check_reference(reference.images)
        for criterion in [*task.criteria, *task.feature_criteria]:
            criterion.check(len(reference.images))
        self.reference, self.task, self.progress = reference, task, progress
        self._open_gap, self._gap = open_gap, None
        self._quality, self._control = quality, control
        self._made: dict[int, np.ndarray] = {}  # this rank's images of the snapshot that is measured, by seed
        self._compiled: Denoiser | None = None
        self._noted = False
        self._loaded: tuple[Subject, torch.nn.Module, dict[str, Any]] | None = None

    def load(self, subject: Subject) -> tuple[torch.nn.Module, dict[str, Any]]:
        """The network, and the header of its snapshot; the last one is held.

        Raises
        ------
        Unreadable
            On all ranks, if one of them cannot.
        """
        if self._loaded is None or self._loaded[0] is not subject:  # its file may have been written again
            self._loaded = None  # free the memory first
            try:
                net, header = load_together(subject)
                self._note_classes(net)
                check_network(net, self.reference.images.shape[1:], self.task.class_idx)
            except ValueError as err:
                raise Unreadable(str(err)) from err
            self._loaded = (subject, self._prepare(net), header)
        return self._loaded[1:]

    def _note_classes(self, net: torch.nn.Module) -> None:
        """Say, once, that the network has classes of which training saw no image, and what becomes of them."""
        empty = getattr(net, "empty_classes", [])
        if not empty or self.task.class_idx is not None:
            return
        if self.task.all_classes:
            draw_all_classes(net)
        what = f"{len(empty)} of the network's {net.label_dim} classes have no training image"
        how = "are drawn all the same" if not getattr(net, "empty_classes", []) else "are left out (see --all-classes)"
        if not self._noted:
            self.progress.write(f"Note: {what}; they {how}.")
        self._noted = True

    def _prepare(self, net: torch.nn.Module) -> torch.nn.Module:
        """The network as it is to compute. It is compiled once: the next snapshot hands over its weights."""
        if hasattr(net, "made"):  # nothing computes
            return net
        if self._compiled is not None and self._compiled.take(net):
            return self._compiled
        prepared = prepare_denoiser(net, self.task.precision, self.task.compile)
        self._compiled = prepared if self.task.compile else None
        return prepared

    def precision(self, subject: Subject) -> str:
        """The precision that counts; on CUDA the snapshot itself may say so (`use_fp16`)."""
        if self.task.precision is not None or subject.optimum is not None or self.reference.device.type != "cuda":
            return self.task.precision or "fp32"
        return own_precision(self.load(subject)[0], self.reference.device)

    def generate(self, subject: Subject, seeds: Sequence[int], **how: Any) -> Measurement:
        """`measure_network` on a snapshot."""
        task, (net, _) = self.task, self.load(subject)
        return measure_network(
            net, self.reference.pixels, seeds, batch=task.batch, class_idx=task.class_idx,
            sampler_kwargs=task.sampler_kwargs, **how,
        )  # fmt: skip

    def measure(
        self,
        subject: Subject,
        *,
        start: Measurement | None = None,  # rows that need not be measured
        keep: Callable[[Measurement], Any] | None = None,  # is given the rows so far, from time to time
        images: Path | None = None,  # folder for PNGs
        subdirs: bool = False,  # put every 1000 seeds into a folder of their own
    ) -> tuple[Measurement, dict[str, Any]]:
        """The rows of a snapshot, and the entries of its record that a sequential test makes, if there is one."""
        task, progress = self.task, self.progress
        total = len(task.seeds)
        error = (1 - task.confidence) * (1.0 if subject.error_share is None else subject.error_share)
        test = SequentialTest(task.bar, 1 - error) if task.bar is not None else None
        looks = set() if test is None else set(accumulate(rounds(total)))
        self._made = {}

        def on_batch(batch_seeds: list[int], batch: torch.Tensor) -> None:
            if writer is not None:
                writer.save(batch_seeds, batch)
            if self._quality is not None or self._control is not None:
                self._made.update(zip(batch_seeds, batch.numpy()))
            progress.batch(len(batch_seeds))

        def on_rows(rows: Measurement) -> bool:
            progress.rows(rows.num_samples, rows.ratio)
            if test is not None and rows.num_samples in looks:
                verdict = test.update(rows.num_memorized - test.successes, rows.num_samples - test.n)
                if dist.broadcast(verdict) is not None:  # machines could round differently
                    return True
            if rows.num_samples < total and keep is not None:
                keep(rows)
            return False

        with PngWriter(images, subdirs) if images is not None else contextlib.nullcontext() as writer:
            rows = self.generate(
                subject, task.seeds, columns=task.pixel_columns, features=self.reference.features,
                feature_columns=task.feature_columns, on_batch=on_batch, start=start, stops=looks, on_rows=on_rows,
            )  # fmt: skip
        if test is None:
            return rows, {}
        low, high = test.interval()
        entries = {"ci_low": low, "ci_high": high, "confidence": test.confidence, "interval": "time-uniform"}
        return rows, entries | {"sequential": test.summary()}

    def open_gap(self, subject: Subject) -> None:
        """Prepare what measures the gap, for networks like that of this snapshot."""
        if self._gap is None and self._open_gap is not None:
            self._gap = self._open_gap(*self.load(subject))

    def lacks_gap(self, record: dict[str, Any], anew: bool = False) -> bool:
        """Whether the gap is asked for and the record has none, or one is to be measured in its place."""
        return self._gap is not None and (anew or not self._gap.holds(record))

    def measure_gap(self, subject: Subject) -> dict[str, Any]:
        """`GapMeter.measure` on a snapshot."""
        self.progress.doing(f"{subject.name} gap")
        return self._gap.measure(self.load(subject)[0])

    def lacks_quality(self, record: dict[str, Any], anew: bool = False) -> bool:
        """Whether the quality is asked for and the record has none, or one is to be measured in its place."""
        return self._quality is not None and (anew or not self._quality.holds(record))

    def measure_quality(self, subject: Subject, record: dict[str, Any]) -> dict[str, Any]:
        """The entry `quality` of the record; see `_images`."""
        self.progress.doing(f"{subject.name} quality")
        images = self._images(subject, record)
        vectors = self._quality.embed(images)
        return self._quality.merged(record, self._quality.measure(list(self._made), vectors))

    def lacks_held_out(self, record: dict[str, Any], anew: bool = False) -> bool:
        """Whether copies of held-out images are asked for and the record has none, or they are to be counted anew."""
        return self._control is not None and (anew or not self._control.holds(record))

    def measure_held_out(self, subject: Subject, record: dict[str, Any]) -> dict[str, Any]:
        """The entry `held_out` of the record; see `_images`."""
        self.progress.doing(f"{subject.name} held-out")
        return self._control.measure(self._images(subject, record))

    def forget_images(self) -> None:
        """The snapshot is done with; the images of the next are others."""
        self._made = {}

    def _images(self, subject: Subject, record: dict[str, Any]) -> np.ndarray:
        """This rank's images of a record, uint8 [n, C, H, W], as `measure` just made them; others are made again."""
        task = self.task
        there = {seed for part in dist.gather(list(self._made)) for seed in part}
        share = split_seeds([seed for seed in task.measured_seeds(record) if seed not in there])
        net = self.load(subject)[0]
        for some, batch in made_images(
            net, share, task.batch, class_idx=task.class_idx, sampler_kwargs=task.sampler_kwargs
        ):
            self._made.update(zip(some, batch.numpy()))
        empty = np.empty((0, *self.reference.images.shape[1:]), dtype=np.uint8)
        return np.stack(list(self._made.values())) if self._made else empty
