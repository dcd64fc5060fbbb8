"""Network snapshots: EMA weights in safetensors, with everything that rebuilds the network in the header.

Reading one executes nothing: the header is JSON, the rest is numbers. Published `.pkl` snapshots are read as well,
as data (`training.snapshots.published`). As a program this module tells what a snapshot holds, and converts:
`python -m training.snapshots.snapshot network-snapshot-200000.pkl --dest=network-snapshot-200000.safetensors`.
"""

import json
import os
import re
from pathlib import Path
from typing import Any

import click
import safetensors
import safetensors.torch
import torch

from dnnlib.cli import report_errors
from dnnlib.limits import check_regular
from dnnlib.pickles import show
from dnnlib.util import atomic_write, fetch
from training.networks import build_network
from training.snapshots.arguments import check_arguments
from training.snapshots.published import read_published

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
    _write(path, net, dict(header, nimg=round(1000 * kimg)))


def _write(path: str | os.PathLike, net: torch.nn.Module, header: dict[str, Any]) -> None:
    tensors = {name: t.detach().cpu().contiguous() for name, t in net.state_dict().items()}
    data = safetensors.torch.save(tensors, metadata={_HEADER_KEY: json.dumps(header)})
    with atomic_write(path) as file:
        file.write(data)


def load_network(
    path_or_url: str | os.PathLike, device: torch.device | str = "cpu"
) -> tuple[torch.nn.Module, dict[str, Any]]:
    """Rebuild the network of a snapshot, in eval mode and without gradients; return it and the header.

    Parameters
    ----------
    path_or_url : a .safetensors snapshot of this project, or a published .pkl; or an http(s) address of one
    device : where the network shall be

    Returns
    -------
    net : the network
    header : network (class_name and arguments), dataset (arguments of the training set), kimg (thousands of
        training images; None if not even the name of a .pkl tells), nimg (exactly so many images,
        where it is known); of a .pkl also loss and augment

    Raises
    ------
    OSError, ValueError
        If the file is missing, cut short, of another kind or version, or its tensors do not fit.
    """
    source = os.fspath(path_or_url)
    path = fetch(source)
    if path.is_dir():
        raise ValueError(f'"{path}" is a folder; name a network-snapshot-*.safetensors in it.')
    check_regular(path)
    header, tensors = _read_pickle(path, source) if _is_pickle(path) else _read_safetensors(path, source)
    net = _build(header["network"], tensors, source)
    net.empty_classes = _empty_classes(header["dataset"], net.label_dim)
    return net.eval().requires_grad_(False).to(device), header


def _empty_classes(dataset: dict[str, Any], label_dim: int) -> list[int]:
    """Classes that training never saw, by the header; none where it does not say, or says nonsense."""
    empty = dataset.get("empty_classes")
    if not isinstance(empty, list) or not all(type(c) is int and 0 <= c < label_dim for c in empty):
        return []
    return sorted(set(empty)) if len(set(empty)) < label_dim else []


def _is_pickle(path: Path) -> bool:
    """By the extension; where there is none of the two, by the beginning (a safetensors header is JSON)."""
    if path.suffix in (".pkl", ".safetensors"):
        return path.suffix == ".pkl"
    with open(path, "rb") as file:
        start = file.read(9)
    return start[:1] == b"\x80" and start[8:] != b"{"


def _read_pickle(path: Path, source: str) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    found = read_published(path, source)
    named = re.search(r"network-snapshot-(\d+)", path.name)
    header = dict(
        format=FORMAT_VERSION, network=found.network, dataset=found.dataset, kimg=int(named[1]) if named else None,
        loss=found.loss, augment=found.augment,
        nimg=1000 * int(named[1]) if named else None,
    )  # fmt: skip
    return header, found.tensors


def _read_safetensors(path: Path, source: str) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    try:
        with safetensors.safe_open(path, framework="pt", device="cpu") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except safetensors.SafetensorError as err:
        raise ValueError(f'"{source}" is cut short or not a safetensors file ({err}).') from err
    try:
        header = json.loads(metadata[_HEADER_KEY])
        version, header["network"] = header["format"], dict(header["network"])
        header["dataset"] = dict(header.get("dataset") or {})
        kimg = header.get("kimg")
        if type(header.get("nimg")) is not int:  # from before it was there, or changed by hand
            header["nimg"] = round(1000 * kimg) if type(kimg) in (int, float) else None
    except (KeyError, TypeError, ValueError, OverflowError, RecursionError) as err:
        raise ValueError(f'"{source}" holds tensors but no snapshot header of this project.') from err
    if version != FORMAT_VERSION:
        raise ValueError(f'"{source}" has snapshot format {version}; this version reads format {FORMAT_VERSION}.')
    return header, tensors


def _build(init_kwargs: dict[str, Any], tensors: dict[str, torch.Tensor], source: str) -> torch.nn.Module:
    """Build a network with these tensors; memory for it is taken only when they are known to be its tensors."""
    try:
        check_arguments(init_kwargs)
        with torch.device("meta"):
            net = build_network(**init_kwargs)
    except (TypeError, ValueError, OverflowError, RuntimeError) as err:
        raise ValueError(f'"{source}" describes a network that cannot be built: {err}') from err
    check_tensors(net, tensors, source)
    for name, tensor in tensors.items():
        if tensor.dtype not in (torch.float32, torch.float16, torch.bfloat16):
            raise ValueError(f'"{name}" in "{source}" is of type {tensor.dtype}; weights are float32 or shorter.')
        if not tensor.isfinite().all():
            raise ValueError(f'"{name}" in "{source}" is not finite: the training diverged; take an earlier snapshot.')
    # Copies: tensors from safetensors are views of the file, which may change.
    net.load_state_dict({name: t.to(torch.float32, copy=True) for name, t in tensors.items()}, assign=True)
    return net


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


def describe(header: dict[str, Any], net: torch.nn.Module) -> str:
    """What a snapshot holds, in lines of text: class, arguments, size, dataset, kimg."""

    def line(name: str, values: Any) -> str:
        values = dict(values) if isinstance(values, dict) else {}
        kind = show(str(values.pop("class_name", "")))  # text from a file may hold control characters
        rest = ", ".join(f"{show(k)}={v!r}" for k, v in values.items())
        return f"{name:<12}{' '.join(filter(None, [kind, rest])) or 'none'}"

    state = net.state_dict()
    count = sum(p.numel() for p in net.parameters())
    types = ", ".join(sorted({str(t.dtype).removeprefix("torch.") for t in state.values()}))
    lines = [
        line("network", header["network"]),
        f"{'size':<12}{count} parameters, {len(state)} tensors, {types}",
        line("dataset", header.get("dataset")),
        f"{'kimg':<12}{'unknown' if header.get('kimg') is None else show(str(header['kimg']))}",
    ]
    return "\n".join(lines + [line(key, header[key]) for key in ("loss", "augment") if key in header])


@click.command()
@click.argument("snapshot")
@click.option("--dest", help="Write it as this .safetensors file", metavar="FILE")
@report_errors
def main(snapshot: str, dest: str | None) -> None:
    """Tell what the SNAPSHOT (a file or an https address) holds; with --dest, convert it to .safetensors.

    Reads this project's .safetensors and published .pkl files. Nothing in them is executed.

    \b
    Example:
      python -m training.snapshots.snapshot network-snapshot-200000.pkl --dest=network-snapshot-200000.safetensors
    """
    if dest is not None and not dest.endswith(".safetensors"):
        raise click.UsageError("The name of --dest must end in .safetensors.")
    net, header = load_network(snapshot)
    click.echo(describe(header, net))
    if dest is not None:
        _write(dest, net, header)
        click.echo(f'Wrote "{dest}".')


if __name__ == "__main__":
    main()
