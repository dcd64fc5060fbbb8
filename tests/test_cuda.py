"""What only a GPU can show; all of it is skipped without one."""

import numpy as np
import pytest
import torch
from test_optim import NEAR, definition
from test_training import last_snapshot

import training.optim
from training.generation import generate_images
from training.optim import OptimEDM, load_optimum
from training.snapshots.snapshot import load_network

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


@pytest.mark.parametrize("sigma", [0.002, 0.02, 0.3, 1, 5, 80])
@pytest.mark.parametrize("skip", [True, False])
def test_optimum_equals_the_definition(sigma, skip, monkeypatch):
    """The dense passes run on TF32 tensor cores, in three exact terms."""
    monkeypatch.setattr(training.optim, "_WORTH", 0)
    random = np.random.RandomState(0)
    net = OptimEDM(NEAR, skip=skip, chunk=30).to("cuda")
    net.images = net.images.to("cuda")
    for _ in range(2):  # the second call may use what the first has left
        x = NEAR[:20] / 127.5 - 1 + sigma * random.randn(20, 1, 8, 8)
        out = net(torch.from_numpy(x).cuda(), torch.tensor([sigma], device="cuda"))
        np.testing.assert_allclose(out.cpu().flatten(1), definition(NEAR, x, sigma)[1], atol=1e-4)


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
