"""The memorization ratio R_mem: the criterion, its interval, and its measurement on one network."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from memorization.knn import nearest_neighbors
from torch_utils import distributed
from training.generation import check_class, generate_images, split_seeds

THRESHOLD = 1 / 3  # of d1/d2 (Yoon et al. 2023)
_CHUNK = 1024  # generated images held before they are compared with the reference


def memorized(distance: np.ndarray, threshold: float = THRESHOLD) -> np.ndarray:
    """Which images are memorized: those with d1 / d2 < `threshold`.

    An image is memorized when it lies much closer to one training image than to any other. Where the
    two nearest training images are both equal to it (d1 = d2 = 0, duplicates in the training set), the
    quotient 0/0 is NaN and the image does not count, as in the published measurement; remove exact
    duplicates from the reference to have such images counted.

    Parameters
    ----------
    distance : float [n, >= 2], distances to the nearest training images, ascending, any unit.
    threshold : upper bound of d1 / d2, exclusive.

    Returns
    -------
    bool [n]

    Raises
    ------
    ValueError
        If `distance` does not have at least two columns.

    References
    ----------
    Yoon et al., "Diffusion Probabilistic Models Generalize when They Fail to Memorize", 2023.
    Gu et al., "On Memorization in Diffusion Models", 2023, Section 2.
    """
    distance = np.asarray(distance, dtype=np.float64)
    if distance.ndim != 2 or distance.shape[1] < 2:
        raise ValueError(f"The criterion needs distances [n, 2] to two neighbours, not {list(distance.shape)}.")
    with np.errstate(divide="ignore", invalid="ignore"):
        return distance[:, 0] / distance[:, 1] < threshold


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


def wilson_interval(successes: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Score interval of a binomial proportion.

    With p = successes / n and z the two-sided normal quantile of `confidence`,

        (p + z^2/2n -+ z sqrt(p (1 - p) / n + z^2 / 4n^2)) / (1 + z^2 / n).

    Unlike p -+ z sqrt(p (1 - p) / n) it stays within 0..1 and has a width at p = 0 and p = 1.

    Returns
    -------
    low, high : bounds as fractions 0..1.

    Raises
    ------
    ValueError
        If not 0 <= successes <= n with n >= 1, or not 0 < confidence < 1.

    References
    ----------
    Wilson, "Probable Inference, the Law of Succession, and Statistical Inference", JASA 22, 1927.
    Brown, Cai & DasGupta, "Interval Estimation for a Binomial Proportion", Stat. Sci. 16, 2001, Eq. 4.
    """
    from scipy.special import ndtri

    if n < 1 or not 0 <= successes <= n:
        raise ValueError(f"{successes} of {n} is no proportion; 0 <= successes <= n and n >= 1 are needed.")
    if not 0 < confidence < 1:
        raise ValueError(f"The confidence must lie between 0 and 1, not {confidence}.")
    p, z = successes / n, float(ndtri((1 + confidence) / 2))
    centre = (p + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z * (p * (1 - p) / n + z**2 / (4 * n**2)) ** 0.5 / (1 + z**2 / n)
    low = 0.0 if successes == 0 else centre - half  # exactly, not up to rounding
    high = 1.0 if successes == n else centre + half
    return low, high


# ----------------------------------------------------------------------------
# Measurement.


@dataclass(frozen=True)
class Measurement:
    """What was measured on one network; rows in ascending order of the seeds."""

    seeds: np.ndarray  # int64 [n]
    knn_distance: np.ndarray  # float64 [n, 2], 0..255 units
    knn_index: np.ndarray  # int64 [n, 2], rows of the reference
    images: np.ndarray | None = None  # uint8 [n, C, H, W], where they were kept

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


def check_inputs(
    net: torch.nn.Module, reference: np.ndarray, seeds: Sequence[int], class_idx: int | None = None
) -> None:
    """Refuse what `measure_network` cannot measure, before anything is generated.

    Raises
    ------
    ValueError
        If there are no seeds or one appears twice, the reference has fewer than two images or another
        shape than the network's images, or `class_idx` is none of the network's classes.
    """
    if not len(seeds):
        raise ValueError("There are no seeds; name at least one image to generate.")
    if len(set(seeds)) != len(seeds):
        ordered = sorted(seeds)
        twice = next(seed for seed, following in zip(ordered, ordered[1:]) if seed == following)
        raise ValueError(f"Seed {twice} appears more than once; each image may count only once.")
    if len(reference) < 2:
        raise ValueError(f"The reference for nearest neighbours has {len(reference)} image(s); d1/d2 needs at least 2.")
    expected = (net.img_channels, net.img_resolution, net.img_resolution)
    if tuple(reference.shape[1:]) != expected:
        raise ValueError(
            f"The network makes images [C, H, W] = {list(expected)}, the reference for nearest neighbours "
            f"has {list(reference.shape[1:])}; use the dataset that the network was trained on."
        )
    check_class(net, class_idx)


def measure_network(
    net: torch.nn.Module,
    reference: np.ndarray,  # uint8 [N, C, H, W]
    seeds: Sequence[int],  # one per image, the same list on all ranks
    *,
    batch: int = 64,  # images per generated batch and rank
    class_idx: int | None = None,  # class to generate; None: as `generate_images` draws them
    sampler_kwargs: dict[str, Any] | None = None,  # of the sampler
    device: str | torch.device | None = None,  # of the nearest-neighbour search; None: CPU
    keep_images: bool = False,  # return the images too
    on_batch: Callable[[list[int], torch.Tensor], None] | None = None,  # sees each batch of this rank
) -> Measurement:
    """Generate one image per seed and find its two nearest neighbours in `reference`.

    Each rank generates its share of the seeds and compares the uint8 pixels that a PNG would hold; the
    shares may have different sizes or be empty. Every rank returns the whole measurement.

    Raises
    ------
    ValueError
        See `check_inputs`.
    """
    check_inputs(net, reference, seeds, class_idx)
    done: list[int] = []
    pending: list[torch.Tensor] = []
    kept = [np.empty((0, *reference.shape[1:]), dtype=np.uint8)]
    distance, index = [np.empty((0, 2))], [np.empty((0, 2), dtype=np.int64)]

    def compare() -> None:
        if pending:
            d, i = nearest_neighbors(torch.cat(pending), reference, k=2, device=device)
            distance.append(d)
            index.append(i)
            pending.clear()

    # This rank's share.
    share = split_seeds(sorted(seeds))
    for batch_seeds, images in generate_images(
        net, share, batch=batch, class_idx=class_idx, sampler_kwargs=sampler_kwargs or {}
    ):
        done.extend(batch_seeds)
        pending.append(images)
        if keep_images:
            kept.append(images.numpy())
        if on_batch is not None:
            on_batch(batch_seeds, images)
        if sum(len(part) for part in pending) >= _CHUNK:
            compare()
    compare()

    # All shares, in the order of the seeds.
    all_seeds = np.concatenate(distributed.gather(np.asarray(done, dtype=np.int64)))
    order = np.argsort(all_seeds, kind="stable")
    if not np.array_equal(all_seeds[order], np.sort(np.asarray(seeds, dtype=np.int64))):
        raise RuntimeError("The ranks did not generate exactly the given seeds.")
    return Measurement(
        seeds=all_seeds[order],
        knn_distance=np.concatenate(distributed.gather(np.concatenate(distance)))[order],
        knn_index=np.concatenate(distributed.gather(np.concatenate(index)))[order],
        images=np.concatenate(distributed.gather(np.concatenate(kept)))[order] if keep_images else None,
    )
