"""Two measured runs: by how much their ratios differ, whether that can be chance, and what it says nothing about."""

import os
from dataclasses import dataclass
from typing import Any

import numpy as np

from memorization.curve.factors import differing_options
from memorization.curve.latents import distances
from memorization.curve.tables import write_csv
from memorization.measure.criteria import memorized
from memorization.measure.ratio import Measurement
from memorization.runs import Run
from memorization.stats.difference import Difference, independent_difference, paired_difference

DISTANCE_COLUMNS = ("seed", "d1", "d2", "nearest", "second_nearest", "memorized")


@dataclass(frozen=True)
class Side:
    """One of the two runs, at one of its snapshots."""

    run: Run
    record: dict[str, Any]
    rows: Measurement | None  # distances in the order of the seeds; None: they are no longer on disk


@dataclass(frozen=True)
class Comparison:
    sides: tuple[Side, Side]
    difference: Difference  # of R_mem, first less second
    notes: tuple[str, ...]  # sentences without a full stop


def compare_runs(a: Run, b: Run, *, kimg: int | None = None, confidence: float = 0.95) -> Comparison:
    """Compare two runs, each at the snapshot of its highest ratio, or both at `kimg`.

    Where both were sampled from the same latents (equal seeds, image sizes and sampler), and the distances of every
    image are on disk, the test is paired; else the images of the two are independent draws.

    Raises
    ------
    ValueError
        If a run was not measured at `kimg`.
    """
    sides = _side(a, kimg), _side(b, kimg)
    notes = [
        "the test and its interval are about these two networks, and know of generated images only; what another "
        "training seed would do, one run of each cannot say"
    ]
    why = _not_paired(*sides)
    if why is None:
        flags = [memorized(side.rows.knn_distance) for side in sides]
        both, one, other = (int(x.sum()) for x in (flags[0] & flags[1], flags[0] & ~flags[1], ~flags[0] & flags[1]))
        difference = paired_difference(both, one, other, len(flags[0]) - both - one - other, confidence)
    else:
        counts = [side.record[key] for side in sides for key in ("num_memorized", "num_samples")]
        difference = independent_difference(*counts, confidence)
        notes.append(f"the images are taken as independent draws, for {why}")
    several = [side.run.path for side in sides if len(side.run.snapshots) > 1]
    if kimg is None and several:
        names = " and ".join(map(str, several))
        notes.append(
            f"the ratio of {names} is the highest of several snapshots, which is too high on average; see --kimg"
        )
    for side in sides:
        if side.record.get("adaptive"):
            notes.append(f"{side.run.path} was measured with --adaptive, and its ratio is biased; measure it without")
        if side.run.other_reference:
            notes.append(f"{side.run.path} was compared with images it was not trained on")
    if a.size != b.size:
        notes.append(f"the training sets have {a.size} and {b.size} images")
    elif a.options.get("dataset_sha256") != b.options.get("dataset_sha256"):
        notes.append("the runs are on different images, or one does not say on which")
    if names := differing_options([a, b]):
        notes.append(f"the runs differ in: {', '.join(names)}")
    return Comparison(sides, difference, tuple(notes))


def comparison_record(comparison: Comparison) -> dict[str, Any]:
    """Strict JSON of a comparison."""
    return {
        "format": 1,
        "runs": [
            {
                "run": str(side.run.path), "size": side.run.size, "seed": side.run.options.get("seed"),
                **{key: side.record.get(key) for key in ("kimg", "num_memorized", "num_samples", "seeds", "reference")},
                "ratio": side.record["num_memorized"] / side.record["num_samples"],
            }
            for side in comparison.sides
        ],
        "difference": vars(comparison.difference),
        "notes": list(comparison.notes),
    }  # fmt: skip


def write_distances(side: Side, path: str | os.PathLike) -> None:
    """A row per generated image: its seed, distances (RMS per pixel of 0..255) and training images, and whether it
    is memorized.

    Raises
    ------
    ValueError
        If the distances are no longer on disk.
    """
    if side.rows is None:
        raise ValueError(f'"{side.run.path}" no longer has its distances in knn-dist; measure it again.')
    rows = side.rows
    flags = memorized(rows.knn_distance)
    write_csv(
        DISTANCE_COLUMNS,
        [
            [int(seed), float(d[0]), float(d[1]), int(i[0]), int(i[1]), int(flag)]
            for seed, d, i, flag in zip(rows.seeds, rows.knn_distance, rows.knn_index, flags)
        ],
        path,
    )


def _side(run: Run, kimg: int | None) -> Side:
    records = [r for r in run.counted if r["kimg"] == (run.kimg if kimg is None else kimg)]
    if not records:
        known = ", ".join(str(s.kimg) for s in run.snapshots)
        raise ValueError(f'"{run.path}" was not measured at kimg {kimg}, but at {known}.')
    record = records[-1]
    return Side(run, record, distances(run, record))


def _not_paired(a: Side, b: Side) -> str | None:
    """Why two runs were not sampled from the same latents; None if they were."""
    if any(side.record.get("source") for side in (a, b)):
        return "images of other programs have no seeds in common"
    if any(side.record.get("seeds") is None for side in (a, b)) or a.record["seeds"] != b.record["seeds"]:
        return "the seeds differ"
    if a.record.get("sampler") != b.record.get("sampler") or a.record.get("class") != b.record.get("class"):
        return "sampler or class differ"
    if len({side.run.options["dataset_kwargs"].get("resolution") for side in (a, b)}) > 1:
        return "the image sizes differ"
    missing = [str(side.run.path) for side in (a, b) if side.rows is None]
    if missing:
        return f"the distances of {' and '.join(missing)} are no longer on disk"
    return None if np.array_equal(a.rows.seeds, b.rows.seeds) else "the seeds differ"
