"""The memorization trajectory of a run on disk: mem_traj.log, mem_traj.jsonl and knn-dist/."""

import contextlib
import datetime
import functools
import hashlib
import json
import math
import os
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from dnnlib.limits import check_npz, parse_json, read_regular
from dnnlib.locks import file_lock
from dnnlib.util import atomic_write
from dnnlib.versions import versions
from memorization.measure.ratio import Measurement, make_measurement
from memorization.stats.intervals import wilson_interval

# A record is one measurement of one snapshot. Two with equal settings are the same measurement done
# twice; an earlier one still holds while the contents of snapshot and reference are the same too.
SETTINGS = ("snapshot", "optimum", "source", "seeds", "class", "sampler", "reference", "reference_size", "adaptive",
            "precision", "compile", "labels", "all_classes")  # fmt: skip
CONTENTS = ("snapshot_sha256", "reference_sha256")

# What decides the row of a seed, its distances to the nearest images: such rows can be used again.
_ROWS = ("optimum", "source", "class", "all_classes", "sampler", *CONTENTS)

# What holds for records that were written before these settings were.
_DEFAULTS = {"precision": "fp32", "compile": False}

# What was found beyond R_mem: it is kept when the same contents are measured again.
RESULTS = ("gap", "quality", "thresholds", "criteria", "classes", "groups", "grouping", "repeats", "left_out",
           "held_out")  # fmt: skip


def make_settings(
    snapshot: str | os.PathLike,  # path of the snapshot, or of the dataset whose optimum is measured
    seeds: Iterable[int],
    *,
    reference_path: str | os.PathLike,  # of the reference dataset
    reference_size: int,  # number of its images
    reference_sha256: str,  # of `training.fingerprint.array_sha256`
    class_idx: int | None,
    sampler_kwargs: dict[str, Any],
    optimum: str | None = None,  # "unconditional" or "class-conditional" optimum; None: a trained network
    adaptive: dict[str, Any] | None = None,  # settings of a sequential test; None: all seeds are measured
    precision: str = "fp32",  # in which the network computed, see `training.precision`
    compile: bool = False,  # it was compiled, and rounded differently
    source: dict[str, Any] | None = None,  # of images or a model of another program; None: a snapshot or an optimum
    labels: dict[str, Any] | None = None,  # what the user says of it, for curves
    all_classes: bool = False,  # classes that training never saw were drawn, too
) -> dict[str, Any]:
    """The part of a record that is known before the measurement: `SETTINGS` and `CONTENTS`.

    Sampler options that are None (not given) are left out, infinite ones are written as text, which
    keeps the file strict JSON.
    """
    sampler = {key: value for key, value in sorted(sampler_kwargs.items()) if value is not None}
    for key, value in sampler.items():
        if isinstance(value, float) and not math.isfinite(value):
            sampler[key] = str(value)
    settings = {
        "snapshot": Path(snapshot).name,
        "optimum": optimum,
        "seeds": format_int_list(seeds),
        "class": class_idx,
        "sampler": sampler,
        "reference": str(Path(reference_path).resolve()),
        "reference_size": reference_size,
        "snapshot_sha256": _sha256(snapshot),
        "reference_sha256": reference_sha256,
        "precision": precision,
        "compile": compile,
    }
    more = {"adaptive": adaptive, "source": source, "labels": labels or None, "all_classes": all_classes or None}
    return settings | {key: value for key, value in more.items() if value is not None}


def find_record(
    records: Iterable[dict[str, Any]], settings: dict[str, Any], keys: Iterable[str] = SETTINGS + CONTENTS
) -> dict[str, Any] | None:
    """The last of `records` that agrees with `settings` in all `keys`, or None. A missing entry is None."""
    found = [r for r in records if all(setting(r, key) == setting(settings, key) for key in keys)]
    return found[-1] if found else None


def setting(record: dict[str, Any], key: str) -> Any:
    """An entry of a record; one that is missing is None, or what held before there was such an entry."""
    return record.get(key, _DEFAULTS.get(key))


def images_seen(record: dict[str, Any]) -> float:
    """Training images that a snapshot has seen; records from before they were counted have the kimg of its name."""
    nimg = record.get("nimg")
    return nimg if nimg is not None else 1000 * record["kimg"]


def make_record(measurement: Measurement, kimg: int | None, settings: dict[str, Any], **entries: Any) -> dict[str, Any]:
    """The record of one measured snapshot.

    Parameters
    ----------
    measurement : what was measured
    kimg : thousands of training images seen; None: not trained
    settings : of `make_settings`
    entries : further ones, or others in place of the 95 % Wilson interval (ci_low, ci_high, confidence, interval)
    """
    n, successes = measurement.num_samples, measurement.num_memorized
    low, high = wilson_interval(successes, n)
    return {
        "kimg": kimg,
        "ratio": measurement.ratio,
        "ci_low": low,
        "ci_high": high,
        "confidence": 0.95,
        "interval": "wilson",
        "num_memorized": successes,
        "num_samples": n,
        "mean_distance": measurement.mean_distance,
        **settings,
        **entries,
        "versions": versions(),
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def write_measurement(
    log: str | os.PathLike,  # path of mem_traj.log
    measurement: Measurement,
    snapshot: str | os.PathLike,  # path of the snapshot, or of the dataset whose optimum was measured
    name: str,  # what its files are called: network-snapshot-KIMG, or optimum-NAME
    record: dict[str, Any],  # of `make_record`
    *,
    images: str | os.PathLike | None = None,  # folder of the PNGs; None: none were kept
) -> dict[str, Any]:
    """Write one measured snapshot in the three published forms, and return its record.

    Beside the log lie `mem_traj.jsonl` (the log's name with another suffix) and `knn-dist/`. The log grows
    by the published two lines; where no PNGs were kept the second names the snapshot as well, for the
    images were compared as they were generated. In the jsonl a record with the same settings is replaced,
    so that no measurement counts twice; its `RESULTS` are kept where the contents are the same. An incomplete
    last line is dropped. `knn-dist/NAME.npz` holds `knn_distance` [n, 2], `knn_index` [n, 2] and `seeds` [n] of
    the last measurement of that snapshot. Processes that write beside each other wait for each other.
    """
    log = Path(log)
    _write_rows(log.parent / "knn-dist" / f"{name}.npz", measurement, record)
    with _lock(log):
        record = _put_record(log, record)
        with open(log, "a", encoding="utf-8") as file:
            file.write(
                f'Generating images from "{snapshot}".\n'
                f'Loading images from "{images if images is not None else snapshot}". '
                f"The calculated KNN distance is {record['mean_distance']}. "
                f"The calibrated KNN ratio is {record['ratio']}\n"
            )
    return record


def update_record(log: str | os.PathLike, record: dict[str, Any], **results: Any) -> dict[str, Any]:
    """Write further `RESULTS` of a measured snapshot into its record, and return the record."""
    with _lock(Path(log)):
        return _put_record(Path(log), {**record, **results})


def _put_record(log: Path, record: dict[str, Any]) -> dict[str, Any]:
    """Write `record` in the place of the one with the same settings, or at the end."""
    jsonl = jsonl_path(log)
    records = read_records(jsonl, report=lambda _: None) if jsonl.exists() else []
    previous = find_record(records, record, SETTINGS)
    if previous is None:
        records.append(record)
    else:
        if find_record([previous], record) is not None:
            record = _with_results(record, previous)
        records[records.index(previous)] = record
    with atomic_write(jsonl, "w") as file:
        file.writelines(json.dumps(r, allow_nan=False) + "\n" for r in records)
    return record


def _with_results(record: dict[str, Any], previous: dict[str, Any]) -> dict[str, Any]:
    """`record` with those results of `previous` that it has not."""
    record = dict(record)
    for key in RESULTS:
        if key in previous and key not in record:
            record[key] = previous[key]
        elif key in previous and key in ("thresholds", "criteria"):
            record[key] = {**previous[key], **record[key]}
    return record


def _lock(log: Path) -> contextlib.AbstractContextManager:
    return file_lock(log.parent / f".{log.name}.lock")


# ----------------------------------------------------------------------------
# Rows on disk: the distances of every image, while a snapshot is measured and after.


def rows_path(log: str | os.PathLike, name: str, settings: dict[str, Any]) -> Path:
    """Where the rows of a measurement lie until it is complete; every measurement has a file of its own."""
    digest = hashlib.sha256(_rows_key(settings).encode() + settings["seeds"].encode()).hexdigest()[:12]
    return Path(log).parent / "knn-dist" / f".partial-{name}-{digest}.npz"


def write_partial(log: str | os.PathLike, measurement: Measurement, name: str, settings: dict[str, Any]) -> None:
    """Write the rows of a measurement that is under way, so that it can go on after an interruption."""
    _write_rows(rows_path(log, name, settings), measurement, settings)


def remove_partial(log: str | os.PathLike, name: str, settings: dict[str, Any]) -> None:
    """Remove what `write_partial` wrote, if anything."""
    rows_path(log, name, settings).unlink(missing_ok=True)


def read_rows(
    log: str | os.PathLike,
    name: str,
    settings: dict[str, Any],
    seeds: Iterable[int],
    columns: dict[str, int],  # wanted arrays beyond knn_distance and knn_index, and their numbers of columns
) -> Measurement | None:
    """The rows of `seeds` that are on disk, of this or another measurement of the same contents, or None.

    Files that are damaged, of other contents or without the wanted columns count as absent.
    """
    best = None
    for path in (rows_path(log, name, settings), Path(log).parent / "knn-dist" / f"{name}.npz"):
        try:
            if not path.is_file():  # a named pipe would be waited for
                continue
            check_npz(path)
            with np.load(path, allow_pickle=False) as file:
                if str(file["settings"]) != _rows_key(settings):
                    continue
                shapes = {"seeds": (), "knn_distance": (2,), "knn_index": (2,), **{k: (c,) for k, c in columns.items()}}
                arrays = {key: file[key] for key in shapes}
            if any(array.shape != (len(arrays["seeds"]), *shapes[key]) for key, array in arrays.items()):
                continue
            if any(array.dtype.kind != ("f" if key.endswith("distance") else "i") for key, array in arrays.items()):
                continue
        except Exception:  # damaged files bring about errors of many kinds
            continue
        rows = make_measurement(arrays).select(seeds)
        if best is None or rows.num_samples > best.num_samples:
            best = rows
    return best


def _write_rows(path: Path, measurement: Measurement, settings: dict[str, Any]) -> None:
    with atomic_write(path) as file:
        np.savez(file, **measurement.arrays(), settings=_rows_key(settings))


def _rows_key(settings: dict[str, Any]) -> str:
    keyed = {key: settings.get(key) for key in _ROWS}
    keyed |= {key: setting(settings, key) for key in _DEFAULTS if setting(settings, key) != _DEFAULTS[key]}
    return json.dumps(keyed, sort_keys=True)


# ----------------------------------------------------------------------------
# Reading.


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


def read_records(path: str | os.PathLike, *, report: Callable[[str], Any] = warnings.warn) -> list[dict[str, Any]]:
    """Read `mem_traj.jsonl`: one record per measured snapshot, in the order of the file.

    A last line that is not complete (the writer was cut off) is left out, and `report` is told so.

    Raises
    ------
    OSError
        If the file cannot be read.
    ValueError
        If a line before the last is no JSON object, or a record holds what none can.
    """
    lines = read_regular(path).decode("utf-8", errors="replace").splitlines()
    records = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            record = parse_json(line)
            if not isinstance(record, dict):
                raise ValueError
        except ValueError:
            if number < len(lines):
                raise ValueError(f'Line {number} of "{path}" is no JSON object; repair or delete that line.') from None
            report(f'The last line of "{path}" is incomplete and is left out.')
        else:
            if (wrong := _wrong_entry(record)) is not None:
                raise ValueError(f'Line {number} of "{path}" has an impossible {wrong}; repair or delete that line.')
            records.append(record)
    return records


def _wrong_entry(record: dict[str, Any]) -> str | None:
    """The key of an entry that no measurement has, or None. Entries may be missing."""
    kinds = dict.fromkeys(("thresholds", "criteria", "classes", "groups", "grouping", "repeats", "left_out"), dict)
    kinds |= {"compile": bool, "other_reference": bool}
    kinds |= dict.fromkeys(("sampler", "adaptive", "sequential", "gap", "quality", "held_out"), dict | None)
    kinds |= dict.fromkeys(("snapshot", "seeds", "reference", "precision", "machine"), str | None)
    kinds |= dict.fromkeys(("kimg", "seconds"), int | float | None)
    kinds |= dict(nimg=int | None, num_samples=int, num_memorized=int)
    for key, kind in kinds.items():
        if key in record and not isinstance(record[key], kind):
            return key
    for key in ("kimg", "seconds"):
        if not abs(record.get(key) or 0) < 1 << 53:  # NaN, too
            return key
    samples = record.get("num_samples", math.inf)
    if samples < 1 or (samples > 1 << 53 and samples != math.inf):
        return "num_samples"
    return None if 0 <= record.get("num_memorized", 0) <= samples else "num_memorized"


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
    path = Path(path)
    files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
    return _content_sha256(tuple((str(file), (at := file.stat()).st_size, at.st_mtime_ns) for file in files))


@functools.lru_cache(maxsize=64)
def _content_sha256(files: tuple[tuple[str, int, int], ...]) -> str:
    """Digest of these files (path, bytes, time of the last change), which while they stay are read only once."""
    digest = hashlib.sha256()
    for path, _, _ in files:
        with open(path, "rb") as file:
            while part := file.read(1 << 20):
                digest.update(part)
    return digest.hexdigest()
