"""Images and labels as they lie in files: one decoder, one encoder, one view of a folder or zip of images."""

import io
import os
import re
import reprlib
import tarfile
import unicodedata
import warnings
import zipfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import PIL.Image
import PIL.ImageOps

from dnnlib.limits import check_regular, check_unpacked, parse_json

Label = int | list[float]

_FORMATS = ("PNG", "JPEG", "BMP", "GIF", "TIFF", "WEBP", "PPM")  # no format whose decoder starts programs
_EXTENSIONS = (
    ".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".bmp", ".gif", ".tif", ".tiff", ".webp",
    ".ppm", ".pgm", ".pbm", ".pnm",
)  # fmt: skip
_MAX_LABEL = (1 << 24) - 1  # a class has a row of weights
_MAX_FILE = 1 << 28  # bytes of an image or a dataset.json in a folder
_MAX_FLOAT32 = float(np.finfo(np.float32).max)

# Folders that other programs leave behind, beside those whose names begin with a dot: they hold previews and rubbish.
_FOREIGN = {"__macosx", "@eadir", "#recycle", "@recycle", "$recycle.bin", "system volume information", "lost+found"}

# Reasons why a file is left out (`ImageFiles.left_out`), and what is done to images (`ImageFiles.notes`).
HIDDEN = "hidden or left behind by other programs"
OTHER_FORMAT = "of formats that are not read"
NESTED = "in folders that are datasets of their own"
LINKED_TWICE = "links to what is there under another name"
BROKEN_LINK = "links that lead nowhere"
TAR_LINK = "links in a tar"
UNKNOWN_NAME = "labels of images that are not there"
TURNED = "turned upright by their EXIF orientation"
OPAQUE = "had an alpha channel that is opaque, which is dropped"

# `decode_image` refuses what PIL only warns of.
warnings.filterwarnings("ignore", category=PIL.Image.DecompressionBombWarning)


# ----------------------------------------------------------------------------
# One image.


def decode_image(data: bytes, name: str, notes: list[str] | None = None) -> np.ndarray:
    """Decode an image file.

    Gray stays gray, bilevel becomes gray, palette, CMYK and YCbCr become RGB. An EXIF orientation is applied, an alpha
    channel that is opaque everywhere is dropped; other metadata are ignored. The pixel count is limited by
    `PIL.Image.MAX_IMAGE_PIXELS`.

    Parameters
    ----------
    data : content of the file
    name : what error messages call it
    notes : gets `TURNED` or `OPAQUE` appended where that was done

    Returns
    -------
    uint8 [height, width] for gray or [height, width, 3] for RGB

    Raises
    ------
    ValueError
        If the data are no image, damaged or too large, or have transparency, more than 8 bits per channel or several
        frames.
    """
    try:
        if _header_bits(data) > 8:
            refusal = _MANY_BITS
        else:
            with PIL.Image.open(io.BytesIO(data), formats=_FORMATS) as image:
                refusal = _refusal(image)
                if refusal is None:
                    return _pixels(image, [] if notes is None else notes)
    except PIL.UnidentifiedImageError:
        refusal = f"is not an image of a known format ({', '.join(_FORMATS)})"
    except PIL.Image.DecompressionBombError as err:
        refusal = f"is too large ({err})"
    except _Transparent:
        refusal = "has transparency (an alpha channel); save it as gray or RGB without"
    except Exception as err:  # on damaged data the decoders raise errors of many kinds
        refusal = f"cannot be decoded ({err})"
    raise ValueError(f'"{name}" {refusal}.')


_MANY_BITS = "has more than 8 bits per channel; save it with 8"


class _Transparent(ValueError):
    """An image that is not opaque."""


def _refusal(image: PIL.Image.Image) -> str | None:
    """Why `decode_image` does not take this image, as far as its header tells, or None."""
    if image.width * image.height > PIL.Image.MAX_IMAGE_PIXELS:
        return f"is too large: {image.width}x{image.height} pixels"
    if getattr(image, "n_frames", 1) > 1 and image.format != "MPO":  # MPO: a photo followed by its preview
        return f"has {image.n_frames} frames; save the frames as single images"
    if image.mode.startswith(("I", "F")) or _tiff_bits(image) > 8:
        return _MANY_BITS
    if image.mode not in ("1", "L", "P", "RGB", "CMYK", "YCbCr", *_ALPHA):
        return f"is stored in the mode {image.mode}; save it as gray or RGB"
    return None


_ALPHA = {"LA": "L", "PA": "RGB", "RGBA": "RGB"}  # mode -> the same without


def _pixels(image: PIL.Image.Image, notes: list[str]) -> np.ndarray:
    """The pixels of an image that `_refusal` lets pass."""
    turned = _orientation(image) in range(2, 9)
    image.load()  # which turns some formats already
    if _orientation(image) in range(2, 9):
        image = PIL.ImageOps.exif_transpose(image)
    if "transparency" in image.info:
        target = "L" if image.mode in ("1", "L") else "RGB"
        image = image.convert("LA" if target == "L" else "RGBA")
    else:
        target = _ALPHA.get(image.mode, {"1": "L", "L": "L"}.get(image.mode, "RGB"))
    if image.mode in _ALPHA:
        if image.getchannel(image.mode[-1]).getextrema() != (255, 255):
            raise _Transparent
        notes.append(OPAQUE)
    if turned:
        notes.append(TURNED)
    return np.array(image if image.mode == target else image.convert(target))


def _orientation(image: PIL.Image.Image) -> int:
    """EXIF orientation, 1 to 8; 1 where there is none or it cannot be read."""
    try:
        return int(image.getexif().get(0x0112, 1))
    except Exception:  # the image itself can be whole
        return 1


def _header_bits(data: bytes) -> int:
    """Bits per channel as the header of a PNG, PNM or JPEG tells: PIL cuts some of more than 8 without a word."""
    if data.startswith(b"\x89PNG\r\n\x1a\n") and len(data) > 24:
        return data[24]
    if re.match(rb"P[2356][\s#]", data):
        header = re.sub(rb"#[^\r\n]*", b" ", data[:4096]).split(maxsplit=4)  # P6 width height maximum
        return int(header[3]).bit_length() if len(header) > 3 and header[3].isdigit() else 8
    if re.match(rb"P7\s", data):
        found = re.search(rb"\nMAXVAL\s+(\d+)", data[:4096])
        return int(found[1]).bit_length() if found else 8
    if data.startswith(b"\xff\xd8"):
        at = 2
        while at + 5 <= len(data) and data[at] == 0xFF:
            kind = data[at + 1]
            if kind == 0xFF:  # filling
                at += 1
            elif 0xC0 <= kind <= 0xCF and kind not in (0xC4, 0xC8, 0xCC):  # start of frame
                return data[at + 4]
            elif kind == 0xDA:
                break
            else:
                at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    return 8


def _tiff_bits(image: PIL.Image.Image) -> int:
    """Bits per channel of a TIFF, the most of all its channels; 64 where they are no unsigned integers."""
    tags = getattr(image, "tag_v2", None)
    if tags is None:
        return 8
    bits, kinds = tags.get(258, 1), tags.get(339, 1)
    kinds = kinds if isinstance(kinds, tuple) else (kinds,)
    return max(bits if isinstance(bits, tuple) else (bits,)) if all(kind in (1, 4) for kind in kinds) else 64


def encode_png(image: np.ndarray, compress_level: int = 0) -> bytes:
    """Encode uint8 [height, width] or [height, width, 1 or 3] as PNG; level 0 does not compress, 9 most."""
    if image.ndim == 3 and image.shape[2] == 1:
        image = image[:, :, 0]
    buffer = io.BytesIO()
    PIL.Image.fromarray(image).save(buffer, format="png", compress_level=compress_level)
    return buffer.getvalue()


# ----------------------------------------------------------------------------
# Labels.


def label_array(labels: Sequence[Label], where: str) -> np.ndarray:
    """Turn labels as `dataset.json` holds them into one array.

    Parameters
    ----------
    labels : all whole numbers, or all vectors of one length
    where : what error messages call their origin

    Returns
    -------
    int64 [N] or float32 [N, length]

    Raises
    ------
    ValueError
        If a label is negative, of another kind than the rest, or not a finite number.
    """
    if not labels or type(labels[0]) is int:
        for label in labels:
            if type(label) is not int or not 0 <= label <= _MAX_LABEL:
                need = f"labels are all whole numbers from 0 to {_MAX_LABEL}, or all vectors"
                raise ValueError(f"{where} holds the label {reprlib.repr(label)}, but {need}.")
        return np.array(labels, dtype=np.int64)
    for label in labels:
        if not isinstance(label, list) or len(label) == 0 or not all(type(v) in (int, float) for v in label):
            need = "labels are all whole numbers, or all non-empty lists of numbers"
            raise ValueError(f"{where} holds the label {reprlib.repr(label)}, but {need}.")
        if len(label) != len(labels[0]):
            raise ValueError(f"{where} holds label vectors of different length, {len(labels[0])} and {len(label)}.")
        if not all(abs(v) <= _MAX_FLOAT32 for v in label):  # false for NaN, too
            raise ValueError(f"{where} holds the label {reprlib.repr(label)}, which is no finite float32 vector.")
    return np.array(labels, dtype=np.float32)


# ----------------------------------------------------------------------------
# A folder or zip of images.


class ImageFiles:
    """The images and the `dataset.json` of a folder (searched recursively), a zip or a tar; nothing is extracted.

    A zip or tar with names that lead outside of it is refused all the same: other programs would extract them.

    Images are known by their extension. Left out, and counted, are hidden files and folders and what other programs
    leave behind (`__MACOSX`, `@eaDir`), at any depth, files of other formats, and folders inside that are datasets
    of their own. If there is nothing but one such folder, it is what is meant. Links to folders are followed; what is
    there under several names counts once, under the name that is no link. In names `\\` is `/`. Objects can be pickled
    and used after a fork: every process opens the zip for itself.

    Parameters
    ----------
    path : folder, zip, or tar that is not compressed

    Attributes
    ----------
    names : list of str
        Relative paths with forward slashes, sorted as text.
    has_metadata : bool
        Whether there is a `dataset.json`.
    left_out : Counter
        Number of files left out, by reason, and of labels without an image, once they are read.
    other_formats : Counter
        The files of formats that are not read, by extension.
    notes : list of str
        What was done to the images read so far, see `decode_image`.

    Raises
    ------
    OSError, ValueError
        If there is nothing at `path`, it is neither folder nor zip, holds no images, or two files of one name
        or names that lead outside.
    """

    def __init__(self, path: str | os.PathLike):
        if not os.fspath(path):
            raise ValueError("The name of the images is empty; give a folder or a zip of images.")
        self.path = Path(path)
        self._zip: tuple[int, zipfile.ZipFile] | None = None  # process id, handle
        self.left_out: Counter[str] = Counter()
        self.other_formats: Counter[str] = Counter()
        self.notes: list[str] = []
        self._is_zip, self._members = False, None
        if self.path.is_dir():
            stored = list(_walk(self.path, self.left_out))
        elif self.path.exists() and self.path.suffix.lower() == ".tar":
            check_regular(self.path)
            self._members = _tar_members(self.path, self.left_out)  # name -> where it begins, its size, its date
            stored = list(self._members)
        elif self.path.exists():
            self._is_zip = True
            check_regular(self.path)
            stored = [name for name in self._zipfile().namelist() if not name.endswith(("/", "\\"))]
        else:
            raise FileNotFoundError(f'"{self.path}" does not exist; give a folder, zip or tar of images.')
        found = [_clean(name) for name in stored]
        self._check_names(found)
        self._stored = {name: other for name, other in zip(found, stored) if name != other}
        self._root = _dataset_root(found)  # where dataset.json lies
        self.has_metadata = f"{self._root}dataset.json" in found
        self.names = self._choose(found)
        self._known = frozenset(self.names)
        if not self.names:
            self.close()
            others = f"; left out: {self.describe_left_out()}" if self.left_out else ""
            raise ValueError(f'"{self.path}" holds no images ({" ".join(_EXTENSIONS)}){others}.')

    def _check_names(self, found: Sequence[str]) -> None:
        what = "rename it" if self.path.is_dir() else f"make the {self.path.suffix[1:].lower() or 'zip'} anew"
        ordered = sorted(found)
        outside = [name for name in found if name.startswith("/") or ".." in name.split("/") or name[1:2] == ":"]
        twice = [name for name, following in zip(ordered, ordered[1:]) if name == following]
        for name in outside[:1]:
            self.close()
            raise ValueError(f'"{self.path}" holds the name "{name}", which leads outside of it; {what}.')
        for name in twice[:1]:
            self.close()
            raise ValueError(f'"{self.path}" holds two files of the name "{name}"; {what}.')

    def _choose(self, found: Sequence[str]) -> list[str]:
        """The names of the images that are read; the others are counted."""
        nested = tuple(
            f"{folder}/"
            for folder, _, name in (other.rpartition("/") for other in found)
            if name == "dataset.json" and folder and f"{folder}/" != self._root
        )
        names = []
        for name in sorted(found):
            is_image = PurePosixPath(name).suffix.lower() in _EXTENSIONS
            if any(is_foreign(part) for part in name.split("/")):
                self.left_out[HIDDEN] += is_image
            elif nested and name.startswith(nested):
                self.left_out[NESTED] += is_image
            elif is_image:
                names.append(name)
            elif name != f"{self._root}dataset.json":
                self.left_out[OTHER_FORMAT] += 1
                self.other_formats[PurePosixPath(name).suffix.lower() or "no extension"] += 1
        self.left_out += Counter()  # without zeros
        return names

    def describe_left_out(self) -> str:
        """What was left out, as a phrase; "" if nothing was."""
        return describe_counts(self.left_out, {OTHER_FORMAT: self.other_formats})

    def read(self, name: str) -> bytes:
        """Return the content of one file.

        Raises
        ------
        OSError, ValueError
            If it cannot be read, or is damaged.
        """
        stored = self._stored.get(name, name)
        if self._members is not None:
            begin, size, _ = self._members[stored]
            with open(self.path, "rb") as file:
                file.seek(begin)
                data = file.read(size) if size <= _MAX_FILE else b""
            if len(data) < size:
                why = "the tar is cut short" if size <= _MAX_FILE else f"it is too large: {size} bytes"
                raise ValueError(f'"{name}" in "{self.path}" cannot be read: {why}.')
            return data
        if not self._is_zip:
            path = self.path / stored
            check_regular(path)
            size = os.stat(path).st_size
            if size > _MAX_FILE:
                raise ValueError(f'"{path}" is too large: {size} bytes.')
            return path.read_bytes()
        try:
            archive = self._zipfile()
            info = archive.getinfo(stored)
            if info.flag_bits & 1:
                raise ValueError("it is encrypted; make the zip anew without a password")
            if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):  # the others cannot be bounded
                raise ValueError("it is compressed by another method than deflate; make the zip anew")
            check_unpacked(info.file_size)
            with archive.open(info) as file:
                # A size makes zlib stop there: what the header announces is no more than a claim.
                return file.read(info.file_size) if info.file_size else file.read(1)
        except Exception as err:  # damaged data: errors of many kinds
            raise ValueError(f'"{name}" in "{self.path}" cannot be read: {err}.') from err

    def stamp(self, name: str) -> str:
        """Size of a file, in a zip its CRC-32 and in a tar its place and date, too, without reading the file."""
        stored = self._stored.get(name, name)
        if self._members is not None:
            return "\0".join(map(str, self._members[stored]))
        if not self._is_zip:
            return str((self.path / stored).stat().st_size)
        info = self._zipfile().getinfo(stored)
        return f"{info.file_size}\0{info.CRC:08x}"

    def image(self, name: str) -> np.ndarray:
        """Return one image, uint8 [height, width] or [height, width, 3]; see `decode_image`."""
        return decode_image(self.read(name), f"{self.path}/{name}", self.notes)

    def metadata(self) -> dict[str, Any] | None:
        """Return the content of `dataset.json`, or None where there is none.

        Raises
        ------
        ValueError
            If it is not a JSON object.
        """
        if not self.has_metadata:
            return None
        data = self.read(f"{self._root}dataset.json")
        try:
            content = parse_json(data)
        except ValueError as err:
            raise ValueError(f'dataset.json of "{self.path}" is no valid JSON: {err}.') from err
        if not isinstance(content, dict):
            raise ValueError(f'dataset.json of "{self.path}" is no JSON object with the key "labels".')
        return content

    def labels(self) -> dict[str, Label] | None:
        """Return {name: label} of the images from `dataset.json`, or None where it is missing or says null.

        Its names may begin with `./`, have backslashes, or be composed of other code points than those of the files.

        Raises
        ------
        ValueError
            If `dataset.json` is not of the form {"labels": [[name, label], ...] or null}, or names none of the images.
            The labels themselves are checked by `label_array`.
        """
        content = self.metadata()
        if content is None or content.get("labels", ()) is None:
            return None
        pairs = content.get("labels")
        if not isinstance(pairs, list) or not all(map(_is_name_label, pairs)):
            form = '{"labels": [[name, label], ...]} or {"labels": null}'
            raise ValueError(f'dataset.json of "{self.path}" is not of the form {form}.')
        labels, unknown = self._by_name(pairs, f'dataset.json of "{self.path}" gives an image more than one label.')
        if pairs and not labels:
            raise ValueError(
                f'dataset.json of "{self.path}" names no image that is there: its first name is '
                f'"{reprlib.repr(pairs[0][0])[1:-1]}", but the first image is "{self.names[0]}", which has no label; '
                "write the names as they are, relative to the folder of dataset.json."
            )
        self.left_out[UNKNOWN_NAME] = unknown
        self.left_out += Counter()
        return labels

    def _by_name(self, pairs: Sequence[list], twice: str) -> tuple[dict[str, Any], int]:
        """{name of an image: value} of [name, value] in `dataset.json`, and how many names are of no image."""
        names = [self._root + _clean(name) for name, _ in pairs]
        unknown = [name for name in names if name not in self._known]
        if unknown:
            composed = {unicodedata.normalize("NFC", name): name for name in self.names}
            names = [composed.get(unicodedata.normalize("NFC", name), name) for name in names]
        if len(set(names)) < len(names):
            raise ValueError(twice)
        values = {name: value for name, (_, value) in zip(names, pairs) if name in self._known}
        return values, len(pairs) - len(values)

    def groups(self) -> dict[str, str] | None:
        """Return {name: group} from the key "groups" of `dataset.json`, or None where there is none.

        Raises
        ------
        ValueError
            If it is not of the form [[name, group], ...] with text for groups, or leaves an image out.
        """
        pairs = (self.metadata() or {}).get("groups")
        if pairs is None:
            return None
        where = f'"groups" in dataset.json of "{self.path}"'
        if not isinstance(pairs, list) or not all(_is_name_label(pair) and isinstance(pair[1], str) for pair in pairs):
            raise ValueError(f"{where} is not of the form [[name, group], ...] with the names of groups.")
        groups, _ = self._by_name(pairs, f"{where} gives an image more than one group.")
        for name in self.names:
            if name not in groups:
                raise ValueError(f'{where} names no group for "{name}"; add it.')
        return groups

    def close(self) -> None:
        """Close the zip; reading opens it again."""
        if self._zip is not None:
            self._zip[1].close()
            self._zip = None

    def _zipfile(self) -> zipfile.ZipFile:
        if self._zip is None or self._zip[0] != os.getpid():
            try:
                self._zip = (os.getpid(), zipfile.ZipFile(self.path))
            except (zipfile.BadZipFile, EOFError, ValueError, NotImplementedError) as err:
                raise ValueError(f'"{self.path}" is neither a folder nor a readable zip: {err}.') from err
        return self._zip[1]

    def __getstate__(self) -> dict[str, Any]:
        return dict(self.__dict__, _zip=None)


def describe_counts(counts: dict[str, int], details: dict[str, dict[str, int]] | None = None) -> str:
    """{"hidden": 2, "of other formats": 1} -> "2 hidden, 1 of other formats (.txt 1)", with the details of a reason."""
    parts = []
    for reason, number in counts.items():
        more = ", ".join(f"{what} {count}" for what, count in sorted((details or {}).get(reason, {}).items()))
        reason = re.sub("^(run folder|measurement)s", r"\1", reason) if number == 1 else reason
        parts.append(f"{number} {reason} ({more})" if more else f"{number} {reason}")
    return ", ".join(parts)


def left_out_sentence(counts: dict[str, int], details: dict[str, dict[str, int]] | None = None, more: str = "") -> str:
    """The sentence with which every program ends: what was left out, see `describe_counts`, and `more` of it."""
    parts = [describe_counts({reason: number for reason, number in counts.items() if number}, details), more]
    return f"Left out: {', '.join(part for part in parts if part) or 'nothing'}."


def _tar_members(path: Path, left_out: Counter[str]) -> dict[str, tuple[int, int, int]]:
    """Of each file in a tar: where its bytes begin, how many there are, and its date. Links are counted as left out."""
    members: dict[str, tuple[int, int, int]] = {}
    try:
        with _BoundedFile(path) as stream, tarfile.open(fileobj=stream, mode="r:") as tar:
            for member in tar:
                name = member.name
                if member.issym() or member.islnk():
                    left_out[TAR_LINK] += PurePosixPath(name).suffix.lower() in _EXTENSIONS
                elif member.isreg():
                    if name in members:
                        raise ValueError(f'it holds two files of the name "{name}"; make the tar anew')
                    if member.issparse():
                        raise ValueError(f'"{name}" is stored with holes; make the tar anew without --sparse')
                    members[name] = (member.offset_data, member.size, int(member.mtime))
    except Exception as err:  # damaged data: errors of many kinds
        raise ValueError(f'"{path}" cannot be read as a tar that is not compressed: {err}.') from err
    left_out += Counter()  # without zeros
    return members


class _BoundedFile(io.FileIO):
    """Reads no more at a time than a file may hold: the headers of a tar can announce any length."""

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= _MAX_FILE:
            raise ValueError("a part of it is too large")
        return super().read(size)


def _clean(name: str) -> str:
    r"""A name in an archive or `dataset.json`, with / for \, and without what means nothing: ./a, a//b."""
    if "\\" not in name and not name.startswith("./") and "/./" not in name and "//" not in name:
        return name
    name = name.replace("\\", "/")
    absolute = "/" if name.startswith("/") else ""
    return absolute + "/".join(part for part in name.split("/") if part not in ("", "."))


def is_foreign(part: str) -> bool:
    """True for the name of a hidden file or folder, or of one that another program leaves behind."""
    return part.startswith(".") or part.lower() in _FOREIGN


def _dataset_root(found: Iterable[str]) -> str:
    """The folder that is the dataset, with a slash at its end: "" unless all images lie in one folder that is one."""
    roots = {name.rpartition("dataset.json")[0] for name in found if PurePosixPath(name).name == "dataset.json"}
    roots = {root for root in roots if not any(map(is_foreign, root.split("/")))}
    if len(roots) != 1:
        return ""
    (root,) = roots
    images = [n for n in found if PurePosixPath(n).suffix.lower() in _EXTENSIONS]
    inside = all(n.startswith(root) for n in images if not any(map(is_foreign, n.split("/"))))
    return root if inside else ""


def _walk(top: Path, left_out: Counter[str]) -> Iterator[str]:
    """The files below a folder, relative to it. Links to folders are followed, each folder and file is met once.

    What is no link comes first, so that it keeps its name. `left_out` counts the links that are left out.
    """
    real = os.path.realpath(top)
    above = {real, *map(str, Path(real).parents)}  # a link to one of these leads back
    folders, files, waiting = {real}, set(), [("", real)]
    links: list[tuple[str, str]] = []
    while waiting or links:
        if not waiting:
            relative, path = links.pop(0)
            target = os.path.realpath(path)
            if os.path.isdir(path):
                if target in folders or target in above:
                    left_out[LINKED_TWICE] += 1
                    continue
                folders.add(target)
                waiting.append((relative + "/", target))
            elif target in files:
                left_out[LINKED_TWICE] += 1
            elif not os.path.exists(path) and PurePosixPath(relative).suffix.lower() not in (*_EXTENSIONS, ".json"):
                left_out[BROKEN_LINK] += 1
            else:  # what cannot be read is an error, once it is read
                files.add(target)
                yield relative
            continue
        prefix, folder = waiting.pop()
        try:
            entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
        except PermissionError:
            if any(map(is_foreign, prefix.split("/")[:-1])):
                continue
            raise
        for entry in entries:
            relative = prefix + entry.name
            if entry.is_symlink():
                if not any(map(is_foreign, relative.split("/"))):
                    links.append((relative, entry.path))
            elif entry.is_dir():
                if entry.path not in folders:
                    folders.add(entry.path)
                    waiting.append((relative + "/", entry.path))
            else:
                files.add(entry.path)
                yield relative


def _is_name_label(pair: Any) -> bool:
    return isinstance(pair, list) and len(pair) == 2 and isinstance(pair[0], str)
