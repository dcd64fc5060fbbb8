"""Measure the memorization ratio of all snapshots of a run."""

from pathlib import Path
from typing import Any

import click
import torch
from tqdm import tqdm

from dnnlib.cli import report_errors
from dnnlib.util import check_folder
from memorization.plots import check_format, neighbour_grid
from memorization.ratio import Measurement, measure_network
from memorization.trajectory import find_record, jsonl_path, make_settings, read_trajectory, write_measurement
from torch_utils import distributed as dist
from training.dataset import ImageFolderDataset
from training.generation import save_png, split_seeds
from training.options import (
    batch_option,
    class_option,
    device_option,
    sampler_options,
    seeds_option,
    subdirs_option,
)
from training.snapshot import list_snapshots, load_network

GRID_SEEDS = 32


@click.command(context_settings=dict(max_content_width=120))
@click.option("--expdir", help="Run folder with the snapshots", metavar="DIR", required=True)
@click.option("--knn-ref", help="Training images to compare with", metavar="ZIP|DIR", required=True)
@click.option("--log", help="Log file; the other results lie beside it  [default: EXPDIR/mem_traj.log]", metavar="FILE")
@seeds_option("0-63")
@class_option
@batch_option
@click.option("--save-images", help="Keep the images, as DIR/network-snapshot-KIMG/SEED.png", metavar="DIR")
@subdirs_option
@click.option("--grid", help=f"Draw {GRID_SEEDS} images of the highest ratio and their nearest ones", metavar="FILE")
@click.option("--remeasure", help="Measure again what the log already holds", is_flag=True)
@sampler_options
@device_option
@report_errors
def main(
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
    device: str,
    **sampler_kwargs: Any,
) -> None:
    """Measure the memorization ratio of all snapshots of a run, newest first.

    For each snapshot one image per seed is generated. It counts as memorized if it is less than 1/3 as far
    from the nearest training image as from the second nearest. A snapshot that was measured before with the
    same settings is not measured again, so that an interrupted command goes on where it stopped.

    Beside the log lie the records (mem_traj.jsonl) and the distances of every image (knn-dist).

    Examples:

    \b
    # Measure a run with 10,000 images per snapshot
    python mem_ratio.py --expdir=RUN --knn-ref=datasets/cifar10-1k.zip --seeds=0-9999

    \b
    # The same with 8 GPUs
    torchrun --standalone --nproc_per_node=8 mem_ratio.py --expdir=RUN --knn-ref=datasets/cifar10-1k.zip \\
        --seeds=0-9999 --batch=512
    """
    target = dist.init(device)
    try:
        # Refuse what can be refused before anything slow.
        log_path = Path(log) if log is not None else Path(expdir) / "mem_traj.log"
        if log_path.is_dir():
            raise ValueError(f'--log: "{log_path}" is a folder; name a file.')
        for folder in [log_path.parent, save_images, Path(grid).parent if grid is not None else None]:
            if folder is not None:
                check_folder(folder)
        jsonl = jsonl_path(log_path)
        if grid is not None:
            check_format(grid)
        snapshots = {kimg: path for kimg, path in list_snapshots(expdir) if kimg > 0}
        if not snapshots:
            raise ValueError(f'"{expdir}" holds no network snapshot after kimg 0; name the folder of a run.')
        reference = ImageFolderDataset(knn_ref).images()
        known = dist.on_rank0(read_known, jsonl)
        how = dict(reference=reference, class_idx=class_idx, sampler_kwargs=sampler_kwargs)

        # Snapshots, newest first.
        records = {}
        for kimg, path in sorted(snapshots.items(), reverse=True):
            settings = make_settings(path, seeds, reference_path=knn_ref, **how)
            record = None if remeasure or save_images is not None else find_record(known, settings)
            note = "" if record is None else "  (measured before)"
            if record is None:
                outdir = Path(save_images) / path.stem if save_images is not None else None
                measurement = measure_snapshot(path, seeds, target, batch=batch, outdir=outdir, subdirs=subdirs, **how)
                record = dist.on_rank0(write_measurement, log_path, measurement, path, kimg, settings, images=outdir)
            records[kimg] = record
            dist.print0(describe(record) + note)

        best = max(records.values(), key=lambda record: record["ratio"])
        dist.print0(f"Highest:     {describe(best)}")
        if grid is not None:
            path = snapshots[best["kimg"]]
            shown = measure_snapshot(path, sorted(seeds)[:GRID_SEEDS], target, batch=batch, keep_images=True, **how)
            if dist.get_rank() == 0:
                nearest = reference[shown.knn_index[:, 0]]
                neighbour_grid(shown.images, nearest, grid, distance=shown.knn_distance, title=path.stem)
            dist.print0(f"Grid:        {grid}")
        dist.print0(f"Log:         {log_path}\nRecords:     {jsonl}\nDistances:   {log_path.parent / 'knn-dist'}")
    finally:
        dist.shutdown()


def measure_snapshot(
    path: Path, seeds: list[int], device: torch.device, outdir: Path | None = None, subdirs: bool = False, **how: Any
) -> Measurement:
    """`measure_network` on a snapshot, with a progress bar, and PNGs where `outdir` is given."""
    net, _ = load_network(path, device)
    hide = None if dist.get_rank() == 0 else True
    with tqdm(total=len(split_seeds(seeds)), desc=path.stem, unit="img", leave=False, disable=hide) as bar:

        def on_batch(batch_seeds: list[int], images: torch.Tensor) -> None:
            if outdir is not None:
                for seed, image in zip(batch_seeds, images):
                    save_png(image, outdir, seed, subdirs)
            bar.update(len(batch_seeds))

        return measure_network(net, seeds=seeds, device=device, on_batch=on_batch, **how)


def read_known(jsonl: Path) -> list[dict[str, Any]]:
    """Records that are already there; a damaged last line is reported."""
    return read_trajectory(jsonl, report=lambda text: click.echo(text, err=True)) if jsonl.exists() else []


def describe(record: dict[str, Any]) -> str:
    ratio, low, high = 100 * record["ratio"], 100 * record["ci_low"], 100 * record["ci_high"]
    return (
        f"kimg {record['kimg']:06d}  R_mem {ratio:6.2f} % [{low:.1f}, {high:.1f}]  "
        f"mean distance {record['mean_distance']:.3f}"
    )


if __name__ == "__main__":
    main()
