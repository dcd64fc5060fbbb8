"""Seconds per kimg of training on the CPU, by the number of threads, and the number that train.py chooses.

`python benchmarks/bench_threads.py` on a quiet machine, and again beside other work: `--busy=4` starts four processes
that do nothing but compute.
"""

import json
import multiprocessing
import os
import time

import click
import torch

from torch_utils.threads import choose_threads, cpu_threads, network_work
from training.loss import LOSSES
from training.networks import build_network
from training.optimizer import Adam

# name: (channels, channel_mult, resolution, images per step)
CASES = {
    "digits 8x8 (README)": (16, [1, 2], 8, 16),
    "8x8, wider": (64, [2, 2], 8, 64),
    "32x32, small": (32, [1, 2], 32, 32),
}


def seconds_per_kimg(case: tuple, threads: int, seconds: float) -> float:
    """Of training steps (forward, backward, update), the fastest of several."""
    channels, mult, resolution, batch = case
    torch.manual_seed(0)
    net = make_net(case).train().requires_grad_(True)
    optimizer = Adam(net.parameters(), lr=1e-3, betas=(0.9, 0.999), eps=1e-8, fused=True)
    loss, images = LOSSES["edm"](), torch.rand(batch, 1, resolution, resolution) * 2 - 1
    best, end = float("inf"), time.perf_counter() + seconds
    with cpu_threads(threads):
        while time.perf_counter() < end or best == float("inf"):
            start = time.perf_counter()
            optimizer.zero_grad(set_to_none=True)
            loss(net, images, None, augment_pipe=None).sum().mul(1 / batch).backward()
            optimizer.step()
            best = min(best, time.perf_counter() - start)
    return best * 1000 / batch


def make_net(case: tuple) -> torch.nn.Module:
    channels, mult, resolution, _ = case
    return build_network(
        class_name="EDMPrecond", model_type="SongUNet", model_channels=channels, channel_mult=mult, num_blocks=1,
        attn_resolutions=[4], img_resolution=resolution, img_channels=1, label_dim=0,
    )  # fmt: skip


def _work() -> None:
    while True:
        sum(range(100_000))


@click.command()
@click.option("--threads", help="Numbers of threads, with commas  [default: 1, 2 and all]", metavar="LIST")
@click.option("--busy", help="Processes that compute meanwhile", type=click.IntRange(min=0), default=0)
@click.option("--seconds", help="Per measurement", type=float, default=2.0, show_default=True)
def main(threads: str | None, busy: int, seconds: float) -> None:
    """Measure training steps of small networks on 1, 2 and all CPU threads; print one JSON object per network."""
    available = torch.get_num_threads()
    counts = sorted({int(n) for n in threads.split(",")} if threads else {1, min(2, available), available})
    others = [multiprocessing.Process(target=_work, daemon=True) for _ in range(busy)]
    for other in others:
        other.start()
    for name, case in CASES.items():
        found = {str(count): round(seconds_per_kimg(case, count, seconds), 3) for count in counts}
        chosen = choose_threads(network_work(make_net(case), case[3]))
        by = "OMP_NUM_THREADS" if os.environ.get("OMP_NUM_THREADS") else "work"
        print(json.dumps(dict(network=name, sec_per_kimg=found, chosen=chosen, by=by, cpus=os.cpu_count(), busy=busy)))
    for other in others:
        other.terminate()


if __name__ == "__main__":
    main()
