"""Network snapshots: EMA weights in safetensors, with everything that rebuilds the network in the header.

Reading one executes nothing: the header is JSON, the rest is numbers.
"""

import json
import os
import re
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch

from dnnlib.util import atomic_write, fetch
from training.networks import build_network

FORMAT_VERSION = 1
_HEADER_KEY = "diffmem"  # safetensors allows one level of strings; ours is one JSON string under this key


def save_snapshot(path: str | os.PathLike, net: torch.nn.Module, kimg: float, dataset_kwargs: dict) -> None:
    """Write the weights of `net` (made by `build_network`), atomically.

    Parameters
    ----------
    path : network-snapshot-KIMG.safetensors
    net : the EMA network
    kimg : thousands of training images seen
    dataset_kwargs : arguments of the training set
    """
    header = dict(format=FORMAT_VERSION, network=net.init_kwargs, dataset=dataset_kwargs, kimg=kimg)
    tensors = {name: t.detach().cpu().contiguous() for name, t in net.state_dict().items()}
    data = safetensors.torch.save(tensors, metadata={_HEADER_KEY: json.dumps(header)})
    with atomic_write(path) as file:
        file.write(data)


def load_network(
    path_or_url: str | os.PathLike, device: torch.device | str = "cpu"
) -> tuple[torch.nn.Module, dict[str, Any]]:
    """Rebuild the network of a snapshot, in eval mode and without gradients; return it and the header.

    Raises
    ------
    OSError, ValueError
        If the file is missing, cut short, of another kind or version, or its tensors do not fit.
    """
    path = fetch(os.fspath(path_or_url))
    if path.is_dir():
        raise ValueError(f'"{path}" is a folder; name a network-snapshot-*.safetensors in it.')
    if path.suffix == ".pkl":
        raise ValueError(
            f'"{path}" is a pickle, which could run code when opened; only .safetensors snapshots are read.'
        )
    try:
        with safetensors.safe_open(path, framework="pt", device="cpu") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except safetensors.SafetensorError as err:
        raise ValueError(f'"{path}" is cut short or not a safetensors file ({err}).') from err

    try:
        header = json.loads(metadata[_HEADER_KEY])
        version, init_kwargs = header["format"], dict(header["network"])
    except (KeyError, TypeError, ValueError) as err:
        raise ValueError(f'"{path}" holds tensors but no snapshot header of this project.') from err
    if version != FORMAT_VERSION:
        raise ValueError(f'"{path}" has snapshot format {version}; this version reads format {FORMAT_VERSION}.')
    try:
        net = build_network(**init_kwargs)
    except (TypeError, ValueError) as err:
        raise ValueError(f'"{path}" describes a network that cannot be built: {err}') from err
    load_tensors(net, tensors, str(path))
    return net.eval().requires_grad_(False).to(device), header


def load_tensors(net: torch.nn.Module, tensors: dict[str, torch.Tensor], source: str) -> None:
    """Copy `tensors` into `net`, whose names and shapes they must have; see `check_tensors`."""
    check_tensors(net, tensors, source)
    for name, tensor in net.state_dict().items():
        tensor.copy_(tensors[name])


def check_tensors(net: torch.nn.Module, tensors: dict[str, torch.Tensor], source: str) -> None:
    """Refuse `tensors` that are not those of `net`; `source` is named in errors.

    Raises
    ------
    ValueError
        If a tensor is missing, unexpected or of another shape.
    """
    state = net.state_dict()
    missing, extra = sorted(state.keys() - tensors.keys()), sorted(tensors.keys() - state.keys())
    if missing or extra:
        what = f'lacks "{missing[0]}"' if missing else f'holds the unexpected "{extra[0]}"'
        raise ValueError(f'"{source}" {what} ({len(missing)} tensors missing, {len(extra)} unexpected).')
    for name, tensor in state.items():
        if tensor.shape != tensors[name].shape:
            raise ValueError(
                f'"{name}" in "{source}" has shape {list(tensors[name].shape)}, the network needs {list(tensor.shape)}.'
            )


def list_snapshots(run_dir: str | os.PathLike) -> list[tuple[int, Path]]:
    """(kimg, path) of the network snapshots in a folder, .safetensors and published .pkl alike, by kimg.

    Raises
    ------
    OSError
        If the folder does not exist.
    """
    run_dir = Path(run_dir)
    if not run_dir.is_dir():
        raise NotADirectoryError(f'"{run_dir}" is not a folder.')
    found = []
    for path in run_dir.iterdir():
        match = re.fullmatch(r"network-snapshot-(\d+)\.(safetensors|pkl)", path.name)
        if match:
            found.append((int(match[1]), path))
    return sorted(found)
