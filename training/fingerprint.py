"""Digests of a dataset, by which a run, a measurement and a figure can be traced to the images they are of."""

import contextlib
import hashlib
import os
from collections.abc import Iterable

import numpy as np

from dnnlib.images import ImageFiles
from dnnlib.repeats import Repeats
from training.dataset import ImageFolderDataset

DECODED_LIMIT = 1 << 30  # bytes of pixels; more are not decoded for their digest


def array_sha256(array: np.ndarray) -> str:
    """Digest of an array's shape and bytes."""
    digest = hashlib.sha256(repr(array.shape).encode())
    digest.update(np.ascontiguousarray(array))
    return digest.hexdigest()


def dataset_sha256(dataset: ImageFolderDataset, repeats: Repeats | None = None) -> str:
    """Digest of the images of a dataset, mirrored ones left out, whatever file or folder they lie in.

    It is `array_sha256` of the pixels, uint8 [N, C, H, W], which `mem_ratio.py` records of its reference, too.
    Beyond `DECODED_LIMIT` it is "listing:" and a digest of the names, sizes and (in a zip) CRC-32 of the files.
    The same pass adds each image to `repeats`; beyond the limit none.

    Raises
    ------
    OSError, ValueError
        If an image cannot be read.
    """
    names = list(dict.fromkeys(dataset.names))
    shape = (len(names), *dataset.image_shape)
    if int(np.prod(shape)) > DECODED_LIMIT:
        return "listing:" + _listing_sha256(dataset.files, names)
    digest = hashlib.sha256(repr(shape).encode())
    for i in range(len(names)):  # mirrored ones come behind
        image = dataset[i][0]
        digest.update(np.ascontiguousarray(image))
        if repeats is not None:
            repeats.add(image)
    return digest.hexdigest()


def zip_sha256(path: str | os.PathLike) -> str:
    """Digest of the names, sizes and CRC-32 of all files in a dataset zip, of which only the directory is read.

    Raises
    ------
    OSError, ValueError
        If it cannot be read.
    """
    with contextlib.closing(ImageFiles(path)) as files:
        return _listing_sha256(files, files.names)


def _listing_sha256(files: ImageFiles, names: Iterable[str]) -> str:
    digest = hashlib.sha256()
    for name in names:
        digest.update(f"{name}\0{files.stamp(name)}\n".encode(errors="surrogateescape"))
    return digest.hexdigest()
