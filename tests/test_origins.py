"""emm.py runs: commit, machine and times of runs, as they were recorded, or that they were not."""

import csv
import json
import os

import pytest
from builders import write_run
from test_training import TINY, small_zip  # noqa: F401

import emm
import mem_ratio
import train
from dnnlib.versions import versions
from memorization.runs import read_run, trained_nimg
from torch_utils.machine import machine_name


def session(commit, machine="CPU A, 2 cores", **changes):
    return dict(commit=commit, machine=machine, torch="2.13.0", threads=1, processes=1, from_kimg=0) | changes


def write(folder, sessions, seconds, measured=(1.5,)):
    """A run with these sessions, seconds of training (None: not recorded), and seconds of its measurements."""
    write_run(folder, 10, [5] * len(measured), sessions=sessions)
    if seconds is not None:
        stats = {"Progress/kimg": {"mean": 1.0}, "Timing/total_sec": {"mean": seconds}}
        (folder / "stats.jsonl").write_text(json.dumps(stats) + "\n")
    lines = [json.loads(line) for line in (folder / "mem_traj.jsonl").read_text().splitlines()]
    records = [record | ({} if s is None else {"seconds": s}) for record, s in zip(lines, measured, strict=True)]
    (folder / "mem_traj.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))


def write_unmeasured(folder):
    """A run of half a minute that was trained, to choose a learning rate, and not measured."""
    write(folder, [session("aaa")], 30.0)
    options = json.loads((folder / "training_options.json").read_text())
    (folder / "training_options.json").write_text(json.dumps(options | {"command": {"lr": 0.1}}))
    (folder / "mem_traj.jsonl").unlink()


def rows_of(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_a_line_for_each_way_of_training(tmp_path, run_cli):
    write(tmp_path / "width/1", [session("aaa")], 100.0)
    write(tmp_path / "width/2", [session("aaa")], 61.5, measured=(2.0, 3.0))
    write(tmp_path / "width/3", [session("bbb"), session("bbb", "GPU B", from_kimg=5)], 10.0)
    write(tmp_path / "depth/1", [session("aaa")], None, measured=(None, 4.0))
    (tmp_path / "depth/empty").mkdir()
    (tmp_path / "depth/empty/training_options.json").write_text("{}")
    write_unmeasured(tmp_path / "depth/tune")
    out = tmp_path / "origins.csv"
    text = run_cli(emm.main, ["runs", tmp_path / "width", tmp_path / "depth", f"--out={out}"]).output
    rows = rows_of(out)
    assert [(row["commit"], row["machine"], row["runs"]) for row in rows] == [
        ("aaa", "CPU A, 2 cores", "2"), ("bbb", "CPU A, 2 cores, then GPU B", "1"), ("aaa", "CPU A, 2 cores", "2")
    ]  # fmt: skip
    assert [row["folder"].rsplit("/")[-1] for row in rows] == ["width", "width", "depth"]
    assert [float(row["training_sec"]) for row in rows] == [161.5, 10, 30]
    assert [row["runs_not_measured"] for row in rows] == ["0", "0", "1"] and "2 (1 not measured)" in text
    assert [float(row["measuring_sec"]) for row in rows] == [6.5, 1.5, 4]
    assert [row["runs_without_time"] for row in rows] == ["0", "0", "1"]
    assert [row["measurements_without_time"] for row in rows] == ["0", "0", "1"]
    assert "2m 42s" in text and "4s (1 of 2 recorded)" in text and text.endswith("Left out: 1 run folder.\n")
    assert text.count("\n") == 7 and "does not say dataset_kwargs.max_size" in text


def test_older_folders_do_not_say(tmp_path, run_cli):
    write_run(tmp_path / "old", 10, [5], versions={"torch": "2.1", "git commit": "ccc-dirty"}, threads=2)
    text = run_cli(emm.main, ["runs", tmp_path, f"--out={tmp_path / 'o.csv'}"]).output
    (row,) = rows_of(tmp_path / "o.csv")
    assert (row["commit"], row["torch"], row["threads"], row["machine"]) == ("ccc-dirty", "2.1", "2", "not recorded")
    assert row["runs_without_time"] == row["measurements_without_time"] == "1" and text.count("not recorded") >= 3


def test_a_line_for_each_run(tmp_path, run_cli):
    """Counts of the snapshot that memorizes most, the loss of the last quarter, and nothing where nothing is known."""
    write(tmp_path / "a/2", [session("aaa")], 61.5, measured=(2.0, 3.0))
    write(tmp_path / "a/1", [session("aaa"), session("bbb", from_kimg=5)], None, measured=(None,))
    write_unmeasured(tmp_path / "a/tune")
    write_run(tmp_path / "b", 20, [3, 8, 6], command={"lr": 0.01}, seed=7, sessions=[session("ccc")])
    ticks = [(0.5, 9.0), (0.8, 0.4), (1.0, 0.2)]
    lines = [{"Progress/kimg": {"mean": kimg}, "Loss/loss": {"mean": loss}} for kimg, loss in ticks]
    (tmp_path / "b/stats.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    out = tmp_path / "runs.csv"
    text = run_cli(emm.main, ["runs", tmp_path / "a", tmp_path / "b", "--per-run", f"--out={out}"]).output
    rows = {row["run"]: row for row in rows_of(out)}
    assert list(rows) == ["1", "2", "tune", "."]
    assert [row["folder"] for row in rows.values()] == [str(tmp_path / "a")] * 3 + [str(tmp_path / "b")]
    assert rows["1"]["commit"] == "aaa, then bbb" and rows["1"]["training_sec"] == rows["1"]["measuring_sec"] == ""
    assert rows["2"]["measuring_sec"] == "5.0" and rows["2"]["training_sec"] == "61.5" and rows["2"]["loss"] == ""
    assert rows["tune"]["num_memorized"] == rows["tune"]["ratio"] == "" and rows["tune"]["training_sec"] == "30.0"
    last = rows["."]
    assert (last["num_memorized"], last["num_samples"], last["ratio"]) == ("8", "64", "0.125")
    assert float(last["loss"]) == pytest.approx(0.3)
    assert (last["size"], last["seed"], last["lr"], last["nimg"], last["epochs"]) == ("20", "7", "0.01", "1000", "50.0")
    assert "|D|" in text and text.count(" - ") >= 6 and "Left out: nothing" in text


def test_options_of_no_size_are_left_out(tmp_path, run_cli):
    """A line for each of what cannot be read, measured or not, and none of them ends the table."""
    for i, changes in enumerate([{"dataset": {"max_size": 10**400}}, {"dataset": {"max_size": "10"}}, {}]):
        write_run(tmp_path / str(i), 10, [5], seed="a\nb", **changes)
    write_unmeasured(tmp_path / "3")
    options = json.loads((tmp_path / "3/training_options.json").read_text())
    (tmp_path / "3/training_options.json").write_text(json.dumps(options | {"dataset_kwargs": {}}))
    (tmp_path / "2/stats.jsonl").write_text('{"Progress/kimg": {"mean": 1e308}}\n')
    text = run_cli(emm.main, ["runs", tmp_path, "--per-run", f"--out={tmp_path / 'o.csv'}"]).output
    (row,) = rows_of(tmp_path / "o.csv")
    assert (row["run"], row["nimg"], row["epochs"]) == ("2", "", "")
    assert text.count("max_size") == 3 and "Left out: 3 run folders" in text and row["seed"] == ""


def test_ratios_of_another_kind_say_so(tmp_path, run_cli):
    """Adaptive, of one class, against other images; and of another program, nothing of whose training is known."""
    for name, changes in {"a": {"adaptive": {"level": 0.9}}, "b": {"class": 3, "other_reference": True}}.items():
        write_run(tmp_path / name, 10, [5])
        record = json.loads((tmp_path / name / "mem_traj.jsonl").read_text())
        (tmp_path / name / "mem_traj.jsonl").write_text(json.dumps(record | changes) + "\n")
    record |= {"source": {"kind": "images"}, "reference": "x.zip", "reference_size": 7, "reference_sha256": "0"}
    (tmp_path / "c").mkdir()
    labels = {"labels": {"dataset_kwargs": 5, "seed": "s"}}  # may not replace what the run is
    (tmp_path / "c/mem_traj.jsonl").write_text(json.dumps(record | labels) + "\n")
    (tmp_path / "d").mkdir()
    (tmp_path / "d/mem_traj.jsonl").write_text(json.dumps(record | {"labels": "x"}) + "\n")
    text = run_cli(emm.main, ["runs", tmp_path, "--per-run", f"--out={tmp_path / 'o.csv'}"]).output
    rows = {row["run"]: row for row in rows_of(tmp_path / "o.csv")}
    kinds = {name: row["ratio_of"] for name, row in rows.items()}
    assert kinds == {"a": "adaptive", "b": "other reference, class 3", "c": ""}
    assert (rows["c"]["size"], rows["c"]["snapshot_nimg"], rows["c"]["seed"]) == ("7", "", "")
    assert "measure them again" in text and "Left out: 1 run folder" in text


def test_no_run(tmp_path, run_cli):
    assert "No run found" in run_cli(emm.main, ["runs", tmp_path], code=1).output


def test_training_and_measuring_record_where_and_how_long(small_zip, tmp_path, run_cli):  # noqa: F811
    """A run that goes on names both sessions; the seconds are those that the clock says, or less."""
    run, args = tmp_path / "run", ["--nosubdir", "--data", small_zip, *TINY, "--resume=latest"]
    for kimg in (0.2, 1.02):
        run_cli(train.main, ["--outdir", run, *args, f"--total-kimg={kimg}"])
    options = json.loads((run / "training_options.json").read_text())
    first, second = options["sessions"]
    assert first["from_kimg"] == 0 and second["from_kimg"] == pytest.approx(0.2, abs=0.05)
    for entry in (first, second):
        assert entry["machine"] == machine_name("cpu") != "" and entry["torch"] == versions()["torch"]
        assert entry["commit"] == versions().get("git commit") and entry["threads"] == options["threads"]
    run_cli(mem_ratio.main, ["--expdir", run, "--knn-ref", small_zip, "--seeds=0-7", "--steps=2", "--device=cpu"])
    records = [json.loads(line) for line in (run / "mem_traj.jsonl").read_text().splitlines()]
    assert len(records) == 1 and all(0 < record["seconds"] < 60 for record in records)
    run_cli(emm.main, ["runs", run, f"--out={tmp_path / 'o.csv'}"])
    (row,) = rows_of(tmp_path / "o.csv")
    assert row["runs_without_time"] == row["measurements_without_time"] == "0" and float(row["training_sec"]) > 0
    assert float(row["measuring_sec"]) == pytest.approx(sum(record["seconds"] for record in records), abs=0.1)
    # Begun anew in another folder, only what happens there counts.
    run_cli(train.main, ["--outdir", tmp_path / "other", "--nosubdir", "--data", small_zip, *TINY, "--total-kimg=1.1",
                         "--resume", sorted(run.glob("training-state-*.pt"))[-1]])  # fmt: skip
    (only,) = json.loads((tmp_path / "other/training_options.json").read_text())["sessions"]
    assert only["from_kimg"] == pytest.approx(1.02, abs=0.05)


def link_to_itself(path):
    path.symlink_to(path.name)


def dangling(path):
    path.symlink_to("nowhere")


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, link_to_itself, dangling])
def test_statistics_that_are_no_file_count_as_missing(tmp_path, run_cli, make):
    write(tmp_path / "good", [session("aaa")], 10.0)
    write(tmp_path / "other", [session("aaa")], 30.0)
    path, out = tmp_path / "other/stats.jsonl", tmp_path / "origins.csv"
    path.unlink()

    def listed():
        text = run_cli(emm.main, ["runs", tmp_path, f"--out={out}"]).output
        return text, rows_of(out), trained_nimg(path.parent)

    missing = listed()
    make(path)  # a pipe that nobody writes to would be waited for without end
    assert listed() == missing and "10" in missing[1][0]["training_sec"]


@pytest.mark.parametrize("name", ["training_options.json", "mem_traj.jsonl"])
@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, link_to_itself, dangling])
def test_a_run_whose_files_are_none_is_left_out_and_said(tmp_path, run_cli, name, make):
    for run in ("good", "other"):
        write(tmp_path / run, [session("aaa")], 10.0)
    path = tmp_path / "other" / name
    path.unlink()
    make(path)
    for args in (["runs", tmp_path], ["curve", tmp_path]):
        result = run_cli(emm.main, args)
        assert f"{tmp_path / 'other'} ({name}: no regular file)" in result.stderr
        assert "Left out: 1 run folder" in result.stdout and str(tmp_path / "good") not in result.stderr
    with pytest.raises(OSError, match=name):
        read_run(tmp_path / "other")
    (tmp_path / "other").rename(tmp_path / "e\x1b[31m")
    text = run_cli(emm.main, ["curve", tmp_path / "e\x1b[31m"], code=1).stderr
    assert "\x1b" not in text and text.count("e\\x1b[31m") == 1


@pytest.mark.parametrize("make", [os.mkfifo, lambda path: path.symlink_to("/dev/zero")])
def test_no_file_of_a_run_is_waited_for(tmp_path, run_cli, make):
    """A state that cannot be read counts as not recorded, a picture as damaged."""
    write(tmp_path / "runs/run", [session("aaa")], 10.0)
    for name in ("run-state.json", "picture.png"):
        make(tmp_path / "runs/run" / name)
    for program in ("runs", "curve", "timescales", "report"):
        result = run_cli(emm.main, [program, tmp_path / "runs", *([] if program == "runs" else ["--out", tmp_path / (
            "r.html" if program == "report" else "c.png")])])  # fmt: skip
        assert "Left out: nothing" in result.stdout or program == "report"
    assert "not a readable PNG file" in (tmp_path / "r.html").read_text()


def test_damaged_measurements_of_other_images_leave_out_their_folder_alone(tmp_path, run_cli):
    write(tmp_path / "good", [session("aaa")], 10.0)
    (tmp_path / "other").mkdir()
    (tmp_path / "other/mem_traj.jsonl").write_text("none\nof this\n")
    result = run_cli(emm.main, ["runs", tmp_path])
    assert "no JSON object" in result.stderr and "Left out: 1 run folder" in result.stdout


def test_names_of_folders_that_are_no_text(tmp_path, run_cli):
    """They are read from the table as they are, and drawn from it as at first."""
    names = [os.fsdecode(b"a\xff"), "b\rc", "b\\rc", "d\ne", 'f,"g', "h$\\bad{$", "$" + "{" * 100 + "}" * 100 + "$"]
    for name in names:
        write(tmp_path / "runs" / name / "run", [session("aaa")], 10.0)
    out = tmp_path / "runs.csv"
    run_cli(emm.main, ["runs", tmp_path / "runs", "--per-run", f"--out={out}"])
    assert sorted(row["run"] for row in rows_of(out)) == sorted(
        f"{name}/run" for name in ["a\\udcff", *names[1:]]
    )  # fmt: skip
    for program, by in (("curve", ["--by=folder"]), ("trajectory", ["--by=folder"]), ("trajectory", ["--per-run"])):
        first, again = tmp_path / "first.png", tmp_path / "again.png"
        run_cli(emm.main, [program, tmp_path / "runs", *by, f"--out={first}"])
        some = by if program == "curve" else []
        run_cli(emm.main, [program, f"--from-csv={first.with_suffix('.csv')}", *some, f"--out={again}"])
        assert first.read_bytes() == again.read_bytes()
