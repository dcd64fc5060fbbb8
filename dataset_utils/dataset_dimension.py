"""Factor data dimension: a class-balanced subset at another resolution."""

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
    """Take the subset that dataset_size.py takes, scaled to --resolution with a Lanczos filter.

    --source is what dataset_tool.py reads; without labels its first images are taken. The same --max-images
    gives the same images at every resolution.

    \b
    Example:
      python dataset_utils/dataset_dimension.py --source=cifar-10-python.tar.gz \\
          --dest=datasets/cifar10-16x16-1000.zip --resolution=16x16 --max-images=1000
    """
    if resolution is None:
        raise click.UsageError("--resolution is missing: the size of the images, for example 16x16.")
    transform_image = make_transform(transform, resolution)
    with open_source(source) as images:
        chosen = subsets.subset(images, max_images, uneven)
        cli.write_and_report(chosen, dest, transform=transform_image, workers=workers)


if __name__ == "__main__":
    main()
