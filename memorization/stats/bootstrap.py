"""How sure the mean ratio of a size is: a parametric bootstrap over generated images and over training seeds.

Model. The runs j of one size have true ratios p_j of mean mu and variance rho mu (1 - mu); of n_j generated images
k_j ~ Binomial(n_j, p_j) are memorized (beta-binomial). So the mean of K observed ratios has the variance

    mu (1 - mu) / m,    m = K^2 / sum_j [rho + (1 - rho) / n_j],

that of m independent images. rho, the correlation within a run, comes from the spread of runs of the same size, over
all sizes of a curve, by moments (Williams 1982):

    s = mean over sizes of  variance of the ratios / (mu (1 - mu)),    rho = (s - h) / (1 - h),    h = mean of 1 / n_j.

A replicate draws s from its scaled inverse chi-squared distribution (its degrees of freedom: runs less sizes) and mu of
each size from Beta(mu m + 1/2, (1 - mu) m + 1/2) (Jeffreys' prior; with one run this is its interval for a proportion,
Brown et al. 2001). EMM has an interval of its own, see `memorization.stats.crossing`.

Runs of the same latents, whose images correlate by r (`memorization.stats.alike`), share a part of the noise of their
images: with c_jl = r / (n_j n_l)^(1/2) for such pairs, else 0,

    m = K^2 / [rho K + (1 - rho) (sum_j 1 / n_j + sum_j sum_l!=j c_jl)],

and h is less by the mean of c_jl over the pairs of a size.

Why not draw runs with replacement? With the two to five seeds that one can afford, the drawn means stay between the
lowest and the highest run: in simulations nominal 95 % became 64 to 90 %. The model above gives 87 to 99 %.

Limits. With one run of each size, nothing is known of the spread of seeds, and only the generated images count. Two
runs of one size alone say little, and the interval says so by its width.

The maximum. R_mem is the highest of several noisy ratios of a run, so it is too high on average. Drawing each snapshot
and taking the maximum again would add that optimism a second time. `optimism` bounds it instead, and the lower ends
of the intervals have it taken off, while the upper ends and the estimate stay as the definition has them. All
snapshots are sampled from the same latents, so their noise is alike and the true optimism is smaller than that.

References
----------
Williams, "Extra-binomial variation in logistic linear models", Applied Statistics 31, 1982.
Brown, Cai & DasGupta, "Interval Estimation for a Binomial Proportion", Statistical Science 16, 2001.
Davison & Hinkley, "Bootstrap Methods and their Application", 1997, Sections 2.2 and 3.8.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

_MIN_VARIANCE = 5  # expected variance of the count, in images, from which a size says something of the spread of seeds
_EQUAL = 3  # standard errors below the highest ratio up to which a snapshot may be as good
_TAIL = 1e-6  # probability left out of an integral on each side

Group = tuple[np.ndarray, np.ndarray]  # num_memorized [K], num_samples [K] of the runs of one size
Shared = tuple[float, Sequence[np.ndarray]]  # r of runs of the same latents, and of each group their numbers [K]


@dataclass(frozen=True)
class SeedSpread:
    """How much runs differ that differ only in their seed; see the module."""

    s: float  # variance of the ratios of runs of one size, in units of mu (1 - mu); 0 if unknown
    h: float  # what sampling alone would give
    dof: int  # degrees of freedom of `s`; 0: unknown

    @property
    def rho(self) -> float | None:
        """Correlation within a run, 0..1; None if no size has several runs with a ratio between 0 and 1."""
        return float(np.clip((self.s - self.h) / (1 - self.h), 0, 1)) if self.dof else None

    def draw(self, replicates: int, rng: np.random.Generator) -> np.ndarray:
        """rho with its uncertainty, float [replicates]; 0 if unknown."""
        if not self.dof:
            return np.zeros(replicates)
        s = self.s * self.dof / rng.chisquare(self.dof, replicates)
        return np.clip((s - self.h) / (1 - self.h), 0, 1)


def seed_spread(groups: Sequence[Group], shared: Shared | None = None) -> SeedSpread:
    """Estimate the spread of seeds from the sizes with several runs; `shared` as of `ratio_replicates`."""
    s = h = dof = 0
    for i, (memorized, samples) in enumerate(groups):
        ratio = memorized / samples
        mean = ratio.mean()
        variance = mean * (1 - mean)
        if len(ratio) < 2 or variance * samples.sum() < _MIN_VARIANCE or samples.min() < 2:
            continue
        s += ((ratio - mean) ** 2).sum() / variance  # (K - 1) times the variance
        h += (len(ratio) - 1) * (1 / samples).mean() - _common(samples, shared, i) / len(ratio)
        dof += len(ratio) - 1
    return SeedSpread(float(s / dof), float(h / dof), dof) if dof else SeedSpread(0.0, 0.0, 0)


def ratio_replicates(
    groups: Sequence[Group],
    replicates: int = 2000,
    seed: int = 0,
    seed_sd: float | None = None,
    shared: Shared | None = None,
) -> np.ndarray:
    """Plausible mean ratios of each size, by the bootstrap of this module.

    Parameters
    ----------
    groups : per size the numbers of memorized and of all images of its runs.
    replicates : number B of curves to draw.
    seed : of the draws; the same seed gives the same result.
    seed_sd : spread between seeds, if it is known, as standard deviation of the logit; None: from the groups.
    shared : correlation r of runs of the same latents, 0 to below 1, and of each group which latents its runs have, as
        numbers [K]; None: each run has its own.

    Returns
    -------
    float [B, S]
    """
    rng = np.random.default_rng(seed)
    rho = seed_spread(groups, shared).draw(replicates, rng)[:, None]  # [B, 1]
    drawn = np.empty((replicates, len(groups)))
    for i, (memorized, samples) in enumerate(groups):
        mean = (memorized / samples).mean()
        if seed_sd is not None:
            rho = np.full((replicates, 1), min(seed_sd**2 * mean * (1 - mean), 1.0))  # to first order in seed_sd
        noise = (1 / samples).sum() + _common(samples, shared, i)
        m = len(samples) ** 2 / (rho * len(samples) + (1 - rho) * noise)[:, 0]  # [B]
        drawn[:, i] = rng.beta(mean * m + 0.5, (1 - mean) * m + 0.5)
    return drawn


def _common(samples: np.ndarray, shared: Shared | None, i: int) -> float:
    """Sum of c_jl over the ordered pairs of runs of the group `i`."""
    if shared is None:
        return 0.0
    alike, latents = shared
    pairs = (latents[i][:, None] == latents[i]) & ~np.eye(len(samples), dtype=bool)
    return float(alike * (pairs / np.sqrt(samples[:, None] * samples)).sum())


def independent_part(samples: np.ndarray, shared: Shared | None, i: int) -> float:
    """Share of the images of the group `i` that as many independent images would be worth, 0..1."""
    own = float((1 / samples).sum())
    return own / (own + _common(samples, shared, i))


def optimism(memorized: np.ndarray, samples: np.ndarray, points: int = 512) -> float:
    """How much higher the highest of several measured ratios is, on average, than the highest true one, at most.

    Snapshots within three standard errors (of the difference) of the highest are taken as equally good, which is the
    least favourable case: the differences between measured ratios are partly noise themselves, and to believe them
    would find too little. With their common ratio p and P_s ~ Beta(p n_s + 1/2, (1 - p) n_s + 1/2) the optimism is
    E max_s P_s - max_s E P_s, where E max_s P_s = low + integral from low of (1 - prod_s F_s(x)) dx.

    Parameters
    ----------
    memorized, samples : int [T], per snapshot.
    points : of the integral.
    """
    from scipy.integrate import trapezoid
    from scipy.special import betainc, betaincinv

    memorized, samples = np.asarray(memorized), np.asarray(samples)
    if len(samples) < 2:
        return 0.0
    ratio, smoothed = memorized / samples, (memorized + 0.5) / (samples + 1)
    variance, best = smoothed * (1 - smoothed) / samples, int(np.argmax(ratio))
    equal = ratio >= ratio[best] - _EQUAL * np.sqrt(variance + variance[best])
    if equal.sum() < 2:
        return 0.0
    n = samples[equal]
    p = memorized[equal].sum() / n.sum()
    a, b = p * n + 0.5, (1 - p) * n + 0.5
    low, high = betaincinv(a, b, _TAIL).max(), betaincinv(a, b, 1 - _TAIL).max()
    x = np.linspace(low, high, points)
    expected = low + trapezoid(1 - betainc(a[:, None], b[:, None], x).prod(axis=0), x)
    return float(max(expected - (a / (a + b)).max(), 0.0))


def percentiles(values: np.ndarray, confidence: float) -> tuple[float, float]:
    """The central part of `values` that holds `confidence` of them; infinite ones stay infinite, never averaged."""
    tail = (1 - confidence) / 2
    low, high = np.quantile(values, [tail, 1 - tail], method="inverted_cdf")
    return float(low), float(high)
