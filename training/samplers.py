"""Samplers: from latents and a denoiser to images, by following the probability-flow ODE.

Karras et al., "Elucidating the Design Space of Diffusion-Based Generative Models" (EDM, 2022).
"""

import math
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future

import torch
from torch import Tensor

from training.networks import iddpm_sigmas, vp_sigma, vp_sigma_inv

# What `ablation_sampler` can vary, beside numbers.
ABLATIONS = dict(
    solver=("euler", "heun"),
    discretization=("vp", "ve", "iddpm", "edm"),
    schedule=("vp", "ve", "linear"),
    scaling=("vp", "none"),
)


class StackedRandomGenerator:
    """One random generator per seed, so that what a seed draws does not depend on its neighbours.

    The numbers come from the CPU generator on every device: a seed means the same image everywhere.
    """

    def __init__(self, device: torch.device | str, seeds: Sequence[int]):
        self.device = torch.device(device)
        self.generators = [torch.Generator().manual_seed(int(seed) % (1 << 32)) for seed in seeds]

    def randn(self, size: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
        """Standard normal numbers of shape `size`, whose first entry is the number of seeds."""
        self._check(size)
        rows = [torch.randn(list(size[1:]), generator=g, dtype=dtype) for g in self.generators]
        return to_device(torch.stack(rows), self.device)

    def randn_like(self, like: Tensor) -> Tensor:
        return self.randn(like.shape, dtype=like.dtype)

    def randint(self, high: int, size: Sequence[int]) -> Tensor:
        """Integers 0..high-1, int64, of shape `size`, whose first entry is the number of seeds."""
        self._check(size)
        rows = [torch.randint(high, size=list(size[1:]), generator=g) for g in self.generators]
        return to_device(torch.stack(rows), self.device)

    def _check(self, size: Sequence[int]) -> None:
        if size[0] != len(self.generators):
            raise ValueError(f"Asked for {size[0]} rows of random numbers from {len(self.generators)} seeds.")


class DrawnAhead:
    """The noise of a `StackedRandomGenerator`, the next of it drawn by a thread while the device computes."""

    def __init__(self, random: StackedRandomGenerator, pool: Executor):
        self._random, self._pool = random, pool
        self._next: tuple[tuple, Future] | None = None

    def randn_like(self, like: Tensor) -> Tensor:
        wanted = (like.shape, like.dtype)
        if self._next is None:
            found = self._random.randn(*wanted)
        elif self._next[0] == wanted:
            found = self._next[1].result()
        else:
            raise ValueError("Noise of one shape and type can be drawn ahead, not of several.")
        self._next = (wanted, self._pool.submit(self._random.randn, *wanted))
        return found


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """Copy from the CPU without waiting for what the device is doing."""
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x.to(device)


def edm_sampler(
    net: Callable,
    latents: Tensor,
    class_labels: Tensor | None = None,
    randn_like: Callable[[Tensor], Tensor] = torch.randn_like,
    num_steps: int = 18,
    sigma_min: float = 0.002,
    sigma_max: float = 80,
    rho: float = 7,
    S_churn: float = 0,
    S_min: float = 0,
    S_max: float = float("inf"),
    S_noise: float = 1,
) -> Tensor:
    """EDM Algorithm 2: Heun's method with optional noise injection ("churn").

    Parameters
    ----------
    net : denoiser with `sigma_min`, `sigma_max`, `round_sigma`
    latents : standard normal noise [batch, channels, h, w]
    class_labels : as `net` takes them, or None
    randn_like : source of the injected noise
    num_steps, sigma_min, sigma_max, rho : noise levels, EDM Eq. 5
    S_churn, S_min, S_max, S_noise : amount, range and inflation of the injected noise

    Returns
    -------
    images, float64, in [-1, 1] up to the network's error
    """
    sigma_min, sigma_max = max(sigma_min, net.sigma_min), min(sigma_max, net.sigma_max)
    t = net.round_sigma(to_device(_edm_sigmas(num_steps, sigma_min, sigma_max, rho), latents.device))
    t = torch.cat([t, t.new_zeros(1)])  # t_N = 0
    gammas = _churn(t[:-1], num_steps, S_churn, S_min, S_max)

    x = latents.to(torch.float64) * t[0]
    for i, gamma in enumerate(gammas):
        t_cur, t_next = t[i], t[i + 1]

        # Raise the noise level to t_hat (steps 5-6 of the algorithm).
        t_hat = net.round_sigma(t_cur + gamma * t_cur) if gamma else t_cur
        if S_churn > 0:
            x = x + (t_hat**2 - t_cur**2).clip(min=0).sqrt() * S_noise * randn_like(x)

        # Euler step from t_hat to t_next.
        d_cur = (x - net(x, t_hat, class_labels).to(torch.float64)) / t_hat
        x_next = x + (t_next - t_hat) * d_cur

        # Second-order correction.
        if i < num_steps - 1:
            d_prime = (x_next - net(x_next, t_next, class_labels).to(torch.float64)) / t_next
            x_next = x + (t_next - t_hat) * 0.5 * (d_cur + d_prime)
        x = x_next
    return x


def ablation_sampler(
    net: Callable,
    latents: Tensor,
    class_labels: Tensor | None = None,
    randn_like: Callable[[Tensor], Tensor] = torch.randn_like,
    num_steps: int = 18,
    sigma_min: float | None = None,
    sigma_max: float | None = None,
    rho: float = 7,
    solver: str = "heun",
    discretization: str = "edm",
    schedule: str = "linear",
    scaling: str = "none",
    epsilon_s: float = 1e-3,
    C_1: float = 0.001,
    C_2: float = 0.008,
    M: int = 1000,
    alpha: float = 1,
    S_churn: float = 0,
    S_min: float = 0,
    S_max: float = float("inf"),
    S_noise: float = 1,
) -> Tensor:
    """EDM Algorithms 1 and 3: every combination of solver, time steps, noise schedule and scaling of Table 1.

    Beyond the parameters of `edm_sampler`:

    Parameters
    ----------
    solver : "euler" or "heun" (with `alpha`: the general second-order family of Algorithm 3)
    discretization : noise levels of "vp", "ve", "iddpm" or "edm"; sigma_min, sigma_max default to theirs
    schedule : sigma(t) of "vp", "ve" or "linear"
    scaling : s(t) of "vp" or "none"
    epsilon_s : end of VP time
    C_1, C_2, M : iDDPM's table of noise levels

    Raises
    ------
    ValueError
        If a name is unknown, or more iDDPM steps are asked for than its table has levels in the range.
    """
    chosen = dict(solver=solver, discretization=discretization, schedule=schedule, scaling=scaling)
    for what, value in chosen.items():
        if value not in ABLATIONS[what]:
            raise ValueError(f'{what} must be one of {", ".join(ABLATIONS[what])}, not "{value}".')
    defaults = dict(
        vp=(vp_sigma(epsilon_s, 19.9, 0.1), vp_sigma(1, 19.9, 0.1)), ve=(0.02, 100), iddpm=(0.002, 81), edm=(0.002, 80)
    )[discretization]  # fmt: skip
    sigma_min = max(defaults[0] if sigma_min is None else sigma_min, net.sigma_min)
    sigma_max = min(defaults[1] if sigma_max is None else sigma_max, net.sigma_max)
    vp = _VPSchedule.through(sigma_min, sigma_max, epsilon_s)

    # Noise levels of the steps.
    fraction = _fractions(num_steps)
    if discretization == "vp":
        sigmas = vp.sigma(1 + fraction * (epsilon_s - 1))
    elif discretization == "ve":
        sigmas = sigma_max * (sigma_min / sigma_max) ** fraction
    elif discretization == "iddpm":
        u = iddpm_sigmas(M, C_1, C_2)
        u = u[(u >= sigma_min) & (u <= sigma_max)]
        if len(u) < num_steps:
            raise ValueError(
                f"iDDPM has {len(u)} noise levels between {sigma_min:g} and {sigma_max:g}; "
                f"{num_steps} steps cannot be told apart."
            )
        sigmas = u[(fraction * (len(u) - 1)).round().to(torch.int64)]
    else:
        sigmas = _edm_sigmas(num_steps, sigma_min, sigma_max, rho)

    # Times of the steps; t_N = 0.
    curve = dict(vp=vp, ve=_VESchedule, linear=_LinearSchedule)[schedule]
    sigma, sigma_deriv, sigma_inv = curve.sigma, curve.sigma_deriv, curve.sigma_inv
    if scaling == "vp":

        def s(t: Tensor) -> Tensor:
            return 1 / (1 + sigma(t) ** 2).sqrt()

        def s_deriv_over_s(t: Tensor) -> Tensor:
            return -sigma(t) * sigma_deriv(t) * s(t) ** 2
    else:

        def s(t: Tensor) -> Tensor:
            return torch.ones_like(t)

        def s_deriv_over_s(t: Tensor) -> Tensor:
            return torch.zeros_like(t)

    def derivative(x: Tensor, t: Tensor) -> Tensor:
        """dx/dt, EDM Eq. 81 with the score written by the denoiser."""
        denoised = net(x / s(t), sigma(t), class_labels).to(torch.float64)
        rate = sigma_deriv(t) / sigma(t)
        return (rate + s_deriv_over_s(t)) * x - rate * s(t) * denoised

    t_steps = sigma_inv(net.round_sigma(to_device(sigmas, latents.device)))
    t_steps = torch.cat([t_steps, t_steps.new_zeros(1)])
    gammas = _churn(sigma(t_steps[:-1]), num_steps, S_churn, S_min, S_max)

    x = latents.to(torch.float64) * (sigma(t_steps[0]) * s(t_steps[0]))
    for i, gamma in enumerate(gammas):
        t_cur, t_next = t_steps[i], t_steps[i + 1]

        # Raise the noise level to that of t_hat. Also without churn, as published: t -> sigma -> t rounds, and
        # the noise that makes up for it (1e-8 of sigma) is part of the published numbers.
        t_hat = sigma_inv(net.round_sigma(sigma(t_cur) + gamma * sigma(t_cur)))
        added = (sigma(t_hat) ** 2 - sigma(t_cur) ** 2).clip(min=0).sqrt()
        x = s(t_hat) / s(t_cur) * x + added * s(t_hat) * S_noise * randn_like(x)

        # Euler step, or the first stage of the second-order step.
        h = t_next - t_hat
        d_cur = derivative(x, t_hat)
        if solver == "euler" or i == num_steps - 1:
            x = x + h * d_cur
        else:
            d_prime = derivative(x + alpha * h * d_cur, t_hat + alpha * h)
            x = x + h * ((1 - 1 / (2 * alpha)) * d_cur + 1 / (2 * alpha) * d_prime)
    return x


# ----------------------------------------------------------------------------
# Noise schedules of the ablation: sigma(t), its derivative, its inverse (EDM Table 1).


class _VPSchedule:
    def __init__(self, beta_d: float, beta_min: float):
        self.beta_d, self.beta_min = beta_d, beta_min

    @classmethod
    def through(cls, sigma_min: float, sigma_max: float, epsilon_s: float) -> "_VPSchedule":
        """The schedule with sigma(epsilon_s) = sigma_min and sigma(1) = sigma_max."""
        low, high = math.log(sigma_min**2 + 1), math.log(sigma_max**2 + 1)
        beta_d = 2 * (low / epsilon_s - high) / (epsilon_s - 1)
        return cls(beta_d, high - 0.5 * beta_d)

    def sigma(self, t: Tensor) -> Tensor:
        return vp_sigma(t, self.beta_d, self.beta_min)

    def sigma_deriv(self, t: Tensor) -> Tensor:
        sigma = self.sigma(t)
        return 0.5 * (self.beta_min + self.beta_d * t) * (sigma + 1 / sigma)

    def sigma_inv(self, sigma: Tensor) -> Tensor:
        return vp_sigma_inv(sigma, self.beta_d, self.beta_min)


class _VESchedule:
    sigma = staticmethod(torch.sqrt)
    sigma_deriv = staticmethod(lambda t: 0.5 / t.sqrt())
    sigma_inv = staticmethod(torch.square)


class _LinearSchedule:
    sigma = staticmethod(lambda t: t)
    sigma_deriv = staticmethod(torch.ones_like)
    sigma_inv = staticmethod(lambda sigma: sigma)


def _fractions(num_steps: int) -> Tensor:
    """0, 1/(N-1), ..., 1 in float64; a single step starts at sigma_max."""
    if num_steps < 1:
        raise ValueError(f"At least one sampling step is needed, not {num_steps}.")
    return torch.arange(num_steps, dtype=torch.float64) / max(num_steps - 1, 1)


def _edm_sigmas(num_steps: int, sigma_min: float, sigma_max: float, rho: float) -> Tensor:
    """EDM Eq. 5 without the final zero: float64 [num_steps]."""
    if sigma_min > sigma_max:
        raise ValueError(f"sigma_min {sigma_min:g} exceeds sigma_max {sigma_max:g} (after the network's own bounds).")
    high, low = sigma_max ** (1 / rho), sigma_min ** (1 / rho)
    return (high + _fractions(num_steps) * (low - high)) ** rho


def _churn(sigmas: Tensor, num_steps: int, S_churn: float, S_min: float, S_max: float) -> list[float]:
    """gamma_i of EDM Algorithm 2: relative rise of the noise level before each step."""
    gamma = min(S_churn / num_steps, math.sqrt(2) - 1)
    if not gamma or (S_min <= 0 and S_max == math.inf):  # the device need not be waited for to know them
        return [gamma] * len(sigmas)
    return [gamma if S_min <= sigma <= S_max else 0.0 for sigma in sigmas.tolist()]
