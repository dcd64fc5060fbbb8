"""The quality of the images of any number of snapshots, against one held-out set: what a record says of it."""

import hashlib
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from memorization.measure.feature_space import FeatureSpace
from memorization.measure.gap import ImageSet
from memorization.measure.quality import CONFIDENCE, MEASURES, PAIRS, Vectors, compare
from torch_utils import distributed as dist
from training.fingerprint import array_sha256

SPACES = ("pca", "pixels", "features")
COMPONENTS = 64  # of the PCA, at most, and at most one for each `_PER_COMPONENT` images of the reference
_PER_COMPONENT = 8
_AXES_IMAGES = 4096  # images that the axes are made of, at most

OVERLAP = "held-out images that are training images"
BEYOND = f"images beyond the {PAIRS:,} of a set whose neighbours are compared"


class QualityMeter:
    """Compares generated images with held-out ones. All ranks make the same calls.

    The held-out set is halved, by a fixed shuffle. One half is the reference of all values. The value of the other half
    is the floor `heldout`, what real images reach; that of the training set is the floor `training`, what copies reach.

    Parameters
    ----------
    training : images uint8 [N, C, H, W] that the networks were trained on; they are taken out of the held-out ones
    heldout : held-out images
    measures : keys of `MEASURES`
    space : "pixels" in [-1, 1]; "pca", the principal components of the held-out pixels; or "features"
    features : the training images in the space of a feature network, for "features"
    device : where to compute

    Raises
    ------
    ValueError
        If the held-out images have another shape than the training images, are the training images, or are too few.
    """

    def __init__(
        self,
        training: np.ndarray,
        heldout: ImageSet,
        measures: Sequence[str] = ("frechet",),
        *,
        space: str = "pca",
        features: FeatureSpace | None = None,
        device: torch.device | str = "cpu",
    ):
        if heldout.images.shape[1:] != training.shape[1:]:
            raise ValueError(
                f'The held-out images of "{heldout.path}" are [C, H, W] = {list(heldout.images.shape[1:])}, the '
                f"training images {list(training.shape[1:])}; make them alike with dataset_tool.py."
            )
        digest = array_sha256(heldout.images)
        if digest == array_sha256(training):
            raise ValueError(
                f'"{heldout.path}" is the training set itself; quality is measured against images that were not '
                "trained on (its value for the training set is printed beside it)."
            )
        known = {hashlib.sha256(image).digest() for image in np.ascontiguousarray(training)}
        new = [hashlib.sha256(image).digest() not in known for image in np.ascontiguousarray(heldout.images)]
        images = heldout.images[new]
        if len(images) < 4:
            raise ValueError(
                f'Of the {len(new)} images of "{heldout.path}" {len(images)} are not among the training images; '
                "quality needs 4 at least, and hundreds to say something."
            )
        self.measures, self.device = tuple(measures), torch.device(device)
        self.left_out = {OVERLAP: len(new) - len(images)} if len(images) < len(new) else {}
        self._features, self._axes = features, None
        halves = np.array_split(np.random.RandomState(0).permutation(len(images)), 2)
        halves = [images[half] for half in halves]
        self._training = training
        self.space: dict[str, Any] = {"name": space}
        if space == "features":
            if features is None:
                raise ValueError("The space of features needs a feature network.")
            self.space |= {"network": features.name, "sha256": features.sha256}
        elif space == "pca":
            self._axes, explained = dist.on_rank0(
                principal_axes, images, min(COMPONENTS, len(halves[0]) // _PER_COMPONENT)
            )
            self.space |= {"dimensions": self._axes[1].shape[1], "explained": explained}
        self._reference, self._other = (Vectors(self._embed_shared(half), self.device) for half in halves)
        self.space["dimensions"] = self._reference.dimensions
        self._settings = {
            "dataset": str(os.path.realpath(heldout.path)),
            "dataset_sha256": digest,
            "dataset_size": len(new),
            "num_reference": len(self._reference),
            "space": self.space,
            "confidence": CONFIDENCE,
        }
        self._floors: dict[str, Any] | None = None

    def check(self, num_samples: int) -> None:
        """Raise ValueError, at once, if so many generated images are too few for the measures."""
        dimensions, half = self.space["dimensions"], "held-out (half of those there are)"
        for name in self.measures:
            for count, what in ((num_samples, "generated"), (len(self._reference), half)):
                balls = (name == "recall") == (what == "generated")  # of which set
                needed = max(
                    2, MEASURES[name].neighbours + 1 if balls else 0, dimensions + 1 if name == "frechet" else 0
                )
                if count >= needed:
                    continue
                why = f" in {dimensions} dimensions, for covariances of full rank" if name == "frechet" else ""
                raise ValueError(
                    f"{name} needs {needed} {what} images at least{why}; there are {count}. Take more"
                    f"{', or --quality-space=pca' if why and self.space['name'] == 'pixels' else ''}."
                )

    def holds(self, record: dict[str, Any]) -> bool:
        """True if `record` has its quality by all measures, with these settings."""
        return self._same(record) and all(name in record["quality"]["measures"] for name in self.measures)

    def _same(self, record: dict[str, Any]) -> bool:
        quality = record.get("quality") or {}
        return all(quality.get(key) == value for key, value in self._settings.items())

    def embed(self, images: np.ndarray) -> np.ndarray:
        """Images uint8 [n, C, H, W] of this rank in the space; of other ranks they may be others, or none."""
        if self._features is not None and self.space["name"] == "features":
            return self._features.embed_together(images)
        if self._axes is None:
            return images
        mean, axes = self._axes
        parts = [_pixels(images[i : i + 1024]) - mean for i in range(0, len(images), 1024)]
        return np.concatenate([part @ axes for part in parts] or [np.empty((0, axes.shape[1]))])

    def measure(self, seeds: Sequence[int], vectors: np.ndarray) -> dict[str, Any]:
        """The entry `quality` of a record, of this rank's share of the images, embedded; see docs/measure.md."""
        every = [(s, v) for s, v in dist.gather((np.asarray(seeds, dtype=np.int64), vectors)) if len(s)]
        order = np.argsort(np.concatenate([s for s, _ in every]), kind="stable")
        rows = np.concatenate([v for _, v in every])[order]
        return dist.on_rank0(self._measure, rows)

    def merged(self, record: dict[str, Any], quality: dict[str, Any]) -> dict[str, Any]:
        """`quality` with those measures of the record that were measured with the same settings, behind its own."""
        old = record.get("quality")
        if not self._same(record) or old["num_samples"] != quality["num_samples"]:
            return quality
        floors = {
            name: floor | {"measures": floor["measures"] | _others(old["floors"][name]["measures"], floor["measures"])}
            for name, floor in quality["floors"].items()
        }
        more = _others(old["measures"], quality["measures"])
        left_out = old["left_out"] | quality["left_out"]
        return quality | {"measures": quality["measures"] | more, "floors": floors, "left_out": left_out}

    def _measure(self, rows: np.ndarray) -> dict[str, Any]:
        images = Vectors(rows, self.device)
        if self._floors is None:
            features = self._features if self.space["name"] == "features" else None
            training = features.reference if features is not None else self.embed(self._training)
            if len(training) > PAIRS:  # it may be sorted, and neighbours are compared of the first ones
                training = training[np.random.RandomState(1).permutation(len(training))]
            self._floors = {
                "training": self._floor(Vectors(training, self.device)),
                "heldout": self._floor(self._other),
            }
        sizes = [len(images), len(self._reference), *(floor["num_samples"] for floor in self._floors.values())]
        pairwise = any(MEASURES[name].neighbours for name in self.measures)
        beyond = sum(max(size - PAIRS, 0) for size in sizes) if pairwise else 0
        return {
            **self._settings,
            "num_samples": len(images),
            "measures": self._compare(images, self.measures),
            "floors": self._floors,
            "left_out": self.left_out | ({BEYOND: beyond} if beyond else {}),
        }

    def _floor(self, images: Vectors) -> dict[str, Any]:
        needed = {"frechet": 2, "kernel": 2, "recall": MEASURES["recall"].neighbours + 1}
        names = [name for name in self.measures if len(images) >= needed.get(name, 1)]
        return {"num_samples": len(images), "measures": self._compare(images, names)}

    def _compare(self, images: Vectors, names: Sequence[str]) -> dict[str, Any]:
        found = compare(images, self._reference, names)
        return {name: estimate.record(biased=name == "frechet") for name, estimate in found.items()}

    def _embed_shared(self, images: np.ndarray) -> np.ndarray:
        """All these images in the space, on all ranks, which share the work where it is much."""
        if self.space["name"] != "features":
            return self.embed(images)
        rank, world = dist.get_rank(), dist.get_world_size()
        share = images[len(images) * rank // world : len(images) * (rank + 1) // world]
        return np.concatenate([part for part in dist.gather(self.embed(share)) if len(part)])


def principal_axes(images: np.ndarray, count: int) -> tuple[tuple[np.ndarray, np.ndarray], float]:
    """Mean [D] and the first principal axes [D, count] of pixels in [-1, 1], and their share of the variance.

    There are fewer axes where the images have fewer dimensions. Of many images a part is enough: any axes do, as long
    as all images are seen along the same ones. The sign of an axis is that of its largest entry made positive.
    """
    import scipy.linalg

    pixels = _pixels(images[:: -(-len(images) // _AXES_IMAGES)])
    mean = pixels.mean(0)
    pixels = pixels - mean
    tall = pixels.shape[0] >= pixels.shape[1]
    value, vector = scipy.linalg.eigh(pixels.T @ pixels if tall else pixels @ pixels.T)
    rank = int((value > value[-1] * len(value) * np.finfo(np.float64).eps).sum()) if value[-1] > 0 else 0
    if rank == 0:
        raise ValueError("All held-out images are the same; there is nothing to compare with.")
    count = max(min(count, rank), 1)
    axes = vector[:, ::-1][:, :count]
    if not tall:
        axes = pixels.T @ axes
        axes = axes / np.sqrt(np.square(axes).sum(0))
    axes = axes * np.sign(axes[np.abs(axes).argmax(0), np.arange(count)])
    return (mean, axes), float(value[-count:].sum() / value.sum())


def describe_quality(quality: dict[str, Any], names: Sequence[str]) -> list[str]:
    """A line for each of these measures: value, interval, and the floors."""
    space = quality["space"]
    where = f"{space.get('network', space['name'])}, {space['dimensions']}"
    floors = {"training": "training set", "heldout": "held-out"}
    lines = []
    for name in names:
        entry = quality["measures"][name]
        line = f"    {f'{name} ({where})':<24s}{_text(entry)}"
        if entry.get("bias") is not None:
            line += f" bias {entry['bias']:+.3g}"
        for key, label in floors.items():
            floor = quality["floors"][key]
            found = floor["measures"].get(name)
            line += f"  {label} ({floor['num_samples']:,}) " + (f"{found['value']:.4g}" if found else "-")
        lines.append(line)
    return lines


def _text(entry: dict[str, Any]) -> str:
    return f"{entry['value']:.4g} [{entry['ci_low']:.4g}, {entry['ci_high']:.4g}]"


def _others(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    return {name: entry for name, entry in old.items() if name not in new}


def _pixels(images: np.ndarray) -> np.ndarray:
    return images.reshape(len(images), -1) / 127.5 - 1
