"""Factor |D|: a class-balanced subset of a labelled source."""

import click

from dataset_utils import cli, subsets
from dataset_utils.sources import NOT_CHOSEN, open_source
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
    """Take a class-balanced subset: the first N/C images of each of the C classes, in class order.

    --source is what dataset_tool.py reads, with a label for every image. N is --max-images; without it the
    smallest class decides.

    \b
    Example:
      python dataset_utils/dataset_size.py --source=cifar-10-python.tar.gz \\
          --dest=datasets/cifar10-1000.zip --max-images=1000
    """
    transform_image = make_transform(transform, resolution)
    with open_source(source) as images:
        chosen = images.select(subsets.balanced(images.require_labels(), max_images, uneven), left_out=NOT_CHOSEN)
        cli.write_and_report(chosen, dest, transform=transform_image, workers=workers)


if __name__ == "__main__":
    main()
