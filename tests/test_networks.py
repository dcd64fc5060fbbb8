"""Networks against the published implementation's outputs (tests/reference/networks.*)."""

import json
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch

from training.networks import SongUNet, build_network

REFERENCE = Path(__file__).parent / "reference"
SPECS = json.loads((REFERENCE / "networks.json").read_text())
NUMBERS = np.load(REFERENCE / "networks.npz")


def fill_weights(net: torch.nn.Module) -> None:
    """The weights that the reference networks were given; see reference/README.md."""
    state = net.state_dict()
    for name, tensor in state.items():
        parts = name.split(".")
        if parts[-1] in ("resample_filter", "u"):
            continue
        random = np.random.RandomState(zlib.crc32(name.encode()) & 0x7FFFFFFF)
        v = random.standard_normal(tuple(tensor.shape)).astype(np.float32)
        if v.ndim >= 2:
            v /= np.sqrt(np.prod(v.shape[1:]))
        elif parts[-1] == "freqs":
            v *= 16
        else:
            v *= 0.1
        if len(parts) > 1 and "norm" in parts[-2] and parts[-1] == "weight":
            v += 1
        tensor.copy_(torch.from_numpy(v))


def reference_network(key: str) -> torch.nn.Module:
    spec = SPECS[key]
    net = build_network(
        spec["precond"], img_resolution=spec["img_resolution"], img_channels=spec["img_channels"],
        label_dim=spec["label_dim"], **spec["kwargs"],
    ).eval().requires_grad_(False)  # fmt: skip
    fill_weights(net)
    return net


def inputs(key: str) -> tuple:
    optional = {}
    for name in ["class_labels", "augment_labels"]:
        if f"{key}/{name}" in NUMBERS:
            optional[name] = torch.from_numpy(NUMBERS[f"{key}/{name}"])
    return torch.from_numpy(NUMBERS[f"{key}/x"]), torch.from_numpy(NUMBERS[f"{key}/sigma"]), optional


@pytest.mark.parametrize("key", SPECS)
def test_outputs_equal_published(key):
    net = reference_network(key)
    x, sigma, optional = inputs(key)
    out, expected = net(x, sigma, **optional), torch.from_numpy(NUMBERS[f"{key}/out"])
    assert (out - expected).abs().max() <= 1e-4 * expected.abs().max()


@pytest.mark.parametrize("key", SPECS)
def test_names_shapes_and_range_equal_published(key):
    net = reference_network(key)
    state = SPECS[key]["state"]
    expected = {name: tuple(shape) for name, shape in (state.items() if isinstance(state, dict) else state)}
    assert {name: tuple(t.shape) for name, t in net.state_dict().items()} == expected
    assert net.sigma_min == pytest.approx(SPECS[key]["sigma_min"], rel=1e-5)
    assert net.sigma_max == pytest.approx(SPECS[key]["sigma_max"], rel=1e-5)


@pytest.mark.parametrize("key", ["ddpmpp_edm_cond", "adm_edm_cond", "adm_iddpm_cond"])
def test_class_indices_equal_one_hot_rows(key):
    net = reference_network(key)
    x, sigma, _ = inputs(key)
    labels = torch.tensor([0, net.label_dim - 1, 2])
    rows = torch.eye(net.label_dim)[labels]
    torch.testing.assert_close(net(x, sigma, labels), net(x, sigma, rows), rtol=0, atol=1e-6)
    assert (net(x, sigma, labels) - net(x, sigma, labels.flip(0))).abs().max() > 1e-3  # labels matter


def test_indices_never_make_rows_of_width_label_dim():
    """Besides the weight gradient itself, no tensor of batch x label_dim may appear."""
    from torch.utils._python_dispatch import TorchDispatchMode

    seen = []

    class Shapes(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            seen.extend(tuple(t.shape) for t in (out if isinstance(out, tuple) else (out,)) if torch.is_tensor(t))
            return out

    net = build_network(
        "EDMPrecond", img_resolution=8, img_channels=1, label_dim=50021, model_type="SongUNet",
        model_channels=8, channel_mult=[1], num_blocks=1, attn_resolutions=[], dropout=0.0,
    )  # fmt: skip
    with Shapes():
        net(torch.zeros(3, 1, 8, 8), torch.ones(3), torch.tensor([1, 2, 50020])).sum().backward()
    assert seen and not [s for s in seen if 3 in s and 50021 in s]


@pytest.mark.parametrize("encoder_type", ["standard", "residual", "skip"])
@pytest.mark.parametrize("decoder_type", ["standard", "skip"])
@pytest.mark.parametrize("resolution", [8, 16])
def test_every_encoder_and_decoder_trains_at_small_sizes(encoder_type, decoder_type, resolution):
    net = SongUNet(
        resolution, 1, 1, model_channels=8, channel_mult=[1, 2, 2], num_blocks=1, attn_resolutions=[4],
        encoder_type=encoder_type, decoder_type=decoder_type, resample_filter=[1, 3, 3, 1],
    )  # fmt: skip
    out = net(torch.randn(2, 1, resolution, resolution), torch.randn(2))
    assert out.shape == (2, 1, resolution, resolution)
    out.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())


def test_removed_skip_carries_nothing():
    """With a skip removed, the decoder cannot see that encoder output except through the main path."""
    kwargs = dict(model_channels=8, channel_mult=[1, 1], num_blocks=1, attn_resolutions=[], dropout=0.0)
    net = SongUNet(8, 1, 1, **kwargs, skip_connections=[0, 1, 1, 1]).eval()
    fill_weights(net)
    x, t = torch.randn(2, 1, 8, 8), torch.randn(2)
    before = net(x, t)
    last = net.dec["8x8_block1"]  # takes the first encoder output, which is removed
    with torch.no_grad():
        last.skip.weight[:, -8:] += 1  # weights on the removed channels are multiplied with zeros
    torch.testing.assert_close(net(x, t), before)
    net.skip_connections = [1, 1, 1, 1]
    assert (net(x, t) - before).abs().max() > 1e-3


def test_box_filter_shortcut_equals_the_filter():
    from training.networks import Conv2d

    x = torch.randn(2, 4, 8, 8)
    for direction in [dict(up=True), dict(down=True)]:
        conv = Conv2d(4, 4, kernel=3, **direction)
        fast = conv(x)
        conv.box_filter = False
        torch.testing.assert_close(conv(x), fast)


def test_initial_scales():
    torch.manual_seed(0)
    net = SongUNet(8, 1, 1, label_dim=4, model_channels=64, channel_mult=[1], num_blocks=1, attn_resolutions=[8])
    block = net.enc["8x8_block0"]
    bound = np.sqrt(6 / (64 * 9 * 2))  # xavier uniform
    assert block.conv0.weight.abs().max() <= bound and block.conv0.weight.std().item() == pytest.approx(
        bound / 3**0.5, rel=0.05
    )
    assert block.conv1.weight.abs().max() <= 1e-5 * bound
    assert block.qkv.weight.abs().max() <= np.sqrt(0.2 * 6 / (64 * 4))
    adm = build_network("EDMPrecond", img_resolution=8, img_channels=1, label_dim=6, model_type="DhariwalUNet",
                        model_channels=64, channel_mult=[1], num_blocks=1, attn_resolutions=[]).model  # fmt: skip
    assert adm.out_conv.weight.abs().max() == 0 and adm.enc["8x8_block0"].conv1.weight.abs().max() == 0
    assert adm.map_label.weight.std().item() == pytest.approx(1, rel=0.1)  # sqrt(label_dim) / sqrt(fan_in)
    assert adm.map_layer0.weight.abs().max() <= np.sqrt(1 / 3) * np.sqrt(3 / 64)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(encoder_type="dense"), "encoder_type"),
        (dict(skip_connections=[1, 1]), "4 zeros or ones"),
        (dict(skip_connections=[1, 1, 2, 1]), "zeros or ones"),
        (dict(channel_mult=[1, 1, 1, 1, 1]), "halved 4 times"),
    ],
)
def test_wrong_arguments(change, message):
    kwargs = dict(model_channels=8, channel_mult=[1, 1], num_blocks=1) | change
    with pytest.raises(ValueError, match=message):
        SongUNet(8, 1, 1, **kwargs)


def test_unknown_class_and_argument():
    with pytest.raises(ValueError, match="Unknown network class"):
        build_network("os.system")
    with pytest.raises(ValueError, match="cannot be built"):
        build_network("EDMPrecond", img_resolution=8, img_channels=1, model_type="SongUNet", colour="blue")
