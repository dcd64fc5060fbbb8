"""What the theoretical optimum generates on the points of one repeat: the upper curve of the two-moons study.

The minimizer of the DDPM loss on a finite training set predicts the noise (Gu et al. 2023, Eq. 2, in the notation of
Ho et al. 2020)

    eps*(x_t, t) = (x_t - sqrt(abar_t) D*(x_t / sqrt(abar_t); sigma_t)) / sqrt(1 - abar_t),
    sigma_t = sqrt((1 - abar_t) / abar_t),

and is sampled like a network. Its last step averages over training points within a few sigma_0 = 0.01 of each other, so
where they lie that close the optimum ends between them: even it does not replay training points only.
"""

import numpy as np
import torch
from torch import Tensor

from toy.diffusion import ALPHA_BAR, SIGMA, ancestral_sample, seeded
from training.optim import OptimEDM

_OPTIMUM = 4  # purpose of the generator
_CHUNK = 1024  # points at a time


def optimum_points(train: np.ndarray, count: int, seed: int) -> np.ndarray:
    """Points that the optimum of `train` [N, 2] generates, float32 [count, 2]."""
    optimum = OptimEDM(torch.from_numpy(train)[:, :, None, None], skip=False, quantized=False)

    def predict(x: Tensor, t: int) -> Tensor:
        signal = float(ALPHA_BAR[t]) ** 0.5
        denoised = torch.cat(
            [optimum(part[:, :, None, None] / signal, SIGMA[t])[:, :, 0, 0] for part in x.split(_CHUNK)]
        )
        return (x - signal * denoised) / (1 - signal**2) ** 0.5

    return ancestral_sample(predict, count, seeded(seed, _OPTIMUM)).numpy()
