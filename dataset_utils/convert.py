"""From a source to a dataset: read, transform and encode in parallel, write in order."""

import contextlib
import os
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from tqdm import tqdm

from dataset_utils.archive import Archive, open_archive
from dataset_utils.sources import Source
from dataset_utils.transforms import Transform, make_transform
from dnnlib.images import encode_png


def write_dataset(
    source: Source,
    dest: str | os.PathLike,
    *,
    transform: Transform | None = None,
    workers: int = 1,
    metadata: dict[str, Any] | None = None,
    quiet: bool = False,
) -> Archive:
    """Write all images of `source` to the zip or folder `dest`.

    Images that the transform drops leave a gap in the numbers of the names, as in the published tool.

    Parameters
    ----------
    source : images and labels
    dest : see `dataset_utils.archive.open_archive`
    transform : see `dataset_utils.transforms.make_transform`; None leaves images as they are
    workers : threads; the result does not depend on it
    metadata : further keys for `dataset.json`
    quiet : no progress bar, even on a terminal

    Returns
    -------
    The finished archive: names, labels and shape of what was written.

    Raises
    ------
    OSError, ValueError
        If an image cannot be read or does not fit, or `dest` cannot be written. Nothing is left behind then.
    """
    for path in source.paths:
        if os.path.exists(dest) and os.path.samefile(path, dest):
            raise ValueError(f'"{dest}" is the source itself; give the dataset another name.')
    transform = transform or make_transform()

    def prepare(i: int) -> tuple[int, np.ndarray | None, bytes | None]:
        image = transform(source.read(i))
        return i, image, None if image is None else encode_png(image)

    prepared = _ordered_map(prepare, range(len(source)), workers)
    with open_archive(dest) as archive, contextlib.closing(prepared):  # no thread outlives an error
        archive.metadata.update(metadata or {})
        for i, image, png in tqdm(prepared, total=len(source), unit="img", disable=True if quiet else None):
            if image is not None:
                label = source.labels[i] if source.labels is not None else None
                group = source.groups[i] if source.groups is not None else None
                archive.add(image, label, index=i, origin=source.names[i], png=png, group=group)
    return archive


def describe(archive: Archive) -> str:
    """One line on a dataset: images, resolution, channels, labels, and the size of each group."""
    height, width, channels = archive.shape
    labelled = [label for label in archive.labels if label is not None]
    if not labelled:
        labels = "no labels"
    elif len(labelled) < len(archive.labels):
        labels = f"no labels (only {len(labelled)} images have one)"
    elif isinstance(labelled[0], int):
        labels = f"labels 0 to {max(labelled)}"
    else:
        labels = f"label vectors of length {len(labelled[0])}"
    images = f"{len(archive.names)} image{'s' * (len(archive.names) != 1)}"
    counts = sorted(Counter(group for group in archive.groups if group is not None).items())
    groups = "".join(f", {number} {group}" for group, number in counts)
    return f"{images}, {width}x{height}, {channels} channel{'s' * (channels != 1)}, {labels}{groups}"


def _ordered_map(function: Callable, items: Iterable, workers: int) -> Iterator:
    """`map` in threads: results come in order, and only a few wait at any time.

    Decoding, resizing and encoding leave the interpreter lock, so that threads are enough.
    """
    if workers == 1:
        yield from map(function, items)
        return
    with ThreadPoolExecutor(workers) as pool:
        waiting: deque = deque()
        try:
            for item in items:
                waiting.append(pool.submit(function, item))
                if len(waiting) >= 4 * workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)
