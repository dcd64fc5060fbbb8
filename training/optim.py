"""The closed-form optimum of denoising score matching on a finite training set.

Gu et al., "On Memorization in Diffusion Models" (2023), Eq. 2: with training images y_1..y_N the minimizer
of the training loss is

    D*(x; sigma) = sum_i w_i y_i,    w = softmax_i( -|x - y_i|^2 / (2 sigma^2) ),

the posterior mean of the training set under Gaussian noise. Sampling from it only replays training images.
"""

import contextlib
import math
import os
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import conv2d

from dnnlib.limits import check_npz, check_regular
from dnnlib.util import fetch
from torch_utils import distributed as dist
from training.dataset import ImageFolderDataset
from training.decoded import decoded_images
from training.optim_dense import ROUGH, Block, Resident, Streamed, dense_sums, rough_logits, wide_sums
from training.optim_sums import Sums, decay, shift

NEGLECT = 1e-6  # weight that all skipped images of a row have together, at most
_LIST = 2048  # images per row that are remembered as still able to carry weight
_KEEP = 32  # of these, at least so many are kept from call to call
_EXACT = 512  # images per row whose distances are computed one by one, in float64
_MARGIN = 2.0  # remembered images reach beyond the needed ones by this factor
_WORTH = 8192  # images from which on remembering beats comparing with all of them
_UNIT = 2.0**-24  # unit roundoff of float32


class Posterior(NamedTuple):
    """What sum_i w_i y_i is made of; one entry per row."""

    effective_number: Tensor  # exp of the entropy of w, float64 [batch]
    nearest: Tensor  # index of the training image with the largest weight, int64 [batch]
    weight: Tensor  # its weight, float64 [batch]


@dataclass
class _Memory:
    """For one row, after a call at u0: which images may matter near u0, and how far away all others are.

    Distances are told relative to one image, the pivot p: G_i(u) = |u - v_i|^2 - |u - p|^2.
    """

    group: int  # class of the row, -1 = all images; other images are not in the sum
    u0: Tensor  # float64 [dim]
    pivot: Tensor  # float64 [dim], pixels of an image near u0
    index: Tensor  # int64 [m], images remembered
    G: Tensor  # float64 [m], lower bounds of G_i(u0)
    rest: float  # G_i(u0) of all other images is at least this


class OptimEDM(torch.nn.Module):
    """D*(x; sigma) of a training set, with the attributes and the call of the preconditioned networks.

    Exactness. Write u, v_i for x, y_i in pixel units 0..255. |v_i|^2 - 2 u.v_i of all images with more than e^-16 of
    the largest weight is computed in float64 where at most 512 images per row can carry weight. Its rounding, a few
    2^-53 |u| |v|, moves a logit by less than 1e-5 down to sigma = 0.002 for images up to 3x64x64, also between
    near-duplicates. Which images those are is decided in float32 with a margin of twice the rounding error bound
    2 dim 2^-24 |u| max|v| (Higham 2002, Section 3.1), so none is missed. Where more images carry weight, sigma is
    as a rule comparable to the distances between images, and logits come from float32 matrix products: their
    relative rounding error, at most dim 2^-24 and in practice a few 2^-24, leaves D* within 1e-5 (measured by the
    tests; 1e-4 is promised). Where float32 is not enough all the same, among mass near-duplicates at small sigma
    (`training.optim_dense.ROUGH`), such rows are computed in float64. Sums over chunks are in float64.

    Skipping. Images are left out only where all of them together have weight below 1e-6; in sets of fewer than
    8192 only whole chunks are. A dense pass at u0 remembers, per row, the nearest image p, the images within reach, and
    a bound of the others. Let u - p = a (u0 - p) + rho with 0 <= a <= 1, as for a point that has moved along its
    noise towards p. Then for each image, with m = |v_i - p| and by Cauchy-Schwarz,

        |u - v_i|^2 - |u - p|^2  =  a G_i(u0) + (1 - a) m^2 - 2 rho.(v_i - p)
                                 >=  a G_i(u0) + min_m ((1 - a) m^2 - 2 |rho| m),

    which proves, without reading it, that an image carries less than 1e-6 / N of the weight of p. Rows for
    which the bound does not suffice take a dense pass. `skip=False` turns this off.

    Memory. The images stay uint8, in memory or in a memory-mapped file, and are visited in chunks; besides
    them there are 8 bytes per image, and up to 2048 remembered images per row of the batch.

    Parameters
    ----------
    images : uint8 [N, C, H, W]; with `quantized=False` floats [N, C, H, W], in the units of x
    labels : int64 [N], to restrict the sum to the images of a class; None = unconditional
    sigma_min, sigma_max : range of noise levels that a sampler may use
    ref_size : take a new random subset of so many images at each call, as the published code does
    skip : skip images that provably carry no weight
    shard : `images` are this rank's part of the training set, and all ranks make every call together
    chunk : images visited at a time; None = as many as a processor's cache holds of them as float32
    quantized : the images are uint8; False is for data that 256 levels cannot tell apart, kept as float32
    dense : compare every row with all images in a few large operations (`training.optim_dense`), which is what a
        GPU does fastest; False: row by row, skipping images, which is fastest on a CPU; None: dense on CUDA

    Raises
    ------
    ValueError
        If the images are none, not uint8 (or not floats), not square, or labels are of another length or negative.
    """

    def __init__(
        self,
        images: np.ndarray | Tensor,
        labels: np.ndarray | Tensor | None = None,
        sigma_min: float = 0,
        sigma_max: float = float("inf"),
        ref_size: int | None = None,
        skip: bool = True,
        shard: bool = False,
        chunk: int | None = None,
        quantized: bool = True,
        dense: bool | None = None,
    ):
        super().__init__()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # a memory-mapped file is read-only; nothing writes to it
            images = torch.as_tensor(images)
        fits = images.dtype == torch.uint8 if quantized else images.is_floating_point()
        if images.ndim != 4 or not fits or len(images) == 0 or images.shape[2] != images.shape[3]:
            raise ValueError(
                f"The optimum needs square images, {'uint8' if quantized else 'floats'} [N, C, H, W] with N > 0, not "
                f"{str(images.dtype).removeprefix('torch.')} {list(images.shape)}."
            )
        if ref_size is not None and ref_size < 1:
            raise ValueError(f"ref_size must be at least 1, not {ref_size}.")
        if not quantized:
            images = ((images.to(torch.float64) + 1) * 127.5).to(torch.float32)
        self.img_channels, self.img_resolution = images.shape[1], images.shape[2]
        self.sigma_min, self.sigma_max = sigma_min, sigma_max
        chunk = chunk or min(max((1 << 21) // images[0].numel(), 512), 4096)
        self.ref_size, self.skip, self.shard, self.chunk, self.dense = ref_size, skip, shard, chunk, dense
        self.images = images  # no buffer: may stay in a file or on the CPU while the rest is on a GPU
        self._subset = torch.Generator().manual_seed(0)  # of ref_size
        self._memory: list[_Memory | None] = []
        self._blocks: Resident | Streamed | None = None  # of the dense evaluation
        self.trace: list[tuple[Tensor, Posterior]] | None = None  # (sigma, posterior) of each call, while a list

        self.label_dim = 0
        self.empty_classes: list[int] = []  # labels below the largest that no image has
        self.register_buffer("order", None, persistent=False)  # images by class
        self.register_buffer("bounds", None, persistent=False)  # where each class begins in `order`
        if labels is not None:
            labels = torch.as_tensor(labels)
            if labels.shape != (len(images),) or labels.is_floating_point() or labels.min() < 0:
                raise ValueError(f"Labels must be one non-negative integer for each of the {len(images)} images.")
            self.label_dim = int(max(self._gather(labels.max()))) + 1
            counts = torch.bincount(labels.to(torch.int64), minlength=self.label_dim)
            self.order = torch.argsort(labels, stable=True)
            self.register_buffer("labels", labels.to(torch.int64), persistent=False)
            self.register_buffer("class_sizes", sum(self._gather(counts)), persistent=False)  # over all shards
            self.bounds = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
            self.empty_classes = (self.class_sizes == 0).nonzero().flatten().tolist()

        # Geometry of the set, in pixel units. Pixels that never vary are cut off: they are the same in D*.
        low, high = images[0].clone(), images[0].clone()
        for part in images.split(chunk):
            low, high = torch.minimum(low, part.amin(0)), torch.maximum(high, part.amax(0))
        low, high = torch.stack(self._gather(low)).amin(0), torch.stack(self._gather(high)).amax(0)
        sizes = [int(n) for n in self._gather(torch.tensor(len(images)))]
        self.size = sum(sizes)  # N, over all shards
        self.first = sum(sizes[: dist.get_rank()]) if shard else 0  # index of our first image
        varies = (low != high).any(0)
        ys, xs = varies.any(1).nonzero().flatten().tolist() or [0], varies.any(0).nonzero().flatten().tolist() or [0]
        self._box = (slice(None), slice(ys[0], ys[-1] + 1), slice(xs[0], xs[-1] + 1))
        self.register_buffer("constant", low.to(torch.float64), persistent=False)
        self.register_buffer("background", (self.constant / 127.5 - 1).to(torch.float32), persistent=False)
        squares = [self._crop(part).to(torch.float64).square().sum(1) for part in images.split(chunk)]
        self.register_buffer("square", torch.cat(squares), persistent=False)  # |v_i|^2, float64 [N]
        self._largest = float(self.square.max()) ** 0.5  # max |v_i|

    # ------------------------------------------------------------------------
    # What it tells.

    def forward(self, x: Tensor, sigma: Tensor, class_labels: Tensor | None = None, **_: Any) -> Tensor:
        """Denoise.

        Parameters
        ----------
        x : noisy images [batch, C, H, W], data in [-1, 1]
        sigma : noise level, [batch] or one for all
        class_labels : int64 indices [batch] (or one), or one-hot rows [batch, label_dim]; needed with labels

        Returns
        -------
        denoised, float32, the shape of x

        Raises
        ------
        ValueError
            If a class has no training image, or classes are missing.
        """
        sums, _ = self._evaluate(x, sigma, class_labels, details=self.trace is not None)
        if self.trace is not None:
            self.trace.append((sigma.reshape(-1).expand(len(x)), _posterior(sums)))
        denoised = self.background.expand(len(x), *self.background.shape).clone()
        box = denoised[(slice(None), *self._box)]
        box.copy_((sums.mean / sums.total[:, None]).reshape(box.shape) / 127.5 - 1)
        return denoised

    def log_density(self, x: Tensor, sigma: Tensor, class_labels: Tensor | None = None) -> Tensor:
        """log of (1/N) sum_i Normal(x; y_i, sigma^2 I), the density of noisy training images: float64 [batch].

        N counts the images of the row's class. Parameters as in `forward`.
        """
        sums, counts = self._evaluate(x, sigma, class_labels)
        sigma = sigma.to(torch.float64).reshape(-1).expand(len(x)).to(x.device)
        pixels = x[0].numel()
        outside = (x.to(torch.float64) + 1) * 127.5 - self.constant
        outside[(slice(None), *self._box)] = 0
        outside = (outside / 127.5).square().flatten(1).sum(1)
        normal = -outside / (2 * sigma**2) - 0.5 * pixels * (2 * math.pi * sigma**2).log()
        return sums.top + sums.total.log() - counts.log() + normal

    def posterior(self, x: Tensor, sigma: Tensor, class_labels: Tensor | None = None) -> Posterior:
        """The weights w of `forward`'s average, summed up; parameters as there."""
        return _posterior(self._evaluate(x, sigma, class_labels)[0])

    def round_sigma(self, sigma: float | Tensor) -> Tensor:
        return torch.as_tensor(sigma)

    # ------------------------------------------------------------------------
    # How it is computed.

    @torch.no_grad()
    def _evaluate(
        self, x: Tensor, sigma: Tensor, class_labels: Tensor | None, details: bool = True
    ) -> tuple[Sums, Tensor]:
        """Softmax sums over the whole training set (all shards), and the number of images each row sees.

        Without `details` moment and nearest may be missing.
        """
        if x.shape[1:] != self.images.shape[1:]:
            raise ValueError(
                f"x is {list(x.shape)}, the training images are [N, {str(list(self.images.shape[1:]))[1:]}."
            )
        u = self._crop((x.to(torch.float64) + 1) * 127.5)  # [batch, dim]
        variance = (sigma.to(device=u.device, dtype=torch.float64).reshape(-1).expand(len(u)) * 127.5) ** 2
        if self.dense if self.dense is not None else u.is_cuda:
            sums, counts = self._evaluate_densely(u, variance, class_labels, details)
        else:
            sums, counts = self._evaluate_skipping(u, variance, class_labels, details)
        if self.shard:
            sums.nearest += self.first
            parts = self._gather(torch.cat([torch.stack([sums.top, sums.total, sums.moment]).t(), sums.mean], dim=1))
            indices = self._gather(sums.nearest)
            sums = Sums.combine([Sums(p[:, 0], p[:, 1], p[:, 2], p[:, 3:], i) for p, i in zip(parts, indices)])
        return sums, counts

    def _evaluate_densely(
        self, u: Tensor, variance: Tensor, class_labels: Tensor | None, details: bool
    ) -> tuple[Sums, Tensor]:
        """All images for all rows at once; see `training.optim_dense`. The device is waited for once."""
        if self._blocks is None or self._blocks.device != u.device:
            kind = Resident if self._fits(u.device) else Streamed
            self._blocks = kind(self.images, self.square, self._crop, self.images.dtype == torch.uint8)
        classes = subset = unknown = None
        if self.ref_size is not None and self.ref_size < len(self.images):
            chosen = torch.randperm(len(self.images), generator=self._subset)[: self.ref_size]
            subset = torch.zeros(len(self.images), dtype=torch.bool).index_fill_(0, chosen, True).to(u.device)
        total = float(self.size) if subset is None else float(sum(self._gather(torch.tensor(self.ref_size))))
        if self.bounds is not None:
            if class_labels is None:
                raise ValueError("This optimum is class-conditional: class_labels are needed.")
            asked = class_labels.argmax(1) if class_labels.ndim == 2 else class_labels.reshape(-1)
            asked = asked.expand(len(u)).to(u.device)
            classes = asked.clamp(0, self.label_dim - 1)
            here = self.bounds.diff() if subset is None else self._class_sizes_of(subset)
            sizes = self.class_sizes if subset is None else sum(self._gather(here))
            unknown = (sizes[classes] == 0) | (classes != asked)

        def hidden(block: Block) -> Tensor:
            part = slice(block.start, block.start + len(block.v))
            mask = None if subset is None else ~subset[None, part]
            if classes is None:
                return mask
            other = self.labels[part] != classes[:, None]
            return other if mask is None else other | mask

        hide = None if classes is None and subset is None else hidden
        sums, wide = dense_sums(self._blocks, u, variance, self._largest, hide, details)
        if self.shard and classes is not None:  # this shard may have no image of the class
            none = here[classes] == 0
            wide &= ~none
            sums.top = sums.top.masked_fill(none, -math.inf)
            sums.total, sums.moment = (t.masked_fill(none, 0) for t in (sums.total, sums.moment))
            sums.mean = sums.mean.masked_fill(none[:, None], 0)
        flags = wide.any() if unknown is None else wide.any() + 2 * unknown.any()
        flags = int(flags)  # the one look
        if flags & 2:
            raise ValueError(f"The training set has no image of class {int(asked[unknown][0])}.")
        if flags & 1:
            rows = wide.nonzero().flatten()

            def hidden_rows(block: Block) -> Tensor:
                mask = hidden(block)
                return mask if len(mask) == 1 else mask[rows]

            some = None if hide is None else hidden_rows
            sums.put(rows, wide_sums(self._blocks, u[rows], variance[rows], some))
        counts = None  # for the density
        if details:
            counts = torch.full([len(u)], total, dtype=torch.float64, device=u.device)
            counts = counts if classes is None else sizes[classes].to(torch.float64)
        return sums, counts

    def _class_sizes_of(self, subset: Tensor) -> Tensor:
        """Number of images of each class in a subset (bool [N]), int64 [label_dim]."""
        return torch.zeros_like(self.class_sizes).scatter_add_(0, self.labels, subset.to(self.class_sizes.dtype))

    def _fits(self, device: torch.device) -> bool:
        """Whether the images in bfloat16 take at most 60 % of the free memory of a CUDA device; True elsewhere."""
        return device.type != "cuda" or 2 * self.images.numel() <= 0.6 * torch.cuda.mem_get_info(device)[0]

    def _evaluate_skipping(
        self, u: Tensor, variance: Tensor, class_labels: Tensor | None, details: bool
    ) -> tuple[Sums, Tensor]:
        """Images that provably carry no weight are left out, row by row; see the docstring of the class."""
        sums = Sums.empty(len(u), u.shape[1], u.device)
        counts = torch.full([len(u)], float(self.size), dtype=torch.float64, device=u.device)
        if len(self._memory) != len(u):
            self._memory = [None] * len(u)
        for group, rows, members in self._groups(class_labels, len(u), u.device):
            if members is not None:
                count = int(sum(self._gather(torch.tensor(len(members)))))
                if count == 0:
                    raise ValueError(f"The training set has no image of class {group}.")
                counts[rows] = count
            if members is None or len(members):
                self._evaluate_rows(sums, group, rows, u[rows], variance[rows], members, details)
        return sums, counts

    def _groups(
        self, class_labels: Tensor | None, batch: int, device: torch.device
    ) -> Iterator[tuple[int, Tensor, Tensor | None]]:
        """(class, rows, images that they see) per class in the batch; -1 and None stand for all images."""
        rows = torch.arange(batch, device=device)
        subset = None
        if self.ref_size is not None and self.ref_size < len(self.images):
            subset = torch.randperm(len(self.images), generator=self._subset)[: self.ref_size].sort().values.to(device)
        if self.bounds is None:
            yield -1, rows, subset
            return
        if class_labels is None:
            raise ValueError("This optimum is class-conditional: class_labels are needed.")
        classes = class_labels.argmax(1) if class_labels.ndim == 2 else class_labels.reshape(-1)
        classes = classes.expand(batch)
        for c in classes.unique().tolist():
            if not 0 <= c < self.label_dim:
                raise ValueError(f"The training set has no image of class {c}.")
            members = self.order[self.bounds[c] : self.bounds[c + 1]]
            if subset is not None:
                members = members[torch.isin(members, subset)]
            yield c, rows[classes == c], members

    def _evaluate_rows(
        self, sums: Sums, group: int, rows: Tensor, u: Tensor, variance: Tensor, members: Tensor | None, details: bool
    ) -> None:
        """Fill in `rows` of `sums`: from memory where it proves enough, else by a dense pass over `members`."""
        count = len(self.images) if members is None else len(members)
        reach = (
            2 * variance * math.log(max(self.size, 2) / NEGLECT)
        )  # images with g above min g + reach carry no weight
        if members is not None and count <= _EXACT:  # few enough to look at each
            error = self._error(u)
            for i, row in enumerate(rows.tolist()):
                self._few(sums, row, members, u[i], float(variance[i]), float(error[i]))
            return
        dense = torch.ones(len(rows), dtype=torch.bool)
        use_memory = self.skip and self.ref_size is None and count >= _WORTH
        if use_memory:
            dense = self._from_memory(sums, group, rows, u, variance, reach)
        if dense.any():
            which = dense.nonzero().flatten().to(u.device)
            part, memories = self._dense(group, u[which], variance[which], reach[which], members, details)
            sums.put(rows[which], part)
            if use_memory:
                for i, memory in zip(rows[which].tolist(), memories):
                    self._memory[i] = memory

    def _dense(
        self, group: int, u: Tensor, variance: Tensor, reach: Tensor, members: Tensor | None, details: bool
    ) -> tuple[Sums, list[_Memory | None]]:
        """One pass over all images (or `members`), in chunks; and what to remember of it."""
        batch, dim = u.shape
        count = len(self.images) if members is None else len(members)
        sums = Sums.empty(batch, dim, u.device)
        mean = sums.mean
        scale = -0.5 / variance
        terms = _split(-2 * u)
        error = self._error(u)
        keep = _MARGIN * reach + error
        best = torch.full([batch], math.inf, dtype=torch.float64, device=u.device)  # min of |v|^2 - 2 u.v so far
        listed = torch.zeros(batch, dtype=torch.int64, device=u.device)  # images listed per row
        found: list[tuple[Tensor, Tensor, Tensor]] = []  # (row, image, |v|^2 - 2 u.v)
        chunk = self.chunk * (16 if u.is_cuda else 1)  # a GPU wants larger products
        exact = self.images.dtype == torch.uint8  # pixels in TF32
        for start in range(0, count, chunk):
            index = None if members is None else members[start : start + chunk]
            v = self._pixels(slice(start, start + chunk) if index is None else index, torch.float32)
            square = self.square[start : start + chunk] if index is None else self.square[index]
            h = _project(v, terms, exact).add_(square.to(torch.float32)[:, None])  # |v|^2 - 2 u.v, [chunk, batch]
            lowest, where = h.min(0) if details else (h.amin(0), None)
            lowest = lowest.to(torch.float64)

            # Remember what lies within reach of the nearest so far; a row with too many is broad.
            best = torch.minimum(best, lowest)
            open_rows = (listed <= _LIST).nonzero().flatten()
            if len(open_rows):
                limit = (best + keep)[open_rows]
                near = (h if len(open_rows) == batch else h[:, open_rows]) <= (limit + 2 * _UNIT * limit.abs()).to(
                    torch.float32
                )
                number = near.sum(0)
                if start == 0:  # where the first chunk foretells too many, do not begin
                    number += _LIST * (number > 2 * _LIST * len(h) / count)
                listed[open_rows] += number
                column, row = (near & (listed[open_rows] <= _LIST)).nonzero().unbind(1)
                row = open_rows[row]
                found.append((row, column + start if index is None else index[column], h[column, row]))

            # Add up the weights, of rows for which the chunk matters at all.
            logit = lowest * scale
            top = torch.maximum(sums.top, logit)
            factor = decay(sums.top, top)
            if details:
                nearest = where + start if index is None else index[where]
                sums.nearest = torch.where(logit > sums.top, nearest, sums.nearest)
                sums.moment = factor * (sums.moment + shift(sums.top, top) * sums.total)
            sums.total *= factor
            mean *= factor[:, None]
            sums.top = top
            active: Tensor | slice = slice(None)
            if self.skip:
                matters = logit > top - math.log(self.size / NEGLECT) - 1
                if not matters.all():
                    active = matters.nonzero().flatten()
                    if not len(active):
                        continue
            e = h[:, active].sub_((top / scale)[active].to(torch.float32))
            e = e.mul_(scale[active].to(torch.float32)).clamp_(min=-60)  # exp is slow on denormal results
            relative = e.clone() if details else None
            e.exp_()
            sums.total[active] += e.sum(0, dtype=torch.float64)
            if details:
                sums.moment[active] += relative.mul_(e).sum(0, dtype=torch.float64)
            mean[active] += _combine(v, _split(e), exact)

        # Logits so far lack |u|^2.
        sums.top += u.square().sum(1) * scale

        # All narrow rows are remembered, and computed again where few images are within reach.
        memories: list[_Memory | None] = [None] * batch
        narrow = listed <= _LIST
        rough = (rough_logits(u, variance, self._largest) > ROUGH).cpu()
        if found and narrow.any():
            row, image, h = (torch.cat(parts) for parts in zip(*found))
            G = h.to(torch.float64) - best[row]  # the pivot is the nearest image
            inside = narrow[row] & (G <= keep[row])
            row, image, G = row[inside], image[inside], G[inside]
            order = torch.argsort(row, stable=True)
            sizes = torch.bincount(row, minlength=batch).tolist()
            limits = zip(error.tolist(), keep.tolist(), reach.tolist())
            for i, (index, g, (margin, rest, near)) in enumerate(
                zip(image[order].split(sizes), G[order].split(sizes), limits)
            ):
                if narrow[i]:
                    pivot = self._pixels(index[g.argmin()].reshape(1), torch.float64)[0]
                    memories[i] = _Memory(group, u[i].clone(), pivot, index, g - margin, rest - margin)
                    needed = index[g <= near + margin]
                    if len(needed) <= _EXACT or rough[i]:
                        self._few(sums, i, needed, u[i], float(variance[i]), margin)
                        rough[i] = False
        if rough.any():  # mass near-duplicates: more than are listed, and float32 cannot tell them apart
            rows = rough.nonzero().flatten()
            sums.put(rows.to(u.device), wide_sums(self._members(members), u[rows], variance[rows]))
            if members is not None:
                sums.nearest[rows] = members[sums.nearest[rows]]
        return sums, memories

    def _members(self, members: Tensor | None) -> Callable[[int], Iterator[Block]]:
        """Blocks of all images, or of `members`; a block's index then counts among these."""

        def blocks(size: int) -> Iterator[Block]:
            for start in range(0, len(self.images) if members is None else len(members), self.chunk):
                part = slice(start, start + self.chunk)
                part = part if members is None else members[part]
                yield Block(start, self._pixels(part, torch.float32), self.square[part], self.square[part])

        return blocks

    def _from_memory(self, sums: Sums, group: int, rows: Tensor, u: Tensor, variance: Tensor, reach: Tensor) -> Tensor:
        """Evaluate the rows for which memory is enough; return which need a dense pass, bool [rows] on the CPU."""
        dense = torch.ones(len(rows), dtype=torch.bool)
        error = self._error(u).tolist()
        for i, row in enumerate(rows.tolist()):
            memory = self._memory[row]
            if memory is None or memory.group != group:
                continue
            now, before = u[i] - memory.pivot, memory.u0 - memory.pivot
            a, penalty = _best_bound(now, before, memory.rest, 2 * self._largest)
            rest = a * memory.rest - penalty  # of G_i(u), as is `lower`
            needed = float(reach[i]) + 1e-9 * float(now @ now) + 1e-6  # with the rounding of these float64 sums
            if rest <= needed:
                continue
            # Keep what is within reach, and at least the nearest few.
            lower = a * memory.G - penalty
            within = lower <= _MARGIN * needed
            kept = int(within.sum())
            if kept < _KEEP:
                kept = min(_KEEP, len(lower))
                within = torch.zeros_like(within).index_fill_(0, lower.topk(kept, largest=False).indices, True)
            if kept < len(lower):
                rest = min(rest, float(lower[~within].min()))
            index = memory.index[within]
            h, v = self._few(sums, row, index, u[i], float(variance[i]), error[i])
            best, where = h.min(0)
            shift = float(best + u[i].square().sum() - now @ now)  # G of the new pivot
            self._memory[row] = _Memory(
                group, u[i].clone(), v[where].to(torch.float64), index, h - best - error[i], rest - shift
            )
            dense[i] = False
        return dense

    def _error(self, u: Tensor) -> Tensor:
        """Twice the bound of the rounding error of |v|^2 - 2 u.v in float32, [batch]."""
        return 4 * u.shape[1] * _UNIT * u.norm(dim=1) * self._largest

    def _few(
        self, sums: Sums, row: int, index: Tensor, u: Tensor, variance: float, error: float
    ) -> tuple[Tensor, Tensor]:
        """Fill in a row of `sums` from the images `index` alone; return their |v|^2 - 2 u.v, float64, and pixels v.

        Distances of all images with more than e^-16 of the largest weight are computed in float64.
        """
        v = self._pixels(index, torch.float32)
        h = (v @ (-2 * u).to(torch.float32)).to(torch.float64) + self.square[index]
        near = (h - h.min() <= 32 * variance + error).nonzero().flatten()
        v_near = v[near].to(torch.float64)
        h[near] = self.square[index[near]] - 2 * (v_near @ u)
        top = h.min()
        relative = (h - top) * (-0.5 / variance)
        e = relative.clamp(min=-60).exp()
        sums.top[row] = (top + u.square().sum()) * (-0.5 / variance)
        sums.total[row] = e.sum()
        sums.moment[row] = (e * relative).sum()
        far = e.to(torch.float32).index_fill_(0, near, 0)
        sums.mean[row] = e[near] @ v_near + (far @ v if len(near) < len(index) else 0)
        sums.nearest[row] = index[relative == 0].min()
        return h, v

    def _pixels(self, which: slice | Tensor, dtype: torch.dtype) -> Tensor:
        """Varying pixels of some images, [count, dim], 0..255."""
        part = self.images[which.to(self.images.device) if isinstance(which, Tensor) else which]
        part = part[(slice(None), *self._box)].to(self.square.device, non_blocking=True)
        return part.to(dtype).flatten(1)  # in this order a crop is copied once

    def _crop(self, images: Tensor) -> Tensor:
        """Cut off the constant border, [count, C, H, W] -> [count, dim]."""
        return images[(slice(None), *self._box)].flatten(1)

    def _gather(self, tensor: Tensor) -> list[Tensor]:
        """The tensors of all ranks, which have one shape."""
        if not self.shard or dist.get_world_size() == 1:
            return [tensor]
        device = (
            torch.device("cuda", torch.cuda.current_device())
            if torch.distributed.get_backend() == "nccl"
            else tensor.device
        )
        sent = tensor.to(device).contiguous()
        parts = [torch.empty_like(sent) for _ in range(dist.get_world_size())]
        torch.distributed.all_gather(parts, sent)
        return [part.to(tensor.device) for part in parts]


def _posterior(sums: Sums) -> Posterior:
    entropy = sums.total.log() - sums.moment / sums.total  # -sum w log w
    # The image with the largest weight has the logit `top`.
    return Posterior(entropy.exp(), sums.nearest, 1 / sums.total)


def _best_bound(now: Tensor, before: Tensor, rest: float, m_max: float) -> tuple[float, float]:
    """The a in [0, 1] that makes a rest - penalty largest, and its penalty; see `OptimEDM`.

    penalty(a) = max over 0 <= m <= m_max of 2 |rho| m - (1 - a) m^2 with rho = now - a before.
    """
    nn, nb, bb = float(now @ now), float(now @ before), max(float(before @ before), 1e-300)
    ideal = min(max(nb / bb, 0.0), 1.0)  # where |rho| is smallest; a smaller a can still be better
    a = np.unique(np.concatenate([[ideal], ideal * (1 - np.geomspace(1e-6, 0.9, 40))]))
    rho = np.sqrt(np.maximum(nn - 2 * a * nb + a * a * bb, 0) * (1 + 1e-9) + 1e-9 * (nn + bb))
    m = np.minimum(rho / np.maximum(1 - a, 1e-300), m_max)
    penalty = 2 * rho * m - (1 - a) * m * m
    best = int(np.argmax(a * rest - penalty))
    return float(a[best]), float(penalty[best])


def _split(a: Tensor) -> list[Tensor]:
    """Terms that add up to float32 `a`. On CUDA each has the 11 bits of TF32, so tensor cores multiply it exactly."""
    a = a.to(torch.float32).contiguous()
    return split_tf32(a) if a.is_cuda else [a]


def split_tf32(a: Tensor) -> list[Tensor]:
    """Three float32 tensors whose sum is `a`, each with at most 11 significant bits."""
    terms = []
    for _ in range(2):
        high = (a.view(torch.int32) & -0x2000).view(torch.float32)  # clear the 13 low bits
        terms.append(high)
        a = a - high  # exact
    return [*terms, a]


def _project(v: Tensor, terms: list[Tensor], exact: bool) -> Tensor:
    """v [chunk, dim] @ sum(terms) [batch, dim]^T: float32 [chunk, batch]; uint8 pixels v are exact in TF32."""
    if v.is_cuda:
        with _tf32(exact):
            return sum(v @ term.t() for term in reversed(terms))  # small terms first
    # A convolution with 1x1 kernels is the same product; on CPUs oneDNN computes it up to twice as fast as BLAS.
    image = v.reshape(1, len(v), 1, -1).permute(0, 3, 1, 2)  # [1, dim, chunk, 1], channels last
    return conv2d(image, terms[0][:, :, None, None]).permute(0, 2, 3, 1).reshape(len(v), -1)


def _combine(v: Tensor, terms: list[Tensor], exact: bool) -> Tensor:
    """sum(terms) [chunk, batch]^T @ v [chunk, dim]: float32 [batch, dim]."""
    if v.is_cuda:
        with _tf32(exact):
            return sum(term.t() @ v for term in reversed(terms))
    return conv2d(v.reshape(1, len(v), 1, -1), terms[0].t()[:, :, None, None]).reshape(terms[0].shape[1], -1)


@contextlib.contextmanager
def _tf32(use: bool) -> Iterator[None]:
    """Let float32 products use TF32 tensor cores, or not; accumulation stays float32."""
    allowed = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = use
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = allowed


def load_optimum(
    path_or_url: str,
    device: torch.device | str = "cpu",
    cond: bool = False,
    mmap: bool = False,
    shard: bool = False,
    **kwargs: Any,
) -> OptimEDM:
    """The optimum of a dataset zip or folder, or of a .npz with `images` uint8 [N, C, H, W] and `labels` [N].

    Parameters
    ----------
    path_or_url : the dataset
    device : where to compute; images that do not fit a GPU stay outside it, and are streamed
    cond : the class-conditional optimum
    mmap : read the images from a memory-mapped decoded copy beside the zip, see `training.decoded`
    shard : hold only this rank's part of the images; all ranks must then call the optimum together
    kwargs : of `OptimEDM`

    Raises
    ------
    OSError, ValueError
        If the file cannot be read as such, `cond` is asked for and there are no integer labels, or there are
        fewer images than ranks to share them.
    """
    path = Path(fetch(path_or_url))
    if path.suffix.lower() == ".npz":
        images, labels = read_npz(path)
        part = _share(len(images), shard, path)
        images, labels = images[part], labels[part] if labels is not None else None
    else:
        dataset = ImageFolderDataset(path, use_labels=cond, cache=False)
        part = _share(len(dataset), shard, path)
        labels = dataset.labels()[part] if cond else None
        if mmap:
            images = decoded_images(path, [len(dataset), *dataset.image_shape])[part]
        elif shard:
            images = np.stack([dataset[i][0] for i in range(len(dataset))[part]])
        else:
            images = dataset.images()
    if cond and (labels is None or labels.ndim != 1 or labels.dtype.kind == "f" or labels.min() < 0):
        raise ValueError(f'"{path}" holds no integer class labels; leave out --cond=1 or label the dataset.')
    net = OptimEDM(images, labels if cond else None, shard=shard, **kwargs).to(device)
    device = torch.device(device)
    if net.dense is False and device.type == "cuda" and images.nbytes <= torch.cuda.mem_get_info(device)[0] / 2:
        net.images = net.images.to(device)  # the dense evaluation makes its own copy
    return net


def _share(size: int, shard: bool, path: Path) -> slice:
    """This rank's contiguous part of `size` images."""
    if not shard:
        return slice(0, size)
    if size < dist.get_world_size():
        raise ValueError(
            f'"{path}" holds {size} images, too few for a shard on each of {dist.get_world_size()} processes.'
        )
    edges = [size * rank // dist.get_world_size() for rank in range(dist.get_world_size() + 1)]
    return slice(edges[dist.get_rank()], edges[dist.get_rank() + 1])


def read_npz(path: str | os.PathLike) -> tuple[np.ndarray, np.ndarray | None]:
    """Read `images` and `labels` of a .npz, None where it has no labels; nothing in the file is executed.

    Raises
    ------
    OSError, ValueError
        If it cannot be read, has no `images`, or labels that are no numbers.
    """
    check_regular(path)
    try:
        check_npz(path)
        with np.load(path, allow_pickle=False) as data:
            arrays = {name: np.asarray(data[name]) for name in ("images", "labels") if name in data}
    except Exception as err:  # zipfile, zlib and numpy each have their own
        raise ValueError(f'"{path}" cannot be read as .npz: {err}.') from err
    if "images" not in arrays:
        raise ValueError(f'"{path}" holds no array named "images"; save it with np.savez(FILE, images=...).')
    images, labels = arrays["images"], arrays.get("labels")
    if images.dtype != np.uint8 or images.ndim != 4 or not images.size or images.shape[2] != images.shape[3]:
        found = f"{images.dtype} {list(images.shape)}"
        raise ValueError(f'"images" in "{path}" must be square images, uint8 [N, C, H, W] with N > 0, not {found}.')
    if labels is not None and labels.dtype.kind not in "iuf":
        raise ValueError(f'"labels" in "{path}" are {labels.dtype}, not numbers.')
    if labels is not None and (labels.ndim == 0 or len(labels) != len(images)):
        raise ValueError(f'"{path}" holds labels {list(labels.shape)} for {len(images)} images.')
    return images, labels
