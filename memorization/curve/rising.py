"""Whether R_mem still rises at the end of the training: then EMM is that of the length of the training, too."""

from collections.abc import Sequence
from dataclasses import dataclass

from memorization.runs import Run, SnapshotPoint

HALF = (0.35, 0.65)  # how much of the training is taken for half of it
END = 0.95  # and for all of it
ERROR = 0.01  # how often a line of which the ratios stay is said to rise, at most


@dataclass(frozen=True)
class Rise:
    """R_mem of one size in the second half of the training, mean of the runs."""

    size: int  # |D|
    halfway: float  # 0..1
    end: float


def halfway_and_end(run: Run) -> tuple[SnapshotPoint, SnapshotPoint] | None:
    """The snapshots at half of the training and at its end; None if not both were measured.

    None, too, of adaptive measurements, which end as soon as a side of a bar is clear, and of models of other
    programs, of whose training nothing is known.
    """
    trained = run.epochs * run.size  # images
    end = run.snapshots[-1]
    if not trained > 0 or end.nimg < END * trained:
        return None
    half = min(run.snapshots, key=lambda point: abs(point.nimg - trained / 2))
    near = HALF[0] <= half.nimg / trained <= HALF[1]
    return (half, end) if near and not (half.adaptive or end.adaptive) else None


def rises(sizes: dict[int, list[Run]]) -> list[Rise]:
    """The sizes at which R_mem rises in the second half of the training, in each run and beyond the noise of images.

    The noise is that of the score test of two proportions, at `ERROR` over the number of sizes; the images of a run's
    two snapshots are taken as independent (made from the same latents, they differ less by chance). That a network's
    ratio goes up and down from snapshot to snapshot is not in it: K runs rise together by chance in 1 of 2^K cases.
    A run with a higher ratio before its end does not rise.

    Parameters
    ----------
    sizes : |D| -> its runs. Runs without both snapshots say nothing.
    """
    from scipy.special import ndtri

    known = {size: [(*pair, run) for run in runs if (pair := halfway_and_end(run))] for size, runs in sizes.items()}
    known = {size: rows for size, rows in known.items() if rows}
    found = []
    for size, rows in known.items():
        if any(half.ratio >= end.ratio or end.ratio < run.ratio for half, end, run in rows):
            continue
        halves, ends, _ = zip(*rows)
        (a, m), (b, n) = _counts(halves), _counts(ends)
        noise = ((a + b) * (m + n - a - b) / (m * n)) ** 0.5 / (m + n) ** 0.5
        if b / n - a / m > -ndtri(ERROR / len(known)) * noise:
            found.append(Rise(size, _mean(halves), _mean(ends)))
    return found


def rise_note(found: Sequence[Rise]) -> str | None:
    """A sentence without a full stop; None where nothing rises."""
    if not found:
        return None
    most = max(found, key=lambda rise: rise.end - rise.halfway)
    return (
        f"R_mem still rises in the second half of the training, at |D| = {most.size} from {100 * most.halfway:.1f} to "
        f"{100 * most.end:.1f} %: EMM is that of this length of training, and may be larger after more epochs"
    )


def _counts(points: Sequence[SnapshotPoint]) -> tuple[int, int]:
    return sum(point.num_memorized for point in points), sum(point.num_samples for point in points)


def _mean(points: Sequence[SnapshotPoint]) -> float:
    return sum(point.ratio for point in points) / len(points)
