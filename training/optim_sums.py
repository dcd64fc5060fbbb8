"""The optimum's definition, plainly, and the sums over training images that its faster evaluations are made of."""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


def plain_optimum(
    images: np.ndarray | Tensor,  # uint8 [N, C, H, W]
    x: np.ndarray | Tensor,  # [batch, C, H, W], data in [-1, 1]
    sigma: float | np.ndarray | Tensor,  # noise level, one for all or [batch]
    seen: np.ndarray | Tensor | None = None,  # bool [batch, N], images that a row may see; None: all
) -> tuple[Tensor, Tensor, Tensor]:
    """D*, the weights w and the log-density of Gu et al. 2023, Eq. 2, in float64: what all evaluations equal.

    Returns
    -------
    denoised : [batch, C, H, W].
    weights : [batch, N].
    log_density : [batch], log of (1/N) sum_i Normal(x; y_i, sigma^2 I).
    """
    x, images = torch.as_tensor(x, dtype=torch.float64), torch.as_tensor(images)
    y = images.to(torch.float64).flatten(1) / 127.5 - 1
    variance = torch.as_tensor(sigma, dtype=torch.float64).reshape(-1).expand(len(x)) ** 2
    logits = torch.stack([-(row - y).square().sum(1) for row in x.flatten(1)]) / (2 * variance[:, None])
    if seen is not None:
        logits = logits.masked_fill(~torch.as_tensor(seen), -math.inf)
    weights = logits.softmax(1)
    number = logits.isfinite().sum(1)
    log_density = logits.logsumexp(1) - number.log() - 0.5 * y.shape[1] * (2 * math.pi * variance).log()
    return (weights @ y).reshape(x.shape), weights, log_density


@dataclass
class Sums:
    """Softmax sums over some images, relative to the largest logit; float64. They add up: see `combine`."""

    top: Tensor  # [batch], largest logit
    total: Tensor  # [batch], sum of e = exp(logit - top)
    moment: Tensor  # [batch], sum of e (logit - top)
    mean: Tensor  # [batch, dim], sum of e v
    nearest: Tensor  # int64 [batch], index with the largest logit

    @classmethod
    def empty(cls, batch: int, dim: int, device: torch.device) -> "Sums":
        zeros = torch.zeros(batch, dtype=torch.float64, device=device)
        index = torch.zeros(batch, dtype=torch.int64, device=device)
        return cls(zeros - math.inf, zeros.clone(), zeros.clone(), zeros.new_zeros(batch, dim), index)

    @staticmethod
    def combine(parts: "list[Sums]") -> "Sums":
        """Sums over all images from those over disjoint sets of them; ties go to the earlier part."""
        result = parts[0]
        for part in parts[1:]:
            top = torch.maximum(result.top, part.top)
            a, b = decay(result.top, top), decay(part.top, top)
            moment = a * (result.moment + shift(result.top, top) * result.total)
            moment = moment + b * (part.moment + shift(part.top, top) * part.total)
            result = Sums(
                top, a * result.total + b * part.total, moment, a[:, None] * result.mean + b[:, None] * part.mean,
                torch.where(part.top > result.top, part.nearest, result.nearest),
            )  # fmt: skip
        return result

    def put(self, rows: Tensor, other: "Sums") -> None:
        """Overwrite the given rows."""
        for name in ("top", "total", "moment", "mean", "nearest"):
            getattr(self, name)[rows] = getattr(other, name)


def decay(old: Tensor, new: Tensor) -> Tensor:
    """exp(old - new), 0 where there was nothing before."""
    return torch.where(old == -math.inf, torch.zeros_like(old), (old - new).exp())


def shift(old: Tensor, new: Tensor) -> Tensor:
    """old - new, 0 where there was nothing before."""
    return torch.where(old == -math.inf, torch.zeros_like(old), old - new)
