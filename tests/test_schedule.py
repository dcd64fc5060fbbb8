"""Durations and snapshots in steps, whatever |D| is; discrete noise levels; gray datasets."""

import json
import zipfile

import numpy as np
import PIL.Image
import pytest
import torch
from test_training import TINY, last_snapshot, small_zip, stats, weights  # noqa: F401

import dataset_tool
import train
from training.loss import VPLoss
from training.networks import vp_sigma
from training.run.schedule import snapshot_kimgs, snapshot_steps
from training.snapshots.snapshot import list_snapshots


def test_snapshot_steps():
    paper = snapshot_steps("250:10000:250,15000:2000000:5000", 2_000_000, 512)
    assert paper[:2] == [250, 500] and paper[39:42] == [10_000, 15_000, 20_000] and paper[-1] == 2_000_000
    assert len(paper) == 40 + 398 and snapshot_steps("250:10000:250", 600, 512) == [250, 500]
    assert snapshot_steps("9, 5,7", 8, 1000) == [5, 7]
    spaced = snapshot_steps("log:5", 10_000, 1000)
    assert spaced == [1, 10, 100, 1000, 10_000]
    assert snapshot_steps("even:1", 9000, 16) == [9000] and snapshot_steps("even:3", 9000, 16) == [3000, 6000, 9000]
    assert snapshot_steps("even:2", 63, 16) == [63]  # half of it is before 1 kimg
    assert snapshot_steps("log:50", 100, 16) == [100]  # 63 to 100 are in kimg 1, whose file is written at the end
    kimg = [step * 16 // 1000 for step in snapshot_steps("log:50", 1000, 16)]
    assert kimg[0] == 1 and kimg[-1] == 16 and len(set(kimg)) == len(kimg)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "is no step"), ("0", "is no step"), ("-3", "is no step"), ("5:3:1", "no range"), ("1:9:0", "no range"),
        ("log:1", "N of 2 or more"), ("even:0", "N of 1 or more"), ("log:x", "is no step"),
        ("2000", "before the first of them"), ("1", "before 1 kimg"), ("100,101", "in the same kimg"),
    ],
)  # fmt: skip
def test_wrong_steps(text, words):
    with pytest.raises(ValueError, match=words):
        snapshot_steps(text, 1000, 32)


def test_planned_snapshots():
    """By hand: ticks of 1 kimg end after 32, 1056, 2080, 3104, 4128 images."""
    assert snapshot_kimgs(4300, 32, 1, 2) == [2, 4] and snapshot_kimgs(6000, 32, 1, 2) == [2, 4, 6]
    assert snapshot_kimgs(6000, 32, 1, 1000) == [6] and snapshot_kimgs(1, 512, 50, 50) == []
    assert snapshot_kimgs(10_000, 512, 0.001, 1) == list(range(1, 11))


def test_steps_do_not_depend_on_the_size(small_zip, digits_zip, tmp_path, run_cli):  # noqa: F811
    """The same number of steps and the same snapshots for 50 and for 1797 images; the last is that of the end."""
    steps = ["--total-steps=125", "--snap-at=40,94", "--ema=0", "--lr-rampup=0", *(a for a in TINY if "snap" not in a)]
    for name, data in [("small", small_zip), ("large", digits_zip)]:
        out = run_cli(train.main, ["--outdir", tmp_path / name, "--nosubdir", "--data", data, *steps]).output
        assert "at 2 listed times, one per kimg at most, and at the end" in out and "4 kimg" in out
        options = json.loads((tmp_path / name / "training_options.json").read_text())
        assert options["total_nimg"] == 4000 and options["snap_nimg"] == [1280, 3008]
        assert options["command"]["duration"] is None and options["command"]["total_steps"] == 125
        planned = snapshot_kimgs(4000, 32, 1, None, [1280, 3008])
        assert [kimg for kimg, _ in list_snapshots(tmp_path / name)] == planned == [1, 3, 4]
        assert {line["Progress/lr"]["mean"] for line in stats(tmp_path / name)} == {1e-3}
    assert options["duration"] == pytest.approx(4000 / 1797 / 20)
    # A run that went on has the snapshots of the one that did not stop.
    for total in ("--total-steps=70", "--total-steps=125"):
        args = ["--outdir", tmp_path / "again", "--nosubdir", "--data", small_zip, *steps, total, "--resume=latest"]
        run_cli(train.main, args)
    assert [kimg for kimg, _ in list_snapshots(tmp_path / "again")] == [1, 2, 3, 4]  # 2: its first end
    for kimg in (1, 3, 4):
        file = f"network-snapshot-{kimg:06d}.safetensors"
        saved, whole = (weights(tmp_path / name / file) for name in ("again", "small"))
        assert all(torch.equal(saved[name], whole[name]) for name in whole)


def test_without_ema_the_snapshot_is_the_network(small_zip, tmp_path, run_cli):  # noqa: F811
    run_cli(train.main, ["--outdir", tmp_path, "--nosubdir", "--data", small_zip, "--total-steps=40", "--ema=0", *TINY])
    (path,) = tmp_path.glob("training-state-*.pt")
    shared = torch.load(path, weights_only=True)
    shared = shared.get("shared", shared)
    saved = weights(last_snapshot(tmp_path))
    for name, value in shared["net"].items():
        torch.testing.assert_close(saved[name], value, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--total-steps=9", "--duration=3"], "exclude each other"),
        (["--total-steps=9", "--total-kimg=3"], "exclude each other"),
        (["--snap-at=40", "--total-steps=50"], "--snap and --snap-at exclude each other"),
        (["--vp-steps=1000"], "--vp-steps belongs to --precond=vp"),
    ],
)
def test_what_excludes_each_other(options, words, small_zip, tmp_path, run_cli):  # noqa: F811
    result = run_cli(train.main, ["--outdir", tmp_path / "x", "--data", small_zip, *TINY, *options], code=1)
    assert words in result.stderr and not (tmp_path / "x").exists()


def test_discrete_vp_is_the_simple_loss_of_ddpm():
    """|F - noise|^2 at the levels of DDPM: cumulative products of 1 - beta for beta from 1e-4 to 0.02."""
    torch.manual_seed(0)
    seen = []

    def net(x, sigma, labels, augment_labels=None):
        seen.append((x, sigma))
        return x - sigma * 0.25  # F = 0.25

    images = torch.zeros(4000, 1, 2, 2)
    loss = VPLoss(steps=1000)(net, images)
    x, sigma = seen[0]
    torch.testing.assert_close(loss, (0.25 - x / sigma) ** 2, rtol=1e-3, atol=1e-4)
    levels = vp_sigma(torch.arange(1, 1001) / 1000, 19.9, 0.1)
    distance = (sigma.flatten()[:, None] - levels).abs().amin(1)
    assert distance.max() < 1e-4 * levels.max() and len(sigma.unique()) > 900
    bar = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
    np.testing.assert_allclose(levels[99:].numpy(), np.sqrt(1 / bar - 1)[99:], rtol=0.07)


def test_gray_datasets(tmp_path, run_cli):
    image = np.random.RandomState(0).randint(0, 256, (10, 12, 3), dtype=np.uint8)
    (tmp_path / "in").mkdir()
    PIL.Image.fromarray(image).save(tmp_path / "in/a.png")
    args = ["--source", tmp_path / "in", "--transform=center-crop", "--resolution=8x8"]
    run_cli(dataset_tool.main, [*args, "--dest", tmp_path / "rgb.zip"])
    run_cli(dataset_tool.main, [*args, "--dest", tmp_path / "gray.zip", "--grayscale"])

    def read(name):
        with zipfile.ZipFile(tmp_path / name) as archive:
            png = next(n for n in archive.namelist() if n.endswith(".png"))
            with archive.open(png) as file:
                return np.array(PIL.Image.open(file)), json.loads(archive.read("dataset.json"))["conversion"]

    rgb, before = read("rgb.zip")
    gray, after = read("gray.zip")
    assert gray.shape == (8, 8) and "grayscale" not in json.dumps(before) and "grayscale" in json.dumps(after)
    assert np.abs(gray - rgb @ [0.299, 0.587, 0.114]).max() <= 1


def test_reuse_takes_no_gray_dataset_for_one_in_colour(tmp_path, run_cli):
    (tmp_path / "rgb").mkdir()
    pixels = np.random.RandomState(0).randint(0, 256, (8, 8, 3), dtype=np.uint8)
    PIL.Image.fromarray(pixels).save(tmp_path / "rgb/0.png")
    make = [f"--source={tmp_path}/rgb", f"--dest={tmp_path}/set.zip", "--reuse"]
    assert "1 channel," in run_cli(dataset_tool.main, [*make, "--grayscale"]).output
    assert "Nothing is written" in run_cli(dataset_tool.main, [*make, "--grayscale"]).output
    assert "3 channels" in run_cli(dataset_tool.main, make).output


def test_the_snapshot_at_the_end_overwrites_no_listed_one():
    with pytest.raises(ValueError, match="steps 40 and 60 are in the same kimg"):
        snapshot_steps("40", 60, 32)
    assert snapshot_steps("40", 63, 32) == [40]
    assert snapshot_steps("log:3", 40, 32) == [40]  # 32, 36 and 40 are all in kimg 1


def test_vp_in_steps_is_sampled_at_the_levels_of_training():
    """Levels as of DDPM (Ho et al. 2020: beta from 1e-4 to 0.02) within 5 %; the sampler keeps to them."""
    from training.networks import build_network
    from training.samplers import edm_sampler

    tiny = dict(model_channels=8, channel_mult=[1], num_blocks=1, attn_resolutions=[], embedding_type="positional")
    net = build_network("VPPrecond", img_resolution=8, img_channels=1, steps=1000, **tiny)
    alpha_bar = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
    ddpm = torch.from_numpy(((1 - alpha_bar) / alpha_bar) ** 0.5)
    t = torch.arange(1, 1001, dtype=torch.float64) / 1000
    levels = (torch.exp(9.95 * t**2 + 0.1 * t) - 1).sqrt()
    assert ((levels / ddpm - 1).abs() < 0.05).all()
    torch.testing.assert_close(net.round_sigma(levels), levels)
    torch.testing.assert_close(net.round_sigma(torch.tensor([0.0, 1e-3, 500.0])), levels[[0, 0, -1]].float())
    assert net.sigma_min == pytest.approx(levels[0].item(), rel=1e-3)

    asked = []

    def watched(x, sigma, class_labels=None):
        asked.append(sigma)
        return torch.zeros_like(x)

    for name in ("sigma_min", "sigma_max", "round_sigma"):
        setattr(watched, name, getattr(net, name))
    edm_sampler(watched, torch.zeros(1, 1, 8, 8))
    distance = (torch.stack(asked)[:, None] / levels - 1).abs().min(dim=1).values
    assert len(asked) == 35 and distance.max() < 1e-9
