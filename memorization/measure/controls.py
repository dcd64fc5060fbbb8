"""What a measured run is compared with, measured as the run was: held-out images, and the optimum of its training set.

Both are written into the records of the run, and are not measured again.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dnnlib.util import parse_int_list
from memorization.measure.evaluator import Evaluator
from memorization.measure.gap import ImageSet
from memorization.measure.held_out import HeldOutControl
from memorization.measure.results import Reference, Task, read_reference
from memorization.measure.subjects import Subject, optimum_subject, snapshot_subjects
from memorization.records import jsonl_path, read_records, setting
from memorization.runs import LOG, Run
from training.fingerprint import array_sha256
from training.optim import OptimEDM


def measure_held_out(
    run: Run, records: Sequence[dict[str, Any]], path: str, device: torch.device, batch: int = 64
) -> dict[str, int]:
    """Count the copies of the held-out images of `path` on the snapshots of these records of the run.

    Returns
    -------
    What was left out of the held-out images, by reason.

    Raises
    ------
    OSError, ValueError
        If what the run was measured with or its snapshots are not there any more, or the held-out images do not fit.
    """
    reference, task = _as_measured(run, records[-1], device, batch)
    control = HeldOutControl.read(reference, path)
    wanted = {record["kimg"] for record in records if not control.holds(record)}
    if wanted:
        subjects = [subject for subject in snapshot_subjects(run.path, device) if subject.kimg in wanted]
        if gone := sorted(wanted - {subject.kimg for subject in subjects}):
            raise FileNotFoundError(
                f'Snapshots of "{run.path}" are not there any more: kimg {", ".join(map(str, gone))}. Held-out images '
                "are counted in all of them that were measured."
            )
        _evaluate(Evaluator(run.path / LOG, reference, task, _describe, control=control), subjects)
    return control.left_out


def measure_optimum(run: Run, record: dict[str, Any], device: torch.device, batch: int = 64) -> None:
    """Measure the optimum of the training set of a run with the seeds, sampler and reference of this record.

    Raises
    ------
    OSError, ValueError
        If what the run was measured with or its training set is not there any more.
    """
    if find_optimum(run, record) is not None:
        return
    reference, task = _as_measured(run, record, device, batch)
    subject = _optimum(run, record, device)
    task = replace(task, precision=None, compile=False)  # it has its own arithmetic
    _evaluate(Evaluator(run.path / LOG, reference, task, _describe), [subject])


def find_optimum(run: Run, record: dict[str, Any]) -> dict[str, Any] | None:
    """The record of the optimum that was measured with the seeds, sampler and reference of this record, or None."""
    jsonl = jsonl_path(run.path / LOG)
    same = ("seeds", "sampler", "class", "reference_sha256")
    found = [
        r for r in read_records(jsonl, report=lambda _: None)
        if r.get("optimum") and r.get("groups") and all(r.get(key) == record.get(key) for key in same)
    ]  # fmt: skip
    return found[-1] if found else None


def _as_measured(run: Run, record: dict[str, Any], device: torch.device, batch: int) -> tuple[Reference, Task]:
    """The reference and the settings with which a record was measured."""
    path, log = record.get("reference"), jsonl_path(run.path / LOG)
    if record.get("adaptive"):
        raise ValueError(f'"{log}" is of mem_ratio.py --adaptive, with as many images as it took; measure without it.')
    if not path or not Path(path).exists():
        raise FileNotFoundError(f'"{path}", with which "{run.path}" was measured, is not there any more.')
    reference = read_reference(path, device, unique=bool((record.get("repeats") or {}).get("unique")))
    if reference.sha256 != record.get("reference_sha256"):
        raise ValueError(f'"{path}" holds other images than when "{run.path}" was measured; measure it again.')
    reference.other = bool(record.get("other_reference"))
    sampler = {key: float(v) if v in ("inf", "-inf") else v for key, v in (record.get("sampler") or {}).items()}
    task = Task(
        seeds=parse_int_list(record["seeds"]), batch=batch, class_idx=record.get("class"), sampler_kwargs=sampler,
        precision=setting(record, "precision"), compile=setting(record, "compile"),
        all_classes=bool(record.get("all_classes")),
    )  # fmt: skip
    return reference, task


def _optimum(run: Run, record: dict[str, Any], device: torch.device) -> Subject:
    """The optimum of what the run was trained on, mirrored images included."""
    data, digest = run.options["dataset_kwargs"], run.options.get("dataset_sha256")
    paths = [path for path in (data.get("path"), record["reference"]) if path and Path(path).exists()]
    if isinstance(digest, str) and not digest.startswith("listing:"):
        paths = [path for path in paths if array_sha256(ImageSet.read(path).images) == digest]
    if not paths:
        raise ValueError(
            f'The training set of "{run.path}", "{data.get("path")}", is not there, or holds other images; its optimum '
            "needs it. Run this in the folder in which train.py ran."
        )
    subject = optimum_subject(paths[0], device, cond=bool(data.get("use_labels")))
    if not data.get("xflip"):
        return subject
    images = ImageSet.read(paths[0], cond=bool(data.get("use_labels")))
    labels = None if images.labels is None else np.tile(images.labels, 2)
    net = OptimEDM(np.concatenate([images.images, images.images[..., ::-1]]), labels).to(device)
    return replace(subject, load=lambda: (net, {}))


def _evaluate(evaluator: Evaluator, subjects: Sequence[Subject]) -> None:
    evaluator.run(subjects)
    for name, reason in evaluator.left_out.items():
        raise ValueError(f"{name} cannot be measured: {reason}")


def _describe(record: dict[str, Any], note: str) -> str:
    what = "The optimum" if record["kimg"] is None else f"kimg {record['kimg']:06d}"
    return f"{what}: {record['num_memorized']} of {record['num_samples']} images memorized{note}"
