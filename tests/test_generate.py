"""generate.py and generate_optim.py: the same image for a seed, whatever the batch, the order and the processes."""

from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from builders import torchrun

import generate
import generate_optim
from training.generation import generate_images, image_path, to_uint8
from training.networks import build_network
from training.snapshots.snapshot import list_snapshots, load_network, save_snapshot


@pytest.fixture(scope="module")
def snapshot(tmp_path_factory):
    """A conditional network with random weights that give images with structure."""
    torch.manual_seed(0)
    net = build_network(
        "EDMPrecond", img_resolution=8, img_channels=1, label_dim=4, model_type="SongUNet", model_channels=8,
        channel_mult=[1, 2], num_blocks=1, attn_resolutions=[4], dropout=0.1,
    )  # fmt: skip
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.05 * torch.randn_like(p))
    path = tmp_path_factory.mktemp("run") / "network-snapshot-000123.safetensors"
    save_snapshot(path, net, 123.0, dict(path="x.zip"))
    return path


def folder(path):
    return {p.relative_to(path).as_posix(): np.array(PIL.Image.open(p)) for p in sorted(Path(path).rglob("*.png"))}


def same(a, b):
    return a.keys() == b.keys() and all(np.array_equal(a[k], b[k]) for k in a)


@pytest.mark.slow
def test_a_seed_means_an_image(snapshot, tmp_path, run_cli):
    base = ["--network", snapshot, "--steps=4", "--device=cpu"]
    run_cli(generate.main, [*base, "--outdir", tmp_path / "a", "--seeds=0-22"])
    run_cli(generate.main, [*base, "--outdir", tmp_path / "b", "--seeds=0-22", "--batch=5"])
    run_cli(generate.main, [*base, "--outdir", tmp_path / "c", "--seeds=13,22,5", "--batch=1"])
    torchrun(2, "generate.py", *base, "--outdir", tmp_path / "d", "--seeds=0-22", "--batch=7")
    a = folder(tmp_path / "a")
    assert list(a) == [f"{i:06d}.png" for i in range(23)] and a["000000.png"].shape == (8, 8)
    assert same(a, folder(tmp_path / "b")) and same(a, folder(tmp_path / "d"))
    c = folder(tmp_path / "c")
    assert sorted(c) == ["000005.png", "000013.png", "000022.png"] and all(np.array_equal(a[k], c[k]) for k in c)
    assert len({image.tobytes() for image in a.values()}) == 23


@pytest.mark.parametrize("threads", [1, 4])
def test_odd_batches_take_the_same_kernels(threads, monkeypatch):
    """With 4 threads torch rounds 17 rows differently from 16 or 32."""
    monkeypatch.setattr("training.generation.to_uint8", lambda images: images)  # every bit
    net = build_network(
        "VPPrecond", img_resolution=16, img_channels=3, model_type="SongUNet", model_channels=32, channel_mult=[2, 2],
        num_blocks=1, attn_resolutions=[],
    ).eval().requires_grad_(False)  # fmt: skip
    for p in net.parameters():
        p.add_(0.05 * torch.randn_like(p))
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        kwargs = dict(sampler_kwargs=dict(num_steps=1))
        images = [torch.cat([x for _, x in generate_images(net, range(20), batch=n, **kwargs)]) for n in (20, 17, 3)]
    finally:
        torch.set_num_threads(before)
    assert torch.equal(images[0], images[1]) and torch.equal(images[0], images[2])


def test_churn_and_class_draws_belong_to_the_seed(snapshot):
    net, _ = load_network(snapshot)
    for kwargs in [dict(S_churn=20, num_steps=4), dict(solver="euler", num_steps=4, S_churn=10)]:
        whole = torch.cat([x for _, x in generate_images(net, range(9), batch=9, sampler_kwargs=kwargs)])
        parts = torch.cat([x for _, x in generate_images(net, range(9), batch=4, sampler_kwargs=kwargs)])
        assert torch.equal(whole, parts)


def test_class_and_subdirs(snapshot, tmp_path, run_cli):
    base = ["--network", snapshot, "--steps=2", "--device=cpu", "--seeds=998-1001"]
    run_cli(generate.main, [*base, "--outdir", tmp_path / "a", "--subdirs", "--class=3"])
    run_cli(generate.main, [*base, "--outdir", tmp_path / "b", "--subdirs", "--class=2"])
    a, b = folder(tmp_path / "a"), folder(tmp_path / "b")
    assert list(a) == ["000000/000998.png", "000000/000999.png", "001000/001000.png", "001000/001001.png"]
    assert not same(a, b)
    assert image_path("out", 12345, True) == Path("out/012000/012345.png")


def test_every_sampler_option_reaches_the_sampler(snapshot, tmp_path, run_cli):
    base = ["--network", snapshot, "--seeds=0-1", "--device=cpu"]
    changes = ["--steps=3", "--sigma_min=0.5", "--sigma_max=5", "--rho=3", "--S_churn=9", "--solver=euler"]
    changes += ["--disc=vp", "--schedule=vp", "--scaling=vp"]
    seen = {}
    run_cli(generate.main, [*base, "--outdir", tmp_path / "base", "--steps=5"])
    reference = folder(tmp_path / "base")
    for change in changes:
        run_cli(generate.main, [*base, "--outdir", tmp_path / change, "--steps=5", change])
        seen[change] = same(folder(tmp_path / change), reference)
    assert not any(seen.values()), seen


def test_optimum_replays_training_images(digits_zip, tmp_path, run_cli):
    from training.dataset import ImageFolderDataset

    dataset = ImageFolderDataset(digits_zip, use_labels=True)
    run_cli(generate_optim.main, ["--network", digits_zip, "--outdir", tmp_path / "a", "--seeds=0-7", "--device=cpu"])
    run_cli(
        generate_optim.main,
        ["--network", digits_zip, "--outdir", tmp_path / "b", "--seeds=0-7", "--class=3", "--device=cpu"],
    )
    for name, pool in [("a", dataset.images()), ("b", dataset.images()[dataset.labels() == 3])]:
        images = folder(tmp_path / name)
        assert len(images) == 8
        for image in images.values():
            assert np.abs(pool[:, 0].astype(int) - image).max((1, 2)).min() <= 1


def test_pixels_are_those_of_the_published_conversion():
    x = torch.tensor([-2, -1, -0.5, 0, 0.5, 0.999, 1, 2, float("nan"), float("inf"), -float("inf")])
    assert to_uint8(x).tolist() == [0, 0, 64, 128, 191, 255, 255, 255, 0, 255, 0]


def test_list_snapshots_by_kimg(tmp_path):
    for name in ["network-snapshot-001000.pkl", "network-snapshot-000020.safetensors", "network-snapshot-x.pkl"]:
        (tmp_path / name).touch()
    assert [kimg for kimg, _ in list_snapshots(tmp_path)] == [20, 1000]


def damaged(snapshot, how, tmp_path):
    import json

    import safetensors.torch

    path = tmp_path / "network-snapshot-000123.safetensors"
    tensors = safetensors.torch.load_file(snapshot)
    header = load_network(snapshot)[1]
    name = "model.map_layer0.weight"
    if how == "cut":
        path.write_bytes(snapshot.read_bytes()[:-100])
        return path
    if how == "missing":
        del tensors[name]
    if how == "extra":
        tensors["model.more"] = torch.zeros(1)
    if how == "shape":
        tensors[name] = torch.zeros(2, 2)
    if how == "version":
        header["format"] = 99
    if how == "class":
        header["network"]["class_name"] = "os.system"
    safetensors.torch.save_file(tensors, path, metadata={} if how == "headless" else {"diffmem": json.dumps(header)})
    return path


@pytest.mark.parametrize(
    "how, message",
    [
        ("cut", "cut short"),
        ("missing", 'lacks "model.map_layer0.weight"'),
        ("extra", 'unexpected "model.more"'),
        ("shape", "has shape [2, 2], the network needs"),
        ("version", "snapshot format 99"),
        ("class", 'Unknown network class "os.system"'),
        ("headless", "no snapshot header"),
    ],
)
def test_damaged_snapshots(how, message, snapshot, tmp_path, run_cli):
    path = damaged(snapshot, how, tmp_path)
    result = run_cli(generate.main, ["--network", path, "--outdir", tmp_path / "out", "--device=cpu"], code=1)
    assert message in result.stderr and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "change, code, message",
    [
        (["--network=missing.safetensors"], 1, '"missing.safetensors" does not exist'),
        (["--network=tests"], 1, "is a folder"),
        (["--network=README.md"], 1, "cut short or not a safetensors"),
        (["--network=http://127.0.0.1:9/x.safetensors"], 1, "Cannot download"),
        (["--seeds=1,a"], 2, "neither a whole number nor a range"),
        (["--seeds=5-2"], 2, "runs backwards"),
        (["--seeds=1,1"], 1, "names a seed twice"),
        (["--seeds=0-1,4294967296"], 2, "4294967296 is larger than"),
        (["--class=4"], 1, "classes 0-3"),
        (["--batch=0"], 2, "--batch"),
        (["--steps=0"], 2, "--steps"),
        (["--solver=rk4"], 2, "--solver"),
        (["--sigma_min=9", "--sigma_max=3"], 1, "exceeds"),
        (["--sigma_max=nan"], 2, "not a finite number"),
        (["--rho=inf"], 2, "not a finite number"),
        (["--disc=iddpm", "--steps=5000"], 1, "5000 steps"),
        (["--outdir=README.md"], 1, "README.md"),
        (["--outdir=README.md/x"], 1, "is a file"),
        (["--outdir="], 1, "is empty"),
        (["--network="], 1, "does not exist"),
    ],
)
def test_wrong_options(change, code, message, snapshot, tmp_path, run_cli, monkeypatch):
    monkeypatch.chdir(Path(__file__).parent.parent)
    args = ["--network", snapshot, "--outdir", tmp_path / "out", "--seeds=0-3", "--device=cpu", *change]
    assert message in run_cli(generate.main, args, code=code).stderr
    assert not (tmp_path / "out").exists()


def test_pickles_run_nothing(tmp_path, run_cli):
    import os
    import pickle

    class Hostile:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    (tmp_path / "network-snapshot-000001.pkl").write_bytes(pickle.dumps(Hostile()))
    args = ["--network", tmp_path / "network-snapshot-000001.pkl", "--outdir", tmp_path / "out"]
    assert "mkdir" in run_cli(generate.main, args, code=1).stderr
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "change, code, message",
    [
        (["--network=missing.zip"], 1, "missing.zip"),
        (["--network=README.md"], 1, "README.md"),
        (["--class=10"], 1, "classes 0-9"),
        (["--network=UNLABELED", "--cond=1"], 1, "labels"),
    ],
)
def test_wrong_options_of_the_optimum(change, code, message, digits_zip, make_zip, tmp_path, run_cli, monkeypatch):
    monkeypatch.chdir(Path(__file__).parent.parent)
    plain = make_zip([np.zeros((8, 8), np.uint8)] * 2, None, tmp_path / "plain.zip")
    change = [c.replace("UNLABELED", plain) for c in change]
    args = ["--network", digits_zip, "--outdir", tmp_path / "out", "--seeds=0-3", "--device=cpu", *change]
    assert message in run_cli(generate_optim.main, args, code=code).stderr
    assert not (tmp_path / "out").exists()


def test_download_is_cached_and_complete(snapshot, tmp_path, run_cli, monkeypatch):
    """A snapshot from an http server on this machine; a short answer leaves nothing in the cache."""
    import http.server
    import threading

    data = snapshot.read_bytes()
    requests = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            requests.append(self.path)
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data if "short" not in self.path else data[:1000])

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("DIFFMEM_CACHE", str(tmp_path / "cache"))
    try:
        url = f"http://127.0.0.1:{server.server_port}"
        args = ["--seeds=0-1", "--steps=2", "--device=cpu", "--outdir", tmp_path / "out"]
        for _ in range(2):
            run_cli(generate.main, ["--network", f"{url}/network-snapshot-000123.safetensors", *args])
        assert len(requests) == 1 and len(list((tmp_path / "cache").iterdir())) == 1
        message = run_cli(generate.main, ["--network", f"{url}/short.safetensors", *args], code=1).stderr
        assert "Cannot download" in message and len(list((tmp_path / "cache").iterdir())) == 1
    finally:
        server.shutdown()
