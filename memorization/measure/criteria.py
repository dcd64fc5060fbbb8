"""When a generated image counts as memorized: d1/d2, calibrated l2, authenticity. Each is a score below a threshold."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

THRESHOLD = 1 / 3  # of d1/d2 (Yoon et al. 2023)
ALPHA = 0.5  # of the calibrated distance (Carlini et al. 2023)

Search = Callable[[Any, int], tuple[np.ndarray, np.ndarray]]  # (images, k) -> distance [n, k], index [n, k]


@dataclass(frozen=True)
class Criterion:
    """A rule that says from distances to training images which generated images are memorized.

    `score` is small for copies, has no unit, and is NaN where it is undefined. An image is memorized when its
    score is below `threshold`; NaN is not. `distance` may have more columns than needed, so that one search
    with the largest `neighbours` serves several criteria; images, features, pixels and any unit will do.
    """

    name: str
    neighbours: int  # columns of `distance` that it reads
    threshold: float  # exclusive upper bound of the score
    formula: str  # of the score, in words
    source: str
    compute: Callable[[np.ndarray, np.ndarray | None], np.ndarray]  # distance [n, neighbours], other -> score [n]
    needs_other: bool = False  # wants `other`, see `other_distance`

    def score(self, distance: np.ndarray, other: np.ndarray | None = None) -> np.ndarray:
        """Score of each image.

        Parameters
        ----------
        distance : float [n, >= neighbours], distances to the nearest training images, ascending.
        other : float [n], with `needs_other`: how far the nearest training image is from its own nearest other one.

        Returns
        -------
        float64 [n]

        Raises
        ------
        ValueError
            If there are too few columns, or `other` is missing or of another length.
        """
        distance = np.asarray(distance, dtype=np.float64)
        if distance.ndim != 2 or distance.shape[1] < self.neighbours:
            columns = f"distances [n, {self.neighbours}] to {_count(self.neighbours)}"
            raise ValueError(f'The criterion "{self.name}" needs {columns}, not {list(distance.shape)}.')
        if self.needs_other:
            other = np.asarray(other, dtype=np.float64) if other is not None else np.empty(0)
            if other.shape != distance.shape[:1]:
                what = "from the nearest training image to its own nearest other one"
                raise ValueError(
                    f'The criterion "{self.name}" needs a distance {what} per image, [{len(distance)}], '
                    f"not {list(other.shape)}."
                )
        with np.errstate(divide="ignore", invalid="ignore"):
            return self.compute(distance[:, : self.neighbours], other)

    def flags(self, distance: np.ndarray, other: np.ndarray | None = None) -> np.ndarray:
        """Which images are memorized, bool [n]; arguments and errors as for `score`."""
        return self.score(distance, other) < self.threshold

    def check(self, reference_size: int) -> None:
        """Raise ValueError if a reference of so many images is too small for this criterion."""
        needed = max(self.neighbours, 2)
        if reference_size < needed:
            raise ValueError(
                f'The criterion "{self.name}" needs at least {needed} training images to compare with, '
                f"but there are {reference_size}; choose another criterion or a larger reference."
            )

    def settings(self) -> dict[str, Any]:
        """What identifies it in a record: name, neighbours and threshold; JSON-ready."""
        return {"name": self.name, "neighbours": self.neighbours, "threshold": self.threshold}


def memorized(distance: np.ndarray, threshold: float = THRESHOLD) -> np.ndarray:
    """Which images are memorized: those with d1 / d2 < `threshold`.

    An image is memorized when it lies much closer to one training image than to any other. Where the
    two nearest training images are both equal to it (d1 = d2 = 0, duplicates in the training set), the
    quotient 0/0 is NaN and the image does not count, as in the published measurement; remove exact
    duplicates from the reference to have such images counted.

    Parameters
    ----------
    distance : float [n, >= 2], distances to the nearest training images, ascending, any unit.
    threshold : upper bound of d1 / d2, exclusive.

    Returns
    -------
    bool [n]

    Raises
    ------
    ValueError
        If `distance` does not have at least two columns.

    References
    ----------
    Yoon et al., "Diffusion Probabilistic Models Generalize when They Fail to Memorize", 2023.
    Gu et al., "On Memorization in Diffusion Models", 2023, Section 2.
    """
    return dataclasses.replace(CRITERIA["ratio"], threshold=threshold).flags(distance)


def make_criterion(name: str, threshold: float | None = None, neighbours: int | None = None) -> Criterion:
    """The criterion of this name (a key of `CRITERIA`), with another threshold or number of neighbours if given.

    Raises
    ------
    ValueError
        If there is no such criterion, the threshold is not positive, or it takes no other number of neighbours.
    """
    if name not in CRITERIA:
        raise ValueError(f'There is no criterion "{name}"; choose one of {", ".join(CRITERIA)}.')
    criterion = CRITERIA[name]
    if threshold is not None:
        if not 0 < threshold < float("inf"):
            raise ValueError(f'The threshold of the criterion "{name}" must be a positive number, not {threshold}.')
        criterion = dataclasses.replace(criterion, threshold=float(threshold))
    if neighbours is not None and neighbours != criterion.neighbours:
        if name != "calibrated":
            raise ValueError(f'The criterion "{name}" compares with {_count(criterion.neighbours)}, no other number.')
        if neighbours < 2:
            raise ValueError(f'The criterion "{name}" needs at least 2 neighbours, not {neighbours}.')
        criterion = dataclasses.replace(criterion, neighbours=neighbours)
    return criterion


def other_distance(nearest: np.ndarray, reference: Any, search: Search) -> np.ndarray:
    """How far each image's nearest training image is from its own nearest other training image.

    Each training image is looked up once, whatever the number of images nearest to it. Of the two nearest
    training images of a training image one is itself at distance 0, hence the other distance is the second,
    0 for an image that is there twice.

    Parameters
    ----------
    nearest : int [n], row of `reference` nearest to each image.
    reference : training images or their features [N, ...], indexable by an array of rows.
    search : (images, k) -> distance [m, k], index [m, k] in `reference`; `Neighbors(reference).query` is one.
        It is called once, on every rank, even if `nearest` is empty.

    Returns
    -------
    float64 [n], in the unit of the search.
    """
    rows, place = np.unique(np.asarray(nearest, dtype=np.int64), return_inverse=True)
    distance, _ = search(reference[rows], 2)
    return np.asarray(distance, dtype=np.float64)[place.reshape(-1), 1]


def threshold_at(score: np.ndarray, rate: float) -> float:
    """The largest threshold that at most the fraction `rate` of the scores fall below.

    With scores of real images that were not trained on, it calibrates a criterion: `rate` is then the
    fraction of novel images that would be called memorized. NaN falls below no threshold.

    Raises
    ------
    ValueError
        If there are no scores, or not 0 <= rate < 1.
    """
    score = np.sort(np.asarray(score, dtype=np.float64), axis=None)  # NaN last
    if not score.size:
        raise ValueError("A threshold cannot be calibrated without scores; give those of at least one image.")
    if not 0 <= rate < 1:
        raise ValueError(f"The rate must be at least 0 and less than 1, not {rate}.")
    at = score[int(rate * score.size)]
    return float("inf") if np.isnan(at) else float(at)


# ----------------------------------------------------------------------------
# Scores, from distances [n, neighbours] and where wanted `other` [n].


def _ratio(distance: np.ndarray, other: None) -> np.ndarray:
    return distance[:, 0] / distance[:, 1]  # NaN for 0/0, as published


def _calibrated(distance: np.ndarray, other: None) -> np.ndarray:
    return _quotient(distance[:, 0], ALPHA * distance.mean(axis=1))


def _authenticity(distance: np.ndarray, other: np.ndarray) -> np.ndarray:
    return _quotient(distance[:, 0], other)


def _quotient(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """a / b, with 0/0 = 0: a pixel-by-pixel copy is one however often the training set holds the image."""
    return np.where((a == 0) & (b == 0), 0.0, a / b)


def _count(neighbours: int) -> str:
    return {1: "one neighbour", 2: "two neighbours"}.get(neighbours, f"{neighbours} neighbours")


CRITERIA = {
    c.name: c
    for c in [
        Criterion(
            name="ratio",
            neighbours=2,
            threshold=THRESHOLD,
            formula="distance to the nearest / to the second nearest training image",
            source="Yoon et al. 2023; Gu et al. 2023, Section 2",
            compute=_ratio,
        ),
        Criterion(
            name="calibrated",
            neighbours=50,
            threshold=1.0,
            formula=f"distance to the nearest / ({ALPHA} x mean distance to the k nearest training images)",
            source="Carlini et al. 2023, extraction from CIFAR-10 models",
            compute=_calibrated,
        ),
        Criterion(
            name="authenticity",
            neighbours=1,
            threshold=1.0,
            formula="distance to the nearest training image / from that one to its own nearest other one",
            source="Alaa et al. 2022, authenticity",
            needs_other=True,
            compute=_authenticity,
        ),
    ]
}
