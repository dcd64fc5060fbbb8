"""Quality of generated images: each measure by an independent formula, intervals by simulation, and mem_ratio.py."""

import json

import numpy as np
import pytest
import scipy.linalg
import scipy.stats
import torch

import mem_ratio as cli
import memorization.measure.quality as quality
import memorization.measure.ratio
from memorization.measure.gap import ImageSet
from memorization.measure.quality import MEASURES, Vectors, compare
from memorization.measure.quality_meter import BEYOND, OVERLAP, QualityMeter, principal_axes
from memorization.records import read_records
from memorization.stats.intervals import exact_interval
from training.networks import build_network
from training.snapshots.snapshot import save_snapshot


@pytest.fixture(scope="module")
def parts(digits):
    """Digits in random order: 200 training images, 800 held-out ones, 797 others."""
    return np.split(digits[np.random.default_rng(0).permutation(1797)], [200, 1000])


@pytest.fixture
def files(parts, tmp_path):
    """train.npz, held.npz, new.npz (other digits) and copies.npz (of training images) in a folder."""
    training, heldout, new = parts
    copies = training[np.random.default_rng(1).integers(0, 200, 300)]
    for name, images in dict(train=training, held=heldout, new=new[:300], copies=copies).items():
        np.savez(tmp_path / f"{name}.npz", images=images)
    return tmp_path


def by_definition(x, y, pixels_x=None, pixels_y=None):
    """All measures of float vectors x, y by their published formulas, from n x m matrices."""

    def kernel(a, b):
        return (a @ b.T / a.shape[1] + 1) ** 3

    def distance(a, b):
        return np.linalg.norm(a[:, None] - b[None], axis=2)

    sx, sy = np.cov(x.T), np.cov(y.T)
    root = scipy.linalg.sqrtm(sx @ sy).real
    n, m = len(x), len(y)
    kxx, kyy = (kernel(a, a) * (1 - np.eye(len(a))) for a in (x, y))
    pairs = distance(x, y)
    dx, dy = (np.sort(distance(a, a), axis=1) for a in (x, y))  # column 0 is the image itself
    return {
        "frechet": np.square(x.mean(0) - y.mean(0)).sum() + np.trace(sx + sy - 2 * root),
        "kernel": kxx.sum() / (n * (n - 1)) + kyy.sum() / (m * (m - 1)) - 2 * kernel(x, y).mean(),
        "precision": (pairs <= dy[:, 3]).any(1).mean(),
        "recall": (pairs <= dx[:, [3]]).any(0).mean(),
        "density": (pairs <= dy[:, 5]).sum(1).mean() / 5,
        "coverage": (pairs <= dy[:, 5]).any(0).mean(),
    }


@pytest.mark.parametrize("block", [1024, 70])
def test_every_measure_equals_its_published_formula(parts, monkeypatch, block):
    """On projected digits, against scipy.linalg.sqrtm and matrices of all pairs."""
    monkeypatch.setattr(quality, "_BLOCK", block)
    rng = np.random.default_rng(2)
    pixels = [images.reshape(len(images), -1) / 127.5 - 1 for images in parts]
    projection = rng.normal(size=(64, 12)) / 8
    x, y = pixels[1][:310] @ projection + 0.05 * rng.normal(size=(310, 12)), pixels[2][:450] @ projection
    found, expected = compare(Vectors(x), Vectors(y), list(MEASURES)), by_definition(x, y)
    for name, estimate in found.items():
        assert estimate.value == pytest.approx(expected[name], rel=1e-9, abs=1e-12), name
        assert estimate.low <= estimate.value <= estimate.high


def test_pixels_are_compared_as_numbers_from_minus_one_to_one(parts):
    x, y = parts[1][:150], parts[2][:250]
    found = compare(Vectors(x), Vectors(y), list(MEASURES))
    as_floats = [images.reshape(len(images), -1) / 127.5 - 1 for images in (x, y)]
    expected = compare(*(Vectors(a) for a in as_floats), ["frechet", "kernel", "precision", "recall", "coverage"])
    for name, estimate in expected.items():
        assert found[name].value == pytest.approx(estimate.value, abs=1e-9), name
    assert np.all(as_floats[0] == x.reshape(len(x), -1) / 127.5 - 1)  # nothing was written into the vectors


def test_frechet_of_singular_covariances_in_closed_form():
    """Diagonal covariances, one axis of which is constant: F = |mu|^2 + sum (s_i - t_i)^2."""
    signs = np.array([[1, 1, 1], [1, -1, 1], [-1, 1, 1], [-1, -1, 1]]) * np.sqrt(3 / 4)  # unbiased variance 1
    s, t = np.array([2.0, 0.5, 0]), np.array([1.0, 1.5, 0])
    estimate = quality.frechet(Vectors(signs * s + [0, 0, 1]), Vectors(signs * t))
    assert estimate.value == pytest.approx(1 + 1 + 1, rel=1e-12)


def test_identical_sets_are_at_no_distance_and_within_their_own_balls(parts):
    x = Vectors(parts[1][:100])
    found = compare(x, x, list(MEASURES))
    assert found["frechet"].value == pytest.approx(0, abs=1e-9)
    assert found["precision"].value == found["recall"].value == found["coverage"].value == 1


def test_copies_at_the_radius_count_in_features_too():
    """Reference vectors that stand four times have balls of radius 0: a copy lies in them, whatever the rounding."""
    y = np.repeat(np.random.default_rng(0).normal(100, 1, size=(6, 33)), 4, axis=0)
    found = compare(Vectors(y[::4]), Vectors(y), ["precision"])
    assert found["precision"].value == 1
    assert compare(Vectors(y[::4] + 1e-6), Vectors(y), ["precision"])["precision"].value == 0


@pytest.mark.filterwarnings("ignore:Matrix is singular")  # of the few images in a part; their Fréchet is not used
def test_larger_sets_are_dealt_into_parts_or_cut(parts, monkeypatch):
    """Beyond PAIRS the kernel distance is the mean over parts, and balls are of the first images."""
    monkeypatch.setattr(quality, "PAIRS", 100)
    x, y = (images[:250].reshape(250, -1) / 127.5 - 1 for images in parts[1:])
    found = compare(Vectors(x), Vectors(y), ["kernel", "recall", "coverage"])
    dealt = [by_definition(x[i::3], y[i::3])["kernel"] for i in range(3)]
    assert found["kernel"].value == pytest.approx(np.mean(dealt), rel=1e-9)
    first = by_definition(x[:100], y[:100])
    assert found["recall"].value == first["recall"] and found["coverage"].value == first["coverage"]


def test_the_exact_interval_is_that_of_scipy():
    for successes, n in ((0, 7), (3, 7), (7, 7), (190, 1000)):
        interval = scipy.stats.binomtest(successes, n).proportion_ci(0.9, method="exact")
        assert exact_interval(successes, n, 0.9) == pytest.approx(tuple(interval), abs=1e-12)
    with pytest.raises(ValueError, match="no proportion"):
        exact_interval(2, 1)


def test_intervals_hold_the_mean_of_the_value_and_bias_leads_to_the_distance():
    """Normal distributions of known Fréchet distance d (s - 1)^2 + |mu|^2; 30 draws of 160 images."""
    rng, d, s = np.random.default_rng(0), 6, 1.2
    found = {name: [] for name in MEASURES}
    for _ in range(30):
        x, y = rng.normal(1 / np.sqrt(d), s, size=(160, d)), rng.normal(size=(160, d))
        for name, estimate in compare(Vectors(x), Vectors(y), list(MEASURES)).items():
            found[name].append(estimate)
    for name, estimates in found.items():
        value, low, high = (np.array([e[i] for e in estimates]) for i in range(3))
        held = ((low <= value.mean()) & (value.mean() <= high)).mean()
        assert held >= 0.85, (name, held)
        assert 0.8 < (high - low).mean() / (2 * 1.96 * value.std()) < 1.6, name
    frechet, bias = (np.mean([e[i] for e in found["frechet"]]) for i in (0, 3))
    truth = d * (s - 1) ** 2 + 1
    assert frechet - truth > 0.05 and abs(frechet - bias - truth) < 0.05


def test_principal_axes_are_those_of_the_covariance(parts):
    """As by the singular vectors, for more images than dimensions and for fewer."""
    for images in (parts[1], parts[1][:40]):
        (mean, axes), explained = principal_axes(images, 5)
        pixels = images.reshape(len(images), -1) / 127.5 - 1
        _, singular, right = np.linalg.svd(pixels - pixels.mean(0), full_matrices=False)
        assert np.abs(np.abs((right[:5] * axes.T).sum(1)) - 1).max() < 1e-9 and np.allclose(mean, pixels.mean(0))
        assert explained == pytest.approx(np.square(singular[:5]).sum() / np.square(singular).sum())


def test_a_meter_takes_training_images_out_and_halves_the_rest(parts):
    training, heldout, new = parts
    both = ImageSet("both.npz", np.concatenate([training[:30], heldout]))
    meter = QualityMeter(training, both, ["frechet", "coverage"], space="pixels")
    entry = meter.measure(range(len(new)), new)
    assert entry["left_out"] == {OVERLAP: 30} and entry["dataset_size"] == 830 and entry["num_reference"] == 400
    half, other = np.array_split(np.random.RandomState(0).permutation(800), 2)
    for images, floor in ((training, entry["floors"]["training"]), (heldout[other], entry["floors"]["heldout"])):
        direct = compare(Vectors(images), Vectors(heldout[half]), ["frechet"])["frechet"]
        assert floor["measures"]["frechet"]["value"] == direct.value and floor["num_samples"] == len(images)
    assert json.loads(json.dumps(entry, allow_nan=False)) == entry


def quality_args(files, *more, images=("new", "copies")):
    given = [f"--images={files / name}.npz" for name in images]
    log = files / "out" / "mem_traj.log"
    return [*given, f"--knn-ref={files}/train.npz", f"--quality={files}/held.npz", f"--log={log}", *more]


def test_copies_score_as_the_training_set_does_and_new_images_as_held_out_ones(run_cli, files):
    result = run_cli(cli.main, quality_args(files, f"--quality-measures={','.join(MEASURES)}"))
    new, copies = read_records(files / "out" / "mem_traj.jsonl")
    for record in (new, copies):
        assert list(record["quality"]["measures"]) == list(MEASURES)
        assert record["quality"]["space"] == {
            "name": "pca",
            "explained": pytest.approx(0.9986, abs=5e-3),
            "dimensions": 50,
        }
    floors = copies["quality"]["floors"]
    for name in ("frechet", "coverage"):
        values = {key: floor["measures"][name]["value"] for key, floor in floors.items()}
        for record, floor in ((new, "heldout"), (copies, "training")):
            own = record["quality"]["measures"][name]["value"]
            other = values["heldout" if floor == "training" else "training"]
            assert abs(own - values[floor]) < abs(own - other), name
    entry = new["quality"]["measures"]["precision"]
    line = next(line for line in result.stdout.splitlines() if line.lstrip().startswith("precision"))
    assert f"{entry['value']:.4g} [{entry['ci_low']:.4g}, {entry['ci_high']:.4g}]" in line
    assert "training set (200)" in line and "held-out (400)" in line


def test_a_record_holds_for_equal_settings_only(run_cli, files, parts):
    jsonl = files / "out" / "mem_traj.jsonl"
    run_cli(cli.main, quality_args(files, images=["new"]))
    first = read_records(jsonl)[0]["quality"]
    run_cli(cli.main, quality_args(files, "--quality-measures=recall", images=["new"]))
    second = read_records(jsonl)[0]["quality"]
    assert second["measures"]["frechet"] == first["measures"]["frechet"] and "recall" in second["measures"]
    run_cli(cli.main, quality_args(files, "--quality-space=pixels", "--quality-measures=recall", images=["new"]))
    third = read_records(jsonl)[0]["quality"]
    assert list(third["measures"]) == ["recall"] and third["space"] == {"name": "pixels", "dimensions": 64}
    np.savez(files / "held.npz", images=parts[1][:400])
    run_cli(cli.main, quality_args(files, "--quality-space=pixels", "--quality-measures=recall", images=["new"]))
    assert read_records(jsonl)[0]["quality"]["num_reference"] == 200
    assert len(read_records(jsonl)) == 1


def test_snapshots_are_sampled_once(run_cli, files, monkeypatch, tmp_path):
    """Ratio and quality are of the same images, in one pass; only what is on no disk is made again."""
    torch.manual_seed(0)
    net = build_network(
        class_name="EDMPrecond", img_resolution=8, img_channels=1, label_dim=0, model_type="SongUNet",
        model_channels=16, num_blocks=1, channel_mult=[1, 1], attn_resolutions=[], dropout=0,
    )  # fmt: skip
    for kimg in (1, 2):
        save_snapshot(tmp_path / "run" / f"network-snapshot-{kimg:06d}.safetensors", net, kimg, {"path": "digits.zip"})
    made = []

    def generate(net, seeds, real=memorization.measure.ratio.generate_images, **kwargs):
        for some, images in real(net, seeds, **kwargs):
            made.extend(some)
            yield some, images

    monkeypatch.setattr(memorization.measure.ratio, "generate_images", generate)
    args = [f"--expdir={tmp_path}/run", f"--knn-ref={files}/train.npz", "--seeds=0-99", "--steps=2", "--device=cpu"]
    args.append("--batch=32")
    judged = [*args, f"--quality={files}/held.npz", "--quality-measures=frechet,kernel"]
    run_cli(cli.main, judged)
    assert made == [*range(100)] * 2
    records = read_records(tmp_path / "run" / "mem_traj.jsonl")
    run_cli(cli.main, judged)
    assert made == [*range(100)] * 2
    (tmp_path / "run" / "mem_traj.jsonl").unlink()
    run_cli(cli.main, args)
    assert made == [*range(100)] * 2  # from knn-dist
    run_cli(cli.main, judged)
    assert made == [*range(100)] * 4
    again = read_records(tmp_path / "run" / "mem_traj.jsonl")
    assert [r["quality"] for r in again] == [r["quality"] for r in records]


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_features_are_a_space_too(run_cli, files, parts):
    class Means(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.unflatten(2, [4, 2]).unflatten(4, [4, 2]).mean(dim=(3, 5)).flatten(1)

    torch.jit.save(torch.jit.script(Means()), files / "net.pt")
    run_cli(cli.main, quality_args(files, f"--features={files}/net.pt", "--quality-measures=frechet", images=["new"]))
    entry = read_records(files / "out" / "mem_traj.jsonl")[0]["quality"]
    assert entry["space"]["network"] == "net.pt" and entry["space"]["dimensions"] == 16
    x, y = (images.astype(np.float32) / 255 for images in (parts[2][:300], parts[1]))
    x, y = (a.reshape(-1, 4, 2, 4, 2).mean(axis=(2, 4)).reshape(len(a), 16) for a in (x, y))
    y = y[np.array_split(np.random.RandomState(0).permutation(800), 2)[0]]
    assert entry["measures"]["frechet"]["value"] == pytest.approx(by_definition(x, y)["frechet"], rel=1e-4)


def test_what_cannot_be_compared_is_refused_in_one_line(run_cli, files, parts):
    cases = [
        (1, [f"--quality={files}/train.npz"], "is the training set itself"),
        (1, ["--quality-space=pixels", "--seeds=0-50"], "needs 65 generated images at least in 64 dimensions"),
        (1, ["--quality-measures=recall", "--seeds=0-2"], "recall needs 4 generated images at least; there are 3."),
        (2, ["--quality-space=features"], "needs --features"),
        (2, ["--adaptive=0.5"], "needs all images"),
        (2, ["--quality-measures=fid"], "'fid' is not one of"),
    ]
    for code, more, message in cases:
        assert message in run_cli(cli.main, quality_args(files, *more, images=["new"]), code=code).stderr
    assert not (files / "out" / "mem_traj.jsonl").exists()
    run_cli(cli.main, quality_args(files, "--quality-measures=density,kernel", "--seeds=0-1", images=["new"]))
    np.savez(files / "held.npz", images=parts[1][:, :, :4, :4])
    assert "[1, 4, 4]" in run_cli(cli.main, quality_args(files), code=1).stderr
    np.savez(files / "held.npz", images=parts[1][:8])
    args = quality_args(files, "--quality-measures=coverage")
    assert "needs 6 held-out (half of those there are) images" in run_cli(cli.main, args, code=1).stderr
    args = [f"--images={files}/new.npz", f"--knn-ref={files}/train.npz", f"--log={files}/out/mem_traj.log"]
    assert "belong to --quality" in run_cli(cli.main, [*args, "--quality-space=pca"], code=2).stderr


def test_images_beyond_those_compared_by_pairs_are_said(parts, monkeypatch):
    monkeypatch.setattr("memorization.measure.quality.PAIRS", 300)
    monkeypatch.setattr("memorization.measure.quality_meter.PAIRS", 300)
    meter = QualityMeter(parts[0], ImageSet("held.npz", parts[1]), ["recall"])
    assert meter.measure(range(310), meter.embed(parts[2][:310]))["left_out"] == {BEYOND: 10 + 100 + 100}
