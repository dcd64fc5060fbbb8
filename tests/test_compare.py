"""emm.py compare: McNemar and Newcombe against published numbers and simulation; pairs from two measured runs."""

import csv
import json

import numpy as np
import pytest
from builders import digit_images
from test_mem_ratio_cli import FAST, add_snapshot
from test_reference import write_options

import emm as cli
import mem_ratio
from memorization.stats.difference import independent_difference, paired_difference


def test_newcombe_independent():
    """Newcombe 1998, Table II, method 10: 56/70 - 48/80, 9/10 - 3/10, 0/10 - 0/20."""
    for counts, expected in [((56, 70, 48, 80), (0.0524, 0.3339)), ((9, 10, 3, 10), (0.1705, 0.8090)),
                             ((0, 10, 0, 20), (-0.1611, 0.2775))]:  # fmt: skip
        found = independent_difference(*counts)
        assert (found.low, found.high) == pytest.approx(expected, abs=1e-4)
    assert independent_difference(3, 4, 1, 4).p_value == pytest.approx(34 / 70)  # the lady tasting tea


def test_mcnemar():
    """Of 8 discordant pairs 1 to 7: 2 (1 + 8) / 256; none: nothing against equality."""
    assert paired_difference(10, 1, 7, 5).p_value == pytest.approx(18 / 256)
    assert paired_difference(10, 0, 0, 5).p_value == 1
    found = paired_difference(40, 12, 2, 46)
    assert found.value == pytest.approx(0.1) and found.low < 0.1 < found.high
    unpaired = independent_difference(52, 100, 42, 100)
    assert found.high - found.low < 0.6 * (unpaired.high - unpaired.low)  # pairs tell more
    swapped = paired_difference(40, 2, 12, 46)
    assert (swapped.low, swapped.high) == pytest.approx((-found.high, -found.low))


def test_coverage_where_there_is_no_difference():
    """Pairs with a common difficulty, and independent images: both tests keep 5 %, both intervals 95 %."""
    rng = np.random.default_rng(0)
    rejected, covered, n = np.zeros(2), np.zeros(2), 100
    trials = 600
    for _ in range(trials):
        p = rng.beta(2, 1, n)
        a, b = rng.random((2, n)) < p
        both, one, other = (a & b).sum(), (a & ~b).sum(), (~a & b).sum()
        paired = paired_difference(int(both), int(one), int(other), int(n - both - one - other))
        free = independent_difference(*(int(x) for x in (rng.binomial(n, 0.7), n, rng.binomial(n, 0.7), n)))
        for i, found in enumerate((paired, free)):
            rejected[i] += found.p_value < 0.05
            covered[i] += found.low <= 0 <= found.high
    assert (rejected / trials <= 0.06).all() and (rejected / trials > 0.01).all()
    assert (np.abs(covered / trials - 0.95) < 0.03).all()


@pytest.fixture(scope="module")
def runs(tmp_path_factory, make_zip):
    from click.testing import CliRunner

    root = tmp_path_factory.mktemp("runs")
    data = make_zip(digit_images()[:40], None, root / "digits-40.zip")
    for name, kimg in (("a", 100), ("b", 200)):
        add_snapshot(root / name, kimg)
        write_options(root / name, data)
        args = [f"--expdir={root / name}", f"--knn-ref={data}", "--seeds=0-7", *FAST]
        result = CliRunner().invoke(mem_ratio.main, args)
        assert result.exit_code == 0, result.output
    return root


def test_two_runs(runs, run_cli, tmp_path):
    out = tmp_path / "ab.json"
    result = run_cli(cli.main, ["compare", runs / "a", runs / "b", f"--out={out}", "--csv"])
    assert "McNemar" in result.stdout and "another training seed" in result.stdout
    record = json.loads(out.read_text())
    assert record["difference"]["paired"] is True and record["difference"]["p_value"] == 1
    assert [run["kimg"] for run in record["runs"]] == [100, 200]
    for letter in "ab":
        with open(tmp_path / f"ab-{letter}.csv", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        (known,) = (runs / letter / "knn-dist").glob("network-snapshot-*.npz")
        distance = np.load(known)["knn_distance"]
        assert [int(row["seed"]) for row in rows] == list(range(8))
        assert [float(row["d1"]) for row in rows] == pytest.approx(list(distance[:, 0]))
        assert [int(row["memorized"]) for row in rows] == list((distance[:, 0] < distance[:, 1] / 3).astype(int))


def test_without_distances_the_images_are_independent(runs, run_cli, tmp_path):
    (runs / "b" / "knn-dist").rename(runs / "b" / "away")
    args = ["compare", runs / "a", runs / "b", f"--out={tmp_path / 'ab.json'}"]
    try:
        result = run_cli(cli.main, args)
        assert "Fisher" in result.stdout and "no longer on disk" in result.stdout
        assert "measure it again" in run_cli(cli.main, [*args, "--csv"], code=1).stderr
    finally:
        (runs / "b" / "away").rename(runs / "b" / "knn-dist")
    assert "not measured at kimg 100, but at 200" in run_cli(cli.main, [*args, "--kimg=100"], code=1).stderr
