"""A dataset zip's images as one memory-mapped array, from a decoded copy beside the zip."""

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from tqdm import tqdm

from dnnlib.util import atomic_write
from torch_utils import distributed as dist
from training.dataset import ImageFolderDataset


def decoded_images(path: str | os.PathLike, shape: Sequence[int] | None = None) -> np.ndarray:
    """Open the images of a dataset zip, uint8 [N, C, H, W], without holding them in memory.

    The first call decodes them into ``NAME.zip.SIZE-TIME.decoded.npy`` beside the zip, where SIZE and TIME are
    those of the zip: a zip that has changed is decoded anew, and older copies are removed. The copy is
    written under a temporary name and renamed, so that several processes, on one machine or on a shared file
    system, can ask at once: under torchrun rank 0 writes it, else the last one to finish does. With `shape`,
    [N, C, H, W], a copy of another shape is refused.

    Raises
    ------
    OSError, ValueError
        If the zip cannot be read, or the copy cannot be written.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f'"{path}" is not a dataset zip; only zips have a decoded copy to map into memory.')
    stamp = path.stat()
    target = path.with_name(f"{path.name}.{stamp.st_size}-{stamp.st_mtime_ns}.decoded.npy")
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


def _write(path: Path, target: Path) -> None:
    """Write the images one after the other: a file that is mapped would kill this process when the disk is full."""
    dataset = ImageFolderDataset(path, cache=False)
    header = dict(descr="|u1", fortran_order=False, shape=(len(dataset), *dataset.image_shape))
    with atomic_write(target) as file:
        np.lib.format.write_array_header_1_0(file, header)
        for i in tqdm(range(len(dataset)), desc=f"Decoding {path.name}", unit="img", disable=None):
            file.write(dataset[i][0].tobytes())
        os.fchmod(file.fileno(), path.stat().st_mode & 0o666)
    for old in target.parent.glob(f"{path.name}.*.decoded.npy"):
        if old != target:
            old.unlink(missing_ok=True)
