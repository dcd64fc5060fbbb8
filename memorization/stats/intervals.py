"""Intervals of a proportion."""


def wilson_interval(successes: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Score interval of a binomial proportion.

    With p = successes / n and z the two-sided normal quantile of `confidence`,

        (p + z^2/2n -+ z sqrt(p (1 - p) / n + z^2 / 4n^2)) / (1 + z^2 / n).

    Unlike p -+ z sqrt(p (1 - p) / n) it stays within 0..1 and has a width at p = 0 and p = 1.

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
