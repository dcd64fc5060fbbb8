"""EMM, the effective model memorization: the training-set size at which R_mem falls below 90 %."""

import json
import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dnnlib.limits import parse_json
from memorization.measure.ratio import wilson_interval
from memorization.records import SETTINGS, jsonl_path, read_trajectory, setting
from training.precision import saved_precision
from training.run.state import read_run_state

OPTIONS, LOG = "training_options.json", "mem_traj.log"
_FIXED = (
    "batch_size",
    "duration",
    "loss",
    "augment",
    "window_size",
    "ema",
    "ema_mode",
    "final_ema",
    "optimizer_kwargs",
    "stop_at_mem",
)
_FIXED_DATA = ("resolution", "use_labels", "xflip")


@dataclass(frozen=True)
class SnapshotPoint:
    """One measured snapshot of a run."""

    kimg: int
    num_memorized: int
    num_samples: int
    adaptive: bool = False  # the measurement stopped as soon as it was clear on which side of a bar the ratio lies

    @property
    def ratio(self) -> float:
        return self.num_memorized / self.num_samples

    @property
    def interval(self) -> tuple[float, float]:
        """95 % Wilson interval of the ratio."""
        return wilson_interval(self.num_memorized, self.num_samples)


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
    snapshots: tuple[SnapshotPoint, ...] = ()  # all that count, ascending kimg
    reference: str | None = None  # dataset that the images were compared with
    sampler: dict[str, Any] | None = None  # options of the sampler

    @property
    def ratio(self) -> float:
        return self.num_memorized / self.num_samples

    @property
    def interval(self) -> tuple[float, float]:
        """95 % Wilson interval of the ratio of that one snapshot."""
        return wilson_interval(self.num_memorized, self.num_samples)

    @property
    def adaptive(self) -> bool:
        """Whether the ratio comes from an adaptive measurement."""
        return any(s.adaptive and s.kimg == self.kimg for s in self.snapshots)


@dataclass(frozen=True)
class Emm:
    """An estimate of EMM, or a bound of it: `verdict` is "at" `size`, "at least" `size`, or "below" `size`."""

    size: float
    verdict: str
    level: float

    def __str__(self) -> str:
        return f"EMM ({self.level * 100:g} %) " + ("≈ " if self.verdict == "at" else "") + self.place

    @property
    def place(self) -> str:
        """The size as text, after "at least" or "below" where it is open."""
        whole = self.size >= 1000 or math.isclose(self.size, round(self.size))
        size = f"{self.size:.{0 if whole else 1}f}"
        return size if self.verdict == "at" else f"{self.verdict} {size}"


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

    |D| is `dataset_kwargs.max_size` of `training_options.json`, the epochs are `total_nimg` / |D|, or those of
    `run-state.json` where the run ended earlier. Where it was measured with several settings (seeds, class,
    sampler, reference), one counts: all classes before a single one, a reference of |D| images before another,
    then the one with the most images over all snapshots, then the most snapshots, of equal ones the last; of
    equal ratios the earlier snapshot. Adaptive measurements (with fewer seeds where the verdict was clear) stand
    in for snapshots that have no other, or only one of fewer images.

    Raises
    ------
    OSError
        If a file cannot be read.
    ValueError
        If the files do not hold what is needed.
    """
    run = Path(run)
    try:
        options = parse_json((run / OPTIONS).read_bytes())
        size, total_nimg = options["dataset_kwargs"]["max_size"], options["total_nimg"]
        if type(size) is not int or size < 1 or not math.isfinite(total_nimg):
            raise ValueError
    except (ValueError, TypeError, KeyError, OverflowError):
        raise ValueError(
            f'"{run / OPTIONS}" does not say dataset_kwargs.max_size (|D|) and total_nimg; '
            "name folders that train.py has written."
        ) from None
    if not isinstance(options.get("network_kwargs", {}), dict):
        raise ValueError(f'"{run / OPTIONS}" holds network_kwargs that are no JSON object.')

    path = jsonl_path(run / LOG)
    try:
        records = [r for r in read_trajectory(path, report=lambda _: None) if not r.get("optimum")]
        if not records:
            raise ValueError(f'"{path}" holds no measurement; run mem_ratio.py on "{run}".')
        records = sorted(_records_that_count(records, size), key=lambda r: r["kimg"])
        best = max(records, key=lambda r: r["num_memorized"] / r["num_samples"])
        return RunPoint(
            run=run,
            size=size,
            epochs=_trained_nimg(run, total_nimg) / size,
            kimg=best["kimg"],
            num_memorized=best["num_memorized"],
            num_samples=best["num_samples"],
            options=options,
            snapshots=tuple(
                SnapshotPoint(r["kimg"], r["num_memorized"], r["num_samples"], bool(r.get("adaptive"))) for r in records
            ),
            reference=best.get("reference"),
            sampler=best.get("sampler"),
        )
    except (KeyError, TypeError, ZeroDivisionError):
        raise ValueError(f'"{path}" lacks kimg, num_memorized or num_samples; measure the run again.') from None


def _trained_nimg(run: Path, total_nimg: float) -> float:
    """Training images seen, which are fewer than planned where the run was ended at a ratio."""
    try:
        state = read_run_state(run)
    except (OSError, ValueError):
        state = None
    if state is None or state["state"] != "complete" or not 0 < state["kimg"] < total_nimg / 1000:
        return total_nimg
    return 1000 * state["kimg"]


def _records_that_count(records: Iterable[dict[str, Any]], size: int) -> list[dict[str, Any]]:
    """One record per snapshot, all with the same settings; see `run_point`."""
    groups: dict[bool, dict[str, list[dict[str, Any]]]] = {False: {}, True: {}}  # adaptive or not, by settings
    for record in records:
        adaptive = bool(record.get("adaptive"))
        left_out = ("snapshot", "seeds", "adaptive") if adaptive else ("snapshot",)  # each may stop at its own seed
        settings = json.dumps([setting(record, key) for key in SETTINGS if key not in left_out])
        groups[adaptive].setdefault(settings, []).append(record)

    def rank(group: list[dict[str, Any]]) -> tuple:
        training_set = group[0].get("reference_size", size) in (size, size / 2)  # mirrored images count twice
        return group[0].get("class") is None, training_set, sum(r["num_samples"] for r in group), len(group)

    full = max(reversed(groups[False].values()), key=rank, default=[])
    adaptive = max(reversed(groups[True].values()), key=lambda g: (*rank(g)[:2], len(g)), default=[])
    if full and adaptive and rank(full)[:2] > rank(adaptive)[:2]:
        adaptive = []
    if full and adaptive and rank(full)[:2] < rank(adaptive)[:2]:
        full = []

    chosen: dict[int, dict[str, Any]] = {}
    for record in [*adaptive, *full]:  # of equally many images the later in this order
        if record["num_samples"] >= chosen.get(record["kimg"], record)["num_samples"]:
            chosen[record["kimg"]] = record
    return list(chosen.values())


def differing_options(runs: Sequence[RunPoint]) -> list[str]:
    """Names of the options, |D| and seed aside, in which the runs differ.

    One curve should hold them fixed: the network, what is done with the data, how it is trained, and the sampler
    of the measurement.
    """
    seen: dict[str, set[str]] = {}
    for run in runs:
        found = {key: run.options.get(key) for key in _FIXED}
        found |= {f"dataset_kwargs.{k}": run.options["dataset_kwargs"].get(k) for k in _FIXED_DATA}
        found |= {f"network_kwargs.{k}": v for k, v in run.options.get("network_kwargs", {}).items()}
        found["sampler"], found["precision"] = run.sampler, saved_precision(run.options)
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
    return emm_at(s, float(emm_crossings(s[order], r[None, order], level)[0]), level)


def emm_crossings(sizes: np.ndarray, ratios: np.ndarray, level: float) -> np.ndarray:
    """log EMM of many curves over the same sizes; see `emm_estimate`.

    Parameters
    ----------
    sizes : float [S], ascending.
    ratios : float [B, S], 0..1.
    level : 1 - epsilon.

    Returns
    -------
    float [B] : natural logarithm of EMM; -inf where it is below the smallest size, inf where at least the largest.
    """
    log_sizes, at_level = np.log(sizes), ratios >= level
    last = len(sizes) - 1 - np.argmax(at_level[:, ::-1], axis=1)  # the largest size at the level
    found = np.full(len(ratios), -np.inf)
    found[at_level[:, -1]] = np.inf
    inside = np.flatnonzero(at_level.any(axis=1) & ~at_level[:, -1])
    i = last[inside]
    above, below = ratios[inside, i], ratios[inside, i + 1]
    t = (above - level) / (above - below)  # 0 at sizes[i], 1 at sizes[i+1]
    found[inside] = (1 - t) * log_sizes[i] + t * log_sizes[i + 1]
    return found


def emm_at(sizes: np.ndarray, log_size: float, level: float) -> Emm:
    """The `Emm` that a value of `emm_crossings` stands for."""
    if math.isinf(log_size):
        return (
            Emm(float(np.max(sizes)), "at least", level) if log_size > 0 else Emm(float(np.min(sizes)), "below", level)
        )
    return Emm(math.exp(log_size), "at", level)
