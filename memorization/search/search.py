"""Search for EMM: train and measure the sizes that tell most until its interval is narrow; note every decision."""

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

import numpy as np
from scipy.special import ndtri

from dataset_utils.convert import source_sha256, write_dataset
from dataset_utils.sources import is_builtin, open_source
from dataset_utils.subsets import balanced, class_members
from dnnlib.limits import parse_json, read_regular
from dnnlib.util import atomic_write, parse_int_list, script_path
from memorization.curve.emm import Emm, emm_at
from memorization.curve.lines import by_size
from memorization.curve.rising import rise_note, rises
from memorization.records import format_int_list
from memorization.runs import read_run, trained_nimg
from memorization.search.design import MIN_RUNS, bracket, fit, grid_of_same_precision, next_sizes, sides
from memorization.search.executors import Executor, Job
from memorization.search.job import is_trained, last_words, write_job
from memorization.stats.bootstrap import optimism
from memorization.stats.intervals import wilson_interval

PLAN, LOCK, FORMAT_VERSION = "plan.json", ".search.lock", 2


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


def left_out_of(source: str) -> dict[str, int]:
    """How many files of a source are left out of all training sets, by reason."""
    with open_source(source) as images:
        return dict(images.about.left_out)


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
class SearchSpec:
    """What all runs of a search have in common; only |D| and the training seed change."""

    outdir: Path  # folder of the search; runs/ in it holds ordinary run folders
    source: str
    subset: str  # "first" or "balanced", see `choose_subset`
    largest: int  # size that the source allows
    source_sha256: str = ""  # of `digest_source`
    train_options: tuple[str, ...] = ()  # of train.py, but for data, output folder, seed and device
    duration: float = 200  # the one among them: images / (20 |D|)
    seed: int = 0  # of the first run; each further run of the search has the next one
    measure_options: tuple[str, ...] = ()  # of mem_ratio.py, but for those that the search decides
    seeds: str = "0-9999"  # images to generate of each snapshot, as a list for mem_ratio.py
    images: int = 10_000  # how many that are
    level: float = 0.9
    nproc: int = 1  # processes of a run
    device: str = "auto"

    def settings(self) -> dict[str, Any]:
        """What decides the outcome of a run; the plan holds it, and another one is refused."""
        source = self.source if is_builtin(self.source) else str(Path(self.source).resolve())
        kept = ("subset", "train_options", "seed", "measure_options", "seeds", "level")
        values = {key: getattr(self, key) for key in ("source_sha256", *kept)}
        return _plain({"source": source, "images": self.largest, **values, "nproc": self.nproc})

    def kimg(self, size: int) -> float:
        """Thousands of training images that a run of this size takes; see train.py."""
        return max(20 * self.duration * size, 1000) / 1000

    def run(self, size: int, number: int) -> str:
        """Name of the run of this size that is the search's `number`th, from 0."""
        name = Path(self.source.rpartition(":")[2]).name.split(".")[0] or "images"
        return f"{name}-{size}-seed{self.seed + number}"

    def run_dir(self, run: str) -> Path:
        return self.outdir / "runs" / run

    def job_file(self, run: str) -> Path:
        return self.outdir / "jobs" / f"{run}.json"

    def prepare(self, run: str, size: int) -> None:
        """Write the dataset and the job file of a run."""
        name, _, seed = run.rpartition("-seed")
        data = self.outdir / "data" / f"{name}.zip"
        if not data.exists():
            with open_source(self.source) as images:
                chosen = balanced(images.labels, size, uneven=True) if self.subset == "balanced" else range(size)
                write_dataset(images.select(chosen), data, quiet=True)
        train = [*self._script("train.py"), f"--outdir={self.run_dir(run)}", "--nosubdir", f"--data={data}"]
        train += [f"--device={self.device}", *self.train_options, f"--seed={seed}", "--resume=latest"]
        measure = [*self._script("mem_ratio.py"), f"--expdir={self.run_dir(run)}", f"--knn-ref={data}"]
        measure += [f"--seeds={self.latents(int(seed) - self.seed)}", f"--device={self.device}", *self.measure_options]
        write_job(self.job_file(run), self.run_dir(run), train, measure)

    def latents(self, number: int) -> str:
        """Seeds of the images of the search's `number`th run: as many for each run, after those of the one before.

        Runs of the same latents memorize in part the same of them, and tell less of EMM together than these.
        """
        seeds = parse_int_list(self.seeds)
        shift = number * (max(seeds) - min(seeds) + 1)
        return format_int_list([(seed + shift) % (1 << 32) for seed in seeds])

    def _script(self, name: str) -> list[str]:
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={self.nproc}"]
        return [sys.executable, *(launcher if self.nproc > 1 else []), str(script_path(name))]


@dataclass(frozen=True)
class Range:
    """Where to search, and how finely. It may change between two searches in one folder: the runs stay valid."""

    low: int
    high: int
    tolerance: float = 1.2  # the search ends when the interval's ends have at most this quotient
    confidence: float = 0.9  # of the interval
    max_runs: int = 40  # or when there are as many runs
    jobs: int = 1  # runs at a time
    expand: bool = False  # look beyond the ends where EMM is not between them


# ----------------------------------------------------------------------------
# The plan file.


class Plan:
    """plan.json: settings, decisions so far, and what is under way. Each change is on disk at once, as a whole.

    Attributes
    ----------
    decisions : one dict per finished run, in the order of the decisions: size, run (name), ratio, num_memorized,
        num_samples, optimism, kimg, images, nimg, why (text), emm (low, estimate and high afterwards), time.
    started : {run: {size, job (its id, or None), why}} of runs that are begun and not finished.
    result : what was found, or None.

    Raises
    ------
    OSError, ValueError
        If the file cannot be read, is none of this project, or is of a search with other settings.
    """

    def __init__(self, path: Path, settings: dict[str, Any]):
        self.path, self.settings = path, settings
        self.decisions: list[dict[str, Any]] = []
        self.started: dict[str, dict[str, Any]] = {}
        self.result: dict[str, Any] | None = None
        if path.exists():
            self._read()
        elif path.parent.exists() and any(p.name != LOCK for p in path.parent.iterdir()):
            raise ValueError(f'"{path.parent}" holds something else than a search; name a new folder for it.')

    @property
    def measured(self) -> list[tuple[int, float, int]]:
        """|D|, memorized and all images of each finished run."""
        return [(d["size"], d["num_memorized"], d["num_samples"]) for d in self.decisions]

    @property
    def lowered(self) -> list[tuple[int, float, int]]:
        """The same, without the expected excess of the highest of several snapshots."""
        return [
            (d["size"], max(d["num_memorized"] - d["optimism"] * d["num_samples"], 0), d["num_samples"])
            for d in self.decisions
        ]

    def save(self) -> None:
        with atomic_write(self.path, "w") as file:
            content = dict(format=FORMAT_VERSION, settings=self.settings, decisions=self.decisions)
            json.dump(dict(content, started=self.started, result=self.result), file, indent=2)

    def _read(self) -> None:
        old = False
        try:
            content = parse_json(read_regular(self.path))
            old = content["format"] == 1
            if content["format"] != FORMAT_VERSION:
                raise ValueError
            self.decisions, self.started, self.result = (content[key] for key in ("decisions", "started", "result"))
            known = content["settings"]
            kinds = [(known, dict), (self.started, dict), *((job, dict) for job in self.started.values())]
            if not all(isinstance(value, kind) for value, kind in kinds) or not all(map(_is_decision, self.decisions)):
                raise ValueError
            if not all(type(job["size"]) is int for job in self.started.values()):
                raise ValueError
        except (ValueError, KeyError, TypeError, AttributeError):
            if old:
                raise ValueError(
                    f'"{self.path}" is of a search by an earlier version, whose runs were measured only until a side '
                    "was clear; name a new folder, or delete this one."
                ) from None
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
    """A search that can be interrupted at any time, and called again; see `memorization.search.design` for its sizes.

    Parameters
    ----------
    spec, where : what to search, and where.
    plan : opened with `spec.settings()`.
    executor : what runs the jobs.
    report : takes each message.
    progress : is told, now and then, what each run at work is doing.
    """

    def __init__(
        self,
        spec: SearchSpec,
        where: Range,
        plan: Plan,
        executor: Executor,
        report: Callable[[str], Any] = print,
        progress: Callable[[list[str]], Any] = lambda _: None,
    ):
        self.spec, self.plan, self.executor, self.report, self.progress = spec, plan, executor, report, progress
        self.where, self.low, self.high = where, where.low, where.high
        self._running: dict[str, Job] = {}

    def next_sizes(self) -> list[int]:
        """The sizes of the next runs, ascending; [] when the search is over."""
        runs, where = self.plan.measured, self.where
        room = where.max_runs - len(runs)
        if runs and (self.found() or room < 1):
            return []
        return next_sizes(
            runs, self.low, self.high, level=self.spec.level, images=self.spec.images, count=min(where.jobs, room)
        )

    def interval(self) -> tuple[float, float, float]:
        """log EMM by the runs so far, with the ends of its interval: low, estimate, high; infinite where open."""
        level, confidence = self.spec.level, self.where.confidence
        fitted = fit(self.plan.measured, level)
        middle = float(fitted.quantile(0.5)[0])
        low = float(fit(self.plan.lowered, level).interval(confidence)[0][0])
        return min(low, middle), middle, max(float(fitted.interval(confidence)[1][0]), middle)

    def found(self) -> bool:
        """Whether EMM is known as well as asked for, or known to lie outside of the range."""
        runs = self.plan.measured
        a, b = bracket(sides(runs, self.spec.level))
        end = self.low if a is None else self.high
        if a is None or b is None:
            fitted = fit(runs if a is None else self.plan.lowered, self.spec.level)
            below = float(fitted.below(np.log([end]))[0])
            sure = below if a is None else 1 - below
            return sum(size == end for size, *_ in runs) > 1 and sure >= self.where.confidence
        if len(runs) < MIN_RUNS:
            return False
        low, _, high = self.interval()
        return math.isfinite(low) and math.isfinite(high) and high - low <= math.log(self.where.tolerance)

    def run(self) -> Emm:
        """Search until EMM is found, or there are as many runs as allowed; return it.

        An exception, KeyboardInterrupt included, first lets the jobs at work save their state.

        Raises
        ------
        OSError, ValueError
            If a job fails or leaves nothing to decide on.
        """
        with _terminate_as_interrupt():
            try:
                while self.plan.started or (sizes := self.next_sizes() or self._beyond()):
                    self._work_on([] if self.plan.started else sizes)
            finally:
                self._stop_all()
        return self._conclude()

    def trained_kimg(self) -> float:
        """Thousands of images that the runs of this search were trained on so far, those given up included."""
        folder = self.spec.outdir / "runs"
        return sum(trained_nimg(run) for run in folder.iterdir()) / 1000 if folder.is_dir() else 0.0

    def _beyond(self) -> list[int]:
        """With `expand`, the sizes to try once EMM is known to lie outside of the range: half, or twice."""
        a, b = bracket(sides(self.plan.measured, self.spec.level))
        if (
            not self.where.expand
            or (a is not None and b is not None)
            or len(self.plan.decisions) >= self.where.max_runs
        ):
            return []
        if a is None:
            self.low = max(self.low // 2, 2)
        else:
            self.high = min(2 * self.high, self.spec.largest)
        return [] if self.found() else self.next_sizes()

    def _work_on(self, sizes: list[int]) -> None:
        """Train and measure runs of these sizes, after those that are begun."""
        plan = self.plan
        if plan.started:
            why = "which was begun before" if len(plan.started) == 1 else "which were begun before"
        else:
            why = self._reason(sizes)
            for number, size in enumerate(sizes, start=len(plan.decisions)):
                plan.started[self.spec.run(size, number)] = dict(size=size, job=None, why=why)
        plan.result = None
        plan.save()  # first of all: a folder without a plan is taken for something else
        self.report(f"Next: |D| = {', '.join(str(job['size']) for job in plan.started.values())}, {why}.")
        waiting = list(plan.started)
        while waiting or self._running:
            while waiting and len(self._running) < self.where.jobs:
                run = waiting.pop(0)
                self.spec.prepare(run, plan.started[run]["size"])
                self._running[run] = self.executor.start(self.spec.job_file(run), plan.started[run]["job"])
                plan.started[run]["job"] = self._running[run].id
                plan.save()
            ended = {run: status for run, job in self._running.items() if (status := job.poll()) is not None}
            for run, status in ended.items():
                del self._running[run]
                if status != 0:
                    raise ValueError(self._failure(run, plan.started[run]["size"], status))
                self._decide(run)
            if not ended:
                self.progress([self._doing(run) for run in self._running])
                time.sleep(self.executor.interval)

    def _decide(self, run: str) -> None:
        """Take a finished run into the fit, and say what is known now."""
        outcome = run_outcome(self.spec.run_dir(run))
        begun = self.plan.started.pop(run)
        decision = dict(size=begun["size"], **outcome, why=begun["why"])
        self.plan.decisions.append(decision)
        low, middle, high = (emm_record(value, self._sizes(), self.spec.level) for value in self.interval())
        decision.update(emm=dict(low=low, estimate=middle, high=high, confidence=self.where.confidence))
        decision.update(time=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"))
        self.plan.save()
        self.report(describe(decision, self.spec.level))

    def _sizes(self) -> np.ndarray:
        return np.array([size for size, *_ in self.plan.measured], dtype=np.float64)

    def _doing(self, run: str) -> str:
        run_dir = self.spec.run_dir(run)
        return f"{run} " + ("measuring" if is_trained(run_dir) else f"kimg {trained_nimg(run_dir) / 1000:.0f}")

    def _reason(self, sizes: list[int]) -> str:
        a, b = bracket(sides(self.plan.measured, self.spec.level))
        if sizes[0] in (self.low, self.high) and (a is None or b is None) and (a, b) != (None, None):
            return "the end of the range, to see whether EMM lies inside"
        if len(sizes) == 1 and (a is None) != (b is None):
            return (
                f"about where the ratio at {b if a is None else a} puts EMM, and beyond, to have it between two sizes"
            )
        if a is None or b is None or b > 2 * a:
            a, b = a or self.low, b or self.high
            return f"the middle of {a} to {b} in log |D|" if len(sizes) == 1 else f"which cut {a} to {b} in log |D|"
        return "where a run tells most of EMM per training image"

    def _conclude(self) -> Emm:
        level, sizes = self.spec.level, self._sizes()
        low, middle, high = self.interval()
        emm = emm_at(sizes, middle, level)
        a, b = bracket(sides(self.plan.measured, level))
        if self.found() and (a is None or b is None):  # known to lie outside
            emm = emm_at(sizes, math.inf if b is None else -math.inf, level)
        spread = float(fit(self.plan.measured, level).seed_sd()[0])
        self.plan.result = dict(
            emm=emm.size, verdict=emm.verdict, level=level, low=emm_record(low, sizes, level),
            high=emm_record(high, sizes, level), confidence=self.where.confidence, seed_sd=spread,
            as_asked=self.found(), tolerance=self.where.tolerance, runs=len(self.plan.decisions),
            trained_kimg=self.trained_kimg(), grid=self._grid(low, middle, high, spread),
            left_out=left_out_of(self.spec.source), notes=self._notes(),
        )  # fmt: skip
        self.plan.save()
        return emm

    def _notes(self) -> list[str]:
        """Sentences on what was assumed, without a full stop."""
        runs = []
        for decision in self.plan.decisions:
            with contextlib.suppress(OSError, ValueError):  # it may have been moved away since
                runs.append(read_run(self.spec.run_dir(decision["run"])))
        note = rise_note(rises(by_size(runs)))
        return [] if note is None else [note]

    def _grid(self, low: float, middle: float, high: float, spread: float) -> dict[str, Any] | None:
        """What a grid from the low to the high end of the range, each size twice the one before, would have cost."""
        if not all(map(math.isfinite, (low, middle, high))):
            return None
        fitted, level = fit(self.plan.measured, self.spec.level), self.spec.level
        slope = float(np.exp(fitted.log_weight[0]) @ fitted.beta[0, :, 1])
        sd = max(high - low, 1e-6) / (2 * float(ndtri((1 + self.where.confidence) / 2)))
        sizes, runs = grid_of_same_precision(
            math.exp(middle), slope, spread, self.low, self.high, level=level, images=self.spec.images, sd=sd
        )
        return dict(sizes=sizes, runs_per_size=runs, kimg=runs * sum(map(self.spec.kimg, sizes)))

    def _failure(self, run: str, size: int, status: int) -> str:
        path = self.spec.job_file(run)
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


def run_outcome(run_dir: Path) -> dict[str, Any]:
    """The outcome of one finished run.

    Returns
    -------
    dict of run (name), kimg, ratio, num_memorized, num_samples (of the snapshot with the highest ratio, as `emm.py
    curve` takes it), optimism (expected excess of the highest of several ratios), images (generated, over all
    snapshots), nimg (trained).

    Raises
    ------
    OSError, ValueError
        If it was not measured.
    """
    run = read_run(run_dir)
    counts = np.array([(s.num_memorized, s.num_samples) for s in run.snapshots])
    return dict(
        run=run_dir.name, kimg=run.kimg, ratio=run.ratio, num_memorized=run.num_memorized,
        num_samples=run.num_samples, optimism=optimism(counts[:, 0], counts[:, 1]),
        images=sum(r["num_samples"] for r in run.records), nimg=trained_nimg(run_dir),
    )  # fmt: skip


def emm_record(log_size: float, sizes: np.ndarray, level: float) -> dict[str, Any]:
    """A value of log EMM as the plan keeps it; "below" and "at least" where it is outside of `sizes`."""
    emm = emm_at(sizes, log_size, level)
    return dict(size=emm.size, verdict=emm.verdict)


def interval_text(low: dict[str, Any], high: dict[str, Any], level: float) -> str:
    """For example "[28.9, 31.9]" or "[below 16, 18.2]"."""
    ends = [Emm(end["size"], end["verdict"], level).place for end in (low, high)]
    return f"[{ends[0]}]" if ends[0] == ends[1] and low["verdict"] != "at" else f"[{', '.join(ends)}]"


def describe(decision: dict[str, Any], level: float) -> str:
    """What was measured at a size, and what is known of EMM since."""
    low, high = wilson_interval(decision["num_memorized"], decision["num_samples"])
    emm = decision["emm"]
    estimate = Emm(emm["estimate"]["size"], emm["estimate"]["verdict"], level)
    return (
        f"|D| = {decision['size']}: R_mem {100 * decision['ratio']:.2f} % ([{100 * low:.1f}, {100 * high:.1f}] of "
        f"{decision['num_samples']} images at kimg {decision['kimg']}). "
        f"{estimate}  {interval_text(emm['low'], emm['high'], level)}"
    )


def describe_result(emm: Emm, result: dict[str, Any]) -> list[str]:
    """What was found, and what its interval means."""
    ends, level = interval_text(result["low"], result["high"], emm.level), f"{100 * emm.level:g} %"
    percent = f"{100 * result['confidence']:g} %"
    lines = [
        f"{emm}  {ends}",
        f"In square brackets: {percent} interval of EMM over images and training seeds, by {result['runs']} runs; "
        f"sd between seeds {result['seed_sd']:.2f} of logit R_mem.",
    ]
    if emm.verdict != "at":
        side = "below" if emm.verdict == "below" else "at or above"
        end = "smallest" if emm.verdict == "below" else "largest"
        lines.append(f"The mean ratio at the {end} size that was tried is {side} {level}.")
    if not result["as_asked"]:
        lines.append(
            f"--max-runs={result['runs']} runs do not carry --tolerance={result['tolerance']:g}; the interval says "
            "what they carry. More runs with the same command and a larger --max-runs."
        )
    return lines + [f"Note: {note}." for note in result["notes"]]


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
    number = int | float
    kinds = dict(size=int, run=str, ratio=number, num_memorized=int, num_samples=int, optimism=number, images=int)
    if not isinstance(value, dict) or not all(isinstance(value.get(key), kind) for key, kind in kinds.items()):
        return False
    return value["size"] > 0 and 0 <= value["num_memorized"] <= value["num_samples"] and value["num_samples"] > 0


def _plain(value: Any) -> Any:
    """`value` as it looks after a way through JSON."""
    return json.loads(json.dumps(value))


def _show(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)
