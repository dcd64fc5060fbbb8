"""Search for EMM: train and measure only the sizes that a bisection asks for, and write down every decision."""

import contextlib
import datetime
import json
import math
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dataset_utils.convert import source_sha256, write_dataset
from dataset_utils.sources import is_builtin, open_source
from dataset_utils.subsets import balanced, class_members
from dnnlib.limits import parse_json
from dnnlib.util import atomic_write, script_path
from memorization.curve.emm import Emm, emm_estimate
from memorization.runs import read_run, trained_nimg
from memorization.search.bisection import bracket, grid_sizes, next_sizes, worst_case
from memorization.search.executors import Executor, Job, last_words
from memorization.search.job import is_trained
from memorization.stats.intervals import wilson_interval

PLAN, LOCK, FORMAT_VERSION = "plan.json", ".search.lock", 1


# ----------------------------------------------------------------------------
# What is searched, and what a run of it is.


def choose_subset(source: str, subset: str = "auto") -> tuple[str, int]:
    """How training sets are drawn from a source, and the largest that can be.

    Parameters
    ----------
    source : see `dataset_utils.sources.open_source`.
    subset : "first" (the first |D| images), "balanced" (the first |D| / C of each of the C classes; where C does not
        divide |D|, one more of each of the first |D| mod C), or "auto": balanced if there are class labels.

    Returns
    -------
    subset : "first" or "balanced".
    largest : number of images.

    Raises
    ------
    OSError, ValueError
        If the source cannot be read, or has no class labels for balanced subsets.
    """
    with open_source(source) as images:
        labels = images.labels
        classes = labels is not None and all(type(label) is int for label in labels)
        if subset == "balanced" and not classes:
            raise ValueError(f'"{source}" has no class labels for balanced subsets; take --subset=first.')
        if subset == "first" or not classes:
            return "first", len(images)
        members = class_members(labels).values()
        return "balanced", len(members) * min(map(len, members))


def digest_source(source: str) -> str:
    """Digest of the images and labels of a source, by which a search knows it again.

    Raises
    ------
    OSError, ValueError
        If the source cannot be read.
    """
    with open_source(source) as images:
        return source_sha256(images)


@dataclass(frozen=True)
class Study:
    """What all runs of a search have in common; only |D| and the training seed change."""

    outdir: Path  # folder of the search; runs/ in it holds ordinary run folders
    source: str
    subset: str  # "first" or "balanced", see `choose_subset`
    largest: int  # size that the source allows
    source_sha256: str = ""  # of `digest_source`
    train_options: tuple[str, ...] = ()  # of train.py, but for data, output folder, seed and device
    duration: float = 200  # the one among them: images / (20 |D|)
    seed: int = 0  # of the first run of each size; the others count on from it
    runs_per_size: int = 1
    measure_options: tuple[str, ...] = ()  # of mem_ratio.py, but for those that the search decides
    seeds: str = "0-9999"  # images to generate at most, as a list for mem_ratio.py
    level: float = 0.9
    confidence: float = 0.95  # of the adaptive measurement of a snapshot
    nproc: int = 1  # processes of a run
    device: str = "auto"

    def settings(self) -> dict[str, Any]:
        """What decides the outcome of a run; the plan holds it, and another one is refused."""
        source = self.source if is_builtin(self.source) else str(Path(self.source).resolve())
        kept = ("subset", "train_options", "seed", "runs_per_size", "measure_options", "seeds", "level", "confidence")
        values = {key: getattr(self, key) for key in ("source_sha256", *kept)}
        return _plain({"source": source, "images": self.largest, **values, "nproc": self.nproc})

    def kimg(self, size: int) -> float:
        """Thousands of training images that the runs of one size take; see train.py."""
        return self.runs_per_size * max(20 * self.duration * size, 1000) / 1000

    def runs(self, size: int) -> list[str]:
        """Names of the runs of one size."""
        name = Path(self.source.rpartition(":")[2]).name.split(".")[0] or "images"
        return [f"{name}-{size}-seed{self.seed + i}" for i in range(self.runs_per_size)]

    def run_dir(self, run: str) -> Path:
        return self.outdir / "runs" / run

    def job_file(self, run: str) -> Path:
        return self.outdir / "jobs" / f"{run}.json"

    def prepare(self, size: int) -> None:
        """Write the dataset of one size and the job files of its runs."""
        data = self.outdir / "data" / f"{self.runs(size)[0].rpartition('-seed')[0]}.zip"
        if not data.exists():
            with open_source(self.source) as images:
                chosen = balanced(images.labels, size, uneven=True) if self.subset == "balanced" else range(size)
                write_dataset(images.select(chosen), data, quiet=True)
        for i, run in enumerate(self.runs(size)):
            train = [*self._script("train.py"), f"--outdir={self.run_dir(run)}", "--nosubdir", f"--data={data}"]
            train += [f"--device={self.device}", *self.train_options, f"--seed={self.seed + i}", "--resume=latest"]
            measure = [*self._script("mem_ratio.py"), f"--expdir={self.run_dir(run)}", f"--knn-ref={data}"]
            measure += [
                f"--seeds={self.seeds}",
                f"--adaptive={self.level}",
                f"--confidence={self.confidence}",
                "--until-above",
            ]
            measure += [f"--device={self.device}", *self.measure_options]
            with atomic_write(self.job_file(run), "w") as file:
                json.dump(dict(run_dir=str(self.run_dir(run)), train=train, measure=measure), file, indent=2)

    def _script(self, name: str) -> list[str]:
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={self.nproc}"]
        return [sys.executable, *(launcher if self.nproc > 1 else []), str(script_path(name))]


@dataclass(frozen=True)
class Range:
    """Where to search, and how finely. It may change between two searches in one folder: the runs stay valid."""

    low: int
    high: int
    tolerance: float = 1.1  # the search ends at high / low <= tolerance
    jobs: int = 1  # runs at a time
    expand: bool = False  # look beyond the ends where EMM is not between them


# ----------------------------------------------------------------------------
# The plan file.


class Plan:
    """plan.json: settings, decisions so far, and what is under way. Each change is on disk at once, as a whole.

    Attributes
    ----------
    decisions : one dict per decided size, in the order of the decisions: size, above (bool), certain (bool),
        ratio, runs (one dict each), why (text), bracket (afterwards), time.
    started : {size: {run: id of its job}} of sizes that are begun and not decided.
    dropped : sizes that were begun, and given up when another decision made them needless.
    result : what was found, or None.

    Raises
    ------
    OSError, ValueError
        If the file cannot be read, is none of this project, or is of a search with other settings.
    """

    def __init__(self, path: Path, settings: dict[str, Any]):
        self.path, self.settings = path, settings
        self.decisions: list[dict[str, Any]] = []
        self.started: dict[int, dict[str, str]] = {}
        self.dropped: list[int] = []
        self.result: dict[str, Any] | None = None
        if path.exists():
            self._read()
        elif path.parent.exists() and any(p.name != LOCK for p in path.parent.iterdir()):
            raise ValueError(f'"{path.parent}" holds something else than a search; name a new folder for it.')

    def decision(self, size: int) -> dict[str, Any]:
        """The decision on a size."""
        return next(decision for decision in self.decisions if decision["size"] == size)

    @property
    def above(self) -> dict[int, bool]:
        """Decided sizes: True where R_mem is at or above the level."""
        return {decision["size"]: decision["above"] for decision in self.decisions}

    def save(self) -> None:
        with atomic_write(self.path, "w") as file:
            content = dict(format=FORMAT_VERSION, settings=self.settings, decisions=self.decisions)
            json.dump(dict(content, started=self.started, dropped=self.dropped, result=self.result), file, indent=2)

    def _read(self) -> None:
        try:
            content = parse_json(self.path.read_bytes())
            if content["format"] != FORMAT_VERSION:
                raise ValueError
            self.decisions, self.dropped, self.result = (content[key] for key in ("decisions", "dropped", "result"))
            self.started = {int(size): jobs for size, jobs in content["started"].items()}
            known = content["settings"]
            kinds = [(known, dict), (self.dropped, list), *((jobs, dict) for jobs in self.started.values())]
            if not all(isinstance(value, kind) for value, kind in kinds) or not all(map(_is_decision, self.decisions)):
                raise ValueError
        except (ValueError, KeyError, TypeError, AttributeError):
            raise ValueError(f'"{self.path}" is no plan of this project in format {FORMAT_VERSION}.') from None
        differ = [
            f"{key} ({_show(known.get(key))}, now {_show(self.settings.get(key))})"
            for key in sorted(known.keys() | self.settings.keys())
            if known.get(key) != self.settings.get(key) and (key in known or key != "source_sha256")  # older plans
        ]
        if differ:
            raise ValueError(
                f'The search in "{self.path.parent}" has another {", another ".join(differ)}; '
                "give the options that it began with, or another folder."
            )


# ----------------------------------------------------------------------------
# The search.


class Search:
    """A search that can be interrupted at any time, and called again.

    Parameters
    ----------
    study, where : what to search, and where.
    plan : opened with `study.settings()`.
    executor : what runs the jobs.
    report : takes each message.
    progress : is told, now and then, what each run at work is doing.
    """

    def __init__(
        self,
        study: Study,
        where: Range,
        plan: Plan,
        executor: Executor,
        report: Callable[[str], Any] = print,
        progress: Callable[[list[str]], Any] = lambda _: None,
    ):
        self.study, self.plan, self.executor, self.report, self.progress = study, plan, executor, report, progress
        self.low, self.high, self.tolerance, self.expand = where.low, where.high, where.tolerance, where.expand
        self.jobs, self.count = where.jobs, max(where.jobs // study.runs_per_size, 1)
        self._running: dict[tuple[int, str], Job] = {}

    def next_sizes(self) -> list[int]:
        """The sizes to work on now: those that are begun, else those that the bisection asks for."""
        a, b = bracket(self.plan.above)
        begun = [s for s in self.plan.started if (a is None or s > a) and (b is None or s < b)]
        return sorted(begun) or next_sizes(self.plan.above, self.low, self.high, self.tolerance, self.count)

    def expected(self) -> dict[str, float]:
        """Upper bounds of what is still to do (`runs`, `kimg`), and the same for a grid of the same resolution."""
        longest, largest = worst_case(self.plan.above, self.low, self.high, self.tolerance, self.count)
        grid = grid_sizes(self.low, self.high, self.tolerance)
        return dict(
            runs=len(longest) * self.study.runs_per_size,
            kimg=sum(map(self.study.kimg, largest)),
            grid_runs=len(grid) * self.study.runs_per_size,
            grid_kimg=sum(map(self.study.kimg, grid)),
        )

    def run(self) -> Emm:
        """Search until EMM is found; return it.

        An exception, KeyboardInterrupt included, first lets the jobs at work save their state.

        Raises
        ------
        OSError, ValueError
            If a job fails or leaves nothing to decide on.
        """
        with _terminate_as_interrupt():
            try:
                while sizes := self.next_sizes() or self._beyond():
                    self._work_on(sizes)
            finally:
                self._stop_all()
        return self._conclude()

    def trained_kimg(self) -> float:
        """Thousands of images that the runs of this search were trained on so far, those given up included."""
        folder = self.study.outdir / "runs"
        return sum(trained_nimg(run) for run in folder.iterdir()) / 1000 if folder.is_dir() else 0.0

    def _beyond(self) -> list[int]:
        """With `expand`, the sizes to try once EMM is known to lie outside of the range: half, or twice."""
        a, b = bracket(self.plan.above)
        if not self.expand or (a is not None and b is not None):
            return []
        if a is None:
            self.low = max(b // 2, 2)
        else:
            self.high = min(2 * a, self.study.largest)
        return self.next_sizes()

    def _work_on(self, sizes: list[int]) -> None:
        """Train and measure these sizes, and decide each as soon as its runs are done."""
        why = self._reason(sizes)
        waiting = [(size, run) for size in sizes for run in self.study.runs(size)]
        for size in sizes:
            self.plan.started.setdefault(size, {})
        self.plan.result = None
        self.plan.save()  # first of all: a folder without a plan is taken for something else
        for size in sizes:
            self.study.prepare(size)
        self.report(f"Next: |D| = {', '.join(map(str, sizes))}, {why}.")
        while waiting or self._running:
            while waiting and len(self._running) < self.jobs:
                size, run = waiting.pop(0)
                known = self.plan.started[size].get(run)
                job = self._running[size, run] = self.executor.start(self.study.job_file(run), known)
                self.plan.started[size][run] = job.id
                self.plan.save()
            ended = {key: status for key, job in self._running.items() if (status := job.poll()) is not None}
            for (size, run), status in ended.items():
                del self._running[size, run]
                if size not in self.plan.started:
                    continue  # it was given up
                if status != 0:
                    raise ValueError(self._failure(run, size, status))
                if not any(s == size for s, _ in [*self._running, *waiting]):
                    self._decide(size, why)
                    waiting = [(s, r) for s, r in waiting if s in self.plan.started]
            if not ended:
                self.progress([self._doing(run) for _, run in self._running])
                time.sleep(self.executor.interval)

    def _decide(self, size: int, why: str) -> None:
        """Put a size above or below the level, by its finished runs, and give up sizes that this makes needless."""
        runs = [run_outcome(self.study.run_dir(run), self.study.level) for run in self.study.runs(size)]
        ratio = math.fsum(run["ratio"] for run in runs) / len(runs)
        verdicts = {run["verdict"] for run in runs}
        certain = len(verdicts) == 1 and verdicts != {"undecided"}
        above = verdicts == {"above"} if certain else ratio >= self.study.level
        del self.plan.started[size]
        decision = dict(size=size, above=above, certain=certain, ratio=ratio, runs=runs, why=why)
        self.plan.decisions.append(decision)
        a, b = bracket(self.plan.above)
        decision.update(bracket=[a, b], time=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"))
        needless = [s for s in self.plan.started if (a is not None and s < a) or (b is not None and s > b)]
        for each in needless:
            del self.plan.started[each]
            self.plan.dropped.append(each)
        self.plan.save()
        for (each, _), job in self._running.items():
            if each in needless:
                job.stop()
        self.report(describe(decision, self.study.level))
        if needless:
            self.report(f"Given up: |D| = {', '.join(map(str, needless))}, which can no longer be EMM.")

    def _doing(self, run: str) -> str:
        run_dir = self.study.run_dir(run)
        return f"{run} " + ("measuring" if is_trained(run_dir) else f"kimg {trained_nimg(run_dir) / 1000:.0f}")

    def _reason(self, sizes: list[int]) -> str:
        a, b = bracket(self.plan.above)
        a, b = a or self.low, b or self.high
        if sizes[0] in self.plan.started:
            return "which was begun before"
        if len(sizes) > 1:
            return f"which cut {a} to {b} in log |D|"
        if sizes[0] in (self.low, self.high):
            return "the end of the range, to see whether EMM lies inside"
        return f"the middle of {a} to {b} in log |D|"

    def _conclude(self) -> Emm:
        decisions = sorted(self.plan.decisions, key=lambda decision: decision["size"])
        emm = emm_estimate([d["size"] for d in decisions], [d["ratio"] for d in decisions], self.study.level)
        ends = bracket(self.plan.above)
        certain = all(self.plan.decision(end)["certain"] for end in ends if end is not None)
        self.plan.result = dict(
            emm=emm.size, verdict=emm.verdict, level=emm.level, bracket=list(ends), certain=certain,
            trained_kimg=self.trained_kimg(),
        )  # fmt: skip
        self.plan.save()
        return emm

    def _failure(self, run: str, size: int, status: int) -> str:
        path = self.study.job_file(run)
        return (
            f"The job of |D| = {size} has failed (exit status {status}): {last_words(path)} "
            f'Its log is "{path.with_suffix(".log")}"; the same command tries again.'
        )

    def _stop_all(self) -> None:
        """Ask the jobs at work to stop, and wait until they have saved their state."""
        for job in self._running.values():
            job.stop()
        while any(job.poll() is None for job in self._running.values()):
            time.sleep(self.executor.interval)
        self._running.clear()


# ----------------------------------------------------------------------------
# Outcomes.


def run_outcome(run_dir: Path, level: float) -> dict[str, Any]:
    """The outcome of one finished run: on which side of the level its highest ratio lies, and how that is known.

    The ratio of a run is the highest over its snapshots: it is above the level as soon as one of them is, and below
    it if all are.

    Returns
    -------
    dict of run (name), verdict ("above", "below" or "undecided"), kimg, ratio, num_memorized, num_samples (of the
    snapshot with the highest ratio, as `emm.py curve` takes it), images (generated, over all snapshots), nimg
    (trained).

    Raises
    ------
    OSError, ValueError
        If it was not measured adaptively at this level.
    """
    run = read_run(run_dir)
    records = [r for r in run.records if (r.get("sequential") or {}).get("bar") == level]
    if not records:
        raise ValueError(
            f'"{run_dir}" holds no adaptive measurement at {level}; delete its mem_traj.jsonl and try again.'
        )
    verdicts = {record["sequential"]["verdict"] for record in records}
    verdict = "above" if "above" in verdicts else "below" if verdicts == {"below"} else "undecided"
    return dict(
        run=run_dir.name, verdict=verdict, kimg=run.kimg, ratio=run.ratio, num_memorized=run.num_memorized,
        num_samples=run.num_samples, images=sum(r["num_samples"] for r in records), nimg=trained_nimg(run_dir),
    )  # fmt: skip


def describe(decision: dict[str, Any], level: float) -> str:
    """What was decided at a size, and why."""
    runs, (a, b) = decision["runs"], decision["bracket"]
    if len(runs) == 1:
        low, high = wilson_interval(runs[0]["num_memorized"], runs[0]["num_samples"])
        seen = f"[{100 * low:.1f}, {100 * high:.1f}] of {runs[0]['num_samples']} images at kimg {runs[0]['kimg']}"
    else:
        seen = f"mean of {', '.join(format(100 * run['ratio'], '.2f') for run in runs)}"
    side = "at least" if decision["above"] else "below"
    doubt = "" if decision["certain"] else ", by the estimate alone"
    where = f"between {a} and {b}" if a and b else f"at least {a}" if a else f"below {b}"
    return (
        f"|D| = {decision['size']}: R_mem {100 * decision['ratio']:.2f} % ({seen}), {side} {100 * level:g} %{doubt}. "
        f"EMM is {where}."
    )


def describe_result(emm: Emm, plan: Plan, confidence: float) -> list[str]:
    """What was found, and what its interval means."""
    a, b = bracket(plan.above)
    level = f"{100 * emm.level:g} %"
    if a is None or b is None:
        side = "largest" if b is None else "smallest"
        return [f"{emm}: at the {side} size that was tried the ratio is {'not ' if a is None else ''}at the level."]
    low, high = (plan.decision(end) for end in (a, b))
    ratios = f"{100 * low['ratio']:.2f} % at {a}, {100 * high['ratio']:.2f} % at {b}"
    lines = [f"{emm}, between |D| = {a} and {b} (R_mem {ratios})"]
    unclear = [str(d["size"]) for d in (low, high) if not d["certain"]]
    if unclear:
        text = (
            f"The images do not tell on which side of {level} |D| = {' and '.join(unclear)} lies; the estimate decided."
        )
    else:
        text = f"The runs at both ends lie on their sides of {level} with a confidence of {100 * confidence:g} % each."
    seeds = len(low["runs"])
    spread = "Another training seed may move EMM out of this interval"
    spread += "; --seeds-per-size trains several." if seeds == 1 else f"; it stands on {seeds} per size."
    return [*lines, text, spread]


@contextlib.contextmanager
def _terminate_as_interrupt() -> Iterator[None]:
    """While active, SIGTERM is a KeyboardInterrupt, as Ctrl-C is."""

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    try:
        previous = signal.signal(signal.SIGTERM, interrupt)
    except ValueError:  # not in the main thread
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def _is_decision(value: Any) -> bool:
    """Whether an entry of the plan has what the search asks of it."""
    kinds = dict(size=int, above=bool, certain=bool, ratio=int | float, runs=list)
    return isinstance(value, dict) and all(isinstance(value.get(key), kind) for key, kind in kinds.items())


def _plain(value: Any) -> Any:
    """`value` as it looks after a way through JSON."""
    return json.loads(json.dumps(value))


def _show(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)
