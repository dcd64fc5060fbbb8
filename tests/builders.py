"""What several test files make: processes that are waited for, images of handwritten digits."""

import subprocess
import time
from collections.abc import Callable

import numpy as np


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
