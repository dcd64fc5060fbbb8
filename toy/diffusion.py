"""The noise process of the two-moons study: DDPM with 50 steps and linear betas.

Ho et al., "Denoising Diffusion Probabilistic Models" (2020); the settings are those of tiny-diffusion.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

STEPS = 50
EMBEDDING = 128  # size of each sinusoidal embedding
COORDINATE_SCALE = 25.0

BETA = torch.linspace(1e-4, 0.02, STEPS, dtype=torch.float64)
ALPHA_BAR = (1 - BETA).cumprod(0)
SIGMA = ((1 - ALPHA_BAR) / ALPHA_BAR).sqrt()  # noise level of x_t / sqrt(ALPHA_BAR), for data of unit scale


def frequencies() -> Tensor:
    """Angular frequencies of an embedding: 1 down to 1e-4 in geometric steps, float32 [EMBEDDING / 2]."""
    return torch.logspace(0, -4, EMBEDDING // 2, dtype=torch.float64).to(torch.float32)


def embed(values: Tensor, scale: float = 1.0) -> Tensor:
    """Sines and cosines of `scale` times the values, [...] -> [..., EMBEDDING]."""
    angles = (values * scale)[..., None] * frequencies().to(values.device)
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


def add_noise(x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps (Eq. 4); t int64, of the shape of x0 without its last dimension."""
    signal = ALPHA_BAR.sqrt().to(x0)[t][..., None]
    return signal * x0 + (1 - ALPHA_BAR).sqrt().to(x0)[t][..., None] * noise


def ancestral_sample(predict: Callable[[Tensor, int], Tensor], count: int, generator: torch.Generator) -> Tensor:
    """Sample by Algorithm 2 with the variance of the posterior q(x_{t-1} | x_t, x_0) (Eq. 7).

    Parameters
    ----------
    predict : (x_t [count, 2], t) -> the noise in x_t; on any device, x_t is moved by it
    count : number of points
    generator : of the starting points and the noise, on the CPU

    Returns
    -------
    float32 [count, 2], on the CPU
    """
    x = torch.randn(count, 2, generator=generator)
    for t in range(STEPS - 1, -1, -1):
        eps = predict(x, t).to("cpu")
        beta, abar = float(BETA[t]), float(ALPHA_BAR[t])
        x = (x - beta / (1 - abar) ** 0.5 * eps) / (1 - beta) ** 0.5
        if t > 0:
            variance = beta * (1 - float(ALPHA_BAR[t - 1])) / (1 - abar)
            x += variance**0.5 * torch.randn(count, 2, generator=generator)
    return x


def seeded(*key: int) -> torch.Generator:
    """A CPU generator for one purpose; keys that differ anywhere give unrelated streams."""
    state = int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0])
    return torch.Generator().manual_seed(state % 2**63)
