"""CIFAR-10 and CIFAR-100 as published, read by `dnnlib.pickles`, which builds numbers and arrays and nothing else."""

import gzip
import os
import tarfile
from pathlib import Path, PurePosixPath

import numpy as np

from dnnlib.pickled_arrays import Array, numpy_names
from dnnlib.pickles import Budget, UnknownName, read_pickle

_BATCHES = [f"data_batch_{i}" for i in range(1, 6)]
_HUNDRED = "train"  # the one batch of CIFAR-100
_MAX_MEMBER = 1 << 28  # bytes; the published batches are 31 MB


def is_cifar_folder(path: str) -> bool:
    """True for a folder into which CIFAR-10 or CIFAR-100 was unpacked."""
    there = [name for name in [*_BATCHES, _HUNDRED, "meta"] if os.path.isfile(os.path.join(path, name))]
    return any(name in _BATCHES for name in there) or there == [_HUNDRED, "meta"]


def load_cifar(path: str, coarse: bool = False) -> tuple[np.ndarray, list[int]]:
    """Read the training images of `cifar-10-python.tar.gz`, `cifar-100-python.tar.gz`, or of the folder in either.

    The order is that of the files. The batches `data_batch_1` to `data_batch_5` may hold any number of images; those
    that are missing are left out. CIFAR-100 has 100 fine labels, or with `coarse` 20 coarse ones. Nothing is extracted
    to disk and no code of the pickles runs.

    Returns
    -------
    images : uint8 [N, 32, 32, 3]
    labels : list of N ints

    Raises
    ------
    ValueError
        If the file is no such archive, is damaged, or asks for anything but arrays of numbers.

    References
    ----------
    Krizhevsky, "Learning multiple layers of features from tiny images", 2009.
    """
    batches = _read_folder(path) if os.path.isdir(path) else _read_tar(path)
    if not batches:
        raise ValueError(f'"{path}" holds none of the CIFAR-10 batches {_BATCHES[0]} to {_BATCHES[-1]}.')
    if batches.keys() == {_HUNDRED}:
        key, classes = ("coarse_labels", 20) if coarse else ("fine_labels", 100)
        return _parse_batch(batches[_HUNDRED], f'{_HUNDRED} in "{path}"', key, classes)
    if coarse:
        raise ValueError(f'"{path}" has no coarse labels; CIFAR-100 has.')
    parts = [_parse_batch(batches[name], f'{name} in "{path}"') for name in _BATCHES if name in batches]
    images = np.concatenate([images for images, _ in parts])
    return images, [label for _, labels in parts for label in labels]


def _read_folder(path: str) -> dict[str, bytes]:
    batches = {}
    for name in [*_BATCHES, _HUNDRED]:
        file = Path(path) / name
        if file.is_file():
            if file.stat().st_size > _MAX_MEMBER:
                raise ValueError(f'"{file}" is too large for a CIFAR batch.')
            batches[name] = file.read_bytes()
    return batches


def _read_tar(path: str) -> dict[str, bytes]:
    batches: dict[str, bytes] = {}
    try:
        with _BoundedGzip(path) as stream, tarfile.open(fileobj=stream, mode="r:") as tar:
            for member in tar:
                name = PurePosixPath(member.name).name
                if member.isfile() and name in (*_BATCHES, _HUNDRED):
                    if name in batches or member.size > _MAX_MEMBER:
                        raise ValueError(f'the batch "{name}" is there twice or too large')
                    batches[name] = tar.extractfile(member).read()
            while stream.read(1 << 20):
                pass  # to the end, where the checksum is
    except Exception as err:  # damaged data bring about errors of many kinds
        raise ValueError(f'"{path}" cannot be read as a .tar.gz file: {err}.') from err
    return batches


class _BoundedGzip(gzip.GzipFile):
    """Unpacks no more at a time than a batch may hold: the headers of a tar can announce any length."""

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= _MAX_MEMBER:
            raise ValueError("a part of it is too large")
        return super().read(size)


def _parse_batch(data: bytes, where: str, key: str = "labels", classes: int = 10) -> tuple[np.ndarray, list[int]]:
    budget = Budget(opcodes=1_000_000, text=_MAX_MEMBER, arrays=2 * len(data))  # of CIFAR-100: 300,000 opcodes
    try:
        batch, _ = read_pickle(memoryview(data), numpy_names(_MAX_MEMBER, budget), budget)
    except UnknownName as err:
        raise ValueError(f"{where} is no CIFAR-10 batch: it {err}, which is refused.") from err
    except ValueError as err:
        raise ValueError(f"{where} is no CIFAR-10 batch: it {err}.") from err
    if not isinstance(batch, dict) or not {"data", key} <= batch.keys():
        raise ValueError(f'{where} is no CIFAR-10 batch: it does not hold "data" and "{key}".')
    images, labels = (v.values if isinstance(v, Array) else v for v in (batch["data"], batch[key]))
    if not isinstance(images, np.ndarray) or images.dtype != np.uint8 or images.shape[1:] != (3072,):
        raise ValueError(f'{where} is no CIFAR-10 batch: "data" is not uint8 of shape [n, 3072].')
    if isinstance(labels, np.ndarray):
        labels = labels.tolist()
    if not isinstance(labels, list) or not all(type(v) is int and 0 <= v < classes for v in labels):
        raise ValueError(f'{where} is no CIFAR-10 batch: "{key}" is no list of whole numbers 0 to {classes - 1}.')
    if len(labels) != len(images):
        raise ValueError(f"{where} holds {len(images)} images but {len(labels)} labels.")
    return images.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1), labels
