"""The one loop from seeds to uint8 images; every tool that samples uses it."""

import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from dnnlib.images import encode_png
from dnnlib.util import atomic_write, check_folder
from torch_utils import distributed as dist
from training.samplers import ABLATIONS, DrawnAhead, StackedRandomGenerator, ablation_sampler, edm_sampler

# On the CPU the number of rows decides which kernels torch takes, and they round differently. Multiples of this
# number get the same ones, where the number of threads is a power of two (as measured for 1 to 16 threads); so
# batches are filled up by repeating their last seed.
_ROWS = 16


def split_seeds(seeds: Sequence[int]) -> list[int]:
    """This rank's share of `seeds`: every world_size-th one. Shares may differ by one and may be empty."""
    return list(seeds[dist.get_rank() :: dist.get_world_size()])


def check_class(net: torch.nn.Module, class_idx: int | None) -> None:
    """Raise ValueError if `class_idx` is a class that the network lacks, or of which an optimum has no image."""
    if class_idx is None:
        return
    if not net.label_dim:
        raise ValueError("--class asks for a class, but the network is unconditional; leave it out.")
    if not 0 <= class_idx < net.label_dim:
        raise ValueError(f"--class={class_idx} is not one of the network's classes 0-{net.label_dim - 1}.")
    if hasattr(net, "bounds") and class_idx in net.empty_classes:
        raise ValueError(f"The training set has no image of class {class_idx}; choose one that it has by --class.")


def drawn_classes(net: torch.nn.Module) -> list[int]:
    """The classes that images are drawn of: those that training saw (`net.empty_classes` are the others)."""
    empty = set(getattr(net, "empty_classes", []))
    return [c for c in range(net.label_dim) if c not in empty]


def draw_all_classes(net: torch.nn.Module) -> None:
    """Draw also classes that training never saw, as published; an optimum has none of them."""
    if not hasattr(net, "bounds"):
        net.empty_classes = []


@torch.no_grad()
def generate_images(
    net: torch.nn.Module,
    seeds: Sequence[int],
    *,
    batch: int = 64,
    ends: Sequence[int] = (),
    class_idx: int | None = None,
    sampler_kwargs: dict[str, Any] | None = None,
    device: torch.device | str | None = None,
) -> Iterator[tuple[list[int], Tensor]]:
    """Generate an image per seed, batch by batch: yields (seeds, images), images uint8 [b, C, H, W] on the CPU.

    Latents, class and injected noise of an image come from its seed alone. On the CPU the images are then
    the same, bit by bit, at any batch size and number of processes, with 1, 2, 4, 8 or 16 threads each; else
    they are up to the rounding of convolutions that depends on the batch size.

    Parameters
    ----------
    net : preconditioned network, what `training.precision.prepare_denoiser` makes of it, or `OptimEDM`
    seeds : this process's share; see `split_seeds`
    batch : images at a time
    ends : positions in `seeds` where a batch ends anyway
    class_idx : class of all images; None draws one per seed, if the network is conditional, of `drawn_classes`
    sampler_kwargs : arguments of `edm_sampler`; with any of solver, discretization, schedule, scaling those
        of `ablation_sampler`. Entries that are None are left at the sampler's defaults.
    device : where `net` lies; None = the device of its first parameter or buffer

    Raises
    ------
    ValueError
        If the class does not exist or sampler arguments contradict each other.
    """
    check_class(net, class_idx)
    if device is None:
        device = next((t.device for t in [*net.parameters(), *net.buffers()]), torch.device("cpu"))
    kwargs = {key: value for key, value in (sampler_kwargs or {}).items() if value is not None}
    sampler = ablation_sampler if kwargs.keys() & ABLATIONS.keys() else edm_sampler
    shape = [net.img_channels, net.img_resolution, net.img_resolution]

    device = torch.device(device)
    batches = split_batches(seeds, batch, ends)
    classes = drawn_classes(net) if net.label_dim else []

    def draw(batch_seeds: list[int]) -> tuple[StackedRandomGenerator, Tensor, Tensor | None]:
        rows = len(batch_seeds)
        if getattr(net, "compiled", False):
            rows = max(rows, batch)  # one shape, which is compiled once
        if device.type == "cpu":
            rows = -(-rows // _ROWS) * _ROWS
        rnd = StackedRandomGenerator(device, batch_seeds + batch_seeds[-1:] * (rows - len(batch_seeds)))
        latents = rnd.randn([rows, *shape])
        if not net.label_dim:
            return rnd, latents, None
        labels = rnd.randint(len(classes), size=[rows])
        return rnd, latents, labels if len(classes) == net.label_dim else torch.tensor(classes, device=device)[labels]

    # A GPU gets its next batch before anyone looks at the last one, with numbers that a thread has drawn meanwhile.
    pool = ThreadPoolExecutor(1) if device.type == "cuda" else None
    try:
        drawn = pool.submit(draw, batches[0]) if pool is not None and batches else None
        waiting = None
        for i, batch_seeds in enumerate(batches):
            rnd, latents, class_labels = drawn.result() if pool is not None else draw(batch_seeds)
            if pool is not None:
                rnd = DrawnAhead(rnd, pool)
                drawn = pool.submit(draw, batches[i + 1]) if i + 1 < len(batches) else None
            if class_labels is not None and class_idx is not None:
                class_labels = torch.full_like(class_labels, class_idx)
            images = to_uint8(sampler(net, latents, class_labels, randn_like=rnd.randn_like, **kwargs))
            images = images[: len(batch_seeds)].to("cpu", non_blocking=True)
            if pool is None:
                yield batch_seeds, images
                continue
            arrived = torch.cuda.Event()
            arrived.record(torch.cuda.current_stream(device))
            if waiting is not None:
                yield _arrived(*waiting)
            waiting = batch_seeds, images, arrived
        if waiting is not None:
            yield _arrived(*waiting)
    finally:
        if pool is not None:
            pool.shutdown(cancel_futures=True)


def _arrived(batch_seeds: list[int], images: Tensor, event: torch.cuda.Event) -> tuple[list[int], Tensor]:
    event.synchronize()
    return batch_seeds, images


def split_batches(seeds: Sequence[int], batch: int, ends: Sequence[int] = ()) -> list[list[int]]:
    """`seeds` in batches of `batch`, or of fewer where one of `ends` (positions in `seeds`) comes before."""
    bounds = [0, *sorted({end for end in ends if 0 < end < len(seeds)}), len(seeds)]
    spans = zip(bounds, bounds[1:])
    return [list(map(int, seeds[i : min(i + batch, high)])) for low, high in spans for i in range(low, high, batch)]


def generate_to_folder(
    net: torch.nn.Module,
    seeds: Sequence[int],
    outdir: str | os.PathLike,
    subdirs: bool = False,
    on_batch: Callable[[list[int]], None] | None = None,
    **kwargs: Any,
) -> None:
    """Generate all `seeds` as PNGs in `outdir`; `kwargs` as in `generate_images`.

    The ranks share the seeds; a `net` that is sharded over ranks is called for all seeds by each of them.
    `on_batch` is told the seeds of each finished batch.

    Raises
    ------
    OSError, ValueError
        If the folder cannot be written, a seed stands twice, or an argument is wrong.
    """
    check_class(net, kwargs.get("class_idx"))
    if len(set(seeds)) != len(seeds):
        raise ValueError("--seeds names a seed twice; each makes one file.")
    check_folder(outdir)  # save_png makes it: arguments that the sampler refuses leave nothing behind
    together = getattr(net, "shard", False)
    share = list(seeds) if together else split_seeds(seeds)
    bar = tqdm(total=len(share), unit="img", disable=None if dist.get_rank() == 0 else True)
    with bar, PngWriter(outdir, subdirs) as writer:
        for batch_seeds, images in generate_images(net, share, **kwargs):
            if not together or dist.get_rank() == 0:
                writer.save(batch_seeds, images)
            if on_batch is not None:
                on_batch(batch_seeds)
            bar.update(len(batch_seeds))
    dist.barrier()
    dist.print0(f'{len(seeds)} images are in "{outdir}".')


def to_uint8(images: Tensor) -> Tensor:
    """[-1, 1] -> 0..255 as a PNG holds it (published: x * 127.5 + 128, clipped, cut); NaN becomes 0."""
    return (images * 127.5 + 128).nan_to_num(nan=0).clip(0, 255).to(torch.uint8)


def image_path(outdir: str | os.PathLike, seed: int, subdirs: bool) -> Path:
    """OUTDIR/SEED.png, or OUTDIR/THOUSAND/SEED.png with a folder per 1000 seeds; six digits each."""
    folder = Path(outdir) / f"{seed - seed % 1000:06d}" if subdirs else Path(outdir)
    return folder / f"{seed:06d}.png"


class PngWriter:
    """Writes images by `save_png` in a thread, while the next ones are generated. To be used in a `with` statement.

    An error in writing is raised by the next call but one, or at the end.
    """

    def __init__(self, outdir: str | os.PathLike, subdirs: bool = False):
        self._where = dict(outdir=outdir, subdirs=subdirs)
        self._pool = ThreadPoolExecutor(1)
        self._batches: deque[Future] = deque()

    def save(self, seeds: Sequence[int], images: Tensor) -> None:
        """Write images, uint8 [n, C, H, W], soon; it waits while two batches before this one are not yet written."""
        while len(self._batches) > 1:
            self._batches.popleft().result()
        self._batches.append(self._pool.submit(self._write, list(seeds), images))

    def _write(self, seeds: list[int], images: Tensor) -> None:
        for seed, image in zip(seeds, images):
            save_png(image, seed=seed, **self._where)

    def __enter__(self) -> "PngWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, *exc_info: object) -> None:
        self._pool.shutdown(cancel_futures=kind is not None)
        if kind is None:
            for batch in self._batches:
                batch.result()


def save_png(image: Tensor | np.ndarray, outdir: str | os.PathLike, seed: int, subdirs: bool = False) -> Path:
    """Write one image, uint8 [C, H, W], where `image_path` says; return the path."""
    path = image_path(outdir, seed, subdirs)
    with atomic_write(path, durable=False) as file:
        file.write(encode_png(np.asarray(image).transpose(1, 2, 0), compress_level=6))
    return path
