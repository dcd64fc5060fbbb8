"""train.py --mem-eval, --stop-at-mem and --tensorboard; run-state.json; numbers of run folders."""

import json
import multiprocessing
import signal
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from builders import wait_for
from test_training import ROOT, TINY, last_snapshot, stats, weights

import mem_ratio
import train
from memorization.measure.gap import ImageSet
from memorization.measure.monitor import MemorizationMonitor, stop_reason
from memorization.measure.quality_meter import QualityMeter
from memorization.measure.ratio import measure_network
from training.dataset import ImageFolderDataset
from training.observer import image_grid
from training.run.run_dir import make_numbered_dir
from training.run.state import read_run_state, write_run_state
from training.samplers import StackedRandomGenerator
from training.snapshots.snapshot import list_snapshots, load_network
from training.training_loop import _observe

N = 40
STOCHASTIC = ["--dropout=0.2", "--augment=0.2", "--xflip=1"]  # every source of random numbers


@pytest.fixture(scope="module")
def small_zip(digits_zip, tmp_path_factory, make_zip):
    path = tmp_path_factory.mktemp("small") / "digits-50.zip"
    return make_zip(ImageFolderDataset(digits_zip).images()[:50, 0], None, path)


@pytest.fixture(scope="module")
def noise_zip(tmp_path_factory, make_zip):
    """Noise, black and white; the noise is what a network that has learned nothing generates from seed 0.

    EDM's preconditioning alone is the optimal denoiser of normal data of standard deviation 0.5, which the sampler
    turns latents into: with the only seed 0, all samples count as memorized from the beginning.
    """
    noise = StackedRandomGenerator("cpu", [0]).randn([1, 8, 8]) / 2
    noise = (noise[0] * 127.5 + 128).clip(0, 255).to(torch.uint8).numpy()
    images = np.stack([noise, np.zeros_like(noise), np.full_like(noise, 255)])
    return make_zip(images, None, tmp_path_factory.mktemp("noise") / "noise.zip")


@pytest.fixture(scope="module")
def base(small_zip):
    return ["--nosubdir", "--data", small_zip, "--duration=1", "--dump=1", *TINY, *STOCHASTIC]


@pytest.fixture(scope="module")
def run_dir(base, tmp_path_factory):
    """Two kimg, measured after each."""
    from click.testing import CliRunner

    path = tmp_path_factory.mktemp("run") / "measured"
    args = ["--outdir", path, *base, f"--mem-eval={N}", "--tensorboard"]
    result = CliRunner().invoke(train.main, list(map(str, args)))
    assert result.exit_code == 0, result.output
    return path


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def events(path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    reader = EventAccumulator(str(path), size_guidance={"scalars": 0, "images": 0})
    reader.Reload()
    return reader


# ----------------------------------------------------------------------------
# What is measured.


def test_ratio_is_that_of_mem_ratio(run_dir, small_zip, run_cli, tmp_path):
    log = tmp_path / "mem_traj.log"
    args = ["--expdir", run_dir, "--knn-ref", small_zip, f"--seeds=0-{N - 1}", "--device=cpu", "--log", log]
    run_cli(mem_ratio.main, args)
    records = [json.loads(line) for line in (tmp_path / "mem_traj.jsonl").read_text().splitlines()]
    lines = stats(run_dir)
    assert "Memorization/ratio" not in lines[0]  # kimg 0
    assert len(records) == len(lines) - 1 == 2
    for record, line in zip(sorted(records, key=lambda r: r["kimg"]), lines[1:]):
        for name in ["ratio", "ci_low", "ci_high", "num_samples", "mean_distance"]:
            assert line[f"Memorization/{name}"]["mean"] == record[name]


def test_ratio_stands_in_the_status_line(run_dir):
    lines = [line for line in (run_dir / "log.txt").read_text().splitlines() if line.startswith("tick")]
    assert "mem" not in lines[0].replace("cpumem", "").replace("gpumem", "")
    for line, row in zip(lines[1:], stats(run_dir)[1:]):
        assert line.endswith(f"mem {100 * row['Memorization/ratio']['mean']:.1f} %")


def test_training_is_the_same_without(run_dir, base, tmp_path, run_cli):
    run_cli(train.main, ["--outdir", tmp_path, *base])
    assert same(weights(last_snapshot(run_dir)), weights(last_snapshot(tmp_path)))
    states = [torch.load(d / "training-state-000002.pt", weights_only=True) for d in (run_dir, tmp_path)]
    assert torch.equal(*(state["ranks"][0]["random"]["cpu"] for state in states))
    assert [x["Loss/loss"] for x in stats(run_dir)] == [x["Loss/loss"] for x in stats(tmp_path)]


def test_random_numbers_go_on_as_if_the_observer_drew_none():
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    _observe(lambda *_: torch.rand(5), None, 0, SimpleNamespace(agreed_now=None))
    assert torch.equal(torch.rand(3), expected)


def test_measuring_is_no_training_time(small_zip, tmp_path, run_cli, monkeypatch):
    """A second in each evaluation is maintenance of the next tick."""
    plain = MemorizationMonitor.__call__

    def slow(self, *args):
        time.sleep(1)
        return plain(self, *args)

    monkeypatch.setattr(MemorizationMonitor, "__call__", slow)
    args = ["--data", small_zip, "--duration=2", "--batch=250", "--mem-eval=1"]
    run_cli(train.main, ["--outdir", tmp_path, "--nosubdir", *TINY, *args])
    lines = stats(tmp_path)
    assert [line["Timing/maintenance_sec"]["mean"] > 1 for line in lines[1:]] == [False, True]
    assert sum(line["Timing/sec_per_tick"]["mean"] for line in lines) < lines[-1]["Timing/total_sec"]["mean"] - 2


def test_monitor_in_rounds_equals_one_measurement(run_dir, small_zip):
    net, _ = load_network(last_snapshot(run_dir))
    reference = ImageFolderDataset(small_zip).images()
    whole = measure_network(net, reference, range(37), keep_images=True)
    seen = MemorizationMonitor(reference, 37, batch=16, grid=True)(net, 1000, lambda: False)
    assert seen.values["Memorization/ratio"] == whole.ratio
    assert seen.values["Memorization/mean_distance"] == whole.mean_distance
    grid = seen.images["Samples/generated_above_nearest"]  # 32 pairs, 8 beside each other, 8x enlarged
    assert grid.shape == (4 * (2 * 64 + 15), 8 * (64 + 12), 3)
    y, x = 143 + 6, 76 + 6  # the tenth: second row, second column
    for image in (whole.images[9, 0], reference[whole.knn_index[9, 0], 0]):
        np.testing.assert_array_equal(grid[y : y + 64, x : x + 64, 0], image.repeat(8, 0).repeat(8, 1))
        y += 64 + 3


def test_monitor_stops_when_asked(run_dir, small_zip):
    net, _ = load_network(last_snapshot(run_dir))
    answers = iter([False, True])
    monitor = MemorizationMonitor(ImageFolderDataset(small_zip).images(), 64, batch=16)
    assert monitor(net, 1000, lambda: next(answers)) is None and not monitor.history


def test_image_grid_frames_and_colours():
    cells = np.zeros((3, 1, 3, 100, 100), np.uint8)
    cells[1, 0, 2] = 9
    grid = image_grid(cells, np.array([False, True, False]), columns=2)
    assert grid.shape == (224, 224, 3) and list(grid[50, 160]) == [0, 0, 9]
    assert list(grid[2, 160]) == [200, 55, 45] and list(grid[2, 50]) == [255] * 3 == list(grid[160, 160])


# ----------------------------------------------------------------------------
# The end of a run that memorizes.


def test_stop_reason():
    def ends(ratios, stop_at=0.9, patience=2):
        return stop_reason([[0, r] for r in ratios], stop_at, patience) is not None

    assert not ends([]) and not ends([0.95]) and not ends([0.95, 0.89]) and not ends([0.95, 0.89, 0.95])
    assert ends([0.1, 0.9, 0.95]) and ends([0.95], patience=1) and not ends([1.0] * 9, stop_at=None)
    assert "3 snapshots in a row" in stop_reason([[0, 1.0]] * 3, 0.9, 3)


def test_run_ends_at_the_ratio_and_resuming_keeps_the_count(noise_zip, tmp_path, run_cli):
    args = ["--nosubdir", "--data", noise_zip, "--duration=100", "--dump=1", "--lr=1e-9", *TINY, "--mem-eval=1"]
    args += ["--stop-at-mem=1", "--stop-patience=3"]
    out = run_cli(train.main, ["--outdir", tmp_path / "a", *args]).output
    assert "Ended at 3.104 of 6 kimg: the memorization ratio was at or above 1 at 3 snapshots in a row." in out
    assert [kimg for kimg, _ in list_snapshots(tmp_path / "a")] == [0, 1, 2, 3]
    state = read_run_state(tmp_path / "a")
    assert (state["state"], state["kimg"]) == ("complete", 3.104) and "at or above 1" in state["reason"]

    run_cli(train.main, ["--outdir", tmp_path / "b", *args, "--resume", tmp_path / "a/training-state-000002.pt"])
    assert [line["Memorization/ratio"]["mean"] for line in stats(tmp_path / "b")] == [1]
    assert read_run_state(tmp_path / "b")["state"] == "complete"

    end = ["--outdir", tmp_path / "c", *args, "--resume", tmp_path / "a/training-state-000003.pt"]
    assert "is at the end of its run" in run_cli(train.main, end, code=1).stderr
    assert not (tmp_path / "c").exists()


def test_states_without_a_count_still_load(run_dir, base, tmp_path, run_cli):
    data = torch.load(run_dir / "training-state-000001.pt", weights_only=True)
    assert len(data["shared"].pop("observer")["history"]) == 1
    torch.save(dict(data, format=1), tmp_path / "training-state-000001.pt")
    args = ["--outdir", tmp_path, *base, "--mem-eval=8", "--stop-at-mem=1"]
    run_cli(train.main, [*args, "--resume", tmp_path / "training-state-000001.pt"])
    assert same(weights(last_snapshot(run_dir)), weights(last_snapshot(tmp_path)))


# ----------------------------------------------------------------------------
# Signals and processes.


@pytest.mark.slow
def test_terminated_while_measuring(run_dir, base, tmp_path, run_cli):
    args = ["--outdir", tmp_path, *base]
    command = [sys.executable, str(ROOT / "train.py"), *map(str, args), "--mem-eval=10000000"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    wait_for(lambda: (read_run_state(tmp_path) or {"kimg": 0})["kimg"] > 1, process)
    time.sleep(0.3)
    process.send_signal(signal.SIGTERM)
    out = process.communicate(timeout=30)[0]
    assert process.returncode == train.EXIT_STOPPED, out
    state = read_run_state(tmp_path)
    assert state["state"] == "stopped" and state["kimg"] == 1.056 and "signal" in state["reason"]
    run_cli(train.main, [*args, "--mem-eval=8", f"--resume={tmp_path / 'training-state-000001.pt'}"])
    assert same(weights(last_snapshot(run_dir)), weights(last_snapshot(tmp_path)))
    assert read_run_state(tmp_path)["state"] == "complete"


@pytest.mark.slow
def test_two_processes_measure_together_and_stop(base, small_zip, heldout, tmp_path):
    """The first evaluation is that of one process; the second is interrupted."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    args = ["--outdir", tmp_path, *base, "--duration=1000", "--mem-eval=101", "--tensorboard"]
    args += [f"--quality-eval={heldout}", "--quality-measures=coverage,kernel"]
    process = subprocess.Popen(
        [*command, str(ROOT / "train.py"), *map(str, args)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        cwd=ROOT,
    )  # fmt: skip
    wait_for(lambda: (read_run_state(tmp_path) or {"kimg": 0})["kimg"] > 2, process)
    process.send_signal(signal.SIGTERM)
    process.wait(timeout=60)
    assert read_run_state(tmp_path)["state"] == "stopped"
    assert "Memorization/ratio" not in stats(tmp_path)[-1] and list(tmp_path.glob("training-state-*.pt"))

    net, _ = load_network(tmp_path / "network-snapshot-000001.safetensors")
    training = ImageFolderDataset(small_zip).images()
    alone = measure_network(net, training, range(101), keep_images=True)
    meter = QualityMeter(training, ImageSet.read(heldout), ["coverage", "kernel"])
    judged = meter.measure(range(101), meter.embed(alone.images))["measures"]
    line = stats(tmp_path)[1]
    assert line["Memorization/num_samples"]["mean"] == 101
    assert line["Memorization/ratio"]["mean"] == alone.ratio
    assert line["Memorization/mean_distance"]["mean"] == pytest.approx(alone.mean_distance, rel=1e-12)
    for name, entry in judged.items():
        assert line[f"Quality/{name}"]["mean"] == pytest.approx(entry["value"], rel=1e-9)
    assert json.loads((tmp_path / "best.json").read_text())["snapshot"] is not None
    assert len(list(tmp_path.glob("events.out.tfevents.*"))) == 1


# ----------------------------------------------------------------------------
# TensorBoard.


def test_event_files_hold_the_statistics(run_dir):
    reader, lines = events(run_dir), stats(run_dir)
    assert {"Loss/loss", "Progress/lr", "Timing/img_per_sec", "Resources/cpu_mem_gb"} <= set(reader.Tags()["scalars"])
    for tag in reader.Tags()["scalars"]:
        expected = [(round(x["Progress/kimg"]["mean"] * 1000), x[tag]["mean"]) for x in lines if tag in x]
        assert [event.step for event in reader.Scalars(tag)] == [nimg for nimg, _ in expected]
        assert [event.value for event in reader.Scalars(tag)] == pytest.approx([value for _, value in expected])
    assert [event.step for event in reader.Scalars("Memorization/ratio")] == [1056, 2016]
    images = reader.Images("Samples/generated_above_nearest")
    assert [(image.step, image.width, image.height) for image in images] == [(1056, 608, 572), (2016, 608, 572)]


def test_resuming_appends_and_alone_it_shows_samples(base, tmp_path, run_cli):
    args = ["--outdir", tmp_path, *base, "--tensorboard"]
    run_cli(train.main, args)
    run_cli(train.main, [*args, "--resume", tmp_path / "training-state-000001.pt"])
    reader = events(tmp_path)
    assert [event.step for event in reader.Scalars("Loss/loss")] == [32, 1056, 2016]  # the last of them once
    assert [image.step for image in reader.Images("Samples/generated")] == [1056, 2016]
    assert "Memorization/ratio" not in reader.Tags()["scalars"]


def test_without_the_package(small_zip, tmp_path, run_cli, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    args = ["--outdir", tmp_path / "x", "--data", small_zip, *TINY]
    assert "pip install tensorboard" in run_cli(train.main, [*args, "--tensorboard"], code=1).stderr
    assert not (tmp_path / "x").exists()
    run_cli(train.main, [*args, "--dry-run"])


# ----------------------------------------------------------------------------
# Run folders.


def test_run_state(tmp_path):
    assert read_run_state(tmp_path) is None
    write_run_state(tmp_path, "stopped", 1.5, "a signal")
    assert json.loads((tmp_path / "run-state.json").read_text()) == dict(state="stopped", kimg=1.5, reason="a signal")
    with pytest.raises(ValueError, match="running, complete"):
        write_run_state(tmp_path, "done", 1)
    (tmp_path / "run-state.json").write_text("[]")
    with pytest.raises(ValueError, match="delete it"):
        read_run_state(tmp_path)


@pytest.mark.slow
def test_failed_run_says_so(base, tmp_path, run_cli, monkeypatch):
    def full(*args, **kwargs):
        assert read_run_state(tmp_path)["state"] == "running"
        raise OSError("the disk is full")

    monkeypatch.setattr("training.run.checkpoint.save_state", full)
    result = run_cli(train.main, ["--outdir", tmp_path, *base, "--cache=0"], code=1)
    assert "the disk is full" in result.stderr
    assert not multiprocessing.active_children()  # a loader process that stays would keep the run from ending
    assert read_run_state(tmp_path) == dict(state="failed", kimg=1.056, reason="the disk is full")


def test_options_are_recorded(run_dir, small_zip, tmp_path, run_cli):
    options = json.loads((run_dir / "training_options.json").read_text())
    assert (options["mem_eval"], options["tensorboard"], options["stop_at_mem"]) == (N, True, None)
    args = [
        "--outdir",
        tmp_path,
        "--data",
        small_zip,
        "--dry-run",
        "--show-options",
        *TINY,
        "--mem-eval=9",
        "--stop-at-mem=0.5",
    ]
    out = run_cli(train.main, args).output
    options = json.loads(out[out.index("{") : out.rindex("}") + 1])
    assert (options["mem_eval"], options["stop_at_mem"], options["stop_patience"]) == (9, 0.5, 2)
    assert "9 images at each snapshot, every 1 kimg" in out and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "change, code, message",
    [
        (["--mem-eval=0"], 2, "--mem-eval"),
        (["--stop-at-mem=0.9"], 1, "--stop-at-mem needs --mem-eval=N"),
        (["--mem-eval=9", "--stop-at-mem=0"], 2, "--stop-at-mem"),
        (["--mem-eval=9", "--stop-at-mem=1.1"], 2, "--stop-at-mem"),
        (["--mem-eval=9", "--stop-at-mem=nan"], 2, "not a finite number"),
        (["--mem-eval=9", "--stop-patience=2"], 1, "--stop-patience belongs to --stop-at-mem"),
        (["--mem-eval=9", "--data=ONE"], 1, "at least 2 training images"),
        (["--mem-eval=9", "--data=ONE", "--xflip=1"], 1, "at least 2 training images"),
        (["--momentum=0.9"], 1, "--momentum belongs to --optimizer=SGD"),
        (["--arch=adm", "--cbase=64", "--embed=positional"], 1, "--embed belongs to --arch=ddpmpp"),
        (["--final-ema=0.99"], 1, "--final-ema belongs to --ema_mode=mode4"),
    ],
)
def test_wrong_options(change, code, message, small_zip, tmp_path, make_zip, run_cli):
    one = make_zip(np.zeros((1, 8, 8), np.uint8), None, tmp_path / "one.zip")
    args = [f"--outdir={tmp_path / 'out'}", f"--data={small_zip}", *TINY]
    result = run_cli(train.main, [*args, *(c.replace("ONE", one) for c in change)], code=code)
    assert message in result.stderr and not (tmp_path / "out").exists()


def test_options_that_have_an_effect_are_taken(small_zip, tmp_path, run_cli):
    args = ["--outdir", tmp_path, "--data", small_zip, "--dry-run", "--show-options", *TINY]
    sgd = ["--optimizer=SGD", "--momentum=0.5", "--ema_mode=mode4", "--final-ema=0.9"]
    out = run_cli(train.main, [*args, *sgd]).output
    assert '"momentum": 0.5' in out and '"final_ema": 0.9' in out and "Note" not in out
    assert "--ema has no effect" in run_cli(train.main, [*args, "--ema_mode=mode3", "--ema=1"]).output
    assert "--desc has no effect" in run_cli(train.main, [*args, "--nosubdir", "--desc=x"]).output


def test_runs_that_start_together_get_different_numbers(tmp_path):
    """All have planned 00000, under names of their own; one claim was left behind by a process that was killed."""
    (tmp_path / ".00003.claimed").mkdir()
    barrier = threading.Barrier(8)

    def start(i):
        barrier.wait()
        for _ in range(4):
            make_numbered_dir(tmp_path / f"00000-run{i}")

    threads = [threading.Thread(target=start, args=[i]) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    names = [path.name for path in tmp_path.iterdir() if not path.name.startswith(".")]
    assert len(names) == 32 and len({name.split("-")[0] for name in names}) == 32
    assert [path.name for path in tmp_path.glob(".*")] == [".00003.claimed"]


# ----------------------------------------------------------------------------
# Quality, and the best snapshot.


@pytest.fixture(scope="module")
def heldout(digits, tmp_path_factory):
    path = tmp_path_factory.mktemp("heldout") / "heldout.npz"
    np.savez(path, images=digits[50:450])
    return path


def test_quality_is_that_of_mem_ratio_and_the_best_snapshot_is_named(base, small_zip, heldout, tmp_path, run_cli):
    """Untrained for two snapshots, all of which are under the bound: the one of the smaller distance is the best."""
    judged = [f"--mem-eval={N}", f"--quality-eval={heldout}", "--quality-measures=kernel,coverage"]
    out = run_cli(train.main, ["--outdir", tmp_path / "run", *base, *judged]).output
    assert "best kernel with a ratio below 0.1" in out
    args = ["--expdir", tmp_path / "run", "--knn-ref", small_zip, f"--seeds=0-{N - 1}", "--device=cpu"]
    measures = ["--quality", heldout, "--quality-measures=kernel,coverage", "--log", tmp_path / "out/mem_traj.log"]
    run_cli(mem_ratio.main, [*args, *measures])
    records = [json.loads(line) for line in (tmp_path / "out/mem_traj.jsonl").read_text().splitlines()]
    records = sorted(records, key=lambda r: r["kimg"])
    lines = stats(tmp_path / "run")
    for record, line in zip(records, lines[1:]):
        for name, entry in record["quality"]["measures"].items():
            assert line[f"Quality/{name}"]["mean"] == pytest.approx(entry["value"], rel=1e-12)
            assert line[f"Quality/{name}_ci_low"]["mean"] == pytest.approx(entry["ci_low"], rel=1e-12)
        for key, floor in record["quality"]["floors"].items():
            assert line[f"Quality/kernel_{key}"]["mean"] == floor["measures"]["kernel"]["value"]
    best = json.loads((tmp_path / "run/best.json").read_text())
    expected = min(records, key=lambda r: r["quality"]["measures"]["kernel"]["value"])
    assert best["snapshot"] == expected["snapshot"] and (tmp_path / "run" / best["snapshot"]).is_file()
    assert best["quality"] == expected["quality"] and best["ratio"] == expected["ratio"]

    # Resumed from before the end, the same file comes again, byte for byte; a run whose images are copies has no best.
    state = tmp_path / "run/training-state-000001.pt"
    run_cli(train.main, ["--outdir", tmp_path / "again", *base, *judged, "--resume", state])
    assert (tmp_path / "again/best.json").read_bytes() == (tmp_path / "run/best.json").read_bytes()


def test_copies_are_no_best_snapshot(noise_zip, heldout, tmp_path, run_cli):
    args = ["--nosubdir", "--data", noise_zip, "--duration=20", "--lr=1e-9", *TINY, "--mem-eval=1"]
    monitor = MemorizationMonitor(np.zeros((2, 1, 8, 8), np.uint8), 1)
    assert monitor.state_dict() == {"history": [], "best": None}
    message = "frechet needs 26 generated images at least"
    result = run_cli(train.main, ["--outdir", tmp_path / "a", *args, f"--quality-eval={heldout}"], code=1)
    assert message in result.stderr and not (tmp_path / "a").exists()
    args += [f"--quality-eval={heldout}", "--quality-measures=coverage", "--mem-eval=2", "--best-mem-below=0.5"]
    run_cli(train.main, ["--outdir", tmp_path / "b", *args])
    best = json.loads((tmp_path / "b/best.json").read_text())
    assert stats(tmp_path / "b")[-1]["Memorization/ratio"]["mean"] >= 0.5
    assert best == {"snapshot": None, "measure": "coverage", "mem_below": 0.5}


def test_a_best_snapshot_of_other_settings_is_dropped():
    class Meter:
        measures = ("recall",)

        def holds(self, record):
            return record["quality"]["space"] == "pca"

    def quality(value, space="pca", num_samples=9):
        return {"space": space, "num_samples": num_samples, "measures": {"recall": {"value": value}}}

    monitor = MemorizationMonitor(np.zeros((2, 1, 8, 8), np.uint8), 9)
    monitor.quality = Meter()
    assert monitor._name_best(1000, 0.2, quality(0.9))["snapshot"] is None
    assert monitor._name_best(2000, 0.0, quality(0.5))["snapshot"] == "network-snapshot-000002.safetensors"
    assert monitor._name_best(3000, 0.05, quality(0.4))["nimg"] == 2000
    assert monitor._name_best(4000, 0.05, quality(0.6))["nimg"] == 4000
    assert monitor._name_best(5000, 0.1, quality(0.9))["nimg"] == 4000
    assert monitor._name_best(6000, 0.0, quality(0.1, num_samples=5))["nimg"] == 6000
    monitor.best["quality"]["space"] = "pixels"
    assert monitor._name_best(7000, 0.3, quality(0.1))["snapshot"] is None


def test_options_of_quality_belong_together(small_zip, heldout, tmp_path, run_cli):
    args = ["--outdir", tmp_path / "x", "--data", small_zip, *TINY]
    for more, message in [
        ([f"--quality-eval={heldout}"], "needs --mem-eval"),
        (["--mem-eval=9", "--best-mem-below=0.2"], "--best-mem-below belongs to --quality-eval"),
        (["--mem-eval=9", "--quality-space=pixels"], "--quality-space belongs to --quality-eval"),
        (["--mem-eval=99", f"--quality-eval={small_zip}"], "is the training set itself"),
    ]:
        assert message in run_cli(train.main, [*args, *more], code=1).stderr
    assert "'fid' is not one of" in run_cli(train.main, [*args, "--quality-measures=fid"], code=2).stderr
    assert not (tmp_path / "x").exists()
