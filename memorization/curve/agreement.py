"""Two networks trained on different images, sampled from the same latents: do they make the same images?

For each latent the networks A and B make images a and b. Compared are, in the root mean square of pixels of 0..255,

    between   |a - b|,
    own       the mean of |a - nearest training image of A| and |b - nearest training image of B|,
    other     |a - b'|, where b' is B's image of the next latent: what networks that do not agree look like.

Networks that copy have own near 0 and between as large as other; networks that have learned the same density have
between smaller than own. The measure is the median over latents of between - own, with a bootstrap interval over
latents. The cosine of a and b (Kadkhodaie et al. compare images so) is given of the pixels, and of the pixels less the
mean training image, since all images of a kind have a large one.

References
----------
Kadkhodaie, Guth, Simoncelli & Mallat, "Generalization in diffusion models arises from geometry-adaptive harmonic
representations", ICLR 2024, arXiv:2310.02557.
"""

import functools
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dnnlib.limits import parse_json, read_regular
from dnnlib.repeats import image_digest
from memorization.curve.factors import differing_options
from memorization.curve.tables import count, number, read_csv, reading_table
from memorization.measure.knn import Neighbors
from memorization.runs import OPTIONS, Run
from memorization.stats.intervals import wilson_interval
from training.dataset import ImageFolderDataset
from training.fingerprint import array_sha256
from training.generation import drawn_classes, generate_images
from training.snapshots.snapshot import list_snapshots, load_network

REPLICATES = 2000
# What is drawn over |D|: these are medians, and NAME_q1 and NAME_q3 beside them the quartiles.
DRAWN = ("between", "own", "other", "cosine_centred", "cosine_other_centred")
QUARTILES = tuple(f"{name}_{q}" for name in DRAWN for q in ("q1", "q3"))
AGREEMENT_COLUMNS = (
    "size_a", "size_b", "kimg_a", "kimg_b", "images", "between", "own", "own_a", "own_b", "other", "difference",
    "ci_low", "ci_high", "share_nearer", "share_ci_low", "share_ci_high", "cosine", "cosine_centred",
    "cosine_other_centred", *QUARTILES, "common", "run_a", "run_b",
)  # fmt: skip


@dataclass(frozen=True)
class Network:
    """One of the two networks, with its training set."""

    run: Run
    path: Path  # snapshot
    kimg: float
    net: torch.nn.Module
    images: np.ndarray  # training images, uint8 [N, C, H, W]


@dataclass(frozen=True)
class Agreement:
    """The images of two networks for the same latents; all distances float64 [n]."""

    networks: tuple[Network, Network]
    common: int  # different images that are in both training sets
    seeds: np.ndarray  # int64 [n]
    images: tuple[np.ndarray, np.ndarray]  # uint8 [n, C, H, W] each
    between: np.ndarray
    own: tuple[np.ndarray, np.ndarray]  # to the nearest training image of the network itself
    nearest: tuple[np.ndarray, np.ndarray]  # int64 [n], which that is
    other: np.ndarray
    cosine: np.ndarray
    cosine_centred: np.ndarray
    cosine_other: np.ndarray  # centred, of different latents
    notes: tuple[str, ...]  # sentences without a full stop

    @property
    def mean_own(self) -> np.ndarray:
        """Of the two networks, for each latent."""
        return (self.own[0] + self.own[1]) / 2

    @property
    def difference(self) -> np.ndarray:
        return self.between - self.mean_own

    def interval(self, confidence: float = 0.95) -> tuple[float, float, float]:
        """Median over latents of `difference`, and the percentile bootstrap interval of it."""
        rng, d = np.random.default_rng(0), self.difference
        drawn = [np.median(d[rng.integers(len(d), size=len(d))]) for _ in range(REPLICATES)]
        low, high = np.quantile(drawn, [(1 - confidence) / 2, (1 + confidence) / 2])
        return float(np.median(d)), float(low), float(high)

    @property
    def nearer(self) -> int:
        """Latents whose two images are nearer to each other than each is to its nearest training image."""
        return int((self.between < np.minimum(*self.own)).sum())

    @functools.cached_property
    def row(self) -> dict[str, Any]:
        """The numbers of the pair by `AGREEMENT_COLUMNS`."""
        a, b = self.networks
        difference, low, high = self.interval()
        share_low, share_high = wilson_interval(self.nearer, len(self.seeds))
        per_latent = {
            "between": self.between, "own": self.mean_own, "own_a": self.own[0], "own_b": self.own[1],
            "other": self.other, "cosine": self.cosine, "cosine_centred": self.cosine_centred,
            "cosine_other_centred": self.cosine_other,
        }  # fmt: skip
        found = {name: float(np.median(x)) for name, x in per_latent.items()} | {
            "size_a": len(a.images), "size_b": len(b.images), "kimg_a": a.kimg, "kimg_b": b.kimg,
            "images": len(self.seeds), "difference": difference, "ci_low": low, "ci_high": high,
            "share_nearer": self.nearer / len(self.seeds), "share_ci_low": share_low, "share_ci_high": share_high,
            "common": self.common, "run_a": str(a.run.path), "run_b": str(b.run.path),
        }  # fmt: skip
        for name in DRAWN:
            found[f"{name}_q1"], found[f"{name}_q3"] = (float(q) for q in np.quantile(per_latent[name], [0.25, 0.75]))
        return {name: found[name] for name in AGREEMENT_COLUMNS}


def read_agreement_csv(path: str | os.PathLike) -> list[dict[str, Any]]:
    """The numbers of each pair, as `Agreement.row` gives them, from a table of emm.py agreement.

    Raises
    ------
    ValueError
        If the file is no such table.
    OSError
        If it cannot be read.
    """
    counts, names = {"size_a", "size_b", "images", "common"}, {"run_a", "run_b"}
    with reading_table(path, "emm.py agreement"):
        kinds = {key: str if key in names else count if key in counts else number for key in AGREEMENT_COLUMNS}
        rows = [{key: kind(row[key]) for key, kind in kinds.items()} for row in read_csv(path)]
        for row in rows:
            ordered = all(row[f"{name}_q1"] <= row[name] <= row[f"{name}_q3"] for name in DRAWN)
            inside = row["ci_low"] <= row["difference"] <= row["ci_high"] and 0 <= row["share_nearer"] <= 1
            if not (ordered and inside and min(row["size_a"], row["size_b"], row["images"]) > 0):
                raise ValueError("numbers that are none of an agreement")
        if not rows:
            raise ValueError("no rows")
    return rows


def open_network(run_dir: str | os.PathLike, kimg: int | None, device: torch.device | str) -> Network:
    """The last snapshot of a run, or that at `kimg`, and the images that it was trained on.

    Raises
    ------
    OSError, ValueError
        If there is no such snapshot, or the training images are not there any more or are others.
    """
    folder = Path(run_dir)
    trained = {k: path for k, path in list_snapshots(folder) if k > 0}
    if not trained or (kimg is not None and kimg not in trained):
        there = f"snapshots at kimg {', '.join(map(str, sorted(trained)))}" if trained else "no snapshot after kimg 0"
        raise ValueError(f'"{folder}" has {there}{"" if kimg is None else f", and none at {kimg}"}.')
    path = trained[max(trained) if kimg is None else kimg]
    try:
        options = parse_json(read_regular(folder / OPTIONS))
        data = options["dataset_kwargs"]
        images = ImageFolderDataset(data["path"], xflip=bool(data.get("xflip"))).images()
        digest = options.get("dataset_sha256")
    except (KeyError, TypeError, ValueError) as err:
        raise ValueError(f'The training images of "{folder}" cannot be read: {err}.') from None
    unmirrored = images[: len(images) // 2] if data.get("xflip") else images
    if isinstance(digest, str) and not digest.startswith("listing:") and digest != array_sha256(unmirrored):
        raise ValueError(f'"{data["path"]}" no longer holds the images that "{folder}" was trained on.')
    net, _ = load_network(path, device)
    return Network(Run(folder, options), path, max(trained) if kimg is None else kimg, net.eval(), images)


def common_images(a: np.ndarray, b: np.ndarray) -> int:
    """How many different images, pixel by pixel, are in both of two sets uint8 [N, C, H, W]."""
    return len({image_digest(image) for image in a} & {image_digest(image) for image in b})


def compare_networks(
    a: Network,
    b: Network,
    seeds: Sequence[int],
    *,
    batch: int = 64,
    sampler_kwargs: dict[str, Any] | None = None,
    device: torch.device | str = "cpu",
    allow_common: bool = False,  # images in both training sets are noted, not refused
) -> Agreement:
    """Sample both networks from the latents of `seeds`, and compare; see the module.

    Raises
    ------
    ValueError
        If they make images of different size, draw different classes, have training images in common, or there are
        fewer than two seeds.
    """
    if len(seeds) < 2 or len(set(seeds)) != len(seeds):
        raise ValueError("An agreement needs two or more different seeds.")
    shapes = [(n.net.img_channels, n.net.img_resolution) for n in (a, b)]
    if shapes[0] != shapes[1]:
        raise ValueError(f"The networks make images of different channels and size: {shapes[0]} and {shapes[1]}.")
    if drawn_classes(a.net) != drawn_classes(b.net):
        raise ValueError("The networks draw different classes, so that equal seeds are not the same latent and label.")
    common = common_images(a.images, b.images)
    if common and not allow_common:
        raise ValueError(
            f"{common} images are in both training sets; make disjoint ones with dataset_tool.py --split=0/2 and 1/2, "
            "or say --allow-common."
        )
    seeds = sorted(seeds)
    made = []
    for network in (a, b):
        parts = generate_images(network.net, seeds, batch=batch, sampler_kwargs=sampler_kwargs, device=device)
        made.append(np.concatenate([images.numpy() for _, images in parts]))
    own, nearest = [], []
    for network, images in zip((a, b), made):
        distance, index = Neighbors(network.images, device=device).query(images, 1)
        own.append(np.asarray(distance, dtype=np.float64)[:, 0])
        nearest.append(np.asarray(index)[:, 0])
    x, y = (images.reshape(len(seeds), -1).astype(np.float64) for images in made)
    mean = np.concatenate([a.images, b.images]).reshape(len(a.images) + len(b.images), -1).mean(axis=0)
    shifted = np.roll(y, 1, axis=0)
    return Agreement(
        (a, b), common, np.array(seeds), (made[0], made[1]), _rms(x - y), (own[0], own[1]), (nearest[0], nearest[1]),
        _rms(x - shifted), _cosine(x, y), _cosine(x - mean, y - mean), _cosine(x - mean, shifted - mean),
        tuple(_notes(a, b, common)),
    )  # fmt: skip


def agreement_record(found: Agreement) -> dict[str, Any]:
    """As plain data."""
    return {
        **found.row,
        "interval": f"95 %, of the median over latents; bootstrap, {REPLICATES} replicates",
        "snapshots": [n.path.name for n in found.networks],
        "seeds_of_training": [n.run.options.get("seed") for n in found.networks],
        "notes": list(found.notes),
    }


def _notes(a: Network, b: Network, common: int) -> list[str]:
    notes = ["this is about these two networks; the interval knows of latents only, not of other training seeds"]
    if common:
        notes.append(f"{common} images are in both training sets")
    if len(a.images) != len(b.images):
        notes.append(f"the training sets have {len(a.images)} and {len(b.images)} images")
    if a.kimg != b.kimg:
        notes.append(f"the networks are of kimg {a.kimg:g} and {b.kimg:g}")
    if (seed := a.run.options.get("seed")) is not None and seed == b.run.options.get("seed"):
        notes.append(f"both were trained with seed {seed}, and began with the same weights")
    if names := differing_options([a.run, b.run]):
        notes.append(f"the runs differ in: {', '.join(names)}")
    return notes


def _rms(x: np.ndarray) -> np.ndarray:
    return np.sqrt((x**2).mean(axis=1))


def _cosine(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    norms = np.linalg.norm(x, axis=1) * np.linalg.norm(y, axis=1)
    return np.divide((x * y).sum(axis=1), norms, out=np.zeros(len(x)), where=norms > 0)
