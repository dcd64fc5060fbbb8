"""The public interface: measure images, sample denoisers, read runs, find EMM."""

import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from memorization.curve.lines import curve_lines
from memorization.measure.criteria import THRESHOLD, memorized
from memorization.measure.gap import Gap, gap_to_optimum
from memorization.measure.knn import Neighbors
from memorization.measure.ratio import check_reference
from memorization.measure.samples import ARRAYS, Fit, Samples, read_array, to_images
from memorization.runs import Run, read_run
from memorization.stats.intervals import wilson_interval
from training.dataset import ImageFolderDataset
from training.generation import generate_images
from training.optim import OptimEDM

Images = np.ndarray | Tensor | str | os.PathLike
_CHUNK = 1024  # images that are read and compared at a time


@dataclass(frozen=True)
class Measurement:
    """How far generated images are from their two nearest training images.

    Attributes
    ----------
    distances : float64 [n, 2], l2 / sqrt(C H W) in 0..255 units
    indices : int64 [n, 2], rows of the training set
    threshold : of d1/d2; 1/3 is that of Gu et al. 2023
    training_size : |D|
    notes : sentences on what limits the result
    """

    distances: np.ndarray
    indices: np.ndarray
    threshold: float
    confidence: float
    training_size: int
    notes: tuple[str, ...] = ()
    _images: Any = field(default=None, repr=False)  # Samples or uint8 [n, C, H, W]
    _training: np.ndarray | None = field(default=None, repr=False)
    _rows: np.ndarray | None = field(default=None, repr=False)  # of the training set that _training holds

    @property
    def num_samples(self) -> int:
        return len(self.distances)

    @property
    def memorized(self) -> np.ndarray:
        """bool [n] : d1 < threshold d2."""
        return memorized(self.distances, self.threshold)

    @property
    def ratio(self) -> float:
        """R_mem, 0..1."""
        return float(self.memorized.mean())

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson interval of R_mem, for these images of this one model."""
        return wilson_interval(int(self.memorized.sum()), self.num_samples, self.confidence)

    def grid(self, path: str | os.PathLike, count: int = 32) -> None:
        """Draw the first `count` images above their nearest training images."""
        from memorization.plots import neighbour_grid  # matplotlib takes a second to load

        rows = range(min(count, self.num_samples))
        images = self._images.images(rows) if isinstance(self._images, Samples) else self._images[: len(rows)]
        nearest = self._training[np.searchsorted(self._rows, self.indices[: len(rows), 0])]
        neighbour_grid(np.ascontiguousarray(images), nearest, path, distance=self.distances[: len(rows)])

    def histogram(self, path: str | os.PathLike) -> None:
        """Draw the distribution of d1/d2."""
        from memorization.plots import ratio_histogram

        ratio_histogram(self.distances, path, thresholds=[self.threshold])

    def to_dict(self) -> dict[str, Any]:
        """The numbers, for JSON."""
        low, high = self.interval
        return {
            "ratio": self.ratio,
            "ci_low": low,
            "ci_high": high,
            "confidence": self.confidence,
            "interval": "wilson",
            "num_memorized": int(self.memorized.sum()),
            "num_samples": self.num_samples,
            "mean_distance": float(self.distances[:, 0].mean()),
            "threshold": self.threshold,
            "reference_size": self.training_size,
            "notes": list(self.notes),
        }

    def to_frame(self) -> Any:
        """One row per image: a pandas data frame where pandas is installed, else a list of dicts."""
        d, i = self.distances, self.indices
        columns = {"d1": d[:, 0], "d2": d[:, 1], "index1": i[:, 0], "index2": i[:, 1], "memorized": self.memorized}
        return table(columns)


def measure(
    images: Images,
    training_images: Images,
    *,
    threshold: float = THRESHOLD,
    confidence: float = 0.95,
    value_range: tuple[float, float] | None = None,
    layout: str | None = None,
    unique: bool = False,
    device: torch.device | str = "cpu",
) -> Measurement:
    """How many of `images` are copies of training images: d1/d2 < threshold (Gu et al. 2023, Section 2).

    Parameters
    ----------
    images, training_images : uint8 [n, C, H, W], [n, H, W, C] or [n, H, W], numpy or torch; or the path of a folder,
        zip, .npz or .npy
    threshold : of d1/d2
    confidence : of the interval
    value_range : what black and white are, where arrays hold floats: (-1, 1) or (0, 1)
    layout : NCHW, NHWC or NHW, where the axes of an array are not clear
    unique : compare with the distinct training images; d1/d2 cannot see copies of an image that is there twice
    device : where to search

    Raises
    ------
    OSError, ValueError
        If images cannot be read, are none, are of different sizes, or there are fewer than 2 training images.
    """
    if not 0 < threshold < float("inf"):
        raise ValueError(f"The threshold of d1/d2 must be positive, not {threshold}.")
    training = _training(training_images, value_range, layout)
    check_reference(training)
    distinct = np.unique(training.reshape(len(training), -1), axis=0, return_index=True)[1]
    notes, repeats = [], len(training) - len(distinct)
    rows = np.arange(len(training))
    if unique and repeats:
        rows = np.sort(distinct)
        training = training[rows]
        check_reference(training)
        notes.append(f"{repeats} training images that repeat another one were left out.")
    elif repeats:
        notes.append(f"{repeats} training images repeat another one: d1/d2 cannot see their copies; see unique=True.")
    shape = training.shape[1:]
    if isinstance(images, str | os.PathLike):
        found: Any = Samples(images, shape, Fit(value_range=value_range))
    else:
        found = to_images(images, value_range=value_range, layout=layout, like=shape)
        if not len(found):
            raise ValueError("There are no images; give at least one.")
    neighbors = Neighbors(training, device=device)
    parts = []
    for start in range(0, len(found), _CHUNK):
        some = range(start, min(start + _CHUNK, len(found)))
        parts.append(
            neighbors.query(found.images(some) if isinstance(found, Samples) else found[some.start : some.stop])
        )
    distances, indices = (np.concatenate(part) for part in zip(*parts))
    if not distances[:, 0].any():
        notes.append("Every image is a training image, at distance 0: are the training images the samples themselves?")
    for note in notes:
        warnings.warn(note, stacklevel=2)
    how = dict(threshold=threshold, confidence=confidence, training_size=len(training), notes=tuple(notes))
    return Measurement(distances, rows[indices], **how, _images=found, _training=training, _rows=rows)


class Optimum(OptimEDM):
    """The closed-form optimum D*(x; sigma) of a training set, a denoiser that only replays it (Gu et al. 2023, Eq. 2).

    Parameters
    ----------
    training_images : as of `measure`
    class_labels : int64 [N], for the class-conditional optimum
    """

    def __init__(
        self,
        training_images: Images,
        class_labels: Any = None,
        *,
        value_range: tuple[float, float] | None = None,
        device: torch.device | str = "cpu",
    ):
        super().__init__(_training(training_images, value_range, None), class_labels)
        self.to(device)


def sample(
    denoiser: torch.nn.Module,
    seeds: Sequence[int],
    *,
    batch: int = 64,
    class_idx: int | None = None,
    **sampler: Any,
) -> np.ndarray:
    """Generate an image per seed with EDM's sampler (Karras et al. 2022, Algorithm 2): uint8 [n, C, H, W].

    Parameters
    ----------
    denoiser : `Optimum`, a network of this project, a `Denoiser`, or one of `diffmem.adapters`
    seeds : whole numbers; a seed is the same image at any batch
    batch : images at a time
    class_idx : class of all images; None draws one per seed, if the denoiser has classes
    sampler : num_steps, sigma_min, sigma_max, rho, S_churn, ...: see `training.samplers`

    Raises
    ------
    ValueError
        If there are no seeds, or a sampler argument does not fit.
    """
    _check_denoiser(denoiser)
    if not len(seeds):
        raise ValueError("There are no seeds; give at least one.")
    made = generate_images(denoiser, list(seeds), batch=batch, class_idx=class_idx, sampler_kwargs=sampler)
    return np.concatenate([images.numpy() for _, images in made])


def gap(
    denoiser: torch.nn.Module,
    training_images: Images,
    *,
    class_labels: Any = None,
    num_noised: int = 256,
    value_range: tuple[float, float] | None = None,
    **how: Any,
) -> Gap:
    """Mean squared distance of a denoiser to the optimum of its training set, by noise level; see docs/optimum.md.

    `how`: sigmas, batch and seed of `memorization.measure.gap.gap_to_optimum`.
    """
    _check_denoiser(denoiser)
    images = _training(training_images, value_range, None)
    device = next((t.device for t in [*denoiser.parameters(), *denoiser.buffers()]), torch.device("cpu"))
    labels = class_labels if getattr(denoiser, "label_dim", 0) else None
    optimum = OptimEDM(images, labels).to(device)
    return gap_to_optimum(denoiser, optimum, images, num_noised=num_noised, class_labels=labels, **how)


def table(columns: dict[str, Any]) -> Any:
    """Columns as a pandas data frame where pandas is installed, else as a list of dicts."""
    try:
        import pandas
    except ImportError:
        plain = [np.asarray(column).tolist() for column in columns.values()]
        return [dict(zip(columns, row)) for row in zip(*plain)]
    return pandas.DataFrame(columns)


def _check_denoiser(denoiser: Any) -> None:
    missing = [name for name in ("img_channels", "img_resolution", "round_sigma") if not hasattr(denoiser, name)]
    if missing:
        raise ValueError(
            f"This denoiser lacks {', '.join(missing)}; wrap it: diffmem.Denoiser(denoise, shape=(C, H, W))."
        )


def _training(images: Images, value_range: tuple[float, float] | None, layout: str | None) -> np.ndarray:
    """Training images, uint8 [N, C, H, W]."""
    if not isinstance(images, str | os.PathLike):
        found = to_images(images, value_range=value_range, layout=layout, what="The training images")
        if not len(found):
            raise ValueError("There are no training images; give at least two.")
        return np.ascontiguousarray(found)
    if os.fspath(images).lower().endswith(ARRAYS):
        return read_array(images, value_range)
    return ImageFolderDataset(images).images()


@dataclass(frozen=True)
class Emm:
    """EMM, the training-set size at which R_mem falls below the level, with its interval.

    Attributes
    ----------
    size : |D|; None where the ratios do not cross the level
    low, high : ends of the interval; None where it is open
    verdict : "at", "below" (the smallest size) or "at least" (the largest)
    images_only : the interval knows of the generated images alone, not of how training seeds differ
    notes : sentences on what was assumed
    """

    size: float | None
    low: float | None
    high: float | None
    confidence: float
    verdict: str
    images_only: bool
    notes: tuple[str, ...]


def emm(
    sizes: Sequence[int],
    memorized: Sequence[int],
    samples: Sequence[int],
    *,
    level: float = 0.9,
    confidence: float = 0.95,
    seed_sd: float | None = None,
) -> Emm:
    """EMM of runs on training sets of these sizes (Gu et al. 2023, Definition 1), with an interval.

    Parameters
    ----------
    sizes : |D| of each run; several runs of a size are its training seeds
    memorized, samples : numbers of memorized and of all generated images of each run
    level : 1 - epsilon
    confidence : of the interval
    seed_sd : how much seeds differ, standard deviation of logit R_mem; None: from sizes with several runs

    Raises
    ------
    ValueError
        If the lengths differ, or a number is out of range.
    """
    if not len(sizes) == len(memorized) == len(samples) or not len(sizes):
        raise ValueError(f"EMM needs as many sizes as numbers, not {len(sizes)}, {len(memorized)} and {len(samples)}.")
    runs = []
    for i, (size, m, n) in enumerate(zip(sizes, memorized, samples)):
        if not 0 <= m <= n or n < 1 or size < 1:
            raise ValueError(f"{m} of {n} memorized images at |D| = {size} is no measurement.")
        options = {"dataset_kwargs": {"max_size": int(size)}, "total_nimg": 0, "network_kwargs": {}}
        record = {"kimg": 0, "num_memorized": int(m), "num_samples": int(n)}
        runs.append(Run(Path(f"run-{i}"), options, (record,), (record,)))
    [line], _ = curve_lines(runs, level=level, confidence=confidence, seed_sd=seed_sd)

    def end(place: Any) -> float | None:
        return place.size if place.verdict == "at" else None

    return Emm(
        end(line.emm), end(line.emm_low), end(line.emm_high), confidence, line.emm.verdict, line.images_only,
        tuple(line.notes),
    )  # fmt: skip


def load_run(path: str | os.PathLike) -> Run:
    """A measured run folder: its options, records and snapshots; see `memorization.runs.Run`.

    `diffmem.records(run)` gives a row per measured snapshot.

    Raises
    ------
    OSError, ValueError
        If it is no run folder, or nothing was measured in it.
    """
    return read_run(path)


def records(run: Run) -> Any:
    """A row per measured snapshot that counts: a pandas data frame where pandas is installed, else a list of dicts."""
    keys = ("kimg", "ratio", "ci_low", "ci_high", "num_memorized", "num_samples", "mean_distance")
    return table({key: [record.get(key) for record in run.counted] for key in keys})
