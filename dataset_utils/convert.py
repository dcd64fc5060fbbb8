"""From a source to a dataset: read, transform and encode in parallel, write in order."""

import contextlib
import hashlib
import json
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
from dnnlib.images import ImageFiles, Label, describe_counts, encode_png, left_out_sentence
from dnnlib.repeats import image_digest

TOO_SMALL = "too small and dropped"
_SHOWN = 20  # classes that are printed


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
    key = SourceKey(transform)

    def prepare(i: int) -> tuple[int, bytes, np.ndarray | None, bytes | None, bytes | None]:
        original = source.read(i)
        image = transform(original)
        if image is None:
            return i, image_digest(original), None, None, None
        return i, image_digest(original), image, encode_png(image), image_digest(image)

    prepared = _ordered_map(prepare, range(len(source)), workers)
    with open_archive(dest) as archive, contextlib.closing(prepared):  # no thread outlives an error
        archive.metadata.update(metadata or {})
        for i, original, image, png, digest in tqdm(
            prepared, total=len(source), unit="img", disable=True if quiet else None
        ):
            label, group = _label(source, i)
            key.add(original, label, group)
            if image is not None:
                origin = source.names[i]
                archive.add(image, label, index=i, origin=origin, png=png, group=group, digest=digest)
        archive.conversion = _conversion(source, archive, key)
    return archive


def _label(source: Source, i: int) -> tuple[Label | None, str | None]:
    label = source.labels[i] if source.labels is not None else None
    if isinstance(label, np.generic | np.ndarray):
        label = label.tolist()
    return label, source.groups[i] if source.groups is not None else None


class SourceKey:
    """What decides a dataset: the images, labels and groups that it is made from, in order, and the transform."""

    def __init__(self, transform: Transform):
        self.settings = transform.settings()
        self._digest = hashlib.sha256()

    def add(self, digest: bytes, label: Label | None, group: str | None) -> None:
        """Add an image by its `image_digest`."""
        self._digest.update(digest + json.dumps([label, group]).encode())

    def entry(self) -> dict[str, str | int | None]:
        """What `dataset.json` says of it."""
        return {"source_sha256": self._digest.hexdigest(), **self.settings}


def is_made_from(dest: str | os.PathLike, source: Source, transform: Transform, workers: int = 1) -> bool:
    """True if `dest` is a dataset that `write_dataset` has made of the same source with the same transform."""
    try:
        with contextlib.closing(ImageFiles(dest)) as files:
            made = (files.metadata() or {}).get("conversion")
    except (OSError, ValueError):
        return False
    if not isinstance(made, dict) or not transform.has_made(made):
        return False
    return made.get("source_sha256") == source_sha256(source, workers)


def source_sha256(source: Source, workers: int = 1) -> str:
    """Digest of the images, labels and groups of a source, which a dataset made of it records."""
    key = SourceKey(make_transform())
    digests = _ordered_map(lambda i: image_digest(source.read(i)), range(len(source)), workers)
    for i, digest in enumerate(digests):
        key.add(digest, *_label(source, i))
    return key.entry()["source_sha256"]


def _conversion(source: Source, archive: Archive, key: SourceKey) -> dict[str, Any]:
    """The entry `conversion` of `dataset.json`: what the dataset was made from, and what was left out or changed."""
    about = source.about
    left_out = about.left_out + Counter({TOO_SMALL: len(source) - len(archive.names)})
    entry: dict[str, Any] = {**key.entry(), "left_out": dict(left_out)}
    if details := {reason: dict(counts) for reason, counts in about.details.items() if left_out[reason]}:
        entry["left_out_details"] = details
    if done := about.done():
        entry["changed"] = dict(sorted(done.items()))
    if about.classes is not None:
        entry["classes"] = about.classes
    without = sum(label is None for label in archive.labels)
    if 0 < without < len(archive.labels):
        entry["images_without_label"] = without
    entry["repeats"] = archive.repeats.counts()
    return entry


def report(source: Source, archive: Archive) -> list[str]:
    """What a user should know of a dataset beside its description, as lines; the last says what was left out."""
    made, about = archive.conversion, source.about
    lines = [f"Note: {warning}" for warning in about.warnings]
    if about.classes is not None:
        shown = [f"{folder or '(no folder)'} {label}" for folder, label in about.classes.items()]
        more = f", and {len(shown) - _SHOWN} more in dataset.json" if len(shown) > _SHOWN else ""
        lines.append(f"Labels of the classes: {', '.join(shown[:_SHOWN])}{more}.")
    if "changed" in made:
        lines.append(f"Changed: {describe_counts(made['changed'])}.")
    if repeats := archive.repeats.describe():
        lines.append(f"Note: {repeats}")
    without = made.get("images_without_label", 0)
    no_labels = f"all labels, because {without} images have none" if without else ""
    lines.append(left_out_sentence(made["left_out"], about.details, no_labels))
    return lines


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
