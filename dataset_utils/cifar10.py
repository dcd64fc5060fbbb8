"""CIFAR-10 and CIFAR-100 as published, read by an unpickler that can build integer arrays and nothing else."""

import gzip
import io
import math
import os
import pickle
import tarfile
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

_BATCHES = [f"data_batch_{i}" for i in range(1, 6)]
_HUNDRED = "train"  # the one batch of CIFAR-100
_INTEGERS = ("u1", "i1", "u2", "i2", "u4", "i4", "u8", "i8")
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
        If the file is no such archive, is damaged, or asks for anything but integer arrays.

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
    try:
        batch = _IntegerUnpickler(io.BytesIO(data), encoding="latin1").load()
    except Exception as err:  # a pickle can fail in as many ways as a program
        raise ValueError(f"{where} is no CIFAR-10 batch: {err}.") from err
    if isinstance(batch, dict):
        batch = {k.decode("latin1") if isinstance(k, bytes) else k: v for k, v in batch.items()}
    if not isinstance(batch, dict) or not {"data", key} <= batch.keys():
        raise ValueError(f'{where} is no CIFAR-10 batch: it does not hold "data" and "{key}".')
    images, labels = (v.value if isinstance(v, _Array) else v for v in (batch["data"], batch[key]))
    if not isinstance(images, np.ndarray) or images.dtype != np.uint8 or images.shape[1:] != (3072,):
        raise ValueError(f'{where} is no CIFAR-10 batch: "data" is not uint8 of shape [n, 3072].')
    if isinstance(labels, np.ndarray):
        labels = labels.tolist()
    if not isinstance(labels, list) or not all(type(v) is int and 0 <= v < classes for v in labels):
        raise ValueError(f'{where} is no CIFAR-10 batch: "{key}" is no list of whole numbers 0 to {classes - 1}.')
    if len(labels) != len(images):
        raise ValueError(f"{where} holds {len(images)} images but {len(labels)} labels.")
    return images.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1), labels


# ----------------------------------------------------------------------------
# The unpickler. A pickle names callables and calls them with arguments of its choice. The few names that
# numpy arrays need are answered with the stand-ins below, so that not even numpy's own constructors see
# these arguments; every other name is refused.


class _IntegerUnpickler(pickle._Unpickler):  # the one in C takes memory for any memo index that a file names
    def find_class(self, module: str, name: str) -> Any:
        module = module.replace("numpy._core.", "numpy.core.")  # numpy 2 renamed it
        allowed: dict[tuple[str, str], Callable] = {
            ("numpy.core.multiarray", "_reconstruct"): lambda *_: _Array(),  # filled by __setstate__
            ("numpy.core.numeric", "_frombuffer"): lambda data, *how: _Array(_decode(data, *how)),
            ("numpy.core.multiarray", "scalar"): lambda dtype, data: _decode(data, dtype, ()).item(),
            ("numpy", "ndarray"): _Array,
            ("numpy", "dtype"): _DType,
            ("_codecs", "encode"): lambda text, _: text.encode("latin1"),  # bytes in a pickle of protocol 2
        }
        if (module, name) not in allowed:
            raise pickle.UnpicklingError(f'it asks for "{module}.{name}", which is refused')
        return allowed[module, name]


class _DType:
    """Stands for `numpy.dtype`: an integer type."""

    def __init__(self, code: str, *_: Any):
        if code not in _INTEGERS:
            raise ValueError(f"it holds an array of type {code!r}")
        self.code, self.order = code, "<"

    def __setstate__(self, state: tuple) -> None:
        self.order = ">" if state[1] == ">" else "<"


class _Array:
    """Stands for `numpy.ndarray`: an array of integers."""

    def __init__(self, value: np.ndarray | None = None):
        self.value = value

    def __setstate__(self, state: tuple) -> None:
        _, shape, dtype, fortran, data = state
        self.value = _decode(data, dtype, shape, "F" if fortran else "C")


def _decode(data: Any, dtype: Any, shape: Any, order: str = "C") -> np.ndarray:
    """Build the array [shape] that the bytes `data` spell."""
    if isinstance(data, str):  # bytes that Python 2 wrote, seen through encoding="latin1"
        data = data.encode("latin1")
    if not isinstance(dtype, _DType) or not isinstance(data, bytes | bytearray) or not isinstance(shape, tuple):
        raise ValueError("it holds an array in an unknown form")
    values = np.frombuffer(data, dtype=np.dtype(dtype.order + dtype.code))
    if not all(type(n) is int and n >= 0 for n in shape) or math.prod(shape) != values.size:
        raise ValueError("it holds an array whose shape and size disagree")
    return values.reshape(shape, order="F" if order == "F" else "C")
