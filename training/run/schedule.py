"""When snapshots are taken: at listed steps, at steps spaced evenly or in their logarithm, or every so many ticks."""

import math
import re
from collections.abc import Collection

import numpy as np

_RANGE = re.compile(r"(\d{1,12}):(\d{1,12}):(\d{1,12})", re.ASCII)
_MOST = 100_000  # snapshots


def snapshot_steps(text: str, total: int, batch: int) -> list[int]:
    """The steps of `--snap-at`, ascending, and none after the last step.

    Parameters
    ----------
    text : steps `250,1000`, ranges `FROM:TO:EVERY` with both ends, as `250:10000:250,15000:2000000:5000`; or `log:N`, N
        steps between the first that ends at 1000 images or more and the last, in like quotients; or `even:N`, the last
        step and N - 1 before it in like distances
    total : steps of the run
    batch : images per step

    Raises
    ------
    ValueError
        If the text is none of this, no step is left, or snapshots would have the same name: names hold whole kimg. Of
        `log:N` and `even:N`, steps of the same kimg are one, and steps before 1000 images none.
    """
    first = -(-1000 // batch)
    if match := re.fullmatch(r"(log|even):(\d{1,6})", text, re.ASCII):
        how, number = match[1], int(match[2])
        if number < (2 if how == "log" else 1):
            raise ValueError(f"--snap-at={how}:N needs an N of {2 if how == 'log' else 1} or more.")
        if first > total:
            raise ValueError(
                f"--snap-at: the run ends at step {total}, before 1 kimg; take {first} steps of {batch} images or more."
            )
        spaced = np.geomspace(first, total, number) if how == "log" else total / number * np.arange(1, number + 1)
        steps = np.unique(spaced.round().astype(int)).tolist()
        last = {step * batch // 1000: step for step in steps if step >= first}  # the last of a kimg: the end stays
        return list(last.values())
    steps: set[int] = set()
    for part in text.split(","):
        if match := _RANGE.fullmatch(part.strip()):
            begin, end, every = map(int, match.groups())
            if every < 1 or not 1 <= begin <= end or (end - begin) // every >= _MOST:
                raise ValueError(f"--snap-at: {part.strip()} is no range; write FROM:TO:EVERY, as 250:10000:250.")
            steps.update(range(begin, end + 1, every))
        elif re.fullmatch(r"\d{1,12}", part.strip(), re.ASCII) and int(part) > 0:
            steps.add(int(part))
        else:
            raise ValueError(
                f'--snap-at: "{part.strip()}" is no step; write 250,1000 or FROM:TO:EVERY, or log:N or even:N for all.'
            )
    if len(steps) > _MOST:
        raise ValueError(f"--snap-at names more than {_MOST} steps.")
    kept = sorted(step for step in steps if step <= total)
    if not kept:
        raise ValueError(f"--snap-at: the run ends at step {total}, before the first of them.")
    if kept[0] < first:
        raise ValueError(f"--snap-at: step {kept[0]} is before 1 kimg ({batch} images a step); begin at step {first}.")
    ends = [*kept, total] if kept[-1] < total else kept  # at the end there is a snapshot anyway
    for step, later in zip(ends, ends[1:]):
        if step * batch // 1000 == later * batch // 1000:
            raise ValueError(
                f"--snap-at: steps {step} and {later} are in the same kimg, which names a snapshot; take one of them."
            )
    return kept


def snapshot_kimgs(
    total_nimg: int,  # duration, in images
    batch: int,  # images per step
    kimg_per_tick: float,
    snapshot_ticks: int | None,  # None = only those of `snap_nimg`
    snap_nimg: Collection[int] = (),
) -> list[int]:
    """The numbers in the names of the snapshots that such a training leaves, kimg 0 apart, ascending.

    Two within one kimg have one name. It ends as planned: neither a signal nor an observer ends it before.
    """
    end = -(-total_nimg // batch) * batch
    times = {end, *(n for n in snap_nimg if n < end)}
    if snapshot_ticks is not None:
        # The first tick is over after one step; each other one at the first step that is kimg_per_tick after it.
        tick = max(math.ceil(kimg_per_tick * 1000 / batch), 1) * batch
        times |= set(range(batch, end, tick * snapshot_ticks))
    return sorted({nimg // 1000 for nimg in times} - {0})
