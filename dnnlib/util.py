"""Dictionaries with attributes, list parsing, atomic files and the run log."""

import contextlib
import errno
import os
import re
import reprlib
import sys
import tempfile
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any
from urllib.parse import urlsplit

_LONGEST_LIST = 10_000_000


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
        If a part is neither an integer nor a range ``LOW-HIGH`` with LOW <= HIGH, or there are more than 10 million
        numbers.
    """
    values: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)\s*(?:-\s*(\d+)\s*)?", part, flags=re.ASCII)
        if not match:
            shown = reprlib.repr(part)  # in one line, and short
            raise ValueError(f"{shown} is neither a whole number nor a range; write for example 1,2,5-10.")
        low, high = int(match[1]), int(match[2] or match[1])
        if high < low:
            raise ValueError(f'The range "{part.strip()}" runs backwards; write {high}-{low}.')
        if len(values) + high - low >= _LONGEST_LIST:
            raise ValueError(f'The list holds more than {_LONGEST_LIST:,} numbers, with the range "{part.strip()}".')
        values.extend(range(low, high + 1))
    return values


def flatten(content: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}"""
    flat: dict[str, Any] = {}
    for key, value in content.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


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


def printable(text: str) -> str:
    """Text in which what cannot be printed is an escape, such as ``\\r``, or ``\\udcff`` for a byte that is not UTF-8.

    Joiners of letters and emoji stay as they are.
    """
    odd = ("Cc", "Cf", "Cn", "Co", "Cs", "Zl", "Zp")
    return "".join(
        c.encode("unicode_escape").decode() if unicodedata.category(c) in odd and c not in "\u200c\u200d" else c
        for c in text
    )


# ----------------------------------------------------------------------------
# Files.


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike, mode: str = "wb", durable: bool = True) -> Iterator[IO]:
    """Open a temporary file beside `path`; on success flush it to disk and rename it to `path`, durably, too.

    Readers see the old file or the new one, never a part; after an error nothing is left behind, and an OSError
    names `path`. `durable=False` does not wait for the disk: for thousands of files that can be made again.
    Text is UTF-8; of a file's name that is not, the bytes are written as escapes, such as ``\\udcff``.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        fd, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    except OSError as err:
        err.filename = os.fspath(path)
        raise
    try:
        umask = os.umask(0)
        os.umask(umask)
        how = {} if "b" in mode else {"encoding": "utf-8", "errors": "backslashreplace"}
        os.fchmod(fd, 0o666 & ~umask)  # mkstemp makes private files; a result is an ordinary one
        with os.fdopen(fd, mode, **how) as file:
            yield file
            file.flush()
            if durable:
                os.fsync(file.fileno())
        os.replace(temporary, path)
        if durable:
            _sync_folder(path.parent)
    except BaseException as err:
        if isinstance(err, OSError) and err.errno is not None and err.filename is None:
            err.filename = os.fspath(path)  # "No space left on device" alone does not say where
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise


def _sync_folder(path: Path) -> None:
    """Flush the entries of a folder to disk: without that, a renamed file can be gone after a power failure."""
    folder = os.open(path, os.O_RDONLY)
    try:
        os.fsync(folder)
    except OSError as err:
        if err.errno not in (errno.EINVAL, errno.ENOTSUP):  # a file system that has no such thing
            raise
    finally:
        os.close(folder)


def check_folder(path: str | os.PathLike) -> None:
    """Refuse a folder that files cannot be written to, without making it.

    Raises
    ------
    OSError
        If the name is empty, there is a file or a broken link of that name or above it, or the nearest folder is
        read-only.
    """
    if not os.fspath(path):
        raise NotADirectoryError("The name of a folder to write to is empty.")
    nearest = next(p for p in [Path(path), *Path(path).absolute().parents] if os.path.lexists(p))
    if not nearest.exists():
        raise NotADirectoryError(f'"{path}" cannot be written to: "{nearest}" is a link that leads nowhere.')
    if not nearest.is_dir():
        raise NotADirectoryError(f'"{path}" cannot be written to: "{nearest}" is a file.')
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise PermissionError(f'"{path}" cannot be written to: no permission to write in "{nearest}".')


def check_file(path: str | os.PathLike, option: str | None = None) -> None:
    """Refuse a file that cannot be written, without making it or its folder; `option` is named in errors.

    Raises
    ------
    OSError
        If the name is empty or that of a folder, a link leads to itself, or as of `check_folder` for its folder.
    """
    prefix = f"{option}: " if option is not None else ""
    if not os.fspath(path):
        raise IsADirectoryError(f"{prefix}The name of a file to write is empty.")
    if Path(path).is_dir():
        raise IsADirectoryError(f'{prefix}"{path}" is a folder; name a file.')
    if os.path.islink(os.path.realpath(path)):
        raise OSError(f'{prefix}"{path}" is a link that leads to itself.')
    try:
        check_folder(Path(path).parent)
    except OSError as err:
        raise type(err)(f"{prefix}{err}") from err


def is_url(text: str) -> bool:
    """True for http and https addresses."""
    return urlsplit(str(text)).scheme in ("http", "https")


def fetch(path_or_url: str, *, verbose: bool = True) -> Path:
    """Return a local path: the argument itself, or the cached download of an http(s) address.

    Nothing in the file is executed; see `dnnlib.download`.

    Raises
    ------
    OSError, ValueError
        If the path does not exist, or the download fails or is not what was announced.
    """
    if is_url(path_or_url):
        from dnnlib.download import download

        return download(path_or_url, verbose=verbose)
    path = Path(path_or_url)
    if not os.fspath(path_or_url) or not path.exists():
        raise FileNotFoundError(f'"{path_or_url}" does not exist.')
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
        with contextlib.suppress(OSError):  # what could not be written was an error already
            self._file.close()


class _Tee:
    def __init__(self, stream: IO[str], file: IO[str]):
        self._stream, self._file = stream, file

    def write(self, text: str) -> int:
        if "\r" not in text and "\x1b" not in text:  # a progress bar rewrites its line; a log file cannot
            try:
                self._file.write(text)
                self._file.flush()
            except OSError as err:
                raise OSError(err.errno, err.strerror, self._file.name) from err
        return self._stream.write(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def script_path(name: str) -> Path:
    """Where an entry point lies: beside the packages in a checkout, among the commands in an installed copy."""
    root = Path(__file__).resolve().parents[1]
    return root / name if (root / name).is_file() else root / "commands" / name
