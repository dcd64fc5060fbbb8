"""Train a diffusion model on a dataset zip or folder."""

import contextlib
import itertools
import json
import os
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import torch
from click.core import ParameterSource

from dnnlib import EasyDict
from dnnlib.cli import Float, IntList, describe_error, report_errors
from dnnlib.repeats import Repeats
from dnnlib.util import Logger, atomic_write, check_folder
from dnnlib.versions import versions
from memorization.measure.monitor import MemorizationMonitor, stop_reason
from torch_utils import distributed as dist
from torch_utils.determinism import deterministic_algorithms
from training.dataset import ImageFolderDataset, describe_images
from training.fingerprint import array_sha256, dataset_sha256
from training.observer import Observer, SampleGrid
from training.options import device_option
from training.precision import PRECISIONS, check_precision, saved_precision
from training.run.checkpoint import latest_state, load_state
from training.run.events import check_tensorboard
from training.run.state import mark_failed, write_run_state
from training.snapshots.snapshot import check_tensors, list_snapshots, load_network
from training.training_loop import OPTIMIZERS, EndOfRun, check_state, make_network, split_batch, training_loop

LATEST = "latest"  # --resume: the newest whole training state
EXIT_STOPPED = 75  # a signal ended the run early and its state is saved (EX_TEMPFAIL: try again)

LOST_CONNECTION = re.compile(r"[Cc]onnection (closed|reset)|[Bb]roken pipe|[Tt]imed out|NCCL")

FRACTION = Float(min=0, max=1)
POSITIVE = Float(min=0, min_open=True)
COUNT = click.IntRange(min=1)
CHANNELS, BLOCKS = click.IntRange(1, 1 << 16), click.IntRange(1, 64)  # as in training.snapshots.arguments
SEED = click.IntRange(min=0, max=(1 << 32) - 1)  # what numpy takes


@click.command(context_settings=dict(max_content_width=120))
# What is trained on what.
@click.option("--outdir", help="Folder for the run folders", metavar="DIR", required=True)
@click.option("--data", help="Training images", metavar="ZIP|DIR", required=True)
@click.option("--cond", help="Condition on the labels", metavar="BOOL", type=bool, default=False, show_default=True)
@click.option(
    "--arch",
    help="U-Net: DDPM++, NCSN++ or ADM",
    metavar="ddpmpp|ncsnpp|adm",
    type=click.Choice(["ddpmpp", "ncsnpp", "adm"]),
    default="ddpmpp",
    show_default=True,
)
@click.option(
    "--precond",
    help="Preconditioning, with its loss",
    metavar="vp|ve|edm",
    type=click.Choice(["vp", "ve", "edm"]),
    default="edm",
    show_default=True,
)
# How.
@click.option(
    "--duration",
    help="Training duration as if |D| were 50,000; epochs / 20",
    metavar="MIMG",
    type=POSITIVE,
    default=200,
    show_default=True,
)
@click.option(
    "--batch", help="Images per step, over all processes", metavar="INT", type=COUNT, default=512, show_default=True
)
@click.option(
    "--batch-gpu", help="At most so many images at a time per process; gradients add up", metavar="INT", type=COUNT
)
@click.option("--cbase", help="Another name of --num-channels, which it overrides", metavar="INT", type=CHANNELS)
@click.option(
    "--cres",
    help="Width at each resolution, in units of --num-channels  [default: 2,2,2; adm: 1,2,3,4]",
    metavar="LIST",
    type=IntList(max=1 << 10),
)
@click.option(
    "--lr", help="Learning rate, after a linear rise", metavar="FLOAT", type=POSITIVE, default=10e-4, show_default=True
)
@click.option(
    "--ema",
    help="EMA half-life as if |D| were 50,000",
    metavar="MIMG",
    type=Float(min=0),
    default=0.5,
    show_default=True,
)
@click.option(
    "--dropout",
    help="Probability of dropping a feature",
    metavar="FLOAT",
    type=FRACTION,
    default=0.13,
    show_default=True,
)
@click.option(
    "--augment",
    help="Probability of each augmentation",
    metavar="FLOAT",
    type=FRACTION,
    default=0.12,
    show_default=True,
)
@click.option(
    "--xflip", help="Add the mirror image of each image", metavar="BOOL", type=bool, default=False, show_default=True
)
@click.option(
    "--window-size",
    help="Shuffling window of the data order, 0 = the same order in each epoch",
    metavar="FLOAT",
    type=FRACTION,
    default=0.5,
    show_default=True,
)
@click.option("--num-blocks", help="Residual blocks per resolution  [default: 4; adm: 3]", metavar="INT", type=BLOCKS)
@click.option(
    "--num-channels", help="Number of network channels  [default: 128; adm: 192]", metavar="INT", type=CHANNELS
)
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
    "--ema-mode",
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
@click.option(
    "--weight-decay", help="L2 penalty on the weights", metavar="FLOAT", type=FRACTION, default=0.0, show_default=True
)
@click.option(
    "--final-ema", help="Final EMA ratio, for mode4", metavar="FLOAT", type=FRACTION, default=0.99929, show_default=True
)
@click.option(
    "--optimizer",
    help="Update rule",
    metavar="Adam|SGD",
    type=click.Choice(list(OPTIMIZERS)),
    default="Adam",
    show_default=True,
)
@click.option("--momentum", help="Momentum for SGD", metavar="FLOAT", type=FRACTION, default=0.9, show_default=True)
# How fast.
@click.option(
    "--fp16", help="Published name of --precision=fp16", metavar="BOOL", type=bool, default=False, show_default=True
)
@click.option(
    "--precision",
    help="In which the network computes (tf32, fp16: CUDA only)  [default: fp32; of a resumed run its own]",
    metavar="|".join(PRECISIONS),
    type=click.Choice(PRECISIONS),
)
@click.option("--compile", help="Compile network and loss (torch.compile): minutes at first, then faster", is_flag=True)
@click.option(
    "--ls", help="Factor on the loss in the backward pass", metavar="FLOAT", type=POSITIVE, default=1, show_default=True
)
@click.option("--bench", help="Let cuDNN choose by timing", metavar="BOOL", type=bool, default=True, show_default=True)
@click.option("--deterministic", help="Take torch's deterministic algorithms only; slower on CUDA", is_flag=True)
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
# What is measured on the way.
@click.option(
    "--mem-eval", help="Measure the memorization ratio of N generated images at each snapshot", metavar="N", type=COUNT
)
@click.option(
    "--stop-at-mem",
    help="End the run when this ratio stays at or above R, 0 to 1",
    metavar="R",
    type=Float(min=0, max=1, min_open=True),
)
@click.option(
    "--stop-patience",
    help="At how many snapshots in a row, for --stop-at-mem",
    metavar="INT",
    type=COUNT,
    default=2,
    show_default=True,
)
@click.option("--tensorboard", help="Write TensorBoard event files into the run folder, too", is_flag=True)
# What is written, and where to begin.
@click.option("--desc", help="Text at the end of the name of the run folder", metavar="STR")
@click.option("--nosubdir", help="Write into --outdir itself", is_flag=True)
@click.option("--tick", help="Interval of status lines", metavar="KIMG", type=COUNT, default=50, show_default=True)
@click.option(
    "--snap", help="Interval of network snapshots", metavar="TICKS", type=COUNT, default=50, show_default=True
)
@click.option("--dump", help="Interval of training states", metavar="TICKS", type=COUNT, default=500, show_default=True)
@click.option("--keep-states", help="Keep the newest N training states  [default: all]", metavar="N", type=COUNT)
@click.option(
    "--max-nan-ticks",
    help="End the run after so many ticks in a row without a finite loss; 0 = never",
    metavar="INT",
    type=click.IntRange(min=0),
    default=3,
    show_default=True,
)
@click.option("--seed", help="Seed of weights, noise and data order  [default: drawn]", metavar="INT", type=SEED)
@click.option("--transfer", help="Start from the weights of a network snapshot", metavar="SNAPSHOT|URL")
@click.option(
    "--resume",
    help="Continue from a training state; latest: from the newest in the run folder, or the beginning (--nosubdir)",
    metavar="PT|latest",
)
@click.option("-n", "--dry-run", help="Check and show the options only", is_flag=True)
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

    \b
    # The same, measured every 4 kimg, until 90 % of 512 images are memorized
    python train.py --outdir=training-runs --data=datasets/digits-64.zip --cres=2,2 --num-channels=8 \\
        --num-blocks=1 --attn-resolutions=4 --batch=16 --augment=0 --duration=400 --tick=1 --snap=4 \\
        --mem-eval=512 --stop-at-mem=0.9 --tensorboard
    """  # noqa: D301
    opts = EasyDict(kwargs)
    with deterministic_algorithms(opts.deterministic):
        device = dist.init(opts.device)
        try:
            complete = run(opts, device)
        except RuntimeError as err:
            if dist.get_world_size() == 1 or not LOST_CONNECTION.search(str(err)):
                raise
            what = str(err).splitlines()[0][:200]
            raise ValueError(f"Another process of this run has ended; the cause stands there ({what}).") from err
        finally:
            dist.shutdown()
    if not complete:
        sys.exit(EXIT_STOPPED)


def run(opts: EasyDict, device: torch.device) -> bool:
    """Train, or only say with what; False if a signal stopped it."""
    try:
        c = loop_arguments(opts, device)
    except EndOfRun as end:
        if opts.resume != LATEST:
            raise
        if not opts.dry_run:
            dist.on_rank0(write_run_state, opts.outdir, "complete", end.kimg, "its last training state is the end")
        dist.print0(f"Nothing is left to do: {end}")
        return True
    run_dir = dist.on_rank0(pick_run_dir, opts, c)
    if opts.dry_run:
        print_options(opts, c, run_dir, device)
        dist.print0("Nothing is trained: --dry-run.")
        return True
    observer = make_observer(opts, device)
    with open_run_dir(run_dir, recorded_options(opts, c), numbered=not opts.nosubdir) as run_dir:
        print_options(opts, c, run_dir, device)
        with Logger(run_dir / "log.txt") if dist.get_rank() == 0 else contextlib.nullcontext():
            return training_loop(run_dir=run_dir, device=device, observer=observer, **c)


def loop_arguments(opts: EasyDict, device: torch.device) -> EasyDict:
    """Turn command-line options into arguments of the training loop; wrong ones are a ClickException."""
    if opts.fp16 and opts.precision not in (None, "fp16"):
        raise click.ClickException(f"--fp16=1 and --precision={opts.precision} exclude each other.")
    if opts.fp16 and device.type != "cuda":
        raise click.ClickException("--fp16=1 needs a CUDA device; leave it out on the CPU.")
    if opts.transfer is not None and opts.resume not in (None, LATEST):
        raise click.ClickException("--transfer and --resume exclude each other: the state holds its own weights.")
    refuse_ignored(opts)
    if opts.tensorboard:
        check_tensorboard()
    split_batch(opts.batch, opts.batch_gpu, dist.get_world_size())
    resume = find_latest(opts) if opts.resume == LATEST else opts.resume
    shared = load_state(resume)[0] if resume is not None else {}
    precision = opts.precision or ("fp16" if opts.fp16 else saved_precision(shared))
    check_precision(precision, device, opts.compile)

    c = EasyDict()
    dataset = ImageFolderDataset(opts.data, use_labels=opts.cond, xflip=opts.xflip)
    if opts.cond and dataset.has_labels and dataset.label_dim < 2:
        dist.print0("Note: --cond=1 with a single class.")
    if opts.mem_eval is not None and len(set(dataset.names)) < 2:
        raise click.ClickException(f'--mem-eval needs at least 2 training images; "{opts.data}" holds 1.')
    c.dataset_kwargs = dict(
        path=opts.data, resolution=dataset.resolution, max_size=len(dataset), use_labels=opts.cond, xflip=opts.xflip,
        cache=opts.cache,
    )  # fmt: skip
    c.network_kwargs = dict(network_arguments(opts), use_fp16=precision == "fp16")
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
    c.update(batch_size=opts.batch, batch_gpu=opts.batch_gpu, loss_scaling=opts.ls)
    c.update(precision=precision, compile=opts.compile)
    c.update(cudnn_benchmark=opts.bench and not opts.deterministic)
    c.update(kimg_per_tick=opts.tick, snapshot_ticks=opts.snap, state_dump_ticks=opts.dump, num_workers=opts.workers)
    c.update(keep_states=opts.keep_states, max_nan_ticks=opts.max_nan_ticks)
    c.update(transfer=opts.transfer, resume=resume, tensorboard=opts.tensorboard)
    c.seed = dist.broadcast(opts.seed if opts.seed is not None else int(torch.randint(1 << 31, []).item()))

    # What cannot be built or read is an error now, not after the run folder is made.
    with torch.device("meta"):
        net = make_network(dataset, c.network_kwargs, c.augment)
    if opts.transfer is not None:
        check_tensors(net, load_network(opts.transfer)[0].state_dict(), opts.transfer)
    content = dict(labels_sha256=array_sha256(dataset.labels()) if dataset.has_labels else None)
    repeats, images = Repeats(), ImageFolderDataset(opts.data, cache=False)
    content["dataset_sha256"] = dist.on_rank0(dataset_sha256, images, repeats)
    for note in (repeats.describe("training images"), describe_images(images)):
        if note:
            dist.print0(f"Note: {note}")
    c.update(content)
    if resume is not None:
        check_state(shared, resume, net, c.batch_size, size, c.optimizer_kwargs, c.total_nimg, content, precision)
        ended = stop_reason(shared.get("observer", {}).get("history", []), opts.stop_at_mem, opts.stop_patience)
        if ended is not None:
            what = f"{ended}; raise --stop-at-mem or leave it out to go on"
            raise EndOfRun(resume, shared["nimg"] / 1000, what)
        if opts.seed is None:
            c.seed = shared.get("seed", c.seed)
    return c


def find_latest(opts: EasyDict) -> str | None:
    """The newest whole training state of the run folder; None if it has none, or is not there."""
    if not opts.nosubdir:
        raise click.ClickException("--resume=latest continues in the run folder: name it with --outdir and --nosubdir.")
    path, damaged = dist.on_rank0(latest_state, opts.outdir)
    for text in damaged:
        dist.print0(f"Note: {text} The one before it is taken.")
    return None if path is None else str(path)


def conditions(opts: EasyDict) -> dict[str, tuple[bool, str]]:
    """Options that have an effect with some others only: name -> (whether they have one here, which others)."""
    return {
        "momentum": (opts.optimizer == "SGD", "--momentum belongs to --optimizer=SGD; Adam has none"),
        "embed": (opts.arch != "adm", "--embed belongs to --arch=ddpmpp and ncsnpp, not to adm"),
        "final_ema": (opts.ema_mode == "mode4", f"--final-ema belongs to --ema_mode=mode4, not to {opts.ema_mode}"),
        "stop_at_mem": (opts.mem_eval is not None, "--stop-at-mem needs --mem-eval=N, the number of images to measure"),
        "stop_patience": (opts.stop_at_mem is not None, "--stop-patience belongs to --stop-at-mem"),
    }


def refuse_ignored(opts: EasyDict) -> None:
    """Refuse options that were given and would have no effect with the others."""

    def given(name: str) -> bool:
        return click.get_current_context().get_parameter_source(name) != ParameterSource.DEFAULT

    for name, (has_effect, message) in conditions(opts).items():
        if not has_effect and given(name):
            raise click.ClickException(f"{message}.")
    if opts.bench and opts.deterministic and given("bench"):
        raise click.ClickException("--bench=1 and --deterministic exclude each other.")
    if opts.ema_mode == "mode3" and given("ema"):
        dist.print0("Note: --ema has no effect with --ema_mode=mode3, whose half-life is fixed.")
    if opts.nosubdir and opts.desc is not None:
        dist.print0("Note: --desc has no effect with --nosubdir.")


def make_observer(opts: EasyDict, device: torch.device) -> Observer | None:
    """What looks at the snapshots: --mem-eval measures them, --tensorboard alone shows what they generate."""
    # A process that trains on so many images at a time generates four times as many without gradients.
    _, per_round = split_batch(opts.batch, opts.batch_gpu, dist.get_world_size())
    batch = max(per_round, min(4 * per_round, 64))
    if opts.mem_eval is None:
        return SampleGrid(batch=batch) if opts.tensorboard else None
    return MemorizationMonitor(
        ImageFolderDataset(opts.data).images(), opts.mem_eval, batch=batch, device=device,
        stop_at=opts.stop_at_mem, patience=opts.stop_patience, grid=opts.tensorboard,
    )  # fmt: skip


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
    return dict(network, dropout=opts.dropout)


def pick_run_dir(opts: EasyDict, c: EasyDict) -> Path:
    """--outdir itself with --nosubdir, else its next numbered subfolder."""
    outdir = Path(opts.outdir)
    check_folder(opts.outdir)
    if opts.desc is not None and "/" in opts.desc:
        raise ValueError(f'--desc: "{opts.desc}" becomes part of a folder name and cannot hold a slash.')
    if opts.nosubdir:
        return outdir
    cond = "cond" if opts.cond else "uncond"
    name = f"{max(run_numbers(outdir), default=-1) + 1:05d}-{Path(opts.data).stem}-{cond}-{opts.arch}-{opts.precond}"
    name += f"-gpus{dist.get_world_size()}-batch{c.batch_size}-{c.precision}"
    name += f"-{opts.desc}" if opts.desc is not None else ""
    if len(os.fsencode(name)) > 255:
        raise ValueError(f'The run folder "{name}" would have too long a name; give a shorter --desc or rename --data.')
    return outdir / name


def run_numbers(outdir: Path) -> set[int]:
    """Numbers at the beginning of the names of the folders in `outdir`."""
    names = [p.name for p in outdir.iterdir() if p.is_dir()] if outdir.is_dir() else []
    return {int(match[0]) for match in (re.match(r"\d+", name) for name in names) if match}


def make_numbered_dir(planned: Path) -> Path:
    """Make the folder NUMBER-NAME, or the same with the next free number if another run has taken this one.

    A number is claimed by making a folder of a hidden name, which only one process can do, and the claim
    becomes the run folder by renaming. So runs that start at the same time get different numbers, whatever
    their names.
    """
    outdir = planned.parent
    first, _, name = planned.name.partition("-")
    outdir.mkdir(parents=True, exist_ok=True)
    for number in itertools.count(int(first)):
        claim = outdir / f".{number:05d}.claimed"
        with contextlib.suppress(FileExistsError):
            claim.mkdir()
            if number not in run_numbers(outdir):  # else it was taken between plan and claim
                return claim.rename(outdir / f"{number:05d}-{name}")
            claim.rmdir()
    raise AssertionError("unreachable")


@contextlib.contextmanager
def open_run_dir(planned: Path, options: dict, numbered: bool) -> Iterator[Path]:
    """Make the run folder; yield its path. An error before the first snapshot removes a new folder."""
    run_dir, new = planned, False

    def make() -> Path:
        nonlocal run_dir, new
        if numbered:
            run_dir, new = make_numbered_dir(planned), True
        else:
            exists = run_dir.exists()
            run_dir.mkdir(parents=True, exist_ok=True)
            new = not exists
        with atomic_write(run_dir / "training_options.json", "w") as file:
            json.dump(options, file, indent=2)
        return run_dir

    try:
        yield dist.on_rank0(make)
    except BaseException as err:
        if dist.get_rank() == 0 and new and describe_error(err) is not None and not list_snapshots(run_dir):
            shutil.rmtree(run_dir)
        elif dist.get_rank() == 0 and not restarts_left():
            with contextlib.suppress(ValueError, OSError):  # the first error is the one to report
                mark_failed(run_dir, " ".join(str(err).split()) or type(err).__name__)
        raise


def restarts_left() -> bool:
    """Whether torchrun starts the processes again when one of them fails."""
    done, limit = (int(os.environ.get(f"TORCHELASTIC_{name}", "0")) for name in ("RESTART_COUNT", "MAX_RESTARTS"))
    return done < limit


def command_in_effect(opts: EasyDict, c: EasyDict) -> dict[str, Any]:
    """The options of the command line, each with its value in effect, as given or by default; None has no effect.

    Where the default depends on other options, or is drawn, that is what it came to.
    """
    network = c.network_kwargs
    command = dict(
        opts, num_channels=network["model_channels"], cres=network["channel_mult"], num_blocks=network["num_blocks"],
        attn_resolutions=network["attn_resolutions"], skip_connections=network.get("skip_connections"),
        precision=c.precision, fp16=c.precision == "fp16", seed=c.seed, bench=c.cudnn_benchmark,
        ema=opts.ema if opts.ema_mode != "mode3" else None,
    )  # fmt: skip
    return command | {name: None for name, (has_effect, _) in conditions(opts).items() if not has_effect}


def recorded_options(opts: EasyDict, c: EasyDict) -> dict:
    """What training_options.json holds: the loop's arguments, and the options they come from."""
    used: dict[str, Any] = dict(command=command_in_effect(opts, c))
    used |= {k: opts[k] for k in ["arch", "precond", "cond", "duration", "ema", "num_blocks", "num_channels", "embed"]}
    used |= dict(mem_eval=opts.mem_eval, stop_at_mem=opts.stop_at_mem)
    used["stop_patience"] = opts.stop_patience if opts.stop_at_mem is not None else None
    used["deterministic"] = opts.deterministic
    used |= dict(total_kimg=c.total_nimg / 1000, num_processes=dist.get_world_size(), versions=versions())
    if opts.resume == LATEST:
        return dict(used, **dict(c, resume=None))  # it is still the run that began without
    return dict(used, **c)


def print_options(opts: EasyDict, c: EasyDict, run_dir: Path, device: torch.device) -> None:
    size = c.dataset_kwargs["max_size"]
    facts = {
        "Run folder": run_dir,
        "Training images": f"{opts.data}, |D| = {size}" + (", with labels" if opts.cond else ""),
        "Network": f"{opts.arch}, {opts.precond}, {c.precision}{', compiled' if c.compile else ''}",
        "Duration": f"{c.total_nimg / 1000:g} kimg, {c.total_nimg / size:g} epochs",
        "Optimizer": f"{opts.optimizer}, batch {c.batch_size}",
        "Processes": f"{dist.get_world_size()}, {device.type}",
    }
    interval = c.kimg_per_tick * c.snapshot_ticks
    if opts.mem_eval is not None:
        facts["Evaluation"] = f"{opts.mem_eval} images at each snapshot, every {interval} kimg and at the end"
    if opts.stop_at_mem is not None:
        times = f"{opts.stop_patience} snapshot" + ("s in a row" if opts.stop_patience > 1 else "")
        facts["Ends early"] = f"at a memorization ratio of {opts.stop_at_mem:g} or more at {times}"
    dist.print0(json.dumps(recorded_options(opts, c), indent=2))
    for name, fact in facts.items():
        dist.print0(f"{name + ':':<17}{fact}")
    if opts.stop_at_mem is not None and interval * opts.stop_patience * 1000 >= c.total_nimg:
        dist.print0("Note: there are too few snapshots to end early; lower --tick or --snap.")


if __name__ == "__main__":
    main()
