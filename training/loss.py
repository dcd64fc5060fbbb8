"""Training losses: weighted squared error of the denoiser at random noise levels (EDM, Eq. 2 and Table 1).

All three draw, in the published order, first the noise level, then the augmentation, then the noise.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from training.networks import vp_sigma


class _DenoisingLoss:
    """lambda(sigma) |D(y + n; sigma) - y|^2 with n ~ N(0, sigma^2 I), per pixel and not reduced."""

    def sample_sigma(self, shape: list[int], device: torch.device) -> Tensor:
        raise NotImplementedError

    def weight(self, sigma: Tensor) -> Tensor:
        return 1 / sigma**2

    def __call__(
        self,
        net: Callable,
        images: Tensor,
        labels: Tensor | None = None,
        augment_pipe: Callable | None = None,
    ) -> Tensor:
        """Loss [batch, channels, h, w] of `net` on `images` in [-1, 1] with class labels as the net takes them."""
        sigma = self.sample_sigma([images.shape[0], 1, 1, 1], images.device)
        y, augment_labels = augment_pipe(images) if augment_pipe is not None else (images, None)
        n = torch.randn_like(y) * sigma
        denoised = net(y + n, sigma, labels, augment_labels=augment_labels)
        return self.weight(sigma) * (denoised - y) ** 2


class VPLoss(_DenoisingLoss):
    """Variance preserving: t uniform in [epsilon_t, 1], or in {1, ..., steps} / steps; sigma = sigma(t).

    With D = x - sigma F and weight 1 / sigma^2 it is |F - noise|^2, the simple loss of DDPM (Ho et al. 2020, Eq. 14),
    whose schedule is 1000 steps of this sigma(t) up to its discretization.
    """

    def __init__(self, beta_d: float = 19.9, beta_min: float = 0.1, epsilon_t: float = 1e-5, steps: int | None = None):
        self.beta_d, self.beta_min, self.epsilon_t, self.steps = beta_d, beta_min, epsilon_t, steps

    def sample_sigma(self, shape: list[int], device: torch.device) -> Tensor:
        if self.steps is not None:
            t = torch.randint(1, self.steps + 1, shape, device=device) / self.steps
        else:
            t = 1 + torch.rand(shape, device=device) * (self.epsilon_t - 1)
        return vp_sigma(t, self.beta_d, self.beta_min)


class VELoss(_DenoisingLoss):
    """Variance exploding: ln sigma uniform in [ln sigma_min, ln sigma_max]."""

    def __init__(self, sigma_min: float = 0.02, sigma_max: float = 100):
        self.sigma_min, self.sigma_max = sigma_min, sigma_max

    def sample_sigma(self, shape: list[int], device: torch.device) -> Tensor:
        return self.sigma_min * (self.sigma_max / self.sigma_min) ** torch.rand(shape, device=device)


class EDMLoss(_DenoisingLoss):
    """EDM: ln sigma ~ N(P_mean, P_std^2), weight (sigma^2 + sigma_data^2) / (sigma sigma_data)^2."""

    def __init__(self, P_mean: float = -1.2, P_std: float = 1.2, sigma_data: float = 0.5):
        self.P_mean, self.P_std, self.sigma_data = P_mean, P_std, sigma_data

    def sample_sigma(self, shape: list[int], device: torch.device) -> Tensor:
        return (torch.randn(shape, device=device) * self.P_std + self.P_mean).exp()

    def weight(self, sigma: Tensor) -> Tensor:
        return (sigma**2 + self.sigma_data**2) / (sigma * self.sigma_data) ** 2


LOSSES = dict(vp=VPLoss, ve=VELoss, edm=EDMLoss)
