"""Feature networks in TorchScript files: what they are given, what they must return, and errors in one line."""

import hashlib

import numpy as np
import pytest
import torch

from memorization.measure.features import load_features

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # of torch, on making such files


class Small(torch.nn.Module):
    """Two features of what it is given, one of a dropout that only training mode applies, and a projection."""

    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(64, 5)
        self.dropout = torch.nn.Dropout(0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        range_ = torch.stack([x.amin(dim=(1, 2, 3)), x.amax(dim=(1, 2, 3))], dim=1)
        return torch.cat([range_, self.dropout(torch.ones_like(range_)), self.linear(x.flatten(1))], dim=1)


class Answer(torch.nn.Module):
    """Returns what `kind` says."""

    def __init__(self, kind: str):
        super().__init__()
        self.kind = kind

    def forward(self, x: torch.Tensor):
        x = x.flatten(1)
        if self.kind == "4d":
            return x[:, :, None, None]
        if self.kind == "short":
            return x[:-1]
        if self.kind == "empty":
            return x[:, :0]
        if self.kind == "nan":
            return (x - x) / (x - x)
        if self.kind == "integer":
            return x.to(torch.int64)
        assert self.kind == "raises"
        raise RuntimeError("wants 224x224")


class Tuple(torch.nn.Module):
    def forward(self, x: torch.Tensor):
        return x.flatten(1), x


@pytest.fixture
def save(tmp_path):
    def save(module, name="net.pt"):
        torch.jit.save(torch.jit.script(module), tmp_path / name)
        return tmp_path / name

    return save


@pytest.fixture(scope="module")
def images():
    from sklearn.datasets import load_digits

    return np.rint(load_digits().images[:50, np.newaxis] * 255 / 16).astype(np.uint8)


def test_features(save, images):
    torch.manual_seed(0)
    module = Small()
    path = save(module)
    network = load_features(path, "cpu", (1, 8, 8))
    told = []
    features = network.embed(images, batch=16, on_batch=told.append)
    assert features.dtype == np.float32 and features.shape == (50, 9)
    assert told == [16, 16, 16, 2]
    span = np.stack([images.min((1, 2, 3)), images.max((1, 2, 3))], 1) / 255  # pixels arrive as 0..1
    np.testing.assert_allclose(features[:, :2], span, rtol=1e-6)
    np.testing.assert_array_equal(features[:, 2:4], 1)  # evaluation mode
    expected = module.linear(torch.from_numpy(images).flatten(1) / 255).detach().numpy()
    np.testing.assert_allclose(features[:, 4:], expected, rtol=0, atol=1e-5)
    np.testing.assert_allclose(network.embed(torch.from_numpy(images), batch=7), features, rtol=0, atol=1e-5)
    assert network.embed(images[:0]).shape[0] == 0
    assert (network.name, network.sha256) == ("net.pt", hashlib.sha256(path.read_bytes()).hexdigest())


def test_half_precision_becomes_float32(save, images):
    class Half(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.flatten(1).to(torch.float16)

    features = load_features(save(Half())).embed(images)
    assert features.dtype == np.float32 and features.max() == 1


def test_copies_stand_out_in_features(save, images):
    """The use of it: neighbours by feature distance, here with a feature that brightness does not change."""
    from memorization.measure.criteria import memorized

    class Normalized(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = x.flatten(1)
            return x / x.square().sum(dim=1, keepdim=True).sqrt()

    network = load_features(save(Normalized()), shape=None)
    darker = (images[:20] * 0.6).astype(np.uint8)
    flags = {}
    for name, a, b in [
        ("pixels", darker.reshape(20, -1).astype(float), images.reshape(50, -1).astype(float)),
        ("features", network.embed(darker), network.embed(images)),
    ]:
        distance = np.sort(np.linalg.norm(a[:, None] - b[None], axis=2), axis=1)[:, :2]
        flags[name] = memorized(distance)
    assert flags["features"].all() and not flags["pixels"].any()


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("4d", r"\[2, 64, 1, 1\]"),
        ("short", r"\[1, 64\]"),
        ("empty", r"\[2, 0\]"),
        ("nan", "not a number"),
        ("integer", "int64"),
        ("raises", "wants 224x224"),
    ],
)
def test_wrong_answers(save, kind, message):
    path = save(Answer(kind))
    with pytest.raises(ValueError, match=message) as error:
        load_features(path, "cpu", (1, 8, 8))
    assert "\n" not in str(error.value) and str(path) in str(error.value)


def test_not_a_tensor(save):
    with pytest.raises(ValueError, match="not tuple"):
        load_features(save(Tuple()), "cpu", (1, 8, 8))


def test_wrong_size(save):
    with pytest.raises(ValueError, match="fails on images") as error:
        load_features(save(Small()), "cpu", (3, 8, 8))
    assert "\n" not in str(error.value)


def test_files_that_are_none(tmp_path):
    with pytest.raises(FileNotFoundError, match="missing"):
        load_features(tmp_path / "none.pt")
    with pytest.raises(FileNotFoundError, match="a folder"):
        load_features(tmp_path)
    (tmp_path / "text.pt").write_text("hello")
    torch.save({"weights": torch.zeros(3)}, tmp_path / "state.pt")
    for name in ("text.pt", "state.pt"):
        with pytest.raises(ValueError, match="no TorchScript file") as error:
            load_features(tmp_path / name)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("images", [np.zeros((2, 8, 8), dtype=np.uint8), np.zeros((2, 1, 8, 8), dtype=np.float32)])
def test_refuses_images(save, images):
    with pytest.raises(ValueError, match="uint8 images"):
        load_features(save(Small())).embed(images)
