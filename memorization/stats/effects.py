"""By how much two lines of a figure differ, in R_mem at one size and in EMM, with intervals that know of seeds.

R_mem. Run j of cell c (a line and a size) has the ratio y_cj = k_cj / n_cj with the mean mu_c; with q = mu (1 - mu)

    Var y_cj = q_c^2 v_cj,    v_cj = 1 / (n_cj q_c) + (1 - 1 / n_cj) tau_l^2,

as in `memorization.stats.crossing`, where the spread tau_l between seeds is that of the line. The few seeds of one line
say little of it, and lines do differ; so log tau_l ~ N(m, s^2) over the lines of the figure, with that module's prior
for exp m, and s one of `_SPREADS`. With the restricted likelihood of the deviations from the cells' means all of that
is a sum over grids. Draws of (m, s), with these of tau of both lines, and with these of logit mu_c ~ N(its estimate,
mean v_c / K_c), give the difference of two cells and its central interval.

Runs of the same latents share noise of their images (`memorization.stats.alike`): of 1 / (n q) the part 1 - rho_l is of
a run alone, and the means of two cells have in common, with S_cg = sum over the runs of c with the latents g of
1 / (n q)^(1/2) / K_c, the variance rho_l sum_g S_cg^2 and the covariance rho_lm sum_g S_ag S_bg, where rho_lm is the
correlation between runs of the two lines.

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
_SPREADS = (0.7, 1.5)  # of log tau over lines, equally likely
_QUANTILES = (np.arange(300) + 0.5) / 300


class Cells:
    """Runs of several lines and sizes.

    Parameters
    ----------
    groups : per cell the numbers of memorized and of all images of its runs.
    lines : of each cell the number of its line; cells of one line have the same spread between seeds.
    seed_sd : the spread, if it is given, standard deviation of the logit; None: from the runs.
    latents : per cell, which latents its runs have, as numbers; None: each run its own.
    alike : correlation of runs of the same latents, of each line and between each two, float [L, L]; with `latents`.
    """

    def __init__(
        self,
        groups: Sequence[Group],
        lines: Sequence[int],
        seed_sd: float | None = None,
        latents: Sequence[np.ndarray] | None = None,
        alike: np.ndarray | None = None,
    ) -> None:
        self.groups, self.lines, self.latents = groups, np.asarray(lines), latents
        self.alike = np.zeros([self.lines.max() + 1] * 2) if alike is None or latents is None else np.asarray(alike)
        self.seeds_known = seed_sd is not None or any(len(k) > 1 for k, _ in groups)
        self.taus = TAUS if seed_sd is None else np.array([float(seed_sd)])
        if not self.seeds_known:
            self.taus = np.zeros(1)
        grid = np.arange(len(self.taus))  # of log tau, even but for its 0, the least
        if len(grid) == 1:
            self.kernels = np.ones([1, 1, 1])
        else:
            step = np.log(TAUS[2] / TAUS[1])
            self.kernels = np.exp(-0.5 * ((grid[:, None] - grid) * step / np.array(_SPREADS)[:, None, None]) ** 2)
            self.kernels /= self.kernels.sum(axis=2, keepdims=True)  # [S, M, T]: P(tau | m, s)
        log_l = np.zeros([self.lines.max() + 1, len(grid)])
        for cell, line in enumerate(self.lines):
            log_l[line] += self._log_likelihood(cell)
        self.likelihood = np.exp(log_l - log_l.max(axis=1, keepdims=True))  # [L, T]
        log_joint = np.log(self.kernels @ self.likelihood.T).sum(axis=2)  # [S, M]
        if len(grid) > 1:
            log_joint += np.log(np.gradient(self.taus) / (1 + self.taus / TAU_SCALE))
        joint = np.exp(log_joint - log_joint.max())
        self.joint = joint / joint.sum()  # of (s, m), posterior

    def seed_sd(self, line: int) -> float | None:
        """Posterior mean of tau of a line; None where nothing is known of it."""
        tau = self.kernels * self.likelihood[line]
        tau = (tau / tau.sum(axis=2, keepdims=True)) @ self.taus  # [S, M]
        return float((self.joint * tau).sum()) if self.seeds_known else None

    def difference(self, a: int, b: int, confidence: float = 0.95, seed: int = 0) -> tuple[float, float]:
        """Central interval of the mean ratio of cell `a` less that of cell `b`, over seeds; or over images alone."""
        rng = np.random.default_rng(seed)
        s, m = np.unravel_index(rng.choice(self.joint.size, size=DRAWS, p=self.joint.ravel()), self.joint.shape)
        tau = {line: self._draw_tau(line, s, m, rng) for line in dict.fromkeys([self.lines[a], self.lines[b]])}
        common = self._draw_common(a, b, rng)
        first, second = (self._draw(c, tau[self.lines[c]], moved, rng) for c, moved in zip((a, b), common))
        low, high = np.quantile(first - second, [(1 - confidence) / 2, (1 + confidence) / 2])
        return float(low), float(high)

    def _log_likelihood(self, cell: int) -> np.ndarray:
        """Restricted, of the deviations of the runs of a cell from their mean, float [T]."""
        k, n = self.groups[cell]
        mean = _smoothed(k, n)
        y, w = (k / n)[:, None], 1 / self._variances(cell)  # [K, 1], [K, T]
        square = (w * (y - (w * y).sum(0) / w.sum(0)) ** 2).sum(0) / (mean * (1 - mean)) ** 2
        return 0.5 * (np.log(w).sum(0) - np.log(w.sum(0)) - square)

    def _draw_tau(self, line: int, s: np.ndarray, m: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Indices of `taus`, one for each (s, m)."""
        below = np.cumsum(self.kernels * self.likelihood[line], axis=2)
        below /= below[..., -1:]
        return (below[s, m] < rng.random(len(m))[:, None]).sum(axis=1)

    def _variances(self, cell: int) -> np.ndarray:
        """Of the logits of single runs, without what they share, float [K, T]."""
        k, n = self.groups[cell]
        mean, own = _smoothed(k, n), 1 - self.alike[self.lines[cell], self.lines[cell]]
        return (own / (n * mean * (1 - mean)))[:, None] + (1 - 1 / n)[:, None] * self.taus**2

    def _draw_common(self, a: int, b: int, rng: np.random.Generator) -> np.ndarray:
        """By how much the latents move the logits of the mean ratios of two cells, float [2, `DRAWS`]."""
        moved = np.zeros([2, DRAWS])
        own, other = (self.alike[line, line] for line in self.lines[[a, b]])
        if self.latents is None or not max(own, other) > 0:
            return moved
        # What the two have in common has loadings whose product is rho_lm; the rest of each is its own.
        between = min(self.alike[self.lines[a], self.lines[b]], (own * other) ** 0.5)
        ratio = (own / other) ** 0.25 if between > 0 else 1.0
        loadings = (between**0.5 * ratio, between**0.5 / ratio)
        for latents in np.unique(np.concatenate([self.latents[a], self.latents[b]])):
            joint = rng.normal(size=DRAWS)
            for i, (cell, alike) in enumerate(((a, own), (b, other))):
                k, n = self.groups[cell]
                mean = _smoothed(k, n)
                scale = ((self.latents[cell] == latents) / np.sqrt(n * mean * (1 - mean))).sum() / len(k)
                rest = max(alike - loadings[i] ** 2, 0.0) ** 0.5
                moved[i] += scale * (loadings[i] * joint + rest * rng.normal(size=DRAWS))
        return moved

    def _draw(self, cell: int, tau: np.ndarray, moved: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        k, n = self.groups[cell]
        sd = np.sqrt(self._variances(cell).sum(axis=0)) / len(k)  # of the logit of the mean ratio
        return expit(logit(_smoothed(k, n)) + sd[tau] * rng.normal(size=len(tau)) + moved)


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
