"""`import diffmem`: the public interface, on real images and on networks of other people."""

import json
import warnings

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

import diffmem
from diffmem import adapters

pytestmark = pytest.mark.filterwarnings("ignore:Every image is a training image")

DIGITS = (load_digits().images * 15.9375).astype(np.uint8)[:, None]
TRAIN, OTHERS = DIGITS[:64], DIGITS[64:104]


def copies(count=30):
    """Copies of training images and images that are none, half and half."""
    noisy = TRAIN[:count].astype(int) + np.random.default_rng(0).integers(-2, 3, TRAIN[:count].shape)
    return np.concatenate([noisy.clip(0, 255).astype(np.uint8), OTHERS[:count]])


def test_measure():
    images = copies()
    result = diffmem.measure(images, TRAIN)
    flat, train = images.reshape(len(images), -1).astype(float), TRAIN.reshape(len(TRAIN), -1).astype(float)
    distance = np.sqrt(((flat[:, None] - train) ** 2).mean(-1))
    d = np.sort(distance, axis=1)[:, :2]
    np.testing.assert_allclose(result.distances, d, rtol=1e-12)
    assert (result.indices[:, 0] == distance.argmin(1)).all()
    assert result.ratio == (d[:, 0] < d[:, 1] / 3).mean() and 0.45 < result.ratio < 0.7
    low, high = result.interval
    assert low < result.ratio < high
    record = json.loads(json.dumps(result.to_dict()))
    assert record["num_samples"] == 60 and record["ratio"] == result.ratio and record["notes"] == []


def test_all_forms_of_the_same_images_give_the_same(tmp_path):
    images = copies()
    expected = diffmem.measure(images, TRAIN).distances
    np.save(tmp_path / "x.npy", images)
    forms = [
        torch.from_numpy(images),
        images.transpose(0, 2, 3, 1),
        images[:, 0],
        torch.from_numpy(images).float() / 127.5 - 1,
        tmp_path / "x.npy",
    ]
    for form in forms:
        how = {"value_range": (-1, 1)} if isinstance(form, torch.Tensor) and form.is_floating_point() else {}
        assert (diffmem.measure(form, TRAIN, **how).distances == expected).all()


def test_pictures_and_tables(tmp_path):
    result = diffmem.measure(copies(), TRAIN)
    result.grid(tmp_path / "grid.png")
    result.histogram(tmp_path / "histogram.png")
    assert all((tmp_path / name).stat().st_size > 1000 for name in ("grid.png", "histogram.png"))
    frame = result.to_frame()
    assert len(frame) == 60 and list(frame["memorized"]) == result.memorized.tolist()


def test_a_table_without_pandas(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pandas", None)
    rows = diffmem.measure(copies(), TRAIN).to_frame()
    assert len(rows) == 60 and set(rows[0]) == {"d1", "d2", "index1", "index2", "memorized"}


def test_repeated_training_images():
    """d1/d2 cannot call a copy of an image memorized that is there twice; distinct images can."""
    twice = np.concatenate([TRAIN, TRAIN])
    with pytest.warns(UserWarning, match="64 training images repeat"):
        assert diffmem.measure(TRAIN[:20], twice).ratio == 0
    with pytest.warns(UserWarning, match="left out"):
        result = diffmem.measure(TRAIN[:20], twice, unique=True)
    assert result.ratio == 1 and result.training_size == 64
    assert (result.indices[:, 0] == np.arange(20)).all()


def test_the_samples_themselves_as_reference():
    with pytest.warns(UserWarning, match="distance 0"):
        diffmem.measure(TRAIN, TRAIN)


@pytest.mark.parametrize(
    "images, training, message",
    [
        (OTHERS, TRAIN[:1], "at least 2"),
        (OTHERS[:0], TRAIN, "no images"),
        (OTHERS, TRAIN[:, :, :4, :4], "compare images of one size"),
        (OTHERS.astype(np.float32), TRAIN, "value_range"),
        ("nowhere", TRAIN, "does not exist"),
    ],
)
def test_bad_input_is_one_sentence(images, training, message):
    with pytest.raises((ValueError, OSError), match=message) as err:
        diffmem.measure(images, training)
    assert "\n" not in str(err.value)


def test_the_optimum_replays_and_has_no_gap():
    optimum = diffmem.Optimum(TRAIN)
    images = diffmem.sample(optimum, range(12))
    assert images.shape == (12, 1, 8, 8) and diffmem.measure(images, TRAIN).ratio == 1
    assert np.abs(diffmem.gap(optimum, TRAIN, num_noised=16).mean).max() < 1e-12


def test_any_function_is_a_denoiser():
    """The posterior mean of a Gaussian, D(x; s) = x c / (c + s^2), and what must be wrapped."""
    denoiser = diffmem.Denoiser(
        lambda x, sigma, labels: x * (0.25 / (0.25 + sigma[:, None, None, None] ** 2)), (1, 8, 8)
    )
    images = diffmem.sample(denoiser, range(64), num_steps=10)
    std = (images.astype(float) / 127.5 - 1).std()
    assert 0.42 < std < 0.56  # of N(0, 0.5^2), a little clipped
    assert (diffmem.sample(denoiser, [3, 5], num_steps=10) == images[[3, 5]]).all()
    with pytest.raises(ValueError, match="wrap it"):
        diffmem.sample(torch.nn.Identity(), range(2))
    with pytest.raises(ValueError, match="wrap it"):
        diffmem.gap(torch.nn.Identity(), TRAIN)


# ----------------------------------------------------------------------------
# Networks that predict epsilon, v or x0 in discrete steps.


@pytest.mark.parametrize("prediction", adapters.PREDICTIONS)
@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_discrete_predictions_of_the_optimum_are_the_optimum(prediction, schedule):
    """A network that is the optimum in epsilon, v or x0 has no gap to it: the formulas undo each other."""
    optimum = diffmem.Optimum(TRAIN)
    a = torch.from_numpy(adapters.betas_to_alphas_cumprod(schedule, 200))

    def predict(x_t, t, class_labels):
        a_t = a[t].reshape(-1, 1, 1, 1)
        x = x_t / a_t.sqrt()
        sigma = ((1 - a_t) / a_t).sqrt()
        y = torch.cat([optimum(x[i : i + 1], sigma[i].flatten()) for i in range(len(x))]).double()
        eps = (x - y) / sigma
        out = {"sample": y, "epsilon": eps, "v_prediction": a_t.sqrt() * eps - (1 - a_t).sqrt() * y}[prediction]
        return torch.cat([out, torch.zeros_like(out)], dim=1).float()  # with a learned variance

    denoiser = adapters.from_discrete(predict, (1, 8, 8), a, prediction)
    sigmas = denoiser.sigmas[[3, 60, 120, 170]]
    gap = diffmem.gap(denoiser, TRAIN, num_noised=8, sigmas=sigmas)
    assert gap.sigma.tolist() == sigmas.tolist()
    assert np.abs(gap.mean).max() < 1e-6
    assert diffmem.measure(diffmem.sample(denoiser, range(6), num_steps=12), TRAIN).ratio == 1


def test_schedules():
    """Ends of the published schedules: linear betas 1e-4 and 0.02, cosine betas at most 0.999."""
    linear, cosine = (adapters.betas_to_alphas_cumprod(name, 1000) for name in ("linear", "cosine"))
    assert linear[0] == pytest.approx(1 - 1e-4) and linear[-1] / linear[-2] == pytest.approx(0.98)
    assert linear[-1] == pytest.approx(4.0358e-5, rel=1e-3)  # Ho et al. 2020
    assert cosine[-1] / cosine[-2] == pytest.approx(1e-3, rel=1e-9) and cosine[499] == pytest.approx(0.4923, abs=2e-3)
    for bad in ([0.5], [0.5, 0.6], [0.5, -0.1]):
        with pytest.raises(ValueError, match="alphas_cumprod"):
            adapters.from_discrete(lambda *_: None, (1, 8, 8), bad)


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    """A diffusers pipeline with weights at random, saved as people save it."""
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    unet = diffusers.UNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, layers_per_block=1, block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "UpBlock2D"), norm_num_groups=4,
    )  # fmt: skip
    path = tmp_path_factory.mktemp("pipeline") / "ddpm"
    diffusers.DDPMPipeline(unet, diffusers.DDPMScheduler(num_train_timesteps=1000)).save_pretrained(path)
    return path


def test_diffusers_network(pipeline):
    """The denoiser is what the scheduler itself derives from the network's output: pred_original_sample."""
    denoiser = adapters.from_diffusers(pipeline)
    assert (denoiser.img_channels, denoiser.img_resolution, denoiser.label_dim) == (1, 8, 0)
    parts = adapters.load_pipeline(pipeline)
    t = 300
    a = parts.scheduler.alphas_cumprod[t]
    x_t = torch.randn([2, 1, 8, 8], generator=torch.Generator().manual_seed(0))
    parts.scheduler.config.clip_sample = False
    with torch.no_grad():
        out = parts.unet(x_t, t).sample
        y = parts.scheduler.step(out, t, x_t).pred_original_sample
        found = denoiser(x_t / a.sqrt(), denoiser.sigmas[t])
    torch.testing.assert_close(found, y, rtol=1e-4, atol=1e-4)
    images = diffmem.sample(denoiser, range(3), num_steps=4)
    assert images.shape == (3, 1, 8, 8)


def test_pickled_weights_are_not_read(pipeline, tmp_path):
    import shutil

    other = shutil.copytree(pipeline, tmp_path / "pickled")
    weights = other / "unet" / "diffusion_pytorch_model.safetensors"
    weights.unlink()
    (other / "unet" / "diffusion_pytorch_model.bin").write_bytes(b"\x80\x04cos\nsystem\n(S'touch ran'\ntR.")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(ValueError, match="safetensors") as err:
            adapters.from_diffusers(other)
    assert "\n" not in str(err.value)
    with pytest.raises(ValueError, match="not a folder"):
        adapters.from_diffusers("someone/something")
