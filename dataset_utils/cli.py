"""What the command lines of Step I share: their options and the line in which they end."""

import re
from collections.abc import Callable
from typing import Any

import click

from dataset_utils.convert import describe, is_made_from, report, write_dataset
from dataset_utils.sources import Source
from dataset_utils.transforms import MODES, Transform, make_transform


class Resolution(click.ParamType):
    """Command-line type of ``WIDTHxHEIGHT`` or ``WIDTH,HEIGHT``."""

    name = "WxH"

    def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, int]:
        match = re.fullmatch(r"(\d{1,5})[x,](\d{1,5})", value, flags=re.ASCII)
        if not match:
            self.fail(f'"{value}" is no resolution; write for example 32x32.', param, ctx)
        return int(match[1]), int(match[2])


source_option = click.option(
    "--source", metavar="PATH", type=str, required=True, help="Where the images are, as in dataset_tool.py."
)
_REUSE = f"{__name__}.reuse"  # in the context: all scripts have this option, and `write_and_report` alone reads it


def dest_option(command: Callable) -> Callable:
    """Decorate with --dest and --reuse."""

    def keep(ctx: click.Context, param: click.Parameter, value: bool) -> None:
        ctx.meta[_REUSE] = value

    reuse = click.option(
        "--reuse", is_flag=True, expose_value=False, callback=keep,
        help="Leave --dest as it is where it was made from the same images and labels in the same way.",
    )  # fmt: skip
    dest = click.option("--dest", metavar="PATH", type=str, required=True, help="Zip (.zip) or folder to write.")
    return dest(reuse(command))


transform_option = click.option(
    "--transform", type=click.Choice(MODES), help="Crop before scaling; needs --resolution."
)
resolution_option = click.option("--resolution", type=Resolution(), help="Size to scale to, in pixels, as 32x32.")
workers_option = click.option(
    "--workers", metavar="INT", type=click.IntRange(1, 256), default=1, show_default=True,
    help="Threads that decode, scale and encode.",
)  # fmt: skip
max_images_option = click.option(
    "--max-images", metavar="INT", type=click.IntRange(min=1), help="Number of images; default: as many as there are."
)
uneven_option = click.option(
    "--uneven", is_flag=True, help="Where the classes cannot share equally, let the first ones have one image more."
)
seed_option = click.option(
    "--seed", metavar="INT", type=click.IntRange(0, (1 << 32) - 1), default=1024, show_default=True,
    help="Seed of the random choices.",
)  # fmt: skip


def subset_options(command: Callable) -> Callable:
    """Decorate with what every script has that takes a subset of a source: what the published scripts take."""
    for option in (
        workers_option, resolution_option, transform_option, max_images_option, dest_option, source_option
    ):  # fmt: skip
        command = option(command)
    return command


def write_and_report(
    images: Source,
    dest: str,
    *,
    transform: Transform | None = None,
    workers: int = 1,
    metadata: dict[str, Any] | None = None,
) -> None:
    """Write a dataset, and print a line that describes it and one that says what was left out.

    Arguments and errors are those of `convert.write_dataset`. With --reuse a dataset that is there already, made from
    the same source, is left as it is.
    """
    if click.get_current_context().meta[_REUSE] and is_made_from(dest, images, transform or make_transform(), workers):
        click.echo(f'Nothing is written: "{dest}" was made from the same {len(images)} images in the same way.')
        return
    archive = write_dataset(images, dest, transform=transform, workers=workers, metadata=metadata)
    click.echo("\n".join([f'Wrote {describe(archive)}, to "{dest}".', *report(images, archive)]))
