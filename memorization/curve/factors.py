"""The factor that tells the lines of a figure apart: its value for each run, from the options or from the dataset."""

import functools
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dnnlib.images import ImageFiles
from dnnlib.util import flatten
from memorization.runs import HOW_RUN, NO_FACTOR, Run

_OTHER_NAMES = {"cbase": "num_channels"}  # which it overrides
_MAX_LIST = 32  # longer lists of dataset.json belong to its images


class _NotRecorded:
    def __repr__(self) -> str:
        return "not recorded"


NOT_RECORDED = _NotRecorded()  # the value of a key that a run does not have; None is a value


def factor_values(runs: Sequence[Run], key: str) -> tuple[list[Any], list[str]]:
    """The value of `key` for each run.

    Parameters
    ----------
    runs : measured runs.
    key : an option of train.py (``weight-decay``, ``batch``); or of what `training_options.json` holds beside
        them, by dotted name (``network_kwargs.channel_mult``) or by the last part where only one key has it; or
        of the dataset: a key of its `dataset.json`, ``num_classes``, ``channels``, and ``dataset``, its name without
        the size; or ``folder``, the name of the folder in which the run folder lies. What has this name in
        the options counts first; ``dataset.KEY`` asks the dataset.

    Returns
    -------
    values : one per run; NOT_RECORDED for runs that do not have the key.
    notes : sentences on what could not be read.

    Raises
    ------
    ValueError
        If no run has the key, several keys have it as their last part, or it is |D| itself. The message lists
        the keys in which the runs differ.
    """
    option = key.removeprefix("--").replace("-", "_")
    option = _OTHER_NAMES.get(option, option)
    if option != "dataset_kwargs.max_size" and any(option in run.command for run in runs):
        return [run.command.get(option, NOT_RECORDED) for run in runs], []
    options = [flatten({name: value for name, value in run.options.items() if name != "command"}) for run in runs]
    known = dict.fromkeys(name for each in options for name in each)
    name = _option_name(option, known, options)
    if name == "dataset_kwargs.max_size":
        raise ValueError(f"--by={key} is |D|, the axis of the figure; the runs differ in: {_differing(runs)}.")
    if name is not None:
        return [each.get(name, NOT_RECORDED) for each in options], []

    name = key.removeprefix("dataset.")
    if name == "folder":
        return [run.path.resolve().parent.name for run in runs], []
    if name == "dataset":
        return [dataset_name(run) for run in runs], []
    facts = [_dataset_facts(run) for run in runs]
    missing = sorted({str(run.options["dataset_kwargs"].get("path")) for run, f in zip(runs, facts) if f is None})
    missing = ", ".join(missing[:3]) + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
    notes = [f"{name} is not recorded where the dataset cannot be read any more: {missing}"]
    if not any(name in f for f in facts if f):
        hint = f" These datasets cannot be read any more: {missing}." if missing else ""
        raise ValueError(f'No run has the key "{key}"; the runs differ in: {_differing(runs)}.{hint}')
    return [(f or {}).get(name, NOT_RECORDED) for f in facts], notes if missing else []


def differing_keys(runs: Sequence[Run]) -> list[str]:
    """The keys for `factor_values` in which the runs differ, those aside that follow |D|."""
    found = []
    for read in (lambda run: run.command, lambda run: _dataset_facts(run) or {}):
        each = [read(run) for run in runs]
        for name in dict.fromkeys(name for values in each for name in values):
            if name not in NO_FACTOR and len({_text(v.get(name, NOT_RECORDED)) for v in each}) > 1:
                found.append(name)
    for name in ("dataset", "folder"):
        if len(set(factor_values(runs, name)[0])) > 1:
            found.append(name)
    return list(dict.fromkeys(found))


def _differing(runs: Sequence[Run]) -> str:
    return ", ".join(differing_keys(runs)) or "nothing"


def differing_options(runs: Sequence[Run]) -> list[str]:
    """Names of the options, |D| and seed aside, in which the runs differ.

    One curve should hold them fixed: the network, what is done with the data, how it is trained, and the sampler
    of the measurement.
    """
    recorded = [run.command for run in runs if "command" in run.options]  # folders from before have other entries, too
    names = {key for command in recorded or [run.command for run in runs] for key in command} - NO_FACTOR - HOW_RUN
    each = [
        run.command | {"resolution": run.options["dataset_kwargs"].get("resolution"), "sampler": run.sampler}
        for run in runs
    ]
    names |= {"resolution", "sampler"}
    return sorted(key for key in names if len({_text(found.get(key)) for found in each}) > 1)


def group_by(values: Sequence[Any]) -> list[tuple[Any, list[int]]]:
    """(value, indices of the runs that have it), numbers ascending, text in order, what is not recorded last."""
    groups: dict[str, tuple[Any, list[int]]] = {}
    for i, value in enumerate(values):
        groups.setdefault(_text(value), (value, []))[1].append(i)
    return sorted(groups.values(), key=lambda group: _order(group[0]))


def readable(value: Any, key: str = "") -> str:
    """A value as it stands in a legend: yes, 0.5, "2,2,2", or of skip connections "all", "only 3", "without 8, 9"."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if value is None:
        return "none"
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, list):
        if key.replace("-", "_").endswith("skip_connections") and value and set(value) <= {0, 1}:
            return _readable_skips(value)
        return ",".join(readable(v) for v in value) or "none"
    return str(value)


def _readable_skips(skips: list[int]) -> str:
    """Positions are counted from 1 at high resolution, as published."""
    kept = [str(i) for i, skip in enumerate(skips, start=1) if skip]
    removed = [str(i) for i, skip in enumerate(skips, start=1) if not skip]
    if not kept or not removed:
        return f"{'all' if kept else 'none'} of {len(skips)}"
    return f"only {', '.join(kept)} of {len(skips)}" if len(kept) <= len(removed) else f"without {', '.join(removed)}"


# ----------------------------------------------------------------------------
# Options.


def _option_name(key: str, known: dict[str, None], options: Sequence[dict[str, Any]]) -> str | None:
    """The full name of a key of the options, or None."""
    if key in known:
        return key
    found = [name for name in known if name.endswith("." + key)]
    distinct = {_text([each.get(name) for each in options]) for name in found}
    if len(distinct) > 1:
        raise ValueError(f'"{key}" could be {" or ".join(found)}; write the whole name.')
    return found[0] if found else None


# ----------------------------------------------------------------------------
# The dataset.


def dataset_name(run: Run) -> str:
    """Name of the dataset without its size: "cifar10-1k.zip" -> "cifar10" for |D| = 1000."""
    stem = Path(str(run.options["dataset_kwargs"].get("path"))).stem
    sizes = "|".join(re.escape(text) for text in (str(run.size), f"{run.size / 1000:g}k"))
    return re.sub(rf"(?:^|[-_.])(?:{sizes})(?=$|[-_.])", "", stem).strip("-_.") or stem


def _dataset_facts(run: Run) -> dict[str, Any] | None:
    """What dataset.json and the images say, or None where the dataset cannot be found.

    Where the path in the options leads nowhere, the reference of the measurement takes its place.
    """
    path = run.options["dataset_kwargs"].get("path")
    for place in (path, run.reference):
        if isinstance(place, str) and place and (facts := _read_facts(os.path.abspath(place), run.size)) is not None:
            return facts
    return None


@functools.lru_cache(maxsize=256)
def _read_facts(path: str, size: int) -> dict[str, Any] | None:
    try:
        files = ImageFiles(path)
        content = dict(files.metadata() or {})
        content.pop("labels", None)
        labels = (files.labels() or {}).values()
        image = files.image(files.names[0])
        files.close()
    except (OSError, ValueError):
        return None
    if size not in (len(files.names), 2 * len(files.names)):  # another file of that name; mirrored images count
        return None
    facts = {k: v for k, v in flatten(content).items() if not isinstance(v, list) or len(v) <= _MAX_LIST}
    classes = {label for label in labels if isinstance(label, int)}
    channels = image.shape[2] if image.ndim == 3 else 1
    return {"resolution": image.shape[0], "channels": channels, "num_classes": len(classes) or None, **facts}


# ----------------------------------------------------------------------------
# Order.


def _text(value: Any) -> str:
    """The same text for the same value; 1 and 1.0 are the same, 1 and true are not."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return json.dumps(value, sort_keys=True, default=repr)


def _order(value: Any) -> tuple:
    if value is NOT_RECORDED:
        return (4,)
    if value is None:
        return (0,)
    if isinstance(value, int | float):
        return (1, value)
    if isinstance(value, list) and all(isinstance(v, int | float) for v in value):
        return (2, len(value), [-v for v in value])  # skip connections: position 1 first
    return (3, [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", _text(value))])
