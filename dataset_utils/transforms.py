"""How an image of any size becomes one of the size asked for: scaled, or cropped to its centre and scaled."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import PIL.Image

MODES = ("center-crop", "center-crop-wide")

_MAX_SIZE = 1 << 14  # pixels
_IF_GIVEN = ("crops", "grayscale")  # settings that are recorded only where they are not the default


@dataclass(frozen=True)
class Transform:
    """A function from an image, uint8 [h, w] or [h, w, 3], to the new one, or None to drop it; and what it is."""

    apply: Callable[[np.ndarray], np.ndarray | None]
    mode: str | None = None
    resolution: tuple[int, int] | None = None
    crops: int | None = None  # of each image, which it gets one by one; those below the resolution are dropped
    grayscale: bool = False  # RGB becomes gray at the end: L of ITU-R 601-2, (299 R + 587 G + 114 B) / 1000

    def __call__(self, image: np.ndarray) -> np.ndarray | None:
        if self.crops is not None and min(image.shape[:2]) < self.resolution[0]:
            return None
        image = self.apply(image)
        if self.grayscale and image is not None and image.ndim == 3:
            image = np.asarray(PIL.Image.fromarray(image).convert("L"))
        return image

    def settings(self) -> dict[str, str | int | None]:
        """{transform, resolution, and crops and grayscale if given} as the options name them."""
        size = "x".join(map(str, self.resolution)) if self.resolution else None
        more = {} if self.crops is None else {"crops": self.crops}
        more |= {"grayscale": True} if self.grayscale else {}
        return {"transform": self.mode, "resolution": size, **more}

    def has_made(self, record: dict[str, object]) -> bool:
        """True if a dataset with this record of its settings was made by this transform."""
        names = {"transform", "resolution", *_IF_GIVEN}
        return {k: v for k, v in record.items() if k in names} == self.settings()


def make_transform(mode: str | None = None, resolution: tuple[int, int] | None = None) -> Transform:
    """Return the function from an image, uint8 [h, w] or [h, w, 3], to the new one, or None to drop it.

    Parameters
    ----------
    mode : None to scale without regard to the aspect ratio, `center-crop` or `center-crop-wide`
    resolution : (width, height) in pixels; None leaves images as they are

    Raises
    ------
    ValueError
        If the mode is unknown, needs a resolution, or the result is not square with a power of two as side.
    """
    if mode is not None and mode not in MODES:
        raise ValueError(f'The transform "{mode}" is unknown; use {" or ".join(MODES)}.')
    if resolution is None:
        if mode is not None:
            raise ValueError(f"The transform {mode} needs a resolution, for example 32x32.")
        return Transform(lambda image: image)
    width, height = resolution
    if not 1 <= width <= _MAX_SIZE or width & (width - 1):
        raise ValueError(f"The resolution {width}x{height} is not possible: its width must be a power of two.")
    if mode == "center-crop-wide":
        if not 1 <= height <= width:
            raise ValueError(f"The resolution {width}x{height} is higher than wide; {mode} makes wide images.")
        return Transform(lambda image: center_crop_wide(image, width, height), mode, resolution)
    if height != width:
        raise ValueError(f"The resolution {width}x{height} is not square; only center-crop-wide can fit it into one.")
    if mode == "center-crop":
        return Transform(lambda image: center_crop(image, width), mode, resolution)
    return Transform(lambda image: scale(image, width, height), mode, resolution)


def scale(image: np.ndarray, width: int, height: int) -> np.ndarray:
    """Resize with a Lanczos filter to uint8 [height, width] or [height, width, 3]."""
    if image.shape[:2] == (height, width):
        return image
    return np.array(PIL.Image.fromarray(image).resize((width, height), PIL.Image.Resampling.LANCZOS))


def center_crop(image: np.ndarray, size: int) -> np.ndarray:
    """Cut the largest square out of the middle and resize it; uint8 RGB [size, size, 3], gray becomes RGB."""
    h, w = image.shape[:2]
    side = min(h, w)
    y, x = (h - side) // 2, (w - side) // 2
    return scale(_rgb(image[y : y + side, x : x + side]), size, size)


def fit(image: np.ndarray, size: int, channels: int) -> np.ndarray:
    """Make an image of any size like those of a dataset: the largest square of its middle, scaled, gray or RGB.

    Parameters
    ----------
    image : uint8 [h, w] or [h, w, 3]
    size : side of the result in pixels
    channels : 1 or 3; an RGB image becomes gray by its luma (ITU-R 601)

    Returns
    -------
    uint8 [size, size] or [size, size, 3]
    """
    cropped = center_crop(image, size)
    if channels == 3:
        return cropped
    return cropped[:, :, 0] if image.ndim == 2 else np.array(PIL.Image.fromarray(cropped).convert("L"))


def center_crop_wide(image: np.ndarray, width: int, height: int) -> np.ndarray | None:
    """Cut a strip out of the middle, resize it to width x height, and lay it on a black square.

    The strip has the full width of the image and round(width * h / w) of its rows. An image narrower than
    `width`, or whose strip is lower than `height`, gives None.

    Returns
    -------
    uint8 RGB [width, width, 3], gray becomes RGB; or None
    """
    h, w = image.shape[:2]
    rows = round(width * h / w)
    if w < width or rows < height:
        return None
    square = np.zeros([width, width, 3], dtype=np.uint8)
    top = (width - height) // 2
    square[top : top + height] = scale(_rgb(image[(h - rows) // 2 : (h + rows) // 2]), width, height)
    return square


def _rgb(image: np.ndarray) -> np.ndarray:
    return image if image.ndim == 3 else np.repeat(image[:, :, np.newaxis], 3, axis=2)
