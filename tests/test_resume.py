"""Training survives: kills, signals, damaged states, full disks, a loss that is no number; and says what it was."""

import errno
import hashlib
import itertools
import json
import os
import random
import resource
import shlex
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from builders import torchrun, wait_for
from click.testing import CliRunner
from conftest import ROOT
from test_training import TINY, last_snapshot, stats, weights

import train
from dnnlib.util import Logger, atomic_write
from torch_utils.determinism import deterministic_algorithms
from training import dataset as dataset_module
from training import fingerprint, training_loop
from training.dataset import ImageFolderDataset
from training.fingerprint import array_sha256, dataset_sha256
from training.run import checkpoint
from training.run.run_dir import open_run_dir
from training.run.state import read_run_state, write_run_state
from training.run.stats_log import StatsLog
from training.snapshots.snapshot import list_snapshots
from training.training_loop import STOP_SIGNALS

# Dropout and augmentation are on, both by default.
BASE = [*TINY, "--nosubdir", "--duration=3", "--cond=1", "--dump=1"]


@pytest.fixture(scope="module")
def images(digits_zip):
    return ImageFolderDataset(digits_zip).images()[:50, 0]


@pytest.fixture(scope="module")
def data(images, digits_zip, tmp_path_factory, make_zip):
    labels = ImageFolderDataset(digits_zip, use_labels=True).labels()[:50]
    return make_zip(images, labels, tmp_path_factory.mktemp("data") / "digits-50.zip")


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    """An undisturbed run of 3 kimg, with a state at each tick."""
    run_dir = tmp_path_factory.mktemp("whole")
    result = CliRunner().invoke(train.main, [f"--outdir={run_dir}", f"--data={data}", *BASE])
    assert result.exit_code == 0, result.output
    return run_dir


def copy(source, target, *patterns):
    target.mkdir(exist_ok=True)
    for path in itertools.chain.from_iterable(source.glob(pattern) for pattern in patterns):
        (target / path.name).write_bytes(path.read_bytes())
    return target


def same(a, b):
    """Whether two runs have the same final weights and, line by line, the same losses."""
    a_weights, b_weights = weights(last_snapshot(a)), weights(last_snapshot(b))
    assert a_weights.keys() == b_weights.keys()
    losses = [[(line["Progress/tick"], line["Loss/loss"]) for line in stats(run)] for run in (a, b)]
    return losses[0] == losses[1] and all(torch.equal(a_weights[k], b_weights[k]) for k in a_weights)


def popen(*args, processes=1, python=(), **kwargs):
    command = [sys.executable, *python]
    if processes > 1:
        command += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}", "--max-restarts=1"]
    return subprocess.Popen(
        [*command, str(ROOT / "train.py"), *map(str, args)], cwd=ROOT, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True, **kwargs,
    )  # fmt: skip


# ----------------------------------------------------------------------------
# Kills.


# Runs a script that dies, as by `kill -9`, with its first training state half written.
KILLED_AT_A_STATE = """
import os, runpy, signal, sys

def replace(source, target, replace=os.replace):
    if os.path.basename(target).startswith("training-state-"):
        os.truncate(source, os.path.getsize(source) // 2)
        os.kill(os.getpid(), signal.SIGKILL)
    replace(source, target)

os.replace = replace
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.slow
def test_killed_at_any_moment(whole, data, tmp_path):
    """While the first state is written, and at a random moment of what follows; then left alone."""
    args = [f"--outdir={tmp_path}", f"--data={data}", *BASE, "--resume=latest", "--keep-states=1"]

    process = popen(*args, python=["-c", KILLED_AT_A_STATE])
    out = process.communicate(timeout=120)[0]
    assert process.returncode == -signal.SIGKILL, out
    assert list(tmp_path.glob(".training-state-*.tmp")) and not checkpoint.list_states(tmp_path)

    process = popen(*args)
    wait_for(lambda: len(stats(tmp_path) if (tmp_path / "stats.jsonl").exists() else []) > 1, process)
    time.sleep(random.uniform(0, 1))
    process.kill()
    process.wait()

    process = popen(*args)
    out = process.communicate(timeout=120)[0]
    assert process.returncode == 0, out
    assert same(whole, tmp_path)
    assert [path.name for path in checkpoint.list_states(tmp_path)] == ["training-state-000003.pt"]
    assert not list(tmp_path.glob(".*.tmp"))


def children(pid):
    with open(f"/proc/{pid}/task/{pid}/children") as file:
        return [int(child) for child in file.read().split()]


@pytest.mark.slow
def test_torchrun_restarts_from_the_newest_state(data, tmp_path):
    """One of two ranks is killed after a state; with one restart the group goes on to undisturbed weights."""
    args = [f"--data={data}", *BASE, "--duration=4", "--resume=latest"]
    torchrun(2, "train.py", f"--outdir={tmp_path / 'a'}", *args)
    run_dir = tmp_path / "b"
    process = popen(f"--outdir={run_dir}", *args, processes=2)
    wait_for(lambda: checkpoint.list_states(run_dir), process)
    first = children(process.pid)
    os.kill(random.choice(first), signal.SIGKILL)
    wait_for(lambda: len(children(process.pid)) == 2 and not set(children(process.pid)) & set(first), process)
    assert read_run_state(run_dir)["state"] == "running"  # torchrun starts it again
    out = process.communicate(timeout=120)[0]
    assert process.returncode == 0, out
    assert "Continuing from" in out and "Traceback" not in out and same(tmp_path / "a", run_dir)
    assert read_run_state(run_dir)["state"] == "complete"


def test_a_lost_process_is_one_line(monkeypatch, tmp_path, data, run_cli):
    def lost(**kwargs):
        raise RuntimeError("[pair.cc:547] Connection closed by peer [127.0.0.1]:6234")

    monkeypatch.setattr(train, "training_loop", lost)
    args = [f"--outdir={tmp_path / 'run'}", f"--data={data}", *BASE]
    with pytest.raises(RuntimeError):  # of one process it is another error
        run_cli(train.main, args)
    monkeypatch.setattr("torch_utils.distributed.get_world_size", lambda: 2)
    monkeypatch.setattr("torch_utils.distributed.broadcast", lambda value: value)
    assert "Another process of this run has ended" in run_cli(train.main, args, code=1).stderr


def test_restarts_of_torchrun_are_no_failure(monkeypatch, tmp_path, data, run_cli):
    def fail(**kwargs):
        write_run_state(tmp_path, "running", 1)
        raise OSError("the disk is full")

    monkeypatch.setattr(train, "training_loop", fail)
    args = [f"--outdir={tmp_path}", f"--data={data}", *BASE]
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "2")
    for count, state in enumerate(["running", "running", "failed"]):
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", str(count))
        run_cli(train.main, args, code=1)
        assert read_run_state(tmp_path)["state"] == state


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP])
def test_signals_of_schedulers(number, whole, data, tmp_path, run_cli):
    """Sent twice, as a scheduler does that signals torchrun and its processes."""
    if signal.getsignal(number) == signal.SIG_IGN:
        pytest.skip("the tests run under nohup")
    args = [f"--outdir={tmp_path}", f"--data={data}", *BASE, "--tick=50"]
    process = popen(*args)
    for line in process.stdout:
        if line.startswith("tick 0"):
            break
    time.sleep(0.2)
    process.send_signal(number)
    process.send_signal(number)
    rest = process.communicate(timeout=60)[0]
    assert process.returncode == train.EXIT_STOPPED == 75, rest
    assert read_run_state(tmp_path)["state"] == "stopped"
    run_cli(train.main, [*args, "--resume=latest"])
    a, b = weights(last_snapshot(whole)), weights(last_snapshot(tmp_path))
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert set(STOP_SIGNALS) == {signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP}


# ----------------------------------------------------------------------------
# --resume=latest and --keep-states.


def test_latest_is_the_beginning_of_a_new_run_and_the_end_of_a_complete_one(whole, data, tmp_path, run_cli):
    run_dir = tmp_path / "run"
    args = [f"--outdir={run_dir}", f"--data={data}", *BASE, "--resume=latest"]
    out = run_cli(train.main, [*args, "--keep-states=2"]).output
    assert same(whole, run_dir) and "Continuing" not in out
    names = [path.name for path in checkpoint.list_states(run_dir)]
    assert names == ["training-state-000002.pt", "training-state-000003.pt"]

    # Killed between the last state and the word "complete".
    write_run_state(run_dir, "running", 3.008)
    content = {path.name: path.read_bytes() for path in run_dir.iterdir() if path.name != "run-state.json"}
    assert "Nothing is left to do" in run_cli(train.main, args).output
    state = read_run_state(run_dir)
    assert (state["state"], state["kimg"]) == ("complete", 3.008)
    assert content == {path.name: path.read_bytes() for path in run_dir.iterdir() if path.name != "run-state.json"}
    assert "raise --duration" in run_cli(train.main, [*args[:-1], f"--resume={run_dir / names[1]}"], code=1).stderr

    # It can be made longer, and then ends as one that was asked for that at once.
    out = run_cli(train.main, [*args, "--duration=4"]).output
    assert f"Continuing from {run_dir / names[1]}." in out
    assert [line["Progress/tick"]["mean"] for line in stats(run_dir)] == [0, 1, 2, 3, 3, 4]  # the last was cut short
    at_once = tmp_path / "at-once"
    run_cli(train.main, [f"--outdir={at_once}", f"--data={data}", *BASE, "--duration=4"])
    longer, straight = weights(last_snapshot(run_dir)), weights(last_snapshot(at_once))
    assert all(torch.equal(longer[key], straight[key]) for key in straight | longer)

    # Killed while it begins to go on, it is not complete: the options there are of the longer run already.
    write_run_state(run_dir, "complete", 4.0)
    with open_run_dir(run_dir, {"total_kimg": 5}, numbered=False):
        assert read_run_state(run_dir) == dict(state="running", kimg=4.0, reason="")


def test_latest_needs_the_run_folder(data, tmp_path, run_cli):
    args = [f"--outdir={tmp_path / 'runs'}", f"--data={data}", *TINY, "--resume=latest"]
    assert "--nosubdir" in run_cli(train.main, args, code=1).stderr
    assert not (tmp_path / "runs").exists()


def test_seed_of_a_resumed_run_is_the_one_it_began_with(whole, data, tmp_path, run_cli):
    copy(whole, tmp_path, "training-state-000001.pt")
    tiny = [arg for arg in BASE if not arg.startswith("--seed")]
    args = [f"--outdir={tmp_path}", f"--data={data}", *tiny, "--resume=latest", "--dry-run", "--show-options"]
    out = run_cli(train.main, args).output
    options = json.loads(out[out.index("{") : out.rindex("}") + 1])
    assert options["seed"] == 7 and options["resume"] is None


def test_transfer_goes_on_as_a_transfer(whole, data, tmp_path, run_cli):
    """--transfer turns the ramp-up of the average off, which must stay so after a resumption."""
    args = [f"--data={data}", *BASE, "--duration=2", f"--transfer={last_snapshot(whole)}"]
    run_cli(train.main, [f"--outdir={tmp_path / 'a'}", *args, "--resume=latest"])
    state = tmp_path / "a" / "training-state-000001.pt"
    run_cli(train.main, [f"--outdir={tmp_path / 'b'}", *args[:-1], f"--resume={state}"])
    copy(tmp_path / "a", tmp_path / "c", state.name, "stats.jsonl")
    run_cli(train.main, [f"--outdir={tmp_path / 'c'}", *args, "--resume=latest"])
    finals = [weights(last_snapshot(tmp_path / name)) for name in "abc"]
    assert all(torch.equal(finals[0][k], other[k]) for other in finals[1:] for k in finals[0])
    assert same(tmp_path / "a", tmp_path / "c")


# ----------------------------------------------------------------------------
# Damaged states.


@pytest.fixture(scope="module")
def state(tmp_path_factory):
    """A small state, and the file of an older one beside it."""
    folder = tmp_path_factory.mktemp("state")
    for kimg in (9, 10):
        shared = dict(net={"w": torch.arange(500.0) + kimg}, nimg=kimg * 1000)
        checkpoint.save_state(folder / f"training-state-{kimg:06d}.pt", shared, dict(order=[3, 1]))
    return folder / "training-state-000010.pt"


def test_every_cut_and_any_flipped_byte_is_recognized(state, tmp_path):
    content = state.read_bytes()
    copy(state.parent, tmp_path, "training-state-000009.pt")
    path = tmp_path / state.name
    rng = np.random.default_rng(0)
    sizes = {0, 1, 100, len(content) - 74, len(content) - 73, len(content) - 72, len(content) - 1}
    for size in sizes | set(rng.integers(len(content), size=60).tolist()):
        path.write_bytes(content[:size])
        found, damaged = checkpoint.latest_state(tmp_path)
        assert found.path.name == "training-state-000009.pt" and len(damaged) == 1, size
        assert str(path) in damaged[0] and "cut short" in damaged[0]
    for place in itertools.chain(range(len(content) - 73, len(content)), rng.integers(len(content), size=200).tolist()):
        flipped = bytearray(content)
        flipped[place] ^= 1 << rng.integers(8)
        path.write_bytes(flipped)
        assert checkpoint.latest_state(tmp_path)[0].path.name == "training-state-000009.pt", place
    path.write_bytes(content)
    found, damaged = checkpoint.latest_state(tmp_path)
    assert (found.path, found.shared["nimg"], found.own, damaged) == (path, 10_000, dict(order=[3, 1]), [])


def test_checksum_is_of_what_stands_before_it(state):
    content = state.read_bytes()
    assert content[-73:] == b"\nsha256 " + hashlib.sha256(content[:-73]).hexdigest().encode() + b"\n"
    loaded = torch.load(state, weights_only=True)  # torch alone reads it, too
    assert loaded["format"] == 2 and torch.equal(loaded["shared"]["net"]["w"], torch.arange(500.0) + 10)


def test_states_of_format_1_load(state, tmp_path):
    path = tmp_path / state.name
    content = torch.load(state, weights_only=True)
    torch.save(dict(content, format=1), path)
    state = checkpoint.load_state(path)
    assert state.shared["nimg"] == 10_000 and state.own == dict(order=[3, 1])
    torch.save(dict(content, format=3), path)
    with pytest.raises(ValueError, match="not a training state of format 1 to 2"):
        checkpoint.latest_state(tmp_path)  # a newer program's, not damaged: nothing is lost by looking away


def test_all_states_damaged(state, tmp_path):
    copy(state.parent, tmp_path, "training-state-*.pt")
    for path in tmp_path.iterdir():
        path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match="delete them to start from the beginning"):
        checkpoint.latest_state(tmp_path)


def test_damaged_state_is_said_and_the_one_before_is_taken(whole, data, tmp_path, run_cli):
    copy(whole, tmp_path, "training-state-*.pt", "stats.jsonl")
    newest, before = (tmp_path / f"training-state-{kimg:06d}.pt" for kimg in (3, 2))
    newest.write_bytes(newest.read_bytes()[:-1000])
    args = [f"--outdir={tmp_path}", f"--data={data}", *BASE]
    error = run_cli(train.main, [*args, f"--resume={newest}"], code=1).stderr
    assert "cut short" in error and f"The one before it is whole: --resume={before}" in error
    out = run_cli(train.main, [*args, "--resume=latest"]).output
    assert f'Note: "{newest}" is cut short' in out and f"Continuing from {before}." in out
    assert same(whole, tmp_path)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda shared: shared.pop("nimg"), "lacks weights or counters"),
        (lambda shared: shared.update(tick="1"), "lacks weights or counters"),
        (lambda shared: shared.update(ema=[]), "lacks weights or counters"),
        (lambda shared: shared.update(optimizer={}), "another optimizer"),
        (lambda shared: shared["optimizer"].update(param_groups=[]), "another optimizer"),
        (lambda shared: shared["optimizer"]["state"][0].update(exp_avg=torch.zeros(7)), "another optimizer"),
    ],
)
def test_states_that_only_look_like_one(change, words, whole, data, tmp_path, run_cli):
    path = tmp_path / "training-state-000002.pt"
    content = torch.load(whole / path.name, weights_only=True)
    change(content["shared"])
    torch.save(dict(content, format=1), path)
    args = [f"--outdir={tmp_path / 'run'}", f"--data={data}", *BASE, f"--resume={path}"]
    assert words in run_cli(train.main, args, code=1).stderr
    assert not (tmp_path / "run").exists()


# ----------------------------------------------------------------------------
# What is written.


def test_older_states_go_only_once_the_new_one_is_whole(tmp_path, monkeypatch):
    def save(kimg, keep):
        checkpoint.save_state(tmp_path / f"training-state-{kimg:06d}.pt", dict(nimg=kimg), {}, keep)
        return [int(path.stem[-6:]) for path in checkpoint.list_states(tmp_path)]

    assert [save(kimg, None) for kimg in (1, 2, 3)][-1] == [1, 2, 3]
    assert save(4, 3) == [2, 3, 4]
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOSPC, "full")))
    with pytest.raises(OSError, match="full"):
        save(5, 1)
    monkeypatch.undo()
    assert [path.name[-9:-3] for path in checkpoint.list_states(tmp_path)] == ["000002", "000003", "000004"]
    assert not list(tmp_path.glob(".*"))
    assert save(3, 1) == [3, 4]  # those beyond belong to another attempt
    assert save(5, 1) == [5]


def test_files_are_on_disk_before_and_after_they_get_their_name(tmp_path, monkeypatch):
    calls = []
    replace, fsync = os.replace, os.fsync
    monkeypatch.setattr(os, "replace", lambda *a: (calls.append("replace"), replace(*a)))
    monkeypatch.setattr(os, "fsync", lambda fd: (calls.append(os.readlink(f"/proc/self/fd/{fd}")), fsync(fd)))
    with atomic_write(tmp_path / "a") as file:
        file.write(b"x")
    assert calls[0].startswith(f"{tmp_path}/.a.") and calls[1:] == ["replace", str(tmp_path)]
    calls.clear()
    with atomic_write(tmp_path / "a", durable=False) as file:
        file.write(b"y")
    assert calls == ["replace"]


# A full disk, as an ordinary user can have it: no file may grow beyond so many bytes.
@pytest.mark.slow
@pytest.mark.parametrize("limit, what", [(30_000, "network-snapshot-000001.safetensors"), (150_000, "training-state")])
def test_full_disk(limit, what, whole, data, tmp_path, run_cli):
    copy(whole, tmp_path, "training-state-000001.pt", "network-snapshot-000000.safetensors", "stats.jsonl")
    assert last_snapshot(whole).stat().st_size < 150_000 < (whole / "training-state-000001.pt").stat().st_size
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.name != "stats.jsonl"}
    args = [f"--outdir={tmp_path}", f"--data={data}", *BASE, "--resume=latest", "--keep-states=1"]
    process = popen(*args, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)))
    out = process.communicate(timeout=60)[0]
    last = out.strip().splitlines()[-1]
    assert process.returncode == 1 and "Traceback" not in out
    assert last.startswith("Error: ") and f"{tmp_path}/{what.replace('000001', '000002')}" in last, out
    assert {name: (tmp_path / name).read_bytes() for name in before} == before
    assert not list(tmp_path.glob(".*"))
    state = read_run_state(tmp_path)
    assert state["state"] == "failed" and what.split("-0")[0] in state["reason"]
    run_cli(train.main, args)  # when there is room again
    assert same(whole, tmp_path)


@pytest.mark.parametrize("name", ["stats.jsonl", "log.txt"])
def test_full_disk_of_statistics_and_log(name, data, tmp_path, run_cli):
    (tmp_path / name).symlink_to("/dev/full")
    error = run_cli(train.main, [f"--outdir={tmp_path}", f"--data={data}", *BASE], code=1).stderr
    assert "No space left on device" in error and f"{tmp_path}/{name}" in error


def line(kimg, **more):
    return {"Progress/kimg": dict(num=1, mean=kimg, std=0.0), **more}


def test_statistics_hold_whole_lines_of_what_counts(tmp_path, monkeypatch):
    path = tmp_path / "stats.jsonl"
    with StatsLog(path, 0) as log:
        for kimg in (1.024, 2.048, 3.072):
            log.add(line(kimg))
    with open(path, "a") as file:
        file.write('{"Progress/kimg": {"num"')  # the process was killed here
    with StatsLog(path, 2048) as log:
        assert [x["Progress/kimg"]["mean"] for x in stats(tmp_path)] == [1.024, 2.048]
        log.add(line(3.072, loss=0.5))
        content = path.read_bytes()
        limit = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(content) + 10, limit[1]))
        try:
            with pytest.raises(OSError, match="stats.jsonl"):
                log.add(line(4.096))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert path.read_bytes() == content and len(stats(tmp_path)) == 3


def test_log_that_cannot_be_written(tmp_path, capsys):
    (tmp_path / "log.txt").symlink_to("/dev/full")
    with pytest.raises(OSError, match="log.txt"), Logger(tmp_path / "log.txt"):
        print("a line")
    print("after it")
    assert "after it" in capsys.readouterr().out


# ----------------------------------------------------------------------------
# A loss that is no number.


def test_nan_ends_the_run(data, tmp_path, run_cli):
    """A rate that is far too high: the first tick is fine, and then nothing is."""
    args = [f"--outdir={tmp_path}", f"--data={data}", *BASE, "--duration=20", "--optimizer=SGD", "--lr=1e30"]
    error = run_cli(train.main, [*args, "--max-nan-ticks=2", "--tick=1"], code=1).stderr
    assert "NaN or infinite in 2 ticks in a row" in error and "--lr" in error
    state = read_run_state(tmp_path)
    assert state["state"] == "failed" and "2 ticks in a row" in state["reason"] and 2 < state["kimg"] < 4
    fractions = [x["Loss/not_finite"]["mean"] for x in stats(tmp_path)]
    assert fractions[0] == 0 and all(x > 0.5 for x in fractions[-2:])
    good = [i for i, x in enumerate(fractions) if i and x <= 0.5]  # a state of each, and of no other
    assert len(checkpoint.list_states(tmp_path)) == len(good)


def test_nan_is_taken_where_wanted_and_keeps_older_states(whole, data, tmp_path, run_cli, monkeypatch):
    from training.loss import EDMLoss

    copy(whole, tmp_path, "training-state-000001.pt")
    loss = EDMLoss.__call__
    monkeypatch.setattr(EDMLoss, "__call__", lambda *a, **k: loss(*a, **k) * float("nan"))
    args = [f"--outdir={tmp_path}", f"--data={data}", *BASE, "--resume=latest", "--keep-states=1"]
    args += ["--duration=6", "--max-nan-ticks=0"]
    run_cli(train.main, args)
    names = [path.name for path in checkpoint.list_states(tmp_path)]
    assert names == ["training-state-000001.pt", "training-state-000006.pt"]  # the last one in any case
    assert read_run_state(tmp_path)["state"] == "complete"
    (tmp_path / names[1]).unlink()
    error = run_cli(train.main, [*args, "--max-nan-ticks=3"], code=1).stderr
    assert f'"{tmp_path / names[0]}" is from before.' in error


# ----------------------------------------------------------------------------
# The same numbers, of the same images.


def test_deterministic(data, tmp_path, run_cli, monkeypatch):
    seen = []
    loop = train.training_loop

    def look(**kwargs):
        seen.append((torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.deterministic))
        return loop(**kwargs)

    monkeypatch.setattr(train, "training_loop", look)
    args = [f"--data={data}", *BASE, "--duration=0.5"]
    for name in "ab":
        run_cli(train.main, [f"--outdir={tmp_path / name}", *args, "--deterministic"])
    run_cli(train.main, [f"--outdir={tmp_path / 'c'}", *args])
    assert seen == [(True, True), (True, True), (False, False)]
    assert not torch.are_deterministic_algorithms_enabled() and same(tmp_path / "a", tmp_path / "b")
    options = [json.loads((tmp_path / name / "training_options.json").read_text()) for name in "ac"]
    assert [(o["deterministic"], o["cudnn_benchmark"]) for o in options] == [(True, False), (False, True)]
    error = run_cli(train.main, [f"--outdir={tmp_path / 'd'}", *args, "--deterministic", "--bench=1"], code=1).stderr
    assert "exclude each other" in error


def test_deterministic_algorithms_set_what_cublas_reads(monkeypatch):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    with deterministic_algorithms(True):
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    with deterministic_algorithms(False):
        assert "CUBLAS_WORKSPACE_CONFIG" not in os.environ


@pytest.mark.slow
def test_digest_of_a_dataset(images, data, tmp_path, make_zip, monkeypatch):
    expected = hashlib.sha256(b"(50, 1, 8, 8)" + images.tobytes()).hexdigest()
    assert dataset_sha256(ImageFolderDataset(data)) == expected == array_sha256(images[:, None])
    assert dataset_sha256(ImageFolderDataset(data, xflip=True, use_labels=True)) == expected
    from dnnlib.images import encode_png

    packed = make_zip([encode_png(image, 9) for image in images], None, tmp_path / "packed.zip")
    assert dataset_sha256(ImageFolderDataset(packed)) == expected  # other files, the same images
    changed = images.copy()
    changed[-1, -1, -1] ^= 1
    other = make_zip(changed, None, tmp_path / "other.zip")
    assert dataset_sha256(ImageFolderDataset(other)) != expected

    monkeypatch.setattr(fingerprint, "DECODED_LIMIT", 1000)  # larger sets: what the zip's directory says
    listed = [dataset_sha256(ImageFolderDataset(path)) for path in (data, packed, other)]
    assert len(set(listed)) == 3 and all(text.startswith("listing:") for text in listed)
    subprocess.run([sys.executable, "-m", "zipfile", "-e", data, tmp_path / "folder"], check=True)
    assert dataset_sha256(ImageFolderDataset(tmp_path / "folder")).startswith("listing:")


def test_digest_is_recorded_and_other_images_are_refused(whole, images, data, tmp_path, make_zip, run_cli):
    options = json.loads((whole / "training_options.json").read_text())
    assert options["dataset_sha256"] == array_sha256(images[:, None]) and len(options["labels_sha256"]) == 64

    labels = ImageFolderDataset(data, use_labels=True).labels()
    other = make_zip(images[::-1], labels, tmp_path / "other.zip")
    relabelled = make_zip(images, labels[::-1], tmp_path / "relabelled.zip")
    moved = make_zip(images, labels, tmp_path / "moved.zip")
    copy(whole, tmp_path / "run", "training-state-000001.pt")
    args = [f"--outdir={tmp_path / 'run'}", *BASE, "--resume=latest", "--dry-run"]
    assert "other dataset content" in run_cli(train.main, [*args, f"--data={other}"], code=1).stderr
    assert "other labels content" in run_cli(train.main, [*args, f"--data={relabelled}"], code=1).stderr
    run_cli(train.main, [*args, f"--data={moved}"])


# ----------------------------------------------------------------------------
# A folder that holds a run.


@pytest.mark.parametrize("held", ["network-snapshot-000001.safetensors", "training-state-000001.pt", "mem_traj.jsonl"])
def test_a_folder_that_holds_a_run_is_refused(held, data, tmp_path, run_cli):
    (tmp_path / held).write_text("of another run")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    args = [f"--outdir={tmp_path}", f"--data={data}", *BASE]
    for more in ([], ["--dry-run"]):
        error = run_cli(train.main, [*args, *more], code=1).stderr
        assert "holds a run" in error and "--resume=latest" in error and "--overwrite" in error
        assert before == {path.name: path.read_bytes() for path in tmp_path.iterdir()}


def test_overwrite_clears_the_run_and_nothing_else(whole, data, tmp_path, run_cli):
    run = copy(whole, tmp_path / "run", "*.safetensors", "*.pt", "*.json", "*.jsonl")
    (run / "network-snapshot-000099.safetensors").write_bytes(b"newer, of another run")
    (run / "network-snapshot-000098.pkl").write_bytes(b"")
    (run / "knn-dist").mkdir()
    for name in ("mem_traj.jsonl", "mem_traj.log", "knn-dist/network-snapshot-000099.npz", "notes.txt"):
        (run / name).write_text("x")
    args = [f"--outdir={run}", f"--data={data}", *BASE, "--duration=1", "--overwrite"]
    run_cli(train.main, [*args, "--dry-run"])
    assert (run / "mem_traj.log").exists()
    run_cli(train.main, args)
    names = {path.name for path in run.iterdir()}
    assert names == {
        "network-snapshot-000000.safetensors", "network-snapshot-000001.safetensors", "training-state-000001.pt",
        "run-state.json", "stats.jsonl", "log.txt", "training_options.json", "notes.txt",
    }  # fmt: skip
    assert "exclude each other" in run_cli(train.main, [*args, "--resume=latest"], code=1).stderr
    other = [f"--outdir={tmp_path}", f"--data={data}", *TINY, "--overwrite"]
    assert "belongs to --nosubdir" in run_cli(train.main, other, code=1).stderr


def test_a_run_without_a_state_begins_again_but_on_its_images_only(whole, images, data, tmp_path, make_zip, run_cli):
    run = copy(whole, tmp_path / "run", "network-snapshot-*", "training_options.json")
    args = [f"--outdir={run}", *BASE, "--resume=latest", "--cond=0", "--dry-run"]
    run_cli(train.main, [*args, f"--data={data}", "--cond=1"])
    other = make_zip(images[::-1], [0] * len(images), tmp_path / "other.zip")
    assert "holds a run" in run_cli(train.main, [*args, f"--data={other}"], code=1).stderr


def interrupt_at(nimg, monkeypatch):
    """Ctrl-C after so many training images."""
    original = training_loop.ema_beta

    def beta(mode, seen, *args, **kwargs):
        if seen == nimg:
            os.kill(os.getpid(), signal.SIGINT)
        return original(mode, seen, *args, **kwargs)

    monkeypatch.setattr(training_loop, "ema_beta", beta)


def test_a_stopped_run_goes_on_by_the_command_it_prints_and_keeps_its_schedule(data, tmp_path, run_cli, monkeypatch):
    """Stopped within a tick; then snapshots lie at the same places as without, and the weights are the same."""
    tiny = [arg for arg in BASE if not arg.startswith(("--snap", "--duration", "--dump"))]
    args = [f"--data={data}", *tiny, "--snap=3", "--duration=4", "--batch=100"]
    run_cli(train.main, [f"--outdir={tmp_path / 'whole'}", *args])
    run = tmp_path / "a run's folder"
    with monkeypatch.context() as patch:
        interrupt_at(2400, patch)
        result = CliRunner().invoke(train.main, [f"--outdir={run}", *args])
    assert result.exit_code == train.EXIT_STOPPED
    out = result.output
    command = out[out.rindex("python ") :].strip()
    words = shlex.split(command.replace("\\\n", ""))  # as a shell joins lines
    assert words[:2] == ["python", "train.py"] and "--resume=latest" in words and f"--outdir={run}" in words
    elsewhere = [word for word in words[2:] if not word.startswith(("--outdir", "--resume"))]
    (state,) = checkpoint.list_states(run)
    note = run_cli(train.main, [*elsewhere, f"--outdir={tmp_path / 'new'}", f"--resume={state}"]).output
    assert "goes on in another folder" in note and f"--outdir={run} --nosubdir --resume=latest" in note
    run_cli(train.main, words[2:])
    kimg = [[k for k, _ in list_snapshots(tmp_path / name)] for name in ("whole", run.name, "new")]
    assert kimg == [[0, 3, 4], [0, 2, 3, 4], [3, 4]]
    final = [weights(last_snapshot(tmp_path / name)) for name in ("whole", run.name, "new")]
    assert all(torch.equal(final[0][k], other[k]) for other in final[1:] for k in final[0])


def test_what_a_run_begins_with_is_read_once(whole, data, tmp_path, run_cli, monkeypatch):
    copy(whole, tmp_path, "training-state-000001.pt", "training-state-000002.pt")
    opened, read = [], []
    original_files, original_read = dataset_module.ImageFiles, checkpoint._read
    monkeypatch.setattr(dataset_module, "ImageFiles", lambda path: opened.append(path) or original_files(path))
    monkeypatch.setattr(checkpoint, "_read", lambda path: read.append(path.name) or original_read(path))
    run_cli(train.main, [f"--outdir={tmp_path}", f"--data={data}", *BASE, "--resume=latest", "--mem-eval=8"])
    assert opened == [str(data)] and read == ["training-state-000002.pt"]


def test_closing_the_terminal_stops_a_run_but_for_nohup(monkeypatch):
    previous = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    try:
        with training_loop._StopSignals() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert stop.requested
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        with training_loop._StopSignals() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not stop.requested
    finally:
        signal.signal(signal.SIGHUP, previous)
