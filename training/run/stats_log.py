"""stats.jsonl: one JSON object per tick."""

import contextlib
import json
import os
import time
from pathlib import Path

from dnnlib.util import atomic_write


class StatsLog:
    """Appends averages to a file, a whole line or none.

    Parameters
    ----------
    path : stats.jsonl
    nimg : training images seen so far. Lines beyond, of a time that did not make it into a training state, are
        removed, and so is a half-written one: the ticks that they were of come again.
    """

    def __init__(self, path: str | os.PathLike, nimg: int):
        self._path = Path(path)
        if self._path.is_file():
            _cut(self._path, nimg)
        self._file = open(path, "ab", buffering=0)  # noqa: SIM115 (closed in __exit__)

    def add(self, averages: dict[str, dict[str, float]]) -> None:
        """Append the averages of a tick, of `Collector.flush`, with the time.

        Raises
        ------
        OSError
            If the disk is full; the file is then as it was.
        """
        size = os.fstat(self._file.fileno()).st_size
        line = (json.dumps(dict(averages, timestamp=time.time())) + "\n").encode()
        try:
            while line:
                line = line[self._file.write(line) :]
        except OSError as err:
            with contextlib.suppress(OSError):
                self._file.truncate(size)
            raise OSError(err.errno, err.strerror, os.fspath(self._path)) from err

    def __enter__(self) -> "StatsLog":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._file.close()


def _cut(path: Path, nimg: int) -> None:
    with open(path, "rb") as file:
        lines = file.readlines()
    kept = [line for line in lines if _nimg(line) <= nimg]
    if len(kept) < len(lines):
        with atomic_write(path) as file:
            file.writelines(kept)


def _nimg(line: bytes) -> float:
    """Training images seen at a line; infinite if it is not whole."""
    try:
        return round(json.loads(line)["Progress/kimg"]["mean"] * 1000) if line.endswith(b"\n") else float("inf")
    except (KeyError, TypeError, ValueError):
        return float("inf")
