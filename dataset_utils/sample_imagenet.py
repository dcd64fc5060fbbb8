"""Factor intra-diversity, first step: a list of ImageNet images of dogs, cats or birds."""

import csv
import os
from pathlib import Path

import click
import numpy as np

from dataset_utils import cli
from dnnlib.cli import report_errors
from dnnlib.images import ImageFiles
from dnnlib.util import atomic_write, check_file

CLASSES = ("dog", "cat", "bird")
ROOT = "datasets/imagenet/data/ILSVRC/Data/CLS-LOC/train"  # where the published script looks
SYNSETS = Path(__file__).with_name("imagenet_synsets.csv")


def read_synsets(class_name: str) -> list[str]:
    """Return the WordNet ids of the ImageNet classes that are dogs, cats or birds, in order."""
    with SYNSETS.open(encoding="utf-8", newline="") as file:
        rows = csv.DictReader(line for line in file if not line.startswith("#"))
        return [row["wnid"] for row in rows if row["class"] == class_name]


def sample_paths(folders: list[Path], count: int, seed: int) -> list[str]:
    """Choose images at random, evenly from all folders, in random order.

    Parameters
    ----------
    folders : one per ImageNet class; where their number does not divide `count`, the first give one more
    count : number of images
    seed : of the choice; it depends on nothing else but the names of folders and images

    Raises
    ------
    ValueError
        If a folder holds no images, or all together hold fewer than `count`.
    """
    shuffled = []
    for folder in folders:
        names = ImageFiles(folder).names
        order = np.random.RandomState([seed, int(folder.name[1:])]).permutation(len(names))
        shuffled.append([str(folder / names[i]) for i in order])
    total = sum(map(len, shuffled))
    if count > total:
        raise ValueError(f"{count} images are asked for, but the {len(folders)} folders hold only {total}.")
    ranks = range(max(map(len, shuffled)))
    chosen = [paths[rank] for rank in ranks for paths in shuffled if rank < len(paths)][:count]
    return [chosen[i] for i in np.random.RandomState([seed, 0]).permutation(count)]


@click.command()
@click.option(
    "--root",
    metavar="DIR",
    type=str,
    default=ROOT,
    show_default=True,
    help="Holds the folders n02085620, ... of ImageNet.",
)
@click.option(
    "--class", "class_name", type=click.Choice(CLASSES), default="dog", show_default=True, help="What is on the images."
)
@click.option(
    "--num-samples",
    metavar="INT",
    type=click.IntRange(min=1),
    default=2000,
    show_default=True,
    help="Number of images.",
)
@click.option(
    "--dest",
    metavar="FILE",
    type=str,
    default=None,
    help="Text file (.txt) to write.  [default: datasets/imagenet/CLASS_NUM.txt]",
)
@cli.seed_option
@report_errors
def main(root: str, class_name: str, num_samples: int, dest: str | None, seed: int) -> None:
    """Choose ImageNet images of one kind, evenly from all its classes, and write their paths to a text file.

    123 ImageNet classes are dogs, 13 cats and 17 birds; imagenet_synsets.csv lists them. What is written, one
    path per line in random order, is a source for intra_diversity.py and dataset_tool.py. Nothing is decoded.

    \b
    Example:
      python dataset_utils/sample_imagenet.py --root=ILSVRC/Data/CLS-LOC/train \\
          --class=dog --num-samples=2000 --dest=datasets/dog_2000.txt
    """
    dest = dest or f"datasets/imagenet/{class_name}_{num_samples}.txt"  # as the published page names it
    if not dest.lower().endswith(".txt"):
        raise click.UsageError(f'--dest is a list of paths: "{dest}" must end in .txt.')
    check_file(dest, "--dest")
    if not os.path.isdir(root):
        raise NotADirectoryError(f'--root: "{root}" is no folder.')
    synsets = read_synsets(class_name)
    folders = [path for path in (Path(os.path.abspath(root)) / wnid for wnid in synsets) if path.is_dir()]
    if not folders:
        raise ValueError(f'"{root}" holds none of the {len(synsets)} folders of ImageNet that are {class_name}s.')
    paths = sample_paths(folders, num_samples, seed)
    with atomic_write(dest, "w") as file:
        file.writelines(f"{path}\n" for path in paths)
    click.echo(f'Wrote {len(paths)} paths from {len(folders)} of {len(synsets)} {class_name} classes to "{dest}".')


if __name__ == "__main__":
    main()
