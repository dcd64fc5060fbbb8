"""Time one dense pass of the closed-form optimum over images of a given size (random pixels)."""

import time

import click
import torch

from dnnlib.cli import report_errors
from torch_utils import distributed as dist
from training.optim import OptimEDM
from training.options import device_option


@click.command(context_settings=dict(max_content_width=120))
@click.option("--images", help="Training images", metavar="INT", type=click.IntRange(min=1), default=10000)
@click.option("--resolution", help="Side in pixels", metavar="INT", type=click.IntRange(min=1), default=64)
@click.option("--channels", help="Colour channels", metavar="INT", type=click.IntRange(min=1), default=3)
@click.option("--batch", help="Rows", metavar="INT", type=click.IntRange(min=1), default=64, show_default=True)
@click.option("--repeats", help="The fastest counts", metavar="INT", type=click.IntRange(min=1), default=5)
@device_option
@report_errors
def main(images: int, resolution: int, channels: int, batch: int, repeats: int, device: str) -> None:
    """Time one evaluation at sigma = 80, where every image carries weight."""
    target = dist.init(device)
    shape = [channels, resolution, resolution]
    pixels = torch.randint(0, 256, [images, *shape], dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    net = OptimEDM(pixels).to(target)
    net.images = net.images.to(target)
    x = 80 * torch.randn(batch, *shape, device=target)
    sigma = torch.tensor(80.0, device=target)
    best = float("inf")
    for _ in range(repeats + 1):
        start = time.perf_counter()
        net(x, sigma).sum().item()
        best = min(best, time.perf_counter() - start)
    rate = 4 * batch * images * pixels[0].numel() / best / 1e9
    click.echo(f"{images} images {shape}, {batch} rows, {target}: {best:.3f} s a pass, {rate:.0f} GFLOP/s")


if __name__ == "__main__":
    main()
