"""The two-moons study: data, ensemble, measurement, statistics and the command."""

import csv
import json
import math
import re
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import ROOT
from scipy.stats import mannwhitneyu
from torch import nn

import outlier_study
from benchmarks.bench_verdicts import simulate
from memorization.plots import save_figure
from memorization.stats.timing import RiseFits, logistic, pooled_shares, sign_flip_test, timing_test
from toy.analysis import auroc, detection, early_stop, false_positives, half_of_rise, median_interval, timings
from toy.data import DUPLICATE, INLIER, OUTLIER, make_data
from toy.diffusion import ALPHA_BAR, SIGMA, STEPS, add_noise, ancestral_sample, embed, seeded
from toy.ensemble import CLIP, Ensemble
from toy.figures import memorization_figure
from toy.files import write_table
from toy.measure import Neighbours, neighbour_distance
from toy.optimum import optimum_points
from toy.study import PRESETS, RELABELINGS, Result, Settings, relabelings, run_study
from training.optim import OptimEDM

TINY = Settings(points=60, outliers=6, duplicates=4, epochs=6, repeats=2, optimum_points=20)
TINY_OPTIONS = "--points=60 --outliers=6 --duplicates=4 --epochs=6 --repeats=2 --optimum-points=20 --device=cpu".split()


class Network(nn.Module):
    """The network in torch's own terms, with the weights of one replica."""

    def __init__(self, ensemble, replica):
        super().__init__()
        self.linear = nn.ModuleList([nn.Linear(*size) for size in [(384, 128), *[(128, 128)] * 3, (128, 2)]])
        for layer, weight, bias in zip(self.linear, ensemble.weights, ensemble.biases):
            layer.weight.data = weight[replica].T.clone()
            layer.bias.data = bias[replica, 0].clone()

    def forward(self, x, t):
        h = torch.cat([embed(x[:, 0], 25.0), embed(x[:, 1], 25.0), embed(t)], dim=1)
        h = nn.functional.gelu(self.linear[0](h))
        for layer in self.linear[1:4]:
            h = h + nn.functional.gelu(layer(h))
        return self.linear[4](h)


def ensemble(repeats=3, points=100):
    data = [make_data(seed, points, 10, 10) for seed in range(repeats)]
    return Ensemble(torch.stack([torch.from_numpy(d.train) for d in data]), list(range(repeats)))


# ----------------------------------------------------------------------------
# Data.


def test_groups_sizes_and_origins():
    data = make_data(1, 500, outliers=30, duplicates=20)
    assert data.train.shape == data.fresh.shape == (550, 2) and data.test.shape == (500, 2)
    assert data.sizes().tolist() == [480, 40, 30] and data.originals().tolist() == [480, 20, 30]
    copies = np.flatnonzero(data.origin != np.arange(550))
    assert copies.tolist() == list(range(530, 550)) and (data.train[copies] == data.train[data.origin[copies]]).all()
    assert (data.group[data.origin[copies]] == DUPLICATE).all()


def test_units_and_cluster():
    """Moons have mean 0 and standard deviation 1 along each axis; the cluster is 2 away along each."""
    data = make_data(0, 40_000, outliers=2000, duplicates=0, noise=0.0, test_outliers=True)
    moons, cluster = data.train[data.group == INLIER], data.train[data.group == OUTLIER]
    assert np.allclose(moons.mean(0), 0, atol=1e-2) and np.allclose(moons.std(0), 1, atol=1e-2)
    assert np.allclose(np.abs(cluster.mean(0)), 2, atol=0.03) and np.allclose(cluster.std(0), 0.2, atol=0.02)
    assert np.allclose(data.test[-2000:].mean(0), cluster.mean(0), atol=0.03) and len(data.test) == 42_000
    quadrants = {tuple(np.sign(make_data(s, 2, 50, 0).train[2:].mean(0))) for s in range(20)}
    assert len(quadrants) == 4


def test_labels_of_the_control_mean_nothing():
    """All sizes stay; outliers and copies are new points of the moons, and no point is there twice."""
    data, control = (make_data(1, 3000, outliers=1500, duplicates=700, test_outliers=True, null=n) for n in (0, 1))
    assert control.sizes().tolist() == data.sizes().tolist() and len(control.test) == len(data.test)
    assert control.originals().tolist() == data.sizes().tolist() and len(np.unique(control.train, axis=0)) == 5200
    inliers, *others = (control.train[control.group == g] for g in (INLIER, DUPLICATE, OUTLIER))
    for points in (*others, control.test[-1500:], control.fresh[3000:4500]):
        assert np.allclose(points.mean(0), inliers.mean(0), atol=0.1)
        assert np.allclose(np.cov(points.T), np.cov(inliers.T), atol=0.1)


def test_inliers_stand_for_groups():
    data = make_data(1, 500, outliers=30, duplicates=20)
    duplicates, outliers = relabelings(data, seed=1)
    assert duplicates.shape == (RELABELINGS, 40) and outliers.shape == (RELABELINGS, 30)
    assert (data.group[duplicates] == INLIER).all() and all(len(set(row)) == 30 for row in outliers.tolist())
    few = relabelings(make_data(1, 50, outliers=30, duplicates=20), seed=1)
    assert [drawn.shape[1] for drawn in few] == [15, 15]  # others must be left to compare with


def test_jitter_moves_copies_only():
    plain, moved = (make_data(3, 200, 0, 50, jitter=jitter) for jitter in (0, 0.05))
    assert (plain.train[:200] == moved.train[:200]).all()
    assert np.std(moved.train[200:] - plain.train[200:]) == pytest.approx(0.05, rel=0.3)


@pytest.mark.parametrize("wrong", [dict(points=1), dict(outliers=-1), dict(duplicates=11), dict(noise=-0.1)])
def test_data_that_cannot_be(wrong):
    with pytest.raises(ValueError, match="points"):
        make_data(0, **(dict(points=10, outliers=1, duplicates=1) | wrong))


# ----------------------------------------------------------------------------
# Diffusion and ensemble.


def test_noise_process():
    assert len(ALPHA_BAR) == STEPS == 50 and ALPHA_BAR[0] == pytest.approx(1 - 1e-4)
    assert float(ALPHA_BAR[-1]) == pytest.approx(math.prod(1 - b for b in np.linspace(1e-4, 0.02, 50)))
    x, noise, t = torch.randn(1000, 2), torch.randn(1000, 2), torch.full([1000], 49)
    signal = add_noise(x, torch.zeros_like(x), t) / x
    assert torch.allclose(signal.square(), ALPHA_BAR[49].float().expand_as(signal), rtol=1e-4)
    assert torch.allclose((add_noise(x, noise, t) - signal * x) / noise / signal, SIGMA[49].float(), rtol=1e-2)


def test_embedding():
    value = embed(torch.tensor([0.3]), 25.0)[0]
    frequency = np.exp(-np.log(10000) / 63 * np.arange(64))
    assert np.allclose(value, np.concatenate([np.sin(7.5 * frequency), np.cos(7.5 * frequency)]), atol=1e-5)


def test_sampler_with_the_exact_noise_of_a_gaussian():
    """For data N(m, s^2) the best prediction is known and linear in x, so moments of the samples are known, too.

    They are not m and s^2: 50 steps do not reach pure noise, and the sampler begins with that.
    """
    mean, variance = torch.tensor([1.0, -0.5]), 0.25

    def predict(x, t):
        abar = float(ALPHA_BAR[t])
        return (x - abar**0.5 * mean) * (1 - abar) ** 0.5 / (abar * variance + 1 - abar)

    x = ancestral_sample(predict, 20_000, seeded(0, 9))
    expected_mean, expected_variance = torch.zeros(2), 1.0
    for t in range(STEPS - 1, -1, -1):
        abar, before = float(ALPHA_BAR[t]), float(ALPHA_BAR[t - 1]) if t else 1.0
        alpha = abar / before
        pull = (1 - alpha) / (abar * variance + 1 - abar)
        expected_mean = ((1 - pull) * expected_mean + pull * abar**0.5 * mean) / alpha**0.5
        expected_variance = expected_variance * (1 - pull) ** 2 / alpha + (1 - alpha) * (1 - before) / (1 - abar)
    assert torch.allclose(x.mean(0), expected_mean, atol=0.02)
    assert torch.allclose(x.var(0), torch.full([2], expected_variance), rtol=0.04)


def test_gradient_is_that_of_autograd():
    e = ensemble()
    x, t, noise = torch.randn(3, 32, 2), torch.randint(STEPS, [3, 32]), torch.randn(3, 32, 2)
    loss = e.gradient(torch.cat([embed(x, 25.0).flatten(2), embed(t)], dim=2), noise)
    for r in range(3):
        network = Network(e, r)
        expected = nn.functional.mse_loss(network(x[r], t[r]), noise[r])
        expected.backward()
        assert float(loss[r]) == pytest.approx(float(expected.detach()), rel=1e-5)
        for layer, W, b in zip(network.linear, e._weight_grads, e._bias_grads):
            assert torch.allclose(W[r].T, layer.weight.grad, atol=1e-6)
            assert torch.allclose(b[r, 0], layer.bias.grad, atol=1e-6)


def test_training_is_that_of_torch():
    """Some epochs against nn.Module, autograd, clip_grad_norm_ and AdamW on the same draws."""
    e = ensemble(repeats=1, points=300)
    data = e.data[0].clone() * 3  # large inputs, so that gradients are clipped
    e.data[0] = data
    network = Network(e, 0)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3)
    clipped = 0
    for epoch in range(3):
        generator = seeded(0, 2, epoch)
        order = torch.randperm(320, generator=generator)
        t, noise = torch.randint(STEPS, [320], generator=generator), torch.randn(320, 2, generator=generator)
        for step in torch.arange(320).split(32):
            optimizer.zero_grad()
            noisy = add_noise(data[order[step]], noise[step], t[step])
            nn.functional.mse_loss(network(noisy, t[step]), noise[step]).backward()
            clipped += float(nn.utils.clip_grad_norm_(network.parameters(), CLIP)) > CLIP
            optimizer.step()
        e.train_epoch()
    assert clipped > 0
    for layer, W in zip(network.linear, e.weights):
        assert torch.allclose(layer.weight, W[0].T, atol=2e-4)


def test_a_replica_is_what_it_would_be_alone():
    """Bit by bit, on a CPU; on a GPU the products of one and of many matrices may round differently."""
    e = ensemble(repeats=3, points=700)
    alone = Ensemble(e.data[1:2], [1])
    for _ in range(4):
        both = e.train_epoch(), alone.train_epoch()
    assert torch.equal(e.flat[1], alone.flat[0]) and both[0][1] == both[1][0]
    assert torch.equal(e.generate(1, 500), alone.generate(0, 500))
    assert not torch.equal(e.flat[0], e.flat[1])


def test_generated_points_are_those_of_the_network():
    """The tabulated first layer, and points beyond the table, change the points by rounding only."""
    e = ensemble()
    e.train_epoch()
    network = Network(e, 2)
    with torch.no_grad():
        expected = ancestral_sample(lambda x, t: network(x, torch.full([len(x)], t)), 3000, seeded(2, 3, 1))
        assert torch.allclose(e.generate(2, 3000), expected, atol=1e-4)
        layers = [(W[2], b[2, 0]) for W, b in zip(e.weights, e.biases)]
        layers[0] = (layers[0][0][:256], layers[0][1])
        layers[1:4] = [(W.T[:, :, None, None], b) for W, b in layers[1:4]]
        x = torch.tensor([[7.0, 0.1], [0.2, -9.0], [0.3, 0.4], [5.99, -5.99]])
        found = e._noise(layers, e._tabulate(2), x, 20)
        assert torch.allclose(found, network(x, torch.full([4], 20)), atol=1e-4)


def test_measuring_does_not_change_the_training():
    first, second = ensemble(), ensemble()
    for _ in range(2):
        first.train_epoch()
        first.generate(0, 50)
        second.train_epoch()
    assert torch.equal(first.flat, second.flat) and torch.equal(first.generate(1, 50), second.generate(1, 50))


# ----------------------------------------------------------------------------
# Measuring.


def brute_force(points, data, ratio):
    d = [np.linalg.norm(points[:, None].astype(float) - y[None], axis=2) for y in (data.train, data.test)]
    return d[0].argmin(1), ratio * d[0].min(1) < d[1].min(1)


@pytest.mark.parametrize("jitter", [0, 0.01])
def test_counts_are_those_of_all_distances(jitter):
    data = make_data(0, 300, 30, 30, jitter=jitter)
    points = np.random.default_rng(0).normal(size=(400, 2)).astype(np.float32)
    found = Neighbours(data).measure(points, 1.5)
    nearest, memorized = brute_force(points, data, 1.5)
    assert found.nearest.tolist() == np.bincount(data.group[nearest], minlength=3).tolist()
    assert found.memorized.tolist() == np.bincount(data.group[nearest[memorized]], minlength=3).tolist()
    assert found.by_point.sum(axis=1).tolist() == [memorized.sum(), 400]
    assert [found.by_point[0, data.group == g].sum() for g in range(3)] == found.memorized.tolist()
    origins = set(data.origin[nearest[memorized]].tolist())
    assert found.hits.tolist() == [o in origins for o in data.origin.tolist()]


def test_chance_is_one_over_one_plus_ratio_squared():
    data = make_data(0, 5000, 0, 0)
    for ratio in (1.5, 2.0):
        found = Neighbours(data).measure(data.fresh, ratio)
        assert found.memorized.sum() / 5000 == pytest.approx(1 / (1 + ratio**2), abs=0.03)


def test_without_held_out_outliers_all_near_the_cluster_is_memorized():
    for test_outliers in (False, True):
        data = make_data(0, 2000, 300, 0, test_outliers=test_outliers)
        found = Neighbours(data).measure(data.fresh, 1.5)
        assert found.memorized[OUTLIER] / found.nearest[OUTLIER] == pytest.approx(0.31 if test_outliers else 1, abs=0.1)


def test_distance_to_the_truth():
    data = make_data(0, 1000, 0, 0)
    near = Neighbours(data)
    assert near.distance(data.fresh) == 0
    shifted = near.distance(data.fresh + np.float32(1))
    assert shifted == pytest.approx(1, rel=1e-3)  # of a shift (1, 1): the mean of its squared projections is 1
    assert near.distance(data.test[:500]) < 0.2


@pytest.mark.parametrize("t", [0, 10, 49])
def test_optimum_on_points_is_the_definition(t):
    """Points closer together than 256 levels could tell apart."""
    y, x = torch.from_numpy(make_data(0, 9000, 50, 50).train), torch.randn(20, 2)
    optimum = OptimEDM(y[:, :, None, None], skip=False, quantized=False)
    found = optimum(x[:, :, None, None], SIGMA[t])[:, :, 0, 0]
    square = (x.double()[:, None] - y.double()).square().sum(2)
    expected = torch.softmax(-square / (2 * SIGMA[t] ** 2), dim=1) @ y.double()
    assert torch.allclose(found.double(), expected, atol=1e-5)


def test_optimum_replays_a_sparse_set():
    data = make_data(0, 40, 0, 10)
    points = optimum_points(data.train, 150, seed=0)
    found = Neighbours(data).measure(points, 2.0)
    assert found.memorized.sum() / 150 > 0.95
    per_point = found.memorized / data.originals().clip(1)
    assert per_point[DUPLICATE] / per_point[INLIER] == pytest.approx(2, rel=0.4)  # it is in the set twice


# ----------------------------------------------------------------------------
# Statistics.


EPOCHS = np.unique(np.geomspace(1, 1500, 30).round())


def drawn(rng, half, number, level, chance, repeats=10):
    """Memorized and all points of a group, [R, E]."""
    near = rng.poisson(number, [repeats, len(EPOCHS)])
    return rng.binomial(near, chance + level * logistic(EPOCHS, half, 2.0)), near


def test_a_fit_finds_the_curve():
    fits = RiseFits(EPOCHS, np.ones(len(EPOCHS)))
    for half, slope in ((10, 2.0), (200, 4.0)):
        fit = fits.best(0.2 + 0.5 * logistic(EPOCHS, half, slope)[None])[0]
        assert fit.half == pytest.approx(half, rel=0.07) and fit.slope == slope
        assert fit.floor == pytest.approx(0.2, abs=0.01) and fit.level == pytest.approx(0.5, abs=0.02)
    assert fits.best(-logistic(EPOCHS, 10, 2.0)[None])[0].half == math.inf


def test_pooled_shares_are_those_of_all_points():
    memorized, nearest = np.array([[3, 0], [1, 0]]), np.array([[4, 0], [6, 0]])
    assert pooled_shares(memorized, nearest).mean(axis=0) == pytest.approx([0.4, 0])
    assert pooled_shares(memorized, nearest)[1, 0] == pytest.approx(0.4 + (1 - 0.4 * 6) / 5)


@pytest.mark.parametrize(("preset", "half"), [("fig4", 2), ("quick", 150)])
def test_equal_timing_is_rarely_called_different(preset, half):
    """Group sizes, chance and final levels differ, timing does not: at most 5 %, within the error of 200 studies."""
    answers = simulate(preset, shift=1.0, middle=half, level=0.5, studies=200)
    for group, said in answers.items():
        assert sum(answer in ("later", "earlier") for answer in said) <= 18, group  # 99.6 % of binomial(200, 0.05)
    assert sum(answer in ("later", "earlier") for said in answers.values() for answer in said) > 3


def test_a_factor_two_is_found():
    answers = simulate("quick", shift=2.0, middle=150, level=0.5, studies=40)
    assert answers["outlier"].count("later") >= 28 and answers["duplicate"].count("earlier") >= 36
    assert "earlier" not in answers["outlier"] and "later" not in answers["duplicate"]


def test_size_is_not_timing():
    """A group of 3 beside one of 3000: where its counts first cross half of their end is early, by noise."""
    rng, crossings, answers = np.random.default_rng(0), [], []
    for _ in range(30):
        small, large = (drawn(rng, 100, n, 0.5, 0.3) for n in (3, 3000))
        for memorized, _ in (small, large):
            crossings.append([EPOCHS[np.argmax(curve >= curve[-3:].mean() / 2)] for curve in memorized])
        answers.append(timing_test(EPOCHS, small, large).answer)
    assert np.median(crossings[::2]) < np.median(crossings[1::2])
    assert answers.count("earlier") + answers.count("later") <= 5


def test_what_has_not_risen_is_not_late():
    rng = np.random.default_rng(0)
    flat, rising = ([drawn(rng, 100, n, level, 0.3) for _ in range(20)] for n, level in ((20, 0.0), (500, 0.5)))
    answers = [timing_test(EPOCHS, *pair).answer for pair in zip(flat, rising)]
    assert answers.count("not risen") >= 17 and "later" not in answers
    assert timing_test(EPOCHS, rising[0], flat[answers.index("not risen")]).answer == "reference not risen"
    flat, rising = flat[0], rising[0]
    assert timing_test(EPOCHS, (flat[0] * 0, flat[1] * 0), rising).p_later is None


def test_half_of_the_rise():
    rng = np.random.default_rng(0)
    half, low, high = half_of_rise(EPOCHS, *drawn(rng, 100, 300, 0.5, 0.3))
    assert half == pytest.approx(100, rel=0.15) and low <= half <= high < 2 * low
    assert math.isnan(half_of_rise(EPOCHS, np.zeros([3, len(EPOCHS)]), None)[0])  # nothing is there


def test_sign_flips():
    assert sign_flip_test(np.ones(10)) == 1 / 1024
    assert sign_flip_test(-np.ones(3)) == 1
    assert sign_flip_test(np.array([3.0, 1, -2])) == 3 / 8  # sums 6, 4 and 2 of eight
    rng = np.random.default_rng(0)
    p = [sign_flip_test(rng.normal(size=20)) for _ in range(200)]
    assert 0.02 < np.mean(np.array(p) < 0.1) < 0.2
    assert math.isnan(sign_flip_test(np.array([np.nan])))


def test_median_interval():
    median, low, high = median_interval(np.random.default_rng(1).normal(5, 1, size=200))
    assert low < 5 < high and high - low < 0.6 and low < median < high
    assert (
        median_interval(np.array([1.0, 2, math.inf]))[0] == 2 and median_interval(np.full(3, math.inf))[1] == math.inf
    )


def test_auroc_with_ties():
    rng = np.random.default_rng(0)
    scores, positive = rng.integers(0, 6, 80).astype(float), rng.random(80) < 0.3
    expected = mannwhitneyu(scores[positive], scores[~positive]).statistic / positive.sum() / (~positive).sum()
    assert auroc(scores, positive) == pytest.approx(expected)
    assert auroc(np.array([0, 1, math.inf]), np.array([False, False, True])) == 1


def made_up_result(outlier_epoch, test_chance=60, repeats=8, test_outliers=True):
    """Repeats in which inliers are memorized from epoch 4 on and outliers from `outlier_epoch` on."""
    data = [make_data(s, 600, 200, 20, test_outliers=True) for s in range(repeats)]
    epochs = np.arange(1, 21)
    memorized = np.zeros([repeats, 20, 3], int)
    memorized[:, :, INLIER], memorized[:, :, DUPLICATE] = np.where(epochs < 4, 180, 450), np.where(epochs < 3, 6, 18)
    memorized[:, :, OUTLIER] = np.where(epochs < outlier_epoch, 60, 180)
    first = np.stack([np.where(d.group == OUTLIER, outlier_epoch, 4) for d in data])
    inliers = np.stack([memorized[:, :, INLIER] // 10, np.full([repeats, 20], 58)], axis=-1)
    return Result(
        settings=Settings(
            points=600, outliers=200, duplicates=20, epochs=20, repeats=repeats, test_outliers=test_outliers
        ),
        data=data, epochs=epochs, memorized=memorized, nearest=np.broadcast_to([580, 20, 200], memorized.shape),
        distance=np.ones([repeats, 20]), loss=np.ones([repeats, 20]), first=first,
        chance=np.tile([175, 6, test_chance], (repeats, 1)), chance_nearest=np.tile([580, 20, 200], (repeats, 1)),
        optimum=np.full([repeats, 3], np.nan), optimum_nearest=np.full([repeats, 3], np.nan), last=data[0].train,
        relabeled=np.broadcast_to(inliers[:, :, None, None], [repeats, 20, 2, 5, 2]),
    )  # fmt: skip


def test_answers_on_a_made_up_result():
    result = made_up_result(outlier_epoch=12)
    found = timings(result.curves())
    assert found["outlier"].answer == "later" and found["outlier"].p_later == 1 / 256
    assert found["duplicate"].answer == "earlier"
    assert false_positives(result) == {"duplicate": {"not shown": 5}, "outlier": {"not shown": 5}}
    assert detection(result)["first epoch"].tolist() == [1] * 8
    stop = early_stop(result, 0)
    assert stop.epoch == 12 and stop.memorized == pytest.approx((450 + 18 + 180) / 820)
    assert early_stop(made_up_result(2), 0).epoch == 2


def test_a_rise_below_chance_is_no_memorization():
    """Points far from all data are memorized more rarely than by chance; only what comes after that is compared."""
    result = made_up_result(outlier_epoch=4)
    assert timings(result.curves())["outlier"].answer == "not shown"
    result.memorized[:, :2, OUTLIER] = 5
    assert timings(result.curves())["outlier"].answer == "not shown"
    whole = [(result.memorized[:, :, g], result.nearest[:, :, g]) for g in (OUTLIER, INLIER)]
    assert timing_test(result.epochs, *whole).answer == "earlier"


def test_answers_that_cannot_be_told():
    """What never rises is censored, and so is all that ends below chance."""
    never = made_up_result(outlier_epoch=99)
    assert (
        timings(never.curves())["outlier"].answer == "not risen"
        and timings(never.curves())["duplicate"].answer == "earlier"
    )
    unseen = made_up_result(12, test_chance=200)  # all are memorized by chance
    assert early_stop(unseen, 0).epoch is None and timings(unseen.curves())["outlier"].answer == "not risen"
    assert (
        timings(replace(unseen, settings=replace(unseen.settings, test_outliers=False)).curves())["outlier"].answer
        == "later"
    )
    unlearned = replace(never, chance=np.tile([460, 6, 60], (8, 1)))
    assert {timing.answer for timing in timings(unlearned.curves()).values()} == {"reference not risen"}
    assert (
        timings(made_up_result(12, repeats=4).curves())["outlier"].answer == "not shown"
    )  # 16 sign patterns, two-sided


def test_neighbour_distance_finds_outliers():
    data = make_data(0, 2000, 20, 0)
    assert auroc(neighbour_distance(data.train), data.group == OUTLIER) > 0.95


# ----------------------------------------------------------------------------
# The study and its command.


def test_presets_are_the_published_settings():
    numbers = {name: (s.outliers, s.duplicates, s.epochs, s.points, s.repeats, s.ratio) for name, s in PRESETS.items()}
    assert numbers["fig1"] == (400, 400, 400, 20_000, 10, 1.5)
    assert numbers["fig2"] == (200, 200, 800, 20_000, 10, 1.5)
    assert numbers["fig3"] == (100, 100, 800, 10_000, 10, 1.5)
    assert numbers["fig4"] == (100, 100, 10, 10_000, 10, 1.5)


def test_schedules():
    assert Settings(epochs=10, eval_every=4).schedule() == [4, 8, 10]
    log = Settings(epochs=1000, eval_schedule="log", evaluations=10).schedule()
    assert log[0] == 1 and log[-1] == 1000 and len(log) == 10 and log == sorted(set(log))


def test_command_writes_everything(run_cli, tmp_path):
    out = tmp_path / "study"
    args = ["moons", "--preset=quick", *TINY_OPTIONS, "--eval-schedule=linear", "--eval-every=2", f"--out={out}"]
    text = run_cli(outlier_study.main, args).output
    assert "Outliers later?" in text and "AUROC" in text
    rows = list(csv.DictReader((out / "memorized.csv").open()))
    assert len(rows) == 2 * 3 * 3 and {row["epoch"] for row in rows} == {"2", "4", "6"}
    for row in rows:
        assert float(row["fraction"]) == pytest.approx(int(row["memorized"]) / 70, abs=1e-5)
        assert float(row["per_point"]) == pytest.approx(int(row["memorized"]) / int(row["points"]), abs=1e-5)
    with np.load(out / "first-epoch.npz") as points:
        first, origin = points["first_epoch"], points["origin"]
        assert points["points"].shape == (2, 70, 2) and set(np.unique(first)) <= {0, 2, 4, 6}
        assert (first[0] == first[0][origin[0]]).all()
    options = json.loads((out / "options.json").read_text())
    assert options["settings"]["points"] == 60 and options["versions"]["torch"]
    assert options["settings"]["test_outliers"] is True  # the preset's: no option overrides it
    summary = json.loads((out / "summary.json").read_text())
    assert summary["repeats"] == 2 and set(summary["groups"]) == {"inlier", "duplicate", "outlier"}
    assert summary["published"]["outliers_by"] == "count" and "As published, the same points" in text
    assert (out / "memorized-published.csv").exists() and (out / "memorized-published.png").stat().st_size > 10_000
    assert (out / "memorized.png").stat().st_size > 10_000 and (out / "points.png").stat().st_size > 10_000
    assert run_cli(outlier_study.main, args).output == text  # finished: shown again


def test_control_beside_its_study(run_cli, tmp_path):
    args = ["moons", *TINY_OPTIONS, "--epochs=2", f"--out={tmp_path / 's'}"]
    assert "with --null runs it" in run_cli(outlier_study.main, args).output
    control = run_cli(outlier_study.main, [*args, "--null"]).output
    assert re.search(r"False positives: \d+ of 200 random relabelings", control) and "with --null" not in control
    assert json.loads((tmp_path / "s" / "null" / "options.json").read_text())["settings"]["null"] is True
    text = run_cli(outlier_study.main, args).output
    assert "Negative control, labels without meaning" in text and text.count("Outliers later?") == 3  # and as published
    summary = tmp_path / "s" / "null" / "summary.json"
    for wrong in ("{}", "[", summary.read_text().replace('"not shown"', '"maybe"').replace('"reference not', '"ref')):
        summary.write_text(wrong)
        assert "run it again with --null" in run_cli(outlier_study.main, args, code=1).stderr


def test_without_a_command_and_without_outliers(run_cli, tmp_path):
    args = [
        *TINY_OPTIONS,
        "--outliers=0",
        "--duplicates=0",
        "--optimum-points=0",
        "--epochs=1",
        f"--out={tmp_path / 's'}",
    ]
    text = run_cli(outlier_study.main, args).output
    assert "Cannot be told" in text and "nan" not in text
    json.loads((tmp_path / "s" / "summary.json").read_text(), parse_constant=pytest.fail)


def test_other_options_in_the_same_folder_are_refused(run_cli, tmp_path):
    args = [*TINY_OPTIONS, "--epochs=1", f"--out={tmp_path / 's'}"]
    run_cli(outlier_study.main, args)
    before = (tmp_path / "s" / "options.json").read_bytes()
    error = run_cli(outlier_study.main, [*args, "--ratio=2", "--test-outliers", "--seed=4"], code=1).stderr
    assert "ratio 1.5 there, 2.0 here" in error and "seed 0 there, 4 here" in error
    assert (tmp_path / "s" / "options.json").read_bytes() == before


def test_one_training_answers_both_ways(tmp_path):
    """With held-out outliers, and as published without: the counts are those of a study of its own."""
    both = run_study(replace(TINY, test_outliers=True), tmp_path / "both")
    alone = run_study(TINY, tmp_path / "alone")
    for name in ("memorized", "nearest", "first", "optimum", "relabeled", "loss", "last"):
        assert np.array_equal(getattr(both.published, name), getattr(alone, name)), name
    assert (both.memorized[:, :, OUTLIER] < alone.memorized[:, :, OUTLIER]).any()
    assert not both.published.curves().in_shares and both.curves().in_shares and alone.published is None
    assert run_study(replace(TINY, test_outliers=True, null=True), tmp_path / "null").published is None


def test_figure_and_answers_from_the_table(run_cli, tmp_path):
    """The same picture and the same p-values, without training."""
    result = replace(
        made_up_result(outlier_epoch=12), optimum=np.full([8, 3], 123.4), optimum_nearest=np.full([8, 3], 200.0)
    )
    table, figure, again = tmp_path / "t.csv", tmp_path / "a.png", tmp_path / "b.png"
    write_table(result, table)
    save_figure(memorization_figure(result.curves(), "Moons"), figure)
    args = ["moons", f"--from-csv={table}", f"--out={again}", "--title=Moons"]
    text = run_cli(outlier_study.main, args).output
    assert again.read_bytes() == figure.read_bytes()
    assert text.startswith(
        "Duplicates earlier? Yes (two-sided p = 0.0078).\nOutliers later? Yes (two-sided p = 0.0078)"
    )
    assert "as it is" in run_cli(outlier_study.main, [*args, "--epochs=3"], code=2).stderr
    lines = table.read_text().splitlines()
    large = [lines[0], *(line.replace(",outlier,", f",outlier,{2**64}") for line in lines[1:])]
    assert large != lines
    for wrong in (
        [], lines[:1], lines[:-1], [*lines, lines[-1]], [line.replace("share", "shape") for line in lines], large
    ):  # fmt: skip
        table.write_text("\n".join(wrong))
        assert "is no table that outlier_study.py moons has written" in run_cli(outlier_study.main, args, code=1).stderr


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ("--points=20", "batch takes 32"),
        ("--duplicates=61", "copies"),
        ("--ratio=0.5", "ratio"),
        ("--epochs=0", "epochs"),
    ],
)
def test_wrong_options(run_cli, tmp_path, option, said):
    code = 2 if option in ("--ratio=0.5", "--epochs=0") else 1
    error = run_cli(outlier_study.main, [*TINY_OPTIONS, f"--out={tmp_path / 's'}", option], code=code).stderr
    assert re.search(said, error) and not (tmp_path / "s").exists()


def test_damaged_state(run_cli, tmp_path):
    args = [*TINY_OPTIONS, "--epochs=1", f"--out={tmp_path / 's'}"]
    run_cli(outlier_study.main, args)
    (tmp_path / "s" / "state.pt").write_bytes(b"not a state")
    assert "state.pt" in run_cli(outlier_study.main, args, code=1).stderr


@pytest.mark.slow
def test_interrupted_and_continued(tmp_path):
    """Ctrl-C ends with status 75; the same command goes on, and nothing differs from an uninterrupted run."""
    settings = replace(TINY, epochs=60, eval_every=10)
    whole = run_study(settings, tmp_path / "whole")
    folder = tmp_path / "study"
    schedule = ["--eval-schedule=linear", "--eval-every=10", "--no-test-outliers"]
    options = [*TINY_OPTIONS, "--epochs=60", *schedule, f"--out={folder}"]
    code = f"import os, signal, sys; sys.path.insert(0, {str(ROOT)!r})\n" + (
        "from toy.ensemble import Ensemble\n"
        "train = Ensemble.train_epoch\n"
        "def epoch(self):\n"
        "    if self.epoch == 20: os.kill(os.getpid(), signal.SIGINT)\n"
        "    return train(self)\n"
        "Ensemble.train_epoch = epoch\n"
        "import outlier_study\n"
        "outlier_study.main()\n"
    )
    ended = subprocess.run([sys.executable, "-c", code, *options], capture_output=True, text=True, timeout=600)
    assert ended.returncode == 75 and "Traceback" not in ended.stderr and "goes on from there" in ended.stderr
    assert torch.load(folder / "state.pt", weights_only=True)["ensemble"]["epoch"] == 21
    resumed = run_study(settings, folder)
    for name in ("memorized", "nearest", "first", "distance", "loss", "optimum", "last"):
        assert np.array_equal(getattr(whole, name), getattr(resumed, name)), name


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_cuda_agrees_with_the_cpu():
    data = ensemble(points=300).data
    cpu, cuda = Ensemble(data, [0, 1, 2]), Ensemble(data, [0, 1, 2], "cuda")
    for e in (cpu, cuda):
        e.train_epoch()
    assert torch.allclose(cpu.flat, cuda.flat.cpu(), atol=1e-3)
    assert torch.allclose(cpu.generate(1, 100), cuda.generate(1, 100), atol=1e-2)
