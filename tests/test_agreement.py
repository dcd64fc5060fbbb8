"""emm.py agreement: distances between two networks for equal latents, on networks of which the answer is known."""

import csv
import json

import numpy as np
import pytest
import torch

import dataset_tool
import emm as cli
import train
from memorization.curve.agreement import Network, compare_networks
from memorization.runs import Run


class Constant(torch.nn.Module):
    """A denoiser that returns the nearer one of its two images."""

    img_channels, img_resolution, label_dim, sigma_min, sigma_max = 1, 8, 0, 0, float("inf")

    def __init__(self, images):
        super().__init__()
        self.register_buffer("images", torch.as_tensor(images, dtype=torch.float64) / 127.5 - 1)

    def round_sigma(self, sigma):
        return torch.as_tensor(sigma)

    def forward(self, x, sigma, class_labels=None, **kwargs):
        return self.images[torch.cdist(x.flatten(1).double(), self.images.flatten(1)).argmin(1)]


def network(images, path="run", kimg=1):
    options = {"dataset_kwargs": {"max_size": len(images), "resolution": 8}, "seed": None}
    return Network(Run(path, options), path, kimg, Constant(images[:2]), images)


def test_copies_and_the_same_function(digits):
    """Networks that copy are at 0 from their own images, those that are the same function at 0 from each other."""
    a, b = network(digits[:2]), network(digits[100:102])
    found = compare_networks(a, b, range(12))
    i, j = found.nearest  # which of its two images each latent leads to
    assert set(i.tolist()) == set(j.tolist()) == {0, 1}
    assert (found.own[0] == 0).all() and (found.own[1] == 0).all() and found.nearer == 0
    x, y = digits[i].reshape(len(i), -1).astype(float), digits[100 + j].reshape(len(j), -1).astype(float)
    rms = np.sqrt(((x - y) ** 2).mean(axis=1))
    np.testing.assert_allclose(found.between, rms)
    value, low, high = found.interval()
    assert value == pytest.approx(np.median(rms)) and 0 < low <= value <= high
    np.testing.assert_allclose(found.cosine, (x * y).sum(1) / np.linalg.norm(x, axis=1) / np.linalg.norm(y, axis=1))

    same = Network(b.run, b.path, 1, Constant(digits[500:502]), b.images)
    other = Network(a.run, a.path, 1, Constant(digits[500:502]), a.images)
    found = compare_networks(other, same, range(12))
    assert (found.between == 0).all() and found.nearer == 12 and found.interval()[2] < 0
    np.testing.assert_allclose(found.cosine, 1)
    np.testing.assert_allclose(found.cosine_centred, 1)


def test_refused(digits):
    a, b = network(digits[:4]), network(digits[3:6])
    with pytest.raises(ValueError, match="1 images are in both training sets"):
        compare_networks(a, b, range(4))
    found = compare_networks(a, b, range(4), allow_common=True)
    assert found.common == 1 and "1 images are in both training sets" in found.notes
    with pytest.raises(ValueError, match="two or more"):
        compare_networks(a, network(digits[10:12]), [1])


def test_command(tmp_path, run_cli):
    """Two halves, two trained networks; a pair, and two pairs over |D|."""
    for k in (0, 1):
        run_cli(
            dataset_tool.main, ["--source=digits", f"--dest={tmp_path}/{k}.zip", f"--split={k}/2", "--max-images=8"]
        )
        run_cli(
            train.main,
            [
                f"--outdir={tmp_path}/run{k}", "--nosubdir", f"--data={tmp_path}/{k}.zip", "--num-channels=8",
                "--cres=1", "--num-blocks=1", "--attn-resolutions=0", "--dropout=0", "--augment=0", "--batch=8",
                "--duration=7",
                "--device=cpu", f"--seed={k}",
            ],
        )  # fmt: skip
    out = tmp_path / "a.png"
    pair = [str(tmp_path / f"run{k}") for k in (0, 1)]
    args = ["--seeds=0-7", "--steps=3", "--device=cpu", f"--out={out}"]
    run_cli(cli.main, ["agreement", *pair, *args])
    record = json.loads(out.with_suffix(".json").read_text())
    (found,) = record["pairs"]
    assert (found["size_a"], found["images"], found["common"]) == (8, 8, 0) and record["sampler"]["num_steps"] == 3
    assert found["ci_low"] <= found["difference"] <= found["ci_high"] and found["seeds_of_training"] == [0, 1]
    first = out.read_bytes()
    run_cli(cli.main, ["agreement", *pair, *pair, *args])
    assert len(list(csv.DictReader(out.with_suffix(".csv").open()))) == 2 and out.read_bytes() != first
    table, again = out.with_suffix(".csv"), tmp_path / "again.png"
    args_again = ["agreement", f"--from-csv={table}", f"--out={again}"]
    text = run_cli(cli.main, args_again).stdout
    assert again.read_bytes() == out.read_bytes() and not again.with_suffix(".csv").exists()
    assert text.count(f"{found['between']:.1f}") >= 2 and f"[{found['ci_low']:+.1f}, {found['ci_high']:+.1f}]" in text
    assert "draws a table as it is" in run_cli(cli.main, [*args_again, "--steps=3"], code=2).stderr
    assert "Give either" in run_cli(cli.main, [*args_again, *pair], code=2).stderr
    lines = table.read_text().splitlines()
    nan = lines[1].replace(str(found["ci_low"]), "nan")
    none_left = lines[1].replace("8,8,", "8,0,", 1)
    large = lines[1].replace("8,8,", f"8,{2**64},", 1)
    outside = lines[1].replace(str(found["difference"]), "1e9")
    assert lines[1] not in (nan, none_left, large, outside)
    for damaged in (
        lines[:1],
        [lines[0], none_left],
        [lines[0], large],
        [lines[0], nan],
        [lines[0], outside],
        ["a,b", "1,2"],
        lines[:1] + ["8,8"],
    ):
        table.write_text("\n".join(damaged))
        assert "is no table that emm.py agreement has written" in run_cli(cli.main, args_again, code=1).stderr
    table.write_text("\n".join(lines[:2]))
    assert "is of one pair" in run_cli(cli.main, args_again, code=1).stderr
    assert "pairs of runs" in run_cli(cli.main, ["agreement", pair[0]], code=2).stderr
    assert "none at 77" in run_cli(cli.main, ["agreement", *pair, "--kimg=77"], code=1).stderr
    same = [pair[0], pair[0]]
    assert "8 images are in both" in run_cli(cli.main, ["agreement", *same, *args], code=1).stderr
    (tmp_path / "1.zip").write_bytes((tmp_path / "0.zip").read_bytes())
    assert "no longer holds the images" in run_cli(cli.main, ["agreement", *pair, *args], code=1).stderr
