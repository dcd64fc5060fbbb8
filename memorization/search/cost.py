"""What the runs of a factor script will cost on this machine: seconds that are measured, not guessed.

    python -m memorization.search.cost QUEUE --measure="OPTIONS of mem_ratio.py" --jobs=2

QUEUE has a line per run, its fields apart by tabs: |D|, value, seed, run folder, shape of the images, options of
train.py. The shape is RESOLUTION,CHANNELS,CLASSES; what is empty is taken from --source. Of each network a few training
steps are timed, by the training loop itself, and a few evaluations in the sampler, with the options of the runs, on
random images of the shape; nothing is written but into a temporary folder.
"""

import contextlib
import heapq
import io
import math
import os
import shlex
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

import click
import numpy as np
import psutil
import torch

import mem_ratio
import train
from dataset_utils.archive import open_archive
from dataset_utils.sources import open_source
from dnnlib import EasyDict
from dnnlib.cli import Float, report_errors
from dnnlib.util import format_time
from memorization.search.job import is_trained, more_training
from torch_utils import distributed as dist
from torch_utils.threads import cpu_threads
from training.precision import check_precision, prepare_denoiser
from training.run.schedule import snapshot_kimgs
from training.run.state import read_run_state
from training.samplers import ABLATIONS, ablation_sampler, edm_sampler
from training.training_loop import make_network, split_batch, training_loop

STEPS = 32  # that are timed, at the least number that the limit does not end before
_IMAGES = 2000  # of the random training set at most; its size decides nothing but labels
_SAMPLER = ("num_steps", "sigma_min", "sigma_max", "rho", "S_churn", "S_min", "S_max", "S_noise", *ABLATIONS)


@dataclass(frozen=True)
class Queued:
    """A run that a factor script has queued."""

    size: int  # |D|
    value: str  # of the factor
    seed: str
    run_dir: str
    shape: str
    options: str  # of train.py

    @property
    def network(self) -> tuple[str, str]:
        """What decides how long a step takes: runs with equal ones are timed once."""
        return self.shape, self.options


@dataclass(frozen=True)
class Steps:
    """Steps or evaluations that were timed."""

    seconds: float  # per image
    images: int  # of each
    of: int  # so many the run has at a time
    count: int
    share: float = 1.0  # of the time, that other work on the processor left it, 0 to 1; 1 where that is not known


@dataclass(frozen=True)
class Timed:
    """What a clock said."""

    seconds: float  # of a step or an evaluation
    count: int  # so many were timed
    share: float = 1.0  # as of Steps


@dataclass(frozen=True)
class Cost:
    """What is known of one network: its speed, and what a run of any size comes to."""

    shape: tuple[int, int, int]  # resolution, channels, classes
    training: Steps
    sampling: Steps  # seconds per image: all evaluations of the sampler
    evaluations: int
    machine: str
    threads: int | None  # of the CPU; None: a GPU
    precision: str
    images: int  # that are generated for each snapshot
    planned: Callable[[int], tuple[int, int]]  # |D| -> training images, snapshots to measure

    def seconds(self, size: int, nproc: int, alone: bool = False) -> tuple[float, float]:
        """Of training and measuring a run; `alone`: if no other work had taken time of the threads."""
        nimg, snapshots = self.planned(size)
        each = [part.seconds * (part.share if alone else 1) / nproc for part in (self.training, self.sampling)]
        return nimg * each[0], snapshots * self.images * each[1]


def read_queue(lines: Sequence[str]) -> list[Queued]:
    """The runs of QUEUE.

    Raises
    ------
    ValueError
        If a line has other fields.
    """
    runs = []
    for number, line in enumerate(lines, start=1):
        fields = line.rstrip("\n").split("\t")
        if len(fields) != 6 or not fields[0].isdigit() or int(fields[0]) < 1 or fields[4].count(",") != 2:
            raise ValueError(f"Line {number} of the queue is not |D|, value, seed, folder, shape, options.")
        runs.append(Queued(int(fields[0]), *fields[1:]))
    if not runs:
        raise ValueError("The queue holds no run.")
    return runs


def find_shape(shape: str, source: str | None) -> tuple[int, int, int]:
    """Resolution, channels and number of classes; what `shape` leaves empty is that of the source.

    Raises
    ------
    OSError, ValueError
        If the source cannot be read, or a number is none.
    """
    parts = shape.split(",")
    if "" in parts:
        if source is None:
            raise ValueError(f'The shape "{shape}" has gaps, and no --source fills them.')
        with open_source(source) as images:
            first = images.read(0)
            labels = [label for label in images.labels or [] if isinstance(label, int)]
            found = [first.shape[0], 1 if first.ndim == 2 else first.shape[2], max(labels, default=0) + 1]
        parts = [part or str(number) for part, number in zip(parts, found)]
    if not all(part.isdigit() and int(part) > 0 for part in parts):
        raise ValueError(f'"{shape}" is no shape; write RESOLUTION,CHANNELS,CLASSES, as 32,3,10.')
    return tuple(map(int, parts))


# ----------------------------------------------------------------------------
# Timing.


def time_network(
    run: Queued,
    shape: tuple[int, int, int],
    measure: Sequence[str],  # options of mem_ratio.py
    limit: float,  # seconds for each of the two
    nproc: int = 1,
) -> Cost:
    """Time training steps and the sampler of the network of a run.

    A step that takes longer than a half of the limit is timed with fewer images, and scaled up.

    Raises
    ------
    click.ClickException, OSError, ValueError
        If train.py or mem_ratio.py would refuse the options.
    """
    resolution, channels, classes = shape
    with tempfile.TemporaryDirectory(prefix="plan-") as folder, contextlib.ExitStack() as stack:
        data = Path(folder, "random.zip")
        _write_images(data, min(run.size, _IMAGES), resolution, channels, classes)
        words = [f"--outdir={folder}/run", "--nosubdir", f"--data={data}", "--seed=0", *run.options.split()]
        with train.main.make_context("train.py", words) as context, contextlib.redirect_stdout(io.StringIO()):
            opts = EasyDict(context.params)
            device = dist.init(opts.device)
            per_process, _ = split_batch(opts.batch, opts.batch_gpu, nproc)
            start = train.prepare(opts, device)
        with mem_ratio.main.make_context("mem_ratio.py", ["--expdir=.", *measure]) as context:
            how = EasyDict(context.params)
        check_precision(how.precision, device, how.compile)
        # torchrun gives each of several processes one thread, where nothing is said.
        alone = device.type == "cpu" and nproc > 1 and not os.environ.get("OMP_NUM_THREADS")
        threads = 1 if alone else start.threads
        stack.enter_context(cpu_threads(threads))

        def planned(size: int) -> tuple[int, int]:
            c = start.loop
            nimg, snap_nimg = train.planned_images(opts, size * (2 if opts.xflip else 1))
            nimg = -(-nimg // c.batch_size) * c.batch_size
            return nimg, len(snapshot_kimgs(nimg, c.batch_size, c.kimg_per_tick, c.snapshot_ticks, snap_nimg))

        def steps(images: int) -> Timed:
            return _time_steps(start, device, Path(folder), images, limit)

        per_round = min(opts.batch_gpu or per_process, per_process)
        training = _grow(steps, per_process, limit, per_round, at_once=start.loop.compile)

        kwargs = {key: how[key] for key in _SAMPLER if how[key] is not None}
        net = make_network(start.dataset, start.loop.network_kwargs, start.loop.augment).eval().to(device)
        net.requires_grad_(False)
        evaluations = _count_evaluations(net, kwargs, device)
        prepared = prepare_denoiser(net, how.precision, how.compile, device)

        def evaluate(images: int) -> Timed:
            return _time_evaluations(prepared, device, images, limit)

        share = -(-len(how.seeds) // nproc)
        sampling = _grow(evaluate, min(how.batch, share), limit, 1, at_once=how.compile)
    sampling = replace(sampling, seconds=sampling.seconds * evaluations)
    return Cost(
        shape, training, sampling, evaluations, start.machine, threads if device.type == "cpu" else None,
        start.loop.precision, len(how.seeds), planned,
    )  # fmt: skip


def _write_images(path: Path, count: int, resolution: int, channels: int, classes: int) -> None:
    """A dataset of noise, whose labels are those of so many classes."""
    shape = [count, resolution, resolution] + [channels] * (channels > 1)
    images = np.random.RandomState(0).randint(256, size=shape, dtype=np.uint8)
    with open_archive(path) as archive:
        for i, image in enumerate(images):
            archive.add(image, i % classes if i < count - 1 else classes - 1)


def _grow(time_with: Callable[[int], Timed], of: int, limit: float, per_round: int, at_once: bool) -> Steps:
    """Time with few images at a time, then with as many as the limit allows, `of` at most."""
    images = of if at_once else 1  # what is compiled is compiled for one number
    while True:
        timed = time_with(images)
        room = int(limit / 2 / timed.seconds)  # so many times as many images take as long as is allowed
        if images == of or room < 2:
            return Steps(timed.seconds / images, images, of, timed.count, timed.share)
        images = min(of, images * room)
        if images > per_round:  # whole rounds of gradient accumulation
            images -= images % per_round


def _share(device: torch.device, busy: float, seconds: float) -> float:
    """What part of these seconds was computed, which took `busy` seconds of the processor.

    1 on a GPU, and with several threads: these also wait for each other, which is no other work.
    """
    return 1.0 if device.type != "cpu" or torch.get_num_threads() > 1 else min(busy / seconds, 1.0)


def _time_steps(start: train.Start, device: torch.device, folder: Path, images: int, limit: float) -> Timed:
    """Time a training step with so many images; the first ones warm up."""
    times: dict[int, float] = {}  # after so many steps, a power of two
    busy: dict[int, float] = {}  # seconds of the processor until then

    def on_step(nimg: int) -> bool:
        step = nimg // images
        if step & (step - 1):
            return False  # a GPU goes on meanwhile, as in training
        _wait(device)
        times[step], busy[step] = time.perf_counter(), time.process_time()
        return step > 1 and (step >= STEPS or times[step] - times[1] > limit / 4)

    gpu = start.loop.batch_gpu
    settings = dict(start.loop, batch_size=images, batch_gpu=gpu if gpu is not None and images > gpu else None)
    settings |= dict(kimg_per_tick=math.inf, snapshot_ticks=None, snap_nimg=(), tensorboard=False, total_nimg=1 << 62)
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        training_loop(
            run_dir=folder, device=device, dataset=start.dataset, weights=start.weights, on_step=on_step, **settings
        )
    last = max(times, default=0)
    if last < 2 or read_run_state(folder)["state"] == "stopped":
        raise KeyboardInterrupt  # the loop has noted a signal, and ended by itself
    first = 2 if last > 2 else 1  # after the first step the loop reports
    seconds = times[last] - times[first]
    return Timed(seconds / (last - first), last - first, _share(device, busy[last] - busy[first], seconds))


def _time_evaluations(net: Callable, device: torch.device, images: int, limit: float) -> Timed:
    """Time an evaluation of the network with so many images in the sampler."""
    latents = torch.randn([images, net.img_channels, net.img_resolution, net.img_resolution], device=device)
    labels = torch.randint(net.label_dim, [images], device=device) if net.label_dim else None
    num_steps = 1
    with torch.no_grad():
        edm_sampler(net, latents, labels, num_steps=1)  # warms up
        while True:
            counted = _Counted(net)
            _wait(device)
            began, busy = time.perf_counter(), time.process_time()
            edm_sampler(counted, latents, labels, num_steps=num_steps)
            _wait(device)
            seconds = time.perf_counter() - began
            if seconds > limit / 4 or counted.calls >= STEPS:
                share = _share(device, time.process_time() - busy, seconds)
                return Timed(seconds / counted.calls, counted.calls, share)
            num_steps *= 2


class _Counted:
    """A denoiser that counts its evaluations; with an `instead` it does not make them."""

    def __init__(self, net: Any, instead: Callable | None = None):
        self._net, self._call, self.calls = net, instead or net, 0

    def __call__(self, *args: Any) -> torch.Tensor:
        self.calls += 1
        return self._call(*args)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._net, name)  # sigma_min, round_sigma, ...


def _count_evaluations(net: torch.nn.Module, kwargs: dict[str, Any], device: torch.device) -> int:
    """Evaluations of the network for one image, with these options of the sampler."""
    counted = _Counted(net, lambda x, *_: torch.zeros_like(x))
    sampler = ablation_sampler if kwargs.keys() & ABLATIONS.keys() else edm_sampler
    sampler(counted, torch.zeros([1, net.img_channels, 1, 1], device=device), None, **kwargs)
    return counted.calls


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


# ----------------------------------------------------------------------------
# What it comes to.


def wall_seconds(seconds: Sequence[float], jobs: int) -> float:
    """Until the last run is done, if `jobs` are worked on at a time in this order and do not slow each other down."""
    free = [0.0] * jobs
    for duration in seconds:
        heapq.heappush(free, heapq.heappop(free) + duration)
    return max(free)


def is_done(run: Queued) -> bool:
    """True if nothing is left to do: the training is complete and was measured."""
    run_dir = Path(run.run_dir)
    try:
        if not is_trained(run_dir) or not (run_dir / "mem_traj.jsonl").exists():
            return False
        return not more_training(run_dir, ["train.py", f"--outdir={run_dir}", "--data=x", *shlex.split(run.options)])
    except (OSError, ValueError):
        return False


def _same_runs(runs: Sequence[Queued]) -> Iterator[list[Queued]]:
    """Runs that differ in the seed alone, in the order of the queue."""
    groups: dict[tuple, list[Queued]] = {}
    for run in runs:
        groups.setdefault((run.size, run.value, run.network), []).append(run)
    yield from groups.values()


def _seconds(value: float) -> str:
    return f"{value:.3g} s"


@click.command(context_settings=dict(max_content_width=120))
@click.argument("queue", type=click.File("r", encoding="utf-8"), default="-")
@click.option("--measure", help="Options of mem_ratio.py", metavar="OPTIONS", default="")
@click.option("--jobs", help="Runs at a time", metavar="INT", type=click.IntRange(1, 1 << 16), default=1)
@click.option("--nproc", help="Processes per run", metavar="INT", type=click.IntRange(1, 1 << 16), default=1)
@click.option("--source", help="Images whose shape fills the gaps", metavar="PATH")
@click.option(
    "--limit", help="Seconds to time each network for, training and sampling each  [default: 2, fewer for many]",
    metavar="SEC", type=Float(min=0, min_open=True, max=3600),
)  # fmt: skip
@report_errors
def main(queue: IO[str], measure: str, jobs: int, nproc: int, source: str | None, limit: float | None) -> None:
    """Say what queued runs will cost on this machine, by timing their networks now."""
    startup = time.time() - psutil.Process().create_time()  # of Python and torch, as each command of a run needs it
    runs = read_queue(queue.read().splitlines())
    networks = list(dict.fromkeys(run.network for run in runs))
    limit = limit if limit is not None else min(2.0, max(0.3, 30 / len(networks)))
    words = shlex.split(measure)
    costs: dict[tuple[str, str], Cost] = {}
    for network in networks:
        run = min((run for run in runs if run.network == network), key=lambda run: run.size)
        try:
            costs[network] = time_network(run, find_shape(run.shape, source), words, limit, nproc)
        except (click.ClickException, OSError, ValueError, torch.OutOfMemoryError) as err:
            text = err.format_message() if isinstance(err, click.ClickException) else str(err).splitlines()[0]
            raise click.ClickException(f"{run.value}, |D| = {run.size}: {text}") from None
    for line in describe(runs, costs, jobs, nproc, startup):
        click.echo(line)


def describe(
    runs: Sequence[Queued], costs: dict[tuple[str, str], Cost], jobs: int, nproc: int, startup: float
) -> Iterator[str]:
    """The lines that say what was timed, and what each run and all of them cost."""
    machines = list(dict.fromkeys((cost.machine, cost.threads) for cost in costs.values()))
    names = [machine if n is None else f"{machine}, {n} thread{'s' * (n > 1)}" for machine, n in machines]
    yield f"Timed now, beside whatever else runs on this machine: {' and '.join(names)}; torch {torch.__version__}."
    for network in costs:
        yield "  " + describe_network([run for run in runs if run.network == network], costs[network])
    if nproc > 1:
        yield f"  Of {nproc} processes per run one was timed, with its share: as if they did not slow each other down."

    left: list[tuple[int, float, float]] = []  # |D|, seconds of each run that is still to do, and if it were alone
    for group in _same_runs(runs):
        train_sec, measure_sec = costs[group[0].network].seconds(group[0].size, nproc)
        seeds = " ".join(run.seed for run in group)
        waiting = [run for run in group if not is_done(run)]
        done = f" ({len(group) - len(waiting)} done)" if len(waiting) < len(group) else ""
        snapshots = costs[group[0].network].planned(group[0].size)[1]
        yield (
            f"  |D| = {group[0].size}, {group[0].value}, seed{'s' if len(group) > 1 else ''} {seeds}{done}: training "
            f"{format_time(train_sec)}, measuring {format_time(measure_sec)} "
            f"({snapshots} snapshot{'s' if snapshots != 1 else ''}){' each' if len(group) > 1 else ''}"
        )
        alone = sum(costs[group[0].network].seconds(group[0].size, nproc, alone=True))
        left += [(run.size, train_sec + measure_sec + 2 * startup, alone + 2 * startup) for run in waiting]
    left.sort(key=lambda entry: -entry[0])  # the largest sets first, as the scripts do

    def total(seconds: Sequence[float]) -> str:
        text = f"{format_time(sum(seconds))} for {len(left)} runs, one after the other"
        if jobs > 1:
            at_once = format_time(wall_seconds(seconds, jobs))
            text += f"; {at_once} with {jobs} at a time, if they do not slow each other down"
        return text

    if (share := min(part.share for cost in costs.values() for part in (cost.training, cost.sampling))) < 0.9:
        yield (
            f"Other work took up to {100 * (1 - share):.0f} % of the time of its thread. "
            f"Without it, at most: {total([seconds for *_, seconds in left])}."
        )
    now = total([seconds for _, seconds, _ in left])
    start = _seconds(2 * startup)
    yield f"Total: {now}. With {start} of starting up per run; without datasets, neighbours, --quality, --gap, figures."


def describe_network(runs: Sequence[Queued], cost: Cost) -> str:
    """What was timed of a network, in a line."""
    values = list(dict.fromkeys(run.value for run in runs))
    t, s = cost.training, cost.sampling
    sizes = sorted({run.size for run in runs})
    name = ", ".join(values)
    resolution, channels, classes = cost.shape
    image = f"{resolution}x{resolution}x{channels}"
    label = f", {classes} classes" if "--cond=1" in runs[0].options.split() else ""
    return (
        f"{name} ({image}{label}, {cost.precision}): {_seconds(1000 * t.seconds)} per kimg of training "
        f"(timed: {_count(t, 'step')}), {_seconds(s.seconds)} per generated image "
        f"({cost.evaluations} evaluations, timed: {_count(s, 'evaluation')})"
        + (f", at |D| = {sizes[0]}" if "--cond=1" in runs[0].options.split() and len(sizes) == 1 else "")
    )


def _count(steps: Steps, what: str) -> str:
    """What was timed: "3 evaluations of 50 images instead of 250, scaled up"."""
    text = f"{steps.count} {what}{'s' * (steps.count > 1)} of {steps.images} image{'s' * (steps.images > 1)}"
    return text + (f" instead of {steps.of}, scaled up" if steps.images < steps.of else "")


if __name__ == "__main__":
    main()
