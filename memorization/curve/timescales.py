"""The two clocks of a study: when runs of each |D| generate well, and when they begin to copy."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from dnnlib.limits import parse_json
from memorization.curve.factors import differing_options, readable
from memorization.curve.lines import AXES, axis_time, by_value, plain_value
from memorization.curve.quality import RunQuality, quality_notes, run_quality
from memorization.curve.tables import count, grouped, number, same_in_all
from memorization.runs import Run
from memorization.stats.timescales import (
    AT,
    AT_MOST,
    BEYOND,
    RunTime,
    SizeTime,
    Slope,
    Time,
    fall,
    fit_slope,
    rise,
    size_times,
)

LEVEL, TOLERANCE = 0.1, 0.1
TIMESCALE_COLUMNS = (
    "line", "size", "quantity", "time", "bound", "low", "low_bound", "high", "high_bound", "interval_of", "runs",
    "axis",
    "reached", "level", "tolerance", "measure", "slope", "slope_low", "slope_high", "slope_constant", "value",
)  # fmt: skip
RUN_COLUMNS = ("line", "size", "run", "time", "ratio", "value")  # R_mem of each run over the training


@dataclass(frozen=True)
class Clock:
    """One of the two times, over |D|."""

    name: str  # tau_gen or tau_mem
    sizes: tuple[SizeTime, ...]  # ascending |D|
    slope: Slope | None

    @property
    def notes(self) -> list[str]:
        """Sentences on what is not known, without a full stop."""
        notes = []
        bounds = [s for s in self.sizes if s.reached < s.num_runs]
        for s in bounds:
            kind = {"beyond": "not reached by the last snapshot", "at most": "there at the first snapshot already"}
            verdicts = {r.time.verdict for r in s.runs} - {AT}
            why = " or ".join(kind[v] for v in sorted(verdicts))
            notes.append(
                f"{self.name} at |D| = {s.size} is {why} in {s.num_runs - s.reached} of {s.num_runs} runs: a bound, "
                "which the slope leaves out"
            )
        if any(s.images_only for s in self.sizes):
            notes.append(
                f"{self.name}: with one run of each size nothing is known of the spread between seeds, and the "
                "interval is that of the images only"
            )
        if len(self.sizes) > 1 and self.slope is None:
            notes.append(f"{self.name} has no slope: fewer than two sizes at which every run has reached it")
        elif self.slope is not None and np.isnan(self.slope.low):
            notes.append(f"the slope of {self.name} has no interval: two runs lie on a line whatever they are")
        return notes


@dataclass(frozen=True)
class Timescales:
    """Of the runs that share one value of a factor."""

    value: Any
    name: str  # "" without a factor
    runs: tuple[Run, ...]
    axis: str  # steps, kimg or epochs
    level: float
    tolerance: float
    measure: str | None  # of quality; None: not measured
    mem: Clock
    gen: Clock | None
    curves: dict[int, list[tuple[np.ndarray, np.ndarray]]] = field(default_factory=dict)  # |D| -> (time, R_mem) per run
    quality: tuple[RunQuality, ...] = ()

    @property
    def clocks(self) -> list[Clock]:
        return [self.mem] if self.gen is None else [self.gen, self.mem]


def timescales(
    runs: Iterable[Run],
    by: str | None = None,
    *,
    axis: str = "steps",
    level: float = LEVEL,
    tolerance: float = TOLERANCE,
    measure: str | None = None,  # of quality; None: the first that was measured
    confidence: float = 0.95,
) -> tuple[list[Timescales], list[str]]:
    """tau_gen and tau_mem per |D|, as defined in `memorization.stats.timescales`, and how they grow with it.

    Returns
    -------
    timescales : one per value of `by`.
    notes : sentences without a full stop.

    Raises
    ------
    ValueError
        If there are no runs, the key or axis is unknown, or a number is out of range.
    """
    runs = list(runs)
    if not 0 < tolerance:
        raise ValueError(f"The tolerance of tau_gen must be above 0, not {tolerance:g}; 0.1 is usual.")
    groups, notes = by_value(runs, by)
    found = []
    for value, group in groups:
        mem: dict[int, list[RunTime]] = {}
        gen: dict[int, list[RunTime]] = {}
        curves: dict[int, list[tuple[np.ndarray, np.ndarray]]] = {}
        name = "" if by is None else readable(value, by)
        qualities = {run.path: run_quality(run, measure) for run in group}
        for run in group:
            shots = [s for s in run.snapshots if s.nimg > 0]
            if not shots:
                notes.append(f"{run.path} does not say when its snapshots were taken, and is left out")
                continue
            times = axis_time(run, [s.nimg for s in shots], axis)
            counts = [s.num_memorized for s in shots], [s.num_samples for s in shots]
            mem.setdefault(run.size, []).append(rise(times, *counts, level))
            curves.setdefault(run.size, []).append((times, np.array([s.ratio for s in shots])))
            quality = qualities[run.path]
            if quality is not None and (points := [p for p in quality.points if p.nimg > 0]):
                sign = 1 if quality.less_is_better else -1
                ends = np.array([(sign * p.value, *sorted((sign * p.low, sign * p.high))) for p in points]).T
                times = axis_time(run, [p.nimg for p in points], axis)
                gen.setdefault(run.size, []).append(fall(times, *ends, tolerance))
        if not mem:
            raise ValueError(
                f"None of the runs{f' of {by} = {name}' if by else ''} says when its snapshots were taken."
            )
        known = tuple(q for q in qualities.values() if q is not None)
        notes += quality_notes(list(qualities.values()))
        clocks = [_clock("tau_gen", gen, confidence), _clock("tau_mem", mem, confidence)]
        notes += [f"{by} = {name}: {note}" if by else note for clock in clocks if clock for note in clock.notes]
        found.append(
            Timescales(
                value, name, tuple(group), axis, level, tolerance, known[0].measure if known else None,
                clocks[1], clocks[0], curves, known,
            )
        )  # fmt: skip
        if names := differing_options(group):
            notes.append(f"the runs{f' of {by} = {name}' if by else ''} differ in: {', '.join(names)}")
    return found, list(dict.fromkeys(notes))


def _clock(name: str, times: dict[int, list[RunTime]], confidence: float) -> Clock | None:
    if not times:
        return None
    sizes = size_times(times, confidence)
    return Clock(name, tuple(sizes), fit_slope(sizes, confidence))


def slope_text(clock: Clock) -> str:
    """For example "tau_mem ~ |D|^0.97 [0.88, 1.06]"."""
    if clock.slope is None:
        return f"{clock.name}: no slope"
    s = clock.slope
    interval = "" if np.isnan(s.low) else f" [{s.low:.2f}, {s.high:.2f}]"
    return f"{clock.name} ~ |D|^{s.value:.2f}{interval}"


def timescale_rows(found: Sequence[Timescales]) -> list[list[Any]]:
    """Rows for a CSV, by `TIMESCALE_COLUMNS`."""
    return [
        [
            t.name, s.size, clock.name, s.time.value, s.time.verdict, s.low.value, s.low.verdict, s.high.value,
            s.high.verdict, "images only" if s.images_only else "seeds", s.num_runs, t.axis, s.reached, t.level,
            t.tolerance, t.measure or "",
            *(("", "", "", "") if (x := clock.slope) is None else (x.value, x.low, x.high, x.constant)),
            json.dumps(plain_value(t.value)),
        ]
        for t in found for clock in t.clocks for s in clock.sizes
    ]  # fmt: skip


def run_rows(found: Sequence[Timescales]) -> list[list[Any]]:
    """Rows for a CSV, by `RUN_COLUMNS`; runs of a size are counted from 1."""
    return [
        [t.name, size, number, *point, json.dumps(plain_value(t.value))]
        for t in found
        for size, curves in sorted(t.curves.items())
        for number, curve in enumerate(curves, start=1)
        for point in zip(*(values.tolist() for values in curve))
    ]


def read_timescales(rows: Sequence[dict[str, str]], runs: Sequence[dict[str, str]]) -> list[Timescales]:
    """From rows of `TIMESCALE_COLUMNS` and `RUN_COLUMNS`, without the runs: enough to draw and print them again.

    Raises
    ------
    ValueError, KeyError, TypeError
        If the rows are none of these tables.
    """
    found = []
    same_in_all(rows, "axis", "level", "tolerance")
    key = ("line", "value") if "value" in rows[0] else ("line",)  # older tables say no value
    lines, courses = grouped(rows, *key), grouped(runs, *key)
    if lines.keys() != courses.keys():
        raise ValueError("runs of other lines")
    for (name, *value), own in lines.items():
        same_in_all(own, "measure")
        clocks = {quantity: _read_clock(quantity, part) for (quantity,), part in grouped(own, "quantity").items()}
        curves = _read_courses(courses[name, *value])
        if not clocks.keys() <= {"tau_gen", "tau_mem"} or {s.size for s in clocks["tau_mem"].sizes} != curves.keys():
            raise ValueError("other quantities or sizes")
        level, tolerance = number(own[0]["level"]), number(own[0]["tolerance"])
        if own[0]["axis"] not in AXES or not (0 < level < 1 and tolerance > 0):
            raise ValueError("no axis, level or tolerance")
        found.append(
            Timescales(
                parse_json(value[0]) if value else None, name, (), own[0]["axis"], level, tolerance,
                own[0]["measure"] or None, clocks["tau_mem"], clocks.get("tau_gen"), curves,
            )
        )  # fmt: skip
    return found


def _read_courses(rows: Sequence[dict[str, str]]) -> dict[int, list[tuple[np.ndarray, np.ndarray]]]:
    """|D| -> (time, R_mem) of each run."""
    curves: dict[int, list[tuple[np.ndarray, np.ndarray]]] = {}
    for (size, _), points in grouped(rows, "size", "run").items():
        time, ratio = np.array([[number(row["time"]), number(row["ratio"])] for row in points]).T
        if time[0] < 0 or (np.diff(time) <= 0).any() or ratio.min() < 0 or ratio.max() > 1:
            raise ValueError("times that do not ascend, or ratios that are none")
        curves.setdefault(count(size), []).append((time, ratio))
    return curves


def _read_clock(name: str, rows: Sequence[dict[str, str]]) -> Clock:
    sizes, first = [], rows[0]
    same_in_all(rows, "slope", "slope_low", "slope_high", "slope_constant")
    for row in rows:
        size, reached, runs = (count(row[key]) for key in ("size", "reached", "runs"))
        ends = []
        for value, verdict in (("time", "bound"), ("low", "low_bound"), ("high", "high_bound")):
            if row[verdict] not in (AT, AT_MOST, BEYOND):
                raise ValueError("a bound that is none")
            ends.append(Time(number(row[value]), row[verdict]))
        if not (size >= 1 and reached <= runs >= 1):
            raise ValueError("counts that are none")
        if min(end.value for end in ends) <= 0:
            raise ValueError("times that are none")
        if sizes and size <= sizes[-1].size:
            raise ValueError("sizes that do not ascend")
        only = {"seeds": False, "images only": True}[row["interval_of"]]
        sizes.append(SizeTime(size, (), *ends, only, reached, runs))
    slope = None
    if first["slope"]:
        value, constant = number(first["slope"]), number(first["slope_constant"])
        slope = Slope(value, float(first["slope_low"]), float(first["slope_high"]), constant, 0, len(sizes), ())
    return Clock(name, tuple(sizes), slope)


def timescale_record(t: Timescales) -> dict[str, Any]:
    """As plain data."""

    def time(x: Time) -> dict[str, Any]:
        return {"value": x.value, "verdict": x.verdict}

    return {
        "name": t.name, "axis": t.axis, "level": t.level, "tolerance": t.tolerance, "measure": t.measure,
        "runs": [str(run.path) for run in t.runs],
        "clocks": {
            clock.name: {
                "sizes": [
                    {
                        "size": s.size, "time": time(s.time), "low": time(s.low), "high": time(s.high),
                        "interval_of": "images only" if s.images_only else "seeds", "reached": s.reached,
                        "runs": [{k: time(getattr(r, k)) for k in ("time", "low", "high")} for r in s.runs],
                    }
                    for s in clock.sizes
                ],
                "slope": None if clock.slope is None else vars(clock.slope),
            }
            for clock in t.clocks
        },
    }  # fmt: skip
