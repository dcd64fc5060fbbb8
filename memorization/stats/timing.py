"""Does one group rise later than another? A test whose null is "the same curve, but for its level".

Given are counts of units r (networks with data of their own) at evaluations e: of n_re generated points near a group
m_re are memorized. The share rises like

    p_g(e) = floor_g + level_g F(ln e - delta_g),      F(ln e; half, slope) = 1 / (1 + (half / e)^slope),

and the question is whether delta differs between a group and the reference, all else being theirs. Epochs at which a
noisy curve first crosses half of its end do not answer it: a small group crosses early, by noise, or its end does not
stand out, and the test reports group size as timing. Here

1. F is fitted to the reference, pooled over units.
2. h, the part of F' = dF / d ln e that neither a constant nor F explains (least squares with the weights w(e), those
   that the number of points near both groups gives), and f, the part of F that a constant does not explain, make two
   numbers of each unit's curve s: a score u = sum w h s, which is 0 on average for any curve floor + level F, and a
   level l = sum w f s. A shift by delta adds -delta level sum w h^2 to u.
3. Per unit z_r = (u_gr - b l_gr) / l_g - (u_r - b l_r) / l, with b = u / l of the reference and values without r means
   over units: the linear part of u_g / l_g - u / l. Floor, level and the number of points drop out, as does every
   deviation of the true curve from F that both groups share.
4. Under the null each z_r is as likely -z_r: groups that are exchangeable may be exchanged within a unit. All 2^R sign
   patterns (10,000 random ones beyond 16 units) give the p-value.

Being linear in the counts, z is what it would be on average over all ways to thin the larger group to the number of the
smaller one in every evaluation, so nothing is thinned. A group that has not risen by the end (level within two standard
errors of 0 over units) is censored: neither late nor early, and there is no p-value.

Units may come from several settings, with epochs and curves of their own (`strata_test`). Steps 1 to 3 are then done in
each setting, whose fit and means are its own; z_r is symmetric under the null in each, whatever its scale, so that the
signs of all units are flipped together. Settings in which the group or the reference has not risen add no units.

What the null leaves open: groups whose curves differ in slope are told apart, too, where one is later at half.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

_REPLICATES = 10_000  # random sign flips
_EXACT = 16  # units up to which all sign flips are tried
_RISEN = 2.0  # standard errors over units
_SLOPES = np.array([0.7, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 9.0])
_HALVES = 60  # nodes of the grid

Answer = Literal["later", "earlier", "not shown", "reference not risen", "not risen", "none"]
Counts = tuple[np.ndarray, np.ndarray | None]  # [R, E], memorized and all points near a group


@dataclass(frozen=True)
class Timing:
    """A group against the reference; p-values are one-sided, None where the question has no answer."""

    answer: Answer  # two-sided, at 5 %
    p_later: float | None = None
    p_earlier: float | None = None


@dataclass(frozen=True)
class Rise:
    """A fitted curve floor + level F."""

    half: float  # epoch of half the rise
    slope: float
    floor: float
    level: float


def logistic(epochs: np.ndarray, half: float | np.ndarray, slope: float | np.ndarray) -> np.ndarray:
    """F of the module: 1/2 at `half`, of the given slope in ln(epoch)."""
    return 1 / (1 + np.exp(slope * np.log(half / epochs)))


class RiseFits:
    """Least-squares fits of many curves at the same epochs, over a grid of half epochs and slopes.

    The grid of half epochs has geometric steps from the first epoch to the last: before and after it nothing was seen.

    Parameters
    ----------
    epochs : [E], ascending, above 0
    weights : [E], at least 0
    """

    def __init__(self, epochs: np.ndarray, weights: np.ndarray):
        self._half, self._slope, self._rises, squares = _grid(tuple(np.asarray(epochs, float).tolist()))
        self.weights = np.asarray(weights, float) / max(np.sum(weights), 1e-300)
        self._mean = self._rises @ self.weights  # [G]
        self._variance = squares @ self.weights - self._mean**2

    def best(self, curves: np.ndarray) -> list[Rise]:
        """The best rise of each of `curves` [B, E]; a curve that only falls has half = infinity, level = 0."""
        mean = curves @ self.weights
        covariance = (curves * self.weights) @ self._rises.T - mean[:, None] * self._mean  # [B, G]
        seen = (covariance > 0) & (self._variance > 1e-9)
        gain = np.divide(covariance**2, self._variance, out=np.zeros_like(covariance), where=seen)
        fits = []
        for b, i in enumerate(gain.argmax(axis=1)):
            if gain[b, i] > 0:
                level = float(covariance[b, i] / self._variance[i])
                floor = float(mean[b] - level * self._mean[i])
                fits.append(Rise(float(self._half[i]), float(self._slope[i]), floor, level))
            else:
                fits.append(Rise(float("inf"), 1.0, float(mean[b]), 0.0))
        return fits


@functools.lru_cache(maxsize=4)
def _grid(epochs: tuple[float, ...]) -> tuple[np.ndarray, ...]:
    """Half epochs [G], slopes [G], their rises [G, E] and the squares of these."""
    halves, slopes = (
        g.ravel() for g in np.meshgrid(np.geomspace(epochs[0], epochs[-1], _HALVES), _SLOPES, indexing="ij")
    )
    rises = logistic(np.array(epochs), halves[:, None], slopes[:, None])
    return halves, slopes, rises, rises**2


def pooled_shares(memorized: np.ndarray, nearest: np.ndarray) -> np.ndarray:
    """What each unit adds to the pooled share of memorized points, float64 [R, E]; the mean over units is that share.

    Linear in the counts, so that a unit with few points near the group counts as little as it should. 0 where no unit
    has points near the group.
    """
    near = nearest.mean(axis=0)
    with np.errstate(invalid="ignore", divide="ignore"):
        pooled = np.where(near > 0, memorized.mean(axis=0) / near, 0)
        return pooled + np.where(near > 0, (memorized - pooled * nearest) / near, 0)


def timing_test(
    epochs: np.ndarray,
    group: Counts,
    reference: Counts,
    flips: np.ndarray | None = None,
) -> Timing:
    """Whether `group` rises later or earlier than `reference`, by the test of the module.

    Parameters
    ----------
    epochs : [E], ascending, above 0
    group, reference : memorized and all points near the group, [R, E] each; without the latter the counts of memorized
        points themselves are the curves
    flips : `sign_flips(R)`, if there are many tests to make

    Returns
    -------
    Timing; its `answer` is wrong in at most 5 % of studies in which the two curves differ in floor and level alone
    """
    found = _later_by(epochs, group, reference)
    return Timing(found) if isinstance(found, str) else _tell(found, flips)


def strata_test(strata: Sequence[tuple[np.ndarray, Counts, Counts]]) -> tuple[Timing, list[Answer | int]]:
    """`timing_test` of units of several settings: arguments (epochs, group, reference) of each setting.

    Returns
    -------
    The answer of all units together; and of each setting how many units it has added, or why none.
    """
    found = [_later_by(*stratum) for stratum in strata]
    units: list[Answer | int] = [each if isinstance(each, str) else len(each) for each in found]
    differences = [each for each in found if not isinstance(each, str)]
    if differences:
        return _tell(np.concatenate(differences)), units
    # None has risen: say what is lacking least.
    return Timing(min(units, key=("not risen", "reference not risen", "none").index, default="none")), units


def _tell(later: np.ndarray, flips: np.ndarray | None = None) -> Timing:
    p_later, p_earlier = sign_flip_test(later, flips), sign_flip_test(-later, flips)
    answer: Answer = "later" if 2 * p_later <= 0.05 else "earlier" if 2 * p_earlier <= 0.05 else "not shown"
    return Timing(answer, p_later, p_earlier)


def _later_by(epochs: np.ndarray, group: Counts, reference: Counts) -> np.ndarray | Answer:
    """z of the module, [R], positive where the group is later; or why there is none."""
    if group[1] is None:
        curves, weights = [np.asarray(group[0], float), np.asarray(reference[0], float)], np.ones(len(epochs))
        if not curves[0].any() or not curves[1].any():
            return "none"
    else:
        curves = [pooled_shares(memorized, nearest) for memorized, nearest in (group, reference)]
        a, b = group[1].mean(axis=0), reference[1].mean(axis=0)
        weights = np.divide(a * b, a + b, out=np.zeros(len(epochs)), where=(a > 0) & (b > 0))
        if not weights.any():
            return "none"
    weights = weights / weights.sum()
    fit = RiseFits(epochs, weights).best(curves[1].mean(axis=0, keepdims=True))[0]
    if not fit.level > 0:
        return "reference not risen"
    rise = logistic(np.asarray(epochs, float), fit.half, fit.slope)
    f = rise - weights @ rise
    h = fit.slope * rise * (1 - rise)
    h = h - weights @ h
    h -= f * (weights @ (h * f)) / (weights @ f**2)
    score, level = [s @ (weights * h) for s in curves], [s @ (weights * f) / (weights @ f**2) for s in curves]
    if not above_zero(level[1]):
        return "reference not risen"
    if not above_zero(level[0]):
        return "not risen"
    slope = score[1].mean() / level[1].mean()
    parts = [(u - slope * v) / v.mean() for u, v in zip(score, level)]
    later = parts[1] - parts[0]
    later[np.abs(later) < 1e-12] = 0  # rounding is no difference
    return later


def above_zero(values: np.ndarray) -> bool:
    """Whether the mean over units is at least two standard errors above 0; of one unit: above 0."""
    error = values.std(ddof=1) / len(values) ** 0.5 if len(values) > 1 else 0.0
    return bool(values.mean() > _RISEN * error)


def sign_flips(count: int) -> np.ndarray:
    """Sign patterns [P, count] of the test: all of them up to 16, else 10,000 random ones and the observed one."""
    if count <= _EXACT:
        return 1 - 2 * ((np.arange(2**count)[:, None] >> np.arange(count)) & 1)
    signs = np.random.default_rng(0).choice([-1, 1], size=[_REPLICATES, count])
    return np.concatenate([signs, np.ones([1, count], dtype=int)])


def sign_flip_test(differences: np.ndarray, flips: np.ndarray | None = None) -> float:
    """One-sided p-value of "the mean difference is above 0", paired over units.

    If the two members of each pair could be exchanged, each difference would as likely have the other sign. The
    p-value is the share of `sign_flips` with a mean at least as large; it is at least 1 / 2^units. NaN ones are left
    out.
    """
    if np.isnan(differences).any():
        differences, flips = differences[~np.isnan(differences)], None
    if not len(differences):
        return float("nan")
    means = (sign_flips(len(differences)) if flips is None else flips) @ differences
    return float(np.mean(means >= differences.sum() - 1e-12 * np.abs(differences).sum()))
