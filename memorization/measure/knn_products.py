"""Products of many rows with many rows, exact or with a known rounding error: what nearest neighbours are ranked by."""

import contextlib
import functools
import math
import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn.functional import conv2d, pad

_ELEMENTS = 1 << 20  # elements per step where something is computed row by row
_FLOAT_SLICE = 1024  # pixels per float32 product: 1024 * 128^2 = 2^24, the last integer before float32 has gaps
_INT8_SLICE = 1 << 16  # pixels per int8 product: 2^16 * 128^2 = 2^30 fits into int32
ALIGNED = 16  # pixels; `torch._int_mm` on CPUs is wrong for one column, and wants a multiple of 8 on CUDA
UNIT = 2.0**-24  # unit roundoff of float32


def pixel_products(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """int8 a [q, dim] @ b [r, dim]^T, exactly, as float32, int32 or int64; dim is a multiple of `ALIGNED`.

    `out` is int32 [q, r] that may be used for it.
    """
    dim = a.shape[1]
    multiply, step = (int8_product, _INT8_SLICE) if int8_works(a.device) else (float32_product, _FLOAT_SLICE)
    if dim <= step:
        return multiply(a, b, out)
    total: Tensor | int = 0
    for i in range(0, dim, step):
        product = multiply(a[:, i : i + step], b[:, i : i + step], out)
        total = total + product.to(torch.int32 if dim < 2**17 else torch.int64)  # up to 2^14 dim
    return total


def int8_product(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """int8 a [q, dim] @ b [r, dim]^T in int32, exact for dim < 2^17; dim is a multiple of 16."""
    if not a.is_cuda:
        return torch._int_mm(a, b.T, out=out) if out is not None else torch._int_mm(a, b.T)
    # cuBLAS wants more than 16 rows, and multiples of 8.
    q, r = max(-len(a) % 8, 24 - len(a)), -len(b) % 8
    product = torch._int_mm(pad(a, (0, 0, 0, q)) if q else a, (pad(b, (0, 0, 0, r)) if r else b).T)
    return product[: len(a), : len(b)].contiguous()


def float32_product(a: Tensor, b: Tensor, out: None = None) -> Tensor:
    """a [q, dim] @ b [r, dim]^T in float32, exact for int8 and dim <= 1024.

    Whatever order it sums in, with or without fused multiply-add, each partial sum of products of int8 is an integer of
    magnitude at most 1024 * 128^2 = 2^24, and all of these are float32 numbers: the rounding error is zero. Inputs
    rounded to TF32 or bfloat16 would not change this, 8 bits are enough for b.
    """
    a, b = a.to(torch.float32), b.to(torch.float32)
    if a.device.type != "cpu":
        return a @ b.T
    # A convolution with 1x1 kernels is the same product; on CPUs oneDNN computes it up to twice as fast as BLAS.
    image = a.reshape(1, len(a), 1, -1).permute(0, 3, 1, 2)  # [1, dim, q, 1], channels last
    return conv2d(image, b[:, :, None, None]).permute(0, 2, 3, 1).reshape(len(a), len(b))


@functools.cache
def int8_works(device: torch.device) -> bool:
    """Whether there is an exact matrix product of int8 here, and not a slow one.

    `torch._int_mm` is private: it may be missing, refuse, saturate sums of two products at 16 bits (on CPUs without
    VNNI), or be a plain loop, some hundred times slower than float32.
    """
    generator = torch.Generator().manual_seed(0)
    for q, r, dim in [(1, 1, 16), (5, 32, 48), (256, 256, 1024)]:
        a, b = (torch.randint(-128, 128, (n, dim), generator=generator).to(device, torch.int8) for n in (q, r))
        a[0], b[0], a[-1, ::2], b[-1] = -128, 127, 127, -128  # the largest sums there are
        b[r // 2] = -128
        try:
            product = int8_product(a, b)
        except (AttributeError, RuntimeError):
            return False
        if not torch.equal(product.to(torch.float64), a.to(torch.float64) @ b.to(torch.float64).T):
            return False

    def seconds(multiply: Callable[[Tensor, Tensor], Tensor]) -> float:
        taken = []
        for _ in range(3):
            start = time.perf_counter()
            multiply(a, b)
            taken.append(time.perf_counter() - start)
        return min(taken)

    return device.type != "cpu" or seconds(int8_product) < 4 * seconds(float32_product)


class Scaled:
    """Vectors as float32 matrices: with the mean m of given rows and a power of two s, x' = s (x - m), rounded.

    Of the given rows |y'| <= 1. Others may be so far away that their squares overflow; see `rounded`.
    """

    def __init__(self, rows: Tensor, device: torch.device):  # rows [N, F]
        self.device = device
        parts = [part for part in steps(rows) if len(part)]
        total = sum((x.to(device, torch.float64).sum(dim=0) for x in parts), torch.zeros((), device=device))
        self._mean = total / max(len(rows), 1)
        norms = [self._centred(x).norm(dim=1).amax() for x in parts]
        largest = torch.stack(norms).amax().item() if norms else 0.0
        self.scale = 2.0 ** min(-math.frexp(largest)[1], 1000)

    def _centred(self, rows: Tensor) -> Tensor:
        return rows.to(self.device, torch.float64) - self._mean

    def rounded(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """x', and |x'| in float64, infinite where it is too large for float32 products."""
        x = (self._centred(rows) * self.scale).to(torch.float32)
        norm = torch.linalg.vector_norm(x, dim=1, dtype=torch.float64)
        return x, norm.masked_fill(~(norm < 2.0**60), math.inf)

    def matrix(self, rows: Tensor) -> Tensor:
        """x', 0 where it is too large."""
        x, norm = self.rounded(rows)
        return x.masked_fill_(norm.isinf()[:, None], 0)


def vector_distances(x: Tensor, y: Tensor) -> Tensor:
    """||x - y|| along the last dimension, float64; the same for a pair wherever and with whatever else it is computed.

    x and y broadcast: [..., F].
    """
    return pairwise_sum((x.to(torch.float64) - y.to(torch.float64)).square_()).sqrt()


def pairwise_sum(x: Tensor) -> Tensor:
    """Sums over the last dimension of x [..., F], which is overwritten; in an order that depends on F alone."""
    size = x.shape[-1]
    while size > 1:
        half = (size + 1) // 2
        x[..., : size - half] += x[..., half:size]
        size = half
    return x[..., 0]


@contextlib.contextmanager
def full_float32() -> Iterator[None]:
    """Keep matrix products of float32 from rounding their inputs to TF32 or bfloat16."""
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(precision)


def steps(rows: Tensor, size: int | None = None) -> tuple[Tensor, ...]:
    """Rows in steps of a few million elements, for work that needs some bytes per element; `size` elements per row."""
    return rows.split(max(_ELEMENTS // (size or rows.shape[1]), 1))
