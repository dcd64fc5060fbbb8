"""The two clocks: times at which a curve passes a level, their intervals over seeds, the slope, the commands; disjoint
parts of a source."""

import csv
import json
import math
from pathlib import Path

import numpy as np
import pytest
from builders import write_run

import dataset_tool
import emm as cli
from benchmarks.bench_timescales import coverage
from dataset_utils.sources import Source
from dataset_utils.subsets import part
from memorization.stats.timescales import (
    RunTime,
    Time,
    _cubic_share,
    _isotonic,
    fall,
    falling_time,
    fit_slope,
    rise,
    rising_time,
    size_times,
)


def test_a_logistic_rise_is_found_between_snapshots():
    """On the logit scale over log t the curve is a line, so the time is exact, however far apart snapshots are."""
    t = np.array([10.0, 100.0, 1000.0, 10000.0])
    ratio = 1 / (1 + 9 * (320 / t) ** 1.5)  # 10 % at 320
    assert rising_time(t, ratio, [10**9] * 4, 0.1).value == pytest.approx(320)
    assert str(rising_time(t, ratio, [10**9] * 4, 0.1)) == "320"
    assert rising_time(t, ratio, [1000] * 4, 1 / (1 + 9 * 0.1**1.5)).value == pytest.approx(3200)


def test_isotonic_regression():
    """The max-min formula: y_i is the highest over a <= i of the lowest over b >= i of the means of a..b."""
    rng = np.random.default_rng(0)
    for n in (1, 2, 7, 20):
        y = np.linspace(0, 1, n) + rng.normal(0, 0.5, n)
        expected = [max(min(y[a : b + 1].mean() for b in range(i, n)) for a in range(i + 1)) for i in range(n)]
        np.testing.assert_allclose(_isotonic(y), expected, atol=1e-12)


def test_monotone_cubic():
    """Between snapshots as scipy's."""
    from scipy.interpolate import PchipInterpolator

    rng = np.random.default_rng(0)
    for _ in range(20):
        x, y = np.sort(rng.uniform(0, 5, 6)), np.sort(rng.exponential(1, 6))
        for i in range(1, 6):
            at = 0.3 * y[i - 1] + 0.7 * y[i]
            found = x[i - 1] + _cubic_share(x, y, i, at) * (x[i] - x[i - 1])
            assert PchipInterpolator(x, y)(found) == pytest.approx(at, abs=2e-3 * (y[i] - y[i - 1]))


def test_early_noise_does_not_cross():
    """One snapshot above the level, all that follow below it: what counts is the lasting rise."""
    found = rising_time([1, 2, 3, 4, 5, 6, 7], [0, 0.12, 0, 0, 0.02, 0.5, 0.9], [100] * 7, 0.1)
    assert 5 < found.value < 6


def test_bounds():
    never, always = rise([10, 20], [0, 3], [100, 100], 0.1), rise([10, 20], [50, 60], [100, 100], 0.1)
    assert (never.time, never.high) == (Time(20, "beyond"), Time(20, "beyond"))
    assert always.time == always.low == Time(10, "at most") and str(always.time) == "at most 10"
    assert never.low == never.time or never.low.value <= 20
    with pytest.raises(ValueError, match="level of tau_mem"):
        rise([10, 20], [0, 3], [100, 100], 1)
    with pytest.raises(ValueError, match="ascending"):
        rise([20, 10], [0, 3], [100, 100], 0.5)


def test_interval_of_a_rise_is_that_of_its_snapshots():
    """10 % [7.9, 12.6] of 655 Wilson: the times at which the ends of the intervals are at the level."""
    t = np.geomspace(100, 1000, 30)
    ratio = 1 / (1 + 9 * (300 / t) ** 2)
    found = rise(t, np.round(ratio * 1000).astype(int), [1000] * 30, 0.1)
    assert found.low.value < found.time.value < found.high.value
    half = 1.96 * math.sqrt(0.1 * 0.9 / 1000) / (0.1 * 0.9 * 2)  # sd of the logit over its slope 2 in log t
    assert math.log(found.high.value / found.low.value) == pytest.approx(2 * half, rel=0.1)


def test_the_best_quality_is_within_its_tolerance():
    """2 + 100 / (1 + (t / 40)^2): within 10 % of 2 where the other part is 0.2."""
    t = np.geomspace(10, 1e5, 40)
    q = 2 + 100 / (1 + (t / 40) ** 2)
    assert falling_time(t, q, 0.1).value == pytest.approx(40 * math.sqrt(499), rel=0.01)
    after = np.concatenate([q, q[::-1][1:]])  # what comes after the best does not matter
    assert falling_time(np.geomspace(10, 1e9, 79), after, 0.1).value == pytest.approx(40 * math.sqrt(499), rel=0.01)
    assert falling_time([1, 2, 3], [0.0, 0.5, 0.4], 0.1).verdict == "at most"
    around_0 = falling_time([1, 2, 3, 4], [5.0, 1.0, 0.2, -0.1], 0.5, [1.0] * 4)  # within 0.5 half widths of -0.1
    assert 2 < around_0.value < 3
    found = fall(t, q, 0.95 * q, 1.05 * q, 0.1)
    assert found.low.value < found.time.value < found.high.value


def test_slope_and_seeds():
    """log tau = log 5 + log |D| exactly, seeds e^+-0.1: slope 1, and the t intervals by hand."""
    by_size = {
        n: [RunTime(*[Time(5 * n * f)] * 3) for f in (math.exp(-0.1), 1.0, math.exp(0.1))] for n in (10, 100, 1000)
    }
    sizes = size_times(by_size)
    half = 2.446912 * 0.1 / math.sqrt(3)  # t of 6 degrees of freedom, sd 0.1 of log tau
    for s in sizes:
        assert not s.images_only and s.time.value == pytest.approx(5 * s.size)
        assert (s.low.value, s.high.value) == pytest.approx(
            (s.time.value * math.exp(-half), s.time.value * math.exp(half))
        )
    slope = fit_slope(sizes)
    error = math.sqrt(0.06 / 7 / (6 * math.log(10) ** 2))
    assert slope.value == pytest.approx(1) and math.exp(slope.constant) == pytest.approx(5)
    assert slope.high - 1 == pytest.approx(2.364624 * error, rel=1e-5)

    by_size[100][0] = RunTime(*[Time(7.0, "beyond")] * 3)
    sizes = size_times(by_size)
    assert sizes[1].time.verdict == "beyond" and sizes[1].reached == 2
    assert fit_slope(sizes).left_out == (100,) and fit_slope(sizes).value == pytest.approx(1)

    single = size_times({n: runs[1:2] for n, runs in by_size.items()})
    assert all(s.images_only for s in single)
    assert fit_slope(single[:1]) is None
    assert math.isnan(fit_slope(single[:2]).low)


def test_coverage():
    """Few studies; the whole table is `benchmarks/bench_timescales.py`."""
    found = coverage(runs=3, images=1000, sd=0.2, snapshots=16, alike=True, studies=20)
    assert found["tau_mem"] >= 0.85 and found["slope_mem"] >= 0.8 and found["slope_gen"] >= 0.8


# ----------------------------------------------------------------------------
# Runs.


def clocks(root: Path, sizes=(64, 256, 1024), seeds=(1, 2, 3), *, measure="frechet", fast=0) -> Path:
    """Runs whose tau_mem is 5 |D| steps times e^(0.1 seed), with quality that is within 10 % of 2 at 893 steps."""
    for size in sizes:
        for seed in seeds:
            steps = np.unique(np.round(np.geomspace(125, 1e5, 12)).astype(int)) * 8
            shift = math.exp(0.1 * (seed - 2))
            ratio = 1 / (1 + 9 * (5 * size * shift / steps) ** 2)
            folder = write_run(
                root / f"{size}-seed{seed}", size, np.round(1000 * ratio).astype(int).tolist(), 1000,
                total_nimg=float(16 * steps[-1]), seed=seed, batch_size=16,
            )  # fmt: skip
            path = folder / "mem_traj.jsonl"
            records = [json.loads(line) for line in path.read_text().splitlines()]
            for record, step in zip(records, steps.tolist()):
                record |= {"kimg": int(step * 16 / 1000), "nimg": step * 16, "snapshot": f"{step}"}
                value = 2 + 100 / (1 + (step / 400) ** 2)
                value = value if measure == "frechet" else 1 / value
                record["quality"] = {
                    "dataset_sha256": "h", "num_reference": 500, "num_samples": 1000, "space": {"name": "pixels"},
                    "measures": {measure: {"value": value, "ci_low": 0.98 * value, "ci_high": 1.02 * value}},
                    "floors": {"heldout": {"num_samples": 500, "measures": {measure: {"value": 1.5}}}},
                }  # fmt: skip
            path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return root


def test_timescales_command(tmp_path, run_cli):
    root = clocks(tmp_path / "runs")
    result = run_cli(cli.main, ["timescales", root, f"--out={tmp_path}/t.png"])
    record = json.loads((tmp_path / "t.json").read_text())["lines"][0]
    mem, gen = record["clocks"]["tau_mem"], record["clocks"]["tau_gen"]
    assert [s["size"] for s in mem["sizes"]] == [64, 256, 1024] and record["axis"] == "steps"
    assert mem["sizes"][2]["time"]["value"] == pytest.approx(5 * 1024, rel=0.05)
    low, high = mem["sizes"][2]["low"]["value"], mem["sizes"][2]["high"]["value"]
    assert low < 5 * 1024 < high and mem["sizes"][2]["interval_of"] == "seeds"
    assert mem["sizes"][0]["time"]["verdict"] == "at most"  # 320 steps, the first snapshot is at 1000
    assert mem["slope"]["left_out"] == [64] and mem["slope"]["value"] == pytest.approx(1, abs=0.1)
    assert gen["slope"]["low"] <= 1e-6 <= gen["slope"]["high"] or abs(gen["slope"]["value"]) < 1e-6
    assert gen["sizes"][1]["time"]["value"] == pytest.approx(400 * math.sqrt(499), rel=0.05)
    assert "there at the first snapshot already in 3 of 3 runs" in result.stderr
    assert "tau_mem ~ |D|^" in result.stdout and "at most 1,000" in result.stdout
    with open(tmp_path / "t.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(r["size"], r["quantity"]) for r in rows][:4] == [
        ("64", "tau_gen"), ("256", "tau_gen"), ("1024", "tau_gen"), ("64", "tau_mem"),
    ]  # fmt: skip
    assert (tmp_path / "t.png").read_bytes()[:4] == b"\x89PNG"
    again = ["timescales", f"--from-csv={tmp_path}/t.csv", f"--out={tmp_path}/again.png"]
    text = run_cli(cli.main, again).stdout.splitlines()[:-1]  # the same times and figure, without the runs
    assert text == result.stdout.splitlines()[: len(text)] and "tau_mem ~ |D|^" in text[-1]
    assert (tmp_path / "again.png").read_bytes() == (tmp_path / "t.png").read_bytes()
    assert "only --title and --out" in run_cli(cli.main, [*again, "--level=0.5"], code=2).stderr
    for name, old, new in (
        ("t", "tau_mem", "tau_cup"), ("t", ",at,", ",near,"), ("t-runs", "1024,", "1025,"), ("t", "steps", "weeks"),
        ("t", ",seeds,3,", ",seeds,0,"), ("t", ",tau_gen,", ",tau_gen,-"), ("t", "64,", f"{2**64},"),
        ("t", "256,tau_mem", "64,tau_mem"), ("t-runs", ",1,1000.0,", ",1,-1000.0,"), ("t-runs", "64,2,", "64,1,"),
    ):  # fmt: skip
        for suffix in ("", "-runs"):
            lines = before = (tmp_path / f"t{suffix}.csv").read_text()
            lines = lines.replace(old, new) if name == f"t{suffix}" else lines
            assert (lines != before) == (name == f"t{suffix}")
            (tmp_path / f"other{suffix}.csv").write_text(lines)
        wrong = ["timescales", f"--from-csv={tmp_path}/other.csv", f"--out={tmp_path}/other.png"]
        assert "no table that emm.py timescales has written" in run_cli(cli.main, wrong, code=1).stderr

    for axis, unit in (("epochs", 1024 / 16),):
        run_cli(cli.main, ["timescales", root, f"--x={axis}", f"--out={tmp_path}/u.png"])
        other = json.loads((tmp_path / "u.json").read_text())["lines"][0]["clocks"]["tau_mem"]["sizes"][2]
        assert other["time"]["value"] * unit == pytest.approx(mem["sizes"][2]["time"]["value"])
    page = tmp_path / "report.html"
    run_cli(cli.main, ["report", root, f"--out={page}"])
    assert "see emm.py timescales: tau_gen ~ |D|^" in page.read_text()
    assert "measured of none" in run_cli(cli.main, ["timescales", root, "--quality=recall"], code=1).stderr


def test_timescales_of_single_runs_without_quality(tmp_path, run_cli):
    """Images only, no tau_gen, and a size that never memorizes is a bound."""
    for size, counts in ((64, [0, 20, 60]), (256, [0, 2, 30]), (1024, [0, 0, 1])):
        write_run(tmp_path / "runs" / str(size), size, counts, 64)
    result = run_cli(cli.main, ["timescales", tmp_path / "runs", f"--out={tmp_path}/t.png"])
    assert "no quality was measured" in result.stderr and "that of the images only" in result.stderr
    assert "tau_mem at |D| = 1024 is not reached by the last snapshot in 1 of 1 runs" in result.stderr
    assert "beyond" in result.stdout and "tau_gen" not in result.stdout
    record = json.loads((tmp_path / "t.json").read_text())["lines"][0]
    assert record["clocks"]["tau_mem"]["slope"]["low"] is None  # two runs lie on a line


def test_more_is_better(tmp_path, run_cli):
    """Coverage rises: the same time, for 1 / q, as 10 % below the best."""
    root = clocks(tmp_path / "runs", sizes=(256, 1024), seeds=(1, 2), measure="coverage")
    run_cli(cli.main, ["timescales", root, f"--out={tmp_path}/t.png"])
    found = json.loads((tmp_path / "t.json").read_text())["lines"][0]["clocks"]["tau_gen"]["sizes"][0]["time"]
    assert found["value"] == pytest.approx(400 * math.sqrt(100 / (2 / 0.9 - 2) - 1), rel=0.05)


def test_trajectory_with_quality(tmp_path, run_cli):
    root = clocks(tmp_path / "runs", seeds=(1, 2))
    args = ["trajectory", root, "--x=steps", "--log", f"--out={tmp_path}/t.png"]
    result = run_cli(cli.main, args)
    assert "best frechet" in result.stdout
    with open(tmp_path / "t.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert float(rows[0]["steps"]) == 1000 and float(rows[0]["quality"]) == pytest.approx(2 + 100 / (1 + 2.5**2))
    again = ["trajectory", f"--from-csv={tmp_path}/t.csv", "--log", f"--out={tmp_path}/again.png"]
    text = run_cli(cli.main, again).stdout.splitlines()  # the same table and figure, without the runs
    assert text[:-1] == result.stdout.splitlines()[: len(text) - 1] and len(text) == 5
    assert (tmp_path / "again.png").read_bytes() == (tmp_path / "t.png").read_bytes()
    assert "only --log, --title and --out" in run_cli(cli.main, [*again, "--level=0.5"], code=2).stderr
    for old, new in (
        ("steps", "weeks"),
        ("frechet", "beauty"),
        (",1000.0,", ",nan,"),
        (",1.5\n", ",inf\n"),
        (",64,", ",0,"),
        (",64,", f",{2**64},"),
        (f",{rows[0]['ratio']},", ",7.5,"),
        (f",{rows[0]['ratio']},", ",-1,"),
    ):
        before = (tmp_path / "t.csv").read_text()
        assert old in before
        (tmp_path / "other.csv").write_text(before.replace(old, new, 1 if "7.5" in new or "-1" in new else -1))
        wrong = ["trajectory", f"--from-csv={tmp_path}/other.csv", f"--out={tmp_path}/other.png"]
        assert "no table that emm.py trajectory has written" in run_cli(cli.main, wrong, code=1).stderr
    path = root / "64-seed1" / "mem_traj.jsonl"
    records = [json.loads(line) for line in path.read_text().splitlines()]
    for record in records:
        record["quality"]["dataset_sha256"] = "other"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    assert "against different images" in run_cli(cli.main, args).stderr
    del records[-1]["quality"]["measures"]["frechet"]["value"]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    assert "quality that cannot be read" in run_cli(cli.main, args, code=1).stderr


# ----------------------------------------------------------------------------
# Disjoint parts.


def test_parts_have_no_image_in_common(tmp_path, run_cli):
    source = Source([str(i) for i in range(11)], lambda i: np.full([4, 4], i, np.uint8))
    halves = [part(source, k, 2).names for k in (0, 1)]
    assert halves == [["0", "2", "4", "6", "8", "10"], ["1", "3", "5", "7", "9"]]
    assert part(source, 1, 2, 3).names == ["1", "3", "5"]
    with pytest.raises(ValueError, match="only 5"):
        part(source, 1, 2, 6)
    dest = tmp_path / "half.zip"
    result = run_cli(dataset_tool.main, ["--source=digits", f"--dest={dest}", "--split=1/2", "--max-images=20"])
    assert "Wrote 20 images" in result.stdout and "Left out: 1777" in result.stdout
    assert "no part" in run_cli(dataset_tool.main, ["--source=digits", f"--dest={dest}", "--split=2/2"], code=2).stderr
