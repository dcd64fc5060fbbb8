"""mem_ratio.py on images and networks of other programs, and what curve and report make of it."""

import json
import subprocess
import sys

import numpy as np
import PIL.Image
import pytest
from click.testing import CliRunner
from conftest import ROOT
from test_api import DIGITS, TRAIN, copies, pipeline  # noqa: F401 (a fixture)
from test_samples import folder

import diffmem
import emm
import mem_ratio


def record(log):
    return json.loads(log.with_suffix(".jsonl").read_text().splitlines()[-1])


@pytest.fixture
def training(tmp_path):
    return folder(tmp_path / "train", TRAIN)


def test_images_of_any_model(training, tmp_path, run_cli):
    np.save(tmp_path / "step-100.npy", copies())
    np.savez(tmp_path / "step-200.npz", copies(10))
    log = tmp_path / "out" / "mem_traj.log"
    args = [f"--images={tmp_path / 'step-100.npy'}", f"--images={tmp_path / 'step-200.npz'}", f"--knn-ref={training}"]
    args += [f"--log={log}", "--label=sampler=ddim", "--device=cpu", f"--grid={tmp_path / 'g.png'}", "--threshold=0.5"]
    out = run_cli(mem_ratio.main, args).stdout
    assert "step-100.npy  R_mem" in out and (tmp_path / "g.png").exists()
    records = [json.loads(line) for line in log.with_suffix(".jsonl").read_text().splitlines()]
    by_name = {r["snapshot"]: r for r in records}
    for name, images in (("step-100.npy", copies()), ("step-200.npz", copies(10))):
        expected = diffmem.measure(images, TRAIN)  # the folder holds the same images in another order
        found = by_name[name]
        assert (found["ratio"], found["num_samples"]) == (expected.ratio, len(images))
        assert found["mean_distance"] == pytest.approx(expected.to_dict()["mean_distance"], rel=1e-12)
        assert found["source"]["kind"] == "images" and found["labels"] == {"sampler": "ddim"} and not found["sampler"]
    assert "(measured before)" in run_cli(mem_ratio.main, args).stdout

    out = run_cli(emm.main, ["curve", tmp_path / "out", f"--out={tmp_path / 'c.png'}", "--by=sampler"]).stdout
    assert "ddim" in out and "64" in out and f"{100 * max(r['ratio'] for r in records):.2f}" in out
    run_cli(emm.main, ["report", tmp_path / "out"])
    assert "ddim" in (tmp_path / "out" / "report.html").read_text()
    run = diffmem.load_run(tmp_path / "out")
    assert run.size == 64 and [s.num_samples for s in run.snapshots] == [60, 20]
    assert len(diffmem.records(run)) == 2


def test_near_repeats_are_counted(tmp_path, run_cli):
    """Five of 20 training images have a twin that differs by one level in one pixel."""
    twins = TRAIN[:5].copy()
    twins[:, 0, 3, 3] ^= 1
    np.save(tmp_path / "train.npy", np.concatenate([TRAIN[:15], twins]))
    np.save(tmp_path / "x.npy", TRAIN[[0, 1, 7, 8]])
    args = [f"--images={tmp_path / 'x.npy'}", f"--knn-ref={tmp_path / 'train.npy'}", "--device=cpu"]
    out = run_cli(mem_ratio.main, [*args, f"--log={tmp_path / 'o' / 'm.log'}", "--near-repeats=0.5"]).stdout
    assert "10 of 20 training images have another one within 0.5" in out and "2 of 4 images (50.0 %)" in out
    found = record(tmp_path / "o" / "m.log")
    assert found["near_repeats"] == {"distance": 0.5, "images": 10, "num_nearest": 2, "share_nearest": 0.5}


def test_images_with_a_sequential_test(training, tmp_path, run_cli):
    np.save(tmp_path / "x.npy", np.concatenate([TRAIN] * 10))
    args = [f"--images={tmp_path / 'x.npy'}", f"--knn-ref={training}", f"--log={tmp_path / 'o' / 'm.log'}"]
    out = run_cli(mem_ratio.main, [*args, "--device=cpu", "--adaptive=0.5"]).stdout
    assert "above 50 % after 64 of 640 images" in out and "at distance 0" in out


def test_what_the_training_images_had_done_to_them(tmp_path, run_cli):
    """Photos whose middle, scaled and gray, are the training images: the same pixels, distance 0."""
    photos = np.random.default_rng(0).integers(0, 256, [20, 3, 24, 16], dtype=np.uint8)
    folder(tmp_path / "photos", photos)
    args = [f"--images={tmp_path / 'photos'}", "--device=cpu", f"--log={tmp_path / 'o' / 'm.log'}"]
    np.save(tmp_path / "train.npy", TRAIN[:5])
    args += [f"--knn-ref={tmp_path / 'train.npy'}"]
    refused = run_cli(mem_ratio.main, args, code=1).stderr
    assert "--resize=scale or center-crop and --to-grayscale" in refused and not (tmp_path / "o").exists()
    run_cli(mem_ratio.main, [*args, "--resize=center-crop", "--to-grayscale"])
    assert record(tmp_path / "o" / "m.log")["source"]["resize"] == "center-crop"


@pytest.mark.parametrize(
    "extra, message",
    [
        (["--images=x.npy", "--knn-ref=train"], "needs --log"),
        (["--images=x.npy", "--log=o/m.log"], "needs --knn-ref"),
        (["--images=x.npy", "--expdir=run", "--knn-ref=train"], "not several"),
        (["--images=x.npy", "--knn-ref=train", "--log=o/m.log", "--gap=3"], "--gap needs a network"),
        (["--images=x.npy", "--knn-ref=train", "--log=o/m.log", "--seeds=0-99"], "holds 60 images"),
        (["--images=x.npy", "--knn-ref=train", "--log=o/m.log", "--label=a"], "KEY=VALUE"),
        (["--images=f.npy", "--knn-ref=train", "--log=o/m.log"], "--value-range=-1,1"),
        (["--images=f.npy", "--knn-ref=train", "--log=o/m.log", "--value-range=0"], "LOW,HIGH"),
        (["--images=nothing", "--knn-ref=train", "--log=o/m.log"], "does not exist"),
        (["--images=x.npy", "--images=x.npz", "--knn-ref=train", "--log=o/m.log"], "rename one"),
        (["--model=keras:x", "--knn-ref=train", "--log=o/m.log"], "the one library is diffusers"),
        (["--model=diffusers:nowhere", "--knn-ref=train", "--log=o/m.log"], "not a folder"),
        (["--pipeline", "--network=x.npz", "--log=o/m.log"], "belongs to --model"),
    ],
)
def test_bad_input(extra, message, training, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    np.save("x.npy", copies())
    np.savez("x.npz", copies())
    np.save("f.npy", copies() / 127.5 - 1)
    result = CliRunner().invoke(mem_ratio.main, [*extra, "--device=cpu"])
    assert result.exit_code in (1, 2) and message in " ".join(result.stderr.split()), result.stderr
    assert not (tmp_path / "o" / "mem_traj.jsonl").exists() and not list(tmp_path.glob("o/*.jsonl"))


def test_a_network_of_diffusers(pipeline, training, tmp_path, run_cli):  # noqa: F811
    """Random weights: nothing is memorized. Samplers of ours and the library's own pipeline; gap to the optimum."""
    log = tmp_path / "o" / "m.log"
    args = [f"--model=diffusers:{pipeline}", f"--knn-ref={training}", "--seeds=0-4", "--device=cpu", "--steps=3"]
    out = run_cli(mem_ratio.main, [*args, f"--log={log}", "--gap=4"]).stdout
    assert "R_mem   0.00 %" in out and (tmp_path / "o" / "gap.png").exists()
    first = record(log)
    assert first["source"]["library"] == "diffusers" and first["num_samples"] == 5 and min(first["gap"]["mean"]) > 1e-4
    run_cli(mem_ratio.main, [*args, "--pipeline", f"--log={tmp_path / 'p' / 'm.log'}"])
    other = record(tmp_path / "p" / "m.log")
    assert other["source"]["sampled_by"] == "its pipeline"
    one = run_cli(mem_ratio.main, [*args, "--pipeline", "--batch=2", f"--log={tmp_path / 'q' / 'm.log'}"])
    assert one.exit_code == 0
    rows = [np.load(tmp_path / x / "knn-dist" / "model-ddpm.npz")["knn_distance"] for x in "pq"]
    np.testing.assert_allclose(*rows, atol=0.5)  # a seed is the same image at any batch, up to rounding


def test_emm_from_numbers():
    sizes, samples = [8, 16, 32, 64, 128] * 2, [1000] * 10
    memorized = [971, 976, 894, 650, 345, 975, 960, 880, 700, 380]
    found = diffmem.emm(sizes, memorized, samples)
    assert 20 < found.low < found.size < found.high < 40 and not found.images_only
    single = diffmem.emm(sizes[:5], memorized[:5], samples[:5])
    assert single.images_only and any("seed" in note for note in single.notes)
    assert diffmem.emm([10, 20], [99, 98], [100, 100]).verdict == "at least"
    with pytest.raises(ValueError, match="no measurement"):
        diffmem.emm([10], [11], [10])


def test_two_sets_in_one_log(training, tmp_path, run_cli):
    np.save(tmp_path / "other.npy", DIGITS[100:140])
    np.save(tmp_path / "x.npy", copies())
    for reference in (training, tmp_path / "other.npy"):
        args = [f"--images={tmp_path / 'x.npy'}", f"--knn-ref={reference}", f"--log={tmp_path / 'o' / 'mem_traj.log'}"]
        run_cli(mem_ratio.main, [*args, "--device=cpu"])
    result = run_cli(emm.main, ["curve", tmp_path / "o", f"--out={tmp_path / 'c.png'}"], code=1)
    assert "--log of its own" in result.stderr


@pytest.mark.slow
def test_the_worked_example(tmp_path, run_cli):
    """docs/other-models.md, shortened: trained by diffusers' own means, measured here."""
    pytest.importorskip("diffusers")
    out = tmp_path / "ddpm"
    command = [sys.executable, ROOT / "examples" / "diffusers_ddpm.py", f"--out={out}", "--size=8", "--steps=80"]
    subprocess.run(command, check=True, capture_output=True)
    args = [f"--model=diffusers:{out / 'pipeline'}", f"--knn-ref={out / 'train'}", "--seeds=0-9", "--device=cpu"]
    run_cli(
        mem_ratio.main, [*args, f"--log={tmp_path / 'o' / 'mem_traj.log'}", f"--grid={tmp_path / 'g.png'}", "--gap=8"]
    )
    found = record(tmp_path / "o" / "mem_traj.log")
    assert found["num_samples"] == 10 and found["reference_size"] == 8
    # It has learned something: at high noise it is nearer to the optimum than the mean of the data is.
    gap = dict(zip(found["gap"]["sigma"], found["gap"]["mean"]))
    train = np.stack([np.asarray(PIL.Image.open(path)) for path in sorted((out / "train").iterdir())]) / 127.5 - 1
    assert gap[min(gap, key=lambda s: abs(s - 1))] < train.var(0).mean()
