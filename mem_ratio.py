"""Measure the memorization ratio, and the gap to the optimum, of all snapshots of a run."""

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from click.core import ParameterSource

from dnnlib.cli import Float, report_errors
from dnnlib.images import left_out_sentence
from dnnlib.util import check_file, check_folder, is_url
from memorization.measure.criteria import CRITERIA, THRESHOLD
from memorization.measure.evaluator import Evaluator
from memorization.measure.feature_space import FeatureSpace
from memorization.measure.features import TRUST, load_features
from memorization.measure.gap import GapMeter, ImageSet
from memorization.measure.held_out import HeldOutControl
from memorization.measure.quality import MEASURES
from memorization.measure.quality_meter import SPACES, QualityMeter, describe_quality
from memorization.measure.results import Reference, Task, read_reference
from memorization.measure.samples import RESIZE, Fit
from memorization.measure.subjects import (
    Subject,
    image_subjects,
    is_snapshot,
    model_subject,
    one_snapshot,
    optimum_subject,
    snapshot_subjects,
    trained_images,
    watch_snapshots,
)
from memorization.records import format_int_list, jsonl_path, setting
from memorization.stats.sequential import error_share
from torch_utils import distributed as dist
from training.options import (
    all_classes_option,
    batch_option,
    class_option,
    device_option,
    precision_options,
    sampler_options,
    seeds_option,
    subdirs_option,
)
from training.precision import check_precision

GRID_SEEDS = 32
UNREADABLE = "snapshots that could not be measured"
OLDER = "snapshots older than one that is above the bar"
MAX_ROWS = 20  # of a table of classes or groups that is printed; the record holds all

FRACTION = Float(min=0, max=1, min_open=True, max_open=True)
POSITIVE = Float(min=0, min_open=True)


def several(convert: Callable[[str], Any]) -> Callable:
    """Callback of an option that may be given several times, and each time as a list: 0.25,0.5."""

    def callback(ctx: click.Context, param: click.Parameter, values: Sequence[str]) -> list[Any]:
        parts = [part.strip() for value in values for part in value.split(",")]
        return list(dict.fromkeys(convert(part, param, ctx) for part in parts))

    return callback


@click.command(context_settings=dict(max_content_width=120))
@click.option("--expdir", help="Run folder with the snapshots", metavar="DIR")
@click.option(
    "--network", help="Instead of a run: one snapshot, or a dataset whose optimum to measure",
    metavar="SNAPSHOT|ZIP|DIR|NPZ|URL",
)  # fmt: skip
@click.option(
    "--cond", help="Class-conditional optimum, with --network=DATASET", metavar="BOOL", type=bool, default=False
)
@click.option(
    "--images", help="Instead of a run: images that any model has made; several allowed, one per checkpoint",
    metavar="DIR|ZIP|NPZ|NPY", multiple=True,
)  # fmt: skip
@click.option(
    "--model", help="Instead of a run: a network of another library, for example diffusers:FOLDER",
    metavar="LIBRARY:FOLDER",
)  # fmt: skip
@click.option("--pipeline", help="Sample with the library's own pipeline, with --model", is_flag=True)
@click.option("--trust", help="Read weights from pickles, too, whose code is run, with --model", is_flag=True)
@click.option("--knn-ref", help="Training images to compare with  [default: --network]", metavar="ZIP|DIR|NPZ|NPY")
@click.option(
    "--other-reference", help="Let --knn-ref be images that the network was not trained on, such as held-out ones",
    is_flag=True,
)  # fmt: skip
@click.option(
    "--resize", help="Give --images the size of the training images first", metavar="|".join(RESIZE),
    type=click.Choice(list(RESIZE)),
)  # fmt: skip
@click.option("--to-grayscale", help="Make --images gray first", is_flag=True)
@click.option("--value-range", help="Black and white of floats in arrays, with --images", metavar="LOW,HIGH")
@click.option(
    "--label", "labels", help="Note this of the images, for emm.py curve --by=KEY; several allowed",
    metavar="KEY=VALUE", multiple=True,
)  # fmt: skip
@click.option(
    "--log", "--log-file", help="Log file; the other results lie beside it  [default: EXPDIR/mem_traj.log]",
    metavar="FILE",
)  # fmt: skip
@click.option(
    "--gap", help="Measure the gap to the optimum, too, on so many noised images", metavar="N",
    type=click.IntRange(min=1),
)  # fmt: skip
@click.option("--holdout", help="Measure the gap on these images, too", metavar="ZIP|DIR|NPZ")
@click.option(
    "--quality", help="Measure the quality of the images, too, against these, which were not trained on",
    metavar="ZIP|DIR|NPZ|NPY",
)  # fmt: skip
@click.option(
    "--quality-measures", help="By which measures  [default: frechet]", metavar=",".join(MEASURES), multiple=True,
    callback=several(click.Choice(list(MEASURES)).convert),
)  # fmt: skip
@click.option(
    "--quality-space", help="Where  [default: features with --features, else pca, of the held-out pixels]",
    metavar="|".join(SPACES), type=click.Choice(SPACES),
)  # fmt: skip
@click.option(
    "--held-out", help="Count copies of these images, too, by group: a control, of dataset_inject.py --held-out",
    metavar="ZIP|DIR",
)  # fmt: skip
@seeds_option("0-63")
@class_option
@all_classes_option
@batch_option
@click.option("--save-images", help="Keep the images, as DIR/network-snapshot-KIMG/SEED.png", metavar="DIR")
@subdirs_option
@click.option("--grid", help=f"Draw {GRID_SEEDS} images of the highest ratio and their nearest ones", metavar="FILE")
@click.option("--hist", help="Draw the distribution of d1/d2 at the highest ratio", metavar="FILE")
@click.option(
    "--threshold", "thresholds", help="Also the ratio with this bound of d1/d2; several allowed", metavar="FLOAT",
    multiple=True, callback=several(POSITIVE.convert),
)  # fmt: skip
@click.option(
    "--criterion", "criteria", help="Also the ratio by this criterion; several allowed", metavar="|".join(CRITERIA),
    multiple=True, callback=several(click.Choice(list(CRITERIA)).convert),
)  # fmt: skip
@click.option(
    "--features", help="Also the criteria in the features of a TorchScript network, whose code is run", metavar="PT"
)
@click.option(
    "--adaptive", "bar", help="Stop with a snapshot as soon as its ratio is above or below this, for example 0.9",
    metavar="FLOAT", type=FRACTION,
)  # fmt: skip
@click.option(
    "--confidence", help="Confidence of that decision", metavar="FLOAT", type=FRACTION, default=0.95, show_default=True
)
@click.option(
    "--until-above", help="Leave out older snapshots once one is above, with --adaptive; all share its confidence",
    is_flag=True,
)  # fmt: skip
@click.option("--watch", help="Measure snapshots as a training run writes them, until it is done", is_flag=True)
@click.option(
    "--poll", help="Look for new snapshots every so many seconds, with --watch", metavar="SEC", type=POSITIVE,
    default=5, show_default=True,
)  # fmt: skip
@click.option(
    "--unique", help="Compare with the different ones among the training images, not with repeats", is_flag=True
)
@click.option(
    "--near-repeats", help="Also count training images that have another one within this distance (RMS, 0 to 255)",
    metavar="FLOAT", type=POSITIVE,
)  # fmt: skip
@click.option("--remeasure", help="Measure again what the log already holds", is_flag=True)
@click.option("--quiet", help="No progress bar, not even on a terminal", is_flag=True)
@sampler_options
@precision_options
@device_option
@report_errors
def main(
    expdir: str | None,
    network: str | None,
    cond: bool,
    images: tuple[str, ...],
    model: str | None,
    pipeline: bool,
    trust: bool,
    knn_ref: str | None,
    resize: str | None,
    to_grayscale: bool,
    value_range: str | None,
    labels: tuple[str, ...],
    log: str | None,
    gap: int | None,
    holdout: str | None,
    quality: str | None,
    quality_measures: list[str],
    quality_space: str | None,
    held_out: str | None,
    seeds: list[int],
    other_reference: bool,
    class_idx: int | None,
    all_classes: bool,
    batch: int,
    save_images: str | None,
    subdirs: bool,
    grid: str | None,
    hist: str | None,
    thresholds: list[float],
    criteria: list[str],
    features: str | None,
    bar: float | None,
    confidence: float,
    until_above: bool,
    watch: bool,
    poll: float,
    unique: bool,
    near_repeats: float | None,
    remeasure: bool,
    quiet: bool,
    precision: str | None,
    compile: bool,
    device: str,
    **sampler_kwargs: Any,
) -> None:
    """Measure the memorization ratio of all snapshots of a run, newest first.

    For each snapshot one image per seed is generated. It counts as memorized if it is less than 1/3 as far
    from the nearest training image as from the second nearest. A snapshot that was measured before with the
    same settings is not measured again, so that an interrupted command goes on where it stopped.

    --watch follows a run that is still training. --adaptive=0.9 stops with a snapshot as soon as its ratio is known to
    be above or below 90 %. --until-above asks whether the run is: it leaves out what is older than a snapshot above,
    and its confidence is that of all snapshots together. --threshold, --criterion and --features add ratios by other
    definitions to the records.

    A copy of a training image that occurs twice has d1 = d2 and does not count, as published; --unique compares with
    each different training image once.

    With --gap=N also the mean squared distance between the network and the closed-form optimum of the training
    images is measured, at 16 noise levels, on N noised training images (and N of --holdout); see gap.png.

    --quality=DATASET compares the images, besides, with images that were not trained on: Fréchet distance, kernel
    distance, precision, recall, density and coverage, each beside its value for the training set and for real images.

    --held-out=DATASET counts of each group how often an image would count as a copy of one that training never saw, and
    says how far apart training images of that group are: what of its copies is chance, and how much d1/d2 asks of it.

    Beside the log lie the records (mem_traj.jsonl) and the distances of every image (knn-dist). torchrun takes
    --log for its own option (Python 3.11): with it, write --log-file.

    Examples:

    \b
    # Measure a run with 10,000 images per snapshot
    python mem_ratio.py --expdir=RUN --knn-ref=datasets/cifar10-1k.zip --seeds=0-9999

    \b
    # The same with 8 GPUs
    torchrun --standalone --nproc_per_node=8 mem_ratio.py --expdir=RUN --knn-ref=datasets/cifar10-1k.zip \\
        --seeds=0-9999 --batch=512

    \b
    # While the run is training: is the ratio above 90 %?
    python mem_ratio.py --expdir=RUN --knn-ref=datasets/cifar10-1k.zip --seeds=0-9999 --watch --adaptive=0.9

    \b
    # How far each snapshot is from the theoretical optimum
    python mem_ratio.py --expdir=RUN --knn-ref=datasets/cifar10-1k.zip --gap=1000 --holdout=datasets/cifar10-test.zip

    \b
    # Quality beside memorization
    python mem_ratio.py --expdir=RUN --knn-ref=datasets/cifar10-1k.zip --seeds=0-9999 \\
        --quality=datasets/cifar10-test.zip --quality-measures=frechet,precision,recall

    \b
    # Measure one snapshot
    python mem_ratio.py --network=RUN/network-snapshot-000024.safetensors --knn-ref=datasets/cifar10-1k.zip

    \b
    # Measure the theoretical optimum itself
    python mem_ratio.py --network=datasets/cifar10-1k.zip --log=optimum/mem_traj.log --seeds=0-999

    \b
    # Images that any model has made, and a model of diffusers
    python mem_ratio.py --images=samples/ --knn-ref=train/ --log=out/mem_traj.log --grid=out/grid.png
    python mem_ratio.py --model=diffusers:ddpm/ --knn-ref=train/ --log=out/mem_traj.log --seeds=0-999
    """
    check_options(expdir, network, cond, knn_ref, log, gap, holdout, bar, until_above, watch)
    notes = check_other_sources(images, model, resize, to_grayscale, value_range, labels)
    snapshot = network is not None and is_snapshot(network)
    if network is not None and not snapshot and (compile or precision not in (None, "fp32")):
        raise click.UsageError(
            "--precision and --compile belong to --expdir; the optimum has its own exact arithmetic."
        )
    target = dist.init(device)
    try:
        check_precision(precision, target, compile)
        # Refuse what can be refused before anything slow.
        run_dir = Path(expdir) if expdir is not None else Path(network).parent if snapshot else None
        log_path = Path(log) if log is not None else run_dir / "mem_traj.log"
        check_file(log_path, "--log")
        figures = [path for path in (grid, hist) if path is not None]
        if figures or gap is not None:
            from memorization import plots  # matplotlib takes a second to load
        for folder in [log_path.parent / "knn-dist", *([save_images] if save_images is not None else [])]:
            check_folder(folder)
        jsonl = jsonl_path(log_path)
        check_file(jsonl)
        for path in figures:
            plots.check_format(path)

        def read(path: str) -> Reference:
            space = None if features is None else lambda images: feature_space(features, images, target)
            return read_reference(path, target, unique=unique, features=space, note=dist.print0)

        reference = None
        if images or model is not None:
            reference = read(knn_ref)
        if images:
            fit = Fit(resize, to_grayscale, parse_range(value_range))
            subjects = image_subjects(images, reference.images.shape[1:], fit)
        elif model is not None:
            subjects = [other_model(model, target, pipeline, trust, sampler_kwargs)]
        elif snapshot:
            subjects = [one_snapshot(network, target)]
        elif network is not None:
            dist.print0(
                f'Measuring the optimum of "{network}" as a training set; images of a model are given by --images.'
            )
            subjects = [optimum_subject(network, target, cond=cond or class_idx is not None)]
            knn_ref = knn_ref if knn_ref is not None else str(subjects[0].path)
        elif watch:
            subjects = watch_snapshots(expdir, target, poll=poll, on_wait=lambda: evaluator.wait(expdir))
        else:
            subjects = snapshot_subjects(expdir, target)
        if reference is None:
            reference = read(knn_ref)
        if run_dir is not None:
            check_trained_on(run_dir, reference, other_reference)
        judge = None
        if quality is not None:
            judge = QualityMeter(
                reference.images, ImageSet.read(quality), quality_measures or ["frechet"], device=target,
                space=quality_space or ("features" if features is not None else "pca"), features=reference.features,
            )  # fmt: skip
        control = HeldOutControl.read(reference, held_out) if held_out is not None else None
        names = [name for name in criteria if name != "ratio"]
        given = click.get_current_context().get_parameter_source("seeds") != ParameterSource.DEFAULT
        parts: dict[int | None, list[Subject]] = {None: subjects}  # seeds of a part -> what is measured with them
        if images and not given:  # all images; checkpoints may have different numbers of them
            parts = {size: [s for s in subjects if s.size == size] for size in sorted({s.size for s in subjects})}
        evaluators, position = [], itertools.count(1)
        for size in parts:
            if judge is not None:
                judge.check(len(seeds) if size is None else size)
        for size, part in parts.items():
            task = Task(
                seeds=seeds if size is None else range(size), batch=batch, class_idx=class_idx,
                sampler_kwargs={} if images else sampler_kwargs, thresholds=thresholds,
                criteria=[CRITERIA[name] for name in names],
                feature_criteria=[CRITERIA[name] for name in criteria or ["ratio"]] if features is not None else [],
                bar=bar, confidence=confidence, precision=precision, compile=compile, labels=notes,
                all_classes=all_classes,
            )  # fmt: skip
            evaluator = Evaluator(
                log_path, reference, task, lambda record, note, task=task: describe(record, task, note, judge),
                quality=judge, control=control,
                open_meter=gap_meter(knn_ref, holdout, reference, num=gap, batch=batch, device=target) if gap else None,
                outdir=Path(save_images) if save_images is not None else None, subdirs=subdirs,
                remeasure=remeasure, quiet=quiet,
            )  # fmt: skip
            evaluators.append(evaluator)
            evaluator.run(first_above(part, evaluator, position) if until_above else part)
        evaluator = max(evaluators, key=highest)
        task = evaluator.task

        best = evaluator.best()
        record = evaluator.records[best.name]
        if gap is not None:
            gap_path = log_path.parent / "gap.png"
            title = f"{log_path.parent.absolute().name}, |D| = {len(reference.images)}"
            dist.on_rank0(plots.gap_curves, list(evaluator.records.values()), gap_path, title=title)
            dist.print0(f"Gap:         {gap_path}")
            loss_path = log_path.parent / "loss.png"
            dist.on_rank0(plots.loss_curves, list(evaluator.records.values()), loss_path, title=title)
            dist.print0(f"Loss:        {loss_path}\n{describe_losses(best.name, record['gap'])}")
        dist.print0(f"Highest:     {describe(record, task, quality=judge)}")
        if "repeats" in record:
            dist.print0(describe_repeats(record))
        if near_repeats is not None:
            record = evaluator.records[best.name] = note_near_repeats(evaluator, best, near_repeats)
        for table in ("classes", "groups"):
            if table in record:
                dist.print0(describe_table(table, record[table]))
        if control is not None:
            dist.print0(describe_held_out(record["held_out"], record["groups"]))
        if record["mean_distance"] == 0:
            dist.print0("Note: every image is a training image, at distance 0; is --knn-ref the images themselves?")
        if grid is not None:
            shown = evaluator.images(best, GRID_SEEDS)
            nearest = reference.images[shown.knn_index[:, 0]]
            shown_seeds = format_int_list(sorted(task.seeds)[:GRID_SEEDS])
            title = f"{best.name}, |D| = {reference.dataset_size}, seeds {shown_seeds}"
            how = dict(distance=shown.knn_distance, title=title)
            dist.on_rank0(plots.neighbour_grid, shown.images, nearest, grid, **how)
            dist.print0(f"Grid:        {grid}")
        if hist is not None:
            how = dict(thresholds=[THRESHOLD, *thresholds], title=best.name)
            dist.on_rank0(plots.ratio_histogram, evaluator.rows(best).knn_distance, hist, **how)
            dist.print0(f"Histogram:   {hist}")
        dist.print0(f"Log:         {log_path}\nRecords:     {jsonl}\nDistances:   {log_path.parent / 'knn-dist'}")
        left_out = [name for each in evaluators for name in each.left_out]
        counts = {UNREADABLE: len(left_out)} | reference.left_out | record.get("left_out", {})
        counts |= record["quality"]["left_out"] if judge is not None else {}
        counts |= control.left_out if control is not None else {}
        if until_above and not watch:
            counts[OLDER] = len(subjects) - len(left_out) - sum(len(each.records) for each in evaluators)
        dist.print0(left_out_sentence(counts))
        if left_out and dist.get_rank() == 0:
            count = f"{len(left_out)} of {len(left_out) + sum(len(each.records) for each in evaluators)} snapshots"
            raise click.ClickException(f"{count} could not be measured: {', '.join(left_out)}.")
    except KeyboardInterrupt:
        if dist.get_rank() == 0:
            click.echo("Interrupted; the same command goes on with what is missing.", err=True)
        raise SystemExit(130) from None
    finally:
        dist.shutdown()


def check_options(
    expdir: str | None,
    network: str | None,
    cond: bool,
    knn_ref: str | None,
    log: str | None,
    gap: int | None,
    holdout: str | None,
    bar: float | None,
    until_above: bool,
    watch: bool,
) -> None:
    """Refuse options that contradict each other."""
    given = click.get_current_context().params
    sources = {"--expdir": expdir, "--network": network, "--images": given["images"], "--model": given["model"]}
    named = [name for name, value in sources.items() if value]
    if len(named) != 1:
        raise click.UsageError(
            "Give one of --expdir, the folder of a run; --network, a dataset whose optimum to measure; --images, what "
            f"a model has made; and --model, a network of another library{'' if not named else '; not several'}."
        )
    snapshot = network is not None and is_snapshot(network)
    if snapshot and log is None and is_url(network):
        raise click.UsageError("--network=URL needs --log, for example --log=out/mem_traj.log.")
    if given["other_reference"] and expdir is None and not snapshot:
        raise click.UsageError("--other-reference belongs to --expdir, or to --network=SNAPSHOT.")
    if named != ["--expdir"] and not snapshot and log is None:
        raise click.UsageError(f"{named[0]} needs --log, for example --log=out/mem_traj.log.")
    if (named != ["--network"] or snapshot) and knn_ref is None:
        raise click.UsageError(f"{named[0]}{'=SNAPSHOT' * snapshot} needs --knn-ref, the training images.")
    if (expdir is not None or snapshot) and cond:
        raise click.UsageError("--cond belongs to --network; a snapshot knows by itself.")
    if holdout is not None and gap is None:
        raise click.UsageError("--holdout needs --gap=N, the number of noised images.")
    if given["quality"] is None and (given["quality_measures"] or given["quality_space"]):
        raise click.UsageError("--quality-measures and --quality-space belong to --quality, which is not given.")
    if given["quality_space"] == "features" and given["features"] is None:
        raise click.UsageError("--quality-space=features needs --features=MODEL.pt, the feature network.")
    if given["quality"] is not None and bar is not None:
        raise click.UsageError("--quality needs all images of a snapshot, --adaptive stops before; leave one out.")
    if until_above and bar is None:
        raise click.UsageError("--until-above needs --adaptive, the ratio to be above.")
    if watch and expdir is None:
        raise click.UsageError("--watch needs --expdir, the folder that a run writes into.")
    needed = {"confidence": ("bar", "--adaptive"), "poll": ("watch", "--watch")}
    context = click.get_current_context()
    for name, (other, flag) in needed.items():
        if context.get_parameter_source(name) != ParameterSource.DEFAULT and not context.params[other]:
            raise click.UsageError(f"--{name} belongs to {flag}, which is not given.")


def check_other_sources(
    images: Sequence[str],
    model: str | None,
    resize: str | None,
    to_grayscale: bool,
    value_range: str | None,
    labels: Sequence[str],
) -> list[tuple[str, str]]:
    """Refuse options that belong to --images or --model without them; return the --label."""
    given = click.get_current_context().params
    for name in ("pipeline", "trust"):
        if given[name] and model is None:
            raise click.UsageError(f"--{name} belongs to --model, which is not given.")
    if not images and (resize or to_grayscale or value_range):
        raise click.UsageError("--resize, --to-grayscale and --value-range belong to --images, which is not given.")
    for name in ("cond", "gap", "class_idx", "precision", "compile", "save_images"):
        if images and given[name]:
            raise click.UsageError(
                f"--{name.replace('_idx', '').replace('_', '-')} needs a network; --images are made."
            )
    if model is not None and (given["compile"] or given["precision"] not in (None, "fp32")):
        raise click.UsageError("--precision and --compile belong to networks of this project, not to --model.")
    parse_range(value_range)
    notes = []
    for label in labels:
        key, equals, value = label.partition("=")
        if not equals or not key.strip() or not value.strip():
            raise click.UsageError(f'--label={label} is not KEY=VALUE, for example --label="sampler=ddim".')
        notes.append((key.strip(), value.strip()))
    if len(dict(notes)) < len(notes):
        raise click.UsageError("--label gives one key two values.")
    if notes and not images and model is None:
        raise click.UsageError("--label belongs to --images and --model; a run has its options.")
    return notes


def parse_range(text: str | None) -> tuple[float, float] | None:
    """LOW,HIGH as two numbers."""
    if text is None:
        return None
    try:
        low, high = (float(part) for part in text.split(","))
    except ValueError:
        raise click.UsageError(f"--value-range={text} is not LOW,HIGH, for example -1,1.") from None
    return low, high


def other_model(
    model: str, device: torch.device, pipeline: bool, trust: bool, sampler_kwargs: dict[str, Any]
) -> Subject:
    """--model=LIBRARY:FOLDER, sampled by EDM's samplers or by its own pipeline."""
    library, _, folder = model.partition(":")
    if library != "diffusers" or not folder:
        raise click.UsageError(f"--model={model} is not LIBRARY:FOLDER; the one library is diffusers.")
    from diffmem import adapters

    if not pipeline:
        return model_subject(
            library, folder, device, lambda: adapters.from_diffusers(folder, device=device, trust=trust)
        )
    source = click.get_current_context().get_parameter_source
    wrong = [name for name in sampler_kwargs if source(name) != ParameterSource.DEFAULT and name != "num_steps"]
    if wrong:
        raise click.UsageError(f"Of the sampler's options --pipeline takes --steps only, not {wrong[0]}.")
    steps = sampler_kwargs["num_steps"] if source("num_steps") != ParameterSource.DEFAULT else None

    def load() -> torch.nn.Module:
        return adapters.PipelineSamples(adapters.load_pipeline(folder, trust=trust), steps, device)

    return model_subject(library, folder, device, load, sampled_by="its pipeline")


def highest(evaluator: Evaluator) -> float:
    """The highest ratio that an evaluator has found; -1 if it could measure nothing."""
    return max((record["ratio"] for record in evaluator.records.values()), default=-1.0)


def first_above(subjects: Iterable[Subject], evaluator: Evaluator, position: Iterator[int]) -> Iterator[Subject]:
    """The snapshots up to the first that the evaluator finds to be above the bar; the run as a whole is, then.

    The error is shared among them in the order in which they are measured, so that with the stated confidence no
    snapshot of the run is wrongly called above.
    """
    for subject in subjects:
        yield replace(subject, error_share=error_share(next(position)))
        sequential = evaluator.records.get(subject.name, {}).get("sequential", {})
        if sequential.get("verdict") == "above":
            return


def check_trained_on(run_dir: Path, reference: Reference, allowed: bool) -> None:
    """Refuse a reference that the network is known not to have been trained on, unless it is `allowed`, and noted.

    A run records the digest of its images (`training.fingerprint.dataset_sha256`); where it recorded none, or
    that of a listing of files, which others may hold as well, nothing is known.

    Raises
    ------
    ValueError
        If it is refused.
    """
    trained_on = trained_images(run_dir)
    if trained_on is None or trained_on[0] == reference.dataset_sha256:
        return
    digest, path, size = trained_on
    what = (
        f'"{reference.path}" ({reference.dataset_size} images, digest {reference.dataset_sha256[:12]}) is not what the '
        f'network was trained on, "{path}" ({size} images, digest {digest[:12]})'
    )
    if not allowed:
        raise ValueError(
            f"{what}: other images, or in another order. Name those as --knn-ref; for held-out or other images say "
            "--other-reference."
        )
    reference.other = True
    dist.print0(f"Note: {what}; the record says so.")


def feature_space(path: str, images: np.ndarray, device: torch.device) -> FeatureSpace:
    """The training images in the features of a TorchScript network."""
    dist.print0(f"Note: {TRUST}")
    return FeatureSpace(load_features(path, device, shape=images.shape[1:]), images, device)


def note_near_repeats(evaluator: Evaluator, subject: Subject, bound: float) -> dict[str, Any]:
    """Count training images with another one within `bound`, and images nearest to such; print it, write it down."""
    reference = evaluator.reference
    near = reference.pixels.self_query(1)[0][:, 0] <= bound
    nearest = int(near[evaluator.rows(subject).knn_index[:, 0]].sum())
    n = evaluator.records[subject.name]["num_samples"]
    found = {"distance": bound, "images": int(near.sum()), "num_nearest": nearest, "share_nearest": nearest / n}
    dist.print0(
        f"Near:        {found['images']} of {len(near)} training images have another one within {bound:g}; such "
        f"a one is the nearest of {nearest} of {n} images ({100 * nearest / n:.1f} %): d1/d2 hardly sees copies."
    )
    return evaluator.ledger.update(evaluator.records[subject.name], near_repeats=found)


def gap_meter(
    training: str, holdout: str | None, reference: Reference, **how: Any
) -> Callable[[torch.nn.Module, dict[str, Any]], GapMeter]:
    """(network, header of its snapshot) -> a meter for networks that were trained like this one."""

    def open_meter(net: torch.nn.Module, header: dict[str, Any]) -> GapMeter:
        cond = net.label_dim > 0
        meter = GapMeter(
            ImageSet.read(training, cond=cond) if cond or reference.unique else ImageSet(training, reference.images),
            ImageSet.read(holdout, cond=cond) if holdout is not None else None,
            xflip=header.get("dataset", {}).get("xflip", False),
            **how,
        )
        meter.check(net)
        if meter.overlap:
            dist.print0(f'Note: {meter.overlap} images of "{holdout}" are training images.')
        return meter

    return open_meter


def describe(record: dict[str, Any], task: Task, note: str = "", quality: QualityMeter | None = None) -> str:
    """The lines that report a record: its ratio, and what else was asked for; `note` ends the first."""
    name = f"kimg {record['kimg']:06d}" if record["kimg"] is not None else "optimum"
    if record.get("source"):
        name = record["snapshot"]
    note = f"  ({setting(record, 'precision')}){note}" if setting(record, "precision") != "fp32" else note
    text = f"{name}  R_mem {_percent(record)}  mean distance {record['mean_distance']:.3f}"
    if "sequential" in record:
        verdict, bar = record["sequential"]["verdict"], f"{100 * task.bar:g} %"
        spent = f"after {record['num_samples']:,} of {len(task.seeds):,} images"
        text += f"  {verdict} {bar} {spent}" if verdict is not None else f"  undecided at {bar} {spent}"
    lines = [(f"d1/d2 < {t:g}", record["thresholds"][repr(t)]) for t in task.thresholds]
    lines += [(name, record["criteria"][name]) for name in task.criterion_names()]
    judged = describe_quality(record["quality"], quality.measures) if quality is not None else []
    return "\n".join([text + note, *(f"    {name:<24s}{_percent(share)}" for name, share in lines), *judged])


def describe_table(kind: str, table: dict[str, dict[str, Any]]) -> str:
    """Ratio of each class or group, as lines."""
    width = max(len(name) for name in [*table, kind])
    lines = [f"    {kind:<{width}s}  R_mem % [95 % interval]  images nearest  training images copied"]
    for name, row in list(table.items())[:MAX_ROWS]:
        ratio = _percent(row) if row["num_nearest"] else "-"
        copied = f"{row['num_replayed']} of {row['num_training']}"
        lines.append(f"    {name:<{width}s}  {ratio:<23s}  {row['num_nearest']:>14d}  {copied:>22s}")
    if len(table) > MAX_ROWS:
        lines.append(f"    ... {len(table) - MAX_ROWS} more are in the record")
    return "\n".join(lines)


def describe_held_out(held_out: dict[str, Any], groups: dict[str, dict[str, Any]]) -> str:
    """Copies of held-out images beside those of training images, and the radius of the criterion, as lines."""
    width = max(map(len, [*held_out["groups"], "held-out"]))
    lines = [
        f"    {'held-out':<{width}s}  images  copies per image  (of training images)  radius  (of training images)"
    ]
    for name, row in held_out["groups"].items():
        own, per = groups.get(name), row["num_counted"] / row["num_images"]
        trained = f"{own['memorized_per_training']:.3f}" if own else "-"
        radius = f"{held_out['training'][name]['radius'][0]:.2f}" if own else "-"
        line = f"    {name:<{width}s}  {row['num_images']:>6d}  {per:>16.3f}  {trained:>20s}"
        lines.append(f"{line}  {row['radius'][0]:>6.2f}  {radius:>20s}")
    return "\n".join(lines)


def describe_losses(name: str, gap: dict[str, Any]) -> str:
    """Denoising losses over sigma of a snapshot, and its gap to the optimum beside them, as lines."""
    sides = ("", "holdout_") if "loss_gap" in gap else ("",)
    titles = [f"{what}, {side}" for what in ("loss", "gap") for side in ("training", "held-out")[: len(sides)]]
    titles += ["loss, held-out - training [95 %]"] * (len(sides) - 1)
    lines = [f"    Denoising loss, and gap to the optimum, of {name}, per pixel:"]
    lines.append(f"    {'sigma':>9s}" + "".join(f"{title:>{max(len(title), 9) + 2}s}" for title in titles))
    for i, sigma in enumerate(gap["sigma"]):

        def text(key: str, i: int = i) -> str:
            return "-" if gap[key][i] is None else f"{gap[key][i]:.3g}"

        cells = [text(side + key) for key in ("loss", "mean") for side in sides]
        if len(sides) > 1:
            cells.append(f"{text('loss_gap')} [{text('loss_gap_low')}, {text('loss_gap_high')}]")
        columns = (f"{cell:>{max(len(title), 9) + 2}s}" for cell, title in zip(cells, titles))
        lines.append(f"    {sigma:9.4g}" + "".join(columns))
    return "\n".join(lines)


def describe_repeats(record: dict[str, Any]) -> str:
    """What repeated training images mean for a record, as a line."""
    repeats = record["repeats"]
    near = f"{repeats['num_nearest']} of {record['num_samples']} images ({100 * repeats['share_nearest']:.1f} %)"
    what = f"of {near} the nearest training image is one of the {repeats['repeated']} that occur more than once"
    if repeats["unique"]:
        return f"Repeats:     {what}; each counts once (--unique), which is not the published number."
    return f"Repeats:     {what}: none of them counts as memorized, as published; see --unique."


def _percent(share: dict[str, Any]) -> str:
    low, high = 100 * share["ci_low"], 100 * share["ci_high"]
    return f"{100 * share['ratio']:6.2f} % [{low:.1f}, {high:.1f}]"


if __name__ == "__main__":
    main()
