"""run-state.json: whether the run of a folder goes on, for tools that follow it."""

import json
import os
from pathlib import Path
from typing import Any

from dnnlib.limits import parse_json, read_regular
from dnnlib.util import atomic_write

NAME = "run-state.json"
NOT_FINITE = "the loss was NaN or infinite"  # in the reason of a run that failed by it
STATES = ("running", "complete", "stopped", "failed")


def write_run_state(run_dir: str | os.PathLike, state: str, kimg: float, reason: str = "") -> None:
    """Replace the state of a run, atomically.

    Parameters
    ----------
    run_dir : run folder, which exists
    state : running (as of the last snapshot), complete, stopped (by a signal; its training state is saved), failed
    kimg : thousands of training images seen
    reason : why it is no longer running, for people

    Raises
    ------
    ValueError
        If `state` is none of these.
    """
    if state not in STATES:
        raise ValueError(f'The state of a run is one of {", ".join(STATES)}, not "{state}".')
    with atomic_write(Path(run_dir) / NAME, "w") as file:
        file.write(json.dumps(dict(state=state, kimg=kimg, reason=reason)) + "\n")


def read_run_state(run_dir: str | os.PathLike) -> dict[str, Any] | None:
    """Read what `write_run_state` wrote: {state, kimg, reason}; None if the folder has no such file.

    A run that was killed outright, without the time to say so, is still called running.

    Raises
    ------
    OSError, ValueError
        If the file cannot be read or is of another kind.
    """
    path = Path(run_dir) / NAME
    try:
        text = read_regular(path)
    except FileNotFoundError:
        return None
    try:
        content = parse_json(text)
        return dict(state=str(content["state"]), kimg=float(content["kimg"]), reason=str(content.get("reason", "")))
    except (AttributeError, KeyError, TypeError, ValueError) as err:
        raise ValueError(f'"{path}" does not hold the state of a run; delete it.') from err


def has_diverged(state: dict[str, Any] | None) -> bool:
    """True of the state of a run that has ended because its loss was not finite."""
    return state is not None and state["state"] == "failed" and NOT_FINITE in state["reason"]


def mark_failed(run_dir: str | os.PathLike, reason: str) -> None:
    """Call a run failed if it is called running; its kimg stays."""
    now = read_run_state(run_dir)
    if now is not None and now["state"] == "running":
        write_run_state(run_dir, "failed", now["kimg"], reason)
