"""EMM, the effective model memorization: the training-set size at which R_mem falls below 90 %."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Emm:
    """An estimate of EMM, or a bound of it: `verdict` is "at" `size`, "at least" `size`, or "below" `size`."""

    size: float
    verdict: str
    level: float

    def __str__(self) -> str:
        return f"EMM ({self.level * 100:g} %) " + ("≈ " if self.verdict == "at" else "") + self.place

    @property
    def place(self) -> str:
        """The size as text, after "at least" or "below" where it is open."""
        whole = self.size >= 1000 or math.isclose(self.size, round(self.size))
        size = f"{self.size:.{0 if whole else 1}f}"
        return size if self.verdict == "at" else f"{self.verdict} {size}"


def emm_text(emm: Emm) -> str:
    """With all digits, as tables hold it: "26.3125", "below 20.0" or "at least 40.0"."""
    return repr(float(emm.size)) if emm.verdict == "at" else f"{emm.verdict} {float(emm.size)!r}"


def parse_emm(text: str, level: float) -> Emm:
    """What `emm_text` has written.

    Raises
    ------
    ValueError
        If the text is none of an EMM.
    """
    verdict, _, size = text.rpartition(" ")
    found = Emm(float(size), verdict or "at", level)
    if found.verdict not in ("at", "below", "at least") or not (math.isfinite(found.size) and found.size > 0):
        raise ValueError(f'"{text}" is no EMM.')
    return found


def emm_estimate(sizes: Sequence[float], ratios: Sequence[float], level: float = 0.9) -> Emm:
    """Effective model memorization: the largest |D| at which R_mem is at least `level`.

    Between the largest measured size with ratio >= `level` and the next larger one the curve is taken
    as linear in log |D|. A curve that is not monotone may cross the level several times; the definition
    asks for the largest |D|, hence the last crossing downwards. Where all sizes are below the level EMM
    is "below" the smallest, where the largest size is still at the level EMM is "at least" that size.

    Parameters
    ----------
    sizes : |D| of each point, in any order, each once.
    ratios : memorization ratio 0..1 of each point.
    level : 1 - epsilon, 0 < level <= 1; epsilon = 0.1 in the study.

    Raises
    ------
    ValueError
        If there are no points, the lengths differ, or sizes, ratios or the level are out of range.

    References
    ----------
    Gu et al., "On Memorization in Diffusion Models", 2023, Definition 1: EMM = max {|D| : R_mem >= 1 - epsilon}.
    """
    s, r = np.asarray(sizes, dtype=np.float64), np.asarray(ratios, dtype=np.float64)
    if s.ndim != 1 or s.shape != r.shape or not s.size:
        raise ValueError(f"EMM needs as many ratios as sizes, at least one, not {r.size} and {s.size}.")
    if not (np.isfinite(s).all() and (s > 0).all() and np.unique(s).size == s.size):
        raise ValueError("EMM needs positive sizes, each once; average runs of the same size first.")
    if not ((r >= 0) & (r <= 1)).all():
        raise ValueError("EMM needs memorization ratios between 0 and 1.")
    if not 0 < level <= 1:
        raise ValueError(f"The level of EMM must lie between 0 and 1, not {level}; 0.9 is usual.")
    order = np.argsort(s)
    return emm_at(s, float(emm_crossings(s[order], r[None, order], level)[0]), level)


def emm_crossings(sizes: np.ndarray, ratios: np.ndarray, level: float) -> np.ndarray:
    """log EMM of many curves over the same sizes; see `emm_estimate`.

    Parameters
    ----------
    sizes : float [S], ascending.
    ratios : float [B, S], 0..1.
    level : 1 - epsilon.

    Returns
    -------
    float [B] : natural logarithm of EMM; -inf where it is below the smallest size, inf where at least the largest.
    """
    log_sizes, at_level = np.log(sizes), ratios >= level
    last = len(sizes) - 1 - np.argmax(at_level[:, ::-1], axis=1)  # the largest size at the level
    found = np.full(len(ratios), -np.inf)
    found[at_level[:, -1]] = np.inf
    inside = np.flatnonzero(at_level.any(axis=1) & ~at_level[:, -1])
    i = last[inside]
    above, below = ratios[inside, i], ratios[inside, i + 1]
    t = (above - level) / (above - below)  # 0 at sizes[i], 1 at sizes[i+1]
    found[inside] = (1 - t) * log_sizes[i] + t * log_sizes[i + 1]
    return found


def emm_at(sizes: np.ndarray, log_size: float, level: float) -> Emm:
    """The `Emm` that a value of `emm_crossings` stands for."""
    if math.isinf(log_size):
        return (
            Emm(float(np.max(sizes)), "at least", level) if log_size > 0 else Emm(float(np.min(sizes)), "below", level)
        )
    return Emm(math.exp(log_size), "at", level)


def missed_gap(sizes: Sequence[float], ratios: Sequence[float], emm: Emm) -> tuple[float, float] | None:
    """The two sizes between which the ratios fall below the level, once, if an EMM that was fitted does not lie there.

    Parameters
    ----------
    sizes : |D|, ascending.
    ratios : mean ratio of each size.
    emm : of the fit.
    """
    above = [ratio >= emm.level for ratio in ratios]
    if sum(a != b for a, b in zip(above, above[1:])) != 1 or not above[0]:
        return None
    after = above.index(False)
    low, high = sizes[after - 1], sizes[after]
    return None if emm.verdict == "at" and low <= emm.size <= high else (low, high)
