"""Samplers against the published implementation's numbers, and the data order."""

import json
import re
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

from torch_utils.misc import InfiniteSampler
from training.samplers import StackedRandomGenerator, ablation_sampler, edm_sampler

REFERENCE = Path(__file__).parent / "reference"
SPECS = json.loads((REFERENCE / "samplers.json").read_text())
NUMBERS = np.load(REFERENCE / "samplers.npz")


class Gauss:
    """The optimal denoiser of N(0, 0.25 I)."""

    sigma_min, sigma_max = 0, float("inf")

    def __call__(self, x, sigma, class_labels=None):
        return x * 0.25 / (0.25 + torch.as_tensor(sigma).reshape(-1, 1, 1, 1) ** 2)

    def round_sigma(self, sigma):
        return torch.as_tensor(sigma)


class Rounding(Gauss):
    sigma_min, sigma_max = 0.01, 50


@pytest.mark.parametrize("key", SPECS)
def test_sampler_equals_published(key):
    spec = SPECS[key]
    sampler = dict(edm_sampler=edm_sampler, ablation_sampler=ablation_sampler)[spec["sampler"]]
    net = dict(Gauss=Gauss, Rounding=Rounding)[spec["net"]]()
    rnd = StackedRandomGenerator("cpu", spec["seeds"])
    latents = rnd.randn([len(spec["seeds"]), 3, 8, 8])
    out = sampler(net, latents, randn_like=rnd.randn_like, **spec["kwargs"])
    np.testing.assert_allclose(out, NUMBERS[key], rtol=1e-6, atol=1e-6 * np.abs(NUMBERS[key]).mean())


def test_all_48_combinations_are_covered():
    names = ["solver", "discretization", "schedule", "scaling"]
    chosen = {tuple(spec["kwargs"][n] for n in names) for key, spec in SPECS.items() if len(key.split("_")) == 5}
    assert len(chosen) == 48


def test_latents_depend_on_the_seed_alone():
    np.testing.assert_array_equal(
        StackedRandomGenerator("cpu", [0, 1, 7]).randn([3, 3, 8, 8]), NUMBERS["latents/0,1,7"]
    )
    alone = StackedRandomGenerator("cpu", [7])
    several = StackedRandomGenerator("cpu", [3, 7, 1])
    for _ in range(2):
        assert torch.equal(alone.randn([1, 4])[0], several.randn([3, 4])[1])
        assert torch.equal(alone.randint(10, size=[1, 2])[0], several.randint(10, size=[3, 2])[1])
    with pytest.raises(ValueError, match="from 1 seeds"):
        alone.randn([2, 4])


def test_edm_sampler_reaches_the_data_distribution():
    """For Gaussian data the ODE is solved exactly by x -> x sigma_data / sqrt(sigma_data^2 + sigma_max^2)."""
    latents = torch.randn(4, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    out = edm_sampler(Gauss(), latents, num_steps=256)
    expected = latents.double() * 80 * 0.5 / (0.25 + 80**2) ** 0.5
    torch.testing.assert_close(out, expected, rtol=1e-3, atol=1e-3)


def test_one_step_goes_to_the_mean():
    out = edm_sampler(Gauss(), torch.ones(1, 1, 2, 2), num_steps=1)
    torch.testing.assert_close(out, Gauss()(torch.full((1, 1, 2, 2), 80.0).double(), 80.0))


@pytest.mark.parametrize(
    "kwargs, message",
    [
        (dict(solver="rk4"), "solver must be"),
        (dict(schedule="cosine"), "schedule must be"),
        (dict(sigma_min=5, sigma_max=1), "exceeds"),
        (dict(num_steps=0), "At least one"),
        (dict(num_steps=5000, discretization="iddpm"), "noise levels"),
    ],
)
def test_wrong_arguments(kwargs, message):
    with pytest.raises(ValueError, match=message):
        ablation_sampler(Gauss(), torch.ones(1, 1, 2, 2), **kwargs)


def _orders():
    cases = []
    for key, expected in json.loads((REFERENCE / "infinite_sampler.json").read_text()).items():
        size, rank, replicas, seed, window = re.fullmatch(
            r"n(\d+)_rank(\d+)of(\d+)_seed(\d+)_window([\d.]+)", key
        ).groups()
        cases.append(pytest.param(int(size), int(rank), int(replicas), int(seed), float(window), expected, id=key))
    return cases


@pytest.mark.parametrize("size, rank, replicas, seed, window, expected", _orders())
def test_data_order_equals_published(size, rank, replicas, seed, window, expected):
    assert list(islice(InfiniteSampler(size, rank, replicas, seed, window), len(expected))) == expected
    batched = InfiniteSampler(size, rank, replicas, seed, window)
    taken = [i for count in [7, 1, 13, 39] for i in batched.take(count)]
    assert taken == expected


@pytest.mark.parametrize("window", [0.0, 0.5])
def test_data_order_continues_from_its_state(window):
    whole = InfiniteSampler(37, 1, 3, seed=5, window_size=window)
    whole.take(100)
    state = json.loads(json.dumps(whole.state_dict()))
    other = InfiniteSampler(37, 1, 3, seed=6, window_size=window)
    other.load_state_dict(state)
    assert np.array_equal(whole.take(200), other.take(200))
    with pytest.raises(ValueError, match="37 images, the dataset has 10"):
        InfiniteSampler(10).load_state_dict(state)
