"""Memorization by group over the training of a run, on records that the test writes."""

import csv

import numpy as np
import pytest
from builders import write_run
from PIL import Image

import outlier_study
from memorization.curve.group_curves import GroupPoint, group_curves, group_timing, half_epoch, pooled
from memorization.runs import read_run
from memorization.stats.intervals import wilson_interval


def row(num_memorized, num_nearest, num_training, num_replayed):
    return {
        "num_nearest": num_nearest, "num_memorized": num_memorized, "num_training": num_training,
        "memorized_per_training": num_memorized / num_training, "num_replayed": num_replayed,
        "ratio": num_memorized / num_nearest if num_nearest else None, "ci_low": None, "ci_high": None,
    }  # fmt: skip


def groups_run(folder, groups_by_kimg, size=100, samples=200):
    """A measured run of `size` training images; kimg 1 is 10 epochs."""
    records = []
    for kimg, groups in groups_by_kimg.items():
        memorized = sum(g["num_memorized"] for g in groups.values())
        records.append({
            "snapshot": f"network-snapshot-{kimg:06d}.safetensors", "kimg": kimg, "num_samples": samples,
            "num_memorized": memorized, "ratio": memorized / samples, "mean_distance": 1.0, "seeds": "0-199",
            "groups": groups, "reference_size": 80,
        })  # fmt: skip
    return write_run(folder, size, [], total_nimg=5000, extra=records)


@pytest.fixture
def run(tmp_path):
    return groups_run(
        tmp_path / "run",
        {
            3: {"duplicate": row(20, 20, 5, 5), "inlier": row(120, 140, 70, 60), "outlier": row(20, 20, 5, 4)},
            1: {"duplicate": row(10, 20, 5, 4), "inlier": row(0, 160, 70, 0), "outlier": row(0, 0, 5, 0)},
            2: {"duplicate": row(20, 20, 5, 5), "inlier": row(80, 150, 70, 50), "outlier": row(2, 10, 5, 1)},
        },
    )


def test_shares_are_copies_per_training_image(run):
    curves = group_curves(read_run(run))
    assert [p.kimg for p in curves["inlier"]] == [1, 2, 3]
    assert [p.epochs for p in curves["inlier"]] == [10, 20, 30]
    last = {name: points[-1] for name, points in curves.items()}
    # 200 generated images for 80 training images: 2.5 each on average.
    assert last["duplicate"].share == pytest.approx(20 / 5 / 2.5)
    assert last["inlier"].share == pytest.approx(120 / 70 / 2.5)
    low, high = wilson_interval(20, 200)
    assert last["outlier"].interval == pytest.approx((low * 80 / 5, high * 80 / 5))
    assert last["inlier"].ratio == pytest.approx(120 / 140)


def test_half_of_the_rise(tmp_path):
    """10 epochs per kimg; all duplicates are copied from 25 epochs on, outliers not at all."""
    groups = {}
    for kimg in range(1, 11):
        groups[kimg] = {"duplicate": row(20 * (kimg > 2), 20, 5, 5), "inlier": row(6 * kimg, 140, 70, 60)}
        groups[kimg]["outlier"] = row(0, 9, 5, 0)
    curves = group_curves(read_run(groups_run(tmp_path / "run", groups)))
    assert 20 < half_epoch(curves["duplicate"]) < 30 < half_epoch(curves["inlier"]) < 90
    assert half_epoch(curves["outlier"]) is None


def test_several_runs_are_one_with_their_counts_added(run):
    curves = group_curves(read_run(run))
    both = pooled([curves, curves])
    assert [p.share for p in both["outlier"]] == [p.share for p in curves["outlier"]]
    assert both["inlier"][2].num_samples == 400 and both["inlier"][2].interval[0] > curves["inlier"][2].interval[0]
    with pytest.raises(ValueError, match="same snapshots"):
        pooled([curves, {name: points[:2] for name, points in curves.items()}])


def seeds_of_one_setting(rng, outlier_half, count=8):
    """Runs in which inliers are half copied at 40 epochs, and each run is a little earlier or later as a whole."""

    def points(name, number, size, half):
        epochs = 10.0 * np.arange(1, 16)
        memorized = rng.binomial(200, number / 200 / (1 + (half / epochs) ** 4))
        return [GroupPoint(e / 10, e, m, m, 1, size, 200, 75) for e, m in zip(epochs, memorized.tolist())]

    shifts = np.exp(0.1 * rng.standard_normal(count))
    return [
        dict(inlier=points("inlier", 120, 70, 40 * s), outlier=points("outlier", 20, 5, outlier_half * s))
        for s in shifts
    ]


def test_timing_over_runs():
    rng = np.random.default_rng(0)
    equal = [group_timing(seeds_of_one_setting(rng, 40), "outlier").answer for _ in range(100)]
    assert equal.count("later") + equal.count("earlier") <= 11  # 99 % of binomial(100, 0.05)
    later = [group_timing(seeds_of_one_setting(rng, 80), "outlier").answer for _ in range(20)]
    assert later.count("later") >= 18
    assert group_timing(seeds_of_one_setting(rng, 40), "duplicate").answer == "none"
    assert group_timing(seeds_of_one_setting(rng, 80, count=5), "outlier").answer == "not shown"


def test_command_draws_and_tells(run, run_cli, tmp_path):
    out = tmp_path / "figures" / "groups.png"
    text = run_cli(outlier_study.main, ["images", run, f"--out={out}", "--title=Digits"]).output
    lines = {line.split()[0]: line.split() for line in text.splitlines() if line}
    assert lines["outlier"][1] == "5" and 10 < float(lines["outlier"][-1]) < 30
    assert "Outliers later? Cannot be told: it takes at least 6 runs, and there are 1." in text
    text = run_cli(outlier_study.main, ["images", *[run] * 8, f"--out={out}"]).output
    assert "Outliers later? Yes (two-sided p = 0.0078)." in text
    with open(out.with_suffix(".csv")) as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 9
    assert float(rows[-1]["share"]) == pytest.approx(20 / 5 / 2.5)
    with Image.open(out) as image:
        assert image.width > 1000


def test_figure_again_from_its_table(run, run_cli, tmp_path):
    first, again = tmp_path / "a.png", tmp_path / "b.png"
    text = run_cli(outlier_study.main, ["images", run, f"--out={first}"]).output
    args = ["images", f"--from-csv={tmp_path / 'a.csv'}", f"--out={again}"]
    lines = run_cli(outlier_study.main, args).output.splitlines()
    assert lines[:4] == text.splitlines()[:4] and again.read_bytes() == first.read_bytes()
    assert "either runs" in run_cli(outlier_study.main, [*args, run], 2).output
    assert "either runs" in run_cli(outlier_study.main, ["images"], 2).output
    (tmp_path / "a.csv").write_text("group,kimg\ninlier,1\n")
    assert "no table of groups" in run_cli(outlier_study.main, args, 1).output


def test_what_cannot_be_drawn(run_cli, tmp_path):
    plain = groups_run(tmp_path / "plain", {1: {}})
    assert "dataset_inject.py" in run_cli(outlier_study.main, ["images", plain], 1).output
    assert not list(plain.glob("groups*"))
    damaged = groups_run(tmp_path / "damaged", {1: {"inlier": {"num_memorized": 1, "num_training": 3}}})
    assert "measure the run again" in run_cli(outlier_study.main, ["images", damaged], 1).output
    wrong = groups_run(tmp_path / "wrong", {1: {"inlier": row(1, 1, 0.5, 1) | {"num_training": 0}}})
    assert "measure the run again" in run_cli(outlier_study.main, ["images", wrong], 1).output
