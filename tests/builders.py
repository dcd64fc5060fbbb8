"""What several test files use: processes that are waited for, images of handwritten digits, a count of operations."""

import subprocess
import time
from collections.abc import Callable

import numpy as np
from torch.utils._python_dispatch import TorchDispatchMode


def wait_for(condition: Callable[[], object], process: subprocess.Popen | None = None, seconds: float = 120) -> None:
    """Until the condition holds; fails when `process` ends before, or it takes too long."""
    deadline = time.time() + seconds
    while not condition():
        assert process is None or process.poll() is None, f"it ended before, with exit status {process.poll()}"
        assert time.time() < deadline, "waited too long"
        time.sleep(0.02)


def digit_images() -> np.ndarray:
    """scikit-learn's handwritten digits, uint8 [1797, 8, 8], as train.py sees them."""
    from sklearn.datasets import load_digits

    return np.rint(load_digits().images * 255 / 16).astype(np.uint8)


class Operations(TorchDispatchMode):
    """Counts what is launched, and what waits for the device."""

    def __init__(self):
        super().__init__()
        self.count, self.waits = 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        views = ("view", "expand", "slice", "select", "unsqueeze", "detach", "t", "transpose", "permute", "alias")
        self.count += name not in (*views, "_unsafe_view", "reshape", "squeeze", "split", "as_strided", "unbind")
        self.waits += name in ("_local_scalar_dense", "nonzero")
        return func(*args, **(kwargs or {}))
