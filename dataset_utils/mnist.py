"""Images and labels in the format of MNIST (idx files, gzipped), which Fashion-MNIST and KMNIST share."""

import gzip
import math
import os
import zlib
from pathlib import Path

import numpy as np

from dnnlib.limits import check_unpacked

IMAGES_SUFFIXES = ("-images-idx3-ubyte.gz", "-images-idx3-ubyte", "-images.idx3-ubyte")


def find_mnist(folder: str) -> str | None:
    """The training images in a folder into which MNIST or one of its kin was put; None if there are none."""
    paths = [os.path.join(folder, f"train{suffix}") for suffix in IMAGES_SUFFIXES]
    return next((path for path in paths if os.path.isfile(path)), None)


def load_mnist(path: str) -> tuple[np.ndarray, list[int]]:
    """Read `PREFIX-images-idx3-ubyte.gz` and the labels beside it, `PREFIX-labels-idx1-ubyte.gz`; or unpacked ones.

    Returns
    -------
    images : uint8 [N, height, width], as stored (28x28 for MNIST)
    labels : list of N ints

    Raises
    ------
    OSError, ValueError
        If the labels are missing, a file is damaged, or the counts disagree.

    References
    ----------
    LeCun, Cortes, Burges, "The MNIST database of handwritten digits", with the description of the format.
    """
    suffix = next(suffix for suffix in IMAGES_SUFFIXES if path.lower().endswith(suffix))
    prefix = Path(path).name[: -len(suffix)]
    labels_path = Path(path).with_name(prefix + suffix.replace("images", "labels").replace("idx3", "idx1"))
    if not labels_path.is_file():
        raise FileNotFoundError(f'The labels "{labels_path}" are missing; put them beside "{path}".')
    images, labels = _load_idx(path, ndim=3), _load_idx(labels_path, ndim=1)
    if len(images) != len(labels):
        raise ValueError(f'"{path}" holds {len(images)} images, but "{labels_path}" {len(labels)} labels.')
    if len(images) and not images.size:
        raise ValueError(f'"{path}" holds images of {images.shape[2]}x{images.shape[1]} pixels.')
    return images, labels.tolist()


def _load_idx(path: str | Path, ndim: int) -> np.ndarray:
    """Read a gzipped idx file of unsigned bytes with `ndim` dimensions."""
    try:
        with (gzip.open if os.fspath(path).endswith(".gz") else open)(path, "rb") as file:
            header = np.frombuffer(file.read(4 + 4 * ndim), dtype=">u4")
            if header.size != 1 + ndim or header[0] != 0x0800 + ndim:
                raise ValueError("it does not begin with the header of such a file")
            shape = tuple(int(n) for n in header[1:])
            size = math.prod(shape)
            check_unpacked(size, os.path.getsize(path))
            data = file.read(size + 1)
    except (EOFError, zlib.error, OSError, ValueError) as err:
        raise ValueError(f'"{path}" cannot be read as a gzipped MNIST file (idx{ndim}): {err}.') from err
    if len(data) != size:
        there = f"{len(data)}" if len(data) < size else "more"
        raise ValueError(f'"{path}" announces {size} bytes of data in its header, but holds {there}.')
    return np.frombuffer(data, dtype=np.uint8).reshape(shape)
