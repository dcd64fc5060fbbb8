"""The criteria: reference numbers, edge cases, agreement with brute force on real images, calibration."""

import dataclasses
import json

import numpy as np
import pytest

from memorization import plots
from memorization.measure import ratio
from memorization.measure.criteria import CRITERIA, THRESHOLD, make_criterion, memorized, other_distance, threshold_at
from memorization.measure.knn import plain_neighbors


@pytest.fixture(scope="module")
def levels():
    """The digits as they are, 0 to 16."""
    from sklearn.datasets import load_digits

    return load_digits().images


@pytest.fixture(scope="module")
def mixed(levels):
    """60 images: copies, noisy copies, and unseen digits; with the 800 digits to compare with."""
    rng = np.random.default_rng(0)
    reference = levels[:800]
    noisy = reference[20:40] + rng.normal(0, 0.2, (20, 8, 8))
    return np.concatenate([reference[:20], noisy, levels[1000:1020]]), reference


# ----------------------------------------------------------------------------
# What the definitions say.


def test_ratio():
    distance = np.array([[0, 5, 9], [1, 3.01, 3.1], [1, 2.99, 3], [5, 5, 5], [0, 0, 1], [1, 0, 0]])
    criterion = CRITERIA["ratio"]
    np.testing.assert_array_equal(criterion.flags(distance), [True, True, False, False, False, False])
    np.testing.assert_array_equal(criterion.flags(distance), memorized(distance))
    np.testing.assert_allclose(criterion.score(distance)[:4], [0, 1 / 3.01, 1 / 2.99, 1])
    assert np.isnan(criterion.score(distance)[4])  # 0/0 does not count, as published
    np.testing.assert_array_equal(make_criterion("ratio", 0.5).flags(distance), memorized(distance, 0.5))
    assert criterion.threshold == THRESHOLD == 1 / 3


def test_calibrated():
    """Carlini et al.: distance to the nearest / (0.5 x mean distance to the 50 nearest), the nearest included."""
    far = np.full((1, 49), 10.0)
    criterion = CRITERIA["calibrated"]
    for nearest, score in [(0.0, 0.0), (1.0, 1 / (0.5 * 491 / 50)), (10.0, 2.0)]:
        assert criterion.score(np.hstack([[[nearest]], far])) == pytest.approx(score)
    # d1 < (d1 + 490) / 100 holds up to d1 = 490 / 99
    for nearest, flag in [(490 / 99 - 1e-9, True), (490 / 99 + 1e-9, False)]:
        assert criterion.flags(np.hstack([[[nearest]], far])) == [flag]
    assert criterion.flags(np.zeros((1, 50))) == [True]  # a copy of an image that is there 50 times


def test_calibrated_with_other_numbers():
    criterion = make_criterion("calibrated", threshold=0.5, neighbours=3)
    assert (criterion.neighbours, criterion.threshold, criterion.name) == (3, 0.5, "calibrated")
    assert criterion.score([[1, 2, 3, 100]]) == pytest.approx(1 / (0.5 * 2))


def test_authenticity():
    distance, other = np.array([[1.0], [2], [3], [0], [0], [2]]), np.array([2.0, 2, 2, 0, 1, 0])
    criterion = CRITERIA["authenticity"]
    np.testing.assert_array_equal(criterion.flags(distance, other), [True, False, False, True, True, False])
    np.testing.assert_array_equal(criterion.score(distance, other), [0.5, 1, 1.5, 0, 0, np.inf])


# ----------------------------------------------------------------------------
# On images.


@pytest.mark.parametrize("name", CRITERIA)
def test_copies_and_unseen_images(mixed, name):
    images, reference = mixed
    distance, index = plain_neighbors(images, reference, 50)
    other = other_distance(index[:, 0], reference, lambda points, k: plain_neighbors(points, reference, k))
    flags = CRITERIA[name].flags(distance, other)
    assert flags[:40].all()
    # Of unseen digits hardly any are as near as copies; half of them are nearer than another training image.
    assert flags[40:].mean() < {"ratio": 0.05, "calibrated": 0.3, "authenticity": 0.7}[name]


def test_other_distance(levels):
    """Equal to the definition, with an image that is there twice and one that is there three times."""
    reference = np.concatenate([levels[:200], levels[7:8], levels[9:10], levels[9:10]])
    nearest = np.array([7, 200, 9, 202, 3, 3, 150])
    calls = []

    def search(points, k):
        calls.append((len(points), k))
        return plain_neighbors(points, reference, k)

    expected = []
    for row in nearest:
        d = np.linalg.norm((reference - reference[row]).reshape(len(reference), -1), axis=1)
        expected.append(np.delete(d, row).min())
    np.testing.assert_allclose(other_distance(nearest, reference, search), expected)
    assert expected[:4] == [0, 0, 0, 0] and min(expected[4:]) > 0
    assert calls == [(6, 2)]  # each training image once
    assert other_distance(np.zeros(0, dtype=int), reference, search).shape == (0,)
    assert calls[1:] == [(0, 2)]  # the search is called all the same: other ranks take part in it


def test_unit_does_not_matter(mixed):
    images, reference = mixed
    distance, index = plain_neighbors(images, reference, 50)
    other = other_distance(index[:, 0], reference, lambda points, k: plain_neighbors(points, reference, k))
    for criterion in CRITERIA.values():
        np.testing.assert_allclose(criterion.score(distance / 64, other / 64), criterion.score(distance, other))
        np.testing.assert_array_equal(
            criterion.score(distance[:, : criterion.neighbours], other), criterion.score(distance, other)
        )


# ----------------------------------------------------------------------------
# Thresholds.


def test_threshold_at():
    score = np.array([0.5, 0.1, 0.3, np.nan, 0.2])
    assert threshold_at(score, 0) == 0.1
    assert threshold_at(score, 0.2) == threshold_at(score, 0.39) == 0.2
    assert threshold_at(score, 0.7) == 0.5
    assert threshold_at(score, 0.8) == np.inf  # no bound lets 4 of 5 pass and not the one without a score
    for rate in (0, 0.1, 0.25, 0.6):
        assert (score < threshold_at(score, rate)).mean() <= rate


def test_calibration_transfers(levels):
    """A threshold that lets 5 % of unseen images pass lets about as many of other unseen images pass."""
    order = np.random.default_rng(0).permutation(len(levels))
    reference, first, second = np.split(levels[order], [897, 1347])
    criterion = CRITERIA["ratio"]
    threshold = threshold_at(criterion.score(plain_neighbors(first, reference, 2)[0]), 0.05)
    flags = make_criterion("ratio", threshold).flags(plain_neighbors(second, reference, 2)[0])
    assert 0.02 < flags.mean() < 0.09


@pytest.mark.parametrize("arguments", [([], 0.1), ([1.0], 1), ([1.0], -0.1), ([1.0], float("nan"))])
def test_threshold_at_refuses(arguments):
    with pytest.raises(ValueError, match="scores|rate"):
        threshold_at(*arguments)


# ----------------------------------------------------------------------------
# Names, records, errors.


def test_names():
    assert list(CRITERIA) == ["ratio", "calibrated", "authenticity"]
    for name, criterion in CRITERIA.items():
        assert criterion.name == name and criterion.source and criterion.formula
        assert make_criterion(name) is criterion
        assert json.loads(json.dumps(criterion.settings())) == criterion.settings()
        with pytest.raises(dataclasses.FrozenInstanceError):
            criterion.threshold = 1
    assert make_criterion("ratio", 0.4).settings() == {"name": "ratio", "neighbours": 2, "threshold": 0.4}
    assert (ratio.memorized, ratio.THRESHOLD) == (memorized, THRESHOLD)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("l2",), "no criterion.*ratio, calibrated, authenticity"),
        (("ratio", 0), "positive"),
        (("ratio", float("nan")), "positive"),
        (("ratio", float("inf")), "positive"),
        (("ratio", None, 3), "two neighbours"),
        (("authenticity", None, 2), "one neighbour"),
        (("calibrated", None, 1), "at least 2"),
    ],
)
def test_refuses_settings(arguments, message):
    with pytest.raises(ValueError, match=message):
        make_criterion(*arguments)


def test_refuses_distances():
    with pytest.raises(ValueError, match=r"50 neighbours, not \[3, 2\]"):
        CRITERIA["calibrated"].flags(np.ones((3, 2)))
    for other in (None, np.ones(2), np.ones((3, 1))):
        with pytest.raises(ValueError, match="own nearest other one"):
            CRITERIA["authenticity"].flags(np.ones((3, 2)), other)
    with pytest.raises(ValueError, match="two neighbours"):
        memorized(np.ones(3))


@pytest.mark.parametrize(("name", "needed"), [("ratio", 2), ("calibrated", 50), ("authenticity", 2)])
def test_refuses_small_references(name, needed):
    CRITERIA[name].check(needed)
    with pytest.raises(ValueError, match=f"at least {needed} training images.*there are {needed - 1}"):
        CRITERIA[name].check(needed - 1)


def test_no_images():
    for criterion in CRITERIA.values():
        assert criterion.flags(np.zeros((0, 50)), np.zeros(0)).shape == (0,)


# ----------------------------------------------------------------------------
# The figure of d1/d2.


def test_histogram(tmp_path, monkeypatch):
    """Heights are percentages of all images, 0/0 included; colours and fractions follow the thresholds."""
    from PIL import Image

    figures = []
    save = plots.save_figure
    monkeypatch.setattr(plots, "save_figure", lambda fig, path: (figures.append(fig), save(fig, path)))
    d2 = np.linspace(5, 20, 100)
    quotient = np.concatenate([np.full(30, 0.1), np.full(20, 1 / 3), np.full(40, 0.72), np.full(10, np.nan)])
    distance = np.where(np.isnan(quotient)[:, None], 0, np.stack([quotient * d2, d2], axis=1))
    distance[30:50] = [3, 9]  # exactly at the threshold: not below it
    plots.ratio_histogram(distance, tmp_path / "h.png", thresholds=[1 / 3, 0.5, 0.9], title="run")
    plots.ratio_histogram(distance[-10:], tmp_path / "undefined.png")
    assert Image.open(tmp_path / "h.png").size == (1200, 760)

    ax, copies = (fig.axes[0] for fig in figures)
    bars = {}
    for bar in ax.patches:
        bars[bar.get_facecolor()[:3]] = bars.get(bar.get_facecolor()[:3], 0) + bar.get_height()
    assert sorted(round(height, 9) for height in bars.values()) == [30, 60]
    texts = [text.get_text() for text in figures[0].legends[0].get_texts()]
    assert [text.split(": ")[1] for text in texts] == ["30.0 %", "50.0 %", "90.0 %"]
    assert [line.get_xdata()[0] for line in ax.lines] == [1 / 3, 0.5, 0.9]
    assert "10 of 100" in ax.get_title(loc="right") and "run, 100 images" in figures[0].get_suptitle()
    assert "10 of 10" in copies.get_title(loc="right")


@pytest.mark.parametrize(
    ("distance", "name", "thresholds", "message"),
    [
        (np.zeros((0, 2)), "h.png", [0.3], "no images"),
        (np.ones((4, 1)), "h.png", [0.3], "two neighbours"),
        (np.ones((4, 2)), "h.png", [], "at least one"),
        (np.ones((4, 2)), "h.png", [0.3, float("nan")], "positive"),
        (np.ones((4, 2)), "h.doc", [0.3], "format"),
    ],
)
def test_histogram_refuses(tmp_path, distance, name, thresholds, message):
    with pytest.raises(ValueError, match=message):
        plots.ratio_histogram(distance, tmp_path / name, thresholds=thresholds)
    assert not list(tmp_path.iterdir())
