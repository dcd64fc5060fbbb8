"""Measure the memorization ratio, and the gap to the optimum, of all snapshots of a run."""

from pathlib import Path
from typing import Any

import click
import torch
from tqdm import tqdm

from dnnlib.cli import report_errors
from dnnlib.util import check_folder
from memorization.gap import GapMeter, ImageSet
from memorization.plots import check_format, gap_curves, neighbour_grid
from memorization.ratio import Measurement, measure_network
from memorization.subjects import Subject, optimum_subject, snapshot_subjects
from memorization.trajectory import (
    find_record,
    jsonl_path,
    make_settings,
    read_trajectory,
    write_gap,
    write_measurement,
)
from torch_utils import distributed as dist
from training.generation import save_png, split_seeds
from training.options import (
    batch_option,
    class_option,
    device_option,
    sampler_options,
    seeds_option,
    subdirs_option,
)

GRID_SEEDS = 32


@click.command(context_settings=dict(max_content_width=120))
@click.option("--expdir", help="Run folder with the snapshots", metavar="DIR")
@click.option("--network", help="Instead of a run: dataset whose optimum to measure", metavar="ZIP|DIR|NPZ|URL")
@click.option("--cond", help="Class-conditional optimum, with --network", metavar="BOOL", type=bool, default=False)
@click.option("--knn-ref", help="Training images to compare with  [default: --network]", metavar="ZIP|DIR|NPZ")
@click.option(
    "--log", "--log-file", help="Log file; the other results lie beside it  [default: EXPDIR/mem_traj.log]",
    metavar="FILE",
)  # fmt: skip
@click.option(
    "--gap", help="Measure the gap to the optimum, too, on so many noised images", metavar="N",
    type=click.IntRange(min=1),
)  # fmt: skip
@click.option("--holdout", help="Measure the gap on these images, too", metavar="ZIP|DIR|NPZ")
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
    expdir: str | None,
    network: str | None,
    cond: bool,
    knn_ref: str | None,
    log: str | None,
    gap: int | None,
    holdout: str | None,
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

    With --gap=N also the mean squared distance between the network and the closed-form optimum of the training
    images is measured, at 16 noise levels, on N noised training images (and N of --holdout); see gap.png.

    Beside the log lie the records (mem_traj.jsonl) and the distances of every image (knn-dist). torchrun takes
    --log for its own option (Python 3.11): with it, write --log-file.

    Examples:

    \b
    # Measure a run with 10,000 images per snapshot
    python mem_ratio.py --expdir=RUN --knn-ref=datasets/cifar10-1k.zip --seeds=0-9999

    \b
    # The same with 8 GPUs
    torchrun --standalone --nproc_per_node=8 mem_ratio.py --expdir=RUN --knn-ref=datasets/cifar10-1k.zip \\
        --seeds=0-9999 --batch=512

    \b
    # How far each snapshot is from the theoretical optimum
    python mem_ratio.py --expdir=RUN --knn-ref=datasets/cifar10-1k.zip --gap=1000 --holdout=datasets/cifar10-test.zip

    \b
    # Measure the theoretical optimum itself
    python mem_ratio.py --network=datasets/cifar10-1k.zip --log=optimum/mem_traj.log --seeds=0-999
    """
    check_options(expdir, network, cond, knn_ref, log, gap, holdout)
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

        if network is not None:
            subjects = [optimum_subject(network, target, cond=cond or class_idx is not None)]
        else:
            subjects = snapshot_subjects(expdir, target)
        knn_ref = knn_ref if knn_ref is not None else str(subjects[0].path)
        meter = None
        if gap is not None:
            meter = open_meter(subjects[0], knn_ref, holdout, num=gap, batch=batch, device=target)
        reference = meter.reference if meter is not None else ImageSet.read(knn_ref).images
        known = dist.on_rank0(read_known, jsonl)
        how = dict(reference=reference, class_idx=class_idx, sampler_kwargs=sampler_kwargs)

        # Snapshots, newest first.
        records = {}
        for subject in subjects:
            settings = make_settings(subject.path, seeds, reference_path=knn_ref, optimum=subject.optimum, **how)
            record = None if remeasure or save_images is not None else find_record(known, settings)
            note = "" if record is None else "  (measured before)"
            if record is None:
                outdir = Path(save_images) / subject.name if save_images is not None else None
                measured = measure_snapshot(subject, seeds, target, batch=batch, outdir=outdir, subdirs=subdirs, **how)
                record = dist.on_rank0(
                    write_measurement, log_path, measured, subject.path, subject.kimg, settings, images=outdir
                )
            if meter is not None and (remeasure or not meter.holds(record)):
                record = dist.on_rank0(write_gap, log_path, record, measure_gap(meter, subject))
            records[subject.name] = record
            dist.print0(describe(record) + note)
        if meter is not None:
            gap_path = log_path.parent / "gap.png"
            title = f"{log_path.parent.absolute().name}, |D| = {len(reference)}"
            dist.on_rank0(gap_curves, list(records.values()), gap_path, title=title)
            dist.print0(f"Gap:         {gap_path}")

        best = max(subjects, key=lambda subject: records[subject.name]["ratio"])
        dist.print0(f"Highest:     {describe(records[best.name])}")
        if grid is not None:
            shown = measure_snapshot(best, sorted(seeds)[:GRID_SEEDS], target, batch=batch, keep_images=True, **how)
            if dist.get_rank() == 0:
                nearest = reference[shown.knn_index[:, 0]]
                neighbour_grid(shown.images, nearest, grid, distance=shown.knn_distance, title=best.name)
            dist.print0(f"Grid:        {grid}")
        dist.print0(f"Log:         {log_path}\nRecords:     {jsonl}\nDistances:   {log_path.parent / 'knn-dist'}")
    finally:
        dist.shutdown()


def check_options(
    expdir: str | None,
    network: str | None,
    cond: bool,
    knn_ref: str | None,
    log: str | None,
    gap: int | None,
    holdout: str | None,
) -> None:
    """Refuse options that contradict each other."""
    if (expdir is None) == (network is None):
        raise click.UsageError("Give either --expdir, the folder of a run, or --network, a dataset.")
    if network is not None and log is None:
        raise click.UsageError("--network needs --log, for example --log=optimum/mem_traj.log.")
    if expdir is not None and knn_ref is None:
        raise click.UsageError("--expdir needs --knn-ref, the training images.")
    if expdir is not None and cond:
        raise click.UsageError("--cond belongs to --network; a snapshot knows by itself.")
    if holdout is not None and gap is None:
        raise click.UsageError("--holdout needs --gap=N, the number of noised images.")


def open_meter(subject: Subject, training: str, holdout: str | None, device: torch.device, **how: Any) -> GapMeter:
    """A meter for networks that were trained as `subject` was."""
    net, header = subject.load()
    cond = net.label_dim > 0
    meter = GapMeter(
        ImageSet.read(training, cond=cond),
        ImageSet.read(holdout, cond=cond) if holdout is not None else None,
        xflip=header.get("dataset", {}).get("xflip", False),
        device=device,
        **how,
    )
    meter.check(net)
    if meter.overlap:
        dist.print0(f'Note: {meter.overlap} images of "{holdout}" are training images.')
    return meter


def measure_gap(meter: GapMeter, subject: Subject) -> dict[str, Any]:
    """`GapMeter.measure` on a snapshot, with a progress bar."""
    net, _ = subject.load()
    hide = None if dist.get_rank() == 0 else True
    with tqdm(desc=f"{subject.name} gap", unit="img", leave=False, disable=hide) as bar:
        return meter.measure(net, on_batch=bar.update)


def measure_snapshot(
    subject: Subject,
    seeds: list[int],
    device: torch.device,
    outdir: Path | None = None,
    subdirs: bool = False,
    **how: Any,
) -> Measurement:
    """`measure_network` on a snapshot, with a progress bar, and PNGs where `outdir` is given."""
    net, _ = subject.load()
    hide = None if dist.get_rank() == 0 else True
    with tqdm(total=len(split_seeds(seeds)), desc=subject.name, unit="img", leave=False, disable=hide) as bar:

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
    name = f"kimg {record['kimg']:06d}" if record["kimg"] is not None else "optimum"
    return f"{name}  R_mem {ratio:6.2f} % [{low:.1f}, {high:.1f}]  mean distance {record['mean_distance']:.3f}"


if __name__ == "__main__":
    main()
