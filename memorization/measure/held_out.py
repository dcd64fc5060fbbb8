"""A control for copies by group: how often generated images count as copies of images that training never saw.

By the criterion x is a copy of y while |x - y| < t |x - z| for all other images z of the reference, t = 1/3. That asks
less of an image that has no similar ones around it, and so a group of outliers may be "copied" more often for its
isolation alone. Two numbers say by how much.

**The radius** of an image y: how far from y an image still counts as its copy. In the direction of a unit vector u that
is

    r(u) = min_z t D_z (sqrt(1 - t^2 + t^2 c_z^2) - t c_z) / (1 - t^2),    D_z = |z - y|,    c_z = u.(z - y) / D_z,

the solution of |r u| = t |r u - (z - y)|: t D / (1 + t) = D/4 towards the nearest other image, at the distance D,
t D / (1 - t) = D/2 away from it if there were no others, and D / sqrt(8) across. The radius is the median of r(u) over
random directions.

**The control**: h is a held-out image, drawn as the images of its group were. x counts as a copy of it if it would
with h added to the reference, |x - h| < t min_y |x - y| over the training images y, each of them there once. Training
had the others of that kind but not h; so what counts is chance, as it would be for an image of that kind and that
isolation which the network has not memorized. Held-out images are added one at a time, so that h has the neighbours
that a training image of its group has, and one more: that asks a little more of h (its radius is given, too). A
network that only replays its training images is never near h; then nothing counts, and nothing was chance.
"""

import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from memorization.measure.criteria import THRESHOLD, memorized
from memorization.measure.gap import ImageSet
from memorization.measure.results import Reference, read_groups
from torch_utils import distributed as dist
from training.fingerprint import array_sha256

OVERLAP = "held-out images that are training images"
INLIER = "inlier"  # the group that the others are compared with

_DIRECTIONS = 128
_BLOCK = 256  # images at a time


def radii(
    images: np.ndarray,  # uint8 [n, C, H, W]
    reference: np.ndarray | None = None,  # uint8 [N, C, H, W], the others; None: the images themselves
    *,
    threshold: float = THRESHOLD,
    directions: int = _DIRECTIONS,
    seed: int = 0,  # of the directions
) -> np.ndarray:
    """How far from each image another one still counts as its copy, see the module: float64 [n], RMS 0..255.

    0 for an image that the reference has twice, and infinite where there is no other.
    """
    y = images.reshape(len(images), -1).astype(np.float64)
    z = y if reference is None else reference.reshape(len(reference), -1).astype(np.float64)
    pixels, t = y.shape[1], threshold
    u = np.random.default_rng(seed).standard_normal([pixels, directions])
    u /= np.linalg.norm(u, axis=0)
    along_y, along_z = y @ u, z @ u  # [n, directions], [N, directions]
    found = np.empty(len(y))
    squares = np.square(z).sum(axis=1)
    for i in range(len(y)):
        if i % _BLOCK == 0:  # products of pixels are exact in float64
            block = y[i : i + _BLOCK]
            squared = np.square(block).sum(axis=1)[:, np.newaxis] + squares - 2 * block @ z.T
        distance = np.sqrt(squared[i % _BLOCK])
        if reference is None:
            distance[i] = np.inf
        nearest = distance.min()
        if nearest == 0 or not np.isfinite(nearest):
            found[i] = nearest
            continue
        near = distance <= nearest * (1 + t) / (1 - t)  # the others bind in no direction
        distance = distance[near, np.newaxis]
        c = (along_z[near] - along_y[i]) / distance
        r = t * distance * (np.sqrt(1 - t**2 + t**2 * c**2) - t * c) / (1 - t**2)
        found[i] = np.median(r.min(axis=0))
    return found / pixels**0.5


def copies_of_each(
    images: np.ndarray,  # uint8 [n, C, H, W], generated
    nearest: np.ndarray,  # float64 [n], RMS distance of each to the nearest training image
    held_out: np.ndarray,  # uint8 [m, C, H, W]
) -> np.ndarray:
    """How many images count as a copy of each held-out one, if it alone is added to the reference: int64 [m]."""
    counts = np.zeros(len(held_out), dtype=np.int64)
    h = held_out.reshape(len(held_out), -1).astype(np.float64)  # products of pixels are exact in float64
    for start in range(0, len(images), _BLOCK):
        x = images[start : start + _BLOCK].reshape(-1, h.shape[1]).astype(np.float64)
        squared = np.square(x).sum(axis=1)[:, np.newaxis] + np.square(h).sum(axis=1) - 2 * x @ h.T
        distance = np.sqrt(squared / h.shape[1])
        training = np.broadcast_to(nearest[start : start + _BLOCK, np.newaxis], distance.shape)
        flags = memorized(np.stack([distance.ravel(), training.ravel()], axis=1)).reshape(distance.shape)
        counts += flags.sum(axis=0)
    return counts


class HeldOutControl:
    """Counts, for any number of snapshots, the copies of held-out images by group. All ranks make the same calls.

    Parameters
    ----------
    reference : training images, each once, with groups
    held_out : images that training never saw, of the same kinds; those that are in the reference are taken out
    groups : name of the group of each

    Raises
    ------
    ValueError
        If images or groups do not fit together, or no image is held out.
    """

    def __init__(self, reference: Reference, held_out: ImageSet, groups: Sequence[str] | None):
        own = reference.tables.get("groups")
        for path, there in ((reference.path, own), (held_out.path, groups)):
            if there is None:
                raise ValueError(f'"{path}" has no groups; make both sets with dataset_utils/dataset_inject.py.')
        shapes = [list(images.shape[1:]) for images in (held_out.images, reference.images)]
        if shapes[0] != shapes[1]:
            raise ValueError(
                f'The held-out images of "{held_out.path}" are [C, H, W] = {shapes[0]}, training images {shapes[1]}; '
                "make both with the same --resolution."
            )
        known = {image.tobytes() for image in reference.images}
        new = np.array([image.tobytes() not in known for image in held_out.images], dtype=bool)
        if not new.any():
            raise ValueError(f'All images of "{held_out.path}" are training images; a control needs others.')
        self._images, self._groups = held_out.images[new], np.asarray(groups)[new]
        self._reference, self._own = reference, np.asarray(own)
        self.left_out = {OVERLAP: int((~new).sum())} if not new.all() else {}
        self._settings = {
            "dataset": str(os.path.realpath(held_out.path)),
            "dataset_sha256": array_sha256(held_out.images),
            "groups_sha256": [array_sha256(np.asarray(names)) for names in (own, groups)],
        }
        self._radii = radii(reference.images)
        self._held_radii = radii(self._images, reference.images)
        inliers = self._own == INLIER
        self.radius = float(np.median(self._radii[inliers if inliers.any() else slice(None)]))

    @classmethod
    def read(cls, reference: Reference, path: str) -> "HeldOutControl":
        """With the images and groups of a dataset; errors as of the class and of reading it."""
        return cls(reference, ImageSet.read(path), read_groups(path)[1])

    def holds(self, record: dict[str, Any]) -> bool:
        """True if `record` has been measured with these held-out images."""
        found = record.get("held_out") or {}
        return all(found.get(key) == value for key, value in self._settings.items() if key != "dataset")

    def measure(self, images: np.ndarray) -> dict[str, Any]:
        """The entry `held_out` of a record, of this rank's share of the generated images, uint8 [n, C, H, W].

        `groups` has, of each group of held-out images, num_images, num_counted (pairs of a generated image and a
        held-out one of which it counts as a copy), num_copied (held-out images with one at least) and `radius`;
        `training` has, of each group of training images, `radius` and num_within, the copies that are no further from
        their training image than the median radius of the inliers, which is `inlier_radius`. A radius is [median,
        smallest, largest], RMS 0..255.
        """
        distance, index = self._reference.pixels.query(images, 2)
        within = np.bincount(
            index[memorized(distance) & (distance[:, 0] <= self.radius), 0], minlength=len(self._own)
        )  # fmt: skip
        parts = dist.gather((copies_of_each(images, distance[:, 0], self._images), within, len(images)))
        counts, within = (sum(part[i] for part in parts) for i in range(2))
        held, training = {}, {}
        for name in np.unique(self._groups).tolist():
            mine = self._groups == name
            held[name] = {
                "num_images": int(mine.sum()), "num_counted": int(counts[mine].sum()),
                "num_copied": int((counts[mine] > 0).sum()), "radius": _spread(self._held_radii[mine]),
            }  # fmt: skip
        for name in np.unique(self._own).tolist():
            mine = self._own == name
            training[name] = {"num_within": int(within[mine].sum()), "radius": _spread(self._radii[mine])}
        return {
            **self._settings, "num_samples": sum(part[2] for part in parts), "groups": held, "training": training,
            "inlier_radius": self.radius, "left_out": self.left_out,
        }  # fmt: skip


def _spread(values: np.ndarray) -> list[float]:
    return [float(np.median(values)), float(values.min()), float(values.max())]
