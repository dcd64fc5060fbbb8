"""Nearest neighbours: the reference numbers, and a brute force in integers on real and awkward data."""

import gzip
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from memorization.knn import nearest_neighbors

REFERENCE = Path(__file__).parent / "reference" / "knn.npz"
FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")


def brute_force(images, reference, k):
    """All distances in 64-bit integers; a stable sort leaves ties in the order of their indices."""
    a, b = (x.reshape(len(x), -1).astype(np.int64) for x in (images, reference))
    squared = np.stack([((row - b) ** 2).sum(axis=1) for row in a])
    index = np.argsort(squared, axis=1, kind="stable")[:, :k]
    return np.sqrt(np.take_along_axis(squared, index, axis=1) / a.shape[1]), index


def check(images, reference, k=2, **kwargs):
    distance, index = nearest_neighbors(images, reference, k, **kwargs)
    expected_distance, expected_index = brute_force(images, reference, k)
    assert distance.dtype == np.float64 and index.dtype == np.int64
    np.testing.assert_array_equal(index, expected_index)
    np.testing.assert_allclose(distance, expected_distance, rtol=1e-15, atol=0)
    return distance, index


@pytest.fixture(scope="module")
def digits():
    images = load_digits().images  # 0..16
    return np.rint(images * 255 / 16).astype(np.uint8)[:, np.newaxis]  # [1797, 1, 8, 8]


def random_images(seed, n, *shape):
    return np.random.RandomState(seed).randint(0, 256, (n, *shape), dtype=np.uint8)


def test_reference_numbers():
    data = np.load(REFERENCE)
    distance, index = nearest_neighbors(data["generated"], data["reference"])
    np.testing.assert_array_equal(index, data["knn_index"])
    np.testing.assert_allclose(distance, data["knn_distance"], rtol=0, atol=1e-6)


@pytest.mark.parametrize("block", [1, 7, 100, 1796, 1797, 4096])
def test_blocks_do_not_matter(digits, block):
    check(digits[:40], digits, k=5, block=block)


def test_more_queries_than_one_block(digits):
    check(digits[:1100], digits[900:1400], k=3)


@pytest.mark.skipif(not FASHION_MNIST.is_dir(), reason="Fashion-MNIST is not on this machine")
def test_fashion_mnist():
    def read(name):
        with gzip.open(FASHION_MNIST / name) as file:
            return np.frombuffer(file.read(), dtype=np.uint8, offset=16).reshape(-1, 1, 28, 28)

    check(read("t10k-images-idx3-ubyte.gz")[:40], read("train-images-idx3-ubyte.gz")[:6000])


def test_duplicates_and_ties_go_to_the_lower_index(digits):
    reference = np.concatenate([digits[:50], digits[:50], digits[:50]])
    distance, index = check(digits[:50], reference, k=4, block=33)
    np.testing.assert_array_equal(index[:, :3], np.arange(50)[:, np.newaxis] + [0, 50, 100])
    assert (distance[:, :3] == 0).all() and (distance[:, 3] > 0).all()


def test_all_reference_images_equal():
    images = random_images(0, 5, 3, 4, 4)
    distance, index = check(images, np.repeat(images[:1], 70, axis=0), k=3, block=16)
    assert (index == [0, 1, 2]).all()


def test_near_duplicates_that_differ_by_one_grey_level():
    """Squared distances 1, 2, 3, ... below |a|^2 = 5e7: hopeless for rounded float32, exact here."""
    query = np.full((1, 3, 32, 32), 255, dtype=np.uint8)
    reference = np.repeat(query, 60, axis=0).reshape(60, -1)
    for i in range(60):
        reference[i, : 60 - i] = 254
    distance, index = check(query, reference.reshape(60, 3, 32, 32), k=60, block=13)
    np.testing.assert_array_equal(index[0], np.arange(59, -1, -1))
    np.testing.assert_allclose(distance[0] ** 2 * 3072, np.arange(1, 61), rtol=1e-12)


@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 16, 16), (3, 32, 32), (1, 64, 64), (3, 64, 64)])
def test_extreme_pixels(shape):
    """Black, white and checkered images make the largest sums there are."""
    noise = random_images(1, 20, *shape)
    extremes = np.where(noise > 127, 255, 0).astype(np.uint8)
    flat = np.stack([np.full(shape, value, dtype=np.uint8) for value in (0, 255, 127, 128)])
    images = np.concatenate([extremes, flat, noise])
    check(images, images[::-1].copy(), k=4, block=9)


def test_exactly_k_reference_images(digits):
    check(digits[10:14], digits[:2], k=2)
    check(digits[10:14], digits[:1], k=1)


def test_no_images(digits):
    distance, index = nearest_neighbors(digits[:0], digits, 2)
    assert distance.shape == index.shape == (0, 2)


def test_tensors_views_and_read_only_arrays(digits):
    expected = nearest_neighbors(digits[:10], digits[:100])
    frozen = digits[:100].copy()
    frozen.flags.writeable = False
    for reference in (torch.from_numpy(digits[:100]), frozen, digits[:100, :, ::-1, ::-1][:, :, ::-1, ::-1]):
        for a, b in zip(expected, nearest_neighbors(torch.from_numpy(digits[:10]), reference)):
            np.testing.assert_array_equal(a, b)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_cuda():
    images, reference = random_images(2, 100, 3, 32, 32), random_images(3, 5000, 3, 32, 32)
    for tf32 in (False, True):
        torch.backends.cuda.matmul.allow_tf32 = tf32
        check(images, np.concatenate([reference, images // 2 * 2]), device="cuda")
    torch.backends.cuda.matmul.allow_tf32 = False


GOOD = np.zeros((4, 3, 8, 8), dtype=np.uint8)


@pytest.mark.parametrize(
    ("images", "reference", "kwargs", "message"),
    [
        (GOOD, GOOD, dict(k=5), "5 nearest neighbours need at least 5 reference images.*there are 4"),
        (GOOD, GOOD, dict(k=0), "k >= 1"),
        (GOOD, GOOD[:0], {}, "there are 0 reference images"),
        (GOOD[:, :1], GOOD, {}, "8x8 with 1 channel, the reference images 8x8 with 3 channels"),
        (GOOD[..., :4, :4], GOOD, {}, "4x4 with 3 channels, the reference images 8x8"),
        (GOOD.astype(np.float32), GOOD, {}, "`images` must be uint8.*not float32"),
        (GOOD, GOOD.astype(np.int64), {}, "`reference` must be uint8.*not int64"),
        (GOOD[0], GOOD, {}, r"`images` must be uint8 images \[n, C, H, W\].*\[3, 8, 8\]"),
        ([[1]], GOOD, {}, "`images` must be uint8.*not list"),
        (GOOD, GOOD, dict(block=0), "block must be at least 1"),
        (GOOD, GOOD, dict(block=1 << 40), "lower `block`"),
    ],
)
def test_bad_inputs(images, reference, kwargs, message):
    with pytest.raises(ValueError, match=message):
        nearest_neighbors(images, reference, **kwargs)
