"""What only a GPU can show; all of it is skipped without one."""

import copy

import numpy as np
import pytest
import torch
from test_knn import check, check_vectors
from test_optim import LABELS, NEAR, crowd
from test_training import last_snapshot, stats

import training.optim
import training.optim_dense
from memorization.measure import knn_dense
from memorization.measure.knn import Neighbors
from training.generation import generate_images
from training.networks import build_network
from training.optim import OptimEDM, load_optimum
from training.optim_sums import plain_optimum
from training.precision import prepare_denoiser
from training.snapshots.snapshot import load_network

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


@pytest.mark.parametrize("sigma", [0.002, 0.02, 0.3, 1, 5, 80])
@pytest.mark.parametrize(
    "how", [dict(), dict(dense=False), dict(dense=False, skip=False)], ids=["dense", "skip", "all"]
)
def test_optimum_equals_the_definition(sigma, how, monkeypatch):
    """In bfloat16 or TF32 products of exact terms."""
    monkeypatch.setattr(training.optim, "_WORTH", 0)
    random = np.random.RandomState(0)
    net = OptimEDM(NEAR, chunk=30, **how).to("cuda")
    if how:
        net.images = net.images.to("cuda")
    for _ in range(2):  # the second call may use what the first has left
        x = NEAR[:20] / 127.5 - 1 + sigma * random.randn(20, 1, 8, 8)
        out = net(torch.from_numpy(x).cuda(), torch.tensor([sigma], device="cuda"))
        np.testing.assert_allclose(out.cpu(), plain_optimum(NEAR, x, sigma)[0], atol=1e-6 if not how else 1e-4)


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("sigma", [0.002, 0.01, 1.0])
def test_dense_optimum_among_mass_near_duplicates(sigma, streamed, monkeypatch):
    monkeypatch.setattr(OptimEDM, "_fits", lambda self, device: not streamed)
    if streamed:
        monkeypatch.setattr(training.optim_dense, "block_size", lambda batch: 700)
    images = crowd(3000)
    x = images[300:308] / 127.5 - 1 + sigma * np.random.RandomState(0).randn(8, 1, 8, 8)
    expected, w, log_p = plain_optimum(images, x, sigma)
    net = OptimEDM(images).to("cuda")
    asked = torch.from_numpy(x).cuda(), torch.tensor(sigma, device="cuda", dtype=torch.float64)
    np.testing.assert_allclose(net(*asked).cpu(), expected, atol=2e-6)
    np.testing.assert_allclose(net.log_density(*asked).cpu(), log_p, rtol=1e-6, atol=1e-4)
    np.testing.assert_allclose(net.posterior(*asked).weight.cpu(), w.amax(1), rtol=1e-3)


def test_dense_conditional_optimum_is_that_of_the_cpu():
    x, sigma, labels = torch.randn(16, 1, 8, 8), torch.tensor(2.0), torch.arange(16) % 10
    images = NEAR[: len(LABELS)]
    there = OptimEDM(images, LABELS).to("cuda")(x.cuda(), sigma.cuda(), labels.cuda())
    torch.testing.assert_close(there.cpu(), OptimEDM(images, LABELS)(x, sigma, labels), rtol=0, atol=1e-5)


def test_optimum_samples_are_those_of_the_cpu(digits_zip):
    images = [
        torch.cat([x for _, x in generate_images(load_optimum(digits_zip, device, cond=True), range(16), batch=16)])
        for device in ["cpu", "cuda"]
    ]
    assert (images[0].int() - images[1].int()).abs().max() <= 1


def test_training_and_sampling(digits_zip, tmp_path, run_cli):
    import train

    args = ["--outdir", tmp_path, "--nosubdir", "--data", digits_zip, "--cond=1", "--device=cuda", "--seed=1"]
    args += ["--cres=1", "--num-channels=16", "--num-blocks=1", "--attn-resolutions=4", "--duration=0.1", "--tick=1"]
    run_cli(train.main, args)
    path = last_snapshot(tmp_path)
    images = [
        torch.cat([x for _, x in generate_images(load_network(path, device)[0], range(16), batch=16)])
        for device in ["cpu", "cuda"]
    ]
    assert (images[0].int() - images[1].int()).abs().float().mean() < 1
    run_cli(train.main, [*args, "--fp16=1"])


# ----------------------------------------------------------------------------
# Precision, compiling, and that the device is not waited for.

TRAIN = ["--nosubdir", "--cond=1", "--device=cuda", "--seed=1", "--cres=1,2", "--num-channels=16", "--num-blocks=1"]
TRAIN += ["--attn-resolutions=4", "--duration=0.1", "--tick=1", "--batch=64"]


@pytest.mark.parametrize("precision", ["tf32", "bf16", "fp16"])
@pytest.mark.parametrize("more", [[], ["--compile"], ["--compile", "--batch-gpu=16"]])
def test_training_in_every_precision(precision, more, digits_zip, tmp_path, run_cli):
    """Compiled 8x8 images without accumulation are trained by CUDA graphs."""
    import train

    run_cli(train.main, ["--outdir", tmp_path / "a", "--data", digits_zip, *TRAIN, f"--precision={precision}", *more])
    run_cli(train.main, ["--outdir", tmp_path / "b", "--data", digits_zip, *TRAIN])
    losses = [[line["Loss/loss"]["mean"] for line in stats(tmp_path / name)] for name in "ab"]
    assert losses[0] == pytest.approx(losses[1], rel=0.1)
    if not more:
        assert torch.backends.cudnn.allow_tf32 is False and torch.backends.cuda.matmul.allow_tf32 is False


@pytest.mark.parametrize("more", [[], ["--precision=bf16", "--batch-gpu=16"], ["--optimizer=SGD", "--lr=1e-5"]])
def test_no_step_waits(more, digits_zip, tmp_path, run_cli, monkeypatch):
    """CUDA itself raises an error at the first wait between two ticks. Augmentation and dropout are on."""
    import train

    count = 0
    for cls in train.OPTIMIZERS.values():

        def step(self, *args, real=cls.step, **kwargs):
            nonlocal count
            count += 1
            torch.cuda.set_sync_debug_mode("error" if 5 <= count < 12 else "default")
            return real(self, *args, **kwargs)

        monkeypatch.setattr(cls, "step", step)
    try:
        run_cli(train.main, ["--outdir", tmp_path, "--data", digits_zip, *TRAIN, *more])
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert count > 15


@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16", "fp16"])
@pytest.mark.parametrize("compile", [False, True])
def test_sampling_in_every_precision(precision, compile):
    """The images are those of float32 up to rounding, in the order of the seeds, the last batch being smaller."""
    torch.manual_seed(0)
    net = build_network(
        "VPPrecond", img_resolution=8, img_channels=1, label_dim=4, model_type="SongUNet", model_channels=16,
        channel_mult=[1, 2], num_blocks=1, attn_resolutions=[4],
    ).eval().requires_grad_(False).cuda()  # fmt: skip
    for kwargs in [dict(num_steps=5), dict(num_steps=5, S_churn=10)]:
        exact, other = (
            list(generate_images(each, range(20), batch=8, sampler_kwargs=kwargs))
            for each in (net, prepare_denoiser(copy.deepcopy(net), precision, compile))
        )
        assert [seeds for seeds, _ in other] == [seeds for seeds, _ in exact]
        images = [torch.cat([x for _, x in part]).int() for part in (exact, other)]
        assert (images[0] - images[1]).abs().float().mean() < (1 if precision == "fp32" else 4)
    assert not torch.backends.cudnn.allow_tf32


# ----------------------------------------------------------------------------
# Nearest neighbours.


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("k", [1, 2, 50])
def test_neighbors_equal_the_definition(k, streamed, monkeypatch):
    """Near-copies, duplicates and noise; float32 products may round to TF32 elsewhere in the process."""
    monkeypatch.setattr(knn_dense._Dense, "_fits", lambda self: not streamed)
    random = np.random.RandomState(k)
    noise = random.randint(0, 256, (5001, 3, 10, 11), dtype=np.uint8)  # dimensions that are no multiple of 8
    reference = np.concatenate([noise, noise[:70], noise[:70] // 2 * 2])
    images = np.concatenate([noise[:150], random.randint(0, 256, (51, 3, 10, 11), dtype=np.uint8)])
    vectors = random.randn(4003, 100).astype(np.float32)
    torch.set_float32_matmul_precision("high")
    try:
        for block in (None, 1000):
            check(images, reference, k, device="cuda", block=block)
            check_vectors(np.concatenate([vectors[:200] + 1e-3, vectors[:5]]), vectors, k, device="cuda", block=block)
    finally:
        torch.set_float32_matmul_precision("highest")
    check(images[:3], reference[:20], 20, device="cuda")


@pytest.mark.parametrize("kind", ["images", "vectors"])
def test_dense_neighbors_do_not_wait(kind, monkeypatch):
    """CUDA itself raises an error at a wait; one look at the result is allowed for vectors."""
    random = np.random.RandomState(0)
    reference = torch.from_numpy(random.randint(0, 256, (3000, 1, 16, 16), dtype=np.uint8)).cuda()
    reference = reference if kind == "images" else reference.flatten(1).float() + torch.randn(3000, 256).cuda()
    part = Neighbors(reference)._part
    queries = reference[:100].flatten(1).contiguous()
    expected = part.search(queries, 2)
    looks = []
    real = torch.Tensor.nonzero

    def look(self, *args):
        torch.cuda.set_sync_debug_mode("default")
        looks.append(real(self, *args))
        torch.cuda.set_sync_debug_mode("error")
        return looks[-1]

    monkeypatch.setattr(torch.Tensor, "nonzero", look)
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = part.search(queries, 2)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(looks) == (kind == "vectors") and all(map(torch.equal, found, expected))
