"""By how much two lines of a figure differ, in R_mem at one size and in EMM, with intervals that know of seeds.

R_mem. Run j of cell c (a line and a size) has the ratio y_cj = k_cj / n_cj with the mean mu_c; with q = mu (1 - mu)

    Var y_cj = q_c^2 v_cj,    v_cj = 1 / (n_cj q_c) + (1 - 1 / n_cj) tau^2,

as in `memorization.stats.crossing`. Three seeds of one cell say next to nothing of the spread tau between seeds, all
cells of a figure together say much; so tau is taken as the same in all of them, with the restricted likelihood of the
deviations from the cells' means and that module's prior. Draws of tau, and with each of logit mu_c ~ N(its estimate,
mean v_c / K_c), give the difference of two cells and its central interval.

EMM. The crossings of two lines are independent, each with the distribution of its own fit; so the ratio of EMM has the
distribution of the difference of their logs. What lies beyond the sizes of a line is known to lie there at best: the
lower end takes the least, the upper end the most that it can be, 0 and infinity where nothing is known.

How often these intervals hold the truth: `benchmarks/bench_effects.py`, with the figures in docs/statistics.md.
"""

from collections.abc import Sequence

import numpy as np
from scipy.special import expit, logit

from memorization.stats.bootstrap import Group
from memorization.stats.crossing import TAU_SCALE, TAUS, Crossing

DRAWS = 10_000
_QUANTILES = (np.arange(300) + 0.5) / 300


class Cells:
    """Runs of several lines and sizes that share the spread between seeds.

    Parameters
    ----------
    groups : per cell the numbers of memorized and of all images of its runs.
    seed_sd : the spread, if it is given, standard deviation of the logit; None: from the runs.
    """

    def __init__(self, groups: Sequence[Group], seed_sd: float | None = None) -> None:
        self.groups, self.seeds_known = groups, seed_sd is not None or any(len(k) > 1 for k, _ in groups)
        self.taus = TAUS if seed_sd is None else np.array([float(seed_sd)])
        if not self.seeds_known:
            self.taus = np.zeros(1)
        self.log_weight = np.zeros(1)
        if len(self.taus) > 1:
            self.log_weight = np.log(np.gradient(self.taus) / (1 + self.taus / TAU_SCALE))
            for k, n in groups:
                v = self._variances(k, n)  # [K, T]
                q = (y := _smoothed(k, n)) * (1 - y)
                w = 1 / v
                mean = (w * (k / n)[:, None]).sum(0) / w.sum(0)
                square = (w * ((k / n)[:, None] - mean) ** 2).sum(0) / q**2
                self.log_weight = self.log_weight - 0.5 * (np.log(v).sum(0) + np.log(w.sum(0)) + square)
        weight = np.exp(self.log_weight - self.log_weight.max())
        self.weight = weight / weight.sum()  # of taus, posterior

    @property
    def seed_sd(self) -> float | None:
        """Posterior mean of tau; None where nothing is known of it."""
        return float(self.weight @ self.taus) if self.seeds_known else None

    def difference(self, a: int, b: int, confidence: float = 0.95, seed: int = 0) -> tuple[float, float]:
        """Central interval of the mean ratio of cell `a` less that of cell `b`, over seeds; or over images alone."""
        rng = np.random.default_rng(seed)
        tau = rng.choice(len(self.taus), size=DRAWS, p=self.weight)
        first, second = (self._draw(self.groups[c], tau, rng) for c in (a, b))
        low, high = np.quantile(first - second, [(1 - confidence) / 2, (1 + confidence) / 2])
        return float(low), float(high)

    def _variances(self, k: np.ndarray, n: np.ndarray) -> np.ndarray:
        """Of the logits of single runs, float [K, T]."""
        mean = _smoothed(k, n)
        return (1 / (n * mean * (1 - mean)))[:, None] + (1 - 1 / n)[:, None] * self.taus**2

    def _draw(self, group: Group, tau: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        k, n = group
        sd = np.sqrt(self._variances(k, n).sum(axis=0)) / len(k)  # of the logit of the mean ratio
        return expit(logit(_smoothed(k, n)) + sd[tau] * rng.normal(size=len(tau)))


def _smoothed(k: np.ndarray, n: np.ndarray) -> float:
    """Mean ratio of the runs, with half an image of either kind more, so that its logit is finite."""
    return float(((k / n).mean() * n.sum() + 0.5) / (n.sum() + 1))


def emm_ratio(
    first: Crossing, second: Crossing, confidence: float = 0.95, *, first_low: Crossing, second_low: Crossing
) -> tuple[float, float]:
    """Interval of EMM of the first line over that of the second; 0 and infinity where the sizes do not tell.

    `first_low` and `second_low` are the fits that lower ends of EMM are of, without the excess of the highest of
    several snapshots.
    """
    low = _log_emm(first_low)[0][:, None] - _log_emm(second)[1]
    high = _log_emm(first)[1][:, None] - _log_emm(second_low)[0]
    tail = (1 - confidence) / 2
    ends = (np.quantile(low, tail, method="inverted_cdf"), np.quantile(high, 1 - tail, method="inverted_cdf"))
    return float(np.exp(ends[0])), float(np.exp(ends[1]))


def _log_emm(fit: Crossing) -> tuple[np.ndarray, np.ndarray]:
    """Evenly likely values of log EMM, float [Q]: the least and the most that each can be."""
    low, high = np.nanmin(fit.log_sizes), np.nanmax(fit.log_sizes)
    x = np.linspace(low, high, 400)
    below = np.maximum.accumulate(fit.below(x))
    inside = np.interp(_QUANTILES, below, x)
    least = np.where(_QUANTILES < below[0], -np.inf, inside)
    most = np.where(_QUANTILES > below[-1], np.inf, inside)
    return least, most
