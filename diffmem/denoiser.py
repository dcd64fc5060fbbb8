"""A denoiser made of any function, with what the samplers and measurements need to know of it."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from training.samplers import edm_sampler  # noqa: F401  (named in the docstring)


class Denoiser(torch.nn.Module):
    """D(x; sigma), the expected clean image given x = y + sigma n, of any function `denoise(x, sigma, class_labels)`.

    Data are in [-1, 1]. The function is called with x float32 [b, C, H, W], sigma float32 [b] and class_labels int64
    [b] or None, and returns D [b, C, H, W]; EDM's convention (Karras et al. 2022, Section 2).

    Parameters
    ----------
    denoise : function or module
    shape : (C, H, W) of the images, H = W
    sigma_min, sigma_max : range of noise levels for which it was trained; samplers stay within
    label_dim : number of classes; 0 = unconditional
    sigmas : float [M], the noise levels that it knows, if these are discrete; others are rounded to the nearest
    device : where it computes; None = where the first parameter of a module lies, else the CPU

    Raises
    ------
    ValueError
        If the shape is not (C, H, H), or the range of noise levels is empty.
    """

    def __init__(
        self,
        denoise: Callable[[Tensor, Tensor, Tensor | None], Tensor],
        shape: Sequence[int],
        *,
        sigma_min: float = 0.0,
        sigma_max: float = float("inf"),
        label_dim: int = 0,
        sigmas: Any = None,
        device: torch.device | str | None = None,
    ):
        super().__init__()
        shape = tuple(int(size) for size in shape)
        if len(shape) != 3 or shape[1] != shape[2] or min(shape) < 1:
            raise ValueError(f"A denoiser needs the shape (C, H, W) of its images with H = W, not {shape}.")
        if not sigma_min < sigma_max:
            raise ValueError(f"The noise levels from {sigma_min} to {sigma_max} are none.")
        self.denoise = denoise  # a module's parameters become this one's
        self.img_channels, self.img_resolution = shape[0], shape[1]
        self.sigma_min, self.sigma_max, self.label_dim = sigma_min, sigma_max, label_dim
        if device is None:
            first = next(iter(denoise.parameters()), None) if isinstance(denoise, torch.nn.Module) else None
            device = first.device if first is not None else "cpu"
        known = torch.empty(0) if sigmas is None else torch.as_tensor(sigmas, dtype=torch.float64).flatten()
        self.register_buffer("sigmas", known.to(device), persistent=False)
        if len(known):
            self.sigma_min, self.sigma_max = max(sigma_min, float(known.min())), min(sigma_max, float(known.max()))

    def forward(self, x: Tensor, sigma: Tensor, class_labels: Tensor | None = None, **unused: Any) -> Tensor:
        """D(x; sigma), float32 [b, C, H, W]; sigma a number or [b]."""
        x = x.to(torch.float32)
        sigma = torch.as_tensor(sigma, dtype=torch.float32, device=x.device).reshape(-1).expand(len(x))
        return self.denoise(x, sigma, class_labels).to(torch.float32)

    def round_sigma(self, sigma: Any) -> Tensor:
        """The nearest noise level that the denoiser knows."""
        sigma = torch.as_tensor(sigma)
        if not len(self.sigmas):
            return sigma
        known = self.sigmas.to(sigma.device)
        distance = (sigma.to(torch.float64).reshape(-1, 1) - known).abs()
        return known[distance.argmin(1)].reshape(sigma.shape).to(sigma.dtype)
