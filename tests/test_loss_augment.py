"""Losses and augmentation against the published implementation's numbers."""

from pathlib import Path

import numpy as np
import pytest
import torch

from training.augment import AugmentPipe, _rotate, _warp, edm_augment_pipe
from training.loss import EDMLoss, VELoss, VPLoss

REFERENCE = Path(__file__).parent / "reference"
LOSSES = np.load(REFERENCE / "losses.npz")
AUGMENT = np.load(REFERENCE / "augment.npz")


def gauss_denoiser(x, sigma, class_labels=None, augment_labels=None):
    """D(x; s) = x 0.25 / (0.25 + s^2), the optimum of N(0, 0.25 I)."""
    return x * 0.25 / (0.25 + sigma.reshape(-1, 1, 1, 1) ** 2)


@pytest.mark.parametrize("loss", [VPLoss, VELoss, EDMLoss])
@pytest.mark.parametrize("seed", [0, 1])
def test_losses_equal_published(loss, seed):
    images = torch.from_numpy(LOSSES[f"{seed}/images"])
    torch.manual_seed(seed)
    value = loss()(gauss_denoiser, images)
    expected = torch.from_numpy(LOSSES[f"{seed}/{loss.__name__}"])
    torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-5 * expected.abs().mean().item())


def test_loss_hands_labels_and_augmentation_to_the_network():
    seen = {}

    def net(x, sigma, class_labels, augment_labels):
        seen.update(labels=class_labels, augment=augment_labels)
        return x

    labels = torch.tensor([3, 1])
    EDMLoss()(net, torch.zeros(2, 1, 8, 8), labels, augment_pipe=edm_augment_pipe(0.5))
    assert seen["labels"] is labels and seen["augment"].shape == (2, 9)


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("setting, p", [("edm", 0.12), ("strong", 1)])
def test_augmentation_equals_published(seed, setting, p):
    key = f"{seed}/{setting}"
    torch.manual_seed(seed)
    out, labels = edm_augment_pipe(p)(torch.from_numpy(AUGMENT[f"{key}/images"]))
    np.testing.assert_allclose(labels, AUGMENT[f"{key}/labels"], atol=1e-4)
    np.testing.assert_allclose(out, AUGMENT[f"{key}/out"], atol=1e-4)


def test_augmentation_that_never_happens_changes_nothing():
    images = torch.rand(4, 1, 8, 8)
    pipe = AugmentPipe(p=0, yflip=1, scale=1, rotate_frac=1, aniso=1, translate_frac=1)
    out, labels = pipe(images)
    assert labels.shape == (4, pipe.label_dim) == (4, 8) and not labels.any()
    torch.testing.assert_close(out[:, :, 2:-2, 2:-2], images[:, :, 2:-2, 2:-2], atol=0.02, rtol=0)


def test_quarter_turn_of_a_smooth_image_is_a_quarter_turn():
    y, x = torch.meshgrid(torch.arange(16.0), torch.arange(16.0), indexing="ij")
    image = torch.exp(-((x - 5) ** 2 + (y - 8) ** 2) / 8)[None, None]
    turned = _warp(image, _rotate(torch.tensor([torch.pi / 2])))
    assert (turned - image.rot90(1, (2, 3))).abs().max() < 0.04
    assert (turned - image).abs().max() > 0.3
