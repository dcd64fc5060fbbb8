"""Images and labels as they lie in files: one decoder, one encoder, one view of a folder or zip of images."""

import io
import os
import reprlib
import warnings
import zipfile
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import PIL.Image

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

# `decode_image` refuses what PIL only warns of.
warnings.filterwarnings("ignore", category=PIL.Image.DecompressionBombWarning)


# ----------------------------------------------------------------------------
# One image.


def decode_image(data: bytes, name: str) -> np.ndarray:
    """Decode an image file.

    Gray stays gray, bilevel becomes gray, palette, CMYK and YCbCr become RGB; metadata such as the EXIF
    orientation is ignored. The pixel count is limited by `PIL.Image.MAX_IMAGE_PIXELS`.

    Parameters
    ----------
    data : content of the file
    name : what error messages call it

    Returns
    -------
    uint8 [height, width] for gray or [height, width, 3] for RGB

    Raises
    ------
    ValueError
        If the data are no image, damaged or too large, or have transparency, 16 bits per channel or several
        frames.
    """
    try:
        with PIL.Image.open(io.BytesIO(data), formats=_FORMATS) as image:
            refusal = _refusal(image)
            if refusal is None:
                target = {"1": "L", "P": "RGB", "CMYK": "RGB", "YCbCr": "RGB"}.get(image.mode)
                return np.array(image.convert(target) if target else image)
    except PIL.UnidentifiedImageError:
        refusal = f"is not an image of a known format ({', '.join(_FORMATS)})"
    except PIL.Image.DecompressionBombError as err:
        refusal = f"is too large ({err})"
    except Exception as err:  # on damaged data the decoders raise errors of many kinds
        refusal = f"cannot be decoded ({err})"
    raise ValueError(f'"{name}" {refusal}.')


def _refusal(image: PIL.Image.Image) -> str | None:
    """Why `decode_image` does not take this image, or None."""
    if image.width * image.height > PIL.Image.MAX_IMAGE_PIXELS:
        return f"is too large: {image.width}x{image.height} pixels"
    if getattr(image, "n_frames", 1) > 1 and image.format != "MPO":  # MPO: a photo followed by its preview
        return f"has {image.n_frames} frames; save the frames as single images"
    if image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        return "has transparency (an alpha channel); save it as gray or RGB without"
    if image.mode.startswith(("I", "F")) or (image.format in ("PNG", "TIFF") and ";16" in str(image.tile)):
        return "has more than 8 bits per channel; save it with 8"
    if image.mode not in ("1", "L", "P", "RGB", "CMYK", "YCbCr"):
        return f"is stored in the mode {image.mode}; save it as gray or RGB"
    return None


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
    """The images and the `dataset.json` of a folder (searched recursively) or of a zip; nothing is extracted.

    A zip with names that lead outside of it is refused all the same: other programs would extract them.

    Images are known by their extension; names that begin with a dot are left out. Objects can be pickled
    and used after a fork: every process opens the zip for itself.

    Parameters
    ----------
    path : folder or zip

    Attributes
    ----------
    names : list of str
        Relative paths with forward slashes, sorted as text.
    has_metadata : bool
        Whether there is a `dataset.json`.

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
        if self.path.is_dir():
            self._is_zip = False
            found = [
                os.path.relpath(os.path.join(folder, file), self.path).replace(os.sep, "/")
                for folder, _, files in os.walk(self.path)
                for file in files
            ]
        elif self.path.exists():
            self._is_zip = True
            check_regular(self.path)
            found = self._zipfile().namelist()
            self._check_names(found)
        else:
            raise FileNotFoundError(f'"{self.path}" does not exist; give a folder or a zip of images.')
        self.names = sorted(name for name in found if _is_image_name(name))
        if not self.names:
            self.close()
            raise ValueError(f'"{self.path}" holds no images ({" ".join(_EXTENSIONS)}).')
        self.has_metadata = "dataset.json" in found

    def _check_names(self, found: Sequence[str]) -> None:
        ordered = sorted(found)
        outside = [name for name in found if name.startswith("/") or ".." in name.split("/")]
        twice = [name for name, following in zip(ordered, ordered[1:]) if name == following]
        for name in outside[:1]:
            self.close()
            raise ValueError(f'"{self.path}" holds the name "{name}", which leads outside of it; make the zip anew.')
        for name in twice[:1]:
            self.close()
            raise ValueError(f'"{self.path}" holds two files of the name "{name}"; make the zip anew.')

    def read(self, name: str) -> bytes:
        """Return the content of one file.

        Raises
        ------
        OSError, ValueError
            If it cannot be read, or is damaged.
        """
        if not self._is_zip:
            check_regular(self.path / name)
            size = os.stat(self.path / name).st_size
            if size > _MAX_FILE:
                raise ValueError(f'"{self.path / name}" is too large: {size} bytes.')
            return (self.path / name).read_bytes()
        try:
            archive = self._zipfile()
            info = archive.getinfo(name)
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

    def image(self, name: str) -> np.ndarray:
        """Return one image, uint8 [height, width] or [height, width, 3]; see `decode_image`."""
        return decode_image(self.read(name), f"{self.path}/{name}")

    def metadata(self) -> dict[str, Any] | None:
        """Return the content of `dataset.json`, or None where there is none.

        Raises
        ------
        ValueError
            If it is not a JSON object.
        """
        if not self.has_metadata:
            return None
        data = self.read("dataset.json")
        try:
            content = parse_json(data)
        except ValueError as err:
            raise ValueError(f'dataset.json of "{self.path}" is no valid JSON: {err}.') from err
        if not isinstance(content, dict):
            raise ValueError(f'dataset.json of "{self.path}" is no JSON object with the key "labels".')
        return content

    def labels(self) -> dict[str, Label] | None:
        """Return {name: label} from `dataset.json`, or None where it is missing or says null.

        Raises
        ------
        ValueError
            If `dataset.json` is not of the form {"labels": [[name, label], ...] or null}. The labels
            themselves are checked by `label_array`.
        """
        content = self.metadata()
        if content is None or content.get("labels", ()) is None:
            return None
        pairs = content.get("labels")
        if not isinstance(pairs, list) or not all(map(_is_name_label, pairs)):
            form = '{"labels": [[name, label], ...]} or {"labels": null}'
            raise ValueError(f'dataset.json of "{self.path}" is not of the form {form}.')
        labels = dict(pairs)
        if len(labels) < len(pairs):
            raise ValueError(f'dataset.json of "{self.path}" gives an image more than one label.')
        return labels

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
        groups = dict(pairs)
        if len(groups) < len(pairs):
            raise ValueError(f"{where} gives an image more than one group.")
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


def _is_image_name(name: str) -> bool:
    path = PurePosixPath(name)
    return path.suffix.lower() in _EXTENSIONS and not path.name.startswith(".")


def _is_name_label(pair: Any) -> bool:
    return isinstance(pair, list) and len(pair) == 2 and isinstance(pair[0], str)
