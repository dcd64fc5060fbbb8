"""How many CPU threads the work is worth: a small network on many waits for them, on a busy machine for long."""

import contextlib
import os
from collections.abc import Iterator

import torch

WORK_PER_THREAD = 1e9  # multiplications of a pass below which a further thread costs more than it brings


def choose_threads(work: float) -> int:
    """CPU threads for passes of so many multiplications each, of those that torch would take.

    ``OMP_NUM_THREADS``, where it is set, has decided already (torchrun sets it to 1 for several processes).
    """
    available = torch.get_num_threads()
    if os.environ.get("OMP_NUM_THREADS"):
        return available
    return min(available, 1 + int(work / WORK_PER_THREAD))


def network_work(net: torch.nn.Module, batch: int) -> float:
    """Multiplications of a forward pass of `batch` images, at most: each weight of a filter once per pixel."""
    pixels = getattr(net, "img_resolution", 1) ** 2
    return float(sum(p.numel() for p in net.parameters())) * pixels * batch


@contextlib.contextmanager
def cpu_threads(count: int) -> Iterator[None]:
    """Compute with so many CPU threads, and then with as many as before."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
