"""A dataset with known duplicates and outliers, and each image's group in `dataset.json`.

Training images that are repeated are memorized first, and so are outliers; with their groups recorded, the
memorization ratio can be told apart by group.
"""

import contextlib
import os
from dataclasses import dataclass

import click
import numpy as np

from dataset_utils import cli, subsets
from dataset_utils.archive import archive_name
from dataset_utils.sources import Source, concatenate, open_source
from dataset_utils.transforms import fit, make_transform
from dnnlib.cli import Float, report_errors
from dnnlib.repeats import image_digest
from dnnlib.util import check_file

INLIER, DUPLICATE, OUTLIER = "inlier", "duplicate", "outlier"
IN_THE_SET = "held-out images that are in the set, too"


@dataclass
class Injection:
    """Images to add to a dataset: their group, and for each where it comes from."""

    images: Source
    group: str
    origins: list[str]


def choose(total: int, count: int, seed: int, stream: int, what: str) -> list[int]:
    """Choose `count` of `total` indices at random, in ascending order; each `stream` draws for itself.

    Raises
    ------
    ValueError
        If there are not so many; the message calls them `what`.
    """
    if count > total:
        raise ValueError(f"{count} {what} are asked for, but there are only {total}.")
    chosen = np.random.RandomState([seed, stream]).permutation(total)[:count]
    return sorted(int(i) for i in chosen)


def perturb(image: np.ndarray, noise: float, jitter: int, random: np.random.RandomState) -> np.ndarray:
    """Return a near duplicate.

    Parameters
    ----------
    image : uint8 [h, w] or [h, w, 3]
    noise : standard deviation of Gaussian noise, in pixel values 0..255; the result is rounded and clipped
    jitter : shift by up to so many pixels down or up and right or left, never by none; edges are repeated
    random : draws the shift and the noise

    Returns
    -------
    uint8, same shape
    """
    if jitter:
        shifts = [(y, x) for y in range(-jitter, jitter + 1) for x in range(-jitter, jitter + 1) if (y, x) != (0, 0)]
        y, x = shifts[random.randint(len(shifts))]
        height, width = image.shape[:2]
        padded = np.pad(image, [(jitter, jitter)] * 2 + [(0, 0)] * (image.ndim - 2), mode="edge")
        image = padded[jitter - y : jitter - y + height, jitter - x : jitter - x + width]
    if noise:
        image = np.clip(np.rint(image + noise * random.standard_normal(image.shape)), 0, 255).astype(np.uint8)
    return image


def duplicates(base: Source, chosen: list[int], copies: int, noise: float, jitter: int, seed: int) -> Injection:
    """Copy each chosen image of `base` `copies` times; with `noise` or `jitter` not exactly, see `perturb`."""
    repeated = [i for i in chosen for _ in range(copies)]
    images = base.select(repeated)
    if noise or jitter:
        images = images.map(
            lambda i, image: perturb(image, noise, jitter, np.random.RandomState([seed, 2, i]))  # in any order
        )
    return Injection(images, DUPLICATE, [archive_name(i) for i in repeated])


def outliers(source: Source, name: str, chosen: list[int], like: np.ndarray) -> Injection:
    """Take these images of `source`, called `name` in the origins, made to the size and channels of `like`."""
    images = source.select(chosen).map(lambda _, image: fit(image, like.shape[0], 1 if like.ndim == 2 else 3))
    return Injection(images, OUTLIER, [_full_name(name, source.names[i]) for i in chosen])


def inverted(base: Source, count: int, seed: int) -> Injection:
    """Take negatives, 255 - image, of random images of `base`."""
    chosen = choose(len(base), count, seed, 3, "outliers")
    images = base.select(chosen).map(lambda _, image: 255 - image)
    return Injection(images, OUTLIER, [archive_name(i) for i in chosen])


def inject(base: Source, chosen: list[int], additions: list[Injection]) -> tuple[Source, list[list[str]]]:
    """Put the additions behind `base`, and record groups.

    Parameters
    ----------
    base : the images to begin with: inliers, unless they have groups
    chosen : which of them are duplicated and belong to the group of their copies
    additions : what comes behind them, in this order

    Returns
    -------
    images : all, with `groups`
    origins : [name, origin] of each addition, for `dataset.json`
    """
    images = concatenate([base, *(addition.images for addition in additions)])
    duplicated = set(chosen)
    groups = base.groups or [INLIER] * len(base)
    images.groups = [DUPLICATE if i in duplicated else group for i, group in enumerate(groups)]
    images.groups += [addition.group for addition in additions for _ in addition.origins]
    origins = [origin for addition in additions for origin in addition.origins]
    return images, [[archive_name(len(base) + i), origin] for i, origin in enumerate(origins)]


def beyond(source: Source, base: Source, uneven: bool) -> Source:
    """Images for a held-out set: as many as `base`, the class-balanced choice of `source`, chosen alike from the rest.

    Raises
    ------
    ValueError
        If the rest has too few of a class, or is empty.
    """
    taken = set(base.names)
    rest = source.select(i for i, name in enumerate(source.names) if name not in taken)
    advice = "the set leaves too few images of the source for a held-out set; take fewer by --max-images."
    if len(rest) == 0:
        raise ValueError(f"--held-out: {advice}")
    try:
        return subsets.subset(rest, len(base), uneven)
    except ValueError as err:
        raise ValueError(f"--held-out: {advice} {err}") from err


def not_in(images: Source, others: Source) -> Source:
    """Those images that equal none of the `others`, pixel by pixel; the rest is counted as left out."""
    known = {image_digest(others.read(i)) for i in range(len(others))}
    new = [i for i in range(len(images)) if image_digest(images.read(i)) not in known]
    return images.select(new, left_out=IN_THE_SET)


def without_class(source: Source, label: int) -> tuple[Source, Source]:
    """Split into the images of all other classes and those of class `label`.

    Raises
    ------
    ValueError
        If either has no images.
    """
    held_out = source.select(subsets.of_class(source.require_labels(), label))
    rest = source.select(i for i, other in enumerate(source.require_labels()) if other != label)
    if len(rest) == 0:
        raise ValueError(f"All images of the source are of class {label}; no inlier is left.")
    return rest, held_out


def labels_of_their_own(base: Source, count: int) -> list[int] | None:
    """Return the labels of `count` images that are of no class of `base`: its largest plus 1, or None without labels.

    Raises
    ------
    ValueError
        If labels of `base` are vectors.
    """
    if base.labels is None:
        return None
    return [max(subsets.class_members(base.require_labels())) + 1] * count


def _full_name(source: str, name: str) -> str:
    return name if name.startswith(source) else f"{source}/{name}"


def _check_options(given: dict[str, object]) -> None:
    """Raise UsageError for options that are of no use without others, or exclude each other."""
    kinds = [name for name in ("--outlier-source", "--outlier-class", "--outliers-inverted") if given[name] is not None]
    if len(kinds) > 1:
        raise click.UsageError(f"{' and '.join(kinds)} exclude each other; outliers are of one kind.")
    if given["--outliers"] and not kinds:
        raise click.UsageError("--outliers needs --outlier-source, --outlier-class or --outliers-inverted.")
    if kinds and not given["--outliers"]:
        raise click.UsageError(f"{kinds[0]} needs --outliers, the number of outliers to add.")
    if not given["--duplicates"]:
        for name in ("--copies", "--noise", "--jitter"):
            if given[name] is not None:
                raise click.UsageError(f"{name} needs --duplicates, the number of images to duplicate.")
        if not given["--outliers"]:
            raise click.UsageError("There is nothing to add; give --duplicates or --outliers.")


@click.command()
@cli.source_option
@cli.dest_option
@cli.max_images_option
@cli.uneven_option
@click.option("--duplicates", "num_duplicates", metavar="INT", type=click.IntRange(min=1), help="Images to duplicate.")
@click.option(
    "--copies", metavar="INT", type=click.IntRange(min=0), help="Copies to add of each; 0 only marks them; default: 1."
)
@click.option("--noise", metavar="FLOAT", type=Float(0, 255, min_open=True), help="Noise on copies, in 0..255.")
@click.option("--jitter", metavar="INT", type=click.IntRange(1, 1024), help="Shift copies by up to so many pixels.")
@click.option("--outliers", "num_outliers", metavar="INT", type=click.IntRange(min=1), help="Outliers to add.")
@click.option("--outlier-source", metavar="PATH", type=str, help="Outliers are images of this dataset.")
@click.option("--outlier-class", metavar="INT", type=click.IntRange(min=0), help="... of this class, else left out.")
@click.option("--outliers-inverted", is_flag=True, default=None, help="... negatives of images of --source.")
@click.option(
    "--held-out", metavar="ZIP", type=str,
    help="Write images that were drawn in the same way and are not in the set, too: a control for outlier_study.py.",
)  # fmt: skip
@cli.resolution_option
@cli.workers_option
@cli.seed_option
@report_errors
def main(
    source: str,
    dest: str,
    max_images: int | None,
    uneven: bool,
    num_duplicates: int | None,
    copies: int | None,
    noise: float | None,
    jitter: int | None,
    num_outliers: int | None,
    outlier_source: str | None,
    outlier_class: int | None,
    outliers_inverted: bool | None,
    held_out: str | None,
    resolution: tuple[int, int] | None,
    workers: int,
    seed: int,
) -> None:
    """Add duplicates and outliers to a dataset, and record the group of each image in dataset.json.

    The images of --source come first (all, or the class-balanced --max-images of them), then the copies, then
    the outliers. --duplicates images are chosen at random, and --copies copies of each are added: exact ones,
    or near ones with --noise (standard deviation, rounded and clipped) and --jitter (shift). With --copies=0 the
    same images are marked but not copied: a reference for mem_ratio.py, in which a duplicated image has one
    nearest neighbour and not two at the same distance.

    \b
    Outliers are one of
      --outlier-source=PATH   random images of another dataset, cut, scaled and made gray or RGB to fit;
                              they get a label of their own, the largest one plus 1
      --outlier-class=C       random images of class C, which is otherwise left out
      --outliers-inverted     negatives of random images of the dataset

    --held-out=ZIP also writes another draw of the same kind, which the set has nothing of: as many images
    of --source, of the same classes, as many of them marked as duplicates and there once, and as many
    outliers, each image with its group. Training never sees them, so that what counts as a copy of them
    does by chance. The set itself is the same with and without.

    \b
    dataset.json then holds
      "groups"    [name, group] of every image: "inlier", "duplicate" (the copies and the image that
                  they copy: it is in the set more than once, too) or "outlier"; an image of --source
                  that has a group keeps it, unless it is now duplicated
      "origins"   [name, origin] of every added image: the name of the image that it copies or inverts,
                  or where an outlier came from

    \b
    Examples:
      python dataset_utils/dataset_inject.py --source=digits --dest=datasets/digits-dup.zip \\
          --max-images=1000 --duplicates=50 --copies=9
      python dataset_utils/dataset_inject.py --source=cifar-10-python.tar.gz --max-images=1000 \\
          --dest=datasets/cifar10-inject.zip --duplicates=50 --copies=4 --jitter=1 --noise=4 \\
          --outliers=50 --outlier-source=train-images-idx3-ubyte.gz
      python dataset_utils/dataset_inject.py --source=digits --max-images=60 --dest=datasets/digits-60.zip \\
          --duplicates=6 --copies=4 --outliers=6 --outliers-inverted --held-out=datasets/digits-60-other.zip
    """
    _check_options(
        {
            "--duplicates": num_duplicates, "--copies": copies, "--noise": noise, "--jitter": jitter,
            "--outliers": num_outliers, "--outlier-source": outlier_source, "--outlier-class": outlier_class,
            "--outliers-inverted": outliers_inverted,
        }
    )  # fmt: skip
    if held_out is not None:
        if not held_out.endswith(".zip"):
            raise click.UsageError(f"--held-out={held_out} is no name of a zip; it must end in .zip.")
        check_file(held_out, "--held-out")
        if os.path.realpath(held_out) == os.path.realpath(dest):
            raise click.UsageError("--held-out and --dest are one file; the held-out images are no part of the set.")
    scale_image = make_transform(None, resolution)
    with contextlib.ExitStack() as stack:
        base = stack.enter_context(open_source(source))
        other = None if outlier_source is None else stack.enter_context(open_source(outlier_source))
        if outlier_class is not None:
            base, other = without_class(base, outlier_class)
        whole = base
        if max_images is not None:
            base = subsets.subset(base, max_images, uneven)
        held_out_base = beyond(whole, base, uneven) if held_out is not None else None
        if outlier_source is not None:
            other.labels = labels_of_their_own(base, len(other))

        def extend(part: Source, number: int, held_out: bool) -> tuple[Source, list[list[str]]]:
            """Add duplicates, `number` of each, and outliers; a held-out part gets other outliers."""
            part = part.map(lambda _, image: scale_image(image))
            chosen = choose(len(part), num_duplicates or 0, seed, 1, "images to duplicate")
            additions = [duplicates(part, chosen, number, noise or 0.0, jitter or 0, seed)]
            if other is not None:
                which = choose(len(other), num_outliers, seed, 3, "outliers")
                if held_out:
                    rest = sorted(set(range(len(other))) - set(which))
                    which = [rest[i] for i in choose(len(rest), num_outliers, seed, 4, "held-out outliers")]
                additions.append(outliers(other, outlier_source or source, which, part.read(0)))
            elif outliers_inverted:
                additions.append(inverted(part, num_outliers, seed))
            return inject(part, chosen, additions)

        images, origins = extend(base, 1 if copies is None else copies, held_out=False)
        control = None
        if held_out_base is not None:  # what cannot be is said before anything is written
            control = not_in(extend(held_out_base, 0, held_out=True)[0], images)
            if len(control) == 0:
                raise ValueError("--held-out: every image that could be held out is in the set, too.")
        cli.write_and_report(images, dest, workers=workers, metadata={"origins": origins})
        if control is not None:
            cli.write_and_report(control, held_out, workers=workers)


if __name__ == "__main__":
    main()
