"""The closed-form optimum against its definition in float64 (tests/reference/optimum.npz), and what is built on it."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from builders import Operations, torchrun
from conftest import ROOT
from sklearn.datasets import load_digits

import generate_optim
import training.optim
import training.optim_dense
from training.decoded import decoded_images
from training.optim import OptimEDM, load_optimum, split_tf32
from training.optim_dense import bfloat16_terms
from training.optim_sums import plain_optimum
from training.samplers import StackedRandomGenerator, edm_sampler
from training.trace import read_trace

REFERENCE = np.load(Path(__file__).parent / "reference" / "optimum.npz")
DIGITS = np.round(load_digits().images * 255 / 16).astype(np.uint8)[:, None]
LABELS = load_digits().target


@pytest.mark.parametrize("chunk", [7, 200, 4096])
def test_equals_the_definition(chunk):
    net = OptimEDM(REFERENCE["images"], chunk=chunk)
    x, sigma = torch.from_numpy(REFERENCE["x"]), torch.from_numpy(REFERENCE["sigma"])
    np.testing.assert_allclose(net(x, sigma), REFERENCE["out"], atol=1e-4)
    log_p = net.log_density(x, sigma) + np.log(200) + 96 * (2 * np.pi * sigma**2).log()
    np.testing.assert_allclose(log_p.numpy(), REFERENCE["log_p"], rtol=1e-5, atol=1e-4)


@pytest.fixture(autouse=True)
def skip_in_small_sets_too(monkeypatch):
    monkeypatch.setattr(training.optim, "_WORTH", 0)


NEAR = np.concatenate([DIGITS, DIGITS[:5]])  # with near-duplicates: one pixel, one level
NEAR[len(DIGITS) :, 0, 3, 3] ^= 1


@pytest.mark.parametrize("sigma", [0.002, 0.005, 0.02, 0.1, 0.3, 1, 2, 5, 20, 80])
@pytest.mark.parametrize("how", [dict(skip=True), dict(skip=False), dict(dense=True)], ids=["skip", "all", "dense"])
def test_equals_the_definition_at_every_noise_level(sigma, how):
    random = np.random.RandomState(0)
    picked = np.concatenate([np.arange(5), random.choice(len(NEAR), 20, replace=False)])
    x = NEAR[picked] / 127.5 - 1 + sigma * random.randn(25, 1, 8, 8)
    net = OptimEDM(NEAR, chunk=500, **how)
    expected, w, log_p = (t.numpy() for t in plain_optimum(NEAR, x, sigma))
    out = net(torch.from_numpy(x), torch.tensor([sigma]))
    np.testing.assert_allclose(out, expected, atol=1e-5 if how != dict(dense=True) else 1e-6)
    np.testing.assert_allclose(net.log_density(torch.from_numpy(x), torch.tensor([sigma])), log_p, rtol=1e-6)
    posterior = net.posterior(torch.from_numpy(x), torch.tensor([sigma]))
    entropy = -(w * np.log(np.maximum(w, 1e-300))).sum(1)
    np.testing.assert_allclose(posterior.effective_number, np.exp(entropy), rtol=1e-4)
    np.testing.assert_allclose(posterior.weight, w.max(1), rtol=1e-4)
    np.testing.assert_allclose(w[np.arange(25), posterior.nearest], w.max(1), rtol=1e-4)


def test_chunks_without_weight_are_passed_over():
    images = np.sort(NEAR.reshape(len(NEAR), -1), axis=0).reshape(NEAR.shape)  # the first chunk is far from the last
    x = images[:2] / 127.5 - 1
    net = OptimEDM(images, chunk=100)
    out = net(torch.from_numpy(x), torch.tensor(0.05))
    np.testing.assert_allclose(out.flatten(1), plain_optimum(images, x, 0.05)[0].flatten(1), atol=1e-5)


def test_near_duplicates_share_the_weight_at_small_sigma():
    """Two training images that differ by one level in one pixel: naive |x|^2 - 2 x.y + |y|^2 would lose it."""
    net = OptimEDM(NEAR)
    x = torch.from_numpy(NEAR[:1] / 127.5 - 1)
    step = 1 / 127.5
    for sigma in [0.002, 0.004, 0.008]:
        posterior = net.posterior(x, torch.tensor([sigma], dtype=torch.float64))
        assert posterior.nearest.item() == 0
        expected = 1 / (1 + np.exp(-(step**2) / (2 * sigma**2)))
        assert posterior.weight.item() == pytest.approx(expected, rel=1e-9)


def test_skipping_changes_nothing_along_a_path():
    """Points that jump about, too: memory of one call must not mislead the next."""
    random = torch.Generator().manual_seed(0)
    fast, plain = OptimEDM(NEAR), OptimEDM(NEAR, skip=False)
    noise = torch.randn(24, 1, 8, 8, generator=random, dtype=torch.float64)
    target = torch.from_numpy(NEAR[:24] / 127.5 - 1)
    for k, sigma in enumerate([80, 10, 3, 2, 1.5, 1, 0.7, 0.5, 0.3, 0.2, 0.1, 0.05, 0.01, 0.002, 1, 0.1, 40, 0.05]):
        if k % 5 == 4:
            target = target.roll(1, 0)  # every row now belongs to another image
        x = target + sigma * (noise + 0.1 * torch.randn(noise.shape, generator=random, dtype=torch.float64))
        torch.testing.assert_close(fast(x, torch.tensor(sigma)), plain(x, torch.tensor(sigma)), rtol=0, atol=1e-5)


# ----------------------------------------------------------------------------
# Mass near-duplicates, and the dense evaluation.


def crowd(count, source=DIGITS[5], seed=0):
    """Copies of one image, each with one pixel changed by one level, among other images; on both sides of them."""
    random = np.random.RandomState(seed)
    copies = np.repeat(source[None], count, axis=0).astype(int)
    pixel = random.randint(64, size=count)
    copies.reshape(count, -1)[np.arange(count), pixel] += random.choice([-1, 1], count)
    return np.concatenate([DIGITS[100:300], copies.clip(0, 255).astype(np.uint8), DIGITS[300:400]])


@pytest.mark.parametrize("count, sigma", [(600, 0.002), (600, 0.004), (600, 0.03), (5000, 0.01), (3000, 0.3)])
@pytest.mark.parametrize("how", [dict(), dict(skip=False), dict(dense=True)], ids=["skip", "all", "dense"])
def test_mass_near_duplicates(count, sigma, how):
    """float32 cannot tell them apart: it was off by 7.7e-3, with an effective number of 21 instead of 1.48."""
    images = crowd(count)
    random = np.random.RandomState(1)
    picked = 200 + random.choice(count, 6, replace=False)
    x = images[picked] / 127.5 - 1 + sigma * random.randn(6, 1, 8, 8)
    expected, w, log_p = (t.numpy() for t in plain_optimum(images, x, sigma))
    net, x, sigma = OptimEDM(images, **how), torch.from_numpy(x), torch.tensor(sigma, dtype=torch.float64)
    for _ in range(2):  # from memory, too
        np.testing.assert_allclose(net(x, sigma), expected, atol=2e-6)
        posterior = net.posterior(x, sigma)
        number = np.exp(-(w * np.log(np.maximum(w, 1e-300))).sum(1))
        np.testing.assert_allclose(posterior.effective_number, number, rtol=1e-4)
        np.testing.assert_allclose(w[np.arange(6), posterior.nearest], w.max(1), rtol=1e-3)
        np.testing.assert_allclose(net.log_density(x, sigma), log_p, rtol=1e-7, atol=1e-4)
    net.trace = []
    np.testing.assert_allclose(net(x, sigma), expected, atol=2e-6)
    ((_, traced),) = net.trace
    np.testing.assert_allclose(traced.effective_number, number, rtol=1e-4)
    np.testing.assert_allclose(w[np.arange(6), traced.nearest], w.max(1), rtol=1e-3)


def test_mass_near_duplicates_of_a_class():
    images = np.concatenate([crowd(700), crowd(900, DIGITS[9], seed=3)])
    labels = np.repeat([2, 0], [1000, 1200])
    seen = labels == np.array([[0], [2]])
    x = images[[1300, 500]] / 127.5 - 1 + 0.003 * np.random.RandomState(0).randn(2, 1, 8, 8)
    expected, w, _ = plain_optimum(images, x, 0.003, seen)
    for how in (dict(), dict(dense=True)):
        net = OptimEDM(images, labels, **how)
        asked = torch.from_numpy(x), torch.tensor(0.003, dtype=torch.float64), torch.tensor([0, 2])
        np.testing.assert_allclose(net(*asked), expected, atol=2e-6)
        assert net.posterior(*asked).nearest.tolist() == w.argmax(1).tolist()


@pytest.mark.parametrize("size", [64, 200, 1 << 20])  # images per block; fewer than the list of the nearest, too
def test_dense_blocks_are_merged(size, monkeypatch):
    monkeypatch.setattr(training.optim_dense, "block_size", lambda batch: size)
    random = np.random.RandomState(0)
    for sigma in (0.05, 1.0, 6.0, 80.0):
        x = DIGITS[:7] / 127.5 - 1 + sigma * random.randn(7, 1, 8, 8)
        labels = torch.tensor([3, 1, 4, 1, 5, 9, 2])
        seen = LABELS == labels[:, None].numpy()
        for net, what in ((OptimEDM(DIGITS, dense=True), None), (OptimEDM(DIGITS, LABELS, dense=True), seen)):
            expected, w, _ = plain_optimum(DIGITS, x, sigma, what)
            asked = torch.from_numpy(x), torch.tensor(sigma), labels
            np.testing.assert_allclose(net(*asked), expected, atol=1e-6)
            posterior, w = net.posterior(*asked), w.numpy()
            assert posterior.nearest.tolist() == w.argmax(1).tolist()
            np.testing.assert_allclose(posterior.weight, w.max(1), rtol=1e-4)


@pytest.mark.parametrize("labels", [None, LABELS], ids=["all", "classes"])
@pytest.mark.parametrize("ref_size", [150, 700])
def test_dense_and_skipping_draw_the_same_subsets(labels, ref_size):
    x, asked = torch.randn(10, 1, 8, 8), torch.arange(10)
    a, b = OptimEDM(DIGITS, labels, ref_size=ref_size), OptimEDM(DIGITS, labels, ref_size=ref_size, dense=True)
    for sigma in (torch.tensor(4.0), torch.tensor(0.3)):
        torch.testing.assert_close(a(x, sigma, asked), b(x, sigma, asked), rtol=0, atol=1e-6)
        torch.testing.assert_close(a.log_density(x, sigma, asked), b.log_density(x, sigma, asked), rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("dense", [False, True])
def test_a_subset_without_an_image_of_the_class(dense):
    net = OptimEDM(DIGITS, LABELS, ref_size=2, dense=dense)
    with pytest.raises(ValueError, match="no image of class"):
        net(torch.zeros(3, 1, 8, 8), torch.tensor(4.0), torch.arange(3))


def test_bfloat16_terms_hold_24_bits():
    a = torch.randn(50, 3) * torch.logspace(-3, 3, 50)[:, None]
    terms = bfloat16_terms(a, 3)
    assert terms.dtype == torch.bfloat16
    assert torch.equal(terms.view(3, 50, 3).double().sum(0), a.double())
    pixels = torch.arange(256)
    assert torch.equal(pixels.bfloat16().long(), pixels)


@pytest.mark.parametrize("conditional", [False, True])
def test_dense_evaluation_is_a_few_large_operations(conditional):
    """A GPU starts each in some microseconds and must not wait: the same number for any batch, one look at a result."""
    counts = []
    for batch in (8, 64):
        net = OptimEDM(DIGITS, LABELS if conditional else None, dense=True)
        asked = torch.randn(batch, 1, 8, 8), torch.tensor(3.0), torch.zeros(batch, dtype=torch.int64)
        net(*asked)  # what is prepared once
        with Operations() as operations:
            net(*asked)
        counts.append(operations.count)
        assert operations.waits <= 1
    assert counts[0] == counts[1] < 80


# ----------------------------------------------------------------------------
# Skipping.


def test_most_calls_of_a_sampler_read_few_images(monkeypatch):
    passes = []
    dense = OptimEDM._dense
    monkeypatch.setattr(OptimEDM, "_dense", lambda self, *args: passes.append(len(args[1])) or dense(self, *args))
    net = OptimEDM(DIGITS)
    rnd = StackedRandomGenerator("cpu", range(16))
    edm_sampler(net, rnd.randn([16, 1, 8, 8]))
    assert sum(passes) < 0.7 * 35 * 16  # rows that were compared with all images


def test_every_call_finds_the_images_that_matter_although_it_skips():
    """A far outlier, which the bounds must not throw away with the rest."""
    images = DIGITS.copy()
    images[77] = 255 - images[77]
    net = OptimEDM(images)
    x = torch.from_numpy(images[76:78] / 127.5 - 1)
    for sigma in [3.0, 1.0, 0.3, 0.1]:
        assert net.posterior(x, torch.tensor(sigma)).nearest.tolist() == [76, 77]
        x = x.flip(0)
        assert net.posterior(x, torch.tensor(sigma)).nearest.tolist() == [77, 76]
        x = x.flip(0)


def test_constant_borders_are_cut_off_and_put_back():
    padded = np.pad(DIGITS[:300], [(0, 0), (0, 0), (4, 4), (4, 4)])
    inner, outer = OptimEDM(DIGITS[:300]), OptimEDM(padded)
    x = torch.randn(6, 1, 16, 16, dtype=torch.float64)
    sigma = torch.tensor(1.5)
    out = outer(x, sigma)
    torch.testing.assert_close(out[:, :, 4:12, 4:12], inner(x[:, :, 4:12, 4:12], sigma))
    assert (out[:, :, :4] == -1).all()
    single = OptimEDM(DIGITS[:1])  # nothing varies
    torch.testing.assert_close(
        single(x[:, :, :8, :8], sigma), torch.from_numpy(DIGITS[:1] / 127.5 - 1).float().expand(6, -1, -1, -1)
    )


def test_log_density_is_a_density():
    """Against scipy's normal densities, with the border that `OptimEDM` cuts off."""
    from scipy.special import logsumexp
    from scipy.stats import multivariate_normal

    images = np.pad(DIGITS[:30], [(0, 0), (0, 0), (1, 1), (1, 1)])
    x = images[:4] / 127.5 - 1 + 0.5 * np.random.RandomState(0).randn(4, 1, 10, 10)
    means = images.reshape(30, -1) / 127.5 - 1
    logs = [multivariate_normal.logpdf(x.reshape(4, -1), mean, 0.25 * np.eye(100)) for mean in means]
    expected = logsumexp(logs, axis=0) - np.log(30)
    out = OptimEDM(images).log_density(torch.from_numpy(x), torch.tensor(0.5))
    np.testing.assert_allclose(out, expected, rtol=1e-9)


def test_tf32_terms_add_up():
    a = torch.randn(1000) * torch.logspace(-6, 6, 1000)
    terms = split_tf32(a)
    assert torch.equal(terms[0].double() + terms[1].double() + terms[2].double(), a.double())
    for term in terms:  # 11 significant bits: nothing is lost where the 13 low bits of the mantissa are cut
        assert torch.equal((term.view(torch.int32) & -0x2000).view(torch.float32), term)


def test_ref_size_takes_another_subset_at_each_call():
    net = OptimEDM(DIGITS, ref_size=100)
    x, sigma = torch.zeros(1, 1, 8, 8), torch.tensor(50.0)
    first, second = net(x, sigma), net(x, sigma)
    assert (first - second).abs().max() > 1e-3
    assert (first - OptimEDM(DIGITS)(x, sigma)).abs().max() < 0.5
    again = OptimEDM(DIGITS, ref_size=100)
    assert torch.equal(again(x, sigma), first)


def test_only_images_of_the_class_carry_weight():
    net, part = OptimEDM(DIGITS, LABELS, chunk=100), OptimEDM(DIGITS[LABELS == 3])
    assert net.label_dim == 10
    x, sigma = torch.randn(4, 1, 8, 8) * 5, torch.full([4], 5.0)
    labels = torch.full([4], 3)
    torch.testing.assert_close(net(x, sigma, labels), part(x, sigma))
    torch.testing.assert_close(net(x, sigma, torch.eye(10)[labels]), part(x, sigma))
    mixed = net(x, sigma, torch.tensor([3, 0, 3, 9]))
    torch.testing.assert_close(mixed[2], part(x, sigma)[2])
    assert (mixed[1] - part(x, sigma)[1]).abs().max() > 1e-3


def test_unique_labels_return_the_image():
    net = OptimEDM(DIGITS[:20], np.arange(20))
    out = net(torch.randn(20, 1, 8, 8), torch.full([20], 80.0), torch.arange(20))
    np.testing.assert_allclose(out, DIGITS[:20] / 127.5 - 1, atol=1e-6)


def test_sampling_it_replays_training_images():
    net = OptimEDM(DIGITS[:100])
    rnd = StackedRandomGenerator("cpu", range(32))
    out = edm_sampler(net, rnd.randn([32, 1, 8, 8]), randn_like=rnd.randn_like)
    pixels = (out * 127.5 + 128).clip(0, 255).to(torch.uint8)
    distance = (pixels[:, None].int() - torch.from_numpy(DIGITS[:100]).int()).abs().amax((2, 3, 4)).amin(1)
    assert distance.max() <= 1


def test_loads_zip_and_npz_alike(digits_zip, tmp_path):
    np.savez(tmp_path / "d.npz", images=DIGITS, labels=LABELS)
    x, sigma = torch.randn(2, 1, 8, 8), torch.tensor([3.0])
    torch.testing.assert_close(load_optimum(digits_zip)(x, sigma), load_optimum(tmp_path / "d.npz")(x, sigma))
    labels = torch.tensor([1, 2])
    a, b = load_optimum(digits_zip, cond=True), load_optimum(tmp_path / "d.npz", cond=True)
    torch.testing.assert_close(a(x, sigma, labels), b(x, sigma, labels))


def test_wrong_input(tmp_path):
    with pytest.raises(ValueError, match=r"uint8 \[N, C, H, W\]"):
        OptimEDM(np.zeros([3, 1, 8, 8]))
    with pytest.raises(ValueError, match="for each of the 3 images"):
        OptimEDM(np.zeros([3, 1, 8, 8], np.uint8), np.array([1, 2]))
    with pytest.raises(ValueError, match="no image of class 1"):
        OptimEDM(DIGITS[:2], np.array([0, 2]))(torch.zeros(1, 1, 8, 8), torch.ones(1), torch.tensor([1]))
    with pytest.raises(ValueError, match="class_labels are needed"):
        OptimEDM(DIGITS[:2], np.array([0, 2]))(torch.zeros(1, 1, 8, 8), torch.ones(1))
    np.savez(tmp_path / "a.npz", pictures=DIGITS[:2])
    with pytest.raises(ValueError, match='no array named "images"'):
        load_optimum(tmp_path / "a.npz")
    np.save(tmp_path / "array.npy", DIGITS[:2])
    (tmp_path / "array.npy").rename(tmp_path / "f.npz")
    with pytest.raises(ValueError, match="f.npz"):
        load_optimum(tmp_path / "f.npz")
    np.savez(tmp_path / "g.npz", images=DIGITS[:2], labels=np.array(["cat", "dog"]))
    with pytest.raises(ValueError, match="not numbers"):
        load_optimum(tmp_path / "g.npz", cond=True)
    np.savez(tmp_path / "b.npz", images=DIGITS[:2])
    with pytest.raises(ValueError, match="--cond=1"):
        load_optimum(tmp_path / "b.npz", cond=True)
    (tmp_path / "c.npz").write_bytes(b"PK nothing")
    with pytest.raises(ValueError, match="cannot be read as .npz"):
        load_optimum(tmp_path / "c.npz")
    np.savez(tmp_path / "e.npz", images=np.array([{}], dtype=object))  # an object array is a pickle: refused
    with pytest.raises(ValueError, match="cannot be read as .npz"):
        load_optimum(tmp_path / "e.npz")


# ----------------------------------------------------------------------------
# Large sets: a decoded copy beside the zip, shards over processes.


def test_decoded_copy_is_written_once_and_follows_the_zip(make_zip, tmp_path):
    path = make_zip(DIGITS[:10, 0], None, tmp_path / "d.zip")
    images = decoded_images(path)
    assert isinstance(images, np.memmap) and np.array_equal(images, DIGITS[:10])
    (copy,) = tmp_path.glob("*.npy")
    written = copy.stat().st_mtime_ns
    decoded_images(path)
    assert copy.stat().st_mtime_ns == written
    make_zip(DIGITS[5:12, 0], None, tmp_path / "d.zip")
    assert np.array_equal(decoded_images(path), DIGITS[5:12])
    assert len(list(tmp_path.iterdir())) == 2  # the old copy is gone, no temporary file is left
    (copy,) = tmp_path.glob("*.npy")
    copy.write_bytes(b"nothing")
    with pytest.raises(ValueError, match="delete it"):
        decoded_images(path)
    with pytest.raises(ValueError, match="not a dataset zip"):
        decoded_images(tmp_path)


@pytest.mark.slow
def test_decoded_copy_asked_for_by_several_processes(make_zip, tmp_path):
    path = make_zip(DIGITS[:300, 0], None, tmp_path / "d.zip")
    code = "import sys; from training.decoded import decoded_images; print(int(decoded_images(sys.argv[1]).sum()))"
    jobs = [subprocess.Popen([sys.executable, "-c", code, path], stdout=subprocess.PIPE, cwd=ROOT) for _ in range(3)]
    sums = [int(job.communicate(timeout=60)[0]) for job in jobs]
    assert sums == [int(DIGITS[:300].sum())] * 3 and len(list(tmp_path.iterdir())) == 2


@pytest.mark.slow
@pytest.mark.parametrize("extra", [[], ["--cond=1"]])
def test_shards_give_the_images_of_one_process(extra, digits_zip, tmp_path, run_cli):
    args = ["--network", digits_zip, "--seeds=0-19", "--device=cpu", "--batch=20", *extra]
    run_cli(generate_optim.main, [*args, "--outdir", tmp_path / "one", f"--trace={tmp_path / 'one.csv'}"])
    out = torchrun(
        2, "generate_optim.py", *args, "--outdir", tmp_path / "two", "--shard", f"--trace={tmp_path / 'two.csv'}"
    )
    assert "20 images" in out
    names = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert len(names) == 20 and all(
        (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes() for name in names
    )
    one, two = read_trace(tmp_path / "one.csv"), read_trace(tmp_path / "two.csv")
    np.testing.assert_array_equal(one["nearest_index"], two["nearest_index"])
    np.testing.assert_allclose(one["effective_number"], two["effective_number"], rtol=1e-4)


@pytest.mark.slow
def test_more_shards_than_images(make_zip, tmp_path):
    path = make_zip(DIGITS[:1, 0], None, tmp_path / "d.zip")
    out = torchrun(2, "generate_optim.py", "--network", path, "--outdir", tmp_path / "o", "--shard", code=1)
    assert "holds 1 images, too few" in out and not (tmp_path / "o").exists()


def test_classes_without_images(make_zip, tmp_path, run_cli):
    path = make_zip(DIGITS[:6, 0], [2, 2, 2, 5, 5, 5], tmp_path / "d.zip")
    args = ["--network", path, "--outdir", tmp_path / "o", "--seeds=0-3", "--device=cpu", "--steps=4"]
    assert "no image of class 3" in run_cli(generate_optim.main, [*args, "--class=3"], code=1).stderr
    assert not (tmp_path / "o").exists()
    run_cli(generate_optim.main, [*args, "--class=5"])
    assert len(list((tmp_path / "o").iterdir())) == 4


def test_trace_has_a_row_per_seed_and_step(digits_zip, tmp_path, run_cli):
    args = ["--network", digits_zip, "--seeds=3-7", "--batch=2", "--steps=12", "--device=cpu", "--mmap"]
    run_cli(generate_optim.main, [*args, "--outdir", tmp_path / "o", "--trace", tmp_path / "t.csv"])
    table = read_trace(tmp_path / "t.csv")
    assert len(table["seed"]) == 5 * 12 and (table["size"] == 1797).all()
    rows = table["seed"] == 5
    sigma, number = table["sigma"][rows], table["effective_number"][rows]
    assert table["step"][rows].tolist() == list(range(12))
    assert sigma[0] == 80 and sigma[-1] == pytest.approx(0.002) and (np.diff(sigma) < 0).all()
    assert number[0] > 1500 and number[-1] == pytest.approx(1, abs=1e-6)
    with pytest.raises(ValueError, match="not a trace"):
        read_trace(ROOT / "pyproject.toml")
