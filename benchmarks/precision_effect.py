"""Does precision move R_mem? The same weights and seeds in several precisions, and runs that were trained in several.

For the last snapshot of each run the same seeds are generated in float32 and in each other precision that the device
has. Printed are R_mem with its 95 % Wilson interval, the share of images whose verdict (memorized or not) flips
against float32, and how far pixels move. Runs that differ in the precision they were trained in are compared by the
interval of the difference of their ratios, measured in float32.
"""

import json
from pathlib import Path

import click
import numpy as np
import torch

from dnnlib.cli import report_errors
from dnnlib.util import atomic_write
from memorization.measure.criteria import memorized
from memorization.measure.knn import Neighbors
from memorization.measure.ratio import Measurement, measure_network
from memorization.stats.intervals import wilson_interval
from torch_utils import distributed as dist
from training.dataset import ImageFolderDataset
from training.options import batch_option, device_option, seeds_option
from training.precision import PRECISIONS, check_precision, prepare_denoiser, saved_precision
from training.snapshots.snapshot import list_snapshots, load_network


def available(device: torch.device) -> list[str]:
    """The precisions beside float32 that a network can compute in on `device`."""
    found = []
    for precision in PRECISIONS[1:]:
        try:
            check_precision(precision, device)
        except ValueError:
            continue
        found.append(precision)
    return found


def newcombe_interval(a: Measurement, b: Measurement) -> tuple[float, float]:
    """95 % interval of R_mem(a) - R_mem(b) for independent images (Newcombe, Stat. Med. 17, 1998, method 10)."""
    (la, ua), (lb, ub) = (wilson_interval(m.num_memorized, m.num_samples) for m in (a, b))
    d = a.ratio - b.ratio
    low = d - ((a.ratio - la) ** 2 + (ub - b.ratio) ** 2) ** 0.5
    return low, d + ((ua - a.ratio) ** 2 + (b.ratio - lb) ** 2) ** 0.5


def _percent(share: float, low: float, high: float) -> str:
    return f"{100 * share:.1f} % [{100 * low:.1f}, {100 * high:.1f}]"


def compare(exact: Measurement, other: Measurement) -> dict[str, float]:
    """How the same seeds differ between two precisions."""
    flips = memorized(exact.knn_distance) != memorized(other.knn_distance)
    pixels = np.abs(exact.images.astype(int) - other.images.astype(int))
    low, high = wilson_interval(int(flips.sum()), len(flips))
    return dict(
        flips=float(flips.mean()), flips_low=low, flips_high=high, mean_pixel_change=float(pixels.mean()),
        same_images=float((pixels.reshape(len(pixels), -1).max(axis=1) == 0).mean()),
        other_nearest=float((exact.knn_index[:, 0] != other.knn_index[:, 0]).mean()),
    )  # fmt: skip


@click.command(context_settings=dict(max_content_width=120))
@click.argument("runs", metavar="RUN...", nargs=-1, required=True)
@click.option("--knn-ref", help="Training images to compare with", metavar="ZIP|DIR", required=True)
@click.option("--out", help="Also write the numbers as JSON", metavar="FILE")
@seeds_option("0-999")
@batch_option
@device_option
@report_errors
def main(runs: tuple[str, ...], knn_ref: str, out: str | None, seeds: list[int], batch: int, device: str) -> None:
    """Measure the last snapshot of each RUN in every precision that the device has."""
    target = dist.init(device)
    reference = Neighbors(ImageFolderDataset(knn_ref).images(), device=target, shard=True)
    results, exact = [], {}
    click.echo(f"torch {torch.__version__}, {target}, {len(seeds)} images; R_mem [95 % interval]")
    for run in runs:
        snapshots = list_snapshots(run)
        if not snapshots:
            raise ValueError(f'"{run}" holds no network snapshot; name the folder of a run.')
        trained = saved_precision(json.loads((Path(run) / "training_options.json").read_text(encoding="utf-8")))
        for precision in ["fp32", *available(target)]:
            net = prepare_denoiser(load_network(snapshots[-1][1], target)[0], precision)
            measured = measure_network(net, reference, seeds, batch=batch, keep_images=True)
            low, high = wilson_interval(measured.num_memorized, measured.num_samples)
            result = dict(run=run, trained=trained, measured=precision, ratio=measured.ratio, ci_low=low, ci_high=high)
            text = f"{run}  trained {trained}  measured {precision}  {_percent(measured.ratio, low, high)}"
            if precision == "fp32":
                exact[run] = (trained, measured)
            else:
                result |= compare(exact[run][1], measured)
                text += (
                    f"\n    verdicts that flip {_percent(result['flips'], result['flips_low'], result['flips_high'])}"
                )
                text += f", another nearest image {100 * result['other_nearest']:.1f} %, "
                text += f"mean change of a pixel {result['mean_pixel_change']:.3f} of 255"
            click.echo(text)
            results.append(result)
    (first, (first_trained, a)), *others = exact.items()
    for run, (trained, b) in others:
        low, high = newcombe_interval(b, a)
        difference = dict(run=run, against=first, difference=b.ratio - a.ratio, ci_low=low, ci_high=high)
        click.echo(
            f"trained {trained} against {first_trained}: R_mem {100 * (b.ratio - a.ratio):+.1f} points "
            f"[{100 * low:+.1f}, {100 * high:+.1f}]; the interval is of the images, not of another run ({run}, {first})"
        )
        results.append(difference)
    if out is not None:
        with atomic_write(Path(out), "w") as file:
            json.dump(results, file, indent=2)


if __name__ == "__main__":
    main()
