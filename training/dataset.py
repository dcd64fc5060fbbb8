"""A dataset zip or folder as training sees it: uint8 images, integer labels, decoded once and held in memory."""

import contextlib
import os
from collections import Counter
from pathlib import Path

import numpy as np
import torch

from dnnlib.images import ImageFiles, describe_counts, label_array

_ADVICE = "make a dataset of equal ones with dataset_tool.py --transform=center-crop --resolution=WxH"


def describe_images(dataset: "ImageFolderDataset") -> str:
    """What was left out of a zip or folder, and what was done to the images that were read, in a sentence; or ""."""
    files = dataset.files
    parts = [f"{files.describe_left_out()} left out"] if files.left_out else []
    if files.notes:
        parts.append(describe_counts(Counter(files.notes)))
    return f'Of "{dataset.path}": {"; ".join(parts)}.' if parts else ""


def files_left_out(path: str | os.PathLike) -> dict[str, int]:
    """How many files of a dataset are left out when it is read, by reason; none of a .npy or .npz."""
    if Path(path).suffix.lower() in (".npy", ".npz"):
        return {}
    with contextlib.closing(ImageFiles(path)) as files:
        return dict(files.left_out)


class ImageFolderDataset(torch.utils.data.Dataset):
    """Images and labels of a dataset zip or folder.

    Subset and flips are those of EDM's `training/dataset.py`. Indexing gives (image, label): uint8
    [C, H, W], and an int, or a float32 [label_dim] vector where `dataset.json` holds vectors, or 0 if
    labels are not used. Objects can be pickled and used by DataLoader workers.

    Parameters
    ----------
    path : zip or folder, as `dataset_tool.py` writes them
    resolution : side of the images in pixels; None takes what is there, else another size is an error
    max_size : keep a random subset of this many images, drawn by `random_seed`, in file order
    use_labels : read the labels, too
    xflip : append a horizontally flipped copy of every image; doubles the dataset
    random_seed : seed of the subset
    cache : decode all images on first access and hold them; else decode each one whenever it is read

    Raises
    ------
    OSError, ValueError
        If the file is missing or damaged, the size is not the one asked for, or labels are asked for but
        missing, incomplete or of no known kind.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        resolution: int | None = None,
        max_size: int | None = None,
        use_labels: bool = False,
        xflip: bool = False,
        random_seed: int = 0,
        cache: bool = True,
    ):
        if max_size is not None and max_size < 1:
            raise ValueError(f"max_size must be at least 1, not {max_size}.")
        self.path = os.fspath(path)
        self.name = Path(path).stem
        self.use_labels, self.xflip, self.cache = use_labels, xflip, cache
        self._files = ImageFiles(path)
        self._images: np.ndarray | None = None  # [N, C, H, W], once decoded
        self._file_labels: np.ndarray | None = None  # of the whole file, once read

        self.image_shape: list[int] | None = None  # [C, H, W]
        self.image_shape = list(self._decode(0).shape)
        _, height, width = self.image_shape
        if height != width:
            need = f"training needs square ones; {_ADVICE}"
            raise ValueError(f'"{self.path}" holds images of {width}x{height}; {need}.')
        if resolution is not None and resolution != width:
            raise ValueError(f'"{self.path}" holds images of {width}x{height}, not {resolution}x{resolution}.')

        self._raw_idx = np.arange(len(self._files.names))
        if max_size is not None and max_size < self._raw_idx.size:
            np.random.RandomState(random_seed % (1 << 31)).shuffle(self._raw_idx)
            self._raw_idx = np.sort(self._raw_idx[:max_size])

        self.label_dim = 0  # number of classes in the whole file, or length of the vectors
        if use_labels:
            labels = self._read_labels()
            if labels is None:
                need = 'it needs a dataset.json with {"labels": [[name, label], ...]}'
                raise ValueError(f'"{self.path}" holds no labels; to use them {need}.')
            self.label_dim = int(labels.max()) + 1 if labels.ndim == 1 else labels.shape[1]

    # ------------------------------------------------------------------------
    # What it is.

    def __len__(self) -> int:
        return self._raw_idx.size * (2 if self.xflip else 1)

    @property
    def num_channels(self) -> int:
        return self.image_shape[0]

    @property
    def resolution(self) -> int:
        return self.image_shape[1]

    @property
    def nbytes(self) -> int:
        """Memory that `images` takes, in bytes."""
        return len(self) * int(np.prod(self.image_shape))

    @property
    def has_labels(self) -> bool:
        return self.label_dim > 0

    @property
    def label_shape(self) -> list[int]:
        return [self.label_dim]

    @property
    def files(self) -> ImageFiles:
        """The zip or folder behind it, with what was left out of it."""
        return self._files

    @property
    def names(self) -> list[str]:
        """File name of every image; flipped copies bear the name of their original."""
        return [self._files.names[i] for i in self._raw_idx] * (2 if self.xflip else 1)

    # ------------------------------------------------------------------------
    # One image.

    def __getitem__(self, i: int) -> tuple[np.ndarray, int | np.ndarray]:
        if not -len(self) <= i < len(self):
            raise IndexError(f"There is no image {i}: the dataset holds {len(self)}.")
        i = int(i) % len(self)
        if self.cache:
            image = self.images()[i]
        else:
            image = self._decode(self._raw_idx[i % self._raw_idx.size])
            if i >= self._raw_idx.size:
                image = image[:, :, ::-1]
        return image.copy(), self._label(i)

    def one_hot(self, i: int) -> np.ndarray:
        """Label of the i-th image as float32 [label_dim]: 1 at its class, or the vector; [0] without labels."""
        label = self._label(i)
        if self.has_labels and not isinstance(label, np.ndarray):
            return (np.arange(self.label_dim) == label).astype(np.float32)
        return label.copy() if self.has_labels else np.zeros(0, dtype=np.float32)

    def _label(self, i: int) -> int | np.ndarray:
        if not self.has_labels:
            return 0
        label = self._file_labels[self._raw_idx[i % self._raw_idx.size]]
        return label.copy() if label.ndim else int(label)

    # ------------------------------------------------------------------------
    # All images.

    def images(self) -> np.ndarray:
        """Return all images, uint8 [N, C, H, W]; with `cache` the array held, which is not to be changed."""
        if self._images is not None:
            return self._images
        count = self._raw_idx.size
        images = np.empty([len(self), *self.image_shape], dtype=np.uint8)
        for i, raw in enumerate(self._raw_idx):
            images[i] = self._decode(raw)
        if self.xflip:
            images[count:] = images[:count, :, :, ::-1]
        if self.cache:
            self._images = images
        return images

    def labels(self) -> np.ndarray | None:
        """Return all labels, int64 [N] or float32 [N, label_dim]; None if labels are not used."""
        return self.file_labels() if self.use_labels else None

    def empty_classes(self) -> list[int]:
        """Classes below the largest label that no image has; [] without labels, or where they are vectors."""
        labels = self.labels()
        if labels is None or labels.ndim != 1:
            return []
        return np.setdiff1d(np.arange(self.label_dim), labels).tolist()

    def file_labels(self) -> np.ndarray | None:
        """Return the labels of all images whether they are used or not; None if the file has none.

        Raises
        ------
        ValueError
            If `dataset.json` is damaged, or labels only some of the images.
        """
        labels = self._read_labels()
        if labels is None:
            return None
        return np.concatenate([labels[self._raw_idx]] * (2 if self.xflip else 1))

    def groups(self) -> list[str] | None:
        """Return the name of the group of every image, in the order of the images; None if the file has no groups.

        `dataset.json` names them under "groups", in the form of the labels: [[name, group], ...].

        Raises
        ------
        ValueError
            If that is of another form, or leaves out an image.
        """
        groups = self._files.groups()
        return None if groups is None else [groups[name] for name in self.names]

    def release(self) -> None:
        """Let go of the decoded images; from now on each is decoded when it is read."""
        self.cache, self._images = False, None

    def close(self) -> None:
        """Close the zip; reading opens it again."""
        self._files.close()

    def _decode(self, raw: int) -> np.ndarray:
        """Read the image with this index in the file, uint8 [C, H, W]."""
        name = self._files.names[raw]
        image = self._files.image(name)
        image = image[np.newaxis] if image.ndim == 2 else image.transpose(2, 0, 1)
        if self.image_shape is not None and list(image.shape) != self.image_shape:
            shapes = f"{list(image.shape)}, but the first image {self.image_shape}"
            raise ValueError(f'"{name}" in "{self.path}" has [channels, height, width] = {shapes}; {_ADVICE}.')
        return image

    def _read_labels(self) -> np.ndarray | None:
        """Labels of the whole file, int64 [n] or float32 [n, dim], or None."""
        if self._file_labels is None:
            labels = self._files.labels()
            if labels is None:
                return None
            for name in self._files.names:
                if name not in labels:
                    raise ValueError(f'dataset.json of "{self.path}" has no label for "{name}"; add it.')
            ordered = [labels[name] for name in self._files.names]
            self._file_labels = label_array(ordered, f'dataset.json of "{self.path}"')
        return self._file_labels
