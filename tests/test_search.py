"""emm.py search: which sizes it asks for, what it writes down, and that it goes on where it was."""

import json
import math
import signal
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
import torch
from builders import wait_for
from conftest import ROOT

import emm
import mem_ratio
from dnnlib.locks import file_lock
from memorization.curve.emm import emm_estimate
from memorization.runs import read_run, trained_nimg
from memorization.search.bisection import bracket, grid_sizes, next_sizes, worst_case
from memorization.search.executors import LocalExecutor, SubmititExecutor, last_words, visible_gpus
from memorization.search.job import SearchJob
from memorization.search.search import Plan, Range, Search, Study, choose_subset
from memorization.stats.sequential import SequentialTest
from training.dataset import ImageFolderDataset

LOW, HIGH, LEVEL = 8, 128, 0.9


def falling(size):
    """A curve like that of the digits: EMM is where it crosses 90 %, near 30."""
    return 1 / (1 + (size / 71) ** 2.66)


TRUE_EMM = 71 * (1 / LEVEL - 1) ** (1 / 2.66)


class FakeExecutor:
    """Leaves what a finished run leaves; the ratio is a function of |D| alone. `die_at` raises instead of starting."""

    interval = 0.01

    def __init__(self, ratio, samples=1000, die_at=None, slow=()):
        self.ratio, self.samples, self.die_at, self.slow = ratio, samples, die_at, slow
        self.started, self.stopped, self.now, self.most = [], [], 0, 0

    def start(self, path, known_id=None):
        if len(self.started) == self.die_at:
            raise KeyboardInterrupt
        run = path.stem
        size, seed = int(run.split("-")[1]), int(run.rpartition("seed")[2])
        self.started.append((size, seed))
        self.now += 1
        self.most = max(self.most, self.now)
        return FakeJob(self, path, size, seed)


class FakeJob:
    def __init__(self, executor, path, size, seed):
        self.executor, self.path, self.size, self.seed, self.id = executor, path, size, seed, f"job-{size}"
        self.status = None

    def poll(self):
        if self.status is None and not (self.size in self.executor.slow and not all_others_done(self.executor)):
            self.finish(0)
        return self.status

    def stop(self):
        self.executor.stopped.append(self.size)
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
            ratio = self.executor.ratio(self.size) if self.seed == 0 else self.executor.ratio(self.size, self.seed)
            record = measured(ratio, self.executor.samples)
            (folder / "mem_traj.jsonl").write_text(json.dumps({"kimg": self.size, **record}) + "\n")


def all_others_done(executor):
    return executor.now <= len(executor.slow)


def measured(ratio, samples):
    """The record of an adaptive measurement that draws exactly the expected number of memorized images."""
    test = SequentialTest(LEVEL, 0.95)
    while test.n < samples and test.verdict is None:
        n = min(test.n + 50, samples)
        test.update(round(ratio * n) - test.successes, n - test.n)
    record = dict(num_memorized=test.successes, num_samples=test.n, ratio=test.successes / test.n, snapshot="x")
    return dict(record, adaptive=dict(bar=LEVEL), sequential=test.summary(), seeds=f"0-{samples - 1}")


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "search"


def make_study(folder, **options):
    subset, largest = choose_subset("digits", "first")
    return Study(outdir=folder, source="digits", subset=subset, largest=largest, duration=50, **options)


def run_search(folder, executor, low=LOW, high=HIGH, study=None, **where):
    """Run or continue the search in `folder`; return its EMM, plan and messages."""
    study, said = study or make_study(folder), []
    plan = Plan(folder / "plan.json", study.settings())
    search = Search(study, Range(low, high, **where), plan, executor, report=said.append)
    return search.run(), plan, said


def sizes(plan):
    return [decision["size"] for decision in plan.decisions]


# ----------------------------------------------------------------------------
# Which sizes.


def test_bisection_finds_the_crossing(folder):
    executor = FakeExecutor(falling)
    found, plan, said = run_search(folder, executor)
    a, b = bracket(plan.above)
    assert a <= TRUE_EMM <= b and b / a <= 1.1
    assert found.verdict == "at" and found.size == pytest.approx(TRUE_EMM, rel=0.03)
    assert executor.started == [(size, 0) for size in sizes(plan)] and executor.most == 1
    assert sizes(plan)[0] == 32  # the middle of 8 to 128 in log; it lies below 90 %, so 128 is not needed
    assert LOW in sizes(plan) and HIGH not in sizes(plan)
    assert said[0] == "Next: |D| = 32, the middle of 8 to 128 in log |D|."
    assert any(line.startswith("|D| = 32: R_mem 89.") and "below 90 %" in line for line in said)
    assert plan.result["bracket"] == [a, b] and plan.result["trained_kimg"] == sum(sizes(plan))


@pytest.mark.parametrize("count", [1, 2, 3, 5])
@pytest.mark.parametrize("true_emm", [7, 8, 9, 22, 23, 50, 101, 127, 128, 500])
def test_any_crossing_is_bracketed_within_the_bound(true_emm, count):
    """For each EMM and number of jobs: the bracket holds it, and no more is tried than was announced."""
    above, tried = {}, []
    longest, largest = worst_case({}, LOW, HIGH, 1.1, count)
    while batch := next_sizes(above, LOW, HIGH, 1.1, count):
        assert len(batch) <= count and not set(batch) & set(tried) and all(LOW <= size <= HIGH for size in batch)
        tried += batch
        above.update({size: size <= true_emm for size in batch})
    a, b = bracket(above)
    if true_emm < LOW:
        assert (a, b) == (None, LOW)
    elif true_emm >= HIGH:
        assert (a, b) == (HIGH, None)
    else:
        assert a <= true_emm < b and (b / a <= 1.1 or b == a + 1)
    assert len(tried) <= len(longest) and sum(tried) <= sum(largest)


def test_bound_is_reached():
    """The announced upper bound is not a guess: some EMM costs it."""
    costs = []
    for true_emm in range(LOW - 1, HIGH + 1):
        above, tried = {}, []
        while batch := next_sizes(above, LOW, HIGH, 1.1, 1):
            tried += batch
            above.update({size: size <= true_emm for size in batch})
        costs.append((len(tried), sum(tried)))
    longest, largest = worst_case({}, LOW, HIGH, 1.1, 1)
    assert max(runs for runs, _ in costs) == len(longest) and max(images for _, images in costs) == sum(largest)


@pytest.mark.parametrize(("low", "high", "tolerance"), [(8, 128, 1.1), (500, 8000, 1.05), (2, 5, 1.01), (10, 40, 2)])
def test_grid_of_the_same_resolution(low, high, tolerance):
    grid = grid_sizes(low, high, tolerance)
    assert grid[0] == low and grid[-1] == high
    for a, b in zip(grid, grid[1:]):
        assert b == a + 1 or math.log(b / a) <= math.log(tolerance) + 1 / a  # up to rounding to whole numbers
    coarser = math.ceil(math.log(high / low) / math.log(tolerance) - 1e-9) - 1
    assert coarser == 0 or (high / low) ** (1 / coarser) > tolerance  # fewer points would not do


def test_never_crossing(folder, tmp_path):
    found, plan, said = run_search(folder, FakeExecutor(lambda size: 0.99))
    assert (found.verdict, found.size) == ("at least", HIGH) and sizes(plan) == [32, 128]
    found, plan, _ = run_search(tmp_path / "below", FakeExecutor(lambda size: 0.2))
    assert (found.verdict, found.size) == ("below", LOW) and sizes(plan) == [32, 8]


def test_expand(tmp_path):
    found, plan, _ = run_search(tmp_path / "up", FakeExecutor(falling), low=2, high=10, expand=True)
    assert found.verdict == "at" and found.size == pytest.approx(TRUE_EMM, rel=0.04)
    assert sizes(plan)[:4] == [4, 10, 20, 40]
    found, plan, _ = run_search(tmp_path / "down", FakeExecutor(falling), low=64, high=256, expand=True)
    assert found.verdict == "at" and found.size == pytest.approx(TRUE_EMM, rel=0.04)
    assert sizes(plan)[:4] == [128, 64, 32, 16]
    found, plan, _ = run_search(tmp_path / "all", FakeExecutor(lambda size: 1.0), low=500, high=1000, expand=True)
    assert (found.verdict, found.size) == ("at least", 1797)  # all that the source has
    found, plan, _ = run_search(tmp_path / "none", FakeExecutor(lambda size: 0.0), low=5, high=20, expand=True)
    assert (found.verdict, found.size) == ("below", 2)  # d1 / d2 needs two images


def test_a_curve_that_rises_again(folder):
    """Between the ends of the bracket the curve does cross the level, and the end below is the next measured one."""

    def bumpy(size):
        return 0.97 if size < 12 or 20 <= size < 40 else 0.6

    found, plan, _ = run_search(folder, FakeExecutor(bumpy))
    a, b = bracket(plan.above)
    assert b / a <= 1.1 and bumpy(a) >= LEVEL > bumpy(b) and a <= found.size <= b


def test_noise_moves_emm_by_little(tmp_path):
    for case in range(5):

        def noisy(size, case=case):
            return min(max(falling(size) + 0.02 * math.sin(7.3 * size + 11 * case), 0), 1)

        found, _, _ = run_search(tmp_path / str(case), FakeExecutor(noisy))
        assert found.size == pytest.approx(TRUE_EMM, rel=0.2)  # 2 % of R_mem are 10 % of |D| on this curve


def test_undecided_sizes_go_by_their_estimate(folder):
    """At |D| = 32 the ratio is the bar within what 200 images can tell: the estimate decides, and the plan says so."""

    def close(size):
        return 0.905 if size == 32 else 1.0 if size < 32 else 0.2

    found, plan, said = run_search(folder, FakeExecutor(close, samples=200))
    assert plan.decision(32)["above"] and not plan.decision(32)["certain"]
    assert not plan.result["certain"] and bracket(plan.above)[0] == 32
    assert any("at least 90 %, by the estimate alone" in line for line in said)
    assert 32 <= found.size <= 35.2


def test_several_seeds_per_size(folder):
    """Runs on both sides of the level: their mean decides."""

    def by_seed(size, seed=0):
        return min(falling(size) + (0.05 if seed else -0.05), 0.99)

    study = make_study(folder, runs_per_size=2)
    found, plan, said = run_search(folder, FakeExecutor(by_seed), study=study, jobs=2)
    assert all(len(decision["runs"]) == 2 for decision in plan.decisions)
    assert found.size == pytest.approx(TRUE_EMM, rel=0.1)
    assert not plan.result["certain"] and any("(mean of " in line for line in said)


def test_jobs_cut_the_bracket_into_parts(folder):
    """Three at a time; what an answer makes needless is stopped and not decided."""
    executor = FakeExecutor(falling, slow=(64,))
    found, plan, said = run_search(folder, executor, jobs=3)
    assert sorted(size for size, _ in executor.started[:3]) == [16, 32, 64] and executor.most == 3
    assert executor.stopped == [64] and plan.dropped == [64] and 64 not in sizes(plan)
    assert "Given up: |D| = 64, which can no longer be EMM." in said
    assert found.size == pytest.approx(TRUE_EMM, rel=0.03) and plan.started == {}
    a, b = bracket(plan.above)
    assert b / a <= 1.1


# ----------------------------------------------------------------------------
# Going on.


@pytest.mark.parametrize("jobs", [1, 2])
def test_continues_after_a_kill_at_each_decision(tmp_path, jobs):
    whole = FakeExecutor(falling)
    found, plan, _ = run_search(tmp_path / "whole", whole, jobs=jobs)
    for die_at in range(len(whole.started)):
        folder = tmp_path / str(die_at)
        first = FakeExecutor(falling, die_at=die_at)
        with pytest.raises(KeyboardInterrupt):
            run_search(folder, first, jobs=jobs)
        second = FakeExecutor(falling)
        again, continued, said = run_search(folder, second, jobs=jobs)
        assert again == found and continued.above == plan.above
        finished = [key for key in first.started if key[0] not in [size for size, _ in second.started]]
        assert sorted([*finished, *second.started]) == sorted(whole.started)
        assert len(first.started) - len(finished) < jobs  # only what was under way is started once more
    third = FakeExecutor(falling)
    assert run_search(tmp_path / "whole", third, jobs=jobs)[0] == found and third.started == []


def test_continues_after_a_kill_before_the_first_run(folder, monkeypatch):
    def prepare(self, size):
        (self.outdir / "data").mkdir(parents=True)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Study, "prepare", prepare)
        run_search(folder, FakeExecutor(falling))
    found, *_ = run_search(folder, FakeExecutor(falling))
    assert found.size == pytest.approx(TRUE_EMM, rel=0.03)


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
        run_search(folder, Queue(falling))
    run_search(folder, Queue(falling))
    assert known[:2] == [None, "4711"] and set(known[2:]) == {None}


def test_range_and_tolerance_may_change(folder):
    _, plan, _ = run_search(folder, FakeExecutor(falling), tolerance=2)
    known = sizes(plan)
    executor = FakeExecutor(falling)
    found, plan, _ = run_search(folder, executor, low=4, high=64, tolerance=1.05)
    a, b = bracket(plan.above)
    assert b / a <= 1.05 or b == a + 1
    assert not {size for size, _ in executor.started} & set(known) and sizes(plan)[: len(known)] == known


def test_other_settings_are_refused(folder):
    run_search(folder, FakeExecutor(falling))
    before = (folder / "plan.json").read_bytes()
    for change, words in [
        (dict(train_options=("--lr=1",)), "another train_options (, now --lr=1)"),
        (dict(level=0.8), "another level (0.9, now 0.8)"),
        (dict(seed=3, nproc=2), "another nproc (1, now 2), another seed (0, now 3)"),
    ]:
        with pytest.raises(ValueError, match="give the options that it began with") as err:
            run_search(folder, FakeExecutor(falling), study=make_study(folder, **change))
        assert words in str(err.value)
    assert (folder / "plan.json").read_bytes() == before


def test_foreign_files_are_refused(folder):
    folder.mkdir()
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="holds something else than a search"):
        run_search(folder, FakeExecutor(falling))
    (folder / "notes.txt").unlink()
    for content in ["", "[]", '{"format": 2}', '{"format": 1, "settings": {}}']:
        (folder / "plan.json").write_text(content)
        with pytest.raises(ValueError, match="is no plan of this project"):
            run_search(folder, FakeExecutor(falling))


def test_result_agrees_with_the_curve(folder):
    """`emm.py curve` reads the same points from the run folders."""
    found, plan, _ = run_search(folder, FakeExecutor(falling))
    points = [read_run(run) for run in sorted((folder / "runs").iterdir())]
    assert {p.size: p.ratio for p in points} == {d["size"]: d["ratio"] for d in plan.decisions}
    assert emm_estimate([p.size for p in points], [p.ratio for p in points], LEVEL) == found


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
    study, sets = Study(outdir=tmp_path, source="digits", subset=subset, largest=largest), {}
    for size in (12, 13):
        study.prepare(size)
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
    assert "at most 7 runs, 649.2 kimg of training" in result.stdout
    assert "a grid as fine: 31 runs, 1641.6 kimg" in result.stdout
    assert list(tmp_path.iterdir()) == []


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
    words = options(folder, train=["--duration=50", "--seed=1"])  # 4 kimg
    search = subprocess.Popen(
        [sys.executable, str(ROOT / "emm.py"), *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    run = folder / "runs" / "digits-4-seed1"
    wait_for(lambda: trained_nimg(run) > 0, seconds=120)
    search.send_signal(signal.SIGINT)
    out, err = search.communicate(timeout=120)
    assert search.returncode == 75 and "the same command goes on." in out and "Traceback" not in out + err
    stopped = trained_nimg(run)
    assert 0 < stopped < 4000 and list(run.glob("training-state-*.pt"))
    plan = json.loads((folder / "plan.json").read_text())
    assert list(plan["started"]) == ["4"] and plan["decisions"] == []

    result = run_cli(emm.main, words)
    assert "Next: |D| = 4, which was begun before." in result.stdout
    assert "EMM (90 %) below 4" in result.stdout or "between |D| = 4 and 5" in result.stdout
    log = (folder / "jobs" / "digits-4-seed1.log").read_text()
    assert f"Continuing from {run}/training-state-{stopped // 1000:06d}.pt" in log and log.count("$ ") == 3
    assert json.loads((run / "mem_traj.jsonl").read_text().splitlines()[-1])["sequential"]["bar"] == 0.9
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


def test_older_snapshots_are_left_out(run_cli):
    """mem_ratio.py --until-above: newest first, up to the first that is above the bar."""
    verdicts = {"newest": "below", "middle": "above", "oldest": "below"}
    evaluator, seen = SimpleNamespace(records={}), []
    for subject in mem_ratio.first_above([SimpleNamespace(name=name) for name in verdicts], evaluator):
        seen.append(subject.name)
        evaluator.records[subject.name] = {"sequential": {"verdict": verdicts[subject.name]}}
    assert seen == ["newest", "middle"]
    result = run_cli(mem_ratio.main, ["--expdir=x", "--knn-ref=y", "--until-above"], code=2)
    assert "--until-above needs --adaptive" in result.stderr
