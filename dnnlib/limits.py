"""What a file from a stranger may ask for: a small one cannot fill the memory, and only ordinary files are read."""

import json
import os
import stat
import zipfile
from pathlib import Path
from typing import Any

_MOST = 1 << 28  # bytes that any file may unpack to
_RATIO = 100  # times its size that a file may unpack to beyond that; real images stay below 20


def check_unpacked(unpacked: int, packed: int = 0) -> None:
    """Refuse data that unpack to more than 256 MiB, unless that is at most 100 times the `packed` bytes.

    Raises
    ------
    ValueError
        A phrase that goes on after the name of the file.
    """
    if unpacked > max(_MOST, _RATIO * packed):
        raise ValueError(f"it unpacks to {unpacked} bytes, which is too large")


def check_npz(path: str | os.PathLike) -> None:
    """Refuse an .npz whose arrays together unpack to too much, as `check_unpacked` does.

    Raises
    ------
    OSError, ValueError, zipfile.BadZipFile
        Also if it cannot be read.
    """
    with zipfile.ZipFile(path) as archive:
        check_unpacked(sum(info.file_size for info in archive.infolist()), os.path.getsize(path))


def check_regular(path: str | os.PathLike) -> None:
    """Refuse what is neither a regular file nor a link to one: a pipe would wait, a device may have no end.

    Raises
    ------
    OSError
        If it is of another kind, a folder, or a link that leads nowhere.
    """
    try:
        regular = stat.S_ISREG(Path(path).stat().st_mode)
    except FileNotFoundError:
        regular = False
    if not regular:
        raise OSError(f'"{path}" is no regular file.')


def read_regular(path: str | os.PathLike) -> bytes:
    """The bytes of a regular file.

    Raises
    ------
    OSError
        If it cannot be read, or is of another kind.
    """
    if os.path.exists(path):
        check_regular(path)
    return Path(path).read_bytes()


def parse_json(text: str | bytes) -> Any:
    """`json.loads`, but nesting that is too deep is a ValueError, as all other damage is."""
    try:
        return json.loads(text)
    except RecursionError as err:
        raise ValueError(str(err)) from err
