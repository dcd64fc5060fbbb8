"""One job: train one network, then measure it. Of a search for EMM, or of a factor script.

    python -m memorization.search.job JOB.json
    python -m memorization.search.job RUN_DIR TRAIN... --then [MEASURE...]    writes RUN_DIR/job.json and does it

The job says in JSON: `run_dir`, and the command lines `train` and `measure` (lists of words), and whether a complete
run is to go on, since more training is asked for. Beside it lie
NAME.log (what the commands print), NAME.stop (made by whoever wants the job to save its state and end) and
NAME.exit (the exit status, once there is one). A training that is complete is not repeated, one that is not goes on
from its newest training state. What is measured already is left to the measuring command.
"""

import contextlib
import datetime
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from dnnlib.locks import file_lock
from dnnlib.util import atomic_write
from training.run.checkpoint import list_states
from training.run.state import has_diverged, read_run_state

BEGIN = "--- begun"
EXIT_STOPPED = 75  # as of train.py: ended early, goes on when started again
# Of train.py: how long to train. A run that is asked for more of the same one goes on from its last training state.
LENGTHS = ("duration", "total_kimg", "total_steps")
_POLL = 0.2  # seconds between two looks at the child and at NAME.stop


class SearchJob:
    """The job of a job file, to be called in the process that is to do it; picklable before that."""

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        self._child: subprocess.Popen | None = None
        self._parent = 0  # the process that waits for this one
        self.stopping = False  # set it, and the job saves its state and ends

    def __call__(self) -> int:
        """Do the job, and return its exit status, which also goes into NAME.exit."""
        self._parent = os.getppid()
        with file_lock(self.path.with_suffix(".lock")):  # an earlier process may still be saving its state
            status = self._run()
            with atomic_write(self.path.with_suffix(".exit"), "w") as file:
                file.write(f"{status}\n")
        return status

    def checkpoint(self) -> Any:
        """What submitit calls before Slurm takes the machine away: save the state; the job is queued once more."""
        import submitit

        self._end_child()
        return submitit.helpers.DelayedSubmission(SearchJob(self.path))

    def _run(self) -> int:
        job = json.loads(self.path.read_text(encoding="utf-8"))
        run_dir = Path(job["run_dir"])
        trained = is_trained(run_dir) and not job.get("goes_on", False)
        with open(self.path.with_suffix(".log"), "a", encoding="utf-8") as log:
            if job["measure"]:
                return (0 if trained else self._call(job["train"], log)) or self._call(job["measure"], log)
            # Where nothing is to be measured a run that has diverged has ended, too, and is not trained again.
            if trained or has_diverged(read_run_state(run_dir)):
                return 0
            status = self._call(job["train"], log)
            return 0 if has_diverged(read_run_state(run_dir)) else status

    def _call(self, command: list[str], log: Any) -> int:
        """Run a command until it ends, or is asked to because this job is to stop; return its exit status."""
        if self._to_stop():
            return EXIT_STOPPED
        print(f"$ {shlex.join(command)}", file=log, flush=True)
        # In a session of its own, so that Ctrl-C in a terminal reaches it once, through the search.
        try:
            self._child = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )
        except OSError as err:
            print(f'Error: "{command[0]}" cannot be started: {err.strerror}.', file=log)
            return 127
        asked = False
        try:
            while self._child.poll() is None:
                if not asked and self._to_stop():
                    self._child.terminate()  # once: at a second signal train.py ends without saving
                    asked = True
                time.sleep(_POLL)
        finally:
            self._end_child()
        return EXIT_STOPPED if asked and self._child.returncode != 0 else abs(self._child.returncode)

    def _to_stop(self) -> bool:
        orphaned = os.getppid() != self._parent
        self.stopping = self.stopping or orphaned or self.path.with_suffix(".stop").exists()
        return self.stopping

    def _end_child(self) -> None:
        if self._child is not None and self._child.poll() is None:
            self._child.terminate()
            self._child.wait()


def is_trained(run_dir: Path) -> bool:
    """True if the run is complete, by its duration or by an option that ends it early."""
    state = read_run_state(run_dir)
    return state is not None and state["state"] == "complete"


def begin(path: Path) -> None:
    """Begin another part of the job's log, and forget its exit status and the wish that it should stop."""
    for suffix in (".stop", ".exit"):
        path.with_suffix(suffix).unlink(missing_ok=True)
    with open(path.with_suffix(".log"), "a", encoding="utf-8") as log:
        log.write(f"{BEGIN} {datetime.datetime.now(datetime.UTC).isoformat(timespec='seconds')}\n")


def last_words(path: Path) -> str:
    """The last error message in the last part of a job's log, or its last line."""
    with contextlib.suppress(OSError):
        text = path.with_suffix(".log").read_bytes()[-(1 << 16) :].decode(errors="replace")
        lines = [line.strip() for line in text.rpartition(BEGIN)[2].splitlines()[1:] if line.strip()]
        errors = [line for line in lines if line.startswith("Error: ")]
        if lines:
            return (errors or lines)[-1].removeprefix("Error: ")
    return "it has left no message."


def other_options(run_dir: Path, train: list[str], *, images: bool = False) -> list[str]:
    """Options of train.py that the run has, or would have, with another value by the command line `train`.

    "lr 0.01, not 0.005", for example. Those that say how to train and not what (device, workers, ...) do not count, nor
    does a longer training (`more_training`). Empty where there is no run yet, `train` is no command of train.py, or
    one that it refuses.

    Parameters
    ----------
    images : whether to compare the training images, too; what is measured afterwards compares them itself.
    """
    compared = _compare(run_dir, train)
    if compared is None:
        return []
    from memorization.runs import HOW_RUN, NO_FACTOR

    recorded, known, asked = compared
    longer = _lengths(run_dir, compared)
    free = HOW_RUN | {"cbase"} | NO_FACTOR - {"seed", "total_kimg", "total_steps"}  # num_channels has cbase
    drawn = {name for name in ("precision", "seed") if asked[name] is None}
    found = [
        f"{key} {_text(known[key])}, not {_text(value)}"
        for key, value in asked.items()
        if key in known and key not in free | drawn and value != known[key] and key not in longer
    ]
    if images and recorded.get("dataset_sha256") not in (None, _digest(asked)):
        found.append("other images")
    return found


def more_training(run_dir: Path, train: list[str]) -> str:
    """By how much the command line `train` is longer than the run that is there: "duration 60.0 to 120.0"; else "".

    A complete run cannot go on if it has no training state any more, or ended before its time by an option.
    """
    compared = _compare(run_dir, train)
    if compared is None:
        return ""
    _, known, asked = compared
    return "; ".join(f"{key} {known[key]} to {asked[key]}" for key in _lengths(run_dir, compared))


def _lengths(run_dir: Path, compared: tuple[dict, dict, dict]) -> list[str]:
    """Which of `LENGTHS` are asked to be more, of a run that can go on."""
    recorded, known, asked = compared
    more = [key for key in LENGTHS if None not in (known.get(key), asked.get(key)) and known[key] < asked[key]]
    if more and is_trained(run_dir):
        total = recorded.get("total_nimg")
        early = isinstance(total, int | float) and 1000 * read_run_state(run_dir)["kimg"] < total
        if early or not list_states(run_dir):
            return []
    return more


def _compare(run_dir: Path, train: list[str]) -> tuple[dict, dict, dict] | None:
    """What the run recorded, of that its command, and what `train` would record; None where they cannot be compared."""
    script = next((i for i, word in enumerate(train) if Path(word).name == "train.py"), None)
    try:
        recorded = json.loads((run_dir / "training_options.json").read_bytes())
        known = recorded["command"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    if script is None or not isinstance(known, dict):
        return None
    # Only for a run that is there: they take seconds to import.
    import click

    import train as program
    from dnnlib import EasyDict
    from dnnlib.cli import expand_home

    try:
        given = program.main.make_context("train", train[script + 1 :]).params
        asked = program.options_in_effect(EasyDict({name: expand_home(value) for name, value in given.items()}))
    except (click.ClickException, click.exceptions.Exit):
        return None  # train.py says it
    return recorded, known, json.loads(json.dumps(asked))  # lists, as they are recorded


def _text(value: Any) -> str:
    return "none" if value is None else str(value)


def _digest(options: dict[str, Any]) -> str | None:
    """Of the training images; None where they cannot be read, which train.py says."""
    from training.dataset import ImageFolderDataset
    from training.fingerprint import dataset_sha256

    try:
        return dataset_sha256(ImageFolderDataset(options["data"], xflip=options["xflip"]))
    except (ValueError, OSError):
        return None


def write_job(path: Path, run_dir: Path, train: list[str], measure: list[str], goes_on: bool = False) -> None:
    """Write a job file; `train` and `measure` are command lines, `goes_on`: train a complete run further."""
    with atomic_write(path, "w") as file:
        json.dump(dict(run_dir=str(run_dir), train=train, measure=measure, goes_on=goes_on), file, indent=2)


def main(argv: list[str]) -> int:
    """Do the job; at SIGTERM or SIGINT it stops as at NAME.stop."""
    if not argv or argv[0] == "--then" or ("--then" not in argv and not Path(argv[0]).is_file()):
        print("Error: name a JOB.json, or give RUN_DIR TRAIN... --then [MEASURE...].", file=sys.stderr)
        return 2
    if given := "--then" in argv:
        run_dir, then = Path(argv[0]), argv.index("--then")
        images = not argv[then + 1 :] and is_trained(run_dir)
        if differing := other_options(run_dir, argv[1:then], images=images):
            print(
                f'Error: "{run_dir}" was trained with other options ({"; ".join(differing)}). Move that folder away, '
                "or write to another.",
                file=sys.stderr,
            )
            return 2
        if more := more_training(run_dir, argv[1:then]):
            print(f"{run_dir}: goes on, {more} (log: {run_dir / 'job.log'})", file=sys.stderr)
        run_dir.mkdir(parents=True, exist_ok=True)
        write_job(run_dir / "job.json", run_dir, argv[1:then], argv[then + 1 :], goes_on=bool(more))
        begin(run_dir / "job.json")
    job = SearchJob(run_dir / "job.json" if given else argv[0])
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: setattr(job, "stopping", True))
    status = job()
    if given and status != 0:
        said = "Stopped; started again, it goes on." if job.stopping else f"Error: {last_words(job.path)}"
        print(said, file=sys.stderr)
        state = read_run_state(run_dir)  # the launcher of several processes has an exit status of its own
        status = EXIT_STOPPED if state is not None and state["state"] == "stopped" else status
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
