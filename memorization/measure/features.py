"""Distances between features instead of pixels: images to vectors, by a network in a TorchScript file."""

import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

TRUST = "A TorchScript file contains a program, which loading and using it runs: take only files that you trust."


class FeatureNetwork:
    """A network that maps images to vectors; see `load_features`.

    Attributes
    ----------
    name : name of the file.
    sha256 : digest of the file, which identifies the network in a record.
    """

    def __init__(self, module: torch.jit.ScriptModule, path: Path, sha256: str, device: torch.device):
        self._module, self._device = module, device
        self.path, self.name, self.sha256 = path, path.name, sha256

    @torch.no_grad()
    def embed(
        self,
        images: np.ndarray | torch.Tensor,  # uint8 [n, C, H, W]
        *,
        batch: int = 64,  # images at a time
        on_batch: Callable[[int], Any] | None = None,  # told the number of images of each batch
    ) -> np.ndarray:
        """Features of all images, float32 [n, F]; F is 0 where there are no images.

        The network is given float32 [batch, C, H, W] in [0, 1], pixel / 255, with the channels and the size of
        the images: a network that wants three channels, another size or other means must bring this about
        itself, inside its forward().

        Raises
        ------
        ValueError
            If the network fails on these images, or returns anything but finite numbers [batch, F].
        """
        images = torch.as_tensor(np.asarray(images))
        if images.dtype != torch.uint8 or images.ndim != 4:
            found = f"{str(images.dtype).removeprefix('torch.')} {list(images.shape)}"
            raise ValueError(f"Features are taken of uint8 images [n, C, H, W], not of {found}.")
        parts = []
        for part in images.split(batch) if len(images) else ():
            parts.append(self._forward(part))
            if on_batch is not None:
                on_batch(len(part))
        return np.concatenate(parts) if parts else np.empty((0, 0), dtype=np.float32)

    def _forward(self, images: torch.Tensor) -> np.ndarray:
        """Features of one batch, checked."""
        shape = list(images.shape)
        try:
            features = self._module(images.to(self._device).to(torch.float32) / 255)
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, torch.jit.Error) as err:
            reason = str(err).strip().splitlines()[-1]  # the lines before are the traceback inside the file
            raise ValueError(f'The feature network "{self.path}" fails on images {shape}: {reason}') from err
        if not isinstance(features, torch.Tensor):
            found = type(features).__name__
        elif features.ndim != 2 or len(features) != len(images) or not features.shape[1]:
            found = list(features.shape)
        elif not features.is_floating_point():
            found = str(features.dtype).removeprefix("torch.")
        elif not features.isfinite().all():
            found = "values that are infinite or not a number"
        else:
            return features.to(torch.float32).cpu().numpy()
        wanted = f"finite floating-point features [{shape[0]}, F]"
        raise ValueError(f'The feature network "{self.path}" must return {wanted} for images {shape}, not {found}.')


def load_features(
    path: str | os.PathLike,
    device: str | torch.device = "cpu",
    shape: tuple[int, int, int] | None = None,
) -> FeatureNetwork:
    """Load a feature network from a TorchScript file, as `torch.jit.save` writes it.

    Loading and using such a file runs the code in it, so load only files that you trust. What it is given
    and what it must return is said at `FeatureNetwork.embed`; it is put into evaluation mode.

    Parameters
    ----------
    path : the file.
    device : where to compute.
    shape : [C, H, W] of the images to come; the network is then tried on a black and a white one.

    Raises
    ------
    OSError
        If the file is missing or cannot be read.
    ValueError
        If it is no TorchScript file, or the network cannot take such images.
    """
    path, device = Path(path), torch.device(device)
    if not path.is_file():
        raise FileNotFoundError(f'The feature network "{path}" is {"a folder" if path.is_dir() else "missing"}.')
    with open(path, "rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    try:
        module = torch.jit.load(path, map_location=device)
    except (RuntimeError, ValueError) as err:
        form = "write one with torch.jit.save(torch.jit.script(network), FILE)"
        raise ValueError(f'"{path}" is no TorchScript file; {form}.') from err
    network = FeatureNetwork(module.eval(), path, sha256, device)
    if shape is not None:
        black_and_white = np.zeros((2, *shape), dtype=np.uint8)
        black_and_white[1] = 255
        network.embed(black_and_white)
    return network
