"""R_mem and quality while a network is trained: the end of a run that memorizes, and its best snapshot."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from memorization.measure.knn import Neighbors
from memorization.measure.quality import MEASURES
from memorization.measure.quality_meter import QualityMeter
from memorization.measure.ratio import measure_network, memorized
from memorization.stats.intervals import wilson_interval
from torch_utils import distributed as dist
from training.generation import split_seeds
from training.observer import GRID_IMAGES, Observation, image_grid

BEST = "best.json"


class MemorizationMonitor:
    """Measures R_mem at each snapshot, as `mem_ratio.py` does by default: same seeds, same sampler.

    Parameters
    ----------
    reference : training images, uint8 [N, C, H, W]; with mirrored training images, the originals only
    num_samples : images to generate, with the seeds 0, 1, ...
    batch : images at a time and rank
    device : of the nearest-neighbour search
    stop_at : end the run when R_mem (0..1) stays at or above this; None = never
    patience : at how many snapshots in a row
    grid : lay out generated images above their nearest training images, memorized ones framed
    quality : measures the quality of the same images, too, and best.json names the snapshot that is best by its first
        measure among those with R_mem below `best_below` (0..1)

    Raises
    ------
    ValueError
        If there is nothing to generate or to compare with, or the bounds are out of range.
    """

    def __init__(
        self,
        reference: np.ndarray,
        num_samples: int,
        *,
        batch: int = 64,
        device: torch.device | str | None = None,
        stop_at: float | None = None,
        patience: int = 2,
        grid: bool = False,
        quality: QualityMeter | None = None,
        best_below: float = 0.1,
    ):
        if num_samples < 1 or patience < 1:
            raise ValueError(f"At least 1 sample and 1 snapshot are needed, not {num_samples} and {patience}.")
        if len(reference) < 2:
            raise ValueError(f"d1/d2 needs at least 2 training images; there is {len(reference)}.")
        if stop_at is not None and not 0 < stop_at <= 1:
            raise ValueError(f"The ratio at which a run ends must lie in (0, 1], not at {stop_at}.")
        self.reference, self.num_samples, self.batch, self.device = reference, num_samples, batch, device
        self.stop_at, self.patience, self.grid = stop_at, patience, grid
        self.history: list[list[float]] = []  # [training images seen, ratio] of each snapshot
        self.quality, self.best_below = quality, best_below
        self.best: dict[str, Any] | None = None  # of the best snapshot so far, see `_name_best`
        if quality is not None:
            quality.check(num_samples)

    def __call__(self, net: torch.nn.Module, nimg: int, interrupted: Callable[[], bool]) -> Observation | None:
        """Measure; see `training.observer.Observer`. The ranks share the images of each round."""
        distance: list[np.ndarray] = []
        cells = [np.empty((0, 2, *self.reference.shape[1:]), dtype=np.uint8)]
        prepared = Neighbors(self.reference, device=self.device or "cpu", shard=True)  # not held while training goes on
        images = [np.empty((0, *self.reference.shape[1:]), dtype=np.uint8)]  # of all ranks
        round_size = self.batch * dist.get_world_size()
        for first in range(0, self.num_samples, round_size):
            if interrupted():
                return None
            seeds = list(range(first, min(first + round_size, self.num_samples)))
            keep = self.grid and first < GRID_IMAGES
            keep_images = keep or self.quality is not None
            measured = measure_network(net, prepared, seeds, batch=self.batch, keep_images=keep_images)
            distance.append(measured.knn_distance)
            if self.quality is not None:
                images.append(measured.images)
            if keep:
                cells.append(np.stack([measured.images, self.reference[measured.knn_index[:, 0]]], axis=1))
        quality = self._measure_quality(np.concatenate(images)) if self.quality is not None else None
        return self._observation(np.concatenate(distance), np.concatenate(cells)[:GRID_IMAGES], nimg, quality)

    def _measure_quality(self, images: np.ndarray) -> dict[str, Any]:
        """The entry `quality` of a record; the ranks share the features."""
        share = split_seeds(range(len(images)))
        return self.quality.measure(share, self.quality.embed(images[share]))

    def _observation(
        self, distance: np.ndarray, cells: np.ndarray, nimg: int, quality: dict[str, Any] | None = None
    ) -> Observation:
        flags = memorized(distance)
        ratio = float(flags.mean())
        low, high = wilson_interval(int(flags.sum()), len(flags))
        values = dict(
            ratio=ratio, ci_low=low, ci_high=high, num_samples=len(flags), mean_distance=float(distance[:, 0].mean())
        )
        self.history.append([nimg, ratio])
        values = {f"Memorization/{name}": value for name, value in values.items()}
        status, files = f"mem {100 * ratio:.1f} %", {}
        if quality is not None:
            values |= quality_values(quality)
            first = self.quality.measures[0]
            status += f"  {first} {quality['measures'][first]['value']:.4g}"
            files = {BEST: self._name_best(nimg, ratio, quality)}
        return Observation(
            values=values,
            status=status,
            files=files,
            stop=stop_reason(self.history, self.stop_at, self.patience),
            images={"Samples/generated_above_nearest": image_grid(cells, flags)} if len(cells) else {},
        )

    def state_dict(self) -> dict[str, Any]:
        return {"history": [list(entry) for entry in self.history], "best": self.best}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.history = [list(entry) for entry in state.get("history", [])]
        self.best = state.get("best")

    def _name_best(self, nimg: int, ratio: float, quality: dict[str, Any]) -> dict[str, Any]:
        """The content of best.json after this snapshot: `snapshot` is None until one has a ratio below the bound.

        A best one of before that was measured in another way, or with another bound, cannot be compared and is dropped.
        """
        measure = self.quality.measures[0]
        how = {"measure": measure, "mem_below": self.best_below}
        best = self.best
        if best is not None and not (self.quality.holds(best) and all(best[key] == how[key] for key in how)):
            best = None
        if best is not None and best["quality"]["num_samples"] != quality["num_samples"]:
            best = None
        if ratio < self.best_below:
            sign = 1 if MEASURES[measure].lower_is_better else -1
            value = quality["measures"][measure]["value"]
            if best is None or sign * value < sign * best["value"]:
                name = f"network-snapshot-{nimg // 1000:06d}.safetensors"
                best = {"snapshot": name, "nimg": nimg, "value": value, "ratio": ratio, **how, "quality": quality}
        self.best = best
        return best if best is not None else {"snapshot": None, **how}


def stop_reason(history: Sequence[Sequence[float]], stop_at: float | None, patience: int) -> str | None:
    """Why a run ends whose snapshots had these [training images, ratio], or None if it goes on.

    It ends when the last `patience` ratios are all at or above `stop_at`.
    """
    last = [ratio for _, ratio in history][-patience:]
    if stop_at is None or len(last) < patience or min(last) < stop_at:
        return None
    times = "1 snapshot" if patience == 1 else f"{patience} snapshots in a row"
    return f"the memorization ratio was at or above {stop_at:g} at {times}"


def quality_values(quality: dict[str, Any]) -> dict[str, float]:
    """The numbers of the entry `quality` for stats.jsonl: Quality/NAME with its interval, and its floors."""
    values = {}
    for name, entry in quality["measures"].items():
        values |= {f"Quality/{name}": entry["value"]}
        values |= {
            f"Quality/{name}_{key}": entry[key] for key in ("ci_low", "ci_high", "bias") if entry.get(key) is not None
        }
        for key, floor in quality["floors"].items():
            if name in floor["measures"]:
                values[f"Quality/{name}_{key}"] = floor["measures"][name]["value"]
    return values
