"""Which of the measured runs count, and why others do not: what one curve may average are seeds of one setting."""

import json
import math
import os
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from memorization.curve.factors import dataset_name, factor_values, group_by
from memorization.runs import HOW_RUN, NO_FACTOR, Run, records_that_count

ALL = "all"  # of `keep`: every run
_HOW_LONG = {"duration", "total_kimg", "total_steps", "mem_eval", "stop_at_mem", "stop_patience"}


@dataclass(frozen=True)
class Selection:
    """The runs that count, in the order in which they were given, and what became of the others."""

    runs: tuple[Run, ...]
    left_out: dict[Path, str]  # folder -> why it does not count
    kept: dict[Path, str]  # folder -> why it would not count, had it not been asked for
    joined: dict[Path, str]  # folder of a run that another one continues -> in which run it is contained
    notes: tuple[str, ...] = ()  # sentences without a full stop

    @property
    def remarks(self) -> list[str]:
        """The kept runs and the notes, as sentences without a full stop."""
        return [f"{folder} is kept as asked for, although it is {why}" for folder, why in self.kept.items()] + [
            f"{folder} is {what}" for folder, what in self.joined.items()
        ] + list(self.notes)  # fmt: skip


def select_runs(
    runs: Sequence[Run],
    by: str | None = None,  # key of `factor_values`: runs with different values are not averaged
    *,
    keep: Iterable[str | os.PathLike] = (),  # run folders that count all the same; "all": every one
    averaged: bool = True,  # False: each run stands for itself, and only continuations are joined
) -> Selection:
    """Leave out the runs that are no seeds of one setting with the others.

    1. A run that another one continues (`--resume` of one of its training states) is one run with it: its
       snapshots up to that state are those of the other, too.
    2. A run that has not come to its end (run-state.json: stopped, failed or running) has a ratio of fewer epochs.
    3. Of runs on different images at one |D|, those of the dataset with most runs count. The digests that the runs
       recorded tell; where two of them cannot be compared, the images are taken to be the same.
    4. Of runs of one |D| planned for different numbers of epochs, those count whose number most runs have.
    5. Of runs with equal seed, images and options, or with a snapshot in common, one counts: it is the same
       network, and no second draw of the seed.

    The last three within each value of `by`. Of equally many the larger number of epochs, then the run that comes
    first, is preferred.

    Raises
    ------
    ValueError
        If none is left, or the key is unknown.
    """
    wanted = {ALL if str(path) == ALL else os.path.realpath(path) for path in keep}
    runs, joined = _join(list(runs))
    if not averaged:
        notes = tuple(f"{run.path} is {why}" for run in runs if (why := _unfinished(run)) is not None)
        return Selection(tuple(runs), {}, {}, joined, notes)
    why: dict[Path, str] = {}
    kept: dict[Path, str] = {}

    def leave_out(found: dict[Path, str]) -> None:
        for path, reason in found.items():
            (kept if ALL in wanted or os.path.realpath(path) in wanted else why).setdefault(path, reason)

    def left(group: Iterable[Run]) -> list[Run]:  # those about which there is still something to decide
        return [run for run in group if run.path not in why and run.path not in kept]

    leave_out({run.path: reason for run in runs if (reason := _unfinished(run)) is not None})
    groups = [left(runs)]
    if by is not None and groups[0]:
        values, _ = factor_values(groups[0], by)
        groups = [[groups[0][i] for i in indices] for _, indices in group_by(values)]
    for group in groups:
        for rule in (_other_images, _other_epochs, _same_network):
            leave_out(rule(left(group)))
    counted = tuple(run for run in runs if run.path not in why)
    if not counted:
        reasons = "; ".join(f'"{path}" is {reason}' for path, reason in why.items())
        raise ValueError(f"None of the measured runs counts: {reasons}. --keep=FOLDER takes one all the same.")
    names = sorted({dataset_name(run) for run in counted})
    notes = []
    if by is None and len(names) > 1:
        notes.append(f"the runs are on datasets of different names ({', '.join(names)}); --by=dataset tells them apart")
    notes += [
        f'{run.path} was compared with "{Path(run.reference).name}", on which it was not trained'
        for run in counted
        if run.other_reference
    ]
    return Selection(counted, why, kept, joined, tuple(notes))


def on_other_images(runs: Sequence[Run]) -> bool:
    """Whether runs of one |D| are on images of differently named datasets."""
    return len({dataset_name(run) for run in runs}) > 1 and bool(_other_images(runs))


# ----------------------------------------------------------------------------
# A run and what it continues.


def _join(runs: list[Run]) -> tuple[list[Run], dict[Path, str]]:
    """Put the snapshots of continued runs into those that continue them."""
    by_folder = {os.path.realpath(run.path): run for run in runs}
    before = {}  # path of a run -> the run that it continues, and from where on
    for run in runs:
        state = run.options.get("resume")
        found = re.fullmatch(r"training-state-(\d+)\.pt", Path(state).name) if isinstance(state, str) else None
        earlier = by_folder.get(os.path.realpath(Path(state).parent)) if found else None
        if earlier is not None and earlier is not run:
            before[run.path] = earlier, int(found[1])
    joined, whole = {}, {}
    for run in [r for r in runs if _unfinished(r) is None] + runs:  # a finished run takes what it continues first
        last, parts, seen = run, [], {run.path}
        if run.path in joined:
            continue
        while last.path in before and before[last.path][0].path not in seen:
            last, start = before[last.path]
            parts.append((last, start))
            seen.add(last.path)
        if _unfinished(run) is not None and any(_unfinished(part) is None for part, _ in parts):
            continue  # a run that came to its end does not lose it to an attempt to go on
        for part, _ in parts:
            joined.setdefault(part.path, f"continued by {run.path}, and one run with it")
        if parts:
            whole[run.path] = _with_parts(run, parts)
    return [whole.get(run.path, run) for run in runs if run.path not in joined], joined


def _with_parts(run: Run, parts: Sequence[tuple[Run, int]]) -> Run:
    """The run with the records of those before it (latest first), each up to the kimg at which it was continued."""
    records, until, before = list(run.records), math.inf, []
    for part, start in parts:
        until = min(until, start)
        before.insert(0, (part.path, until))
        records = [record for record in part.records if (record.get("kimg") or 0) <= until] + records
    counted = sorted(records_that_count(records, run.size), key=lambda r: r["kimg"])
    return replace(run, records=tuple(records), counted=tuple(counted), before=tuple(before))


# ----------------------------------------------------------------------------
# Why a run does not count. Each rule returns {folder: reason}.


def _unfinished(run: Run) -> str | None:
    """Why a run has not come to its end; None if it has, or does not say."""
    state = run.state
    if state is None or state["state"] == "complete" or 1000 * state["kimg"] >= run.options["total_nimg"]:
        return None
    word = "still running, or was killed," if state["state"] == "running" else state["state"]
    total = run.options["total_nimg"]
    return (
        f"{word} at {state['kimg']:g} of {total / 1000:g} kimg (epoch {1000 * state['kimg'] / run.size:,.0f} of "
        f"{total / run.size:,.0f})"
    )


def _other_images(runs: Sequence[Run]) -> dict[Path, str]:
    names = Counter(dataset_name(run) for run in runs)
    found: dict[Path, str] = {}
    others = set()  # names of datasets that do not count at one size
    for same in _by_size(runs):
        for kind in (True, False):  # digests of all pixels, and of a listing of files: only like compare with like
            digests = {run.path: d for run in same if (d := _digest(run)) and d.startswith("listing:") == kind}
            if len(set(digests.values())) < 2:
                continue
            count = Counter(digests.values())
            candidates = [run for run in same if run.path in digests]
            main = max(candidates, key=lambda run: (names[dataset_name(run)], count[digests[run.path]]))
            for run in candidates:
                if digests[run.path] != digests[main.path]:
                    found[run.path] = (
                        f"on other images ({_of(run)}, digest {_short(digests[run.path])}) than {main.path} "
                        f"({_of(main)}, {_short(digests[main.path])})"
                    )
                    if dataset_name(run) != dataset_name(main):
                        others.add(dataset_name(run))
    rest = {dataset_name(run) for run in runs if run.path not in found} - others
    if rest:  # also at sizes at which there is no run to compare with
        for run in runs:
            if run.path not in found and dataset_name(run) in others:
                found[run.path] = f"on images of {_of(run)}, as others that are left out, and not of {_any(rest)}"
    return found


def _other_epochs(runs: Sequence[Run]) -> dict[Path, str]:
    count = Counter(_planned(run) for run in runs)
    found = {}
    for same in _by_size(run for run in runs if run.options["total_nimg"] > 0):  # else nothing is known of it
        most = max((_planned(run) for run in same), key=lambda epochs: (count[epochs], epochs))
        for run in same:
            if _planned(run) != most:
                found[run.path] = (
                    f"trained for {_planned(run):,g} epochs, and the others of |D| = {run.size} for {most:,g}"
                )
    return found


def _same_network(runs: Sequence[Run]) -> dict[Path, str]:
    found: dict[Path, str] = {}
    counted: list[Run] = []
    for run in sorted(runs, key=lambda r: (-r.epochs, -r.num_samples)):  # stable
        for other in counted:
            if (what := _in_common(run, other)) is not None:
                found[run.path] = f"the same network as {other.path} ({what})"
                break
        else:
            counted.append(run)
    return found


def _in_common(a: Run, b: Run) -> str | None:
    """By what two runs are the same network; None if they are not, or nothing says so."""
    if a.size != b.size:
        return None
    if _snapshots(a) & _snapshots(b):
        return "a snapshot with the same content"
    if a.options.get("seed") is None or a.options["seed"] != b.options.get("seed"):
        return None
    digests = _digest(a), _digest(b)
    if digests[0] != digests[1] or (None in digests and _data(a) != _data(b)):
        return None
    if _setting(a) != _setting(b) or a.options.get("labels_sha256") != b.options.get("labels_sha256"):
        return None
    return f"seed {a.options['seed']}, the same images and options"


def _snapshots(run: Run) -> set[str]:
    return {r["snapshot_sha256"] for r in run.counted if isinstance(r.get("snapshot_sha256"), str)}


def _setting(run: Run) -> str:
    """Options that make a network what it is, seed and duration aside, as text."""
    named = {k: v for k, v in run.command.items() if v is not None and k not in NO_FACTOR | HOW_RUN | _HOW_LONG}
    return json.dumps(named, sort_keys=True, default=repr)


def _planned(run: Run) -> float:
    """Epochs as planned, to three digits: |D| does not divide everything."""
    return float(f"{run.options['total_nimg'] / run.size:.3g}")


def _digest(run: Run) -> str | None:
    digest = run.options.get("dataset_sha256")
    return digest if isinstance(digest, str) else None


def _data(run: Run) -> Any:
    return run.options["dataset_kwargs"].get("path")


def _of(run: Run) -> str:
    return Path(str(_data(run))).name


def _any(names: set[str]) -> str:
    return " or ".join(sorted(names))


def _short(digest: str) -> str:
    return digest.removeprefix("listing:")[:8]


def _by_size(runs: Iterable[Run]) -> list[list[Run]]:
    runs = list(runs)
    sizes = sorted({run.size for run in runs})
    return [[run for run in runs if run.size == size] for size in sizes]
