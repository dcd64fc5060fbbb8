"""With what a run was trained, session by session: a run that was resumed may have had several commits or machines."""

from pathlib import Path
from typing import Any

from dnnlib.limits import parse_json, read_regular
from dnnlib.versions import versions
from torch_utils import distributed as dist
from training.run.run_dir import OPTIONS

KEYS = ("commit", "machine", "torch", "threads", "processes")


def this_session(machine: str, threads: int, from_kimg: float) -> dict[str, Any]:
    """The entry of `sessions` in training_options.json for what runs now.

    Parameters
    ----------
    machine : of `torch_utils.machine.machine_name`
    threads : of the CPU, per process
    from_kimg : where it begins, in thousand training images
    """
    found = versions()
    return dict(
        commit=found.get("git commit"), machine=machine, torch=found["torch"], threads=threads,
        processes=dist.get_world_size(), from_kimg=from_kimg,
    )  # fmt: skip


def earlier_sessions(run_dir: Path, state: Path | None) -> list[dict[str, Any]]:
    """The sessions of the run in `run_dir`, if it goes on from the training state `state` there; else none."""
    if state is None or state.resolve().parent != run_dir.resolve():
        return []
    try:
        options = parse_json(read_regular(run_dir / OPTIONS))
    except (OSError, ValueError):
        options = {}
    return recorded_sessions(options)


def recorded_sessions(options: dict[str, Any]) -> list[dict[str, Any]]:
    """`sessions` of training_options.json; of a folder from before there was that entry, what is known of its last one.

    What is not recorded is None.
    """
    sessions = options.get("sessions")
    if isinstance(sessions, list) and sessions and all(isinstance(session, dict) for session in sessions):
        return [{key: session.get(key) for key in (*KEYS, "from_kimg")} for session in sessions]
    found = options.get("versions")
    found = found if isinstance(found, dict) else {}
    return [
        dict(
            commit=found.get("git commit"), machine=None, torch=found.get("torch"), threads=options.get("threads"),
            processes=options.get("num_processes"), from_kimg=None,
        )
    ]  # fmt: skip
