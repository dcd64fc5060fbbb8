"""Time a training step of ours against a plain loop, in one run, and say what takes the time.

The plain loop does what the published code does, written anew: 2x resampling by a depthwise convolution, attention by
two products and a softmax, Adam as torch has it by default, one nan_to_num and one EMA update per tensor, and a batch
of images copied from the host at each step. Both take short turns, so that other work on the machine disturbs their
ratio little.
"""

import contextlib
import copy
import functools
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import click
import torch
from torch import Tensor
from torch.nn.functional import conv2d, conv_transpose2d

from dnnlib.cli import report_errors
from dnnlib.util import atomic_write
from torch_utils import distributed as dist
from torch_utils.training_stats import Collector
from training.loss import LOSSES
from training.networks import Conv2d, UNetBlock, build_network
from training.optimizer import Adam, clean_gradients
from training.options import device_option, precision_options
from training.precision import arithmetic, check_precision, compile_step, set_precision

VP = dict(
    class_name="VPPrecond", img_channels=3, model_type="SongUNet", model_channels=128, channel_mult=[2, 2, 2],
    num_blocks=2, attn_resolutions=[16], dropout=0.13,
)  # fmt: skip
# (loss, batch, network): of scripts/demo.sh, and the basic setting of the study at two sizes.
SIZES = {
    "demo": ("edm", 16, dict(class_name="EDMPrecond", img_resolution=8, img_channels=1, model_type="SongUNet",
                             model_channels=16, channel_mult=[1, 2], num_blocks=1, attn_resolutions=[4], dropout=0)),
    "8x8": ("vp", 128, dict(VP, img_resolution=8, channel_mult=[2, 2])),
    "16x16": ("vp", 256, dict(VP, img_resolution=16)),
    "32x32": ("vp", 256, dict(VP, img_resolution=32)),
}  # fmt: skip
CONVOLUTIONS = ("aten::mkldnn_convolution", "aten::cudnn_convolution", "aten::convolution_backward")
BETA = 0.999  # of the moving average


class Step:
    """A network, what trains it, and its moving average."""

    def __init__(self, net: torch.nn.Module, loss: str, images: Tensor, batch: int, device: torch.device):
        self.net, self.loss_fn, self.batch, self.device = net, LOSSES[loss](), batch, device
        self.params = list(net.parameters())
        self.ema = [p.detach().clone() for p in self.params]
        self.stats, self.count, self.images = Collector(device), 0, images  # images uint8 [N, C, H, W] on the CPU

    def _index(self) -> Tensor:
        self.count += 1
        return (torch.arange(self.batch) + self.count * self.batch) % len(self.images)


class PlainStep(Step):
    def __init__(self, *args: object):
        super().__init__(*args)
        self.optimizer = torch.optim.Adam(self.params, lr=1e-4)

    def __call__(self) -> Tensor:
        self.optimizer.zero_grad(set_to_none=True)
        images = torch.stack([self.images[i] for i in self._index().tolist()])  # as a loader collates them
        images = images.to(self.device).to(torch.float32) / 127.5 - 1
        with plain_layers():
            loss = self.loss_fn(self.net, images)
            self.stats.report("Loss/loss", loss)
            loss.sum().mul(1 / self.batch).backward()
        for p in self.params:
            if p.grad is not None:
                torch.nan_to_num(p.grad, nan=0, posinf=1e5, neginf=-1e5, out=p.grad)
        self.optimizer.step()
        for average, p in zip(self.ema, self.params):
            average.copy_(p.detach().lerp(average, BETA))
        return loss.detach()


class OurStep(Step):
    def __init__(self, *args: object, precision: str, compile: bool):
        super().__init__(*args)
        self.optimizer, self.precision = Adam(self.params, lr=1e-4), precision
        set_precision(self.net, precision)
        self.images = self.images.to(self.device)
        self.compute = functools.partial(_loss, self.loss_fn, self.net)
        if compile:
            self.compute = compile_step(self.compute, self.net, self.device)

    def __call__(self) -> Tensor:
        self.optimizer.zero_grad(set_to_none=True)
        index = self._index()
        index = index.pin_memory().to(self.device, non_blocking=True) if self.device.type == "cuda" else index
        with arithmetic(self.precision):
            loss, total = self.compute(self.images[index].to(torch.float32) / 127.5 - 1)
            self.stats.report("Loss/loss", loss)
            total.mul(1 / self.batch).backward()
        clean_gradients(self.params)
        self.optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_(self.ema, self.params, 1 - BETA)
        return loss.detach()


def _loss(loss_fn: Callable, net: torch.nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
    loss = loss_fn(net, images)
    return loss, loss.sum()


@contextlib.contextmanager
def plain_layers() -> Iterator[None]:
    """Let the layers compute as one writes them down first."""
    before = Conv2d._resample, UNetBlock._attend
    Conv2d._resample, UNetBlock._attend = _plain_resample, _plain_attend
    try:
        yield
    finally:
        Conv2d._resample, UNetBlock._attend = before


def _plain_resample(layer: Conv2d, x: Tensor, pad: int) -> Tensor:
    f = layer.resample_filter.to(x.dtype)
    if layer.up:
        return conv_transpose2d(x, f.mul(4).tile([x.shape[1], 1, 1, 1]), groups=x.shape[1], stride=2, padding=pad)
    return conv2d(x, f.tile([x.shape[1], 1, 1, 1]), groups=x.shape[1], stride=2, padding=pad)


def _plain_attend(block: UNetBlock, qkv: Tensor) -> Tensor:
    batch, channels, height, width = qkv.shape
    q, k, v = qkv.reshape(batch * block.num_heads, channels // block.num_heads // 3, 3, -1).unbind(2)
    weight = torch.einsum("ncq,nck->nqk", q.float(), (k / k.shape[1] ** 0.5).float()).softmax(dim=2).to(q.dtype)
    return torch.einsum("nqk,nck->ncq", weight, v).reshape(batch, channels // 3, height, width)


def timed(step: Step, steps: int) -> float:
    """Seconds per step."""
    _wait(step.device)
    start = time.perf_counter()
    for _ in range(steps):
        step()
    _wait(step.device)
    return (time.perf_counter() - start) / steps


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def convolution_share(step: Step, steps: int) -> float | None:
    """Share of the time on the device that convolutions take, 0..1; None if the profiler sees none (compiled)."""
    with torch.profiler.profile() as profile:
        timed(step, steps)
    kind = "self_device_time_total" if step.device.type == "cuda" else "self_cpu_time_total"
    spent = {event.key: getattr(event, kind) for event in profile.key_averages()}
    convolutions = sum(seconds for name, seconds in spent.items() if name.startswith(CONVOLUTIONS))
    return convolutions / sum(spent.values()) if convolutions else None


@click.command(context_settings=dict(max_content_width=120))
@click.option("--size", metavar="|".join(SIZES), type=click.Choice(list(SIZES)), default="demo", show_default=True)
@click.option("--batch", help="Images per step  [default: of the size]", metavar="INT", type=click.IntRange(min=1))
@click.option("--steps", help="Steps per turn", metavar="INT", type=click.IntRange(min=1), default=5, show_default=True)
@click.option("--turns", help="Turns of each", metavar="INT", type=click.IntRange(min=1), default=21, show_default=True)
@click.option("--out", help="Also write the numbers as JSON", metavar="FILE")
@precision_options
@device_option
@report_errors
def main(
    size: str,
    batch: int | None,
    steps: int,
    turns: int,
    out: str | None,
    precision: str | None,
    compile: bool,
    device: str,
) -> None:
    """Time training steps of ours and of a plain loop, which is always float32 and not compiled."""
    target, precision = dist.init(device), precision or "fp32"
    check_precision(precision, target, compile)
    loss, default_batch, network = SIZES[size]
    batch = batch or default_batch
    torch.manual_seed(0)
    net = build_network(**network).train().to(target)
    images = torch.randint(256, [1000, net.img_channels, net.img_resolution, net.img_resolution], dtype=torch.uint8)
    plain = PlainStep(copy.deepcopy(net), loss, images, batch, target)
    ours = OurStep(net, loss, images, batch, target, precision=precision, compile=compile)

    losses = []
    for step in (plain, ours):
        torch.manual_seed(1)
        losses.append(step().double().mean().item())
    for step in (plain, ours):
        timed(step, 3)
    seconds = [(timed(plain, steps), timed(ours, steps)) for _ in range(turns)]
    ratios = sorted(a / b for a, b in seconds)
    share = convolution_share(ours, steps)
    found = dict(
        size=size, batch=batch, precision=precision, compile=compile, device=str(target), torch=torch.__version__,
        threads=torch.get_num_threads(), plain_img_per_sec=batch / min(a for a, _ in seconds),
        img_per_sec=batch / min(b for _, b in seconds), ratio=ratios[len(ratios) // 2], ratio_low=ratios[0],
        ratio_high=ratios[-1], convolution_share=share, first_losses=losses,
    )  # fmt: skip
    if target.type == "cuda":
        found["device"] = torch.cuda.get_device_name(target)
    click.echo(
        f"{size}, batch {batch}, {precision}{', compiled' if compile else ''}, {found['device']}, "
        f"torch {torch.__version__}, {found['threads']} threads; {turns} turns of {steps} steps\n"
        f"plain {found['plain_img_per_sec']:.1f} img/s, ours {found['img_per_sec']:.1f} img/s (fastest turns)\n"
        f"ratio {found['ratio']:.2f} (median; {ratios[0]:.2f} to {ratios[-1]:.2f})\n"
        f"loss of the first step: plain {losses[0]:.6f}, ours {losses[1]:.6f}"
    )
    if share is not None:
        most = found["ratio"] / share
        click.echo(f"convolutions take {100 * share:.0f} % of our step; were all else free, the ratio: {most:.2f}")
    if out is not None:
        with atomic_write(Path(out), "w") as file:
            json.dump(found, file, indent=2)


if __name__ == "__main__":
    main()
