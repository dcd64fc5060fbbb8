"""Memorization by class and by group of the training images: which of them are replayed, and how often."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from memorization.stats.intervals import wilson_interval

MAX_CLASSES = 1000  # a table of more is not read by anyone; unique labels make |D| classes


def group_table(
    flags: np.ndarray,  # bool [n], which generated images are memorized
    nearest: np.ndarray,  # int [n], row of the training image nearest to each
    groups: Sequence[str] | np.ndarray,  # [N], group name or class of each training image
    confidence: float = 0.95,  # of the intervals
) -> dict[str, dict[str, Any]]:
    """Count generated images by the group of their nearest training image.

    A generated image belongs to the group of the training image nearest to it, for this is the image that it
    copies if it copies one. That holds for class-conditional networks, too: the class that was asked for is not
    used, and a copy of an image of another class counts where the copied image is. Images that are not
    memorized are attributed in the same way; for them it says only what they resemble most, in the space of
    the distances.

    Returns
    -------
    A row per group, classes in ascending order, names in alphabetic order; groups without any generated image
    are there, too. JSON-ready. Each row holds

    - num_nearest : generated images whose nearest training image is in the group
    - num_memorized : memorized ones among these
    - ratio, ci_low, ci_high : num_memorized / num_nearest with its Wilson interval; None if there are none
    - num_training : training images in the group
    - memorized_per_training : num_memorized / num_training, which compares groups of different size: it is
      the same for all groups if all training images are replayed equally often
    - num_replayed : training images in the group that at least one memorized image is nearest to

    Raises
    ------
    ValueError
        If the lengths differ, `nearest` names no training image, or the groups are neither text nor classes.
    """
    flags, nearest = np.asarray(flags, dtype=bool), np.asarray(nearest, dtype=np.int64)
    groups = np.asarray(groups)
    if flags.ndim != 1 or flags.shape != nearest.shape:
        raise ValueError(f"There are {flags.size} verdicts for {nearest.size} nearest training images.")
    if groups.ndim != 1 or groups.dtype.kind not in "iuU":
        found = f"{groups.dtype} {list(groups.shape)}"
        raise ValueError(f"Groups are one name or one class number per training image, not {found}.")
    if nearest.size and not 0 <= nearest.min() <= nearest.max() < groups.size:
        raise ValueError(f"The nearest training images are rows {nearest.min()} to {nearest.max()} of {groups.size}.")

    names, member = np.unique(groups, return_inverse=True)  # member: [N], position in names
    sizes = np.bincount(member, minlength=names.size)
    resembled = np.bincount(member[nearest], minlength=names.size)
    memorized = np.bincount(member[nearest[flags]], minlength=names.size)
    replayed = np.bincount(member[np.unique(nearest[flags])], minlength=names.size)
    table = {}
    for name, *counts in zip(names.tolist(), resembled.tolist(), memorized.tolist(), sizes.tolist(), replayed.tolist()):
        num_nearest, num_memorized, num_training, num_replayed = counts
        low, high = wilson_interval(num_memorized, num_nearest, confidence) if num_nearest else (None, None)
        table[str(name)] = {
            "num_nearest": num_nearest,
            "num_memorized": num_memorized,
            "ratio": num_memorized / num_nearest if num_nearest else None,
            "ci_low": low,
            "ci_high": high,
            "num_training": num_training,
            "memorized_per_training": num_memorized / num_training,
            "num_replayed": num_replayed,
        }
    return table


def label_groups(labels: np.ndarray | None) -> np.ndarray | None:
    """Labels as groups for `group_table`, or None where a table would say nothing.

    That is without labels, for vectors, for a single class, and for more than `MAX_CLASSES` classes or one
    class per image.
    """
    if labels is None or labels.ndim != 1:
        return None
    classes = np.unique(labels).size
    return labels if 1 < classes <= min(MAX_CLASSES, labels.size - 1) else None
