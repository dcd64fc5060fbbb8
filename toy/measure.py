"""Which generated points are memorized, and how far the generated distribution is from the true one.

A generated point x is memorized when its nearest training point is closer than its nearest test point by the ratio r,

    r |x - nearest training point| < |x - nearest test point|,

and it counts for the group of that training point. Where training and test points are drawn alike and x knows neither,
this happens by chance with probability 1 / (1 + r^2) in two dimensions; `ToyData.fresh` measures it.
"""

from dataclasses import dataclass

import numpy as np
from scipy.spatial import cKDTree

from toy.data import GROUPS, ToyData

_DIRECTIONS = 16


@dataclass(frozen=True)
class Counts:
    """The verdict on generated points."""

    nearest: np.ndarray  # int64 [3], points whose nearest training point is of the group
    memorized: np.ndarray  # int64 [3], of these, memorized ones
    hits: np.ndarray  # bool [N], training points that are memorized; a point and its copies together
    by_point: np.ndarray  # int64 [2, N], memorized points and all points whose nearest training point is this one
    distance: float  # sliced Wasserstein distance to fresh draws of the same distribution


class Neighbours:
    """Compares points with the data of one repeat; all processors search.

    Parameters
    ----------
    data : of the repeat
    """

    def __init__(self, data: ToyData):
        self.data = data
        self._rows = np.flatnonzero(data.origin == np.arange(len(data.origin)))  # copies at a distance stay in the tree
        moved = (data.train != data.train[data.origin]).any(axis=1)
        self._rows = np.union1d(self._rows, np.flatnonzero(moved))
        self._train, self._test = cKDTree(data.train[self._rows]), cKDTree(data.test)
        angles = np.pi * (np.arange(_DIRECTIONS) + 0.5) / _DIRECTIONS
        self._directions = np.stack([np.cos(angles), np.sin(angles)])  # [2, directions]
        self._sorted = np.sort(data.fresh @ self._directions, axis=0)

    def measure(self, points: np.ndarray, ratio: float) -> Counts:
        """Count `points` [n, 2] by the definition of the module."""
        to_train, which = self._train.query(points, workers=-1)
        to_test, _ = self._test.query(points, workers=-1)
        nearest = self._rows[which]
        memorized = ratio * to_train < to_test
        origins = np.zeros(len(self.data.train), dtype=bool)
        origins[self.data.origin[nearest[memorized]]] = True
        group_of = self.data.group
        group = group_of[nearest]
        return Counts(
            nearest=np.bincount(group, minlength=len(GROUPS)),
            memorized=np.bincount(group[memorized], minlength=len(GROUPS)),
            hits=origins[self.data.origin],
            by_point=np.stack([np.bincount(rows, minlength=len(group_of)) for rows in (nearest[memorized], nearest)]),
            distance=self.distance(points),
        )

    def distance(self, points: np.ndarray) -> float:
        """Sliced 2-Wasserstein distance to `ToyData.fresh`, over 16 directions."""
        own = np.sort(points @ self._directions, axis=0)
        if len(own) != len(self._sorted):
            at = (np.arange(len(self._sorted)) + 0.5) / len(self._sorted)
            own = np.quantile(own, at, axis=0, method="hazen")
        return float(np.sqrt(((own - self._sorted) ** 2).mean()))


def neighbour_distance(train: np.ndarray, k: int = 10) -> np.ndarray:
    """Distance of each training point to its k-th nearest other one, float64 [N]: the usual detector of outliers.

    Copies are other points, as a detector that knows of no copies sees them.
    """
    k = min(k, len(train) - 1)
    distance, _ = cKDTree(train).query(train, k=[k + 1], workers=-1)
    return distance[:, 0]
