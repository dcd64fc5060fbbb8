"""The scripts of dataset_utils/: which images and labels they choose, against plain code on the raw sources."""

import importlib
import os
import pickle
import random
import re
import shlex
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
from builders import digit_images
from conftest import ROOT
from test_dataset_tool import FASHION, cifar_tar, random_images, read_dataset, write_folder

import dataset_tool
from dataset_utils.archive import archive_name
from dataset_utils.dataset_inject import perturb
from dataset_utils.sample_imagenet import CLASSES, read_synsets
from dataset_utils.sources import concatenate, open_source
from dataset_utils.subsets import random_labels
from dataset_utils.transforms import fit
from training.dataset import ImageFolderDataset

SCRIPTS = "dataset_size dataset_dimension dataset_diversity dataset_random dataset_unique".split()
SCRIPTS += "sample_imagenet intra_diversity dataset_inject".split()


def main_of(script):
    return importlib.import_module(f"dataset_utils.{script}").main


@pytest.fixture
def make(run_cli, tmp_path):
    """make(script, options...): run it; return images [N, ...], labels, and the content of dataset.json."""

    def run(script, *options, dest="out.zip"):
        dest = tmp_path / dest
        result = run_cli(main_of(script), [*options, f"--dest={dest}"])
        images, metadata = read_dataset(dest)
        assert result.stdout.startswith(f"Wrote {len(images)} images, ") and str(dest) in result.stdout
        assert list(images) == [archive_name(i) for i in range(len(images))]
        labels = metadata["labels"] and [label for _, label in metadata["labels"]]
        return np.stack(list(images.values())), labels, metadata

    return run


@pytest.fixture(scope="module")
def cifar(tmp_path_factory):
    """A source like CIFAR-10 of 230 images, 23 of each class in mixed order: path, images, labels."""
    images = random_images(230, 3072)
    labels = np.random.RandomState(1).permutation(np.arange(230) % 10)
    batches = {
        f"data_batch_{i + 1}": pickle.dumps({"data": images[a : a + 115], "labels": labels[a : a + 115].tolist()})
        for i, a in enumerate([0, 115])
    }
    path = cifar_tar(tmp_path_factory.mktemp("cifar") / "cifar-10-python.tar.gz", batches)
    return str(path), images.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1), labels


@pytest.fixture(scope="module")
def digits_source():
    """The digits: path, images, labels."""
    from sklearn.datasets import load_digits

    return "digits", digit_images(), load_digits().target


@pytest.fixture(params=["cifar", "digits_source"])
def labelled(request):
    return request.getfixturevalue(request.param)


def first_of_classes(images, labels, counts):
    """The first counts[c] images of each class c, one class after the other."""
    chosen = np.concatenate([np.flatnonzero(labels == c)[:n] for c, n in enumerate(counts)])
    return images[chosen], labels[chosen].tolist()


def assert_same(images, labels, expected):
    np.testing.assert_array_equal(images, expected[0])
    assert labels == expected[1]


# ----------------------------------------------------------------------------
# Subsets.


@pytest.mark.parametrize("count", [10, 200])
def test_size(make, labelled, count):
    path, *data = labelled
    images, labels, _ = make("dataset_size", f"--source={path}", f"--max-images={count}")
    assert_same(images, labels, first_of_classes(*data, [count // 10] * 10))


def test_size_without_max_images_takes_what_the_smallest_class_allows(make, labelled):
    path, images, labels = labelled
    smallest = np.bincount(labels).min()
    assert smallest == (174 if path == "digits" else 23)
    assert_same(*make("dataset_size", f"--source={path}")[:2], first_of_classes(images, labels, [smallest] * 10))


def test_size_uneven(make, run_cli, digits_source, tmp_path):
    path, *data = digits_source
    args = [f"--source={path}", "--max-images=64"]
    error = run_cli(main_of("dataset_size"), [*args, f"--dest={tmp_path / 'no.zip'}"], code=1).stderr
    assert "60 or 70" in error and "--uneven" in error and not os.listdir(tmp_path)
    images, labels, _ = make("dataset_size", *args, "--uneven")
    assert_same(images, labels, first_of_classes(*data, [7] * 4 + [6] * 6))


@pytest.mark.parametrize("source", ["zip", "folder", "fashion"])
def test_size_of_other_sources(make, make_zip, tmp_path, source):
    """Classes are those that occur: here 2, 5 and 7."""
    data = random_images(30, 8, 8), np.array([7, 2, 5] * 10)
    if source == "fashion":
        if not FASHION.is_dir():
            pytest.skip(f"Fashion-MNIST is not at {FASHION}")
        images, labels, _ = make("dataset_size", f"--source={FASHION / 't10k-images-idx3-ubyte.gz'}", "--max-images=20")
        assert labels == [c for c in range(10) for _ in range(2)] and images.shape == (20, 32, 32)
        return
    path = make_zip(*data, tmp_path / "in.zip")
    if source == "folder":
        zipfile.ZipFile(path).extractall(tmp_path / "in")
        path = tmp_path / "in"
    images, labels, _ = make("dataset_size", f"--source={path}", "--max-images=12")
    assert_same(images, labels, first_of_classes(*data, [0, 0, 4, 0, 0, 4, 0, 4]))


@pytest.mark.parametrize("size", [16, 8])
def test_dimension(make, cifar, size):
    path, *data = cifar
    chosen, true = first_of_classes(*data, [5] * 10)
    expected = [np.array(PIL.Image.fromarray(i).resize((size, size), PIL.Image.Resampling.LANCZOS)) for i in chosen]
    options = [f"--source={path}", "--max-images=50", f"--resolution={size}x{size}"]
    for script in ("dataset_dimension", "dataset_size"):
        images, labels, _ = make(script, *options, dest=f"{script}.zip")
        assert_same(images, labels, (expected, true))


@pytest.mark.parametrize("num_classes, count", [(1, 20), (2, 33), (3, 20), (10, 28), (4, None)])
def test_diversity(make, labelled, num_classes, count):
    path, images, labels = labelled
    size = count or num_classes * np.bincount(labels)[:num_classes].min()
    share = size // num_classes
    counts = [share] * (num_classes - 1) + [size - share * (num_classes - 1)]
    options = [f"--max-images={count}"] if count else []
    made = make("dataset_diversity", f"--source={path}", f"--num-classes={num_classes}", *options)
    assert len(made[0]) == size
    assert_same(*made[:2], first_of_classes(images, labels, counts))


@pytest.mark.parametrize("num_classes", [1, 10, 1000])
def test_random_labels(make, labelled, num_classes):
    path, *data = labelled
    images, labels, _ = make(
        "dataset_random", f"--source={path}", "--max-images=200", f"--num-classes={num_classes}", dest="new"
    )
    random.seed(1024)
    expected = [random.randint(0, num_classes - 1) for _ in range(200)]
    assert_same(images, labels, (first_of_classes(*data, [20] * 10)[0], expected))
    assert max(labels) > num_classes * 0.9 - 1


def test_random_labels_are_the_published_ones():
    """Numbers of Python's generator, written down: they must never change."""
    assert random_labels(12, 10) == [0, 7, 6, 5, 8, 1, 7, 8, 5, 5, 6, 1]
    assert random_labels(12, 10, seed=0) != random_labels(12, 10)


def test_unique_labels(make, labelled):
    path, *data = labelled
    images, labels, _ = make("dataset_unique", f"--source={path}", "--max-images=70")
    assert_same(images, labels, (first_of_classes(*data, [7] * 10)[0], list(range(70))))


@pytest.mark.parametrize("script", ["dataset_unique", "dataset_random", "dataset_dimension"])
def test_without_labels_the_first_images_are_taken(make, run_cli, make_zip, tmp_path, script):
    source = random_images(6, 8, 8)
    path = make_zip(source, None, tmp_path / "in.zip")
    more = {"dataset_random": ["--num-classes=3"], "dataset_dimension": ["--resolution=8x8"]}.get(script, [])
    images, labels, _ = make(script, f"--source={path}", "--max-images=4", *more)
    np.testing.assert_array_equal(images, source[:4])
    assert {"dataset_unique": labels == [0, 1, 2, 3], "dataset_dimension": labels is None}.get(script, True)
    args = [f"--source={path}", "--max-images=7", f"--dest={tmp_path / 'no.zip'}", *more]
    assert "has only 6" in run_cli(main_of(script), args, code=1).stderr


def test_same_options_same_bytes(make, tmp_path):
    inject = ["--duplicates=9", "--copies=3", "--noise=4", "--jitter=1", "--outliers=5", "--outlier-class=9"]
    for script, options in [("dataset_random", ["--num-classes=5"]), ("dataset_inject", inject)]:
        for dest, workers in [("a.zip", 1), ("b.zip", 3)]:
            make(script, "--source=digits", "--max-images=90", *options, f"--workers={workers}", dest=dest)
        assert (tmp_path / "a.zip").read_bytes() == (tmp_path / "b.zip").read_bytes()
        make(script, "--source=digits", "--max-images=90", *options, "--seed=7")
        assert (tmp_path / "a.zip").read_bytes() != (tmp_path / "out.zip").read_bytes()


# ----------------------------------------------------------------------------
# ImageNet and intra-diversity.


def test_synsets():
    """123 dogs, 13 cats, 17 birds, each list in the order of WordNet, without repetition."""
    lists = {name: read_synsets(name) for name in CLASSES}
    assert {name: len(wnids) for name, wnids in lists.items()} == {"dog": 123, "cat": 13, "bird": 17}
    for name, ends in [("dog", "n02085620 n02115641"), ("cat", "n02123045 n02130308"), ("bird", "n01514668 n01622779")]:
        assert f"{lists[name][0]} {lists[name][-1]}" == ends
        assert all(re.fullmatch(r"n\d{8}", wnid) for wnid in lists[name])
        assert lists[name] == sorted(set(lists[name]))
    assert "n02113978" in lists["dog"] and "n02115913" not in lists["dog"]  # Mexican hairless; dhole


@pytest.fixture
def imagenet(tmp_path):
    """A folder like ImageNet's: cats of 3 of the 13 classes with 5, 2 and 9 photos of 40x30, and a dog."""
    folders = {"n02123045": 5, "n02123597": 2, "n02130308": 9, "n02085620": 1}
    files = {f"{w}/{w}_{i}.png": random_images(30, 40, 3, seed=i) for w, n in folders.items() for i in range(n)}
    return write_folder(tmp_path / "train", files)


def test_sample_imagenet(run_cli, tmp_path, imagenet):
    def sample(count, *options, code=0):
        args = [f"--root={imagenet}", "--class=cat", f"--num-samples={count}", f"--dest={tmp_path / 'cat.txt'}"]
        result = run_cli(main_of("sample_imagenet"), [*args, *options], code=code)
        return result.stderr if code else (tmp_path / "cat.txt").read_text().splitlines()

    lines = sample(7)
    assert all(Path(line).is_file() for line in lines) and len(set(lines)) == 7
    folders = [Path(line).parent.name for line in lines]
    assert [folders.count(f) for f in ("n02123045", "n02123597", "n02130308")] == [3, 2, 2]
    assert folders != sorted(folders)  # in random order
    assert sample(7) == lines != sample(7, "--seed=3")
    assert len(set(sample(16))) == 16
    assert "hold only 16" in sample(17, code=1)
    assert "must end in .txt" in sample(2, f"--dest={tmp_path / 'x.zip'}", code=2)
    assert "is no folder" in sample(2, f"--root={tmp_path / 'lost'}", code=1)
    assert "none of the 17 folders" in sample(2, "--class=bird", code=1)
    assert "--class" in sample(2, "--class=fish", code=2)


@pytest.mark.parametrize("rate, kept", [(0, 10), (0.2, 8), (0.25, 7), (0.8, 2), (1, 0)])
def test_intra_diversity(make, cifar, run_cli, imagenet, tmp_path, rate, kept):
    path, images, labels = cifar
    args = [f"--root={imagenet}", "--class=cat", "--num-samples=12", f"--dest={tmp_path / 'cat.txt'}"]
    run_cli(main_of("sample_imagenet"), args)
    mixed, mixed_labels, _ = make(
        "intra_diversity", f"--source={path}", "--class=3", f"--mix={tmp_path / 'cat.txt'}", "--max-images=10",
        f"--inter-rate={rate}",
    )  # fmt: skip
    photos = [PIL.Image.open(line) for line in (tmp_path / "cat.txt").read_text().splitlines()]
    photos = [p.crop((5, 0, 35, 30)).resize((32, 32), PIL.Image.Resampling.LANCZOS) for p in photos[: 10 - kept]]
    expected = [*images[labels == 3][:kept], *(np.array(photo) for photo in photos)]
    assert_same(mixed, mixed_labels, (expected, [3] * 10))


def test_intra_diversity_counts_are_exact(make, make_zip, tmp_path):
    """(1 - 0.8) * 2000 is 399.99999999999994 in floating point, and means 400."""
    source = make_zip(np.zeros([400, 1, 1], np.uint8), None, tmp_path / "a.zip")
    mix = make_zip(np.full([1600, 2, 2, 3], 255, np.uint8), None, tmp_path / "b.zip")
    options = [f"--source={source}", f"--mix={mix}", "--inter-rate=0.8", "--max-images=2000"]
    images, labels, _ = make("intra_diversity", *options)
    assert images.shape == (2000, 1, 1) and images[:400].max() == 0 and images[400:].min() == 255 and labels is None


@pytest.mark.parametrize(
    "options, code, words",
    [
        ("--class=3 --inter-rate=0.5", 2, "need --mix"),
        ("--class=3 --inter-rate=1.5 --mix=digits", 2, "--inter-rate"),
        ("--class=3 --inter-rate=nan --mix=digits", 2, "--inter-rate"),
        ("--inter-rate=0.5 --mix=digits --mix-class=1", 1, "has 10 classes --class"),
        ("--class=3 --inter-rate=0.5 --mix=digits", 1, "has 10 classes --mix-class"),
        ("--class=12 --inter-rate=0.5 --mix=digits --mix-class=1", 1, "no image of class 12 has 0, 1, 9"),
        ("--class=3 --max-images=30", 1, "30 --source only 23"),
        ("--class=3 --max-images=400 --inter-rate=0.95 --mix=digits --mix-class=1", 1, "380 --mix only 182"),
    ],
)
def test_intra_diversity_errors(run_cli, tmp_path, cifar, options, code, words):
    args = [f"--source={cifar[0]}", f"--dest={tmp_path / 'out.zip'}", *options.split()]
    result = run_cli(main_of("intra_diversity"), args, code=code)
    assert all(word in result.stderr for word in words.split()), result.stderr
    assert os.listdir(tmp_path) == []


def test_commands_of_the_published_page(run_cli, make_zip, tmp_path, monkeypatch):
    """They name no class, no number, no folder of ImageNet and no images to mix in."""
    monkeypatch.chdir(tmp_path)
    photos = {f"n02085620/{i}.png": random_images(30, 40, 3, seed=i) for i in range(10)}
    write_folder(tmp_path / "datasets/imagenet/data/ILSVRC/Data/CLS-LOC/train", photos)
    assert "2000 images are asked for" in run_cli(main_of("sample_imagenet"), [], code=1).stderr  # dogs, in that folder
    run_cli(main_of("sample_imagenet"), ["--num-samples=10"])
    args = ["--source=datasets/imagenet/dog_10.txt", "--dest=datasets/imagenet/imagenet_dog_2000-32x32.zip"]
    run_cli(main_of("intra_diversity"), [*args, "--resolution=32x32", "--transform=center-crop"])
    dogs = make_zip(np.zeros([10, 32, 32, 3], np.uint8), [5] * 10, tmp_path / "cifar10_dog.zip")
    args = [f"--source={dogs}", "--dest=mixture.zip", "--max-images=10", "--inter-rate=0.8"]
    assert "Wrote 10 images, 32x32" in run_cli(main_of("intra_diversity"), args).output


def test_fit():
    gray, rgb = random_images(6, 10), random_images(10, 6, 3)
    np.testing.assert_array_equal(fit(gray, 6, 1), gray[:, 2:8])
    np.testing.assert_array_equal(fit(rgb, 6, 3), rgb[2:8])
    np.testing.assert_array_equal(fit(gray, 6, 3), np.stack([gray[:, 2:8]] * 3, axis=-1))
    luma = rgb[2:8] @ [0.299, 0.587, 0.114]
    assert fit(rgb, 6, 1).shape == (6, 6) and np.abs(fit(rgb, 6, 1) - luma).max() < 1
    assert fit(gray, 4, 1).shape == (4, 4)


# ----------------------------------------------------------------------------
# Injection.


def groups_of(metadata):
    return [group for _, group in metadata["groups"]]


def index_of(name):
    return int(Path(name).stem.removeprefix("img"))


def test_exact_duplicates(make, labelled):
    path, *data = labelled
    images, labels, metadata = make(
        "dataset_inject", f"--source={path}", "--max-images=100", "--duplicates=12", "--copies=3"
    )
    base, base_labels = first_of_classes(*data, [10] * 10)
    np.testing.assert_array_equal(images[:100], base)
    assert labels[:100] == base_labels and len(images) == 136
    assert [name for name, _ in metadata["groups"]] == [name for name, _ in metadata["labels"]]
    assert [name for name, _ in metadata["origins"]] == [archive_name(i) for i in range(100, 136)]
    originals = [index_of(origin) for _, origin in metadata["origins"]]
    assert len(set(originals)) == 12 and all(originals.count(i) == 3 for i in originals)
    np.testing.assert_array_equal(images[100:], images[originals])
    assert labels[100:] == [labels[i] for i in originals]
    expected = ["duplicate" if i in originals else "inlier" for i in range(100)] + ["duplicate"] * 36
    assert groups_of(metadata) == expected


@pytest.mark.parametrize("options", ["--noise=6", "--jitter=2", "--noise=3 --jitter=1"])
def test_near_duplicates(make, cifar, options):
    images, _, metadata = make(
        "dataset_inject", f"--source={cifar[0]}", "--duplicates=20", "--copies=2", *options.split()
    )
    assert len(images) == 230 + 40
    originals = images[[index_of(origin) for _, origin in metadata["origins"]]].astype(float)
    copies = images[230:].astype(float)
    assert (copies != originals).any(axis=(1, 2, 3)).all()
    assert len({copy.tobytes() for copy in copies}) == 40 or options == "--jitter=2"  # 24 shifts: two may agree
    if options == "--noise=6":
        free = (originals > 30) & (originals < 225)
        assert abs((copies - originals)[free].std() - np.sqrt(36 + 1 / 12)) < 0.1
        assert abs((copies - originals)[free].mean()) < 0.1
    if options == "--jitter=2":
        shifts = [
            [(y, x) for y in range(-2, 3) for x in range(-2, 3)
             if np.array_equal(b[2 + y : 30 + y, 2 + x : 30 + x], a[2:30, 2:30])]
            for a, b in zip(originals, copies)
        ]  # fmt: skip
        assert all(len(s) == 1 for s in shifts) and [(0, 0)] not in shifts
        assert len({s[0] for s in shifts}) > 10


def test_perturb_clips_and_repeats_edges():
    white = np.full([4, 4], 255, np.uint8)
    noisy = perturb(white, 50.0, 0, np.random.RandomState(0))
    assert noisy.dtype == np.uint8 and noisy.max() == 255 and 100 < noisy.min() < 255
    np.testing.assert_array_equal(perturb(white, 0.0, 3, np.random.RandomState(0)), white)
    image = random_images(4, 4)
    np.testing.assert_array_equal(perturb(image, 0.0, 0, np.random.RandomState(0)), image)


def test_outliers_of_another_dataset(make, cifar, make_zip, tmp_path):
    """RGB photos of another size become gray digits of 8x8, with a label of their own."""
    other = random_images(12, 24, 16, 3)
    path = make_zip(other, "missing", tmp_path / "other.zip")
    images, labels, metadata = make(
        "dataset_inject", "--source=digits", "--max-images=50", "--outliers=7", f"--outlier-source={path}"
    )
    assert groups_of(metadata) == ["inlier"] * 50 + ["outlier"] * 7
    assert labels[50:] == [10] * 7
    chosen = [index_of(origin) for _, origin in metadata["origins"]]
    assert len(set(chosen)) == 7 and all(origin.startswith(f"{path}/00000/img") for _, origin in metadata["origins"])
    for image, i in zip(images[50:], chosen):
        square = PIL.Image.fromarray(other[i, 4:20]).resize((8, 8), PIL.Image.Resampling.LANCZOS)
        np.testing.assert_array_equal(image, np.array(square.convert("L")))


def test_outliers_of_a_held_out_class(make, digits_source):
    path, images, labels = digits_source
    made, made_labels, metadata = make("dataset_inject", f"--source={path}", "--outliers=9", "--outlier-class=4")
    rest = labels != 4
    np.testing.assert_array_equal(made[:-9], images[rest])
    assert made_labels == [*labels[rest], *[4] * 9]
    numbers = [int(re.fullmatch(r"digits\[(\d+)\]", origin)[1]) for _, origin in metadata["origins"]]
    assert len(set(numbers)) == 9 and all(labels[i] == 4 for i in numbers)
    np.testing.assert_array_equal(made[-9:], images[numbers])
    assert groups_of(metadata) == ["inlier"] * rest.sum() + ["outlier"] * 9


def test_inverted_outliers_and_duplicates_together(make):
    options = ["--source=digits", "--max-images=60", "--outliers=5", "--outliers-inverted", "--resolution=4x4"]
    images, labels, metadata = make("dataset_inject", *options, "--duplicates=3")
    assert groups_of(metadata)[60:] == ["duplicate"] * 3 + ["outlier"] * 5 and images.shape == (68, 4, 4)
    sources = [index_of(origin) for _, origin in metadata["origins"][3:]]
    np.testing.assert_array_equal(images[63:], 255 - images[sources])
    assert labels[63:] == [labels[i] for i in sources]
    alone = make("dataset_inject", *options)[2]  # the outliers do not depend on the duplicates
    assert [origin for _, origin in alone["origins"]] == [archive_name(i) for i in sources]


OUTLIERS = ["--outliers-inverted", "--outlier-class=4", "--outlier-source={other}"]


@pytest.mark.parametrize("kind", OUTLIERS)
def test_held_out_images_are_another_draw_of_the_same_kind(make, digits_source, make_zip, tmp_path, kind):
    """Nothing of the set is in it, the groups are as large, and the set is the same byte for byte."""
    _, digits, labels = digits_source
    other = random_images(12, 8, 8)
    kind = kind.format(other=make_zip(other, "missing", tmp_path / "other.zip"))
    options = ["--source=digits", f"--max-images={54 if '=4' in kind else 60}", "--outliers=6", kind, "--duplicates=5"]
    plain = make("dataset_inject", *options, "--copies=2", dest="plain.zip")
    images, _, _ = make("dataset_inject", *options, "--copies=2", f"--held-out={tmp_path / 'held.zip'}", dest="set.zip")
    assert (tmp_path / "plain.zip").read_bytes() == (tmp_path / "set.zip").read_bytes()
    held, metadata = read_dataset(tmp_path / "held.zip")
    held, groups, size = np.stack(list(held.values())), groups_of(metadata), len(images) - 16
    assert sorted(groups) == ["duplicate"] * 5 + ["inlier"] * (size - 5) + ["outlier"] * 6
    assert not {image.tobytes() for image in held} & {image.tobytes() for image in images}
    made = [label for _, label in metadata["labels"]]
    assert made[:size] == plain[1][:size]  # as many of each class
    classes = sorted(set(made[:size]))
    expected = [digits[labels == c][size // len(classes) : 2 * size // len(classes)] for c in classes]
    np.testing.assert_array_equal(held[:size], np.concatenate(expected))
    if "inverted" in kind:
        assert all((255 - image).tobytes() in {i.tobytes() for i in held[:size]} for image in held[size:])
    else:
        pool = digits[labels == 4] if "=4" in kind else other
        assert all(any(np.array_equal(image, one) for one in pool) for image in held[size:])
        assert len({image.tobytes() for image in [*held[size:], *images[-6:]]}) == 12


def test_held_out_images_that_are_in_the_set_are_left_out(run_cli, make_zip, tmp_path):
    """The source has two of its images twice, and the second ones come behind the set."""
    images = random_images(9, 8, 8)
    path = make_zip(np.concatenate([images[:6], images[[1, 3]], images[6:], images[:1]]), None, tmp_path / "in.zip")
    args = [f"--source={path}", "--max-images=6", "--duplicates=1", f"--dest={tmp_path / 'set.zip'}"]
    text = run_cli(main_of("dataset_inject"), [*args, f"--held-out={tmp_path / 'held.zip'}"]).stdout
    held, _ = read_dataset(tmp_path / "held.zip")
    np.testing.assert_array_equal(np.stack(list(held.values())), images[6:])
    assert "3 held-out images that are in the set, too" in text


def test_unlabelled_sets_stay_unlabelled(make, make_zip, tmp_path):
    path = make_zip(random_images(6, 8, 8), None, tmp_path / "in.zip")
    options = [f"--source={path}", "--duplicates=2", "--outliers=3", "--outlier-source=digits"]
    assert make("dataset_inject", *options)[1] is None


def test_groups_survive(run_cli, make, tmp_path):
    """Conversion, choice of images and a second injection keep groups; training reads them in order."""
    make("dataset_inject", "--source=digits", "--max-images=40", "--duplicates=4", dest="a.zip")
    names = groups_of(read_dataset(tmp_path / "a.zip")[1])
    options = [f"--source={tmp_path / 'a.zip'}", f"--dest={tmp_path / 'b'}", "--max-images=42", "--resolution=4x4"]
    assert "2 duplicate" not in run_cli(dataset_tool.main, options).stdout
    metadata = read_dataset(tmp_path / "b")[1]
    assert groups_of(metadata) == names[:42] and "origins" not in metadata
    assert ImageFolderDataset(tmp_path / "a.zip").groups() == names
    source = open_source(tmp_path / "a.zip")
    assert source.select([43, 0]).groups == [names[43], names[0]]
    assert concatenate([source, source]).groups == names * 2
    assert concatenate([source, open_source("digits")]).groups is None
    again = make("dataset_inject", f"--source={tmp_path / 'a.zip'}", "--outliers=3", "--outliers-inverted")[2]
    assert groups_of(again) == names + ["outlier"] * 3


@pytest.mark.parametrize(
    "groups, words",
    [
        ('{"a": "b"}', "form"),
        ('[["00000/img00000000.png", 1]]', "form"),
        ('[["00000/img00000000.png", "x"], ["00000/img00000000.png", "y"]]', "more than one"),
        ('[["00000/img00000000.png", "x"]]', "no group for img00000001.png"),
    ],
)
def test_bad_groups(run_cli, make_zip, tmp_path, groups, words):
    content = f'{{"labels": null, "groups": {groups}}}'.encode()
    path = make_zip(random_images(2, 8, 8), content, tmp_path / "in.zip")
    result = run_cli(dataset_tool.main, [f"--source={path}", f"--dest={tmp_path / 'out.zip'}"], code=1)
    assert all(word in result.stderr for word in words.split())


def test_training_on_an_injected_set(make, run_cli, tmp_path):
    import train

    make("dataset_inject", "--source=digits", "--max-images=20", "--duplicates=2", "--copies=2", "--outliers=2",
         "--outliers-inverted", dest="injected.zip")  # fmt: skip
    options = "--cond=1 --cres=1,1 --num-channels=4 --num-blocks=1 --batch=100 --augment=0 --duration=0.1 --device=cpu"
    run_cli(train.main, [f"--outdir={tmp_path}", f"--data={tmp_path / 'injected.zip'}", *options.split()])
    assert list(tmp_path.glob("00000-*/network-snapshot-*.safetensors"))


# ----------------------------------------------------------------------------
# Errors and the command lines.


@pytest.mark.parametrize(
    "script, options, code, words",
    [
        ("dataset_size", "--max-images=240", 1, "24 class 0 has only 23"),
        ("dataset_size", "--max-images=5", 1, "10 classes share 5 take 10, --uneven"),
        ("dataset_size", "--max-images=0", 2, "--max-images"),
        ("dataset_size", "--source=nowhere", 1, "nowhere does not exist"),
        ("dataset_size", "--resolution=24x24", 1, "power of two"),
        ("dataset_diversity", "--num-classes=11", 1, "11 only 10"),
        ("dataset_diversity", "--num-classes=2 --max-images=49", 1, "class 0 has only 23 24"),
        ("dataset_diversity", "--num-classes=4 --max-images=3", 1, "3 4"),
        ("dataset_diversity", "", 2, "--num-classes"),
        ("dataset_random", "--num-classes=0", 2, "--num-classes"),
        ("dataset_random", "--num-classes=5 --max-images=500", 1, "50 class 0 has only 23"),
        ("dataset_unique", "--max-images=500", 1, "50 class 0 has only 23"),
        ("dataset_dimension", "", 2, "--resolution"),
        ("dataset_dimension", "--resolution=16x8", 1, "not square"),
        ("dataset_inject", "", 2, "nothing to add"),
        ("dataset_inject", "--copies=3 --outliers=1 --outliers-inverted", 2, "--copies needs --duplicates"),
        ("dataset_inject", "--noise=3", 2, "--noise needs --duplicates"),
        ("dataset_inject", "--duplicates=1 --noise=nan", 2, "--noise"),
        ("dataset_inject", "--outliers=3", 2, "--outlier-source --outlier-class --outliers-inverted"),
        ("dataset_inject", "--outlier-class=3", 2, "needs --outliers"),
        ("dataset_inject", "--outliers=1 --outlier-class=3 --outliers-inverted", 2, "exclude each other"),
        ("dataset_inject", "--outliers=24 --outlier-class=3", 1, "24 outliers only 23"),
        ("dataset_inject", "--outliers=4 --outlier-class=33", 1, "no image of class 33"),
        ("dataset_inject", "--duplicates=231", 1, "231 only 230"),
        ("dataset_inject", "--max-images=240 --duplicates=1", 1, "class 0 has only 23"),
        ("dataset_inject", "--duplicates=1 --held-out=x.zip", 1, "--held-out too few --max-images"),
        ("dataset_inject", "--max-images=120 --duplicates=1 --held-out=x.zip", 1, "--held-out --max-images 12 only 11"),
        ("dataset_inject", "--max-images=20 --duplicates=1 --held-out=folder", 2, "--held-out .zip"),
    ],
)
def test_errors(run_cli, tmp_path, cifar, script, options, code, words):
    args = [f"--source={cifar[0]}", f"--dest={tmp_path / 'out.zip'}", *options.split()]
    result = run_cli(main_of(script), args, code=code)
    assert all(word in result.stderr for word in words.split()), result.stderr
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("labels, words", [(None, "has no label"), ([[0.5], [1.5]], "vectors")])
def test_labels_are_needed(run_cli, make_zip, tmp_path, labels, words):
    path = make_zip(random_images(2, 8, 8), labels, tmp_path / "in.zip")
    for script, option in [("dataset_size", ""), ("dataset_diversity", "--num-classes=1"), ("dataset_inject", "")]:
        more = [option] if option else ["--outliers=1", "--outlier-class=0"] if script == "dataset_inject" else []
        args = [f"--source={path}", f"--dest={tmp_path / 'out.zip'}", *more]
        assert words in run_cli(main_of(script), args, code=1).stderr


@pytest.mark.parametrize("script", [s for s in SCRIPTS if s != "sample_imagenet"])
def test_source_is_not_overwritten(run_cli, make_zip, tmp_path, script):
    path = make_zip(random_images(4, 8, 8), [0, 0, 0, 0], tmp_path / "in.zip")
    before = Path(path).read_bytes()
    more = {
        "dataset_diversity": ["--num-classes=1"], "dataset_random": ["--num-classes=2"],
        "dataset_dimension": ["--resolution=4x4"], "dataset_inject": ["--duplicates=1"],
    }.get(script, [])  # fmt: skip
    result = run_cli(main_of(script), [f"--source={path}", f"--dest={path}", *more], code=1)
    assert "source itself" in result.stderr and Path(path).read_bytes() == before


def test_mix_is_not_overwritten(run_cli, make_zip, tmp_path):
    path = make_zip(random_images(4, 8, 8), None, tmp_path / "in.zip")
    args = ["--source=digits", "--class=0", f"--mix={path}", "--inter-rate=0.1", "--max-images=10", f"--dest={path}"]
    assert "source itself" in run_cli(main_of("intra_diversity"), args, code=1).stderr


def documented_commands():
    text = (ROOT / "docs/datasets.md").read_text().replace("\\\n", " ")
    return re.findall(r"^python (\S+\.py) (.*)$", text, flags=re.MULTILINE)


def test_documented_commands_run(run_cli, tmp_path, monkeypatch, capsys):
    """Every command of docs/datasets.md whose sources are there runs; the others have the options that they use."""
    monkeypatch.chdir(tmp_path)
    for wnid in read_synsets("dog")[:3]:
        write_folder(Path(f"ILSVRC/Data/CLS-LOC/train/{wnid}"), {f"{i}.png": random_images(9, 8, 3) for i in range(2)})
    seen, ran = set(), 0
    for script, rest in documented_commands():
        arguments = shlex.split(rest)
        name = script.removeprefix("dataset_utils/").removesuffix(".py")
        main = dataset_tool.main if name == "dataset_tool" else main_of(name)
        seen.add(name)
        known = {option for parameter in main.params for option in parameter.opts}
        assert {argument.split("=")[0] for argument in arguments} <= known
        values = dict(argument.split("=", 1) for argument in arguments if "=" in argument)
        if values.get("--source") == "digits" and "fashion" not in rest:
            run_cli(main, arguments)
            ran += 1
    assert seen >= set(SCRIPTS) and ran >= 5


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS)
def test_help_and_example(script, tmp_path):
    """Run by its path from any folder, each script explains itself and gives an example with options it has."""
    command = [sys.executable, str(ROOT / f"dataset_utils/{script}.py"), "--help"]
    out = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=True).stdout
    assert out.startswith("Usage: ")
    example = out[out.index("Example") : out.index("Options:")]
    assert f"python dataset_utils/{script}.py" in example
    known = {option for parameter in main_of(script).params for option in parameter.opts}
    assert set(re.findall(r"--[\w-]+", example)) <= known
