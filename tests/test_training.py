"""train.py: schedules, files, resuming, several processes, and what it refuses."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from builders import torchrun

import train
from training.run.schedule import snapshot_kimgs
from training.snapshots.snapshot import list_snapshots, load_network
from training.training_loop import ema_beta, split_batch

ROOT = Path(__file__).resolve().parent.parent
# A network that trains 1000 images in about a second.
TINY = ["--cres=1", "--num-channels=8", "--num-blocks=1", "--attn-resolutions=4", "--batch=32", "--seed=7", "--tick=1"]
TINY += ["--device=cpu", "--snap=1"]


@pytest.fixture(scope="module")
def small_zip(digits_zip, tmp_path_factory, make_zip):
    from training.dataset import ImageFolderDataset

    dataset = ImageFolderDataset(digits_zip, use_labels=True)
    path = tmp_path_factory.mktemp("small") / "digits-50.zip"
    return make_zip(dataset.images()[:50, 0], dataset.labels()[:50], path)


def weights(path):
    return safetensors.torch.load_file(path)


def last_snapshot(run_dir):
    return list_snapshots(run_dir)[-1][1]


def stats(run_dir):
    return [json.loads(line) for line in (Path(run_dir) / "stats.jsonl").read_text().splitlines()]


# ----------------------------------------------------------------------------
# Schedules.


def test_ema_modes():
    h, n = 500_000, 1_000_000  # r = 50 at |D| = 1000
    assert ema_beta("mode1", n * 100, 256, 1000, h) == pytest.approx(0.5 ** (256 / h))
    assert ema_beta("mode2", n * 100, 256, 1000, h) == pytest.approx(0.5 ** (512 / (h * 50)))
    assert ema_beta("mode3", n * 100, 256, 1000, h) == pytest.approx(0.5 ** (256 / 500_000))
    expected = 0.99929 / 0.5 ** (256 / 500_000) * 0.5 ** (256 / (h * 50))
    assert ema_beta("mode4", n * 100, 256, 1000, h) == pytest.approx(expected)
    with pytest.raises(ValueError, match="mode1, mode2"):
        ema_beta("mode5", 1, 1, 1, 1)


def test_ema_is_limited_by_the_images_seen():
    assert ema_beta("mode1", 0, 64, 1000, 1e6) == 0  # the average begins as the weights
    assert ema_beta("mode1", 10_000, 64, 1000, 1e6) == pytest.approx(0.5 ** (64 / 500))
    assert ema_beta("mode1", 10_000, 64, 1000, 1e6, rampup_ratio=None) == pytest.approx(0.5 ** (64 / 1e6))


def test_durations_count_images(small_zip, tmp_path, run_cli):
    """The formulas of the study at |D| = 50, where rounding to whole kimg would turn the average off."""
    out = run_cli(
        train.main, ["--outdir", tmp_path, "--data", small_zip, "--duration=30", "--dry-run", "--show-options", *TINY]
    ).output
    options = json.loads(out[out.index("{") : out.rindex("}") + 1])
    assert options["total_nimg"] == 30 * 20 * 50 and options["total_kimg"] == 30
    assert options["ema_halflife_nimg"] == 0.5 * 20 * 50
    assert options["lr_rampup_nimg"] == 200 * 50
    assert "600 epochs" in out and not list(tmp_path.iterdir())
    out = run_cli(
        train.main, ["--outdir", tmp_path, "--data", small_zip, "--duration=0.1", "--dry-run", "--show-options", *TINY]
    ).output
    assert '"total_nimg": 1000' in out


def test_published_networks_are_the_defaults(digits_zip, tmp_path, run_cli):
    def network(*args):
        out = run_cli(
            train.main,
            ["--outdir", tmp_path, "--data", digits_zip, "--dry-run", "--show-options", "--device=cpu", *args],
        ).output
        return json.loads(out[out.index("{") : out.rindex("}") + 1])["network_kwargs"]

    ddpmpp = network()
    assert (ddpmpp["class_name"], ddpmpp["encoder_type"], ddpmpp["channel_mult_noise"]) == ("EDMPrecond", "standard", 1)
    assert (ddpmpp["model_channels"], ddpmpp["channel_mult"], ddpmpp["num_blocks"]) == (128, [2, 2, 2], 4)
    assert ddpmpp["skip_connections"] == [1] * 15 and ddpmpp["attn_resolutions"] == [16] and ddpmpp["dropout"] == 0.13
    ncsnpp = network("--arch=ncsnpp", "--precond=ve", "--num-blocks=2", "--embed=fourier")
    assert (ncsnpp["class_name"], ncsnpp["encoder_type"], ncsnpp["channel_mult_noise"]) == ("VEPrecond", "residual", 2)
    assert ncsnpp["resample_filter"] == [1, 3, 3, 1] and ncsnpp["embedding_type"] == "fourier"
    adm = network("--arch=adm")
    assert (adm["model_channels"], adm["channel_mult"], adm["num_blocks"]) == (192, [1, 2, 3, 4], 3)
    assert adm["attn_resolutions"] == [32, 16, 8] and "skip_connections" not in adm
    assert network("--attn-resolutions=8,4", "--cbase=16", "--cres=1,2")["attn_resolutions"] == [8, 4]


# ----------------------------------------------------------------------------
# A run.


@pytest.fixture(scope="module")
def run_dir(small_zip, tmp_path_factory):
    """Three kimg, with dropout, augmentation and labels, a state at each tick."""
    from click.testing import CliRunner

    outdir = tmp_path_factory.mktemp("runs")
    args = ["--outdir", outdir, "--data", small_zip, "--duration=3", "--cond=1", "--augment=0.12", "--dump=1", *TINY]
    result = CliRunner().invoke(train.main, list(map(str, args)))
    assert result.exit_code == 0, result.output
    (path,) = outdir.iterdir()
    return path


def test_run_folder(run_dir):
    assert run_dir.name == "00000-digits-50-cond-ddpmpp-edm-gpus1-batch32-fp32"
    names = {path.name for path in run_dir.iterdir()}
    assert {"training_options.json", "log.txt", "stats.jsonl"} <= names
    assert {f"network-snapshot-{k:06d}.safetensors" for k in range(4)} <= names
    assert {f"training-state-{k:06d}.pt" for k in range(1, 4)} <= names
    assert not [name for name in names if name.endswith(".tmp")]
    log = (run_dir / "log.txt").read_text()
    assert "tick 3" in log and "sec/kimg" in log and "sec/tick" in log and "cpumem" in log and "\r" not in log
    options = json.loads((run_dir / "training_options.json").read_text())
    assert options["dataset_kwargs"]["max_size"] == 50 and options["seed"] == 7 and options["total_nimg"] == 3000
    assert snapshot_kimgs(3000, 32, 1, 1) == [1, 2, 3]  # as planned, kimg 0 apart


def test_statistics(run_dir):
    lines = stats(run_dir)
    assert [line["Progress/tick"]["mean"] for line in lines] == [0, 1, 2, 3]
    images = [line["Progress/kimg"]["mean"] * 1000 for line in lines]
    assert images == pytest.approx([32, 1056, 2080, 3008])  # whole batches
    assert sum(line["Loss/loss"]["num"] for line in lines) == 3008 * 64  # every pixel once
    assert lines[-1]["Progress/lr"]["mean"] == pytest.approx(1e-3 * (3008 - 32) / 10_000)
    assert lines[-1]["Loss/loss"]["mean"] < lines[1]["Loss/loss"]["mean"]


def test_snapshot_rebuilds_the_network(run_dir):
    net, header = load_network(last_snapshot(run_dir))
    assert (net.label_dim, net.img_resolution, net.img_channels) == (10, 8, 1)
    assert header["kimg"] == pytest.approx(3.008) and header["dataset"]["max_size"] == 50
    assert header["network"]["class_name"] == "EDMPrecond" and not net.training
    out = net(torch.randn(2, 1, 8, 8), torch.tensor([1.0, 2.0]), torch.tensor([3, 4]))
    assert out.isfinite().all() and not out.requires_grad


def test_same_seed_same_run_and_loader_equals_memory(run_dir, small_zip, tmp_path, run_cli):
    """--cache=0 reads through loader processes; order and numbers are those of the run from memory."""
    args = ["--outdir", tmp_path / "a", "--nosubdir", "--data", small_zip, "--duration=3", "--cond=1", *TINY]
    run_cli(train.main, [*args, "--cache=0", "--workers=1"])
    a, b = weights(last_snapshot(run_dir)), weights(last_snapshot(tmp_path / "a"))
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_resumed_run_equals_the_uninterrupted_one(run_dir, small_zip, tmp_path, run_cli):
    args = ["--outdir", tmp_path, "--nosubdir", "--data", small_zip, "--duration=3", "--cond=1", *TINY]
    run_cli(train.main, [*args, "--resume", run_dir / "training-state-000001.pt"])
    a, b = weights(last_snapshot(run_dir)), weights(last_snapshot(tmp_path))
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert [line["Progress/tick"]["mean"] for line in stats(tmp_path)] == [2, 3]
    assert [x["Loss/loss"] for x in stats(tmp_path)] == [x["Loss/loss"] for x in stats(run_dir)[2:]]


@pytest.mark.slow
@pytest.mark.parametrize("cache", [0, 1])
def test_terminated_run_saves_its_state_and_continues(cache, run_dir, small_zip, tmp_path):
    args = ["--outdir", tmp_path, "--nosubdir", "--data", small_zip, "--duration=3", "--cond=1", *TINY, "--tick=50"]
    command = [sys.executable, str(ROOT / "train.py"), *map(str, args), f"--cache={cache}"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT, start_new_session=True)
    for line in process.stdout:
        if line.startswith("tick 0"):
            break
    time.sleep(0.3)
    os.killpg(process.pid, signal.SIGTERM)  # loader processes, too
    rest = process.communicate(timeout=60)[0]
    assert process.returncode == train.EXIT_STOPPED, rest
    (state,) = tmp_path.glob("training-state-*.pt")
    assert "--resume=latest" in rest and "--nosubdir" in rest  # the whole command that continues
    assert state.is_file()
    subprocess.run([*command, f"--resume={state}"], check=True, capture_output=True, cwd=ROOT, timeout=120)
    a, b = weights(last_snapshot(run_dir)), weights(last_snapshot(tmp_path))
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_transfer_starts_from_the_snapshot(run_dir, small_zip, tmp_path, run_cli):
    source = last_snapshot(run_dir)
    args = ["--outdir", tmp_path, "--nosubdir", "--data", small_zip, "--duration=1", "--cond=1", *TINY]
    run_cli(train.main, [*args, "--transfer", source])
    a, b = weights(source), weights(tmp_path / "network-snapshot-000000.safetensors")  # after a step of rate 0
    assert all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize(
    "extra",
    [
        ["--arch=ncsnpp", "--precond=ve", "--embed=fourier"],
        ["--precond=vp", "--augment=0", "--skip-connections=1,0", "--optimizer=SGD", "--lr=1e-5"],
        ["--arch=adm", "--cbase=64", "--xflip=1", "--batch-gpu=8", "--ls=4"],
    ],
)
def test_other_settings_train(extra, small_zip, tmp_path, run_cli):
    run_cli(train.main, ["--outdir", tmp_path, "--nosubdir", "--data", small_zip, "--duration=0.1", *TINY, *extra])
    net, header = load_network(last_snapshot(tmp_path))
    assert all(p.isfinite().all() for p in net.parameters())
    assert header["dataset"]["max_size"] == (100 if "--xflip=1" in extra else 50)


def test_loss_scaling_leaves_the_update_alone(small_zip, tmp_path, run_cli):
    args = ["--data", small_zip, "--duration=0.1", "--nosubdir", "--optimizer=SGD", "--lr=1e-5", *TINY]
    run_cli(train.main, ["--outdir", tmp_path / "a", *args])
    run_cli(train.main, ["--outdir", tmp_path / "b", *args, "--ls=64"])  # a power of two: exact
    a, b = weights(last_snapshot(tmp_path / "a")), weights(last_snapshot(tmp_path / "b"))
    assert all(torch.equal(a[k], b[k]) for k in a)


# ----------------------------------------------------------------------------
# Several processes.


@pytest.mark.slow
def test_two_processes_agree_with_one(small_zip, tmp_path):
    """Other noise, same expectation: the mean losses agree within their standard errors."""
    args = ["--data", small_zip, "--duration=8", "--nosubdir", "--augment=0", "--dropout=0", *TINY]
    torchrun(2, "train.py", "--outdir", tmp_path / "two", *args)
    torchrun(1, "train.py", "--outdir", tmp_path / "one", *args)
    one, two = stats(tmp_path / "one"), stats(tmp_path / "two")
    assert len(one) == len(two) == 9
    assert [x["Loss/loss"]["num"] for x in one] == [x["Loss/loss"]["num"] for x in two]
    for a, b in zip(one, two):
        a, b = a["Loss/loss"], b["Loss/loss"]
        # The 64 pixels of an image share a noise level: count images, not pixels.
        error = np.sqrt((a["std"] ** 2 + b["std"] ** 2) / (a["num"] / 64))
        assert abs(a["mean"] - b["mean"]) < 4 * error
    assert one[-1]["Loss/loss"]["mean"] < 0.8 * one[0]["Loss/loss"]["mean"]


@pytest.mark.slow
def test_two_processes_resume_exactly(small_zip, tmp_path):
    """With Fourier embedding, whose random frequencies must be the same on both ranks, as they are after resuming."""
    args = ["--data", small_zip, "--duration=3", "--nosubdir", "--dump=1", "--embed=fourier", *TINY]
    out = torchrun(2, "train.py", "--outdir", tmp_path / "a", *args)
    assert "Warning" not in out
    state = tmp_path / "a" / "training-state-000001.pt"
    torchrun(2, "train.py", "--outdir", tmp_path / "b", *args, "--resume", state)
    a, b = weights(last_snapshot(tmp_path / "a")), weights(last_snapshot(tmp_path / "b"))
    assert all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.slow
def test_two_processes_stop_between_ticks(small_zip, tmp_path):
    args = ["--outdir", tmp_path, "--nosubdir", "--data", small_zip, "--duration=1000", *TINY, "--tick=100000"]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    process = subprocess.Popen(
        [*command, str(ROOT / "train.py"), *map(str, args)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        text=True, cwd=ROOT,
    )  # fmt: skip
    for line in process.stdout:
        if line.startswith("tick 0"):
            break
    process.send_signal(signal.SIGTERM)
    rest = process.communicate(timeout=60)[0]
    assert len(list(tmp_path.glob("training-state-*.pt"))) == 1
    assert f"--outdir={tmp_path} " in rest and "--resume=latest --nosubdir" in rest


@pytest.mark.slow
def test_an_error_of_rank_0_ends_all_ranks(small_zip, tmp_path):
    args = ["--data", small_zip, *TINY, "--nosubdir"]
    (tmp_path / "run" / "training_options.json").mkdir(parents=True)  # what only rank 0 comes across
    out = torchrun(2, "train.py", "--outdir", tmp_path / "run", *args, code=1)
    assert "training_options.json" in out and "Is a directory" in out and "RuntimeError" not in out


def test_split_batch():
    assert split_batch(512, None, 8) == (64, 64)
    assert split_batch(512, 16, 8) == (64, 16)
    assert split_batch(512, 100, 8) == (64, 64)
    with pytest.raises(ValueError, match="cannot be divided among 3 processes"):
        split_batch(512, None, 3)
    with pytest.raises(ValueError, match="--batch-gpu=48 does not divide the 64 images"):
        split_batch(512, 48, 8)


@pytest.mark.slow
def test_batch_not_divisible_by_the_processes(small_zip, tmp_path):
    out = torchrun(2, "train.py", "--outdir", tmp_path / "x", "--data", small_zip, *TINY, "--batch=31", code=1)
    assert "Error: --batch=31 cannot be divided among 2 processes." in out
    assert not (tmp_path / "x").exists()


# ----------------------------------------------------------------------------
# Wrong input.


@pytest.mark.parametrize(
    "change, code, message",
    [
        (["--data=missing.zip"], 1, "missing.zip"),
        (["--data=pyproject.toml"], 1, "pyproject.toml"),
        (["--cond=1", "--data=UNLABELED"], 1, "dataset.json"),
        (["--batch=0"], 2, "--batch"),
        (["--batch-gpu=5"], 1, "--batch-gpu=5 does not divide"),
        (["--duration=0"], 2, "--duration"),
        (["--lr=-1"], 2, "--lr"),
        (["--arch=unet"], 2, "--arch"),
        (["--attn-resolutions=4,x"], 2, "neither a whole number nor a range"),
        (["--cres=1,1,1,1,1"], 1, "halved"),
        (["--skip-connections=1,1,1"], 1, "skip_connections must be"),
        (["--skip-connections=1,2"], 1, "zeros or ones"),
        (["--arch=adm", "--skip-connections=1"], 1, "--skip-connections belongs to"),
        (["--fp16=1"], 1, "--fp16=1 needs a CUDA device"),
        (["--device=tpu"], 1, "--device=tpu"),
        (["--transfer=a.safetensors", "--resume=training-state-000001.pt"], 1, "exclude each other"),
        (["--transfer=missing.safetensors"], 1, "missing.safetensors"),
        (["--resume=training-state-000001.pt"], 1, "does not exist"),
        (["--resume=pyproject.toml"], 1, "not named training-state"),
        (["--resume="], 1, "not named training-state"),
        (["--resume=CUT"], 1, "cut short"),
        (["--transfer=CUTNET"], 1, "cut short"),
        (["--outdir=pyproject.toml"], 1, "is a file"),
        (["--seed=x"], 2, "--seed"),
        (["--seed=4294967296"], 2, "--seed"),
        (["--duration=nan"], 2, "not a finite number"),
        (["--duration=inf"], 2, "not a finite number"),
        (["--lr=nan"], 2, "not a finite number"),
        (["--num-channels=2"], 1, "even number of channels"),
        (["--num-channels=7"], 1, "even number of channels"),
        (["--num-channels=18"], 1, "4 equal groups"),
        (["--arch=adm", "--num-channels=224", "--cres=1"], 1, "3 attention heads"),
        (["--cres=0"], 1, "--cres"),
        (["--desc=a/b"], 1, "slash"),
        (["--data="], 1, "is empty"),
        (["--outdir="], 1, "is empty"),
        (["--outdir=pyproject.toml/run"], 1, "is a file"),
        (["--data=CORRUPT"], 1, "img00000003.png"),
        (["--data=CORRUPT", "--cache=0"], 1, "img00000003.png"),
        (["--data=SIZES"], 1, "img00000003.png"),
        (["--transfer=OTHER"], 1, 'unexpected "model.map_label.bias"'),
    ],
)
def test_wrong_options(change, code, message, small_zip, run_dir, make_zip, tmp_path, run_cli, monkeypatch):
    replace = {}
    if "--data=UNLABELED" in change:
        from training.dataset import ImageFolderDataset

        images = ImageFolderDataset(small_zip).images()[:4, 0]
        replace["--data=UNLABELED"] = "--data=" + make_zip(images, None, tmp_path / "unlabeled.zip")
    if "--resume=CUT" in change:
        cut = tmp_path / "training-state-000001.pt"
        cut.write_bytes((run_dir / cut.name).read_bytes()[:5000])
        replace["--resume=CUT"] = f"--resume={cut}"
    if "--data=CORRUPT" in change or "--data=SIZES" in change:
        image = np.zeros((8, 8), np.uint8)
        odd = b"no image" if "--data=CORRUPT" in change else image[:4, :4]
        path = make_zip([image, image, image, odd], None, tmp_path / "odd.zip")
        replace |= {"--data=CORRUPT": f"--data={path}", "--data=SIZES": f"--data={path}"}
    if "--transfer=OTHER" in change:
        replace["--transfer=OTHER"] = f"--transfer={run_dir / 'network-snapshot-000001.safetensors'}"  # conditional
    if "--transfer=CUTNET" in change:
        cut = tmp_path / "network-snapshot-000001.safetensors"
        cut.write_bytes((run_dir / cut.name).read_bytes()[:5000])
        replace["--transfer=CUTNET"] = f"--transfer={cut}"
    monkeypatch.chdir(ROOT)
    args = [f"--outdir={tmp_path / 'out'}", f"--data={small_zip}", *TINY, *(replace.get(c, c) for c in change)]
    result = run_cli(train.main, args, code=code)
    assert message in result.stderr and len(result.stderr) < 600
    assert not multiprocessing.active_children()
    assert not list((tmp_path / "out").glob("*"))


def test_resume_with_other_options(run_dir, digits_zip, small_zip, tmp_path, run_cli):
    state = run_dir / "training-state-000001.pt"
    base = ["--outdir", tmp_path, "--nosubdir", "--duration=3", "--cond=1", *TINY, "--resume", state]
    assert "another network" in run_cli(train.main, [*base, "--data", small_zip, "--num-channels=16"], 1).stderr
    assert "another batch size" in run_cli(train.main, [*base, "--data", small_zip, "--batch=16"], 1).stderr
    assert "another dataset size" in run_cli(train.main, [*base, "--data", digits_zip], 1).stderr
    assert "another optimizer" in run_cli(train.main, [*base, "--data", small_zip, "--optimizer=SGD"], 1).stderr
    assert "another optimizer" in run_cli(train.main, [*base, "--data", small_zip, "--weight-decay=0.1"], 1).stderr
    assert "end of its run" in run_cli(train.main, [*base, "--data", small_zip, "--duration=1"], 1).stderr
    assert not list(tmp_path.iterdir())


def test_full_disk_while_the_state_is_written(tmp_path, monkeypatch):
    from training.run import checkpoint

    def save(data, file):
        file.write(b"half")
        raise RuntimeError("unexpected pos 64 vs 0")  # torch's words for a failed write

    monkeypatch.setattr(torch, "save", save)
    with pytest.raises(OSError, match="disk full"):
        checkpoint.save_state(tmp_path / "training-state-000001.pt", {}, {})
    assert not list(tmp_path.iterdir())


def test_help_names_every_published_option(run_cli):
    text = run_cli(train.main, ["--help"]).output
    published = """
        outdir data cond arch precond duration batch batch-gpu cbase cres lr ema dropout augment xflip window-size
        num-blocks num-channels embed attn-resolutions ema_mode skip-connections weight-decay final-ema optimizer
        momentum fp16 ls bench cache workers desc nosubdir tick snap dump seed transfer resume dry-run device
    """.split()
    assert [name for name in published if f"--{name}" not in text] == []
