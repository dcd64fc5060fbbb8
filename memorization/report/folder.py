"""What a folder of runs holds: the measured runs with their training, the others, the pictures, plans of searches."""

import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import PIL.Image

from dnnlib.limits import check_regular, parse_json
from memorization.runs import OTHER_MEASUREMENTS, RUN_FOLDERS, Run, find_runs, other_measurements, read_run
from memorization.selection import select_runs


@dataclass(frozen=True)
class RunsFolder:
    """Measured runs by |D|, then name; other folders that look like runs, each with the reason why not."""

    root: Path
    runs: dict[str, Run]  # by their name: the path below the folder
    left_out: dict[str, str]
    notes: tuple[str, ...] = ()  # on the runs that count, without a full stop

    def left_out_counts(self) -> dict[str, int]:
        """What was left out, by what it is, but for pictures and plans."""
        return {RUN_FOLDERS: len(self.left_out), OTHER_MEASUREMENTS: other_measurements(self.runs.values())}

    def select(self, by: str | None = None, keep: Sequence[str | os.PathLike] = ()) -> "RunsFolder":
        """The same with the runs that count where `by` tells lines apart; see `memorization.selection`."""
        if not self.runs:
            return self
        found = select_runs(list(self.runs.values()), by, keep=keep)
        names = {run.path: name for name, run in self.runs.items()}
        left_out = {names[path]: reason for path, reason in (found.left_out | found.joined).items()}
        runs = {names[run.path]: run for run in found.runs}
        notes = (*(f"{names[path]} is kept as asked for, although it is {why}" for path, why in found.kept.items()),
                 *found.notes)  # fmt: skip
        return replace(self, runs=runs, left_out=dict(sorted((self.left_out | left_out).items())), notes=notes)


def read_runs_folder(root: str | os.PathLike) -> RunsFolder:
    """Read all runs at and below a folder. One that cannot be read is left out, and the others stand.

    Raises
    ------
    OSError
        If `root` is not a folder.
    """
    root = Path(root)
    found, missing = find_runs([root])
    left_out = {_name(folder, root): reason for folder, reason in missing.items()}
    runs = {}
    for folder in found:
        try:
            run = read_run(folder)
            _ = run.statistics, run.device  # files that cannot be read leave it out, too
            runs[_name(folder, root)] = run
        except (ValueError, OSError) as err:
            left_out[_name(folder, root)] = str(err)
    runs = dict(sorted(runs.items(), key=lambda item: (item[1].size, item[0])))
    return RunsFolder(root, runs, dict(sorted(left_out.items())))


def differing(commands: Sequence[dict[str, Any]]) -> dict[str, list[Any]]:
    """Options (of `Run.command`) in which runs differ: name -> value of each run, None where it has none."""
    columns = {key: [each.get(key) for each in commands] for key in sorted({key for each in commands for key in each})}
    return {key: values for key, values in columns.items() if len({json.dumps(v, sort_keys=True) for v in values}) > 1}


def common(commands: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Options that all runs have, with equal values."""
    shared = {key for key in commands[0] if all(key in each and each[key] == commands[0][key] for each in commands)}
    return {key: commands[0][key] for key in sorted(shared)}


def find_pictures(
    root: str | os.PathLike,
    runs: Iterable[str | os.PathLike],
    *,
    each: int = 4 << 20,  # largest file, in bytes
    total: int = 24 << 20,  # of all files, in bytes
) -> tuple[dict[str, bytes], dict[str, str]]:
    """PNG files in a study's folder, its runs' folders, and those between; single samples (000007.png) do not count.

    Returns
    -------
    pictures : path below `root` -> content of the file, by path.
    left_out : path -> reason: too large, beyond the total, or damaged.
    """
    root = Path(root)
    pictures: dict[str, bytes] = {}
    left_out: dict[str, str] = {}
    room = total
    for path in sorted(p for folder in _folders(root, runs) for p in folder.glob("*.png") if not p.stem.isdigit()):
        name = _name(path, root)
        try:
            check_regular(path)
            size = path.stat().st_size
            if size > min(each, room):
                limit = f"larger than {each >> 20} MiB" if size > each else f"beyond {total >> 20} MiB in all"
                raise ValueError(limit)
            with PIL.Image.open(path, formats=["PNG"]) as image:
                image.verify()
            pictures[name] = path.read_bytes()
            room -= size
        except (ValueError, OSError, SyntaxError, PIL.Image.DecompressionBombError) as err:
            left_out[name] = str(err) if type(err) is ValueError else "not a readable PNG file"
    return pictures, left_out


def find_plans(root: str | os.PathLike, runs: Iterable[str | os.PathLike]) -> tuple[dict[str, dict], dict[str, str]]:
    """Plans of searches (`plan.json`) in the folders of `find_pictures`.

    Returns
    -------
    plans : path below `root` -> content of the file.
    left_out : path -> reason.
    """
    plans: dict[str, dict] = {}
    left_out: dict[str, str] = {}
    for folder in sorted(_folders(Path(root), runs)):
        path = folder / "plan.json"
        if not path.is_file():
            continue
        try:
            content = parse_json(path.read_bytes())
            if not isinstance(content, dict) or not isinstance(content.get("decisions"), list):
                raise ValueError
            plans[_name(path, Path(root))] = content
        except (ValueError, OSError):
            left_out[_name(path, Path(root))] = "not a plan of emm.py search"
    return plans, left_out


def _folders(root: Path, runs: Iterable[str | os.PathLike]) -> set[Path]:
    """The study's folder, its runs' folders, and those between."""
    above = (folder for run in runs for folder in [Path(run), *Path(run).parents])
    return {root} | {folder for folder in above if folder.is_relative_to(root)}


def _name(path: Path, root: Path) -> str:
    """Path below `root`; the folder's own name for `root` itself."""
    return path.relative_to(root).as_posix() if path != root else path.absolute().name
