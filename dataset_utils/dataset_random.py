"""Factor conditioning: the class-balanced subset with random labels."""

import click

from dataset_utils import cli, subsets
from dataset_utils.sources import open_source
from dataset_utils.transforms import make_transform
from dnnlib.cli import report_errors


@click.command()
@cli.subset_options
@cli.uneven_option
@click.option("--num-classes", metavar="INT", type=click.IntRange(min=1), required=True, help="Number of classes C.")
@cli.seed_option
@report_errors
def main(
    source: str,
    dest: str,
    max_images: int | None,
    transform: str | None,
    resolution: tuple[int, int] | None,
    workers: int,
    uneven: bool,
    num_classes: int,
    seed: int,
) -> None:
    """Take the subset that dataset_size.py takes, and give each image one of C classes at random.

    --source is what dataset_tool.py reads; without labels its first images are taken, and without --max-images all
    images, as they are. The labels are those of
    the published script: Python's random.seed(1024), then randint(0, C-1) for one image after the other.

    \b
    Example:
      python dataset_utils/dataset_random.py --source=cifar-10-python.tar.gz \\
          --dest=datasets/cifar10-random10-1000.zip --num-classes=10 --max-images=1000
    """
    transform_image = make_transform(transform, resolution)
    with open_source(source) as images:
        chosen = images if max_images is None else subsets.subset(images, max_images, uneven)
        labels = subsets.random_labels(len(chosen), num_classes, seed)
        labelled = chosen.select(range(len(chosen)), labels)
        cli.write_and_report(labelled, dest, transform=transform_image, workers=workers)


if __name__ == "__main__":
    main()
