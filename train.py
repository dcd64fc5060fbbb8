"""Train a diffusion model on a dataset zip or folder."""

import contextlib
import json
import os
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from click.core import ParameterSource

from dnnlib import EasyDict
from dnnlib.cli import Float, IntList, WordList, report_errors
from dnnlib.images import left_out_sentence
from dnnlib.repeats import Repeats
from dnnlib.util import Logger
from dnnlib.versions import versions
from memorization.measure.feature_space import FeatureSpace
from memorization.measure.features import TRUST, load_features
from memorization.measure.gap import ImageSet
from memorization.measure.monitor import MemorizationMonitor, stop_reason
from memorization.measure.quality import MEASURES
from memorization.measure.quality_meter import QualityMeter
from memorization.report.commands import command_text, command_words
from torch_utils import distributed as dist
from torch_utils.determinism import deterministic_algorithms
from torch_utils.machine import machine_name
from torch_utils.threads import choose_threads, cpu_threads, network_work
from training.dataset import ImageFolderDataset, describe_images
from training.fingerprint import array_sha256, dataset_sha256
from training.observer import Observer, SampleGrid
from training.options import device_option
from training.precision import PRECISIONS, check_precision, saved_precision
from training.run.checkpoint import State, latest_state, load_state
from training.run.events import check_tensorboard
from training.run.run_dir import open_run_dir, plan_run_dir, refuse_another_run
from training.run.schedule import snapshot_steps
from training.run.sessions import earlier_sessions, this_session
from training.run.state import write_run_state
from training.snapshots.snapshot import check_tensors, load_network
from training.training_loop import OPTIMIZERS, EndOfRun, check_state, make_network, split_batch, training_loop

ONLY_SAID = ("desc", "overwrite", "dry_run", "show_options", "seed")  # options that a continuing command has no use for
QUALITY_OPTIONS = ("quality_eval", "quality_measures", "quality_space", "quality_features", "best_mem_below")
NO_IMAGE = "classes without an image"
LATEST = "latest"  # --resume: the newest whole training state
EXIT_STOPPED = 75  # a signal ended the run early and its state is saved (EX_TEMPFAIL: try again)

LOST_CONNECTION = re.compile(r"[Cc]onnection (closed|reset)|[Bb]roken pipe|[Tt]imed out|NCCL")

FRACTION, POSITIVE, NOT_NEGATIVE = Float(min=0, max=1), Float(min=0, min_open=True), Float(min=0)
RATIO = Float(min=0, max=1, min_open=True)
KIMG, STEPS = Float(min=0, max=1e12, min_open=True), click.IntRange(1, 10**12)
COUNT, COUNT_OR_0 = click.IntRange(min=1), click.IntRange(min=0)
CHANNELS, BLOCKS = click.IntRange(1, 1 << 16), click.IntRange(1, 64)  # as in training.snapshots.arguments
SEED = click.IntRange(min=0, max=(1 << 32) - 1)  # what numpy takes
LIST, WIDTHS = IntList(), IntList(max=1 << 10)
QUALITIES = WordList(MEASURES)
FLAG = object()  # a type without a value


def option(name: str, kind: Any, default: Any, help: str, metavar: str | None = None, *other_names: str) -> Callable:
    """One line of the table of options; `kind` is a type, a list of words, or FLAG."""
    if kind is FLAG:
        return click.option(name, *other_names, help=help, is_flag=True)
    if isinstance(kind, list):
        kind, metavar = click.Choice(kind), "|".join(kind)
    what = dict(help=help, type=kind, metavar=metavar)
    if default is ...:
        return click.option(name, *other_names, required=True, **what)
    return click.option(name, *other_names, default=default, show_default=default is not None, **what)


# fmt: off
@click.command(context_settings=dict(max_content_width=120))
# What is trained on what.
@option("--outdir", str, ..., "Folder for the run folders", "DIR")
@option("--data", str, ..., "Training images", "ZIP|DIR")
@option("--cond", bool, False, "Condition on the labels", "BOOL")
@option("--arch", ["ddpmpp", "ncsnpp", "adm"], "ddpmpp", "U-Net: DDPM++, NCSN++ or ADM")
@option("--precond", ["vp", "ve", "edm"], "edm", "Preconditioning, with its loss")
# How.
@option("--duration", POSITIVE, 200, "Duration as if |D| were 50,000; epochs / 20; 1000 images at least", "MIMG")
@option("--total-kimg", KIMG, None, "Instead of --duration: so many thousand images, whatever |D| is", "KIMG")
@option("--total-steps", STEPS, None, "Instead of --duration: so many steps, whatever |D| is", "INT")
@option("--vp-steps", COUNT, None, "Train vp at so many discrete noise levels, as DDPM at 1000  [default: all]", "INT")
@option("--batch", COUNT, 512, "Images per step, over all processes", "INT")
@option("--batch-gpu", COUNT, None, "At most so many images at a time per process; gradients add up", "INT")
@option("--cbase", CHANNELS, None, "Another name of --num-channels, which it overrides", "INT")
@option("--cres", WIDTHS, None, "Width at each resolution, in --num-channels  [default: 2,2,2; adm: 1,2,3,4]", "LIST")
@option("--lr", POSITIVE, 10e-4, "Learning rate, after a linear rise", "FLOAT")
@option("--lr-rampup", NOT_NEGATIVE, 200, "How long it rises", "EPOCHS")
@option("--ema", NOT_NEGATIVE, 0.5, "EMA half-life as if |D| were 50,000; 0 = no EMA", "MIMG")
@option("--dropout", FRACTION, 0.13, "Probability of dropping a feature", "FLOAT")
@option("--augment", FRACTION, 0.12, "Probability of each augmentation", "FLOAT")
@option("--xflip", bool, False, "Add the mirror image of each image", "BOOL")
@option("--window-size", FRACTION, 0.5, "Shuffling window of the data order, 0 = the same in each epoch", "FLOAT")
@option("--num-blocks", BLOCKS, None, "Residual blocks per resolution  [default: 4; adm: 3]", "INT")
@option("--num-channels", CHANNELS, None, "Number of network channels  [default: 128; adm: 192]", "INT")
@option("--embed", ["positional", "fourier"], "positional", "Time embedding (ddpmpp, ncsnpp)")
@option("--attn-resolutions", LIST, None, "Resolutions with attention  [default: 16; adm: 32,16,8]", "LIST")
@option("--ema_mode", ["mode1", "mode2", "mode3", "mode4"], "mode2", "How to adjust the EMA ratio", None, "--ema-mode")
@option("--skip-connections", LIST, None, "A 0 or 1 per skip, high resolution first  [default: all 1]", "LIST")
@option("--weight-decay", FRACTION, 0.0, "L2 penalty on the weights", "FLOAT")
@option("--final-ema", FRACTION, 0.99929, "Final EMA ratio, for mode4", "FLOAT")
@option("--optimizer", list(OPTIMIZERS), "Adam", "Update rule")
@option("--momentum", FRACTION, 0.9, "Momentum for SGD", "FLOAT")
# How fast.
@option("--fp16", bool, False, "Published name of --precision=fp16", "BOOL")
@option("--precision", list(PRECISIONS), None, "Of the network (tf32, fp16: CUDA)  [default: fp32; resumed: its own]")
@option("--compile", FLAG, None, "Compile network and loss (torch.compile): minutes at first, then faster")
@option("--ls", POSITIVE, 1, "Factor on the loss in the backward pass", "FLOAT")
@option("--bench", bool, True, "Let cuDNN choose by timing", "BOOL")
@option("--deterministic", FLAG, None, "Take torch's deterministic algorithms only; slower on CUDA")
@option("--cache", bool, True, "Hold the dataset in memory, on the device, if it fits", "BOOL")
@option("--workers", COUNT, 1, "Loader processes, if it does not", "INT")
@device_option
# What is measured on the way.
@option("--mem-eval", COUNT, None, "Measure the memorization ratio of N generated images at each snapshot", "N")
@option("--stop-at-mem", RATIO, None, "End the run when this ratio stays at or above R, 0 to 1", "R")
@option("--stop-patience", COUNT, 2, "At how many snapshots in a row, for --stop-at-mem", "INT")
@option("--quality-eval", str, None, "Measure the quality of the images of --mem-eval, too, against held-out ones",
        "ZIP|DIR|NPZ|NPY")
@option("--quality-measures", QUALITIES, "frechet", "By which measures; the first chooses the best snapshot",
        ",".join(MEASURES))
@option("--quality-space", ["pca", "pixels"], "pca", "Where: principal components of held-out pixels, or pixels")
@option("--quality-features", str, None, "There: in features of a TorchScript network, whose code is run", "PT")
@option("--best-mem-below", RATIO, 0.1, "best.json names the best snapshot with a ratio below R, 0 to 1", "R")
@option("--tensorboard", FLAG, None, "Write TensorBoard event files into the run folder, too")
# What is written, and where to begin.
@option("--desc", str, None, "Text at the end of the name of the run folder", "STR")
@option("--nosubdir", FLAG, None, "Write into --outdir itself")
@option("--overwrite", FLAG, None, "Remove the run that --outdir holds, with what was measured on it (--nosubdir)")
@option("--tick", COUNT, 50, "Interval of status lines", "KIMG")
@option("--snap", COUNT, 50, "Interval of network snapshots", "TICKS")
@option("--snap-at", str, None, "Instead of --snap: after these steps, as 250,1000:9000:500, or N in like quotients or "
        "distances", "LIST|log:N|even:N")
@option("--dump", COUNT, 500, "Interval of training states", "TICKS")
@option("--keep-states", COUNT, None, "Keep the newest N training states  [default: all]", "N")
@option("--max-nan-ticks", COUNT_OR_0, 3, "End after so many ticks in a row without a finite loss; 0 = never", "INT")
@option("--seed", SEED, None, "Seed of weights, noise and data order  [default: drawn]", "INT")
@option("--transfer", str, None, "Start from the weights of a network snapshot", "SNAPSHOT|URL")
@option("--resume", str, None, "Continue from a state; latest: from the newest in the run folder, if any (--nosubdir)",
        "PT|latest")
@click.option("--show-options", help="Print all options as JSON, too", is_flag=True)
@click.option("-n", "--dry-run", help="Check the options and say what would be trained, only", is_flag=True)
@report_errors
# fmt: on
def main(**kwargs: Any) -> None:
    """Train a diffusion model, for the study of memorization.

    Durations scale with the size of the training set |D|, so that the same --duration is the same number of
    epochs (20 times --duration) for every |D|. --total-kimg and --total-steps are the same for every |D|.

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


@dataclass
class Start:
    """What a run begins with, each opened once."""

    loop: EasyDict  # arguments of the training loop that are plain data
    dataset: ImageFolderDataset
    state: State | None  # from which it goes on
    weights: dict[str, torch.Tensor] | None  # with which it begins, of --transfer
    threads: int  # of the CPU
    machine: str  # the CPU or GPU
    images: dict[str, Any]  # how many of the training images are the same, and which files and classes are left out


def run(opts: EasyDict, device: torch.device) -> bool:
    """Train, or only say with what; False if a signal stopped it."""
    try:
        start = prepare(opts, device)
    except EndOfRun as end:
        if opts.resume != LATEST:
            raise
        if not opts.dry_run:
            dist.on_rank0(write_run_state, opts.outdir, "complete", end.kimg, "its last training state is the end")
        dist.print0(f"Nothing is left to do: {end}")
        return True
    run_dir = dist.on_rank0(pick_run_dir, opts, start)
    if opts.dry_run:
        print_options(opts, start, run_dir, device)
        dist.print0("Nothing is trained: --dry-run.")
        return True
    observer = make_observer(opts, start.dataset, device)
    options = recorded_options(opts, start, run_dir)
    with (
        open_run_dir(run_dir, options, numbered=not opts.nosubdir, overwrite=opts.overwrite) as run_dir,
        cpu_threads(start.threads),
    ):
        print_options(opts, start, run_dir, device)
        with Logger(run_dir / "log.txt") if dist.get_rank() == 0 else contextlib.nullcontext():
            complete = training_loop(
                run_dir=run_dir, device=device, dataset=start.dataset, state=start.state, weights=start.weights,
                observer=observer, **start.loop,
            )  # fmt: skip
            dist.print0(left_out_sentence(start.images["left_out"]))
            if not complete:
                dist.print0(f"This goes on with it:\n{continuing_command(opts, start, run_dir)}")
            return complete


def prepare(opts: EasyDict, device: torch.device) -> Start:
    """Turn command-line options into what the training loop takes; wrong ones are an error.

    What cannot be built or read is an error now, not after the run folder is made.
    """
    if opts.fp16 and opts.precision not in (None, "fp16"):
        raise click.ClickException(f"--fp16=1 and --precision={opts.precision} exclude each other.")
    if opts.fp16 and device.type != "cuda":
        raise click.ClickException("--fp16=1 needs a CUDA device; leave it out on the CPU.")
    if opts.transfer is not None and opts.resume not in (None, LATEST):
        raise click.ClickException("--transfer and --resume exclude each other: the state holds its own weights.")
    if opts.overwrite and opts.resume is not None:
        raise click.ClickException("--overwrite and --resume exclude each other: what is continued must stay.")
    refuse_ignored(opts)
    if opts.tensorboard:
        check_tensorboard()
    _, per_round = split_batch(opts.batch, opts.batch_gpu, dist.get_world_size())
    state = None
    if opts.resume is not None:
        state = find_latest(opts) if opts.resume == LATEST else load_state(opts.resume)
    shared = state.shared if state is not None else {}
    precision = opts.precision or ("fp16" if opts.fp16 else saved_precision(shared))
    check_precision(precision, device, opts.compile)

    # Images.
    dataset = ImageFolderDataset(opts.data, use_labels=opts.cond, xflip=opts.xflip, cache=opts.cache)
    size = len(dataset)
    if opts.cond and dataset.has_labels and dataset.label_dim < 2:
        dist.print0("Note: --cond=1 with a single class.")
    if opts.mem_eval is not None and len(set(dataset.names)) < 2:
        raise click.ClickException(f'--mem-eval needs at least 2 training images; "{opts.data}" holds 1.')

    # Durations, in images: the published formulas are for |D| = 50,000 and scale with |D|.
    c = EasyDict()
    c.dataset_kwargs = dict(
        path=opts.data, resolution=dataset.resolution, max_size=size, use_labels=opts.cond, xflip=opts.xflip,
        cache=opts.cache,
    )  # fmt: skip
    if empty := dataset.empty_classes():
        c.dataset_kwargs.update(empty_classes=empty)
        named = ", ".join(map(str, empty[:10])) + (", ..." if len(empty) > 10 else "")
        dist.print0(
            f"Note: {len(empty)} of {dataset.label_dim} classes have no image ({named}). They are not trained, and "
            "generate.py and mem_ratio.py leave them out unless --all-classes is given."
        )
    c.network_kwargs = dict(network_arguments(opts), use_fp16=precision == "fp16")
    c.loss = opts.precond
    c.vp_steps = opts.vp_steps
    c.optimizer_kwargs = dict(class_name=opts.optimizer, lr=opts.lr, weight_decay=opts.weight_decay)
    if opts.optimizer == "Adam":
        c.optimizer_kwargs.update(betas=[0.9, 0.999], eps=1e-8)
    else:
        c.optimizer_kwargs.update(momentum=opts.momentum)
    c.total_nimg, c.snap_nimg = planned_images(opts, size)
    c.ema_halflife_nimg = opts.ema * 20 * size
    c.lr_rampup_nimg = opts.lr_rampup * size
    c.ema_rampup_ratio = None if opts.transfer is not None else 0.05
    c.update(ema_mode=opts.ema_mode, final_ema=opts.final_ema, augment=opts.augment, window_size=opts.window_size)
    c.update(batch_size=opts.batch, batch_gpu=opts.batch_gpu, loss_scaling=opts.ls)
    c.update(precision=precision, compile=opts.compile)
    c.update(cudnn_benchmark=opts.bench and not opts.deterministic)
    c.update(kimg_per_tick=opts.tick, state_dump_ticks=opts.dump, num_workers=opts.workers)
    c.snapshot_ticks = opts.snap if opts.snap_at is None else None
    c.update(keep_states=opts.keep_states, max_nan_ticks=opts.max_nan_ticks, tensorboard=opts.tensorboard)
    c.seed = dist.broadcast(opts.seed if opts.seed is not None else int(torch.randint(1 << 31, []).item()))

    # Network.
    with torch.device("meta"):
        net = make_network(dataset, c.network_kwargs, c.augment)
    weights = None
    if opts.transfer is not None:
        weights = load_network(opts.transfer)[0].state_dict()
        check_tensors(net, weights, opts.transfer)
    threads = choose_threads(network_work(net, per_round)) if device.type == "cpu" else torch.get_num_threads()

    # What the images are, and whether the state is of them.
    content = dict(labels_sha256=array_sha256(dataset.labels()) if dataset.has_labels else None)
    repeats = Repeats()
    content["dataset_sha256"] = dist.on_rank0(dataset_sha256, dataset, repeats)
    for note in (repeats.describe("training images"), describe_images(dataset)):
        if note:
            dist.print0(f"Note: {note}")
    c.update(content)
    if state is not None:
        check_state(shared, state.path, net, c.batch_size, size, c.optimizer_kwargs, c.total_nimg, content, precision)
        ended = stop_reason(shared.get("observer", {}).get("history", []), opts.stop_at_mem, opts.stop_patience)
        if ended is not None:
            what = f"{ended}; raise --stop-at-mem or leave it out to go on"
            raise EndOfRun(state.path, shared["nimg"] / 1000, what)
        if shared.get("vp_steps") != opts.vp_steps:
            before = shared.get("vp_steps")
            how = "without --vp-steps" if before is None else f"with --vp-steps={before}"
            raise ValueError(f'"{state.path}" was trained {how}; go on so, or begin anew.')
        if opts.seed is None:
            c.seed = shared.get("seed", c.seed)
    left_out = dict(dataset.files.left_out)
    if empty:
        left_out[NO_IMAGE] = len(empty)
    images = dict(repeats.counts() if dist.get_rank() == 0 else {}, left_out=left_out)
    return Start(c, dataset, state, weights, threads, machine_name(device), dist.broadcast(images))


def planned_images(opts: EasyDict, size: int) -> tuple[int, list[int]]:
    """How many images a run sees that has `size` training images, and after how many of them --snap-at lists snapshots.

    Raises
    ------
    ValueError
        If --snap-at does not fit such a run.
    """
    total = max(round(opts.duration * 20 * size), 1000)
    if opts.total_kimg is not None or opts.total_steps is not None:
        total = max(round(opts.total_kimg * 1000), 1) if opts.total_kimg else opts.total_steps * opts.batch
    if opts.snap_at is None:
        return total, []
    steps = snapshot_steps(opts.snap_at, -(-total // opts.batch), opts.batch)
    return total, [step * opts.batch for step in steps]


def find_latest(opts: EasyDict) -> State | None:
    """The newest whole training state of the run folder; None if it has none, or is not there."""
    if not opts.nosubdir:
        raise click.ClickException("--resume=latest continues in the run folder: name it with --outdir and --nosubdir.")
    state, damaged = latest_state(opts.outdir)
    for text in damaged:
        dist.print0(f"Note: {text} The one before it is taken.")
    return state


def pick_run_dir(opts: EasyDict, start: Start) -> Path:
    """Where the run goes: --outdir itself with --nosubdir, if no other run is there, else its next numbered folder."""
    if opts.desc is not None and "/" in opts.desc:
        raise ValueError(f'--desc: "{opts.desc}" becomes part of a folder name and cannot hold a slash.')
    name = None
    if not opts.nosubdir:
        name = f"{Path(opts.data).stem}-{'cond' if opts.cond else 'uncond'}-{opts.arch}-{opts.precond}"
        name += f"-gpus{dist.get_world_size()}-batch{opts.batch}-{start.loop.precision}"
        name += f"-{opts.desc}" if opts.desc is not None else ""
    run_dir = plan_run_dir(opts.outdir, name)
    resumed = start.state.path if start.state is not None else None
    if not opts.overwrite:
        content = {key: start.loop[key] for key in ("dataset_sha256", "labels_sha256")}
        refuse_another_run(run_dir, resumed, opts.resume == LATEST, content)
    if resumed is not None and resumed.resolve().parent != run_dir.resolve():
        print(
            f'Note: the run of "{resumed.parent}" goes on in another folder, "{run_dir}", which will hold what comes '
            f"after {start.state.shared['nimg'] / 1000:g} kimg only; --outdir={resumed.parent} --nosubdir "
            "--resume=latest would go on in its own."
        )
    return run_dir


def continuing_command(opts: EasyDict, start: Start, run_dir: Path) -> str:
    """The command that goes on with a stopped run, as it is typed: the options that were given, and the folder."""
    context = click.get_current_context()
    parameters = [p.name for p in context.command.params if p.name not in ONLY_SAID]
    given = [name for name in parameters if context.get_parameter_source(name) != ParameterSource.DEFAULT]
    values = {name: opts[name] for name in given} | {"outdir": str(run_dir), "nosubdir": True, "resume": LATEST}
    if Path(sys.argv[0]).name == "diffmem" and dist.get_world_size() == 1:
        return command_text(["diffmem", "train", *command_words("", values, 1)[2:]])
    script = sys.argv[0] if Path(sys.argv[0]).name == "train.py" else "train.py"
    return command_text(command_words(script, values, dist.get_world_size()))


def conditions(opts: EasyDict) -> dict[str, tuple[bool, str]]:
    """Options that have an effect with some others only: name -> (whether they have one here, which others)."""
    by_epochs = opts.total_kimg is None and opts.total_steps is None
    return {
        "duration": (by_epochs, "--duration, --total-kimg and --total-steps exclude each other"),
        "total_kimg": (opts.total_steps is None, "--duration, --total-kimg and --total-steps exclude each other"),
        "vp_steps": (opts.precond == "vp", f"--vp-steps belongs to --precond=vp, not to {opts.precond}"),
        "snap": (opts.snap_at is None, "--snap and --snap-at exclude each other"),
        "momentum": (opts.optimizer == "SGD", "--momentum belongs to --optimizer=SGD; Adam has none"),
        "embed": (opts.arch != "adm", "--embed belongs to --arch=ddpmpp and ncsnpp, not to adm"),
        "final_ema": (opts.ema_mode == "mode4", f"--final-ema belongs to --ema_mode=mode4, not to {opts.ema_mode}"),
        "stop_at_mem": (opts.mem_eval is not None, "--stop-at-mem needs --mem-eval=N, the number of images to measure"),
        "stop_patience": (opts.stop_at_mem is not None, "--stop-patience belongs to --stop-at-mem"),
        "quality_eval": (opts.mem_eval is not None, "--quality-eval needs --mem-eval=N, the number of images"),
        **{
            name: (opts.quality_eval is not None, f"--{name.replace('_', '-')} belongs to --quality-eval=DATASET")
            for name in ("quality_measures", "quality_features", "best_mem_below")
        },
        "quality_space": (
            opts.quality_eval is not None and opts.quality_features is None,
            "--quality-space belongs to --quality-eval=DATASET, without --quality-features",
        ),
        "overwrite": (opts.nosubdir, "--overwrite belongs to --nosubdir; else each run gets a folder of its own"),
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


def make_observer(opts: EasyDict, dataset: ImageFolderDataset, device: torch.device) -> Observer | None:
    """What looks at the snapshots: --mem-eval measures them, --tensorboard alone shows what they generate."""
    # A process that trains on so many images at a time generates four times as many without gradients.
    _, per_round = split_batch(opts.batch, opts.batch_gpu, dist.get_world_size())
    batch = max(per_round, min(4 * per_round, 64))
    if opts.mem_eval is None:
        return SampleGrid(batch=batch) if opts.tensorboard else None
    originals = dataset.images()[: len(set(dataset.names))]  # mirrored ones come behind
    return MemorizationMonitor(
        originals, opts.mem_eval, batch=batch, device=device,
        stop_at=opts.stop_at_mem, patience=opts.stop_patience, grid=opts.tensorboard,
        quality=quality_meter(opts, originals, device), best_below=opts.best_mem_below,
    )  # fmt: skip


def quality_meter(opts: EasyDict, originals: np.ndarray, device: torch.device) -> QualityMeter | None:
    """What measures --quality-eval, if it is given."""
    if opts.quality_eval is None:
        return None
    space = features = None
    if opts.quality_features is not None:
        dist.print0(f"Note: {TRUST}")
        network = load_features(opts.quality_features, device, shape=originals.shape[1:])
        space, features = "features", FeatureSpace(network, originals, device)
    heldout = ImageSet.read(opts.quality_eval)
    meter = QualityMeter(
        originals, heldout, opts.quality_measures, space=space or opts.quality_space, features=features, device=device
    )
    for reason, number in meter.left_out.items():
        dist.print0(f"Note: {number} {reason} are left out.")
    return meter


def network_arguments(opts: EasyDict) -> dict:
    """Arguments of `build_network` for --arch and --precond, but for those that the dataset decides."""
    network = dict(class_name=dict(vp="VPPrecond", ve="VEPrecond", edm="EDMPrecond")[opts.precond])
    if opts.vp_steps is not None:
        network.update(steps=opts.vp_steps)
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


def options_in_effect(opts: EasyDict) -> dict[str, Any]:
    """The options of the command line, each with its value in effect, as given or by default; None has no effect.

    Where the default depends on other options, that is what it came to.
    """
    network = network_arguments(opts)
    command = dict(
        opts, num_channels=network["model_channels"], cres=network["channel_mult"], num_blocks=network["num_blocks"],
        attn_resolutions=network["attn_resolutions"], skip_connections=network.get("skip_connections"),
        ema=opts.ema if opts.ema_mode != "mode3" else None,
    )  # fmt: skip
    without_effect = dict.fromkeys(name for name, (has_effect, _) in conditions(opts).items() if not has_effect)
    return command | without_effect | {"overwrite": opts.overwrite}


def command_in_effect(opts: EasyDict, c: EasyDict) -> dict[str, Any]:
    """As `options_in_effect`, with what is drawn, or follows from the device or from the state that is continued."""
    drawn = dict(precision=c.precision, fp16=c.precision == "fp16", seed=c.seed, bench=c.cudnn_benchmark)
    return options_in_effect(opts) | drawn


def recorded_options(opts: EasyDict, start: Start, run_dir: Path) -> dict:
    """What training_options.json holds: the loop's arguments, the options they come from, and with what it is done."""
    c = start.loop
    used: dict[str, Any] = dict(command=command_in_effect(opts, c))
    used |= {k: opts[k] for k in ["arch", "precond", "cond", "ema", "num_blocks", "num_channels", "embed"]}
    used["duration"] = used["command"]["duration"] or c.total_nimg / (20 * c.dataset_kwargs["max_size"])
    used |= dict(mem_eval=opts.mem_eval, stop_at_mem=opts.stop_at_mem)
    used["stop_patience"] = opts.stop_patience if opts.stop_at_mem is not None else None
    used |= {key: opts[key] if opts.quality_eval is not None else None for key in QUALITY_OPTIONS}
    used["deterministic"] = opts.deterministic
    used |= dict(total_kimg=c.total_nimg / 1000, num_processes=dist.get_world_size(), versions=versions())
    used |= dict(transfer=opts.transfer, resume=opts.resume if opts.resume != LATEST else None, threads=start.threads)
    state = start.state
    began = this_session(start.machine, start.threads, state.shared["nimg"] / 1000 if state is not None else 0)
    used["sessions"] = [*earlier_sessions(run_dir, state.path if state is not None else None), began]
    return dict(used, training_images=start.images, **c)


def print_options(opts: EasyDict, start: Start, run_dir: Path, device: torch.device) -> None:
    c = start.loop
    size = c.dataset_kwargs["max_size"]
    facts = {
        "Run folder": run_dir,
        "Training images": f"{opts.data}, |D| = {size}" + (", with labels" if opts.cond else ""),
        "Network": f"{opts.arch}, {opts.precond}, {c.precision}{', compiled' if c.compile else ''}",
        "Duration": f"{c.total_nimg / 1000:g} kimg, {c.total_nimg / size:g} epochs",
        "Optimizer": f"{opts.optimizer}, batch {c.batch_size}",
        "Processes": f"{dist.get_world_size()}, {device.type}",
    }
    if device.type == "cpu":
        by = "OMP_NUM_THREADS" if os.environ.get("OMP_NUM_THREADS") else "the size of the network and the batch"
        facts["Processes"] += f", {start.threads} thread{'s' if start.threads > 1 else ''} each (by {by})"
    times = f"{len(c.snap_nimg)} listed time{'s' if len(c.snap_nimg) > 1 else ''}, one per kimg at most,"
    often = f"at {times} {'and at' if max(c.snap_nimg, default=0) < c.total_nimg else 'with'} the end"
    few = len(c.snap_nimg) < opts.stop_patience
    if not c.snap_nimg:
        interval = c.kimg_per_tick * c.snapshot_ticks
        often = f"every {interval} kimg and at the end"
        few = interval * opts.stop_patience * 1000 >= c.total_nimg
    if c.snap_nimg:
        facts["Snapshots"] = often
    if opts.mem_eval is not None:
        facts["Evaluation"] = f"{opts.mem_eval} images at each snapshot, {often}"
    if opts.quality_eval is not None:
        facts["Quality"] = f"{', '.join(opts.quality_measures)} against {opts.quality_eval}"
        facts["best.json"] = f"best {opts.quality_measures[0]} with a ratio below {opts.best_mem_below:g}"
    if opts.stop_at_mem is not None:
        times = f"{opts.stop_patience} snapshot" + ("s in a row" if opts.stop_patience > 1 else "")
        facts["Ends early"] = f"at a memorization ratio of {opts.stop_at_mem:g} or more at {times}"
    for name, fact in facts.items():
        dist.print0(f"{name + ':':<17}{fact}")
    if opts.show_options:
        dist.print0(json.dumps(recorded_options(opts, start, run_dir), indent=2))
    if opts.stop_at_mem is not None and few:
        more = "lower --tick or --snap" if opts.snap_at is None else "list more in --snap-at"
        dist.print0(f"Note: there are too few snapshots to end early; {more}.")


if __name__ == "__main__":
    main()
