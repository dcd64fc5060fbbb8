"""Runs of the same latents: how alike their images are, and that intervals know it."""

import json
import os

import numpy as np
import pytest
from builders import write_run

import emm as cli
from benchmarks.bench_alike import coverage
from memorization import records
from memorization.curve.latents import Latents
from memorization.measure.ratio import make_measurement
from memorization.runs import read_run
from memorization.stats.alike import MOST, Alike, correlation, same_latents
from memorization.stats.bootstrap import ratio_replicates, seed_spread
from memorization.stats.crossing import fit_crossing
from memorization.stats.effects import Cells
from memorization.stats.intervals import wilson_interval
from memorization.stats.simulation import draw_alike


def test_the_correlation_is_that_of_the_indicators():
    rng = np.random.default_rng(0)
    a, b = rng.random([2, 400]) < 0.7
    b[:200] = a[:200]
    seeds = np.arange(400)
    known = np.corrcoef(a, b)[0, 1]
    assert correlation([seeds, seeds], [a, b]) == pytest.approx(known) and 0.3 < known < 0.6
    assert correlation([seeds, seeds], [a, a]) == MOST
    # A tenth of the latents in common: the counts correlate as much less, by 100 / (1000 100)^(1/2).
    long, short = rng.random(1000) < 0.5, np.arange(100)
    assert correlation([np.arange(1000), short], [long, long[:100]]) == pytest.approx(0.1**0.5, rel=0.1)
    three = Alike([seeds, seeds, seeds[:0]], [a, a, None])
    assert three.correlation([(0, 1)]) == three.correlation([(1, 0)]) == MOST and three.correlation([]) is None
    assert correlation([seeds, seeds], [a, ~a]) == 0  # it is taken for no worse than independent
    assert correlation([seeds, seeds], [a, np.ones(400, dtype=bool)]) is None  # all memorized: nothing is said
    assert correlation([seeds, seeds + 400], [a, b]) is None and correlation([seeds], [a]) is None


def test_latents_are_shared_directly_or_through_others():
    ranges = [(0, 10), (20, 30), (9, 12), (40, 50), (11, 21)]
    assert list(same_latents([np.arange(*r) for r in ranges])) == [0, 0, 0, 1, 0]
    assert list(same_latents([np.arange(5), np.arange(5, 9)])) == [0, 1]
    assert list(same_latents([np.array([1 << 60]), np.array([(1 << 60) + 1])])) == [0, 1]  # beyond what a float holds
    assert list(same_latents([np.zeros(0, dtype=np.int64)] * 2)) == [0, 1]


def test_the_mean_of_a_size_is_as_sure_as_it_is():
    """Simulated: the standard deviation of the mean of three runs that memorize in part the same."""
    rng = np.random.default_rng(1)
    flags = draw_alike(np.full([1, 3], 0.8), 200_000, 0.6, 0.0, rng)[0]
    alike = correlation([np.arange(200_000)] * 3, list(flags))
    true = flags.reshape(3, 400, 500).mean(axis=(0, 2)).std()  # over 400 studies of 500 images
    group, same = (np.full(3, 400), np.full(3, 500)), [np.zeros(3, dtype=int)]
    drawn = ratio_replicates([group], 20_000, seed_sd=0.0, shared=(alike, same)).std()
    assert drawn == pytest.approx(true, rel=0.08)
    assert ratio_replicates([group], 20_000, seed_sd=0.0).std() < 0.8 * true
    apart = (alike, [np.arange(3)])  # latents of their own
    assert ratio_replicates([group], 20_000, seed_sd=0.0, shared=apart).std() == pytest.approx(
        ratio_replicates([group], 20_000, seed_sd=0.0).std()
    )


def test_seeds_that_do_not_differ_are_found_where_images_are_alike():
    """Runs of the same latents differ less than independent ones; what is left is not taken for a negative spread."""
    rng, found = np.random.default_rng(2), []
    for _ in range(200):
        flags = draw_alike(np.full([1, 3], 0.7), 500, 0.6, 0.0, rng)[0]
        k, same = flags.sum(axis=1), [np.zeros(3, dtype=int)]
        alike = correlation([np.arange(500)] * 3, list(flags))
        spread = seed_spread([(k, np.full(3, 500))], (alike, same))
        found.append((spread.s, spread.h))
    s, h = np.mean(found, axis=0)
    assert s == pytest.approx(h, rel=0.15) and h < 0.75 / 500


def test_independent_images_are_fitted_as_before():
    runs = ([20, 20, 40, 40], [960, 950, 800, 790], [1000] * 4)
    plain, zero = fit_crossing(*runs), fit_crossing(*runs, alike=0.0, latents=[0, 0, 0, 0])
    assert plain.interval(0.95) == zero.interval(0.95)
    same = fit_crossing(*runs, alike=0.5).interval(0.95)
    assert same[0] < plain.interval(0.95)[0] and same[1] > plain.interval(0.95)[1]
    with pytest.raises(ValueError, match="0 to below 1"):
        fit_crossing(*runs, alike=1.0)
    with pytest.raises(ValueError, match="latents of 4 runs"):
        fit_crossing(*runs, alike=0.5, latents=[0, 0])


def test_a_difference_of_lines_that_copy_the_same_is_sure():
    """Where two lines memorize the same latents their difference has none of that noise; else it has all of it."""
    k, n, same = np.full(3, 350), np.full(3, 500), [np.zeros(3, dtype=int)] * 2

    def length(*alike):
        low, high = Cells([(k, n)] * 2, [0, 1], 0.0, same, np.array(alike).reshape(2, 2)).difference(0, 1)
        return high - low

    apart, together, independent = length(0.5, 0, 0, 0.5), length(0.5, 0.5, 0.5, 0.5), length(0, 0, 0, 0)
    assert apart == pytest.approx(2**0.5 * independent, rel=0.05)  # 1 + (3 - 1) / 2 = 2 times the variance
    assert together == pytest.approx(0.5**0.5 * independent, rel=0.05)


def test_intervals_hold_the_truth():
    """Seven in ten of the latents alike; the benchmark has the whole table. The error of 60 studies is 3 %."""
    alike, texts = coverage("8 to 128", 0.9, 0.2, 0.1, 500, studies=60)
    held = [float(text.split()[0]) for text in texts]
    assert 0.6 < alike < 0.8
    assert held[0] < 80 and held[2] < 88 and held[4] < 90  # taken as independent: EMM, R_mem, difference
    assert held[1] >= 88 and held[3] >= 90 and held[5] >= 90


# ----------------------------------------------------------------------------
# From run folders.


def study(folder, flags, seeds, sizes, rows=True, **options):
    """Measured runs with the distances of their images: flags bool [runs, n]."""
    for i, (flag, size) in enumerate(zip(flags, sizes)):
        run = write_run(folder / f"{size}-{i}", size, [int(flag.sum())], len(flag), seed=i, **options)
        record = json.loads((run / "mem_traj.jsonl").read_text()) | {"seeds": seeds[i]}
        (run / "mem_traj.jsonl").write_text(json.dumps(record) + "\n")
        first = int(seeds[i].split("-")[0])
        arrays = {
            "seeds": np.arange(first, first + len(flag)),
            "knn_distance": np.stack([np.where(flag, 1.0, 3.0), np.full(len(flag), 4.0)], axis=1),
            "knn_index": np.zeros([len(flag), 2], dtype=np.int64),
        }
        if rows:
            records._write_rows(run / "knn-dist" / f"{record['snapshot']}.npz", make_measurement(arrays), record)
    return folder


def curve(folder, run_cli):
    result = run_cli(cli.main, ["curve", folder, f"--out={folder.parent / 'c.png'}"])
    return result, json.loads((folder.parent / "c.json").read_text())["lines"][0]


def test_the_curve_finds_it(run_cli, tmp_path):
    rng = np.random.default_rng(3)
    sizes = [20, 20, 20, 40, 40, 40]
    flags = draw_alike(np.repeat([0.95, 0.8], 3)[None], 500, 0.8, 0.0, rng)[0]
    same, own = ["0-499"] * 6, [f"{500 * i}-{500 * i + 499}" for i in range(6)]
    result, line = curve(study(tmp_path / "same", flags, same, sizes), run_cli)
    assert "the intervals allow for it" in result.stderr and "knn-dist" not in result.stderr
    runs = [read_run(path) for path in sorted((tmp_path / "same").iterdir())]
    latents = Latents(runs)
    assert line["alike"] == latents.alike(runs) == pytest.approx(correlation([np.arange(500)] * 6, list(flags)))
    assert line["alike_of_one_size"] == latents.alike(runs[:3], runs[3:])
    assert latents.alike(runs[:3], runs[3:]) > line["alike"] > latents.alike_between((runs[:3], runs[3:]))

    result, apart = curve(study(tmp_path / "own", flags, own, sizes), run_cli)
    assert apart["alike"] is None and result.stderr == ""
    result, unknown = curve(study(tmp_path / "unknown", flags, same, sizes, rows=False), run_cli)
    assert unknown["alike"] is None and "(knn-dist) are not on disk" in result.stderr

    def length(of):
        return np.log(of["emm_high"]["size"] / of["emm_low"]["size"])

    assert apart["emm_high"] == unknown["emm_high"] and length(line) > 1.15 * length(apart)
    assert line["points"][1]["ci_low"] < apart["points"][1]["ci_low"]


def test_other_latents_by_another_way(tmp_path):
    """Another sampler or another image size makes other latents of the same seed; a damaged record says nothing."""
    flags = np.random.default_rng(4).random([4, 100]) < 0.8
    folder = study(tmp_path / "runs", flags, ["0-99"] * 4, [20] * 4)
    for name, change in (("20-1", {"sampler": {"num_steps": 9}}), ("20-2", {"seeds": None})):
        path = folder / name / "mem_traj.jsonl"
        path.write_text(json.dumps(json.loads(path.read_text()) | change) + "\n")
    path = folder / "20-3" / "training_options.json"
    options = json.loads(path.read_text())
    options["dataset_kwargs"]["resolution"] = 16
    path.write_text(json.dumps(options))
    runs = [read_run(path) for path in sorted(folder.iterdir())]
    assert len(set(Latents(runs).numbers(runs))) == 4


@pytest.mark.parametrize("damage", ["huge seeds", "pipe", "other counts", "seeds twice", "junk", "unpacks"])
def test_distances_that_are_not_those_of_the_record_count_as_missing(run_cli, tmp_path, damage):
    flags = np.random.default_rng(5).random([3, 100]) < 0.8
    folder = study(tmp_path / "runs", flags, ["0-99"] * 3, [20] * 3)
    run = folder / "20-1"
    (rows,) = (run / "knn-dist").iterdir()
    with np.load(rows, allow_pickle=False) as file:
        arrays = dict(file)
    if damage == "huge seeds":
        record = json.loads((run / "mem_traj.jsonl").read_text()) | {"seeds": f"{10**20}-{10**20 + 99}"}
        (run / "mem_traj.jsonl").write_text(json.dumps(record) + "\n")
    elif damage == "pipe":
        rows.unlink()
        os.mkfifo(rows)
    elif damage == "junk":
        rows.write_bytes(b"PK\x03\x04junk")
    elif damage == "unpacks":  # to 320 MB
        np.savez_compressed(rows, **arrays, more=np.zeros(40_000_000))
    else:
        change = (
            {"knn_distance": arrays["knn_distance"][:, ::-1]}
            if damage == "other counts"
            else {"seeds": np.zeros(100, int)}
        )
        np.savez(rows, **arrays | change)
    result, line = curve(folder, run_cli)
    assert ("are not on disk" in result.stderr) == (damage != "huge seeds")  # of those nothing is shared
    assert line["alike"] is not None


def test_where_nearly_all_is_memorized_images_are_not_counted_thrice(run_cli, tmp_path):
    """Three runs that memorize all but the same images tell of one: nothing can be said of seeds there."""
    flags = np.repeat(np.arange(1000)[None] > 0, 3, axis=0)
    result, line = curve(study(tmp_path / "same", flags, ["0-999"] * 3, [20] * 3), run_cli)
    (point,) = line["points"]
    worth = 3000 / 2.9  # rho is taken to be 0.95 at most: 1 + 2 * 0.95
    assert point["ci_low"] == pytest.approx(wilson_interval(0.999 * worth, worth)[0], rel=1e-6)
    _, apart = curve(study(tmp_path / "own", flags, ["0-999", "1000-1999", "2000-2999"], [20] * 3), run_cli)
    assert apart["points"][0]["ci_low"] == pytest.approx(wilson_interval(2997, 3000)[0], rel=1e-6)
