"""Training state: what a run needs, beside its options, to go on as if it had never stopped."""

import errno
import hashlib
import os
import re
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch

from dnnlib.util import atomic_write
from torch_utils import distributed as dist

FORMAT_VERSION = 2  # 1: without checksum; still read

# A state is what torch.save writes, and behind it a line with the SHA-256 of that; torch.load does not mind the line.
_CHECKSUM = re.compile(rb"\nsha256 ([0-9a-f]{64})\n")
_CHECKSUM_SIZE = 73  # bytes


class DamagedState(ValueError):
    """A training state that is cut short or altered."""


@dataclass(frozen=True)
class State:
    """A training state, read."""

    path: Path
    shared: dict[str, Any]  # what all ranks have alike
    own: dict[str, Any]  # what belongs to this rank


# ----------------------------------------------------------------------------
# Random states.


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


# ----------------------------------------------------------------------------
# Writing.


def save_state(
    path: str | os.PathLike, shared: dict[str, Any], per_rank: dict[str, Any], keep: int | None = None
) -> None:
    """Write a state file atomically, on rank 0; every rank must call this.

    Parameters
    ----------
    path : training-state-KIMG.pt
    shared : what all ranks have alike (weights, optimizer, counters)
    per_rank : what each rank has of its own (random states, data position); plain numbers and tensors
    keep : so many of the states up to this one stay in its folder, older ones are removed once this one is on
        disk; None = all

    Raises
    ------
    OSError
        If the file cannot be written, on every rank. Older states are then as they were.
    """
    ranks = dist.gather(per_rank)
    dist.on_rank0(_write, Path(path), dict(format=FORMAT_VERSION, shared=shared, ranks=ranks), keep)


def _write(path: Path, data: dict[str, Any], keep: int | None) -> None:
    with atomic_write(path) as file:
        hashing = _Hashing(file)
        try:
            torch.save(data, hashing)
        except RuntimeError as err:  # what some versions of torch make of an error of the file
            raise OSError(f'"{path}" cannot be written; is the disk full? ({err})') from err
        file.write(b"\nsha256 %s\n" % hashing.digest.hexdigest().encode())
    if keep is not None:
        older = [state for state in list_states(path.parent) if _kimg(state) < _kimg(path)]
        for old in older[: max(len(older) - (keep - 1), 0)]:
            old.unlink(missing_ok=True)


class _Hashing:
    """Passes on what is written to a file, and computes its SHA-256 on the way."""

    def __init__(self, file: IO[bytes]):
        self.digest = hashlib.sha256()
        self._file = file

    def write(self, data: bytes) -> int:
        self.digest.update(data)
        return self._file.write(data)

    def flush(self) -> None:
        self._file.flush()


# ----------------------------------------------------------------------------
# Reading.


def load_state(path: str | os.PathLike) -> State:
    """Read a state file. Nothing in the file is executed.

    Raises
    ------
    OSError, ValueError
        If the file is missing, damaged (the message names the newest whole one before it), of another kind, or of
        a run with another number of processes.
    """
    path = Path(path)
    if not re.fullmatch(r"training-state-\d+\.pt", path.name):
        raise ValueError(f'"{path}" is not named training-state-KIMG.pt; --resume continues from such a file.')
    if not path.is_file():
        raise FileNotFoundError(f'"{path}" does not exist.')
    try:
        data = _read(path)
    except DamagedState as err:
        older = [state for state in list_states(path.parent) if _kimg(state) < _kimg(path)]
        before = next((state for state in reversed(older) if _is_whole(state)), None)
        hint = f" The one before it is whole: --resume={before}" if before is not None else ""
        raise DamagedState(f"{err}{hint}") from err
    return _of_this_rank(path, data)


def _of_this_rank(path: Path, data: dict[str, Any]) -> State:
    if len(data["ranks"]) != dist.get_world_size():
        raise ValueError(
            f'"{path}" was written by {len(data["ranks"])} processes, this run has {dist.get_world_size()}; '
            f"start as many."
        )
    return State(path, data["shared"], data["ranks"][dist.get_rank()])


def list_states(run_dir: str | os.PathLike) -> list[Path]:
    """The files training-state-KIMG.pt of a run folder, oldest first; [] if there is no such folder."""
    named = Path(run_dir).glob("training-state-*.pt")
    return sorted((p for p in named if re.fullmatch(r"training-state-\d+\.pt", p.name)), key=_kimg)


def latest_state(run_dir: str | os.PathLike) -> tuple[State | None, list[str]]:
    """Read the newest whole training state of a run folder; every rank must call this, and reads it once.

    Returns
    -------
    state : None if there is no state at all
    damaged : what is wrong with each newer one

    Raises
    ------
    OSError, ValueError
        If a file cannot be read, is of another kind, or all states are damaged.
    """
    data: dict[str, Any] = {}  # of rank 0, which looks for it

    def find() -> tuple[Path | None, list[str]]:
        nonlocal data
        damaged: list[str] = []
        for path in reversed(list_states(run_dir)):
            try:
                data = _read(path)
                return path, damaged
            except DamagedState as err:
                damaged.append(str(err))
        if damaged:
            raise ValueError(f'No training state in "{run_dir}" is whole; delete them to start from the beginning.')
        return None, []

    path, damaged = dist.on_rank0(find)
    if path is None:
        return None, damaged
    return _of_this_rank(path, data) if data else load_state(path), damaged


def _kimg(path: Path) -> int:
    return int(path.stem.rpartition("-")[2])


def _is_whole(path: Path) -> bool:
    try:
        _read(path)
        return True
    except ValueError:
        return False


def _read(path: Path) -> dict[str, Any]:
    """The content of a state file, if it agrees with its checksum."""
    with open(path, "rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(size - _CHECKSUM_SIZE, 0))
        checksum = _CHECKSUM.fullmatch(file.read())
        if checksum is not None and _sha256(file, size - _CHECKSUM_SIZE) != checksum[1].decode():
            raise DamagedState(f'"{path}" is damaged: it does not agree with its checksum.')
    try:
        with warnings.catch_warnings(action="ignore"):  # on the pickle protocol of a file that is none
            data = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as err:  # pickle, zip and torch each have their own
        if isinstance(err, OSError) and err.errno != errno.EINVAL:  # that one comes of an offset beyond the end
            raise
        raise DamagedState(
            f'"{path}" is cut short or not a training state of this project ({type(err).__name__}).'
        ) from err
    version = data.get("format") if isinstance(data, dict) else None
    kinds = dict(shared=dict, ranks=list)
    if version not in (1, FORMAT_VERSION) or not all(isinstance(data.get(key), kind) for key, kind in kinds.items()):
        raise ValueError(f'"{path}" is not a training state of format 1 to {FORMAT_VERSION}.')
    if version > 1 and checksum is None:
        raise DamagedState(f'"{path}" is cut short: its checksum is missing.')
    return data


def _sha256(file: IO[bytes], size: int) -> str:
    """Digest of the first `size` bytes."""
    digest, block = hashlib.sha256(), 1 << 20
    file.seek(0)
    for start in range(0, size, block):
        digest.update(file.read(min(block, size - start)))
    return digest.hexdigest()
