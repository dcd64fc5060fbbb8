"""At which noise level the optimum's posterior over training images collapses onto one of them, from traces."""

import math
import os
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from training.trace import read_trace

LEVEL = 2  # fewer effective images than this: one of them has taken over


@dataclass(frozen=True)
class PosteriorCurve:
    """Effective number of training images at the points that a sampler visits, over its seeds; sigma descending."""

    size: int  # |D|
    seeds: int
    sigma: np.ndarray  # float64 [steps]
    median: np.ndarray  # float64 [steps]
    low: np.ndarray  # float64 [steps], first quartile
    high: np.ndarray  # float64 [steps], third quartile

    @property
    def collapse(self) -> float | None:
        """The noise level at which the median first falls below `LEVEL`, or None if it never does."""
        return crossing(self.sigma, self.median)

    @property
    def collapse_quartiles(self) -> tuple[float | None, float | None]:
        """The noise levels at which a quarter, and at which three quarters, of the seeds have fallen below it."""
        return crossing(self.sigma, self.low), crossing(self.sigma, self.high)


def crossing(sigma: np.ndarray, number: np.ndarray, level: float = LEVEL) -> float | None:
    """The noise level at which `number` [steps] first falls below `level`, or None if it never does.

    Between two steps log(number) is taken as linear in log(sigma); what begins below the level has crossed it
    at the first step.
    """
    below = np.flatnonzero(number < level)
    if not below.size:
        return None
    i = below[0]
    if i == 0:
        return float(sigma[0])
    (a, b), (s, t) = np.log(number[i - 1 : i + 1]), np.log(sigma[i - 1 : i + 1])
    return math.exp(s + (t - s) * (a - math.log(level)) / (a - b))


def posterior_curves(traces: Iterable[str | os.PathLike]) -> list[PosteriorCurve]:
    """One curve per |D| from the traces of `generate_optim.py --trace`, ascending; traces of one |D| are pooled.

    Raises
    ------
    OSError, ValueError
        If a file is no trace, there is none, or traces of one |D| visit different noise levels or hold the
        same seeds.
    """
    by_size: dict[int, dict[float, dict[int, float]]] = {}  # size -> sigma -> seed -> effective number
    for path in traces:
        table = read_trace(path)
        rows = zip(table["size"], table["sigma"], table["seed"], table["effective_number"])
        for size, sigma, seed, number in rows:
            seen = by_size.setdefault(int(size), {}).setdefault(float(sigma), {})
            if int(seed) in seen:
                raise ValueError(f'"{path}" repeats seed {int(seed)} of |D| = {int(size)}; name each trace once.')
            seen[int(seed)] = float(number)
    if not by_size:
        raise ValueError("There are no traces; write them with generate_optim.py --trace=FILE.")
    curves = []
    for size, numbers in sorted(by_size.items()):
        if len({frozenset(seen) for seen in numbers.values()}) > 1:
            raise ValueError(f"The traces of |D| = {size} visit different noise levels; give all the same sampler.")
        sigma = sorted(numbers, reverse=True)
        table = np.array([list(numbers[s].values()) for s in sigma])  # [steps, seeds]
        low, median, high = np.quantile(table, [0.25, 0.5, 0.75], axis=1)
        curves.append(PosteriorCurve(size, table.shape[1], np.array(sigma), median, low, high))
    return curves
