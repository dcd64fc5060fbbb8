"""A study as one self-contained HTML page: EMM, curves, runs, pictures, options, versions, and how to repeat it."""

import base64
import hashlib
import json
import math
import os
import re
import tempfile
from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

import jinja2

from dnnlib.images import left_out_sentence
from dnnlib.util import atomic_write, format_time
from dnnlib.versions import versions
from memorization.curve.emm import Emm
from memorization.curve.factors import differing_options
from memorization.curve.figures import curve_figure, timescales_figure, trajectory_figure
from memorization.curve.lines import Line, curve_lines, line_notes, trajectories
from memorization.curve.timescales import slope_text, timescales
from memorization.report.commands import FEATURES, command_text, measure_command, train_command
from memorization.report.folder import RunsFolder, common, differing, find_pictures, find_plans
from memorization.runs import NO_FACTOR, QualityCurve, Run
from memorization.selection import on_other_images

CHARTS = 60  # runs of which the training is drawn
HERE = Path(__file__).parent
STYLE, SCRIPT = ((HERE / name).read_text(encoding="utf-8") for name in ("report.css", "report.js"))


class Cell(NamedTuple):
    """A cell of a table that is more than its text."""

    text: object
    sort: float | str | None = None  # what to sort by
    code: bool = False  # a name in a file, in the type of code
    more: str = ""  # after the code


def write_report(
    folder: RunsFolder,  # of `memorization.report.folder.read_runs_folder`, with at least one run
    out: str | os.PathLike,  # the page
    *,
    by: str | None = None,  # option that gives each of its values a curve, as of `curve_lines`
    level: float = 0.9,  # ratio that defines EMM, 1 - epsilon
    seed_sd: float | None = None,  # spread between seeds, sd of logit R_mem; None: from the runs
    title: str | None = None,
    command: Sequence[str] = (),  # what made the page; shown
) -> None:
    """Write the page. It needs no other file and no network, and appears complete or not at all.

    Raises
    ------
    ValueError
        If nothing is measured, `by` is no option of the runs, or the level is out of range.
    """
    if not folder.runs:
        raise ValueError(f'No measured run in "{folder.root}"; train with train.py and measure with mem_ratio.py.')
    lines, notes = curve_lines(folder.runs.values(), by, level=level, seed_sd=seed_sd)
    notes += [*line_notes(lines, by), *folder.notes]
    name = folder.root.absolute().name
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True
    )
    environment.filters["count"] = _count
    content = environment.get_template("report.html.j2").render(
        title=title or f"Memorization study: {name}",
        # Nothing from outside, and no script or style but the page's own.
        policy=f"default-src 'none'; img-src data:; style-src '{_digest(STYLE)}'; script-src '{_digest(SCRIPT)}'; "
        "base-uri 'none'; form-action 'none'",
        style=STYLE,
        script=SCRIPT,
        headline=_headline(folder, lines, by),
        curves=_curves(folder, lines, by, notes),
        plans=_plans(folder),
        runs=_runs(folder),
        left_out=[(_code(name), reason) for name, reason in folder.left_out.items()],
        others_left_out=any(folder.left_out_counts().values()),
        left_out_sentence=left_out_sentence(folder.left_out_counts()),
        training=_training(folder, level),
        pictures=_pictures(folder),
        options=_options(folder),
        versions=_versions(folder),
        root=folder.root,
        command=command_text(command),
        commands=_commands(folder, f"{name}-again"),
        made=f"{datetime.now().astimezone():%Y-%m-%d %H:%M %Z}",
    )
    with atomic_write(out, "w") as file:
        file.write(content)


def _digest(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _code(name: object) -> Cell:
    return Cell(name, code=True)


def _image(data: bytes, mime: str, alt: str) -> dict[str, str]:
    return {"base64": base64.b64encode(data).decode(), "mime": mime, "alt": alt}


# ----------------------------------------------------------------------------
# What came out.


def _headline(folder: RunsFolder, lines: Sequence[Line], by: str | None) -> dict[str, Any]:
    runs = folder.runs.values()
    sizes = sorted({run.size for run in runs})
    images = sum(s.num_samples for run in runs for s in run.snapshots)
    kinds = sorted({f"{run.options.get('arch', '?')} with {run.options.get('precond', '?')}" for run in runs})
    span = f"|D| = {sizes[0]:,}" + (f" to {sizes[-1]:,}" if len(sizes) > 1 else "")
    what = (
        f"{_count(len(runs), 'training run')} ({', '.join(kinds)}) on {_count(len(sizes), 'training-set size')}, {span}"
    )
    if by is not None:
        what += f"; compared: {by} = {', '.join(line.name for line in lines)}"
    facts = []
    for line in lines:
        label = f"EMM ({100 * line.emm.level:g} %)" + (f", {by} = {line.name}" if by is not None else "")
        interval = f"{line.interval_name} {line.emm_interval}"
        facts.append((line.emm.place, label, interval))
    facts += [(len(runs), "measured runs", None), (f"{sizes[0]:,} – {sizes[-1]:,}", "training images |D|", None)]
    facts += [(f"{images:,}", "generated images compared", None)]
    return {"what": what + ".", "facts": facts}


def _curves(folder: RunsFolder, lines: Sequence[Line], by: str | None, notes: Sequence[str]) -> dict[str, Any]:
    points = list(folder.runs.values())
    level = lines[0].emm.level
    values = ", ".join(f"{line.name or 'all runs'}: {line.emm} {line.emm_interval}" for line in lines)
    figures = [
        (
            _drawn(curve_figure, lines, f"Memorization ratio over |D|. {values}", by=by),
            "R_mem over |D|, with 95 % intervals; the dashed line is the level of EMM.",
        )
    ]
    try:
        paths, more = trajectories(points, by)
    except ValueError:  # runs without epochs in common have no mean
        paths, more = trajectories(points, by, per_run=True)
    alt = f"Memorization ratio over epochs: {'; '.join(path.name for path in paths)}"
    caption = "R_mem over the training; band: 95 % interval of one run, lowest to highest of several."
    figures.append((_drawn(trajectory_figure, paths, alt, level=level), caption))
    try:
        clocks, _ = timescales(points, by)
    except ValueError as err:  # snapshots of different measures of quality, or without a batch size
        clocks = []
        more.append(f"tau_gen and tau_mem are not shown: {str(err).rstrip('.')}")
    clocks = [found for found in clocks if found.gen is not None]
    if clocks:
        words = "; ".join(slope_text(clock) for found in clocks for clock in found.clocks)
        caption = f"When models become good (tau_gen) and begin to copy (tau_mem), see emm.py timescales: {words}."
        figures.append((_drawn(timescales_figure, clocks, words), caption))
        more += [note for found in clocks for clock in found.clocks for note in clock.notes]

    if any(point.adaptive for point in points):
        more.append("some ratios are of adaptive measurements, which stop early: sure on the side of their bar only")
    warnings = [f"Note: {note}." for note in dict.fromkeys([*notes, *more])]
    for line in lines:
        if line.differing:
            which = f" of {by} = {line.name}" if by is not None else ""
            warnings.append(f"Note: the runs{which} differ in more than |D| and seed: {', '.join(line.differing)}.")
    head = ["line", "|D|", "runs", "epochs", "R_mem %", "95 % interval", "images"]
    rows = [
        [
            line.name or "all",
            p.size,
            p.runs,
            f"{p.epochs:,.0f}",
            _percent(p.ratio),
            _interval(p.interval),
            p.num_samples,
        ]
        for line in lines
        for p in line.points
    ]
    return {"warnings": warnings, "figures": figures, "points": (head, rows)}


def _drawn(draw: Callable[..., None], what: Sequence[Any], alt: str, **how: Any) -> dict[str, str]:
    """What a function of `memorization.curve.figures` draws, as part of the page."""
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "figure.svg"
        draw(what, path, **how)
        return _image(path.read_bytes(), "image/svg+xml", alt)


def only_factor(folder: RunsFolder) -> str | None:
    """The option in which the runs differ beside |D| and seed, or the dataset, if it is one; else None."""
    if not folder.runs:
        return None
    runs = folder.select(keep=["all"]).runs.values()  # a run and what it continues are one
    names = differing_options(list(runs)) + (["dataset"] if on_other_images(list(runs)) else [])
    return names[0] if len(names) == 1 and names != ["sampler"] else None


# ----------------------------------------------------------------------------
# How it came about.


def _plans(folder: RunsFolder) -> dict[str, Any]:
    plans, left_out = find_plans(folder.root, [run.path for run in folder.runs.values()])
    return {"plans": [_plan(name, plan) for name, plan in plans.items()], "left_out": left_out}


def _plan(name: str, plan: dict[str, Any]) -> dict[str, Any]:
    """The decisions of a search, in their order, and what it found."""
    if plan.get("format") != 1:
        return _plan_of_runs(name, plan)
    rows = []
    for i, decision in enumerate(d for d in plan["decisions"] if isinstance(d, dict)):
        ratio, bracket, runs = (decision.get(key) for key in ("ratio", "bracket", "runs"))
        runs = [run for run in runs if isinstance(run, dict)] if isinstance(runs, list) else []
        rows.append(
            [
                i + 1,
                _show(decision.get("size")),
                _show(decision.get("why")),
                _percent(ratio) if isinstance(ratio, int | float) else "–",
                "at or above" if decision.get("above") else "below",
                "yes" if decision.get("certain") else "no, by the estimate alone",
                ", ".join(_show(run.get("images")) for run in runs),
                _between(*(bracket if isinstance(bracket, list) and len(bracket) == 2 else (None, None))),
            ]
        )
    head = ["", "|D|", "why this size", "R_mem %", "the level", "certain", "images", "then EMM is"]
    words = []
    if dropped := plan.get("dropped"):
        words.append(f"Begun and given up, since other decisions made them needless: |D| = {_show(dropped)}.")
    result = plan.get("result")
    words.append("The search has not ended." if result is None else f"Found: {_found(result)}.")
    settings = plan.get("settings") if isinstance(plan.get("settings"), dict) else {}
    known = [(_code(key), _code(_show(value))) for key, value in settings.items()]
    return {"name": name, "head": head, "rows": rows, "words": words, "settings": known}


def _plan_of_runs(name: str, plan: dict[str, Any]) -> dict[str, Any]:
    """The same of a search that decides by a fit to all runs."""
    rows = []
    for i, decision in enumerate(d for d in plan["decisions"] if isinstance(d, dict)):
        ratio, emm = decision.get("ratio"), decision.get("emm")
        emm = emm if isinstance(emm, dict) else {}
        rows.append(
            [
                i + 1,
                _show(decision.get("size")),
                _show(decision.get("why")),
                _percent(ratio) if isinstance(ratio, int | float) else "–",
                _show(decision.get("images")),
                _end(emm.get("estimate")),
                f"{_end(emm.get('low'))} – {_end(emm.get('high'))}",
            ]
        )
    head = ["", "|D|", "why this size", "R_mem %", "images", "then EMM is", "interval"]
    result = plan.get("result")
    words = "The search has not ended."
    if isinstance(result, dict) and isinstance(result.get("confidence"), int | float):
        words = f"Found: EMM {_end(result | {'size': result.get('emm')})}, {100 * result['confidence']:g} % interval "
        words += f"{_end(result.get('low'))} – {_end(result.get('high'))} over images and training seeds"
        words += "." if result.get("as_asked") else "; it is wider than was asked for."
    settings = plan.get("settings") if isinstance(plan.get("settings"), dict) else {}
    known = [(_code(key), _code(_show(value))) for key, value in settings.items()]
    return {"name": name, "head": head, "rows": rows, "words": [words], "settings": known}


def _end(emm: Any) -> str:
    """An estimate of EMM, or an end of its interval, as a plan has it."""
    size, verdict = (emm.get("size"), emm.get("verdict")) if isinstance(emm, dict) else (None, None)
    known = isinstance(size, int | float) and verdict in ("at", "below", "at least")
    return Emm(size, verdict, 0.9).place if known else "–"


def _between(low: Any, high: Any) -> str:
    """The bracket of a search in words."""
    if low is None or high is None:
        return "unknown" if low is high else f"below {_show(high)}" if low is None else f"at least {_show(low)}"
    return f"between {_show(low)} and {_show(high)}"


def _found(result: Any) -> str:
    """The result of a search in words."""
    try:
        emm = Emm(float(result["emm"]), str(result["verdict"]), float(result["level"]))
        text = f"{emm}, {_between(*result['bracket'])}" if emm.verdict == "at" else str(emm)
        sure = "each end of the bracket is certain" if result["certain"] else "not all ends of the bracket are certain"
        return f"{text}; {sure}; {float(result['trained_kimg']):,.1f} thousand images trained on"
    except (KeyError, TypeError, ValueError):
        return _show(result)


def _runs(folder: RunsFolder) -> tuple[list[str], list[list[object]], set[int]]:
    commands = [run.command for run in folder.runs.values()]
    factors = {key: values for key, values in differing(commands).items() if key not in NO_FACTOR}
    factors = dict(list(factors.items())[:4])  # the others are in the table of options
    head = ["run", "|D|", "R_mem %", "95 % interval", "images", "at epoch", "epochs", "seed", "trained", "on", *factors]
    rows = []
    for i, (name, run) in enumerate(folder.runs.items()):
        best = run.nimg / run.size
        state = run.state and run.state["state"]
        processes = run.options.get("num_processes", 1)
        where = (run.device or "unknown") + (f" × {processes}" if processes != 1 else "")
        rows.append(
            [
                Cell(name, code=True, more=f" ({state})" if state not in (None, "complete") else ""),
                run.size,
                Cell(_percent(run.ratio), run.ratio),
                Cell(_interval(run.interval), run.interval[0]),
                Cell(f"{run.num_samples:,}" + (" (adaptive)" if run.adaptive else ""), run.num_samples),
                Cell(f"{best:,.0f}", best),
                Cell(f"{run.epochs:,.0f}", run.epochs),
                _show(run.options.get("seed")),
                Cell(format_time(run.seconds), run.seconds) if run.seconds is not None else Cell("unknown", ""),
                where,
                *(_show(values[i]) for values in factors.values()),
            ]
        )
    return head, rows, set(range(1, 9))


# ----------------------------------------------------------------------------
# Over training.


def _training(folder: RunsFolder, level: float) -> dict[str, Any]:
    drawn = list(folder.runs.items())[:CHARTS]
    note = f" The first {CHARTS} of {len(folder.runs)} runs are drawn." if len(drawn) < len(folder.runs) else ""
    return {"note": note, "charts": [_chart(name, run, level) for name, run in drawn]}


def _chart(name: str, run: Run, level: float) -> dict[str, Any]:
    """Ratio above loss, and above quality, where it was measured, over epochs: paths, dots, texts of an inline SVG."""
    left, right, top, middle, low, bottom = 34, 252, 8, 78, 92, 134  # of the two panels, in units of the drawing
    ratios = [(s.nimg / run.size, s.ratio, *s.interval) for s in run.snapshots]
    losses = [(x, loss) for x, loss in run.losses if loss > 0]
    quality = run.quality
    end = max([run.epochs, *(r[0] for r in ratios), *(x for x, _ in losses), *(q[0] for q in quality.points)])
    x = _scale(0, end, left, right)
    y = _scale(0, 1, middle, top)

    loss = None
    texts = [(left - 4, top + 6, "100", "end"), (left - 4, middle, "0", "end")]
    if losses:
        least, most = min(loss for _, loss in losses), max(loss for _, loss in losses)
        z = _scale(math.log(least), math.log(most), bottom - 2, low + 2)
        loss = _path([(x(e), z(math.log(loss))) for e, loss in losses])
        texts += [(left - 4, low + 6, f"{most:.2g}", "end"), (left - 4, bottom, f"{least:.2g}", "end")]
    else:
        texts.append(((left + right) / 2, (low + bottom) / 2, "no loss recorded", "middle"))
    height = bottom
    drawn = None
    if quality.points:
        panel_top, height = bottom + 20, bottom + 72
        drawn = _quality_panel(quality, x, (panel_top, height), right)
        texts += [(left - 4, panel_top + 6, drawn["most"], "end"), (left - 4, height, drawn["least"], "end")]
        texts += [(right, panel_top - 5, quality.label, "end")]
        texts += [(left + 3, y + (9 if y < panel_top + 10 else -3), words, "start") for y, words in drawn["names"]]
    texts += [(left, height + 13, "0", "middle"), (right, height + 13, f"{end:,.0f} epochs", "end")]
    return {
        "name": name, "size": f"{run.size:,}", "width": 260, "height": height + 16,
        "words": f"Memorization ratio and training loss of {name} over {end:,.0f} epochs"
        + (f", and {quality.label}" if drawn else ""),
        "axes": f"M{left} {top}V{middle}H{right}M{left} {low}V{bottom}H{right}"
        + (f"M{left} {panel_top}V{height}H{right}" if drawn else ""),
        "quality": drawn,
        "level": f"M{left} {y(level)}H{right}",
        "intervals": [f"M{x(e)} {y(below)}V{y(above)}" for e, _, below, above in ratios],
        "ratio": _path([(x(e), y(r)) for e, r, *_ in ratios]),
        "dots": [
            (x(e), y(ratio), f"epoch {e:,.0f}: {_percent(ratio)} % {_interval(interval)}")
            for e, ratio, *interval in ratios
        ],
        "loss": loss, "texts": texts,
    }  # fmt: skip


def _quality_panel(
    quality: QualityCurve, x: Callable[[float], float], panel: tuple[float, float], right: float
) -> dict[str, Any]:
    """Quality over epochs, linear; dashed, the values of the training set and of held-out images."""
    top, bottom = panel
    values = [value for _, value, *_ in quality.points] + list(quality.floors.values())
    least, most = min(values), max(values)
    y = _scale(least, most, bottom - 2, top + 2)
    return {
        "least": f"{least:.2g}", "most": f"{most:.2g}", "path": _path([(x(e), y(v)) for e, v, *_ in quality.points]),
        "names": [(y(value), name) for name, value in quality.floors.items()],
        "floors": [(f"M{x(0)} {y(value)}H{right}", f"{name}: {value:.4g}") for name, value in quality.floors.items()],
        "dots": [(x(e), y(v), f"epoch {e:,.0f}: {v:.4g} [{a:.4g}, {b:.4g}]") for e, v, a, b in quality.points],
    }  # fmt: skip


def _scale(start: float, end: float, first: float, last: float) -> Callable[[float], float]:
    """Linear map of start..end to first..last, to a tenth of a unit."""
    factor = (last - first) / ((end - start) or 1)
    return lambda value: round(first + (value - start) * factor, 1)


def _path(points: Sequence[tuple[float, float]]) -> str:
    return "".join(f"{'L' if i else 'M'}{x} {y}" for i, (x, y) in enumerate(points))


def _pictures(folder: RunsFolder) -> dict[str, Any]:
    pictures, left_out = find_pictures(folder.root, [run.path for run in folder.runs.values()])
    return {
        "pictures": [(name, _image(data, "image/png", f"Picture {name}")) for name, data in pictures.items()],
        "left_out": [(_code(name), reason) for name, reason in left_out.items()],
    }


# ----------------------------------------------------------------------------
# With what.


def _options(folder: RunsFolder) -> dict[str, Any]:
    options = [run.command for run in folder.runs.values()]
    differ = differing(options)
    rows = [[_code(name), *(_show(values[i]) for values in differ.values())] for i, name in enumerate(folder.runs)]
    same = [(_code(key), _code(_show(value))) for key, value in common(options).items()]
    return {"number": len(options), "differ": (["run", *differ], rows), "same": same}


def _versions(folder: RunsFolder) -> dict[str, Any]:
    here = versions()
    groups: dict[str, tuple[dict[str, Any], list[str]]] = {}
    for name, run in folder.runs.items():
        recorded = run.options.get("versions")
        recorded = recorded if isinstance(recorded, dict) else {}
        groups.setdefault(json.dumps(recorded, sort_keys=True), (recorded, []))[1].append(name)
    columns = [(found, _count(len(names), "run")) for found, names in groups.values() if found]
    unknown = sum(len(names) for found, names in groups.values() if not found)
    keys = dict.fromkeys([*here, *(key for found, _ in columns for key in found)])
    rows = [[key, here.get(key, ""), *(_show(found.get(key, "")) for found, _ in columns)] for key in keys]
    return {"table": (["", "this page", *(head for _, head in columns)], rows), "unknown": unknown}


def _commands(folder: RunsFolder, again: str) -> list[tuple[str, list[str], list[str]]]:
    """Of each run its name, notes, and the commands that repeat it below the new folder `again`."""
    parts = []
    for name, run in folder.runs.items():
        target = Path(again) / name
        lines, notes = [], []
        try:
            lines.append(command_text(train_command(run.options, target, (run.device or "").split(":")[0] or None)))
            if run.options.get("resume") is not None:
                notes.append("This run went on from a training state; without --resume it starts at the beginning.")
        except ValueError as err:
            notes.append(f"No command for the training: {err}")
        try:
            for record in run.measurements:
                lines.append(command_text(measure_command(record, target)))
                in_features = ((record.get("quality") or {}).get("space") or {}).get("name") == "features"
                if in_features or any(name.startswith(FEATURES) for name in record.get("criteria") or {}):
                    what = " and --quality with the held-out images" if in_features else ""
                    notes.append(f"Measured in features, too: add --features with the TorchScript file{what}.")
        except ValueError as err:
            notes.append(f"No command for the measurement: {err}")
        parts.append((name, notes, lines))
    return parts


# ----------------------------------------------------------------------------
# Words and numbers.


def _show(value: Any) -> str:
    """An option as text: as JSON, but without quotes around text, and a dash where there is none."""
    if value is None:
        return "–"
    if isinstance(value, str) and (digest := re.fullmatch(r"(listing:)?([0-9a-f]{8})[0-9a-f]{24,}", value)):
        return f"{digest[1] or ''}{digest[2]}…"
    return value if isinstance(value, str) else json.dumps(value)


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}" + ("" if number == 1 else "s")


def _percent(ratio: float) -> str:
    return f"{100 * ratio:.2f}"


def _interval(interval: Sequence[float]) -> str:
    low, high = interval
    return f"[{100 * low:.1f}, {100 * high:.1f}]"
