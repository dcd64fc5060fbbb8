"""What is measured: the snapshots of a run, or the closed-form optimum of a dataset in their place."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dnnlib.util import fetch
from training.optim import load_optimum
from training.snapshot import list_snapshots, load_network


@dataclass(frozen=True)
class Subject:
    """A denoiser to be measured."""

    path: Path  # of the snapshot, or of the dataset whose optimum it is
    kimg: int | None  # None: not trained
    optimum: str | None  # "unconditional" or "class-conditional" optimum; None: a trained network
    load: Callable[[], tuple[torch.nn.Module, dict[str, Any]]]  # the network, and the header of its snapshot

    @property
    def name(self) -> str:
        """What files about it are called: network-snapshot-KIMG, or optimum-NAME."""
        return self.path.stem if self.optimum is None else f"optimum-{self.path.stem}"


def snapshot_subjects(run_dir: str | os.PathLike, device: torch.device | str) -> list[Subject]:
    """The snapshots of a run after kimg 0, newest first.

    Raises
    ------
    OSError, ValueError
        If there is no such folder, or no such snapshot in it.
    """
    snapshots = {kimg: path for kimg, path in list_snapshots(run_dir) if kimg > 0}
    if not snapshots:
        raise ValueError(f'"{run_dir}" holds no network snapshot after kimg 0; name the folder of a run.')
    return [
        Subject(path, kimg, None, lambda path=path: load_network(path, device))
        for kimg, path in sorted(snapshots.items(), reverse=True)
    ]


def optimum_subject(path_or_url: str, device: torch.device | str, cond: bool = False) -> Subject:
    """The optimum of a dataset, which is loaded at once; see `training.optim.load_optimum`."""
    path = fetch(path_or_url)
    net = load_optimum(path, device, cond=cond)
    return Subject(path, None, "class-conditional" if cond else "unconditional", lambda: (net, {}))
