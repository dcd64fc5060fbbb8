"""Memorization by group: counts against loops, attribution, and groups in datasets."""

import json
import zipfile

import numpy as np
import pytest

from memorization.measure.groups import MAX_CLASSES, group_table, label_groups
from memorization.stats.intervals import wilson_interval
from training.dataset import ImageFolderDataset


def test_counts():
    groups = ["inlier"] * 6 + ["outlier"] * 2 + ["unused"]
    nearest = [0, 0, 0, 1, 5, 6, 7, 7, 7]
    flags = [True, True, False, True, False, True, True, True, False]
    table = group_table(np.array(flags), np.array(nearest), groups)
    assert list(table) == ["inlier", "outlier", "unused"]
    low, high = wilson_interval(3, 5)
    assert table["inlier"] == {
        "num_nearest": 5, "num_memorized": 3, "ratio": 0.6, "ci_low": low, "ci_high": high,
        "num_training": 6, "memorized_per_training": 0.5, "num_replayed": 2,
    }  # fmt: skip
    assert {k: v for k, v in table["outlier"].items() if not k.startswith("ci")} == {
        "num_nearest": 4, "num_memorized": 3, "ratio": 0.75,
        "num_training": 2, "memorized_per_training": 1.5, "num_replayed": 2,
    }  # fmt: skip
    assert table["unused"] == {
        "num_nearest": 0, "num_memorized": 0, "ratio": None, "ci_low": None, "ci_high": None,
        "num_training": 1, "memorized_per_training": 0.0, "num_replayed": 0,
    }  # fmt: skip
    assert json.loads(json.dumps(table, allow_nan=False)) == table


def test_sums_and_brute_force():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 12, 300)
    nearest, flags = rng.integers(0, 300, 2000), rng.random(2000) < 0.3
    table = group_table(flags, nearest, labels, confidence=0.8)
    assert list(table) == [str(c) for c in range(12)]  # by number, not 0, 1, 10, 11, 2
    assert sum(row["num_nearest"] for row in table.values()) == 2000
    assert sum(row["num_memorized"] for row in table.values()) == flags.sum()
    assert sum(row["num_training"] for row in table.values()) == 300
    for name, row in table.items():
        inside = labels[nearest] == int(name)
        assert row["num_nearest"] == inside.sum() and row["num_memorized"] == (inside & flags).sum()
        assert row["num_replayed"] == len({i for i, f in zip(nearest, flags) if f and labels[i] == int(name)})
        assert (row["ci_low"], row["ci_high"]) == wilson_interval(row["num_memorized"], row["num_nearest"], 0.8)


def test_uniform_replay_shows_as_equal_numbers_per_training_image():
    """Groups of 900 and 100 images, all replayed equally often: equal memorized_per_training."""
    groups = ["big"] * 900 + ["small"] * 100
    table = group_table(np.ones(5000, dtype=bool), np.arange(5000) % 1000, groups)
    assert table["big"]["memorized_per_training"] == table["small"]["memorized_per_training"] == 5
    assert (table["big"]["num_replayed"], table["small"]["num_replayed"]) == (900, 100)


def test_nothing_generated():
    table = group_table(np.zeros(0, dtype=bool), np.zeros(0, dtype=int), [3, 3, 5])
    assert [(name, row["num_nearest"], row["num_training"]) for name, row in table.items()] == [
        ("3", 0, 2),
        ("5", 0, 1),
    ]


@pytest.mark.parametrize(
    ("flags", "nearest", "groups", "message"),
    [
        ([True], [0, 1], ["a", "b"], "1 verdicts for 2"),
        ([True], [2], ["a", "b"], "rows 2 to 2 of 2"),
        ([True], [-1], ["a", "b"], "rows -1 to -1 of 2"),
        ([True], [0], np.zeros((2, 3), dtype=np.float32), "float32"),
        ([True], [0], ["a", None], "one name or one class"),
    ],
)
def test_refuses(flags, nearest, groups, message):
    with pytest.raises(ValueError, match=message):
        group_table(flags, nearest, groups)


def test_labels_as_groups():
    np.testing.assert_array_equal(label_groups(np.array([2, 0, 2])), [2, 0, 2])
    assert label_groups(None) is None
    assert label_groups(np.zeros((4, 3), dtype=np.float32)) is None
    assert label_groups(np.zeros(4, dtype=np.int64)) is None  # one class
    assert label_groups(np.arange(4)) is None  # one per image
    assert label_groups(np.arange(5000) % MAX_CLASSES) is not None
    assert label_groups(np.arange(5000) % (MAX_CLASSES + 1)) is None


# ----------------------------------------------------------------------------
# Groups of a dataset.


@pytest.fixture
def grouped(tmp_path, make_zip):
    """grouped(groups): a zip of six images 4x4 whose dataset.json has this value under "groups"."""

    def make(groups):
        images = np.random.RandomState(0).randint(0, 256, (6, 4, 4), dtype=np.uint8)
        return make_zip(images, json.dumps({"labels": None, "groups": groups}).encode(), tmp_path / "x.zip")

    return make


NAMES = [f"00000/img{i:08d}.png" for i in range(6)]
GROUPS = ["inlier", "outlier", "inlier", "ümlaut", "inlier", "outlier"]


def test_groups_of_a_dataset(grouped, tmp_path):
    path = grouped([*zip(NAMES, GROUPS)][::-1])  # whatever the order in the file
    assert ImageFolderDataset(path).groups() == GROUPS
    some = ImageFolderDataset(path, max_size=4, random_seed=1, xflip=True)
    assert some.groups() == [GROUPS[NAMES.index(name)] for name in some.names] and len(some.groups()) == 8
    with zipfile.ZipFile(path) as archive:
        archive.extractall(tmp_path / "folder")
    assert ImageFolderDataset(tmp_path / "folder").groups() == GROUPS


def test_no_groups(grouped, tmp_path, make_zip):
    assert ImageFolderDataset(grouped(None)).groups() is None
    images = np.zeros((2, 4, 4), dtype=np.uint8)
    for labels in (None, "missing", [0, 1]):
        assert ImageFolderDataset(make_zip(images, labels, tmp_path / "y.zip")).groups() is None


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ([*zip(NAMES, GROUPS)][:5], NAMES[5]),  # too few
        ([*zip(NAMES, GROUPS), (NAMES[0], "outlier")], "more than one"),
        ([*zip(NAMES, range(6))], "groups"),  # numbers
        ([*zip(NAMES, [None] * 6)], "groups"),
        (GROUPS, "groups"),  # without names
        (dict(zip(NAMES, GROUPS)), "groups"),
        ("inlier", "groups"),
        ([], NAMES[0]),
    ],
)
def test_malformed_groups(grouped, groups, message):
    dataset = ImageFolderDataset(grouped(groups))  # training does not need them
    with pytest.raises(ValueError, match=message) as error:
        dataset.groups()
    assert "\n" not in str(error.value) and "dataset.json" in str(error.value) and "x.zip" in str(error.value)
