"""emm.py search: which sizes it asks for, how often its interval is right, and that it goes on where it was."""

import json
import math
import os
import signal
import subprocess
import sys

import numpy as np
import psutil
import pytest
import torch
from builders import wait_for
from conftest import ROOT
from scipy.special import expit, logit

import emm
from benchmarks import bench_search
from dnnlib.locks import file_lock
from memorization.runs import read_run, trained_nimg
from memorization.search import job
from memorization.search.cost import Queued, is_done
from memorization.search.design import MIN_RUNS, bracket, candidates, fit, grid_of_same_precision, next_sizes, sides
from memorization.search.executors import LocalExecutor, SubmititExecutor, visible_gpus
from memorization.search.job import SearchJob, last_words, more_training, other_options
from memorization.search.search import Plan, Range, Search, SearchSpec, choose_subset, describe_result
from memorization.stats.crossing import fit_crossing
from training.dataset import ImageFolderDataset
from training.run.state import NOT_FINITE

LOW, HIGH, LEVEL, TRUE_EMM, SLOPE = 8, 128, 0.9, 31, 2.66


def falling(size, seed=None):
    """A curve like that of the digits, whose seeds differ by a standard deviation of 0.2 of the logit."""
    noise = 0 if seed is None else 0.2 * np.random.default_rng([seed, size]).normal()
    return float(expit(logit(LEVEL) - SLOPE * math.log(size / TRUE_EMM) + noise))


class FakeExecutor:
    """Leaves what a finished run leaves; the ratio is a function of |D| and seed. `die_at` raises, not starts."""

    interval = 0.01

    def __init__(self, ratio=falling, samples=1000, die_at=None):
        self.ratio, self.samples, self.die_at = ratio, samples, die_at
        self.started, self.now, self.most = [], 0, 0

    def left(self, record):
        """What is left of a measurement: a record for each snapshot."""
        return [record]

    def start(self, path, known_id=None):
        if len(self.started) == self.die_at:
            raise KeyboardInterrupt
        size, seed = int(path.stem.split("-")[1]), int(path.stem.rpartition("seed")[2])
        self.started.append((size, seed))
        self.now += 1
        self.most = max(self.most, self.now)
        return FakeJob(self, path, size, seed)


class FakeJob:
    def __init__(self, executor, path, size, seed):
        self.executor, self.path, self.size, self.seed, self.id = executor, path, size, seed, f"job-{size}"
        self.status = None

    def poll(self):
        if self.status is None:
            self.finish(0)
        return self.status

    def stop(self):
        self.finish(75)

    def finish(self, status):
        self.status = status
        self.executor.now -= 1
        folder = self.path.parent.parent / "runs" / self.path.stem
        folder.mkdir(parents=True, exist_ok=True)
        nimg = 1000 * self.size
        stats = {"Progress/kimg": {"num": 1, "mean": nimg / 1000, "std": 0}}
        (folder / "stats.jsonl").write_text(json.dumps(stats) + "\n")
        if status == 0:
            options = {"dataset_kwargs": {"max_size": self.size}, "total_nimg": nimg}
            (folder / "training_options.json").write_text(json.dumps(options))
            n = self.executor.samples
            record = dict(kimg=self.size, num_memorized=round(self.executor.ratio(self.size, self.seed) * n))
            record.update(num_samples=n, snapshot="x", seeds=f"0-{n - 1}")
            lines = [json.dumps(each) + "\n" for each in self.executor.left(record)]
            (folder / "mem_traj.jsonl").write_text("".join(lines))


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "search"


def make_spec(folder, **options):
    subset, largest = choose_subset("digits", "first")
    return SearchSpec(
        outdir=folder, source="digits", subset=subset, largest=largest, duration=50, images=1000, **options
    )


def run_search(folder, executor, low=LOW, high=HIGH, spec=None, **where):
    """Run or continue the search in `folder`; return its EMM, plan and messages."""
    spec, said = spec or make_spec(folder), []
    plan = Plan(folder / "plan.json", spec.settings())
    search = Search(spec, Range(low, high, **where), plan, executor, report=said.append)
    return search.run(), plan, said


def sizes(plan):
    return [decision["size"] for decision in plan.decisions]


# ----------------------------------------------------------------------------
# Which sizes.


def test_search_finds_the_crossing(folder):
    executor = FakeExecutor()
    found, plan, said = run_search(folder, executor)
    result = plan.result
    low, high = result["low"]["size"], result["high"]["size"]
    assert found.verdict == "at" and low <= TRUE_EMM <= high and high / low <= 1.2 and result["as_asked"]
    assert executor.started == [(size, seed) for seed, size in enumerate(sizes(plan))] and executor.most == 1
    assert sizes(plan)[0] == 32 and HIGH not in sizes(plan)[4:]  # the middle of 8 to 128 in log
    assert said[0] == "Next: |D| = 32, the middle of 8 to 128 in log |D|."
    assert any("where a run tells most of EMM per training image" in line for line in said)
    assert any(line.startswith("|D| = 32: R_mem ") and "EMM (90 %)" in line for line in said)
    assert MIN_RUNS <= len(plan.decisions) == result["runs"] and result["trained_kimg"] == sum(sizes(plan))
    assert 2 * result["trained_kimg"] < sum(result["grid"]["sizes"]) * result["grid"]["runs_per_size"]
    words = describe_result(found, result)
    assert words[0].startswith("EMM (90 %) ≈ ") and "90 % interval of EMM over images and training seeds" in words[1]


def test_a_search_says_that_ratios_still_rise(folder):
    class Learning(FakeExecutor):
        """Each run has half of its ratio at half of its training."""

        def left(self, record):
            half = dict(record, kimg=record["kimg"] / 2, snapshot="half", num_memorized=record["num_memorized"] // 2)
            return [half, record]

    found, plan, _ = run_search(folder, Learning())
    words = describe_result(found, plan.result)[-1]
    assert words.startswith("Note: R_mem still rises in the second half of the training, at |D| = ")
    found, plan, _ = run_search(folder.with_name("other"), FakeExecutor())
    assert not plan.result["notes"] and not any("rises" in line for line in describe_result(found, plan.result))


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("true_emm", [9, 22, 50, 101])
def test_sizes_gather_at_the_crossing(true_emm, count):
    """First the crossing is bracketed; then the runs lie about it, and none is dearer than it needs to be."""
    runs = []
    while len(runs) < 12:
        batch = next_sizes(runs, LOW, HIGH, images=1000, count=count)
        assert 1 <= len(batch) <= count and batch == sorted(batch) and all(LOW <= size <= HIGH for size in batch)
        p = [expit(logit(LEVEL) - SLOPE * math.log(size / true_emm)) for size in batch]
        runs += [(size, round(1000 * q), 1000) for size, q in zip(batch, p)]
    late = np.array([size for size, *_ in runs[6:]])
    assert (late > true_emm / 5).all() and (late > true_emm / 2).sum() >= 5 and (late < 3.5 * true_emm).all()
    a, b = bracket(sides(runs, LEVEL))
    assert a <= true_emm <= b
    assert math.exp(fit(runs, LEVEL).quantile(0.5)[0]) == pytest.approx(true_emm, rel=0.03)


def test_the_next_size_lowers_the_variance_by_most_per_image():
    """Beside every other candidate: the same fit with one more run there, and the images that it takes."""
    runs = [(size, round(1000 * falling(size)), 1000) for size in (8, 16, 32, 32, 64, 23)]
    (chosen,) = next_sizes(runs, LOW, HIGH, images=1000)

    def gain(size):
        more = [*runs, (size, round(1000 * falling(size)), 1000)]
        spread = [fit_crossing(*np.array(each).T, LEVEL, seed_sd=0.2).interval(0.9) for each in (runs, more)]
        before, after = (float(high[0] - low[0]) for low, high in spread)
        return math.log(before / after) / size

    gains = {int(size): gain(int(size)) for size in candidates(LOW, HIGH)}
    assert gains[chosen] > 0.7 * max(gains.values())


def test_grid_of_the_same_precision():
    """By the formula of the variance of a ratio of two regression coefficients, and by the fit itself."""
    grid, runs = grid_of_same_precision(31, -SLOPE, 0.3, 8, 128, level=LEVEL, images=10_000, sd=0.03)
    assert grid == [8, 16, 32, 64, 128] and runs > 2
    rng = np.random.default_rng(0)
    size = np.repeat(grid, runs).astype(float)
    p = expit(logit(LEVEL) - SLOPE * np.log(size / 31) + 0.3 * rng.normal(size=(300, len(size))))
    k = rng.binomial(10_000, p)
    spread = fit_crossing(size, k, np.full(k.shape, 10_000), LEVEL, seed_sd=0.3).quantile(0.5).std()
    assert 0.7 * 0.03 < spread < 1.2 * 0.03
    assert grid_of_same_precision(31, -SLOPE, 0.3, 8, 128, level=LEVEL, images=10_000, sd=1)[1] == 2


@pytest.mark.parametrize(("curve", "tau"), [(0, 0.0), (0, 0.3), (1, 0.2)])
def test_the_interval_of_a_search_covers(curve, tau):
    """Nominal 90 %, by 40 simulated searches, at half of a grid's cost; benchmarks/bench_search.py has the table."""
    curve = bench_search.CURVES[curve]
    found = bench_search.search(curve, tau, 1000, 40)
    assert 0.76 <= found.covers(curve.truth(tau)) and (found.high - found.low <= math.log(1.2)).all()
    assert found.images.mean() < 0.6 * bench_search.grid(curve, tau, 1000, found.length(), studies=20)[1]


def test_simulated_searches_are_those_of_the_program():
    """The sizes of one of several simulated searches that go on together, asked for one by one."""
    curve, chosen = bench_search.CURVES[1], []
    found = bench_search.search(curve, 0.2, 1000, 3, on_run=lambda *run: chosen.append(run))
    runs = []
    for _, size, k in (run for run in chosen if run[0] == 2):
        assert next_sizes(runs, curve.low, curve.high, images=1000) == [size]
        runs.append((size, k, 1000))
    assert len(runs) == found.runs[2]
    ends = fit(runs, LEVEL).interval(0.9)
    assert (ends[0][0], ends[1][0]) == pytest.approx((found.low[2], found.high[2]), abs=1e-3)


def test_never_crossing(folder, tmp_path):
    found, plan, said = run_search(folder, FakeExecutor(lambda size, seed: 0.99))
    assert (found.verdict, found.size) == ("at least", HIGH) and sizes(plan)[:3] == [32, 64, 128]
    assert set(sizes(plan)[3:]) == {128} and len(plan.decisions) < MIN_RUNS
    found, plan, _ = run_search(tmp_path / "below", FakeExecutor(lambda size, seed: 0.2))
    assert (found.verdict, found.size) == ("below", LOW) and set(sizes(plan)[2:]) == {8}
    assert "at the smallest size that was tried is below 90 %" in " ".join(describe_result(found, plan.result))


def test_expand(tmp_path):
    found, plan, _ = run_search(tmp_path / "up", FakeExecutor(), low=2, high=10, expand=True)
    assert found.verdict == "at" and found.size == pytest.approx(TRUE_EMM, rel=0.2)
    found, plan, _ = run_search(tmp_path / "down", FakeExecutor(), low=64, high=256, expand=True)
    assert found.verdict == "at" and found.size == pytest.approx(TRUE_EMM, rel=0.2)
    found, plan, _ = run_search(tmp_path / "all", FakeExecutor(lambda size, seed: 1.0), low=500, high=1000, expand=True)
    assert (found.verdict, found.size) == ("at least", 1797)  # all that the source has
    found, plan, _ = run_search(tmp_path / "none", FakeExecutor(lambda size, seed: 0.0), low=5, high=20, expand=True)
    assert (found.verdict, found.size) == ("below", 2)  # d1 / d2 needs two images


def test_what_the_seeds_do_not_carry_is_said(folder):
    """A tolerance that is finer than the runs allow: the interval is what it is, and the words say so."""
    found, plan, _ = run_search(folder, FakeExecutor(), tolerance=1.01, max_runs=9)
    low, high = plan.result["low"]["size"], plan.result["high"]["size"]
    assert len(plan.decisions) == 9 and not plan.result["as_asked"] and high / low > 1.01
    assert "--max-runs=9 runs do not carry --tolerance=1.01" in describe_result(found, plan.result)[-1]


def test_jobs_at_a_time(folder):
    executor = FakeExecutor()
    found, plan, said = run_search(folder, executor, jobs=3)
    assert executor.most == 3 and sorted(size for size, _ in executor.started[:3]) == [16, 32, 64]
    assert len({seed for _, seed in executor.started}) == len(executor.started)  # each run has a seed of its own
    assert found.size == pytest.approx(TRUE_EMM, rel=0.2) and plan.started == {}


# ----------------------------------------------------------------------------
# Going on.


@pytest.mark.parametrize("jobs", [1, 2])
def test_continues_after_a_kill_at_each_decision(tmp_path, jobs):
    whole = FakeExecutor()
    found, plan, _ = run_search(tmp_path / "whole", whole, jobs=jobs)
    for die_at in range(len(whole.started)):
        folder = tmp_path / str(die_at)
        first = FakeExecutor(die_at=die_at)
        with pytest.raises(KeyboardInterrupt):
            run_search(folder, first, jobs=jobs)
        second = FakeExecutor()
        again, continued, said = run_search(folder, second, jobs=jobs)
        assert again == found and sizes(continued) == sizes(plan)
        finished = [key for key in first.started if key not in second.started]
        assert sorted([*finished, *second.started]) == sorted(whole.started)
        assert len(first.started) - len(finished) < jobs  # only what was under way is started once more
    third = FakeExecutor()
    assert run_search(tmp_path / "whole", third, jobs=jobs)[0] == found and third.started == []


def test_continues_after_a_kill_before_the_first_run(folder, monkeypatch):
    def prepare(self, run, size):
        (self.outdir / "data").mkdir(parents=True)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(SearchSpec, "prepare", prepare)
        run_search(folder, FakeExecutor())
    found, *_ = run_search(folder, FakeExecutor())
    assert found.size == pytest.approx(TRUE_EMM, rel=0.2)


def test_known_job_is_handed_over(folder):
    """A job that may still run in a queue is offered to the executor under its id."""

    class Queue(FakeExecutor):
        def start(self, path, known_id=None):
            known.append(known_id)
            if len(known) == 1:
                return Waiting()
            return super().start(path, known_id)

    class Waiting:
        id = "4711"
        asked = False

        def poll(self):
            if not self.asked:
                raise KeyboardInterrupt
            return 75

        def stop(self):
            self.asked = True

    known = []
    with pytest.raises(KeyboardInterrupt):
        run_search(folder, Queue())
    run_search(folder, Queue())
    assert known[:2] == [None, "4711"] and set(known[2:]) == {None}


def test_range_and_tolerance_may_change(folder):
    _, plan, _ = run_search(folder, FakeExecutor(), tolerance=1.5)
    known = sizes(plan)
    executor = FakeExecutor()
    found, plan, _ = run_search(folder, executor, low=4, high=64, tolerance=1.01, max_runs=10, confidence=0.8)
    assert len(plan.decisions) == 10 and plan.result["confidence"] == 0.8
    assert sizes(plan)[: len(known)] == known and [seed for _, seed in executor.started][0] == len(known)


def test_other_settings_are_refused(folder):
    run_search(folder, FakeExecutor())
    before = (folder / "plan.json").read_bytes()
    for change, words in [
        (dict(train_options=("--lr=1",)), "another train_options (, now --lr=1)"),
        (dict(level=0.8), "another level (0.9, now 0.8)"),
        (dict(seed=3, nproc=2), "another nproc (1, now 2), another seed (0, now 3)"),
    ]:
        with pytest.raises(ValueError, match="give the options that it began with") as err:
            run_search(folder, FakeExecutor(), spec=make_spec(folder, **change))
        assert words in str(err.value)
    assert (folder / "plan.json").read_bytes() == before


def test_foreign_files_are_refused(folder):
    folder.mkdir()
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="holds something else than a search"):
        run_search(folder, FakeExecutor())
    (folder / "notes.txt").unlink()
    for content in ["", "[]", '{"format": 3}', '{"format": 2, "settings": {}}']:
        (folder / "plan.json").write_text(content)
        with pytest.raises(ValueError, match="is no plan of this project"):
            run_search(folder, FakeExecutor())
    (folder / "plan.json").write_text('{"format": 1, "settings": {}, "decisions": [], "started": {}}')
    with pytest.raises(ValueError, match="is of a search by an earlier version.*name a new folder"):
        run_search(folder, FakeExecutor())


def test_the_curve_reads_the_same_runs(folder):
    """`emm.py curve` reads the same points from the run folders."""
    found, plan, _ = run_search(folder, FakeExecutor())
    points = [read_run(run) for run in (folder / "runs").iterdir()]
    assert sorted((p.size, p.ratio) for p in points) == sorted((d["size"], d["ratio"]) for d in plan.decisions)
    measured = np.array([(p.size, p.num_memorized, p.num_samples) for p in points]).T
    assert math.exp(fit_crossing(*measured, LEVEL).quantile(0.5)[0]) == pytest.approx(found.size, rel=0.01)


# ----------------------------------------------------------------------------
# Subsets.


def test_subsets(tmp_path, make_zip):
    images = np.zeros((30, 8, 8), dtype=np.uint8)
    labelled = make_zip(images, [0] * 20 + [1] * 10, tmp_path / "a.zip")
    plain = make_zip(images, None, tmp_path / "b.zip")
    assert choose_subset(labelled) == ("balanced", 20) and choose_subset(labelled, "first") == ("first", 30)
    assert choose_subset(plain) == ("first", 30)
    with pytest.raises(ValueError, match="has no class labels for balanced subsets; take --subset=first"):
        choose_subset(plain, "balanced")


def test_training_sets_are_nested(tmp_path):
    """Size 13 of 10 classes: one image of each, and another of the first three; the set of size 12 is inside."""
    subset, largest = choose_subset("digits")
    assert (subset, largest) == ("balanced", 1740)  # 174 of the rarest digit
    spec, sets = SearchSpec(outdir=tmp_path, source="digits", subset=subset, largest=largest), {}
    for size in (12, 13):
        spec.prepare(spec.run(size, 0), size)
        data = ImageFolderDataset(str(tmp_path / "data" / f"digits-{size}.zip"), use_labels=True)
        assert np.bincount(data.labels()).tolist() == [2] * (size - 10) + [1] * (20 - size)
        sets[size] = {image.tobytes() for image in data.images()}
    assert len(sets[13]) == 13 and sets[12] < sets[13]


# ----------------------------------------------------------------------------
# Jobs.


def write_job(folder, train, measure="true"):
    folder.mkdir(exist_ok=True)
    job = dict(run_dir=str(folder / "run"), train=["sh", "-c", train, "train"], measure=["sh", "-c", measure])
    (folder / "x.json").write_text(json.dumps(job))
    return folder / "x.json"


def said(path):
    """What the commands of a job have printed."""
    lines = path.with_suffix(".log").read_text().splitlines()
    return [line for line in lines if not line.startswith(("$ ", "--- "))]


TRAIN = 'mkdir -p run && echo \'{"state": "complete", "kimg": 1}\' > run/run-state.json && echo trained'
SAVES = "trap 'echo saved; exit 75' TERM; echo began; while true; do sleep 0.05; done"


def test_job_trains_once(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = write_job(tmp_path, TRAIN, "echo measured")
    assert SearchJob(path)() == 0 and SearchJob(path)() == 0
    assert said(path) == ["trained", "measured", "measured"]
    assert (tmp_path / "x.exit").read_text() == "0\n"


def test_each_run_has_latents_of_its_own(folder):
    spec = make_spec(folder, seeds="0-63")
    assert [spec.latents(number) for number in (0, 1, 3)] == ["0-63", "64-127", "192-255"]
    assert make_spec(folder, seeds="5,7-8").latents(2) == "13,15-16"
    assert make_spec(folder, seeds=f"{2**32 - 2}-{2**32 - 1}").latents(1) == "0-1"  # seeds have 32 bits
    for number, size in enumerate((16, 16)):
        run = spec.run(size, number)
        spec.prepare(run, size)
        assert f"--seeds={spec.latents(number)}" in json.loads(spec.job_file(run).read_text())["measure"]


def test_a_run_with_other_options_is_not_taken_for_done(tmp_path, capsys):
    command = {"lr": 0.01, "seed": 1, "cres": [1, 2], "device": "cuda", "ema": 3.0, "duration": 60.0, "batch": 16}
    words = [
        "python",
        "train.py",
        "--outdir=x",
        "--data=y.zip",
        "--seed=1",
        "--cres=1,2",
        "--duration=60",
        "--batch=16",
    ]
    assert other_options(tmp_path, [*words, "--lr=1e-2", "--ema=3"]) == []  # there is no run yet
    (tmp_path / "training_options.json").write_text(json.dumps({"command": command}))
    assert other_options(tmp_path, [*words, "--lr=5e-3", "--device=cpu", "--lr=1e-2", "--ema=3"]) == []
    assert other_options(tmp_path, [*words, "--lr=5e-3", "--seed=2", "--ema=3"]) == [
        "seed 1, not 2", "lr 0.01, not 0.005"
    ]  # fmt: skip
    assert other_options(tmp_path, ["sh", "-c", "true"]) == []
    # Effective values: by epochs or by steps, other channels by another name, a default that an option had replaced.
    asked = [*words[:-2], "--batch=16", "--lr=1e-2", "--ema=3", "--num-blocks=1"]
    assert other_options(tmp_path, [*asked, "--total-steps=9"]) == ["duration 60.0, not none"]
    command |= {"num_channels": 8, "cbase": 8, "transfer": None, "skip_connections": [1, 0, 1, 1], "total_steps": 9}
    (tmp_path / "training_options.json").write_text(json.dumps({"command": command | {"duration": None}}))
    asked += ["--num-channels=16", "--cbase=8", "--total-steps=9"]
    assert other_options(tmp_path, [*asked, "--skip-connections=1,0,1,1"]) == []
    assert set(other_options(tmp_path, [*asked, "--transfer=~/x.pt"])) == {
        "skip_connections [1, 0, 1, 1], not [1, 1, 1, 1]", f"transfer none, not {os.path.expanduser('~/x.pt')}"
    }  # fmt: skip
    assert other_options(tmp_path, [*asked, "--lrr=1"]) == []  # train.py says it
    (tmp_path / "training_options.json").write_text(
        json.dumps(
            {
                "command": command
                | {"duration": 60.0, "total_steps": None, "skip_connections": [1] * 10, "num_channels": 128}
            }
        )
    )
    # More of the same training is no other option, and a plan counts it; less is.
    recorded = json.loads((tmp_path / "training_options.json").read_text())
    files = {"run-state.json": '{"state": "complete", "kimg": 1}', "mem_traj.jsonl": "", "training-state-000001.pt": ""}
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    known = "--seed=1 --cres=1,2 --batch=16 --ema=3 --lr=1e-2 --num-blocks=4 --skip-connections=1,1,1,1,1,1,1,1,1,1"
    for duration, done, more, other in (
        (60, True, "", []), (90, False, "duration 60.0 to 90.0", []), (30, True, "", ["duration 60.0, not 30.0"])
    ):  # fmt: skip
        asked = [*words[:3], "--data=y.zip", *known.split(), f"--duration={duration}"]
        assert is_done(Queued(10, "x", "1", str(tmp_path), "8,1,10", f"{known} --duration={duration}")) == done
        assert more_training(tmp_path, asked) == more
        assert [text for text in other_options(tmp_path, asked) if "duration" in text] == other
    longer = [*words[:3], "--data=y.zip", *known.split(), "--duration=90"]
    assert more_training(tmp_path, [*words[:3], "--data=y.zip", "--total-steps=99"]) == ""  # unlike the run's 60
    # Without its state, or ended early by an option, it cannot go on.
    state = tmp_path / "training-state-000001.pt"
    state.unlink()
    assert more_training(tmp_path, longer) == "" and "duration 60.0, not 90.0" in other_options(tmp_path, longer)
    state.touch()
    (tmp_path / "training_options.json").write_text(json.dumps(recorded | {"total_nimg": 2000}))
    assert more_training(tmp_path, longer) == "" and "duration 60.0, not 90.0" in other_options(tmp_path, longer)
    (tmp_path / "training_options.json").write_text(json.dumps(recorded | {"total_nimg": 1000}))
    assert more_training(tmp_path, longer) == "duration 60.0 to 90.0"
    before = sorted(tmp_path.iterdir())
    assert job.main([str(tmp_path), *words, "--ema=3", "--lr=1", "--then", "true"]) == 2
    assert "other options (lr 0.01, not 1.0)" in capsys.readouterr().err and sorted(tmp_path.iterdir()) == before


def test_a_job_that_cannot_be_started(tmp_path, capsys):
    assert job.main([str(tmp_path / "run"), "no-such-launcher", "train.py", "--then", "true"]) == 127
    assert 'Error: "no-such-launcher" cannot be started: No such file' in capsys.readouterr().err
    for words in ([], ["--then"], [str(tmp_path)]):
        assert job.main(words) == 2 and "name a JOB.json" in capsys.readouterr().err


def test_a_job_that_measures_nothing_does_not_train_again_what_diverged(tmp_path, monkeypatch):
    """As when two runs of a factor script wait for the same learning rates to be tried."""
    monkeypatch.chdir(tmp_path)
    reason = f"{NOT_FINITE} in 3 ticks in a row, up to 8 kimg"
    diverges = "mkdir -p run && cp state.json run/run-state.json && echo trained; exit 1"
    (tmp_path / "state.json").write_text(json.dumps(dict(state="failed", kimg=8, reason=reason)))
    path = write_job(tmp_path, diverges)
    job = json.loads(path.read_text())
    path.write_text(json.dumps(job | {"measure": []}))
    assert SearchJob(path)() == 0 and SearchJob(path)() == 0 and said(path) == ["trained"]
    path.write_text(json.dumps(job))  # one that measures tries again, and fails again
    assert SearchJob(path)() == 1 and said(path) == ["trained", "trained"]


@pytest.mark.slow
def test_jobs_share_out_the_gpus(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7,8")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 5)
    assert visible_gpus() == ["4", "5", "6", "7", "8"]
    executor = LocalExecutor(visible_gpus(), per_job=2)

    def start(name):
        train = 'echo "$CUDA_VISIBLE_DEVICES"; while [ ! -e end ]; do sleep 0.05; done; exit 3'
        path = write_job(tmp_path / name, train)
        job = executor.start(path)
        wait_for(lambda: said(path))
        return job, said(path)

    monkeypatch.chdir(tmp_path)
    (first, seen), (_, other) = start("a"), start("b")
    assert (seen, other) == (["4,5"], ["6,7"]) and start("c")[1] == ["4,5"]
    (tmp_path / "end").touch()
    wait_for(lambda: first.poll() == 3)


@pytest.mark.slow
def test_job_that_fails(tmp_path):
    path = write_job(tmp_path, "echo 'Error: no such luck'; echo more; exit 3")
    job = LocalExecutor().start(path)
    wait_for(lambda: job.poll() is not None)
    assert job.poll() == 3 and last_words(path) == "no such luck"
    path.write_text("{")
    job = LocalExecutor().start(path)
    wait_for(lambda: job.poll() is not None)
    assert job.poll() != 0 and "JSONDecodeError" in last_words(path)
    assert last_words(tmp_path / "missing.json") == "it has left no message."


@pytest.mark.slow
def test_job_stops_when_asked(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = write_job(tmp_path, SAVES)
    job = LocalExecutor().start(path)
    wait_for(lambda: "\nbegan\n" in (tmp_path / "x.log").read_text())
    assert job.poll() is None
    job.stop()
    wait_for(lambda: job.poll() is not None)
    assert job.poll() == 75 and (tmp_path / "x.log").read_text().endswith("began\nsaved\n")
    job = LocalExecutor().start(write_job(tmp_path, TRAIN))  # the wish to stop is gone
    wait_for(lambda: job.poll() is not None)
    assert job.poll() == 0


@pytest.mark.slow
def test_job_stops_when_its_search_is_killed(tmp_path):
    path = write_job(tmp_path, SAVES)
    code = "import subprocess, sys; subprocess.run([sys.executable, '-m', 'memorization.search.job', sys.argv[1]])"
    search = subprocess.Popen([sys.executable, "-c", code, str(path)], cwd=ROOT)
    wait_for(lambda: path.with_suffix(".log").exists() and "\nbegan\n" in path.with_suffix(".log").read_text())
    search.kill()
    search.wait()
    wait_for(lambda: path.with_suffix(".exit").exists())
    assert path.with_suffix(".exit").read_text() == "75\n" and path.with_suffix(".log").read_text().endswith("saved\n")


def test_submitit_is_optional(tmp_path, monkeypatch, run_cli):
    monkeypatch.setitem(sys.modules, "submitit", None)
    result = run_cli(emm.main, options(tmp_path / "s", "--executor=slurm"), code=1)
    assert "need submitit; install it with: pip install 'diffusion-memorization[slurm]'" in result.stderr


def test_slurm_options(tmp_path, run_cli):
    pytest.importorskip("submitit")
    result = run_cli(emm.main, options(tmp_path / "s", "--executor=submitit-local", "--slurm=acount=me"), code=1)
    assert "acount" in result.stderr
    result = run_cli(emm.main, options(tmp_path / "t", "--executor=submitit-local", "--slurm=account"), code=2)
    assert '"account" is not KEY=VALUE' in result.stderr


@pytest.mark.slow
def test_submitit_queues_an_interrupted_job_again(tmp_path):
    """Slurm announces the end of a job's time by a signal: the job saves, and goes on in its next turn."""
    pytest.importorskip("submitit")
    first = f'mkdir {tmp_path}/run && trap "echo saved; exit 75" TERM && echo began && while true; do sleep 0.05; done'
    path = write_job(tmp_path, f"if [ -d {tmp_path}/run ]; then echo again; else {first}; fi", "echo measured")
    job = SubmititExecutor(tmp_path / "submitit", "local", {"timeout_min": 60}).start(path)
    wait_for(lambda: (tmp_path / "x.log").exists() and "\nbegan\n" in (tmp_path / "x.log").read_text())
    controller = psutil.Process(int(job.id))
    controller.children()[0].send_signal(signal.SIGUSR2)
    wait_for(lambda: job.poll() is not None)
    said = [
        line for line in (tmp_path / "x.log").read_text().splitlines() if not line.startswith(("$ ", "if ", "--- "))
    ]
    assert said == ["began", "saved", "again", "measured"] and job.poll() == 0


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    """Programs with the names of Slurm's, which note how they are called; `state` holds what sacct says."""
    pytest.importorskip("submitit")
    programs, state, calls = tmp_path / "bin", tmp_path / "state", tmp_path / "calls"
    programs.mkdir()
    state.write_text("PENDING")
    answers = dict(sbatch="echo Submitted batch job 12", srun="true", scancel=f"echo CANCELLED > {state}")
    answers["sacct"] = f"echo 'JobID|State|NodeList'; echo \"12|$(cat {state})|n1\""
    for name, answer in answers.items():
        (programs / name).write_text(f'#!/bin/sh\necho {name} "$@" >> {calls}\n{answer}\n')
        (programs / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(programs), prepend=":")
    from submitit.slurm.slurm import SlurmInfoWatcher, SlurmJob

    monkeypatch.setattr(SlurmJob, "watcher", SlurmInfoWatcher(delay_s=0))
    return calls, state


@pytest.mark.slow
def test_slurm_job(tmp_path, slurm):
    calls, state = slurm
    parameters = dict(name="emm-search", timeout_min=30, slurm_partition="gpu", gpus_per_node=2)
    executor = SubmititExecutor(tmp_path / "submitit", "slurm", parameters)
    path = write_job(tmp_path / "jobs", "true")
    job = executor.start(path)
    assert job.id == "12" and job.poll() is None
    submitted = next((tmp_path / "submitit").glob("*.sh")).read_text()
    for line in ("--partition=gpu", "--gpus-per-node=2", "--time=30"):
        assert f"#SBATCH {line}\n" in submitted
    again = executor.start(path, known_id="12")  # it is still there, so nothing new is submitted
    assert again.id == "12" and calls.read_text().count("sbatch") == 1
    again.stop()
    wait_for(lambda: again.poll() is not None)
    assert again.poll() == 75 and "scancel 12" in calls.read_text()  # it had not begun to run


@pytest.mark.slow
def test_slurm_job_that_is_killed(tmp_path, slurm):
    _, state = slurm
    path = write_job(tmp_path / "jobs", "true")
    job = SubmititExecutor(tmp_path / "submitit", "slurm", dict(timeout_min=30)).start(path)
    assert job.poll() is None
    state.write_text("OUT_OF_MEMORY")
    wait_for(lambda: job.poll() is not None)
    assert job.poll() == 1 and last_words(path).startswith("the job ended as OUT_OF_MEMORY; see ")


# ----------------------------------------------------------------------------
# The command.

SMALL = ["--num-channels=8", "--cres=1", "--num-blocks=1", "--attn-resolutions=4", "--dropout=0", "--augment=0"]
SMALL += ["--batch=16", "--lr=1e-2", "--tick=1"]


def options(outdir, *flags, train=("--duration=4",), low=4, high=5):
    words = ["search", "--source=digits", f"--outdir={outdir}", f"--low={low}", f"--high={high}", "--seeds=0-63"]
    return [*words, "--device=cpu", *flags, "--", *SMALL, *train]


def test_dry_run_writes_nothing(tmp_path, run_cli):
    result = run_cli(emm.main, options(tmp_path / "s", "-n", low=8, high=128, train=["--duration=60"]))
    assert "until the ends of its 90 % interval are within a factor of 1.2" in result.stdout
    assert "Expect:  8 to 40 runs in all" in result.stdout
    assert "each 9.6 (|D| = 8) to 153.6 kimg (|D| = 128) of training, and 64 images per snapshot" in result.stdout
    assert list(tmp_path.iterdir()) == []


def test_benchmark(run_cli):
    result = run_cli(bench_search.main, ["--searches=2", "--images=1000", "--tau=0.1"])
    assert len([line for line in result.output.splitlines() if "| 0.1 |" in line]) == 2


@pytest.mark.parametrize(
    ("flags", "train", "code", "words"),
    [
        (["--low=9", "--high=9"], [], 2, "--low=9 is not less than --high=9"),
        (["--high=5000"], [], 2, "digits has class-balanced training sets of 1740 at most"),
        (["--tolerance=1"], [], 2, "not in the range x>=1.001"),
        (["--level=1"], [], 2, "not in the range"),
        (["--source=nowhere.zip"], [], 1, 'The source "nowhere.zip" does not exist'),
        ([], ["--duration=0"], 2, "TRAIN_OPTIONS: Invalid value for '--duration'"),
        ([], ["--speed=9"], 2, "TRAIN_OPTIONS: No such option"),
        ([], ["--data=x.zip"], 2, "--data is set by the search itself"),
        ([], ["--nosubdir"], 2, "--nosubdir is set by the search itself"),
        ([], ["stray"], 2, "TRAIN_OPTIONS: Got unexpected extra argument"),
        (["--measure=--steps=x"], [], 2, "--measure: Invalid value for '--steps'"),
        (["--measure=--adaptive=0.5"], [], 2, "--adaptive is set by the search itself"),
        (["--measure='"], [], 2, "--measure: No closing quotation"),
        (["--executor=moon"], [], 2, "'moon' is not one of"),
    ],
)
def test_bad_options(tmp_path, run_cli, flags, train, code, words):
    result = run_cli(emm.main, options(tmp_path / "s", *flags, train=train), code=code)
    assert words in result.stderr
    assert not (tmp_path / "s").exists()


def test_one_search_at_a_time(tmp_path, run_cli):
    with file_lock(tmp_path / "s" / ".search.lock"):
        result = run_cli(emm.main, options(tmp_path / "s"), code=1)
    assert "Another search is at work" in result.stderr


@pytest.mark.slow
def test_interrupted_and_continued(tmp_path, run_cli):
    """The real thing, tiny: Ctrl-C while it trains, then the same command; nothing is trained twice."""
    folder = tmp_path / "s"
    words = options(folder, "--max-runs=2", train=["--duration=50", "--seed=1"])  # 4 kimg
    search = subprocess.Popen(
        [sys.executable, str(ROOT / "emm.py"), *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # else ignored in a background job
    )  # fmt: skip
    run = folder / "runs" / "digits-4-seed1"
    wait_for(lambda: trained_nimg(run) > 0, seconds=120)
    search.send_signal(signal.SIGINT)
    out, err = search.communicate(timeout=120)
    assert search.returncode == 75 and "the same command goes on." in out and "Traceback" not in out + err
    stopped = trained_nimg(run)
    assert 0 < stopped < 4000 and list(run.glob("training-state-*.pt"))
    plan = json.loads((folder / "plan.json").read_text())
    assert list(plan["started"]) == ["digits-4-seed1"] and plan["decisions"] == []

    result = run_cli(emm.main, words)
    assert "Next: |D| = 4, which was begun before." in result.stdout
    assert "EMM (90 %) " in result.stdout and "by 2 runs" in result.stdout
    log = (folder / "jobs" / "digits-4-seed1.log").read_text()
    assert f"Continuing from {run}/training-state-{stopped // 1000:06d}.pt" in log and log.count("$ ") == 3
    assert json.loads((run / "mem_traj.jsonl").read_text().splitlines()[-1])["num_samples"] == 64
    before = trained_nimg(run)
    assert run_cli(emm.main, words).exit_code == 0 and trained_nimg(run) == before
    result = run_cli(emm.main, options(folder, train=["--duration=51", "--seed=1"]), code=1)
    assert "has another train_options" in result.stderr
    assert run_cli(emm.main, ["curve", str(folder), f"--out={tmp_path}/c.png"]).exit_code == 0


def test_submitit_local_search(tmp_path, run_cli):
    pytest.importorskip("submitit")
    result = run_cli(emm.main, options(tmp_path / "s", "--executor=submitit-local"))
    assert "EMM (90 %) below 4" in result.stdout
    assert list((tmp_path / "s" / "jobs" / "submitit").glob("*_result.pkl"))


def test_failed_job_is_one_line(tmp_path, run_cli):
    result = run_cli(emm.main, options(tmp_path / "s", train=["--batch-gpu=3"]), code=1)
    assert "The job of |D| = 4 has failed (exit status 1): --batch-gpu=3 does not divide" in result.stderr
    assert "jobs/digits-4-seed0.log" in result.stderr
