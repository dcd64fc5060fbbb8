"""Time the closed-form optimum against the plain formula, in one run.

The plain formula is what one writes down first: all images as float32, torch.cdist, softmax, matrix product,
at each of the evaluations of an 18-step Heun sampler. Prints the seconds per noise level of both, their
ratio, the largest difference of the images, and the peak memory.
"""

import resource
import time
from collections.abc import Callable

import click
import torch

from dnnlib.cli import report_errors
from torch_utils import distributed as dist
from training.dataset import ImageFolderDataset
from training.optim import OptimEDM
from training.options import device_option
from training.samplers import StackedRandomGenerator, edm_sampler


class PlainOptimum:
    """D* by the textbook formula."""

    sigma_min, sigma_max = 0, float("inf")

    def __init__(self, images: torch.Tensor):
        self.y = images.flatten(1).to(torch.float32) / 127.5 - 1  # [N, dim]

    def round_sigma(self, sigma: torch.Tensor) -> torch.Tensor:
        return torch.as_tensor(sigma)

    def __call__(self, x: torch.Tensor, sigma: torch.Tensor, class_labels: None = None) -> torch.Tensor:
        rows = x.to(torch.float32).flatten(1)
        w = torch.softmax(-(torch.cdist(rows, self.y) ** 2) / (2 * sigma.to(torch.float32) ** 2), dim=1)  # [batch, N]
        return (w @ self.y).reshape(x.shape)


class Timed:
    """Adds up the seconds that calls of `net` take, by noise level."""

    def __init__(self, net: Callable, device: torch.device):
        self.net, self.device = net, device
        self.sigma_min, self.sigma_max, self.round_sigma = net.sigma_min, net.sigma_max, net.round_sigma
        self.seconds: dict[float, float] = {}

    def __call__(self, x: torch.Tensor, sigma: torch.Tensor, class_labels: None = None) -> torch.Tensor:
        self._wait()
        start = time.perf_counter()
        out = self.net(x, sigma, class_labels)
        self._wait()
        key = round(float(sigma), 4)
        self.seconds[key] = self.seconds.get(key, 0) + time.perf_counter() - start
        return out

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def peak_memory(device: torch.device) -> float:
    """GiB: of the device's allocator on CUDA, of the process on the CPU (so far)."""
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device) / 2**30
        torch.cuda.reset_peak_memory_stats(device)
        return peak
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


@click.command(context_settings=dict(max_content_width=120))
@click.option("--data", help="Dataset zip", metavar="ZIP", required=True)
@click.option("--batch", help="Seeds", metavar="INT", type=click.IntRange(min=1), default=64, show_default=True)
@click.option(
    "--repeats", help="Runs of each; the fastest counts", metavar="INT", type=click.IntRange(min=1), default=3
)
@click.option("--plain/--no-plain", help="Run the plain formula, too", default=True, show_default=True)
@device_option
@report_errors
def main(data: str, batch: int, repeats: int, plain: bool, device: str) -> None:
    """Time the closed-form optimum (training/optim.py) against the plain formula."""
    target = dist.init(device)
    images = torch.from_numpy(ImageFolderDataset(data).images())
    name = torch.cuda.get_device_name(target) if target.type == "cuda" else f"cpu, {torch.get_num_threads()} threads"
    click.echo(f"{len(images)} images {list(images.shape[1:])}, {batch} seeds, torch {torch.__version__}, {name}")

    def run(build: Callable) -> tuple[torch.Tensor, float, dict[float, float], float]:
        net = build()
        best = None
        for _ in range(repeats):
            timed = Timed(net, target)
            rnd = StackedRandomGenerator(target, range(batch))
            out = edm_sampler(timed, rnd.randn([batch, *images.shape[1:]]), randn_like=rnd.randn_like)
            total = sum(timed.seconds.values())
            if best is None or total < best[1]:
                best = (out, total, timed.seconds, peak_memory(target))
        return best

    def ours() -> OptimEDM:
        net = OptimEDM(images).to(target)
        net.images = net.images.to(target)
        return net

    # Ours first: the process's peak memory on the CPU only ever grows.
    out, total, seconds, memory = run(ours)
    reference = run(lambda: PlainOptimum(images.to(target))) if plain else None
    click.echo(f"{'sigma':>10} {'ours, s':>10} {'plain, s':>10} {'ratio':>7}")
    for sigma, value in seconds.items():
        other = reference[2][sigma] if reference else float("nan")
        click.echo(f"{sigma:>10.4f} {value:>10.4f} {other:>10.4f} {other / value:>7.1f}")
    other = reference[1] if reference else float("nan")
    click.echo(f"{'total':>10} {total:>10.3f} {other:>10.3f} {other / total:>7.2f}")
    if reference:
        click.echo(f"largest difference of the images: {(out - reference[0]).abs().max():.2e} (data in [-1, 1])")
    click.echo(f"peak memory: ours {memory:.2f} GiB" + (f", plain {reference[3]:.2f} GiB" if reference else ""))


if __name__ == "__main__":
    main()
