"""The optimum evaluated densely: a constant number of large operations, none of which waits for the device.

For B rows u and N images v, in pixel units 0..255:

1. h = |v|^2 - 2 u.v in float32 [B, N], from one product. On CUDA pixels are bfloat16, which holds 0..255 exactly,
   and -2u is a sum of three bfloat16 terms (24 bits), multiplied as 3B rows with float32 results.
2. The `TOP` smallest h per row are computed again in float64: they hold what float32 could get wrong.
3. Their weights are float64; those of all others exp((h_min - h) / 2 sigma^2) in float32.
4. The mean is a float64 product over the former and a float32 one (on CUDA two bfloat16 terms) over the latter.

Others than the top ones enter with an error of their logits of a few 2^-24 |u| max|v| / 2 sigma^2. Where that exceeds
`ROUGH` and, times the weight that they carry, a hundredth of it, or where more images than the top ones lie within the
rounding error of the nearest (mass near-duplicates at small sigma), a row is `wide`: all its images are computed in
float64.

Images that do not lie on the device come in blocks through pinned memory, the next one copied while the last one is
computed; sums and top lists of blocks are merged, and what falls out of a top list joins the others.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from torch_utils.streaming import Stream
from training.optim_sums import Sums

TOP = 128  # images per row that are computed in float64
ROUGH = 1e-3  # error of logits up to which float32 serves where many images carry weight: their errors average out
_BYTES = 1 << 30  # of the arrays [B, block] of one block, together
_GATHERED = 1 << 30  # bytes of the top images in float64 at a time
_HIDDEN = 1e30  # |v|^2 - 2 u.v of an image that a row does not see
_LEAST = -80.0  # logits below are nothing; exp is slow where its results are denormal
_UNIT = 2.0**-24  # unit roundoff of float32


class Block(NamedTuple):
    """Some of the images, on the device of the computation."""

    start: int  # index of the first
    v: Tensor  # [n, dim], pixels: bfloat16 on CUDA, else float32
    square: Tensor  # float64 [n], |v|^2
    square32: Tensor  # the same in float32


Blocks = Callable[[int], Iterator[Block]]  # images per block, at most -> all images


def block_size(batch: int) -> int:
    """Images per block, so that what is computed of them for `batch` rows takes at most about 1 GiB."""
    return max(_BYTES // (28 * max(batch, 1)), 1 << 12)


def rounding(length: Tensor, largest: float) -> Tensor:
    """How wrong float32 makes |v|^2 - 2 u.v, [B]: 4 x 2^-24 (|u| + max|v|) max|v|, from |u| [B].

    Blocked float32 sums were seen to err by less than 2 x 2^-24 |u| |v|; `largest` is max|v|.
    """
    return (length + largest) * (4 * _UNIT * largest)


def rough_logits(u: Tensor, variance: Tensor, largest: float) -> Tensor:
    """How wrong float32 makes the logits of the rows, [B]."""
    return rounding(u.norm(dim=1), largest) / (2 * variance)


def dense_sums(
    blocks: Blocks,
    u: Tensor,  # float64 [B, dim]
    variance: Tensor,  # float64 [B], sigma^2 in pixel units
    largest: float,  # max |v|
    hidden: Callable[[Block], Tensor] | None = None,  # bool [B or 1, n] : images that a row does not see
    details: bool = True,  # moment and nearest are wanted, too; else they are 0
) -> tuple[Sums, Tensor]:
    """Softmax sums over all images, and which rows are `wide`, bool [B]: of those they are not exact."""
    batch, dim = u.shape
    scale = -0.5 / variance  # float64 [B]
    scale32 = scale.to(torch.float32)[:, None]
    terms = _terms(u)
    count, top_h, top_index, pixels, square, others, reference = 0, *[None] * 6
    for block in blocks(block_size(batch)):
        count += len(block.v)
        h = _product(terms, block, batch)
        if hidden is not None:
            h.masked_fill_(hidden(block), _HIDDEN)
        best, place = h.topk(min(TOP, h.shape[1]), dim=1, largest=False)
        if top_h is None:
            reference = best[:, :1]
            others = _add_up(h, reference, scale32, place, block.v, details)
            top_h, top_index, pixels, square = best, place + block.start, block.v[place], block.square[place]
            continue
        # Merge with what was before; what falls out of the list joins the others.
        lowest = torch.minimum(best[:, :1], top_h[:, :1])
        part = _add_up(h, lowest, scale32, place, block.v, details)
        others = tuple(a + b for a, b in zip(_rescale(others, reference, lowest, scale), part))
        reference = lowest
        merged = [torch.cat(pair, 1) for pair in ((top_h, best), (top_index, place + block.start),
                  (square, block.square[place]), (pixels, block.v[place]))]  # fmt: skip
        order = merged[0].argsort(dim=1, stable=True)
        keep, drop = order[:, :TOP], order[:, TOP:]
        top_h, top_index, square = (t.gather(1, keep) for t in merged[:3])
        pixels = merged[3].gather(1, keep[..., None].expand(-1, -1, dim))
        if drop.shape[1]:
            dropped = merged[3].gather(1, drop[..., None].expand(-1, -1, dim)).to(torch.float64)
            logit = ((merged[0].gather(1, drop) - lowest) * scale32).clamp_(_LEAST, 0).to(torch.float64)
            e = logit.exp()
            gone = (e.sum(1), (e * logit).sum(1), torch.bmm(e[:, None], dropped)[:, 0])
            others = tuple(a + b for a, b in zip(others, gone))

    # The top images, in float64.
    parts = list(_float64(pixels))
    exact = _join([torch.baddbmm(square[i : i + n, :, None], p, u[i : i + n, :, None], alpha=-2) for i, n, p in parts])
    exact = exact[..., 0]  # |v|^2 - 2 u.v, [B, K]
    if hidden is not None:
        exact = torch.where(top_h == _HIDDEN, _HIDDEN, exact)
    top = exact.amin(1, keepdim=True)
    logit = ((exact - top) * scale[:, None]).clamp_(min=-700)
    e = logit.exp()
    total, moment, mean = _rescale(others, reference, top, scale)
    mean = mean + _join([torch.bmm(e[i : i + n, None], p) for i, n, p in parts])[:, 0]
    everything = total + e.sum(1)
    nearest = torch.zeros_like(place[:, 0])
    if details:
        moment = moment + (e * logit).sum(1)
        nearest = torch.where(exact == top, top_index, torch.iinfo(torch.int64).max).amin(1)
    squared = u.square().sum(1)
    sums = Sums((top[:, 0] + squared) * scale, everything, moment, mean, nearest)

    # Are they exact?
    if count <= TOP:
        return sums, torch.zeros_like(nearest, dtype=torch.bool)
    error = rounding(squared.sqrt(), largest)
    rough = error * scale.neg()
    wide = (rough > ROUGH) & (rough * (total / everything) > ROUGH / 100)
    if details:  # the nearest may not be among the top images
        wide |= (top_h[:, -1] - top_h[:, 0]) <= 2 * error
    return sums, wide


def wide_sums(blocks: Blocks, u: Tensor, variance: Tensor, hidden: Callable[[Block], Tensor] | None = None) -> Sums:
    """Softmax sums with everything in float64."""
    parts, scale = [], -0.5 / variance
    for block in blocks(block_size(4 * len(u))):
        v = block.v.to(torch.float64)
        h = block.square - 2 * (u @ v.t())
        if hidden is not None:
            h.masked_fill_(hidden(block), _HIDDEN)
        top, place = h.min(1)
        place = (h == top[:, None]).to(torch.int8).argmax(1)  # the first
        logit = ((h - top[:, None]) * scale[:, None]).clamp_(min=-700)
        e = logit.exp()
        logits = (top + u.square().sum(1)) * scale
        parts.append(Sums(logits, e.sum(1), (e * logit).sum(1), e @ v, place + block.start))
    return Sums.combine(parts)


class Resident:
    """Blocks of images that lie on the device: as bfloat16 on CUDA, elsewhere as they are until they are needed."""

    def __init__(self, images: Tensor, square: Tensor, crop: Callable[[Tensor], Tensor], exact: bool):
        self.device, self._square, self._square32 = square.device, square, square.to(torch.float32)
        self._crop, self._images = crop, images
        self._halves = exact and square.is_cuda and _can_bfloat16()
        if self._halves:
            parts = [crop(part).to(square.device).to(torch.bfloat16) for part in images.split(1 << 14)]
            self._images, self._crop = torch.cat(parts), lambda part: part

    def __call__(self, size: int) -> Iterator[Block]:
        size = size if self._halves else min(size, 1 << 14)  # elsewhere float32 copies are made: keep them small
        for start in range(0, len(self._images), size):
            v = self._crop(self._images[start : start + size]).to(self._square.device)
            v = v if self._halves else v.to(torch.float32)
            part = slice(start, start + size)
            yield Block(start, v, self._square[part], self._square32[part])


class Streamed:
    """Blocks of images outside a CUDA device: copied while the last block is computed."""

    def __init__(self, images: Tensor, square: Tensor, crop: Callable[[Tensor], Tensor], exact: bool):
        self.device, self._square, self._square32 = square.device, square, square.to(torch.float32)
        self._dtype = torch.bfloat16 if exact and _can_bfloat16() else torch.float32
        self._stream = Stream(images, square.device, crop)

    def __call__(self, size: int) -> Iterator[Block]:
        for start, v in self._stream(size):
            part = slice(start, start + len(v))
            yield Block(start, v.to(self._dtype), self._square[part], self._square32[part])


# ----------------------------------------------------------------------------
# Products.


def _terms(u: Tensor) -> Tensor:
    """float64 u [B, dim] as what `_product` multiplies: -2u in bfloat16 terms [3B, dim] on CUDA, else u in float32."""
    if not u.is_cuda or not _can_bfloat16():
        return u.to(torch.float32)
    return bfloat16_terms((-2 * u).to(torch.float32), 3)


def bfloat16_terms(a: Tensor, count: int) -> Tensor:
    """float32 [B, dim] as a sum of bfloat16 terms of 8 bits each, [count B, dim], largest first."""
    terms = []
    for _ in range(count):
        terms.append(a.to(torch.bfloat16))
        a = a - terms[-1].to(torch.float32)  # exact
    return torch.cat(terms)


def _product(terms: Tensor, block: Block, batch: int) -> Tensor:
    """|v|^2 - 2 u.v in float32, [B, n]."""
    if terms.dtype == torch.float32:
        return torch.addmm(block.square32, terms, block.v.to(torch.float32).t(), alpha=-2)
    parts = torch.mm(terms, block.v.t(), out_dtype=torch.float32).view(3, batch, len(block.v))
    return (parts[2] + parts[1]).add_(parts[0]).add_(block.square32)  # the smallest first


def _add_up(
    h: Tensor, lowest: Tensor, scale: Tensor, place: Tensor, v: Tensor, details: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """total, moment and mean of the images that are not at `place`; uses up h."""
    logit = h.sub_(lowest).mul_(scale).clamp_(_LEAST, 0)
    e = logit.exp() if details else logit.exp_()
    e.scatter_(1, place, 0)
    if v.dtype == torch.bfloat16:
        halves = torch.mm(bfloat16_terms(e, 2), v, out_dtype=torch.float32).view(2, len(e), -1)
        mean = halves[1] + halves[0]
    else:
        mean = e @ v
    total = e.sum(1, dtype=torch.float64)
    moment = logit.mul_(e).sum(1, dtype=torch.float64) if details else total
    return total, moment, mean.to(torch.float64)


def _rescale(
    sums: tuple[Tensor, Tensor, Tensor], old: Tensor, new: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Sums relative to the logit of h = old [B, 1] as sums relative to that of h = new, float32 or float64."""
    moved = (old.to(torch.float64) - new).squeeze(1) * scale
    factor = moved.exp()
    total, moment, mean = sums
    total, moment = total * factor, moment if moment is total else (moment + moved * total) * factor
    return total, moment, mean * factor[:, None]


def _float64(pixels: Tensor) -> Iterator[tuple[int, int, Tensor]]:
    """(first row, rows, [rows, K, dim] in float64), some rows at a time where all would take too much memory."""
    rows = max(_GATHERED // (8 * pixels[0].numel()), 1)
    for start in range(0, len(pixels), rows):
        part = pixels[start : start + rows]
        yield start, len(part), part.to(torch.float64)


def _join(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


_bfloat16: bool | None = None


def _can_bfloat16() -> bool:
    """Whether this torch multiplies bfloat16 into float32 (`torch.mm(..., out_dtype=)`) on CUDA."""
    global _bfloat16
    if _bfloat16 is None:
        try:
            one = torch.ones(16, 16, dtype=torch.bfloat16, device="cuda")
            _bfloat16 = torch.mm(one, one, out_dtype=torch.float32).dtype == torch.float32
        except (TypeError, RuntimeError):
            _bfloat16 = False
    return _bfloat16
