"""The closed-form optimum against its definition in float64 (tests/reference/optimum.npz) and its properties."""

from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from training.optim import OptimEDM, load_optimum
from training.samplers import StackedRandomGenerator, edm_sampler

REFERENCE = np.load(Path(__file__).parent / "reference" / "optimum.npz")
DIGITS = np.round(load_digits().images * 255 / 16).astype(np.uint8)[:, None]
LABELS = load_digits().target


@pytest.mark.parametrize("chunk", [7, 200, 4096])
def test_equals_the_definition(chunk):
    net = OptimEDM(REFERENCE["images"], chunk=chunk)
    x, sigma = torch.from_numpy(REFERENCE["x"]), torch.from_numpy(REFERENCE["sigma"])
    np.testing.assert_allclose(net(x, sigma), REFERENCE["out"], atol=1e-4)
    log_p = net.posterior_mean(x, sigma)[1]
    np.testing.assert_allclose(log_p, REFERENCE["log_p"], rtol=1e-9, atol=1e-6)


@pytest.mark.parametrize("sigma", [0.002, 0.02, 0.2, 2, 20, 80])
def test_equals_the_definition_at_every_noise_level_with_near_duplicates(sigma):
    images = np.concatenate([DIGITS[:200], DIGITS[:5]])
    images[200:, 0, 0, 0] ^= 1  # one pixel, one level
    y = images.reshape(len(images), -1) / 127.5 - 1
    x = y[:5] + sigma * np.random.RandomState(0).randn(5, 64)
    squared = ((x[:, None] - y) ** 2).sum(2)
    logits = -squared / (2 * sigma**2)
    w = np.exp(logits - logits.max(1, keepdims=True))
    expected = (w / w.sum(1, keepdims=True)) @ y
    out = OptimEDM(images)(torch.from_numpy(x).reshape(5, 1, 8, 8), torch.tensor([sigma]))
    np.testing.assert_allclose(out.flatten(1), expected, atol=1e-4)


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
    np.savez(tmp_path / "b.npz", images=DIGITS[:2])
    with pytest.raises(ValueError, match="--cond=1"):
        load_optimum(tmp_path / "b.npz", cond=True)
    (tmp_path / "c.npz").write_bytes(b"PK nothing")
    with pytest.raises(ValueError, match="cannot be read as .npz"):
        load_optimum(tmp_path / "c.npz")
    np.savez(tmp_path / "e.npz", images=np.array([{}], dtype=object))  # an object array is a pickle: refused
    with pytest.raises(ValueError, match="cannot be read as .npz"):
        load_optimum(tmp_path / "e.npz")
