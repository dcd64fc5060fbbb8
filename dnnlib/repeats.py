"""Exact repeats: which images of a set are the same, pixel by pixel, found in one pass of digests.

A copy of an image that the set holds twice has d1 = d2, so that d1/d2 < 1/3 never calls it memorized.
"""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np


def image_digest(image: np.ndarray) -> bytes:
    """16 bytes that are equal for images of equal shape and pixels, and different for others."""
    digest = hashlib.blake2b(repr(image.shape).encode(), digest_size=16)
    digest.update(np.ascontiguousarray(image))
    return digest.digest()


@dataclass
class Repeats:
    """Which images are the same, of those added so far.

    Attributes
    ----------
    first : of each image, the index of the first that is equal to it; its own if there is none before it
    """

    first: list[int] = field(default_factory=list)
    _known: dict[bytes, int] = field(default_factory=dict, repr=False)

    def add(self, image: np.ndarray | bytes) -> None:
        """Add an image, or its `image_digest`."""
        digest = image if isinstance(image, bytes) else image_digest(image)
        self.first.append(self._known.setdefault(digest, len(self.first)))

    @property
    def distinct(self) -> np.ndarray:
        """Indices of the images that are not equal to one before them, int64, ascending."""
        return np.array([i for i, first in enumerate(self.first) if i == first], dtype=np.int64)

    @property
    def repeated(self) -> np.ndarray:
        """bool [N], True where there is another image equal to it."""
        first = np.array(self.first, dtype=np.int64)
        return np.bincount(first, minlength=len(first))[first] > 1

    def counts(self) -> dict[str, int]:
        """{images, distinct, repeated}: all; different ones among them; those that occur more than once."""
        return {"images": len(self.first), "distinct": len(self._known), "repeated": int(self.repeated.sum())}

    def describe(self, what: str = "images") -> str:
        """What to tell a user about it, in one sentence; "" if all images are different."""
        counts = self.counts()
        if not counts["repeated"]:
            return ""
        times = f"{counts['repeated']} of the {counts['images']} {what} occur more than once ({counts['distinct']}"
        return f"{times} are different); d1/d2 cannot call copies of them memorized, see mem_ratio.py --unique."


def find_repeats(images: Iterable[np.ndarray]) -> Repeats:
    """Compare all images, uint8 of any shape."""
    repeats = Repeats()
    for image in images:
        repeats.add(image)
    return repeats
