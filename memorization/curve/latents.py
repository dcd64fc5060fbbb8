"""Which runs were sampled from the same latents, and how far they memorize the same of them."""

import json
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from memorization.measure.criteria import memorized
from memorization.measure.ratio import Measurement
from memorization.records import read_rows
from memorization.runs import LOG, Run
from memorization.stats.alike import Alike, same_latents


@dataclass(frozen=True)
class Sampled:
    """From what the images of a run were made, of the snapshot for which it stands."""

    way: Hashable  # runs with equal ones make the same latents of the same seed; None: not known, as of other programs
    seeds: np.ndarray  # int [n]
    flags: np.ndarray | None  # bool [n], whether each is memorized; None: the distances are no longer on disk


class Latents:
    """Of runs, each at the snapshot with its highest ratio: which share latents, and how alike they are then."""

    def __init__(self, runs: Sequence[Run]) -> None:
        self._sampled = [_sampled(run) for run in runs]
        self._index = {run.path: i for i, run in enumerate(runs)}
        self._numbers, ways = np.zeros(len(runs), dtype=int), [s.way for s in self._sampled]
        for way in dict.fromkeys(ways):
            members = [i for i, other in enumerate(ways) if other == way]
            found = np.arange(len(members)) if way is None else same_latents([self._sampled[i].seeds for i in members])
            self._numbers[members] = found + self._numbers.max() + 1
        self._alike = Alike([s.seeds for s in self._sampled], [s.flags for s in self._sampled])

    def numbers(self, runs: Iterable[Run]) -> np.ndarray:
        """int [K]; runs with equal ones have latents in common."""
        return self._numbers[self._indices(runs)]

    def alike(self, *groups: Sequence[Run]) -> float | None:
        """Correlation of whether an image is memorized, between the runs within each of these groups.

        None if no two of them share latents, or nothing can be said: the distances of their images are not on disk, or
        they memorize all or nothing.
        """
        return self._correlation(
            (a, b) for group in map(self._indices, groups) for i, a in enumerate(group) for b in group[:i]
        )

    def alike_between(self, *pairs: tuple[Sequence[Run], Sequence[Run]]) -> float | None:
        """The same between the runs of one group and those of another, of each pair of groups."""
        return self._correlation(
            (a, b) for one, other in pairs for a in self._indices(one) for b in self._indices(other)
        )

    def _correlation(self, pairs: Iterable[tuple[int, int]]) -> float | None:
        flags = [s.flags for s in self._sampled]
        return self._alike.correlation(
            (a, b)
            for a, b in pairs
            if self._numbers[a] == self._numbers[b] and flags[a] is not None and flags[b] is not None
        )

    def _indices(self, runs: Iterable[Run]) -> list[int]:
        return [self._index[run.path] for run in runs]

    def unknown(self, runs: Sequence[Run]) -> bool:
        """Whether the distances of some of the runs that share latents are not on disk."""
        numbers = self.numbers(runs)
        return any(
            (numbers == number).sum() > 1 and self._sampled[self._index[run.path]].flags is None
            for run, number in zip(runs, numbers)
        )


def distances(run: Run, record: dict[str, Any]) -> Measurement | None:
    """The distances of a record's images in the order of its seeds; None if they are no longer on disk."""
    seeds = _seeds(record)
    if not isinstance(record.get("snapshot"), str) or not seeds:
        return None
    folders: Sequence[Path] = [run.path, *(folder for folder, _ in run.before)]
    for folder in folders:
        found = read_rows(folder / LOG, Path(record["snapshot"]).stem, record, seeds, {})
        if found is not None and found.num_samples == record["num_samples"]:
            return found
    return None


def _sampled(run: Run) -> Sampled:
    record = run.best_record
    seeds = np.array([] if record.get("source") else _seeds(record), dtype=np.int64)
    if not len(seeds):
        return Sampled(None, seeds, None)
    resolution = run.options["dataset_kwargs"].get("resolution")
    way = json.dumps([record.get("sampler"), record.get("class"), resolution], sort_keys=True)
    rows = distances(run, record)
    if rows is None or len(np.unique(rows.seeds)) < rows.num_samples or rows.num_memorized != record["num_memorized"]:
        return Sampled(way, seeds, None)  # not there, or not those of the record
    return Sampled(way, rows.seeds, memorized(rows.knn_distance))


def _seeds(record: dict[str, Any]) -> list[int]:
    """The seeds of the images that a record counts; none where it does not say them."""
    from dnnlib.util import parse_int_list

    if not isinstance(record.get("seeds"), str):
        return []
    try:
        seeds = parse_int_list(record["seeds"])[: record["num_samples"]]
    except ValueError:
        return []
    return seeds if max(seeds) < 1 << 63 else []
