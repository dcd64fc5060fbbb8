"""The training loop: EDM's recipe with the schedules of the memorization study, counted in images."""

import contextlib
import copy
import functools
import json
import os
import signal
import sys
import time
import warnings
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from dnnlib.util import format_time
from torch_utils import distributed as dist
from torch_utils.misc import InfiniteSampler
from torch_utils.training_stats import Collector
from training.augment import edm_augment_pipe
from training.dataset import ImageFolderDataset
from training.loss import LOSSES
from training.networks import build_network
from training.observer import Observation, Observer
from training.optimizer import Adam, clean_gradients
from training.precision import arithmetic, compile_step, prepare_denoiser, saved_precision, set_precision
from training.run import checkpoint
from training.run.events import EventLog
from training.run.run_dir import write_json
from training.run.state import NOT_FINITE, write_run_state
from training.run.stats_log import StatsLog
from training.snapshots.snapshot import load_tensors, save_snapshot

OPTIMIZERS = dict(Adam=Adam, SGD=torch.optim.SGD)
# Ctrl-C, a scheduler, Slurm's --signal=USR1@60, a terminal that is closed.
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)


class EndOfRun(ValueError):
    """A training state after which there is nothing left to do."""

    def __init__(self, source: str | os.PathLike, kimg: float, reason: str):
        super().__init__(f'"{source}" is at the end of its run, {reason}.')
        self.kimg, self.reason = kimg, reason


def training_loop(
    run_dir: str | os.PathLike,  # Output folder, which exists.
    dataset: ImageFolderDataset,  # Training images.
    dataset_kwargs: dict,  # Its arguments, for the header of the snapshots.
    network_kwargs: dict,  # Arguments of build_network, but for those that the dataset decides.
    loss: str,  # vp, ve or edm.
    optimizer_kwargs: dict,  # class_name (Adam or SGD) and its arguments.
    device: torch.device,  # Where to train.
    total_nimg: int,  # Duration, in images.
    vp_steps: int | None = None,  # Discrete noise levels of the loss of vp; None = all.
    seed: int = 0,  # Of weights, noise and data order.
    batch_size: int = 512,  # Images per step, over all processes.
    batch_gpu: int | None = None,  # At most this many images at a time on a device; None = no limit.
    augment: float = 0,  # Augmentation probability; 0 = none.
    lr_rampup_nimg: float = 0,  # The learning rate rises linearly over so many images.
    ema_mode: str = "mode2",  # See ema_beta.
    ema_halflife_nimg: float = 0,  # Half-life of the moving average of the weights, in images.
    ema_rampup_ratio: float | None = 0.05,  # It is at most this fraction of the images seen; None = no limit.
    final_ema: float = 0.99929,  # For mode4.
    precision: str = "fp32",  # In which the network computes, see training.precision.
    compile: bool = False,  # Compile network and loss.
    loss_scaling: float = 1,  # Factor on the loss during the backward pass, against underflow in float16.
    window_size: float = 0.5,  # Shuffling window of the data order, see InfiniteSampler.
    kimg_per_tick: float = 50,  # Interval of status lines.
    snapshot_ticks: int | None = 50,  # Interval of network snapshots, in ticks; None = only those of `snap_nimg`.
    snap_nimg: Collection[int] = (),  # After which numbers of images there are snapshots, too; multiples of the batch.
    state_dump_ticks: int = 500,  # Interval of training states, in ticks.
    keep_states: int | None = None,  # So many of the newest states stay; None = all.
    max_nan_ticks: int = 3,  # End the run after so many ticks in a row without a finite loss; 0 = never.
    num_workers: int = 1,  # Loader processes, for a dataset that does not fit into memory.
    cudnn_benchmark: bool = True,  # Let cuDNN time its algorithms.
    weights: dict[str, Tensor] | None = None,  # Start from these, of `make_network`.
    state: checkpoint.State | None = None,  # Continue from this training state, which `check_state` has taken.
    dataset_sha256: str | None = None,  # Digest of the images; a training state of other images is refused.
    labels_sha256: str | None = None,  # Digest of the labels, if they are used.
    tensorboard: bool = False,  # Write event files, too.
    observer: Observer | None = None,  # Looks at each snapshot after kimg 0; its numbers join the statistics.
    on_step: Callable[[int], bool] | None = None,  # Told the images seen after each step; True ends all, unsaved.
) -> bool:
    """Train; write snapshots, states and statistics into `run_dir`.

    An observer leaves the training as it would be without: the same weights, bit by bit.

    Returns
    -------
    True if the run is complete, by its duration or because the observer ended it; False if a signal ended it
    early, and the state is then saved, or if `on_step` did, and nothing is.

    Raises
    ------
    OSError, ValueError
        If a file cannot be written, the state does not fit this run, the batch cannot be divided, or the loss
        has not been finite for `max_nan_ticks` ticks.
    """
    start_time = time.time()
    world_size, rank = dist.get_world_size(), dist.get_rank()
    torch.manual_seed(np.random.RandomState((seed * world_size + rank) % (1 << 31)).randint(1 << 31))
    torch.backends.cudnn.benchmark = cudnn_benchmark

    # Batch size per process and per round of gradient accumulation.
    per_rank, per_round = split_batch(batch_size, batch_gpu, world_size)

    # Data.
    order = InfiniteSampler(len(dataset), rank, world_size, seed=seed, window_size=window_size)

    # Network.
    pipe = edm_augment_pipe(augment) if augment else None
    net = make_network(dataset, network_kwargs, augment)
    net.train().requires_grad_(True).to(device)
    dist.print0(f"Network has {sum(p.numel() for p in net.parameters()):,} parameters on {device}.")
    if weights is not None and state is None:
        net.load_state_dict(weights)

    # Optimizer, moving average, and what joins the processes.
    loss_fn = LOSSES[loss]() if vp_steps is None else LOSSES[loss](steps=vp_steps)
    snap_nimg = frozenset(snap_nimg)
    settings, optimizer_kwargs = optimizer_kwargs, dict(optimizer_kwargs)
    optimizer = OPTIMIZERS[optimizer_kwargs.pop("class_name")](net.parameters(), fused=True, **optimizer_kwargs)
    ddp = net
    if world_size > 1:
        # Buffers are constants, some of them random (Fourier frequencies): made equal once, not at every step.
        buffers = dict(net.named_buffers())
        for buffer in buffers.values():
            torch.distributed.broadcast(buffer, src=0)
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(net, list(buffers))
        ddp = DistributedDataParallel(
            net, device_ids=[device] if device.type == "cuda" else None, gradient_as_bucket_view=True
        )
        warnings.filterwarnings("ignore", "Grad strides do not match")  # of 1x1 filters, where they do not matter
    net.empty_classes = dataset_kwargs.get("empty_classes", [])  # they are not drawn where images are generated
    ema = copy.deepcopy(net).eval().requires_grad_(False)
    params, ema_params = list(net.parameters()), list(ema.parameters())
    set_precision(net, precision)
    compute_loss = functools.partial(_loss, loss_fn, ddp, pipe)
    if compile:  # rounds of accumulation hold gradients, which a CUDA graph would overwrite
        compute_loss = compile_step(compute_loss, net, device, graphs=per_rank == per_round)
    averaged = ema if observer is None else prepare_denoiser(ema, precision, compile, device)  # what it looks at

    # Resume.
    nimg = tick = tick_start_nimg = nan_ticks = 0
    content = dict(dataset_sha256=dataset_sha256, labels_sha256=labels_sha256)
    if state is not None:
        shared, resume = state.shared, state.path
        load_tensors(net, shared["net"], resume)
        load_tensors(ema, shared["ema"], resume)
        try:
            optimizer.load_state_dict(shared["optimizer"])
        except (KeyError, TypeError, ValueError, AttributeError, IndexError) as err:
            raise ValueError(f'"{resume}" holds the state of another optimizer.') from err
        for p, moments in optimizer.state.items():
            if any(isinstance(m, Tensor) and m.ndim and m.shape != p.shape for m in moments.values()):
                raise ValueError(f'"{resume}" holds the state of another optimizer.')
        nimg, tick = shared["nimg"], shared["tick"]
        tick_start_nimg = shared.get("tick_start_nimg", nimg)
        ema_rampup_ratio = shared.get("ema_rampup_ratio", ema_rampup_ratio)
        order.load_state_dict(state.own["order"])
        if observer is not None:
            observer.load_state_dict(shared.get("observer", {}))
        checkpoint.set_random_state(state.own["random"])
        dist.print0(f"Continuing from {resume}.")
    dist.on_rank0(_remove_leftovers, run_dir)

    # Train.
    dist.print0(
        f"Training for {total_nimg / 1000:g} kimg ({total_nimg / len(dataset):g} epochs of {len(dataset)} images)..."
    )
    dist.print0()
    stats = Collector(device)
    timed_nimg, tick_start_time = nimg, time.time()
    maintenance_time = tick_start_time - start_time
    reason = "its duration is over"
    bar = tqdm(
        total=round(total_nimg / 1000, 3), initial=nimg / 1000, unit="kimg", smoothing=0.05,
        disable=None if rank == 0 else True, bar_format="{l_bar}{bar}| {n:.1f}/{total:g} kimg [{elapsed}<{remaining}]",
    )  # fmt: skip
    done = nimg >= total_nimg
    _tell(run_dir, "running", nimg)
    loader = contextlib.closing(_batches(dataset, order, per_round, device, num_workers))
    events_file = _event_log(run_dir, tensorboard, nimg if state is not None else None)
    stats_file = StatsLog(Path(run_dir) / "stats.jsonl", nimg) if rank == 0 else contextlib.nullcontext()
    with _StopSignals() as stop, bar, loader as batches, stats_file as stats_log, events_file as events:
        while not done:
            # Accumulate gradients.
            optimizer.zero_grad(set_to_none=True)
            for i in range(per_rank // per_round):
                last = i == per_rank // per_round - 1
                with arithmetic(precision), contextlib.nullcontext() if last or ddp is net else ddp.no_sync():
                    images, labels = next(batches)
                    value, total = compute_loss(images, labels)
                    stats.report("Loss/loss", value)
                    stats.report("Loss/not_finite", ~total.detach().isfinite())
                    total.mul(loss_scaling / per_rank).backward()

            # Update the weights.
            lr = optimizer_kwargs["lr"] * (min(nimg / lr_rampup_nimg, 1) if lr_rampup_nimg else 1)
            for group in optimizer.param_groups:
                group["lr"] = lr
            clean_gradients(params, loss_scaling)
            optimizer.step()

            # Update the moving average.
            beta = ema_beta(ema_mode, nimg, batch_size, len(dataset), ema_halflife_nimg, ema_rampup_ratio, final_ema)
            with torch.no_grad():
                torch._foreach_lerp_(ema_params, params, 1 - beta)
            nimg += batch_size
            bar.update(batch_size / 1000)
            if on_step is not None and on_step(nimg):
                return False

            # Once per tick: snapshot, observation, status, statistics, state.
            done = nimg >= total_nimg
            stopping = stop.agreed() and not done
            over = tick == 0 or nimg >= tick_start_nimg + kimg_per_tick * 1000
            due = nimg in snap_nimg
            if not over and not done and not stopping and not due:
                continue
            tick_end_time = time.time()
            name = f"{nimg // 1000:06d}"
            seen = Observation()
            if done or stopping or due or (over and snapshot_ticks is not None and tick % snapshot_ticks == 0):
                path = Path(run_dir) / f"network-snapshot-{name}.safetensors"
                dist.on_rank0(save_snapshot, path, ema, nimg / 1000, dataset_kwargs)
                _tell(run_dir, "running", nimg)
                if observer is not None and not stopping and nimg >= 1000:
                    bar.set_description("evaluating")
                    seen = _observe(observer, averaged, nimg, stop)
                    bar.set_description("")
                    stopping = seen is None and not done  # a signal came meanwhile
                    seen = seen or Observation()
                    for file, entries in seen.files.items():
                        dist.on_rank0(write_json, Path(run_dir) / file, entries)
                    reason = seen.stop or reason
                    done = done or seen.stop is not None
            for key, value in {"Progress/lr": lr, "Progress/ema_beta": beta, **seen.values}.items():
                stats.report(key, value)
            _report_status(
                stats, bar, device, tick=tick, nimg=nimg, tick_nimg=nimg - timed_nimg, start_time=start_time,
                tick_sec=tick_end_time - tick_start_time, maintenance_sec=maintenance_time, note=seen.status,
            )  # fmt: skip
            averages = stats.flush()
            if stats_log is not None:
                stats_log.add(averages)
            if events is not None:
                events.add(averages, seen.images, nimg)

            # While the loss is not finite the states from before are what counts.
            lost = averages["Loss/not_finite"]["mean"] > 0.5
            nan_ticks = nan_ticks + over if lost else 0  # a listed snapshot within a tick is none
            if nan_ticks and nan_ticks == max_nan_ticks:
                _give_up(run_dir, nimg, nan_ticks)
            dump = done or stopping or (over and tick % state_dump_ticks == 0 and tick != 0 and not lost)
            if over:  # else a run that goes on from here completes it
                tick, tick_start_nimg = tick + 1, nimg
            if dump:
                checkpoint.save_state(
                    Path(run_dir) / f"training-state-{name}.pt",
                    shared=dict(
                        net=net.state_dict(), ema=ema.state_dict(), optimizer=optimizer.state_dict(),
                        nimg=nimg, tick=tick, tick_start_nimg=tick_start_nimg,
                        batch_size=batch_size, dataset_size=len(dataset), **content,
                        network=_plain(net.init_kwargs), optimizer_settings=_plain(settings), seed=seed,
                        precision=precision, vp_steps=vp_steps,
                        ema_rampup_ratio=ema_rampup_ratio,
                        observer=observer.state_dict() if observer is not None else {},
                    ),
                    per_rank=dict(order=order.state_dict(), random=checkpoint.random_state()),
                    keep=None if lost else keep_states,
                )  # fmt: skip
            timed_nimg, tick_start_time = nimg, time.time()
            maintenance_time = tick_start_time - tick_end_time
            if stopping:
                break
        _tell(run_dir, "complete" if done else "stopped", nimg, reason if done else "a signal asked it to stop")
        dist.print0()
        if not done:
            dist.print0(f"Stopped at {nimg / 1000:g} kimg; its state is saved.")
        elif nimg < total_nimg:
            dist.print0(f"Ended at {nimg / 1000:g} of {total_nimg / 1000:g} kimg: {reason}.")
        dist.barrier()  # torchrun ends all when one leaves with an error, as after a signal: leave together
    return done


def _give_up(run_dir: str | os.PathLike, nimg: int, ticks: int) -> None:
    """End a run whose loss is no longer finite."""
    reason = f"{NOT_FINITE} in {ticks} ticks in a row, up to {nimg / 1000:g} kimg"
    states = dist.on_rank0(checkpoint.list_states, run_dir)
    before = f'"{states[-1]}" is from before.' if states else "There is no training state from before."
    _tell(run_dir, "failed", nimg, reason)
    dist.barrier()
    raise ValueError(f"Training has stopped: {reason}. Try a lower --lr, or --precision=fp32. {before}")


def _loss(loss_fn: Callable, net: Callable, pipe: Callable | None, images: Tensor, labels: Tensor | None) -> tuple:
    """The loss of each pixel, and its sum: what is compiled as a whole."""
    value = loss_fn(net, images, labels, augment_pipe=pipe)
    return value, value.sum()


def _observe(observer: Observer, ema: torch.nn.Module, nimg: int, stop: "_StopSignals") -> Observation | None:
    """What the observer says, None if a signal came meanwhile; random numbers go on as if it had drawn none."""
    random = checkpoint.random_state()
    seen = observer(ema, nimg, stop.agreed_now)
    checkpoint.set_random_state(random)
    return seen


# ----------------------------------------------------------------------------
# Network and state.


def make_network(dataset: ImageFolderDataset, network_kwargs: dict, augment: float) -> torch.nn.Module:
    """The network for the images and labels of `dataset`; it takes augmentation labels if `augment` is not 0."""
    if augment:
        network_kwargs = dict(network_kwargs, augment_dim=edm_augment_pipe(augment).label_dim)
    return build_network(
        **network_kwargs,
        img_resolution=dataset.resolution,
        img_channels=dataset.num_channels,
        label_dim=dataset.label_dim,
    )


def check_state(
    shared: dict[str, Any],  # What the ranks share of a training state.
    source: str | os.PathLike,  # Its file, for messages.
    net: torch.nn.Module,  # Network of this run.
    batch_size: int,
    dataset_size: int,
    optimizer_kwargs: dict,  # As of training_loop; the learning rate may differ.
    total_nimg: int,
    content: dict[str, str | None],  # dataset_sha256 and labels_sha256 of this run.
    precision: str = "fp32",
) -> None:
    """Raise ValueError if a run with these settings cannot continue from a training state.

    At the end of its run that is an `EndOfRun`.
    """
    if (saved := saved_precision(shared)) != precision:
        raise ValueError(f'"{source}" is of a run in another precision; resume with --precision={saved}.')
    now = dict(network=net.init_kwargs, batch_size=batch_size, dataset_size=dataset_size)
    now["optimizer_settings"] = optimizer_kwargs
    for what, value in _plain(now).items():
        saved = shared.get(what)
        if what == "optimizer_settings":
            value, saved = (dict(settings or {}, lr=None) for settings in (value, saved))
        if value != saved:
            what = what.removesuffix("_settings").replace("_", " ")
            raise ValueError(f'"{source}" is of a run with another {what}; resume with its options.')
    for name, value in content.items():
        if None not in (value, shared.get(name)) and value != shared[name]:  # older states do not know
            raise ValueError(f'"{source}" is of a run on other {name.split("_")[0]} content; resume with its --data.')
    tensors = all(isinstance(shared.get(part), dict) for part in ("net", "ema", "optimizer"))
    counters = (shared.get("nimg"), shared.get("tick"), shared.get("tick_start_nimg", 0))
    if not tensors or any(type(counter) is not int for counter in counters):
        raise ValueError(f'"{source}" lacks weights or counters; it is not a whole training state.')
    if shared["nimg"] >= total_nimg:
        kimg = shared["nimg"] / 1000
        raise EndOfRun(source, kimg, f"{kimg:g} kimg; raise --duration to go on")


def _plain(value: Any) -> Any:
    """`value` as it looks after a way through JSON: lists for tuples."""
    return json.loads(json.dumps(value))


# ----------------------------------------------------------------------------
# Schedules.


def split_batch(batch_size: int, batch_gpu: int | None, world_size: int) -> tuple[int, int]:
    """Images per process and per round of gradient accumulation.

    Raises
    ------
    ValueError
        If the batch is not divisible by the processes, or a process's share by `batch_gpu`.
    """
    if batch_size % world_size:
        raise ValueError(f"--batch={batch_size} cannot be divided among {world_size} processes.")
    per_rank = batch_size // world_size
    per_round = min(batch_gpu or per_rank, per_rank)
    if per_rank % per_round:
        raise ValueError(f"--batch-gpu={batch_gpu} does not divide the {per_rank} images that each process takes.")
    return per_rank, per_round


def ema_beta(
    mode: str,
    nimg: int,
    batch_size: int,
    dataset_size: int,
    halflife_nimg: float,
    rampup_ratio: float | None = 0.05,
    final_ema: float = 0.99929,
) -> float:
    """Weight of the old average in one EMA update (published `--ema_mode`).

    Batch B, half-life h images (at most rampup_ratio * nimg), r = 50000 / dataset_size:
    mode1 0.5^(B / h), mode2 0.5^(512 / (h r)), mode3 0.5^(B / 500000),
    mode4 final_ema / 0.5^(B / 500000) 0.5^(B / (h r)).
    """
    h = halflife_nimg if rampup_ratio is None else min(halflife_nimg, nimg * rampup_ratio)
    h = max(h, 1e-8)
    r = 50000 / dataset_size
    if mode == "mode1":
        return 0.5 ** (batch_size / h)
    if mode == "mode2":
        return 0.5 ** (512 / (h * r))
    if mode == "mode3":
        return 0.5 ** (batch_size / 500_000)
    if mode == "mode4":
        return final_ema / 0.5 ** (batch_size / 500_000) * 0.5 ** (batch_size / (h * r))
    raise ValueError(f'ema_mode must be mode1, mode2, mode3 or mode4, not "{mode}".')


# ----------------------------------------------------------------------------
# Data.


def _batches(
    dataset: ImageFolderDataset, order: InfiniteSampler, count: int, device: torch.device, num_workers: int
) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Endless (images float [count, C, H, W] in [-1, 1], labels or None) on `device`, in `order`.

    A dataset that fits lies on the device as uint8 and is gathered by index; else worker processes decode
    it. Either way `order` stands behind the last batch that was taken, so its state can be saved.
    """
    if dataset.cache and _fits(dataset.nbytes, device):
        images = torch.from_numpy(dataset.images()).to(device)
        labels = torch.from_numpy(dataset.labels()).to(device) if dataset.has_labels else None
        while True:
            index = torch.from_numpy(order.take(count))
            if device.type == "cuda":  # else the copy waits until the device has done all before it
                index = index.pin_memory().to(device, non_blocking=True)
            yield images[index].to(torch.float32) / 127.5 - 1, labels[index] if labels is not None else None

    dist.print0(
        f"The dataset is decoded by {num_workers} worker processes (--cache=0, or it does not fit into memory)."
    )
    dataset.release()
    ahead = copy.deepcopy(order)  # the loader runs ahead of training
    loader = torch.utils.data.DataLoader(
        dataset, batch_sampler=(ahead.take(count).tolist() for _ in iter(int, 1)), num_workers=num_workers,
        pin_memory=device.type == "cuda", prefetch_factor=2, multiprocessing_context="spawn",
        generator=torch.Generator(),  # else it draws from the generator that noise comes from
        worker_init_fn=_leave_signals_to_the_loop,
    )  # fmt: skip
    loaded = iter(loader)
    try:
        for images, labels in loaded:
            order.take(count)
            images = images.to(device, non_blocking=True).to(torch.float32) / 127.5 - 1
            yield images, labels.to(device, non_blocking=True) if dataset.has_labels else None
    except (ValueError, OSError) as err:  # torch puts the traceback of the loader process before the message
        raise ValueError(str(err).strip().rpartition("Error: ")[2]) from err
    finally:
        # Its processes end when nothing holds the iterator any more, but the traceback of an error does; and as
        # they ignore signals, this process would wait for them for ever.
        loaded._shutdown_workers()


def _leave_signals_to_the_loop(worker: int) -> None:
    """Schedulers and terminals signal every process; a loader that ends before the state is saved takes it along."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def _fits(nbytes: int, device: torch.device) -> bool:
    """True if `nbytes` take at most a quarter of the device's free memory, or of each local process's share."""
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
    else:
        free = psutil.virtual_memory().available / int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return nbytes <= free / 4


# ----------------------------------------------------------------------------
# Reports and signals.


def _report_status(
    stats: Collector,
    bar: tqdm,
    device: torch.device,
    *,
    tick: int,
    nimg: int,
    tick_nimg: int,  # images of this tick
    start_time: float,  # of the run
    tick_sec: float,  # duration of this tick
    maintenance_sec: float,  # between this tick and the one before
    note: str,  # end of the line
) -> None:
    """Print the status line and add its numbers to `stats`."""
    values: dict[str, Any] = {
        "Progress/tick": tick,
        "Progress/kimg": nimg / 1e3,
        "Timing/total_sec": time.time() - start_time,
        "Timing/sec_per_tick": tick_sec,
        "Timing/sec_per_kimg": tick_sec / tick_nimg * 1e3,
        "Timing/img_per_sec": tick_nimg / tick_sec,
        "Timing/maintenance_sec": maintenance_sec,
        "Resources/cpu_mem_gb": psutil.Process().memory_info().rss / 2**30,
        "Resources/peak_gpu_mem_gb": 0.0,
        "Resources/peak_gpu_mem_reserved_gb": 0.0,
    }
    if device.type == "cuda":
        values["Resources/peak_gpu_mem_gb"] = torch.cuda.max_memory_allocated(device) / 2**30
        values["Resources/peak_gpu_mem_reserved_gb"] = torch.cuda.max_memory_reserved(device) / 2**30
        torch.cuda.reset_peak_memory_stats(device)
    for name, value in values.items():
        stats.report(name, value)
    total, per_tick, per_kimg = (values[f"Timing/{k}"] for k in ["total_sec", "sec_per_tick", "sec_per_kimg"])
    line = (
        f"tick {tick:<5d} kimg {nimg / 1e3:<9.1f} time {format_time(total):<12s} sec/tick {per_tick:<7.1f} "
        f"sec/kimg {per_kimg:<7.3f} maintenance {maintenance_sec:<6.1f} "
        f"cpumem {values['Resources/cpu_mem_gb']:<6.2f} gpumem {values['Resources/peak_gpu_mem_gb']:<6.2f} "
        f"reserved {values['Resources/peak_gpu_mem_reserved_gb']:<6.2f} threads {torch.get_num_threads():<3d} {note}"
    )
    if dist.get_rank() == 0:
        bar.write(line.rstrip(), file=sys.stdout)
        sys.stdout.flush()


def _event_log(run_dir: str | os.PathLike, wanted: bool, resumed_nimg: int | None) -> Any:
    if not wanted or dist.get_rank() != 0:
        return contextlib.nullcontext()
    return EventLog(run_dir, resumed_nimg)


def _tell(run_dir: str | os.PathLike, state: str, nimg: int, reason: str = "") -> None:
    """Write run-state.json, on rank 0."""
    dist.on_rank0(write_run_state, run_dir, state, nimg / 1000, reason)


def _remove_leftovers(run_dir: str | os.PathLike) -> None:
    """Remove the temporary files of a run that was killed while it wrote (see `dnnlib.util.atomic_write`)."""
    for name in (
        "training-state-*",
        "network-snapshot-*",
        "run-state.json",
        "training_options.json",
        "stats.jsonl",
        "best.json",
    ):
        for path in Path(run_dir).glob(f".{name}.*.tmp"):
            path.unlink(missing_ok=True)


class _StopSignals:
    """While active, `STOP_SIGNALS` are noted, so that the loop can save its state; a second Ctrl-C acts at once.

    Other signals do not: schedulers send them to all processes, torchrun passes its own on, so each comes twice.
    """

    interval = 5  # seconds between two questions of the ranks to each other

    def __init__(self):
        self.requested = False
        self._steps = self._left = 1  # between two questions, until the next one

    def agreed(self) -> bool:
        """Whether a rank is asked to stop: the same answer on all ranks, each of which calls this after each step."""
        if dist.get_world_size() == 1:
            return self.requested
        self._left -= 1
        if self._left > 0:
            return False
        now = time.time()
        answers = dist.gather((self.requested, now - self._asked))
        per_step = max(answers[0][1], 1e-3) / self._steps
        self._asked, self._steps = now, min(max(int(self.interval / per_step), 1), 1000)
        self._left = self._steps
        return any(requested for requested, _ in answers)

    def agreed_now(self) -> bool:
        """As `agreed`, but for work that takes long between two calls: the ranks ask each other every time."""
        return any(dist.gather(self.requested))

    def __enter__(self) -> "_StopSignals":
        self._asked = time.time()
        noted = [s for s in STOP_SIGNALS if s != signal.SIGHUP or signal.getsignal(s) != signal.SIG_IGN]  # nohup
        self._previous = {s: signal.signal(s, self._note) for s in noted}
        return self

    def __exit__(self, *exc_info: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: object) -> None:
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.requested = True
