"""training/dataset.py: subset, flips, labels and errors of the dataset that training reads."""

import json
import multiprocessing
import os
import pickle
import zipfile

import numpy as np
import PIL.Image
import pytest
import torch
from conftest import png

from dataset_utils.convert import write_dataset
from dataset_utils.sources import open_source
from training.dataset import ImageFolderDataset


def random_images(*shape, seed=0):
    return np.random.RandomState(seed).randint(0, 256, shape, dtype=np.uint8)


@pytest.fixture
def colour(tmp_path, make_zip):
    """Ten 4x4 RGB images with labels 0..4, as zip and as array [N, C, H, W]."""
    images = random_images(10, 4, 4, 3)
    path = make_zip(images, [i // 2 for i in range(10)], tmp_path / "colour.v1.zip")
    return path, images.transpose(0, 3, 1, 2)


# ----------------------------------------------------------------------------
# What it holds.


def test_digits(digits_zip):
    from sklearn.datasets import load_digits

    digits = load_digits()
    dataset = ImageFolderDataset(digits_zip, resolution=8, use_labels=True)
    assert (len(dataset), dataset.name, dataset.path) == (1797, "digits", digits_zip)
    assert (dataset.image_shape, dataset.num_channels, dataset.resolution) == ([1, 8, 8], 1, 8)
    assert (dataset.label_dim, dataset.label_shape, dataset.has_labels) == (10, [10], True)
    assert dataset.nbytes == dataset.images().nbytes == 1797 * 64
    assert dataset.images().dtype == np.uint8 and dataset.labels().dtype == np.int64
    np.testing.assert_array_equal(dataset.images()[:, 0], np.rint(digits.images * 255 / 16))
    np.testing.assert_array_equal(dataset.labels(), digits.target)
    image, label = dataset[17]
    assert type(label) is int and label == digits.target[17]
    np.testing.assert_array_equal(image, dataset.images()[17])
    np.testing.assert_array_equal(dataset.one_hot(17), np.eye(10, dtype=np.float32)[label])


def test_colour_and_folder(tmp_path, colour):
    path, images = colour
    with zipfile.ZipFile(path) as archive:
        archive.extractall(tmp_path / "folder")
    for dataset in (ImageFolderDataset(path), ImageFolderDataset(f"{tmp_path}/folder/")):
        assert dataset.image_shape == [3, 4, 4]
        np.testing.assert_array_equal(dataset.images(), images)
        np.testing.assert_array_equal(dataset.file_labels(), np.arange(10) // 2)
    assert dataset.name == "folder"
    assert ImageFolderDataset(path).name == "colour.v1"


@pytest.mark.parametrize("size", [1, 2, 64])
def test_other_sizes(tmp_path, make_zip, size):
    images = random_images(3, size, size)
    dataset = ImageFolderDataset(make_zip(images, None, tmp_path / "x.zip"))
    np.testing.assert_array_equal(dataset.images()[:, 0], images)
    assert dataset.file_labels() is None


def test_without_labels(colour):
    dataset = ImageFolderDataset(colour[0])
    assert (dataset.label_dim, dataset.has_labels, dataset.labels()) == (0, False, None)
    assert dataset[3][1] == 0
    assert dataset.one_hot(3).shape == (0,)


def test_vector_labels(tmp_path, make_zip):
    vectors = [[0.5, 1, -2], [0, 0, 1e-3]]
    path = make_zip(random_images(2, 4, 4), vectors, tmp_path / "x.zip")
    dataset = ImageFolderDataset(path, use_labels=True, xflip=True)
    assert (dataset.label_dim, dataset.labels().dtype) == (3, np.float32)
    np.testing.assert_array_equal(dataset.labels(), np.float32(vectors * 2))
    for i in range(4):
        np.testing.assert_array_equal(dataset[i][1], np.float32(vectors[i % 2]))
        np.testing.assert_array_equal(dataset.one_hot(i), np.float32(vectors[i % 2]))


# ----------------------------------------------------------------------------
# Subset and flips, as published: shuffle by RandomState(seed), first max_size, sorted; flips appended.


@pytest.mark.parametrize("seed, expected", [(0, [2, 4, 8, 9]), (3, [1, 2, 4, 5])])
def test_subset(colour, seed, expected):
    path, images = colour
    order = np.arange(10)
    np.random.RandomState(seed).shuffle(order)
    assert sorted(order[:4].tolist()) == expected  # the numbers of the published code, written down
    dataset = ImageFolderDataset(path, max_size=4, random_seed=seed, use_labels=True)
    np.testing.assert_array_equal(dataset.images(), images[expected])
    np.testing.assert_array_equal(dataset.labels(), np.array(expected) // 2)
    assert dataset.label_dim == 5  # of the whole file
    assert dataset.names == [f"00000/img{i:08d}.png" for i in expected]


def test_subset_is_not_needed(colour):
    path, images = colour
    for max_size in (None, 10, 11):
        np.testing.assert_array_equal(ImageFolderDataset(path, max_size=max_size).images(), images)
    big = ImageFolderDataset(path, max_size=4, random_seed=2**31 + 3)  # the seed is taken modulo 2**31
    np.testing.assert_array_equal(big.images(), ImageFolderDataset(path, max_size=4, random_seed=3).images())


@pytest.mark.parametrize("cache", [True, False])
def test_flips(colour, cache):
    path, images = colour
    dataset = ImageFolderDataset(path, max_size=4, xflip=True, use_labels=True, cache=cache)
    subset = images[[2, 4, 8, 9]]
    expected = np.concatenate([subset, subset[:, :, :, ::-1]])
    assert len(dataset) == 8
    assert dataset.nbytes == expected.nbytes
    np.testing.assert_array_equal(dataset.images(), expected)
    np.testing.assert_array_equal(np.stack([image for image, _ in dataset]), expected)
    assert [label for _, label in dataset] == dataset.labels().tolist() == [1, 2, 4, 4] * 2
    assert dataset.names[5] == dataset.names[1]
    np.testing.assert_array_equal(dataset[-1][0], expected[-1])
    for i in (8, -9):
        with pytest.raises(IndexError, match="holds 8"):
            dataset[i]


def test_cache(colour):
    path, images = colour
    held = ImageFolderDataset(path)
    assert held.images() is held.images()
    held[0][0][:] = 0  # what indexing returns belongs to the caller
    np.testing.assert_array_equal(held.images(), images)
    held.close()
    os.unlink(path)
    np.testing.assert_array_equal(held[9][0], images[9])


def test_not_cached(colour):
    path, images = colour
    dataset = ImageFolderDataset(path, cache=False)
    assert dataset.images() is not dataset.images()
    dataset.close()  # reading opens it again
    np.testing.assert_array_equal(dataset[9][0], images[9])


# ----------------------------------------------------------------------------
# Processes.


@pytest.mark.parametrize("cache", [True, False])
def test_pickle(colour, cache):
    path, images = colour
    dataset = ImageFolderDataset(path, use_labels=True, cache=cache)
    dataset[0]
    copy = pickle.loads(pickle.dumps(dataset))
    np.testing.assert_array_equal(copy.images(), images)
    assert copy[9][1] == 4


@pytest.mark.slow
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_data_loader(digits_zip, method):
    dataset = ImageFolderDataset(digits_zip, use_labels=True, cache=False, max_size=120)
    dataset[0]  # the zip is open before the workers start
    loader = torch.utils.data.DataLoader(
        dataset,
        batch_size=50,
        num_workers=1 if method == "spawn" else 2,
        multiprocessing_context=multiprocessing.get_context(method),
    )
    images, labels = (torch.cat(parts) for parts in zip(*loader))
    assert images.dtype == torch.uint8 and labels.dtype == torch.int64
    np.testing.assert_array_equal(images.numpy(), dataset.images())
    np.testing.assert_array_equal(labels.numpy(), dataset.labels())


def test_round_trip(tmp_path, colour):
    """What is written from a dataset zip loads as the same dataset."""
    with open_source(colour[0]) as source:
        write_dataset(source, tmp_path / "again.zip", metadata={"groups": [0] * 10})
    a, b = (ImageFolderDataset(path, use_labels=True) for path in (colour[0], tmp_path / "again.zip"))
    np.testing.assert_array_equal(a.images(), b.images())
    np.testing.assert_array_equal(a.labels(), b.labels())


# ----------------------------------------------------------------------------
# What a user can get wrong.

IMAGES = random_images(3, 4, 4)


def labels_json(*labels):
    return json.dumps({"labels": [[f"00000/img{i:08d}.png", x] for i, x in enumerate(labels)]}).encode()


BAD = {
    "labels missing": (IMAGES, "missing", {}, "dataset.json"),
    "labels null": (IMAGES, None, {}, "dataset.json"),
    "labels incomplete": (IMAGES, labels_json(1, 2), {}, "dataset.json img00000002.png"),
    "no labels key": (IMAGES, b"{}", {}, "dataset.json form"),
    "no JSON": (IMAGES, b"\xff\xfe", {}, "dataset.json JSON"),
    "no object": (IMAGES, b"3", {}, "dataset.json"),
    "not pairs": (IMAGES, b'{"labels": [1, 2, 3]}', {}, "dataset.json form"),
    "negative": (IMAGES, labels_json(0, -1, 2), {}, "dataset.json -1"),
    "huge": (IMAGES, labels_json(0, 10**30, 2), {}, "dataset.json"),
    "bool": (IMAGES, labels_json(0, True, 2), {}, "dataset.json True"),
    "float": (IMAGES, labels_json(0, 1.5, 2), {}, "dataset.json 1.5"),
    "text": (IMAGES, labels_json(0, "dog", 2), {}, "dataset.json dog"),
    "null": (IMAGES, labels_json(0, None, 2), {}, "dataset.json None"),
    "mixed": (IMAGES, labels_json([1.0], 1, [2.0]), {}, "dataset.json whole numbers"),
    "ragged": (IMAGES, labels_json([1.0], [1.0, 2.0], [2.0]), {}, "dataset.json length"),
    "empty vectors": (IMAGES, labels_json([], [], []), {}, "dataset.json non-empty"),
    "NaN": (IMAGES, labels_json([0.0], [float("nan")], [0.0]), {}, "dataset.json finite"),
    "infinite": (IMAGES, labels_json([0.0], [1e300], [0.0]), {}, "dataset.json finite"),
    "big integer": (IMAGES, labels_json([0], [10**400], [0]), {}, "dataset.json finite"),
    "resolution": (IMAGES, [0, 1, 2], dict(resolution=8), "4x4 8x8"),
    "max_size": (IMAGES, [0, 1, 2], dict(max_size=0), "max_size"),
    "not square": (IMAGES[:, :, :2], [0, 1, 2], {}, "2x4 square"),
    "sizes": ([IMAGES[0], IMAGES[1, :2, :2]], [0, 1], {}, "img00000001.png [1, 2, 2] [1, 4, 4]"),
    "channels": ([IMAGES[0], random_images(4, 4, 3)], [0, 1], {}, "img00000001.png [3, 4, 4]"),
    "corrupt": ([IMAGES[0], png(random_images(4, 4))[:50]], [0, 1], {}, "img00000001.png decoded"),
    "corrupt first": ([b"text"], [0], {}, "img00000000.png not an image"),
    "alpha": ([IMAGES[0], png(random_images(4, 4, 4))], [0, 1], {}, "img00000001.png transparency"),
    "empty": ([], [], {}, "no images"),
}  # fmt: skip


@pytest.mark.parametrize("images, labels, options, words", BAD.values(), ids=BAD)
@pytest.mark.parametrize("cache", [True, False])
def test_bad_dataset(tmp_path, make_zip, images, labels, options, words, cache):
    path = make_zip(images, labels, tmp_path / "bad.zip")
    with pytest.raises((ValueError, OSError)) as caught:
        list(ImageFolderDataset(path, cache=cache, **{"use_labels": True, **options}))
    for word in [*words.split(), *(["bad.zip"] if "max_size" not in options else [])]:
        assert word in str(caught.value)
    assert "\n" not in str(caught.value)


def test_bad_labels_do_not_matter_unless_used(tmp_path, make_zip):
    dataset = ImageFolderDataset(make_zip(IMAGES, labels_json(1, -2), tmp_path / "bad.zip"))
    assert dataset.images().shape == (3, 1, 4, 4)
    with pytest.raises(ValueError, match="img00000002.png"):
        dataset.file_labels()


def test_bad_path(tmp_path):
    with pytest.raises(FileNotFoundError, match="does not exist"):
        ImageFolderDataset(tmp_path / "nowhere.zip")
    (tmp_path / "text.zip").write_text("text")
    with pytest.raises(ValueError, match="neither a folder nor a readable zip"):
        ImageFolderDataset(tmp_path / "text.zip")
    (tmp_path / "folder").mkdir()
    with pytest.raises(ValueError, match="no images"):
        ImageFolderDataset(tmp_path / "folder")


@pytest.mark.parametrize("name", ["../../evil.png", "/abs.png"])
def test_names_that_lead_outside_are_refused(tmp_path, name):
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        archive.writestr(name, png(IMAGES[0]))
    with pytest.raises(ValueError, match="leads outside"):
        ImageFolderDataset(tmp_path / "x.zip")
    assert os.listdir(tmp_path) == ["x.zip"]


def test_png_by_others(tmp_path):
    """Palette PNGs of a hand-made folder load as RGB."""
    PIL.Image.fromarray(random_images(4, 4, 3)).quantize(8).save(tmp_path / "a.png")
    assert ImageFolderDataset(tmp_path).image_shape == [3, 4, 4]
