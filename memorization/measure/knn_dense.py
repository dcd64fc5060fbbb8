"""Nearest neighbours densely, for GPUs: a constant number of large operations per block, none of which waits.

uint8 images. Scores |y|^2 - 2 x.y of all pairs are exact integers. Rows of the reference are taken in runs of 32. Let
(m, g) be the smallest score of run g, and g: the k nearest images, by score and then by index, lie in the k runs with
the smallest (m, g). Were there k smaller ones than that of an image's own run, each would hold an image with a smaller
score, or with the same score and a smaller index.

Float vectors. Scores are lower bounds L in float32; the `CANDIDATES` + k rows with the smallest L are computed in
float64, and the result is exact where the k-th distance lies below the largest L among them. Other queries (equal
distances en masse, vectors that float32 cannot tell apart) are found in one look at the device, and searched again by
filter and refine. With x', y' as in `Scaled`, S = |x'| + |y'|, T = s^2 |x - y|^2 - |x'|^2, u = 2^-24 and
gamma = (F + 1) u / (1 - (F + 1) u):

- |T - (|y'|^2 - 2 x'.y')| <= 2.1 u S^2, of rounding to float32;
- L is computed as (1 - r) |y'|^2 - 2 (x'.y' + (r |x'|) |y'|), whose bracket is one product of length F + 1. That is
  (|y'|^2 - 2 x'.y') - r (S^2 - |x'|^2) but for the error of the product, at most gamma (1 + r) S^2 / 4, which counts
  twice, and of rounding |y'|^2, |x'|, |y'| and the difference, at most 2.1 u S^2;
- so T >= L - r |x'|^2 - tiny if r S^2 >= (gamma (1 + r) / 2 + 4.2 u) S^2, that is r = (gamma / 2 + 4.2 u) /
  (1 - gamma / 2). We take 4.5 u, which covers float64's own rounding, too; underflow adds less than F 2^-119 = tiny.

References that do not fit the device come in blocks through pinned memory.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from memorization.measure import knn_products as products
from memorization.measure.knn_products import ALIGNED, UNIT, Scaled, vector_distances
from torch_utils.streaming import Stream

CANDIDATES = 64  # vectors per query and block beyond k that are computed in float64
_RUN = 32  # rows of the reference whose smallest score is taken together
_ROWS = 1 << 17  # rows of the reference in a block, at most
_LARGEST = torch.iinfo(torch.int64).max


class _Limits(NamedTuple):
    """What one step may take."""

    operand: int  # elements of a block of the reference
    scores: int  # scores at a time
    gathered: int  # elements in float64 at a time

    @classmethod
    def of(cls, device: torch.device) -> "_Limits":
        if device.type != "cuda":
            return cls(1 << 24, 1 << 24, 1 << 22)
        free = torch.cuda.mem_get_info(device)[0]
        return cls(min(1 << 29, free // 32), min(1 << 28, free // 64), min(1 << 26, free // 256))


class _Dense:
    """A contiguous part of a reference set. Subclasses say how rows are compared."""

    nothing: Tensor  # [], larger than any value

    def __init__(self, rows: Tensor, first: int, total: int, device: torch.device, block: int | None = None):
        self.rows, self.first, self.total, self.device = rows, first, total, device
        self._limits = _Limits.of(device)
        self._prepare()
        most = min(_ROWS, max(self._limits.operand // rows.shape[1], _RUN), max(len(rows), 1))
        self._block_rows = -(-min(most, block or most) // _RUN) * _RUN
        self._stream = Stream(rows, device)
        self._held = list(self._blocks()) if self._fits() else None

    # What subclasses define.

    def _prepare(self) -> None:
        raise NotImplementedError

    def _width(self) -> int:
        """Bytes of a row that are held."""
        raise NotImplementedError

    def _encode(self, start: int, rows: Tensor) -> NamedTuple:
        """A block of the reference, from rows on the device."""
        raise NotImplementedError

    def search(self, rows: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """The k nearest of this part to each of `rows` [n, size]: value and index, [n, k], ascending by both.

        Where the part has fewer than k rows, the last places hold `nothing` and the size of the whole reference.
        """
        raise NotImplementedError

    def distance(self, value: Tensor) -> Tensor:
        """Values as distances, float64."""
        raise NotImplementedError

    # What they share.

    def _fits(self) -> bool:
        """Whether the encoded reference may stay on the device."""
        size = len(self.rows) * self._width()
        if self.device.type != "cuda":
            return size <= 1 << 29
        return size <= torch.cuda.mem_get_info(self.device)[0] // 2

    def _blocks(self) -> Iterator[NamedTuple]:
        for start, rows in self._stream(self._block_rows):
            yield self._encode(start, rows)

    def _pass(self, queries: tuple[Tensor, ...], look: Callable) -> list[tuple[Tensor, ...]]:
        """`look(queries, block, found so far)` of some queries at a time, over all blocks."""
        step = max(self._limits.scores // self._block_rows, _RUN)
        parts = list(zip(*(q.split(step) for q in queries)))
        found: list[tuple[Tensor, ...] | None] = [None] * len(parts)
        for block in self._held if self._held is not None else self._blocks():
            for i, part in enumerate(parts):
                found[i] = look(part, block, found[i])
        return found

    def _fill(self, value: Tensor, index: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """[n, k] from what was found, whose rows beyond the part's end are none; indices of the whole reference."""
        none = index >= len(self.rows)
        value, index = torch.where(none, self.nothing, value), torch.where(none, self.total, index + self.first)
        more = k - value.shape[1]
        if more > 0:
            value = torch.cat([value, self.nothing.expand(len(value), more)], 1)
            index = torch.cat([index, index.new_full((len(index), more), self.total)], 1)
        return value, index


def _fill_up(rows: Tensor, columns: int) -> Tensor:
    """Zeros for whole runs of rows, and for `columns`."""
    n, m = -len(rows) % _RUN, columns - rows.shape[1]
    return pad(rows, (0, m, 0, n)) if n or m else rows


# ----------------------------------------------------------------------------
# uint8 images.


class _PixelBlock(NamedTuple):
    start: int
    matrix: Tensor  # int8 [R, dim], pixels - 128
    square: Tensor  # [R], their |y|^2; larger than any score in rows that fill up


class DensePixels(_Dense):
    """Images [N, C*H*W], ranked by the integers score * N + index."""

    def _prepare(self) -> None:
        self.nothing = torch.tensor(_LARGEST, device=self.device)
        self._dim = -(-self.rows.shape[1] // ALIGNED) * ALIGNED
        self._none = 3 * 2**14 * self.rows.shape[1] + 1  # scores are smaller
        self._dtype = torch.int32 if self._none < 2**31 else torch.int64
        self._padded = len(self.rows) + _RUN  # above any index in a run

    def _width(self) -> int:
        return self._dim + self._dtype.itemsize

    def _matrix(self, rows: Tensor) -> Tensor:
        return (rows ^ 128).view(torch.int8)  # x - 128 in two's complement

    def _squares(self, matrix: Tensor) -> Tensor:
        """|x|^2, int64 [n]."""
        some = max(self._limits.operand // 4 // matrix.shape[1], 1)
        return torch.cat([part.to(torch.int32).square_().sum(1) for part in matrix.split(some)])

    def _encode(self, start: int, rows: Tensor) -> _PixelBlock:
        matrix = self._matrix(rows)
        square = pad(self._squares(matrix).to(self._dtype), (0, -len(rows) % _RUN), value=self._none)
        return _PixelBlock(start, _fill_up(matrix, self._dim), square)

    def search(self, rows: Tensor, k: int) -> tuple[Tensor, Tensor]:
        if not len(rows) or not len(self.rows):
            return self._fill(*(torch.empty(len(rows), 0, dtype=torch.int64, device=self.device) for _ in "vi"), k)
        matrix = self._matrix(rows.to(self.device))
        norm = self._squares(matrix)[:, None]
        matrix = pad(matrix, (0, self._dim - matrix.shape[1])) if self._dim != matrix.shape[1] else matrix
        found = self._pass((matrix,), lambda part, block, best: self._look(*part, block, best, k))
        key = torch.cat([best for (best,) in found])
        return self._fill(key.div(self._padded, rounding_mode="floor") + norm, key.remainder(self._padded), k)

    def _look(
        self, matrix: Tensor, block: _PixelBlock, best: tuple[Tensor] | None, k: int
    ) -> tuple[Tensor]:  # keys, ascending
        score = products.pixel_products(matrix, block.matrix).to(self._dtype)
        torch.sub(block.square, score, alpha=2, out=score)
        runs = score.view(len(score), -1, _RUN)  # [q, groups, 32]
        groups = runs.shape[1]
        low = runs.amin(2).to(torch.int64).mul_(groups).add_(torch.arange(groups, device=self.device))
        group = low.topk(min(k, groups), dim=1, largest=False, sorted=False).values.remainder_(groups)
        index, score = _members(runs, group)
        key = score.to(torch.int64).mul_(self._padded).add_(index).add_(block.start)
        if best is not None:
            key = torch.cat([*best, key], 1)
        return (key.topk(min(k, key.shape[1]), dim=1, largest=False).values,)

    def distance(self, value: Tensor) -> Tensor:
        return (value.to(torch.float64) / self.rows.shape[1]).sqrt()


def _members(runs: Tensor, group: Tensor) -> tuple[Tensor, Tensor]:
    """Index in the block and score of all members of the given groups, [q, groups * 32]."""
    score = runs.gather(1, group[:, :, None].expand(-1, -1, _RUN)).flatten(1)
    index = group[:, :, None] * _RUN + torch.arange(_RUN, device=group.device)
    return index.flatten(1), score


# ----------------------------------------------------------------------------
# Float vectors.


class _VectorBlock(NamedTuple):
    start: int
    matrix: Tensor  # float32 [R, F + 1], y' and |y'|
    square: Tensor  # float32 [R], (1 - r) |y'|^2; infinite in rows that fill up
    rows: Tensor  # [n, F] as given


class DenseVectors(_Dense):
    """Vectors [N, F], ranked by float64 distances."""

    def __init__(
        self,
        rows: Tensor,
        first: int,
        total: int,
        device: torch.device,
        block: int | None = None,
        *,
        exact: Callable,  # -> a part with `search`, for queries that float32 does not decide
    ):
        self._make_exact, self._exact = exact, None
        super().__init__(rows, first, total, device, block)

    def _prepare(self) -> None:
        self.nothing = torch.tensor(torch.inf, dtype=torch.float64, device=self.device)
        self._scaled = Scaled(self.rows, self.device)
        length = (self.rows.shape[1] + 1) * UNIT
        gamma = length / (1 - length)
        self._relative = (gamma / 2 + 4.5 * UNIT) / (1 - gamma / 2)
        self._tiny = self.rows.shape[1] * 2.0**-119

    def _width(self) -> int:
        return self.rows.shape[1] * (4 + self.rows.element_size())

    def _encode(self, start: int, rows: Tensor) -> _VectorBlock:
        matrix, norm = self._scaled.rounded(rows)
        square = (norm.square() * (1 - self._relative)).to(torch.float32)
        matrix = torch.cat([matrix, norm[:, None].to(torch.float32)], 1)
        square = pad(square, (0, -len(rows) % _RUN), value=torch.inf)
        return _VectorBlock(start, _fill_up(matrix, matrix.shape[1]), square, rows)

    def search(self, rows: Tensor, k: int) -> tuple[Tensor, Tensor]:
        if not len(rows) or not len(self.rows):
            value = torch.empty(len(rows), 0, dtype=torch.float64, device=self.device)
            return self._fill(value, value.to(torch.int64), k)
        given = rows.to(self.device)
        matrix, norm = self._scaled.rounded(given)
        matrix = torch.cat([matrix, (norm * self._relative)[:, None].to(torch.float32)], 1)
        matrix.masked_fill_(norm.isinf()[:, None], 0)
        found = self._pass((matrix, given), lambda part, block, best: self._look(*part, block, best, k))
        value, index, cut = (torch.cat(parts) for parts in zip(*found))
        value, index = self._fill(value, index, k)

        # All others are at least as far as `cut` says, which is infinite where there are none.
        square = norm.square()
        farthest = (value[:, -1] * self._scaled.scale).square() - square
        decided = (farthest < cut - self._relative * square - self._tiny) | (cut == torch.inf)
        undecided = (~decided).nonzero()[:, 0]  # the one look
        if len(undecided):
            if self._exact is None:
                self._exact = self._make_exact()
            value[undecided], index[undecided] = self._exact.search(given[undecided], k)
        return value, index

    def _look(
        self, matrix: Tensor, given: Tensor, block: _VectorBlock, best: tuple[Tensor, ...] | None, k: int
    ) -> tuple[Tensor, Tensor, Tensor]:  # distance and index, ascending by both; lower bound of the scores of others
        with products.full_float32():
            low = products.float32_product(matrix, block.matrix)
        torch.sub(block.square, low, alpha=2, out=low)
        runs = low.view(len(low), -1, _RUN)
        wanted = min(CANDIDATES + k, low.shape[1])
        group = runs.amin(2).topk(min(wanted, runs.shape[1]), dim=1, largest=False, sorted=False).indices
        index, low = _members(runs, group)
        low, place = low.topk(wanted, dim=1, largest=False)
        index = index.gather(1, place).sort(1).values
        cut = low[:, -1].to(torch.float64)
        if wanted >= len(block.rows):
            cut = torch.full_like(cut, torch.inf)
        value = self._distances(given, block.rows, index)
        index = index + block.start
        if best is not None:
            value, index = torch.cat([best[0], value], 1), torch.cat([best[1], index], 1)
            cut = torch.minimum(best[2], cut)
        value, place = value.sort(dim=1, stable=True)  # equal distances stay in the order of their indices
        return value[:, :k], index.gather(1, place[:, :k]), cut

    def _distances(self, given: Tensor, rows: Tensor, index: Tensor) -> Tensor:
        """||x - y|| of x [q, F] and the rows at index [q, C], infinite beyond the end; float64."""
        some = max(self._limits.gathered // (index.shape[1] * given.shape[1]), 1)
        parts = [
            vector_distances(x[:, None], rows[i.clamp(max=len(rows) - 1)])
            for x, i in zip(given.split(some), index.split(some))
        ]
        return torch.cat(parts).masked_fill_(index >= len(rows), torch.inf)

    def distance(self, value: Tensor) -> Tensor:
        return value
