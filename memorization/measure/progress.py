"""One progress bar over all snapshots, and the lines above it."""

import sys
from typing import IO, Any

from tqdm import tqdm

from torch_utils import distributed as dist


class Progress:
    """A bar over the images of all snapshots, with the name of the snapshot and its ratio so far.

    Only rank 0 shows it, on a terminal. Lines are written in any case, above the bar.

    Parameters
    ----------
    per_snapshot : images of each snapshot, at most
    quiet : no bar, not even on a terminal
    """

    def __init__(self, per_snapshot: int, quiet: bool = False):
        self.hidden = quiet or dist.get_rank() != 0
        self._per_snapshot = per_snapshot
        self._bar = tqdm(total=0, unit="img", leave=False, disable=True if self.hidden else None)
        self._expected = self._ended = 0  # snapshots
        self._before = 0  # images of the ended ones

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *exc_info: Any) -> None:
        self._bar.close()

    def expect(self, snapshots: int) -> None:
        """So many snapshots are known of, in all."""
        self._expected = max(snapshots, self._expected)
        self._rescale()

    def doing(self, what: str) -> None:
        """Say what is going on, in front of the bar."""
        self._bar.set_description(what)

    def batch(self, images: int) -> None:
        """Each rank has generated so many images more."""
        left = self._before + self._per_snapshot - self._bar.n
        self._bar.update(min(images * dist.get_world_size(), max(left, 0)))

    def rows(self, images: int, ratio: float) -> None:
        """So many images of this snapshot have been compared, with this ratio."""
        self._bar.set_postfix_str(f"R_mem {100 * ratio:.1f} %", refresh=False)
        self._bar.update(self._before + images - self._bar.n)

    def end(self) -> None:
        """The snapshot is finished or left out; images that need not be generated are no longer expected."""
        self._ended += 1
        self._before = self._bar.n
        self._bar.set_postfix_str("", refresh=False)
        self._rescale()

    def write(self, text: str, file: IO[str] | None = None) -> None:
        """Write a line, on rank 0."""
        if dist.get_rank() == 0:
            file = file or sys.stdout
            tqdm.write(text, file=file)
            file.flush()

    def _rescale(self) -> None:
        self._bar.total = self._before + max(self._expected - self._ended, 0) * self._per_snapshot
        self._bar.refresh()
