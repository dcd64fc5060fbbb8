"""Is a probability above or below a bar? A test that may be looked at after every sample, and stops when it knows."""

import math
from typing import Any

import numpy as np
from scipy.special import betainc, betaln

PRIOR_SAMPLES = 30  # how sharply the mixture is concentrated at the bar; see docs/criteria.md for the choice


class SequentialTest:
    """Sequential test of a Bernoulli probability p against a bar, valid whenever and however often one looks.

    For each side there is a test martingale, the likelihood ratio of a mixture over that side to the bar:

        M(n) = integral q^s (1 - q)^(n - s) dF(q) / (bar^s (1 - bar)^(n - s))

    after s successes in n samples, where F is the distribution Beta(g bar, g (1 - bar)), g = `PRIOR_SAMPLES`,
    truncated to q > bar (for "above") or q < bar (for "below"). If p <= bar, each factor of the mixture over
    q > bar has expectation p q / bar + (1 - p) (1 - q) / (1 - bar) <= 1, so that M is a nonnegative
    supermartingale that begins at 1, and by Ville's inequality it ever reaches 1 / alpha with probability at
    most alpha. The test says "above" once M of that side is at least 1 / alpha, and "below" likewise.

    Both sides are tested at the level alpha = 1 - confidence. No correction for two tests is due: for any p
    only one of the verdicts is false ("above" for p < bar, "below" for p > bar), and the other test cannot
    make it. Where p is the bar itself, "above" says p >= bar and "below" p <= bar, and each is reached with
    probability at most alpha.

    Parameters
    ----------
    bar : 0 < bar < 1.
    confidence : 1 - alpha, 0 < confidence < 1.

    Attributes
    ----------
    successes, n : what was seen so far.
    verdict : "above", "below" or None as long as it is open. The first verdict stays.

    Raises
    ------
    ValueError
        If `bar` or `confidence` is not between 0 and 1.

    References
    ----------
    Ville, "Étude critique de la notion de collectif", 1939.
    Robbins, "Statistical Methods Related to the Law of the Iterated Logarithm", Ann. Math. Stat. 41, 1970.
    Howard, Ramdas, McAuliffe & Sekhon, "Time-uniform, nonparametric, nonasymptotic confidence sequences",
    Ann. Stat. 49, 2021.
    Ramdas, Grünwald, Vovk & Shafer, "Game-theoretic statistics and safe anytime-valid inference", Stat. Sci. 38, 2023.
    """

    def __init__(self, bar: float = 0.9, confidence: float = 0.95):
        for name, value in [("bar", bar), ("confidence", confidence)]:
            if not 0 < value < 1:
                raise ValueError(f"The {name} of a sequential test must lie between 0 and 1, not {value}.")
        self.bar, self.confidence = float(bar), float(confidence)
        self.successes, self.n = 0, 0
        self.verdict: str | None = None

    def update(self, successes: int, n: int) -> str | None:
        """Take `n` more samples, `successes` of them successes, and return the verdict so far.

        Raises
        ------
        ValueError
            If not 0 <= successes <= n.
        """
        if not 0 <= successes <= n:
            raise ValueError(f"{successes} successes among {n} new samples cannot be.")
        self.successes, self.n = self.successes + int(successes), self.n + int(n)
        if self.verdict is None:
            above, below = self.log_evidence()
            if max(above, below) >= -math.log1p(-self.confidence):
                self.verdict = "above" if above > below else "below"
        return self.verdict

    def log_evidence(self) -> tuple[float, float]:
        """Logarithms of the two martingales: evidence against p <= bar, and against p >= bar."""
        s, f = self.successes, self.n - self.successes
        return float(_log_martingale(s, f, self.bar)), float(_log_martingale(f, s, 1 - self.bar))

    def interval(self) -> tuple[float, float]:
        """Confidence sequence: bounds that hold p with probability `confidence` at all times together.

        All p are kept at which the likelihood ratio of the Beta(1/2, 1/2) mixture is below 1 / alpha (Robbins
        1970; the mixture of Krichevsky and Trofimov). Unlike the verdict it is two-sided, hence a verdict may
        come a little before the bar leaves the interval. It is wider than the interval of a fixed n.
        """
        s, f = self.successes, self.n - self.successes
        return _lower_bound(s, f, 1 - self.confidence), 1 - _lower_bound(f, s, 1 - self.confidence)

    def summary(self) -> dict[str, Any]:
        """What a record keeps, JSON-ready: setting, counts, verdict, interval, and both evidences (logarithms)."""
        above, below = self.log_evidence()
        low, high = self.interval()
        return {
            "method": "beta mixture martingales, Ville's inequality",
            "bar": self.bar,
            "confidence": self.confidence,
            "verdict": self.verdict,
            "num_samples": self.n,
            "num_successes": self.successes,
            "low": low,
            "high": high,
            "log_evidence_above": above,
            "log_evidence_below": below,
        }


def decision_bounds(
    n: Any, bar: float = 0.9, confidence: float = 0.95, prior_samples: float = PRIOR_SAMPLES
) -> tuple[np.ndarray, np.ndarray]:
    """Where the test decides after `n` samples: "above" from how many successes, "below" up to how many.

    Parameters
    ----------
    n : int, or an array of them.
    bar, confidence : of the test.
    prior_samples : g of the mixture; `SequentialTest` takes the default.

    Returns
    -------
    above : int64 like `n`, the least number of successes that says "above"; n + 1 where none does.
    below : int64 like `n`, the largest number of successes that says "below"; -1 where none does.
    """
    n = np.asarray(n, dtype=np.int64)
    above = _least_successes(n, bar, confidence, prior_samples)
    return above, n - _least_successes(n, 1 - bar, confidence, prior_samples)


def error_share(position: int) -> float:
    """Share of the error that the test at this position of a sequence of tests may make: 1/2, 1/6, 1/12, ...

    The shares 1 / (j (j + 1)) of the positions j = 1, 2, ... add up to 1, however many there are, and however that is
    decided. Where each test is made at its share of alpha, one of them or more is wrong with probability at most alpha.

    Raises
    ------
    ValueError
        If `position` is not at least 1.
    """
    if position < 1:
        raise ValueError(f"Positions count from 1; {position} is none.")
    return 1 / (position * (position + 1))


def rounds(total: int, first: int = 64, growth: float = 1.25, multiple: int = 1) -> list[int]:
    """Sizes of the rounds in which `total` samples are drawn: at least `first`, then all so far times `growth`.

    With a look after every round, a decision that needs n samples comes after at most about growth * n, in a
    number of rounds that grows with log(total).

    Parameters
    ----------
    total : number of samples, the sum of the rounds.
    first : samples of the first round.
    growth : samples after each round relative to those before it, > 1.
    multiple : every round but the last is a multiple of this, for instance batch size times ranks.

    Raises
    ------
    ValueError
        If a number is less than 1, or `growth` is not larger than 1.
    """
    if min(total, first, multiple) < 1 or not 1 < growth < math.inf:
        raise ValueError(f"No rounds of {total} samples from {first} on, times {growth}, in multiples of {multiple}.")
    sizes, drawn, target = [], 0, float(first)
    while drawn < total:
        size = max(math.ceil((target - drawn) / multiple), 1) * multiple
        sizes.append(min(size, total - drawn))
        drawn += sizes[-1]
        target = drawn * growth
    return sizes


# ----------------------------------------------------------------------------
# Numbers, all in logarithms.


def _log_martingale(s: Any, f: Any, bar: float, g: float = PRIOR_SAMPLES) -> Any:
    """log M(s + f) for "above" after `s` successes and `f` failures; arrays or numbers. "Below" exchanges them."""
    a, c = g * bar, g * (1 - bar)
    mixture = _log_upper_beta(a + s, c + f, bar) - _log_upper_beta(a, c, bar)
    return mixture - np.multiply(s, math.log(bar)) - np.multiply(f, math.log1p(-bar))


def _log_upper_beta(a: Any, c: Any, x: float) -> np.ndarray:
    """log of the integral of q^(a-1) (1-q)^(c-1) over x < q < 1."""
    a, c = np.broadcast_arrays(np.asarray(a, dtype=np.float64), np.asarray(c, dtype=np.float64))
    fraction = np.asarray(betainc(c, a, 1 - x))
    tiny = fraction < 1e-200  # there the far tail, which betainc cannot hold
    with np.errstate(divide="ignore"):
        result = np.asarray(betaln(a, c) + np.log(fraction))
    if tiny.any():
        result[tiny] = _log_far_tail(c[tiny], a[tiny], 1 - x)
    return result


def _log_far_tail(a: np.ndarray, b: np.ndarray, x: float) -> np.ndarray:
    """log of the integral of q^(a-1) (1-q)^(b-1) over 0 < q < x, for x well below a / (a + b).

    By the continued fraction x^a (1-x)^b / a / (1 + d1 / (1 + d2 / (1 + ...))) (NIST DLMF 8.17.22), evaluated
    by the recurrence of Lentz. It needs about as many terms as the root of a + b.
    """
    front = a * math.log(x) + b * math.log1p(-x) - np.log(a)
    value = upper = np.ones_like(a)
    lower = np.zeros_like(a)
    for m in range(1, 100_000):
        half = m // 2
        if m % 2:
            d = -(a + half) * (a + b + half) * x / ((a + m - 1) * (a + m))
        else:
            d = half * (b - half) * x / ((a + m - 1) * (a + m))
        lower = 1 / (1 + d * lower)
        upper = 1 + d / upper
        step = upper * lower
        value = value * step
        if np.abs(step - 1).max() < 1e-14:
            break
    return front - np.log(value)


def _least_successes(n: np.ndarray, bar: float, confidence: float, g: float) -> np.ndarray:
    """The least number of successes among `n` that says "above"; n + 1 where not even n does. By bisection."""
    low, high = np.floor(n * bar).astype(np.int64), n + 1  # the martingale grows with s; at s <= n bar it is <= 1
    while (open_ := high - low > 1).any():
        middle = np.where(open_, (low + high) // 2, low)
        decided = _log_martingale(middle, n - middle, bar, g) >= -math.log1p(-confidence)
        high, low = np.where(open_ & decided, middle, high), np.where(open_ & ~decided, middle, low)
    return high


def _lower_bound(s: int, f: int, alpha: float) -> float:
    """The least p at which the Beta(1/2, 1/2) mixture's likelihood ratio to p is below 1 / alpha."""
    if s == 0:
        return 0.0
    from scipy.optimize import brentq

    limit = betaln(s + 0.5, f + 0.5) - betaln(0.5, 0.5) + math.log(alpha)
    return brentq(lambda p: s * math.log(p) + f * math.log1p(-p) - limit, 1e-300, s / (s + f) if f else 1 - 2**-53)
