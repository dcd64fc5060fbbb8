"""Tables as CSV: what all that the programs write and read have in common."""

import contextlib
import csv
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from dnnlib.util import atomic_write


def read_csv(path: str | os.PathLike) -> list[dict[str, str]]:
    """The rows of a CSV, column -> text; csv.Error, UnicodeDecodeError or OSError if there are none to read."""
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def write_csv(columns: Sequence[str], rows: Iterable[Sequence[Any]], path: str | os.PathLike) -> None:
    with atomic_write(path, "w") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(columns)
        quoting = csv.writer(file, lineterminator="\n", quoting=csv.QUOTE_ALL)
        for row in rows:  # csv.writer quotes a "\n" by itself, but no "\r", which ends a line for readers, too
            (quoting if any("\r" in cell for cell in row if isinstance(cell, str)) else writer).writerow(row)


@contextlib.contextmanager
def reading_table(path: str | os.PathLike, program: str) -> Iterator[None]:
    """Whatever goes wrong with the rows of a table is that it is none of the program's: a ValueError that says so."""
    try:
        yield
    except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, csv.Error) as err:
        raise ValueError(f'"{path}" is no table that {program} has written; draw it from its runs again.') from err


def grouped(rows: Iterable[dict[str, str]], *keys: str) -> dict[tuple[str, ...], list[dict[str, str]]]:
    """The rows by what they have in these columns, in the order of their coming; a ValueError if there are none."""
    groups: dict[tuple[str, ...], list[dict[str, str]]] = {}
    for row in rows:
        groups.setdefault(tuple(row[key] for key in keys), []).append(row)
    if not groups:
        raise ValueError("no rows")
    return groups


def same_in_all(rows: Sequence[dict[str, str]], *keys: str) -> None:
    """Raise ValueError if rows differ in what is the same in all of them: they would be read as the first says."""
    if any(row.get(key) != rows[0].get(key) for row in rows for key in keys):
        raise ValueError("rows that differ")


def count(text: str) -> int:
    """A number of images or runs, as exact in float64."""
    count = int(text)
    if not 0 <= count < 1 << 53:
        raise ValueError("a number that none can be")
    return count


def number(text: str) -> float:
    """One that is finite."""
    if not math.isfinite(value := float(text)):
        raise ValueError("a number that is not finite")
    return value
