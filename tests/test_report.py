"""emm.py report: the commands repeat the runs; the page is complete, harmless and self-contained, and works."""

import base64
import html.parser
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from builders import write_run
from chromium import Chromium, find_chromium
from click.testing import CliRunner
from conftest import ROOT, png

import emm
import mem_ratio
import train
from dnnlib.versions import versions
from memorization.curve.factors import differing_options
from memorization.curve.lines import curve_lines
from memorization.report.commands import measure_command, train_command
from memorization.report.folder import common, differing, find_pictures, read_runs_folder
from memorization.report.report import SCRIPT, _chart, _show, only_factor, write_report
from memorization.runs import Run

TINY = ["--cres=1", "--num-channels=8", "--num-blocks=1", "--attn-resolutions=4", "--batch=32", "--seed=7", "--tick=1"]
TINY += ["--device=cpu", "--snap=1", "--duration=6"]


@pytest.fixture(scope="module")
def digits_16(tmp_path_factory):
    import dataset_tool

    path = tmp_path_factory.mktemp("data") / "digits-16.zip"
    result = CliRunner().invoke(dataset_tool.main, ["--source=digits", f"--dest={path}", "--max-images=16"])
    assert result.exit_code == 0, result.output
    return str(path)


@pytest.fixture(scope="module")
def trained(digits_16, tmp_path_factory):
    """A small run, measured on a short sampler."""
    run = tmp_path_factory.mktemp("trained") / "digits-16"
    for main, args in (
        (train.main, [f"--outdir={run}", "--nosubdir", f"--data={digits_16}", *TINY]),
        (mem_ratio.main, [f"--expdir={run}", f"--knn-ref={digits_16}", "--seeds=0-7,9", "--steps=3", "--solver=euler"]),
    ):
        result = CliRunner().invoke(main, args)
        assert result.exit_code == 0, result.output
    return run


@pytest.fixture(scope="module")
def study(trained, tmp_path_factory):
    """Six measured runs of two widths, an unmeasured one, two damaged ones, and a picture."""
    root = tmp_path_factory.mktemp("study")
    for channels, counts in ((8, (62, 40, 10)), (16, (64, 60, 30))):
        for size, count in zip((8, 16, 32), counts):
            run = root / f"width-{channels}" / f"{size}"
            network = {"model_channels": channels}
            write_run(run, size, [count // 2, count], kimg=1, template=trained, num_channels=channels, network=network)
    shutil.copytree(trained, root / "unmeasured", ignore=shutil.ignore_patterns("mem_traj*", "knn-dist"))
    (write_run(root / "no-options", 8, [1], kimg=1, template=trained) / "training_options.json").write_text("{")
    (write_run(root / "no-records", 8, [1], kimg=1, template=trained) / "mem_traj.jsonl").write_text("")
    (root / "width-8" / "8" / "grid.png").write_bytes(png(np.eye(16, dtype=np.uint8) * 255))
    return root


class Elements(html.parser.HTMLParser):
    """All elements of a page as (name, attributes), and the text in them by name."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.text, self._open = [], {}, []
        self.feed(text)

    def handle_starttag(self, name, attributes):
        self.elements.append((name, dict(attributes)))
        if name not in ("meta", "img", "br"):
            self._open.append(name)

    def handle_endtag(self, name):
        assert self._open.pop() == name, "elements do not nest"

    def handle_data(self, data):
        if self._open:
            self.text.setdefault(self._open[-1], []).append(data)

    def all(self, name):
        return [attributes for each, attributes in self.elements if each == name]


def make_page(root, out, **how):
    write_report(read_runs_folder(root), out, **how)
    return out.read_text(encoding="utf-8")


# ----------------------------------------------------------------------------
# Commands.


def recorded(args):
    """The options that train.py would record; and those of its command that make a run what it is, with the rest."""
    result = CliRunner().invoke(train.main, [*args, "--dry-run", "--show-options"])
    assert result.exit_code == 0, result.output
    text = result.output
    options = json.loads(text[text.index("{") : text.rindex("\n}") + 2])
    command = {key: value for key, value in options["command"].items() if key not in ("outdir", "nosubdir", "desc")}
    return options, options | {"command": command, "num_blocks": None, "num_channels": None, "embed": None}


def test_train_commands_repeat_the_options(digits_16, digits_zip, trained, tmp_path):
    base = [f"--outdir={tmp_path}/first", f"--data={digits_16}", "--num-blocks=1", "--cres=1"]  # quick to build
    odd = ["--lr=1.2345e-05", "--dropout=0.1", "--ema=0.7", "--weight-decay=1e-7", "--duration=0.3", "--ls=0.5"]
    odd += ["--batch=48", "--batch-gpu=16", "--window-size=0.25", "--bench=0", "--cache=0", "--workers=2", "--xflip=1"]
    odd += ["--tick=3", "--snap=4", "--dump=5", "--seed=4294967295", "--augment=0.3"]
    odd += ["--keep-states=2", "--max-nan-ticks=0", "--deterministic"]
    snapshot = sorted(trained.glob("network-snapshot-*"))[-1]
    state = sorted(trained.glob("training-state-*"))[-1]
    cases = [
        [],
        odd,
        ["--arch=adm", "--num-channels=32", "--num-blocks=2", "--precond=vp", "--attn-resolutions=8,4"],
        ["--arch=ncsnpp", "--precond=ve", "--embed=fourier", "--cbase=16", "--num-channels=32", "--cres=1,2"],
        ["--cres=1,1", "--skip-connections=0,1,1,0", "--optimizer=SGD", "--momentum=0.5"],
        ["--ema_mode=mode3"],
        ["--ema_mode=mode4", "--final-ema=0.99"],
        [f"--data={digits_zip}", "--cond=1"],
        ["--mem-eval=64", "--stop-at-mem=0.9", "--stop-patience=3"],
        [
            "--mem-eval=64",
            f"--quality-eval={digits_zip}",
            "--quality-measures=kernel,frechet",
            "--quality-space=pixels",
        ],
        ["--mem-eval=64", f"--quality-eval={digits_zip}", "--quality-features=a.pt", "--best-mem-below=0.25"],
        ["--total-kimg=3", "--lr-rampup=5", "--ema=0"],
        ["--total-steps=30", "--snap-at=20:30:4", "--precond=vp", "--vp-steps=50"],
        [*TINY, f"--transfer={snapshot}"],
        [*TINY, f"--resume={state}", "--duration=20"],
    ]
    seen = set()
    for case in cases:
        options, wanted = recorded(base + case)
        words = train_command(options, tmp_path / "again", "cpu")
        assert words[:2] == ["python", "train.py"]
        again = recorded(words[2:])[1]
        wanted["command"]["device"] = "cpu"
        assert again == wanted
        assert options["command"].keys() == {param.name for param in train.main.params}
        seen |= {word.split("=")[0] for word in words if word.startswith("--")}
    options["command"] |= {"tensorboard": True, "compile": True}
    seen |= set(train_command(options, tmp_path))

    # An option that train.py learns later must find its way into the commands.
    flags = {p.opts[-1] for p in train.main.params}
    assert flags - seen == {"--desc", "--dry-run", "--overwrite", "--show-options"}
    assert flags == {f"--{p.name.replace('_', '-')}" for p in train.main.params}  # what a loop over the names needs


def test_train_command_words(trained, tmp_path):
    options = json.loads((trained / "training_options.json").read_text())
    words = train_command(options | {"num_processes": 4}, tmp_path / "a b", "cuda")
    assert words[:4] == ["torchrun", "--standalone", "--nproc_per_node=4", "train.py"]
    assert f"--outdir={tmp_path}/a b" in words and "--device=cuda" in words and "--duration=6" in words
    command = options["command"]
    for damaged in (
        {},
        options | {"command": None},
        options | {"command": command | {"seed": {}}},
        options | {"num_processes": "x"},
    ):
        with pytest.raises(ValueError, match="not as train.py writes it"):
            train_command(damaged, tmp_path)


def test_folders_from_before_the_command_was_recorded(study, tmp_path):
    """They give the same curve and the same table; only the commands of their training are missing, which is said."""
    before = tmp_path / "before"
    shutil.copytree(study / "width-8", before / "width-8")
    shutil.copytree(study / "width-16", before / "width-16")
    for path in before.rglob("training_options.json"):
        options = json.loads(path.read_text())
        del options["command"]
        path.write_text(json.dumps(options))
    new, old = read_runs_folder(study), read_runs_folder(before)
    assert old.runs.keys() == new.runs.keys() and only_factor(old) == only_factor(new) == "num_channels"
    for name, run in new.runs.items():
        found = old.runs[name].command
        shared = run.command.keys() & found.keys()
        assert {key: found[key] for key in shared} == {key: run.command[key] for key in shared}
        assert (
            not {"arch", "batch", "cres", "lr", "dropout", "num_channels", "precision", "weight_decay"} - found.keys()
        )
    lines, lines_before = (curve_lines(each.runs.values(), "num_channels")[0] for each in (new, old))
    assert [(line.value, line.emm, line.points) for line in lines] == [
        (line.value, line.emm, line.points) for line in lines_before
    ]
    text = Elements(make_page(before, tmp_path / "page.html")).text
    assert sum("No command for the training: this run was trained before" in p for p in text["p"]) == 6
    assert sum("mem_ratio.py" in pre for pre in text["pre"]) == 6
    assert not any("train.py" in pre for pre in text["pre"])
    mixed = [*list(new.runs.values())[:1], *list(old.runs.values())[2:3]]
    assert differing_options(mixed) == []


def test_what_has_no_effect_is_not_recorded(digits_16):
    """An option without effect is null; one whose default depends on others is what it came to."""
    base = ["--outdir=runs", f"--data={digits_16}", "--num-blocks=1", "--num-channels=8", "--cres=1"]
    command = recorded(base)[0]["command"]
    assert [command[k] for k in ("momentum", "final_ema", "stop_patience", "cbase", "desc")] == [None] * 5
    assert (command["attn_resolutions"], command["skip_connections"]) == ([16], [1, 1])
    assert command["precision"] == "fp32" and type(command["seed"]) is int and command["bench"] is True
    command = recorded([*base, "--cbase=16", "--ema_mode=mode3", "--deterministic"])[0]["command"]
    assert (command["cbase"], command["num_channels"], command["ema"], command["bench"]) == (16, 16, None, False)


def test_measure_command_finds_all_measured(trained, run_cli):
    """The rebuilt command has the recorded settings: it finds every snapshot measured before."""
    (run,) = read_runs_folder(trained).runs.values()
    (record,) = run.measurements
    words = measure_command(record, trained)
    assert words[:2] == ["python", "mem_ratio.py"] and {"--seeds=0-7,9", "--steps=3", "--solver=euler"} <= set(words)
    before = (trained / "mem_traj.jsonl").read_text()
    run_cli(mem_ratio.main, [*words[2:], "--device=cpu"])
    assert (trained / "mem_traj.jsonl").read_text() == before
    with pytest.raises(ValueError, match="lacks settings"):
        measure_command({"seeds": "0-7"}, trained)
    more = {"adaptive": {"bar": 0.9, "confidence": 0.99}, "class": 3, "thresholds": {"0.25": {}, "0.5": {}}}
    words = measure_command(record | more | {"criteria": {"calibrated": {}, "features:ratio": {}}}, trained)
    wanted = {"--adaptive=0.9", "--confidence=0.99", "--class=3", "--threshold=0.25", "--criterion=calibrated"}
    assert wanted <= set(words) and not any("features" in word for word in words)
    parsed = mem_ratio.main.make_context("mem_ratio.py", words[2:]).params
    assert (parsed["bar"], list(parsed["thresholds"]), list(parsed["criteria"])) == (0.9, [0.25, 0.5], ["calibrated"])


@pytest.mark.slow
def test_commands_can_be_pasted(study, trained, tmp_path):
    """A shell takes the text apart into the words of the command, whatever the files are called."""
    name = 'it\'s 100 % "odd" $HOME'
    run = write_run(tmp_path / name, 8, [60], kimg=1, template=trained, dataset={"path": f"/data/{name}\n.zip"})
    (text,) = [text for text in Elements(make_page(tmp_path, tmp_path / "x.html")).text["pre"] if "train.py" in text]
    assert max(map(len, text.splitlines())) < 110
    shown = subprocess.run(["bash", "-c", 'python() { printf "%s\\0" "$@"; }; ' + text], capture_output=True, text=True)
    options = json.loads((run / "training_options.json").read_text())
    target = f"{tmp_path.name}-again/{name}"
    (found,) = read_runs_folder(tmp_path).runs.values()
    wanted = train_command(options, target, "cpu")[1:] + measure_command(found.measurements[0], target)[1:]
    assert shown.stdout.split("\0")[:-1] == wanted


# ----------------------------------------------------------------------------
# What is read.


def test_a_study_is_read_as_far_as_it_can_be(study, trained):
    found = read_runs_folder(study)
    assert [(run.size, name) for name, run in found.runs.items()] == [
        (size, f"width-{width}/{size}") for size in (8, 16, 32) for width in (16, 8)
    ]
    assert "mem_ratio.py" in found.left_out["unmeasured"]
    assert "total_nimg" in found.left_out["no-options"]
    assert "no measurement" in found.left_out["no-records"]
    ((name, run),) = read_runs_folder(trained).runs.items()
    stats = [json.loads(line) for line in (trained / "stats.jsonl").read_text().splitlines()]
    assert run.seconds == pytest.approx(stats[-1]["Timing/total_sec"]["mean"])
    assert run.losses[-1] == pytest.approx((run.epochs, stats[-1]["Loss/loss"]["mean"]), rel=0.02)
    assert (run.device, run.state["state"], name) == ("cpu", "complete", "digits-16")


def test_time_of_a_resumed_run_is_of_all_sessions(trained, tmp_path):
    run = write_run(tmp_path / "run", 8, [1], kimg=1, template=trained)
    entries = [(1, 5.0, 2.0), (2, 9.0, 1.0), (3, 4.0, 0.5)]  # kimg, seconds since this session began, loss
    keys = ("Progress/kimg", "Timing/total_sec", "Loss/loss")
    lines = [json.dumps({key: {"mean": value} for key, value in zip(keys, entry)}) for entry in entries]
    (run / "stats.jsonl").write_text("\n".join([*lines, '{"Progress/kimg": {"me']))
    (found,) = read_runs_folder(tmp_path).runs.values()
    assert found.seconds == 13
    assert found.losses == [(125, 2.0), (250, 1.0), (375, 0.5)]


def test_damaged_numbers_leave_a_run_out_or_a_gap(trained, tmp_path):
    write_run(tmp_path / "good", 8, [60], kimg=1, template=trained)
    write_run(tmp_path / "impossible", 8, [65], kimg=1, template=trained)
    write_run(tmp_path / "endless", 8, [60], kimg=1, template=trained, total_nimg=float("inf"))
    (tmp_path / "good" / "stats.jsonl").write_text(
        '{"Progress/kimg": {"mean": 1}, "Loss/loss": {"mean": NaN}, "Timing/total_sec": {"mean": NaN}}\n'
        '[]\n{"Progress/kimg": 3}\n{"Progress/kimg": {"mean": 2}, "Loss/loss": {"mean": 0.5}}\n'
    )
    found = read_runs_folder(tmp_path)
    assert list(found.runs) == ["good"] and found.runs["good"].losses == [(250, 0.5)]
    assert "num_memorized" in found.left_out["impossible"] and "total_nimg" in found.left_out["endless"]
    assert "impossible num_memorized" in make_page(tmp_path, tmp_path / "report.html")


def test_options_that_differ_and_that_do_not():
    commands = [{"seed": 1, "arch": "adm", "width": w} for w in (8, 16)]
    commands[1]["extra"] = None
    commands[1]["new"] = False
    assert differing(commands) == {"new": [None, False], "width": [8, 16]}
    assert common(commands) == {"arch": "adm", "seed": 1}


def test_the_only_factor(study, trained, tmp_path):
    assert only_factor(read_runs_folder(study)) == "num_channels"
    write_run(tmp_path / "a", 8, [1], kimg=1, template=trained)
    assert only_factor(read_runs_folder(tmp_path)) is None
    write_run(tmp_path / "b", 16, [1], kimg=1, template=trained, augment=0.5, precond="vp")
    assert only_factor(read_runs_folder(tmp_path)) is None


def test_pictures_have_limits(tmp_path):
    run = tmp_path / "runs" / "a"
    (run / "samples").mkdir(parents=True)
    small = png(np.zeros((8, 8), dtype=np.uint8))
    for name in ("curve.png", "000003.png", "runs/grid.png", "runs/a/hist.png", "runs/a/samples/x.png"):
        (tmp_path / name).write_bytes(small)
    (run / "large.png").write_bytes(small + bytes(1000))
    (run / "broken.png").write_bytes(small[:40])
    (run / "page.png").write_text("<svg onload=alert(1)>")
    pictures, left_out = find_pictures(tmp_path, [run], each=1000)
    assert pictures == dict.fromkeys(["curve.png", "runs/a/hist.png", "runs/grid.png"], small)
    assert left_out == {
        "runs/a/broken.png": "not a readable PNG file",
        "runs/a/large.png": "larger than 0 MiB",
        "runs/a/page.png": "not a readable PNG file",
    }
    pictures, left_out = find_pictures(tmp_path, [run], total=2 * len(small))
    assert list(pictures) == ["curve.png", "runs/a/hist.png"] and "in all" in left_out["runs/grid.png"]


# ----------------------------------------------------------------------------
# The page.


def test_the_command_writes_the_page(study, run_cli, tmp_path):
    out = tmp_path / "new" / "page.html"
    result = run_cli(emm.main, ["report", study, f"--out={out}", "--title=Width & depth"])
    assert result.stderr.count("Left out: ") == 3 and str(out) in result.output
    page = out.read_text(encoding="utf-8")
    elements = Elements(page)
    assert elements.text["h1"] == ["Width & depth"] == elements.text["title"][:1]
    lines, _ = curve_lines(read_runs_folder(study).runs.values(), "num_channels")
    for line in lines:
        assert line.emm.place in elements.text["b"]
        assert f"{line.interval_name} {line.emm_interval}" in elements.text["span"]
    assert "emm.py report" in page and "--by=num_channels" in page
    for name in ("width-8/8", "width-16/32", "unmeasured", "no-options", "no-records"):
        assert name in elements.text["code"]
    assert {versions()["torch"], versions()["python"]} <= set(elements.text["td"])
    train_lines = [text for text in elements.text["pre"] if "train.py" in text]
    assert len(train_lines) == 6 and all("mem_ratio.py" in text for text in train_lines)


def test_everything_lies_in_the_page(study, tmp_path):
    elements = Elements(make_page(study, tmp_path / "report.html"))
    for name, attributes in elements.elements:
        assert not {"href", "srcset", "action", "data", "poster"} & attributes.keys(), (name, attributes)
        assert attributes.get("src", "data:").startswith("data:")
    assert not elements.all("link") and not elements.all("iframe")
    images = elements.all("img")
    assert len(images) == 3 and all(image["alt"] for image in images)
    picture = base64.b64decode(images[-1]["src"].partition(",")[2])
    assert picture == (study / "width-8" / "8" / "grid.png").read_bytes()
    charts = elements.all("svg")
    assert len(charts) == 6 and all(chart["role"] == "img" and chart["aria-label"] for chart in charts)
    (policy,) = [meta["content"] for meta in elements.all("meta") if "http-equiv" in meta]
    assert policy.startswith("default-src 'none'; img-src data:;") and "unsafe" not in policy


def test_text_from_files_stays_text(study, trained, tmp_path):
    evil = '"><script>alert(1)</script><img src=x onerror=alert(2)>&amp;'
    name = "<b onclick=alert(3)>run"
    run = write_run(
        tmp_path / name, 8, [60], kimg=1, template=trained, arch=evil, seed=evil, dataset={"path": f"{evil}.zip"}
    )
    options = json.loads((run / "training_options.json").read_text())
    (run / "training_options.json").write_text(json.dumps(options | {evil: evil, "versions": {evil: evil}}))
    (run / "log.txt").write_text(f"Network has 1 parameters on {evil}.\n")
    (run / f"grid{name}.png").write_bytes(png(np.zeros((8, 8), dtype=np.uint8)))
    plan = {"settings": {evil: evil}, "decisions": [{"size": evil, "why": evil, "runs": evil}], "result": {evil: evil}}
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    (tmp_path / "<i>bad").mkdir()
    (tmp_path / "<i>bad" / "training_options.json").write_text("{}")
    plain = Elements(make_page(study, tmp_path / "plain.html"))
    elements = Elements(make_page(tmp_path, tmp_path / "report.html", title=evil, command=["emm.py", evil]))
    assert elements.text["h1"] == [evil]
    assert elements.text["script"] == [SCRIPT]
    assert {each for each, _ in elements.elements} <= {each for each, _ in plain.elements} | {"caption"}
    for each, attributes in elements.elements:
        assert not [key for key in attributes if key.startswith("on")], (each, attributes)
        assert each != "img" or attributes["src"].startswith("data:")
    for text in (name, "<i>bad", f"{name}/grid{name}.png"):
        assert text in elements.text["code"]


def test_a_plan_is_a_table(study, trained, tmp_path):
    write_run(tmp_path / "runs" / "digits-16-seed0", 16, [60], kimg=1, template=trained)
    run = {"run": "digits-16-seed0", "verdict": "above", "ratio": 0.95, "images": 320, "kimg": 1}
    decision = {"size": 16, "above": True, "certain": True, "ratio": 0.95, "runs": [run], "why": "the middle of it"}
    result = {"emm": 18.2, "verdict": "at", "level": 0.9, "bracket": [16, 20], "certain": True, "trained_kimg": 12.5}
    plan = {"format": 1, "settings": {"source": "digits"}, "decisions": [decision | {"bracket": [16, None]}]}
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(plan | {"started": {}, "dropped": [24], "result": result}))
    elements = Elements(make_page(tmp_path, tmp_path / "report.html"))
    assert {"the middle of it", "95.00", "at or above", "320", "at least 16"} <= set(elements.text["td"])
    found = "EMM (90 %) ≈ 18.2, between 16 and 20; each end of the bracket is certain; 12.5 thousand images trained on"
    assert f"Found: {found}." in elements.text["p"]
    assert any("|D| = [24]" in text for text in elements.text["p"])
    path.write_text(json.dumps(plan | {"result": None}))
    assert "has not ended" in make_page(tmp_path, tmp_path / "report.html")
    path.write_text("{")
    assert "plan.json is left out" in make_page(tmp_path, tmp_path / "report.html")


def test_runs_of_several_options_are_pooled_with_a_note(trained, tmp_path):
    write_run(tmp_path / "a", 8, [60], kimg=1, template=trained, augment=0.5)
    write_run(tmp_path / "b", 16, [40], kimg=1, template=trained, window_size=0.0)
    page = make_page(tmp_path, tmp_path / "report.html")
    assert "differ in more than |D| and seed: augment, window_size." in page


def test_refusals_leave_nothing(study, tmp_path):
    (tmp_path / "empty").mkdir()
    for args, message in [
        (["report", tmp_path / "none"], "is not a folder"),
        (["report", tmp_path / "empty"], "No measured run"),
        (["report", study, f"--out={tmp_path}"], "name a file"),
        (["report", study, f"--out={tmp_path}/page.html", "--level=90"], "between 0 and 1"),
        (["report", study, f"--out={tmp_path}/page.html", "--by=nothing"], "nothing"),
    ]:
        result = CliRunner().invoke(emm.main, [str(arg) for arg in args])
        assert result.exit_code == 1 and isinstance(result.exception, SystemExit)
        assert message in result.stderr.splitlines()[-1]
    assert [path.name for path in tmp_path.iterdir()] == ["empty"]


# ----------------------------------------------------------------------------
# Versions, and the page in a browser.


@pytest.mark.slow
def test_versions_know_the_commit_of_a_clone_only(tmp_path):
    found = versions()
    assert {"python", "torch", "numpy", "diffusion-memorization", "platform"} <= found.keys()
    if shutil.which("git") and (ROOT / ".git").exists():
        head = subprocess.run(["git", "-C", ROOT, "rev-parse", "HEAD"], capture_output=True, text=True).stdout
        assert head.startswith(found["git commit"].removesuffix("-dirty"))
    (tmp_path / "dnnlib").mkdir()
    shutil.copy(ROOT / "dnnlib" / "versions.py", tmp_path / "dnnlib")
    code = "import runpy, sys; print('git commit' in runpy.run_path(sys.argv[1])['versions']())"
    command = [sys.executable, "-c", code, str(tmp_path / "dnnlib" / "versions.py")]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "False\n"


@pytest.mark.slow
@pytest.mark.skipif(find_chromium() is None, reason="no Chromium or Chrome is installed")
def test_in_chromium(study, tmp_path):
    out = Path(tmp_path / "report.html")
    make_page(study, out, by="num_channels")
    with Chromium(tmp_path / "profile") as browser:
        browser.open(out)
        assert browser.logged == []
        assert [address for address in browser.requested if not address.startswith("data:image/")] == [
            out.as_uri()[:60]
        ]
        images = browser.evaluate("[...document.images].map(image => [image.naturalWidth, image.alt])")
        assert len(images) == 3 and all(width > 0 for width, _ in images)
        rows = "[...document.querySelectorAll('#runs tbody tr')].map(row => [...row.cells].map(c => c.textContent))"
        before = browser.evaluate(rows)
        assert [row[1] for row in before] == ["8", "8", "16", "16", "32", "32"]
        heads = browser.evaluate("[...document.querySelectorAll('#runs th')].map(head => head.textContent)")
        column = heads.index("R_mem %")
        click = f"document.querySelectorAll('#runs th button')[{column}].click()"
        for sign in (1, -1):
            browser.evaluate(click)
            after = browser.evaluate(rows)
            assert sorted(after) == sorted(before)
            ratios = [float(row[column]) for row in after]
            assert ratios == sorted(ratios, reverse=sign < 0) and len(set(ratios)) > 2
        light = browser.evaluate("getComputedStyle(document.body).backgroundColor")
        browser.screenshot(tmp_path / "light.png")
        assert len(np.unique(np.asarray(_pixels(tmp_path / "light.png")).reshape(-1, 3), axis=0)) > 50  # not blank

        browser.open(out, width=400, dark=True)
        assert browser.evaluate("document.documentElement.scrollWidth") <= 400  # nothing sticks out
        assert browser.evaluate("getComputedStyle(document.body).backgroundColor") != light
        assert browser.logged == []


def _pixels(path):
    import PIL.Image

    with PIL.Image.open(path) as image:
        return image.convert("RGB").copy()


def test_digests_are_shortened_and_the_ratio_comes_before_the_options(study, tmp_path):
    page = make_page(study, tmp_path / "page.html", by="num_channels")
    head = page[page.index(">Runs<") :]
    assert head.index("R_mem %") < head.index("seed") < head.index("num_channels")
    assert _show("ab12cd34" + "0" * 56) == "ab12cd34…" and _show("listing:ab12cd34" + "0" * 56) == "listing:ab12cd34…"
    assert _show("training-runs") == "training-runs"


def test_quality_of_a_run_is_a_curve_and_a_panel_of_its_chart(tmp_path):
    """By the first measure; a record with other settings than the last is no point of it."""

    def record(kimg, value, dataset="a"):
        entry = {"frechet": {"value": value, "ci_low": value - 1, "ci_high": value + 1}}
        floors = {"training": {"measures": {"frechet": {"value": 5.0}}}, "heldout": {"measures": {}}}
        quality = {"dataset_sha256": dataset, "num_reference": 9, "num_samples": 8, "space": {"name": "pca"}}
        quality |= {"measures": entry, "floors": floors}
        return dict(kimg=kimg, nimg=1000 * kimg, num_samples=8, num_memorized=2, quality=quality)

    records = (record(1, 9.0, dataset="b"), record(2, 7.0), record(3, 6.0))
    options = {"dataset_kwargs": {"max_size": 100}, "total_nimg": 3000}
    run = Run(tmp_path, options, records, records)
    assert run.quality.points == ((20, 7, 6, 8), (30, 6, 5, 7)) and run.quality.floors == {"training set": 5}
    chart = _chart("x", run, 0.9)
    assert len(chart["quality"]["dots"]) == 2 and chart["quality"]["most"] == "7" and chart["quality"]["least"] == "5"
    assert "Fréchet distance" in [text for _, _, text, _ in chart["texts"]]
    plain = tuple({**r, "quality": None} for r in records)
    assert _chart("x", Run(tmp_path, options, plain, plain), 0.9)["quality"] is None
