"""How good generated images are, by their distribution: distances and overlaps with images that nobody trained on.

x are vectors (pixels or features) of generated images [n, d], y those of the reference [m, d]. The Fréchet distance and
the kernel distance compare the distributions as a whole; precision, recall, density and coverage compare their
supports, by balls that reach from each image to its k-th nearest neighbour in its own set. Everything goes in blocks:
memory is that of the vectors and of d x d, and the time grows with n and m, not with their squares, for measures that
compare all pairs take at most `PAIRS` images of a set at once (see `kernel` and `manifold`).

docs/criteria.md has what each interval holds, and how often it does in simulations.

References
----------
Heusel et al., "GANs Trained by a Two Time-Scale Update Rule Converge to a Local Nash Equilibrium", 2017, Eq. 6.
Bińkowski et al., "Demystifying MMD GANs", 2018, Section 3.
Kynkäänniemi et al., "Improved Precision and Recall Metric for Assessing Generative Models", 2019, Eqs. 1 and 2.
Naeem et al., "Reliable Fidelity and Diversity Metrics for Generative Models", 2020, Eqs. 5 and 6.
Politis & Romano, "Large Sample Confidence Regions Based on Subsamples under Minimal Assumptions", 1994.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from memorization.measure.knn import Neighbors
from memorization.measure.knn_products import vector_distances
from memorization.stats.intervals import exact_interval

PAIRS = 10_000  # images of a set that are compared with each other pair by pair
CONFIDENCE = 0.95
GROUPS = 20  # parts that the interval of a share is made of, at most
_PER_GROUP = 20  # images of each set in a part, at least
_BLOCK = 1024  # images at a time
_TIE = 1e-11  # relative error up to which a product of float64 may be wrong about a squared distance
_REFINED = 1 << 24  # numbers at a time where distances are computed again


@dataclass(frozen=True)
class Measure:
    """What is measured, and which way is better."""

    name: str
    label: str  # on an axis
    lower_is_better: bool
    source: str
    neighbours: int = 0  # k of the balls; 0: none


MEASURES = {
    m.name: m
    for m in [
        Measure("frechet", "Fréchet distance", True, "Heusel et al. 2017"),
        Measure("kernel", "kernel distance", True, "Bińkowski et al. 2018"),
        Measure("precision", "precision", False, "Kynkäänniemi et al. 2019", 3),
        Measure("recall", "recall", False, "Kynkäänniemi et al. 2019", 3),
        Measure("density", "density", False, "Naeem et al. 2020", 5),
        Measure("coverage", "coverage", False, "Naeem et al. 2020", 5),
    ]
}


class Estimate(NamedTuple):
    """A value with its interval."""

    value: float
    low: float
    high: float
    bias: float | None = None  # how much too high `value` is for its number of images; None: not known, or unbiased

    def record(self, biased: bool = False) -> dict[str, float | None]:
        """For a record; with `bias`, if `biased`."""
        entry: dict[str, float | None] = {"value": self.value, "ci_low": self.low, "ci_high": self.high}
        return entry | ({"bias": self.bias} if biased else {})


class _Moments(NamedTuple):
    mean: np.ndarray  # float64 [d]
    cov: np.ndarray  # float64 [d, d], unbiased
    root: np.ndarray  # its symmetric root


class Vectors:
    """Vectors of a set of images, with what comparisons need of one set, each computed once.

    Parameters
    ----------
    rows : uint8 [n, C, H, W] pixels, which are compared as x / 127.5 - 1, or floating point [n, d] features
    device : where to compute
    """

    def __init__(self, rows: np.ndarray, device: torch.device | str = "cpu"):
        self.rows, self.device = rows, torch.device(device)
        self.dimensions = math.prod(rows.shape[1:])
        self._radii: dict[int, np.ndarray] = {}
        self._parts: dict[int, list[Vectors]] = {}

    def __len__(self) -> int:
        return len(self.rows)

    def block(self, rows: slice | np.ndarray) -> Tensor:
        """These vectors, float64 [b, d]."""
        x = self.raw(rows)
        return x / 127.5 - 1 if self.rows.dtype == np.uint8 else x

    def raw(self, rows: slice | np.ndarray) -> Tensor:
        """These vectors as they were given, pixels as 0..255; float64 [b, d]."""
        part = torch.from_numpy(np.ascontiguousarray(self.rows[rows]))
        return part.to(self.device).to(torch.float64).flatten(1)

    def blocks(self) -> Iterator[Tensor]:
        """All vectors, float64, block by block."""
        for part in slices(len(self)):
            yield self.block(part)

    @cached_property
    def moments(self) -> _Moments:
        """Mean and unbiased covariance, in two passes."""
        mean = sum(x.sum(0) for x in self.blocks()) / len(self)
        cov = torch.zeros(self.dimensions, self.dimensions, dtype=torch.float64, device=self.device)
        for x in self.blocks():
            x = x - mean
            cov.addmm_(x.T, x)
        cov = (cov / (len(self) - 1)).cpu().numpy()
        return _Moments(mean.cpu().numpy(), cov, symmetric_root(cov))

    def parts(self, count: int) -> list["Vectors"]:
        """The vectors dealt into so many parts."""
        if count not in self._parts:
            dealt = (Vectors(self.rows[start::count], self.device) for start in range(count))
            self._parts[count] = [self] if count == 1 else list(dealt)
        return self._parts[count]

    @cached_property
    def first(self) -> "Vectors":
        """The first `PAIRS` of them."""
        return Vectors(self.rows[:PAIRS], self.device)

    @cached_property
    def kernel_means(self) -> Tensor:
        """Mean over the others of k(x_i, x_j), float64 [n]; see `kernel`."""
        total = torch.zeros(len(self), dtype=torch.float64, device=self.device)
        for some in slices(len(self)):
            a = self.block(some)
            for others in slices(len(self)):
                if others.start < some.start:
                    continue  # by symmetry
                values = (a @ self.block(others).T / self.dimensions + 1) ** 3
                if others == some:
                    values.fill_diagonal_(0)
                else:
                    total[others] += values.sum(0)
                total[some] += values.sum(1)
        return total / (len(self) - 1)

    def radii(self, k: int) -> np.ndarray:
        """Distance of each vector to its k-th nearest other one, in units of `Neighbors`."""
        if not any(known >= k for known in self._radii):
            self._radii[k] = Neighbors(self.rows, device=self.device).self_query(k)[0]
        known = min(known for known in self._radii if known >= k)
        return self._radii[known][:, k - 1]


def symmetric_root(matrix: np.ndarray) -> np.ndarray:
    """The positive symmetric root of a positive semidefinite matrix; rounding errors below zero are taken as zero."""
    import scipy.linalg

    value, vector = scipy.linalg.eigh(matrix)
    value[value < max(value[-1], 0) * len(value) * np.finfo(np.float64).eps] = 0
    return (vector * np.sqrt(value)) @ vector.T


def slices(count: int, step: int = _BLOCK) -> list[slice]:
    """Consecutive parts of `count` rows."""
    return [slice(first, min(first + step, count)) for first in range(0, count, step)]


# ----------------------------------------------------------------------------
# Fréchet distance.


def frechet(x: Vectors, y: Vectors) -> Estimate:
    """Fréchet distance of normal distributions with the moments of x and y (FID, where the features are Inception's).

        F = |mu_x - mu_y|^2 + tr(S_x + S_y - 2 (S_x S_y)^(1/2)),

    where tr (S_x S_y)^(1/2) is the sum of the singular values of S_y^(1/2) S_x^(1/2), with symmetric roots: all of it
    real, also where a covariance is singular.

    Interval: F is smooth in the moments, and those are means over images. With T_x the matrix of the optimal map from
    N(mu_x, S_x) to N(mu_y, S_y), an image x moves F by

        h(x) = 2 (mu_x - mu_y).(x - mu_x) + (x - mu_x)^T (I - T_x) (x - mu_x) - its mean,

    to first order, likewise y; hence Var F = Var h(x) / n + Var h(y) / m (the infinitesimal jackknife, Efron 1982). It
    holds the mean of F at these n and m. `bias`, how far that lies above the distance of the distributions, is of order
    1/n + 1/m, so that halves have twice of it (Quenouille 1949; Chong & Forsyth 2020): mean F of two halves, less F.

    Raises
    ------
    ValueError
        If a set has fewer than two images.
    """
    import scipy.linalg

    _at_least(x, y, 2)
    a, b = x.moments, y.moments
    left, singular, right = scipy.linalg.svd(b.root @ a.root)
    value = _frechet(a, b, singular)
    inverse = np.zeros_like(singular)
    kept = singular > singular[0] * len(singular) * np.finfo(np.float64).eps
    inverse[kept] = 1 / singular[kept]
    maps = []  # S^(1/2) U s^-1 U^T S^(1/2): where the other distribution's root and singular vectors make the map
    for root, vectors in ((b.root, left), (a.root, right.T)):
        half = root @ vectors
        maps.append((half * inverse) @ half.T)
    variance = 0.0
    for data, own, other, to in ((x, a, b, maps[0]), (y, b, a, maps[1])):
        variance += _spread(data, own.mean, own.mean - other.mean, np.eye(len(to)) - to) / len(data)
    bias = None
    if min(len(x), len(y)) // 2 > x.dimensions:
        pairs = zip(x.parts(2), y.parts(2))
        bias = float(np.mean([_frechet(p.moments, q.moments) for p, q in pairs])) - value
    return _normal(value, variance, low=0.0)._replace(bias=bias)


def _frechet(a: _Moments, b: _Moments, singular: np.ndarray | None = None) -> float:
    import scipy.linalg

    singular = scipy.linalg.svdvals(b.root @ a.root) if singular is None else singular
    squared = float(np.square(a.mean - b.mean).sum())
    return max(squared + float(np.trace(a.cov) + np.trace(b.cov) - 2 * singular.sum()), 0.0)


def _spread(data: Vectors, mean: np.ndarray, shift: np.ndarray, matrix: np.ndarray) -> float:
    """Variance over images of 2 shift.(x - mean) + (x - mean)^T matrix (x - mean)."""
    mean, shift, matrix = (torch.from_numpy(part).to(data.device) for part in (mean, shift, matrix))
    parts = []
    for x in data.blocks():
        x = x - mean
        parts.append(2 * x @ shift + ((x @ matrix) * x).sum(1))
    return float(torch.cat(parts).var())


# ----------------------------------------------------------------------------
# Kernel distance.


def kernel(x: Vectors, y: Vectors) -> Estimate:
    """Squared maximum mean discrepancy with the kernel k(x, y) = (x.y / d + 1)^3, unbiased (KID).

        mean over i != j of k(x_i, x_j) + mean over i != j of k(y_i, y_j) - 2 mean over i, j of k(x_i, y_j)

    over all pairs. Sets of more than `PAIRS` images are dealt into as many parts as that needs, and the distances of
    part to part averaged, which is unbiased, too. Interval: of a U-statistic by the means of the images (its
    infinitesimal jackknife, Efron 1982), h(x_i) = 2 (mean over j of k(x_i, x_j) - mean over j of k(x_i, y_j)), and
    Var = Var h(x) / n + Var h(y) / m.

    Raises
    ------
    ValueError
        If a set has fewer than two images for each part.
    """
    count = -(-max(len(x), len(y)) // PAIRS)
    _at_least(x, y, 2 * count)
    values, variance = [], 0.0
    for p, q in zip(x.parts(count), y.parts(count)):
        rows, columns = _kernel_sums(p, q)
        values.append(0.0)
        for own, across, others in ((p, rows, len(q)), (q, columns, len(p))):
            mean = own.kernel_means - across / others  # of each image, h / 2
            values[-1] += float(mean.mean())
            variance += 4 * float(mean.var()) / len(own) / count**2
    return _normal(float(np.mean(values)), variance)


def _kernel_sums(p: Vectors, q: Vectors) -> tuple[Tensor, Tensor]:
    """Sums over the other set of k(p_i, q_j): [n] and [m]."""
    rows, columns = (torch.zeros(len(data), dtype=torch.float64, device=p.device) for data in (p, q))
    for some in slices(len(p)):
        a = p.block(some)
        for others in slices(len(q)):
            values = (a @ q.block(others).T / p.dimensions + 1) ** 3
            rows[some] += values.sum(1)
            columns[others] += values.sum(0)
    return rows, columns


# ----------------------------------------------------------------------------
# Precision, recall, density, coverage.


def manifold(x: Vectors, y: Vectors, names: Sequence[str]) -> dict[str, Estimate]:
    """Precision, recall, density and coverage of x against the reference y, those of `names`.

    With B_k(y_j) the closed ball around y_j that reaches to its k-th nearest other one among y, likewise of x,

        precision = share of x_i in any B_3(y_j),        recall = share of y_j in any B_3(x_i),
        density = mean over i of #{j: x_i in B_5(y_j)} / 5,    coverage = share of j with any x_i in B_5(y_j).

    Radii are exact (`Neighbors`), and so is who lies within. Of more than `PAIRS` images of a set the first are taken.

    Interval: by subsampling (Politis & Romano 1994). The sets are dealt into B <= `GROUPS` parts each; the values of
    part against part vary over the draw of generated and of reference images, radii included, and balls are local, so
    that Var = (variance of the parts' values) / B. A share has the exact binomial interval of as many images as have
    that variance (at most those that there are), widened as Student's t with B - 1 degrees of freedom is; density the
    normal one. With fewer than `_PER_GROUP` images for each of two parts it is the interval for independent images.

    Raises
    ------
    ValueError
        If a set that needs balls has no more than k images.
    """
    for name in names:
        data, which = (x, "generated") if name == "recall" else (y, "reference")
        if (k := MEASURES[name].neighbours) >= len(data):
            raise ValueError(
                f"{name} needs more than {k} {which} images to have {k} neighbours; there are {len(data)}."
            )
    x, y = (data if len(data) <= PAIRS else data.first for data in (x, y))
    counts = _hits(x, y, names)
    groups = min(GROUPS, min(len(x), len(y)) // _PER_GROUP)
    values = []
    if groups > 1:
        parts = zip(x.parts(groups), y.parts(groups))
        values = [{name: _score(name, hits) for name, hits in _hits(p, q, names).items()} for p, q in parts]
    estimates = {}
    for name, hits in counts.items():
        variance = _subsampled([v[name] for v in values]) if values else None
        value = _score(name, hits)
        if name == "density":
            variance = (
                float(hits.var(ddof=1)) / len(hits) / MEASURES[name].neighbours ** 2 if variance is None else variance
            )
            estimates[name] = _normal(value, variance, low=0.0)
        else:
            estimates[name] = _share(value, len(hits), variance)
    return estimates


def _hits(x: Vectors, y: Vectors, names: Sequence[str]) -> dict[str, np.ndarray]:
    """Per generated image in how many balls it lies; for recall and coverage per reference image how many match it."""
    n, m = len(x), len(y)
    bounds = {name: (x if name == "recall" else y).radii(MEASURES[name].neighbours) for name in names}
    hits = {name: np.zeros(m if name in ("recall", "coverage") else n, dtype=np.int64) for name in names}
    for some in slices(n):
        for others in slices(m):
            squared = _SquaredDistances(x, y, some, others)
            for name, radius in bounds.items():
                inside = squared.within(radius[some, None] if name == "recall" else radius[None, others])
                if name in ("recall", "coverage"):
                    hits[name][others] += inside.sum(0).cpu().numpy()
                else:
                    hits[name][some] += inside.sum(1).cpu().numpy()
    return hits


def _score(name: str, hits: np.ndarray) -> float:
    return float(hits.mean() / MEASURES[name].neighbours if name == "density" else (hits > 0).mean())


def _subsampled(values: Sequence[float]) -> float:
    """Variance of the whole by the values of its parts, as large as Student's t asks for few parts."""
    from scipy.special import ndtri, stdtrit

    level = (1 + CONFIDENCE) / 2
    wider = float(stdtrit(len(values) - 1, level) / ndtri(level)) ** 2
    return wider * float(np.var(values, ddof=1)) / len(values)


def _share(value: float, count: int, variance: float | None) -> Estimate:
    """The exact interval of as many independent images, up to `count`, as give a share this variance."""
    alone = value * (1 - value) / count
    number = count if variance is None or alone == 0 else count * alone / max(variance, alone)
    return Estimate(value, *exact_interval(value * number, number, CONFIDENCE))


class _SquaredDistances:
    """|x_i - y_j|^2 of a block, and an exact comparison with squared radii.

    Products of pixels are exact in float64. Those of features are not, so that pairs as near to the bound as the error
    may be are computed again, as `Neighbors` computes distances.
    """

    def __init__(self, x: Vectors, y: Vectors, some: slice, others: slice):
        self.a, self.b = x.raw(some), y.raw(others)
        self.pixels = x.rows.dtype == np.uint8
        self.size = x.dimensions
        norms = self.a.square().sum(1)[:, None] + self.b.square().sum(1)[None]
        self.squared = norms - 2 * self.a @ self.b.T
        self.error = 0 * norms if self.pixels else _TIE * norms

    def within(self, radius: np.ndarray) -> Tensor:
        """Which pairs are at most `radius` ([n, 1] or [1, m], in units of `Neighbors`) apart, bool [n, m]."""
        radius = torch.from_numpy(radius).to(self.a.device)
        bound = (radius.square() * self.size).round() if self.pixels else radius.square()
        inside = self.squared <= bound
        if not self.pixels:
            near = ((self.squared - bound).abs() <= self.error).nonzero()
            radius = radius.expand(inside.shape)
            for part in near.split(max(_REFINED // self.size, 1)):
                i, j = part.T
                inside[i, j] = vector_distances(self.a[i], self.b[j]) <= radius[i, j]
        return inside


# ----------------------------------------------------------------------------


def compare(x: Vectors, y: Vectors, names: Sequence[str]) -> dict[str, Estimate]:
    """These measures (keys of `MEASURES`) of x against the reference y, in the order of `names`.

    Raises
    ------
    ValueError
        If there are too few images.
    """
    balls = [name for name in names if MEASURES[name].neighbours]
    found = manifold(x, y, balls) if balls else {}
    found |= {name: measure(x, y) for name, measure in (("frechet", frechet), ("kernel", kernel)) if name in names}
    return {name: found[name] for name in names}


def _at_least(x: Vectors, y: Vectors, count: int) -> None:
    if min(len(x), len(y)) < count:
        raise ValueError(f"At least {count} images on each side are needed, not {len(x)} and {len(y)}.")


def _normal(value: float, variance: float, low: float = -math.inf) -> Estimate:
    from scipy.special import ndtri

    half = float(ndtri((1 + CONFIDENCE) / 2)) * math.sqrt(variance)
    return Estimate(value, max(value - half, low), value + half)
