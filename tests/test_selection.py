"""Which runs count on a curve: whole ones, each network once, on one set of images, for one number of epochs."""

import json
import shutil

import numpy as np
import pytest
from builders import write_run

import emm as cli
import mem_ratio
import train
from memorization.report.folder import read_runs_folder
from memorization.report.report import only_factor
from memorization.runs import read_run
from memorization.selection import select_runs
from training.run.state import write_run_state

A, B = "a" * 64, "b" * 64


def read(*folders):
    return [read_run(folder) for folder in folders]


def names(selection):
    return [run.path.name for run in selection.runs]


def run_of(folder, size=16, memorized=(30,), state=None, path=None, **options):
    data = {"path": path or f"digits-{size}.zip", "max_size": size, "resolution": 8, "use_labels": False}
    run = write_run(folder, size, list(memorized), dataset_kwargs=data, **options)
    if state is not None:
        write_run_state(run, *state)
    return run


def test_runs_that_were_not_finished(tmp_path):
    """1000 epochs of |D| = 16 are 16 kimg."""
    runs = read(
        run_of(tmp_path / "whole", state=("complete", 16)),
        run_of(tmp_path / "early", seed=2, state=("complete", 8)),  # --stop-at-mem
        run_of(tmp_path / "stopped", seed=3, state=("stopped", 4)),
        run_of(tmp_path / "failed", seed=4, state=("failed", 2)),
        run_of(tmp_path / "running", seed=5, state=("running", 1)),
        run_of(tmp_path / "unknown", seed=6),
    )
    found = select_runs(runs)
    assert names(found) == ["whole", "early", "unknown"]
    assert found.left_out[runs[2].path] == "stopped at 4 of 16 kimg (epoch 250 of 1,000)"
    assert found.left_out[runs[4].path].startswith("still running, or was killed, at 1 of 16 kimg")
    assert [run.epochs for run in runs] == [1000, 500, 250, 125, 62.5, 1000]
    found = select_runs(runs, keep=[str(runs[2].path)])
    assert names(found) == ["whole", "early", "stopped", "unknown"] and list(found.kept) == [runs[2].path]
    assert names(select_runs(runs, keep=["all"])) == [run.path.name for run in runs]
    with pytest.raises(ValueError, match=r"None of the measured runs counts: .*stopped.*--keep"):
        select_runs(runs[2:3])
    assert len(select_runs(runs[2:3], averaged=False).notes) == 1


def test_the_same_network_twice(tmp_path):
    runs = read(
        run_of(tmp_path / "first", dataset_sha256=A, seed=1),
        run_of(tmp_path / "again", dataset_sha256=A, seed=1, path="elsewhere/copy-16.zip"),
        run_of(tmp_path / "seed", dataset_sha256=A, seed=2),
        run_of(tmp_path / "width", dataset_sha256=A, seed=1, network_kwargs={"model_channels": 32}),
        run_of(tmp_path / "size", 32, dataset_sha256=B, seed=1),
    )
    found = select_runs(runs)
    assert names(found) == ["first", "seed", "width", "size"]
    assert found.left_out[runs[1].path] == f"the same network as {runs[0].path} (seed 1, the same images and options)"
    assert names(select_runs(runs, "num_channels")) == names(found)


def test_runs_that_share_a_snapshot(tmp_path):
    extra = [{"kimg": 100, "snapshot": "1", "num_memorized": 5, "num_samples": 64, "snapshot_sha256": A}]
    runs = read(*(run_of(tmp_path / f"{i}", memorized=(), extra=extra, seed=None) for i in (1, 2)))
    found = select_runs(runs)
    assert names(found) == ["1"] and "a snapshot with the same content" in found.left_out[runs[1].path]


def test_other_images(tmp_path):
    def run(name, size, digest, seed, data="digits"):
        return run_of(tmp_path / name, size, dataset_sha256=digest, seed=seed, path=f"{data}-{size}.zip")

    runs = read(
        run("fashion-16", 16, "f" * 64, 1, "fashion"),
        run("digits-16", 16, A, 1),
        run("digits-16b", 16, A, 2),
        run("digits-32", 32, B, 1),
        run("fashion-64", 64, "e" * 64, 1, "fashion"),
    )
    found = select_runs(runs)
    assert names(found) == ["digits-16", "digits-16b", "digits-32"]
    assert "fashion-16.zip, digest ffffffff" in found.left_out[runs[0].path]
    assert "digits-16.zip, aaaaaaaa" in found.left_out[runs[0].path]
    assert "of fashion-64.zip" in found.left_out[runs[4].path]  # no other run of 64 images
    assert names(select_runs(runs, "dataset")) == [run.path.name for run in runs]
    assert only_factor(read_runs_folder(tmp_path)) == "dataset"


def test_images_that_cannot_be_compared_or_need_not(tmp_path):
    runs = read(
        run_of(tmp_path / "new", dataset_sha256=A, seed=1),
        run_of(tmp_path / "old", seed=2),
        run_of(tmp_path / "listing", dataset_sha256="listing:" + A, seed=3),
        run_of(tmp_path / "renamed", dataset_sha256=A, seed=4, path="other.zip"),
        run_of(tmp_path / "larger", 32, dataset_sha256=B, seed=4, path="third.zip"),
    )
    found = select_runs(runs)
    assert len(found.runs) == 5
    assert found.notes == (
        "the runs are on datasets of different names (digits, other, third); --by=dataset tells them apart",
    )


def test_other_epochs(tmp_path):
    runs = read(
        run_of(tmp_path / "short", seed=1, total_nimg=8000),
        run_of(tmp_path / "long", seed=2),
        run_of(tmp_path / "large", 32, seed=3),
        run_of(tmp_path / "other-size", 64, seed=3, total_nimg=1000),  # alone of its size: the epochs are in the table
    )
    found = select_runs(runs)
    assert names(found) == ["long", "large", "other-size"]
    assert found.left_out[runs[0].path] == "trained for 500 epochs, and the others of |D| = 16 for 1,000"
    assert len(select_runs(runs, "total_nimg").runs) == 4


def test_a_run_and_what_it_continues_are_one(tmp_path):
    """Stopped at 250 kimg of three snapshots at 100 to 300, continued from the state of 200."""
    first = run_of(tmp_path / "first", memorized=(10, 40, 99), n=100, state=("stopped", 3), total_nimg=16_000)
    later = run_of(tmp_path / "later", memorized=(), state=("complete", 16), total_nimg=16_000,
                   resume=f"{first}/training-state-000200.pt",
                   extra=[{"kimg": k, "snapshot": "x", "num_memorized": 50, "num_samples": 100, "seeds": "0-99"}
                          for k in (250, 350)])  # fmt: skip
    for folder, ticks in ((first, (100, 200, 300)), (later, (250, 350))):
        lines = [{"Progress/kimg": {"mean": k}, "Timing/total_sec": {"mean": i}} for i, k in enumerate(ticks, start=1)]
        (folder / "stats.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for order in ((first, later), (later, first)):
        found = select_runs(read(*order))
        (run,) = found.runs
        assert [(s.kimg, s.num_memorized) for s in run.snapshots] == [(100, 10), (200, 40), (250, 50), (350, 50)]
        assert found.left_out == {} and found.joined == {first: f"continued by {later}, and one run with it"}
        assert run.epochs == 1000 and len(run.losses) == 0 and [s["Progress/kimg"] for s in run.statistics][-1] == 350
        assert run.seconds == 2 + 2
    write_run_state(later, "stopped", 4)
    write_run_state(first, "complete", 16)  # an attempt to go on does not undo what was finished
    found = select_runs(read(first, later))
    assert names(found) == ["first"] and list(found.left_out) == [later]


def test_commands_say_what_is_left_out(tmp_path, run_cli):
    """A run stopped at epoch 174 beside a whole one: 41.4 % and not the mean of both."""
    root = tmp_path / "runs"
    run_of(
        root / "whole", memorized=(414,), n=1000, seed=1, dataset_sha256=A, state=("complete", 19.2), total_nimg=19_200
    )
    run_of(
        root / "stopped", memorized=(0,), n=1000, seed=1, dataset_sha256=A, state=("stopped", 2.784), total_nimg=19_200
    )
    shutil.copytree(root / "whole", root / "copy")
    result = run_cli(cli.main, ["curve", root, f"--out={tmp_path}/curve.png"])
    assert result.stdout.splitlines()[1].split() == ["16", "1200", "41.40", "[38.4,", "44.5]", "1"]
    assert "stopped at 2.784 of 19.2 kimg (epoch 174 of 1,200)" in result.stderr
    assert f"Left out: {root}/whole is the same network as {root}/copy" in result.stderr
    record = json.loads((tmp_path / "curve.json").read_text())
    assert sorted(record["left_out"]) == [f"{root}/stopped", f"{root}/whole"] and record["kept"] == {}
    result = run_cli(cli.main, ["curve", root, f"--out={tmp_path}/curve.png", f"--keep={root}/stopped"])
    assert result.stdout.splitlines()[1].split()[1:3] == ["687", "20.70"]
    assert f"Note: {root}/stopped is kept as asked for" in result.stderr
    assert list(json.loads((tmp_path / "curve.json").read_text())["kept"]) == [f"{root}/stopped"]
    assert "same network" in run_cli(cli.main, ["trajectory", root, f"--out={tmp_path}/t.png"]).stderr
    assert run_cli(cli.main, ["trajectory", root, f"--out={tmp_path}/t.png", "--per-run"]).stdout.count("|D| = 16") == 3
    result = run_cli(cli.main, ["report", root, f"--out={tmp_path}/page.html"])
    page = (tmp_path / "page.html").read_text()
    assert result.stdout.startswith("1 runs") and "epoch 174 of 1,200" in page and "the same network as" in page


def test_a_real_run_and_its_continuation(tmp_path, digits_zip, run_cli):
    """What train.py records of a run that goes on in a new folder is enough to find the two to be one."""
    tiny = [f"--data={digits_zip}", "--cres=1", "--num-channels=8", "--num-blocks=1", "--attn-resolutions=4",
            "--batch=64", "--seed=7", "--tick=1", "--snap=1", "--dump=1", "--device=cpu", "--nosubdir"]  # fmt: skip
    run_cli(train.main, [f"--outdir={tmp_path}/a", *tiny, "--duration=0.06"])
    state = sorted((tmp_path / "a").glob("training-state-*.pt"))[-2]
    run_cli(train.main, [f"--outdir={tmp_path}/b", *tiny, "--duration=0.09", f"--resume={state}"])
    for name in "ab":
        run_cli(mem_ratio.main, [f"--expdir={tmp_path}/{name}", f"--knn-ref={digits_zip}", "--seeds=0-3", "--steps=2"])
    a, b = read(tmp_path / "a", tmp_path / "b")
    (run,) = select_runs([a, b]).runs
    assert run.path == b.path and len(run.snapshots) > len(b.snapshots)
    assert np.all(np.diff([s.kimg for s in run.snapshots]) > 0)
    assert run.snapshots[0].kimg == a.snapshots[0].kimg
