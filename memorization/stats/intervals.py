"""Intervals of a proportion, of a count, and of the ratio of two proportions."""

import numpy as np


def wilson_interval(successes: float, n: float, confidence: float = 0.95) -> tuple[float, float]:
    """Score interval of a binomial proportion.

    With p = successes / n and z the two-sided normal quantile of `confidence`,

        (p + z^2/2n -+ z sqrt(p (1 - p) / n + z^2 / 4n^2)) / (1 + z^2 / n).

    Unlike p -+ z sqrt(p (1 - p) / n) it stays within 0..1 and has a width at p = 0 and p = 1. Neither number need be
    whole.

    Returns
    -------
    low, high : bounds as fractions 0..1.

    Raises
    ------
    ValueError
        If not 0 <= successes <= n with n >= 1, or not 0 < confidence < 1.

    References
    ----------
    Wilson, "Probable Inference, the Law of Succession, and Statistical Inference", JASA 22, 1927.
    Brown, Cai & DasGupta, "Interval Estimation for a Binomial Proportion", Stat. Sci. 16, 2001, Eq. 4.
    """
    from scipy.special import ndtri

    if n < 1 or not 0 <= successes <= n:
        raise ValueError(f"{successes} of {n} is no proportion; 0 <= successes <= n and n >= 1 are needed.")
    if not 0 < confidence < 1:
        raise ValueError(f"The confidence must lie between 0 and 1, not {confidence}.")
    p, z = successes / n, float(ndtri((1 + confidence) / 2))
    centre = (p + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z * (p * (1 - p) / n + z**2 / (4 * n**2)) ** 0.5 / (1 + z**2 / n)
    low = 0.0 if successes == 0 else centre - half  # exactly, not up to rounding
    high = 1.0 if successes == n else centre + half
    return low, high


def exact_interval(successes: float, n: float, confidence: float = 0.95) -> tuple[float, float]:
    """Exact interval of a binomial proportion (Clopper & Pearson, Biometrika 26, 1934): never holds less often.

    Its bounds are quantiles of beta distributions; `successes` and `n` need not be whole there.

    Raises
    ------
    ValueError
        If not 0 <= successes <= n with n > 0, or not 0 < confidence < 1.
    """
    from scipy.special import betaincinv

    if not n > 0 or not 0 <= successes <= n:
        raise ValueError(f"{successes} of {n} is no proportion; 0 <= successes <= n and n > 0 are needed.")
    if not 0 < confidence < 1:
        raise ValueError(f"The confidence must lie between 0 and 1, not {confidence}.")
    tail = (1 - confidence) / 2
    low = 0.0 if successes == 0 else float(betaincinv(successes, n - successes + 1, tail))
    high = 1.0 if successes == n else float(betaincinv(successes + 1, n - successes, 1 - tail))
    return low, high


def poisson_interval(count: int, confidence: float = 0.95) -> tuple[float, float]:
    """Exact interval of the mean of a Poisson count (Garwood, Biometrika 28, 1936).

    Raises
    ------
    ValueError
        If the count is negative, or not 0 < confidence < 1.
    """
    from scipy.special import gammaincinv

    if count < 0:
        raise ValueError(f"{count} is no count.")
    if not 0 < confidence < 1:
        raise ValueError(f"The confidence must lie between 0 and 1, not {confidence}.")
    tail = (1 - confidence) / 2
    low = 0.0 if count == 0 else float(gammaincinv(count, tail))
    return low, float(gammaincinv(count + 1, 1 - tail))


def ratio_interval(
    successes: int, n: int, other_successes: int, other_n: int, confidence: float = 0.95
) -> tuple[float, float]:
    """Score interval of p / q, for successes of n in one sample and other_successes of other_n in another.

    It holds all values phi at which the most likely q under p = phi q,

        q = (-B - sqrt(B^2 - 4 A C)) / 2 A,   A = (n + n') phi,   B = -(phi (n + k') + n' + k),   C = k + k',

    has a chi-square of both counts of at most z^2. From 0 where the first count is 0, to infinity where the other is.

    Raises
    ------
    ValueError
        If the counts are none, or not 0 < confidence < 1.

    References
    ----------
    Koopman, "Confidence intervals for the ratio of two binomial proportions", Biometrics 40, 1984.
    """
    from scipy.optimize import brentq
    from scipy.special import ndtri

    for k, total in ((successes, n), (other_successes, other_n)):
        if total < 1 or not 0 <= k <= total:
            raise ValueError(f"{k} of {total} is no proportion; 0 <= successes <= n and n >= 1 are needed.")
    if not 0 < confidence < 1:
        raise ValueError(f"The confidence must lie between 0 and 1, not {confidence}.")
    limit = float(ndtri((1 + confidence) / 2)) ** 2

    def excess(log_phi: float) -> float:
        phi = float(np.exp(log_phi))
        a, c = (n + other_n) * phi, successes + other_successes
        b = -(phi * (n + other_successes) + other_n + successes)
        q = (-b - max(b * b - 4 * a * c, 0.0) ** 0.5) / (2 * a)
        square = 0.0
        for k, total, p in ((successes, n, min(phi * q, 1.0)), (other_successes, other_n, min(q, 1.0))):
            variance = total * p * (1 - p)
            square += (k - total * p) ** 2 / variance if variance > 0 else (0.0 if abs(k - total * p) < 1e-9 else 1e12)
        return square - limit

    if successes == other_successes == 0:
        return 0.0, float("inf")
    # The best value; where a count is 0, or both are all, a step beside it.
    centre = float(np.log(max(successes, 0.5) / n) - np.log(max(other_successes, 0.5) / other_n))
    low = 0.0 if successes == 0 else float(np.exp(brentq(excess, centre - 30, centre)))
    high = float("inf") if other_successes == 0 else float(np.exp(brentq(excess, centre, centre + 30)))
    return low, high
