"""Time what runs on a GPU against plain implementations in the same run: one command, meant for 8 minutes on an H100.

    python benchmarks/bench_gpu.py --out=DIR [--device=cpu --tiny] [--rows=optimum,neighbours,train,sample]

Rows are the optimum's evaluations of an 18-step sampler (64 and 512 seeds), the two nearest of 60,000 images to
10,000, training steps of DDPM++ at three sizes, and sampling; images are random. The plain implementations do what the
published code does, written anew, in float32. Each row says

- ratio: how many times faster ours is, the median over turns, in which both take part one after the other (but
  plain sampling is timed once);
- limit: the share of what the device could do, of the time that the row's products and its least traffic of memory
  take at the rates of a large matrix product in the row's precision and of a large copy, measured first;
- exact: how far our result is from the definition (optimum, neighbours), or from the plain one (the loss of the first
  step, relative; images of the same seeds, mean difference in grey levels).

DIR/bench_gpu.json and DIR/bench_gpu.txt are written anew after each row: a run cut short leaves what it has.
"""

import copy
import json
import platform
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # wherever it is started

import click
import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.bench_knn import PlainSearch, make_queries
from benchmarks.bench_optim import PlainOptimum, Timed
from benchmarks.bench_train import SIZES, OurStep, PlainStep, plain_layers, timed
from dnnlib.cli import report_errors
from dnnlib.util import atomic_write
from memorization.measure.knn import Neighbors, plain_neighbors
from memorization.measure.knn_products import int8_product, int8_works
from torch_utils import distributed as dist
from training.generation import generate_images
from training.networks import build_network
from training.optim import OptimEDM
from training.optim_sums import plain_optimum
from training.options import device_option
from training.precision import arithmetic, check_precision, prepare_denoiser
from training.samplers import StackedRandomGenerator, edm_sampler

ROWS = ("optimum", "neighbours", "train", "sample")
_CUDA_WAYS = [("fp32", False), ("tf32", False), ("bf16", False), ("bf16", True)]  # (precision, compiled)
_CPU_WAYS = [("fp32", False), ("bf16", False)]


class Sizes:
    """How large each row is; `tiny` is for seeing that it runs."""

    def __init__(self, tiny: bool):
        self.tiny = tiny
        self.images, self.shape, self.queries = (500, (1, 8, 8), 50) if tiny else (60_000, (1, 32, 32), 10_000)
        self.seeds = (4, 8) if tiny else (64, 512)
        self.train = ["demo"] if tiny else ["32x32", "8x8", "16x16"]
        self.sample, self.sampled, self.steps = ("demo", 4, 3) if tiny else ("32x32", 512, 18)
        self.turns = 1 if tiny else 3


# ----------------------------------------------------------------------------
# What the device can do.


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(function: Callable[[], Any], device: torch.device) -> float:
    wait(device)
    start = time.perf_counter()
    function()
    wait(device)
    return time.perf_counter() - start


def measure_limits(device: torch.device, tiny: bool) -> dict[str, float]:
    """Operations per second of a large product by precision, and bytes per second of a large copy ("copy")."""
    cuda = device.type == "cuda"
    n = 256 if tiny else 8192 if cuda else 1024
    found = {}
    for precision in ["fp32", "bf16", *(["tf32", "fp16"] if cuda else [])]:
        dtype = dict(bf16=torch.bfloat16, fp16=torch.float16).get(precision, torch.float32)
        a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in "ab")
        with arithmetic(precision):
            taken = min(seconds(lambda a=a, b=b: a @ b, device) for _ in range(5))
        found[precision] = 2 * n**3 / taken
    if int8_works(device):
        a, b = (torch.randint(-128, 128, (n, n), device=device, dtype=torch.int8) for _ in "ab")
        found["int8"] = 2 * n**3 / min(seconds(lambda: int8_product(a, b), device) for _ in range(5))
    a = torch.zeros(1 << (22 if tiny else 30 if cuda else 27), dtype=torch.uint8, device=device)
    b = torch.ones_like(a)
    found["copy"] = 2 * len(a) / min(seconds(lambda: a.copy_(b), device) for _ in range(5))
    return found


# ----------------------------------------------------------------------------
# Rows.


def in_turns(plain: Callable[[], float], ours: Callable[[], float], turns: int, work: float | None = None) -> dict:
    """Entries plain, ours and ratio of a row, from functions that return seconds.

    Of the fastest turns: the seconds, or the images per second where `work` is the number of images.
    """
    both = [(plain(), ours()) for _ in range(turns)]
    ratios = sorted(a / b for a, b in both)
    fastest = [min(column) for column in zip(*both)]
    plain, ours = (work / taken if work else taken for taken in fastest)
    return dict(
        unit="img/s" if work else "s", plain=plain, ours=ours, ratio=ratios[len(ratios) // 2], ratio_low=ratios[0],
        ratio_high=ratios[-1], turns=turns,
    )  # fmt: skip


def random_images(count: int, shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    """Blurred noise, uint8 [count, C, H, W]; every tenth image is the one before but for one grey level of a pixel."""
    generator = torch.Generator().manual_seed(seed)
    parts = []
    for start in range(0, count, 5000):
        coarse = torch.rand(min(5000, count - start), shape[0], 4, 4, generator=generator)
        fine = interpolate(coarse, size=shape[1:], mode="bilinear")
        noise = torch.rand(fine.shape, generator=generator)
        parts.append((255 * (0.85 * fine + 0.15 * noise)).to(torch.uint8))
    images = torch.cat(parts).numpy()
    images[1::10] = images[: len(images[1::10]) * 10 : 10]
    images[1::10, 0, 0, 0] ^= 1
    return images


def optimum_rows(sizes: Sizes, device: torch.device, limits: dict[str, float]) -> Iterator[Callable[[], dict]]:
    images = torch.from_numpy(random_images(sizes.images, sizes.shape))
    dim = images[0].numel()
    precision = "bf16" if device.type == "cuda" else "fp32"

    def row(batch: int) -> dict[str, Any]:
        ours, plain = OptimEDM(images).to(device), PlainOptimum(images.to(device))
        if device.type == "cuda":
            ours.images = ours.images.to(device)
        evaluations = 35  # of 18 Heun steps

        def run(net: Callable) -> float:
            net, rnd = Timed(net, device), StackedRandomGenerator(device, range(batch))
            edm_sampler(net, rnd.randn([batch, *sizes.shape]), randn_like=rnd.randn_like)
            return sum(net.seconds.values())

        run(ours), run(plain)  # what happens once
        found = in_turns(lambda: run(plain), lambda: run(ours), sizes.turns)
        products = 4 * batch * len(images) * dim / limits[precision]
        traffic = (len(images) * dim * (2 if precision == "bf16" else 4) + 4 * batch * len(images)) / limits["copy"]
        worst = 0.0
        random = torch.Generator().manual_seed(1)
        for sigma in (0.002, 0.02, 0.2, 2, 80):
            x = images[:4].to(torch.float64) / 127.5 - 1
            x = (x + sigma * torch.randn(x.shape, generator=random, dtype=torch.float64)).to(device)
            expected = plain_optimum(images.to(device), x, sigma)[0]
            out = ours(x, torch.tensor(sigma, dtype=torch.float64, device=device))
            worst = max(worst, float((out - expected).abs().max()))
        return dict(
            found, row="optimum", setting=f"{batch} seeds, {len(images)} x {dim}",
            limit=evaluations * (products + traffic) / found["ours"], exact=worst,
            exact_means="largest difference from float64 at sigma 0.002 to 80, data in [-1, 1]",
        )  # fmt: skip

    for batch in sizes.seeds:
        yield lambda batch=batch: row(batch)


def neighbours_rows(sizes: Sizes, device: torch.device, limits: dict[str, float]) -> Iterator[Callable[[], dict]]:
    images = random_images(sizes.images, sizes.shape)
    queries = make_queries(images, None, sizes.queries)
    dim = images[0].size
    flat = {name: (part.reshape(len(part), -1) / np.float32(255)).astype(np.float32) for name, part in queries.items()}
    sets = {
        "near-copies": (images, queries["near-copies"]),
        "unrelated": (images, queries["unrelated"]),
        "float vectors": (images.reshape(len(images), -1) / np.float32(255), flat["near-copies"]),
    }

    def row(name: str) -> dict[str, Any]:
        reference, asked = sets[name]
        plain = PlainSearch(reference, device)
        prepare = seconds(lambda: Neighbors(reference, device=device), device)
        ours = Neighbors(reference, device=device)
        pixels = reference.dtype == np.uint8
        ours.query(asked), plain.query(asked[:2000], 2)  # what happens once
        found = in_turns(
            lambda: seconds(lambda: plain.query(asked, 2), device), lambda: seconds(lambda: ours.query(asked), device),
            sizes.turns,
        )  # fmt: skip
        rate = limits["int8" if pixels and "int8" in limits else "fp32"]
        size = 1 if pixels and "int8" in limits else 4
        least = 2 * len(asked) * len(images) * dim / rate + (len(asked) + len(images)) * dim * size / limits["copy"]
        few = asked[:: max(len(asked) // 10, 1)]
        distance, index = ours.query(few)
        expected, right = plain_neighbors(few, reference, 2)
        return dict(
            found, row="neighbours", setting=f"{name}, {len(asked)} to {len(images)} x {dim}",
            prepare_seconds=prepare, limit=least / found["ours"], exact=float(np.abs(distance - expected).max()),
            wrong=int((index != right).sum()),
            wrong_plain=int((plain.query(few, 2)[1] != right).sum()),
            exact_means=f"largest difference of distances from the definition, {len(few)} queries",
        )  # fmt: skip

    for name in sets:
        yield lambda name=name: row(name)


def ways(device: torch.device, tiny: bool) -> list[tuple[str, bool]]:
    return _CUDA_WAYS if device.type == "cuda" and not tiny else _CPU_WAYS


def build(size: str, device: torch.device) -> torch.nn.Module:
    torch.manual_seed(0)
    net = build_network(**SIZES[size][2])
    with torch.no_grad():
        for p in net.parameters():  # some layers begin as zero, which no arithmetic can get wrong
            p.add_(0.01 * torch.randn_like(p))
    return net.to(device)


def operations(net: torch.nn.Module, device: torch.device, backward: bool) -> int:
    """Floating-point operations of products and convolutions per image."""
    x = torch.randn(1, net.img_channels, net.img_resolution, net.img_resolution, device=device)
    with FlopCounterMode(display=False) as counter, plain_layers(), torch.set_grad_enabled(backward):
        out = net(x, torch.ones(1, device=device))
        if backward:
            out.square().mean().backward()
    net.zero_grad(set_to_none=True)
    return counter.get_total_flops()


def train_rows(sizes: Sizes, device: torch.device, limits: dict[str, float]) -> Iterator[Callable[[], dict]]:
    def row(size: str, precision: str, compile: bool) -> dict[str, Any]:
        loss, batch, _ = SIZES[size]
        batch = 4 if sizes.tiny else batch
        check_precision(precision, device, compile)
        net = build(size, device).train()
        images = torch.from_numpy(random_images(1000, (net.img_channels, net.img_resolution, net.img_resolution)))
        work = batch * operations(net, device, backward=True)
        plain = PlainStep(copy.deepcopy(net), loss, images, batch, device)
        ours = OurStep(net, loss, images, batch, device, precision=precision, compile=compile)
        losses = []
        for step in (plain, ours):
            torch.manual_seed(1)
            losses.append(float(step().double().mean()))
        steps = 1 if sizes.tiny else 3
        timed(ours, steps), timed(plain, 1)
        found = in_turns(lambda: timed(plain, steps), lambda: timed(ours, steps), sizes.turns, batch)
        return dict(
            found, row="train", setting=f"{size}, batch {batch}, {precision}{', compiled' if compile else ''}",
            limit=work / limits[precision] / (batch / found["ours"]), exact=abs(losses[1] / losses[0] - 1),
            exact_means="relative difference of the loss of the first step",
        )  # fmt: skip

    for precision, compile in ways(device, sizes.tiny):
        for size in sizes.train:
            yield lambda size=size, precision=precision, compile=compile: row(size, precision, compile)


@torch.no_grad()
def plain_sample(net: torch.nn.Module, seeds: range, steps: int, device: torch.device) -> Tensor:
    """Heun's method (EDM, Algorithm 1) as one writes it down; uint8 [n, C, H, W] on the CPU."""
    shape = [net.img_channels, net.img_resolution, net.img_resolution]
    x = torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds]).to(device)
    low, high = max(0.002, net.sigma_min), min(80, net.sigma_max)
    ramp = torch.arange(steps, dtype=torch.float64, device=device) / (steps - 1)
    t = net.round_sigma((high ** (1 / 7) + ramp * (low ** (1 / 7) - high ** (1 / 7))) ** 7)
    t = torch.cat([t, torch.zeros_like(t[:1])])
    x = x.to(torch.float64) * t[0]
    with plain_layers():
        for now, after in zip(t[:-1], t[1:]):
            slope = (x - net(x, now).to(torch.float64)) / now
            moved = x + (after - now) * slope
            if after > 0:
                second = (moved - net(moved, after).to(torch.float64)) / after
                moved = x + (after - now) * (slope + second) / 2
            x = moved
    return (x * 127.5 + 128).clip(0, 255).to(torch.uint8).cpu()


def sample_rows(sizes: Sizes, device: torch.device, limits: dict[str, float]) -> Iterator[Callable[[], dict]]:
    plain: list[tuple[float, Tensor]] = []  # seconds and images, measured once

    def row(precision: str, compile: bool) -> dict[str, Any]:
        seeds, steps = range(sizes.sampled), sizes.steps
        net = build(sizes.sample, device).eval().requires_grad_(False)
        work = len(seeds) * (2 * steps - 1) * operations(net, device, backward=False)
        ours = prepare_denoiser(copy.deepcopy(net), precision, compile)

        def sample(count: int) -> Tensor:
            kwargs = dict(num_steps=count)
            return torch.cat([x for _, x in generate_images(ours, seeds, batch=len(seeds), sampler_kwargs=kwargs)])

        if not plain:
            plain_sample(net, seeds, 2, device)  # what happens once
            images: list[Tensor] = []
            taken = seconds(lambda: images.append(plain_sample(net, seeds, steps, device)), device)
            plain.append((taken, images[0]))
        sample(2)
        images = []
        found = in_turns(
            lambda: plain[0][0], lambda: seconds(lambda: images.append(sample(steps)), device), 1, len(seeds)
        )
        return dict(
            found, row="sample",
            setting=f"{sizes.sample}, {steps} steps, batch {len(seeds)}, {precision}{', compiled' if compile else ''}",
            limit=work / limits[precision] / (len(seeds) / found["ours"]),
            exact=float((images[0].float() - plain[0][1].float()).abs().mean()),
            exact_means="mean difference of the images, grey levels",
        )  # fmt: skip

    for precision, compile in ways(device, sizes.tiny):
        yield lambda precision=precision, compile=compile: row(precision, compile)


# ----------------------------------------------------------------------------


def table(found: dict[str, Any]) -> str:
    limits = ", ".join(
        f"{name} {rate / 1e9:,.0f} GB/s" if name == "copy" else f"{name} {rate / 1e12:,.2f} T/s"
        for name, rate in found["limits"].items()
    )
    lines = [f"{found['device']}, torch {found['torch']}, CUDA {found['cuda']}; {found['command']}", limits, ""]
    lines.append(f"{'row':<11} {'setting':<45} {'plain':>9} {'ours':>9}       {'ratio':>6} {'limit':>6} {'exact':>8}")
    for row in found["rows"]:
        if "error" in row:
            lines.append(f"{row['row']:<11} {row['error']}")
            continue
        wrong = f"  {row['wrong']} wrong (plain {row['wrong_plain']})" if "wrong" in row else ""
        lines.append(
            f"{row['row']:<11} {row['setting']:<45} {row['plain']:>9.4g} {row['ours']:>9.4g} {row['unit']:<5} "
            f"{row['ratio']:>6.2f} {100 * row['limit']:>5.1f}% {row['exact']:>8.1e}{wrong}"
        )
    means = {row["row"]: row["exact_means"] for row in found["rows"] if "exact_means" in row}
    return "\n".join([*lines, "", *(f"exact, {name}: {text}" for name, text in means.items())]) + "\n"


@click.command(context_settings=dict(max_content_width=120))
@click.option("--out", help="Folder of bench_gpu.json and bench_gpu.txt", metavar="DIR", required=True)
@click.option("--rows", help=f"Any of {','.join(ROWS)}", metavar="LIST", default=",".join(ROWS), show_default=True)
@click.option("--tiny", help="Small sizes, which only show that it runs", is_flag=True)
@click.option(
    "--minutes", help="Start no row after so long", metavar="FLOAT", type=float, default=7.0, show_default=True
)
@device_option
@report_errors
def main(out: str, rows: str, tiny: bool, minutes: float, device: str) -> None:
    """Time ours against a plain implementation, row by row (see the top of this file)."""
    start = time.perf_counter()
    names = rows.split(",")
    if not set(names) <= set(ROWS):
        raise click.UsageError(f"--rows={rows} names other rows than {', '.join(ROWS)}; leave them out.")
    target, sizes = dist.init(device), Sizes(tiny)
    name = f"{platform.machine()}, {torch.get_num_threads()} threads"
    if target.type == "cuda":
        name = torch.cuda.get_device_name(target)
    command = " ".join(["bench_gpu.py", *sys.argv[1:]])
    found: dict[str, Any] = dict(
        device=name, torch=torch.__version__, cuda=torch.version.cuda, command=command,
        tiny=tiny, limits=measure_limits(target, tiny), rows=[],
    )  # fmt: skip
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    making = dict(optimum=optimum_rows, neighbours=neighbours_rows, train=train_rows, sample=sample_rows)
    shown = 0
    for kind in names:
        for measure in making[kind](sizes, target, found["limits"]):
            began = time.perf_counter()
            if began - start > 60 * minutes:
                row = dict(row=kind, error=f"not measured: {minutes:g} minutes were over (--minutes)")
            else:
                try:
                    row = dict(measure(), took=time.perf_counter() - began)
                except (RuntimeError, ValueError) as err:  # out of memory, no compiler: the others go on
                    row = dict(row=kind, error=f"failed: {str(err).splitlines()[0]}")
            found["rows"].append(row)
            text = table(found)
            with atomic_write(folder / "bench_gpu.json", "w") as file:
                json.dump(found, file, indent=2)
            with atomic_write(folder / "bench_gpu.txt", "w") as file:
                file.write(text)
            lines = text.split("\n\nexact")[0].splitlines()
            click.echo("\n".join(lines[shown:]))
            shown = len(lines)
            if target.type == "cuda":
                torch.cuda.empty_cache()
    if any(row.get("error", "").startswith("failed") for row in found["rows"]):
        raise click.ClickException(f'Some rows failed; the others are in "{folder}".')


if __name__ == "__main__":
    main()
