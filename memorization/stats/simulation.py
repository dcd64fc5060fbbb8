"""For simulated studies: the true EMM of a curve that is known, and runs that are sampled from the same latents."""

from collections.abc import Callable

import numpy as np
from scipy.optimize import brentq
from scipy.special import expit, ndtri

_NODES, _WEIGHTS = np.polynomial.hermite_e.hermegauss(60)


def mean_crossing(
    shape: Callable[[float], float],  # logit of the ratio over log |D|, falling
    tau: float,  # standard deviation of the logit between seeds
    level: float = 0.9,
    low: float = 1.0,  # |D| between which it lies
    high: float = 1e6,
) -> float:
    """log |D| at which the mean of the ratio over all seeds is at the level, by Gauss-Hermite quadrature.

    The mean of the ratios is not the ratio of the mean logit: where seeds differ, it crosses 90 % earlier.
    """
    weights = _WEIGHTS / _WEIGHTS.sum()
    return brentq(lambda x: float(weights @ expit(shape(x) + tau * _NODES)) - level, np.log(low), np.log(high))


def draw_alike(ratios: np.ndarray, images: int, within: float, between: float, rng: np.random.Generator) -> np.ndarray:
    """Whether each image is memorized, by runs of the same latents, bool [L, N, images].

    An image is memorized where a normal number lies below the quantile of the run's ratio. These numbers correlate
    between runs, latent by latent; the indicators do so less, and the less the further the ratios differ.

    Parameters
    ----------
    ratios : true ratio of each run of each line, float [L, N].
    images : that each run generates, of the same latents.
    within, between : correlation of the normal numbers of runs of one line, and of two lines (at most the former).
    """
    lines, runs = ratios.shape
    common = between**0.5 * rng.normal(size=[1, 1, images])
    of_line = (within - between) ** 0.5 * rng.normal(size=[lines, 1, images])
    own = (1 - within) ** 0.5 * rng.normal(size=[lines, runs, images])
    return common + of_line + own < ndtri(ratios)[..., None]
