"""What all command lines share: list and number arguments, one-line errors."""

import errno
import functools
import io
import math
import os
import sys
from collections.abc import Callable, Iterable
from typing import Any

import click

from dnnlib.util import parse_int_list, printable


class IntList(click.ParamType):
    """Command-line type of ``1,2,5-10``, numbers up to `max`; see `dnnlib.util.parse_int_list`."""

    name = "list"

    def __init__(self, max: int | None = None):
        self.max = max

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> list[int]:
        if isinstance(value, list):
            return value
        try:
            numbers = parse_int_list(value)
        except ValueError as err:
            self.fail(str(err), param, ctx)
        if self.max is not None and max(numbers) > self.max:
            self.fail(f"{max(numbers)} is larger than {self.max}.", param, ctx)
        return numbers


class WordList(click.ParamType):
    """Command-line type of a list of some of these words, each once: ``a,b``."""

    name = "list"

    def __init__(self, words: Iterable[str]):
        self.words = tuple(words)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> list[str]:
        parts = value if isinstance(value, list) else [part.strip() for part in value.split(",")]
        for part in parts:
            if part not in self.words:
                self.fail(f"{part!r} is not one of {', '.join(self.words)}.", param, ctx)
        return list(dict.fromkeys(parts))


class Float(click.FloatRange):
    """Command-line type of a number in a range, as `click.FloatRange`; but nan, which passes every range, is refused.

    inf is taken only with `infinite`.
    """

    def __init__(self, *args: Any, infinite: bool = False, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.infinite = infinite

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        number = super().convert(value, param, ctx)
        if math.isnan(number) or (math.isinf(number) and not self.infinite):
            self.fail(f"{number} is not a finite number.", param, ctx)
        return number


def _replace_what_cannot_be_shown() -> None:
    """Let a terminal that is not UTF-8 show ? for a character that it lacks, where it would end the program."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
            stream.reconfigure(errors="replace")


_replace_what_cannot_be_shown()  # here, since --help is printed before any function of a program is called


def expand_home(value: Any) -> Any:
    """~ and ~user at the beginning of a path, where no file has that name; a shell leaves them in --option=~/path."""
    if isinstance(value, list | tuple):
        return type(value)(map(expand_home, value))
    return os.path.expanduser(value) if isinstance(value, str) and not os.path.lexists(value) else value


def report_errors(main: Callable) -> Callable:
    """Turn the errors that a user can cause (ValueError, OSError, too little memory) into one line and exit status 1.

    Beforehand ~ at the beginning of arguments becomes the home folder.

    ``DIFFMEM_TRACEBACK=1`` shows the traceback instead. Under torchrun each line names its rank.
    """

    @functools.wraps(main)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        try:
            return main(*args, **{name: expand_home(value) for name, value in kwargs.items()})
        except (ValueError, OSError, MemoryError, RuntimeError) as err:
            text = describe_error(err)
            if text is None or os.environ.get("DIFFMEM_TRACEBACK") == "1":
                raise
            message = printable(" ".join(text.split()))
            rank = int(os.environ.get("RANK", "0"))
            raise click.ClickException(f"[rank {rank}] {message}" if rank else message) from None

    return wrapper


_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


def describe_error(err: BaseException) -> str | None:
    """What to tell the user about an error, in one sentence or more; None for an error of the program."""
    reason = str(err).strip().splitlines()[0] if str(err).strip() else type(err).__name__
    # torch reports that the CPU has too little memory as a bare RuntimeError.
    if isinstance(err, MemoryError) or type(err).__name__ == "OutOfMemoryError" or "can't allocate memory" in str(err):
        return f"There is not enough memory; take a smaller --batch, network or dataset ({reason[:200]})."
    if isinstance(err, OSError) and err.strerror and err.filename is not None:
        name = os.fsdecode(err.filename if err.filename2 is None else err.filename2)
        advice = "; make room, or choose another folder" if err.errno in _NO_ROOM else ""
        return f'"{name}": {err.strerror}{advice}.'
    return str(err) or type(err).__name__ if isinstance(err, ValueError | OSError) else None
