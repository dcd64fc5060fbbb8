"""What is measured: the snapshots of a run, the optimum of a dataset, or images and models of other programs."""

import os
import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dnnlib.limits import parse_json, read_regular
from dnnlib.util import fetch
from memorization.measure.samples import Fit, Samples
from torch_utils import distributed as dist
from training.optim import load_optimum
from training.run.state import NAME as RUN_STATE
from training.run.state import read_run_state
from training.snapshots.snapshot import list_snapshots, load_network

_OPTIONS = "training_options.json"


@dataclass(frozen=True)
class Subject:
    """A denoiser to be measured."""

    path: Path  # of the snapshot, or of the dataset whose optimum it is
    kimg: int | None  # None: not trained
    optimum: str | None  # "unconditional" or "class-conditional" optimum; None: a trained network
    load: Callable[[], tuple[torch.nn.Module, dict[str, Any]]]  # the network, and the header of its snapshot
    source: dict[str, Any] | None = None  # where the images are from, if not from a snapshot of ours: for the record
    size: int | None = None  # number of its images; None: as many as are asked for
    error_share: float | None = None  # of a sequential test over several subjects; None: it has its error for itself

    @property
    def name(self) -> str:
        """What files about it are called: network-snapshot-KIMG, optimum-NAME, images-NAME or model-NAME."""
        if self.source is not None:
            return f"{self.source['kind']}-{self.path.stem if self.path.is_file() else self.path.name}"
        return self.path.stem if self.optimum is None else f"optimum-{self.path.stem}"


def load_together(subject: Subject) -> tuple[torch.nn.Module, dict[str, Any]]:
    """`subject.load()` on all ranks, or the same ValueError on all, if one of them cannot."""
    loaded = refusal = None
    try:
        loaded = subject.load()
    except (OSError, ValueError) as err:
        refusal = str(err)
    refusals = [text for text in dist.gather(refusal) if text is not None]
    if refusals:
        raise ValueError(refusals[0])
    return loaded


def snapshot_subjects(run_dir: str | os.PathLike, device: torch.device | str) -> list[Subject]:
    """The snapshots of a run after kimg 0, newest first; the same on all ranks.

    Raises
    ------
    OSError, ValueError
        If there is no such folder, or no such snapshot in it.
    """
    subjects = _subjects(dist.on_rank0(list_snapshots, run_dir), device)
    if not subjects:
        raise ValueError(f'"{run_dir}" holds no network snapshot after kimg 0; name the folder of a run.')
    return subjects


def one_snapshot(path_or_url: str, device: torch.device | str) -> Subject:
    """A single snapshot; its kimg is that of its name, or of its header.

    Raises
    ------
    OSError, ValueError
        If it cannot be read, or does not say its kimg.
    """
    path = fetch(path_or_url)
    named = re.fullmatch(r"network-snapshot-(\d+)", path.stem)
    kimg = int(named[1]) if named else load_network(path)[1].get("kimg")
    if kimg is None:
        raise ValueError(f'"{path}" does not say its kimg; name it network-snapshot-KIMG{path.suffix}.')
    return Subject(path, int(kimg), None, lambda: load_network(path, device))


def is_snapshot(path_or_url: str) -> bool:
    """Whether this is the name of a network snapshot, and not of a dataset."""
    return path_or_url.partition("#")[0].endswith((".safetensors", ".pkl"))


def watch_snapshots(
    run_dir: str | os.PathLike,
    device: torch.device | str,
    *,
    poll: float = 5,  # seconds between two looks
    on_wait: Callable[[], Any] | None = None,  # called before each wait
) -> Iterator[Subject]:
    """The snapshots of a run after kimg 0, each once, as they appear, until the run is done.

    Of those that are there the newest comes first; a new one, hence, before older ones that are still to come. One
    that is written again comes again: two snapshots within one kimg have the same name.

    Raises
    ------
    OSError, ValueError
        If there is no such folder, it does not say when the run is done (see `run_is_done`), or the run is
        done without a snapshot.
    """
    seen: dict[Path, int] = {}
    while True:
        done, found, written = dist.on_rank0(_look, run_dir)
        new = [subject for subject in _subjects(found, device) if seen.get(subject.path) != written[subject.path]]
        if new:
            seen[new[0].path] = written[new[0].path]
            yield new[0]
        elif done:
            break
        else:
            if on_wait is not None:
                on_wait()
            time.sleep(poll)
    if not seen:
        raise ValueError(f'The run in "{run_dir}" is over, and has left no network snapshot after kimg 0.')


def run_is_done(run_dir: str | os.PathLike) -> bool:
    """True if a training run will write no more snapshots.

    That is: its `run-state.json` says that it is no longer running, or that its last snapshot has the `total_kimg`
    of its `training_options.json`; without that file the name of a snapshot, which is in whole kimg, says so. A run
    that was killed, so that it could say nothing, may be resumed: it is not done.

    Raises
    ------
    OSError, ValueError
        If the folder has neither of the two files, or one that is damaged.
    """
    state, total = read_run_state(run_dir), _total_kimg(Path(run_dir) / _OPTIONS)
    if state is None and total is None:
        raise ValueError(
            f'"{run_dir}" has neither {RUN_STATE} nor {_OPTIONS} with total_kimg, '
            "so nothing says when the run is done; leave out --watch."
        )
    if state is not None:
        return state["state"] != "running" or (total is not None and state["kimg"] >= total)
    return any(kimg + 1 > total for kimg, _ in list_snapshots(run_dir))


def _look(run_dir: str | os.PathLike) -> tuple[bool, list[tuple[int, Path]], dict[Path, int]]:
    """Whether the run is done, its snapshots, and their times: in this order, so that the last one is not missed."""
    if not Path(run_dir).is_dir():
        raise NotADirectoryError(f'"{run_dir}" is not a folder.')
    done, found = run_is_done(run_dir), list_snapshots(run_dir)
    return done, found, {path: path.stat().st_mtime_ns for _, path in found}


def _subjects(snapshots: list[tuple[int, Path]], device: torch.device | str) -> list[Subject]:
    """Newest first, without kimg 0; of two files with one number the .safetensors."""
    by_kimg = {kimg: path for kimg, path in snapshots if kimg > 0}
    return [
        Subject(path, kimg, None, lambda path=path: load_network(path, device))
        for kimg, path in sorted(by_kimg.items(), reverse=True)
    ]


def _total_kimg(path: Path) -> float | None:
    """Duration of a run by its options, None where they are not there or do not say."""
    try:
        return float(parse_json(read_regular(path))["total_kimg"])
    except (FileNotFoundError, KeyError):
        return None
    except (ValueError, TypeError) as err:
        raise ValueError(f'"{path}" is damaged: {err}.') from err


def trained_images(run_dir: str | os.PathLike) -> tuple[str, str, int] | None:
    """Digest of the pixels, path and number of the images that the networks of a run folder were trained on.

    None if the folder does not record the digest (published and older ones, and very large training sets, which
    have that of a listing of files).
    """
    try:
        options = parse_json(read_regular(Path(run_dir) / _OPTIONS))
        digest, data = options["dataset_sha256"], options["dataset_kwargs"]
        if not isinstance(digest, str) or digest.startswith("listing:"):
            return None
        size = data["max_size"] // 2 if data.get("xflip") else data["max_size"]
        return digest, str(data["path"]), size
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def optimum_subject(path_or_url: str, device: torch.device | str, cond: bool = False) -> Subject:
    """The optimum of a dataset, which is loaded at once; see `training.optim.load_optimum`."""
    path = fetch(path_or_url)
    net = load_optimum(path, device, cond=cond)
    return Subject(path, None, "class-conditional" if cond else "unconditional", lambda: (net, {}))


def image_subjects(
    paths: Sequence[str | os.PathLike],
    like: Sequence[int],  # (C, H, W) of the training images
    fit: Fit,
) -> list[Subject]:
    """Images that any model has made, one subject per folder, zip or array; see `Samples`.

    Raises
    ------
    OSError, ValueError
        If there are no images, they do not fit, or two of the paths have one name.
    """
    subjects = []
    for path in paths:
        samples = Samples(path, like, fit)
        number = re.search(r"(?:kimg|snapshot|step|checkpoint)\D?(\d+)", samples.path.stem)
        source = {"kind": "images", "path": str(samples.path.resolve()), **fit.record()}
        source |= {"checkpoint": int(number[1])} if number else {}
        subjects.append(Subject(samples.path, None, None, lambda net=samples: (net, {}), source, len(samples)))
    names = [subject.name for subject in subjects]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f'Two of the --images are called "{name.partition("-")[2]}"; rename one, or use two logs.')
    return subjects


def model_subject(
    kind: str, path: str, device: torch.device | str, load: Callable[[], torch.nn.Module], **how: Any
) -> Subject:
    """A network of another library, loaded at once; `how` it is sampled goes into the record."""
    net = load()
    source = {"kind": "model", "library": kind, "path": str(Path(path).resolve()), **how}
    return Subject(Path(path), None, None, lambda: (net.to(device), {}), source)
