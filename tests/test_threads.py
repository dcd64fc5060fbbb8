"""CPU threads: few for little work, as OMP_NUM_THREADS says where it is set; the choice is recorded and put back."""

import json

import pytest
import torch
from test_training import TINY

import train
from torch_utils import threads
from training.networks import build_network


@pytest.fixture
def eight_threads(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)


def net(channels, size):
    with torch.device("meta"):
        return build_network(
            class_name="EDMPrecond", model_type="SongUNet", model_channels=channels, channel_mult=[1, 2],
            num_blocks=1, attn_resolutions=[4], img_resolution=size, img_channels=1, label_dim=0,
        )  # fmt: skip


def test_work_decides(eight_threads, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    small = threads.network_work(net(16, 8), 16)
    assert threads.choose_threads(small) == 1
    assert threads.choose_threads(1.5 * threads.WORK_PER_THREAD) == 2
    assert threads.choose_threads(threads.network_work(net(128, 32), 512)) == 8  # as in the study: all there are
    monkeypatch.setenv("OMP_NUM_THREADS", "8")
    assert threads.choose_threads(small) == 8


def test_work_grows_with_batch_pixels_and_weights():
    parameters = sum(p.numel() for p in net(16, 8).parameters())
    assert threads.network_work(net(16, 8), 10) == parameters * 64 * 10
    assert threads.network_work(net(16, 16), 10) > 3.5 * threads.network_work(net(16, 8), 10)


def test_threads_are_put_back_and_change_no_other_code():
    before = torch.get_num_threads()
    with pytest.raises(ValueError, match="x"), threads.cpu_threads(1):
        assert torch.get_num_threads() == 1
        raise ValueError("x")
    assert torch.get_num_threads() == before


@pytest.mark.parametrize(("variable", "words"), [(None, "size of the network"), ("1", "OMP_NUM_THREADS")])
def test_a_run_says_and_records_its_threads(variable, words, digits_zip, tmp_path, run_cli, monkeypatch):
    if variable is None:
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    else:
        monkeypatch.setenv("OMP_NUM_THREADS", variable)
    args = [f"--outdir={tmp_path / 'run'}", "--nosubdir", f"--data={digits_zip}", *TINY, "--duration=0.001"]
    out = run_cli(train.main, args).output
    found = json.loads((tmp_path / "run" / "training_options.json").read_text())["threads"]
    assert f"{found} thread" in out and words in out and f" threads {found}" in out
    assert found == (1 if variable is None else torch.get_num_threads())
