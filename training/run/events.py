"""TensorBoard event files of a run, through torch's own writer. The package tensorboard is optional."""

import os

import numpy as np


def check_tensorboard() -> None:
    """Refuse event files that cannot be written.

    Raises
    ------
    ValueError
        If the package tensorboard is not installed, or too old for torch.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter  # noqa: F401
    except ImportError as err:
        raise ValueError(f"--tensorboard needs a package: pip install tensorboard ({err})") from err


class EventLog:
    """Writes what stats.jsonl holds, and images, over the number of training images seen.

    Parameters
    ----------
    run_dir : run folder, in which the event files lie
    resumed_nimg : training images seen when the run was resumed; what older files of the folder say about later
        ones is then not shown
    """

    def __init__(self, run_dir: str | os.PathLike, resumed_nimg: int | None = None):
        from torch.utils.tensorboard import SummaryWriter

        purge = None if resumed_nimg is None else resumed_nimg + 1
        self._writer = SummaryWriter(os.fspath(run_dir), purge_step=purge)

    def add(self, averages: dict[str, dict[str, float]], images: dict[str, np.ndarray], nimg: int) -> None:
        """Add averages (of `Collector.flush`) and images (uint8 [height, width, 3]); they are on disk on return."""
        for name, value in averages.items():
            self._writer.add_scalar(name, value["mean"], nimg)
        for name, image in images.items():
            self._writer.add_image(name, image, nimg, dataformats="HWC")
        self._writer.flush()

    def __enter__(self) -> "EventLog":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._writer.close()
