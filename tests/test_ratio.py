"""R_mem: criterion and interval, measurement of real networks, files of the trajectory, the command."""

import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
import torch
from builders import torchrun
from PIL import Image

import mem_ratio as cli
from memorization.measure.knn import nearest_neighbors
from memorization.measure.meter import SnapshotMeter
from memorization.measure.ratio import measure_network, memorization_ratio, memorized
from memorization.records import format_int_list, make_record, read_records, write_measurement
from memorization.stats.intervals import wilson_interval
from training.dataset import ImageFolderDataset
from training.generation import generate_images
from training.networks import build_network
from training.optim import OptimEDM
from training.snapshots.snapshot import save_snapshot

ROOT = Path(__file__).resolve().parent.parent
REFERENCE = ROOT / "tests" / "reference" / "knn.npz"
FAST = ["--steps=3", "--device=cpu"]


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Networks this small gain nothing from threads, and lose much where tests run side by side."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# ----------------------------------------------------------------------------
# Criterion and interval.


def test_reference_ratio():
    data = np.load(REFERENCE)
    distance, _ = nearest_neighbors(data["generated"], data["reference"])
    assert memorization_ratio(distance) == pytest.approx(float(data["ratio"]), abs=1e-12)


def test_criterion():
    distance = np.array([[0, 5], [1, 3.01], [1, 2.99], [5, 5], [0, 0], [1, 0]])
    np.testing.assert_array_equal(memorized(distance), [True, True, False, False, False, False])
    np.testing.assert_array_equal(memorized(distance, 0.5), [True, True, True, False, False, False])
    assert memorization_ratio(distance) == 2 / 6


@pytest.mark.parametrize("distance", [np.zeros(4), np.zeros((4, 1)), np.zeros((0, 2))])
def test_criterion_refuses(distance):
    with pytest.raises(ValueError, match="two neighbours|no images"):
        memorization_ratio(distance)


@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    [  # Newcombe, "Two-sided confidence intervals for the single proportion", Stat. Med. 17, 1998, Table I
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_published(successes, n, low, high):
    assert wilson_interval(successes, n) == pytest.approx((low, high), abs=5e-5)


@pytest.mark.parametrize("confidence", [0.5, 0.95, 0.999])
@pytest.mark.parametrize(("successes", "n"), [(0, 1), (1, 1), (0, 64), (60, 64), (64, 64), (9320, 10_000), (1, 10**6)])
def test_wilson_scipy(successes, n, confidence):
    expected = scipy.stats.binomtest(successes, n).proportion_ci(confidence, method="wilson")
    low, high = wilson_interval(successes, n, confidence)
    assert (low, high) == pytest.approx((expected.low, expected.high), abs=1e-12)
    assert 0 <= low <= successes / n <= high <= 1
    mirrored = wilson_interval(n - successes, n, confidence)
    assert mirrored == pytest.approx((1 - high, 1 - low), abs=1e-12)


@pytest.mark.parametrize("arguments", [(1, 0), (-1, 5), (6, 5), (1, 5, 0), (1, 5, 1), (1, 5, 95)])
def test_wilson_refuses(arguments):
    with pytest.raises(ValueError):
        wilson_interval(*arguments)


# ----------------------------------------------------------------------------
# Measurement.


@pytest.fixture(scope="module")
def digits_100(digits):
    return digits[:100]


@pytest.fixture(scope="module")
def small_zip(make_zip, digits_100, tmp_path_factory):
    return make_zip(digits_100[:, 0], None, tmp_path_factory.mktemp("data") / "digits100.zip")


def random_network(seed, label_dim=0, img_channels=1):
    torch.manual_seed(seed)
    net = build_network(
        class_name="EDMPrecond", img_resolution=8, img_channels=img_channels, label_dim=label_dim,
        model_type="SongUNet", model_channels=16, num_blocks=1, channel_mult=[1, 1], attn_resolutions=[], dropout=0,
    )  # fmt: skip
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return net.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def make_run(tmp_path_factory):
    def make(kimgs=(0, 100, 200), **kwargs):
        run = tmp_path_factory.mktemp("run")
        for kimg in kimgs:
            path = run / f"network-snapshot-{kimg:06d}.safetensors"
            save_snapshot(path, random_network(kimg, **kwargs), kimg, {"path": "digits.zip"})
        return run

    return make


def test_optimum_memorizes_everything(digits_100):
    """The closed-form optimum replays the training set: R_mem = 1, each image next to its original."""
    result = measure_network(OptimEDM(digits_100), digits_100, range(20), sampler_kwargs={"num_steps": 18})
    assert result.ratio == 1 and result.num_memorized == result.num_samples == 20
    assert result.mean_distance < 1  # of 255 grey levels
    assert len(set(result.knn_index[:, 0])) > 5


def test_measurement_agrees_with_its_definition(digits_100):
    net, seeds = random_network(1), [9, 2, 5, 40]
    result = measure_network(net, digits_100, seeds, batch=3, sampler_kwargs={"num_steps": 3}, keep_images=True)
    (_, images), *rest = generate_images(net, sorted(seeds), batch=8, sampler_kwargs={"num_steps": 3})
    assert not rest
    np.testing.assert_array_equal(result.seeds, [2, 5, 9, 40])
    np.testing.assert_array_equal(result.images, images.numpy())
    distance, index = nearest_neighbors(images, digits_100)
    np.testing.assert_array_equal(result.knn_distance, distance)
    np.testing.assert_array_equal(result.knn_index, index)


def test_chunks_do_not_matter(digits_100, monkeypatch):
    arguments = (random_network(1), digits_100, range(30))
    whole = measure_network(*arguments, batch=7, sampler_kwargs={"num_steps": 1})
    monkeypatch.setattr("memorization.measure.ratio._CHUNK", 10)
    parts = measure_network(*arguments, batch=7, sampler_kwargs={"num_steps": 1})
    np.testing.assert_array_equal(whole.knn_distance, parts.knn_distance)


def test_diverged_network_is_measured(digits_100):
    net = random_network(1)
    next(net.parameters()).fill_(float("nan"))
    result = measure_network(net, digits_100, range(4), sampler_kwargs={"num_steps": 2})
    assert np.isfinite(result.knn_distance).all() and (result.knn_index[1:] == result.knn_index[0]).all()


@pytest.mark.parametrize(
    ("network", "reference", "seeds", "class_idx", "message"),
    [
        ({}, (10, 1, 8, 8), [], None, "no seeds"),
        ({}, (10, 1, 8, 8), [1, 4, 2, 4], None, "Seed 4 appears more than once"),
        ({}, (1, 1, 8, 8), [1], None, "needs at least 2"),
        ({}, (10, 3, 8, 8), [1], None, r"\[1, 8, 8\].*\[3, 8, 8\]"),
        ({}, (10, 1, 16, 16), [1], None, r"\[1, 8, 8\].*\[1, 16, 16\]"),
        ({}, (10, 1, 8, 8), [1], 0, "unconditional"),
        ({"label_dim": 4}, (10, 1, 8, 8), [1], 4, "0-3"),
    ],
)
def test_measurement_refuses(monkeypatch, network, reference, seeds, class_idx, message):
    monkeypatch.setattr("memorization.measure.ratio.generate_images", None)  # nothing may be generated
    with pytest.raises(ValueError, match=message):
        measure_network(random_network(0, **network), np.zeros(reference, np.uint8), seeds, class_idx=class_idx)


# ----------------------------------------------------------------------------
# Files.


@pytest.mark.parametrize(
    ("values", "text"), [([], ""), ([3], "3"), (range(64), "0-63"), ([7, 0, 1, 2, 9, 8, 11], "0-2,7-9,11")]
)
def test_format_int_list(values, text):
    assert format_int_list(values) == text


def test_half_written_last_line(tmp_path):
    path, told = tmp_path / "mem_traj.jsonl", []
    path.write_text('{"kimg": 200}\n\n{"kimg": 100}\n{"kimg": 5')
    assert read_records(path, report=told.append) == [{"kimg": 200}, {"kimg": 100}]
    assert len(told) == 1 and "incomplete" in told[0] and str(path) in told[0]
    with pytest.warns(UserWarning, match="incomplete"):
        read_records(path)
    path.write_text('{"kimg": 200}\n{"kimg"\n{"kimg": 100}\n')
    with pytest.raises(ValueError, match="Line 2 of"):
        read_records(path)
    path.write_text('{"kimg": 200}\n[1]\n')
    assert read_records(path, report=told.append) == [{"kimg": 200}]
    with pytest.raises(OSError):
        read_records(tmp_path / "missing")


def test_records_are_replaced_not_repeated(tmp_path, digits_100):
    result = measure_network(OptimEDM(digits_100), digits_100, [0, 1], sampler_kwargs={"num_steps": 2})
    settings = dict(snapshot="s", seeds="0-1", sampler={}, reference="r", reference_size=100)
    settings |= {"class": None, "snapshot_sha256": "1", "reference_sha256": "2"}
    log = tmp_path / "new" / "mem_traj.log"
    for change in ({}, {"seeds": "2-3"}, {"snapshot_sha256": "3"}):
        write_measurement(log, result, "s", "network-snapshot-000100", make_record(result, 100, {**settings, **change}))
    records = read_records(log.with_suffix(".jsonl"))
    assert [(r["seeds"], r["snapshot_sha256"]) for r in records] == [("0-1", "3"), ("2-3", "1")]
    assert len(log.read_text().splitlines()) == 6


# ----------------------------------------------------------------------------
# Command.

LINES = re.compile(
    r'Generating images from "(?P<snapshot>[^"]+)"\.\n'
    r'Loading images from "(?P<images>[^"]+)"\. The calculated KNN distance is (?P<distance>[\d.e+-]+)\. '
    r"The calibrated KNN ratio is (?P<ratio>[\d.e+-]+)\n"
)


def test_command(make_run, small_zip, digits_100, tmp_path, run_cli):
    run = make_run()
    images, grid = tmp_path / "images", tmp_path / "grid.png"
    arguments = [f"--expdir={run}", f"--knn-ref={small_zip}", "--seeds=0-4,1002", "--batch=4", *FAST]
    result = run_cli(cli.main, [*arguments, f"--save-images={images}", "--subdirs", f"--grid={grid}"])

    # The log: newest first, without kimg 0.
    log = (run / "mem_traj.log").read_text()
    entries = list(LINES.finditer(log))
    assert "".join(entry[0] for entry in entries) == log
    assert [Path(e["snapshot"]).name for e in entries] == [f"network-snapshot-000{k}.safetensors" for k in (200, 100)]
    assert [Path(e["images"]) for e in entries] == [images / f"network-snapshot-000{k}" for k in (200, 100)]

    # The records, the distances, the PNGs: one measurement.
    records = read_records(run / "mem_traj.jsonl")
    assert [r["kimg"] for r in records] == [200, 100]
    for record, entry in zip(records, entries):
        data = np.load(run / "knn-dist" / f"network-snapshot-{record['kimg']:06d}.npz")
        seeds = data["seeds"].tolist()
        assert seeds == [0, 1, 2, 3, 4, 1002] and record["seeds"] == "0-4,1002"
        files = [Path(entry["images"]) / f"{s // 1000 * 1000:06d}" / f"{s:06d}.png" for s in seeds]
        pixels = np.stack([np.asarray(Image.open(file)) for file in files])[:, np.newaxis]
        distance, index = nearest_neighbors(pixels, digits_100)
        np.testing.assert_array_equal(data["knn_distance"], distance)
        np.testing.assert_array_equal(data["knn_index"], index)
        assert float(entry["distance"]) == record["mean_distance"] == pytest.approx(distance[:, 0].mean())
        assert float(entry["ratio"]) == record["ratio"] == memorization_ratio(distance)
        assert (record["num_memorized"], record["num_samples"]) == (memorized(distance).sum(), 6)
        assert (record["ci_low"], record["ci_high"]) == wilson_interval(record["num_memorized"], 6)
        assert record["sampler"]["num_steps"] == 3 and record["sampler"]["S_max"] == "inf"
        assert record["reference_size"] == 100 and record["class"] is None
        assert re.search(rf"kimg 000{record['kimg']}  R_mem +{100 * record['ratio']:.2f} % \[", result.output)
    assert Image.open(grid).size[0] > 400
    assert "Highest:" in result.output and str(run / "mem_traj.log") in result.output

    # A second time nothing is measured again, unless asked for; other seeds are another measurement.
    again = run_cli(cli.main, arguments)
    assert again.output.count("measured before") == 2
    assert (run / "mem_traj.log").read_text() == log
    run_cli(cli.main, [*arguments, "--remeasure"])
    when = {"time": None, "seconds": None}
    assert [r | when for r in read_records(run / "mem_traj.jsonl")] == [r | when for r in records]
    assert (run / "mem_traj.log").read_text().count("\n") == 8
    assert "measured before" not in run_cli(cli.main, [*arguments, "--seeds=0-1"]).output
    assert len(read_records(run / "mem_traj.jsonl")) == 4


def test_interrupted_command_goes_on(make_run, small_zip, run_cli, monkeypatch):
    run = make_run()
    arguments = [f"--expdir={run}", f"--knn-ref={small_zip}", "--seeds=0-2", *FAST]
    measured = []

    def stop_at_second(meter, subject, measure=SnapshotMeter.measure, **kwargs):
        measured.append(subject.name)
        if len(measured) == 2:
            raise OSError("The disk is full.")
        return measure(meter, subject, **kwargs)

    monkeypatch.setattr(SnapshotMeter, "measure", stop_at_second)
    assert "The disk is full." in run_cli(cli.main, arguments, code=1).output
    with open(run / "mem_traj.jsonl", "a") as file:
        file.write('{"kimg": 1')
    result = run_cli(cli.main, arguments)
    assert measured == ["network-snapshot-000200", "network-snapshot-000100", "network-snapshot-000100"]
    assert "incomplete" in result.output
    assert [r["kimg"] for r in read_records(run / "mem_traj.jsonl")] == [200, 100]
    # A snapshot whose content has changed is measured again.
    save_snapshot(run / "network-snapshot-000200.safetensors", random_network(7), 200, {})
    assert run_cli(cli.main, arguments).output.count("measured before") == 1
    assert measured[3:] == ["network-snapshot-000200"]


def test_snapshots_go_by_number(make_run, small_zip, run_cli):
    """kimg 0 is left out by its number, not by its place; the log may lie elsewhere; classes are recorded."""
    run = make_run([300], label_dim=4)
    log = run / "elsewhere" / "class2.log"
    run_cli(cli.main, [f"--expdir={run}", f"--knn-ref={small_zip}", "--seeds=3", "--class=2", f"--log={log}", *FAST])
    (record,) = read_records(log.with_suffix(".jsonl"))
    assert (record["kimg"], record["class"]) == (300, 2)
    assert (log.parent / "knn-dist" / "network-snapshot-000300.npz").exists()
    assert not (run / "mem_traj.log").exists()


@pytest.mark.slow
@pytest.mark.parametrize("seeds", ["0-4", "7"])  # shares of 3 and 2; of 1 and 0
def test_two_processes(make_run, small_zip, seeds, run_cli):
    run = make_run([100])
    arguments = [f"--expdir={run}", f"--knn-ref={small_zip}", f"--seeds={seeds}", "--batch=2", *FAST]
    run_cli(cli.main, [*arguments, f"--log={run / 'one' / 'mem_traj.log'}"])
    out = torchrun(2, "mem_ratio.py", *arguments, f"--grid={run / 'grid.png'}")
    assert out.count("Highest:") == 1 and (run / "grid.png").exists()
    one, two = (np.load(folder / "knn-dist" / "network-snapshot-000100.npz") for folder in (run / "one", run))
    for key in one:
        np.testing.assert_array_equal(one[key], two[key])
    (record,) = read_records(run / "mem_traj.jsonl")
    assert record["num_samples"] == len(one["seeds"])


@pytest.mark.parametrize(
    ("change", "code", "message"),
    [
        (["--expdir=missing"], 1, "is not a folder"),
        (["--expdir=empty"], 1, "no network snapshot after kimg 0"),
        (["--expdir=only-zero"], 1, "no network snapshot after kimg 0"),
        (["--expdir=damaged"], 1, "network-snapshot-000100.safetensors"),
        (["--knn-ref=missing.zip"], 1, "missing.zip"),
        (["--knn-ref=one.zip"], 1, "needs at least 2"),
        (["--knn-ref=colour.zip"], 1, "[1, 8, 8]"),
        (["--knn-ref=large.zip"], 1, "[1, 16, 16]"),
        (["--seeds=0-3,2"], 1, "Seed 2 appears more than once"),
        (["--seeds=a"], 2, "neither a whole number nor a range"),
        (["--seeds=5-1"], 2, "runs backwards"),
        (["--batch=0"], 2, "--batch"),
        (["--class=0"], 1, "unconditional"),
        (["--class=-1"], 2, "--class"),
        (["--expdir=classes", "--class=4"], 1, "0-3"),
        (["--log=empty"], 1, "is a folder"),
        (["--log=mem_traj.jsonl"], 1, "overwrite its own records"),
        (["--log="], 1, "is a folder"),
        (["--log=one.zip/m.log"], 1, "is a file"),
        (["--grid=grid.doc"], 1, "does not say a format"),
        (["--grid=folder.png"], 1, "is a folder"),
        (["--save-images=one.zip"], 1, "is a file"),
        (["--device=tpu"], 1, "tpu"),
        (["--steps=0"], 2, "--steps"),
    ],
)
def test_bad_commands(make_run, make_zip, small_zip, digits_100, run_cli, tmp_path, monkeypatch, change, code, message):
    monkeypatch.chdir(tmp_path)
    for name, kwargs in [("run", {"kimgs": [100]}), ("only-zero", {"kimgs": [0]}), ("damaged", {"kimgs": [100]})]:
        os.symlink(make_run(**kwargs), name)
    os.symlink(make_run([100], label_dim=4), "classes")
    Path("damaged/network-snapshot-000100.safetensors").write_bytes(b"not a snapshot")
    Path("empty").mkdir()
    Path("folder.png").mkdir()
    make_zip(digits_100[:1, 0], None, "one.zip")
    make_zip(digits_100[:3, 0, :, :, np.newaxis].repeat(3, axis=3), None, "colour.zip")
    make_zip(digits_100[:3, 0].repeat(2, axis=1).repeat(2, axis=2), None, "large.zip")
    monkeypatch.setattr("memorization.measure.ratio.generate_images", None)  # nothing may be generated
    before = sorted(tmp_path.glob("**/*"))
    defaults = {"--expdir": "run", "--knn-ref": small_zip, "--seeds": "0-3", "--device": "cpu"}
    defaults |= dict(option.split("=", 1) for option in change)
    result = run_cli(cli.main, [f"{key}={value}" for key, value in defaults.items()], code=code)
    assert message in result.output
    assert sorted(tmp_path.glob("**/*")) == before and not list(Path("run").glob("mem_traj*"))


def test_records_are_strict_json(make_run, small_zip, run_cli):
    run = make_run([100])
    run_cli(cli.main, [f"--expdir={run}", f"--knn-ref={small_zip}", "--seeds=0", *FAST])

    def refuse(constant):
        raise AssertionError(constant)

    json.loads((run / "mem_traj.jsonl").read_text(), parse_constant=refuse)


# ----------------------------------------------------------------------------
# The optimum as a network.


def measure_optimum(run_cli, folder, network, *options):
    """Run the command; return the last record and the distances."""
    command = [f"--network={network}", f"--log={folder / 'mem_traj.log'}", "--device=cpu", *options]
    result = run_cli(cli.main, command)
    record = read_records(folder / "mem_traj.jsonl")[-1]
    return record, np.load(folder / "knn-dist" / f"optimum-{Path(network).stem}.npz"), result.output


def test_optimum_of_its_own_data(digits_zip, run_cli, tmp_path):
    """No two of the 1797 digits_100 are equal: every image is a copy of exactly one, and counts."""
    record, data, output = measure_optimum(run_cli, tmp_path, digits_zip, "--seeds=0-31", "--gap=8")
    assert record["ratio"] == 1 and (data["knn_distance"][:, 0] == 0).all() and (data["knn_distance"][:, 1] > 0).all()
    assert (record["kimg"], record["optimum"], record["snapshot"]) == (None, "unconditional", "digits.zip")
    assert "optimum  R_mem 100.00 %" in output and len(LINES.findall((tmp_path / "mem_traj.log").read_text())) == 1
    assert max(record["gap"]["mean"]) < 1e-8 and (tmp_path / "gap.png").exists()
    *_, output = measure_optimum(run_cli, tmp_path, digits_zip, "--seeds=0-31", "--gap=8")
    assert "measured before" in output and len(read_records(tmp_path / "mem_traj.jsonl")) == 1


def test_optimum_of_data_with_exact_duplicates(digits_100, make_zip, run_cli, tmp_path):
    """A copy of an image that is there twice is as near to the second (0/0), and does not count."""
    images = np.concatenate([digits_100, digits_100[:40]])
    network = make_zip(images[:, 0], None, tmp_path / "twice.zip")
    record, data, _ = measure_optimum(run_cli, tmp_path, network, "--seeds=0-63", f"--save-images={tmp_path / 'out'}")
    made = [np.asarray(Image.open(tmp_path / "out" / "optimum-twice" / f"{seed:06d}.png")) for seed in range(64)]
    is_double = np.array([(image == digits_100[:40, 0]).all((1, 2)).any() for image in made])
    np.testing.assert_array_equal(memorized(data["knn_distance"]), ~is_double)
    assert 10 < is_double.sum() < 60 and record["num_memorized"] == 64 - is_double.sum()


@pytest.mark.parametrize("kind", ["zip", "npz"])
def test_class_conditional_optimum(digits_zip, run_cli, tmp_path, kind):
    data = ImageFolderDataset(digits_zip, use_labels=True)
    network = digits_zip
    if kind == "npz":
        network = tmp_path / "digits.npz"
        np.savez(network, images=data.images()[:300], labels=data.labels()[:300])
    measure_optimum(run_cli, tmp_path, network, "--seeds=0-7")
    record, found, _ = measure_optimum(run_cli, tmp_path, network, "--seeds=0-7", "--cond=1", "--gap=5")
    assert record["optimum"] == "class-conditional" and record["class"] is None and record["ratio"] == 1
    assert max(record["gap"]["mean"]) < 1e-8
    record, found, _ = measure_optimum(run_cli, tmp_path, network, "--seeds=0-7", "--class=3")
    assert record["optimum"] == "class-conditional" and record["class"] == 3
    assert (data.labels()[found["knn_index"][:, 0]] == 3).all()
    assert len(read_records(tmp_path / "mem_traj.jsonl")) == 3  # three measurements, not one thrice


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        ([], 2, "--expdir, the folder of a run"),
        (["--expdir=x", "--network=y.zip", "--log=out/l.log"], 2, "--expdir, the folder of a run"),
        (["--expdir=x"], 2, "--expdir needs --knn-ref"),
        (["--expdir=x", "--knn-ref=y.zip", "--cond=1"], 2, "--cond belongs to --network"),
        (["--network=ours.zip"], 2, "--network needs --log"),
        (["--network=missing.zip", "--log=out/l.log"], 1, "does not exist"),
        (["--network=ours.zip", "--log=out/l.log", "--cond=1"], 1, "holds no labels"),
        (["--network=ours.zip", "--log=out/l.log", "--class=1"], 1, "holds no labels"),
        (["--network=ours.zip", "--log=out/l.log", "--knn-ref=large.zip"], 1, "[1, 16, 16]"),
        (["--network=empty.npz", "--log=out/l.log"], 1, 'no array named "images"'),
        (["--network=text.npz", "--log=out/l.log"], 1, "cannot be read as .npz"),
    ],
)
def test_bad_optima(digits_100, make_zip, run_cli, tmp_path, monkeypatch, options, code, message):
    monkeypatch.chdir(tmp_path)
    make_zip(digits_100[:9, 0], None, "ours.zip")
    make_zip(digits_100[:9, 0].repeat(2, axis=1).repeat(2, axis=2), None, "large.zip")
    np.savez("empty.npz", pixels=digits_100)
    Path("text.npz").write_text("text")
    before = sorted(tmp_path.rglob("*"))
    assert message in run_cli(cli.main, [*options, "--device=cpu"], code=code).output
    assert sorted(tmp_path.rglob("*")) == before
