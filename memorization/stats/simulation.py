"""The true EMM of a curve that is known, for simulated studies."""

from collections.abc import Callable

import numpy as np
from scipy.optimize import brentq
from scipy.special import expit

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
