"""PLAN=1 of the factor scripts: what is timed is what would run, and what it comes to is what it says."""

import os
import re
import subprocess
import time

import numpy as np
import pytest
import torch
from conftest import ROOT

import train
from dnnlib import EasyDict
from memorization.search import cost
from training.networks import build_network

SCRIPTS = sorted(p.stem for p in (ROOT / "scripts").glob("*_*.sh") if "study.sh" in p.read_text())
NETWORK = "--cres=1 --num-blocks=1 --attn-resolutions=4 --batch=16 --device=cpu --dropout=0 --augment=0"


def plan(tmp_path, run_cli, rows, *args, code=0):
    """Lines that the command prints for rows of (|D|, value, seed, run folder, shape, options)."""
    queue = tmp_path / "queue.tsv"
    queue.write_text("".join("\t".join(map(str, row)) + "\n" for row in rows))
    result = run_cli(cost.main, [queue, "--limit=0.02", *args], code)
    return result.output if code else result.output.splitlines()


def in_seconds(text):
    units = {"d": 86400, "h": 3600, "m": 60, "s": 1}
    return sum(int(number) * units[unit] for number, unit in re.findall(r"(\d+)([dhms])", text))


def test_seconds_of_runs_follow_from_what_was_timed(tmp_path, run_cli):
    done, waiting = tmp_path / "done", tmp_path / "waiting"
    done.mkdir()
    (done / "run-state.json").write_text('{"state": "complete", "kimg": 1, "reason": ""}')
    (done / "mem_traj.jsonl").write_text("{}\n")
    options = f"--duration=3000 {NETWORK} --tick=4 --snap=1000"
    rows = [
        (size, f"{channels}", seed, done if (size, channels, seed) == (20, 8, 1) else waiting, "8,1,10",
         f"{options} --num-channels={channels}")
        for channels in (8, 128) for size in (20, 40) for seed in (1, 2)
    ]  # fmt: skip
    began, before = time.time(), sorted(os.listdir(tmp_path))
    lines = plan(tmp_path, run_cli, rows, "--measure=--seeds=0-99999 --batch=32 --device=cpu", "--jobs=2")
    assert time.time() - began < 30 and sorted(os.listdir(tmp_path)) == sorted([*before, "queue.tsv"])
    assert lines[0].startswith("Timed now") and ", 1 thread; torch 2" in lines[0]

    speeds = {}
    for line in lines[1:3]:
        match = re.search(
            r"^  (\d+) \(8x8x1, fp32\): (\S+) s per kimg of training \(timed: \d+ steps? of \d+ images?.*\), "
            r"(\S+) s per generated image \(35 evaluations, timed: ",
            line,
        )
        speeds[match[1]] = float(match[2]), float(match[3])
    assert all(seconds > 0 for each in speeds.values() for seconds in each)

    runs = [
        re.search(r"^  \|D\| = (\d+), (\d+), seeds 1 2(.*): training (.*), measuring (.*) \(1 snapshot\) each$", line)
        for line in lines[3:7]
    ]
    total = 0.0
    for match in runs:
        train_sec, measure_sec = speeds[match[2]]
        train_sec, measure_sec = train_sec * 60 * int(match[1]), measure_sec * 100_000  # 60,000 epochs
        assert in_seconds(match[4]) == pytest.approx(train_sec, rel=0.01, abs=1)
        assert in_seconds(match[5]) == pytest.approx(measure_sec, rel=0.01, abs=1)
        left = 1 if match.group(1, 2) == ("20", "8") else 2
        assert (match[3] == " (1 done)") == (left == 1)
        total += left * (train_sec + measure_sec)
    at_once, jobs = re.search(
        r"^Total: (.*) for 7 runs, one after the other; (.*) with 2 at a time", lines[-1]
    ).groups()
    start = 7 * float(re.search(r"With (\S+) s of starting up per run", lines[-1])[1])
    assert in_seconds(at_once) == pytest.approx(total + start, rel=0.02)
    assert in_seconds(at_once) / 2 <= in_seconds(jobs) + 1 < in_seconds(at_once)


def test_the_network_is_that_of_the_run(tmp_path, run_cli, monkeypatch):
    """Channels, resolution, classes, batch, precision and the sampler are those of the options."""
    seen = []

    def loop(**kwargs):
        net = cost.make_network(kwargs["dataset"], kwargs["network_kwargs"], kwargs["augment"])
        seen.append((net.img_resolution, net.img_channels, net.label_dim, kwargs["precision"], kwargs["batch_size"]))
        return original(**kwargs)

    original = cost.training_loop
    monkeypatch.setattr(cost, "training_loop", loop)
    options = f"--total-steps=100 {NETWORK} --num-channels=8 --snap-at=100"
    rows = [
        (50, "unique", 1, tmp_path / "a", "4,3,50", f"{options} --cond=1 --precision=bf16"),
        (50, "none", 1, tmp_path / "b", "8,1,10", options),
    ]
    lines = plan(tmp_path, run_cli, rows, "--measure=--seeds=0-9 --solver=euler --steps=7 --device=cpu", "--nproc=2")
    assert seen[0][:4] == (4, 3, 50, "bf16") and seen[-1][:4] == (8, 1, 0, "fp32")
    assert max(batch for *_, batch in seen) <= 8  # each of two processes takes a half
    assert "(4x4x3, 50 classes, bf16)" in lines[1] and all("(7 evaluations" in line for line in lines[1:3])
    assert "Of 2 processes per run one was timed" in lines[3] and "(1 snapshot)" in lines[4]


def test_long_steps_are_timed_with_few_images():
    asked = []

    def time_with(images):
        asked.append(images)
        return cost.Timed(0.3 * images, 1)

    found = cost._grow(time_with, 512, 2.0, 512, at_once=False)
    assert asked == [1, 3] and (found.images, found.of, found.seconds) == (3, 512, pytest.approx(0.3))
    assert cost._count(found, "step") == "1 step of 3 images instead of 512, scaled up"
    # Whole rounds of gradient accumulation; and all images where a step is short.
    assert cost._grow(lambda n: cost.Timed(0.001 * n, 9), 512, 2.0, 64, at_once=False).images == 512
    assert cost._grow(lambda n: cost.Timed(0.006 * n, 9), 512, 2.0, 64, at_once=False).images == 128
    assert cost._grow(lambda n: cost.Timed(50.0 * n, 1), 512, 2.0, 64, at_once=True).images == 512  # what is compiled


def test_evaluations_of_the_sampler():
    net = build_network(
        class_name="VPPrecond", img_resolution=4, img_channels=1, model_type="SongUNet", model_channels=8,
        channel_mult=[1], num_blocks=1, attn_resolutions=[4],
    )  # fmt: skip
    cpu = torch.device("cpu")
    assert cost._count_evaluations(net, dict(num_steps=18), cpu) == 35
    assert cost._count_evaluations(net, dict(num_steps=18, S_churn=5), cpu) == 35
    assert cost._count_evaluations(net, dict(num_steps=256, solver="euler", discretization="vp"), cpu) == 256


def test_other_work_is_told_apart():
    """A process that waits three quarters of the time: the total says so, and what it would be without."""
    steps = cost.Steps(0.1, 16, 16, 8, share=0.25)
    found = cost.Cost(
        (8, 1, 10), steps, cost.Steps(1.0, 1, 1, 1), 35, "CPU", 1, "fp32", 100, lambda size: (100 * size, 1)
    )
    run = cost.Queued(40, "v", "1", "/nowhere", "8,1,10", "")
    *_, alone, total = cost.describe([run], {run.network: found}, jobs=1, nproc=1, startup=5.0)
    assert total.startswith("Total: 8m 30s for 1 runs")  # 400 s of training, 100 s of sampling, 10 s of starting up
    assert alone.startswith(
        "Other work took up to 75 % of the time of its thread. Without it, at most: 3m 30s for 1 runs"
    )
    quiet = cost.replace(found, training=cost.replace(steps, share=0.95))
    assert not any("Other work" in line for line in cost.describe([run], {run.network: quiet}, 1, 1, 5.0))
    cpu, threads = torch.device("cpu"), torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        assert cost._share(cpu, 1.0, 4.0) == 0.25 and cost._share(torch.device("cuda"), 1.0, 4.0) == 1
        torch.set_num_threads(2)  # one that waits for the other is no other work
        assert cost._share(cpu, 4.5, 4.0) == 1
    finally:
        torch.set_num_threads(threads)


def test_several_runs_at_a_time():
    assert cost.wall_seconds([5, 4, 3, 3], 1) == 15 and cost.wall_seconds([5, 4, 3, 3], 2) == 8
    assert cost.wall_seconds([5], 3) == 5 and cost.wall_seconds([], 2) == 0


def test_gaps_of_the_shape_are_those_of_the_source(tmp_path):
    source = tmp_path / "source.npz"
    np.savez(source, images=np.zeros([4, 16, 16, 3], np.uint8), labels=np.array([0, 6, 2, 1]))
    assert cost.find_shape(",,", str(source)) == (16, 3, 7)
    assert cost.find_shape("8,,", str(source)) == (8, 3, 7) and cost.find_shape("32,1,5", None) == (32, 1, 5)
    with pytest.raises(ValueError, match="no --source"):
        cost.find_shape(",1,5", None)


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ((10, "v", 1, "run", "8,1,10", "--num-chanels=8"), "v, |D| = 10: No such option"),
        ((10, "v", 1, "run", "8,1,10", f"{NETWORK} --total-steps=1 --duration=1"), "exclude each other"),
        ((10, "v", 1, "run", "9,1,10", NETWORK), "power of two"),
        ((10, "v", 1, "run", "8,1", NETWORK), "Line 1 of the queue"),
    ],
)
def test_wrong_runs(row, words, tmp_path, run_cli):
    assert words in plan(tmp_path, run_cli, [row], code=1)


# ----------------------------------------------------------------------------
# The scripts.


@pytest.fixture(scope="module")
def queued(tmp_path_factory):
    """queued(script, scale): what the script would have timed, as rows of the queue."""
    folder = tmp_path_factory.mktemp("stub")
    stub = folder / "python"
    stub.write_text(f'#!/bin/sh\ncat > "{folder}/queue"\n')
    stub.chmod(0o755)

    def run(script, scale):
        env = os.environ | {"SCALE": scale, "PLAN": "1", "PYTHON": str(stub), "OUT": str(folder / "out")}
        done = subprocess.run(
            ["bash", f"scripts/{script}.sh"], cwd=ROOT, env=env, capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 0, done.stdout + done.stderr
        assert not (folder / "out").exists()
        return cost.read_queue((folder / "queue").read_text().splitlines())

    return run


@pytest.mark.slow
@pytest.mark.parametrize("scale", ["small", "medium", "paper"])
def test_every_script_queues_networks_that_train_py_takes(scale, queued):
    for script in SCRIPTS:
        runs = queued(script, scale)
        networks = {run.network: run for run in runs}
        for shape, options in networks:
            resolution, channels, classes = (int(part or 1) for part in shape.split(","))
            with train.main.make_context("train.py", ["--outdir=x", "--data=x", *options.split()]) as context:
                opts = EasyDict(context.params)
                train.refuse_ignored(opts)
                size = networks[shape, options].size
                nimg, times = train.planned_images(opts, size)
                arguments = train.network_arguments(opts)
            assert nimg >= 1000 and len(times) == len(set(times))
            if scale == "medium":
                with torch.device("meta"):
                    build_network(**arguments, img_resolution=resolution, img_channels=channels, label_dim=classes)
                assert opts.device == "auto" and 8 <= resolution <= 32
                levels = [resolution >> i for i in range(len(opts.cres))]
                assert len(levels) == 3 and opts.attn_resolutions == [levels[1]], (script, options)
        if scale == "medium":
            assert len({run.seed for run in runs}) == 3, script
            assert {run.shape.split(",")[0] for run in runs} == (
                {"32", "16", "8"} if script == "data_dimension" else {"16"}
            ), script
    classes = {run.value: run.shape for run in queued("cond_labels", scale) if run.size == 50 or scale != "medium"}
    assert classes["random-10"].endswith(",10") and int(classes["unique"].split(",")[2]) >= 20
