"""What a record says beyond R_mem: other thresholds, other criteria, classes and groups; all of it from distances."""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from dnnlib.repeats import Repeats, find_repeats
from memorization.measure.criteria import Criterion, memorized, other_distance
from memorization.measure.feature_space import FeatureSpace
from memorization.measure.gap import ImageSet
from memorization.measure.groups import group_table, label_groups
from memorization.measure.knn import Neighbors
from memorization.measure.ratio import Measurement
from memorization.stats.intervals import wilson_interval
from torch_utils import distributed as dist
from training.dataset import ImageFolderDataset, files_left_out
from training.fingerprint import array_sha256
from training.optim import read_npz

REPEATS = "training images that repeat another one"
NOT_NEEDED = "images of which the verdict had no need"


@dataclass(frozen=True)
class Task:
    """What is measured on every snapshot."""

    seeds: Sequence[int]
    batch: int = 64  # images at a time and rank
    class_idx: int | None = None
    sampler_kwargs: dict[str, Any] = field(default_factory=dict)
    thresholds: Sequence[float] = ()  # of d1/d2 in pixels, beside the published one
    criteria: Sequence[Criterion] = ()  # in pixels, beside the published one
    feature_criteria: Sequence[Criterion] = ()  # in features, where the reference has them
    bar: float | None = None  # stop as soon as the ratio is above or below; None: measure all seeds
    confidence: float = 0.95  # of that decision
    precision: str | None = None  # in which the network computes, see training.precision; None: its own
    compile: bool = False
    all_classes: bool = False  # draw also classes that training never saw
    labels: Sequence[tuple[str, Any]] = ()  # key and value, for the record

    def adaptive(self, share: float | None = None) -> dict[str, float] | None:
        """The entry `adaptive` of the record of a snapshot that may make this share of the error; None: all of it."""
        if self.bar is None:
            return None
        return {"bar": self.bar, "confidence": self.confidence} | ({"error_share": share} if share is not None else {})

    @property
    def pixel_columns(self) -> int:
        """Nearest images to look for."""
        return max([2, *(criterion.neighbours for criterion in self.criteria)])

    @property
    def feature_columns(self) -> int:
        """Nearest images to look for in features."""
        return max([2, *(criterion.neighbours for criterion in self.feature_criteria)])

    def measured_seeds(self, record: dict[str, Any]) -> list[int]:
        """The seeds that were measured for a record; a sequential test leaves out the last ones."""
        return sorted(self.seeds)[: record["num_samples"]]

    def criterion_names(self) -> list[str]:
        """Their keys in the entry `criteria` of the records."""
        return [c.name for c in self.criteria] + [f"features:{c.name}" for c in self.feature_criteria]

    def arrays(self, features: FeatureSpace | None) -> dict[str, int]:
        """The arrays needed in `Measurement.more`, with their columns."""
        columns = {"pixels": self.pixel_columns} if self.pixel_columns > 2 else {}
        if features is not None:
            columns[features.key] = self.feature_columns
        return {f"{space}_{what}": count for space, count in columns.items() for what in ("distance", "index")}


class Reference:
    """The training images to compare with, prepared once for all snapshots.

    Parameters
    ----------
    path : dataset
    images : uint8 [N, C, H, W]
    device : where to search
    labels : int64 [N] classes, or other labels, or None
    groups : name of the group of each image, or None
    features : of the same images, or None
    repeats : which of all training images are the same, where some are; else None
    unique : `images` are the different ones among them
    dataset_sha256, dataset_size : digest and number of all training images, if `images` are the different ones only
    left_out : how many training images or files beside them were left out, by reason
    """

    def __init__(
        self,
        path: str,
        images: np.ndarray,
        device: torch.device | str,
        *,
        labels: np.ndarray | None = None,
        groups: Sequence[str] | None = None,
        features: FeatureSpace | None = None,
        repeats: Repeats | None = None,
        unique: bool = False,
        dataset_sha256: str | None = None,
        dataset_size: int | None = None,
        left_out: dict[str, int] | None = None,
    ):
        self.path, self.images, self.features = path, images, features
        self.device = torch.device(device)
        self.sha256 = array_sha256(images) if unique or dataset_sha256 is None else dataset_sha256
        self.dataset_sha256 = dataset_sha256 or self.sha256
        self.dataset_size = dataset_size or len(images)
        self.pixels = Neighbors(images, device=device, shard=True)
        tables = {"classes": label_groups(labels), "groups": groups}
        self.tables = {name: groups for name, groups in tables.items() if groups is not None}
        self.unique = unique
        self.other = False  # the network is known not to have been trained on it; see `check_trained_on`
        self.left_out = {reason: number for reason, number in (left_out or {}).items() if number}
        self.repeats: dict[str, Any] | None = None  # what records say of them; None if there are none
        if repeats is not None and repeats.counts()["repeated"]:
            self.repeats = {**repeats.counts(), "unique": unique}
            self.repeated = repeats.repeated[repeats.distinct] if unique else repeats.repeated  # bool [N]
        self.grouping = {name: array_sha256(np.asarray(groups)) for name, groups in self.tables.items()}


def read_groups(path: str | os.PathLike) -> tuple[np.ndarray | None, list[str] | None]:
    """Labels and groups of a dataset zip or folder or of a .npz, None where it has none.

    Raises
    ------
    OSError, ValueError
        If the file cannot be read, or labels or groups are incomplete.
    """
    if not os.fspath(path).lower().endswith(".npz"):
        data = ImageFolderDataset(path)
        return data.file_labels(), data.groups()
    return read_npz(path)[1], None


def read_reference(
    path: str,
    device: torch.device | str,
    *,
    unique: bool = False,  # each different image once
    features: Callable[[np.ndarray], FeatureSpace] | None = None,  # of these images, if wanted
    note: Callable[[str], Any] = lambda _: None,  # is told what a user should know
) -> Reference:
    """The training images of a dataset, with their classes and groups."""
    images = ImageSet.read(path).images
    labels = groups = None
    try:
        labels, groups = read_groups(path)
    except ValueError as err:
        note(f"Note: no ratio per class or group. {err}")
    digest, size = array_sha256(images), len(images)
    repeats = find_repeats(images)
    if text := repeats.describe("training images"):
        note(f"Note: {text if not unique else text.partition(';')[0] + '; each is compared with once.'}")
    if unique:
        images = images[repeats.distinct]
        labels = None if labels is None else labels[repeats.distinct]
        groups = None if groups is None else [groups[i] for i in repeats.distinct]
    left_out = {REPEATS: len(repeats.first) - len(images)} if unique else {}
    return Reference(
        path, images, device, labels=labels, groups=groups, features=features(images) if features else None,
        repeats=repeats, unique=unique, dataset_sha256=digest, dataset_size=size,
        left_out=left_out | files_left_out(path),
    )  # fmt: skip


def find_results(rows: Measurement, task: Task, reference: Reference) -> dict[str, Any]:
    """What a record has beyond R_mem, if there is any: `thresholds`, `criteria`, `classes`, `groups` and so on.

    Also `other_reference`: true, where the reference is known not to be what the network was trained on.

    A share is {ratio, num_memorized, num_samples, ci_low, ci_high} with a 95 % Wilson interval. `thresholds` has
    one for each threshold of d1/d2, `criteria` one for each criterion beside its settings, under its name
    ("calibrated") in pixels and as "features:calibrated" in features. `classes` and `groups` are tables of
    `memorization.measure.groups.group_table`, by the published criterion, and `grouping` has the digest of what each
    was made of. `repeats`, where training images occur more than once, has `Repeats.counts`, whether the reference are
    the different ones (unique), and of how many generated images (num_nearest), and of which share of them
    (share_nearest), the nearest training image is one that occurs more than once. `left_out` has the number of seeds
    that a sequential test did not need, and of what was left out of the training images, by reason.

    All ranks call this together, with the same rows.
    """
    results: dict[str, Any] = {}
    if reference.other:
        results["other_reference"] = True
    if task.thresholds:
        results["thresholds"] = {_key(t): _share(memorized(rows.knn_distance, t)) for t in task.thresholds}
    if found := _criteria(task, reference):
        results["criteria"] = {
            name: settings | _share(_flags(criterion, rows, reference, in_features="features_sha256" in settings))
            for name, criterion, settings in found
        }
    for name, groups in reference.tables.items():
        results[name] = group_table(memorized(rows.knn_distance), rows.knn_index[:, 0], groups)
    if reference.tables:
        results["grouping"] = reference.grouping
    if reference.repeats is not None:
        near = int(reference.repeated[rows.knn_index[:, 0]].sum())
        results["repeats"] = {**reference.repeats, "num_nearest": near, "share_nearest": near / rows.num_samples}
    left_out = {NOT_NEEDED: len(task.seeds) - rows.num_samples} if rows.num_samples < len(task.seeds) else {}
    if left_out or reference.left_out:
        results["left_out"] = left_out | reference.left_out
    return results


def lacks_results(record: dict[str, Any], task: Task, reference: Reference) -> bool:
    """True if `find_results` has something to add to a record."""
    if reference.other and not record.get("other_reference"):
        return True
    if any(_key(t) not in record.get("thresholds", {}) for t in task.thresholds):
        return True
    for name, _, settings in _criteria(task, reference):
        found = record.get("criteria", {}).get(name, {})
        if any(found.get(key) != value for key, value in settings.items()):
            return True
    if reference.repeats is not None and "repeats" not in record:
        return True
    if any(record.get("left_out", {}).get(reason) != number for reason, number in reference.left_out.items()):
        return True
    known = record.get("grouping", {})  # older records do not say, and hold
    return any(name not in record or known.get(name, digest) != digest for name, digest in reference.grouping.items())


def _criteria(task: Task, reference: Reference) -> list[tuple[str, Criterion, dict[str, Any]]]:
    """Name in the record, criterion and settings of what is asked for."""
    found = [(criterion.name, criterion, criterion.settings()) for criterion in task.criteria]
    if reference.features is not None:
        for criterion in task.feature_criteria:
            settings = criterion.settings() | {"features_sha256": reference.features.sha256}
            found.append((f"features:{criterion.name}", criterion, settings))
    return found


def _flags(criterion: Criterion, rows: Measurement, reference: Reference, in_features: bool) -> np.ndarray:
    """Which images are memorized, in pixels or in features."""
    if in_features:
        space = reference.features
        points, neighbors = space.reference, space.neighbors
        distance, index = rows.more[f"{space.key}_distance"], rows.more[f"{space.key}_index"]
    else:
        points, neighbors = reference.images, reference.pixels
        distance, index = rows.more.get("pixels_distance", rows.knn_distance), rows.knn_index
    other = None
    if criterion.needs_other:
        rank, world = dist.get_rank(), dist.get_world_size()
        other = np.empty(len(distance))
        for i, part in enumerate(dist.gather(other_distance(index[rank::world, 0], points, neighbors.query))):
            other[i::world] = part
    return criterion.flags(distance, other)


def _share(flags: np.ndarray) -> dict[str, Any]:
    """Fraction, counts and interval of flags [n], n >= 1, JSON-ready."""
    n, successes = len(flags), int(flags.sum())
    low, high = wilson_interval(successes, n)
    return {"ratio": successes / n, "num_memorized": successes, "num_samples": n, "ci_low": low, "ci_high": high}


def _key(threshold: float) -> str:
    """The shortest text of a number: 0.25."""
    return repr(float(threshold))
