"""Several crops of each image: squares side by side, so that no two of them share a pixel."""

from functools import lru_cache

import numpy as np

from dataset_utils.sources import Source

MAX_CROPS = 10_000


def crop_grid(height: int, width: int, count: int) -> list[tuple[int, int, int]]:
    """Where to cut `count` equal squares, as large as fit side by side, out of the middle of an image.

    Returns
    -------
    (top, left, side) of each in pixels, row by row. Where the grid has more squares than asked for, the last are left
    out. An image of fewer pixels than `count` gives [].
    """
    sides = sorted({n // k for n in (height, width) for k in range(1, count + 1) if n >= k}, reverse=True)
    for side in sides:  # the largest side is n // k for one of the two, where k squares stand in a row
        rows, columns = height // side, width // side
        if rows * columns >= count:
            top, left = (height - rows * side) // 2, (width - columns * side) // 2
            places = [(top + r * side, left + c * side, side) for r in range(rows) for c in range(columns)]
            return places[:count]
    return []


def cut_crops(source: Source, count: int) -> Source:
    """`count` squares of each image of a source, see `crop_grid`, with the label and group of the image."""
    read = lru_cache(maxsize=16)(source.read)  # the crops of an image are read one after the other

    def cut(i: int) -> np.ndarray:
        image = read(i // count)
        places = crop_grid(*image.shape[:2], count)
        if not places:
            height, width = image.shape[:2]
            raise ValueError(f'"{source.names[i // count]}" is {width}x{height}, which has no {count} squares.')
        top, left, side = places[i % count]
        return np.ascontiguousarray(image[top : top + side, left : left + side])

    def repeat(values: list | None) -> list | None:
        return None if values is None else [value for value in values for _ in range(count)]

    names = [f"{name}, crop {k}" for name in source.names for k in range(count)]
    return Source(names, cut, repeat(source.labels), source.paths, source.close, repeat(source.groups), source.about)
