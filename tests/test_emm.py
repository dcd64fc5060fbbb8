"""EMM and the collapse of the optimum: the crossings, runs and traces on disk, the tables, the figures."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from builders import write_run
from click.testing import CliRunner
from PIL import Image

import emm as cli
import generate_optim
from memorization.curve.emm import Emm, emm_estimate
from memorization.curve.factors import differing_options
from memorization.curve.lines import curve_lines, curve_points, trajectories
from memorization.measure.posterior import crossing, posterior_curves
from memorization.plots import collapse_curve, neighbour_grid, quotient_text
from memorization.runs import find_runs, read_run

# ----------------------------------------------------------------------------
# The estimate.


def test_published_curves():
    """CIFAR-10, basic setting: EMM lies just over 1k at 32x32, between 2k and 16k at lower resolutions."""
    emm = emm_estimate([500, 1000, 2000, 3000, 4000, 5000], [0.99, 0.92, 0.61, 0.35, 0.17, 0.09])
    assert emm.verdict == "at"
    assert emm.size == pytest.approx(1000 * 2 ** (2 / 31))  # 92 -> 61 crosses 90 after 2/31 of the way
    assert str(emm) == "EMM (90 %) ≈ 1046"
    low = emm_estimate([1000, 2000, 4000, 8000, 16000], [1.0, 0.995, 0.95, 0.60, 0.11])
    assert 4000 < low.size < 8000
    lowest = emm_estimate([1000, 2000, 4000, 8000, 16000], [1.0, 0.995, 0.97, 0.895, 0.64])
    assert low.size < lowest.size < 8000


@pytest.mark.parametrize(
    ("sizes", "ratios", "level", "expected"),
    [
        ([16, 32, 64], [1.0, 0.99, 0.95], 0.9, Emm(64, "at least", 0.9)),
        ([16, 32, 64], [0.89, 0.5, 0.1], 0.9, Emm(16, "below", 0.9)),
        ([16], [0.9], 0.9, Emm(16, "at least", 0.9)),  # the level itself counts
        ([16], [0.1], 0.9, Emm(16, "below", 0.9)),
        ([16, 32], [0.9, 0.5], 0.9, Emm(16, "at", 0.9)),
        ([16, 64], [1.0, 0.8], 0.9, Emm(32, "at", 0.9)),  # half way in log |D|
        ([64, 16], [0.8, 1.0], 0.9, Emm(32, "at", 0.9)),  # order does not matter
        ([16, 64], [0.6, 0.4], 0.5, Emm(32, "at", 0.5)),
        ([1, 2, 4, 16, 64], [1.0, 0.5, 0.7, 1.0, 0.8], 0.9, Emm(32, "at", 0.9)),  # last crossing downwards
        ([1, 2, 4], [0.5, 0.2, 0.95], 0.9, Emm(4, "at least", 0.9)),
        ([1, 4, 8], [0.8, 1.0, 0.8], 0.9, Emm(32**0.5, "at", 0.9)),
    ],
)
def test_verdicts(sizes, ratios, level, expected):
    emm = emm_estimate(sizes, ratios, level)
    assert (emm.verdict, emm.level) == (expected.verdict, level)
    assert emm.size == pytest.approx(expected.size, rel=1e-12)


def test_wording():
    assert str(Emm(17.3249, "at", 0.9)) == "EMM (90 %) ≈ 17.3"
    assert str(Emm(64.0, "at least", 0.9)) == "EMM (90 %) at least 64"
    assert str(Emm(16.0, "below", 0.955)) == "EMM (95.5 %) below 16"


@pytest.mark.parametrize(
    ("sizes", "ratios", "level", "message"),
    [
        ([], [], 0.9, "at least one"),
        ([1, 2], [0.5], 0.9, "as many ratios as sizes"),
        ([1, 1], [0.5, 0.6], 0.9, "each once"),
        ([0, 1], [0.5, 0.6], 0.9, "positive sizes"),
        ([1, float("nan")], [0.5, 0.6], 0.9, "positive sizes"),
        ([1, 2], [0.5, 60], 0.9, "between 0 and 1"),
        ([1, 2], [0.5, float("nan")], 0.9, "between 0 and 1"),
        ([1, 2], [1, 0.5], 90, "between 0 and 1, not 90"),
        ([1, 2], [1, 0.5], 0, "between 0 and 1, not 0"),
    ],
)
def test_bad_curves(sizes, ratios, level, message):
    with pytest.raises(ValueError, match=message):
        emm_estimate(sizes, ratios, level)


# ----------------------------------------------------------------------------
# Runs.


def test_read_run_takes_the_highest_snapshot(tmp_path):
    point = read_run(write_run(tmp_path / "run", 16, [10, 60, 60, 40], total_nimg=640_000))
    assert (point.size, point.epochs, point.kimg, point.num_memorized) == (16, 40_000, 200, 60)
    assert point.ratio == 60 / 64 and point.interval[0] < 60 / 64 < point.interval[1]


def test_read_run_takes_the_settings_with_most_images(tmp_path):
    trial = {"kimg": 900, "snapshot": "9", "num_memorized": 4, "num_samples": 4, "seeds": "0-3"}
    point = read_run(write_run(tmp_path / "run", 16, [10, 20], extra=[trial]))
    assert (point.kimg, point.num_samples) == (200, 64)
    later = {"kimg": 300, "snapshot": "3", "num_memorized": 5, "num_samples": 128, "seeds": "64-191"}
    point = read_run(write_run(tmp_path / "later", 16, [10, 20], extra=[later | {"num_samples": 129}]))
    assert (point.kimg, point.num_memorized) == (300, 5)
    point = read_run(write_run(tmp_path / "more", 16, [10, 20], extra=[later]))  # of equally many, more snapshots
    assert (point.kimg, point.num_memorized) == (200, 20)


def test_read_run_prefers_all_classes_and_the_training_set(tmp_path):
    other = {"kimg": 200, "snapshot": "2", "num_memorized": 500, "num_samples": 1000, "seeds": "0-999"}
    point = read_run(write_run(tmp_path / "class", 16, [10, 20], extra=[other | {"class": 3}]))
    assert point.num_memorized == 20
    point = read_run(write_run(tmp_path / "reference", 16, [10, 20], extra=[other | {"reference_size": 17}]))
    assert point.num_memorized == 20
    adaptive = other | {"class": 3, "adaptive": {"bar": 0.9, "confidence": 0.95}}
    assert read_run(write_run(tmp_path / "adaptive", 16, [10, 20], extra=[adaptive])).num_memorized == 20


def test_epochs_of_a_run_that_ended_at_a_ratio(tmp_path):
    run = write_run(tmp_path / "run", 16, [10], total_nimg=16_000)
    (run / "run-state.json").write_text(json.dumps({"state": "complete", "kimg": 8.0, "reason": "ratio"}))
    assert read_run(run).epochs == 500
    (run / "run-state.json").write_text(json.dumps({"state": "stopped", "kimg": 8.0}))
    assert read_run(run).epochs == 500  # what it was trained for, not what was planned


def test_half_written_last_line_is_left_out(tmp_path):
    run = write_run(tmp_path / "run", 16, [10, 60])
    text = (run / "mem_traj.jsonl").read_text()
    (run / "mem_traj.jsonl").write_text(text[:-30])
    assert read_run(run).num_memorized == 10


def test_runs_of_one_size_are_pooled(tmp_path):
    runs = [write_run(tmp_path / f"{i}", size, [k]) for i, (size, k) in enumerate([(32, 20), (16, 60), (16, 64)])]
    points = curve_points(map(read_run, runs))
    assert [(p.size, p.runs, p.num_memorized, p.num_samples) for p in points] == [(16, 2, 124, 128), (32, 1, 20, 64)]
    assert points[0].ratio == pytest.approx(np.mean([60 / 64, 64 / 64]))


def test_find_runs(tmp_path):
    a = write_run(tmp_path / "all" / "a", 16, [1])
    b = write_run(tmp_path / "all" / "deep" / "b", 16, [1])
    unmeasured = write_run(tmp_path / "all" / "c", 16, [1])
    (unmeasured / "mem_traj.jsonl").unlink()
    foreign = tmp_path / "all" / "d"
    (foreign / "knn-dist").mkdir(parents=True)
    (foreign / "network-snapshot-000100.pkl").touch()
    (foreign / "knn-dist" / "network-snapshot-000100.npz").touch()
    runs, left_out = find_runs([tmp_path / "all", a])
    assert runs == [a, b]
    assert list(left_out) == [unmeasured, foreign]
    assert "mem_ratio.py" in left_out[unmeasured]


def test_differing_options(tmp_path):
    a = read_run(write_run(tmp_path / "a", 16, [1], seed=1))
    b = read_run(write_run(tmp_path / "b", 32, [1], seed=2))
    c = read_run(write_run(tmp_path / "c", 32, [1], batch_size=64, network_kwargs={"model_channels": 32}))
    assert differing_options([a, b]) == []
    assert differing_options([a, b, c]) == ["batch", "num_channels"]


def test_measured_optimum_is_no_snapshot(tmp_path):
    optimum = {"kimg": None, "optimum": "unconditional", "num_memorized": 640, "num_samples": 640}
    assert read_run(write_run(tmp_path / "run", 16, [10, 60], extra=[optimum])).num_memorized == 60


# ----------------------------------------------------------------------------
# Command and figures.


def invoke(*args):
    return CliRunner().invoke(cli.main, [str(arg) for arg in args])


def test_curve_command(tmp_path):
    for size, memorized in [(16, [30, 62]), (24, [45]), (64, [3])]:
        write_run(tmp_path / "runs" / f"{size}", size, memorized)
    out = tmp_path / "figures" / "curve.png"
    result = invoke("curve", tmp_path / "runs", f"--out={out}", "--title=digits 8x8")
    assert result.exit_code == 0, result.output
    (line,), _ = curve_lines([read_run(run) for run in find_runs([tmp_path / "runs"])[0]])
    assert line.emm.verdict == "at" and 16 < line.emm.size < 24
    assert f"\n{line.emm}  [" in result.output and "] images only\n" in result.output
    assert "Note: with one run of each size nothing is known of the spread between seeds" in result.output
    assert "96.88  [89.3, 99.1]" in result.output
    assert Image.open(out).size[0] > 500
    with open(out.with_suffix(".csv"), newline="") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["size"]) for row in rows] == [16, 24, 64]
    assert float(rows[0]["ratio"]) == 62 / 64 and rows[0]["runs"] == "1" and rows[0]["interval_of"] == "images only"
    content = json.loads(out.with_suffix(".json").read_text())
    assert content["lines"][0]["interval_of"] == "images only" and content["lines"][0]["seed_sd"] is None
    assert sorted(path.name for path in out.parent.iterdir()) == ["curve.csv", "curve.json", "curve.png"]


def test_curve_as_published(tmp_path):
    """--interpolation=linear: straight lines in log |D|, and said so."""
    for size, memorized in [(16, [62]), (24, [45]), (64, [3])]:
        write_run(tmp_path / "runs" / f"{size}", size, memorized)
    result = invoke("curve", tmp_path / "runs", f"--out={tmp_path / 'c.png'}", "--interpolation=linear")
    assert f"\n{emm_estimate([16, 24, 64], [62 / 64, 45 / 64, 3 / 64])}  [" in result.output
    assert "Note: EMM is read off straight lines in log |D|, as published" in result.output


def test_curve_reports_what_it_leaves_out(tmp_path):
    write_run(tmp_path / "a", 16, [30])
    (write_run(tmp_path / "b", 32, [30], batch_size=2) / "mem_traj.jsonl").unlink()
    write_run(tmp_path / "c", 64, [30], batch_size=4)
    result = invoke("curve", tmp_path, f"--out={tmp_path / 'c.svg'}")
    assert result.exit_code == 0, result.output
    assert f"Left out: {tmp_path / 'b'}" in result.output and "and seed: batch." in result.output
    assert "EMM (90 %) below 16" in result.output


def bad_options(folder):
    (folder / "run" / "training_options.json").write_text('{"dataset_kwargs": {}}')


def bad_json(folder):
    (folder / "run" / "training_options.json").write_text("{")


def bad_line(folder):
    (folder / "run" / "mem_traj.jsonl").write_text('{"kimg": 1\n{"kimg": 2}\n')


def no_counts(folder):
    (folder / "run" / "mem_traj.jsonl").write_text('{"kimg": 1}\n')


def no_records(folder):
    (folder / "run" / "mem_traj.jsonl").write_text("")


def nothing(folder):
    pass


@pytest.mark.parametrize(
    ("args", "damage", "message"),
    [
        (["missing"], nothing, "is not a folder"),
        (["empty"], nothing, "No measured run found"),
        (["run", "--out=curve"], nothing, "does not say a format"),
        (["run", "--out=curve.csv"], nothing, "does not say a format"),
        (["run", "--out=folder.png"], nothing, "is a folder"),
        (["run", "--level=90"], nothing, "between 0 and 1, not 90"),
        (["run"], bad_options, "dataset_kwargs.max_size"),
        (["run"], bad_json, "dataset_kwargs.max_size"),
        (["run"], bad_line, "Line 1 of"),
        (["run"], no_counts, "lacks kimg, num_memorized or num_samples"),
        (["run"], no_records, "holds no measurement"),
        ([], nothing, "either runs"),
    ],
)
def test_bad_commands(tmp_path, monkeypatch, args, damage, message):
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path / "run", 16, [30])
    (tmp_path / "empty").mkdir()
    (tmp_path / "folder.png").mkdir()
    damage(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    result = invoke("curve", *args)
    assert result.exit_code in (1, 2) and isinstance(result.exception, SystemExit)
    assert message in result.output
    assert sorted(tmp_path.rglob("*")) == before  # nothing half-written


@pytest.mark.parametrize("suffix", ["png", "pdf", "svg"])
def test_grids(tmp_path, suffix):
    images = np.zeros((3, 3, 8, 8), dtype=np.uint8)
    neighbour_grid(images, images, tmp_path / f"g.{suffix}", distance=np.array([[0, 0], [1, 2], [1, 9]]))
    assert len(list(tmp_path.iterdir())) == 1


def test_grid_shows_every_pixel(tmp_path):
    """The enlarged pixels are those of the images, memorized pairs first."""
    images = np.random.RandomState(0).randint(0, 256, (2, 3, 8, 8), dtype=np.uint8)
    neighbour_grid(images, images[::-1], tmp_path / "g.png", distance=np.array([[2.0, 3.0], [1.0, 9.0]]))
    picture = np.asarray(Image.open(tmp_path / "g.png").convert("RGB")).reshape(-1, 3).tolist()
    colours = {tuple(colour) for colour in picture}
    assert {tuple(colour) for colour in images.transpose(0, 2, 3, 1).reshape(-1, 3).tolist()} <= colours


@pytest.mark.parametrize(
    ("shape", "distance", "path", "message"),
    [
        ((2, 3, 8, 8), (3, 2), "g.png", "distances"),
        ((3, 3, 8, 4), (3, 2), "g.png", "as many neighbours"),
        ((0, 3, 8, 8), (0, 2), "g.png", "n >= 1"),
        ((2, 3, 8, 8), (2, 2), "g.doc", "format"),
    ],
)
def test_bad_grids(tmp_path, shape, distance, path, message):
    neighbours = np.zeros((shape[0], 3, 8, 8), dtype=np.uint8)
    with pytest.raises(ValueError, match=message):
        neighbour_grid(np.zeros(shape, dtype=np.uint8), neighbours, tmp_path / path, distance=np.ones(distance))
    assert not list(tmp_path.iterdir())


# ----------------------------------------------------------------------------
# Collapse.


def write_trace(path, size, numbers, sigmas=(8.0, 4.0, 2.0, 1.0), first=0):
    """A trace: `numbers` holds the effective numbers of each seed, one per step."""
    lines = ["size,seed,step,sigma,effective_number,nearest_index,weight"]
    for seed, row in enumerate(numbers, start=first):
        lines += [f"{size},{seed},{step},{s},{n},0,1" for step, (s, n) in enumerate(zip(sigmas, row))]
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.mark.parametrize(
    ("numbers", "expected"),
    [
        ([100, 8, 1, 1], 4 / 2 ** (2 / 3)),  # 8 -> 1 over a factor 2 of sigma: a third of the way up from 1 in log
        ([100, 4, 1, 1], 4 / 2**0.5),
        ([100, 8, 4, 2], None),  # at the level, not below it
        ([1, 1, 1, 1], 8),
        ([4, 1, 4, 1], 8 / 2**0.5),  # the first time
    ],
)
def test_crossing(numbers, expected):
    found = crossing(np.array([8.0, 4.0, 2.0, 1.0]), np.array(numbers, dtype=float))
    assert found == (None if expected is None else pytest.approx(expected))


def test_posterior_curves(tmp_path):
    small = write_trace(tmp_path / "a.csv", 10, [[10, 4, 1, 1], [10, 6, 1, 1], [10, 9, 3, 1]])
    large = write_trace(tmp_path / "b.csv", 99, [[99, 50, 8, 1]])
    more = write_trace(tmp_path / "c.csv", 99, [[99, 60, 10, 1]], first=1)
    ten, many = posterior_curves([large, small, more])
    assert (ten.size, ten.seeds, many.size, many.seeds) == (10, 3, 99, 2)
    np.testing.assert_array_equal(ten.sigma, [8, 4, 2, 1])
    np.testing.assert_array_equal(ten.median, [10, 6, 1, 1])
    np.testing.assert_array_equal(ten.low, [10, 5, 1, 1])
    np.testing.assert_array_equal(ten.high, [10, 7.5, 2, 1])
    np.testing.assert_array_equal(many.median, [99, 55, 9, 1])
    assert ten.collapse == crossing(ten.sigma, ten.median)
    assert ten.collapse_quartiles[0] > ten.collapse > ten.collapse_quartiles[1]


def test_collapse_command(digits_zip, make_zip, tmp_path, run_cli):
    """From real traces: more images hold out to lower noise levels, and all of them collapse."""
    from training.dataset import ImageFolderDataset

    few = make_zip(ImageFolderDataset(digits_zip).images()[:20, 0], None, tmp_path / "few.zip")
    options = ["--seeds=0-7", f"--outdir={tmp_path / 'out'}", "--device=cpu"]
    for name, network in [("few", few), ("all", digits_zip)]:
        run_cli(generate_optim.main, [f"--network={network}", f"--trace={tmp_path / name}.csv", *options])
    out = tmp_path / "figures" / "c.png"
    result = run_cli(cli.main, ["collapse", tmp_path / "all.csv", tmp_path / "few.csv", f"--out={out}"])
    rows = [line.split() for line in result.output.splitlines()[1:3]]
    assert [row[:2] for row in rows] == [["20", "8"], ["1797", "8"]]
    assert 5 > float(rows[0][2]) > float(rows[1][2]) > 0.3
    assert Image.open(out).size[0] > 800


def test_collapse_figure_of_curves_that_never_fall(tmp_path):
    curves = posterior_curves([write_trace(tmp_path / "a.csv", 10, [[10, 10, 9, 9]])])
    collapse_curve(curves, tmp_path / "c.pdf")
    result = invoke("collapse", tmp_path / "a.csv", f"--out={tmp_path / 'c.png'}")
    assert "never  never to never" in result.output
    collapse_curve(posterior_curves([write_trace(tmp_path / "b.csv", 1, [[1, 1, 1, 1]])]), tmp_path / "d.png")
    with pytest.raises(ValueError, match="no curves"):
        collapse_curve([], tmp_path / "e.png")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "Missing argument"),
        (["missing.csv"], "missing.csv"),
        (["text.csv"], "is not a trace"),
        (["a.csv", "a.csv"], "repeats seed 0 of |D| = 10"),
        (["a.csv", "other.csv"], "different noise levels"),
        (["a.csv", "--out=c.doc"], "does not say a format"),
    ],
)
def test_bad_traces(tmp_path, monkeypatch, run_cli, args, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.csv").write_text("text")
    write_trace(tmp_path / "a.csv", 10, [[10, 10, 9, 9]])
    write_trace(tmp_path / "other.csv", 10, [[10, 10, 9, 9]], sigmas=(8, 4, 3, 1), first=1)
    before = sorted(tmp_path.rglob("*"))
    result = run_cli(cli.main, ["collapse", *args], code=1 if args else 2)
    assert message in result.output and sorted(tmp_path.rglob("*")) == before


def test_a_run_is_found_once_by_any_of_its_names(tmp_path, monkeypatch):
    run = write_run(tmp_path / "all" / "run", 16, [1])
    (tmp_path / "link").symlink_to(tmp_path / "all")
    monkeypatch.chdir(tmp_path)
    assert find_runs(["all", tmp_path / "all", tmp_path / "link"])[0] == [Path("all/run")]
    assert read_run("all/run").size == read_run(run).size == 16


def test_epochs_are_of_the_images_seen_not_of_the_name_of_the_file(tmp_path):
    """The last snapshot of |D| = 8 after 1,200 epochs has seen 9.6 kimg and is called 000009."""
    exact = {"kimg": 9, "nimg": 9600, "snapshot": "9", "num_memorized": 60, "num_samples": 64, "seeds": "0-63"}
    run = read_run(write_run(tmp_path / "a", 8, [], total_nimg=9600, extra=[exact]))
    assert (run.kimg, run.nimg, run.nimg / run.size, run.epochs) == (9, 9600, 1200, 1200)
    (path,) = trajectories([run])[0]
    assert path.time.tolist() == [1200]
    before = read_run(write_run(tmp_path / "b", 8, [], extra=[{k: v for k, v in exact.items() if k != "nimg"}]))
    assert (before.kimg, before.nimg) == (9, 9000)


@pytest.mark.parametrize(
    ("quotient", "text"),
    [(0.1, "0.10"), (0.326, "0.33"), (0.3329, "0.333"), (0.334, "0.334"), (0.3334, "0.3334"), (0.338, "0.338"),
     (1 / 3, "1/3"), (0.34, "0.34"), (0.999, "1.00"), (float("nan"), "0/0")],
)  # fmt: skip
def test_a_quotient_is_printed_on_its_side_of_a_third(quotient, text):
    assert quotient_text(quotient, quotient < 1 / 3).removesuffix("0") == text.removesuffix("0")
