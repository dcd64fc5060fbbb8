"""Dictionaries with attributes, list parsing, atomic files, cached downloads and the run log."""

import contextlib
import hashlib
import os
import re
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any
from urllib.parse import urlsplit


class EasyDict(dict):
    """A dict whose items are also attributes: ``d.lr`` is ``d["lr"]``."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None

    def __setattr__(self, name: str, value: Any) -> None:
        self[name] = value

    def __delattr__(self, name: str) -> None:
        del self[name]


# ----------------------------------------------------------------------------
# Text.


def parse_int_list(text: str) -> list[int]:
    """Parse a comma-separated list of integers and ranges: ``"1,2,5-10"`` -> [1, 2, 5, 6, 7, 8, 9, 10].

    Raises
    ------
    ValueError
        If a part is neither an integer nor a range ``LOW-HIGH`` with LOW <= HIGH.
    """
    values: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)\s*(?:-\s*(\d+)\s*)?", part, flags=re.ASCII)
        if not match:
            raise ValueError(f'"{part}" is neither a whole number nor a range; write for example 1,2,5-10.')
        low, high = int(match[1]), int(match[2] or match[1])
        if high < low:
            raise ValueError(f'The range "{part.strip()}" runs backwards; write {high}-{low}.')
        if high - low >= 100_000_000:
            raise ValueError(f'The range "{part.strip()}" holds more than 100 million numbers.')
        values.extend(range(low, high + 1))
    return values


def format_time(seconds: float) -> str:
    """Format a duration the way the status lines do: 12s, 3m 07s, 2h 05m 00s, 1d 02h 03m."""
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    days, h = divmod(hours, 24)
    if days:
        return f"{days}d {h:02}h {m:02}m"
    if hours:
        return f"{h}h {m:02}m {s:02}s"
    return f"{m}m {s:02}s" if minutes else f"{s}s"


# ----------------------------------------------------------------------------
# Files.


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike, mode: str = "wb", durable: bool = True) -> Iterator[IO]:
    """Open a temporary file beside `path`; on success flush it to disk and rename it to `path`.

    Readers see the old file or the new one, never a part; after an error nothing is left behind.
    `durable=False` does not wait for the disk: for thousands of files that can be made again.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    fd, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        umask = os.umask(0)
        os.umask(umask)
        os.fchmod(fd, 0o666 & ~umask)  # mkstemp makes private files; a result is an ordinary one
        with os.fdopen(fd, mode, **({} if "b" in mode else {"encoding": "utf-8"})) as file:
            yield file
            file.flush()
            if durable:
                os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise


def check_folder(path: str | os.PathLike) -> None:
    """Refuse a folder that files cannot be written to, without making it.

    Raises
    ------
    OSError
        If the name is empty, there is a file of that name or above it, or the nearest folder is read-only.
    """
    if not os.fspath(path):
        raise NotADirectoryError("The name of a folder to write to is empty.")
    nearest = next(p for p in [Path(path), *Path(path).absolute().parents] if p.exists())
    if not nearest.is_dir():
        raise NotADirectoryError(f'"{path}" cannot be written to: "{nearest}" is a file.')
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise PermissionError(f'"{path}" cannot be written to: no permission to write in "{nearest}".')


def is_url(text: str) -> bool:
    """True for http and https addresses."""
    return urlsplit(str(text)).scheme in ("http", "https")


def cache_dir() -> Path:
    """Folder for downloads: ``DIFFMEM_CACHE``, or ``diffmem`` in the user's cache folder."""
    if os.environ.get("DIFFMEM_CACHE"):
        return Path(os.environ["DIFFMEM_CACHE"])
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "diffmem"


def fetch(path_or_url: str, *, verbose: bool = True) -> Path:
    """Return a local path: the argument itself, or the cached download of an http(s) address.

    The download is written to a temporary name and renamed when its length agrees with what the
    server announced. Nothing in the file is executed.

    Raises
    ------
    OSError
        If the path does not exist, or the download fails or ends early.
    """
    if not is_url(path_or_url):
        path = Path(path_or_url)
        if not os.fspath(path_or_url) or not path.exists():
            raise FileNotFoundError(f'"{path_or_url}" does not exist.')
        return path

    import requests
    from tqdm import tqdm

    name = re.sub(r"[^\w.-]", "_", Path(urlsplit(path_or_url).path).name) or "download"
    path = cache_dir() / f"{hashlib.sha256(path_or_url.encode()).hexdigest()[:16]}-{name}"
    if path.exists():
        return path
    try:
        with requests.get(path_or_url, stream=True, timeout=30) as response:
            response.raise_for_status()
            expected = int(response.headers.get("Content-Length", 0))
            bar = tqdm(total=expected or None, unit="B", unit_scale=True, desc=name, disable=None if verbose else True)
            with atomic_write(path) as file, bar:
                received = 0
                for block in response.iter_content(1 << 20):
                    file.write(block)
                    received += len(block)
                    bar.update(len(block))
                if expected and received != expected and "Content-Encoding" not in response.headers:
                    raise OSError(f"the download ended after {received} of {expected} bytes")
    except (requests.RequestException, OSError) as err:
        raise OSError(f'Cannot download "{path_or_url}": {err}') from err
    return path


class Logger:
    """While active, copies what is printed to stdout and stderr into a file, progress bars excepted."""

    def __init__(self, path: str | os.PathLike):
        self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115 (closed in __exit__)
        self._stdout, self._stderr = sys.stdout, sys.stderr

    def __enter__(self) -> "Logger":
        sys.stdout, sys.stderr = _Tee(self._stdout, self._file), _Tee(self._stderr, self._file)
        return self

    def __exit__(self, *exc_info: object) -> None:
        sys.stdout, sys.stderr = self._stdout, self._stderr
        self._file.close()


class _Tee:
    def __init__(self, stream: IO[str], file: IO[str]):
        self._stream, self._file = stream, file

    def write(self, text: str) -> int:
        if "\r" not in text and "\x1b" not in text:  # a progress bar rewrites its line; a log file cannot
            self._file.write(text)
            self._file.flush()
        return self._stream.write(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
