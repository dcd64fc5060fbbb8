"""Rows that do not fit a GPU, block by block: the next block is copied while the last one is computed."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

_STAGE = 1 << 29  # bytes of pinned memory per stage, at most; there are two


class Stream:
    """Blocks of rows outside a CUDA device, staged in pinned memory that is kept for the next pass.

    On other devices, plain slices.
    """

    def __init__(self, rows: Tensor, device: torch.device, prepare: Callable[[Tensor], Tensor] = lambda part: part):
        self.rows, self.device = rows, device
        self._prepare = prepare  # on the CPU, rows of a block -> what is copied, [n, ...]
        self._stage: list[Tensor] = []
        self._side = torch.cuda.Stream(device) if device.type == "cuda" else None

    def __call__(self, size: int) -> Iterator[tuple[int, Tensor]]:
        """(index of the first, block on the device), of at most `size` rows, and a multiple of 32 where it can be."""
        if self._side is None:
            for start in range(0, len(self.rows), size):
                yield start, self._prepare(self.rows[start : start + size]).to(self.device)
            return
        one = self._prepare(self.rows[:1])
        fits = max(_STAGE // (one[0].numel() * one.element_size()), 1 << 10)
        size = min(size, fits // 32 * 32, len(self.rows))
        if not self._stage or len(self._stage[0]) < size:
            self._stage = [torch.empty(size, *one.shape[1:], dtype=one.dtype, pin_memory=True) for _ in range(2)]
        copied: list[torch.cuda.Event | None] = [None, None]
        current = torch.cuda.current_stream(self.device)
        for turn, start in enumerate(range(0, len(self.rows), size)):
            part = self._prepare(self.rows[start : start + size])
            if copied[turn % 2] is not None:
                copied[turn % 2].synchronize()  # the copy out of this stage, two blocks ago
            stage = self._stage[turn % 2][: len(part)]
            stage.copy_(part)
            with torch.cuda.stream(self._side):
                block = stage.to(self.device, non_blocking=True)
                copied[turn % 2] = torch.cuda.Event()
                copied[turn % 2].record(self._side)
            current.wait_stream(self._side)
            block.record_stream(current)
            yield start, block
