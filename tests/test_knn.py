"""Nearest neighbours: the reference numbers, and a brute force in integers on real and awkward data."""

import gzip
import itertools
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from builders import Operations

from memorization.measure import knn, knn_dense, knn_projected
from memorization.measure import knn_products as products
from memorization.measure.knn import Neighbors, nearest_neighbors, plain_neighbors
from memorization.measure.knn_projected import Projection

ROOT = Path(__file__).resolve().parent.parent
REFERENCE = Path(__file__).parent / "reference" / "knn.npz"
FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")


def check(images, reference, k=2, **kwargs):
    """Both ways of searching equal the definition."""
    expected_distance, expected_index = plain_neighbors(images, reference, k)
    for dense in (True, False):
        distance, index = nearest_neighbors(images, reference, k, dense=dense, **kwargs)
        assert distance.dtype == np.float64 and index.dtype == np.int64
        np.testing.assert_array_equal(index, expected_index)
        np.testing.assert_allclose(distance, expected_distance, rtol=1e-15, atol=0)
    return distance, index


@pytest.fixture(params=["best", "float32"])
def arithmetic(request, monkeypatch):
    """Both ways to multiply pixels: int8 where that is exact and fast, and float32."""
    if request.param == "float32":
        monkeypatch.setattr(products, "int8_works", lambda device: False)
    elif not products.int8_works(torch.device("cpu")):
        pytest.skip("no fast exact int8 product here")


def random_images(seed, n, *shape):
    return np.random.RandomState(seed).randint(0, 256, (n, *shape), dtype=np.uint8)


def test_reference_numbers(arithmetic):
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
    """Padded as the dataset tool does; the queries differ from the reference in the border, too."""

    def read(name, n):
        with gzip.open(FASHION_MNIST / name) as file:
            images = np.frombuffer(file.read(16 + n * 784), dtype=np.uint8, offset=16).reshape(-1, 1, 28, 28)
        return np.pad(images, ((0, 0), (0, 0), (2, 2), (2, 2)))

    unrelated, reference = read("t10k-images-idx3-ubyte.gz", 15), read("train-images-idx3-ubyte.gz", 6000)
    copies = np.clip(reference[::400] + np.random.RandomState(0).randint(-9, 10, (15, 1, 32, 32)), 0, 255)
    copies = copies.astype(np.uint8)
    _, index = check(np.concatenate([unrelated, copies]), reference, k=5)
    np.testing.assert_array_equal(index[15:, 0], np.arange(0, 6000, 400))


def test_duplicates_and_ties_go_to_the_lower_index(digits):
    reference = np.concatenate([digits[:50], digits[:50], digits[:50]])
    distance, index = check(digits[:50], reference, k=4, block=33)
    np.testing.assert_array_equal(index[:, :3], np.arange(50)[:, np.newaxis] + [0, 50, 100])
    assert (distance[:, :3] == 0).all() and (distance[:, 3] > 0).all()


@pytest.mark.parametrize("k", [1, 3, 70])
def test_all_reference_images_equal(k):
    images = random_images(0, 5, 3, 4, 4)
    distance, index = check(images, np.repeat(images[:1], 70, axis=0), k=k, block=16)
    assert (index == np.arange(k)).all()


@pytest.mark.parametrize("levels", [1, 2, 3])
@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 2, 2), (3, 3, 3)])
def test_many_ties(levels, shape):
    """Few grey levels and few pixels: most distances occur many times."""
    random = np.random.RandomState(4)
    images, reference = (random.randint(0, levels + 1, (n, *shape)).astype(np.uint8) for n in (60, 700))
    for k, block in ((1, 64), (2, 200), (50, 100), (50, 2048), (700, 300)):
        check(images, reference, k=k, block=block)


def test_norms_of_all_sizes():
    """From black over dim to bright: the nearest is not the one with the largest product."""
    images = random_images(5, 900, 3, 4, 4)
    images = (images * np.random.RandomState(6).rand(900, 1, 1, 1) ** 3).astype(np.uint8)
    check(images[:200], images[200:], k=50, block=128)


@pytest.mark.parametrize(
    "limits",
    [
        dict(_QUERIES=7, _ROWS=20, _LISTED=64),
        dict(_HELD=0),
        dict(_OPERAND=640, _ELEMENTS=100, _HELD=0),
        dict(_CHUNK=64),
        dict(_GROUP=1),
        dict(_GROUP=5, _INT8_SLICE=16, _FLOAT_SLICE=24),
    ],
)
def test_limits_do_not_matter(digits, limits, arithmetic, monkeypatch):
    for name, value in limits.items():
        monkeypatch.setattr(knn if hasattr(knn, name) else products, name, value)
    check(digits[:50], digits[30:330], k=4)


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
def test_extreme_pixels(shape, arithmetic):
    """Black, white and checkered images make the largest sums there are."""
    noise = random_images(1, 20, *shape)
    extremes = np.where(noise > 127, 255, 0).astype(np.uint8)
    flat = np.stack([np.full(shape, value, dtype=np.uint8) for value in (0, 255, 127, 128)])
    images = np.concatenate([extremes, flat, noise])
    check(images, images[::-1].copy(), k=4, block=9)


def test_sums_beyond_32_bits(arithmetic):
    """3 * 256 * 256 pixels: |a|^2 = 3.2e9 > 2^31."""
    extremes = np.where(random_images(7, 8, 3, 256, 256) > 250, 255, 0).astype(np.uint8)
    images = np.concatenate([extremes, 255 - extremes, extremes // 2])
    check(images[::6], images, k=24)


def test_int8_products_are_exact():
    """Whatever the shape, also of slices of wider matrices; the probe that decides did not see these."""
    if not products.int8_works(torch.device("cpu")):
        pytest.skip("no fast exact int8 product here")
    for dim in (16, 32, 784):
        for q in (1, 2, 17, 64):
            for r in (1, 2, 31, 64):
                a = torch.randint(-128, 128, (q, dim + 16), dtype=torch.int8)[:, :dim]
                b = torch.randint(-128, 128, (r, dim + 16), dtype=torch.int8)[:, 16:]
                product = products.int8_product(a, b, torch.empty(q, r, dtype=torch.int32))
                assert torch.equal(product.to(torch.int64), a.to(torch.int64) @ b.to(torch.int64).T), (q, r, dim)


def test_a_saturating_or_missing_int8_product_is_not_used(monkeypatch):
    def saturating(a, b, out=None):
        pairs = (a[:, :, None].to(torch.int32) * b.to(torch.int32)).unflatten(1, (-1, 2)).sum(2)
        return pairs.clamp(-(2**15), 2**15 - 1).sum(1).to(torch.int32)

    def refusing(a, b, out=None):
        raise RuntimeError("not on this device")

    for function in (saturating, refusing):
        monkeypatch.setattr(torch, "_int_mm", function)
        assert not products.int8_works.__wrapped__(torch.device("cpu"))
    monkeypatch.delattr(torch, "_int_mm")
    assert not products.int8_works.__wrapped__(torch.device("cpu"))


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


def test_one_reference_many_queries(digits):
    neighbors = Neighbors(digits[:500])
    assert len(neighbors) == 500 and neighbors.shape == (1, 8, 8)
    for part, k in ((digits[500:510], 1), (digits[600:601], 50), (digits[:0], 2), (digits[700:900], 3)):
        for a, b in zip(neighbors.query(part, k), nearest_neighbors(part, digits[:500], k)):
            np.testing.assert_array_equal(a, b)


def test_memory_mapped_reference_is_neither_copied_nor_written(digits, tmp_path):
    np.save(tmp_path / "images.npy", digits[:300])
    mapped = np.load(tmp_path / "images.npy", mmap_mode="r")
    neighbors = Neighbors(mapped)
    assert neighbors._rows.data_ptr() == mapped.ctypes.data
    np.testing.assert_array_equal(neighbors.query(digits[:9])[1], nearest_neighbors(digits[:9], digits[:300])[1])


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("k", [1, 3, 8])
def test_self_query(digits, k, dense):
    """Digits, twice each, one of them six times: a row is no neighbour of itself, its copies are."""
    reference = np.concatenate([digits[:40], digits[:40], np.repeat(digits[:1], 4, axis=0)])
    distance, index = Neighbors(reference, block=32, dense=dense).self_query(k)
    for i in range(len(reference)):
        others = np.delete(np.arange(len(reference)), i)
        expected_distance, expected_index = plain_neighbors(reference[i : i + 1], reference[others], k)
        np.testing.assert_array_equal(index[i], others[expected_index[0]])
        np.testing.assert_allclose(distance[i], expected_distance[0], rtol=1e-15)
    assert distance[0, 0] == 0 and index[0, 0] == 40


@pytest.mark.slow
def test_memory():
    """60,000 images of 1024 pixels: not much more than the rearranged copy (60 MB)."""
    script = """if True:
        import resource
        import numpy as np
        from memorization.measure.knn import Neighbors

        peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        block = np.random.RandomState(0).randint(0, 256, (6000, 1, 32, 32), dtype=np.uint8)
        reference = np.concatenate([block + np.uint8(i) for i in range(10)])
        Neighbors(block[:50]).query(block[:50])  # what libraries need
        before = peak()
        Neighbors(reference).query(block[:2100], k=50)
        print(peak() - before)
    """
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 400  # MiB


# ----------------------------------------------------------------------------
# Float vectors.


def check_vectors(queries, reference, k=2, rtol=1e-14, **kwargs):
    expected_distance, expected_index = plain_neighbors(queries, reference, k)
    found = [nearest_neighbors(queries, reference, k, dense=dense, **kwargs) for dense in (True, False)]
    for distance, index in found:
        assert distance.dtype == np.float64 and index.dtype == np.int64
        np.testing.assert_array_equal(index, expected_index)
        np.testing.assert_allclose(distance, expected_distance, rtol=rtol, atol=0)
    np.testing.assert_array_equal(*(distance for distance, _ in found))
    return distance, index


@pytest.mark.parametrize("k", [1, 2, 50])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("size", [1, 2, 37, 512])
def test_vectors(size, dtype, k):
    random = np.random.RandomState(size)
    queries, reference = (random.randn(n, size).astype(dtype) for n in (70, 3000))
    check_vectors(queries, reference, k, block=700)


def test_vectors_that_float32_cannot_tell_apart():
    """Distances that differ by 1e-10 of their size, far from the origin, in scrambled order."""
    random = np.random.RandomState(0)
    direction = random.randn(64)
    direction /= np.linalg.norm(direction)
    order = random.permutation(2000)
    reference = 1000 + 5 * direction * (1 + 1e-10 * order[:, np.newaxis]) + 0 * random.randn(2000, 64)
    queries = np.full((3, 64), 1000.0)
    _, index = check_vectors(queries, reference, k=50, rtol=1e-12)
    np.testing.assert_array_equal(index[0], np.argsort(order)[:50])
    rounded = torch.cdist(*(torch.from_numpy(x).to(torch.float32) for x in (queries, reference)))
    assert not np.array_equal(rounded.topk(50, dim=1, largest=False).indices.numpy(), index)


def test_vectors_with_an_outlier_and_many_copies():
    random = np.random.RandomState(1)
    base = random.randn(40, 16)
    reference = np.concatenate([base, 1e12 * base[:1], np.repeat(base, 30, axis=0), base + 1e-9])
    distance, index = check_vectors(np.concatenate([base[:7], reference[40:41]]), reference, k=33, block=100, rtol=1e-9)
    np.testing.assert_array_equal(index[1, :3], [1, 71, 72])
    assert (distance[1:7, :31] == 0).all() and (distance[1:7, 31:] > 0).all()


@pytest.mark.parametrize("scale", [1e-140, 1e-30, 1e30, 1e140])
def test_vectors_of_any_size(scale):
    random = np.random.RandomState(2)
    queries, reference = scale * random.randn(9, 20), scale * random.randn(300, 20)
    queries[0] *= 1e7  # far away
    if scale < 1:
        queries[1] /= scale**1.5  # so far that float32 products are out of the question
    check_vectors(queries, reference, k=5, rtol=1e-12)


def test_equal_vectors():
    _, index = check_vectors(np.ones((3, 8)), np.full((500, 8), 2.0), k=4, block=50)
    assert (index == [0, 1, 2, 3]).all()


def test_low_precision_of_matrix_products_is_not_used(monkeypatch):
    def product(a, b, multiply=products.float32_product):
        assert torch.get_float32_matmul_precision() == "highest"
        return multiply(a, b)

    monkeypatch.setattr(products, "float32_product", product)
    random = np.random.RandomState(3)
    queries, reference = (random.randn(n, 256).astype(np.float32) for n in (50, 4000))
    torch.set_float32_matmul_precision("medium")
    try:
        check_vectors(queries, reference, k=50)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize("dense", [False, True])
def test_self_query_of_vectors(dense):
    vectors = np.random.RandomState(5).randn(200, 12)
    vectors[150] = vectors[3]
    distance, index = Neighbors(vectors, dense=dense).self_query(2)
    expected = np.sqrt(((vectors[:, np.newaxis] - vectors) ** 2).sum(2))
    np.fill_diagonal(expected, np.inf)
    np.testing.assert_array_equal(index, np.argsort(expected, axis=1, kind="stable")[:, :2])
    assert index[3, 0] == 150 and index[150, 0] == 3 and distance[3, 0] == 0


# ----------------------------------------------------------------------------
# Dense.


@pytest.mark.parametrize("limits", [(1 << 10, 1 << 8, 1 << 8), (1 << 12, 1 << 20, 1 << 20)])
@pytest.mark.parametrize("n", [1, 31, 32, 33, 500])
def test_dense_blocks_do_not_matter(n, limits, digits, monkeypatch):
    """Streamed, with blocks of few rows, some queries at a time; 5 x 7 pixels are no multiple of 8."""
    monkeypatch.setattr(knn_dense._Limits, "of", lambda device: knn_dense._Limits(*limits))
    monkeypatch.setattr(knn_dense._Dense, "_fits", lambda self: False)
    monkeypatch.setattr(knn_dense, "CANDIDATES", 5)
    images = np.concatenate([digits[: n // 2], digits[: n - n // 2]])[..., :5, :7]  # each twice
    vectors = images.reshape(n, -1) / 256  # whose squares add up without rounding, so that ties are ties
    for k in {1, min(n, 40), n}:
        check(digits[3:73, :, :5, :7], images, k)
        check_vectors(digits[3:73, :, :5, :7].reshape(70, -1) / 256, vectors, k)


def test_few_vectors_are_searched_twice(monkeypatch):
    """The bound of float32's error decides unless distances are equal en masse: it is neither lax nor idle."""
    searched = []

    def search(self, rows, k, real=knn._Vectors.search):
        searched.append(len(rows))
        return real(self, rows, k)

    monkeypatch.setattr(knn._Vectors, "search", search)
    random = np.random.RandomState(0)
    reference = random.randn(5000, 300).astype(np.float32)
    reference[0] *= 1e4  # an outlier does not spoil the others' bounds
    queries = np.concatenate([random.randn(50, 300), reference[100:150] + 1e-3]).astype(np.float32)
    neighbors = Neighbors(reference, dense=True)
    _, index = neighbors.query(queries)
    assert not searched
    np.testing.assert_array_equal(index, plain_neighbors(queries, reference, 2)[1])
    reference[1000:1200] = reference[1000]
    queries[7] = reference[1000]
    check_vectors(queries, reference, k=2)
    assert searched == [1, len(queries)]


@pytest.mark.parametrize("kind", ["images", "vectors"])
def test_dense_search_is_a_few_large_operations(kind, digits):
    """A GPU starts each in some microseconds and must not wait: the same number for any queries, at most one look."""
    reference = digits if kind == "images" else digits.reshape(-1, 64) / 16
    neighbors = Neighbors(reference, dense=True)
    counts = []
    for queries in (8, 64):
        rows = torch.from_numpy(reference[:queries]).flatten(1)
        with Operations() as operations:
            neighbors._part.search(rows, 2)
        counts.append(operations.count)
        assert operations.waits <= (kind == "vectors")
    assert counts[0] == counts[1] < 80


@pytest.mark.parametrize("dense", [False, True])
def test_exact_under_autocast_of_the_caller(digits, dense):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = Neighbors(digits[:300], dense=dense).query(digits[250:350], 3)
    for value, expected in zip(found, plain_neighbors(digits[250:350], digits[:300], 3)):
        np.testing.assert_allclose(value, expected, rtol=1e-14)


def test_dense_on_cuda_only_unless_told(digits):
    assert isinstance(Neighbors(digits)._part, knn._Pixels)
    assert isinstance(Neighbors(digits, dense=True)._part, knn_dense.DensePixels)
    assert isinstance(Neighbors(digits.reshape(-1, 64) / 16, dense=True)._part, knn_dense.DenseVectors)


# ----------------------------------------------------------------------------
# Projected.


@pytest.fixture
def projected(monkeypatch):
    """Whatever the processor and the size; the numbers of decided queries are listed."""
    decided = []

    def search(self, rows, k, real=Projection.search):
        found = real(self, rows, k)
        decided.append(int(found[2].sum()))
        return found

    monkeypatch.setattr(Projection, "search", search)
    monkeypatch.setattr(knn._Pixels, "_pays", lambda self, k: self._asked and k <= 30)
    return decided


@pytest.mark.parametrize("axes", [1, 10, 64])
@pytest.mark.parametrize("k", [1, 2, 30])
def test_projected_search_is_exact(k, axes, digits, projected, monkeypatch):
    """Also with ties, among images that are there three times, and for queries that it leaves to the other search."""
    monkeypatch.setattr(knn_projected, "AXES", axes)
    reference = np.concatenate([digits[:900], digits[:300], 255 - digits[:60], digits[:301]])
    random = np.random.RandomState(k)
    copies = np.clip(digits[:70] + random.randint(-8, 9, (70, 1, 8, 8)), 0, 255).astype(np.uint8)
    queries = np.concatenate([digits[:20], copies, digits[1000:1070], random_images(0, 20, 1, 8, 8)])
    check(queries, reference, k)
    assert (projected[0] > 100) if axes == 64 and k == 2 else projected


def test_projected_search_gives_up_on_noise(digits, projected, monkeypatch):
    """Where most queries are about as far from all images, the others are not tried."""
    monkeypatch.setattr(knn_projected, "AXES", 4)
    monkeypatch.setattr(knn, "_TRIED", 16)
    check(random_images(5, 60, 1, 8, 8), digits[:900], 2)
    assert len(projected) == 1 and projected[0] < 8
    projected.clear()
    monkeypatch.setattr(knn_projected, "AXES", 64)
    check(digits[:60], digits[:900], 2)
    assert projected == [16, 16, 16, 12]


def test_projected_search_of_extremes(projected):
    """Black, white, checkered, one grey level apart; in a subspace, where the residual is rounding alone."""
    noise = random_images(3, 300, 1, 40, 40)
    extremes = np.where(noise > 127, 255, 0).astype(np.uint8)
    flat = np.stack([np.full((1, 40, 40), value, dtype=np.uint8) for value in range(256)])
    check(np.concatenate([flat[::20], extremes[:5]]), np.concatenate([flat, extremes, flat]), 3)
    stripes = np.repeat(random_images(4, 500, 1, 40, 1), 40, axis=3)
    near = stripes[:40].copy()
    near[:, 0, 0, 0] ^= 1
    check(near, np.concatenate([stripes, near]), 4)
    assert len(projected) == 2


def test_projected_once_there_are_many_queries(digits, monkeypatch):
    """From the query on with which it pays, counted over all calls; the results stay those of the definition."""
    monkeypatch.setattr(products, "int8_works", lambda device: False)
    monkeypatch.setattr(knn, "_MANY_ROWS", 500)
    monkeypatch.setattr(knn, "_MANY_QUERIES", 60)
    reference = np.kron(digits[:600], np.ones((1, 1, 3, 3), np.uint8))
    queries = np.kron(digits[590:670], np.ones((1, 1, 3, 3), np.uint8))
    queries[:, :, ::5] ^= 3
    neighbors = Neighbors(reference)
    for part in np.split(queries, 4):
        for found, expected in zip(neighbors.query(part, 2), plain_neighbors(part, reference, 2)):
            np.testing.assert_allclose(found, expected, rtol=1e-14)
        assert (neighbors._part._projection is not None) == (neighbors._part._asked >= 60)
    assert neighbors._part._asked == 80


# ----------------------------------------------------------------------------
# Several processes.

SHARDED = """if True:
    import sys
    import numpy as np
    from memorization.measure.knn import Neighbors
    from torch_utils import distributed as dist

    dist.init("cpu")
    data, rank = np.load(sys.argv[1]), dist.get_rank()
    out = {}
    for name, dense in [("images", False), ("vectors", False), ("images", True), ("vectors", True)]:
        neighbors = Neighbors(data[name], shard=True, dense=dense)
        assert len(neighbors._rows) == len(data[name]) // 2
        for i, share in enumerate([(0, 30, 75), (0, 0, 5), (0, 5, 5), (0, 0, 0)]):
            queries = data[name + "_queries"][share[rank] : share[rank + 1]]
            for k in (1, 7, 90):
                out[f"{name}-{dense}-{i}-{k}-d"], out[f"{name}-{dense}-{i}-{k}-i"] = neighbors.query(queries, k)
        out[f"{name}-{dense}-self-d"], out[f"{name}-{dense}-self-i"] = neighbors.self_query(3)
        one = Neighbors(data[name][:1], shard=True, dense=dense)
        out[f"{name}-{dense}-one"] = one.query(queries[:0] if rank else queries, 1)[1]
        messages = []
        for bad, k in ((data[name][..., :2], 1), (data[name][:3], 1 + rank), (data[name][:3], 1000)):
            try:
                neighbors.query(data[name][:3] if rank == 0 and k == 1 else bad, k)
            except ValueError as err:
                messages.append(str(err))
        out[f"{name}-{dense}-errors"] = messages
    np.savez(f"{sys.argv[2]}/{rank}.npz", **out)
    dist.shutdown()
"""


@pytest.mark.slow
def test_two_processes_share_the_reference(digits, tmp_path):
    random = np.random.RandomState(0)
    data = dict(
        images=np.concatenate([digits[:50], digits[:50]]), images_queries=digits[10:85],
        vectors=random.randint(-2, 3, (100, 3)) / 10, vectors_queries=random.randint(-2, 3, (75, 3)) / 10,
    )  # fmt: skip
    np.savez(tmp_path / "data.npz", **data)
    (tmp_path / "script.py").write_text(SHARDED)
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", tmp_path / "script.py",
         tmp_path / "data.npz", tmp_path], capture_output=True, text=True, cwd=ROOT, timeout=120,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    ranks = [np.load(tmp_path / f"{rank}.npz") for rank in (0, 1)]
    for name, dense in itertools.product(("images", "vectors"), (False, True)):
        whole, queries = Neighbors(data[name]), data[name + "_queries"]
        for i, share in enumerate([(0, 30, 75), (0, 0, 5), (0, 5, 5), (0, 0, 0)]):
            for k in (1, 7, 90):
                for rank, found in enumerate(ranks):
                    distance, index = whole.query(queries[share[rank] : share[rank + 1]], k)
                    np.testing.assert_array_equal(found[f"{name}-{dense}-{i}-{k}-d"], distance)
                    np.testing.assert_array_equal(found[f"{name}-{dense}-{i}-{k}-i"], index)
        for found in ranks:
            distance, index = whole.self_query(3)
            np.testing.assert_array_equal(found[f"{name}-{dense}-self-d"], distance)
            np.testing.assert_array_equal(found[f"{name}-{dense}-self-i"], index)
            assert (found[f"{name}-{dense}-one"] == 0).all()
            assert "compare" in found[f"{name}-{dense}-errors"][0]
            assert "ask for the same number" in found[f"{name}-{dense}-errors"][1]
            assert "there are 100 reference" in found[f"{name}-{dense}-errors"][2]


# ----------------------------------------------------------------------------
# Wrong input.


GOOD = np.zeros((4, 3, 8, 8), dtype=np.uint8)
VECTORS = np.ones((4, 8))


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
        (GOOD, VECTORS, {}, "The images are uint8 images, the reference float vectors"),
        (VECTORS, GOOD, {}, "The images are float vectors, the reference uint8 images"),
        (VECTORS[:, :3], VECTORS, {}, "The vectors are of length 3, the reference vectors of length 8"),
        (VECTORS * np.nan, VECTORS, {}, "`images` holds numbers that are not finite"),
        (VECTORS, VECTORS * np.inf, {}, "`reference` holds numbers that are not finite"),
        (VECTORS[:, :0], VECTORS, {}, r"not float64 \[4, 0\]"),
    ],
)
def test_bad_inputs(images, reference, kwargs, message):
    with pytest.raises(ValueError, match=message):
        nearest_neighbors(images, reference, **kwargs)


def test_self_query_needs_another_image():
    with pytest.raises(ValueError, match="2 nearest others need at least 3 reference images"):
        Neighbors(GOOD[:2]).self_query(2)
