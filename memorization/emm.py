"""EMM, the effective model memorization: the training-set size at which R_mem falls below 90 %."""

import json
import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from memorization.ratio import wilson_interval
from memorization.trajectory import SETTINGS, jsonl_path, read_trajectory

OPTIONS, LOG = "training_options.json", "mem_traj.log"
_FIXED = ("batch_size", "duration", "loss", "augment", "window_size", "ema", "ema_mode", "optimizer_kwargs")
_FIXED_DATA = ("resolution", "use_labels", "xflip")


@dataclass(frozen=True)
class RunPoint:
    """One run on the curve: its size, and the snapshot at which it memorizes most."""

    run: Path
    size: int  # |D|
    epochs: float
    kimg: int  # of the snapshot with the highest ratio
    num_memorized: int
    num_samples: int
    options: dict[str, Any]  # training_options.json

    @property
    def ratio(self) -> float:
        return self.num_memorized / self.num_samples

    @property
    def interval(self) -> tuple[float, float]:
        """95 % Wilson interval of the ratio of that one snapshot."""
        return wilson_interval(self.num_memorized, self.num_samples)


@dataclass(frozen=True)
class CurvePoint:
    """All runs at one size, pooled: `num_memorized` of `num_samples` images over `runs` runs."""

    size: int
    epochs: float  # mean
    num_memorized: int
    num_samples: int
    runs: int

    @property
    def ratio(self) -> float:
        return self.num_memorized / self.num_samples

    @property
    def interval(self) -> tuple[float, float]:
        """95 % Wilson interval of the pooled ratio; it knows of the sampling, not of the spread of runs."""
        return wilson_interval(self.num_memorized, self.num_samples)


@dataclass(frozen=True)
class Emm:
    """An estimate of EMM: `verdict` is "at" `size`, "at least" `size`, or "below" `size`."""

    size: float
    verdict: str
    level: float

    def __str__(self) -> str:
        size = f"{self.size:.1f}" if self.size < 1000 and self.size % 1 else f"{self.size:.0f}"
        return f"EMM ({self.level * 100:g} %) " + (f"≈ {size}" if self.verdict == "at" else f"{self.verdict} {size}")


def find_runs(paths: Iterable[str | os.PathLike]) -> tuple[list[Path], dict[Path, str]]:
    """Find the measured runs at and below the given folders.

    A run folder has a `training_options.json`; it is measured once `mem_ratio.py` has left a
    `mem_traj.jsonl` in it.

    Returns
    -------
    runs : measured run folders, sorted, each once.
    left_out : other folders that look like runs (options or snapshots), each with the reason.

    Raises
    ------
    OSError
        If one of `paths` is not a folder.
    """
    runs: set[Path] = set()
    left_out: dict[Path, str] = {}
    for path in paths:
        if not Path(path).is_dir():
            raise NotADirectoryError(f'"{path}" is not a folder; name run folders or a folder of them.')
        for folder, _, files in os.walk(path):
            options, records = OPTIONS in files, jsonl_path(LOG).name in files
            snapshots = any(name.startswith("network-snapshot-") for name in files)
            if options and records:
                runs.add(Path(folder))
            elif options or (snapshots and Path(folder).name != "knn-dist"):
                missing = "not measured yet; run mem_ratio.py on it" if not records else f"no {OPTIONS}"
                left_out[Path(folder)] = missing
    return sorted(runs), dict(sorted(left_out.items()))


def run_point(run: str | os.PathLike) -> RunPoint:
    """Read |D|, the epochs and the highest ratio over the snapshots of one measured run.

    |D| is `dataset_kwargs.max_size` of `training_options.json`, the epochs are `total_nimg` / |D|.
    Where the run was measured with several settings (seeds, class, sampler, reference), those with the
    most images per snapshot count, of equal ones the last; of equal ratios the earlier snapshot.

    Raises
    ------
    OSError
        If a file cannot be read.
    ValueError
        If the files do not hold what is needed.
    """
    run = Path(run)
    try:
        options = json.loads((run / OPTIONS).read_text(encoding="utf-8"))
        size, total_nimg = options["dataset_kwargs"]["max_size"], options["total_nimg"]
        if size is None or size < 1:
            raise ValueError
    except (ValueError, TypeError, KeyError):
        raise ValueError(
            f'"{run / OPTIONS}" does not say dataset_kwargs.max_size (|D|) and total_nimg; '
            "name folders that train.py has written."
        ) from None

    path = jsonl_path(run / LOG)
    groups: dict[str, list[dict[str, Any]]] = {}
    try:
        for record in read_trajectory(path, report=lambda _: None):
            if record.get("optimum"):  # `mem_ratio.py --network` may have written here, too
                continue
            settings = json.dumps([record.get(key) for key in SETTINGS if key != "snapshot"])
            groups.setdefault(settings, []).append(record)
        if not groups:
            raise ValueError(f'"{path}" holds no measurement; run mem_ratio.py on "{run}".')
        records = max(reversed(groups.values()), key=lambda group: min(r["num_samples"] for r in group))
        best = max(sorted(records, key=lambda r: r["kimg"]), key=lambda r: r["num_memorized"] / r["num_samples"])
        return RunPoint(
            run=run,
            size=int(size),
            epochs=total_nimg / size,
            kimg=best["kimg"],
            num_memorized=best["num_memorized"],
            num_samples=best["num_samples"],
            options=options,
        )
    except (KeyError, TypeError, ZeroDivisionError):
        raise ValueError(f'"{path}" lacks kimg, num_memorized or num_samples; measure the run again.') from None


def curve_points(runs: Iterable[RunPoint]) -> list[CurvePoint]:
    """Pool the runs of each size: ratio and interval are those of all their images; ascending sizes."""
    by_size: dict[int, list[RunPoint]] = {}
    for run in runs:
        by_size.setdefault(run.size, []).append(run)
    return [
        CurvePoint(
            size=size,
            epochs=float(np.mean([run.epochs for run in group])),
            num_memorized=sum(run.num_memorized for run in group),
            num_samples=sum(run.num_samples for run in group),
            runs=len(group),
        )
        for size, group in sorted(by_size.items())
    ]


def differing_options(runs: Sequence[RunPoint]) -> list[str]:
    """Names of the training options, |D| and seed aside, in which the runs differ.

    One curve should hold them fixed: the network, what is done with the data, and how it is trained.
    """
    seen: dict[str, set[str]] = {}
    for run in runs:
        found = {key: run.options.get(key) for key in _FIXED}
        found |= {f"dataset_kwargs.{k}": run.options["dataset_kwargs"].get(k) for k in _FIXED_DATA}
        found |= {f"network_kwargs.{k}": v for k, v in run.options.get("network_kwargs", {}).items()}
        for key, value in found.items():
            seen.setdefault(key, set()).add(json.dumps(value, sort_keys=True))
    return sorted(key for key, values in seen.items() if len(values) > 1)


def emm_estimate(sizes: Sequence[float], ratios: Sequence[float], level: float = 0.9) -> Emm:
    """Effective model memorization: the largest |D| at which R_mem is at least `level`.

    Between the largest measured size with ratio >= `level` and the next larger one the curve is taken
    as linear in log |D|. A curve that is not monotone may cross the level several times; the definition
    asks for the largest |D|, hence the last crossing downwards. Where all sizes are below the level EMM
    is "below" the smallest, where the largest size is still at the level EMM is "at least" that size.

    Parameters
    ----------
    sizes : |D| of each point, in any order, each once.
    ratios : memorization ratio 0..1 of each point.
    level : 1 - epsilon, 0 < level <= 1; epsilon = 0.1 in the study.

    Raises
    ------
    ValueError
        If there are no points, the lengths differ, or sizes, ratios or the level are out of range.

    References
    ----------
    Gu et al., "On Memorization in Diffusion Models", 2023, Definition 1: EMM = max {|D| : R_mem >= 1 - epsilon}.
    """
    s, r = np.asarray(sizes, dtype=np.float64), np.asarray(ratios, dtype=np.float64)
    if s.ndim != 1 or s.shape != r.shape or not s.size:
        raise ValueError(f"EMM needs as many ratios as sizes, at least one, not {r.size} and {s.size}.")
    if not (np.isfinite(s).all() and (s > 0).all() and np.unique(s).size == s.size):
        raise ValueError("EMM needs positive sizes, each once; average runs of the same size first.")
    if not ((r >= 0) & (r <= 1)).all():
        raise ValueError("EMM needs memorization ratios between 0 and 1.")
    if not 0 < level <= 1:
        raise ValueError(f"The level of EMM must lie between 0 and 1, not {level}; 0.9 is usual.")
    order = np.argsort(s)
    s, r = s[order], r[order]
    at_level = np.flatnonzero(r >= level)
    if not at_level.size:
        return Emm(float(s[0]), "below", level)
    i = at_level[-1]
    if i == s.size - 1:
        return Emm(float(s[-1]), "at least", level)
    t = (r[i] - level) / (r[i] - r[i + 1])  # 0 at s[i], 1 at s[i+1]
    return Emm(math.exp((1 - t) * math.log(s[i]) + t * math.log(s[i + 1])), "at", level)
