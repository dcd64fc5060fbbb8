"""Convert images from where they are published into the dataset zip that training reads."""

import re
from dataclasses import replace

import click

from dataset_utils import cli, subsets
from dataset_utils.crops import MAX_CROPS, cut_crops
from dataset_utils.sources import CLASS_ORDERS, open_source
from dataset_utils.transforms import make_transform
from dnnlib.cli import report_errors


class Part(click.ParamType):
    """Command-line type of ``K/N``, the K-th of N parts, counted from 0."""

    name = "K/N"

    def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, int]:
        match = re.fullmatch(r"(\d{1,6})/(\d{1,6})", value, flags=re.ASCII)
        if not match or int(match[1]) >= int(match[2]):
            self.fail(f'"{value}" is no part; the halves of a set are 0/2 and 1/2.', param, ctx)
        return int(match[1]), int(match[2])


@click.command()
@cli.source_option
@cli.dest_option
@click.option("--max-images", metavar="INT", type=click.IntRange(min=1), help="Take the first so many images.")
@click.option(
    "--split", metavar="K/N", type=Part(),
    help="Take every N-th image beginning with number K (from 0), before --max-images: parts without a common image.",
)  # fmt: skip
@cli.transform_option
@cli.resolution_option
@cli.workers_option
@click.option(
    "--class-order",
    type=click.Choice(CLASS_ORDERS),
    default="natural",
    show_default=True,
    help="Number class folders with 2 before 10 (natural), or in the order of the names as text (published).",
)
@click.option(
    "--classes",
    type=click.Choice(["folders", "prefixes"]),
    default="folders",
    show_default=True,
    help="Without a dataset.json: classes are the top-level folders, or the file names up to the first underscore.",
)
@click.option("--coarse", is_flag=True, help="Take the 20 coarse labels of CIFAR-100 instead of its 100 fine ones.")
@click.option(
    "--crops", metavar="INT", type=click.IntRange(1, MAX_CROPS),
    help="Cut so many squares, side by side, out of each image; needs --resolution.",
)  # fmt: skip
@click.option("--grayscale", is_flag=True, help="Make RGB gray, one channel (L of ITU-R 601-2).")
@report_errors
def main(
    source: str,
    dest: str,
    max_images: int | None,
    split: tuple[int, int] | None,
    transform: str | None,
    resolution: tuple[int, int] | None,
    workers: int,
    class_order: str,
    classes: str,
    coarse: bool,
    crops: int | None,
    grayscale: bool,
) -> None:
    """Convert images into a dataset: a zip or folder of equal square PNGs with class labels.

    What --source is follows from its name:

    \b
    digits, sklearn:digits        scikit-learn's 1797 handwritten digits, 8x8
    *.tar.gz                      CIFAR-10 or -100, cifar-10-python.tar.gz,
                                  or the unpacked folder
    *-images-idx3-ubyte.gz        MNIST, Fashion-MNIST; labels beside it;
                                  28x28 is padded with black to 32x32;
                                  also unpacked, and the folder they are in
    *.npz                         arrays images and labels
    *_lmdb/                       LSUN category
    *.txt                         one image path per line
    *.zip, *.tar                  all images in it
    *.parquet                     dataset of Hugging Face, or the folder it
                                  is in (columns image and label); needs
                                  pyarrow
    any other folder              all images in it and its subfolders

    \b
    Examples:
      python dataset_tool.py --source=digits --dest=datasets/digits.zip
      python dataset_tool.py --source=cifar-10-python.tar.gz \\
          --dest=datasets/cifar10-16x16.zip --resolution=16x16
      python dataset_tool.py --source=train-images-idx3-ubyte.gz \\
          --dest=datasets/mnist.zip --max-images=1000
      python dataset_tool.py --source=lsun/cat_lmdb --dest=datasets/lsun-cat.zip \\
          --transform=center-crop-wide --resolution=512x384 --workers=4
      python dataset_tool.py --source=imagenet-dogs.txt --dest=datasets/dogs.zip \\
          --transform=center-crop --resolution=32x32
      python dataset_tool.py --source=photos/ --dest=datasets/photos.zip \\
          --transform=center-crop --resolution=64x64
      python dataset_tool.py --source=datasets/photos.zip --dest=datasets/photos-8.zip \\
          --resolution=8x8
      python dataset_tool.py --source=photos/ --dest=datasets/patches.zip \\
          --crops=16 --resolution=64x64
      python dataset_tool.py --source=digits --dest=half-a.zip --split=0/2
      python dataset_tool.py --source=digits --dest=half-b.zip --split=1/2

    Images must come out square, all of one size that is a power of two, and all gray or all RGB; 8 bits
    per channel, no transparency. --resolution scales with a Lanczos filter. --transform=center-crop first
    cuts the largest square out of the middle. center-crop-wide cuts a strip out of the middle, scales it
    to WxH and lays it on a black square of side W; images that are too small are dropped, and their
    numbers are missing in the names. Both make RGB of gray; --grayscale makes gray of RGB, last of all.
    --crops=N cuts N equal squares, as large as fit side by side, out of the middle of each image; those that
    are smaller than the resolution are dropped.

    Labels come with the source. For a folder or zip they stand in its dataset.json,
    {"labels": [["00000/img00000000.png", 6], ...]}, or, if there is no such file, follow from the
    top-level folders in the order of their names (--class-order). They are written only if every image
    has one. What is left out is counted, printed and recorded in dataset.json.
    Groups that a dataset.json names (see dataset_utils/dataset_inject.py) are kept.

    An existing zip is replaced, an existing folder must be empty. After an error nothing is left behind.
    """
    transform_image = make_transform(transform, resolution)
    if crops is not None:
        if resolution is None or transform == "center-crop-wide":
            raise click.UsageError("--crops needs --resolution, for example 64x64, and not center-crop-wide.")
        transform_image = replace(transform_image, crops=crops)
    transform_image = replace(transform_image, grayscale=grayscale)
    with open_source(source, max_images if split is None else None, class_order, coarse, classes) as images:
        images = images if split is None else subsets.part(images, *split, max_images)
        images = cut_crops(images, crops) if crops is not None else images
        cli.write_and_report(images, dest, transform=transform_image, workers=workers)


if __name__ == "__main__":
    main()
