"""Factor conditioning: the class-balanced subset with a label of its own for each image."""

import click

from dataset_utils import cli, subsets
from dataset_utils.sources import open_source
from dataset_utils.transforms import make_transform
from dnnlib.cli import report_errors


@click.command()
@cli.subset_options
@cli.uneven_option
@report_errors
def main(
    source: str,
    dest: str,
    max_images: int | None,
    transform: str | None,
    resolution: tuple[int, int] | None,
    workers: int,
    uneven: bool,
) -> None:
    """Take the subset that dataset_size.py takes, and label each image with its index.

    --source is what dataset_tool.py reads; without labels its first images are taken, and without --max-images all
    images, as they are.

    \b
    Example:
      python dataset_utils/dataset_unique.py --source=cifar-10-python.tar.gz \\
          --dest=datasets/cifar10-unique-1000.zip --max-images=1000
    """
    transform_image = make_transform(transform, resolution)
    with open_source(source) as images:
        chosen = images if max_images is None else subsets.subset(images, max_images, uneven)
        labelled = chosen.select(range(len(chosen)), range(len(chosen)))
        cli.write_and_report(labelled, dest, transform=transform_image, workers=workers)


if __name__ == "__main__":
    main()
