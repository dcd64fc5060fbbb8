"""A dataset zip's images as one memory-mapped array, from a decoded copy beside the zip."""

import contextlib
import os
import tempfile
from pathlib import Path

import numpy as np
from tqdm import tqdm

from torch_utils import distributed as dist
from training.dataset import ImageFolderDataset


def decoded_images(path: str | os.PathLike) -> np.ndarray:
    """Open the images of a dataset zip, uint8 [N, C, H, W], without holding them in memory.

    The first call decodes them into ``NAME.zip.SIZE-TIME.decoded.npy`` beside the zip, where SIZE and TIME are
    those of the zip: a zip that has changed is decoded anew, and older copies are removed. The copy is
    written under a temporary name and renamed, so that several processes, on one machine or on a shared file
    system, can ask at once: under torchrun rank 0 writes it, else the last one to finish does.

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
    except ValueError as err:
        raise ValueError(f'"{target}" is damaged ({err}); delete it, and it is written anew.') from err
    if images.dtype != np.uint8 or images.ndim != 4:
        raise ValueError(f'"{target}" does not hold uint8 images [N, C, H, W]; delete it, and it is written anew.')
    return images


def _write(path: Path, target: Path) -> None:
    dataset = ImageFolderDataset(path, cache=False)
    fd, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.", suffix=".tmp")
    os.close(fd)
    try:
        shape = (len(dataset), *dataset.image_shape)
        images = np.lib.format.open_memmap(temporary, mode="w+", dtype=np.uint8, shape=shape)
        for i in tqdm(range(len(dataset)), desc=f"Decoding {path.name}", unit="img", disable=None):
            images[i] = dataset[i][0]
        images.flush()
        del images
        os.chmod(temporary, path.stat().st_mode & 0o666)
        os.replace(temporary, target)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise
    for old in target.parent.glob(f"{path.name}.*.decoded.npy"):
        if old != target:
            old.unlink(missing_ok=True)
