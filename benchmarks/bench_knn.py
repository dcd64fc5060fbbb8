"""Time the nearest-neighbour search against torch.cdist and topk, in one run.

Queries are near-copies of the reference images (each pixel moved by up to 8 grey levels), images that have nothing to
do with them, and noise. Prints the seconds of both, their ratio, in how many queries the neighbours of float32 cdist
differ, and how many results were checked against the plain definition.
"""

import resource
import time
from collections.abc import Callable

import click
import numpy as np
import torch

from dnnlib.cli import report_errors
from memorization.measure.knn import Neighbors, plain_neighbors
from torch_utils import distributed as dist
from training.dataset import ImageFolderDataset
from training.options import device_option

_PLAIN = 2000  # queries per torch.cdist: among the fastest, and its distances to 60,000 images take 0.5 GB
_CHECKED = 50  # queries of each kind that are compared with the plain definition


class PlainSearch:
    """What one writes down first."""

    def __init__(self, reference: np.ndarray, device: torch.device):
        self.device = device
        self.reference = torch.from_numpy(reference).to(device).flatten(1).to(torch.float32)

    def query(self, images: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        distance, index = [], []
        for part in torch.from_numpy(images).split(_PLAIN):
            part = part.to(self.device).flatten(1).to(torch.float32)
            d, i = torch.cdist(part, self.reference).topk(k, dim=1, largest=False)
            distance.append(d.cpu().numpy())
            index.append(i.cpu().numpy())
        return np.concatenate(distance) / self.reference.shape[1] ** 0.5, np.concatenate(index)


def make_queries(reference: np.ndarray, others: np.ndarray | None, n: int, seed: int = 0) -> dict[str, np.ndarray]:
    """Queries by kind, uint8 [n, C, H, W]."""
    rng = np.random.default_rng(seed)
    base = reference[rng.integers(len(reference), size=n)]
    moved = np.clip(base + rng.integers(-8, 9, size=base.shape, dtype=np.int16), 0, 255).astype(np.uint8)
    if others is None:  # halves of two images, upside down: about as far from the reference as new images
        second = reference[rng.integers(len(reference), size=n)]
        others = (base // 2 + second // 2)[:, :, ::-1]
    unrelated = np.ascontiguousarray(others[np.arange(n) % len(others)])
    return {"near-copies": moved, "unrelated": unrelated, "noise": rng.integers(0, 256, base.shape, dtype=np.uint8)}


def seconds(function: Callable, device: torch.device) -> float:
    start = time.perf_counter()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def fastest(functions: list[Callable], device: torch.device, repeats: int) -> list[float]:
    """Seconds of each function, the fastest of several runs, in turn: a change of the machine's load meets all."""
    return np.min([[seconds(function, device) for function in functions] for _ in range(repeats)], axis=0).tolist()


@click.command(context_settings=dict(max_content_width=120))
@click.option("--data", help="Dataset of the reference images", metavar="ZIP", required=True)
@click.option(
    "--others", help="Dataset of unrelated queries  [default: blends of the reference, flipped]", metavar="ZIP"
)
@click.option("--queries", help="Images of each kind", metavar="INT", type=click.IntRange(min=1), default=10_000)
@click.option("--k", help="Neighbours", metavar="INT", type=click.IntRange(min=1), default=2, show_default=True)
@click.option(
    "--repeats", help="Runs of each; the fastest counts", metavar="INT", type=click.IntRange(min=1), default=3
)
@device_option
@report_errors
def main(data: str, others: str | None, queries: int, k: int, repeats: int, device: str) -> None:
    """Time the nearest-neighbour search (memorization/measure/knn.py) against float32 torch.cdist and topk."""
    target = dist.init(device)
    reference = ImageFolderDataset(data).images()
    unrelated = ImageFolderDataset(others).images() if others else None
    name = torch.cuda.get_device_name(target) if target.type == "cuda" else f"cpu, {torch.get_num_threads()} threads"
    click.echo(f"{queries} queries, {len(reference)} images {list(reference.shape[1:])}, k={k}")
    click.echo(f"torch {torch.__version__}, {name}")

    Neighbors(reference[:64], device=target).query(reference[:64])  # what happens once in a process
    (prepare,) = fastest([lambda: Neighbors(reference, device=target)], target, repeats)
    neighbors = Neighbors(reference, device=target)
    kinds = make_queries(reference, unrelated, queries)
    first = next(iter(kinds.values()))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    neighbors.query(first, k)
    memory = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    plain = PlainSearch(reference, target)

    click.echo(f"{'':<12} {'ours, s':>8} {'cdist, s':>9} {'ratio':>6} {'+ prepare':>10} {'differ':>7} {'checked':>8}")
    for kind, images in kinds.items():
        found, rounded = neighbors.query(images, k), plain.query(images, k)
        for value, expected in zip(found, plain_neighbors(images[:_CHECKED], reference, k)):
            np.testing.assert_allclose(value[:_CHECKED], expected, rtol=1e-14)
        ours, other = fastest(
            [lambda images=images: neighbors.query(images, k), lambda images=images: plain.query(images, k)],
            target,
            repeats,
        )
        differ = int((found[1] != rounded[1]).any(axis=1).sum())
        click.echo(
            f"{kind:<12} {ours:>8.3f} {other:>9.3f} {other / ours:>6.1f} {other / (ours + prepare):>10.1f} "
            f"{differ:>7} {len(images[:_CHECKED]):>8}"
        )
    click.echo(f"preparing the reference once: {prepare:.3f} s")
    if target.type == "cpu":
        click.echo(f"memory for {queries} queries beyond the prepared reference: {memory:.0f} MiB")


if __name__ == "__main__":
    main()
