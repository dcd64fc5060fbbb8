"""Lines of the study's figures: R_mem over |D| with its EMM, and over the training; one per value of a factor."""

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from memorization.curve.emm import Emm, emm_at, emm_estimate, missed_gap
from memorization.curve.factors import differing_options, factor_values, group_by, readable
from memorization.curve.latents import Latents
from memorization.curve.quality import QualityPoint
from memorization.curve.rising import rise_note, rises
from memorization.runs import Run
from memorization.stats.bootstrap import (
    Group,
    Shared,
    independent_part,
    optimism,
    percentiles,
    ratio_replicates,
    seed_spread,
)
from memorization.stats.crossing import Crossing, fit_crossing
from memorization.stats.intervals import wilson_interval

REPLICATES = 2000
# Where the spread between seeds is known from; IMAGES: it is not, and the interval is that of the images only.
RUNS, OTHER_LINES, GIVEN, IMAGES = "runs of one size", "other lines", "given", "images only"
INTERPOLATIONS = ("logit", "linear")


@dataclass(frozen=True)
class CurvePoint:
    """All runs of one size. The ratio is the mean of the runs', with its interval."""

    size: int  # |D|
    epochs: float  # mean
    ratio: float
    ci_low: float
    ci_high: float
    num_memorized: int  # over all runs
    num_samples: int
    runs: int
    optimism: float = 0.0  # taken off the lower end; see `memorization.stats.bootstrap`
    seeds_known: bool = False  # whether the interval knows of seeds; else it is that of the images

    @property
    def interval(self) -> tuple[float, float]:
        return self.ci_low, self.ci_high


@dataclass(frozen=True)
class Line:
    """The curve over |D| of the runs that share one value of a factor."""

    value: Any  # as in the options; None without a factor
    name: str  # the value as text; "" without a factor
    runs: tuple[Run, ...]  # none where the line was read from its table
    points: tuple[CurvePoint, ...]  # ascending size
    emm: Emm
    emm_low: Emm  # ends of the interval; "below" or "at least" where the interval is open
    emm_high: Emm
    confidence: float
    seed_sd: float | None  # spread between seeds, standard deviation of logit R_mem; None: unknown
    seeds_from: str  # RUNS, OTHER_LINES, GIVEN or IMAGES
    crossings: int  # how often the mean ratios pass the level from one size to the next
    interpolation: str = "logit"  # how `emm` is read
    fitted: Crossing | None = None  # None where the line was read from its table
    lowered: Crossing | None = None  # without the excess of the highest of several snapshots
    latents: Latents | None = None  # of the runs of all lines; None where the line was read from its table
    alike: float | None = None  # correlation of whether runs of the same latents memorize an image; None: no such runs

    @property
    def images_only(self) -> bool:
        """Whether nothing is known of the spread between seeds, so that the interval is none of EMM."""
        return self.seeds_from == IMAGES

    @property
    def emm_interval(self) -> str:
        """As text, for example "[28.9, 31.9]", "[below 16, 18.2]" or "[28.9, 31.9] images only"."""
        low, high = self.emm_low.place, self.emm_high.place
        text = f"[{low}]" if low == high and self.emm_low.verdict != "at" else f"[{low}, {high}]"
        return f"{text} {IMAGES}" if self.images_only else text

    @property
    def interval_name(self) -> str:
        """What the interval is, for example "95 % interval"."""
        return f"{100 * self.confidence:g} % interval" + (" of the images of these runs" if self.images_only else "")

    @property
    def notes(self) -> list[str]:
        """Sentences on what was assumed or cannot be known, without a full stop."""
        level, found = f"{100 * self.emm.level:g} %", []
        sizes, ratios = [point.size for point in self.points], [point.ratio for point in self.points]
        if self.crossings > 1:
            how = "a falling curve fitted to all sizes" if self.interpolation == "logit" else "the last of them"
            found.append(f"the ratios pass {level} {self.crossings} times from size to size; EMM is read off {how}")
        elif self.interpolation == "logit" and (gap := missed_gap(sizes, ratios, self.emm)):
            found.append(
                f"the ratios pass {level} between |D| = {gap[0]} and {gap[1]}, the curve fitted to all sizes does not: "
                "noise, or no straight line of logit R_mem in log |D|, as where small sets are trained too briefly; "
                "sizes nearer to the level tell, and --interpolation=linear reads the ratios"
            )
        if note := rise_note(rises(by_size(self.runs))):
            found.append(note)
        if self.alike:
            found.append(
                "runs that were sampled from the same seeds memorize in part the same of them (`alike` in the record); "
                "the intervals allow for it"
            )
        if self.latents is not None and self.latents.unknown(self.runs):
            found.append(
                "of runs that were sampled from the same seeds, distances of images (knn-dist) are not on disk; where "
                "nothing else says how alike the images are, intervals take them as independent, and are too short"
            )
        if self.images_only:
            several = any(point.runs > 1 for point in self.points)
            why, what = "with one run of each size", "train several"
            if several:
                why, what = "from these runs", "train several of a size whose ratios lie between 0 and 100 %"
            found.append(
                f"{why} nothing is known of the spread between seeds, and the interval is that of the images only: "
                f"another seed may move EMM out of it; {what}, or say --seed-sd"
            )
        elif self.seeds_from == OTHER_LINES:
            found.append(f"the spread between seeds (sd {self.seed_sd:.2g} of logit R_mem) is that of the other lines")
        elif self.seeds_from == GIVEN:
            found.append(f"the spread between seeds (sd {self.seed_sd:.2g} of logit R_mem) is as given")
        if self.interpolation == "linear":
            found.append("EMM is read off straight lines in log |D|, as published; its interval is that of the fit")
        return found

    @property
    def differing(self) -> list[str]:
        """Options, |D| and seed aside, in which the runs of this line differ."""
        return differing_options(self.runs)


def curve_lines(
    runs: Iterable[Run],
    by: str | None = None,  # key of `factor_values`; None: one line
    *,
    level: float = 0.9,  # 1 - epsilon
    confidence: float = 0.95,  # of the intervals
    seed_sd: float | None = None,  # spread between seeds, sd of logit R_mem; None: from the runs
    interpolation: str = "logit",  # or "linear": EMM is read off straight lines in log |D|, as published
    replicates: int = REPLICATES,  # of the bootstrap of the ratios
    seed: int = 0,  # of that bootstrap
) -> tuple[list[Line], list[str]]:
    """Curves over |D|, one per value of a factor, each with EMM and its interval.

    Runs of one size are averaged, whatever else they differ in (see `Line.differing`). EMM and its interval are from
    `memorization.stats.crossing`, the intervals of the ratios from `memorization.stats.bootstrap`. Where a line has no
    size with several runs, the spread between seeds is taken from the lines that have; where none has, it is unknown
    and the interval is that of the images only (`Line.images_only`).

    Returns
    -------
    lines : ascending values.
    notes : sentences on what `factor_values` could not read.

    Raises
    ------
    ValueError
        If there are no runs, the key is unknown, or a number is out of range.
    """
    if not 0 < confidence < 1:
        raise ValueError(f"The confidence must lie between 0 and 1, not {confidence}; 0.95 is usual.")
    if not 0 < level < 1:
        raise ValueError(f"The level of EMM must lie between 0 and 1, not {level:g}; 0.9 is usual.")
    if interpolation not in INTERPOLATIONS:
        raise ValueError(f'The interpolation is one of {", ".join(INTERPOLATIONS)}, not "{interpolation}".')
    runs = list(runs)
    groups, notes = by_value(runs, by)
    latents = Latents(runs)
    spreads = [_spread(group, level, latents) for _, group in groups] if seed_sd is None else []
    known = [s for s in spreads if s is not None]
    lines = []
    for i, (value, group) in enumerate(groups):
        prior = None
        if seed_sd is not None:
            source = GIVEN
        elif spreads[i] is not None:
            source = RUNS
        else:
            source, prior = (OTHER_LINES, np.sum(known, axis=0)) if known else (IMAGES, None)
        sd = 0.0 if source == IMAGES else seed_sd
        fitted = _crossing(group, level, latents, sd, prior)
        lowered = _crossing(group, level, latents, sd, prior, [_optimism(run) for run in group])
        spread = float(fitted.seed_sd()[0])
        known_elsewhere = spread if source in (OTHER_LINES, GIVEN) else None
        points = curve_points(
            group, confidence=confidence, seed_sd=known_elsewhere, replicates=replicates, seed=seed, latents=latents
        )
        emm, low, high = _emm(points, fitted, lowered, confidence, interpolation)
        lines.append(
            Line(
                value=value,
                name="" if by is None else readable(value, by),
                runs=tuple(group),
                points=tuple(points),
                emm=emm,
                emm_low=low,
                emm_high=high,
                confidence=confidence,
                seed_sd=None if source == IMAGES else spread,
                seeds_from=source,
                crossings=int(np.abs(np.diff([p.ratio >= level for p in points])).sum()),
                interpolation=interpolation,
                fitted=fitted,
                lowered=lowered,
                latents=latents,
                alike=latents.alike(group),
            )
        )
    return lines, notes


def line_notes(lines: Sequence[Line], by: str | None = None) -> list[str]:
    """The notes of all lines, each once, with the lines that it holds for."""
    found: dict[str, list[str]] = {}
    for line in lines:
        for note in line.notes:
            found.setdefault(note, []).append(line.name)
    return [note if len(names) == len(lines) else f"{by} = {', '.join(names)}: {note}" for note, names in found.items()]


def curve_points(
    runs: Iterable[Run],
    *,
    confidence: float = 0.95,
    seed_sd: float | None = None,  # spread between seeds, if it is known; None: from the runs
    replicates: int = REPLICATES,
    seed: int = 0,
    latents: Latents | None = None,  # of these runs and others; None: of these
) -> list[CurvePoint]:
    """Average the runs of each size; ascending sizes.

    The interval is Wilson's where the spread of seeds is unknown (no size has several runs), else that of the
    bootstrap; see `memorization.stats.bootstrap`, also for the optimism that is taken off the lower end.
    """
    sizes = by_size(runs)
    groups = [run_counts(group) for group in sizes.values()]
    shared = _shared([*sizes.values()], latents)
    seeds_known = seed_sd is not None or seed_spread(groups, shared).rho is not None
    drawn = ratio_replicates(groups, replicates, seed, seed_sd, shared)  # [B, S]
    points = []
    for i, (size, runs) in enumerate(sizes.items()):
        memorized, samples = groups[i]
        ratio = float((memorized / samples).mean())
        if seeds_known:
            low, high = percentiles(drawn[:, i], confidence)
        else:
            part = independent_part(samples, shared, i)  # as so many independent images
            low, high = wilson_interval(part * memorized.sum(), part * samples.sum(), confidence)
        excess = float(np.mean([_optimism(run) for run in runs]))
        points.append(
            CurvePoint(
                size=size,
                epochs=float(np.mean([run.epochs for run in runs])),
                ratio=ratio,
                ci_low=max(min(low - excess, ratio), 0.0),
                ci_high=max(high, ratio),
                num_memorized=int(memorized.sum()),
                num_samples=int(samples.sum()),
                runs=len(runs),
                optimism=excess,
                seeds_known=seeds_known,
            )
        )
    return points


def _shared(groups: Sequence[Sequence[Run]], latents: Latents | None) -> Shared | None:
    """Of the runs of each size, for `memorization.stats.bootstrap`; None where no images are alike."""
    latents = latents or Latents([run for group in groups for run in group])
    alike = latents.alike(*groups)
    return (alike, [latents.numbers(group) for group in groups]) if alike else None


def _spread(runs: Sequence[Run], level: float, latents: Latents) -> np.ndarray | None:
    """log-likelihood of the spread between seeds by the sizes that have several runs; None if that says nothing."""
    groups = [*by_size(runs).values()]
    if seed_spread([run_counts(group) for group in groups], _shared(groups, latents)).rho is None:
        return None
    return _crossing(runs, level, latents).tau_log_likelihood()[0]


def _crossing(
    runs: Sequence[Run],
    level: float,
    latents: Latents,
    seed_sd: float | None = None,
    log_prior: np.ndarray | None = None,
    lowered_by: Sequence[float] | float = 0.0,  # taken off each ratio
) -> Crossing:
    samples = np.array([run.num_samples for run in runs])
    memorized = np.maximum([run.num_memorized for run in runs] - np.asarray(lowered_by) * samples, 0)
    sizes = np.array([run.size for run in runs])
    alike = latents.alike(runs) or 0.0
    return fit_crossing(
        sizes, memorized, samples, level,
        seed_sd=seed_sd, log_prior=log_prior, alike=alike, latents=latents.numbers(runs),
    )  # fmt: skip


def _emm(
    points: Sequence[CurvePoint], fitted: Crossing, lowered: Crossing, confidence: float, interpolation: str
) -> tuple[Emm, Emm, Emm]:
    """EMM with both ends of its interval; `lowered` is the fit without the excess of the highest of several ratios."""
    sizes, level = np.array([p.size for p in points], dtype=np.float64), fitted.level
    estimate = float(fitted.quantile(0.5)[0])
    low = min(float(lowered.interval(confidence)[0][0]), estimate)
    high = max(float(fitted.interval(confidence)[1][0]), estimate)
    emm = emm_at(sizes, estimate, level)
    if interpolation == "linear":
        emm = emm_estimate(sizes, [p.ratio for p in points], level)
    return emm, emm_at(sizes, low, level), emm_at(sizes, high, level)


def by_value(runs: list[Run], by: str | None) -> tuple[list[tuple[Any, list[Run]]], list[str]]:
    """(value, its runs), and the notes of `factor_values`; one group without a key."""
    if not runs:
        raise ValueError("There are no runs; train with train.py and measure with mem_ratio.py.")
    if by is None:
        return [(None, runs)], []
    values, notes = factor_values(runs, by)
    return [(value, [runs[i] for i in indices]) for value, indices in group_by(values)], notes


def by_size(runs: Iterable[Run]) -> dict[int, list[Run]]:
    """Ascending |D| -> its runs."""
    found: dict[int, list[Run]] = {}
    for run in runs:
        found.setdefault(run.size, []).append(run)
    return dict(sorted(found.items()))


def run_counts(runs: Sequence[Run]) -> Group:
    return np.array([run.num_memorized for run in runs]), np.array([run.num_samples for run in runs])


def _optimism(run: Run) -> float:
    counts = np.array([(s.num_memorized, s.num_samples) for s in run.snapshots]).reshape(-1, 2)
    return optimism(counts[:, 0], counts[:, 1])


# ----------------------------------------------------------------------------
# Over the training.


AXES = ("epochs", "kimg", "steps")


def axis_time(run: Run, nimg: Sequence[float], axis: str) -> np.ndarray:
    """Training images seen as epochs, thousands of images or steps, float64.

    Raises
    ------
    ValueError
        If the axis is unknown, or the run does not say its batch size.
    """
    if axis not in AXES:
        raise ValueError(f'The time axis is one of {", ".join(AXES)}, not "{axis}".')
    unit = {"epochs": run.size, "kimg": 1000}.get(axis)
    if unit is None:
        unit = run.options.get("batch_size") or run.command.get("batch")
        if not isinstance(unit, int) or unit < 1:
            raise ValueError(f'"{run.path}" does not say its batch size, and hence not its steps; take --x=kimg.')
    return np.asarray(nimg, dtype=np.float64) / unit


@dataclass(frozen=True)
class Band:
    """A measure over the training: mean of the runs; of one run its 95 % interval, of several lowest and highest."""

    time: np.ndarray  # float [T], ascending
    value: np.ndarray  # float [T]
    low: np.ndarray  # float [T]
    high: np.ndarray  # float [T]


@dataclass(frozen=True)
class Trajectory:
    """R_mem over the training, of one run or of the runs that differ only in their seed."""

    value: Any  # of the factor; None without one
    size: int  # |D|
    name: str
    runs: tuple[Run, ...]
    time: np.ndarray  # float [T], ascending
    ratio: np.ndarray  # float [T], mean of the runs
    low: np.ndarray  # float [T], band: one run: 95 % Wilson interval; several: the lowest run
    high: np.ndarray  # float [T]
    axis: str = "epochs"  # what `time` counts
    quality: Band | None = None  # None: not measured, or not in all runs
    read_runs: int = 0  # how many, where it was read from its table

    @property
    def num_runs(self) -> int:
        return len(self.runs) or self.read_runs

    @property
    def differing(self) -> list[str]:
        """Options, |D| and seed aside, in which the runs differ."""
        return differing_options(self.runs)


def trajectories(
    runs: Iterable[Run],
    by: str | None = None,  # key of `factor_values`
    *,
    per_run: bool = False,  # a line for each run; else runs of the same |D| and value are averaged
    axis: str = "epochs",  # of `AXES`
    quality: Callable[[Run], Sequence[QualityPoint]] | None = None,  # of each run; may be empty
) -> tuple[list[Trajectory], list[str]]:
    """R_mem against the training, in epochs kimg * 1000 / |D| (Gu et al. 2023, Figures 1c and 5c), kimg or steps.

    Runs whose snapshots lie at other times are averaged on all times that lie within all of them, along straight
    lines. The band is the 95 % Wilson interval of a single run, and reaches from the lowest to the highest of several.

    Returns
    -------
    trajectories : by value, then ascending |D|.
    notes : sentences on what `factor_values` could not read.

    Raises
    ------
    ValueError
        If there are no runs, the key is unknown, or averaged runs have no times in common.
    """
    runs = list(runs)
    groups, notes = by_value(runs, by)
    several = len({run.size for run in runs}) > 1
    lines = []
    for value, group in groups:
        for size, same in by_size(group).items():
            parts = ([f"{by} = {readable(value, by)}"] if by else []) + ([f"|D| = {size}"] if several or not by else [])
            labels = _distinct([run.path for run in same])
            for label, part in zip(labels, [[run] for run in same]) if per_run else [("", same)]:
                name = ", ".join([*parts, label] if per_run and len(same) > 1 else parts)
                bands = [_ratio_band(run, axis) for run in part]
                mean = _average(part, bands, axis)
                good = [_quality_band(run, quality(run), axis) for run in part] if quality is not None else []
                found = _average(part, good, axis) if good and None not in good else None
                lines.append(
                    Trajectory(value, size, name, tuple(part), mean.time, mean.value, mean.low, mean.high, axis, found)
                )
    return lines, notes


def _distinct(paths: Sequence[Path]) -> list[str]:
    """The names of folders, with as many of the folders above as it takes to tell them apart."""
    resolved = [path.resolve() for path in paths]
    for depth in range(1, max(len(path.parts) for path in resolved) + 1):
        names = ["/".join(path.parts[-depth:]) for path in resolved]
        if len(set(names)) == len(names):
            return names
    return [str(path) for path in paths]


def _ratio_band(run: Run, axis: str) -> Band:
    low, high = np.array([s.interval for s in run.snapshots]).T
    time = axis_time(run, [s.nimg for s in run.snapshots], axis)
    return Band(time, np.array([s.ratio for s in run.snapshots]), low, high)


def _quality_band(run: Run, points: Sequence[QualityPoint], axis: str) -> Band | None:
    if not points:
        return None
    value, low, high = np.array([(p.value, p.low, p.high) for p in points]).T
    return Band(axis_time(run, [p.nimg for p in points], axis), value, low, high)


def _average(runs: Sequence[Run], bands: Sequence[Band], axis: str) -> Band:
    """The mean of the runs, and from the lowest to the highest; a single run as it is."""
    if len(bands) == 1:
        return bands[0]
    first, last = max(b.time[0] for b in bands), min(b.time[-1] for b in bands)
    common = np.unique(np.concatenate([b.time for b in bands]))
    common = common[(common >= first) & (common <= last)]
    if not common.size:
        raise ValueError(f'"{runs[0].path}" and the runs with it have no {axis} in common; draw them with --per-run.')
    at = np.array([np.interp(common, b.time, b.value) for b in bands])
    return Band(common, at.mean(axis=0), at.min(axis=0), at.max(axis=0))


# ----------------------------------------------------------------------------
# As plain data.


def line_record(line: Line) -> dict[str, Any]:
    """A line as strict JSON takes it: enough to draw it again and to find what it was made of."""
    options, commands = [run.options for run in line.runs], [run.options.get("command") for run in line.runs]
    common = _common(options)
    if all(isinstance(command, dict) for command in commands):
        common["command"] = _common(commands)
    return {
        "value": plain_value(line.value),
        "name": line.name,
        "emm": _emm_record(line.emm),
        "emm_low": _emm_record(line.emm_low),
        "emm_high": _emm_record(line.emm_high),
        "interval_of": "images only" if line.images_only else "EMM",
        "interpolation": line.interpolation,
        "crossings": line.crossings,
        "alike": line.alike,
        "alike_of_one_size": None if line.latents is None else line.latents.alike(*by_size(line.runs).values()),
        "seed_sd": line.seed_sd,
        "seed_sd_from": None if line.images_only else line.seeds_from,
        "notes": line.notes,
        "points": [vars(point) for point in line.points],
        "runs": [_run_record(run) for run in line.runs],
        "differing": line.differing,
        "options": common,  # those that all runs share
    }


def plain_value(value: Any) -> Any:
    """The value of a factor as JSON takes it."""
    return value if isinstance(value, str | int | float | list | None) else None


def _common(options: Sequence[dict[str, Any]]) -> dict[str, Any]:
    return {k: v for k, v in options[0].items() if all(_same(v, other.get(k)) for other in options)}


def _emm_record(emm: Emm) -> dict[str, Any]:
    return {"size": emm.size, "verdict": emm.verdict}


def _run_record(run: Run) -> dict[str, Any]:
    return {
        "run": str(run.path),
        "size": run.size,
        "seed": run.options.get("seed"),
        "epochs": run.epochs,
        "kimg": run.kimg,
        "nimg": run.nimg,
        "ratio": run.ratio,
        "num_memorized": run.num_memorized,
        "num_samples": run.num_samples,
        "adaptive": run.adaptive,
        "snapshots": [vars(snapshot) for snapshot in run.snapshots],
    }


def _same(a: Any, b: Any) -> bool:
    return json.dumps(a, sort_keys=True) == json.dumps(b, sort_keys=True)
