"""What all command lines share: list arguments and one-line errors."""

import functools
import os
from collections.abc import Callable
from typing import Any

import click

from dnnlib.util import parse_int_list


class IntList(click.ParamType):
    """Command-line type of ``1,2,5-10``; see `dnnlib.util.parse_int_list`."""

    name = "list"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> list[int]:
        if isinstance(value, list):
            return value
        try:
            return parse_int_list(value)
        except ValueError as err:
            self.fail(str(err), param, ctx)


def report_errors(main: Callable) -> Callable:
    """Turn the errors that a user can cause (ValueError, OSError) into one line and exit status 1.

    ``DIFFMEM_TRACEBACK=1`` shows the traceback instead. Under torchrun each line names its rank.
    """

    @functools.wraps(main)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        try:
            return main(*args, **kwargs)
        except (ValueError, OSError) as err:
            if os.environ.get("DIFFMEM_TRACEBACK") == "1":
                raise
            message = " ".join(str(err).split()) or type(err).__name__
            rank = int(os.environ.get("RANK", "0"))
            raise click.ClickException(f"[rank {rank}] {message}" if rank else message) from None

    return wrapper
