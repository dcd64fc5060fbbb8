"""The quality of the snapshots of a run, as `mem_ratio.py --quality` has recorded it."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from memorization.measure.quality import MEASURES
from memorization.records import images_seen
from memorization.runs import Run

NOT_COMPARABLE = "snapshots whose quality was measured against other images or in another space"


@dataclass(frozen=True)
class QualityPoint:
    """One measure of one snapshot."""

    nimg: float  # training images seen
    value: float
    low: float  # ends of the 95 % interval
    high: float


@dataclass(frozen=True)
class RunQuality:
    """One measure of the snapshots of a run, ascending nimg, all against the same images."""

    measure: str
    points: tuple[QualityPoint, ...]
    against: str  # what it was measured against, as text that is equal for comparable values
    heldout: float | None  # the measure of other held-out images, a floor
    left_out: int  # snapshots that were measured against other images

    @property
    def label(self) -> str:
        return MEASURES[self.measure].label

    @property
    def less_is_better(self) -> bool:
        return MEASURES[self.measure].lower_is_better


def run_quality(run: Run, measure: str | None = None) -> RunQuality | None:
    """The quality of the snapshots that count; None: not measured.

    Parameters
    ----------
    measure : of `MEASURES`; None: the first that was asked for when it was measured

    Raises
    ------
    ValueError
        If there is no such measure, or a record of it is damaged.
    """
    if measure is not None and measure not in MEASURES:
        raise ValueError(f'"{measure}" is no measure of quality; known are {", ".join(MEASURES)}.')
    records = [r for r in run.counted if isinstance(r.get("quality"), dict)]
    try:
        if measure is None:
            measure = next((name for r in reversed(records) for name in r["quality"]["measures"]), None)
            if measure is not None and measure not in MEASURES:
                raise ValueError
        records = [r for r in records if measure in r["quality"]["measures"]]
        if not records:
            return None
        against = _against(records[-1]["quality"])
        same = [r for r in records if _against(r["quality"]) == against]
        points = {}
        for r in same:
            found = r["quality"]["measures"][measure]
            point = QualityPoint(images_seen(r), *(float(found[key]) for key in ("value", "ci_low", "ci_high")))
            if not all(map(math.isfinite, (point.value, point.low, point.high))):
                raise ValueError
            points[point.nimg] = point
        floor = (same[-1]["quality"].get("floors") or {}).get("heldout", {}).get("measures", {}).get(measure)
        heldout = None if floor is None else float(floor["value"])
    except (KeyError, TypeError, ValueError, AttributeError):
        raise ValueError(
            f'"{run.path}" has a record of quality that cannot be read; measure it again with --remeasure.'
        ) from None
    ordered = tuple(sorted(points.values(), key=lambda p: p.nimg))
    return RunQuality(measure, ordered, against, heldout, len(records) - len(same))


def quality_notes(qualities: Sequence[RunQuality | None]) -> list[str]:
    """Sentences on what cannot be compared, without a full stop."""
    found = [q for q in qualities if q is not None]
    notes = []
    if len({q.against for q in found}) > 1:
        notes.append("the quality of the runs was measured against different images or in different spaces")
    if found and len(found) < len(qualities):
        missing = len(qualities) - len(found)
        notes.append(f"of {missing} of {len(qualities)} runs no quality was measured; see mem_ratio.py --quality")
    if others := sum(q.left_out for q in found):
        notes.append(f"{others} {NOT_COMPARABLE} are left out")
    return notes


def _against(quality: dict[str, Any]) -> str:
    keys = ("dataset_sha256", "num_reference", "num_samples", "space")
    return json.dumps([quality.get(key) for key in keys], sort_keys=True)
