"""Digests of a dataset, by which a run, a measurement and a figure can be traced to the images they are of."""

import hashlib
import zipfile
from pathlib import Path

import numpy as np

from training.dataset import ImageFolderDataset

DECODED_LIMIT = 1 << 30  # bytes of pixels; more are not decoded for their digest


def array_sha256(array: np.ndarray) -> str:
    """Digest of an array's shape and bytes."""
    digest = hashlib.sha256(repr(array.shape).encode())
    digest.update(np.ascontiguousarray(array))
    return digest.hexdigest()


def dataset_sha256(dataset: ImageFolderDataset) -> str:
    """Digest of the images of a dataset, mirrored ones left out, whatever file or folder they lie in.

    It is `array_sha256` of the pixels, uint8 [N, C, H, W], which `mem_ratio.py` records of its reference, too.
    Beyond `DECODED_LIMIT` it is "listing:" and a digest of the names, sizes and (in a zip) CRC-32 of the files.

    Raises
    ------
    OSError, ValueError
        If an image cannot be read.
    """
    names = list(dict.fromkeys(dataset.names))
    shape = (len(names), *dataset.image_shape)
    if int(np.prod(shape)) > DECODED_LIMIT:
        return "listing:" + _listing_sha256(Path(dataset.path), names)
    digest = hashlib.sha256(repr(shape).encode())
    for i in range(len(names)):  # mirrored ones come behind
        digest.update(np.ascontiguousarray(dataset[i][0]))
    return digest.hexdigest()


def _listing_sha256(path: Path, names: list[str]) -> str:
    digest = hashlib.sha256()
    if path.is_dir():
        for name in names:
            digest.update(f"{name}\0{(path / name).stat().st_size}\n".encode())
    else:
        with zipfile.ZipFile(path) as archive:
            for info in map(archive.getinfo, names):
                digest.update(f"{info.filename}\0{info.file_size}\0{info.CRC:08x}\n".encode())
    return digest.hexdigest()
