"""Lines of a study: the factor that tells them apart, EMM with its bootstrap interval, trajectories, figures, files."""

import csv
import json
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from builders import write_run
from PIL import Image

import emm as cli
from memorization.curve.emm import emm_crossings, emm_estimate
from memorization.curve.factors import NOT_RECORDED, differing_keys, factor_values, group_by, readable
from memorization.curve.figures import curve_figure, line_styles, trajectory_figure
from memorization.curve.files import read_curve_csv, write_curve_csv
from memorization.curve.lines import curve_lines, curve_points, line_notes, trajectories
from memorization.curve.rising import rises
from memorization.runs import Run, read_run
from memorization.stats.bootstrap import optimism, percentiles, ratio_replicates, seed_spread


def study(folder, curves, sizes=(16, 64), seeds=(1,), n=1000, **options):
    """Measured runs: `curves` maps num_channels to the ratio at each size."""
    for channels, ratios in curves.items():
        for size, ratio in zip(sizes, ratios):
            for seed in seeds:
                network = {"model_channels": channels, "skip_connections": [1, 1]}
                run = folder / f"w{channels}" / f"{size}-{seed}"
                write_run(run, size, [round(ratio * n)], n, seed=seed, network_kwargs=network, **options)
    return folder


def points(folder):
    return [read_run(path.parent) for path in sorted(folder.rglob("training_options.json"))]


# ----------------------------------------------------------------------------
# Bootstrap.

SIZES = np.array([8.0, 16, 32, 64, 128])


def test_the_spread_of_seeds_is_found():
    rng = np.random.default_rng(0)
    samples = np.full(5, 500)
    for rho in (0.0, 0.05, 0.2):
        found = []
        for _ in range(100):
            means = np.array([0.2, 0.5, 0.9])[:, None]
            p = means if rho == 0 else rng.beta(means * (1 / rho - 1), (1 - means) * (1 / rho - 1), size=(3, 5))
            found.append(seed_spread([(k, samples) for k in rng.binomial(500, p, size=(3, 5))]).rho)
        assert np.mean(found) == pytest.approx(rho, abs=0.005, rel=0.2)


def test_what_says_nothing_of_the_seeds():
    one, saturated = (np.array([90]), np.array([100])), (np.array([100, 100]), np.array([100, 100]))
    assert seed_spread([one, saturated]).rho is None
    assert seed_spread([one, (np.array([50, 50]), np.array([100, 100]))]).rho == 0


def test_replicates_of_one_run_are_binomial():
    drawn = ratio_replicates([(np.array([900]), np.array([1000]))], 20_000)
    assert drawn.mean() == pytest.approx(0.9, abs=1e-3)
    assert drawn.std() == pytest.approx((0.9 * 0.1 / 1000) ** 0.5, rel=0.03)
    np.testing.assert_array_equal(drawn, ratio_replicates([(np.array([900]), np.array([1000]))], 20_000))


def test_the_seed_spread_widens_all_sizes():
    alike, apart = np.array([900, 900, 900]), np.array([950, 900, 850])
    samples, single = np.full(3, 1000), (np.array([500]), np.array([1000]))
    narrow, wide = (ratio_replicates([(k, samples), single]).std(axis=0) for k in (alike, apart))
    assert (wide > 2 * narrow).all()
    assert (narrow > 0).all()


@pytest.mark.parametrize("snapshots", [2, 10])
def test_optimism_of_equal_snapshots(snapshots):
    """The expected maximum of independent binomial ratios, by simulation."""
    rng = np.random.default_rng(0)
    excess = (rng.binomial(1000, 0.8, size=(20_000, snapshots)).max(axis=1) / 1000).mean() - 0.8
    found = optimism(np.full(snapshots, 800), np.full(snapshots, 1000))
    assert found == pytest.approx(excess, rel=0.03)


def test_optimism_of_one_clear_maximum_is_none():
    assert optimism(np.array([800]), np.array([1000])) == 0
    assert optimism(np.array([100, 500, 800]), np.array([1000, 1000, 1000])) == pytest.approx(0, abs=1e-6)
    assert optimism(np.array([]), np.array([])) == 0


def test_many_curves_cross_as_one():
    rng = np.random.default_rng(0)
    ratios = np.concatenate([rng.random((200, 5)), [[1, 1, 1, 1, 1], [0, 0, 0, 0, 0], [0.9, 0, 0.9, 0, 0]]])
    for row, log_size in zip(ratios, emm_crossings(SIZES, ratios, 0.7)):
        emm = emm_estimate(SIZES, row, 0.7)
        verdict = {np.inf: "at least", -np.inf: "below"}.get(log_size, "at")
        assert emm.verdict == verdict and (verdict != "at" or emm.size == pytest.approx(np.exp(log_size)))


def test_percentiles_keep_open_ends():
    values = np.array([-np.inf] * 30 + [1.0] * 940 + [np.inf] * 30)
    assert percentiles(values, 0.95) == (-np.inf, np.inf)
    assert percentiles(values, 0.9) == (1, 1)


# ----------------------------------------------------------------------------
# Lines.


def test_lines_by_width(tmp_path):
    folder = study(tmp_path, {16: [1.0, 0.8], 32: [1.0, 0.85], 8: [0.8, 0.1], 64: [1.0, 0.99]})
    lines, notes = curve_lines(points(folder), "num_channels")
    assert [(line.value, line.name) for line in lines] == [(8, "8"), (16, "16"), (32, "32"), (64, "64")]
    assert notes == [] and all(line.differing == [] and line.images_only for line in lines)
    below, at, later, beyond = lines
    assert (below.emm.verdict, beyond.emm.verdict) == ("below", "at least")
    assert below.emm_interval == "[below 16] images only" and beyond.emm_interval == "[at least 64] images only"
    assert 32 < at.emm.size < later.emm.size < 64  # on the logit scale the level is near the size with 80 %
    linear, _ = curve_lines(points(folder), "num_channels", interpolation="linear")
    assert linear[1].emm.size == pytest.approx(32)  # half way in log |D|
    assert linear[2].emm.size == pytest.approx(16 * 4 ** (2 / 3))
    assert (linear[1].emm_low, linear[1].emm_high) == (at.emm_low, at.emm_high)
    for line in (at, later):
        assert line.emm_low.verdict == line.emm_high.verdict == "at"
        assert line.emm_low.size < line.emm.size < line.emm_high.size
        assert line.points[1].interval == pytest.approx(line.runs[1].interval)  # one run: Wilson's


def test_an_interval_open_on_one_side(tmp_path):
    line = curve_lines(points(study(tmp_path, {16: [0.99, 0.91]}, n=200)))[0][0]
    assert str(line.emm) == "EMM (90 %) at least 64" and line.emm_low.verdict == "at"
    assert line.emm_interval.endswith(", at least 64] images only") and 30 < line.emm_low.size < 64
    line = curve_lines(points(study(tmp_path / "low", {16: [0.89, 0.1]}, n=200)))[0][0]
    assert line.emm_interval.startswith("[below 16, ") and line.emm_high.verdict == "at"


def test_seeds_are_averaged_and_their_spread_counts(tmp_path):
    for seed, memorized in enumerate([950, 900, 850]):
        write_run(tmp_path / "few" / f"{seed}", 16, [memorized], 1000, seed=seed)
        write_run(tmp_path / "few" / f"large{seed}", 64, [500], 1000, seed=seed)
    write_run(tmp_path / "few" / "adaptive", 16, [100], 100, seed=9)
    line = curve_lines(points(tmp_path))[0][0]
    assert line.points[0].ratio == pytest.approx(np.mean([0.95, 0.9, 0.85, 1.0]))  # of the runs, not of the images
    assert (line.points[0].runs, line.points[0].num_samples) == (4, 3100)
    assert 0.2 < line.seed_sd < 0.9 and not line.images_only and line.differing == []
    low, high = line.points[0].interval
    assert high - low > 2 * 1.96 * np.std([0.95, 0.9, 0.85, 1.0]) / 2
    assert line.points[0].ci_low < line.points[0].ratio < line.points[0].ci_high


def test_optimism_lowers_only_the_lower_end(tmp_path):
    one = curve_points([read_run(write_run(tmp_path / "one", 16, [50, 800], 1000))])[0]
    many = curve_points([read_run(write_run(tmp_path / "many", 16, [800] * 10, 1000))])[0]
    assert many.ratio == one.ratio and many.ci_high == one.ci_high
    assert many.ci_low == pytest.approx(one.ci_low - many.optimism)
    assert many.optimism == pytest.approx(0.0195, abs=0.001)


def test_two_thousand_replicates_are_quick(tmp_path):
    runs = points(study(tmp_path, {16: [0.99, 0.97, 0.9, 0.8, 0.5, 0.1]}, (8, 16, 32, 64, 128, 256), (1, 2, 3)))
    curve_lines(runs)  # imports
    start = time.perf_counter()
    curve_lines(runs, replicates=2000)
    assert time.perf_counter() - start < 1


def test_where_the_spread_between_seeds_comes_from(tmp_path):
    """From sizes with several runs, else from other lines, or as given; else it is unknown, and nothing hides that."""
    folder = study(tmp_path / "one", {16: [0.97, 0.8]}, (16, 32))
    alone = curve_lines(points(folder))[0][0]
    for seed, (a, b) in enumerate([(0.98, 0.85), (0.95, 0.7), (0.96, 0.8)]):
        write_run(tmp_path / "more" / f"a{seed}", 16, [round(1000 * a)], 1000, seed=seed, network_kwargs={"w": 9})
        write_run(tmp_path / "more" / f"b{seed}", 32, [round(1000 * b)], 1000, seed=seed, network_kwargs={"w": 9})
    lines = curve_lines(points(tmp_path), "folder")[0]
    borrowed, own = sorted(lines, key=lambda line: len(line.runs))
    given = curve_lines(points(folder), seed_sd=0.3)[0][0]
    assert [line.seeds_from for line in (alone, borrowed, own, given)] == [
        "images only", "other lines", "runs of one size", "given",
    ]  # fmt: skip
    width = {name: np.log(x.emm_high.size / x.emm_low.size) for name, x in [("alone", alone), ("borrowed", borrowed)]}
    assert width["borrowed"] > 1.5 * width["alone"] and alone.seed_sd is None
    assert own.seed_sd / 2 < borrowed.seed_sd < 2 * own.seed_sd and given.seed_sd == pytest.approx(0.3)
    assert any("is that of the other lines" in note and "folder = " in note for note in line_notes(lines, "folder"))
    for line, known in [(alone, False), (borrowed, True), (given, True)]:
        assert all(point.seeds_known == known for point in line.points)
        assert ("images only" in line.emm_interval) == (not known)


def test_a_curve_that_crosses_several_times_says_so(tmp_path):
    line = curve_lines(points(study(tmp_path, {16: [0.99, 0.88, 0.92, 0.5]}, (16, 24, 32, 64))))[0][0]
    assert line.crossings == 3 and any("pass 90 % 3 times" in note for note in line.notes)
    assert 16 < line.emm.size < 33  # not the last of them, which noise pushes up


def test_a_fit_that_misses_the_ratios_says_so(tmp_path):
    """Digits, 8 channels, three seeds: 10 images were trained too briefly, so that the curve is bent there."""
    for size, counts in [(10, (480, 475, 469)), (20, (479, 446, 458)), (40, (255, 307, 306))]:
        for seed, memorized in enumerate(counts):
            write_run(tmp_path / "bent" / f"{size}-{seed}", size, [memorized], 500, seed=seed)
    line = curve_lines(points(tmp_path / "bent"))[0][0]
    assert line.points[1].ratio > 0.9 > line.points[2].ratio and line.emm.size < 20
    assert any("pass 90 % between |D| = 20 and 40, the curve fitted to all sizes does not" in x for x in line.notes)
    linear = curve_lines(points(tmp_path / "bent"), interpolation="linear")[0][0]
    assert 20 < linear.emm.size < 22 and not any("does not" in note for note in linear.notes)
    straight = curve_lines(points(study(tmp_path / "straight", {16: [0.98, 0.94, 0.8]}, (10, 20, 40), (1, 2))))[0][0]
    assert 20 < straight.emm.size < 40 and not any("does not" in note for note in straight.notes)


def test_a_ratio_that_still_rises_is_said(tmp_path, capsys):
    """Fashion-MNIST at 16x16, 50 images, medium scale: of 250 images after 600, 1200, 1800 and 2400 epochs."""
    for seed, counts in enumerate([(30, 119, 175, 218), (30, 132, 179, 219), (36, 129, 191, 226)]):
        write_run(tmp_path / f"50-{seed}", 50, counts, 250, seed=seed, total_nimg=400_000)
    line = curve_lines(points(tmp_path))[0][0]
    (rise,) = rises({50: list(line.runs)})
    assert (rise.size, rise.halfway, rise.end) == (50, pytest.approx(380 / 750), pytest.approx(663 / 750))
    cli.main(["curve", str(tmp_path), "--out", str(tmp_path / "c.png")], standalone_mode=False)
    said = capsys.readouterr().err
    assert "still rises in the second half of the training, at |D| = 50 from 50.7 to 88.4 %" in said
    assert "still rises" in json.loads((tmp_path / "c.json").read_text())["lines"][0]["notes"][0]


@pytest.mark.parametrize(
    "counts",
    [
        [(200, 500, 500, 500)],  # at the end
        [(500,)],  # only the end was measured
        [(0, 400, 450, 500), (0, 450, 440, 440)],  # one of two runs rises
        [(0, 480, 500, 500)],  # within the noise of 1000 images
        [(0, 300, 900, 500)],  # the highest is not at the end
    ],
)
def test_nothing_is_said_to_rise(tmp_path, counts):
    for seed, memorized in enumerate(counts):
        write_run(tmp_path / f"20-{seed}", 20, memorized, 1000, seed=seed, total_nimg=100_000 * len(memorized))
    assert not rises({20: points(tmp_path)})


def test_what_is_no_half_of_a_training_is_not_compared(tmp_path):
    """Snapshots of the first half only, an adaptive end, folders of images of other programs."""
    write_run(tmp_path / "begun", 20, (100, 500), 1000, total_nimg=800_000)
    adaptive = [record(200, 900, 1000, adaptive=ADAPTIVE, seeds="0-999")]
    write_run(tmp_path / "adaptive", 20, [100], 1000, extra=adaptive, total_nimg=200_000)
    write_run(tmp_path / "whole", 20, (100, 500), 1000, total_nimg=200_000)
    runs = {run.path.name: run for run in points(tmp_path)}
    others = Run(tmp_path, runs["whole"].options | {"total_nimg": 0}, counted=runs["whole"].counted)
    assert [rise.end for rise in rises({20: [runs["whole"]]})] == [0.5]
    assert not any(rises({20: [run]}) for run in (runs["begun"], runs["adaptive"], others))


@pytest.mark.parametrize("runs", [1, 3])
def test_a_ratio_that_stays_is_seldom_said_to_rise(runs):
    rng, said = np.random.default_rng(0), 0

    def options(size):
        return {"dataset_kwargs": {"max_size": size}, "total_nimg": 20_000}

    for _ in range(300):
        truth = {size: rng.beta(20, 2, size=runs) for size in (10, 20, 40)}
        sizes = {
            size: [
                Run(
                    Path(f"{size}-{i}"),
                    options(size),
                    counted=tuple(record(k, int(rng.binomial(500, p)), 500) for k in (10, 20)),
                )
                for i, p in enumerate(ratios)
            ]
            for size, ratios in truth.items()
        }
        said += bool(rises(sizes))
    assert said / 300 <= 0.03  # nominally 0.01


def test_bad_lines(tmp_path):
    runs = points(study(tmp_path, {16: [0.9, 0.8]}))
    with pytest.raises(ValueError, match="no runs"):
        curve_lines([])
    with pytest.raises(ValueError, match="confidence must lie between 0 and 1, not 95"):
        curve_lines(runs, confidence=95)
    with pytest.raises(ValueError, match="between 0 and 1, not 2"):
        curve_lines(runs, level=2)
    with pytest.raises(ValueError, match="interpolation is one of logit, linear"):
        curve_lines(runs, interpolation="cubic")
    with pytest.raises(ValueError, match="standard deviation >= 0"):
        curve_lines(runs, seed_sd=-1)


# ----------------------------------------------------------------------------
# Adaptive measurements.


def record(kimg, memorized, n, **entries):
    return {"kimg": kimg, "snapshot": f"{kimg}", "num_memorized": memorized, "num_samples": n, **entries}


ADAPTIVE = {"bar": 0.9, "confidence": 0.95}


@pytest.mark.parametrize("same_seeds", [True, False])
def test_adaptive_records_of_different_length_are_one_run(tmp_path, same_seeds):
    extra = [
        record(k, m, n, adaptive=ADAPTIVE, seeds="0-9999" if same_seeds else f"0-{n - 1}")
        for k, m, n in [(100, 3, 20), (200, 950, 1000), (300, 50, 64)]
    ]
    run = read_run(write_run(tmp_path / "run", 16, [], extra=extra))
    assert [(s.kimg, s.num_samples, s.adaptive) for s in run.snapshots] == [
        (100, 20, True), (200, 1000, True), (300, 64, True),
    ]  # fmt: skip
    assert (run.kimg, run.adaptive) == (200, True)


def test_full_measurements_win(tmp_path):
    adaptive = [record(100 * i, 20, 20, adaptive=ADAPTIVE, seeds="0-19") for i in (1, 2, 3)]
    run = read_run(write_run(tmp_path / "run", 16, [10, 60], extra=adaptive))  # kimg 100 and 200 in full
    assert [(s.kimg, s.num_samples, s.adaptive) for s in run.snapshots] == [
        (100, 64, False), (200, 64, False), (300, 20, True),
    ]  # fmt: skip
    trial = [record(100, 500, 1000, adaptive=ADAPTIVE, seeds="0-999")]
    run = read_run(write_run(tmp_path / "trial", 16, [4], 4, extra=trial))  # four images are no full measurement
    assert (run.num_samples, run.adaptive) == (1000, True)


# ----------------------------------------------------------------------------
# Factors.


def factor(folder, key):
    return factor_values(points(folder), key)[0]


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        ("network_kwargs.model_channels", [16, 32]),
        ("model_channels", [16, 32]),
        ("num_channels", [16, 32]),  # what the network took, not the option, which may be null
        ("--num-channels", [16, 32]),
        ("weight_decay", [0.0, 0.1]),
        ("optimizer_kwargs.weight_decay", [0.0, 0.1]),
        ("optimizer", ["Adam", "Adam"]),
        ("batch", [16, 16]),
        ("resolution", [8, 8]),
        ("arch", ["ddpmpp", NOT_RECORDED]),
        ("cond", [False, True]),
        ("folder", ["w16", "w32"]),
        ("dataset", ["digits", "digits-random"]),
    ],
)
def test_keys(tmp_path, key, expected):
    data = {"max_size": 64, "resolution": 8}
    common = {"num_channels": None}
    for width, decay, path, options in [(16, 0.0, "digits-64", {"arch": "ddpmpp"}), (32, 0.1, "digits-64-random", {})]:
        write_run(
            tmp_path / f"w{width}" / "run", 64, [1], cond=width == 32,
            dataset_kwargs={"path": f"gone/{path}.zip", **data}, network_kwargs={"model_channels": width},
            optimizer_kwargs={"class_name": "Adam", "weight_decay": decay}, **common, **options,
        )  # fmt: skip
    assert factor(tmp_path, key) == expected


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("nonsense", 'No run has the key "nonsense"; the runs differ in: network_kwargs.class_name, optimizer. '),
        ("class_name", "could be network_kwargs.class_name or optimizer_kwargs.class_name"),
        ("max_size", "is |D|, the axis"),
        ("dataset_kwargs.max_size", "is |D|, the axis"),
        ("dataset.labels", "datasets cannot be read any more: x.zip"),
        ("optimizer_kwargs", "No run has the key"),
    ],
)
def test_bad_keys(tmp_path, run_cli, key, message):
    for i, names in enumerate([("A", "B"), ("C", "D")]):
        network, optimizer = ({"class_name": name} for name in names)
        write_run(tmp_path / f"{i}", 16, [1], network_kwargs=network, optimizer_kwargs=optimizer)
    out = tmp_path / "c.png"
    for command in ("curve", "trajectory"):
        result = run_cli(cli.main, [command, tmp_path, f"--by={key}", f"--out={out}"], code=1)
        assert message in result.output
    assert len(list(tmp_path.iterdir())) == 2


def test_dataset_keys(tmp_path, make_zip, monkeypatch):
    """From the zip; where the path of the options leads nowhere, from the reference of the measurement; else noted."""
    monkeypatch.chdir(tmp_path)
    images = np.zeros((4, 8, 8), dtype=np.uint8)
    extra = json.dumps({"labels": [[f"00000/img{i:08d}.png", i % 3] for i in range(4)], "rule": {"alpha": 0.5}})
    make_zip(images, extra.encode(), tmp_path / "a.zip")
    make_zip(np.zeros((4, 8, 8, 3), dtype=np.uint8), [0, 1, 2, 3], tmp_path / "b.zip")

    def data(path, size=4):
        return {"path": path, "max_size": size, "resolution": 8}

    write_run(tmp_path / "runs" / "a", 4, [1], dataset_kwargs=data("a.zip"))
    reference = record(500, 9, 64, reference=str(tmp_path / "b.zip"))
    write_run(tmp_path / "runs" / "b", 4, [], extra=[reference], dataset_kwargs=data("gone/b.zip"))
    runs = points(tmp_path / "runs")
    assert factor_values(runs, "num_classes") == ([3, 4], [])
    assert factor_values(runs, "channels") == ([1, 3], [])
    assert factor_values(runs, "dataset.resolution") == ([8, 8], [])
    assert factor_values(runs, "rule.alpha") == ([0.5, NOT_RECORDED], [])
    assert "num_classes" in differing_keys(runs)

    write_run(tmp_path / "runs" / "c", 4, [1], dataset_kwargs=data("gone.zip"))
    write_run(tmp_path / "runs" / "d", 9, [1], dataset_kwargs=data("a.zip", 9))  # another file of that name by now
    values, notes = factor_values(points(tmp_path / "runs"), "num_classes")
    assert values == [3, 4, NOT_RECORDED, NOT_RECORDED]
    assert notes == ["num_classes is not recorded where the dataset cannot be read any more: a.zip, gone.zip"]
    lines, _ = curve_lines(points(tmp_path / "runs"), "num_classes")
    assert [line.name for line in lines] == ["3", "4", "not recorded"]


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (True, "yes"),
        (None, "none"),
        (1e-5, "1e-05"),
        (2.0, "2"),
        ("adm", "adm"),
        ([1, 2, 2], "1,2,2"),
        ([1] * 9, "all of 9"),
        ([0] * 9, "none of 9"),
        ([0, 0, 1, 0, 0, 0, 0, 0, 0], "only 3 of 9"),
        ([1, 1, 1, 1, 1, 1, 1, 0, 0], "without 8, 9"),
        (NOT_RECORDED, "not recorded"),
    ],
)
def test_readable(value, expected):
    key = "skip_connections" if isinstance(value, list) and len(value) == 9 else "other"
    assert readable(value, key) == expected


def test_order_of_values():
    only = [[int(i == j) for i in range(3)] for j in (2, 0, 1)]
    assert [value for value, _ in group_by(only)] == [[1, 0, 0], [0, 1, 0], [0, 0, 1]]
    values = [NOT_RECORDED, "c10", "c9", 2, 0.5, None, True, 1, 1.0]
    assert [value for value, _ in group_by(values)] == [None, 0.5, True, 1, 2, "c9", "c10", NOT_RECORDED]
    assert dict((str(v), i) for v, i in group_by(values))["1"] == [7, 8]


# ----------------------------------------------------------------------------
# Trajectories.


def test_trajectories_of_runs(tmp_path):
    for size in (16, 32):
        for seed, final in [(1, 40), (2, 60)]:
            write_run(tmp_path / f"{size}-{seed}", size, [0, 20, final], seed=seed)
    small, large = trajectories(points(tmp_path))[0]
    assert (small.name, large.name, len(small.runs)) == ("|D| = 16", "|D| = 32", 2)
    np.testing.assert_allclose(small.time, np.array([100, 200, 300]) * 1000 / 16)
    np.testing.assert_allclose(large.time, small.time / 2)
    np.testing.assert_allclose(small.ratio, np.array([0, 20, 50]) / 64)
    np.testing.assert_allclose([small.low, small.high], np.array([[0, 20, 40], [0, 20, 60]]) / 64)
    each = trajectories(points(tmp_path), per_run=True)[0]
    assert [t.name for t in each] == [f"|D| = {size}, {size}-{seed}" for size in (16, 32) for seed in (1, 2)]
    np.testing.assert_allclose((each[0].low[2], each[0].high[2]), each[0].runs[0].interval)


def test_trajectories_with_other_epochs(tmp_path):
    write_run(tmp_path / "a", 16, [0, 16, 32, 48], seed=1)
    extra = [record(150, 8, 64), record(350, 40, 64)]
    write_run(tmp_path / "b", 16, [], seed=2, extra=extra)
    (line,) = trajectories(points(tmp_path))[0]
    np.testing.assert_allclose(line.time * 16 / 1000, [150, 200, 300, 350])
    np.testing.assert_allclose(line.ratio * 64, [8, 16, 32, 40])
    write_run(tmp_path / "c", 16, [], seed=3, extra=[record(900, 1, 64)])
    with pytest.raises(ValueError, match="no epochs in common"):
        trajectories(points(tmp_path))
    assert len(trajectories(points(tmp_path), per_run=True)[0]) == 3


def test_trajectory_command(tmp_path, run_cli):
    for cond in (False, True):
        for size in (16, 32):
            for seed in (1, 2):
                name = f"{cond}-{size}-{seed}"
                write_run(tmp_path / "runs" / name, size, [seed, 30, 50 + 10 * cond], cond=cond, seed=seed)
    out = tmp_path / "figures" / "t.png"
    result = run_cli(cli.main, ["trajectory", tmp_path / "runs", "--by=cond", f"--out={out}", "--title=labels"])
    assert "differ in more" not in result.output
    assert "cond = yes, |D| = 32    2       9375               93.75    93.75  9375" in result.output
    with open(out.with_suffix(".csv"), newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 4 * 3 and rows[0]["line"] == "cond = no, |D| = 16"
    assert [float(rows[0][k]) * 64 for k in ("ratio", "low", "high")] == [1.5, 1, 2]
    assert (
        sorted(p.name for p in out.parent.iterdir()) == ["t.csv", "t.json", "t.png"] and Image.open(out).size[0] > 1000
    )
    again = out.with_name("again.png")
    run_cli(cli.main, ["trajectory", f"--from-csv={out.with_suffix('.csv')}", f"--out={again}", "--title=labels"])
    assert again.read_bytes() == out.read_bytes()
    again.unlink()
    for name in ("a", "b"):  # as factor scripts name them: the same folder names for each value
        for seed in (1, 2):
            write_run(tmp_path / "same" / name / f"16-seed{seed}", 16, [seed, 30], seed=seed, cond=name == "a")
    each = tmp_path / "each.png"
    text = run_cli(cli.main, ["trajectory", tmp_path / "same", "--per-run", f"--out={each}"]).output
    assert "|D| = 16, a/16-seed1" in text and "|D| = 16, b/16-seed2" in text
    run_cli(cli.main, ["trajectory", f"--from-csv={each.with_suffix('.csv')}", f"--out={tmp_path / 'each2.png'}"])
    assert (tmp_path / "each2.png").read_bytes() == each.read_bytes()
    result = run_cli(cli.main, ["trajectory", tmp_path / "runs", f"--out={out}", "--level=90"], code=1)
    assert "between 0 and 1, not 90" in result.output
    write_run(tmp_path / "runs" / "other", 16, [1, 2, 3], batch_size=99)
    result = run_cli(cli.main, ["trajectory", tmp_path / "runs", f"--out={out}"])
    assert "the runs of |D| = 16 differ in more than |D| and seed: batch, cond" in result.stderr


# ----------------------------------------------------------------------------
# The command.


def test_curve_command_by(tmp_path, run_cli):
    study(tmp_path / "runs", {8: [0.95, 0.3], 16: [1.0, 0.8]}, seeds=(1, 2))
    network = {"model_channels": 8, "skip_connections": [1, 1]}
    write_run(tmp_path / "runs" / "x", 16, [9], 64, network_kwargs=network, batch_size=2, seed=3)
    out = tmp_path / "figures" / "w.png"
    args = ["curve", tmp_path / "runs", "--by=num_channels", f"--out={out}", "--title=width"]
    result = run_cli(cli.main, args)
    assert "num_channels      |D|" in result.output
    assert "\n8            EMM (90 %) below 16  [below 16" in result.output
    assert "\n16           EMM (90 %) ≈ 5" in result.output and "images only" not in result.output
    assert "the runs of num_channels = 8 differ in more than |D| and seed: batch" in result.stderr
    assert sorted(p.name for p in out.parent.iterdir()) == ["w.csv", "w.json", "w.png"]
    with open(out.with_suffix(".csv"), newline="") as file:
        assert [(r["line"], r["size"], r["runs"]) for r in csv.DictReader(file)] == [
            ("8", "16", "3"), ("8", "64", "2"), ("16", "16", "2"), ("16", "64", "2"),
        ]  # fmt: skip


@pytest.mark.parametrize(
    ("curves", "by", "seeds"),
    [
        ({8: [0.95, 0.3], 16: [1.0, 0.8]}, "num_channels", (1, 2)),
        ({8: [0.95, 0.3], 16: [1.0, 0.8], 32: [1, 0.99], 64: [0.5, 0.2]}, "num_channels", (1,)),  # a scale of colours
        ({8: [0.95, 0.3], 16: [1.0, 0.8], 32: [1, 0.99], 64: [0.5, 0.2]}, "folder", (1,)),  # separate colours
        ({8: [0.95, 0.3]}, None, (1, 2)),
    ],
)
def test_figure_again_from_its_table(tmp_path, run_cli, curves, by, seeds):
    runs = study(tmp_path / "runs", curves, seeds=seeds)
    if by == "folder":
        for width in curves:  # names that look like numbers are text
            (runs / f"w{width}").rename(runs / str(width))
    first, again = tmp_path / "a.png", tmp_path / "b.png"
    options = ["--title=Again", *([f"--by={by}"] if by else [])]
    text = run_cli(cli.main, ["curve", runs, f"--out={first}", *options]).output
    result = run_cli(cli.main, ["curve", f"--from-csv={tmp_path / 'a.csv'}", f"--out={again}", *options])
    rows = [line.split("  (sd between")[0] for line in text.splitlines() if "|D|" in line or "[" in line]
    assert [line for line in result.stdout.splitlines() if "|D|" in line or "[" in line] == [
        row for row in rows if not row.startswith("Note")
    ]
    if by and len(seeds) == 1:
        assert "nothing is known of the spread between seeds" in result.stderr
    linear = tmp_path / "linear.png"
    run_cli(cli.main, ["curve", runs, f"--out={linear}", "--interpolation=linear", *options])
    args = ["curve", f"--from-csv={linear.with_suffix('.csv')}", f"--out={again}", *options]
    assert "its interval is that of the fit" in run_cli(cli.main, args).stderr
    run_cli(cli.main, ["curve", f"--from-csv={tmp_path / 'a.csv'}", f"--out={again}", *options])
    assert again.read_bytes() == first.read_bytes()
    assert not again.with_suffix(".csv").exists() and not again.with_suffix(".json").exists()


def test_tables_that_cannot_be_drawn(tmp_path, run_cli):
    runs, table = study(tmp_path / "runs", {8: [0.95, 0.3], 16: [1.0, 0.8]}), tmp_path / "a.csv"
    run_cli(cli.main, ["curve", runs, "--by=num_channels", f"--out={tmp_path / 'a.png'}"])
    out = tmp_path / "b.png"
    args = ["curve", f"--from-csv={table}", f"--out={out}"]
    assert "either runs" in run_cli(cli.main, [*args, runs], 2).stderr
    assert "either runs" in run_cli(cli.main, ["curve"], 2).stderr
    assert "say --by" in run_cli(cli.main, args, 2).stderr
    assert "as it is" in run_cli(cli.main, [*args, "--level=0.9"], 2).stderr
    assert "needs --out" in run_cli(cli.main, args[:2], 2).stderr
    assert (
        "nothing.csv"
        in run_cli(cli.main, ["curve", f"--from-csv={tmp_path / 'nothing.csv'}", f"--out={out}"], 1).stderr
    )
    good = table.read_text()
    damage = {
        "emm_low": "low", "images only": "guess", ",0.9,0.95,": ",0.9,2,", ",1000,": ",nan,", ",950,1000,": ",0,0,",
        ",logit,": ",cubic,", "8,16,": f"8,{10**400},", "8,64,": f"8,{2**64},",
    }  # fmt: skip
    one_row = {
        ",logit,": ",linear,",
        ",0.9,0.95,": ",0.8,0.95,",
        "below 16.0": "below 17.0",
        ",seeds,": ",images only,",
    }
    one_row |= {",950,1000,": f",950,{10**17},"}
    seeds = study(tmp_path / "seeds", {8: [0.95, 0.3], 16: [0.5, 0.2]}, seeds=(1, 2))
    run_cli(cli.main, ["curve", seeds, "--by=num_channels", f"--out={tmp_path / 's.png'}"])
    wrong = [(good, good.replace(old, new)) for old, new in damage.items()]
    wrong += [(good, good.replace(old, new, 1)) for old, new in one_row.items() if old in good]
    text = (tmp_path / "s.csv").read_text()
    wrong += [(text, text.replace(old, new, 1)) for old, new in one_row.items() if old in text]
    assert len(wrong) == len(damage) + 7
    rows = good.splitlines(keepends=True)
    wrong += [(good, "".join(order)) for order in ([*rows, rows[1]], [rows[0], *rows[:0:-1]])]
    wrong.append((good, good.replace('"8"', "[" * 60_000).replace(",8\n", "," + "[" * 60_000 + "\n")))
    for before, after in wrong:
        assert before != after
        table.write_text(after)
        assert "is no table that emm.py curve has written" in run_cli(cli.main, args, 1).stderr
    assert not out.exists()


def test_record_holds_what_the_figure_shows(tmp_path, run_cli):
    """Strict JSON from which the figure can be drawn again; repeated, it is the same but for the time."""
    study(tmp_path / "runs", {8: [0.95, 0.3], 16: [1.0, 0.8]}, seeds=(1, 2), wrong=float("nan"))
    out = tmp_path / "w.svg"
    contents = []
    for _ in range(2):
        run_cli(cli.main, ["curve", tmp_path / "runs", "--by=num_channels", f"--out={out}", "--level=0.85"])
        text = out.with_suffix(".json").read_text()
        contents.append(json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON")))
    for content in contents:
        content.pop("time")
    assert contents[0] == contents[1]
    lines, _ = curve_lines(points(tmp_path / "runs"), "num_channels", level=0.85)
    content = contents[0]
    assert (content["by"], content["level"], content["confidence"]) == ("num_channels", 0.85, 0.95)
    assert {"diffusion-memorization", "torch"} <= content["versions"].keys() and content["command"]
    for line, found in zip(lines, content["lines"], strict=True):
        assert found["value"] == line.value
        assert found["emm"] == {"size": line.emm.size, "verdict": line.emm.verdict}
        assert found["emm_low"]["size"] == line.emm_low.size and found["emm_high"]["size"] == line.emm_high.size
        assert [(p["size"], p["ratio"], p["ci_low"], p["ci_high"]) for p in found["points"]] == [
            (p.size, p.ratio, *p.interval) for p in line.points
        ]
        assert [r["seed"] for r in found["runs"]] == [r.options["seed"] for r in line.runs]
        assert found["options"]["batch_size"] == 16 and "seed" not in found["options"]
        assert found["runs"][0]["snapshots"][0]["num_samples"] == 1000


def test_note_on_adaptive_measurements(tmp_path, run_cli):
    write_run(tmp_path / "a", 16, [], extra=[record(100, 30, 30, adaptive=ADAPTIVE)])
    result = run_cli(cli.main, ["curve", tmp_path, f"--out={tmp_path / 'c.png'}"])
    assert "adaptive measurements" in result.stderr


# ----------------------------------------------------------------------------
# Figures.


@pytest.mark.parametrize(("count", "suffix"), [(1, "png"), (3, "pdf"), (9, "svg")])
def test_figures_of_many_lines(tmp_path, count, suffix):
    study(tmp_path / "runs", {8 * i: [1 - 0.01 * i, 0.5 + 0.02 * i] for i in range(1, count + 1)})
    runs = points(tmp_path / "runs")
    curve_figure(curve_lines(runs, "num_channels")[0], tmp_path / f"c.{suffix}", by="num_channels", title="t")
    trajectory_figure(trajectories(runs, "num_channels")[0], tmp_path / f"t.{suffix}", level=None)
    assert len(list(tmp_path.iterdir())) == 3


def test_legend_names_every_line(tmp_path):
    study(tmp_path / "runs", {8: [0.8, 0.3], 16: [1.0, 0.8], 32: [1.0, 0.99]})
    lines, _ = curve_lines(points(tmp_path / "runs"), "num_channels")
    curve_figure(lines, tmp_path / "c.svg", by="num_channels")
    text = (tmp_path / "c.svg").read_text()
    labels = [f"{line.name}:  {line.emm.place}  {line.emm_interval}" for line in lines]
    assert labels[0] == "8:  below 16  [below 16] images only" and "95 %" not in text
    for label in labels:
        assert f"<!-- {label} -->" in text


@pytest.mark.parametrize("interpolation", ["logit", "linear"])
def test_a_line_passes_where_emm_is(tmp_path, interpolation):
    """Of two sizes the fit passes through both ratios: the drawn line has the level at EMM, markers at the sizes."""
    [line], _ = curve_lines(points(study(tmp_path / "runs", {16: [0.99, 0.6]})), interpolation=interpolation)
    drawn = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("memorization.curve.figures.save_figure", lambda fig, path: drawn.append(fig))
        curve_figure([line], tmp_path / "c.png")
    curve = drawn[0].axes[0].containers[0].lines[0]
    x, y = curve.get_data()
    assert x[:: curve.get_markevery()] == pytest.approx([16, 64])
    assert y[:: curve.get_markevery()] == pytest.approx([99, 60])
    assert np.interp(np.log(line.emm.size), np.log(x), y) == pytest.approx(90, abs=0.3)
    write_curve_csv([line], tmp_path / "c.csv")
    [again] = read_curve_csv(tmp_path / "c.csv")
    assert again.interpolation == interpolation
    for name, each in {"a": line, "b": again}.items():
        curve_figure([each], tmp_path / f"{name}.png")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_a_line_that_reaches_all_or_nothing_is_drawn(tmp_path):
    lines, _ = curve_lines(
        points(study(tmp_path / "runs", {16: [1.0, 0.0], 32: [0.0, 0.0], 64: [1.0, 1.0]})), "num_channels"
    )
    with pytest.MonkeyPatch.context() as patch:
        drawn = []
        patch.setattr("memorization.curve.figures.save_figure", lambda fig, path: drawn.append(fig))
        curve_figure(lines, tmp_path / "c.png", by="num_channels")
    for container, ends in zip(drawn[0].axes[0].containers, [(100, 0), (0, 0), (100, 100)], strict=True):
        y = container.lines[0].get_ydata()
        assert (y[0], y[-1]) == ends and np.isfinite(y).all() and (0 <= y).all() and (y <= 100).all()
        assert ends[0] != ends[1] or (y == ends[0]).all()  # level where the ratios are equal


def test_a_line_goes_no_way_around(tmp_path):
    """From point to point it rises or falls, whatever the numbers of images are."""
    counts = ((8, 1, 12), (16, 0, 3), (32, 2999, 3000), (64, 3, 3))
    runs = [write_run(tmp_path / f"{size}", size, [k], n) for size, k, n in counts]
    lines, _ = curve_lines(map(read_run, runs))
    with pytest.MonkeyPatch.context() as patch:
        drawn = []
        patch.setattr("memorization.curve.figures.save_figure", lambda fig, path: drawn.append(fig))
        curve_figure(lines, tmp_path / "c.png")
    curve = drawn[0].axes[0].containers[0].lines[0]
    y, step = curve.get_ydata(), curve.get_markevery()
    for start in range(0, len(y) - 1, step):
        assert (np.diff(y[start : start + step + 1]) * np.sign(y[start + step] - y[start]) >= 0).all()


def test_lines_of_one_name_and_names_that_a_legend_leaves_out(tmp_path, run_cli):
    """No attention and attention at no resolution are both "none"; a name may begin with an underscore."""
    runs = tmp_path / "runs"
    for folder, value in (("a", None), ("_b", [])):
        for size, counts in ((16, [50, 95]), (64, [5, 30])):
            write_run(runs / folder / str(size), size, counts, 100, command={"attn_resolutions": value})
    for program in ("curve", "trajectory", "timescales"):
        first, again = tmp_path / f"{program}.png", tmp_path / "again.png"
        run_cli(cli.main, [program, runs, "--by=attn_resolutions", f"--out={first}"])
        by = ["--by=attn_resolutions"] if program != "trajectory" else []
        table = first.with_suffix(".csv")
        run_cli(cli.main, [program, f"--from-csv={table}", *(by if program == "curve" else []), f"--out={again}"])
        assert again.read_bytes() == first.read_bytes()
    lines, _ = curve_lines(points(runs), "folder")
    with pytest.MonkeyPatch.context() as patch:
        drawn = []
        patch.setattr("memorization.curve.figures.save_figure", lambda fig, path: drawn.append(fig))
        curve_figure(lines, tmp_path / "c.png", by="folder")
    assert [text.get_text().split(":")[0] for text in drawn[0].legends[0].get_texts()] == [" _b", "a"]


def test_lines_of_one_size_stand_beside_each_other(tmp_path):
    """Over the values; at one |D| their intervals would hide each other."""
    study(tmp_path / "runs", {8: [0.8], 16: [0.9], 32: [0.95]}, sizes=(16,))
    lines, _ = curve_lines(points(tmp_path / "runs"), "num_channels")
    with pytest.MonkeyPatch.context() as patch:
        drawn = []
        patch.setattr("memorization.curve.figures.save_figure", lambda fig, path: drawn.append(fig))
        curve_figure(lines, tmp_path / "c.png", by="num_channels")
    [ax] = drawn[0].axes
    assert [text.get_text() for text in ax.get_xticklabels()] == ["8", "16", "32"]
    x, y = ax.containers[0].lines[0].get_data()
    assert list(x) == [0, 1, 2] and y == pytest.approx([80, 90, 95])
    assert ax.get_xlabel() == "num_channels, |D| = 16; intervals of the images only"
    curve_figure([replace(lines[0], name=r"a$\frac$b"), *lines[1:]], tmp_path / "c.png")  # a name, no formula
    assert (tmp_path / "c.png").exists()


@pytest.mark.parametrize("values", [list(range(9)), list("abcdefghi"), [True, False]])
def test_lines_can_be_told_apart(values):
    """Each has its own marker and colour; neighbours differ in grey, or in dashes."""
    styles = line_styles(values)
    assert len({style["marker"] for style in styles}) == len(values)
    assert len({str(style["color"]) for style in styles}) == len(values)
    from matplotlib.colors import to_rgb

    grey = [np.dot(to_rgb(style["color"]), [0.299, 0.587, 0.114]) for style in styles]
    for (a, b), (i, j) in zip(zip(grey, grey[1:]), zip(styles, styles[1:])):
        assert abs(a - b) > 0.1 or i["linestyle"] != j["linestyle"] or all(np.diff(grey) > 0.03)


def test_nothing_to_draw(tmp_path):
    for figure in (curve_figure, trajectory_figure):
        with pytest.raises(ValueError, match="There are no"):
            figure([], tmp_path / "c.png")
    lines, _ = curve_lines(points(study(tmp_path / "runs", {16: [0.9, 0.8]})))
    with pytest.raises(ValueError, match="format"):
        curve_figure(lines, tmp_path / "c.doc")
    assert [p.name for p in tmp_path.iterdir()] == ["runs"]


def test_one_snapshot_is_a_point_and_the_level_has_its_number(tmp_path):
    """Runs with one snapshot each: no line, and the axis of the epochs begins at 0."""
    drawn = []

    def keep(fig, path):
        drawn.append(fig)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("memorization.curve.figures.save_figure", keep)
        runs = points(study(tmp_path / "runs", {8: [0.95, 0.3], 16: [1.0, 0.8]}, sizes=(16, 17)))
        trajectory_figure(trajectories(runs, "num_channels")[0], tmp_path / "t.png")
        curve_figure(curve_lines(runs, "num_channels")[0], tmp_path / "c.png")
    for fig in drawn:
        assert "90 %" in [text.get_text() for text in fig.axes[0].texts]
        fig.draw_without_rendering()
        legend = fig.legends[0].get_window_extent()
        assert legend.y1 < fig.axes[0].get_window_extent().y0  # below, where it takes no width
        assert legend.width <= fig.bbox.width
    ax = drawn[0].axes[0]
    assert ax.get_xlim()[0] == 0 and all(
        line.get_linestyle() == "None" for line in ax.lines[1:] if len(line.get_xdata()) > 1
    )
    assert len(ax.containers) == 4
