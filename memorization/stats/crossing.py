"""Where a falling curve of proportions crosses a level, and how sure that is: a logit line with two kinds of spread.

Model. At log |D| = x the mean ratio of the runs is mu(x) with logit mu = f(x). Run j of size i has the true ratio p_ij,
which on the logit scale differs from f(x_i) by the spread between seeds tau, and k_ij ~ Binomial(n_ij, p_ij):

    E y_ij = mu_i,    Var y_ij ~ mu_i (1 - mu_i) / n_ij + (1 - 1 / n_ij) (mu_i (1 - mu_i) tau)^2,    y = k / n.

Only this mean and variance are used (quasi-likelihood; McCullagh & Nelder 1989, Chapter 9), so that the curve is the
mean ratio over seeds, as it is averaged and drawn. It is nearly a line,

    f(x_i) = a + b x_i + u_i,    u_i ~ N(0, (omega (logit level - a - b x_i))^2),

and departs from the line the more, the further a size lies from the level: what is far off says less of the crossing.
Published curves are lines within omega = 0.1 or so; one with undertrained sizes was not within 0.3.

For each (tau, omega) of a grid, a and b follow by iterated weighted least squares with their covariance, and the
restricted likelihood of (tau, omega) by the same linearization (Breslow & Clayton 1993). With flat a and b, the prior
1 / (`TAU_SCALE` + tau) for tau, and `_OMEGAS` for omega, the crossing x* = (logit level - a) / b has the distribution

    P(x* < x) = mean over (tau, omega) of  Phi((logit level - a - b x) / sd(a + b x)),

whose quantiles for one (tau, omega) are the bounds of Fieller (1954), and which the uncertain tau widens as a t
distribution does.

Runs that are sampled from the same latents memorize, in part, the same of them, so that their counts are wrong
together. With the correlation rho of two such runs in whether an image is memorized (`memorization.stats.alike`),

    Cov(y_ij, y_kl) = rho (mu_i (1 - mu_i) / n_ij)^(1/2) (mu_k (1 - mu_k) / n_kl)^(1/2),

and only 1 - rho of the variance of an image is of a run alone. The fit takes that part for the runs; what is common to
a set of runs adds rho d d' to the covariance of a and b, where d are a and b of the line through the standard
deviations of its runs (and zeros for the others).

That these intervals cover as they say over repeated studies was simulated:
`benchmarks/bench_emm_interval.py`, with the figures in docs/statistics.md.

References
----------
Fieller, "Some problems in interval estimation", Journal of the Royal Statistical Society B 16, 1954.
McCullagh & Nelder, "Generalized Linear Models", 2nd edition, 1989.
Breslow & Clayton, "Approximate inference in generalized linear mixed models", JASA 88, 1993.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from scipy.special import expit, logit, ndtr

TAUS = np.concatenate([[0.0], np.geomspace(0.01, 2, 23)])  # spread between seeds, standard deviation of the logit
TAU_SCALE = 0.05
_OMEGAS = np.array([0, 0.03, 0.06, 0.12, 0.25, 0.5])  # relative departure from the line
_OMEGA_WEIGHTS = np.array([0.5, 0.2, 0.14, 0.09, 0.04, 0.03])
_STEPS, _TOL, _MAX_ETA = 25, 1e-4, 12.0


@dataclass(frozen=True)
class Crossing:
    """Distribution of the crossing of B data sets, whose sizes are the same or not; see the module.

    C counts the pairs (tau, omega) of the grid.
    """

    log_sizes: np.ndarray  # float [S], ascending, of the sizes that were measured; or [B, S], NaN after the last
    level: float
    tau: np.ndarray  # float [C]
    omega: np.ndarray  # float [C]
    log_weight: np.ndarray  # float [B, C], posterior, normalized
    log_likelihood: np.ndarray  # float [B, C], restricted, up to a constant
    beta: np.ndarray  # float [B, C, 2], a (at the mean of log_sizes) and b
    cov: np.ndarray  # float [B, C, 3], variance of a, covariance, variance of b

    @cached_property
    def centre(self) -> np.ndarray:
        """Mean of the log sizes, a number or float [B]."""
        return np.nanmean(self.log_sizes, axis=-1)

    def below(self, x: np.ndarray) -> np.ndarray:
        """P(log EMM < x), float [B], for x float [B]: that the curve is below the level at x."""
        d = (np.asarray(x, dtype=np.float64) - self.centre)[:, None]
        mean = self.beta[..., 0] + self.beta[..., 1] * d - logit(self.level)
        var = self.cov[..., 0] + 2 * self.cov[..., 1] * d + self.cov[..., 2] * d**2
        return (np.exp(self.log_weight) * ndtr(-mean / np.sqrt(np.maximum(var, 1e-300)))).sum(axis=1)

    def quantile(self, q: float) -> np.ndarray:
        """log |D| below which the crossing lies with probability `q`, float [B]; +-inf outside of the sizes."""
        low, high = (np.full(len(self.beta), end(self.log_sizes, axis=-1)) for end in (np.nanmin, np.nanmax))
        before, after = self.below(low) >= q, self.below(high) < q
        for _ in range(40):
            middle = (low + high) / 2
            less = self.below(middle) < q
            low, high = np.where(less, middle, low), np.where(less, high, middle)
        found = (low + high) / 2  # both, where the curve rises: open on the side of q
        found = np.where(before, -np.inf, found) if q >= 0.5 else np.where(after, np.inf, found)
        return np.where(after, np.inf, found) if q >= 0.5 else np.where(before, -np.inf, found)

    def interval(self, confidence: float = 0.95) -> tuple[np.ndarray, np.ndarray]:
        """Central interval of log EMM, float [B] each; -inf and inf where it is open."""
        return self.quantile((1 - confidence) / 2), self.quantile((1 + confidence) / 2)

    def seed_sd(self) -> np.ndarray:
        """Posterior mean of tau, float [B]."""
        return np.exp(self.log_weight) @ self.tau

    def tau_log_likelihood(self) -> np.ndarray:
        """log L(tau), float [B, T] on `TAUS`, averaged over omega: what other studies may take as prior."""
        by_tau = self.log_likelihood.reshape(len(self.beta), -1, len(_OMEGAS)) + np.log(_OMEGA_WEIGHTS)
        return np.logaddexp.reduce(by_tau, axis=2)

    def row(self, i: int) -> "Crossing":
        """The data set `i` alone."""
        names = ("log_weight", "log_likelihood", "beta", "cov")
        x = self.log_sizes if self.log_sizes.ndim == 1 else self.log_sizes[i][~np.isnan(self.log_sizes[i])]
        return replace(self, log_sizes=x, **{name: getattr(self, name)[i : i + 1] for name in names})


def fit_crossing(
    sizes: Sequence[float] | np.ndarray,  # |D| of each run, [N], or [B, N] where the B curves have other sizes
    memorized: np.ndarray,  # memorized images of each run, [N] or [B, N]; need not be whole
    samples: np.ndarray,  # all images of each run, like `memorized`
    level: float = 0.9,
    *,
    seed_sd: float | None = None,  # tau; None: estimated from the runs
    log_prior: np.ndarray | None = None,  # [T] on `TAUS`, added to that of tau; see `Crossing.tau_log_likelihood`
    tau_scale: float = TAU_SCALE,  # of the prior of tau; inf: flat, for runs that end where the spread looks small
    alike: float | np.ndarray = 0.0,  # rho of runs of the same latents, 0 to below 1; or [B]
    latents: Sequence[int] | None = None,  # [N], which latents each run has, as numbers; None: all the same
) -> Crossing:
    """Fit the model of this module to the runs of one curve, or of B curves at once.

    With a single size there is no slope: the curve is a constant, and the crossing is known to lie on a side at best.

    Raises
    ------
    ValueError
        If there are no runs, lengths differ, or a number is out of range.
    """
    sizes = np.asarray(sizes, dtype=np.float64)
    k, n = np.atleast_2d(np.asarray(memorized, dtype=np.float64)), np.atleast_2d(np.asarray(samples, dtype=np.float64))
    fits = k.shape == n.shape and (sizes.shape == k.shape if sizes.ndim == 2 else sizes.shape == k.shape[1:])
    if not sizes.size or not fits:
        raise ValueError(f"A crossing needs counts of as many runs as sizes, not {k.shape} and {sizes.shape}.")
    if not (np.isfinite(sizes).all() and (sizes > 0).all() and (n >= 1).all() and ((k >= 0) & (k <= n)).all()):
        raise ValueError("A crossing needs positive sizes, and counts between 0 and the number of images.")
    if not 0 < level < 1:
        raise ValueError(f"The level of a crossing must lie between 0 and 1, not {level}; 0.9 is usual.")
    if seed_sd is not None and not 0 <= seed_sd < math.inf:
        raise ValueError(f"The spread between seeds is a standard deviation >= 0 on the logit scale, not {seed_sd}.")

    alike = np.atleast_1d(np.asarray(alike, dtype=np.float64))
    if not ((alike >= 0) & (alike < 1)).all():
        raise ValueError(f"Runs of the same latents correlate by 0 to below 1, not {alike}.")
    latents = np.zeros(k.shape[1], dtype=int) if latents is None else np.asarray(latents)
    if latents.shape != k.shape[1:]:
        raise ValueError(f"The latents of {k.shape[1]} runs are needed, not of {len(latents)}.")
    sets = (latents == np.unique(latents)[:, None]).astype(np.float64) if alike.any() else np.zeros([0, k.shape[1]])

    unique, index = _unique(sizes)
    taus = TAUS if seed_sd is None else np.array([float(seed_sd)])
    log_tau = np.log(np.gradient(taus) / (1 + taus / tau_scale)) if len(taus) > 1 else np.zeros(1)
    if log_prior is not None and seed_sd is None:
        log_tau = log_tau + log_prior - np.max(log_prior)
    tau, omega = np.repeat(taus, len(_OMEGAS)), np.tile(_OMEGAS, len(taus))
    x = np.log(unique)
    x_mid = x - np.nanmean(x, axis=-1, keepdims=True)
    likelihood, beta, cov = _fit(x_mid, index, k, n, logit(level), tau, omega, alike[:, None, None], sets)
    weight = likelihood + np.repeat(log_tau, len(_OMEGAS)) + np.tile(np.log(_OMEGA_WEIGHTS), len(taus))
    weight = weight - np.logaddexp.reduce(weight, axis=1, keepdims=True)
    return Crossing(x, level, tau, omega, weight, likelihood, beta, cov)


def _unique(sizes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Ascending sizes [S] without repetition, and which each run has [N]; of several curves [B, S], NaN-padded."""
    if sizes.ndim == 1:
        return np.unique(sizes, return_inverse=True)
    rows = [np.unique(row, return_inverse=True) for row in sizes]
    unique = np.full((len(rows), max(len(found) for found, _ in rows)), np.nan)
    for row, (found, _) in zip(unique, rows):
        row[: len(found)] = found
    return unique, np.array([index for _, index in rows])


def _fit(
    x: np.ndarray,  # [S], mean 0; or [B, S], NaN after the last
    index: np.ndarray,  # [N] or [B, N], which size each run has
    k: np.ndarray,  # [B, N]
    n: np.ndarray,  # [B, N]
    bar: float,  # logit of the level
    tau: np.ndarray,  # [C]
    omega: np.ndarray,  # [C]
    alike: np.ndarray,  # [B, 1, 1] or [1, 1, 1]
    sets: np.ndarray,  # [G, N], 1.0 for the runs of each set of latents; none if nothing is alike
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Restricted log-likelihood [B, C], (a, b) [B, C, 2] and their covariance [B, C, 3]."""
    used = ~np.isnan(x)  # [S] or [B, S]
    lone = used.sum(-1) == 1  # no slope
    of_size = (index[..., None] == np.arange(x.shape[-1])).astype(np.float64)  # [N, S] or [B, N, S]
    extra = min(0.5, 1 / k.shape[1])  # images of either kind, one in all: keeps a and b finite (Firth 1993, in spirit)
    y, n = ((k + extra) / (n + 2 * extra))[:, None], n[:, None]  # [B, 1, N]
    ratio = (y @ of_size)[:, 0] / np.maximum(of_size.sum(axis=-2), 1)
    x = np.where(used, x, 0.0)
    beta = _start(x, np.clip(ratio, 0.002, 0.998), used, lone)[:, None].repeat(len(tau), axis=1)
    if x.ndim == 2:
        x, used, lone, index = x[:, None], used[:, None], lone[:, None], index[:, None]  # [B, 1, .]

    def of_run(value: np.ndarray) -> np.ndarray:  # [B, C, S] -> [B, C, N]
        if index.ndim == 1:
            return value[..., index]
        return np.take_along_axis(value, np.broadcast_to(index, (*value.shape[:2], index.shape[-1])), axis=-1)

    t2 = (tau**2)[:, None]
    for _ in range(_STEPS):
        eta = np.clip(beta[..., :1] + beta[..., 1:] * x, -_MAX_ETA, _MAX_ETA)  # [B, C, S]
        mu = expit(eta)
        d = mu * (1 - mu)
        eta_run, mu_run, d_run = of_run(eta), of_run(mu), of_run(d)
        variance = (1 - alike) / (n * d_run) + t2 * (1 - 1 / n)  # [B, C, N], of the working logit
        z = eta_run + (y - mu_run) / d_run
        w = 1 / variance
        w_size = np.where(used, w @ of_size, 1.0)  # [B, C, S]
        z_size = (w * z) @ of_size / w_size
        w_line = used / (1 / w_size + (omega[:, None] * (eta - bar)) ** 2)
        s0, s1, s2 = w_line.sum(-1), (w_line * x).sum(-1), (w_line * x**2).sum(-1)
        c0, c1 = (w_line * z_size).sum(-1), (w_line * x * z_size).sum(-1)
        s2 = np.where(lone, 1.0, s2)  # with s1 = c1 = 0: a constant
        det = s0 * s2 - s1**2
        new = np.stack([(s2 * c0 - s1 * c1) / det, (s0 * c1 - s1 * c0) / det], axis=-1)
        step = np.clip(new - beta, -2, 2)
        beta = beta + step
        if np.abs(step).max() < _TOL:
            break
    within = w * (z - of_run(z_size)) ** 2
    between = w_line * (z_size - beta[..., :1] - beta[..., 1:] * x) ** 2
    log_l = np.log(w).sum(-1) - np.log(w_size).sum(-1) + np.log(np.where(used, w_line, 1.0)).sum(-1) - np.log(det)
    log_l = 0.5 * (log_l - within.sum(-1) - between.sum(-1))
    cov = np.stack([s2 / det, -s1 / det, np.where(lone, 0.0, s0 / det)], axis=-1)
    for members in sets:
        moved = (w * members / np.sqrt(n * d_run)) @ of_size / w_size  # of each size, by one standard deviation
        c0, c1 = (w_line * moved).sum(-1), (w_line * x * moved).sum(-1)
        a, b = (s2 * c0 - s1 * c1) / det, np.where(lone, 0.0, (s0 * c1 - s1 * c0) / det)
        cov = cov + alike * np.stack([a * a, a * b, b * b], axis=-1)
    return log_l, beta, cov


def _start(x: np.ndarray, ratio: np.ndarray, used: np.ndarray, lone: np.ndarray) -> np.ndarray:
    """A line through the logits of the mean ratios [B, S], weighted: (a, b), float [B, 2]."""
    w, z = used * ratio * (1 - ratio), logit(ratio)
    x0, z0 = ((w * v).sum(-1) / w.sum(-1) for v in (x, z))
    spread = (w * (x - x0[:, None]) ** 2).sum(-1)
    b = np.where(lone, 0.0, (w * (x - x0[:, None]) * z).sum(-1) / np.where(lone, 1.0, spread))
    return np.stack([z0 - b * x0, b], axis=-1)
