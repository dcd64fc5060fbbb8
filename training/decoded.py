"""A dataset zip's images as one memory-mapped array, from a decoded copy beside the zip."""

import hashlib
import os
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from tqdm import tqdm

from dnnlib.download import cache_dir
from dnnlib.util import atomic_write
from torch_utils import distributed as dist
from training.dataset import ImageFolderDataset
from training.fingerprint import zip_sha256


def decoded_images(path: str | os.PathLike, shape: Sequence[int] | None = None) -> np.ndarray:
    """Open the images of a dataset zip, uint8 [N, C, H, W], without holding them in memory.

    The first call decodes them into ``NAME.zip.DIGEST.decoded.npy`` beside the zip, or, where that folder is read-only,
    in the cache folder (`dnnlib.download.cache_dir`). DIGEST is of the names, sizes and checksums of the files in the
    zip: a zip that has changed is decoded anew, and its older copies are removed. The copy is written under a temporary
    name and renamed, so that several processes, on one machine or on a shared file system, can ask at once: under
    torchrun rank 0 writes it, else the last one to finish does. With `shape`, [N, C, H, W], a copy of another shape is
    refused.

    Raises
    ------
    OSError, ValueError
        If the zip cannot be read, or the copy cannot be written.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f'"{path}" is not a dataset zip; only zips have a decoded copy to map into memory.')
    target = decoded_path(path)
    if dist.get_rank() == 0 and not target.exists():
        _write(path, target)
    dist.barrier()
    if not target.exists():  # rank 0 wrote to the disk of another machine
        _write(path, target)
    try:
        images = np.load(target, mmap_mode="r", allow_pickle=False)
        if not isinstance(images, np.ndarray) or images.dtype != np.uint8 or images.ndim != 4:
            raise ValueError("no uint8 images [N, C, H, W]")
        if shape is not None and images.shape != tuple(shape):
            raise ValueError(f"images {list(images.shape)} instead of {list(shape)}")
    except (ValueError, EOFError) as err:
        raise ValueError(f'"{target}" is damaged ({err}); delete it, and it is written anew.') from err
    return images


def decoded_path(path: Path) -> Path:
    """Where the decoded copy of a dataset zip lies, or will."""
    name = f"{path.name}.{zip_sha256(path)[:16]}.decoded.npy"
    beside = path.with_name(name)
    if beside.exists() or os.access(path.parent, os.W_OK):
        return beside
    place = hashlib.sha256(os.fsencode(path.resolve())).hexdigest()[:16]  # so that older copies are of this zip
    return cache_dir() / "decoded" / place / name


def _write(path: Path, target: Path) -> None:
    """Write the images one after the other: a file that is mapped would kill this process when the disk is full."""
    dataset = ImageFolderDataset(path, cache=False)
    header = dict(descr="|u1", fortran_order=False, shape=(len(dataset), *dataset.image_shape))
    with atomic_write(target) as file:
        np.lib.format.write_array_header_1_0(file, header)
        for i in tqdm(range(len(dataset)), desc=f"Decoding {path.name}", unit="img", disable=None):
            file.write(dataset[i][0].tobytes())
        os.fchmod(file.fileno(), path.stat().st_mode & 0o666)
    copy = re.compile(re.escape(path.name) + r"\.([0-9a-f]{16}|\d+-\d+)\.decoded\.npy")  # size and time: before
    for old in target.parent.iterdir():
        if old != target and copy.fullmatch(old.name):
            old.unlink(missing_ok=True)
