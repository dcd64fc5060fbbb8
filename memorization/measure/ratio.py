"""The memorization ratio R_mem: the criterion, and its measurement on one network."""

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from memorization.measure.criteria import THRESHOLD, memorized
from memorization.measure.feature_space import FeatureSpace
from memorization.measure.knn import Neighbors
from torch_utils import distributed
from training.generation import check_class, generate_images, split_batches, split_seeds

_CHUNK = 256  # images per rank, or a batch if that is more, between two comparisons with the reference


def memorization_ratio(distance: np.ndarray, threshold: float = THRESHOLD) -> float:
    """R_mem, the fraction 0..1 of memorized images (Gu et al. 2023, Section 2); see `memorized`.

    Raises
    ------
    ValueError
        If there are no images, or `distance` does not have at least two columns.
    """
    flags = memorized(distance, threshold)
    if not flags.size:
        raise ValueError("The memorization ratio of no images is undefined; generate at least one.")
    return float(flags.mean())


# ----------------------------------------------------------------------------
# Measurement.


@dataclass(frozen=True)
class Measurement:
    """What was measured on one network; rows in ascending order of the seeds."""

    seeds: np.ndarray  # int64 [n]
    knn_distance: np.ndarray  # float64 [n, 2], 0..255 units
    knn_index: np.ndarray  # int64 [n, 2], rows of the reference
    images: np.ndarray | None = None  # uint8 [n, C, H, W], where they were kept
    more: dict[str, np.ndarray] = field(default_factory=dict)  # [n, k]: NAME_distance and NAME_index

    @property
    def num_samples(self) -> int:
        return len(self.seeds)

    @property
    def num_memorized(self) -> int:
        return int(memorized(self.knn_distance).sum())

    @property
    def ratio(self) -> float:
        return memorization_ratio(self.knn_distance)

    @property
    def mean_distance(self) -> float:
        """Mean distance to the nearest training image, 0..255 units."""
        return float(self.knn_distance[:, 0].mean())

    def arrays(self) -> dict[str, np.ndarray]:
        """All arrays but the images, by name."""
        return {"seeds": self.seeds, "knn_distance": self.knn_distance, "knn_index": self.knn_index, **self.more}

    def select(self, seeds: Iterable[int]) -> "Measurement":
        """The rows of those of `seeds` that are there, without images."""
        rows = np.flatnonzero(np.isin(self.seeds, np.fromiter(seeds, dtype=np.int64)))
        return make_measurement({name: array[rows] for name, array in self.arrays().items()})


def make_measurement(arrays: dict[str, np.ndarray], images: np.ndarray | None = None) -> Measurement:
    """The measurement of these arrays, whose rows it sorts by seed."""
    order = np.argsort(arrays["seeds"], kind="stable")
    arrays = {name: array[order] for name, array in arrays.items()}
    seeds, distance, index = (arrays.pop(name) for name in ("seeds", "knn_distance", "knn_index"))
    return Measurement(seeds, distance, index, None if images is None else images[order], more=arrays)


def check_seeds(seeds: Sequence[int]) -> None:
    """Raise ValueError if there are no seeds, or one appears twice."""
    if not len(seeds):
        raise ValueError("There are no seeds; name at least one image to generate.")
    if len(set(seeds)) != len(seeds):
        ordered = sorted(seeds)
        twice = next(seed for seed, following in zip(ordered, ordered[1:]) if seed == following)
        raise ValueError(f"Seed {twice} appears more than once; each image may count only once.")


def check_reference(reference: np.ndarray | Neighbors) -> None:
    """Raise ValueError if the reference has fewer than two images."""
    if len(reference) < 2:
        raise ValueError(f"The reference for nearest neighbours has {len(reference)} image(s); d1/d2 needs at least 2.")


def check_network(
    net: torch.nn.Module,
    shape: Sequence[int],  # [C, H, W] of the reference
    class_idx: int | None = None,
) -> None:
    """Raise ValueError if the network's images have another shape, or `class_idx` is none of its classes."""
    expected = getattr(net, "image_shape", (net.img_channels, net.img_resolution, net.img_resolution))
    if tuple(shape) != expected:
        raise ValueError(
            f"The network makes images [C, H, W] = {list(expected)}, the reference for nearest neighbours "
            f"has {list(shape)}; use the dataset that the network was trained on."
        )
    check_class(net, class_idx)


def made_images(
    net: torch.nn.Module, seeds: Sequence[int], batch: int, ends: Sequence[int] = (), **how: Any
) -> Iterator[tuple[list[int], torch.Tensor]]:
    """`generate_images`, or the images of a "network" whose images are there already, or made in another way."""
    if hasattr(net, "made"):
        return net.made(seeds, batch=batch, ends=ends)
    return generate_images(net, seeds, batch=batch, ends=ends, **how)


def measure_network(
    net: torch.nn.Module,
    reference: np.ndarray | Neighbors,  # uint8 [N, C, H, W], or prepared, which pays where it is used again
    seeds: Sequence[int],  # one per image, the same list on all ranks
    *,
    batch: int = 64,  # images per generated batch and rank
    class_idx: int | None = None,  # class to generate; None: as `generate_images` draws them
    sampler_kwargs: dict[str, Any] | None = None,  # of the sampler
    device: str | torch.device | None = None,  # of the nearest-neighbour search in an array; None: CPU
    columns: int = 2,  # nearest images to look for
    features: FeatureSpace | None = None,  # look for nearest images there, too
    feature_columns: int = 2,  # so many
    keep_images: bool = False,  # return the images too
    on_batch: Callable[[list[int], torch.Tensor], Any] | None = None,  # sees each batch of this rank
    start: Measurement | None = None,  # rows of an earlier measurement that need not be measured again
    stops: Iterable[int] = (),  # numbers of images after which `on_rows` is called, among others
    on_rows: Callable[[Measurement], bool | None] | None = None,  # sees all rows so far; True ends the measurement
) -> Measurement:
    """Generate one image per seed and find its two nearest neighbours in `reference`.

    Seeds are taken in ascending order, some hundred at a time: each rank generates its share of them, which
    may be empty, and compares the uint8 pixels that a PNG would hold. Then every rank has all rows so far and
    calls `on_rows`, which has to answer the same on all ranks. A prepared reference is `Neighbors(images,
    device=..., shard=True)`; without `shard` it works, too.

    With `columns` above 2 `more` holds `pixels_distance` and `pixels_index` [n, columns], with `features` it
    holds `KEY_distance` and `KEY_index`, where KEY is `features.key`.

    Raises
    ------
    ValueError
        See `check_seeds`, `check_reference` and `check_network`.
    """
    check_seeds(seeds)
    check_reference(reference)
    if not isinstance(reference, Neighbors):
        check_network(net, reference.shape[1:], class_idx)
        reference = Neighbors(reference, device=device or "cpu", shard=True)
    check_network(net, reference.shape, class_idx)
    seeds = np.sort(np.asarray(seeds, dtype=np.int64))

    def measure(share: list[int]) -> tuple[dict[str, np.ndarray], np.ndarray | None]:
        parts = [np.empty((0, *reference.shape), dtype=np.uint8)]
        for batch_seeds, images in itertools.islice(generated, len(split_batches(share, batch))):
            parts.append(images.numpy())
            if on_batch is not None:
                on_batch(batch_seeds, images)
        made = np.concatenate(parts)
        distance, index = reference.query(made, columns)
        arrays = {"seeds": np.asarray(share, dtype=np.int64)}
        arrays |= {"knn_distance": distance[:, :2], "knn_index": index[:, :2]}
        if columns > 2:
            arrays |= {"pixels_distance": distance, "pixels_index": index}
        if features is not None:
            found = features.query(made, feature_columns)
            arrays |= {f"{features.key}_distance": found[0], f"{features.key}_index": found[1]}
        every = distributed.gather((arrays, made if keep_images else None))
        arrays = {name: np.concatenate([part[name] for part, _ in every]) for name in arrays}
        return arrays, np.concatenate([part for _, part in every]) if keep_images else None

    step = -(-_CHUNK // batch) * batch * distributed.get_world_size()
    ends = sorted({*range(step, len(seeds), step), *(n for n in stops if 0 < n < len(seeds)), len(seeds)})
    chunks = []  # (rows that are known, seeds that are not, this rank's share of them)
    for first, end in zip([0, *ends], ends):
        chunk = seeds[first:end]
        known = start.select(chunk).arrays() if start is not None and not keep_images else {"seeds": chunk[:0]}
        missing = np.setdiff1d(chunk, known["seeds"])
        chunks.append((known, missing, split_seeds(missing.tolist())))
    # One generator for all of them: a GPU is at the next images while these are compared.
    shares = [share for _, _, share in chunks]
    how = dict(batch=batch, ends=list(itertools.accumulate(map(len, shares))))
    every = [seed for share in shares for seed in share]
    generated = made_images(net, every, class_idx=class_idx, sampler_kwargs=sampler_kwargs or {}, **how)
    arrays, images = {}, None
    for known, missing, share in chunks:
        found = [part for part in (arrays, known) if len(part.get("seeds", ()))]
        if len(missing):
            new, new_images = measure(share)
            found.append(new)
            images = new_images if images is None else np.concatenate([images, new_images])
        arrays = {name: np.concatenate([part[name] for part in found]) for name in found[-1]}
        rows = make_measurement(arrays, images)
        if on_rows is not None and on_rows(rows):
            break
    return rows
