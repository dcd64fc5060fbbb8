"""The memorization trajectory of a run on disk: mem_traj.log, mem_traj.jsonl and knn-dist/."""

import datetime
import hashlib
import json
import math
import os
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from dnnlib.util import atomic_write
from memorization.ratio import Measurement, wilson_interval

# A record is one measurement of one snapshot. Two with equal settings are the same measurement done
# twice; an earlier one still holds while the contents of snapshot and reference are the same too.
SETTINGS = ("snapshot", "optimum", "seeds", "class", "sampler", "reference", "reference_size")
CONTENTS = ("snapshot_sha256", "reference_sha256")


def make_settings(
    snapshot: str | os.PathLike,  # path of the snapshot, or of the dataset whose optimum is measured
    seeds: Iterable[int],
    *,
    reference_path: str | os.PathLike,  # of the reference dataset
    reference: np.ndarray,  # its images, uint8 [N, C, H, W]
    class_idx: int | None,
    sampler_kwargs: dict[str, Any],
    optimum: str | None = None,  # "unconditional" or "class-conditional" optimum; None: a trained network
) -> dict[str, Any]:
    """The part of a record that is known before the measurement: `SETTINGS` and `CONTENTS`.

    Sampler options that are None (not given) are left out, infinite ones are written as text, which
    keeps the file strict JSON.
    """
    sampler = {key: value for key, value in sorted(sampler_kwargs.items()) if value is not None}
    for key, value in sampler.items():
        if isinstance(value, float) and not math.isfinite(value):
            sampler[key] = str(value)
    pixels = np.ascontiguousarray(reference)
    reference_sha256 = hashlib.sha256(repr(pixels.shape).encode())
    reference_sha256.update(pixels)
    return {
        "snapshot": Path(snapshot).name,
        "optimum": optimum,
        "seeds": format_int_list(seeds),
        "class": class_idx,
        "sampler": sampler,
        "reference": str(Path(reference_path).resolve()),
        "reference_size": len(pixels),
        "snapshot_sha256": _sha256(snapshot),
        "reference_sha256": reference_sha256.hexdigest(),
    }


def find_record(
    records: Iterable[dict[str, Any]], settings: dict[str, Any], keys: Iterable[str] = SETTINGS + CONTENTS
) -> dict[str, Any] | None:
    """The last of `records` that agrees with `settings` in all `keys`, or None. A missing entry is None."""
    found = [r for r in records if all(r.get(key) == settings.get(key) for key in keys)]
    return found[-1] if found else None


def write_measurement(
    log: str | os.PathLike,  # path of mem_traj.log
    measurement: Measurement,
    snapshot: str | os.PathLike,  # path of the snapshot, or of the dataset whose optimum was measured
    kimg: int | None,  # None: not trained
    settings: dict[str, Any],  # of `make_settings`
    *,
    images: str | os.PathLike | None = None,  # folder of the PNGs; None: none were kept
) -> dict[str, Any]:
    """Write one measured snapshot in the three published forms, and return its record.

    Beside the log lie `mem_traj.jsonl` (the log's name with another suffix) and `knn-dist/`. The log grows
    by the published two lines; where no PNGs were kept the second names the snapshot as well, for the
    images were compared as they were generated. In the jsonl a record with the same settings is replaced,
    so that no measurement counts twice; its gap is kept where the contents are the same. An incomplete last
    line is dropped. `knn-dist/network-snapshot-KIMG.npz` (or `optimum-NAME.npz`) holds `knn_distance` [n, 2],
    `knn_index` [n, 2] and `seeds` [n] of the last measurement of that snapshot.
    """
    log = Path(log)
    n, successes = measurement.num_samples, measurement.num_memorized
    low, high = wilson_interval(successes, n)
    record = {
        "kimg": kimg,
        "ratio": measurement.ratio,
        "ci_low": low,
        "ci_high": high,
        "confidence": 0.95,
        "num_memorized": successes,
        "num_samples": n,
        "mean_distance": measurement.mean_distance,
        **settings,
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }

    name = f"optimum-{Path(snapshot).stem}" if kimg is None else f"network-snapshot-{kimg:06d}"
    with atomic_write(log.parent / "knn-dist" / f"{name}.npz") as file:
        np.savez(
            file,
            knn_distance=measurement.knn_distance,
            knn_index=measurement.knn_index,
            seeds=measurement.seeds,
        )

    _put_record(log, record)
    with open(log, "a", encoding="utf-8") as file:
        file.write(
            f'Generating images from "{snapshot}".\n'
            f'Loading images from "{images if images is not None else snapshot}". '
            f"The calculated KNN distance is {record['mean_distance']}. "
            f"The calibrated KNN ratio is {record['ratio']}\n"
        )
    return record


def write_gap(log: str | os.PathLike, record: dict[str, Any], gap: dict[str, Any]) -> dict[str, Any]:
    """Write the gap of a measured snapshot (see `memorization.gap`) into its record, and return the record."""
    record = {**record, "gap": gap}
    _put_record(Path(log), record)
    return record


def _put_record(log: Path, record: dict[str, Any]) -> None:
    """Write `record` in the place of the one with the same settings, or at the end."""
    jsonl = jsonl_path(log)
    records = read_trajectory(jsonl, report=lambda _: None) if jsonl.exists() else []
    previous = find_record(records, record, SETTINGS)
    if previous is None:
        records.append(record)
    else:
        if "gap" in previous and "gap" not in record and find_record([previous], record) is not None:
            record["gap"] = previous["gap"]
        records[records.index(previous)] = record
    with atomic_write(jsonl, "w") as file:
        file.writelines(json.dumps(r, allow_nan=False) + "\n" for r in records)


def jsonl_path(log: str | os.PathLike) -> Path:
    """Where the records beside a log lie.

    Raises
    ------
    ValueError
        If the log itself is called `*.jsonl`.
    """
    if Path(log).suffix == ".jsonl":
        raise ValueError(f'The log "{log}" would overwrite its own records; name it for example mem_traj.log.')
    return Path(log).with_suffix(".jsonl")


def read_trajectory(path: str | os.PathLike, *, report: Callable[[str], Any] = warnings.warn) -> list[dict[str, Any]]:
    """Read `mem_traj.jsonl`: one record per measured snapshot, in the order of the file.

    A last line that is not complete (the writer was cut off) is left out, and `report` is told so.

    Raises
    ------
    OSError
        If the file cannot be read.
    ValueError
        If a line before the last is no JSON object.
    """
    lines = Path(path).read_text(encoding="utf-8", errors="replace").splitlines()
    records = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            if not isinstance(record, dict):
                raise ValueError
        except ValueError:
            if number < len(lines):
                raise ValueError(f'Line {number} of "{path}" is no JSON object; repair or delete that line.') from None
            report(f'The last line of "{path}" is incomplete and is left out.')
        else:
            records.append(record)
    return records


def format_int_list(values: Iterable[int]) -> str:
    """Ascending integers as the text that `dnnlib.util.parse_int_list` reads: [0, 1, 2, 7] -> "0-2,7"."""
    spans: list[list[int]] = []
    for value in sorted(values):
        if spans and value == spans[-1][1] + 1:
            spans[-1][1] = value
        else:
            spans.append([value, value])
    return ",".join(f"{low}" if low == high else f"{low}-{high}" for low, high in spans)


def _sha256(path: str | os.PathLike) -> str:
    """Digest of a file, or of all files of a folder."""
    digest = hashlib.sha256()
    path = Path(path)
    for each in sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]:
        with open(each, "rb") as file:
            while part := file.read(1 << 20):
                digest.update(part)
    return digest.hexdigest()
