"""The writer of datasets: equal square PNGs and `dataset.json` in a zip or folder, as a whole or not at all."""

import contextlib
import json
import os
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from dnnlib.images import Label, encode_png, label_array
from dnnlib.repeats import Repeats
from dnnlib.util import atomic_write

Save = Callable[[str, bytes], None]


def archive_name(index: int) -> str:
    """Name of the image with this index: 1234 -> "00001/img00001234.png"."""
    digits = f"{index:08d}"
    return f"{digits[:5]}/img{digits}.png"


class Archive:
    """A dataset that is being written; see `open_archive`.

    Attributes
    ----------
    names : list of str
        The images written so far.
    labels : list
        Their labels, None where there is none.
    groups : list
        Their groups, None where there is none.
    shape : tuple
        (height, width, channels) of all images; None before the first.
    repeats : Repeats
        Which of them are the same.
    metadata : dict
        What `dataset.json` holds beside `labels`, `groups` and `conversion`.
    conversion : dict
        How the dataset came about.
    """

    def __init__(self, save: Save):
        self._save = save
        self.names: list[str] = []
        self.labels: list[Label | None] = []
        self.groups: list[str | None] = []
        self.shape: tuple[int, int, int] | None = None
        self.repeats = Repeats()
        self.metadata: dict[str, Any] = {}
        self.conversion: dict[str, Any] = {}

    def add(
        self,
        image: np.ndarray,
        label: Label | None = None,
        *,
        index: int | None = None,
        origin: str | None = None,
        png: bytes | None = None,
        group: str | None = None,
        digest: bytes | None = None,
    ) -> None:
        """Append an image.

        Parameters
        ----------
        image : uint8 [size, size] or [size, size, 1 or 3], the same size and channels for all
        label : class, vector or None
        index : number in its name; default: how many there are before it
        origin : what error messages call it; default: its name in the archive
        png : the image as PNG, where the caller has encoded it already
        group : the name of the group that it belongs to, or None
        digest : `image_digest` of it, where the caller knows it

        Raises
        ------
        ValueError
            If the size is no power of two, or the image differs from the first.
        """
        name = archive_name(len(self.names) if index is None else index)
        origin = origin or name
        shape = (*image.shape, 1) if image.ndim == 2 else image.shape
        if self.shape is None:
            _check_first(image, shape, origin)
            self.shape = shape
        elif shape != self.shape:
            message = f'"{origin}" is {_describe(shape)}, but the images before it are {_describe(self.shape)}'
            raise ValueError(f"{message}; all must be equal; {_advice(shape, self.shape)}.")
        self._save(name, encode_png(image) if png is None else png)
        self.names.append(name)
        if isinstance(label, np.generic | np.ndarray):
            label = label.tolist()
        self.labels.append(label)
        self.groups.append(group)
        self.repeats.add(image if digest is None else digest)

    def finish(self) -> None:
        """Write `dataset.json`; its labels are null, and it has no groups, unless every image has one."""
        if not self.names:
            raise ValueError("No image is left to write: all were too small for the transform.")
        complete = all(label is not None for label in self.labels)
        if complete:
            label_array(self.labels, "The dataset")
        labels = [[name, label] for name, label in zip(self.names, self.labels)] if complete else None
        content = {**self.metadata, "labels": labels}
        if all(group is not None for group in self.groups):
            content["groups"] = [[name, group] for name, group in zip(self.names, self.groups)]
        if self.conversion:
            content["conversion"] = self.conversion
        self._save("dataset.json", json.dumps(content).encode())


@contextlib.contextmanager
def open_archive(dest: str | os.PathLike) -> Iterator[Archive]:
    """Write a dataset to `dest`: a zip if the name ends in .zip (an existing one is replaced), else a folder.

    The dataset appears at `dest` when the block ends without an error; otherwise nothing is left behind.
    The same images give the same bytes.

    Raises
    ------
    OSError, ValueError
        If `dest` cannot be written, is a folder that is not empty, or the images do not form a dataset.
    """
    if not os.fspath(dest):
        raise ValueError("The name of the dataset to write is empty.")
    path = Path(os.path.realpath(dest))
    if path.is_symlink():
        raise OSError(f'"{dest}" is a link that leads to itself.')
    if path.parent.exists() and not path.parent.is_dir():
        raise NotADirectoryError(f'"{dest}" cannot be written: "{path.parent}" is not a folder.')
    with (_zip if path.suffix.lower() == ".zip" else _folder)(path) as save:
        archive = Archive(save)
        yield archive
        archive.finish()


@contextlib.contextmanager
def _zip(path: Path) -> Iterator[Save]:
    if path.is_dir():
        raise IsADirectoryError(f'"{path}" is a folder; a name that ends in .zip is for a zip file.')
    with atomic_write(path) as file, zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:

        def save(name: str, data: bytes) -> None:
            info = zipfile.ZipInfo(name)  # dated 1980, so that the same images give the same zip
            info.external_attr = 0o644 << 16
            archive.writestr(info, data)

        yield save


@contextlib.contextmanager
def _folder(path: Path) -> Iterator[Save]:
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        kind = "a folder that is not empty" if path.is_dir() else "a file"
        raise FileExistsError(f'"{path}" is {kind}; give a new name, an empty folder or a name that ends in .zip.')
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp") as temporary:
        folder = Path(temporary) / path.name
        folder.mkdir()

        def save(name: str, data: bytes) -> None:
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_bytes(data)

        yield save
        os.replace(folder, path)


def _check_first(image: np.ndarray, shape: tuple[int, ...], origin: str) -> None:
    if image.dtype != np.uint8 or len(shape) != 3 or shape[2] not in (1, 3):
        raise ValueError(f'"{origin}" is {image.dtype} {shape}; images are uint8 [height, width, 1 or 3].')
    height, width, _ = shape
    if height != width or width & (width - 1) or width == 0:
        need = "a dataset holds square images whose side is a power of two"
        raise ValueError(f'"{origin}" is {width}x{height}, but {need}; use --resolution, for example 32x32.')


def _advice(shape: tuple[int, ...], other: tuple[int, ...]) -> str:
    """What makes images of these two shapes equal."""
    side = max(1, 1 << (min(*shape[:2], *other[:2]).bit_length() - 1))
    if shape[2] != other[2]:
        return f"use --transform=center-crop with --resolution={side}x{side}, which makes RGB of gray, too"
    return f"use --resolution={side}x{side}, with --transform=center-crop where they are not all square"


def _describe(shape: tuple[int, ...]) -> str:
    return f"{shape[1]}x{shape[0]} {'gray' if shape[2] == 1 else 'RGB'}"
