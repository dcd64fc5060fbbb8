"""The folder of a run: how it is named and claimed, refused where it holds another run, cleared, left at an error."""

import contextlib
import itertools
import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dnnlib.cli import describe_error
from dnnlib.limits import parse_json, read_regular
from dnnlib.util import atomic_write, check_folder
from torch_utils import distributed as dist
from training.run.checkpoint import list_states
from training.run.state import NAME as RUN_STATE
from training.run.state import mark_failed, read_run_state, write_run_state
from training.snapshots.snapshot import list_snapshots

OPTIONS = "training_options.json"
MEASUREMENTS = ("mem_traj.jsonl", "mem_traj.log", "knn-dist")
# What --overwrite removes: all that training and measuring write into a run folder by themselves.
_CONTENT = (
    "network-snapshot-*.safetensors", "network-snapshot-*.pkl", "training-state-*.pt", OPTIONS, RUN_STATE,
    "stats.jsonl", "log.txt", "events.out.tfevents.*", "mem_traj*", "knn-dist", "best.json",
)  # fmt: skip


def plan_run_dir(outdir: str | os.PathLike, name: str | None) -> Path:
    """`outdir` itself, or with a name the subfolder NUMBER-NAME of it with the next free number; nothing is made.

    Raises
    ------
    OSError, ValueError
        If there can be no such folder.
    """
    check_folder(os.fspath(outdir))
    if name is None:
        return Path(outdir)
    name = f"{max(run_numbers(Path(outdir)), default=-1) + 1:05d}-{name}"
    if len(os.fsencode(name)) > 255:
        raise ValueError(f'The run folder "{name}" would have too long a name; give a shorter --desc or rename --data.')
    return Path(outdir) / name


def refuse_another_run(run_dir: Path, resumed: Path | None, latest: bool, content: dict[str, Any]) -> None:
    """Refuse a folder that holds a run which is not continued: what is left of it would count as of the new one.

    Parameters
    ----------
    run_dir : where the run shall go
    resumed : training state from which it goes on; None: it begins
    latest : whether it was asked to go on from the newest state there, or to begin where there is none yet
    content : dataset_sha256 and labels_sha256 of the training set

    Raises
    ------
    ValueError
        If it holds snapshots, states or measurements of another run.
    """
    if not run_dir.is_dir():
        return
    if resumed is not None and resumed.resolve().parent == run_dir.resolve():
        return  # a training state of other images is refused where it is read
    snapshots, states = len(list_snapshots(run_dir)), len(list_states(run_dir))
    measured = any((run_dir / name).exists() for name in MEASUREMENTS)
    if not snapshots and not states and not measured:
        return
    if latest and not _is_of_other_images(run_dir, content):
        return  # it was killed before its first state: the same run begins again
    counts = {"snapshot": snapshots, "training state": states}
    held = [f"{count} {what}{'s' if count > 1 else ''}" for what, count in counts.items() if count]
    held += ["measurements"] * measured
    raise ValueError(
        f'"{run_dir}" holds a run ({", ".join(held)}), which would be mixed with this one: continue it with '
        "--resume=latest and its options, clear it with --overwrite, or take another --outdir."
    )


def _is_of_other_images(run_dir: Path, content: dict[str, Any]) -> bool:
    try:
        recorded = parse_json(read_regular(run_dir / OPTIONS))
        return any(None not in (value, recorded.get(key)) and value != recorded[key] for key, value in content.items())
    except (OSError, ValueError, AttributeError):
        return False


def clear_run(run_dir: Path) -> None:
    """Remove what training and measuring have written into a folder; other files stay."""
    for path in itertools.chain.from_iterable(run_dir.glob(pattern) for pattern in _CONTENT):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def run_numbers(outdir: Path) -> set[int]:
    """Numbers at the beginning of the names of the folders in `outdir`."""
    names = [p.name for p in outdir.iterdir() if p.is_dir()] if outdir.is_dir() else []
    return {int(match[0]) for match in (re.match(r"\d+", name) for name in names) if match}


def make_numbered_dir(planned: Path) -> Path:
    """Make the folder NUMBER-NAME, or the same with the next free number if another run has taken this one.

    A number is claimed by making a folder of a hidden name, which only one process can do, and the claim
    becomes the run folder by renaming. So runs that start at the same time get different numbers, whatever
    their names.
    """
    outdir = planned.parent
    first, _, name = planned.name.partition("-")
    outdir.mkdir(parents=True, exist_ok=True)
    for number in itertools.count(int(first)):
        claim = outdir / f".{number:05d}.claimed"
        with contextlib.suppress(FileExistsError):
            claim.mkdir()
            if number not in run_numbers(outdir):  # else it was taken between plan and claim
                return claim.rename(outdir / f"{number:05d}-{name}")
            claim.rmdir()
    raise AssertionError("unreachable")


@contextlib.contextmanager
def open_run_dir(planned: Path, options: dict, *, numbered: bool, overwrite: bool = False) -> Iterator[Path]:
    """Make the run folder, on rank 0; yield its path. An error before the first snapshot removes a new folder.

    Parameters
    ----------
    planned : of `plan_run_dir`
    options : what training_options.json shall hold
    numbered : whether its name begins with a number, of which the next free one is taken
    overwrite : remove the run that the folder holds
    """
    run_dir, new = planned, False

    def make() -> Path:
        nonlocal run_dir, new
        if numbered:
            run_dir, new = make_numbered_dir(planned), True
        else:
            exists = run_dir.exists()
            run_dir.mkdir(parents=True, exist_ok=True)
            new = not exists
        if overwrite:
            clear_run(run_dir)
        with contextlib.suppress(ValueError, OSError):  # complete by other options than those: it goes on
            if (state := read_run_state(run_dir)) is not None and state["state"] == "complete":
                write_run_state(run_dir, "running", state["kimg"])
        with atomic_write(run_dir / OPTIONS, "w") as file:
            json.dump(options, file, indent=2)
        return run_dir

    try:
        yield dist.on_rank0(make)
    except BaseException as err:
        if dist.get_rank() == 0 and new and describe_error(err) is not None and not list_snapshots(run_dir):
            shutil.rmtree(run_dir)
        elif dist.get_rank() == 0 and not _restarts_left():
            with contextlib.suppress(ValueError, OSError):  # the first error is the one to report
                mark_failed(run_dir, " ".join(str(err).split()) or type(err).__name__)
        raise


def _restarts_left() -> bool:
    """Whether torchrun starts the processes again when one of them fails."""
    done, limit = (int(os.environ.get(f"TORCHELASTIC_{name}", "0")) for name in ("RESTART_COUNT", "MAX_RESTARTS"))
    return done < limit


def write_json(path: str | os.PathLike, entries: dict[str, Any]) -> None:
    """Write a file of a run as JSON, atomically."""
    with atomic_write(path, "w") as file:
        file.write(json.dumps(entries, indent=2, allow_nan=False) + "\n")
