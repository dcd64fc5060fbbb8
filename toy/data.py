"""Two moons with injected outliers and near duplicates, a held-out test set, and fresh draws as a control.

Units. scikit-learn's `make_moons` puts its points on two half circles of radius 1. Here both coordinates are centred
and scaled by the mean and the standard deviation of the noise-free curves, so "2 standard deviations from the mean" is
a distance of 2 along each axis.
"""

import math
from dataclasses import dataclass

import numpy as np
from sklearn.datasets import make_moons

GROUPS = ("inlier", "duplicate", "outlier")
INLIER, DUPLICATE, OUTLIER = range(3)

_CENTER = np.array([0.5, 0.25])
_SCALE = np.array([math.sqrt(0.75), math.sqrt(9 / 16 - 1 / math.pi)])  # of the two half circles, in closed form
_OUTLIER_DISTANCE = 2.0  # standard deviations, along each axis


@dataclass(frozen=True)
class ToyData:
    """The points of one repeat. A point and its copies share an origin, and are counted as one point."""

    train: np.ndarray  # float32 [N, 2]; inliers, then outliers, then copies
    group: np.ndarray  # int8 [N], index in GROUPS; duplicates are the copies and the points that were copied
    origin: np.ndarray  # int64 [N], row of the point that this one is a copy of; its own row for all others
    test: np.ndarray  # float32 [M, 2], held out; with outliers only if they were asked for
    fresh: np.ndarray  # float32 [N, 2], new draws, in the same shares: what a model that learned the truth generates

    def originals(self) -> np.ndarray:
        """Number of points in each group with copies counted once, int64 [3]."""
        return np.bincount(self.group[self.origin == np.arange(len(self.origin))], minlength=len(GROUPS))

    def sizes(self) -> np.ndarray:
        """Number of points in each group with copies counted each, int64 [3]."""
        return np.bincount(self.group, minlength=len(GROUPS))


def make_data(
    seed: int,
    points: int = 20_000,  # inliers, before copies are added
    outliers: int = 400,  # points of the cluster
    duplicates: int = 400,  # copies, of so many different inliers
    jitter: float = 0.0,  # standard deviation of what is added to a copy; 0 = exact copies
    test_outliers: bool = False,  # put as many held-out points of the cluster into the test set
    noise: float = 0.05,  # of make_moons, in radii of a moon
    spread: float = 0.2,  # standard deviation of the cluster
    null: bool = False,  # labels without meaning: the negative control
) -> ToyData:
    """Draw the data of one repeat.

    The cluster of outliers is Gaussian and lies 2 standard deviations from the mean along each axis, in one of the
    four quadrants, chosen at random. Lengths are in the units of the module.

    With `null` outliers are drawn from the moons, and so are the points that would be copies, each its own origin:
    all sizes stay, and points of different groups can be exchanged.

    Raises
    ------
    ValueError
        If a number is negative, there are fewer than 2 points, or more duplicates than points.
    """
    if points < 2 or min(outliers, duplicates, jitter, noise, spread) < 0:
        raise ValueError(
            f"Two moons need at least 2 points, and no number below 0; given are {points} points, {outliers} outliers, "
            f"{duplicates} duplicates, jitter {jitter}, noise {noise}, spread {spread}."
        )
    if duplicates > points:
        raise ValueError(f"{duplicates} duplicates cannot be copies of different points: there are {points}.")
    rng = np.random.default_rng([seed, 0])
    center = _OUTLIER_DISTANCE * rng.choice([-1.0, 1.0], size=2)

    def moons(count: int) -> np.ndarray:
        x, _ = make_moons(max(count, 2), noise=noise, random_state=int(rng.integers(2**31)))  # in shuffled order
        return (x[:count] - _CENTER) / _SCALE

    def cluster(count: int) -> np.ndarray:
        return moons(count) if null else center + spread * rng.standard_normal((count, 2))

    inliers, outlying = moons(points), cluster(outliers)
    chosen = rng.choice(points, size=duplicates, replace=False)
    copies = moons(duplicates) if null else inliers[chosen] + jitter * rng.standard_normal((duplicates, 2))
    group = np.zeros(points + outliers + duplicates, dtype=np.int8)
    group[points : points + outliers] = OUTLIER
    group[points + outliers :] = group[chosen] = DUPLICATE
    origin = np.concatenate([np.arange(points + outliers), chosen])
    if null:
        origin = np.arange(len(origin))
    test = [moons(points), cluster(outliers if test_outliers else 0)]
    fresh = [moons(points), cluster(outliers), moons(duplicates)]
    return ToyData(
        train=np.concatenate([inliers, outlying, copies]).astype(np.float32),
        group=group,
        origin=origin,
        test=np.concatenate(test).astype(np.float32),
        fresh=np.concatenate(fresh).astype(np.float32),
    )
