"""What several test files use: processes that start quickly or are waited for, images of handwritten digits, measured
runs, a count of operations."""

import atexit
import functools
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils._python_dispatch import TorchDispatchMode

ROOT = Path(__file__).resolve().parent.parent


def wait_for(condition: Callable[[], object], process: subprocess.Popen | None = None, seconds: float = 120) -> None:
    """Until the condition holds; fails when `process` ends before, or it takes too long."""
    deadline = time.time() + seconds
    while True:
        ended = process is not None and process.poll() is not None  # asked first: what it did last still counts
        if condition():
            return
        assert not ended, f"it ended before, with exit status {process and process.poll()}"
        assert time.time() < deadline, "waited too long"
        time.sleep(0.02)


@functools.cache
def forking_python() -> str:
    """A command that is called like python and starts quickly; see fork_python.py."""
    folder = tempfile.mkdtemp(prefix="p")
    server = subprocess.Popen([sys.executable, str(ROOT / "tests/fork_python.py"), f"{folder}/s"])
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    atexit.register(server.kill)
    wait_for(lambda: os.path.exists(f"{folder}/s"), server)
    return f"{folder}/s-python"


def torchrun(processes: int, script: str, *args: Any, code: int = 0) -> str:
    """What an entry point says in several processes; with another `code` than 0 it has to fail.

    Where it is to succeed, nothing depends on torchrun but the variables that it sets, and the processes are forks of
    one that has torch loaded.
    """
    command = [str(ROOT / script), *map(str, args)]
    how: dict[str, Any] = dict(text=True, cwd=ROOT)
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    if code != 0:
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        done = subprocess.run([*launch, *command], capture_output=True, timeout=240, env=env, **how)
        assert done.returncode != 0, done.stdout + done.stderr
        return done.stdout + done.stderr
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    env |= {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
    started = [
        subprocess.Popen(
            [forking_python(), *command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            env=env | {"RANK": str(rank), "LOCAL_RANK": str(rank)}, **how,
        )
        for rank in range(processes)
    ]  # fmt: skip
    out = "".join(process.communicate(timeout=240)[0] for process in started)
    assert not any(process.returncode for process in started), out
    return out


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


def write_run(
    folder: Path,
    size: int,  # |D|
    memorized: Iterable[int],  # of n images, per snapshot
    n: int = 64,
    *,
    kimg: int = 100,  # between snapshots
    total_nimg: float | None = None,
    extra: Iterable[dict[str, Any]] = (),  # further records
    template: Path | None = None,  # measured run folder whose options, first record and losses are taken
    **changes: Any,  # of options; a dict changes KEY_kwargs, if there are
) -> Path:
    """A measured run; returns the folder."""
    folder.mkdir(parents=True)
    memorized = list(memorized)
    if template is None:
        options: dict[str, Any] = {
            "dataset_kwargs": {"path": "x.zip", "resolution": 8, "use_labels": False, "xflip": False},
            "network_kwargs": {"model_channels": 16},
            "total_nimg": 1000 * size,
            "batch_size": 16,
            "seed": 1,
        }
        record = {"seeds": f"0-{n - 1}"}
    else:
        options = json.loads((template / "training_options.json").read_text())
        options["total_nimg"] = 1000 * kimg * len(memorized)
        options["command"] |= {key: value for key, value in changes.items() if key in options["command"]}
        options["command"]["data"] = changes.get("dataset", {}).get("path", options["command"]["data"])
        record = json.loads((template / "mem_traj.jsonl").read_text().splitlines()[0])
        shutil.copy(template / "stats.jsonl", folder)
    options["dataset_kwargs"]["max_size"] = size
    options["total_nimg"] = total_nimg or options["total_nimg"]
    for key, value in changes.items():
        if isinstance(value, dict) and f"{key}_kwargs" in options:
            options[f"{key}_kwargs"] |= value
        else:
            options[key] = value
    (folder / "training_options.json").write_text(json.dumps(options))
    records = [
        record | {"kimg": kimg * i, "snapshot": f"{i}", "num_memorized": k, "num_samples": n}
        for i, k in enumerate(memorized, start=1)
    ]
    if template is not None:
        records = [each | {"ratio": each["num_memorized"] / n} for each in records]
    (folder / "mem_traj.jsonl").write_text("".join(json.dumps(each) + "\n" for each in [*records, *extra]))
    return folder
