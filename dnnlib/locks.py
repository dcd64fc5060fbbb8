"""Lock files: one process at a time writes a file, or works on a task, even across machines that share a disk."""

import contextlib
import errno
import fcntl
import os
import warnings
from collections.abc import Iterator
from pathlib import Path

_UNSUPPORTED = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL}


@contextlib.contextmanager
def file_lock(path: str | os.PathLike, *, wait: bool = True) -> Iterator[bool]:
    """Hold the lock file `path` (flock); yields True, or False if another process holds it and `wait` is False.

    The system gives the lock back when the process ends, however it ends. The file is removed by the one who
    held it. On a file system without locks a warning says so, once, and everyone is let in.

    Raises
    ------
    OSError
        If the file cannot be made.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        while True:
            file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
            try:
                fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except BlockingIOError:
                os.close(file)
                yield False
                return
            except OSError as err:
                os.close(file)
                if err.errno not in _UNSUPPORTED:
                    raise
                with contextlib.suppress(FileNotFoundError):
                    path.unlink()
                warnings.warn(
                    f'The file system of "{path.parent}" has no locks; let one process at a time write there.',
                    stacklevel=2,
                )
                break
            stack.callback(os.close, file)
            if _is_open(path, file):
                stack.callback(path.unlink, missing_ok=True)  # first of the two: while the lock is still held
                break
            stack.close()  # its last holder has removed it meanwhile
        yield True


def _is_open(path: Path, file: int) -> bool:
    """True if `path` still is the open file."""
    try:
        return os.path.samestat(path.stat(), os.fstat(file))
    except FileNotFoundError:
        return False
