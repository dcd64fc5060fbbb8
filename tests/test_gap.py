"""The gap to the optimum: against its definition in float64, its statistics, and the command that measures it."""

import json

import numpy as np
import pytest
import torch
from builders import torchrun
from PIL import Image
from test_ratio import FAST, random_network

import mem_ratio as cli
from memorization.measure.gap import GapMeter, ImageSet, gap_to_optimum, noise_levels
from memorization.measure.meter import SnapshotMeter
from memorization.plots import gap_curves
from memorization.records import read_records
from training.dataset import ImageFolderDataset
from training.networks import build_network
from training.optim import OptimEDM
from training.snapshots.snapshot import save_snapshot


@pytest.fixture(scope="module")
def labels(digits_zip):
    return ImageFolderDataset(digits_zip, use_labels=True).labels()


class Denoiser(torch.nn.Module):
    """scale * x, and a record of what it was called with."""

    img_channels, img_resolution, sigma_min, sigma_max = 1, 8, 0.0, float("inf")

    def __init__(self, scale, label_dim=0):
        super().__init__()
        self.scale, self.label_dim, self.calls = scale, label_dim, []

    def forward(self, x, sigma, class_labels=None):
        self.calls.append((x.numpy(), float(sigma), class_labels))
        return self.scale * x

    def round_sigma(self, sigma):
        return sigma

    def seen(self, sigma):
        """All noised images of this noise level, in order, float64 [n, pixels]."""
        return np.concatenate([x.reshape(len(x), -1) for x, s, _ in self.calls if s == sigma])


def denoised(images, x, sigma):
    """D*(x; sigma) [n, pixels], straight from the formula in float64."""
    y = images.reshape(len(images), -1) / 127.5 - 1
    logits = -((x[:, None] - y) ** 2).sum(2) / (2 * sigma**2)
    w = np.exp(logits - logits.max(1, keepdims=True))
    return w / w.sum(1, keepdims=True) @ y


SIGMAS = [0.002, 0.05, 0.5, 2, 80]

# ----------------------------------------------------------------------------
# The measure.


def test_optimum_is_no_distance_from_itself(digits):
    net, other = OptimEDM(digits), OptimEDM(digits, skip=False)
    for gap in [gap_to_optimum(net, net, digits, num_noised=40), gap_to_optimum(other, net, digits, num_noised=40)]:
        assert len(gap.sigma) == 16 and gap.num_noised == 40
        assert (gap.mean < 1e-8).all() and (gap.stderr < 1e-8).all()


@pytest.mark.parametrize("scale", [0, 1])
@pytest.mark.parametrize("noised", ["training", "held out"])
def test_equals_the_definition(digits, scale, noised):
    training = digits[:60]
    images = training if noised == "training" else digits[60:120]
    net = Denoiser(scale)
    gap = gap_to_optimum(net, OptimEDM(training), images, sigmas=SIGMAS, num_noised=30, batch=8)
    np.testing.assert_allclose(gap.sigma, SIGMAS)
    for sigma, mean, stderr in zip(gap.sigma, gap.mean, gap.stderr):
        x = net.seen(sigma)
        squares = ((scale * x - denoised(training, x, sigma)) ** 2).mean(1)
        assert len(squares) == 30
        assert mean == pytest.approx(squares.mean(), rel=1e-5, abs=1e-9)
        assert stderr == pytest.approx(squares.std(ddof=1) / 30**0.5, rel=1e-4, abs=1e-9)


def test_what_is_noised(digits):
    """Different training images, and for each the same normal noise at all noise levels and for all networks."""
    first, second = Denoiser(0), Denoiser(1)
    for net, batch in [(first, 64), (second, 7)]:
        gap = gap_to_optimum(net, OptimEDM(digits[:20]), digits[:100], num_noised=100, batch=batch, seed=5)
    y = digits[:100].reshape(100, -1) / 127.5 - 1
    x = first.seen(gap.sigma[0])
    picked = ((x[:, None] - y) ** 2).sum(2).argmin(1)
    assert sorted(picked) == list(range(100))
    noise = [(first.seen(sigma) - y[picked]) / sigma for sigma in gap.sigma]
    np.testing.assert_allclose(noise, np.broadcast_to(noise[5], (16, *noise[5].shape)), atol=1e-9)
    assert abs(noise[0].mean()) < 0.05 and noise[0].std() == pytest.approx(1, abs=0.05)
    assert np.abs(np.corrcoef(noise[0]) - np.eye(100)).max() < 0.6  # a noise of its own for each
    for sigma in gap.sigma:
        np.testing.assert_array_equal(first.seen(sigma), second.seen(sigma))
    third = Denoiser(0)
    gap_to_optimum(third, OptimEDM(digits[:20]), digits[:100], num_noised=100, seed=6)
    assert np.abs(third.seen(gap.sigma[8]) - first.seen(gap.sigma[8])).max() > 1


def test_images_repeat_only_if_there_are_too_few(digits):
    net = Denoiser(0)
    gap = gap_to_optimum(net, OptimEDM(digits[:4]), digits[:4], sigmas=[0.01], num_noised=40)
    assert gap.mean[0] > 0 and len(np.unique(net.seen(0.01), axis=0)) == 40  # each with its own noise
    single = gap_to_optimum(net, OptimEDM(digits[:4]), digits[:4], sigmas=[0.01], num_noised=1)
    assert single.mean[0] > 0 and np.isnan(single.stderr[0])


@pytest.mark.parametrize("noised", ["training", "held out"])
def test_losses_are_those_of_the_same_noised_images(digits, noised):
    """Each from its definition, with the image that was noised, in float64."""
    training = digits[:60]
    images = training if noised == "training" else digits[60:120]
    net = Denoiser(0.7)
    gap = gap_to_optimum(net, OptimEDM(training), images, sigmas=[0.02, 1.5], num_noised=60, batch=16)
    y = images.reshape(60, -1) / 127.5 - 1
    low = net.seen(gap.sigma[0])
    y = y[((low[:, None] - y) ** 2).sum(2).argmin(1)]  # at little noise the nearest is the one
    for i, sigma in enumerate(gap.sigma):
        x = net.seen(sigma)
        np.testing.assert_allclose(gap.losses[:, i], ((0.7 * x - y) ** 2).mean(1), rtol=1e-9)
        assert gap.loss[i] == pytest.approx(gap.losses[:, i].mean())
        assert gap.loss_stderr[i] == pytest.approx(gap.losses[:, i].std(ddof=1) / 60**0.5)
        best = ((denoised(training, x, sigma) - y) ** 2).mean()
        assert gap.optimum_loss[i] == pytest.approx(best, rel=1e-4, abs=1e-9)


def test_loss_on_held_out_images_less_that_on_training_images(digits):
    """No difference where they are of one kind; the optimum knows its own; equal noise makes the interval shorter."""
    held = []
    for seed in range(12):
        mixed = digits[np.random.default_rng(seed).permutation(len(digits))]
        training, heldout = ImageSet("training", mixed[:80]), ImageSet("held-out", mixed[80:400])
        entry = GapMeter(training, heldout, num=80, seed=seed).measure(Denoiser(0.5))
        low, value, high = (np.array(entry[key]) for key in ("loss_gap_low", "loss_gap", "loss_gap_high"))
        np.testing.assert_allclose(
            value, np.array(entry["holdout_loss"]) - np.array(entry["loss"]), rtol=1e-6, atol=1e-9
        )
        held.append((low <= 0) & (0 <= high))
    assert np.mean(held) > 0.85
    alone = 1.96 * np.hypot(entry["loss_stderr"], entry["holdout_loss_stderr"])
    assert ((high - low) / 2)[-1] < 0.5 * alone[-1]
    optimum = OptimEDM(training.images)
    entry = GapMeter(training, heldout, num=80).measure(optimum)
    assert np.array(entry["loss_gap_low"])[:8].min() > 0.01
    np.testing.assert_allclose(entry["loss"], entry["optimum_loss"], atol=1e-9)
    assert GapMeter(training, num=8).measure(optimum).keys().isdisjoint({"loss_gap", "holdout_loss"})


def test_gap_is_the_excess_loss(digits):
    """E |D - y|^2 = E |D* - y|^2 + gap, on training images: the cross term vanishes in the mean."""
    net, training = Denoiser(0.7), digits[:50]
    sigma, y = 1.0, training.reshape(50, -1) / 127.5 - 1
    gap = gap_to_optimum(net, OptimEDM(training), training, sigmas=[sigma], num_noised=2000)
    x = net.seen(sigma)
    # Which image each x belongs to is not recorded; average over the posterior instead, which is exact.
    logits = -((x[:, None] - y) ** 2).sum(2) / (2 * sigma**2)
    w = np.exp(logits - logits.max(1, keepdims=True))
    w /= w.sum(1, keepdims=True)
    loss = (w * ((0.7 * x[:, None] - y) ** 2).mean(2)).sum(1).mean()
    best = (w * (((w @ y)[:, None] - y) ** 2).mean(2)).sum(1).mean()
    assert gap.mean[0] == pytest.approx(loss - best, rel=1e-5)


def test_standard_error_is_the_spread_over_seeds(digits):
    net, optimum = Denoiser(0.9), OptimEDM(digits[:50])
    gaps = [gap_to_optimum(net, optimum, digits[50:], sigmas=[0.5, 5], num_noised=40, seed=s) for s in range(60)]
    spread = np.std([gap.mean for gap in gaps], axis=0, ddof=1)
    np.testing.assert_allclose(np.mean([gap.stderr for gap in gaps], axis=0), spread, rtol=0.35)


@pytest.mark.parametrize("batch", [1, 7, 100])
def test_batch_does_not_matter(digits, batch):
    net, optimum = random_network(3), OptimEDM(digits[:200])
    one = gap_to_optimum(net, optimum, digits[:200], num_noised=25)
    other = gap_to_optimum(net, optimum, digits[:200], num_noised=25, batch=batch)
    np.testing.assert_allclose(one.mean, other.mean, rtol=1e-4)
    np.testing.assert_allclose(one.stderr, other.stderr, rtol=1e-4)


def test_conditional(digits, labels):
    """Both denoisers are told the label of the image, and D* sees its class alone."""
    net, optimum = Denoiser(0, label_dim=10), OptimEDM(digits[:300], labels[:300])
    gap = gap_to_optimum(net, optimum, digits[:300], sigmas=[3.0], num_noised=40, batch=16, class_labels=labels[:300])
    x, told = net.seen(3.0), np.concatenate([c.numpy() for _, _, c in net.calls])
    expected = [((denoised(digits[:300][labels[:300] == c], row[None], 3.0)) ** 2).mean() for row, c in zip(x, told)]
    assert gap.mean[0] == pytest.approx(np.mean(expected), rel=1e-5)
    assert set(told) <= set(range(10)) and len(set(told)) > 5


def test_noise_levels_are_those_the_network_takes():
    small = dict(img_resolution=8, img_channels=1, model_type="SongUNet", model_channels=16, channel_mult=[1])
    vp, ve = (build_network(class_name=name, **small) for name in ("VPPrecond", "VEPrecond"))
    for net, low in [(vp, 0.002), (ve, 0.02)]:
        np.testing.assert_allclose(noise_levels(net)[[0, -1]], [low, 80], rtol=1e-6)
        ratios = noise_levels(net)[1:] / noise_levels(net)[:-1]
        np.testing.assert_allclose(ratios, ratios[0], rtol=1e-9)
    iddpm = build_network(class_name="iDDPMPrecond", **small)
    images = np.zeros((3, 1, 8, 8), dtype=np.uint8)
    gap = gap_to_optimum(iddpm.eval(), OptimEDM(images), images, num_noised=2)
    assert set(gap.sigma) <= set(iddpm.u.double().tolist()) and len(gap.sigma) == 16
    wide = gap_to_optimum(vp.eval(), OptimEDM(images), images, sigmas=[1e-5, 1e-4, 1.0, 1e4], num_noised=2)
    np.testing.assert_allclose(wide.sigma, [vp.sigma_min, 1, vp.sigma_max], rtol=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(num_noised=0), "at least 1"),
        (dict(images=np.zeros((0, 1, 8, 8), np.uint8)), "at least 1"),
        (dict(images=np.zeros((5, 1, 4, 4), np.uint8)), r"noised images have \[1, 4, 4\]"),
        (dict(images=np.zeros((5, 3, 8, 8), np.uint8)), r"noised images have \[3, 8, 8\]"),
        (dict(images=np.zeros((5, 1, 8, 8), np.float32)), "uint8, not float32"),
        (dict(optimum=OptimEDM(np.zeros((5, 1, 4, 4), np.uint8))), r"optimum's images have \[1, 4, 4\]"),
        (dict(sigmas=[]), "above 0"),
        (dict(sigmas=[1, 0]), "above 0"),
        (dict(sigmas=[float("nan")]), "above 0"),
        (dict(net=Denoiser(0, label_dim=3)), "one label for each"),
        (dict(net=Denoiser(0, label_dim=3), class_labels=np.zeros(4, int)), "one label for each"),
        (dict(net=Denoiser(0, label_dim=3), class_labels=np.full(5, 3)), "classes 0-2, the images 3-3"),
        (dict(optimum=OptimEDM(np.zeros((5, 1, 8, 8), np.uint8), np.zeros(5, int))), "one label for each"),
        (dict(optimum=OptimEDM(np.zeros((5, 1, 8, 8), np.uint8), shard=True)), "without shard"),
    ],
)
def test_refuses(change, message):
    images = np.zeros((5, 1, 8, 8), np.uint8)
    arguments = dict(net=Denoiser(0), optimum=OptimEDM(images), images=images, num_noised=2) | change
    with pytest.raises(ValueError, match=message):
        gap_to_optimum(**arguments)


# ----------------------------------------------------------------------------
# Of a run.


def test_mirrored_images_are_training_images(digits):
    meter = GapMeter(ImageSet("x", digits[:30]), num=20, xflip=True)
    both = np.concatenate([digits[:30], digits[:30, :, :, ::-1]])
    entry = meter.measure(OptimEDM(both))
    assert len(meter.training.images) == 60 and len(meter.reference) == 30 and max(entry["mean"]) < 1e-8


def test_diverged_network_is_recorded(digits):
    meter = GapMeter(ImageSet("x", digits[:30]), ImageSet("y", digits[20:40]), num=1)
    entry = meter.measure(Denoiser(float("nan")))
    assert entry["mean"] == entry["stderr"] == entry["holdout_mean"] == [None] * 16 and meter.overlap == 10
    assert json.loads(json.dumps(entry, allow_nan=False)) == entry


def test_npz_is_read_with_its_labels(digits, labels, tmp_path):
    np.savez(tmp_path / "d.npz", images=digits[:50], labels=labels[:50])
    data = ImageSet.read(tmp_path / "d.npz", cond=True)
    np.testing.assert_array_equal(data.images, digits[:50])
    np.testing.assert_array_equal(data.labels, labels[:50])
    assert ImageSet.read(tmp_path / "d.npz").labels is None


@pytest.fixture
def setup(tmp_path, make_zip, digits, labels):
    """A run of two snapshots, its training set, and held-out images; the folder that they are in."""
    for kimg in (100, 200):
        path = tmp_path / "run" / f"network-snapshot-000{kimg}.safetensors"
        save_snapshot(path, random_network(kimg), kimg, {"path": "training.zip", "xflip": False})
    save_snapshot(tmp_path / "cond" / path.name, random_network(1, label_dim=10), 200, {})
    make_zip(digits[:60, 0], labels[:60], tmp_path / "training.zip")
    make_zip(digits[60:90, 0], labels[60:90], tmp_path / "held-out.zip")
    make_zip(digits[50:70, 0], None, tmp_path / "overlapping.zip")
    make_zip(digits[:9, 0, :, :, np.newaxis].repeat(3, axis=3), labels[:9], tmp_path / "colour.zip")
    make_zip(digits[:9, 0], [9 - i for i in range(9)], tmp_path / "classes-1-9.zip")
    make_zip(digits[:9, 0], [11 for i in range(9)], tmp_path / "class-11.zip")
    make_zip(digits[:9, 0], [[0.5, 0.5] for i in range(9)], tmp_path / "vectors.zip")
    return tmp_path


def run_options(folder, **change):
    options = {"expdir": folder / "run", "knn-ref": folder / "training.zip", "seeds": "0-2", "gap": 12} | change
    return [f"--{key}={value}" for key, value in options.items() if value is not None] + FAST


def test_command(setup, run_cli, digits, monkeypatch):
    result = run_cli(cli.main, run_options(setup, holdout=setup / "held-out.zip"))
    assert f"Gap:         {setup / 'run' / 'gap.png'}\n" in result.output and "Note:" not in result.output
    assert Image.open(setup / "run" / "gap.png").size[0] > 800
    assert f"Loss:        {setup / 'run' / 'loss.png'}\n" in result.output
    assert Image.open(setup / "run" / "loss.png").size[0] > 1600
    records = read_records(setup / "run" / "mem_traj.jsonl")
    assert [r["kimg"] for r in records] == [200, 100]
    for record in records:
        gap, net = record["gap"], random_network(record["kimg"])
        assert (gap["num"], gap["seed"], gap["holdout_size"]) == (12, 0, 30)
        for images, prefix in [(digits[:60], ""), (digits[60:90], "holdout_")]:
            expected = gap_to_optimum(net, OptimEDM(digits[:60]), images, num_noised=12)
            np.testing.assert_allclose(gap["sigma"], expected.sigma)
            np.testing.assert_allclose(gap[prefix + "mean"], expected.mean, rtol=1e-5)
            np.testing.assert_allclose(gap[prefix + "stderr"], expected.stderr, rtol=1e-4)
            np.testing.assert_allclose(gap[prefix + "loss"], expected.loss, rtol=1e-5)
            np.testing.assert_allclose(gap[prefix + "loss_stderr"], expected.loss_stderr, rtol=1e-4)
        shown = [line for line in result.output.splitlines() if line.startswith(f"    {gap['sigma'][5]:9.4g} ")]
        assert len(shown) == 1

    # Nothing is measured twice: neither with the same settings, nor with fewer, nor the ratio for another gap.
    calls = []
    for name in ("measure_gap", "measure"):
        real = getattr(SnapshotMeter, name)

        def count(*args, name=name, real=real, **kwargs):
            calls.append(name)
            return real(*args, **kwargs)

        monkeypatch.setattr(SnapshotMeter, name, count)
    run_cli(cli.main, run_options(setup, holdout=setup / "held-out.zip"))
    run_cli(cli.main, run_options(setup))
    run_cli(cli.main, run_options(setup, gap=None))
    assert calls == [] and read_records(setup / "run" / "mem_traj.jsonl") == records
    result = run_cli(cli.main, run_options(setup, gap=5, holdout=setup / "overlapping.zip"))
    assert calls == ["measure_gap"] * 2
    assert f'Note: 10 images of "{setup / "overlapping.zip"}" are training images.' in result.output
    changed = read_records(setup / "run" / "mem_traj.jsonl")
    assert [r["gap"]["num"] for r in changed] == [5, 5]
    assert [{**r, "gap": None} for r in changed] == [{**r, "gap": None} for r in records]

    # A ratio that is measured again leaves the gap alone, unless that is asked for, too.
    run_cli(cli.main, [*run_options(setup, gap=None), "--remeasure"])
    assert [r["gap"] for r in read_records(setup / "run" / "mem_traj.jsonl")] == [r["gap"] for r in changed]
    calls.clear()
    run_cli(cli.main, [*run_options(setup), "--remeasure"])
    assert calls == ["measure", "measure_gap"] * 2
    # Another network under the same name has no gap yet.
    save_snapshot(setup / "run" / "network-snapshot-000200.safetensors", random_network(7), 200, {})
    run_cli(cli.main, run_options(setup, gap=None))
    assert ["gap" in r for r in read_records(setup / "run" / "mem_traj.jsonl")] == [False, True]


def test_interrupted_between_ratio_and_gap(setup, run_cli, monkeypatch):
    def stop(*args):
        raise OSError("The disk is full.")

    with monkeypatch.context() as patch:
        patch.setattr(SnapshotMeter, "measure_gap", stop)
        run_cli(cli.main, run_options(setup), code=1)
    assert len(read_records(setup / "run" / "mem_traj.jsonl")) == 1
    assert run_cli(cli.main, run_options(setup)).output.count("measured before") == 1
    assert ["gap" in r for r in read_records(setup / "run" / "mem_traj.jsonl")] == [True, True]


def test_class_conditional_run(setup, run_cli, digits, labels):
    change = {"expdir": setup / "cond", "holdout": setup / "held-out.zip", "seeds": "0"}
    run_cli(cli.main, run_options(setup, **change))
    (record,) = read_records(setup / "cond" / "mem_traj.jsonl")
    optimum = OptimEDM(digits[:60], labels[:60])
    expected = gap_to_optimum(
        random_network(1, label_dim=10), optimum, digits[60:90], num_noised=12, class_labels=labels[60:90]
    )
    np.testing.assert_allclose(record["gap"]["holdout_mean"], expected.mean, rtol=1e-5)


@pytest.mark.slow
def test_two_processes(setup, run_cli):
    run_cli(cli.main, run_options(setup, log=setup / "one" / "mem_traj.log", holdout=setup / "held-out.zip", gap=7))
    out = torchrun(2, "mem_ratio.py", *run_options(setup, holdout=setup / "held-out.zip", gap=7), "--batch=3")
    assert out.count("Gap:") == 1 and (setup / "run" / "gap.png").exists()
    for one, two in zip(*(read_records(setup / name / "mem_traj.jsonl") for name in ("one", "run"))):
        assert one["gap"]["sigma"] == two["gap"]["sigma"]
        for key in ("mean", "stderr", "holdout_mean", "holdout_stderr"):
            np.testing.assert_allclose(one["gap"][key], two["gap"][key], rtol=1e-4)


@pytest.mark.parametrize(
    ("change", "code", "message"),
    [
        ({"gap": 0}, 2, "--gap"),
        ({"gap": "many"}, 2, "--gap"),
        ({"gap": None, "holdout": "held-out.zip"}, 2, "--holdout needs --gap"),
        ({"holdout": "missing.zip"}, 1, "missing.zip"),
        ({"holdout": "colour.zip"}, 1, "[3, 8, 8], the training images [1, 8, 8]"),
        ({"expdir": "cond", "knn-ref": "overlapping.zip"}, 1, "holds no labels"),
        ({"expdir": "cond", "holdout": "overlapping.zip"}, 1, "holds no labels"),
        ({"expdir": "cond", "knn-ref": "vectors.zip"}, 1, "are vectors"),
        ({"expdir": "cond", "knn-ref": "class-11.zip"}, 1, "classes 0-9, the images 11-11"),
        ({"expdir": "cond", "knn-ref": "classes-1-9.zip", "holdout": "held-out.zip"}, 1, "images of class 0"),
    ],
)
def test_bad_commands(setup, run_cli, monkeypatch, change, code, message):
    monkeypatch.chdir(setup)
    before = sorted(setup.rglob("*"))
    result = run_cli(cli.main, run_options(setup, **change), code=code)
    assert message in result.output and sorted(setup.rglob("*")) == before


def test_figure(tmp_path):
    gap = {"sigma": [0.01, 1, 80], "mean": [1e-4, 0.1, None], "stderr": [None, 0.1, 0.1]}
    held_out = {"holdout_mean": [0.1, 0, 0.1], "holdout_stderr": [0.1, 0.1, 0.1]}
    records = [{"kimg": None, "gap": {**gap, "mean": [0, 0, 0]}}, {"kimg": 7, "gap": gap | held_out}, {"kimg": 9}]
    gap_curves(records, tmp_path / "gap.svg", title="Any")
    gap_curves(records[:1], tmp_path / "zero.png")
    assert len(list(tmp_path.iterdir())) == 2
    with pytest.raises(ValueError, match="no gap to draw"):
        gap_curves(records[2:], tmp_path / "none.png")
    with pytest.raises(ValueError, match="format"):
        gap_curves(records, tmp_path / "gap.doc")
