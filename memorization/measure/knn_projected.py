"""Nearest images on CPUs without fast int8 products: a few axes rule out nearly all of a large reference.

For any matrix A of spectral norm at most 1, |x - y|^2 = |A (x - y)|^2 + |B (x - y)|^2 with B = (1 - A^T A)^(1/2), and
|B (x - y)| >= |r(x) - r(y)| with r(x) = |B x| = (|x|^2 - |A x|^2)^(1/2). So the vectors x~ = (A x, r(x)) have
|x~ - y~| <= |x - y|, and L = |y~|^2 - 2 x~.y~ <= |x - y|^2 - |x~|^2: a product of width m + 1 in place of one over all
pixels. Images with L above the k-th of a handful of exact distances are out; the others are compared in integers.

A need not be exact: it is a matrix of integers of 8 bits, near the principal axes of the reference, divided by their
spectral norm (with room for the rounding of that norm). Then A x of pixels is an exact product of integers, and r(x)
comes from integers, too. x is taken from the rounded mean of the reference, so that x~ is short.

Rounding: x~ is right to float64 before it is rounded to float32, which moves it by at most u |x~|, u = 2^-24; so
|x~ - y~| by at most u S with S = |x~| + |y~|, and its square by 2 u S^2 at most. With g = (m + 1) u / (1 - (m + 1) u)
the product is off by g |x~| |y~| <= g S^2 / 4, so L by twice that; what is left (rounding |y~|^2, the difference, the
bound) is below 8 u S^2. Together (g / 2 + 16 u) S^2 has room.
"""

import itertools

import torch
from torch import Tensor

from memorization.measure.knn_products import UNIT

AXES = 191  # m: with r, products of width 192; the fastest of 63 to 255 on Fashion-MNIST
_SAMPLE = 4000  # images that the axes are taken from; any axes give the same results
_ITERATIONS = 3  # of the subspace iteration; likewise
_QUERIES = 256  # queries at a time, at most
_PRODUCTS = 1 << 24  # of queries and images that are held at a time, 64 MiB
_RUN = 32  # images of like norm that are ruled out together
_SHARE = 16  # a query that leaves more than N / _SHARE images is not decided here
_FLOATS = 1 << 20  # pixels of reference images that are made float32 at a time, 4 MiB
_SLICE = 1024  # pixels whose products of 8 bits float32 adds up exactly: 2^10 of at most 2^14


class Projection:
    """A reference set, projected."""

    def __init__(self, rows: Tensor):  # uint8 [N, size]
        self._pixels = (rows ^ 128).view(torch.int8)  # y - 128 in two's complement
        self._axes, self._scale = _axes(rows)  # int8 values in float32 [m, size]; A is their product
        self._center = _signed(rows[:: max(len(rows) // _SAMPLE, 1)]).mean(0).round()  # int8 values
        self._factors = torch.cat([self._axes, self._center[None]]).T.contiguous()  # [size, m + 1]
        self._of_center = _product(self._center[None], self._factors)[0]  # float64, exact
        projected, square, self._norm = self._project(rows)

        order = square.argsort(stable=True)
        more = -len(rows) % _RUN
        self._order = torch.cat([order, order[-1:].repeat(more)])
        square = square[self._order]
        square[len(rows) :] = torch.inf
        self._square = square.to(torch.float32).view(-1, _RUN)  # [runs, 32]
        self._least = self._square[:, 0]
        self._projected = projected[self._order].T  # [m + 1, runs * 32]
        self._largest = float(square[: len(rows)].amax().sqrt())
        width = len(self._projected)
        self._floats = torch.empty(_FLOATS // _SLICE, min(_SLICE, rows.shape[1]))
        self._relative = width * UNIT / (1 - width * UNIT) / 2 + 16 * UNIT

    def _project(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x~ in float32 [n, m + 1], its square in float64, and |x - 128|^2, int64."""
        projected, square, norm = [], [], []
        for part in rows.split(2048):
            part = _signed(part)
            n = sum(s.square().sum(1).to(torch.float64) for s in part.split(_SLICE, 1))
            p = _product(part, self._factors)  # of x; the last column with the mean
            whole = n - 2 * p[:, -1] + self._of_center[-1]  # |x - mean|^2
            p = (p[:, :-1] - self._of_center[:-1]) * self._scale
            rest = (whole - p.square().sum(1)).clamp_(min=0).sqrt_()
            x = torch.cat([p, rest[:, None]], 1)
            square.append(x.square().sum(1))
            projected.append(x.to(torch.float32))
            norm.append(n.to(torch.int64))
        return torch.cat(projected), torch.cat(square), torch.cat(norm)

    def search(self, rows: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
        """||x - y||^2 and index of the k nearest, int64 [n, k]; and which queries it has decided, bool [n].

        Parameters
        ----------
        rows : uint8 [n, size]
        k : at most 30
        """
        columns = self._projected.shape[1]
        product = torch.empty(min(len(rows), _QUERIES, max(_PRODUCTS // columns, 1)), columns)
        found = [self._some(part, k, product[: len(part)]) for part in rows.split(len(product))]
        return tuple(torch.cat(parts) for parts in zip(*found))

    def _some(self, rows: Tensor, k: int, product: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, square, norm = self._project(rows)
        exact = _signed(rows)
        product = torch.mm(x, self._projected, out=product).view(len(x), -1, _RUN)
        low = torch.sub(self._least, product.amax(2), alpha=2)  # of runs

        # A handful of exact distances: of the images with the smallest L in the runs with the smallest.
        handful = low.topk(min(k + 2, low.shape[1]), dim=1, largest=False).indices
        query = torch.arange(len(x)).repeat_interleave(handful.shape[1])
        scores = self._scores(product, query, handful.flatten()).view(len(x), -1)
        place = scores.topk(k + 2, dim=1, largest=False).indices
        near = self._order[handful.gather(1, place // _RUN) * _RUN + place % _RUN]
        kth = self._distances(exact, norm, near.flatten(), [k + 2] * len(x)).view(len(x), -1).topk(k, largest=False)
        error = self._relative * (square.sqrt() + self._largest).square()
        bound = (kth.values[:, -1] - square + error).to(torch.float32)

        query, run = (low <= bound[:, None]).nonzero().T
        kept = (self._scores(product, query, run) <= bound[query, None]).nonzero().T
        query, index = query[kept[0]], self._order[run[kept[0]] * _RUN + kept[1]]
        counts = query.bincount(minlength=len(x))
        decided = counts <= len(self._pixels) // _SHARE
        keep = decided[query]
        query, index, counts = query[keep], index[keep], counts * decided
        key = self._distances(exact, norm, index, counts.tolist()) * len(self._pixels) + index
        # The k smallest keys of each query: sorted by key, and then, stably, by query.
        order = key.argsort()
        order = order[query[order].argsort(stable=True)]
        first = (counts.cumsum(0) - counts)[decided]
        key = key[order[first[:, None] + torch.arange(k)]]
        value, nearest = (torch.zeros(len(x), k, dtype=torch.int64) for _ in "vi")
        value[decided], nearest[decided] = key // len(self._pixels), key % len(self._pixels)
        return value, nearest, decided

    def _scores(self, product: Tensor, query: Tensor, run: Tensor) -> Tensor:
        """L of the members of runs, [found, 32]."""
        return torch.sub(self._square[run], product[query, run], alpha=2)

    def _distances(self, exact: Tensor, norm: Tensor, index: Tensor, counts: list[int]) -> Tensor:
        """||x - y||^2 of the first query and the first counts[0] rows of `index`, and so on; int64 [sum of counts]."""
        total = self._norm[index] + norm.repeat_interleave(torch.tensor(counts))
        products, ends = torch.empty(len(index)), list(itertools.accumulate(counts))
        for i in range(0, exact.shape[1], _SLICE):
            queries, query, first = exact[:, i : i + _SLICE].unbind(), 0, 0
            for start in range(0, len(index), len(self._floats)):
                y = self._pixels[:, i : i + _SLICE].index_select(0, index[start : start + len(self._floats)])
                y = self._floats[: len(y), : y.shape[1]].copy_(y)  # new memory for each would take longer than the rest
                while first < start + len(y):
                    stop = min(ends[query], start + len(y))
                    if first < stop:
                        torch.mv(y[first - start : stop - start], queries[query], out=products[first:stop])
                    first, query = stop, query + (stop == ends[query])
            total -= 2 * products.to(torch.int64)
        return total


def _signed(rows: Tensor) -> Tensor:
    """uint8 less 128, in float32."""
    return rows.to(torch.float32).sub_(128)


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a [n, size] @ b [size, m] of 8-bit integers in float32, exact; float64."""
    return sum((s @ t).to(torch.float64) for s, t in zip(a.split(_SLICE, 1), b.split(_SLICE)))


def _axes(rows: Tensor) -> tuple[Tensor, float]:
    """Integers of 8 bits near the principal axes [m, size], in float32, and the scale that makes their norm at most 1.

    Axes by subspace iteration on some of the images (Halko, Martinsson, Tropp 2011, algorithm 4.4).
    """
    size = rows.shape[1]
    sample = rows[:: max(len(rows) // _SAMPLE, 1)].to(torch.float32)
    sample -= sample.mean(0)
    axes = torch.randn(size, min(AXES, size), generator=torch.Generator().manual_seed(0))
    for _ in range(_ITERATIONS):
        axes = torch.linalg.qr(sample.T @ (sample @ axes)).Q
    axes = (axes * (127 / axes.abs().amax(0).clamp_(min=1e-9))).round().T.contiguous()
    axes *= torch.linalg.vector_norm(axes, dim=1).reciprocal()[:, None]  # of like length,
    axes = (axes * (127 / axes.abs().amax().clamp_(min=1e-9))).round()  # in whole numbers up to 127
    gram = axes.to(torch.float64)
    gram = gram @ gram.T
    return axes, float(torch.linalg.eigvalsh(gram)[-1].clamp(min=1) * (1 + 1e-9)) ** -0.5
