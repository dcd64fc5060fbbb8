"""Which training-set sizes to try next, so that few training images find where R_mem falls below the level."""

import math
from collections.abc import Mapping


def bracket(above: Mapping[int, bool]) -> tuple[int | None, int | None]:
    """The largest size at or above the level, and the next larger one below it; None where there is none.

    `above` says of each known size on which side of the level it lies. EMM is defined as the largest size that
    is still at the level; hence a curve that rises again is followed to its last known crossing.
    """
    low = max((size for size, high_ratio in above.items() if high_ratio), default=None)
    high = min((size for size, r in above.items() if not r and (low is None or size > low)), default=None)
    return low, high


def next_sizes(above: Mapping[int, bool], low: int, high: int, tolerance: float, count: int = 1) -> list[int]:
    """The sizes to try next, at most `count`, ascending; [] when the search is over.

    Bisection in log |D|, for `count` > 1 into `count` + 1 parts. It begins in the middle: training takes the same
    number of epochs at every size, so that the large end costs most. After the first answer only the end on the
    other side has to be looked at, and that comes next: [low] if the middle is below the level, [high] if it is
    at the level. The search is over when high / low of the bracket is at most `tolerance`, when no whole number
    is left between, or when the end of the range shows that EMM lies outside.

    Parameters
    ----------
    above : known sizes, True where R_mem is at or above the level.
    low, high : range in which EMM is looked for, 1 <= low < high.
    tolerance : > 1.
    count : sizes to try at once.
    """
    a, b = bracket(above)
    if a is None and b is None:
        return _between(low, high, count) or [low]
    if a is None:
        if b <= low:
            return []
        return sorted({low, *_between(low, b, count - 1)})
    if b is None:
        if a >= high:
            return []
        return sorted({high, *_between(a, high, count - 1)})
    return [] if b <= a * tolerance else _between(a, b, count)


def worst_case(
    above: Mapping[int, bool], low: int, high: int, tolerance: float, count: int = 1
) -> tuple[list[int], list[int]]:
    """The sizes that the search has still to try at worst: the most of them, and the set with the largest sum.

    All answers of a curve that falls through the level once, inside the range or outside, are gone through.
    """
    sizes = next_sizes(above, low, high, tolerance, count)
    if not sizes:
        return [], []
    outcomes = []
    for crossing in range(len(sizes) + 1):
        known = {**above, **{size: place < crossing for place, size in enumerate(sizes)}}
        outcomes.append(worst_case(known, low, high, tolerance, count))
    longest = max((outcome[0] for outcome in outcomes), key=len)
    largest = max((outcome[1] for outcome in outcomes), key=sum)
    return sizes + longest, sizes + largest


def grid_sizes(low: int, high: int, tolerance: float) -> list[int]:
    """The sizes of a grid from `low` to `high` in which neighbours differ by the factor `tolerance` at most.

    This is what finds the same bracket without a search. Where whole numbers are further apart, they are all there.
    """
    steps = math.ceil(math.log(high / low) / math.log(tolerance) - 1e-9)
    return sorted({round(low * (high / low) ** (i / steps)) for i in range(steps + 1)})


def _between(low: int, high: int, count: int) -> list[int]:
    """At most `count` whole numbers strictly between, equally far apart in log."""
    spaced = (low * (high / low) ** (i / (count + 1)) for i in range(1, count + 1))
    return sorted({min(max(round(size), low + 1), high - 1) for size in spaced}) if high - low > 1 else []
