"""Generate images from the closed-form optimum of a training set."""

from typing import Any

import click

from dnnlib.cli import report_errors
from torch_utils import distributed as dist
from training.generation import generate_to_folder
from training.optim import load_optimum
from training.options import (
    batch_option,
    class_option,
    device_option,
    sampler_options,
    seeds_option,
    subdirs_option,
)


@click.command(context_settings=dict(max_content_width=120))
@click.option("--network", help="Dataset whose optimum to sample", metavar="ZIP|DIR|NPZ|URL", required=True)
@click.option("--outdir", help="Where to save the images", metavar="DIR", required=True)
@click.option("--cond", help="Class-conditional optimum", metavar="BOOL", type=bool, default=False, show_default=True)
@seeds_option("0-63")
@subdirs_option
@class_option
@batch_option
@sampler_options
@device_option
@report_errors
def main(
    network: str,
    outdir: str,
    cond: bool,
    seeds: list[int],
    subdirs: bool,
    class_idx: int | None,
    batch: int,
    device: str,
    **sampler_kwargs: Any,
) -> None:
    """Generate images with the theoretical optimum of a dataset, which only replays training images.

    Example:

    \b
    torchrun --standalone --nproc_per_node=1 generate_optim.py --outdir=fid-tmp-optim --seeds=0-49999 --subdirs \\
        --network=datasets/cifar10/cifar10-train.zip
    """
    target = dist.init(device)
    try:
        dist.print0(f'Loading training images from "{network}"...')
        net = load_optimum(network, target, cond=cond or class_idx is not None)
        generate_to_folder(net, seeds, outdir, subdirs, batch=batch, class_idx=class_idx, sampler_kwargs=sampler_kwargs)
    finally:
        dist.shutdown()


if __name__ == "__main__":
    main()
