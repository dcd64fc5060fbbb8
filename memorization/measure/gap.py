"""Over the noise level: the gap between a denoiser and the closed-form optimum of its training set, and its loss."""

import hashlib
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from memorization.measure.samples import read_array
from torch_utils import distributed
from training.dataset import ImageFolderDataset
from training.fingerprint import array_sha256
from training.generation import split_seeds
from training.optim import OptimEDM, load_optimum
from training.samplers import StackedRandomGenerator

NUM_SIGMAS = 16
Z95 = 1.959964  # two-sided 95 % of the normal distribution


@dataclass(frozen=True)
class Gap:
    """What `gap_to_optimum` measured; one entry per noise level, ascending."""

    sigma: np.ndarray  # float64 [sigmas]
    mean: np.ndarray  # float64 [sigmas], per pixel, for data in [-1, 1]
    stderr: np.ndarray  # float64 [sigmas], NaN for a single image
    num_noised: int
    losses: np.ndarray  # float64 [num_noised, sigmas], denoising loss of each noised image, per pixel
    optimum_loss: np.ndarray  # float64 [sigmas], mean of that of D*

    @property
    def loss(self) -> np.ndarray:
        """Mean denoising loss, float64 [sigmas]."""
        return self.losses.mean(axis=0)

    @property
    def loss_stderr(self) -> np.ndarray:
        """Its standard error; NaN for a single image."""
        return _stderr(self.losses)


def noise_levels(net: torch.nn.Module, num: int = NUM_SIGMAS, low: float = 0.002, high: float = 80) -> Tensor:
    """`num` noise levels at equal ratios over the sampler's range, as far as `net` has it: float64, ascending."""
    low, high = max(low, net.sigma_min), min(high, net.sigma_max)
    return torch.logspace(math.log10(low), math.log10(high), num, dtype=torch.float64)


@torch.no_grad()
def gap_to_optimum(
    net: torch.nn.Module,  # preconditioned network or another optimum
    optimum: OptimEDM,  # of the network's training set, on the network's device
    images: np.ndarray | Tensor,  # uint8 [N, C, H, W], what is noised
    *,
    sigmas: Sequence[float] | Tensor | None = None,  # None: `noise_levels` of the network
    num_noised: int = 256,  # noised images per noise level
    batch: int = 64,  # images at a time and rank
    seed: int = 0,  # of the images and their noise
    class_labels: np.ndarray | Tensor | None = None,  # int64 [N], if the network or the optimum has classes
    on_batch: Callable[[int], None] | None = None,  # told the number of images of each batch of this rank
) -> Gap:
    """Mean squared distance of the denoiser D_theta to the closed-form optimum D*, at each noise level.

        gap(sigma) = E |D_theta(y + n; sigma) - D*(y + n; sigma)|^2 / (C H W),    n ~ N(0, sigma^2 I),

    a mean over pixels (all C H W values of an image) with data in [-1, 1], estimated on `num_noised` noised
    images y. D* is the posterior mean of the training set (Gu et al. 2023, Eq. 2) and D_theta minimizes a
    regression on it. Hence, over training images y, the gap is the excess of the denoising loss,

        E |D_theta(y + n; sigma) - y|^2 = E |D*(y + n; sigma) - y|^2 + E |D_theta(y + n; sigma) - D*(y + n; sigma)|^2.

    Images are drawn by `seed`, without replacement while there are enough, else with. The i-th has a noise
    seed of its own and the same standard normal noise at each noise level, times sigma. So all networks of
    one shape see the same noised images, and the result depends neither on the batch nor on the ranks, which share
    the images, beyond the rounding of the network. Noise levels are limited to the network's range and rounded as
    it does for a sampler. Both losses above are measured on the same noised images (`losses`, `optimum_loss`); the
    i-th ones of any two sets of images have the same noise. The standard error is that of independent draws of
    image and noise.

    Raises
    ------
    ValueError
        If there are no images or noise levels, shapes differ, or labels are missing or no class of the network.

    References
    ----------
    Gu et al., "On Memorization in Diffusion Models", 2023.
    """
    images = torch.as_tensor(images)
    _check(net, optimum, images, num_noised, class_labels)
    device = optimum.constant.device
    sigma = noise_levels(net) if sigmas is None else torch.as_tensor(sigmas, dtype=torch.float64).flatten()
    if not len(sigma) or not bool((sigma > 0).all()):
        raise ValueError(f"The gap needs noise levels above 0, not {sigma.tolist()}.")
    sigma = net.round_sigma(sigma.clip(max(net.sigma_min, 0), net.sigma_max).to(device)).unique()  # ascending

    random = np.random.RandomState(seed)
    noise_seeds = random.randint(1 << 32, size=num_noised, dtype=np.int64)
    index = random.choice(len(images), num_noised, replace=num_noised > len(images))

    # This rank's share: squared distances, image by image.
    share = split_seeds(range(num_noised))
    squares = np.empty([len(share), len(sigma), 3])  # D_theta to D*, D_theta to y, D* to y
    for start in range(0, len(share), batch):
        which = share[start : start + batch]
        y = images[torch.from_numpy(index[which])].to(device).to(torch.float64) / 127.5 - 1
        n = StackedRandomGenerator(device, noise_seeds[which]).randn(y.shape, dtype=torch.float64)
        labels = None if class_labels is None else torch.as_tensor(class_labels)[index[which]].to(device)
        for s in reversed(range(len(sigma))):  # downwards, as a sampler goes: the optimum then skips most work
            x = y + n * sigma[s]
            denoised, best = _denoise(net, x, sigma[s], labels), _denoise(optimum, x, sigma[s], labels)
            differences = torch.stack([denoised - best, denoised - y, best - y], dim=1)
            squares[start : start + len(which), s] = differences.square().flatten(2).mean(2).cpu()
        if on_batch is not None:
            on_batch(len(which))

    # All shares, in the order of the images: the sums do not depend on who computed what.
    order = np.argsort(np.concatenate(distributed.gather(np.asarray(share, dtype=np.int64))), kind="stable")
    squares = np.concatenate(distributed.gather(squares))[order]
    gap, losses, best = np.moveaxis(squares, 2, 0)
    return Gap(sigma.cpu().numpy(), gap.mean(axis=0), _stderr(gap), num_noised, losses, best.mean(axis=0))


def _stderr(values: np.ndarray) -> np.ndarray:
    """Standard error of the means of the columns of [n, sigmas]; NaN where n is 1."""
    n = len(values)
    return values.std(axis=0, ddof=1) / math.sqrt(n) if n > 1 else np.full(values.shape[1], np.nan)


def _denoise(net: torch.nn.Module, x: Tensor, sigma: Tensor, labels: Tensor | None) -> Tensor:
    return net(x, sigma, labels if net.label_dim else None).to(torch.float64)


def _check(
    net: torch.nn.Module, optimum: OptimEDM, images: Tensor, num: int, labels: np.ndarray | Tensor | None
) -> None:
    if num < 1 or not len(images):
        raise ValueError(f"The gap needs at least 1 noised image, not {num} of {len(images)}.")
    expected = [net.img_channels, net.img_resolution, net.img_resolution]
    for name, shape in [("optimum's", optimum.images.shape[1:]), ("noised", images.shape[1:])]:
        if list(shape) != expected:
            raise ValueError(f"The network takes images [C, H, W] = {expected}, the {name} images have {list(shape)}.")
    if images.dtype != torch.uint8:
        raise ValueError(f"The images to noise must be uint8, not {str(images.dtype).removeprefix('torch.')}.")
    if getattr(optimum, "shard", False):
        raise ValueError("The ranks share the noised images, so each needs the whole optimum; load it without shard.")
    if net.label_dim or optimum.label_dim:
        if labels is None or len(labels) != len(images):
            raise ValueError("The gap of a class-conditional denoiser needs one label for each image.")
        if net.label_dim and not 0 <= int(min(labels)) <= int(max(labels)) < net.label_dim:
            raise ValueError(
                f"The network has the classes 0-{net.label_dim - 1}, the images {min(labels)}-{max(labels)}; "
                "use the dataset that it was trained on."
            )


# ----------------------------------------------------------------------------
# For the snapshots of a run.


class ImageSet(NamedTuple):
    """Images of a dataset, and where they are from."""

    path: str
    images: np.ndarray  # uint8 [N, C, H, W]
    labels: np.ndarray | None = None  # int64 [N]

    @classmethod
    def read(cls, path: str | os.PathLike, *, cond: bool = False) -> "ImageSet":
        """Read a dataset zip or folder or a .npz as `load_optimum` does, with integer labels if `cond`."""
        path = os.fspath(path)
        if path.lower().endswith(".npy"):
            if cond:
                raise ValueError(f'"{path}" holds no labels; a .npz with images and labels, or a dataset, can.')
            return cls(path, read_array(path))
        if not path.lower().endswith(".npz"):
            data = ImageFolderDataset(path, use_labels=cond)
            labels = data.labels()
            if labels is not None and labels.ndim != 1:
                raise ValueError(f'The optimum needs integer class labels, those of "{path}" are vectors.')
            return cls(path, data.images(), labels)
        optimum = load_optimum(path, cond=cond)
        labels = None
        if cond:
            labels = np.empty(len(optimum.images), dtype=np.int64)
            labels[optimum.order.numpy()] = np.repeat(np.arange(optimum.label_dim), optimum.bounds.diff().numpy())
        return cls(path, optimum.images.numpy(), labels)


class GapMeter:
    """Measures the gap of any number of networks that were trained on one set.

    Parameters
    ----------
    training : the training set; with labels, if the networks are class-conditional
    xflip : the mirror image of each image was trained on, too
    holdout : images outside the training set, to be noised, too, or None; D* is still that of `training`
    num, batch, seed : `num_noised`, `batch` and `seed` of `gap_to_optimum`
    device : where to compute

    Raises
    ------
    ValueError
        If the held-out images have another shape, or are of a class that the training set has not.
    """

    def __init__(
        self,
        training: ImageSet,
        holdout: ImageSet | None = None,
        *,
        num: int,
        xflip: bool = False,
        batch: int = 64,
        seed: int = 0,
        device: torch.device | str = "cpu",
    ):
        if holdout is not None:
            if holdout.images.shape[1:] != training.images.shape[1:]:
                raise ValueError(
                    f'The held-out images of "{holdout.path}" are [C, H, W] = {list(holdout.images.shape[1:])}, '
                    f"the training images {list(training.images.shape[1:])}."
                )
            if training.labels is not None and (new := np.setdiff1d(holdout.labels, training.labels)).size:
                raise ValueError(f'"{holdout.path}" has images of class {new[0]}, the training set has none.')
        self.reference = training.images
        if xflip:
            images = np.concatenate([training.images, training.images[..., ::-1]])
            labels = None if training.labels is None else np.concatenate([training.labels] * 2)
            training = ImageSet(training.path, images, labels)
        self.training, self.holdout = training, holdout
        self._how = dict(num_noised=num, batch=batch, seed=seed)
        self._optimum = OptimEDM(training.images, training.labels).to(device)
        self._settings = {"num": num, "seed": seed}
        if holdout is not None:
            digest = array_sha256(holdout.images)
            path = str(os.path.realpath(holdout.path))
            self._settings |= {"holdout": path, "holdout_size": len(holdout.images), "holdout_sha256": digest}

    def check(self, net: torch.nn.Module) -> None:
        """Raise ValueError, at once, if `measure` cannot measure this network."""
        for data in [self.training, self.holdout]:
            if data is not None:
                _check(net, self._optimum, torch.as_tensor(data.images), self._settings["num"], data.labels)

    @property
    def overlap(self) -> int:
        """Number of held-out images that are also in the training set, pixel by pixel."""
        if self.holdout is None:
            return 0
        training = {hashlib.sha256(image).digest() for image in np.ascontiguousarray(self.training.images)}
        return sum(hashlib.sha256(image).digest() in training for image in np.ascontiguousarray(self.holdout.images))

    def holds(self, record: dict[str, Any]) -> bool:
        """True if `record` (of `memorization.records`) has its gap, measured with these settings."""
        gap = record.get("gap") or {}
        return "loss" in gap and all(key in gap and gap[key] == value for key, value in self._settings.items())

    def measure(self, net: torch.nn.Module, on_batch: Callable[[int], None] | None = None) -> dict[str, Any]:
        """The gap of `net`, as the entry `gap` of its record.

        That is: num, seed, sigma [sigmas], mean and stderr [sigmas] of `Gap`; with held-out images also holdout
        (path), holdout_size, holdout_sha256, holdout_mean and holdout_stderr. What is not finite is None.

        Beside these the denoising loss: loss, loss_stderr and optimum_loss [sigmas], with held-out images also
        holdout_loss, holdout_loss_stderr and holdout_optimum_loss, and loss_gap, loss_gap_low and loss_gap_high: loss
        on held-out less that on training images, with its 95 % interval. The i-th noised images of both have the same
        noise, so that their difference has less spread where the losses depend on the noise.
        """
        result = self._measure(net, self.training, on_batch)
        entry = {**self._settings, "sigma": result.sigma.tolist()}
        entry |= _entries(result)
        if self.holdout is not None:
            heldout = self._measure(net, self.holdout, on_batch)
            entry |= {f"holdout_{key}": value for key, value in _entries(heldout).items()}
            difference = heldout.losses - result.losses
            mean, half = difference.mean(axis=0), Z95 * _stderr(difference)
            entry |= {"loss_gap": _finite(mean)}
            entry |= {"loss_gap_low": _finite(mean - half), "loss_gap_high": _finite(mean + half)}
        return entry

    def _measure(self, net: torch.nn.Module, data: ImageSet, on_batch: Callable[[int], None] | None) -> Gap:
        return gap_to_optimum(net, self._optimum, data.images, class_labels=data.labels, on_batch=on_batch, **self._how)


def _entries(result: Gap) -> dict[str, list[float | None]]:
    names = ("mean", "stderr", "loss", "loss_stderr", "optimum_loss")
    return {name: _finite(getattr(result, name)) for name in names}


def _finite(values: np.ndarray) -> list[float | None]:
    """A list for strict JSON, which knows neither NaN nor infinity."""
    return [float(value) if np.isfinite(value) else None for value in values]
