"""Where images come from: every kind of source tells how many, which labels, and reads the i-th."""

import itertools
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from dataset_utils import mnist
from dataset_utils.cifar10 import is_cifar_folder, load_cifar
from dataset_utils.parquet import ParquetImages, find_parquet
from dnnlib.images import OTHER_FORMAT, ImageFiles, Label, decode_image, describe_counts, label_array
from dnnlib.limits import check_npz, check_regular

BEYOND = "beyond --max-images"
NOT_CHOSEN = "not asked for"
SKLEARN_DIGITS = "sklearn:digits"
CLASS_ORDERS = ("natural", "published")

_PARTS = {"train", "training", "test", "testing", "val", "valid", "validation", "dev", "eval"}  # of a dataset


@dataclass
class About:
    """What is to be said of a source beside its images.

    Attributes
    ----------
    left_out : number of files and images that are there and not taken, by reason
    details : of a reason, what it was and how often: {".heic": 2}
    notes : what was done to the images read so far, one entry for each time
    parts : sources that this one was put together from, whose notes count, too
    classes : name of the folder -> label, where labels follow from folders; else None
    warnings : sentences that a user should read
    """

    left_out: Counter[str] = field(default_factory=Counter)
    details: dict[str, Counter[str]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    parts: Sequence["About"] = ()
    classes: dict[str, int] | None = None
    warnings: list[str] = field(default_factory=list)

    def describe_left_out(self) -> str:
        """What was left out, as a phrase; "" if nothing was."""
        return describe_counts(self.left_out, self.details)

    def done(self) -> Counter[str]:
        """What was done to the images read so far, and to how many."""
        return sum((part.done() for part in self.parts), Counter(self.notes))


def _together(abouts: Iterable[About]) -> About:
    parts = list({id(about): about for about in abouts}.values())
    if len(parts) == 1:
        return parts[0]
    return About(
        sum((part.left_out for part in parts), Counter()),
        {reason: counts for part in parts for reason, counts in part.details.items()},
        parts=parts,
        classes=parts[0].classes if parts else None,
        warnings=[warning for part in parts for warning in part.warnings],
    )


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
    about : what is to be said of it
    """

    def __init__(
        self,
        names: Sequence[str],
        read: Callable[[int], np.ndarray],
        labels: Sequence[Label | None] | None = None,
        paths: Sequence[str] = (),
        close: Callable[[], None] | None = None,
        groups: Sequence[str] | None = None,
        about: About | None = None,
    ):
        for what, values in (("labels", labels), ("groups", groups)):
            if values is not None and len(values) != len(names):
                raise ValueError(f"There are {len(values)} {what} for {len(names)} images.")
        self.names, self.read, self.paths = names, read, tuple(paths)
        self.labels = None if labels is None or all(label is None for label in labels) else list(labels)
        self.groups = None if groups is None else list(groups)
        self.about = about or About()
        self._close = close

    def __len__(self) -> int:
        return len(self.names)

    def __iter__(self) -> Iterator[tuple[np.ndarray, Label | None]]:
        for i in range(len(self)):
            yield self.read(i), self.labels[i] if self.labels is not None else None

    def select(
        self, indices: Iterable[int], labels: Sequence[Label] | None = None, left_out: str | None = None
    ) -> "Source":
        """Return the images at `indices`, in this order, with their labels or the `labels` given instead.

        With a reason in `left_out` the others are counted as left out.
        """
        indices = [int(i) for i in indices]
        about = self.about
        if labels is not None:
            about = replace(about, classes=None)
        elif self.labels is not None:
            labels = [self.labels[i] for i in indices]
        if left_out is not None and (others := len(self) - len(set(indices))):
            about = replace(about, left_out=about.left_out + Counter({left_out: others}))
        groups = None if self.groups is None else [self.groups[i] for i in indices]
        names = [self.names[i] for i in indices]
        return Source(names, lambda i: self.read(indices[i]), labels, self.paths, self._close, groups, about)

    def map(self, change: Callable[[int, np.ndarray], np.ndarray]) -> "Source":
        """Return the same images, each as `change(index, image)` makes it."""
        return Source(
            self.names, lambda i: change(i, self.read(i)), self.labels, self.paths, self._close, self.groups, self.about
        )

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
        _together(source.about for source in sources),
    )


def open_source(
    path: str | os.PathLike,
    max_images: int | None = None,
    class_order: str = "natural",
    coarse: bool = False,
    classes: str = "folders",
) -> Source:
    """Open a source; its kind follows from the name.

    ========================  ==========================================================================
    `digits`,                 scikit-learn's 1797 handwritten digits, 8x8, values 0..16 scaled to 0..255;
    `sklearn:digits`          the short name only where there is no file or folder `digits`
    `*.tar.gz`, `*.tgz`       CIFAR-10 or CIFAR-100, Python version; or the folder in it
    `*-images-idx3-ubyte.gz`  MNIST and its kin, labels beside it; 28x28 is padded to 32x32
    `*.npz`                   arrays `images` uint8 [N, H, W], [N, H, W, C] or [N, C, H, W], and `labels` if there
    `*_lmdb/` with data.mdb   LSUN category; gray images become RGB
    `*.txt`                   one image path per line, absolute or relative to the text file
    `*.parquet`, or a folder  dataset of Hugging Face: columns `image` and `label`; needs pyarrow
    with such files
    `*.zip`, `*.tar`, folder  all images in it; labels from `dataset.json`, else from top-level folders
    ========================  ==========================================================================

    Parameters
    ----------
    path : file or folder, or `digits`
    max_images : take the first so many images, None = all
    coarse : take the coarse labels of CIFAR-100
    classes : what the classes of images in a folder, zip or tar without `dataset.json` are: top-level `folders`, or
        what the file names begin with, up to the first underscore (`prefixes`)
    class_order : how folders are numbered: `natural` (2 before 10) or `published` (as text)

    Raises
    ------
    OSError, ValueError
        If there is no such source, or it is damaged or empty.

    References
    ----------
    The order of images and the labels from folder names are those of the dataset tool of EDM (Karras et
    al., "Elucidating the design space of diffusion-based generative models", NeurIPS 2022), with three
    exceptions: a `dataset.json` without labels means no labels, folder names count in a zip, too, and numbers in
    them are compared as numbers (`class_order`).
    """
    if max_images is not None and max_images < 1:
        raise ValueError(f"The number of images to take must be at least 1, not {max_images}.")
    text = os.fspath(path)
    name = os.path.basename(text.rstrip("/")).lower()
    if is_builtin(text):
        source = _open_digits(max_images)
    elif text == "digits":
        raise ValueError(
            f'The source "digits" can be what is here under this name or scikit-learn\'s; write ./digits or '
            f"{SKLEARN_DIGITS}."
        )
    elif not os.path.exists(text):
        raise FileNotFoundError(f'The source "{text}" does not exist.')
    elif os.path.isdir(text) and is_cifar_folder(text):
        source = _from_arrays(*load_cifar(text, coarse), text, max_images)
    elif os.path.isdir(text) and (images := mnist.find_mnist(text)):
        source = _open_file(images, os.path.basename(images), max_images, class_order, coarse)
    elif os.path.isdir(text):
        lmdb = name.endswith("_lmdb") and os.path.lexists(os.path.join(text, "data.mdb"))
        if lmdb:
            source = _open_lmdb(text, max_images)
        elif find_parquet(text) and not _has_images(text):
            source = _open_parquet(text, max_images, coarse)
        else:
            source = _open_files(text, max_images, class_order, classes)
    else:
        check_regular(text)
        source = _open_file(text, name, max_images, class_order, coarse, classes)
    if len(source) == 0:
        source.close()
        raise ValueError(f'The source "{text}" holds no images.')
    return source


def is_builtin(source: str) -> bool:
    """True if a source is no file or folder, but comes with a package."""
    return source == SKLEARN_DIGITS or (source == "digits" and not os.path.lexists(source))


# ----------------------------------------------------------------------------
# The kinds of sources. `limit` is the number of images to take, None = all.


def _open_file(
    path: str, name: str, limit: int | None, class_order: str, coarse: bool, classes: str = "folders"
) -> Source:
    """A file of any kind, which its lower-case `name` tells."""
    if name.endswith(".parquet"):
        return _open_parquet(path, limit, coarse)
    if name.endswith((".zip", ".tar")):
        return _open_files(path, limit, class_order, classes)
    if name.endswith((".tar.gz", ".tgz")):
        return _from_arrays(*load_cifar(path, coarse), path, limit)
    if name.endswith(mnist.IMAGES_SUFFIXES):
        images, labels = mnist.load_mnist(path)
        return _from_arrays(images, labels, path, limit, padding=2 if images.shape[1:] == (28, 28) else 0)
    if name.endswith(".npz"):
        return _open_npz(path, limit)
    if name.endswith(".txt"):
        return _open_list(path, limit)
    kinds = "a folder, .zip, .tar, .npz, .parquet, .txt, CIFAR's .tar.gz, MNIST's -images-idx3-ubyte.gz, or digits"
    raise ValueError(f'The source "{path}" is of no known kind; give {kinds}.')


def _from_arrays(
    images: np.ndarray, labels: list[int] | None, path: str, limit: int | None, padding: int = 0
) -> Source:
    """Images held in memory, uint8 [N, height, width] or [N, height, width, 3], with a black margin."""

    def read(i: int) -> np.ndarray:
        return np.pad(images[i], [(padding, padding)] * 2 + [(0, 0)] * (images.ndim - 3))

    about = About(left_out=_beyond(len(images), limit))
    images, labels = images[:limit], None if labels is None else labels[:limit]
    return Source([f"{path}[{i}]" for i in range(len(images))], read, labels, [path], about=about)


def _beyond(total: int, limit: int | None) -> Counter[str]:
    """How many images are left out because of the limit."""
    return Counter() if limit is None or total <= limit else Counter({BEYOND: total - limit})


def _open_npz(path: str, limit: int | None) -> Source:
    """Arrays `images` and, where there are any, `labels`."""
    try:
        check_npz(path)
        with np.load(path, allow_pickle=False) as arrays:
            images, labels = arrays["images"], arrays.get("labels")
    except KeyError as err:
        raise ValueError(f'"{path}" holds no array "images", uint8 [N, H, W], [N, H, W, C] or [N, C, H, W].') from err
    except Exception as err:  # damaged files bring about errors of many kinds
        raise ValueError(f'"{path}" cannot be read as an .npz file: {err}.') from err
    if images.ndim == 4 and images.shape[3] not in (1, 3) and images.shape[1] in (1, 3):
        images = images.transpose(0, 2, 3, 1)
    if images.ndim == 4 and images.shape[3] == 1:
        images = images[..., 0]
    if images.dtype != np.uint8 or images.ndim not in (3, 4) or (images.ndim == 4 and images.shape[3] != 3):
        need = "uint8 [N, H, W], [N, H, W, C] or [N, C, H, W] with 1 or 3 channels"
        raise ValueError(f'"images" in "{path}" is {images.dtype} {list(images.shape)}, but must be {need}.')
    source = _from_arrays(images, None, path, limit)
    if labels is not None:
        if labels.shape[:1] != images.shape[:1]:
            raise ValueError(f'"{path}" holds {len(images)} images, but labels of the shape {list(labels.shape)}.')
        values = labels.reshape(len(labels), -1)
        values = values[:, 0].tolist() if values.shape[1] == 1 else values.tolist()
        label_array(values, f'"labels" in "{path}"')
        source.labels = values[:limit]
    return source


def _open_digits(limit: int | None) -> Source:
    from sklearn.datasets import load_digits  # here: it takes a second

    digits = load_digits()
    images = np.rint(digits.images * (255 / 16)).astype(np.uint8)  # [1797, 8, 8]
    source = _from_arrays(images, digits.target.tolist(), "digits", limit)
    source.paths = ()
    return source


def _open_files(path: str, limit: int | None, class_order: str = "natural", classes_from: str = "folders") -> Source:
    """A folder, zip or tar."""
    files = ImageFiles(path)
    names = files.names
    if os.path.isdir(path):
        names = sorted(names, key=lambda name: name.split("/"))  # folder by folder; an archive is sorted as text
    about = About(details={OTHER_FORMAT: files.other_formats}, notes=files.notes)
    labels = files.labels()
    if classes_from == "prefixes":
        if files.has_metadata:
            raise ValueError(f'"{path}" has a dataset.json with labels; leave out --classes=prefixes.')
        prefixes = {name: os.path.basename(name).partition("_") for name in names}
        for name, (_, separator, _) in prefixes.items():
            if not separator:
                raise ValueError(f'"{name}" in "{path}" has no underscore, up to which a name says the class.')
        folders = sorted({prefix for prefix, _, _ in prefixes.values()}, key=_sort_key(class_order))
        about.classes = {prefix: i for i, prefix in enumerate(folders)}
        labels = {name: about.classes[prefix] for name, (prefix, _, _) in prefixes.items()}
    elif not files.has_metadata and (classes := folder_classes(names, class_order)):
        labels = {name: classes[_top_folder(name)] for name in names}
        about.classes = classes
        parts = [folder for folder in classes if folder.lower() in _PARTS]
        if len(parts) > 1 and len(parts) == len(classes):
            listed = " and ".join(f'"{part}"' for part in parts)
            about.warnings.append(
                f"The folders {listed} look like parts of a dataset, not like classes, but count as classes; "
                f'for one of them give --source="{path.rstrip("/")}/{parts[0]}".'
            )
    about.left_out = files.left_out + _beyond(len(names), limit)
    names = names[:limit]
    ordered = [labels.get(name) for name in names] if labels else None
    label_array([label for label in ordered or () if label is not None], f'dataset.json of "{path}"')
    grouping = files.groups()
    groups = [grouping[name] for name in names] if grouping else None
    full = [f"{path.rstrip('/')}/{name}" for name in names]
    return Source(full, lambda i: files.image(names[i]), ordered, [path], files.close, groups, about)


def _has_images(path: str) -> bool:
    try:
        ImageFiles(path).close()
    except ValueError:
        return False
    return True


def _open_parquet(path: str, limit: int | None, coarse: bool) -> Source:
    """Parquet files with images."""
    images = ParquetImages(path, coarse)
    labels = None if images.labels is None else images.labels[:limit]
    label_array([label for label in labels or () if label is not None], f'The column of labels of "{path}"')
    left_out = images.left_out + _beyond(len(images.names), limit)
    about = About(left_out=left_out, classes=images.classes, warnings=images.warnings)
    names = images.names[:limit]

    def read(i: int) -> np.ndarray:
        return decode_image(images.read(i), names[i], about.notes)

    return Source(names, read, labels, [path], about=about)


def folder_classes(names: Iterable[str], order: str = "natural") -> dict[str, int] | None:
    """Number the top-level folders; images outside of folders count as one, too, called "". None if there is one only.

    The order is that of their names as text (`published`), or with the numbers in them compared as numbers (`natural`),
    so that 2 comes before 10.
    """
    folders = sorted({_top_folder(name) for name in names}, key=_sort_key(order))
    return {folder: i for i, folder in enumerate(folders)} if len(folders) > 1 else None


def _sort_key(order: str) -> Callable[[str], tuple] | None:
    return _natural if order == "natural" else None


def _top_folder(name: str) -> str:
    return name.split("/")[0] if "/" in name else ""


def _natural(text: str) -> tuple:
    """Key that sorts numbers in text as numbers, and what is then equal (01, 1) as text."""
    parts = re.split(r"([0-9]+)", text)
    return [(int(part), "") if i % 2 else (0, part) for i, part in enumerate(parts)], text


def _open_list(path: str, limit: int | None) -> Source:
    """A text file with one image path per line."""
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError:
        raise ValueError(f'"{path}" is no text file (UTF-8) with one image path per line.') from None
    numbered = [(number, line.strip()) for number, line in enumerate(lines, 1) if line.strip()]
    about = About(left_out=_beyond(len(numbered), limit))
    numbered = numbered[:limit]
    files = [Path(path).parent / line for _, line in numbered]
    for file, (number, line) in zip(files, numbered):
        if not os.path.isfile(file):
            shown = line if len(line) <= 300 else f"{line[:300]}..."
            raise FileNotFoundError(f'Line {number} of "{path}" names "{shown}", but there is no such file.')

    def read(i: int) -> np.ndarray:
        return decode_image(files[i].read_bytes(), str(files[i]), about.notes)

    return Source([str(f) for f in files], read, paths=[path], about=about)


def _open_lmdb(path: str, limit: int | None) -> Source:
    """An LSUN category: an lmdb database whose values are image files."""
    import lmdb

    about = About()

    def read(i: int) -> np.ndarray:
        with environment.begin() as transaction:
            image = decode_image(transaction.get(keys[i]), names[i], about.notes)
        return image if image.ndim == 3 else np.repeat(image[:, :, np.newaxis], 3, axis=2)

    try:
        environment = lmdb.open(path, readonly=True, lock=False, readahead=False)
        # Pages are mapped into memory: to touch one beyond the end of the file would kill this process.
        needed = (environment.info()["last_pgno"] + 1) * environment.stat()["psize"]
        if os.path.getsize(Path(path) / "data.mdb") < needed:
            raise OSError(f'"{path}" is cut short: its data.mdb has fewer pages than it says.')
        with environment.begin() as transaction:
            keys = list(itertools.islice(transaction.cursor().iternext(keys=True, values=False), limit))
        about.left_out = _beyond(environment.stat()["entries"], limit)
    except lmdb.Error as err:
        raise OSError(f'"{path}" cannot be opened as an lmdb database: {err}.') from err
    names = [f"{path}/{key.decode('latin1')}" for key in keys]
    return Source(names, read, paths=[path], close=environment.close, about=about)
