"""What looks at the averaged network while it is trained, at each snapshot, and may end the run."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch

from torch_utils import distributed as dist
from training.generation import generate_images

GRID_IMAGES = 32
_RED = (200, 55, 45)


@dataclass(frozen=True)
class Observation:
    """What was seen at one snapshot."""

    values: dict[str, float] = field(default_factory=dict)  # for stats.jsonl; the same on all ranks
    status: str = ""  # end of the status line
    stop: str | None = None  # why the run is to end here; the same on all ranks
    images: dict[str, np.ndarray] = field(default_factory=dict)  # for TensorBoard, uint8 [H, W, 3]; of rank 0
    files: dict[str, dict[str, Any]] = field(default_factory=dict)  # for the run folder: name and content, as JSON


class Observer(Protocol):
    """Called by all ranks. It must not change the network; the random state is put back for it."""

    def __call__(self, net: torch.nn.Module, nimg: int, interrupted: Callable[[], bool]) -> Observation | None:
        """Look at the averaged network after `nimg` training images.

        A slow observer calls `interrupted` from time to time, on all ranks alike (it waits for all of them and
        gives all the same answer), and returns None when it says that the run is to stop.
        """

    def state_dict(self) -> dict[str, Any]:
        """What must survive an interruption, in plain numbers and lists."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a `state_dict`, or from {} of a run that had no observer."""


class SampleGrid:
    """Generates the images of the seeds 0, 1, ... on rank 0, to look at."""

    def __init__(self, num: int = GRID_IMAGES, batch: int = 64):
        self.num, self.batch = num, batch

    def __call__(self, net: torch.nn.Module, nimg: int, interrupted: Callable[[], bool]) -> Observation:
        if dist.get_rank() != 0:
            return Observation()
        images = torch.cat([images for _, images in generate_images(net, range(self.num), batch=self.batch)])
        return Observation(images={"Samples/generated": image_grid(images.numpy()[:, np.newaxis])})

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


def image_grid(
    cells: np.ndarray,  # uint8 [n, parts, C, H, W]
    framed: np.ndarray | None = None,  # bool [n]
    columns: int = 8,
) -> np.ndarray:
    """Lay out cells of images in reading order, as one picture, uint8 [height, width, 3].

    The parts of a cell lie below each other. Gray becomes RGB, images smaller than 64 pixels are enlarged
    pixel by pixel, and a red frame surrounds the cells of `framed`.
    """
    n, parts = cells.shape[:2]
    scale = max(1, 64 // max(cells.shape[3:]))
    pixels = np.moveaxis(cells, 2, -1).repeat(scale, axis=2).repeat(scale, axis=3)
    height, width = pixels.shape[2:4]

    margin, gap = 6, 3
    columns = min(columns, n)
    shape = (-(-n // columns), columns, parts * (height + gap) - gap + 2 * margin, width + 2 * margin, 3)
    canvas = np.full(shape, 255, np.uint8)
    for i in range(n):
        cell = canvas[i // columns, i % columns]
        if framed is not None and framed[i]:
            cell[1:-1, 1:-1] = _RED
            cell[4:-4, 4:-4] = 255
        for part in range(parts):
            top = margin + part * (height + gap)
            cell[top : top + height, margin:-margin] = pixels[i, part]
    return canvas.swapaxes(1, 2).reshape(shape[0] * shape[2], shape[1] * shape[3], 3)
