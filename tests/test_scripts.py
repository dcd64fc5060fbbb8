"""The factor scripts: each goes through all its steps in a tiny setting, and plans what was published."""

import csv
import json
import os
import re
import subprocess
from pathlib import Path

import numpy as np
import pytest
from builders import forking_python
from conftest import ROOT

SCRIPTS = sorted(p.stem for p in (ROOT / "scripts").glob("*_*.sh") if "study.sh" in p.read_text())

# One small size and few values of each factor.
TINY = {
    "cond_labels": {"LABELS": "none true random-2 unique"},
    "cond_unique_50k": {},
    "data_classes": {"CLASSES": "2 5"},
    "data_dimension": {"SOURCE": "digits", "RESOLUTIONS": "8 4"},
    "data_intra_diversity": {"ALPHAS": "0 0.5", "MIX": "digits"},
    "data_size": {"SIZES": "10 12"},
    "model_depth": {"DEPTHS": "1 2", "RATES": "1e-2"},
    "model_embedding": {},
    "model_skip_position": {"SKIPS": "100000 000001", "NETWORK": "ncsnpp"},
    "model_skip_resolution": {"SKIPS": "111111 110000"},
    "model_width": {"WIDTHS": "8 12", "SEEDS": "1 2", "RATES": "1e-4 1e-2"},
    "time_scales": {"SIZES": "10 20", "STEPS": "10", "HELD_OUT": "60"},
    "train_batch": {"BATCHES": "100 200"},
    "train_ema": {"RATIOS": "0.99 0"},
    "train_weight_decay": {"DECAYS": "0 1e-2"},
}
# Whose tiny values have the basic setting among them.
COMPARED = {
    "cond_labels", "cond_unique_50k", "data_dimension", "data_intra_diversity", "model_depth", "model_embedding",
    "model_skip_resolution", "train_ema", "train_weight_decay",
}  # fmt: skip
LARGE = "--batch=200"  # few steps
LINES = {"cond_labels": 4, "data_size": 1, "time_scales": 1}  # of the figure; the others have two


@pytest.fixture
def python():
    return forking_python()


def shell(script, env, code=0):
    done = subprocess.run(
        ["bash", f"scripts/{script}.sh"], cwd=ROOT, env=os.environ | env, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_every_script_has_a_tiny_setting_and_a_line_in_the_table():
    assert sorted(TINY) == SCRIPTS
    table = (ROOT / "scripts/README.md").read_text()
    for script in SCRIPTS:
        assert len(re.findall(rf"^\| `{script}.sh` \|.*\|$", table, flags=re.M)) == 1, script


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS)
def test_factor_in_a_tiny_setting(script, python, tmp_path):
    env = {
        "SCALE": "small", "SIZES": "10", "SEEDS": "1", "DURATION": "0.05", "SAMPLES": "8", "JOBS": "1",
        "PYTHON": python, "OUT": str(tmp_path / "out"), "DATASETS": str(tmp_path / "data"), "MEASURE": "--steps=3",
        "TRAIN": " ".join(["--num-channels=8"] * (script != "model_width") + [LARGE] * (script != "train_batch")),
    } | TINY[script]  # fmt: skip
    text = shell(script, env)

    runs = [p.parent for p in (tmp_path / "out/runs").glob("*/*/training_options.json")]
    assert text.count(": training (log:") == len(runs) >= 2
    for run in runs:
        assert json.loads((run / "run-state.json").read_text())["state"] == "complete"
        assert json.loads((run / "mem_traj.jsonl").read_text().splitlines()[-1])["num_samples"] == 8
    tables = [path for path in (tmp_path / "out").glob("*.csv") if not path.stem.endswith("-effects")]
    (table,) = tables if script != "cond_unique_50k" else [tmp_path / f"out/{script}.csv"]
    assert ("Against " in text) == table.with_name(f"{table.stem}-effects.csv").is_file() == (script in COMPARED)
    assert table.with_suffix(".png").is_file()
    with open(table) as file:
        rows = list(csv.DictReader(file))
    key = next(iter(rows[0]))
    assert len({row[key] for row in rows} if script != "data_size" else {1}) == LINES.get(script, 2)
    assert sum(int(row["runs"]) for row in rows) == len(runs)

    if script == "model_width":  # the learning rate by the training loss; and what is done is not done again
        assert {p.parent.name for p in (tmp_path / "out/tune").glob("*/10")} == {"8", "12"}
        rates = {json.loads((run / "training_options.json").read_text())["command"]["lr"] for run in runs}
        assert rates == {1e-2} and text.count("learning rate 0.01") == len(runs)
        assert shell(script, env | {"PART": "rates", "TASK": "4"}).count("learning rate") == 1  # only said
        assert "one of the 4 runs" in shell(script, env | {"PART": "rates", "TASK": "5"}, code=2)
        again = shell(script, env)
        assert "training (log" not in again and again.count("R_mem") >= len(runs)


@pytest.mark.slow
def test_an_interrupted_run_continues(python, tmp_path):
    env = {
        "SCALE": "small",
        "SIZES": "10",
        "SEEDS": "1",
        "SAMPLES": "4",
        "WIDTHS": "8",
        "RATES": "1e-2",
        "PYTHON": python,
        "JOBS": "1",
    }
    env |= {"OUT": str(tmp_path / "out"), "DATASETS": str(tmp_path / "data"), "TRAIN": "--tick=1 --dump=1 --batch=100"}
    run = tmp_path / "out/runs/8/10-seed1"
    shell("model_width", env | {"DURATION": "16"})
    first = sorted(run.glob("training-state-*.pt"))[0]
    for path in [*run.glob("*.pt"), run / "mem_traj.jsonl", *run.glob("network-snapshot-*")]:
        if path != first:
            path.unlink()
    (run / "run-state.json").write_text('{"state": "stopped", "kimg": 1}')
    shell("model_width", env | {"DURATION": "16"})
    assert first.name in (run / "job.log").read_text()
    assert json.loads((run / "run-state.json").read_text())["state"] == "complete"
    # Of more epochs it goes on from its end, and is measured there; it is not trained for fewer.
    text = shell("model_width", env | {"DURATION": "20"})
    assert "goes on, duration 16.0 to 20.0" in text and text.count("goes on") == 1
    state = json.loads((run / "run-state.json").read_text())
    assert state["state"] == "complete" and state["kimg"] == pytest.approx(4, abs=0.1)
    assert {json.loads(line)["kimg"] for line in (run / "mem_traj.jsonl").read_text().splitlines()} >= {state["kimg"]}
    assert "goes on" not in shell("model_width", env | {"DURATION": "20"})
    text = shell("model_width", env | {"DURATION": "16"}, code=123)
    assert "was trained with other options (duration 20.0, not 16.0)" in text


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "runs", "images"),
    [
        ("model_width", 24, 2480),  # 4 widths, 6 sizes, 40,000 epochs each
        ("train_batch", 21, 1680),
        ("train_ema", 27, 2160),
        ("model_skip_position", 9, 360),
        ("model_skip_resolution", 22, 880),
        ("cond_unique_50k", 2, 1200),  # 12,000 epochs
    ],
)
def test_plan_at_paper_scale(script, runs, images):
    text = shell(script, {"PLAN": "1", "PYTHON": "true"})  # nothing is timed
    assert f"(paper): {runs} runs, {images} million training images." in text


@pytest.mark.slow
def test_wrong_values_are_refused():
    env = {"SCALE": "small", "TRAIN": "--batch=8 --lr=1e-3", "DATASETS": "/nowhere", "PYTHON": "true"}
    assert "leave --lr out of TRAIN" in shell("model_width", env, code=2)
    env = {"SCALE": "small", "RATES": "1e-2 5e-3 0.01", "DATASETS": "/nowhere", "PYTHON": "true"}
    assert "has a learning rate twice" in shell("model_depth", env, code=2)
    assert '"abc" is no learning rate' in shell("model_depth", env | {"RATES": "1e-2 abc"}, code=2)
    assert "it is rates, with TASK=N" in shell("model_depth", env | {"RATES": "", "PART": "rate", "TASK": "1"}, code=2)
    for wrong in ("1e-2/16", "0", "1e-400", "1e400"):
        text = shell("train_batch", env | {"RATES": "", "LR": wrong}, code=2)
        assert f'LR="{wrong}": "{wrong}" is no learning rate' in text
    for both in ({"RATES": "1e-2"}, {"RATES": "", "TRAIN": "--lr=1e-3"}):
        assert "choose one of the two" in shell("train_batch", env | {"LR": "1e-3"} | both, code=2)
        assert "are not in proportion" in shell("train_batch", env | both | {"PREPARE": "1"})
    assert "proportion" not in shell("train_batch", env | {"RATES": "", "TRAIN": "", "PREPARE": "1"})
    text = shell("model_width", env | {"RATES": "", "AGAINST": "17"}, code=2)
    assert "AGAINST=17 is none of the values: 16 32 8" in text
    assert "choose small, medium or paper" in shell("model_width", {"SCALE": "large"}, code=2)
    for wrong in ("0", "abc"):
        assert f"SNAPS={wrong}: choose a number" in shell("data_size", env | {"SNAPS": wrong}, code=2)
    assert "choose ddpmpp or ncsnpp" in shell("model_skip_position", {"NETWORK": "adm", "PLAN": "1"}, code=2)
    assert "from 1 to 24" in shell("model_width", {"TASK": "25", "DATASETS": "/nowhere", "PYTHON": "true"}, code=2)
    assert "choose none, true" in shell("cond_labels", {"LABELS": "false", "PLAN": "1"}, code=2)


def test_half_of_the_training_is_measured_unless_the_options_say_when():
    each = 'for options in "" "--tick=2 --snap=2" "--snap-at=log:3"; do echo "<$(snapshots "$options")>"; done'
    for env, said in [
        ({"SCALE": "small"}, ["--snap-at=even:2", "", ""]),
        ({"SCALE": "medium", "SNAPS": "3"}, ["--snap-at=even:3", "", ""]),
        ({"SCALE": "small", "TRAIN": "--tick=1 --snap=3"}, ["", "", ""]),
        ({"SCALE": "paper"}, ["", "", ""]),
    ]:
        done = subprocess.run(
            ["bash", "-c", f"source scripts/study.sh; {each}"],
            cwd=ROOT,
            env=os.environ | env,
            capture_output=True,
            text=True,
        )
        assert done.stdout.splitlines() == [f"<{option}>" for option in said], done.stderr


@pytest.mark.slow
def test_a_plan_times_the_networks_and_leaves_nothing(python, tmp_path):
    env = {"SCALE": "small", "SIZES": "10 20", "WIDTHS": "8", "SEEDS": "1 2", "PYTHON": python, "PLAN": "1"}
    env |= {"OUT": str(tmp_path / "out"), "DATASETS": str(tmp_path / "data"), "TRAIN": "--batch=8", "RATES": "1e-3"}
    text = shell("model_width", env)
    assert "(small): 4 runs" in text and "(8x8x1, fp32)" in text and re.search(r"timed: \d+ steps? of 8 images\)", text)
    assert re.search(r"\|D\| = 20, 8, seeds 1 2: training \d.*, measuring \d.* \(2 snapshots\) each", text)
    assert "for 4 runs, one after the other" in text and "with 2 at a time" in text
    assert not list(tmp_path.iterdir())
    wrong = shell("model_width", env | {"TRAIN": "--batch=0"}, code=1)
    assert "Error: 8, |D| = 10: Invalid value for '--batch'" in wrong and "Traceback" not in wrong


FASHION = Path("/usr/share/datasets/fashion-mnist/train-images-idx3-ubyte.gz")


@pytest.mark.slow
@pytest.mark.skipif(not FASHION.exists(), reason="Fashion-MNIST is not installed (dataset-fashion-mnist)")
@pytest.mark.parametrize("script", ["data_intra_diversity", "time_scales"])
def test_medium_scale_takes_fashion_mnist_at_16x16(script, python, tmp_path):
    env = {
        "SCALE": "medium", "SIZES": "10", "SEEDS": "1", "DURATION": "0.05", "SAMPLES": "8", "JOBS": "1",
        "PYTHON": python, "OUT": str(tmp_path / "out"), "DATASETS": str(tmp_path / "data"), "MEASURE": "--steps=3",
        "TRAIN": f"--num-channels=8 {LARGE} --device=cpu", "HELD_OUT": "60", "ALPHAS": "0.5",
    }  # fmt: skip
    shell(script, env | ({"STEPS": "10"} if script == "time_scales" else {}))
    (run,) = (p.parent for p in (tmp_path / "out/runs").glob("*/*/training_options.json"))
    options = json.loads((run / "training_options.json").read_text())
    assert options["dataset_kwargs"]["resolution"] == 16 and options["command"]["attn_resolutions"] == [8]
    assert json.loads((run / "run-state.json").read_text())["state"] == "complete" and (run / "mem_traj.jsonl").exists()


@pytest.mark.slow
def test_a_run_on_another_source_is_refused(python, tmp_path):
    digits = np.arange(40 * 64).reshape(40, 8, 8) % 251
    source, run = tmp_path / "source.npz", tmp_path / "out/runs/8/10-seed1"
    env = {
        "SCALE": "small", "SIZES": "10", "SEEDS": "1", "SAMPLES": "4", "WIDTHS": "8", "RATES": "1e-2", "PYTHON": python,
        "JOBS": "1", "OUT": str(tmp_path / "out"), "DATASETS": str(tmp_path / "data"), "DURATION": "0.05",
        "SOURCE": str(source), "TRAIN": LARGE, "MEASURE": "--steps=3",
    }  # fmt: skip
    np.savez(source, images=digits.astype(np.uint8), labels=np.arange(40) % 10)
    shell("model_width", env)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file() and path.stem != "job"}
    np.savez(source, images=(255 - digits).astype(np.uint8), labels=np.arange(40) % 10)
    text = shell("model_width", env, code=123)  # of xargs: a command failed
    assert "is not what the network was trained on" in text and "set OUT to another" in text
    assert "training (log" not in text and "R_mem" not in text
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file() and path.stem != "job"} == before
    np.savez(source, images=digits.astype(np.uint8), labels=np.arange(40) % 10)
    text = shell("model_width", env | {"RATES": "2e-2"}, code=123)
    assert "was trained with other options (lr 0.01, not 0.02). Move that folder away" in text and "R_mem" not in text
    text = shell("model_width", env)
    assert "training (log" not in text and "R_mem" in text
