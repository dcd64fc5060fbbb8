"""Memorization by group over the training of a run, on records that the test writes."""

import csv
import json

import pytest
from PIL import Image

import outlier_study
from memorization.curve.group_curves import group_curves, half_epoch
from memorization.runs import read_run
from memorization.stats.intervals import wilson_interval


def row(num_memorized, num_nearest, num_training, num_replayed):
    return {
        "num_nearest": num_nearest, "num_memorized": num_memorized, "num_training": num_training,
        "memorized_per_training": num_memorized / num_training, "num_replayed": num_replayed,
        "ratio": num_memorized / num_nearest if num_nearest else None, "ci_low": None, "ci_high": None,
    }  # fmt: skip


def write_run(folder, groups_by_kimg, size=100, samples=200):
    """A measured run of `size` training images; kimg 1 is 10 epochs."""
    folder.mkdir()
    options = {"dataset_kwargs": {"max_size": size, "path": "set.zip"}, "total_nimg": 5000}
    (folder / "training_options.json").write_text(json.dumps(options))
    with open(folder / "mem_traj.jsonl", "w") as file:
        for kimg, groups in groups_by_kimg.items():
            memorized = sum(g["num_memorized"] for g in groups.values())
            record = {
                "snapshot": f"network-snapshot-{kimg:06d}.safetensors", "kimg": kimg, "num_samples": samples,
                "num_memorized": memorized, "ratio": memorized / samples, "mean_distance": 1.0, "seeds": "0-199",
                "groups": groups, "reference_size": 80,
            }  # fmt: skip
            file.write(json.dumps(record) + "\n")
    return folder


@pytest.fixture
def run(tmp_path):
    return write_run(
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


def test_half_of_the_highest_share(run):
    curves = group_curves(read_run(run))
    assert half_epoch(curves["duplicate"]) == 10  # at half with the first snapshot
    assert half_epoch(curves["inlier"]) == pytest.approx(10 + 10 * 60 / 80)
    assert half_epoch(curves["outlier"]) == pytest.approx(20 + 10 * 8 / 18)
    assert half_epoch(curves["outlier"][:1]) is None


def test_command_draws_and_tells(run, run_cli, tmp_path):
    out = tmp_path / "figures" / "groups.png"
    text = run_cli(outlier_study.main, ["images", run, f"--out={out}", "--title=Digits"]).output
    lines = {line.split()[0]: line.split() for line in text.splitlines() if line}
    assert lines["outlier"][1] == "5" and lines["outlier"][-1] == "24"
    assert lines["duplicate"][-1] == "10"
    with open(out.with_suffix(".csv")) as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 9
    assert float(rows[-1]["share"]) == pytest.approx(20 / 5 / 2.5)
    with Image.open(out) as image:
        assert image.width > 1000


def test_what_cannot_be_drawn(run_cli, tmp_path):
    plain = write_run(tmp_path / "plain", {1: {}})
    assert "dataset_inject.py" in run_cli(outlier_study.main, ["images", plain], 1).output
    assert not list(plain.glob("groups*"))
    damaged = write_run(tmp_path / "damaged", {1: {"inlier": {"num_memorized": 1, "num_training": 3}}})
    assert "measure the run again" in run_cli(outlier_study.main, ["images", damaged], 1).output
    wrong = write_run(tmp_path / "wrong", {1: {"inlier": row(1, 1, 0.5, 1) | {"num_training": 0}}})
    assert "measure the run again" in run_cli(outlier_study.main, ["images", wrong], 1).output
