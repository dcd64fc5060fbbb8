"""Factor number of classes (inter-diversity): the same |D| from fewer classes."""

import click

from dataset_utils import cli, subsets
from dataset_utils.sources import NOT_CHOSEN, open_source
from dataset_utils.transforms import make_transform
from dnnlib.cli import report_errors


@click.command()
@cli.subset_options
@click.option("--num-classes", metavar="INT", type=click.IntRange(min=1), required=True, help="Number of classes C.")
@report_errors
def main(
    source: str,
    dest: str,
    max_images: int | None,
    transform: str | None,
    resolution: tuple[int, int] | None,
    workers: int,
    num_classes: int,
) -> None:
    """Take N images of the first C classes: N // C of each, the last class takes the remainder.

    --source is what dataset_tool.py reads, with a label for every image. N is --max-images; without it the
    smallest of these classes decides. Labels stay as they are.

    \b
    Example:
      python dataset_utils/dataset_diversity.py --source=cifar-10-python.tar.gz \\
          --dest=datasets/cifar10-2classes-1000.zip --num-classes=2 --max-images=1000
    """
    transform_image = make_transform(transform, resolution)
    with open_source(source) as images:
        chosen = images.select(
            subsets.first_classes(images.require_labels(), num_classes, max_images), left_out=NOT_CHOSEN
        )
        cli.write_and_report(chosen, dest, transform=transform_image, workers=workers)


if __name__ == "__main__":
    main()
