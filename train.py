"""Train a diffusion model on a dataset zip or folder."""

import json
import re
import sys
from pathlib import Path
from typing import Any

import click
import torch

from dnnlib import EasyDict
from dnnlib.cli import IntList, report_errors
from dnnlib.util import Logger, atomic_write
from torch_utils import distributed as dist
from training.augment import edm_augment_pipe
from training.checkpoint import load_state
from training.dataset import ImageFolderDataset
from training.networks import build_network
from training.options import device_option
from training.snapshot import load_network
from training.training_loop import OPTIMIZERS, split_batch, training_loop

EXIT_STOPPED = 75  # a signal ended the run early and its state is saved (EX_TEMPFAIL: try again)

FRACTION = click.FloatRange(min=0, max=1)
POSITIVE = click.FloatRange(min=0, min_open=True)
COUNT = click.IntRange(min=1)


@click.command(context_settings=dict(max_content_width=120))
# Main options.
@click.option("--outdir", help="Where to save the results", metavar="DIR", required=True)
@click.option("--data", help="Path to the dataset", metavar="ZIP|DIR", required=True)
@click.option(
    "--cond", help="Train class-conditional model", metavar="BOOL", type=bool, default=False, show_default=True
)
@click.option(
    "--arch",
    help="Network architecture",
    metavar="ddpmpp|ncsnpp|adm",
    type=click.Choice(["ddpmpp", "ncsnpp", "adm"]),
    default="ddpmpp",
    show_default=True,
)
@click.option(
    "--precond",
    help="Preconditioning & loss function",
    metavar="vp|ve|edm",
    type=click.Choice(["vp", "ve", "edm"]),
    default="edm",
    show_default=True,
)
# Hyperparameters.
@click.option(
    "--duration",
    help="Training duration as if |D| were 50,000; epochs / 20",
    metavar="MIMG",
    type=POSITIVE,
    default=200,
    show_default=True,
)
@click.option("--batch", help="Total batch size", metavar="INT", type=COUNT, default=512, show_default=True)
@click.option("--batch-gpu", help="Limit batch size per process, by gradient accumulation", metavar="INT", type=COUNT)
@click.option(
    "--cbase", help="Number of network channels, like --num-channels  [default: varies]", metavar="INT", type=COUNT
)
@click.option(
    "--cres",
    help="Channels per resolution, times the number of channels  [default: varies]",
    metavar="LIST",
    type=IntList(),
)
@click.option("--lr", help="Learning rate", metavar="FLOAT", type=POSITIVE, default=10e-4, show_default=True)
@click.option(
    "--ema",
    help="EMA half-life as if |D| were 50,000",
    metavar="MIMG",
    type=click.FloatRange(min=0),
    default=0.5,
    show_default=True,
)
@click.option("--dropout", help="Dropout probability", metavar="FLOAT", type=FRACTION, default=0.13, show_default=True)
@click.option(
    "--augment", help="Augment probability, 0 = none", metavar="FLOAT", type=FRACTION, default=0.12, show_default=True
)
@click.option("--xflip", help="Enable dataset x-flips", metavar="BOOL", type=bool, default=False, show_default=True)
@click.option(
    "--window-size",
    help="Shuffling window of the data order, 0 = the same order in each epoch",
    metavar="FLOAT",
    type=FRACTION,
    default=0.5,
    show_default=True,
)
@click.option("--num-blocks", help="Residual blocks per resolution  [default: 4; adm: 3]", metavar="INT", type=COUNT)
@click.option("--num-channels", help="Number of network channels  [default: 128; adm: 192]", metavar="INT", type=COUNT)
@click.option(
    "--embed",
    help="Time embedding (ddpmpp, ncsnpp)",
    metavar="positional|fourier",
    type=click.Choice(["positional", "fourier"]),
    default="positional",
    show_default=True,
)
@click.option(
    "--attn-resolutions", help="Resolutions with attention  [default: 16; adm: 32,16,8]", metavar="LIST", type=IntList()
)
@click.option(
    "--ema_mode",
    help="How to adjust the EMA ratio",
    metavar="mode1|mode2|mode3|mode4",
    type=click.Choice(["mode1", "mode2", "mode3", "mode4"]),
    default="mode2",
    show_default=True,
)
@click.option(
    "--skip-connections",
    help="A 0 or 1 per skip connection, high resolution first  [default: all 1]",
    metavar="LIST",
    type=IntList(),
)
@click.option("--weight-decay", help="Weight decay", metavar="FLOAT", type=FRACTION, default=0.0, show_default=True)
@click.option(
    "--final-ema", help="Final EMA ratio, for mode4", metavar="FLOAT", type=FRACTION, default=0.99929, show_default=True
)
@click.option(
    "--optimizer",
    help="Optimizer",
    metavar="Adam|SGD",
    type=click.Choice(list(OPTIMIZERS)),
    default="Adam",
    show_default=True,
)
@click.option("--momentum", help="Momentum for SGD", metavar="FLOAT", type=FRACTION, default=0.9, show_default=True)
# Performance-related.
@click.option(
    "--fp16", help="Enable mixed-precision training (CUDA)", metavar="BOOL", type=bool, default=False, show_default=True
)
@click.option("--ls", help="Loss scaling", metavar="FLOAT", type=POSITIVE, default=1, show_default=True)
@click.option("--bench", help="Enable cuDNN benchmarking", metavar="BOOL", type=bool, default=True, show_default=True)
@click.option(
    "--cache",
    help="Hold the dataset in memory, on the device, if it fits",
    metavar="BOOL",
    type=bool,
    default=True,
    show_default=True,
)
@click.option(
    "--workers", help="Loader processes, if it does not", metavar="INT", type=COUNT, default=1, show_default=True
)
@device_option
# I/O-related.
@click.option("--desc", help="String to include in result dir name", metavar="STR")
@click.option("--nosubdir", help="Do not create a subdirectory for results", is_flag=True)
@click.option("--tick", help="How often to print progress", metavar="KIMG", type=COUNT, default=50, show_default=True)
@click.option("--snap", help="How often to save snapshots", metavar="TICKS", type=COUNT, default=50, show_default=True)
@click.option("--dump", help="How often to dump state", metavar="TICKS", type=COUNT, default=500, show_default=True)
@click.option("--seed", help="Random seed  [default: random]", metavar="INT", type=click.IntRange(min=0))
@click.option("--transfer", help="Start from the weights of a network snapshot", metavar="SNAPSHOT|URL")
@click.option("--resume", help="Continue from a training state", metavar="PT")
@click.option("-n", "--dry-run", help="Print training options and exit", is_flag=True)
@report_errors
def main(**kwargs: Any) -> None:
    """Train a diffusion model, for the study of memorization.

    Durations scale with the size of the training set |D|, so that the same --duration is the same number of
    epochs (20 times --duration) for every |D|.

    Examples:

    \b
    # The basic setting of the study, with 8 GPUs
    torchrun --standalone --nproc_per_node=8 train.py --outdir=training-runs --data=datasets/cifar10-1000.zip \\
        --precond=vp --num-blocks=2 --augment=0 --window-size=0 --lr=2e-4 --duration=2000 --seed=1024

    \b
    # A small model on a laptop
    python train.py --outdir=training-runs --data=datasets/digits-64.zip --cres=2,2 --num-channels=8 \\
        --num-blocks=1 --attn-resolutions=4 --batch=16 --augment=0 --duration=40 --tick=1
    """  # noqa: D301
    opts = EasyDict(kwargs)
    device = dist.init(opts.device)
    try:
        c = loop_arguments(opts, device)
        run_dir = dist.broadcast(pick_run_dir(opts, c) if dist.get_rank() == 0 else None)
        print_options(opts, c, run_dir, device)
        if opts.dry_run:
            dist.print0("Dry run; exiting.")
            return
        if dist.get_rank() == 0:
            run_dir.mkdir(parents=True, exist_ok=opts.nosubdir)
            with atomic_write(run_dir / "training_options.json", "w") as file:
                json.dump(recorded_options(opts, c), file, indent=2)
            with Logger(run_dir / "log.txt"):
                complete = training_loop(run_dir=run_dir, device=device, **c)
        else:
            complete = training_loop(run_dir=run_dir, device=device, **c)
    finally:
        dist.shutdown()
    if not complete:
        sys.exit(EXIT_STOPPED)


def loop_arguments(opts: EasyDict, device: torch.device) -> EasyDict:
    """Turn command-line options into arguments of the training loop; wrong ones are a ClickException."""
    if opts.fp16 and device.type != "cuda":
        raise click.ClickException("--fp16=1 needs a CUDA device; leave it out on the CPU.")
    if opts.transfer is not None and opts.resume is not None:
        raise click.ClickException("--transfer and --resume exclude each other: the state holds its own weights.")
    split_batch(opts.batch, opts.batch_gpu, dist.get_world_size())

    c = EasyDict()
    dataset = ImageFolderDataset(opts.data, use_labels=opts.cond, xflip=opts.xflip)
    if opts.cond and dataset.has_labels and dataset.label_dim < 2:
        dist.print0("Note: --cond=1 with a single class.")
    c.dataset_kwargs = dict(
        path=opts.data, resolution=dataset.resolution, max_size=len(dataset), use_labels=opts.cond, xflip=opts.xflip,
        cache=opts.cache,
    )  # fmt: skip
    c.network_kwargs = network_arguments(opts)
    c.loss = opts.precond
    c.optimizer_kwargs = dict(class_name=opts.optimizer, lr=opts.lr, weight_decay=opts.weight_decay)
    if opts.optimizer == "Adam":
        c.optimizer_kwargs.update(betas=[0.9, 0.999], eps=1e-8)
    else:
        c.optimizer_kwargs.update(momentum=opts.momentum)

    # Durations, in images: the published formulas are for |D| = 50,000 and scale with |D|.
    size = len(dataset)
    c.total_nimg = max(round(opts.duration * 20 * size), 1000)
    c.ema_halflife_nimg = opts.ema * 20 * size
    c.lr_rampup_nimg = 200 * size
    c.ema_rampup_ratio = None if opts.transfer is not None else 0.05
    c.update(ema_mode=opts.ema_mode, final_ema=opts.final_ema, augment=opts.augment, window_size=opts.window_size)
    c.update(batch_size=opts.batch, batch_gpu=opts.batch_gpu, loss_scaling=opts.ls, cudnn_benchmark=opts.bench)
    c.update(kimg_per_tick=opts.tick, snapshot_ticks=opts.snap, state_dump_ticks=opts.dump, num_workers=opts.workers)
    c.update(transfer=opts.transfer, resume=opts.resume)
    c.seed = dist.broadcast(opts.seed if opts.seed is not None else int(torch.randint(1 << 31, []).item()))

    # What cannot be built or read is an error now, not after the run folder is made.
    if opts.transfer is not None:
        load_network(opts.transfer)
    if opts.resume is not None:
        load_state(opts.resume)
    with torch.device("meta"):
        build_network(
            **{**c.network_kwargs, "img_resolution": dataset.resolution, "img_channels": dataset.num_channels},
            label_dim=dataset.label_dim, augment_dim=edm_augment_pipe(1).label_dim if opts.augment else 0,
        )  # fmt: skip
    return c


def network_arguments(opts: EasyDict) -> dict:
    """Arguments of `build_network` for --arch and --precond, but for those that the dataset decides."""
    network = dict(class_name=dict(vp="VPPrecond", ve="VEPrecond", edm="EDMPrecond")[opts.precond])
    if opts.arch == "adm":
        if opts.skip_connections is not None:
            raise click.ClickException("--skip-connections belongs to --arch=ddpmpp and ncsnpp, not to adm.")
        network.update(model_type="DhariwalUNet", model_channels=opts.num_channels or 192, channel_mult=[1, 2, 3, 4])
        network.update(num_blocks=opts.num_blocks or 3, attn_resolutions=opts.attn_resolutions or [32, 16, 8])
    else:
        ncsnpp = opts.arch == "ncsnpp"
        network.update(model_type="SongUNet", embedding_type=opts.embed, decoder_type="standard")
        network.update(encoder_type="residual" if ncsnpp else "standard", channel_mult_noise=2 if ncsnpp else 1)
        network.update(resample_filter=[1, 3, 3, 1] if ncsnpp else [1, 1], channel_mult=[2, 2, 2])
        network.update(model_channels=opts.num_channels or 128, num_blocks=opts.num_blocks or 4)
        network.update(attn_resolutions=opts.attn_resolutions or [16])
    if opts.cbase is not None:
        network.update(model_channels=opts.cbase)
    if opts.cres is not None:
        network.update(channel_mult=opts.cres)
    if opts.arch != "adm":
        count = (network["num_blocks"] + 1) * len(network["channel_mult"])
        network.update(skip_connections=opts.skip_connections or [1] * count)
    return dict(network, dropout=opts.dropout, use_fp16=opts.fp16)


def pick_run_dir(opts: EasyDict, c: EasyDict) -> Path:
    """--outdir itself with --nosubdir, else its next numbered subfolder."""
    outdir = Path(opts.outdir)
    if outdir.exists() and not outdir.is_dir():
        raise click.ClickException(f'--outdir: "{outdir}" is a file; name a folder.')
    if opts.nosubdir:
        return outdir
    runs = [p.name for p in outdir.iterdir() if p.is_dir()] if outdir.is_dir() else []
    numbers = [int(match[0]) for match in (re.match(r"\d+", name) for name in runs) if match]
    cond = "cond" if opts.cond else "uncond"
    dtype = "fp16" if opts.fp16 else "fp32"
    name = f"{max(numbers, default=-1) + 1:05d}-{Path(opts.data).stem}-{cond}-{opts.arch}-{opts.precond}"
    name += f"-gpus{dist.get_world_size()}-batch{c.batch_size}-{dtype}"
    return outdir / (name + (f"-{opts.desc}" if opts.desc is not None else ""))


def recorded_options(opts: EasyDict, c: EasyDict) -> dict:
    """What training_options.json holds: the loop's arguments, and the options they come from."""
    used = {k: opts[k] for k in ["arch", "precond", "cond", "duration", "ema", "num_blocks", "num_channels", "embed"]}
    return dict(used, total_kimg=c.total_nimg / 1000, num_processes=dist.get_world_size(), **c)


def print_options(opts: EasyDict, c: EasyDict, run_dir: Path, device: torch.device) -> None:
    size = c.dataset_kwargs["max_size"]
    dist.print0()
    dist.print0("Training options:")
    dist.print0(json.dumps(recorded_options(opts, c), indent=2))
    dist.print0()
    dist.print0(f"Output directory:        {run_dir}")
    dist.print0(f"Dataset path:            {opts.data}")
    dist.print0(f"Dataset size |D|:        {size}")
    dist.print0(f"Duration:                {c.total_nimg / 1000:g} kimg, {c.total_nimg / size:g} epochs")
    dist.print0(f"Class-conditional:       {opts.cond}")
    dist.print0(f"Network architecture:    {opts.arch}")
    dist.print0(f"Preconditioning & loss:  {opts.precond}")
    dist.print0(f"Optimizer:               {opts.optimizer}")
    dist.print0(f"Processes, device:       {dist.get_world_size()}, {device.type}")
    dist.print0(f"Batch size:              {c.batch_size}")
    dist.print0(f"Mixed-precision:         {opts.fp16}")
    dist.print0()


if __name__ == "__main__":
    main()
