"""Which images and which labels: the rules of the study's data factors (Gu et al. 2023)."""

import random
from collections.abc import Sequence

from dataset_utils.sources import NOT_CHOSEN, Source
from dnnlib.images import Label


def class_members(labels: Sequence[Label]) -> dict[int, list[int]]:
    """Return {class: indices of its images, in order}, classes in order.

    Raises
    ------
    ValueError
        If labels are vectors.
    """
    if not all(type(label) is int for label in labels):
        raise ValueError("The labels of the source are vectors, but whole numbers are needed: one class per image.")
    members: dict[int, list[int]] = {label: [] for label in sorted(set(labels))}
    for i, label in enumerate(labels):
        members[label].append(i)
    return members


def balanced(labels: Sequence[Label], count: int | None = None, uneven: bool = False) -> list[int]:
    """Return the indices of a class-balanced subset: the first count/C images of each class, in class order.

    Parameters
    ----------
    labels : class of each image; the C classes are those that occur
    count : number of images, None = as many as the smallest class allows
    uneven : where C does not divide `count`, let the first count mod C classes have one image more

    Raises
    ------
    ValueError
        If a class has too few images, or C does not divide `count` and `uneven` is not set.
    """
    members = class_members(labels)
    if count is None:
        count = len(members) * min(map(len, members.values()))
    share, rest = divmod(count, len(members))
    if rest and not uneven:
        near = " or ".join(str(n) for n in (count - rest, count - rest + len(members)) if n > 0)
        advice = f"take {near}, or let the first {rest} have one more (--uneven)"
        raise ValueError(f"{len(members)} classes cannot share {count} images equally; {advice}.")
    return _first(members, {label: share + (k < rest) for k, label in enumerate(members)})


def first_classes(labels: Sequence[Label], num_classes: int, count: int | None = None) -> list[int]:
    """Return the indices of `count` images of the first classes: count // C of each, the last takes the remainder.

    Parameters
    ----------
    labels : class of each image
    num_classes : C, the number of classes
    count : number of images, None = as many as the smallest of these classes allows from each

    Raises
    ------
    ValueError
        If there are not so many classes, or a class has too few images.
    """
    members = class_members(labels)
    if num_classes > len(members):
        raise ValueError(f"{num_classes} classes are asked for, but the source has only {len(members)}.")
    chosen = list(members)[:num_classes]
    if count is None:
        count = num_classes * min(len(members[label]) for label in chosen)
    share = count // num_classes
    if share == 0:
        raise ValueError(f"{count} images cannot hold {num_classes} classes; take at least {num_classes} images.")
    wanted = dict.fromkeys(chosen, share)
    wanted[chosen[-1]] = count - share * (num_classes - 1)
    return _first(members, wanted)


def of_class(labels: Sequence[Label], label: int, count: int | None = None) -> list[int]:
    """Return the indices of the first `count` images of one class, None = all.

    Raises
    ------
    ValueError
        If there is no such class, or it has too few images.
    """
    members = class_members(labels)
    if label not in members:
        raise ValueError(f"The source has no image of class {label}; it has the classes {_listed(members)}.")
    return _first(members, {label: len(members[label]) if count is None else count})


def subset(source: Source, count: int | None = None, uneven: bool = False) -> Source:
    """Return the class-balanced subset of a labelled source, or the first images of one without labels.

    Raises
    ------
    ValueError
        As for `balanced`, or if there are fewer images than `count`.
    """
    if source.labels is not None:
        return source.select(balanced(source.require_labels(), count, uneven), left_out=NOT_CHOSEN)
    count = len(source) if count is None else count
    if count > len(source):
        raise ValueError(f"{count} images are asked for, but the source has only {len(source)}.")
    return source.select(range(count), left_out=NOT_CHOSEN)


def part(source: Source, number: int, parts: int, count: int | None = None) -> Source:
    """Return every `parts`-th image of a source beginning with `number` (from 0): parts that have no image in common.

    An image that the source holds twice may still be in two parts.

    Parameters
    ----------
    count : of these, the first so many; None: all

    Raises
    ------
    ValueError
        If there are fewer.
    """
    chosen = range(number, len(source), parts)
    if len(chosen) < (count or 1):
        raise ValueError(
            f"{count or 1} images are asked for, but part {number} of {parts} of the source has only {len(chosen)}."
        )
    return source.select(chosen[:count], left_out=NOT_CHOSEN)


def random_labels(count: int, num_classes: int, seed: int = 1024) -> list[int]:
    """Return a random class per image, drawn as published: `random.seed(1024)`, then `randint(0, C-1)` in order."""
    generator = random.Random(seed)
    return [generator.randint(0, num_classes - 1) for _ in range(count)]


def _first(members: dict[int, list[int]], wanted: dict[int, int]) -> list[int]:
    """Return the first `wanted[c]` images of each class c, class by class."""
    for label, number in wanted.items():
        if number > len(members[label]):
            there = f"class {label} has only {len(members[label])} images"
            raise ValueError(f"{number} images of class {label} are needed, but {there}; ask for fewer images.")
    return [i for label, number in wanted.items() for i in members[label][:number]]


def _listed(members: dict[int, list[int]]) -> str:
    labels = [str(label) for label in members]
    return ", ".join(labels) if len(labels) <= 10 else f"{', '.join(labels[:9])}, ..., {labels[-1]}"
