"""Where the jobs of a search run: as processes of this machine, or through submitit on a Slurm cluster.

A job is a file that `memorization.search.job` understands; search and job talk through the files beside it, so that
they need nothing in common but a disk.
"""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch

from memorization.search.job import EXIT_STOPPED, SearchJob, begin


class Job(Protocol):
    """A job that was started."""

    id: str  # by which the executor knows it

    def poll(self) -> int | None:
        """Exit status, or None while the job waits or runs."""

    def stop(self) -> None:
        """Ask it to save its state and end, and return at once."""


class Executor(Protocol):
    interval: float  # seconds between two looks at a job

    def start(self, path: Path, known_id: str | None = None) -> Job:
        """Start the job of this file; or take it up where `known_id` still waits or runs."""


class LocalExecutor:
    """Each job is a process of this machine. It ends by itself when the process that started it is gone.

    Parameters
    ----------
    gpus : names of the GPUs to share out, as in CUDA_VISIBLE_DEVICES; none: each job finds its own.
    per_job : GPUs of each job. Where there are not enough for all, jobs share them.
    """

    interval = 0.2

    def __init__(self, gpus: Sequence[str] = (), per_job: int = 1):
        self._groups = [gpus[i : i + per_job] for i in range(0, len(gpus) - per_job + 1, per_job)]
        self._jobs: list[tuple[int, subprocess.Popen]] = []  # place in the groups, process

    def start(self, path: Path, known_id: str | None = None) -> "LocalJob":
        begin(path)
        paths = [
            str(Path(__file__).resolve().parents[__package__.count(".") + 1]),
            os.environ.get("PYTHONPATH"),
        ]  # installed or not
        environment = dict(os.environ, PYTHONPATH=os.pathsep.join(filter(None, paths)))
        busy = [place for place, process in self._jobs if process.poll() is None]
        place = min(range(len(self._groups)), key=busy.count, default=0)
        if self._groups:
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(self._groups[place])
        with open(path.with_suffix(".log"), "a", encoding="utf-8") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", f"{__package__}.job", str(path)],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C in the terminal is for the search, which asks its jobs to stop
            )
        self._jobs.append((place, process))
        return LocalJob(path, process)


class LocalJob:
    def __init__(self, path: Path, process: subprocess.Popen):
        self.id, self._path, self._process = str(process.pid), path, process

    def poll(self) -> int | None:
        status = self._process.poll()
        return status if status is None else abs(status)

    def stop(self) -> None:
        self._path.with_suffix(".stop").touch()


class SubmititExecutor:
    """Each job is a job of submitit: of Slurm, or of submitit's own local executor (cluster="local").

    Before Slurm's time limit, or when it takes the machine away, the job saves its state and is queued once more.

    Parameters
    ----------
    folder : for submitit's files; on a disk that the cluster shares.
    cluster : "slurm" or "local".
    parameters : of `submitit.AutoExecutor.update_parameters`, for example timeout_min, gpus_per_node,
        slurm_partition.

    Raises
    ------
    ValueError
        If submitit is not installed, there is no Slurm here, or a parameter is none of submitit's.
    """

    def __init__(self, folder: Path, cluster: str, parameters: dict[str, Any]):
        try:
            import submitit
        except ImportError:
            raise ValueError(
                "Jobs for Slurm need submitit; install it with: pip install 'diffusion-memorization[slurm]'."
            ) from None
        try:
            self._executor = submitit.AutoExecutor(folder=folder, cluster=cluster)
            self._executor.update_parameters(**parameters)
        except (RuntimeError, NameError, ValueError, TypeError, AssertionError) as err:
            text = str(err).splitlines()[0] if str(err) else type(err).__name__
            raise ValueError(f"submitit cannot run jobs with these options: {text}") from None
        self._job_class = {"slurm": submitit.SlurmJob, "local": submitit.LocalJob}[cluster]
        self._folder = folder
        self.interval = 5 if cluster == "slurm" else 0.2

    def start(self, path: Path, known_id: str | None = None) -> "SubmititJob":
        if known_id is not None:
            known = SubmititJob(path, self._job_class(self._folder, known_id))
            if known.poll() is None:
                return known
        begin(path)
        return SubmititJob(path, self._executor.submit(SearchJob(path)))


class SubmititJob:
    """Its exit status is in a file beside the job: what a job returns through submitit would be a pickle."""

    def __init__(self, path: Path, job: Any):
        self.id, self._path, self._job, self._stopping = job.job_id, path, job, False

    def poll(self) -> int | None:
        if not self._job.done():
            return None
        try:
            return int(self._path.with_suffix(".exit").read_text())
        except FileNotFoundError:
            if not self._stopping:
                with open(self._path.with_suffix(".log"), "a", encoding="utf-8") as log:
                    log.write(f"Error: the job ended as {self._job.state}; see {self._job.paths.stderr}\n")
            return EXIT_STOPPED if self._stopping else 1

    def stop(self) -> None:
        self._stopping = True
        self._path.with_suffix(".stop").touch()
        if self._job.state == "PENDING":
            self._job.cancel(check=False)


def visible_gpus() -> list[str]:
    """The GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    count = torch.cuda.device_count()
    named = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    return [name.strip() for name in named.split(",")][:count] if named else [str(i) for i in range(count)]
