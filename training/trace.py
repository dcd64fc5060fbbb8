"""How the optimum's posterior over training images narrows while an image is sampled."""

import csv
import os
from pathlib import Path
from typing import Any

import numpy as np

from dnnlib.util import atomic_write
from torch_utils import distributed as dist
from training.optim import OptimEDM

COLUMNS = ("size", "seed", "step", "sigma", "effective_number", "nearest_index", "weight")


class PosteriorTrace:
    """Collects, per seed and sampling step, what `OptimEDM.posterior` says at the point that the sampler visits.

    Of several calls at one sigma in a row (the trial point of Heun's method, then the point itself) the last
    counts, so that there is one row per step.
    """

    def __init__(self, net: OptimEDM):
        self._net = net
        self._rows: list[tuple] = []
        net.trace = []

    def add(self, seeds: list[int]) -> None:
        """Take what `net` has recorded for a batch that began with these seeds."""
        calls = []
        for sigma, posterior in self._net.trace:
            if calls and bool((calls[-1][0] == sigma).all()):
                calls.pop()
            calls.append((sigma, posterior))
        self._net.trace = []
        for step, (sigma, posterior) in enumerate(calls):
            columns = [sigma, posterior.effective_number, posterior.nearest, posterior.weight]
            for seed, *values in zip(seeds, *(column.tolist() for column in columns)):
                self._rows.append((self._net.size, seed, step, *values))

    def write(self, path: str | os.PathLike) -> None:
        """Write the rows of all ranks as CSV, by seed and step; every rank must call this."""
        parts = [self._rows] if self._net.shard else dist.gather(self._rows)
        if dist.get_rank() == 0:
            with atomic_write(path, "w") as file:
                writer = csv.writer(file, lineterminator="\n")
                writer.writerow(COLUMNS)
                writer.writerows(sorted((row for part in parts for row in part), key=lambda row: row[1:3]))
        dist.barrier()


def read_trace(path: str | os.PathLike) -> dict[str, Any]:
    """Read a trace: {column: array [rows]}.

    Raises
    ------
    OSError, ValueError
        If the file is missing or not such a trace.
    """
    try:
        with open(Path(path), encoding="utf-8", newline="") as file:
            rows = list(csv.reader(file))
        if tuple(rows[0]) != COLUMNS or len(rows) < 2:
            raise ValueError
        table = np.array(rows[1:], dtype=np.float64)
        if not np.isfinite(table).all() or (table < 0).any() or (table[:, 4] < 0.999).any():
            raise ValueError  # sizes, seeds and steps are whole numbers; the effective number is at least 1
    except (IndexError, ValueError, csv.Error):
        raise ValueError(f'"{path}" is not a trace of generate_optim.py --trace (or has no rows).') from None
    return {name: table[:, i] for i, name in enumerate(COLUMNS)}
