"""Where images come from: every kind of source tells how many, which labels, and reads the i-th."""

import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from dataset_utils import mnist
from dataset_utils.cifar10 import load_cifar10
from dnnlib.images import ImageFiles, Label, decode_image, label_array
from dnnlib.limits import check_regular


class Source:
    """Named images with or without labels. Nothing is decoded before it is read.

    Parameters
    ----------
    names : what messages call the images
    read : returns the i-th image, uint8 [height, width] or [height, width, 3]; called from several threads
    labels : one per image (int, vector, or None where an image has none), or None if none has one
    paths : the files or folders behind this source, which nobody should overwrite while it is read
    close : releases what `read` holds open
    groups : one per image, or None: what `dataset.json` names under "groups", such as inlier or outlier
    """

    def __init__(
        self,
        names: Sequence[str],
        read: Callable[[int], np.ndarray],
        labels: Sequence[Label | None] | None = None,
        paths: Sequence[str] = (),
        close: Callable[[], None] | None = None,
        groups: Sequence[str] | None = None,
    ):
        for what, values in (("labels", labels), ("groups", groups)):
            if values is not None and len(values) != len(names):
                raise ValueError(f"There are {len(values)} {what} for {len(names)} images.")
        self.names, self.read, self.paths = names, read, tuple(paths)
        self.labels = None if labels is None or all(label is None for label in labels) else list(labels)
        self.groups = None if groups is None else list(groups)
        self._close = close

    def __len__(self) -> int:
        return len(self.names)

    def __iter__(self) -> Iterator[tuple[np.ndarray, Label | None]]:
        for i in range(len(self)):
            yield self.read(i), self.labels[i] if self.labels is not None else None

    def select(self, indices: Iterable[int], labels: Sequence[Label] | None = None) -> "Source":
        """Return the images at `indices`, in this order, with their labels or the `labels` given instead."""
        indices = [int(i) for i in indices]
        if labels is None and self.labels is not None:
            labels = [self.labels[i] for i in indices]
        groups = None if self.groups is None else [self.groups[i] for i in indices]
        names = [self.names[i] for i in indices]
        return Source(names, lambda i: self.read(indices[i]), labels, self.paths, self._close, groups)

    def map(self, change: Callable[[int, np.ndarray], np.ndarray]) -> "Source":
        """Return the same images, each as `change(index, image)` makes it."""
        return Source(self.names, lambda i: change(i, self.read(i)), self.labels, self.paths, self._close, self.groups)

    def require_labels(self) -> list[Label]:
        """Return the labels.

        Raises
        ------
        ValueError
            If an image has none.
        """
        for i, name in enumerate(self.names):
            if self.labels is None or self.labels[i] is None:
                raise ValueError(f'"{name}" has no label, but labels are needed; add a dataset.json with labels.')
        return self.labels

    def close(self) -> None:
        """Release what is held open."""
        if self._close is not None:
            self._close()

    def __enter__(self) -> "Source":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


def concatenate(sources: Sequence[Source]) -> Source:
    """Return the images of all sources, one source after the other.

    Labels missing in one are None there; groups are kept if all have them.
    """
    where = [(source, i) for source in sources for i in range(len(source))]
    return Source(
        [source.names[i] for source, i in where],
        lambda i: where[i][0].read(where[i][1]),
        [source.labels[i] if source.labels is not None else None for source, i in where],
        [path for source in sources for path in source.paths],
        lambda: [source.close() for source in sources],
        [source.groups[i] for source, i in where] if all(source.groups is not None for source in sources) else None,
    )


def open_source(path: str | os.PathLike, max_images: int | None = None) -> Source:
    """Open a source; its kind follows from the name.

    ========================  ==========================================================================
    `digits`                  scikit-learn's 1797 handwritten digits, 8x8, values 0..16 scaled to 0..255
    `*.tar.gz`, `*.tgz`       CIFAR-10, Python version
    `*-images-idx3-ubyte.gz`  MNIST and its kin, labels beside it; 28x28 is padded to 32x32
    `*_lmdb/`                 LSUN category; gray images become RGB
    `*.txt`                   one image path per line, absolute or relative to the text file
    `*.zip`, folder           all images in it; labels from `dataset.json`, else from top-level folders
    ========================  ==========================================================================

    Parameters
    ----------
    path : file or folder, or `digits`
    max_images : take the first so many images, None = all

    Raises
    ------
    OSError, ValueError
        If there is no such source, or it is damaged or empty.

    References
    ----------
    The order of images and the labels from folder names are those of the dataset tool of EDM (Karras et
    al., "Elucidating the design space of diffusion-based generative models", NeurIPS 2022), with two
    exceptions: a `dataset.json` without labels means no labels, and folder names count in a zip, too.
    """
    if max_images is not None and max_images < 1:
        raise ValueError(f"The number of images to take must be at least 1, not {max_images}.")
    text = os.fspath(path)
    name = os.path.basename(text.rstrip("/")).lower()
    if text == "digits":
        source = _open_digits(max_images)
    elif not os.path.exists(text):
        raise FileNotFoundError(f'The source "{text}" does not exist.')
    elif os.path.isdir(text):
        source = _open_lmdb(text, max_images) if name.endswith("_lmdb") else _open_files(text, max_images)
    else:
        check_regular(text)
        source = _open_file(text, name, max_images)
    if len(source) == 0:
        source.close()
        raise ValueError(f'The source "{text}" holds no images.')
    return source


# ----------------------------------------------------------------------------
# The kinds of sources. `limit` is the number of images to take, None = all.


def _open_file(path: str, name: str, limit: int | None) -> Source:
    """A file of any kind, which its lower-case `name` tells."""
    if name.endswith(".zip"):
        return _open_files(path, limit)
    if name.endswith((".tar.gz", ".tgz")):
        return _from_arrays(*load_cifar10(path), path, limit)
    if name.endswith(mnist.IMAGES_SUFFIX):
        images, labels = mnist.load_mnist(path)
        return _from_arrays(images, labels, path, limit, padding=2 if images.shape[1:] == (28, 28) else 0)
    if name.endswith(".txt"):
        return _open_list(path, limit)
    kinds = "a folder, .zip, .txt, CIFAR-10's .tar.gz, MNIST's -images-idx3-ubyte.gz, or digits"
    raise ValueError(f'The source "{path}" is of no known kind; give {kinds}.')


def _from_arrays(images: np.ndarray, labels: list[int], path: str, limit: int | None, padding: int = 0) -> Source:
    """Images held in memory, uint8 [N, height, width] or [N, height, width, 3], with a black margin."""

    def read(i: int) -> np.ndarray:
        return np.pad(images[i], [(padding, padding)] * 2 + [(0, 0)] * (images.ndim - 3))

    images, labels = images[:limit], labels[:limit]
    return Source([f"{path}[{i}]" for i in range(len(images))], read, labels, [path])


def _open_digits(limit: int | None) -> Source:
    from sklearn.datasets import load_digits  # here: it takes a second

    digits = load_digits()
    images = np.rint(digits.images * (255 / 16)).astype(np.uint8)  # [1797, 8, 8]
    source = _from_arrays(images, digits.target.tolist(), "digits", limit)
    source.paths = ()
    return source


def _open_files(path: str, limit: int | None) -> Source:
    """A folder or zip."""
    files = ImageFiles(path)
    names = files.names
    if os.path.isdir(path):
        names = sorted(names, key=lambda name: name.split("/"))  # folder by folder; a zip is sorted as text
    labels = files.labels() if files.has_metadata else _folder_labels(names)
    names = names[:limit]
    ordered = [labels.get(name) for name in names] if labels else None
    label_array([label for label in ordered or () if label is not None], f'dataset.json of "{path}"')
    grouping = files.groups()
    groups = [grouping[name] for name in names] if grouping else None
    full = [f"{path.rstrip('/')}/{name}" for name in names]
    return Source(full, lambda i: files.image(names[i]), ordered, [path], files.close, groups)


def _folder_labels(names: list[str]) -> dict[str, int] | None:
    """Number the top-level folders in the order of their names; images outside of folders count as one, too."""
    folders = {name: name.split("/")[0] if "/" in name else "" for name in names}
    classes = {folder: i for i, folder in enumerate(sorted(set(folders.values())))}
    return {name: classes[folder] for name, folder in folders.items()} if len(classes) > 1 else None


def _open_list(path: str, limit: int | None) -> Source:
    """A text file with one image path per line."""
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError:
        raise ValueError(f'"{path}" is no text file (UTF-8) with one image path per line.') from None
    numbered = [(number, line.strip()) for number, line in enumerate(lines, 1) if line.strip()][:limit]
    files = [Path(path).parent / line for _, line in numbered]
    for file, (number, line) in zip(files, numbered):
        if not os.path.isfile(file):
            shown = line if len(line) <= 300 else f"{line[:300]}..."
            raise FileNotFoundError(f'Line {number} of "{path}" names "{shown}", but there is no such file.')
    return Source([str(f) for f in files], lambda i: decode_image(files[i].read_bytes(), str(files[i])), paths=[path])


def _open_lmdb(path: str, limit: int | None) -> Source:
    """An LSUN category: an lmdb database whose values are image files."""
    import lmdb

    def read(i: int) -> np.ndarray:
        with environment.begin() as transaction:
            image = decode_image(transaction.get(keys[i]), names[i])
        return image if image.ndim == 3 else np.repeat(image[:, :, np.newaxis], 3, axis=2)

    try:
        environment = lmdb.open(path, readonly=True, lock=False, readahead=False)
        # Pages are mapped into memory: to touch one beyond the end of the file would kill this process.
        needed = (environment.info()["last_pgno"] + 1) * environment.stat()["psize"]
        if os.path.getsize(Path(path) / "data.mdb") < needed:
            raise OSError(f'"{path}" is cut short: its data.mdb has fewer pages than it says.')
        with environment.begin() as transaction:
            keys = list(itertools.islice(transaction.cursor().iternext(keys=True, values=False), limit))
    except lmdb.Error as err:
        raise OSError(f'"{path}" cannot be opened as an lmdb database: {err}.') from err
    names = [f"{path}/{key.decode('latin1')}" for key in keys]
    return Source(names, read, paths=[path], close=environment.close)
