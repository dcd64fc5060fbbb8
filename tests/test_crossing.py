"""The interval of EMM: how often it holds the truth where the truth is known, and numbers that other ways give, too."""

import math

import numpy as np
import pytest
from scipy.special import expit, logit

from benchmarks import bench_emm_interval
from benchmarks.bench_emm_interval import GRIDS, coverage, draw, true_crossing
from memorization.stats.bootstrap import optimism
from memorization.stats.crossing import TAUS, fit_crossing

BAR = logit(0.9)


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize(("seeds", "tau", "images"), [(2, 0.3, 10_000), (3, 0.1, 1000), (3, 0.5, 1000), (5, 0, 10_000)])
def test_the_interval_covers_the_true_emm(grid, seeds, tau, images):
    """Nominal 95 %: 300 studies each, whose own error is 1.3 %; the benchmark has the whole table."""
    covered, length = coverage(grid, seeds, tau, images, studies=300, seed=0)
    assert 0.915 <= covered <= 0.99
    assert length < 0.1 + 2.6 * tau / math.sqrt(seeds)  # and it says something


def test_images_alone_do_not_cover():
    """With one run of each size the interval of the images misses EMM as soon as seeds differ; hence its name."""
    assert coverage("8 to 128", 1, 0.5, 1000, studies=200, seed=0, seed_sd=0)[0] < 0.75
    assert coverage("8 to 128", 1, 0.5, 1000, studies=200, seed=0, seed_sd=0.5)[0] > 0.9


def test_two_sizes_are_a_line():
    """Without a spread, two sizes with many images determine the line."""
    found = fit_crossing([10, 40], [97_000, 80_000], [100_000, 100_000], seed_sd=0).quantile(0.5)[0]
    x, z = np.log([10, 40]), logit([0.97, 0.8])
    assert found == pytest.approx(np.interp(-BAR, -z, x), abs=2e-3)


def test_fieller_for_known_spread():
    """With one run of very many images per size and a known tau the model is a regression with known variance."""
    sizes, tau, p = np.array([8.0, 16, 32, 64]), 0.2, np.array([0.99, 0.95, 0.9, 0.6])
    fitted = fit_crossing(sizes, p * 1e9, np.full(4, 1e9), seed_sd=tau)
    i = int(np.flatnonzero(fitted.omega == 0)[0])
    x = np.log(sizes) - np.log(sizes).mean()
    design = np.stack([np.ones(4), x], axis=1)
    cov = tau**2 * np.linalg.inv(design.T @ design)
    assert fitted.cov[0, i] == pytest.approx([cov[0, 0], cov[0, 1], cov[1, 1]], abs=1e-6)


def test_the_spread_is_found():
    rng = np.random.default_rng(0)
    sizes, counts, samples = draw("8 to 128", 5, 0.4, 10_000, 200, rng)
    assert fit_crossing(sizes, counts, samples).seed_sd().mean() == pytest.approx(0.4, rel=0.1)
    fitted = fit_crossing(sizes, counts[:1], samples[:1])
    assert 0.2 < TAUS[fitted.tau_log_likelihood()[0].argmax()] < 0.8
    assert fit_crossing(sizes, counts[:1], samples[:1], seed_sd=0.25).seed_sd() == pytest.approx(0.25)


def test_the_interval_allows_for_the_maximum():
    """Ten equally good snapshots: without the optimism taken off, the interval lies too high in half of the studies."""
    rng, n, studies = np.random.default_rng(0), 1000, 40
    sizes, tau, shots = np.repeat(GRIDS["8 to 128"][0], 2).astype(float), 0.1, 10
    truth = true_crossing("8 to 128", tau)
    p = expit(GRIDS["8 to 128"][1](np.log(sizes)) + tau * rng.normal(size=(studies, len(sizes))))
    k = rng.binomial(n, p[..., None], size=(*p.shape, shots))
    best, samples = k.max(axis=-1), np.full(p.shape, n)
    excess = np.array([[optimism(run, np.full(shots, n)) for run in each] for each in k])
    high = fit_crossing(sizes, best, samples).interval()[1]
    naive = fit_crossing(sizes, best, samples).interval()[0]
    low = fit_crossing(sizes, np.maximum(best - excess * n, 0), samples).interval()[0]
    assert ((low <= truth) & (truth <= high)).mean() > 0.9 > ((naive <= truth) & (truth <= high)).mean()


@pytest.mark.parametrize(
    ("sizes", "memorized", "ends"),
    [
        ([16], [70], (-np.inf, -np.inf)),  # below the only size
        ([16], [100], (np.inf, np.inf)),
        ([16], [90], (-np.inf, np.inf)),
        ([16, 32], [99, 98], (None, np.inf)),
        ([16, 32], [60, 20], (-np.inf, -np.inf)),
        ([8, 16, 32], [50, 70, 99], (-np.inf, np.inf)),  # a rising curve says nothing of EMM
    ],
)
def test_open_ends(sizes, memorized, ends):
    found = fit_crossing(sizes, memorized, np.full(len(sizes), 100), seed_sd=0).interval()
    for end, expected in zip(found, ends):
        assert expected is None or end[0] == expected


def test_many_curves_are_fitted_as_one():
    rng = np.random.default_rng(1)
    sizes, counts, samples = draw("published", 2, 0.2, 1000, 5, rng)
    together = fit_crossing(sizes, counts, samples)
    for i in range(5):
        alone = fit_crossing(sizes, counts[i], samples[i])
        np.testing.assert_allclose(together.row(i).interval(), alone.interval(), atol=1e-3)


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (([], [], []), {}, "as many runs as sizes"),
        (([8, 16], [1], [2]), {}, "as many runs as sizes"),
        (([8, -1], [1, 1], [2, 2]), {}, "positive sizes"),
        (([8, 16], [3, 1], [2, 2]), {}, "counts between 0"),
        (([8], [1], [2]), {"level": 1}, "level of a crossing"),
        (([8], [1], [2]), {"seed_sd": math.nan}, "standard deviation"),
    ],
)
def test_refuses(arguments, options, message):
    with pytest.raises(ValueError, match=message):
        fit_crossing(*arguments, **options)


def test_benchmark(run_cli):
    result = run_cli(bench_emm_interval.main, ["--studies=4", "--images=1000"])
    rows = [line for line in result.output.splitlines() if line.startswith("| ") and "published" in line]
    assert len(rows) == 3
