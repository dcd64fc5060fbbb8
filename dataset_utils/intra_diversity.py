"""Factor intra-diversity: images of one class, a part of them replaced by more diverse images of the same kind."""

import contextlib
import math
import os

import click

from dataset_utils import cli, subsets
from dataset_utils.sources import NOT_CHOSEN, Source, concatenate, open_source
from dataset_utils.transforms import fit, make_transform
from dnnlib.cli import Float, report_errors

MIX = "datasets/imagenet/imagenet_dog_2000-32x32.zip"  # what the published page makes before it mixes


def one_class(source: Source, label: int | None, name: str, option: str) -> Source:
    """Return the images of class `label`; None takes all, if they are of one class or have no labels.

    Raises
    ------
    ValueError
        If there is no such class, or several and none is chosen; messages name `name` and `option`.
    """
    if label is not None:
        return source.select(subsets.of_class(source.require_labels(), label), left_out=NOT_CHOSEN)
    members = subsets.class_members(source.require_labels()) if source.labels is not None else {}
    if len(members) > 1:
        raise ValueError(f'"{name}" has {len(members)} classes; choose one by {option}.')
    return source


def mixture(source: Source, mix: Source | None, inter_rate: float, count: int | None = None) -> Source:
    """Return floor((1 - inter_rate) · count) images of `source`, then images of `mix`, each the first ones.

    Parameters
    ----------
    source : images of one class, all of one size
    mix : images of any size, cut and scaled to that of `source`, whose label they take over; None if alpha is 0
    inter_rate : alpha, the part of the result that comes from `mix`
    count : size of the result, None = as many images as `source` has

    Raises
    ------
    ValueError
        If either has too few images.
    """
    count = len(source) if count is None else count
    kept = math.floor((1 - inter_rate) * count + 1e-6)  # (1 - 0.8) * 2000 is 399.99999999999994
    base = _first(source, kept, "--source")
    if kept == count:
        return base
    first = source.read(0)
    size, channels = first.shape[0], 1 if first.ndim == 2 else 3
    mixed = _first(mix, count - kept, "--mix").map(lambda _, image: fit(image, size, channels))
    mixed.labels = None if source.labels is None else source.labels[:1] * len(mixed)
    return concatenate([base, mixed])


def _first(source: Source, count: int, option: str) -> Source:
    if count > len(source):
        there = f"there are only {len(source)}; see --max-images"
        raise ValueError(f"{count} images of {option} are needed, but {there}.")
    return source.select(range(count), left_out=NOT_CHOSEN)


@click.command()
@cli.subset_options
@click.option(
    "--class", "--class-num", "label", metavar="INT", type=click.IntRange(min=0), help="Class to take from --source."
)
@click.option(
    "--mix",
    metavar="PATH",
    type=str,
    help=f"More diverse images, such as a list of sample_imagenet.py.  [default: {MIX}]",
)
@click.option("--mix-class", metavar="INT", type=click.IntRange(min=0), help="Class to take from --mix.")
@click.option(
    "--inter-rate", metavar="FLOAT", type=Float(0, 1), default=0.0, show_default=True,
    help="Part of the result that comes from --mix, alpha.",
)  # fmt: skip
@report_errors
def main(
    source: str,
    dest: str,
    max_images: int | None,
    transform: str | None,
    resolution: tuple[int, int] | None,
    workers: int,
    label: int | None,
    mix: str | None,
    mix_class: int | None,
    inter_rate: float,
) -> None:
    """Mix images of one class with more diverse images of the same kind, as dogs of CIFAR-10 and ImageNet.

    Of the N images of the result (--max-images; default: as many as --source has of the class) the first
    (1 - alpha) N are the first of --source, the rest the first of --mix. Images of --mix are cut to the
    largest square in their middle and scaled to the size of --source, and gray or RGB as it is; then
    --transform and --resolution apply to all. All bear the label of --source, if it has labels.

    \b
    Example (5 is the class dog):
      python dataset_utils/intra_diversity.py --source=cifar-10-python.tar.gz --class=5 \\
          --mix=datasets/dog_2000.txt --inter-rate=0.5 --max-images=2000 \\
          --dest=datasets/mixture-0.5-2000.zip
    """
    transform_image = make_transform(transform, resolution)
    if mix is None and inter_rate > 0 and os.path.exists(MIX):
        mix = MIX
    if mix is None and (inter_rate > 0 or mix_class is not None):
        raise click.UsageError(
            f"--inter-rate and --mix-class need --mix, the images to mix in; there is no {MIX} either."
        )
    with contextlib.ExitStack() as stack:
        base = one_class(stack.enter_context(open_source(source)), label, source, "--class")
        other = mix and one_class(stack.enter_context(open_source(mix)), mix_class, mix, "--mix-class")
        images = mixture(base, other, inter_rate, max_images)
        cli.write_and_report(images, dest, transform=transform_image, workers=workers)


if __name__ == "__main__":
    main()
