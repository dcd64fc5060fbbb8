"""The difference of two proportions: its interval, and a test that it is zero; of the same or of different units."""

from dataclasses import dataclass

from memorization.stats.intervals import wilson_interval


@dataclass(frozen=True)
class Difference:
    """p_a - p_b."""

    value: float
    low: float  # ends of the interval
    high: float
    p_value: float  # two-sided
    confidence: float
    paired: bool
    test: str
    interval: str
    only_a: int | None = None  # units that count in one of the two only, where they are the same units
    only_b: int | None = None


def paired_difference(both: int, only_a: int, only_b: int, neither: int, confidence: float = 0.95) -> Difference:
    """Of the same units, each of which counts in both, in one, or in neither: McNemar's exact test.

    The interval is Newcombe's method 10: Wilson's of each proportion, joined with their correlation.

    Raises
    ------
    ValueError
        If there are no units, or a number is negative.

    References
    ----------
    McNemar, "Note on the sampling error of the difference between correlated proportions", Psychometrika 12, 1947.
    Newcombe, "Improved confidence intervals for the difference between binomial proportions based on paired data",
    Stat. Med. 17, 1998, method 10.
    """
    from scipy.stats import binomtest

    n = both + only_a + only_b + neither
    if n < 1 or min(both, only_a, only_b, neither) < 0:
        raise ValueError(
            f"{both}, {only_a}, {only_b} and {neither} are no counts of units, of which there is one or more."
        )
    a, b = both + only_a, both + only_b
    product = a * b * (n - a) * (n - b)
    excess = both * neither - only_a * only_b
    if excess > 0:
        excess = max(excess - n / 2, 0)  # his correction for continuity
    phi = excess / product**0.5 if product else 0.0
    low, high = _newcombe(a, n, b, n, confidence, phi)
    p_value = 1.0 if only_a + only_b == 0 else float(binomtest(only_a, only_a + only_b).pvalue)
    return Difference(
        (a - b) / n, low, high, p_value, confidence, True, "McNemar, exact", "Newcombe 10", only_a, only_b
    )


def independent_difference(a: int, n_a: int, b: int, n_b: int, confidence: float = 0.95) -> Difference:
    """Of different units, a of n_a and b of n_b: Fisher's exact test, Newcombe's interval without correction.

    Raises
    ------
    ValueError
        If one is no proportion.

    References
    ----------
    Newcombe, "Interval estimation for the difference between independent proportions", Stat. Med. 17, 1998, method 10.
    """
    from scipy.stats import fisher_exact

    low, high = _newcombe(a, n_a, b, n_b, confidence)
    p_value = float(fisher_exact([[a, n_a - a], [b, n_b - b]]).pvalue)
    return Difference(a / n_a - b / n_b, low, high, p_value, confidence, False, "Fisher, exact", "Newcombe 10")


def _newcombe(a: int, n_a: int, b: int, n_b: int, confidence: float, phi: float = 0.0) -> tuple[float, float]:
    p, (p_low, p_high) = a / n_a if n_a else 0.0, wilson_interval(a, n_a, confidence)
    q, (q_low, q_high) = b / n_b if n_b else 0.0, wilson_interval(b, n_b, confidence)

    def half(x: float, y: float) -> float:
        return max(x**2 - 2 * phi * x * y + y**2, 0.0) ** 0.5

    return p - q - half(p - p_low, q_high - q), p - q + half(p_high - p, q - q_low)
