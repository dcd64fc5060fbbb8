"""The sequential test: error rate under looks after every sample, numbers against integrals, rounds, the benchmark."""

import json
import math

import numpy as np
import pytest
from scipy.integrate import quad
from scipy.special import betainc, betaln

from benchmarks import bench_adaptive
from memorization.stats.intervals import wilson_interval
from memorization.stats.sequential import (
    PRIOR_SAMPLES,
    SequentialTest,
    _log_martingale,
    decision_bounds,
    error_share,
    rounds,
)


def simulate(p, cap, bar=0.9, confidence=0.95, replications=4000, looks=None, seed=0):
    """Verdicts (1 above, -1 below, 0 open) and samples spent of many tests of a probability p."""
    looks = np.arange(1, cap + 1) if looks is None else looks
    above, below = decision_bounds(looks, bar, confidence)
    rng, found = np.random.default_rng(seed), []
    for _ in range(0, replications, 500):
        s = np.cumsum(rng.random((500, cap)) < p, axis=1, dtype=np.int32)[:, looks - 1]
        found.append(bench_adaptive.decide(s, looks, above, below))
    return np.concatenate(found, axis=1)


# ----------------------------------------------------------------------------
# Error rates.


@pytest.mark.parametrize(("bar", "confidence"), [(0.9, 0.95), (0.9, 0.8), (0.5, 0.9)])
def test_error_rate_at_the_bar(bar, confidence):
    """Looked at after every sample, with p at the bar: either verdict comes with probability at most alpha."""
    alpha = 1 - confidence
    verdict, _ = simulate(bar, 3000, bar, confidence)
    noise = 3 * math.sqrt(alpha * confidence / verdict.size)
    for side in (1, -1):
        rate = (verdict == side).mean()
        assert rate <= alpha + noise
        assert rate > alpha / 10  # the level is used, not wasted


@pytest.mark.parametrize(("p", "wrong"), [(0.89, 1), (0.86, 1), (0.91, -1), (0.94, -1)])
def test_error_rate_beside_the_bar(p, wrong):
    verdict, _ = simulate(p, 2000, replications=3000)
    assert (verdict == wrong).mean() <= 0.05


def test_looks_of_any_kind():
    """Fewer looks cannot make more errors than looks after every sample, and cost samples."""
    every = simulate(0.9, 3000)
    some = simulate(0.9, 3000, looks=np.cumsum(rounds(3000, 64)))
    assert ((some[0] != 0) & (every[0] == 0)).sum() == 0
    assert some[1].mean() > every[1].mean()


def test_peeking_at_wilson_intervals_is_not_valid():
    looks = np.cumsum(rounds(3000, 64))
    above, below = bench_adaptive.wilson_bounds(looks, 0.9, 0.95)
    for n, high, low in zip(looks.tolist(), above, below):
        assert wilson_interval(int(high), n)[0] > 0.9 >= wilson_interval(int(high) - 1, n)[0]
        assert wilson_interval(int(low), n)[1] < 0.9 <= wilson_interval(int(low) + 1, n)[1]
    rng = np.random.default_rng(0)
    s = np.cumsum(rng.random((2000, 3000)) < 0.9, axis=1)[:, looks - 1]
    naive, _ = bench_adaptive.decide(s, looks, above, below)
    valid, _ = bench_adaptive.decide(s, looks, *decision_bounds(looks))
    assert (naive != 0).mean() > 0.2  # though each single look errs in 5 % of the cases
    assert (valid > 0).mean() <= 0.05 and (valid < 0).mean() <= 0.05


@pytest.mark.parametrize(("p", "samples"), [(1.0, 60), (0.95, 250), (0.85, 350), (0.5, 20)])
def test_power(p, samples):
    verdict, spent = simulate(p, 2000, replications=1000)
    assert (verdict == (1 if p > 0.9 else -1)).mean() > 0.99
    assert spent.mean() < samples


def test_shared_error_holds_for_a_run():
    """16 snapshots just below the bar: that one or more is called above has at most the error of the run."""
    looks, runs = np.cumsum(rounds(10_000)), 600
    rng = np.random.default_rng(0)
    s = np.cumsum(rng.binomial(np.diff(looks, prepend=0), 0.899, size=(runs, 16, len(looks))), axis=2)

    def false_above(shares):
        above = np.array([decision_bounds(looks, 0.9, 1 - 0.05 * share)[0] for share in shares])
        return (s >= above).any(axis=(1, 2)).mean()

    assert false_above([error_share(j) for j in range(1, 17)]) <= 0.05
    assert false_above(np.ones(16)) > 0.1  # each at the whole error


def test_error_share():
    assert sum(error_share(j) for j in range(1, 10_000)) == pytest.approx(1, abs=2e-4)
    with pytest.raises(ValueError, match="count from 1"):
        error_share(0)


# ----------------------------------------------------------------------------
# Numbers.


def log_integral(s, f, bar):
    """log M by quadrature around the largest value of the integrand."""
    a, c = PRIOR_SAMPLES * bar, PRIOR_SAMPLES * (1 - bar)

    def log_integrand(q):
        return (a + s - 1) * np.log(q) + (c + f - 1) * np.log1p(-q)

    top = min(max((a + s - 1) / max(a + c + s + f - 2, 1), bar), 1 - 1e-9)
    peak = log_integrand(top)
    width = max(math.sqrt(top * (1 - top) / (s + f + 1)), 1e-7)
    points = sorted({bar, 1.0, *(x for k in (-8, -1, -1e-2, 0, 1e-2, 1, 8) if bar < (x := top + k * width) < 1)})
    parts = [quad(lambda q: math.exp(log_integrand(q) - peak), x, y, limit=200)[0] for x, y in zip(points, points[1:])]
    prior = betaln(a, c) + math.log(betainc(c, a, 1 - bar))
    return math.log(sum(parts)) + peak - prior - s * math.log(bar) - f * math.log1p(-bar)


@pytest.mark.parametrize(
    ("s", "f"), [(0, 0), (5, 1), (60, 4), (20, 80), (950, 50), (100, 900), (9000, 1000), (0, 3000), (6000, 4000)]
)
@pytest.mark.parametrize("bar", [0.5, 0.9])
def test_martingale_is_the_mixture(s, f, bar):
    assert _log_martingale(s, f, bar) == pytest.approx(log_integral(s, f, bar), abs=1e-6, rel=1e-6)


@pytest.mark.parametrize("bar", [0.1, 0.5, 0.9, 0.99])
def test_far_tail_joins_the_near_one(bar):
    """Where the incomplete beta function underflows the continued fraction goes on without a jump."""
    n = 20_000
    s = np.arange(0, int(n * bar), 5)
    values = _log_martingale(s, n - s, bar)
    assert np.isfinite(values).all() and (np.diff(values) > 0).all()
    assert np.abs(np.diff(values, 2)).max() < 0.05


@pytest.mark.parametrize("share", [0, 1e-6, 0.5, 0.8985, 0.9, 0.9015, 0.999999, 1])
def test_a_million_samples(share):
    test = SequentialTest()
    test.update(round(share * 10**6), 10**6)
    summary = test.summary()
    assert summary == json.loads(json.dumps(summary, allow_nan=False))
    assert summary["verdict"] == ("above" if share > 0.9 else "below" if share < 0.9 else None)
    assert 0 <= summary["low"] <= share <= summary["high"] <= 1
    assert summary["high"] - summary["low"] < 0.005


def test_expectation_is_one_at_the_bar():
    """E[M(n)] = 1 for p = bar: a martingale, exactly, by summing over all outcomes."""
    from scipy.stats import binom

    for bar, n in [(0.9, 50), (0.9, 1000), (0.3, 200)]:
        s = np.arange(n + 1)
        expectation = (binom.pmf(s, n, bar) * np.exp(_log_martingale(s, n - s, bar))).sum()
        assert expectation == pytest.approx(1, abs=1e-9)
        under = (binom.pmf(s, n, bar - 0.05) * np.exp(_log_martingale(s, n - s, bar))).sum()
        assert under < 1


def test_bounds_are_those_of_update():
    for n in (1, 5, 33, 64, 1000):
        above, below = (int(x) for x in decision_bounds(n))
        for s in {0, below, below + 1, above - 1, above, n}:
            if 0 <= s <= n:
                expected = "above" if s >= above else "below" if s <= below else None
                assert SequentialTest().update(s, n) == expected


def test_sides_are_mirrored():
    for s, n in [(3, 20), (60, 64), (500, 1000)]:
        one, other = SequentialTest(0.9), SequentialTest(1 - 0.9)
        one.update(s, n)
        other.update(n - s, n)
        assert one.log_evidence() == pytest.approx(other.log_evidence()[::-1], abs=1e-9)
        assert one.interval() == pytest.approx([1 - p for p in other.interval()[::-1]], abs=1e-9)


def test_interval_covers_at_all_times():
    """All bounds along a path together miss p in at most 5 % of the paths; each is wider than Wilson's."""
    looks = np.unique(np.geomspace(1, 3000, 120).astype(int))
    for p in (0.9, 0.5, 0.99):
        limits = {}
        rng, missed = np.random.default_rng(1), 0
        s = np.cumsum(rng.random((400, 3000)) < p, axis=1)[:, looks - 1]
        for path in s:
            for successes, n in zip(path.tolist(), looks.tolist()):
                if (successes, n) not in limits:
                    test = SequentialTest()
                    test.update(successes, n)
                    limits[successes, n] = test.interval()
                low, high = limits[successes, n]
                if not low <= p <= high:
                    missed += 1
                    break
        assert missed / len(s) <= 0.05
    for (successes, n), (low, high) in limits.items():
        wilson = wilson_interval(successes, n)
        assert n < 20 or high - low > wilson[1] - wilson[0]


# ----------------------------------------------------------------------------
# Use.


def test_use():
    test = SequentialTest(bar=0.9, confidence=0.95)
    assert (test.verdict, test.interval(), test.log_evidence()) == (None, (0, 1), (0, 0))
    assert test.update(31, 32) is None
    assert test.update(np.int64(64), np.int64(64)) == "above"
    assert (test.successes, test.n, test.verdict) == (95, 96, "above")
    assert test.update(0, 1000) == "above"  # the first verdict stays: it is the one with the guarantee
    assert test.summary()["num_samples"] == 1096


@pytest.mark.parametrize("arguments", [(0,), (1,), (0.9, 0), (0.9, 1), (90,), (0.9, float("nan"))])
def test_refuses_settings(arguments):
    with pytest.raises(ValueError, match="between 0 and 1"):
        SequentialTest(*arguments)


@pytest.mark.parametrize("counts", [(-1, 3), (4, 3), (0, -1)])
def test_refuses_counts(counts):
    with pytest.raises(ValueError, match="new samples"):
        SequentialTest().update(*counts)


@pytest.mark.parametrize(
    ("total", "first", "growth", "multiple"),
    [(10_000, 64, 1.25, 64), (10_000, 50, 2, 1), (10, 64, 1.5, 8), (1, 1, 9, 1)],
)
def test_rounds(total, first, growth, multiple):
    sizes = rounds(total, first, growth, multiple)
    assert sum(sizes) == total and min(sizes) >= 1
    assert all(size % multiple == 0 for size in sizes[:-1])
    assert sizes[0] >= min(first, total)
    drawn = np.cumsum(sizes)
    assert (drawn[1:] <= np.maximum(drawn[:-1] * growth + multiple, drawn[:-1] + multiple)).all()
    assert len(sizes) <= 2 + math.log(max(total / first, 1)) / math.log(growth)


@pytest.mark.parametrize("arguments", [(0,), (10, 0), (10, 1, 1), (10, 1, 2, 0)])
def test_rounds_refuses(arguments):
    with pytest.raises(ValueError):
        rounds(*arguments)


def test_benchmark(run_cli):
    result = run_cli(bench_adaptive.main, ["--replications=20", "--cap=500"])
    rows = [line.split("|")[1:-1] for line in result.output.splitlines() if line.startswith("| 0.")]
    assert [float(row[0]) for row in rows] == [0.5, 0.7, 0.8, 0.85, 0.87, 0.88, 0.89, 0.9, 0.91, 0.92, 0.93, 0.95, 0.98]
    assert float(rows[0][2]) == 100 and float(rows[0][4]) < 40
