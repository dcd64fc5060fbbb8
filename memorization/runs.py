"""A run folder, read once: its options, what was measured on it, how its training went, and what of that counts."""

import contextlib
import json
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from dnnlib.limits import parse_json, read_regular
from dnnlib.util import flatten
from memorization.measure.quality import MEASURES
from memorization.records import SETTINGS, images_seen, jsonl_path, read_records, setting
from memorization.stats.intervals import wilson_interval
from training.precision import saved_precision
from training.run.state import read_run_state

OPTIONS, LOG, STATISTICS = "training_options.json", "mem_traj.log", "stats.jsonl"

# What programs that read run folders leave out, as they say it.
RUN_FOLDERS = "run folders"
OTHER_MEASUREMENTS = "measurements of snapshots that were measured more than once"

# Options of train.py that say which run it is, and how it is run, written and looked at; the others are what a curve
# holds fixed.
_WHICH = {"data", "seed", "outdir", "desc", "nosubdir", "overwrite", "resume", "dry_run", "show_options"}
HOW_RUN = {"batch_gpu", "fp16", "compile", "ls", "bench", "deterministic", "cache", "workers", "device", "mem_eval",
           "stop_patience", "quality_eval", "quality_measures", "quality_space", "quality_features",
           "best_mem_below", "tensorboard", "tick", "snap", "snap_at", "dump", "keep_states",
           "max_nan_ticks"}  # fmt: skip
# Consequences of the options and of the images, which older run folders name beside them.
_CONSEQUENCES = {"dataset_kwargs.max_size", "dataset_kwargs.empty_classes", "training_images",
                 "dataset_kwargs.resolution", "dataset_kwargs.use_labels", "total_nimg",
                 "total_kimg", "total_steps", "snap_nimg", "ema_halflife_nimg", "lr_rampup_nimg", "ema_rampup_ratio",
                 "loss", "dataset_sha256", "labels_sha256", "num_processes"}  # fmt: skip
NO_FACTOR = _WHICH | _CONSEQUENCES

# Where run folders from before there was the entry `command` hold an option of train.py under another name.
_BEFORE = {
    "batch_size": "batch", "loss_scaling": "ls", "cudnn_benchmark": "bench", "num_workers": "workers",
    "kimg_per_tick": "tick", "snapshot_ticks": "snap", "state_dump_ticks": "dump", "dataset_kwargs.path": "data",
    "dataset_kwargs.xflip": "xflip", "dataset_kwargs.cache": "cache", "network_kwargs.model_channels": "num_channels",
    "network_kwargs.channel_mult": "cres", "network_kwargs.num_blocks": "num_blocks",
    "network_kwargs.attn_resolutions": "attn_resolutions", "network_kwargs.dropout": "dropout",
    "network_kwargs.skip_connections": "skip_connections", "network_kwargs.use_fp16": "fp16",
    "optimizer_kwargs.class_name": "optimizer", "optimizer_kwargs.lr": "lr", "optimizer_kwargs.momentum": "momentum",
    "optimizer_kwargs.weight_decay": "weight_decay",
}  # fmt: skip


@dataclass(frozen=True)
class SnapshotPoint:
    """One measured snapshot of a run."""

    kimg: int
    num_memorized: int
    num_samples: int
    nimg: float = 0  # training images seen; `kimg` is the whole number in the name of the file
    adaptive: bool = False  # the measurement stopped as soon as it was clear on which side of a bar the ratio lies

    @property
    def ratio(self) -> float:
        return self.num_memorized / self.num_samples

    @property
    def interval(self) -> tuple[float, float]:
        """95 % Wilson interval of the ratio."""
        return wilson_interval(self.num_memorized, self.num_samples)


@dataclass(frozen=True)
class QualityCurve:
    """Quality over the training of a run, by one measure."""

    label: str = ""
    points: tuple[tuple[float, float, float, float], ...] = ()  # epoch, value, interval
    floors: dict[str, float] = field(default_factory=dict)  # of the training set and of held-out images


@dataclass(frozen=True)
class Run:
    """A measured run. On a curve it stands for its size, with the snapshot at which it memorizes most."""

    path: Path  # of the folder, as it was given
    options: dict[str, Any]  # training_options.json
    records: tuple[dict[str, Any], ...] = ()  # mem_traj.jsonl without closed-form optima, in the order of the file
    counted: tuple[dict[str, Any], ...] = ()  # those that count (`records_that_count`), ascending kimg
    state: dict[str, Any] | None = None  # run-state.json; None: not recorded, or damaged
    before: tuple[tuple[Path, float], ...] = ()  # folders of the runs that it continues, each up to so many kimg

    @property
    def size(self) -> int:
        """|D|: `dataset_kwargs.max_size`."""
        return self.options["dataset_kwargs"]["max_size"]

    @property
    def epochs(self) -> float:
        """Training images seen over |D|: as planned, or fewer where the run has ended or stopped before."""
        total_nimg, state = self.options["total_nimg"], self.state
        if state is not None and 0 < state["kimg"] < total_nimg / 1000:
            total_nimg = 1000 * state["kimg"]
        return total_nimg / self.size

    @cached_property
    def snapshots(self) -> tuple[SnapshotPoint, ...]:
        """The snapshots that count, ascending kimg."""
        return tuple(
            SnapshotPoint(r["kimg"], r["num_memorized"], r["num_samples"], images_seen(r), bool(r.get("adaptive")))
            for r in self.counted
        )

    @cached_property
    def best(self) -> SnapshotPoint:
        """The snapshot with the highest ratio; of equal ones the earlier."""
        return max(self.snapshots, key=lambda s: s.ratio)

    @property
    def kimg(self) -> int:
        return self.best.kimg

    @property
    def nimg(self) -> float:
        return self.best.nimg

    @property
    def num_memorized(self) -> int:
        return self.best.num_memorized

    @property
    def num_samples(self) -> int:
        return self.best.num_samples

    @property
    def ratio(self) -> float:
        return self.best.ratio

    @property
    def interval(self) -> tuple[float, float]:
        """95 % Wilson interval of the ratio of that one snapshot."""
        return self.best.interval

    @property
    def adaptive(self) -> bool:
        """Whether the ratio comes from an adaptive measurement."""
        return self.best.adaptive

    @property
    def reference(self) -> str | None:
        """Dataset that the images of the best snapshot were compared with."""
        return self.best_record.get("reference")

    @property
    def other_reference(self) -> bool:
        """Whether that is not what the run was trained on (`mem_ratio.py --other-reference`)."""
        return bool(self.best_record.get("other_reference"))

    @property
    def sampler(self) -> dict[str, Any] | None:
        """Options of the sampler that made them."""
        return self.best_record.get("sampler")

    @property
    def best_record(self) -> dict[str, Any]:
        """The record of that snapshot; empty where there is none."""
        return self.counted[self.snapshots.index(self.best)] if self.counted else {}

    @property
    def measurements(self) -> list[dict[str, Any]]:
        """The last record of each way in which the snapshots were measured."""
        return [ways[-1] for ways in by_settings(self.records)]

    # ------------------------------------------------------------------------
    # The training.

    @cached_property
    def command(self) -> dict[str, Any]:
        """The options of train.py that were in effect, by their names: the entry `command` of the options.

        Folders from before there was that entry have what can be found of them, beside what was derived; from them
        no command can be rebuilt.
        """
        recorded = self.options.get("command")
        if isinstance(recorded, dict):
            return {"lr_rampup": 200.0} | recorded  # what it was before it could be chosen
        flat = flatten({key: value for key, value in self.options.items() if key != "versions"})
        named = {_BEFORE[key]: value for key, value in flat.items() if key in _BEFORE}
        command = {key: value for key, value in flat.items() if key not in _BEFORE} | named
        command.pop("total_kimg", None)  # there a consequence, not the option
        command |= {"precision": saved_precision(self.options), "lr_rampup": 200.0}
        without_effect = {"final_ema": command.get("ema_mode") != "mode4", "ema": command.get("ema_mode") == "mode3",
                          "embed": command.get("arch") == "adm"}  # fmt: skip
        return command | {key: None for key, nothing in without_effect.items() if nothing and key in command}

    @cached_property
    def statistics(self) -> list[dict[str, float]]:
        """stats.jsonl: name -> finite mean, per tick. Incomplete lines, for a run may be going on, are left out."""
        entries = []
        for folder, until in [*self.before, (self.path, math.inf)]:
            entries += [means for means in _read_statistics(folder) if means["Progress/kimg"] <= until]
        return entries

    @property
    def losses(self) -> list[tuple[float, float]]:
        """(epoch, mean loss since the entry before)."""
        losses = {entry["Progress/kimg"]: entry["Loss/loss"] for entry in self.statistics if "Loss/loss" in entry}
        return [(1000 * kimg / self.size, loss) for kimg, loss in sorted(losses.items())]

    @property
    def quality(self) -> QualityCurve:
        """By the first measure: of mem_traj.jsonl, or else what train.py --quality-eval noted in stats.jsonl.

        Measurements with other settings than the last one's cannot be drawn in one line, and are left out.
        """
        records = [r for r in self.counted if r.get("quality")]
        if records:
            last = records[-1]["quality"]
            name = next(iter(last["measures"]))
            how = ("dataset_sha256", "num_reference", "space", "num_samples")
            same = [r for r in records if all(r["quality"][key] == last[key] for key in how)]
            same = [r for r in same if name in r["quality"]["measures"]]
            points = [
                (images_seen(r) / self.size, e["value"], e["ci_low"], e["ci_high"])
                for r in same for e in [r["quality"]["measures"][name]]
            ]  # fmt: skip
            floors = {key: floor["measures"].get(name) for key, floor in last["floors"].items()}
            floors = {key: entry["value"] for key, entry in floors.items() if entry is not None}
        else:
            names = self.options.get("quality_measures") or []
            name = names[0] if names else ""
            keys = [f"Quality/{name}{end}" for end in ("", "_ci_low", "_ci_high")]
            entries = [entry for entry in self.statistics if all(key in entry for key in keys)]
            points = [(1000 * e["Progress/kimg"] / self.size, *(e[key] for key in keys)) for e in entries]
            ends = {key: f"Quality/{name}_{key}" for key in ("training", "heldout")}
            floors = {key: entries[-1][end] for key, end in ends.items() if entries and end in entries[-1]}
        names = {"training": "training set", "heldout": "held-out images"}
        floors = {names.get(key, key): value for key, value in floors.items()}
        label = MEASURES[name].label if name in MEASURES else name
        return QualityCurve(label, tuple(points), floors)

    @property
    def seconds(self) -> float | None:
        """Of training, over all sessions; None: not recorded."""
        seconds = last = 0.0
        for now in [entry.get("Timing/total_sec", last) for entry in self.statistics]:
            seconds += now - last if now >= last else now  # a resumed run counts from its own start
            last = now
        return seconds if self.statistics else None

    @cached_property
    def device(self) -> str | None:
        """What it was trained on: cpu, cuda:0; None: not recorded."""
        log = self.path / "log.txt"
        text = log.read_text(encoding="utf-8", errors="replace") if log.is_file() else ""
        found = re.findall(r"^Network has [\d,]+ parameters on ([\w:]+)\.$", text, flags=re.MULTILINE)
        return ", ".join(dict.fromkeys(found)) or None


def _read_statistics(folder: Path) -> list[dict[str, float]]:
    path = folder / STATISTICS
    entries = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []:
        try:
            content = parse_json(line).items()
            means = {name: float(value["mean"]) for name, value in content if isinstance(value, dict)}
        except (ValueError, TypeError, KeyError, AttributeError, OverflowError):
            continue
        means = {name: mean for name, mean in means.items() if math.isfinite(mean)}
        if "Progress/kimg" in means:
            entries.append(means)
    return entries


def read_options(path: Path) -> dict[str, Any]:
    """The training options of the run folder `path`, which say |D| and how many images the run is to see.

    Raises
    ------
    OSError
        If they cannot be read.
    ValueError
        If they do not say so.
    """
    try:
        options = parse_json(read_regular(path / OPTIONS))
        size, total_nimg = options["dataset_kwargs"]["max_size"], options["total_nimg"]
        if type(size) is not int or not 1 <= size < 2**53 or not math.isfinite(total_nimg):
            raise ValueError
    except (ValueError, TypeError, KeyError, OverflowError):
        raise ValueError(
            f'"{path / OPTIONS}" does not say dataset_kwargs.max_size (|D|) and total_nimg; '
            "name folders that train.py has written."
        ) from None
    return options


def read_run(path: str | os.PathLike) -> Run:
    """Read a measured run.

    |D| is `dataset_kwargs.max_size` of `training_options.json`, the epochs are `total_nimg` / |D|, or those of
    `run-state.json` where the run ended earlier; which records count, says `records_that_count`.

    Raises
    ------
    OSError
        If a file cannot be read.
    ValueError
        If the files do not hold what is needed.
    """
    path = Path(path)
    if not (path / OPTIONS).exists() and (records := _other_records(path)):
        try:
            return _other_run(path, records)
        except (KeyError, TypeError, AttributeError):
            what = "lacks what mem_ratio.py writes of images and models of other programs"
            raise ValueError(f'"{jsonl_path(path / LOG)}" {what}; measure them again.') from None
    options = read_options(path)
    size = options["dataset_kwargs"]["max_size"]
    if not isinstance(options.get("network_kwargs", {}), dict):
        raise ValueError(f'"{path / OPTIONS}" holds network_kwargs that are no JSON object.')

    jsonl = jsonl_path(path / LOG)
    records = [r for r in read_records(jsonl, report=lambda _: None) if not r.get("optimum")]
    if not records:
        raise ValueError(f'"{jsonl}" holds no measurement; run mem_ratio.py on "{path}".')
    state = None
    with contextlib.suppress(OSError, ValueError):
        state = read_run_state(path)
    try:
        counted = sorted(records_that_count(records, size), key=lambda r: r["kimg"])
        run = Run(path, options, tuple(records), tuple(counted), state)
        _ = run.best  # refuses records without counts
    except (KeyError, TypeError, ZeroDivisionError):
        raise ValueError(f'"{jsonl}" lacks kimg, num_memorized or num_samples; measure the run again.') from None
    return run


def find_runs(paths: Iterable[str | os.PathLike]) -> tuple[list[Path], dict[Path, str]]:
    """Find the measured runs at and below the given folders, through links, too.

    A run folder has a `training_options.json`; it is measured once `mem_ratio.py` has left a
    `mem_traj.jsonl` in it. A folder with measurements of images or models of other programs counts, too.

    Returns
    -------
    runs : measured run folders, sorted, each once, by whatever names its folder was given.
    left_out : other folders that look like runs (options, snapshots, or measurements that cannot be read), each with
        the reason.

    Raises
    ------
    OSError
        If one of `paths` is not a folder.
    """
    runs: dict[str, Path] = {}  # by their real path
    left_out: dict[str, tuple[Path, str]] = {}
    for path in paths:
        if not Path(path).is_dir():
            raise NotADirectoryError(f'"{path}" is not a folder; name run folders or a folder of them.')
        for folder, files in _walk(path):
            missing = _missing(Path(folder), files)
            if missing == "":
                runs.setdefault(os.path.realpath(folder), Path(folder))
            elif missing is not None:
                left_out.setdefault(os.path.realpath(folder), (Path(folder), missing))
    return sorted(runs.values()), dict(sorted(left_out.values()))


def _missing(folder: Path, files: Sequence[str]) -> str | None:
    """What a folder with these files lacks to be a measured run; "" if nothing, None if it does not look like one."""
    needed = (OPTIONS, jsonl_path(LOG).name)
    if odd := [name for name in needed if name not in files and os.path.lexists(folder / name)]:
        return f"{' and '.join(odd)}: no regular file"
    options, records = (name in files for name in needed)
    if records and not options:
        try:
            options = bool(_other_records(folder))
        except (ValueError, OSError) as err:
            return str(err).rstrip(".")
    if options and records:
        return ""
    if options or (folder.name != "knn-dist" and any(name.startswith("network-snapshot-") for name in files)):
        return f"no {OPTIONS}" if records else "not measured yet; run mem_ratio.py on it"
    return None


def _other_records(path: Path) -> list[dict[str, Any]]:
    """Measurements in a folder of images or models of other programs (`mem_ratio.py --images`, `--model`)."""
    jsonl = jsonl_path(path / LOG)
    return [r for r in read_records(jsonl, report=lambda _: None) if r.get("source")] if jsonl.exists() else []


def _other_run(path: Path, records: list[dict[str, Any]]) -> Run:
    """Such a folder as a run: |D| is the size of the reference, each source one snapshot, the labels are options.

    Nothing is known of the training: epochs are 0, and `kimg` counts the checkpoints where their names do not say.

    Raises
    ------
    ValueError
        If the records are of different references or have different labels.
    """
    last = records[-1]
    for key in ("reference_sha256", "labels"):
        if any(record.get(key) != last.get(key) for record in records):
            what = "training sets" if key != "labels" else "--label"
            raise ValueError(f'"{path}" holds measurements with different {what}; give each a --log of its own.')
    names = list(dict.fromkeys(record["snapshot"] for record in records))
    known = [record["source"].get("checkpoint") for record in records]
    records = [
        dict(record, kimg=number if None not in known else names.index(record["snapshot"]))
        for record, number in zip(records, known)
    ]
    options = {
        "dataset_kwargs": {"path": last["reference"], "max_size": last["reference_size"]},
        "dataset_sha256": last["reference_sha256"], "total_nimg": 0, "network_kwargs": {},
        "source": last["source"]["kind"],
    }  # fmt: skip
    options = {**(last.get("labels") or {}), **options}  # labels name factors, not what the run is
    if type(last["reference_size"]) is not int or last["reference_size"] < 1:
        raise TypeError
    counted = {record["snapshot"]: record for record in records}  # the last measurement of each source
    return Run(path, options, tuple(records), tuple(sorted(counted.values(), key=lambda r: r["kimg"])))


def _walk(top: str | os.PathLike) -> Iterator[tuple[str, list[str]]]:
    """(folder, names of its files) at and below `top`. Links are followed, and come last: each folder is met once.

    A link that leads to a folder above `top` is not followed, for it would lead everywhere.
    """
    real = Path(os.path.realpath(top))
    seen = set(map(str, real.parents))
    waiting, links = [os.fspath(top)], []
    while waiting or links:
        folder = waiting.pop() if waiting else links.pop(0)
        target = os.path.realpath(folder)
        if target in seen:
            continue
        seen.add(target)
        try:
            entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
        except OSError:
            continue  # as os.walk does
        # Not those that would be waited for (a named pipe), or lead nowhere (a link to what is gone, or to itself).
        yield folder, [entry.name for entry in entries if _is(entry.is_file)]
        for entry in entries:
            if _is(entry.is_dir):
                (links if entry.is_symlink() else waiting).append(entry.path)


def _is(kind: Callable[[], bool]) -> bool:
    try:
        return kind()
    except OSError:  # a link to itself
        return False


def by_settings(
    records: Iterable[dict[str, Any]], *, apart_from: Sequence[str] = ("snapshot", "source")
) -> list[list[dict[str, Any]]]:
    """Records that were measured in the same way: with equal `SETTINGS`, those aside that are named."""
    ways: dict[str, list[dict[str, Any]]] = {}
    for record in records:
        settings = json.dumps([setting(record, key) for key in SETTINGS if key not in apart_from])
        ways.setdefault(settings, []).append(record)
    return list(ways.values())


def records_that_count(records: Sequence[dict[str, Any]], size: int) -> list[dict[str, Any]]:
    """One record per snapshot of a run on `size` images, all measured in the same way.

    Where it was measured with several settings (seeds, class, sampler, reference), one counts: all classes before a
    single one, a reference of |D| images before another, and none that the run is known not to have been trained on;
    then the one with the most images over all snapshots, then the most snapshots, of equal ones the last. Adaptive
    measurements (with fewer seeds where the verdict was clear) stand in for snapshots that have no other, or only one
    of fewer images.
    """

    def rank(group: list[dict[str, Any]]) -> tuple:
        training_set = group[0].get("reference_size", size) in (size, size / 2)  # mirrored images count twice
        training_set = training_set and not group[0].get("other_reference")
        return group[0].get("class") is None, training_set, sum(r["num_samples"] for r in group), len(group)

    full = by_settings(r for r in records if not r.get("adaptive"))
    early = by_settings(  # each may stop at its own seed
        (r for r in records if r.get("adaptive")), apart_from=("snapshot", "source", "seeds", "adaptive")
    )
    full = max(reversed(full), key=rank, default=[])
    early = max(reversed(early), key=lambda g: (*rank(g)[:2], len(g)), default=[])
    if full and early and rank(full)[:2] > rank(early)[:2]:
        early = []
    if full and early and rank(full)[:2] < rank(early)[:2]:
        full = []

    chosen: dict[int, dict[str, Any]] = {}
    for record in [*early, *full]:  # of equally many images the later in this order
        if record["num_samples"] >= chosen.get(record["kimg"], record)["num_samples"]:
            chosen[record["kimg"]] = record
    return list(chosen.values())


def other_measurements(runs: Iterable[Run]) -> int:
    """How many records of the runs do not count, see `records_that_count`."""
    return sum(len(run.records) - len(run.counted) for run in runs)


def trained_nimg(path: Path) -> int:
    """Images that a run has been trained on so far, by the last line of its stats.jsonl; 0 before there is one."""
    if not (path / STATISTICS).is_file():
        return 0
    with open(path / STATISTICS, "rb") as file:
        file.seek(max(file.seek(0, os.SEEK_END) - (1 << 14), 0))
        lines = file.read().splitlines()
    for line in reversed(lines):
        with contextlib.suppress(ValueError, KeyError, TypeError, OverflowError):  # the last one may be half written
            return round(1000 * json.loads(line)["Progress/kimg"]["mean"])
    return 0
