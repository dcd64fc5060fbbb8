"""Images that a model has generated, wherever they lie: a folder, a zip, a .npz or a .npy; read as they are needed."""

import math
import os
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import PIL.Image
import torch
from torch import Tensor

from dataset_utils.transforms import center_crop, scale
from dnnlib.images import ImageFiles
from dnnlib.limits import check_regular, check_unpacked

ARRAYS = (".npy", ".npz")
RESIZE = {"scale": scale, "center-crop": lambda image, width, height: center_crop(image, width)}


# ----------------------------------------------------------------------------
# Arrays of any kind as uint8 [n, C, H, W].


def image_layout(shape: Sequence[int], like: Sequence[int] | None = None, what: str = "The images") -> str:
    """How the axes of an array of images are meant: "NCHW", "NHWC" or "NHW".

    Channels are the axis of length 1 or 3. Where both could be, that of `like` (C, H, W) decides.

    Raises
    ------
    ValueError
        If it is not clear, or no order of axes fits.
    """
    shape = tuple(shape)
    if len(shape) == 3:
        return "NHW"
    fits = [] if len(shape) != 4 else [name for name, axis in (("NCHW", 1), ("NHWC", 3)) if shape[axis] in (1, 3)]
    if len(fits) == 2 and like is not None:
        fits = [name for name in fits if _chw(shape, name) == tuple(like)] or fits
    if len(fits) == 1:
        return fits[0]
    if len(fits) == 2:
        raise ValueError(f"{what} {list(shape)} can be read as [n, C, H, W] and as [n, H, W, C]; give layout=.")
    raise ValueError(
        f"{what} must be [n, C, H, W], [n, H, W, C] or [n, H, W] with 1 or 3 channels, not {list(shape)}; "
        "transpose the array."
    )


def to_images(
    array: np.ndarray | Tensor,  # [n, C, H, W], [n, H, W, C] or [n, H, W]
    *,
    value_range: tuple[float, float] | None = None,  # of floats: what black and white are
    layout: str | None = None,  # NCHW, NHWC or NHW; None: see `image_layout`
    like: Sequence[int] | None = None,  # (C, H, W) that is expected
    what: str = "The images",  # begins the messages
) -> np.ndarray:
    """An array or tensor of images as uint8 [n, C, H, W], the pixels that a PNG would hold.

    Floats become round-half-up of 255 (x - low) / (high - low), which for (-1, 1) is EDM's x 127.5 + 128, cut.

    Raises
    ------
    ValueError
        If the axes are not clear, or the numbers are neither uint8 nor floats in a `value_range` that is given.
    """
    array = array.detach().cpu().numpy() if isinstance(array, Tensor) else np.asarray(array)
    layout = layout or image_layout(array.shape, like, what)
    if layout not in ("NCHW", "NHWC", "NHW") or len(layout) != array.ndim:
        raise ValueError(f"{what} {list(array.shape)} cannot be in the layout {layout}; it is NCHW, NHWC or NHW.")
    array = to_pixels(array, value_range, what)
    if layout == "NHW":
        return array[:, np.newaxis]
    return array.transpose(0, 3, 1, 2) if layout == "NHWC" else array


def to_pixels(array: np.ndarray, value_range: tuple[float, float] | None, what: str) -> np.ndarray:
    """The numbers of an array as uint8; see `to_images`."""
    if array.dtype == np.uint8:
        return array
    if array.dtype.kind != "f":
        raise ValueError(f"{what} are {array.dtype}; give uint8 from 0 to 255, or floats with their range.")
    if value_range is None:
        raise ValueError(
            f"{what} are {array.dtype}, and nothing says which numbers are black and white: give the range "
            "(value_range=(-1, 1) or (0, 1); on the command line --value-range=-1,1), or uint8 from 0 to 255."
        )
    low, high = value_range
    if not low < high or not math.isfinite(high - low):
        raise ValueError(f"The range {low} to {high} is none; (0, 1), (-1, 1) and (0, 255) are usual.")
    array = array.astype(np.float64)
    if not np.isfinite(array).all():
        raise ValueError(f"{what} hold NaN or infinite numbers; look at how they were made.")
    if array.size and (array.min() < low - 0.01 * (high - low) or array.max() > high + 0.01 * (high - low)):
        raise ValueError(
            f"{what} reach from {array.min():.4g} to {array.max():.4g}, outside the range {low:g} to {high:g} "
            "that was given; clip them, or give their range."
        )
    return np.clip(np.floor((array - low) / (high - low) * 255 + 0.5), 0, 255).astype(np.uint8)


# ----------------------------------------------------------------------------
# Files.


class Fit(NamedTuple):
    """What is done to each image, as it was done to the training images."""

    resize: str | None = None  # of `RESIZE`
    grayscale: bool = False
    value_range: tuple[float, float] | None = None  # of floats in arrays

    def record(self) -> dict[str, Any]:
        """For a record: what was done, without what was not."""
        return {key: value for key, value in self._asdict().items() if value not in (None, False)}


class Samples:
    """The images of one folder, zip, .npz or .npy in the order of their names or rows; image i has the "seed" i.

    Folders and zips are read file by file, .npy and uncompressed .npz by memory map, compressed .npz as a stream.

    Parameters
    ----------
    path : folder with or without subfolders, zip, .npy, or .npz with `arr_0` (ADM's format), `images`, `samples`, or
        a single array
    like : (C, H, W) of the training images that they are to be compared with
    fit : what is done to each image first

    Raises
    ------
    OSError, ValueError
        If there are no images there, or (also later, from `images`) one cannot be read or has another size.
    """

    label_dim = 0  # as of an unconditional network

    def __init__(self, path: str | os.PathLike, like: Sequence[int], fit: Fit | None = None):
        self.path, self.image_shape, self.fit = Path(path), tuple(like), fit or Fit()
        if self.path.suffix.lower() in ARRAYS:
            self._rows: _Rows | None = _Rows(self.path)
            self._count = self._rows.shape[0]
            raw = (3 if self._rows.shape[-1] == 3 else 1, 0, 0)
            expected = self.image_shape if self.fit == Fit(value_range=self.fit.value_range) else raw
            self._layout = image_layout(self._rows.shape, expected, f'The images in "{self.path}"')
        else:
            self._rows = None
            self._files = ImageFiles(self.path)
            self._count = len(self._files.names)
        if not self._count:
            raise ValueError(f'"{self.path}" holds no images.')
        self.images([0])  # what does not fit at all is said before anything slow

    def __len__(self) -> int:
        return self._count

    @property
    def img_channels(self) -> int:
        return self.image_shape[0]

    @property
    def img_resolution(self) -> int:
        return self.image_shape[1]

    def images(self, rows: Sequence[int]) -> np.ndarray:
        """These images, uint8 [len(rows), C, H, W]; ascending `rows` are read fastest."""
        images = np.empty([len(rows), *self.image_shape], dtype=np.uint8)
        if self._rows is None:
            for i, row in enumerate(rows):
                name = self._files.names[row]
                images[i] = self._fit(self._files.image(name), f'"{name}" in "{self.path}"')
            return images
        for i, row in enumerate(rows):
            what = f'Image {row} of "{self.path}"'
            array = to_images(self._rows[row][np.newaxis], value_range=self.fit.value_range, layout=self._layout,
                              what=f'The images in "{self.path}"')[0]  # fmt: skip
            images[i] = self._fit(array[0] if len(array) == 1 else array.transpose(1, 2, 0), what)
        return images

    def made(self, seeds: Sequence[int], batch: int, ends: Sequence[int] = ()) -> Iterator[tuple[list[int], Tensor]]:
        """As `training.generation.generate_images`: (rows, images), images uint8 [b, C, H, W]; no batch crosses `ends`.

        Raises
        ------
        ValueError
            If there are fewer images than the seeds ask for.
        """
        if len(seeds) and max(seeds) >= self._count:
            raise ValueError(f'"{self.path}" holds {self._count} images; --seeds asks for number {max(seeds)}.')
        for start, end in zip([0, *ends], [*ends, len(seeds)]):
            for first in range(start, end, batch):
                some = [int(row) for row in seeds[first : min(first + batch, end)]]
                yield some, torch.from_numpy(self.images(some))

    def _fit(self, image: np.ndarray, what: str) -> np.ndarray:
        """uint8 [h, w] or [h, w, 3] -> [C, H, W]."""
        channels, height, width = self.image_shape
        if self.fit.resize is not None and image.shape[:2] != (height, width):
            gray = image.ndim == 2
            image = RESIZE[self.fit.resize](image, width, height)
            image = image[:, :, 0] if gray and image.ndim == 3 else image
        if self.fit.grayscale and image.ndim == 3:
            image = np.array(PIL.Image.fromarray(image).convert("L"))
        made = image[np.newaxis] if image.ndim == 2 else image.transpose(2, 0, 1)
        if made.shape != self.image_shape:
            c, h, w = made.shape
            remedies = ["--resize=scale or center-crop"] * ((h, w) != (height, width))
            remedies += ["--to-grayscale"] * (c == 3 and channels == 1)
            remedy = f"do to them what was done to the training images ({' and '.join(remedies)})"
            if c == 1 and channels == 3:
                remedy = "gray images cannot be compared with colour ones; make the training set gray, too"
            raise ValueError(
                f"{what} is {w}x{h} with {_channels(c)}, the training images are {width}x{height} with "
                f"{_channels(channels)}; {remedy}."
            )
        return made


def read_array(path: str | os.PathLike, value_range: tuple[float, float] | None = None) -> np.ndarray:
    """All images of a .npz or .npy, uint8 [n, C, H, W]; see `Samples`."""
    rows = _Rows(Path(path))
    what = f'The images in "{path}"'
    layout = image_layout(rows.shape, None, what)
    if not rows.shape[0]:
        raise ValueError(f'"{path}" holds no images.')
    return np.concatenate(
        [
            to_images(rows[i][np.newaxis], value_range=value_range, layout=layout, what=what)
            for i in range(rows.shape[0])
        ]
    )


class _Rows:
    """Rows of the array in a .npy or .npz, without reading all of it."""

    def __init__(self, path: Path):
        self._path = path
        check_regular(path)
        self._stream: Any = None  # of a compressed member, and the row that comes next
        self._next = 0
        try:
            if path.suffix.lower() == ".npy":
                self._array = np.load(path, mmap_mode="r", allow_pickle=False)
                self.shape = self._array.shape
            else:
                self._open_npz()
        except Exception as err:  # zipfile, zlib and numpy each have their own
            if f'"{path}"' in str(err):
                raise
            raise ValueError(f'"{path}" cannot be read as {path.suffix}: {err}') from err
        if len(self.shape) < 3:
            raise ValueError(f'"{path}" holds an array {list(self.shape)}, which are no images.')

    def __getitem__(self, row: int) -> np.ndarray:
        if self._array is not None:
            return np.array(self._array[row])
        if self._stream is None or row < self._next:
            self._start()
        size = math.prod(self.shape[1:]) * self._dtype.itemsize
        try:
            while self._next <= row:
                data = self._stream.read(size)
                self._next += 1
        except Exception as err:
            raise ValueError(f'"{self._path}" is damaged: {err}.') from err
        if len(data) < size:
            raise ValueError(f'"{self._path}" is cut short: it ends in image {row}.')
        return np.frombuffer(data, dtype=self._dtype).reshape(self.shape[1:])

    def _open_npz(self) -> None:
        with zipfile.ZipFile(self._path) as archive:
            infos = {info.filename.removesuffix(".npy"): info for info in archive.infolist()}
            check_unpacked(sum(info.file_size for info in infos.values()), os.path.getsize(self._path))
            names = [name for name in ("arr_0", "images", "samples") if name in infos]
            if not names and len(infos) != 1:
                raise ValueError(
                    f'"{self._path}" holds {", ".join(sorted(infos)) or "nothing"}; save the images as '
                    "np.savez(FILE, images) or np.savez(FILE, images=...)."
                )
            self._info = infos[(names or list(infos))[0]]
            with archive.open(self._info) as file:
                self.shape, fortran, self._dtype = _header(file, self._path)
                header = file.tell()
        if fortran:
            raise ValueError(f'"{self._path}" holds an array in Fortran order; save np.ascontiguousarray of it.')
        self._array = None
        if self._info.compress_type == zipfile.ZIP_STORED:
            with open(self._path, "rb") as file:
                file.seek(self._info.header_offset + 26)
                name, extra = (int.from_bytes(file.read(2), "little") for _ in range(2))
            offset = self._info.header_offset + 30 + name + extra + header
            self._array = np.memmap(self._path, self._dtype, "r", offset, self.shape)

    def _start(self) -> None:
        self._stream = zipfile.ZipFile(self._path).open(self._info)  # noqa: SIM115 (read on over several calls)
        _header(self._stream, self._path)
        self._next = 0


def _header(file: Any, path: Path) -> tuple[tuple[int, ...], bool, np.dtype]:
    version = np.lib.format.read_magic(file)
    reader: Callable = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran, dtype = reader(file)
    if dtype.hasobject:
        raise ValueError(f'"{path}" holds Python objects, which are not read; save an array of numbers.')
    return shape, fortran, dtype


def _chw(shape: Sequence[int], layout: str) -> tuple[int, ...]:
    return tuple(shape[1:]) if layout == "NCHW" else (shape[3], shape[1], shape[2])


def _channels(count: int) -> str:
    return f"{count} channel{'s' * (count != 1)}"
