"""The closed-form optimum of denoising score matching on a finite training set.

Gu et al., "On Memorization in Diffusion Models" (2023), Eq. 2: with training images y_1..y_N the minimizer
of the training loss is

    D*(x; sigma) = sum_i w_i y_i,    w = softmax_i( -|x - y_i|^2 / (2 sigma^2) ),

the posterior mean of the training set under Gaussian noise. Sampling from it only replays training images.
"""

import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dnnlib.util import fetch
from training.dataset import ImageFolderDataset


class OptimEDM(torch.nn.Module):
    """D*(x; sigma) of a training set, with the attributes and the call of the preconditioned networks.

    The images stay uint8 on the device and are visited in chunks; per chunk the running maximum of the
    logits, the sum of weights and the weighted sum of images are updated (the streaming form of softmax),
    so nothing of width N but the images themselves is held. Distances are |x|^2 - 2 x.y + |y|^2 in float64:
    their rounding error, below 1e-12 |x|^2, divided by 2 sigma^2 stays below 1e-6 down to sigma = 0.002.

    Parameters
    ----------
    images : uint8 [N, C, H, W]
    labels : int64 [N], to restrict the sum to the images of a class; None = unconditional
    sigma_min, sigma_max : range of noise levels that a sampler may use
    chunk : images visited at a time

    Raises
    ------
    ValueError
        If the images are none, not uint8, not square, or labels are of another length or negative.
    """

    def __init__(
        self,
        images: np.ndarray | Tensor,
        labels: np.ndarray | Tensor | None = None,
        sigma_min: float = 0,
        sigma_max: float = float("inf"),
        chunk: int = 2048,
    ):
        super().__init__()
        images = torch.as_tensor(images)
        if images.ndim != 4 or images.dtype != torch.uint8 or len(images) == 0 or images.shape[2] != images.shape[3]:
            raise ValueError(
                "The optimum needs square images, uint8 [N, C, H, W] with N > 0, not "
                f"{str(images.dtype).removeprefix('torch.')} {list(images.shape)}."
            )
        self.img_channels, self.img_resolution = images.shape[1], images.shape[2]
        self.sigma_min, self.sigma_max, self.chunk = sigma_min, sigma_max, chunk
        self.label_dim = 0
        self.register_buffer("images", images.flatten(1))  # [N, C H W]
        self.register_buffer("labels", None)
        if labels is not None:
            labels = torch.as_tensor(labels)
            if labels.shape != (len(images),) or labels.is_floating_point() or labels.min() < 0:
                raise ValueError(f"Labels must be one non-negative integer for each of the {len(images)} images.")
            self.labels = labels.to(torch.int64)
            self.label_dim = int(labels.max()) + 1

    def forward(self, x: Tensor, sigma: Tensor, class_labels: Tensor | None = None, **_: Any) -> Tensor:
        """Denoise x [batch, C, H, W] at sigma ([batch] or one), for the classes given; float32 of x's shape."""
        return self.posterior_mean(x, sigma, class_labels)[0].to(torch.float32)

    def posterior_mean(self, x: Tensor, sigma: Tensor, class_labels: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return D*(x; sigma) and log sum_i exp(-|x - y_i|^2 / (2 sigma^2)), both float64.

        Parameters
        ----------
        x : [batch, C, H, W], data in [-1, 1]
        sigma : [batch] or one for all
        class_labels : int64 indices [batch] or one-hot rows [batch, label_dim]; needed with labels

        Raises
        ------
        ValueError
            If a class has no training image.
        """
        rows = x.to(torch.float64).flatten(1)  # [batch, dim]
        scale = -0.5 / sigma.to(torch.float64).reshape(-1, 1).expand(len(rows), 1) ** 2
        wanted = self._wanted(class_labels, len(rows))

        top = torch.full([len(rows), 1], -math.inf, dtype=torch.float64, device=rows.device)  # max of the logits
        total = torch.zeros_like(top)  # sum of exp(logit - top)
        mean = torch.zeros_like(rows)  # sum of exp(logit - top) y
        norms = rows.square().sum(1, keepdim=True)
        for start in range(0, len(self.images), self.chunk):
            y = self.images[start : start + self.chunk].to(torch.float64) / 127.5 - 1  # [chunk, dim]
            squared = (norms - 2 * rows @ y.t() + y.square().sum(1)).clip(min=0)
            logits = squared * scale  # [batch, chunk]
            if wanted is not None:
                logits[self.labels[start : start + self.chunk] != wanted] = -math.inf
            new_top = torch.maximum(top, logits.amax(1, keepdim=True))
            safe = new_top.nan_to_num(neginf=0.0)  # no image of the class so far: every weight is exp(-inf) = 0
            weights, decay = (logits - safe).exp(), (top - safe).exp()
            total = total * decay + weights.sum(1, keepdim=True)
            mean = mean * decay + weights @ y
            top = new_top
        return (mean / total).reshape(x.shape), (top + total.log()).flatten()

    def round_sigma(self, sigma: float | Tensor) -> Tensor:
        return torch.as_tensor(sigma)

    def _wanted(self, class_labels: Tensor | None, batch: int) -> Tensor | None:
        """Class of each row, [batch, 1]; None if there are no labels."""
        if self.labels is None:
            return None
        if class_labels is None:
            raise ValueError("This optimum is class-conditional: class_labels are needed.")
        if class_labels.ndim == 2:
            class_labels = class_labels.argmax(1)
        missing = [int(c) for c in class_labels.unique() if not (self.labels == c).any()]
        if missing:
            raise ValueError(f"The training set has no image of class {missing[0]}.")
        return class_labels.reshape(-1, 1).expand(batch, 1)


def load_optimum(path_or_url: str, device: torch.device | str = "cpu", cond: bool = False) -> OptimEDM:
    """The optimum of a dataset zip or folder, or of a .npz with `images` uint8 [N, C, H, W] and `labels` [N].

    Raises
    ------
    OSError, ValueError
        If the file cannot be read as such, or `cond` is asked for and there are no integer labels.
    """
    path = Path(fetch(path_or_url))
    if path.suffix.lower() == ".npz":
        images, labels = _read_npz(path)
    else:
        dataset = ImageFolderDataset(path, use_labels=cond)
        images, labels = dataset.images(), dataset.labels()
    if cond and (labels is None or labels.ndim != 1):
        raise ValueError(f'"{path}" holds no integer class labels; leave out --cond=1 or label the dataset.')
    return OptimEDM(images, labels if cond else None).to(device)


def _read_npz(path: str | os.PathLike) -> tuple[np.ndarray, np.ndarray | None]:
    try:
        with np.load(path, allow_pickle=False) as data:
            images = data["images"]
            labels = data.get("labels", None)
    except KeyError:
        raise ValueError(f'"{path}" holds no array named "images".') from None
    except Exception as err:  # zipfile, zlib and numpy each have their own
        raise ValueError(f'"{path}" cannot be read as .npz: {err}') from err
    return images, labels
