"""What a factor does: each line of a figure against one of them, the basic setting."""

import contextlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dnnlib.util import printable
from memorization.curve.emm import Emm
from memorization.curve.lines import GIVEN, IMAGES, CurvePoint, Line, by_size, run_counts
from memorization.stats.effects import Cells, emm_ratio

EFFECT_COLUMNS = (
    "line", "against", "size", "difference", "low", "high", "interval_of", "runs", "runs_against",
    "emm_ratio_least", "emm_ratio_most", "emm_ratio_low", "emm_ratio_high", "confidence",
)  # fmt: skip


@dataclass(frozen=True)
class Difference:
    """R_mem of a line less that of the basic one at one size, as fractions."""

    size: int  # |D|
    value: float
    low: float
    high: float
    runs: int
    runs_against: int

    @property
    def interval(self) -> tuple[float, float]:
        return self.low, self.high


@dataclass(frozen=True)
class Effect:
    """A line against the basic one."""

    line: Line
    against: Line
    differences: tuple[Difference, ...]  # ascending sizes that both lines have; may be none
    emm_least: float  # EMM of the line over that of the basic one: the least and the most that it can be, equal where
    emm_most: float  # both were found; 0 and infinity where the sizes do not tell
    emm_low: float  # interval
    emm_high: float
    seeds_known: bool  # else the intervals are those of the images

    @property
    def emm_ratio(self) -> str:
        """As text: "1.52", "at least 1.52", "at most 0.8" or "unknown"."""
        return _ratio_text(self.emm_least, self.emm_most)


def effects(lines: Sequence[Line], against: str) -> list[Effect]:
    """All lines but one against that one.

    Parameters
    ----------
    lines : of `curve_lines`, with their runs.
    against : name of the basic line, as in the table of the curve.

    Raises
    ------
    ValueError
        If no line, or no other line, has that name.
    """
    names = [line.name for line in lines]
    first = _position(names, against)
    if first is None or len(lines) < 2:
        raise ValueError(f'No line to compare with "{against}"; the lines are: {", ".join(names)}.')
    base = lines[first]
    cells = {(i, size): runs for i, line in enumerate(lines) for size, runs in by_size(line.runs).items()}
    index = {key: number for number, key in enumerate(cells)}
    given = base.seed_sd if base.seeds_from == GIVEN else None
    counts, numbers = [run_counts(runs) for runs in cells.values()], None
    if base.latents is not None:
        numbers = [base.latents.numbers(runs) for runs in cells.values()]
    pooled = Cells(counts, [line for line, _ in cells], given, numbers, _alike(lines))
    found = []
    for i, line in enumerate(lines):
        if line is base:
            continue
        differences = []
        for a in line.points:
            for b in base.points:
                if a.size == b.size:
                    ends = pooled.difference(index[i, a.size], index[first, a.size], line.confidence)
                    differences.append(_difference(a, b, ends))
        low, high = emm_ratio(
            line.fitted, base.fitted, line.confidence, first_low=line.lowered, second_low=base.lowered
        )
        least, most = _range(line.emm), _range(base.emm)
        least, most = least[0] / most[1], (math.inf if most[0] == 0 else least[1] / most[0])
        low, high = min(low, least), max(high, most)
        known = pooled.seeds_known and not (line.images_only or base.images_only)
        found.append(Effect(line, base, tuple(differences), least, most, low, high, known))
    return found


def _alike(lines: Sequence[Line]) -> np.ndarray:
    """Correlation of whether runs of the same |D| and latents memorize an image, in lines and between them, [L, L]."""
    found = np.zeros([len(lines)] * 2)
    sizes = [by_size(line.runs) for line in lines]
    for i, line in enumerate(lines):
        if line.latents is None:
            continue
        within = line.latents.alike(*sizes[i].values())
        found[i, i] = (line.alike if within is None else within) or 0.0  # of one run per size: of all sizes together
        for j in range(i):
            pairs = [(sizes[i][size], sizes[j][size]) for size in sizes[i] if size in sizes[j]]
            found[i, j] = found[j, i] = line.latents.alike_between(*pairs) or 0.0
    return found


def _position(names: Sequence[str], against: str) -> int | None:
    """Of the line with that name, or with that number (1e-4 for 0.0001)."""
    if against in names:
        return names.index(against)
    for i, name in enumerate(names):
        with contextlib.suppress(ValueError):
            if float(name) == float(against):
                return i
    return None


def _difference(a: CurvePoint, b: CurvePoint, ends: tuple[float, float]) -> Difference:
    """The highest of several snapshots is too high on average: what that may be is added on either side."""
    value = a.ratio - b.ratio
    low, high = min(ends[0] - a.optimism, value), max(ends[1] + b.optimism, value)
    return Difference(a.size, value, max(low, -1.0), min(high, 1.0), a.runs, b.runs)


def _range(emm: Emm) -> tuple[float, float]:
    return {"at": (emm.size, emm.size), "below": (0.0, emm.size), "at least": (emm.size, math.inf)}[emm.verdict]


def _ratio_text(least: float, most: float) -> str:
    if least == most:
        return f"{least:.2f}"
    if math.isinf(most):
        return "unknown" if least == 0 else f"at least {least:.2f}"
    return f"at most {most:.2f}" if least == 0 else f"{least:.2f} to {most:.2f}"


def effect_lines(found: Sequence[Effect], by: str) -> list[str]:
    """The table on screen, and what its intervals are."""
    name, names = f"{by} = {printable(found[0].against.name)}", [printable(effect.line.name) for effect in found]
    width = max(len(by), *map(len, names))
    confidence = f"{100 * found[0].line.confidence:g} %"
    rows = [f"Against {name}:", f"{by:<{width}} {'|D|':>8} {'R_mem, points':>14}  {confidence + ' interval':<18} runs"]
    for effect, line in zip(found, names):
        for d in effect.differences:
            interval = f"[{100 * d.low:+.1f}, {100 * d.high:+.1f}]"
            runs = f"{d.runs} and {d.runs_against}"
            rows.append(f"{line:<{width}} {d.size:>8} {100 * d.value:>+14.2f}  {interval:<18} {runs}")
        if not effect.differences:
            rows.append(f"{line:<{width}} no |D| in common")
    for effect, line in zip(found, names):
        rows.append(f"{line:<{width}} EMM times {effect.emm_ratio}  {_interval_text(effect)}")
    count = sum(len(effect.differences) + 1 for effect in found)
    what = "seeds" if all(effect.seeds_known for effect in found) else f"{IMAGES} where one run tells nothing of seeds"
    rows.append(
        f"{count} interval{'s' * (count > 1)}, each for itself ({what}); of many, some miss the truth by chance."
    )
    return rows


def _interval_text(effect: Effect) -> str:
    high = "inf" if math.isinf(effect.emm_high) else f"{effect.emm_high:.2f}"
    return f"[{effect.emm_low:.2f}, {high}]" + ("" if effect.seeds_known else f" {IMAGES}")


def effect_rows(found: Sequence[Effect]) -> list[list[object]]:
    """Rows of `EFFECT_COLUMNS`, one per line and common size; of a line without one, a row without a size.

    The least and the most that the ratio of EMM can be are equal where EMM of both lines was found, 0 and infinity
    where the sizes do not tell.
    """
    rows = []
    for effect in found:
        interval_of = "seeds" if effect.seeds_known else IMAGES
        ratio = [effect.emm_least, effect.emm_most, effect.emm_low, effect.emm_high, effect.line.confidence]
        for d in effect.differences:
            numbers = [d.size, d.value, d.low, d.high, interval_of, d.runs, d.runs_against]
            rows.append([effect.line.name, effect.against.name, *numbers, *ratio])
        if not effect.differences:
            rows.append([effect.line.name, effect.against.name, *[""] * 4, interval_of, "", "", *ratio])
    return rows
