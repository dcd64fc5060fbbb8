"""Unique labels against no labels: time and memory of a training step, as ratios measured in one run.

    python benchmarks/bench_unique_labels.py --classes=50000 --batch=16

The step is that of the training loop: loss, backward pass, Adam, moving average of the weights. The two networks
take turns, step by step. The memory is the peak of a process of its own (on CUDA: of the allocator).
"""

import copy
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import click
import torch

from dnnlib.cli import report_errors
from torch_utils.distributed import select_device
from training.loss import LOSSES
from training.networks import build_network
from training.options import device_option


@click.command()
@click.option("--classes", help="Number of unique labels", type=click.IntRange(min=2), default=50_000)
@click.option("--batch", help="Images per step", type=click.IntRange(min=1), default=16)
@click.option("--channels", help="--num-channels of train.py", type=int, default=128)
@click.option("--blocks", help="--num-blocks of train.py", type=int, default=4)
@click.option("--resolution", type=int, default=32)
@click.option("--steps", help="Timed steps of each network", type=click.IntRange(min=1), default=5)
@click.option("--memory-of", type=int, hidden=True)
@device_option
@report_errors
def main(
    classes: int,
    batch: int,
    channels: int,
    blocks: int,
    resolution: int,
    steps: int,
    memory_of: int | None,
    device: str,
) -> None:
    """Time and memory of training with unique labels, relative to an unconditional network."""
    where = select_device(device)
    network = dict(channels=channels, blocks=blocks, resolution=resolution)
    if memory_of is not None:
        step = make_step(memory_of, batch, where, **network)
        step(), step()
        click.echo(peak_memory(where))
        return

    # Time: in turns, so that both see the same machine.
    candidates = {label_dim: make_step(label_dim, batch, where, **network) for label_dim in (0, classes)}
    times: dict[int, list[float]] = {label_dim: [] for label_dim in candidates}
    for i in range(steps + 1):
        for label_dim, step in candidates.items():
            start = time.perf_counter()
            step()
            if i > 0:  # the first one allocates
                times[label_dim].append(time.perf_counter() - start)
    seconds = {label_dim: statistics.median(values) for label_dim, values in times.items()}
    del candidates, step

    # Memory: each in a process of its own.
    peak = {}
    for label_dim in (0, classes):
        command = [sys.executable, __file__, f"--memory-of={label_dim}", f"--batch={batch}", f"--device={where.type}"]
        command += [f"--{key}={value}" for key, value in network.items()]
        peak[label_dim] = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)

    click.echo(f"batch {batch}, {channels} channels, {blocks} blocks, {where.type}, torch {torch.__version__}")
    click.echo(f"{'':>16} {'s/step':>8} {'GiB':>6}")
    for label_dim, name in ((0, "unconditional"), (classes, f"{classes} labels")):
        click.echo(f"{name:>16} {seconds[label_dim]:8.3f} {peak[label_dim] / 2**30:6.2f}")
    click.echo(f"{'ratio':>16} {seconds[classes] / seconds[0]:8.3f} {peak[classes] / peak[0]:6.3f}")


def make_step(
    label_dim: int, batch: int, device: torch.device, channels: int, blocks: int, resolution: int
) -> Callable[[], None]:
    """One training step of the published EDM setting on random images, with Adam and EMA."""
    torch.manual_seed(0)
    net = build_network(
        class_name="EDMPrecond", model_type="SongUNet", img_resolution=resolution, img_channels=3, label_dim=label_dim,
        model_channels=channels, channel_mult=[2, 2, 2], num_blocks=blocks, attn_resolutions=[resolution // 2],
        dropout=0.13,
    ).to(device).train()  # fmt: skip
    ema = copy.deepcopy(net).eval().requires_grad_(False)
    params, ema_params = list(net.parameters()), list(ema.parameters())
    optimizer = torch.optim.Adam(params, lr=1e-3, fused=True)
    loss_fn = LOSSES["edm"]()
    images = torch.rand(batch, 3, resolution, resolution, device=device) * 2 - 1

    def step() -> None:
        labels = torch.randint(label_dim, (batch,), device=device) if label_dim else None
        optimizer.zero_grad(set_to_none=True)
        loss_fn(net, images, labels).sum().div(batch).backward()
        for p in params:
            torch.nan_to_num(p.grad, nan=0, posinf=1e5, neginf=-1e5, out=p.grad)
        optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_(ema_params, params, 1e-3)
        if device.type == "cuda":
            torch.cuda.synchronize()

    return step


def peak_memory(device: torch.device) -> int:
    """Bytes."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    main()
