"""Exact nearest neighbours of uint8 images or of float vectors: d1 and d2 of the memorization criteria.

Filter and refine. Nearest by ||x - y||^2 is nearest by the score |y|^2 - 2 x.y. The products x.y of a block of
queries with a block of the reference come from one matrix product, in the cheapest arithmetic that allows a
guarantee; an interval [low, high] then surely holds the score:

- uint8 images: products of int8 pixels are exact, so low = high, and neighbours are ranked by the integers
  score * N + index, which has no ties;
- float vectors: products are float32 and the interval is as wide as a proven bound of their rounding error; what
  could be among the k nearest is computed again in float64.

When k items have high <= bound, no item with low > bound is among the k nearest. Most are ruled out 32 at a time:
the reference is sorted by norm and cut into groups, and min |y|^2 - 2 max x.y bounds the scores of a group. Groups
of all norms are dealt to each block like cards, so that the first block already gives a good bound. CPUs without int8
products rule out most images of a large reference by a few principal axes (`knn_projected`).
"""

import math
import warnings
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from memorization.measure import knn_products as products
from memorization.measure.knn_dense import DensePixels, DenseVectors
from memorization.measure.knn_products import ALIGNED, UNIT, Scaled, steps, vector_distances
from memorization.measure.knn_projected import AXES, Projection
from torch_utils import distributed as dist

_GROUP = 32  # reference rows that are ruled out together
_BLOCK = 2048  # reference rows per matrix product
_QUERIES = 2048  # queries per matrix product
_OPERAND = 1 << 26  # bytes of each operand of a matrix product, at most
_CHUNK = 1 << 27  # bytes of queries at a time, at most
_ROWS = 1 << 14  # queries at a time, at most
_HELD = 1 << 29  # bytes of prepared reference that are held; a larger one is prepared block by block in each call
_MANY_QUERIES, _MANY_ROWS = 1024, 1 << 13  # from where a projection pays
_TRIED = 1024  # queries after which is asked whether it does
_LISTED = 1 << 20  # items that are looked at one by one at a time


def plain_neighbors(
    images: np.ndarray, reference: np.ndarray, k: int = 2
) -> tuple[np.ndarray, np.ndarray]:  # distance [n, k], index [n, k]
    """The definition, plainly: what all searches here equal, for a few images at a time.

    uint8 images [n, ...]: root-mean-square pixel difference from 64-bit integers. Floats [n, ...]: Euclidean distance
    in float64. Ties go to the lower index.
    """
    pixels = images.dtype == np.uint8
    wide, size = np.int64 if pixels else np.float64, math.prod(images.shape[1:])
    x, y = (a.reshape(len(a), size).astype(wide) for a in (images, reference))
    squared = np.array([np.square(row - y).sum(axis=1) for row in x]).reshape(len(x), len(y))
    distance = np.sqrt(squared / y.shape[1] if pixels else squared)
    index = distance.argsort(axis=1, kind="stable")[:, :k]
    return np.take_along_axis(distance, index, axis=1), index


def nearest_neighbors(
    images: np.ndarray | Tensor,  # uint8 [n, C, H, W] or float [n, F]
    reference: np.ndarray | Tensor,  # uint8 [N, C, H, W] or float [N, F]
    k: int = 2,  # neighbours per image
    *,
    device: str | torch.device | None = None,  # where to compute; None: where `images` is
    block: int | None = None,  # reference images per matrix product
    dense: bool | None = None,  # see `Neighbors`
) -> tuple[np.ndarray, np.ndarray]:
    """Find the `k` nearest reference images of each image, exactly: `Neighbors(reference).query(images, k)`.

    Use `Neighbors` for several calls with the same reference.

    Returns
    -------
    distance : float64 [n, k], ascending.
    index : int64 [n, k], row of `reference`.

    Raises
    ------
    ValueError
        As `Neighbors` and its `query`.
    """
    images = _as_rows(images, "images")
    return Neighbors(reference, device=device or images.device, block=block, dense=dense).query(images, k)


class Neighbors:
    """A reference set, prepared for many searches of nearest neighbours.

    Images are compared by the root-mean-square pixel difference ||x - y||_2 / sqrt(C*H*W), in 0..255 units, and
    float vectors by ||x - y||_2. Results are those of a brute force: in 64-bit integers for images, in float64 for
    vectors, whose squares are added in an order that depends on F alone. Neighbours at the same distance come in the
    order of their indices, so an image that is there twice is found as two neighbours, the lower index first.

    Memory. Besides the reference itself, which is kept and not copied: on the CPU a rearranged copy (int8 or float32)
    where it takes at most 512 MiB, up to 128 MiB of rearranged queries, and blocks of at most 64 MiB; below 1 GiB in
    all for k up to 50. On CUDA a copy where it takes at most half of the free memory, and blocks of 1 to 2 GiB.

    Parameters
    ----------
    reference : uint8 [N, C, H, W], or floating point [N, F], finite; may be a memory-mapped file. It must not change
        later.
    device : torch device of the computation; default the device of `reference`.
    shard : each process prepares and searches only its part of `reference`, rows N*rank/world to N*(rank+1)/world.
        All processes pass the same reference, and make every call together.
    block : rows of `reference` per matrix product; None: 2048, or what is fast on the device where it is dense.
    dense : True: all pairs are compared by a few large operations that never wait for the device (`knn_dense`); what
        does not fit a GPU is streamed through it. False: most pairs are ruled out (filter and refine, above). None:
        dense on CUDA. Results are the same.

    Raises
    ------
    ValueError
        If `reference` is neither uint8 [N, C, H, W] nor finite floats [N, F], or `block` is below 1 or so large that a
        block would have 2^36 pixels.

    References
    ----------
    Higham, Accuracy and Stability of Numerical Algorithms, 2002, Section 3.1 (rounding errors of inner products).
    """

    def __init__(
        self,
        reference: np.ndarray | Tensor,  # uint8 [N, C, H, W] or float [N, F]
        *,
        device: str | torch.device | None = None,
        shard: bool = False,
        block: int | None = None,
        dense: bool | None = None,
    ):
        rows = _as_rows(reference, "reference")
        size = rows[0].numel() if len(rows) else 1
        if block is not None and block < 1:
            raise ValueError(f"block must be at least 1, not {block}.")
        if (block or 1) * size >= 2**36:
            raise ValueError(f"Blocks of {block} images of {size} pixels are too large; lower `block`.")
        if max(len(rows), 1) * size >= 2**46 or (size >= 2**22 and rows.ndim == 2):
            # N times the scores of pixels must fit into int64, and F 2^-24 be small.
            raise ValueError(f"{len(rows)} rows of {size} numbers are too many for one search.")
        self.device = torch.device(device) if device is not None else rows.device
        self.shape = tuple(rows.shape[1:])
        self._count, self._shard = len(rows), shard and dist.get_world_size() > 1
        rank, world = (dist.get_rank(), dist.get_world_size()) if self._shard else (0, 1)
        first, end = (len(rows) * r // world for r in (rank, rank + 1))
        self._images = rows.dtype == torch.uint8
        self._kind = "images" if self._images else "vectors"
        self._rows, self._first = rows[first:end], first
        self._part = self._make_part(block, self.device.type == "cuda" if dense is None else dense)

    def _make_part(self, block: int | None, dense: bool) -> "_Part | DensePixels | DenseVectors":
        given = (self._rows.flatten(1), self._first, self._count, self.device)
        if not dense:
            return (_Pixels if self._images else _Vectors)(*given, block or _BLOCK)
        if self._images:
            return DensePixels(*given, block)
        return DenseVectors(*given, block, exact=lambda: _Vectors(*given, _BLOCK))

    def __len__(self) -> int:
        return self._count

    @torch.no_grad()
    def query(self, images: np.ndarray | Tensor, k: int = 2) -> tuple[np.ndarray, np.ndarray]:
        """Find the `k` nearest reference rows of each image or vector, exactly.

        With `shard`, all processes call this together, each with its own images, which may be of different number or
        none, and get their own results, the same bit for bit as without `shard`.

        Parameters
        ----------
        images : uint8 [n, C, H, W] or floats [n, F], of the size of the reference; n may be 0.
        k : number of neighbours, 1 <= k <= N.

        Returns
        -------
        distance : float64 [n, k], ascending.
        index : int64 [n, k], row of `reference`.

        Raises
        ------
        ValueError
            If the images are of another kind or size than the reference, or there are fewer than `k` reference
            images. With `shard` on all processes, if on one.
        """
        counts, queries = self._check(images, k)
        step = min(_CHUNK // (queries.shape[1] * queries.element_size()), _ROWS)
        step = max(step // len(counts), 1)
        distance, index = [np.empty((0, k))], [np.empty((0, k), dtype=np.int64)]
        for start in range(0, max(counts), step):
            sizes = [min(max(count - start, 0), step) for count in counts]
            with torch.autocast(self._part.device.type, enabled=False):  # whatever the caller's network computes in
                d, i = self._nearest(queries[start : start + step], sizes, k)
            distance.append(self._part.distance(d).cpu().numpy())
            index.append(i.cpu().numpy())
        return np.concatenate(distance), np.concatenate(index)

    def self_query(self, k: int = 1) -> tuple[np.ndarray, np.ndarray]:
        """Find the `k` nearest other reference rows of each reference row.

        A row is left out of its own neighbours by its index, so an exact duplicate is a neighbour at distance 0.
        With `shard`, all processes call this together, and all get the whole result.

        Returns
        -------
        distance : float64 [N, k], ascending.
        index : int64 [N, k], never the row itself.

        Raises
        ------
        ValueError
            If there are no more than `k` reference rows.
        """
        if not 1 <= k < len(self):
            raise ValueError(
                f"{k} nearest others need at least {max(k, 1) + 1} reference {self._kind} and k >= 1; "
                f"there are {len(self)} reference {self._kind}."
            )
        distance, index = self.query(self._rows, k + 1)
        own = index == self._first + np.arange(len(index))[:, np.newaxis]
        own[~own.any(axis=1), k] = True  # not even among its k + 1 nearest: there are so many duplicates before it
        distance, index = distance[~own].reshape(-1, k), index[~own].reshape(-1, k)
        if self._shard:
            distance, index = (np.concatenate(dist.gather(part)) for part in (distance, index))
        return distance, index

    def _check(self, images: np.ndarray | Tensor, k: int) -> tuple[list[int], Tensor]:
        """Numbers of queries of all ranks, and this rank's queries [n, size]; or the same error on all ranks."""
        queries, problem = None, None
        try:
            queries = _as_rows(images, "images")
            self._check_queries(queries, k)
        except ValueError as err:
            problem = err
        if not self._shard:
            if problem is not None:
                raise problem
            return [len(queries)], queries.flatten(1)
        told = dist.gather((str(problem) if problem else None, k, 0 if problem else len(queries)))
        for message, asked, _ in told:
            if message is not None:
                raise ValueError(message)
            if asked != k:
                raise ValueError(f"The processes ask for {k} and {asked} neighbours; ask for the same number.")
        queries = queries.flatten(1)
        return [count for *_, count in told], queries if self._images else queries.to(torch.float64)

    def _check_queries(self, queries: Tensor, k: int) -> None:
        if (queries.dtype == torch.uint8) != self._images:
            own, other = ("uint8 images", "float vectors") if self._images else ("float vectors", "uint8 images")
            raise ValueError(f"The images are {other}, the reference {own}; compare like with like.")
        if tuple(queries.shape[1:]) != self.shape:
            given, own = _describe(tuple(queries.shape[1:])), _describe(self.shape)
            raise ValueError(
                f"The {self._kind} are {given}, the reference {self._kind} {own}; "
                f"compare {self._kind} of one {'size and one number of channels' if self._images else 'length'}."
            )
        if not 1 <= k <= len(self):
            raise ValueError(
                f"{k} nearest neighbours need at least {max(k, 1)} reference {self._kind} and k >= 1; "
                f"there are {len(self)} reference {self._kind}."
            )

    def _nearest(self, queries: Tensor, sizes: list[int], k: int) -> tuple[Tensor, Tensor]:
        """Ranks by distance (see `_Part.search`) and indices of this rank's queries; `sizes` on each rank."""
        if not self._shard:
            return self._part.search(queries, k)
        everyone = torch.cat([part[:size] for part, size in zip(_all_gather(queries, max(sizes)), sizes)])
        found = self._part.search(everyone, k)
        mine = slice(sum(sizes[: dist.get_rank()]), sum(sizes[: dist.get_rank() + 1]))
        value, index = (torch.cat([part[mine] for part in _all_gather(x, len(everyone))], dim=1) for x in found)
        # The parts come in the order of their indices, and so do equal distances in each: stable sorting is enough.
        order = value.argsort(dim=1, stable=True)[:, :k]
        return value.gather(1, order), index.gather(1, order)


# ----------------------------------------------------------------------------
# Filter and refine, for rows of either kind.


class _Block(NamedTuple):
    """Reference rows in L groups of g. Column m * L + j of a product with them belongs to member m of group j."""

    matrix: Tensor  # [g * L, dim], to take products with
    norm: Tensor  # [L, g], |y|^2
    index: Tensor  # int64 [L, g], rows of the whole reference; -1 fills up the last group


class _Queries(NamedTuple):
    """Some encoded queries."""

    matrix: Tensor  # [q, dim], to take products with
    norm: Tensor  # [q]; |x|^2 of pixels, |x| of vectors
    rows: Tensor  # [q, size], as given


class _Best:
    """What can be among the k nearest of some queries: parallel lists of query, low, high and index."""

    def __init__(self, count: int, k: int, unbounded: Tensor):
        self.count, self.k = count, k
        self.bound = unbounded.repeat(count)  # k items of each query have high <= bound: one with low > bound is out
        none = torch.empty(0, dtype=torch.int64, device=unbounded.device)
        self.items = (none, none.to(unbounded.dtype), none.to(unbounded.dtype), none)
        self._added: list[tuple[Tensor, ...]] = []

    @property
    def empty(self) -> bool:
        return not self._added and not len(self.items[0])

    def add(self, *items: Tensor) -> None:
        """Add items that are not above the bounds; settle when there are as many of them as neighbours asked for."""
        self._added.append(items)
        if sum(len(query) for query, *_ in self._added) >= self.k * self.count:
            self.settle()

    def settle(self) -> None:
        """Lower the bounds to the k-th smallest `high` of each query, and drop what lies above."""
        if not self._added:
            return
        query, low, high, index = (torch.cat(parts) for parts in zip(self.items, *self._added))
        self._added = []
        order, place = _places(self.count, query, high)
        kth = order[place == self.k - 1]
        self.bound[query[kth]] = torch.minimum(self.bound[query[kth]], high[kth])
        keep = low <= self.bound[query]
        self.items = (query[keep], low[keep], high[keep], index[keep])


class _Part:
    """A contiguous part of a reference set, cut into blocks. Subclasses say how rows are compared."""

    dtype: torch.dtype  # of the matrices that are multiplied
    dim: int  # their columns
    unbounded: Tensor  # [], larger than any score
    nothing: Tensor  # [], larger than any value

    def __init__(self, rows: Tensor, first: int, total: int, device: torch.device, block: int):
        self.rows, self.first, self.total, self.device = rows, first, total, device
        norm = self._prepare()
        width = self.dim * self.dtype.itemsize
        columns = max(min(block, _OPERAND // width, len(rows)), 1)
        group = min(_GROUP, columns)
        order = norm.argsort(stable=True)
        filler = -len(order) % group  # repeats the last row, which changes neither extremes nor products of a group
        index = pad(order + first, (0, filler), value=-1).view(-1, group)
        order = torch.cat([order, order[-1:].repeat(filler)]).view(-1, group)
        blocks = -(-len(order) // (columns // group))
        self._layout = [(order[i::blocks], norm[order[i::blocks]], index[i::blocks]) for i in range(blocks)]
        self._step = max(min(_QUERIES, _OPERAND // width), 1)
        room = _HELD if device.type == "cpu" else torch.cuda.mem_get_info(device)[0] // 2
        self._held = [self._block(i) for i in range(blocks)] if len(rows) * width <= room else None

    # What subclasses define.

    def _prepare(self) -> Tensor:
        """Set the attributes, and return |y|^2 of the rows, [N] on the CPU."""
        raise NotImplementedError

    def _matrix(self, rows: Tensor) -> Tensor:
        """Rows as they are multiplied, [n, size] -> [n, dim]."""
        raise NotImplementedError

    def _norm(self, rows: Tensor) -> Tensor:
        """`_Queries.norm`, [n, size] -> [n]."""
        raise NotImplementedError

    def _products(self, a: Tensor, b: Tensor) -> Tensor:
        """a [q, dim] @ b [r, dim]^T, contiguous; valid until the next call."""
        raise NotImplementedError

    def _score(self, product: Tensor, square: Tensor, index: Tensor | int) -> Tensor:
        """|y|^2 - 2 x.y, or what has the same order, from x.y and |y|^2."""
        raise NotImplementedError

    def _error(self, norm: Tensor, square: Tensor) -> Tensor | int:
        """Bound of the error of the score, from `_Queries.norm` and |y|^2; it grows with both."""
        raise NotImplementedError

    def _value(self, queries: _Queries, items: tuple[Tensor, ...]) -> Tensor:
        """What items are ranked by, exactly."""
        raise NotImplementedError

    def distance(self, value: Tensor) -> Tensor:
        """Values as distances, float64."""
        raise NotImplementedError

    # What they share.

    def search(self, rows: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """The k nearest of this part to each of `rows` [n, size]: value and index, [n, k], ascending by both.

        Where the part has fewer than k rows, the last places hold `nothing` and the size of the whole reference.
        """
        value = self.nothing.repeat(len(rows), k)
        index = torch.full((len(rows), k), self.total, device=self.device)
        if not len(rows) or not self._layout:
            return value, index
        queries = [_Queries(self._matrix(some), self._norm(some), some) for some in rows.split(self._step)]
        best = [_Best(len(q.rows), k, self.unbounded) for q in queries]
        for i in range(len(self._layout)):
            block = self._held[i] if self._held is not None else self._block(i)
            for q, found in zip(queries, best):
                self._look(block, q, found)
        for i, (q, found) in enumerate(zip(queries, best)):
            found.settle()
            exact = self._refine(q, found)
            query, *_, nearest = found.items
            place = _places(found.count, query)[1]
            value[i * self._step + query, place] = exact
            index[i * self._step + query, place] = nearest
        return value, index

    def _block(self, i: int) -> _Block:
        order, norm, index = self._layout[i]
        rows = self.rows[order.T.flatten().to(self.rows.device)]
        return _Block(self._matrix(rows), norm.to(self.device), index.to(self.device))

    def _look(self, block: _Block, queries: _Queries, best: _Best) -> None:
        """Add to `best` what the block has to offer."""
        groups, size = block.norm.shape
        product = self._products(queries.matrix, block.matrix).view(-1, size, groups)
        top, near, far = product.amax(dim=1), block.norm.amin(dim=1), block.norm.amax(dim=1)
        error = self._error(queries.norm[:, None], far)
        if best.empty and groups >= best.k:  # each group has a row whose score is at most this
            high = self._score(top, far, self.total - 1) + error
            best.bound = high.topk(best.k, dim=1, largest=False).values[:, -1]
        low = self._score(top, near, 0) - error
        for found in (low <= best.bound[:, None]).nonzero().split(_LISTED // size):
            query, group = found.T
            square, index = block.norm[group], block.index[group]  # [found, g]
            score = self._score(product[query, :, group], square, index)
            error = self._error(queries.norm[query, None], square)
            keep = (score <= best.bound[query, None] + error) & (index >= 0)
            which = keep.flatten().nonzero().flatten()
            query, index, score = query[which // size], index.flatten()[which], score.flatten()[which]
            error = error.flatten()[which] if isinstance(error, Tensor) else error
            best.add(query, score - error, score + error, index)
            if len(best.items[0]) > 4 * best.k * best.count:  # never with exact scores
                self._refine(queries, best)

    def _refine(self, queries: _Queries, best: _Best) -> Tensor:
        """Keep the k nearest items of each query, by `_value` and then by index; return their values."""
        query, *_, index = best.items
        value = self._value(queries, best.items)
        order, place = _places(best.count, query, value, index)
        order = order[place < best.k]
        best.items = tuple(item[order] for item in best.items)
        return value[order]


def _places(count: int, query: Tensor, *keys: Tensor) -> tuple[Tensor, Tensor]:
    """The order of items by query and then by `keys`, and the place of each so ordered item within its query."""
    order = torch.arange(len(query), device=query.device)
    for key in (*reversed(keys), query):
        order = order[key[order].argsort(stable=True)]
    sizes = query.bincount(minlength=count)
    return order, torch.arange(len(query), device=query.device) - (sizes.cumsum(0) - sizes)[query[order]]


# ----------------------------------------------------------------------------
# uint8 images.


class _Pixels(_Part):
    """Images [N, C*H*W], ranked by integers.

    With a = x - 128 and b = y - 128 in [-128, 127], ||x - y||^2 = |a|^2 + (|b|^2 - 2 a.b). Pixels that have one value
    in all rows of the part are left out of a.b and of |b|^2; their (x - y)^2 goes to |a|^2.
    """

    dtype = torch.int8
    _projection: Projection | None = None
    _asked = 0  # queries so far

    def search(self, rows: Tensor, k: int) -> tuple[Tensor, Tensor]:
        self._asked += len(rows)
        if not self._pays(k):
            return super().search(rows, k)
        if self._projection is None:
            self._projection = Projection(self.rows)
        found, left = [], []  # left: queries that are not decided
        for start in range(0, len(rows), _TRIED):
            if 2 * len(left) > start:  # noise, perhaps: about as far from all images
                left += range(start, len(rows))
                found.append((torch.zeros(len(rows) - start, k, dtype=torch.int64),) * 2)
                break
            value, index, decided = self._projection.search(rows[start : start + _TRIED], k)
            found.append((value, index + self.first))
            left += ((~decided).nonzero()[:, 0] + start).tolist()
        value, index = (torch.cat(parts) for parts in zip(*found))
        if left:
            value[left], index[left] = super().search(rows[left], k)
        return value, index

    def _pays(self, k: int) -> bool:
        """Whether a projection does: for many queries and a large reference, without fast products of int8."""
        size, count = self.rows.shape[1], len(self.rows)
        large = self._asked >= _MANY_QUERIES and count >= _MANY_ROWS and 4 * count * (AXES + 1) <= _HELD // 2
        large = large and k <= _GROUP - 2 and 2 * AXES <= size
        return large and {self.device.type, self.rows.device.type} == {"cpu"} and not products.int8_works(self.device)

    def _prepare(self) -> Tensor:
        self.unbounded = self.nothing = torch.tensor(torch.iinfo(torch.int64).max, device=self.device)
        low = torch.full(self.rows.shape[1:], 255, dtype=torch.uint8)
        high = torch.zeros_like(low)
        for part in steps(self.rows) if len(self.rows) else ():
            low = torch.minimum(low, part.amin(dim=0).cpu())
            high = torch.maximum(high, part.amax(dim=0).cpu())
        varying = low < high
        count = int(varying.sum())
        self.dim = max(-(-count // ALIGNED), 1) * ALIGNED
        self._filler = self.dim - count
        self._varying = None if varying.all() else varying.nonzero().flatten().to(self.device)
        self._centre = torch.where(varying, 128, low.to(torch.int32)).to(self.device)
        self._out = torch.empty(0, dtype=torch.int32, device=self.device)
        return self._norm(self.rows).cpu()

    def _matrix(self, rows: Tensor) -> Tensor:
        rows = rows.to(self.device)
        if self._varying is not None:
            rows = rows.index_select(1, self._varying)
        rows = (rows ^ 128).view(torch.int8)  # x - 128 in two's complement
        return pad(rows, (0, self._filler)) if self._filler else rows

    def _norm(self, rows: Tensor) -> Tensor:
        # Sums of int32 are int64.
        return torch.cat([(part.to(self.device) - self._centre).square().sum(dim=1) for part in steps(rows)])

    def _products(self, a: Tensor, b: Tensor) -> Tensor:
        if products.int8_works(self.device) and len(self._out) < len(a) * len(b):
            self._out = self._out.new_empty(len(a) * len(b))
        out = self._out[: len(a) * len(b)].view(len(a), len(b)) if len(self._out) else None
        return products.pixel_products(a, b, out)

    def _score(self, product: Tensor, square: Tensor, index: Tensor | int) -> Tensor:
        return (square - 2 * product.to(torch.int64)) * self.total + index

    def _error(self, norm: Tensor, square: Tensor) -> int:
        return 0

    def _value(self, queries: _Queries, items: tuple[Tensor, ...]) -> Tensor:
        """||x - y||^2, int64."""
        query, low, *_ = items
        return low.div(self.total, rounding_mode="floor") + queries.norm[query]

    def distance(self, value: Tensor) -> Tensor:
        return (value.to(torch.float64) / self.rows.shape[1]).sqrt()


# ----------------------------------------------------------------------------
# Float vectors.


class _Vectors(_Part):
    """Vectors [N, F], ranked by float64 distances.

    Candidates come from float32. With the mean m of the rows and a power of two s, X = s (x - m) and Y = s (y - m) are
    rounded to x' and y' in float32, and scores are |y'|^2 - 2 x'.y'. Let S = |x'| + |y'| and u = 2^-24.

    - Rounding to float32 moves |X - Y| by at most u (|x'| + |y'|) = u S, and |X - Y|^2 - |x'|^2 therefore by 2 u S^2
      (and terms in u^2).
    - The float32 product has an error of at most gamma |x'| |y'| <= gamma S^2 / 4, gamma = F u / (1 - F u), in
      any order of summation (Higham 2002, Eq. 3.5). It counts twice.
    - Underflow adds less than F 2^-120, as |Y| <= 1 and |x'| < 2^60. Larger |X| are not multiplied: nothing is known of
      their scores.

    So the error is at most (gamma / 2 + 2.1 u) S^2 + F 2^-120, where the tenth covers u^2 and the rounding of float64.
    """

    dtype = torch.float32

    def _prepare(self) -> Tensor:
        self.unbounded = self.nothing = torch.tensor(torch.inf, dtype=torch.float64, device=self.device)
        self.dim = self.rows.shape[1]
        self._scaled = Scaled(self.rows, self.device)
        gamma = self.dim * UNIT / (1 - self.dim * UNIT)
        self._relative, self._absolute = gamma / 2 + 2.1 * UNIT, self.dim * 2.0**-120
        return self._norm(self.rows).square().cpu()

    def _matrix(self, rows: Tensor) -> Tensor:
        return self._scaled.matrix(rows)

    def _norm(self, rows: Tensor) -> Tensor:
        return torch.cat([self._scaled.rounded(part)[1] for part in steps(rows)])

    def _products(self, a: Tensor, b: Tensor) -> Tensor:
        with products.full_float32():
            return products.float32_product(a, b)

    def _score(self, product: Tensor, square: Tensor, index: Tensor | int) -> Tensor:
        return square - 2 * product.to(torch.float64)

    def _error(self, norm: Tensor, square: Tensor) -> Tensor:
        return self._relative * (norm + square.sqrt()).square() + self._absolute

    def _value(self, queries: _Queries, items: tuple[Tensor, ...]) -> Tensor:
        """||x - y||, float64, the same for a pair of vectors wherever and with whatever else it is computed."""
        query, *_, index = items
        parts = [torch.empty(0, dtype=torch.float64, device=self.device)]
        for which in steps(torch.stack([query, index - self.first], dim=1), self.dim):
            x, y = (rows[i.to(rows.device)].to(self.device) for rows, i in zip((queries.rows, self.rows), which.T))
            parts.append(vector_distances(x, y))
        return torch.cat(parts)

    def distance(self, value: Tensor) -> Tensor:
        return value


# ----------------------------------------------------------------------------
# Small things.


def _all_gather(rows: Tensor, longest: int) -> list[Tensor]:
    """The rows of all ranks, each filled up to `longest`."""
    device = rows.device
    if torch.distributed.get_backend() == "nccl":
        rows = rows.to(torch.device("cuda", torch.cuda.current_device()))
    else:
        rows = rows.cpu()
    rows = pad(rows, (0, 0, 0, longest - len(rows))).contiguous()
    parts = [torch.empty_like(rows) for _ in range(dist.get_world_size())]
    torch.distributed.all_gather(parts, rows)
    return [part.to(device) for part in parts]


def _as_rows(data: np.ndarray | Tensor, name: str) -> Tensor:
    """Images or vectors as a tensor that shares their memory where it can; ValueError if they are neither."""
    if isinstance(data, np.ndarray) and data.dtype in (np.uint8, np.float16, np.float32, np.float64):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # a memory-mapped file is read-only; nothing writes to it
            data = torch.from_numpy(np.require(data, requirements=["C"]))
    is_tensor = isinstance(data, Tensor) and 0 not in data.shape[1:]
    if is_tensor and data.dtype == torch.uint8 and data.ndim == 4:
        return data
    if is_tensor and data.dtype.is_floating_point and data.ndim == 2:
        if len(data) and not torch.stack([(part.abs() < 1e150).all() for part in steps(data)]).all():
            raise ValueError(f"`{name}` holds numbers that are not finite (or beyond 1e150); drop these vectors.")
        return data
    kind = str(getattr(data, "dtype", type(data).__name__)).removeprefix("torch.")
    found = f"{kind} {list(getattr(data, 'shape', []))}"
    raise ValueError(
        f"`{name}` must be uint8 images [n, C, H, W], pixels 0..255, or float vectors [n, F], not {found}."
    )


def _describe(shape: tuple[int, ...]) -> str:
    if len(shape) == 1:
        return f"of length {shape[0]}"
    channels, height, width = shape
    return f"{height}x{width} with {channels} channel{'s' * (channels != 1)}"
