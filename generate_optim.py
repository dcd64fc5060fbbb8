"""Generate images from the closed-form optimum of a training set."""

from typing import Any

import click

from dnnlib.cli import report_errors
from dnnlib.images import left_out_sentence
from dnnlib.util import check_file, fetch
from torch_utils import distributed as dist
from training.dataset import files_left_out
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
from training.trace import PosteriorTrace


@click.command(context_settings=dict(max_content_width=120))
@click.option("--network", help="Dataset whose optimum to sample", metavar="ZIP|DIR|NPZ|URL", required=True)
@click.option("--outdir", help="Folder for the PNGs", metavar="DIR", required=True)
@click.option("--cond", help="Class-conditional optimum", metavar="BOOL", type=bool, default=False, show_default=True)
@click.option(
    "--ref-size", help="Use a new random subset of so many images at each call", metavar="INT",
    type=click.IntRange(min=1),
)  # fmt: skip
@click.option("--trace", help="Write sigma, effective number and nearest image per step and seed", metavar="CSV")
@click.option("--mmap", help="Read images from a memory-mapped decoded copy beside the zip", is_flag=True)
@click.option("--shard", help="Share the training images, not the seeds, among the processes", is_flag=True)
@click.option(
    "--skip", help="Skip images that provably carry no weight", metavar="BOOL", type=bool, default=True,
    show_default=True,
)  # fmt: skip
@click.option(
    "--dense", help="Compare with all images in few large operations, the fastest on a GPU  [default: on CUDA]",
    metavar="BOOL", type=bool,
)  # fmt: skip
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
    ref_size: int | None,
    trace: str | None,
    mmap: bool,
    shard: bool,
    skip: bool,
    dense: bool | None,
    seeds: list[int],
    subdirs: bool,
    class_idx: int | None,
    batch: int,
    device: str,
    **sampler_kwargs: Any,
) -> None:
    """Generate images with the theoretical optimum of a dataset, which only replays training images.

    Examples:

    \b
    # 50,000 images, in folders of 1000
    torchrun --standalone --nproc_per_node=1 generate_optim.py --outdir=fid-tmp-optim --seeds=0-49999 --subdirs \\
        --network=datasets/cifar10/cifar10-train.zip

    \b
    # A dataset too large for one GPU: each of 8 holds an eighth of it
    torchrun --standalone --nproc_per_node=8 generate_optim.py --outdir=out --mmap --shard \\
        --network=datasets/imagenet-64x64.zip
    """
    target = dist.init(device)
    try:
        if trace is not None:
            check_file(trace, "--trace")
        net = load_optimum(
            network, target, cond=cond or class_idx is not None, mmap=mmap, shard=shard, ref_size=ref_size, skip=skip,
            dense=dense,
        )  # fmt: skip
        recorder = PosteriorTrace(net) if trace is not None else None
        generate_to_folder(
            net, seeds, outdir, subdirs, on_batch=recorder.add if recorder else None, batch=batch, class_idx=class_idx,
            sampler_kwargs=sampler_kwargs,
        )  # fmt: skip
        if recorder:
            recorder.write(trace)
            dist.print0(f"Trace: {trace}")
        dist.print0(left_out_sentence(files_left_out(fetch(network))))
    finally:
        dist.shutdown()


if __name__ == "__main__":
    main()
