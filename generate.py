"""Generate images from a network snapshot."""

from typing import Any

import click

from dnnlib.cli import report_errors
from dnnlib.images import left_out_sentence
from torch_utils import distributed as dist
from training.generation import draw_all_classes, generate_to_folder
from training.options import (
    all_classes_option,
    batch_option,
    class_option,
    device_option,
    precision_options,
    sampler_options,
    seeds_option,
    subdirs_option,
)
from training.precision import check_precision, prepare_denoiser
from training.snapshots.snapshot import load_network


@click.command(context_settings=dict(max_content_width=120))
@click.option("--network", help="Snapshot to sample from", metavar="SNAPSHOT|URL", required=True)
@click.option("--outdir", help="Folder for the PNGs", metavar="DIR", required=True)
@seeds_option("0-63")
@subdirs_option
@class_option
@all_classes_option
@batch_option
@sampler_options
@precision_options
@device_option
@report_errors
def main(
    network: str,
    outdir: str,
    seeds: list[int],
    subdirs: bool,
    class_idx: int | None,
    all_classes: bool,
    batch: int,
    precision: str | None,
    compile: bool,
    device: str,
    **sampler_kwargs: Any,
) -> None:
    """Generate images with a trained network: a PNG per seed, the same image for a seed on any machine.

    Examples:

    \b
    # The first 64 seeds: out/000000.png to out/000063.png
    python generate.py --network=RUN/network-snapshot-002000.safetensors --outdir=out

    \b
    # 10,000 images with 8 GPUs, in folders of 1000
    torchrun --standalone --nproc_per_node=8 generate.py --network=RUN/network-snapshot-002000.safetensors \\
        --outdir=out --seeds=0-9999 --subdirs --batch=512
    """
    target = dist.init(device)
    try:
        check_precision(precision, target, compile)
        net = load_network(network, target)[0]
        if all_classes:
            draw_all_classes(net)
        empty = len(net.empty_classes) if class_idx is None else 0
        net = prepare_denoiser(net, precision, compile, target)
        generate_to_folder(net, seeds, outdir, subdirs, batch=batch, class_idx=class_idx, sampler_kwargs=sampler_kwargs)
        dist.print0(left_out_sentence({"classes of which training saw no image": empty}))
    finally:
        dist.shutdown()


if __name__ == "__main__":
    main()
