"""Torch's deterministic algorithms, for the same numbers in each run on one kind of device."""

import contextlib
import os
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def deterministic_algorithms(wanted: bool) -> Iterator[None]:
    """While active and `wanted`, torch takes deterministic algorithms only, and fails where it has none.

    To be entered before CUDA is used: cuBLAS reads its workspace setting when it starts.
    """
    if not wanted:
        yield
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    before = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.deterministic
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.deterministic = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        torch.backends.cudnn.deterministic = before[1]
