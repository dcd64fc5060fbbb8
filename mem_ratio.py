"""Memorization trajectory of a run: R_mem of each of its snapshots."""

from pathlib import Path
from typing import Any

import click
import torch
from tqdm import tqdm

from dnnlib.cli import report_errors
from memorization.ratio import measure_network
from memorization.trajectory import find_record, jsonl_path, make_settings, read_trajectory, write_measurement
from torch_utils import distributed
from training.dataset import ImageFolderDataset
from training.generation import save_png
from training.options import device_option, sampler_options, seeds_option
from training.snapshot import list_snapshots, load_network

GRID_SEEDS = 32


@click.command(context_settings={"show_default": True})
@click.option("--expdir", metavar="DIR", required=True, help="Run folder with the snapshots.")
@click.option("--knn-ref", metavar="ZIP|DIR", required=True, help="Training images to compare with.")
@click.option("--log", metavar="FILE", help="Log file; the other results lie beside it. [default: EXPDIR/mem_traj.log]")
@seeds_option
@click.option("--class", "class_idx", type=int, metavar="INT", help="Class label. [default: random]")
@click.option("--batch", type=click.IntRange(min=1), default=64, help="Images per batch and process.")
@click.option("--save-images", metavar="DIR", help="Keep the images as DIR/network-snapshot-KIMG/SEED.png.")
@click.option("--subdirs", is_flag=True, help="With --save-images: a folder for every 1000 seeds.")
@click.option("--grid", metavar="FILE", help=f"Picture of {GRID_SEEDS} images and their nearest neighbours.")
@click.option("--remeasure", is_flag=True, help="Measure again what is already measured with these settings.")
@sampler_options
@device_option
@report_errors
def main(device: str, **options: Any) -> None:
    """Measure the memorization ratio of all snapshots of a run, newest first.

    Of each snapshot one image per seed is generated; it is memorized if its distance to the nearest
    training image is less than 1/3 of that to the second nearest. Snapshots that were measured before
    with the same settings are not measured again.

    \b
    Examples:
      python mem_ratio.py --expdir=training-runs/00000-run --knn-ref=datasets/cifar10-1k.zip --seeds=0-9999
      torchrun --standalone --nproc_per_node=8 mem_ratio.py --expdir=... --knn-ref=... --seeds=0-9999
    """
    torch_device = distributed.init(device)
    try:
        measure_run(device=torch_device, **options)
    finally:
        distributed.shutdown()


def measure_run(
    expdir: str,
    knn_ref: str,
    log: str | None,
    seeds: list[int],
    class_idx: int | None,
    batch: int,
    save_images: str | None,
    subdirs: bool,
    grid: str | None,
    remeasure: bool,
    device: torch.device,
    **sampler: Any,
) -> None:
    sampler_kwargs = {key: value for key, value in sampler.items() if value is not None}

    # What can be refused is refused before anything slow.
    if grid is not None:
        from memorization.plots import check_format

        check_format(grid)
    log_path = Path(log) if log is not None else Path(expdir) / "mem_traj.log"
    jsonl = jsonl_path(log_path)
    if log_path.is_dir():
        raise click.UsageError(f'--log="{log}" is a folder; name a file.')
    snapshots = [(kimg, path) for kimg, path in list_snapshots(expdir) if kimg > 0]
    if not snapshots:
        raise click.ClickException(f'"{expdir}" holds no snapshot after kimg 0; train with train.py first.')
    reference = ImageFolderDataset(knn_ref).images()
    known = []
    if distributed.get_rank() == 0 and jsonl.exists():
        known = read_trajectory(jsonl, report=lambda message: click.echo(message, err=True))
    known = distributed.broadcast(known)

    # Snapshots, newest first.
    measured: list[tuple[dict[str, Any], Path]] = []
    for kimg, path in reversed(snapshots):
        settings = make_settings(
            path,
            seeds,
            class_idx=class_idx,
            sampler_kwargs=sampler_kwargs,
            reference=knn_ref,
            reference_images=reference,
        )
        record = None if remeasure or save_images else find_record(known, settings)
        note = "  (measured before)" if record else ""
        if record is None:
            record = measure_snapshot(...)
