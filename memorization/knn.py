"""Exact nearest neighbours of uint8 images: d1 and d2 of the memorization criterion."""

import numpy as np
import torch

_SLICE = 1024  # pixels per matrix product: 1024 * 128^2 = 2^24, the last integer before float32 has gaps
_QUERIES = 512  # images of the first argument per block


@torch.no_grad()
def nearest_neighbors(
    images: np.ndarray | torch.Tensor,  # [n, C, H, W]
    reference: np.ndarray | torch.Tensor,  # [N, C, H, W]
    k: int = 2,  # neighbours per image
    *,
    device: str | torch.device | None = None,  # where to compute; None: where `images` is
    block: int = 2048,  # reference images held as float32 at a time
) -> tuple[np.ndarray, np.ndarray]:
    """Find the `k` nearest reference images of each image, exactly.

    The distance is the root-mean-square pixel difference, ||x - y||_2 / sqrt(C*H*W), in 0..255 units.
    Images at the same distance come in the order of their indices, so a training image that is there
    twice is found as two neighbours, the lower index first.

    Why float32 is exact here. With a = x - 128 and b = y - 128, integers in [-128, 127],

        ||x - y||^2 = |a|^2 + (|b|^2 - 2 a.b).

    The matrix product a.b runs over slices of 1024 pixels. Whatever order it sums in, with or without
    fused multiply-add, each partial sum is an integer of magnitude at most 1024 * 128^2 = 2^24, and all
    of these are float32 numbers: the rounding error is zero (TF32 or bfloat16 inputs would not change
    this, 8 bits are enough for b). The rest is integer arithmetic below 2^53 in float64, where
    neighbours are ranked by (|b|^2 - 2 a.b) * block + index, one distinct integer per reference image.

    Parameters
    ----------
    images : uint8 [n, C, H, W]; n may be 0.
    reference : uint8 [N, C, H, W].
    k : number of neighbours, 1 <= k <= N.
    device : torch device of the computation; default the device of `images`.
    block : images of `reference` per block; with the 512 of `images` it bounds the memory needed.

    Returns
    -------
    distance : float64 [n, k], ascending.
    index : int64 [n, k], row of `reference`.

    Raises
    ------
    ValueError
        If the images are not uint8 [n, C, H, W], the two shapes differ, or there are fewer than `k`
        reference images.
    """
    images, reference = _as_tensor(images, "images"), _as_tensor(reference, "reference")
    if images.shape[1:] != reference.shape[1:]:
        raise ValueError(
            f"The images are {_describe(images)}, the reference images {_describe(reference)}; "
            "compare images of one size and one number of channels."
        )
    if not 1 <= k <= len(reference):
        raise ValueError(
            f"{k} nearest neighbours need at least {max(k, 1)} reference images and k >= 1; "
            f"there are {len(reference)} reference images."
        )
    if block < 1:
        raise ValueError(f"block must be at least 1, not {block}.")
    pixels = images[0].numel() if len(images) else reference[0].numel()
    if block * pixels >= 2**36:  # |b|^2 - 2 a.b lies within 3 * 2^14 * pixels
        raise ValueError(f"Blocks of {block} images of {pixels} pixels are too large; lower `block`.")
    device = torch.device(device) if device is not None else images.device

    # Best so far, ordered by distance, then index; the reference blocks come in index order.
    best_score = torch.empty(len(images), 0, dtype=torch.int64, device=device)  # |b|^2 - 2 a.b
    best_index = torch.empty(len(images), 0, dtype=torch.int64, device=device)
    for start in range(0, len(reference), block):
        b = _centre(reference[start : start + block], device)  # [R, pixels]
        parts = [_block_neighbors(_centre(q, device), b, k) for q in images.split(_QUERIES)]
        score = torch.cat([best_score, torch.cat([s for s, _ in parts])], dim=1)
        index = torch.cat([best_index, torch.cat([i for _, i in parts]) + start], dim=1)
        order = torch.argsort(score, dim=1, stable=True)[:, :k]  # stable: ties stay in index order
        best_score, best_index = score.gather(1, order), index.gather(1, order)

    norms = [_squared_norm(_centre(q, device)) for q in images.split(_QUERIES)]
    squared = best_score + torch.cat(norms).to(torch.int64)[:, None]  # ||x - y||^2
    distance = (squared.to(torch.float64) / pixels).sqrt()
    return distance.cpu().numpy(), best_index.cpu().numpy()


def _block_neighbors(a: torch.Tensor, b: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores |b|^2 - 2 a.b and rows of the min(k, R) nearest of `b` [R, pixels] to each of `a` [Q, pixels]."""
    rows = len(b)
    key = _squared_norm(b) * rows + torch.arange(rows, dtype=torch.float64, device=b.device)
    key = key.expand(len(a), rows)
    for i in range(0, a.shape[1], _SLICE):  # exact integers throughout, see `nearest_neighbors`
        key = torch.sub(key, a[:, i : i + _SLICE] @ b[:, i : i + _SLICE].T, alpha=2 * rows)
    key = key.topk(min(k, rows), dim=1, largest=False).values.to(torch.int64)
    return key.div(rows, rounding_mode="floor"), key.remainder(rows)


def _centre(images: torch.Tensor, device: torch.device) -> torch.Tensor:
    """uint8 [n, C, H, W] -> float32 [n, C*H*W] of integers in [-128, 127]."""
    return images.to(device).flatten(1).to(torch.float32) - 128


def _squared_norm(a: torch.Tensor) -> torch.Tensor:
    """|a|^2 of each row, float64 and exact."""
    parts = [part.square().sum(dim=1).to(torch.float64) for part in a.split(_SLICE, dim=1)]
    return torch.stack(parts).sum(dim=0)


def _as_tensor(images: np.ndarray | torch.Tensor, name: str) -> torch.Tensor:
    if isinstance(images, np.ndarray) and images.dtype == np.uint8:
        images = torch.from_numpy(np.require(images, requirements=["C", "W"]))
    if not isinstance(images, torch.Tensor) or images.dtype != torch.uint8 or images.ndim != 4:
        found = f"{getattr(images, 'dtype', type(images).__name__)} {list(getattr(images, 'shape', []))}"
        raise ValueError(f"`{name}` must be uint8 images [n, C, H, W], pixels 0..255, not {found}.")
    return images


def _describe(images: torch.Tensor) -> str:
    channels, height, width = images.shape[1:]
    return f"{height}x{width} with {channels} channel{'s' * (channels != 1)}"
