"""Training state: what a run needs, beside its options, to go on as if it had never stopped."""

import os
import re
import warnings
from pathlib import Path
from typing import Any

import torch

from dnnlib.util import atomic_write
from torch_utils import distributed as dist

FORMAT_VERSION = 1


def random_state() -> dict[str, torch.Tensor]:
    """States of torch's random generators on this rank."""
    state = dict(cpu=torch.get_rng_state())
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_random_state(state: dict[str, torch.Tensor]) -> None:
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def save_state(path: str | os.PathLike, shared: dict[str, Any], per_rank: dict[str, Any]) -> None:
    """Write a state file atomically, on rank 0; every rank must call this.

    Parameters
    ----------
    path : training-state-KIMG.pt
    shared : what all ranks have alike (weights, optimizer, counters)
    per_rank : what each rank has of its own (random states, data position); plain numbers and tensors
    """
    ranks = dist.gather(per_rank)
    if dist.get_rank() == 0:
        try:
            with atomic_write(path) as file:
                torch.save(dict(format=FORMAT_VERSION, shared=shared, ranks=ranks), file)
        except RuntimeError as err:  # what torch makes of an error of the file
            raise OSError(f'"{path}" cannot be written; is the disk full? ({err})') from err
    dist.barrier()


def load_state(path: str | os.PathLike) -> tuple[dict[str, Any], dict[str, Any]]:
    """Read a state file: what is shared, and what belongs to this rank. Nothing in the file is executed.

    Raises
    ------
    OSError, ValueError
        If the file is missing, cut short, of another kind, or of a run with another number of processes.
    """
    path = Path(path)
    if not re.fullmatch(r"training-state-\d+\.pt", path.name):
        raise ValueError(f'"{path}" is not named training-state-KIMG.pt; --resume continues from such a file.')
    if not path.is_file():
        raise FileNotFoundError(f'"{path}" does not exist.')
    try:
        with warnings.catch_warnings(action="ignore"):  # on the pickle protocol of a file that is none
            data = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as err:  # pickle, zip and torch each have their own
        raise ValueError(
            f'"{path}" is cut short or not a training state of this project ({type(err).__name__}).'
        ) from err
    if not isinstance(data, dict) or data.get("format") != FORMAT_VERSION or not {"shared", "ranks"} <= data.keys():
        raise ValueError(f'"{path}" is not a training state of format {FORMAT_VERSION}.')
    if len(data["ranks"]) != dist.get_world_size():
        raise ValueError(
            f'"{path}" was written by {len(data["ranks"])} processes, this run has {dist.get_world_size()}; '
            f"start as many."
        )
    return data["shared"], data["ranks"][dist.get_rank()]
