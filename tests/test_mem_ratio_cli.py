"""mem_ratio.py beyond one clean pass: interruptions, damaged snapshots, neighbours, watching, adaptive, criteria."""

import errno
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner

import mem_ratio as cli
import memorization.measure.ratio
import memorization.measure.subjects
from dnnlib.locks import file_lock
from memorization.measure.criteria import CRITERIA, other_distance
from memorization.measure.groups import group_table
from memorization.measure.knn import nearest_neighbors
from memorization.measure.ratio import measure_network, memorized
from memorization.records import read_records
from memorization.report.commands import measure_command
from memorization.stats.intervals import wilson_interval
from memorization.stats.sequential import SequentialTest, rounds
from training.dataset import ImageFolderDataset
from training.networks import build_network
from training.run.state import write_run_state
from training.snapshots.snapshot import load_network, save_snapshot

ROOT = Path(__file__).resolve().parent.parent
FAST = ["--steps=2", "--device=cpu"]


def random_network(seed, img_resolution=8):
    torch.manual_seed(seed)
    net = build_network(
        class_name="EDMPrecond", img_resolution=img_resolution, img_channels=1, label_dim=0,
        model_type="SongUNet", model_channels=16, num_blocks=1, channel_mult=[1, 1], attn_resolutions=[], dropout=0,
    )  # fmt: skip
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return net.eval().requires_grad_(False)


def add_snapshot(run, kimg, **kwargs):
    path = Path(run) / f"network-snapshot-{kimg:06d}.safetensors"
    save_snapshot(path, random_network(kimg, **kwargs), kimg, {"path": "digits.zip"})


@pytest.fixture(scope="module")
def data(digits_zip):
    data = ImageFolderDataset(digits_zip, use_labels=True)
    return data.images()[:100], data.labels()[:100]


@pytest.fixture(scope="module")
def reference(make_zip, data, tmp_path_factory):
    return make_zip(data[0][:, 0], data[1], tmp_path_factory.mktemp("data") / "digits100.zip")


@pytest.fixture
def run(tmp_path):
    """A run with the snapshots 100 and 200."""
    for kimg in (100, 200):
        add_snapshot(tmp_path / "run", kimg)
    return tmp_path / "run"


@pytest.fixture
def generated(monkeypatch):
    """The seeds that were generated, in order."""
    seeds = []

    def generate(net, some, real=memorization.measure.ratio.generate_images, **kwargs):
        for batch_seeds, images in real(net, some, **kwargs):
            seeds.extend(batch_seeds)
            yield batch_seeds, images

    monkeypatch.setattr(memorization.measure.ratio, "generate_images", generate)
    return seeds


def records_of(run):
    return read_records(Path(run) / "mem_traj.jsonl")


def rows_of(run, kimg):
    return np.load(Path(run) / "knn-dist" / f"network-snapshot-{kimg:06d}.npz")


def arguments(run, reference, *options):
    return [f"--expdir={run}", f"--knn-ref={reference}", "--seeds=0-3", *FAST, *options]


def torchrun(count, *command):
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={count}"]
    return subprocess.run(
        [*launch, str(ROOT / "mem_ratio.py"), *map(str, command)],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=180,
    )  # fmt: skip


# ----------------------------------------------------------------------------
# Interruptions and damage.


def test_goes_on_within_a_snapshot(run, reference, run_cli, monkeypatch, generated, tmp_path):
    options = ["--seeds=0-11", "--batch=4"]
    run_cli(cli.main, arguments(run, reference, *options, f"--log={tmp_path / 'whole.log'}"))
    monkeypatch.setattr(memorization.measure.ratio, "_CHUNK", 4)
    generated.clear()
    counted = memorization.measure.ratio.generate_images

    def interrupted(net, some, **kwargs):
        batches = counted(net, some, **kwargs)
        while len(generated) < 8:
            yield next(batches)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(memorization.measure.ratio, "generate_images", interrupted)
        result = CliRunner().invoke(cli.main, arguments(run, reference, *options))
    assert result.exit_code == 130 and "goes on with what is missing" in result.stderr
    assert generated == list(range(8)) and not (run / "mem_traj.jsonl").exists()
    assert len(list((run / "knn-dist").glob(".partial-*.npz"))) == 1

    # Only the rest is generated, and the rows are those of one pass; nothing is left behind.
    run_cli(cli.main, arguments(run, reference, *options))
    assert generated == [*range(12), *range(12)]
    for kimg in (100, 200):
        whole = np.load(tmp_path / "knn-dist" / f"network-snapshot-{kimg:06d}.npz")
        for name, array in rows_of(run, kimg).items():
            np.testing.assert_array_equal(array, whole[name])
    assert sorted(os.listdir(run / "knn-dist")) == ["network-snapshot-000100.npz", "network-snapshot-000200.npz"]


def test_partial_rows_of_another_network_do_not_count(run, reference, run_cli, generated):
    run_cli(cli.main, arguments(run, reference))
    save_snapshot(run / "network-snapshot-000200.safetensors", random_network(5), 200, {})
    generated.clear()
    run_cli(cli.main, arguments(run, reference, "--seeds=0-5"))
    assert generated == [0, 1, 2, 3, 4, 5, 4, 5]  # 100 is the same: its rows 0-3 are used again


def damage(run):
    """Four snapshots that cannot be measured, beside the good ones 100 and 200."""
    good = (run / "network-snapshot-000100.safetensors").read_bytes()
    (run / "network-snapshot-000150.safetensors").write_bytes(good[: len(good) // 2])
    (run / "network-snapshot-000300.safetensors").write_bytes(b"no snapshot")
    (run / "network-snapshot-000400.pkl").write_bytes(b"\x80\x04.")
    add_snapshot(run, 500, img_resolution=16)
    return ["000500", "000400", "000300", "000150"]


def test_damaged_snapshots_are_left_out(run, reference, run_cli):
    names = [f"network-snapshot-{number}" for number in damage(run)]
    result = run_cli(cli.main, arguments(run, reference), code=1)
    lines = [line for line in result.stdout.splitlines() if "left out." in line]
    assert [line.split(":")[0] for line in lines] == names
    for line, word in zip(lines, ["[1, 16, 16]", "000400.pkl", "not a safetensors file", "cut short"]):
        assert word in line
    assert result.stderr == f"Error: 4 of 6 snapshots could not be measured: {', '.join(names)}.\n"
    assert [r["kimg"] for r in records_of(run)] == [200, 100]
    assert run_cli(cli.main, arguments(run, reference), code=1).stdout.count("measured before") == 2


@pytest.mark.slow
def test_processes_agree_about_damage_and_verdict(run, reference, run_cli, tmp_path):
    damage(run)
    options = ["--seeds=0-199", "--batch=16", "--adaptive=0.5", "--criterion=calibrated,authenticity"]
    run_cli(cli.main, arguments(run, reference, *options, f"--log={tmp_path / 'one' / 'mem_traj.log'}"), code=1)
    result = torchrun(2, *arguments(run, reference, *options))
    assert result.returncode != 0 and result.stderr.count("Error: 4 of 6 snapshots could not be measured") == 1
    assert [r["num_samples"] for r in records_of(run)] == [64, 64]
    for one, two in zip(records_of(tmp_path / "one"), records_of(run), strict=True):
        assert {**one, "time": None, "seconds": None} == {**two, "time": None, "seconds": None}
        for name, array in rows_of(tmp_path / "one", one["kimg"]).items():
            np.testing.assert_array_equal(array, rows_of(run, one["kimg"])[name])


def test_records_are_the_same_bytes_at_any_batch(run, reference, run_cli, tmp_path):
    texts = []
    for batch in (64, 7):
        log = tmp_path / f"{batch}" / "mem_traj.log"
        run_cli(cli.main, arguments(run, reference, "--seeds=0-39", f"--batch={batch}", f"--log={log}"))
        texts.append(re.sub(r'"time": "[^"]*"|"seconds": [0-9.]+', "", log.with_suffix(".jsonl").read_text()))
    assert texts[0] == texts[1] and texts[0].count("versions") == 2


# ----------------------------------------------------------------------------
# Several at once.


@pytest.mark.slow
def test_evaluators_at_once(run, reference):
    """Two with the same settings share the work, a third with other seeds writes beside them; nothing is lost."""
    add_snapshot(run, 300)
    command = [sys.executable, str(ROOT / "mem_ratio.py"), "--batch=16"]
    seeds = ["--seeds=0-31", "--seeds=0-31", "--seeds=50-81"]
    processes = [
        subprocess.Popen([*command, *arguments(run, reference, each)], stdout=subprocess.PIPE, text=True)
        for each in seeds
    ]
    outputs = [process.communicate(timeout=180)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0], outputs
    assert sorted((r["seeds"], r["kimg"]) for r in records_of(run)) == [
        (each, kimg) for each in ("0-31", "50-81") for kimg in (100, 200, 300)
    ]
    assert (run / "mem_traj.log").read_text().count("\n") == 2 * 6  # none was measured twice
    assert sum(output.count("measured before") for output in outputs) == 3
    assert not list(run.rglob("*.lock")) and not list(run.rglob(".partial*"))


@pytest.mark.slow
def test_file_lock(tmp_path, monkeypatch):
    path = tmp_path / "folder" / "lock"
    script = f"from dnnlib.locks import file_lock\nwith file_lock({str(path)!r}, wait=False) as held: print(held)"

    def other():
        return subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True).stdout.strip()

    with file_lock(path) as held:
        assert held and other() == "False"
    assert not path.exists() and other() == "True"

    def no_locks(*_):
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    monkeypatch.setattr("fcntl.flock", no_locks)
    with pytest.warns(UserWarning, match="has no locks"), file_lock(path) as held:
        assert held and not path.exists()


# ----------------------------------------------------------------------------
# Watching.


def test_watch(tmp_path, reference, run_cli, monkeypatch):
    """Snapshots are measured as they come, the newest first, until the run says that it is over."""
    run = tmp_path / "run"
    add_snapshot(run, 100)
    write_run_state(run, "running", 100)
    waits = []

    def sleep(seconds):
        waits.append(seconds)
        assert len(waits) <= 3
        if len(waits) == 2:
            add_snapshot(run, 200)
            add_snapshot(run, 300)
        if len(waits) == 3:
            add_snapshot(run, 400)
            write_run_state(run, "complete", 400)

    monkeypatch.setattr(memorization.measure.subjects.time, "sleep", sleep)
    result = run_cli(cli.main, arguments(run, reference, "--watch", "--poll=7"))
    assert waits == [7, 7, 7] and result.stdout.count("Waiting for snapshots") == 1
    assert [r["kimg"] for r in records_of(run)] == [100, 300, 200, 400]
    assert run_cli(cli.main, arguments(run, reference, "--watch")).stdout.count("measured before") == 4


def test_watch_sees_a_snapshot_that_is_written_again(run):
    """A run of 200.4 kimg that has a snapshot at 200.1 writes another of that name."""
    write_run_state(run, "running", 200.1)

    def end():
        add_snapshot(run, 200)
        write_run_state(run, "complete", 200.4)

    found = memorization.measure.subjects.watch_snapshots(run, "cpu", poll=0, on_wait=end)
    (run / "training_options.json").write_text(json.dumps({"total_kimg": 200.4}))
    assert [subject.kimg for subject in found] == [200, 100, 200]


@pytest.mark.parametrize(
    ("state", "options", "done"),
    [
        ("running", None, False),
        ("stopped", {"total_kimg": 900}, True),
        ("failed", None, True),
        ("running", {"total_kimg": 900}, False),
        ("running", {"total_kimg": 200}, True),
        ("running", {"total_kimg": 200.4}, False),
        (None, {"total_kimg": 200.4}, True),
        (None, {"total_kimg": 201}, False),
    ],
)
def test_run_is_done(run, state, options, done):
    if state is not None:
        write_run_state(run, state, 200)
    if options is not None:
        (run / "training_options.json").write_text(json.dumps(options))
    assert memorization.measure.subjects.run_is_done(run) == done


# ----------------------------------------------------------------------------
# Adaptive.


def test_adaptive(reference, run_cli, tmp_path, generated):
    """The optimum memorizes everything, which takes one round to see; the whole measurement then needs the rest."""
    command = [f"--network={reference}", f"--log={tmp_path / 'mem_traj.log'}", "--seeds=0-199", "--device=cpu"]
    result = run_cli(cli.main, [*command, "--adaptive=0.9", "--confidence=0.9"])
    (record,) = records_of(tmp_path)
    test = SequentialTest(0.9, 0.9)
    spent = next(n for n in np.cumsum(rounds(200)) if test.update(n - test.n, n - test.n))
    assert f"above 90 % after {spent} of 200 images" in result.stdout and generated == list(range(spent))
    assert record["sequential"] == test.summary() and record["num_samples"] == spent < 200
    assert (record["ci_low"], record["ci_high"]) == test.interval() and record["interval"] == "time-uniform"
    assert record["adaptive"] == {"bar": 0.9, "confidence": 0.9} and record["seeds"] == "0-199"
    assert "measured before" in run_cli(cli.main, [*command, "--adaptive=0.9", "--confidence=0.9"]).stdout

    result = run_cli(cli.main, command)
    assert "measured before" not in result.stdout and generated == list(range(200))
    run_cli(cli.main, [*command, "--adaptive=0.99"])
    assert generated == list(range(200))
    records = records_of(tmp_path)
    assert [r["num_samples"] for r in records] == [spent, 200, 200]
    assert records[2]["sequential"]["verdict"] is None and records[1]["ratio"] == 1


def test_until_above(run, reference, run_cli, tmp_path):
    """A run is asked as a whole: the snapshots share the error in the order in which they are measured."""
    log = tmp_path / "mem_traj.log"
    command = [f"--expdir={run}", f"--knn-ref={reference}", f"--log={log}", "--seeds=0-63", "--device=cpu"]
    command += ["--adaptive=0.9", "--until-above"]
    run_cli(cli.main, command)
    records = records_of(tmp_path)
    assert len(records) > 1 and all(r["ratio"] < 0.9 for r in records)  # hence none was left out
    for j, record in enumerate(records, start=1):
        assert record["adaptive"] == {"bar": 0.9, "confidence": 0.95, "error_share": 1 / (j * (j + 1))}
        assert record["confidence"] == pytest.approx(1 - 0.05 / (j * (j + 1)))
        assert "--until-above" in measure_command(record, run) and "--confidence=0.95" in measure_command(record, run)
    assert run_cli(cli.main, command).stdout.count("measured before") == len(records)

    images = [tmp_path / name for name in ("a.zip", "b.zip")]  # all memorized: the first says it for the run
    for path in images:
        shutil.copy(reference, path)
    command = [*(f"--images={path}" for path in images), f"--knn-ref={reference}", "--adaptive=0.5", "--until-above"]
    run_cli(cli.main, [*command, f"--log={tmp_path / 'other' / 'mem_traj.log'}", "--device=cpu"])
    (record,) = records_of(tmp_path / "other")
    assert record["sequential"]["verdict"] == "above"


# ----------------------------------------------------------------------------
# Thresholds, criteria, classes, features.


def test_further_criteria(run, reference, data, run_cli, monkeypatch, generated, tmp_path):
    images, labels = data
    hist = tmp_path / "hist.png"
    run_cli(cli.main, arguments(run, reference, "--seeds=0-39", "--criterion=calibrated"))
    assert len(generated) == 80
    options = ["--threshold=0.9", "--threshold=0.25,0.95", "--criterion=authenticity", f"--hist={hist}"]
    result = run_cli(cli.main, arguments(run, reference, "--seeds=0-39", *options))
    assert len(generated) == 80 and result.stdout.count("measured before") == 2  # all of it from the distances
    assert hist.stat().st_size > 10_000 and (run / "mem_traj.log").read_text().count("\n") == 4

    for record in records_of(run):
        net, _ = load_network(run / record["snapshot"])
        made = measure_network(net, images, range(40), sampler_kwargs={"num_steps": 2}, keep_images=True).images
        distance, index = nearest_neighbors(made, images, 50)
        other = other_distance(index[:, 0], images, lambda some, k: nearest_neighbors(some, images, k))
        for name in ("calibrated", "authenticity"):
            count = int(CRITERIA[name].flags(distance, other).sum())
            low, high = wilson_interval(count, 40)
            share = dict(num_memorized=count, num_samples=40, ratio=count / 40, ci_low=low, ci_high=high)
            assert record["criteria"][name] == CRITERIA[name].settings() | share
            assert f"{name:<24s}{100 * count / 40:6.2f} %" in result.stdout or name == "calibrated"
        assert list(record["thresholds"]) == ["0.9", "0.25", "0.95"]
        for text, share in record["thresholds"].items():
            assert share["num_memorized"] == memorized(distance, float(text)).sum()
        assert record["classes"] == group_table(memorized(distance), index[:, 0], labels)
        assert "groups" not in record
        np.testing.assert_array_equal(rows_of(run, record["kimg"])["pixels_distance"], distance)
    assert "training images copied" in result.stdout


def test_groups(run, data, run_cli, make_zip, tmp_path):
    """Groups of dataset.json are counted; where they are damaged a note says so, and the rest is measured."""
    names = [f"00000/img{i:08d}.png" for i in range(100)]
    groups = [[name, "odd" if i % 2 else "even"] for i, name in enumerate(names)]
    for content, entries in [(groups, {"groups"}), (groups[1:], set())]:
        text = json.dumps({"labels": None, "groups": content}).encode()
        path = make_zip(data[0][:, 0], text, tmp_path / f"groups{len(content)}.zip")
        result = run_cli(cli.main, arguments(run, path))
        record = records_of(run)[-1]
        assert {"classes", "groups"} & record.keys() == entries
        assert ("Note: no ratio per class or group." in result.stdout) == (not entries)
        if entries:
            assert list(record["groups"]) == ["even", "odd"] and "    odd " in result.stdout


def test_groups_that_change(run, data, run_cli, make_zip, generated, tmp_path):
    """Other groups of the same images ask for another table, not for other images."""
    names = [f"00000/img{i:08d}.png" for i in range(100)]
    for modulus in (2, 4, 4):
        groups = [[name, "odd" if i % modulus else "even"] for i, name in enumerate(names)]
        path = make_zip(data[0][:, 0], json.dumps({"labels": None, "groups": groups}).encode(), tmp_path / "groups.zip")
        run_cli(cli.main, arguments(run, path))
        assert [r["groups"]["even"]["num_training"] for r in records_of(run)] == [100 // modulus] * 2
    assert generated == [0, 1, 2, 3] * 2


class Flat(torch.nn.Module):
    def forward(self, x):
        return x.flatten(1)


def test_features(run, reference, run_cli, tmp_path):
    """The pixels as features give the same ratio, by the same criteria."""
    path = tmp_path / "flat.pt"
    torch.jit.script(Flat()).save(path)
    options = ["--seeds=0-19", f"--features={path}", "--criterion=ratio,calibrated,authenticity"]
    result = run_cli(cli.main, arguments(run, reference, *options))
    assert "which loading and using it runs" in result.stdout
    for record in records_of(run):
        found = record["criteria"]
        assert found["features:ratio"]["num_memorized"] == record["num_memorized"]
        for name in ("calibrated", "authenticity"):
            assert found[f"features:{name}"]["num_memorized"] == found[name]["num_memorized"]
        assert len(found["features:ratio"]["features_sha256"]) == 64
    before = records_of(run)
    assert run_cli(cli.main, arguments(run, reference, *options)).stdout.count("measured before") == 2
    assert records_of(run) == before


class Dark(torch.nn.Module):
    def forward(self, x):
        return (x.flatten(1) < 0.5).to(torch.float32).cumsum(1)


def test_features_of_another_network(run, reference, run_cli, tmp_path):
    """Distances on disk that one network has led to are not taken for those of another."""
    for network in (Flat, Dark):
        torch.jit.script(network()).save(tmp_path / f"{network.__name__}.pt")
    for network, name in [(Flat, "same"), (Dark, "same"), (Dark, "new")]:
        path = tmp_path / f"{network.__name__}.pt"
        run_cli(cli.main, arguments(run, reference, f"--features={path}", f"--log={tmp_path / name / 'mem_traj.log'}"))
    same, new = (rows_of(tmp_path / name, 200) for name in ("same", "new"))
    assert same.keys() == new.keys()
    assert all(np.array_equal(same[key], new[key]) for key in new)
    same, new = ([record["criteria"] for record in records_of(tmp_path / name)] for name in ("same", "new"))
    assert same == new


def test_old_records_hold(run, reference, run_cli, generated):
    """Records of earlier versions, without the keys that are new, are still found."""
    run_cli(cli.main, arguments(run, reference))
    new = {"interval", "classes", "grouping"}
    old = [{key: value for key, value in record.items() if key not in new} for record in records_of(run)]
    (run / "mem_traj.jsonl").write_text("".join(json.dumps(record) + "\n" for record in old))
    result = run_cli(cli.main, arguments(run, reference))
    assert result.stdout.count("measured before") == 2 and len(generated) == 8
    for record, completed in zip(old, records_of(run)):
        assert {key: value for key, value in completed.items() if key not in ("classes", "grouping")} == record


def test_no_bar_where_there_is_no_terminal(run, reference, run_cli):
    assert run_cli(cli.main, arguments(run, reference)).stderr == ""
    assert run_cli(cli.main, arguments(run, reference, "--quiet", "--remeasure")).stderr == ""


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (["--threshold=0"], 2, "--threshold"),
        (["--threshold=0.2,x"], 2, "'x'"),
        (["--criterion=ratio,other"], 2, "'other'"),
        (["--adaptive=1"], 2, "--adaptive"),
        (["--adaptive=nan"], 2, "not a finite number"),
        (["--confidence=0"], 2, "--confidence"),
        (["--poll=0"], 2, "--poll"),
        (["--poll=1"], 2, "--poll belongs to --watch"),
        (["--confidence=0.9"], 2, "--confidence belongs to --adaptive"),
        (["--hist=figure.doc"], 1, "does not say a format"),
        (["--features=missing.pt"], 1, "missing.pt"),
        (["--watch"], 1, "nothing says when the run is done"),
        (["--knn-ref=ten.zip", "--criterion=calibrated"], 1, "at least 50 training images"),
    ],
)
def test_bad_options(run, reference, data, make_zip, run_cli, monkeypatch, tmp_path, options, code, message):
    monkeypatch.chdir(tmp_path)
    make_zip(data[0][:10, 0], None, "ten.zip")
    before = sorted(run.rglob("*"))
    assert message in run_cli(cli.main, arguments(run, reference, *options), code=code).output
    assert sorted(run.rglob("*")) == before


def test_watch_needs_a_run(reference, run_cli, tmp_path):
    command = [f"--network={reference}", f"--log={tmp_path / 'l.log'}", "--watch"]
    assert "--watch needs --expdir" in run_cli(cli.main, command, code=2).output
