"""When a curve over the training passes a level, how sure that is, and how that time grows with |D|.

Time of one run. The snapshots at t_1 < t_2 < ... have values y_s with 95 % intervals. The curve is made monotone by
isotonic regression, so that a noisy early snapshot does not cross for the others. Between snapshots it is linear in
log t. tau is the first time at which it reaches the level:

    rise(y, level):  y = R_mem, between snapshots on the logit scale (0 and 1 count as half an image);  tau_mem.
    fall(y, tolerance):  y = a distance to held-out images;  tau_gen is the first time with
                         y <= best + tolerance * max(|best|, half width of the interval of the best),
                         of the curve up to the time of its best, between snapshots a monotone cubic (Fritsch &
                         Carlson), since near its best it is no line; where more is better, of -y.

A curve that is there at its first snapshot, or never, gives a bound: "at most" t_1, "beyond" t_last.

Images. All snapshots of a run are sampled from the same latents, so their errors are alike. The interval of a rise is
therefore that between the crossings of the upper and of the lower ends of all snapshots' intervals: right where the
errors are the same, and too wide rather than too narrow where they are independent. Of a fall, whose level depends on
another snapshot, each value is drawn anew around the fitted curve (`REPLICATES` times).

Seeds. log tau of the runs of one |D| has a standard deviation s, the same at all |D| and pooled over those with several
runs: K runs have the mean of log tau +- t s / sqrt(K) with the t quantile of all degrees of freedom. s contains the
images' share. With one run of each |D| nothing is known of seeds, and the interval is that of the images only.

Scaling. tau ~ |D|^slope by least squares of log tau on log |D| over runs, with the t interval of the scatter about
the line (runs less 2 degrees of freedom), which contains seeds, images and what the line does not describe.

References
----------
Bonnaire, Urfin, Biroli & Mezard, "Why Diffusion Models Don't Memorize", NeurIPS 2025 (tau_gen, tau_mem ~ n).
Fritsch & Carlson, "Monotone piecewise cubic interpolation", SIAM Journal on Numerical Analysis 17, 1980.
Barlow, Bartholomew, Bremner & Brunk, "Statistical Inference under Order Restrictions", 1972 (isotonic regression).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from memorization.stats.intervals import wilson_interval

REPLICATES = 400
AT, AT_MOST, BEYOND = "at", "at most", "beyond"
_Z = 1.959964  # of the snapshots' 95 % intervals


@dataclass(frozen=True)
class Time:
    """A time, or a bound of it: `verdict` is "at", "at most" (before the first snapshot) or "beyond" (the last)."""

    value: float
    verdict: str = AT

    def __str__(self) -> str:
        rounded = float(f"{self.value:.3g}")
        text = f"{rounded:,.0f}" if rounded >= 1000 else f"{rounded:g}"
        return f"{self.verdict} {text}" if self.verdict != AT else text

    @property
    def ends(self) -> tuple[float, float]:
        """Between what it lies: 0 and infinity where it is open."""
        return (0 if self.verdict == AT_MOST else self.value), (math.inf if self.verdict == BEYOND else self.value)


@dataclass(frozen=True)
class RunTime:
    """Of one run, with the interval of its images."""

    time: Time
    low: Time
    high: Time


@dataclass(frozen=True)
class SizeTime:
    """Of the runs of one size."""

    size: int
    runs: tuple[RunTime, ...]
    time: Time  # geometric mean
    low: Time
    high: Time
    images_only: bool  # whether the interval knows nothing of seeds
    reached: int  # runs in which the time is known, and no bound
    read_runs: int = 0  # how many, where it was read from a table and `runs` is empty

    @property
    def num_runs(self) -> int:
        return len(self.runs) or self.read_runs


@dataclass(frozen=True)
class Slope:
    """log tau = constant + slope log |D|."""

    value: float
    low: float  # nan: too few runs
    high: float
    constant: float
    runs: int
    sizes: int
    left_out: tuple[int, ...]  # sizes of which a run has a bound only


def rising_time(times: Sequence[float], ratios: Sequence[float], samples: Sequence[int], level: float) -> Time:
    """The first of `times` (ascending, above 0) at which `ratios` of so many `samples` reach `level`."""
    t, y = _checked(times, ratios)
    half = 0.5 / np.asarray(samples, dtype=np.float64)
    y = np.clip(_isotonic(y), half, 1 - half)
    return _first(t, np.maximum.accumulate(np.log(y / (1 - y))), math.log(level / (1 - level)))


def falling_time(
    times: Sequence[float], values: Sequence[float], tolerance: float, half_widths: Sequence[float] | None = None
) -> Time:
    """The first of `times` at which `values` are within the tolerance of their lowest; see the module."""
    t, y = _checked(times, values)
    best = int(y.argmin())
    half = 0.0 if half_widths is None else float(half_widths[best])
    level = y[best] + tolerance * max(abs(float(y[best])), half)
    return _first(t[: best + 1], _isotonic(-y[: best + 1]), -level, curved=True)


def rise(times: Sequence[float], memorized: Sequence[int], samples: Sequence[int], level: float) -> RunTime:
    """When memorized / samples reaches `level`; the interval is from the 95 % intervals of the snapshots.

    Raises
    ------
    ValueError
        If the level is not between 0 and 1, or the curve is none.
    """
    if not 0 < level < 1:
        raise ValueError(f"The level of tau_mem must lie between 0 and 1, not {level:g}; 0.1 is usual.")
    low, high = np.array([wilson_interval(int(k), int(n)) for k, n in zip(memorized, samples)]).T
    ratio = np.asarray(memorized) / np.asarray(samples)
    found = [rising_time(times, y, samples, level) for y in (ratio, high, low)]
    return RunTime(*found)  # the upper ends are there first


def fall(
    times: Sequence[float],
    values: Sequence[float],
    low: Sequence[float],
    high: Sequence[float],
    tolerance: float,
    *,
    replicates: int = REPLICATES,
    seed: int = 0,
) -> RunTime:
    """When `values` are within `tolerance` of their lowest; low and high are the ends of their 95 % intervals."""
    t, y = _checked(times, values)
    half = (np.asarray(high, dtype=np.float64) - np.asarray(low, dtype=np.float64)) / 2
    time = falling_time(t, y, tolerance, half)
    best, rng = int(y.argmin()), np.random.default_rng(seed)
    centre = np.concatenate([-_isotonic(-y[: best + 1]), _isotonic(y[best:])[1:]])
    drawn = centre + rng.standard_normal([replicates, len(y)]) * half / _Z
    found = [falling_time(t, row, tolerance, half) for row in drawn]
    ends = np.sort([f.ends for f in found], axis=0)
    k = int(0.025 * replicates)
    low_end, high_end = ends[k, 0], ends[replicates - 1 - k, 1]
    lower = Time(float(t[0]), AT_MOST) if low_end <= 0 else Time(float(low_end))
    upper = Time(float(t[-1]), BEYOND) if math.isinf(high_end) else Time(float(high_end))
    return RunTime(time, min(lower, time, key=_order), max(upper, time, key=_order))


def size_times(by_size: dict[int, Sequence[RunTime]], confidence: float = 0.95) -> list[SizeTime]:
    """Times and intervals per size, ascending; see "Seeds" of the module."""
    from scipy.stats import t as student

    logs = {size: [math.log(r.time.value) for r in runs if r.time.verdict == AT] for size, runs in by_size.items()}
    spread = [np.asarray(x) - np.mean(x) for x in logs.values() if len(x) > 1]
    dof = sum(len(x) - 1 for x in spread)
    sd = math.sqrt(sum(float(x @ x) for x in spread) / dof) if dof else math.nan
    found = []
    for size, runs in sorted(by_size.items()):
        runs = tuple(runs)
        verdicts = {r.time.verdict for r in runs} - {AT}
        mean = math.exp(float(np.mean([math.log(r.time.value) for r in runs])))
        verdict = AT if not verdicts else verdicts.pop() if len(verdicts) == 1 else BEYOND
        reached = sum(r.time.verdict == AT for r in runs)
        if verdict != AT:
            low = high = time = Time(mean, verdict)
        elif dof:
            half = float(student.ppf((1 + confidence) / 2, dof)) * sd / math.sqrt(len(runs))
            time, low, high = Time(mean), Time(mean * math.exp(-half)), Time(mean * math.exp(half))
        else:
            time, low, high = Time(mean), runs[0].low, runs[0].high
        found.append(SizeTime(size, runs, time, low, high, not dof, reached))
    return found


def fit_slope(sizes: Sequence[SizeTime], confidence: float = 0.95) -> Slope | None:
    """How the time grows with |D|; None with fewer than two sizes in which every run has reached it.

    A size of which a run has only a bound is left out as a whole: its other runs would be the quick ones.
    """
    from scipy.stats import t as student

    whole = [s for s in sizes if s.reached == s.num_runs]
    if len(whole) < 2:
        return None
    x = np.array([math.log(s.size) for s in whole for _ in s.runs])
    y = np.array([math.log(r.time.value) for s in whole for r in s.runs])
    dx = x - x.mean()
    value = float(dx @ y / (dx @ dx))
    constant = float(y.mean() - value * x.mean())
    dof = len(x) - 2
    half = math.nan
    if dof > 0:
        residual = y - constant - value * x
        error = math.sqrt(float(residual @ residual) / dof / float(dx @ dx))
        half = float(student.ppf((1 + confidence) / 2, dof)) * error
    left_out = tuple(s.size for s in sizes if s.reached < s.num_runs)
    return Slope(value, value - half, value + half, constant, len(x), len(whole), left_out)


def _checked(times: Sequence[float], values: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    t, y = np.asarray(times, dtype=np.float64), np.asarray(values, dtype=np.float64)
    if t.ndim != 1 or not t.size or t.shape != y.shape or not (t > 0).all() or not (np.diff(t) > 0).all():
        raise ValueError(f"A curve over time needs as many values as ascending times above 0, not {t} and {y}.")
    if not np.isfinite(y).all():
        raise ValueError("A curve over time needs finite values.")
    return t, y


def _isotonic(y: np.ndarray) -> np.ndarray:
    """The non-decreasing values nearest to `y` in squares; pools of adjacent violators."""
    blocks: list[list[float]] = []  # mean, number
    for value in y.tolist():
        blocks.append([value, 1])
        while len(blocks) > 1 and blocks[-2][0] >= blocks[-1][0]:
            (a, m), (b, n) = blocks[-2:]
            blocks[-2:] = [[(a * m + b * n) / (m + n), m + n]]
    return np.repeat([b[0] for b in blocks], [int(b[1]) for b in blocks])


def _first(t: np.ndarray, y: np.ndarray, level: float, curved: bool = False) -> Time:
    """The first time at which non-decreasing `y` is at the level; between times it is linear in log t, or curved."""
    there = np.flatnonzero(y >= level)
    if not there.size:
        return Time(float(t[-1]), BEYOND)
    i = int(there[0])
    if i == 0:
        return Time(float(t[0]), AT_MOST)
    share = (level - y[i - 1]) / (y[i] - y[i - 1])
    if curved and len(t) > 2:
        share = _cubic_share(np.log(t), y, i, level)
    return Time(float(t[i - 1] * (t[i] / t[i - 1]) ** share))


def _cubic_share(x: np.ndarray, y: np.ndarray, i: int, level: float) -> float:
    """How far from x[i - 1] to x[i] the monotone cubic through non-decreasing `y` reaches the level, 0..1."""
    h, d = np.diff(x).tolist(), (np.diff(y) / np.diff(x)).tolist()

    def slope(k: int) -> float:  # weighted harmonic mean of the slopes on both sides; at the ends by three points
        if 0 < k < len(d):
            w, v = 2 * h[k] + h[k - 1], h[k] + 2 * h[k - 1]
            return (w + v) / (w / d[k - 1] + v / d[k]) if d[k - 1] > 0 and d[k] > 0 else 0.0
        a, b = (0, 1) if k == 0 else (-1, -2)
        end = ((2 * h[a] + h[b]) * d[a] - h[a] * d[b]) / (h[a] + h[b])
        return min(max(end, 0.0), 3 * d[a])

    width, s = h[i - 1], np.linspace(0, 1, 65)
    at = (2 * s**3 - 3 * s**2 + 1) * y[i - 1] + (3 * s**2 - 2 * s**3) * y[i]
    at += width * ((s**3 - 2 * s**2 + s) * slope(i - 1) + (s**3 - s**2) * slope(i))
    return float(np.interp(level, at, s))


def _order(time: Time) -> tuple[float, float]:
    return time.ends
