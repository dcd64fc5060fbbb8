"""What all command lines share: list and number arguments, one-line errors."""

import functools
import math
import os
from collections.abc import Callable
from typing import Any

import click

from dnnlib.util import parse_int_list


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
