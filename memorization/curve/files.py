"""The tables and records that lie beside the figures of curves and trajectories."""

import datetime
import json
import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dnnlib.limits import parse_json
from dnnlib.util import atomic_write
from dnnlib.versions import versions
from memorization.curve.emm import emm_text, parse_emm
from memorization.curve.lines import (
    AXES,
    IMAGES,
    INTERPOLATIONS,
    RUNS,
    Band,
    CurvePoint,
    Line,
    Trajectory,
    line_record,
    plain_value,
)
from memorization.curve.quality import MEASURES
from memorization.curve.tables import count, grouped, read_csv, reading_table, same_in_all, write_csv
from memorization.curve.timescales import Timescales, read_timescales

CURVE_COLUMNS = (
    "line", "size", "epochs", "ratio", "ci_low", "ci_high", "num_memorized", "num_samples", "runs",
    "interval_of", "emm", "emm_low", "emm_high", "level", "confidence",
    "interpolation", "value",
)  # fmt: skip
TRAJECTORY_COLUMNS = ("line", "size", "epochs", "ratio", "low", "high", "runs", "level", "value")
QUALITY_COLUMNS = ("quality", "quality_low", "quality_high", "measure", "heldout")


def write_curve_csv(lines: Iterable[Line], path: str | os.PathLike) -> None:
    """One row per point of each line; `line` is empty where there is no factor.

    `interval_of` says whether ci_low and ci_high know of training seeds, or of the images of these runs only. EMM of
    the line and the ends of its interval, the same in each of its rows, may be "below 20.0" or "at least 40.0"; they
    are read as `interpolation` says ("logit" in tables from before there was that column). `value` is JSON, which tells
    numbers from text that looks like them; they are drawn in other colours.
    """
    rows = []
    for line in lines:
        value, how = json.dumps(plain_value(line.value)), line.interpolation
        ends = [emm_text(emm) for emm in (line.emm, line.emm_low, line.emm_high)]
        for p in line.points:
            interval_of = "seeds" if p.seeds_known else IMAGES
            numbers = (getattr(p, name) for name in CURVE_COLUMNS[1:9])
            rows.append([line.name, *numbers, interval_of, *ends, line.emm.level, line.confidence, how, value])
    write_csv(CURVE_COLUMNS, rows, path)


def read_curve_csv(path: str | os.PathLike) -> list[Line]:
    """The lines from what `write_curve_csv` has written, without their runs: enough to draw and print them again.

    Raises
    ------
    ValueError
        If the file is no such table.
    OSError
        If it cannot be read.
    """
    with reading_table(path, "emm.py curve"):
        rows = read_csv(path)
        groups = grouped(rows, "line", "value")
        same_in_all(rows, "level", "confidence", "interpolation")
        return [_line(name, parse_json(value), group) for (name, value), group in groups.items()]


def _line(name: str, value: Any, rows: Sequence[dict[str, str]]) -> Line:
    points, first = [], rows[0]
    same_in_all(rows, "emm", "emm_low", "emm_high", "interval_of")
    for row in rows:
        size, memorized, samples, runs = (count(row[key]) for key in ("size", "num_memorized", "num_samples", "runs"))
        epochs, ratio, low, high = (float(row[key]) for key in ("epochs", "ratio", "ci_low", "ci_high"))
        if not (size > 0 and runs > 0 and memorized <= samples > 0 and 0 <= low <= ratio <= high <= 1):
            raise ValueError("numbers that are none of a curve")
        if not 0 <= epochs < math.inf or (points and size <= points[-1].size):
            raise ValueError("epochs that are none, or sizes that do not ascend")
        seeds = {"seeds": True, IMAGES: False}[row["interval_of"]]
        points.append(CurvePoint(size, epochs, ratio, low, high, memorized, samples, runs, seeds_known=seeds))
    level, confidence = float(first["level"]), float(first["confidence"])
    if not (0 < level < 1 and 0 < confidence < 1):
        raise ValueError("no level or confidence")
    interpolation = first.get("interpolation") or "logit"
    if interpolation not in INTERPOLATIONS:
        raise ValueError("no interpolation")
    emm, emm_low, emm_high = (parse_emm(first[key], level) for key in ("emm", "emm_low", "emm_high"))
    ratios = [p.ratio >= level for p in points]
    return Line(
        value=value, name=name, runs=(), points=tuple(points), emm=emm, emm_low=emm_low, emm_high=emm_high,
        confidence=confidence, seed_sd=None, seeds_from=RUNS if points[0].seeds_known else IMAGES,
        crossings=sum(a != b for a, b in zip(ratios, ratios[1:])), interpolation=interpolation,
    )  # fmt: skip


def write_trajectory_csv(
    trajectories: Sequence[Trajectory],
    path: str | os.PathLike,
    *,
    level: float,  # drawn as a line
    measure: str = "",  # of quality
    heldout: float | None = None,  # that measure of held-out images themselves
) -> None:
    """One row per time of each line; `low` and `high` are the ends of the band, see `Trajectory`.

    The column `epochs` has the name of the axis; `value` is JSON, see `write_curve_csv`. Where quality was measured
    its columns follow, of which the first three are empty at times at which it was not; times at which it alone was
    measured have rows of their own.
    """
    axis = trajectories[0].axis if trajectories else "epochs"
    columns = tuple(axis if name == "epochs" else name for name in TRAJECTORY_COLUMNS)
    with_quality = any(t.quality is not None for t in trajectories)
    rows = []
    for t in trajectories:
        found = {float(time): point for time, *point in zip(t.time, t.ratio, t.low, t.high)}
        good = {} if t.quality is None else dict(zip(t.quality.time.tolist(), _quality_rows(t.quality)))
        about = [measure, "" if heldout is None else heldout]
        for time in sorted({*found, *good}):
            ratio = [float(x) for x in found[time]] if time in found else [""] * 3
            more = [*good.get(time, [""] * 3), *about] if with_quality else []
            rows.append([t.name, t.size, time, *ratio, t.num_runs, level, json.dumps(plain_value(t.value)), *more])
    write_csv(columns + QUALITY_COLUMNS * with_quality, rows, path)


@dataclass(frozen=True)
class TrajectoryTable:
    """What `write_trajectory_csv` has written."""

    trajectories: list[Trajectory]
    level: float
    measure: str  # of quality; "": none
    heldout: float | None


def read_trajectory_csv(path: str | os.PathLike) -> TrajectoryTable:
    """The trajectories of a table, without their runs: enough to draw and print them again.

    Raises
    ------
    ValueError
        If the file is no such table.
    OSError
        If it cannot be read.
    """
    with reading_table(path, "emm.py trajectory"):
        rows = read_csv(path)
        groups = list(grouped(rows, "line", "size", "value").values())
        same_in_all(rows, "level", "measure", "heldout")
        found = [_trajectory(rows) for rows in groups]
        first = groups[0][0]
        level, measure, heldout = float(first["level"]), first.get("measure") or "", first.get("heldout") or ""
        floor = float(heldout) if heldout else None
        if not 0 < level <= 1 or measure not in ("", *MEASURES) or any(t.quality for t in found) != bool(measure):
            raise ValueError("no level or measure")
        if floor is not None and not math.isfinite(floor):
            raise ValueError("no quality of held-out images")
        return TrajectoryTable(found, level, measure, floor)


def _trajectory(rows: Sequence[dict[str, str]]) -> Trajectory:
    first = rows[0]
    same_in_all(rows, "runs")
    size, runs = count(first["size"]), count(first["runs"])
    [axis] = [name for name in AXES if name in first]
    ratio = _read_band(rows, axis, ("ratio", "low", "high"))
    quality = _read_band(rows, axis, QUALITY_COLUMNS[:3]) if QUALITY_COLUMNS[0] in first else None
    if ratio is None or not (ratio.low.min() >= 0 and ratio.high.max() <= 1) or not _ordered(ratio):
        raise ValueError("numbers that are none of a trajectory")
    if min(runs, size) < 1 or ratio.time[0] < 0 or (quality is not None and quality.time[0] < 0):
        raise ValueError("numbers that are none of a trajectory")
    return Trajectory(
        parse_json(first["value"]), size, first["line"], (), ratio.time, ratio.value, ratio.low,
        ratio.high, axis, quality, runs,
    )  # fmt: skip


def _read_band(rows: Sequence[dict[str, str]], axis: str, names: Sequence[str]) -> Band | None:
    """Of the rows that have it; None if none does."""
    kept = [[float(row[key]) for key in (axis, *names)] for row in rows if row[names[0]]]
    if not kept:
        return None
    band = Band(*np.array(kept).T)
    if not np.isfinite(kept).all() or (np.diff(band.time) <= 0).any():
        raise ValueError("times that do not ascend, or numbers that are none")
    return band


def _ordered(band: Band) -> bool:
    """Whether the band holds its line, up to the rounding of a mean."""
    return bool((band.low <= band.value + 1e-9).all() and (band.value <= band.high + 1e-9).all())


def _quality_rows(band: Band) -> list[list[float]]:
    return np.stack([band.value, band.low, band.high], axis=1).tolist()


def runs_table(table: str | os.PathLike) -> Path:
    """Of the times over |D| in FILE.csv: FILE-runs.csv, R_mem of each run over the training."""
    return Path(table).with_name(f"{Path(table).stem}-runs.csv")


def read_timescales_csv(path: str | os.PathLike) -> list[Timescales]:
    """What emm.py timescales has written into that table and `runs_table`, without the runs.

    Raises
    ------
    ValueError
        If a file is no such table.
    OSError
        If one cannot be read.
    """
    with reading_table(f'{path}" with "{runs_table(path)}', "emm.py timescales"):
        return read_timescales(read_csv(path), read_csv(runs_table(path)))


def write_curve_json(
    lines: Sequence[Line],
    path: str | os.PathLike,
    *,
    by: str | None,
    replicates: int,
    command: Sequence[str],  # words of the command line
    notes: Sequence[str] = (),
    left_out: dict[str, str] | None = None,  # folder -> reason
    kept: dict[str, str] | None = None,  # folder that counts as asked for -> why it would not
    joined: dict[str, str] | None = None,  # folder -> the run that it is part of
    counts: dict[str, int] | None = None,  # of what was left out, as the program says it
    effects: Sequence[dict[str, Any]] = (),  # of the lines against one of them
) -> None:
    """Everything that the figure shows and comes from, as strict JSON (numbers that are not finite become null)."""
    content = {
        "format": 1,
        "by": by,
        "level": lines[0].emm.level,
        "confidence": lines[0].confidence,
        "method": "logit line with spread between seeds, see memorization/stats/crossing.py; "
        f"ratios: beta-binomial bootstrap, {replicates} replicates, see memorization/stats/bootstrap.py",
        "lines": [line_record(line) for line in lines],
        **({"effects": list(effects)} if effects else {}),
        **_origin(command, notes, left_out, kept, joined, counts),
    }
    write_json(content, path)


def write_record(
    path: str | os.PathLike,
    *,
    command: Sequence[str],
    by: str | None = None,
    notes: Sequence[str] = (),
    left_out: dict[str, str] | None = None,
    kept: dict[str, str] | None = None,
    joined: dict[str, str] | None = None,
    counts: dict[str, int] | None = None,
    **content: Any,  # further entries
) -> None:
    """What the figure and table beside it come from, and what was left out; arguments as in `write_curve_json`."""
    write_json({"format": 1, "by": by, **content, **_origin(command, notes, left_out, kept, joined, counts)}, path)


def _origin(
    command: Sequence[str],
    notes: Sequence[str],
    left_out: dict[str, str] | None,
    kept: dict[str, str] | None,
    joined: dict[str, str] | None,
    counts: dict[str, int] | None,
) -> dict[str, Any]:
    return {
        "notes": list(notes),
        "left_out": left_out or {},
        "left_out_counts": counts or {},
        "kept": kept or {},
        "joined": joined or {},
        "versions": versions(),
        "command": list(command),
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def write_json(content: dict[str, Any], path: str | os.PathLike) -> None:
    """As strict JSON, in which numbers that are not finite are null."""
    with atomic_write(path, "w") as file:
        json.dump(_strict(content), file, indent=1, allow_nan=False)
        file.write("\n")


def _strict(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _strict(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [_strict(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
