"""The files of a two-moons study: a table over epochs, what happened to each training point, and the summary."""

import csv
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import numpy as np

from dnnlib.limits import parse_json, read_regular
from dnnlib.util import atomic_write
from memorization.curve.tables import count, read_csv, reading_table
from memorization.stats.timing import Answer
from toy.data import GROUPS
from toy.study import Curves, Result, Settings, check_same, share

_COLUMNS = (
    "repeat", "seed", "epoch", "group", "training_points", "points", "generated", "nearest", "memorized", "fraction",
    "per_point", "chance_per_point", "optimum_per_point", "share", "chance_share", "optimum_share", "distance", "loss",
    "chance", "chance_nearest", "optimum", "optimum_nearest", "outliers_by",
)  # fmt: skip


def write_table(result: Result, path: Path) -> None:
    """One row per repeat, epoch and group.

    training_points counts copies each and points counts them once; fraction is of all generated points, per_point of
    `points`, share of `nearest`, the points generated nearest to the group; distance and loss are of the repeat, and
    the same in each group's row. chance and optimum are counts as `memorized` is, and outliers_by says how outliers
    are compared. `read_table` reads it.
    """
    curves = result.curves()
    per_point, chance = curves.per_point(result.memorized), curves.per_point(result.chance)
    optimum = curves.per_point(result.optimum)
    shares, chance_share = share(result.memorized, result.nearest), share(result.chance, result.chance_nearest)
    optimum_share = share(result.optimum, result.optimum_nearest)
    by = "share" if curves.in_shares else "count"
    with atomic_write(path, "w") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(_COLUMNS)
        for r, data in enumerate(result.data):
            sizes, originals = data.sizes(), data.originals()
            for (e, epoch), (g, name) in ((e, g) for e in enumerate(result.epochs) for g in enumerate(GROUPS)):
                count = result.memorized[r, e, g]
                numbers = (
                    count / result.generated, per_point[r, e, g], chance[r, g], optimum[r, g],
                    shares[r, e, g], chance_share[r, g], optimum_share[r, g],
                )  # fmt: skip
                writer.writerow([
                    r, result.settings.seed + r, epoch, name, sizes[g], originals[g], result.generated,
                    result.nearest[r, e, g], count, *(_number(n) for n in numbers), _number(result.distance[r, e]),
                    _number(result.loss[r, e]), result.chance[r, g], result.chance_nearest[r, g],
                    _number(result.optimum[r, g]), _number(result.optimum_nearest[r, g]), by,
                ])  # fmt: skip


def read_table(path: str | os.PathLike) -> Curves:
    """The counts of a study from what `write_table` has written.

    Raises
    ------
    ValueError
        If the file is no such table, or rows are missing.
    OSError
        If it cannot be read.
    """
    with reading_table(path, "outlier_study.py moons"):
        rows = read_csv(path)
        cells = {(count(row["repeat"]), count(row["epoch"]), row["group"]): row for row in rows}
        repeats, epochs = (sorted({key[i] for key in cells}) for i in (0, 1))

        def column(name: str, type: Callable, last: bool = False) -> np.ndarray:  # [R, E, 3], or [R, 3] at the end
            at = epochs[-1:] if last else epochs
            values = np.array([[[type(cells[r, e, g][name]) for g in GROUPS] for e in at] for r in repeats])
            return values[:, -1] if last else values

        def optional(text: str) -> float:
            return float(text) if text else float("nan")

        by = {row["outliers_by"] for row in rows}
        generated = {count(row["generated"]) for row in rows}
        if len(rows) != len(cells) or len(generated) != 1 or by not in ({"share"}, {"count"}) or min(epochs) < 1:
            raise ValueError("rows")
        curves = Curves(
            epochs=np.array(epochs), memorized=column("memorized", count), nearest=column("nearest", count),
            chance=column("chance", count, True), chance_nearest=column("chance_nearest", count, True),
            optimum=column("optimum", optional, True), optimum_nearest=column("optimum_nearest", optional, True),
            sizes=column("training_points", count, True)[0], originals=column("points", count, True),
            generated=generated.pop(), in_shares=by == {"share"},
        )  # fmt: skip
        if curves.generated < 1 or (curves.nearest < curves.memorized).any():
            raise ValueError("counts")
        return curves


def write_points(result: Result, path: Path) -> None:
    """Training points [R, N, 2] with groups [R, N], origins [R, N] and first memorized epochs [R, N] (0: never)."""
    with atomic_write(path) as file:
        np.savez_compressed(
            file,
            points=np.stack([data.train for data in result.data]),
            group_names=np.array(GROUPS),
            group=np.stack([data.group for data in result.data]),
            origin=np.stack([data.origin for data in result.data]),
            first_epoch=result.first,
            epochs=result.epochs,
        )


def write_summary(summary: dict[str, Any], path: Path) -> None:
    """The answers of `toy.analysis.summarize` as JSON."""
    with atomic_write(path, "w") as file:
        json.dump(summary, file, indent=2)


def read_summary(folder: Path, settings: Settings) -> dict[str, Any] | None:
    """What `write_summary` has left in the folder of a study with these settings; None if there is none.

    Raises
    ------
    ValueError
        If the folder holds a study with other settings, or the summary is damaged.
    """
    path = folder / "summary.json"
    if not path.exists():
        return None
    check_same(settings, folder)
    try:
        summary = parse_json(read_regular(path))
        for group in ("outlier", "duplicate"):
            answers = summary["false_positives"][group]
            if not all(isinstance(n, int) and n >= 0 for n in answers.values()) or not sum(answers.values()):
                raise ValueError("counts")
            timing = summary["timing"][group]
            answered = timing["answer"] in ("later", "earlier", "not shown")
            if answered != all(isinstance(timing[key], float) for key in ("p_later", "p_earlier")):
                raise ValueError("p-values")
            if timing["answer"] not in get_args(Answer):
                raise ValueError("answer")
        if not isinstance(summary["repeats"], int) or summary["outliers_by"] not in ("share", "count"):
            raise ValueError("repeats")
    except (ValueError, KeyError, TypeError, AttributeError) as err:
        raise ValueError(f'"{path}" is not the summary of a two-moons study; run it again with --null.') from err
    return summary


def _number(value: float) -> str:
    return "" if np.isnan(value) else f"{value:.6g}"
