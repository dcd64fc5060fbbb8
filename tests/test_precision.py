"""--precision and --compile: what they change and leave alone, and that no training step waits for the device."""

import copy
import importlib.util
import json
import multiprocessing
import os
import socket
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from conftest import ROOT
from test_training import TINY, last_snapshot, stats, weights
from torch.utils._python_dispatch import TorchDispatchMode

import generate
import mem_ratio
import train
import training.precision
from memorization.curve.factors import factor_values
from memorization.report.commands import measure_command
from memorization.runs import Run
from training.augment import edm_augment_pipe
from training.dataset import ImageFolderDataset
from training.generation import PngWriter, split_batches
from training.loss import EDMLoss
from training.networks import build_network
from training.optim import load_optimum
from training.optimizer import Adam, clean_gradients
from training.precision import arithmetic, check_precision, own_precision, prepare_denoiser, set_precision
from training.samplers import DrawnAhead, StackedRandomGenerator
from training.snapshots.snapshot import save_snapshot

SMALL = dict(
    img_resolution=8, img_channels=1, model_type="SongUNet", model_channels=8, channel_mult=[1], num_blocks=1,
    attn_resolutions=[4],
)  # fmt: skip


@pytest.fixture(scope="module")
def small_zip(digits_zip, tmp_path_factory, make_zip):
    dataset = ImageFolderDataset(digits_zip, use_labels=True)
    path = tmp_path_factory.mktemp("small") / "digits-50.zip"
    return make_zip(dataset.images()[:50, 0], dataset.labels()[:50], path)


def make_net(seed=0, **kwargs):
    torch.manual_seed(seed)
    net = build_network("EDMPrecond", **{**SMALL, **kwargs})
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.05 * torch.randn_like(p))
    return net


def run(run_cli, outdir, data, *extra, code=0):
    args = ["--outdir", outdir, "--nosubdir", "--data", data, "--duration=1", "--cond=1", *TINY, *extra]
    return run_cli(train.main, args, code=code)


# ----------------------------------------------------------------------------
# Arithmetic.


def test_bf16_rounds_to_8_bits_within_the_network_only():
    net, x, sigma = make_net().eval(), torch.randn(8, 1, 8, 8), torch.full([8], 0.7)
    exact = net(x, sigma)
    set_precision(net, "bf16")
    rounded = net(x, sigma)
    error = (rounded - exact).abs().max() / exact.std()
    assert rounded.dtype == torch.float32 and 1e-4 < error < 0.05
    assert torch.equal(net(x, sigma, force_fp32=True), exact)
    assert all(p.dtype == torch.float32 for p in net.parameters())
    # c_skip x is not rounded: at a small noise level it is nearly everything.
    tiny = torch.full([8], 1e-6)
    torch.testing.assert_close(net(x, tiny), x, rtol=0, atol=1e-5)


def test_gradients_in_bf16_point_the_same_way():
    net = make_net()
    grads = []
    for precision in ["fp32", "bf16"]:
        set_precision(net, precision)
        torch.manual_seed(1)
        EDMLoss()(net, torch.randn(32, 1, 8, 8)).sum().backward()
        grads.append(torch.cat([p.grad.flatten() for p in net.parameters()]))
        net.zero_grad()
    assert grads[1].dtype == torch.float32
    assert 0.99 < torch.cosine_similarity(*grads, dim=0) < 0.999999


def test_tf32_is_on_only_within():
    flags = lambda: (torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32)  # noqa: E731
    before = flags()
    with pytest.raises(KeyError), arithmetic("tf32"):
        assert flags() == (True, True)
        raise KeyError
    with arithmetic("bf16"):
        assert flags() == before
    assert flags() == before


def test_denoisers(monkeypatch):
    net = make_net().eval().requires_grad_(False)
    assert prepare_denoiser(net) is net and own_precision(net, "cpu") == "fp32"
    x, sigma = torch.randn(4, 1, 8, 8), torch.tensor(0.5)
    exact = net(x, sigma)
    monkeypatch.setattr(training.precision, "BACKEND", "aot_eager")
    compiled = prepare_denoiser(net, "fp32", compile=True)
    assert compiled.compiled and compiled.sigma_max == net.sigma_max and compiled.img_resolution == 8
    torch.testing.assert_close(compiled(x, sigma), exact, rtol=1e-5, atol=1e-6)
    with torch.no_grad():
        for p in net.parameters():
            p.mul_(1.01)  # as the moving average goes on: it is the same network
    torch.testing.assert_close(compiled(x, sigma), net(x, sigma), rtol=1e-5, atol=1e-6)
    assert not torch.allclose(compiled(x, sigma), exact, rtol=1e-5, atol=1e-6)
    old = make_net(use_fp16=True)
    assert own_precision(old, "cuda") == "fp16" and own_precision(old, "cpu") == "fp32"
    with pytest.raises(AttributeError):
        compiled.no_such_thing  # noqa: B018


def test_what_a_device_cannot_do(monkeypatch):
    for precision in ["tf32", "fp16"]:
        check_precision(precision, "cuda")
        with pytest.raises(ValueError, match=f"--precision={precision} needs a CUDA device"):
            check_precision(precision, "cpu")
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ValueError, match=r"--compile needs a C\+\+ compiler"):
        check_precision("fp32", "cpu", compile=True)


def test_channels_come_last_where_it_pays_only():
    """Float32 without TF32 is very slow with channels last on CUDA."""
    wanted = {}
    for precision in training.precision.PRECISIONS:
        for device in ["cpu", "cuda"]:
            net = make_net()
            set_precision(net, precision)
            training.precision.compile_step(net.forward, net, device)
            wanted[precision, device] = net.channels_last
    assert {key for key, last in wanted.items() if last} == {("tf32", "cuda"), ("bf16", "cuda"), ("fp16", "cuda")}
    net = make_net().eval()
    x, sigma = torch.randn(2, 1, 8, 8), torch.ones(2)
    before = net(x, sigma)
    net.channels_last = True
    torch.testing.assert_close(net(x, sigma), before, rtol=1e-5, atol=1e-5)


# ----------------------------------------------------------------------------
# The update.


def test_gradients_are_cleaned_as_published():
    nan, inf = float("nan"), float("inf")
    params = [torch.zeros(2, 3), torch.zeros(4), torch.zeros(1, 1, 1, 1)]
    grads = [
        torch.tensor([[1, nan, inf], [-inf, -0.0, 3e5]]),
        torch.tensor([nan, 2.0, 1e-40, -7]),
        torch.full([1] * 4, 8.0),
    ]
    for p, g in zip(params, grads):
        p.grad = g.clone()
    clean_gradients(params, loss_scaling=4)
    for p, g in zip(params, grads):
        assert torch.equal(p.grad, torch.nan_to_num(g / 4, nan=0, posinf=1e5, neginf=-1e5)) and p.grad.shape == p.shape
    assert params[0].grad[0, 2] == 1e5 and params[0].grad[1, 2] == 3e5 / 4 and params[1].grad[0] == 0


@pytest.mark.parametrize("weight_decay", [0, 0.1])
def test_adam_is_torchs_bit_by_bit(weight_decay):
    """Also after its state has gone through a file of either."""
    start = [torch.randn(3, 4), torch.randn(7), torch.randn(2, 1, 3, 3)]
    kwargs = dict(lr=1e-2, betas=[0.9, 0.999], eps=1e-8, weight_decay=weight_decay)

    def made(cls, **more):
        params = [p.clone().requires_grad_() for p in start]
        return params, cls(params, **kwargs, **more)

    (a, ours), (b, theirs) = made(Adam), made(torch.optim.Adam, fused=True)
    random = torch.Generator().manual_seed(0)
    for step in range(8):
        for p, q in zip(a, b):
            p.grad = torch.randn(p.shape, generator=random)
            q.grad = p.grad.clone()
        for group in [*ours.param_groups, *theirs.param_groups]:
            group["lr"] = 1e-3 * step
        ours.step(), theirs.step()
        assert all(torch.equal(p, q) for p, q in zip(a, b))
        if step == 4:  # each goes on from the state of the other
            states = copy.deepcopy((ours.state_dict(), theirs.state_dict()))
            assert [s["step"].item() for s in states[0]["state"].values()] == [5, 5, 5]
            ours.load_state_dict(states[1]), theirs.load_state_dict(states[0])


def test_padding_is_as_far_as_needed_or_more(monkeypatch):
    """On a GPU the margin is the largest there is, so that nobody has to know the transformations."""
    images = torch.rand(64, 3, 8, 8)
    results = []
    for look in [True, False]:
        monkeypatch.setattr("training.augment._may_look", lambda _, look=look: look)
        torch.manual_seed(3)
        results.append(edm_augment_pipe(1)(images))
    assert torch.equal(results[0][1], results[1][1])
    torch.testing.assert_close(results[0][0], results[1][0], rtol=0, atol=1e-4)
    assert (results[0][0] - images).abs().mean() > 0.05


# ----------------------------------------------------------------------------
# Nothing in a step waits.

WAITING = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "unique", "masked_select")
LOOKS = ("item", "tolist", "numpy", "cpu", "__bool__", "__float__", "__int__", "__index__", "nonzero")


class Recorder(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("extra", [[], ["--batch-gpu=16", "--ls=2", "--precision=bf16"], ["--optimizer=SGD"]])
def test_no_step_between_two_ticks_waits_for_the_device(extra, small_zip, tmp_path, run_cli, monkeypatch):
    """With labels, dropout and augmentation, whose margins are chosen here as on a GPU."""
    recorder = Recorder()
    monkeypatch.setattr("training.augment._may_look", lambda _: False)
    for cls in train.OPTIMIZERS.values():
        monkeypatch.setattr(cls, "step", marked(cls.step, recorder))
    for name in LOOKS:
        monkeypatch.setattr(torch.Tensor, name, recorded(getattr(torch.Tensor, name), name, recorder))
    with recorder:
        run(run_cli, tmp_path, small_zip, *extra)
    steps = " ".join(recorder.calls).split("STEP")[1:-1]
    assert len(steps) > 20
    inner = [step.split() for step in steps[2:-2]]  # the first tick ends after the first step, the last with the run
    assert all("convolution_backward" in step and "_foreach_lerp_" in step for step in inner)
    assert {name for step in inner for name in step} & {*WAITING, *(f"Tensor.{name}" for name in LOOKS)} == set()


def marked(function, recorder):
    def step(*args, **kwargs):
        recorder.calls.append("STEP")
        return function(*args, **kwargs)

    return step


def recorded(function, name, recorder):
    def look(*args, **kwargs):
        recorder.calls.append(f"Tensor.{name}")
        return function(*args, **kwargs)

    return look


def test_a_step_needs_no_values_at_all(monkeypatch):
    """On the meta device there are none: whoever looked at one, or copied from the host in every step, would fail."""
    from torch_utils.training_stats import Collector

    device = torch.device("meta")
    with device:
        net = build_network("EDMPrecond", **SMALL, label_dim=3, augment_dim=9, dropout=0.1).train()
    images, labels = torch.empty(4, 1, 8, 8, device=device), torch.zeros(4, dtype=torch.int64, device=device)
    pipe, stats, copies = edm_augment_pipe(0.5), Collector(device), []

    class Copies(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            host = any(isinstance(a, torch.Tensor) and a.device.type == "cpu" and a.ndim for a in args)
            if func.overloadpacket.__name__ in ("_to_copy", "copy_", "lift_fresh") and host:
                copies.append(func.overloadpacket.__name__)
            return func(*args, **(kwargs or {}))

    for _ in range(2):
        copies.clear()
        with Copies():
            loss = EDMLoss()(net, images, labels, augment_pipe=pipe)
            stats.report("loss", loss)
            stats.report("lr", 0.1)
            loss.sum().backward()
            clean_gradients(list(net.parameters()), 2)
    assert copies == []


def test_calls_of_an_update_do_not_grow_with_the_network():
    def count(blocks):
        net = make_net(num_blocks=blocks)
        params = list(net.parameters())
        optimizer = Adam(params, lr=1e-3)
        for p in params:
            p.grad = torch.randn_like(p)
        optimizer.step(), optimizer.step()
        with Recorder() as recorder:
            clean_gradients(params, 2)
            optimizer.step()
        kernels = [
            name for name in recorder.calls if name not in ("view", "narrow", "slice", "split_with_sizes", "detach")
        ]
        return len(params), kernels

    few, many = count(1), count(3)
    assert many[0] > 1.5 * few[0] and many[1] == few[1] and len(few[1]) < 12


# ----------------------------------------------------------------------------
# Runs.


def test_bf16_run(small_zip, tmp_path, run_cli):
    """With accumulation, dropout, augmentation, labels and --mem-eval; close to float32, and not the same."""
    args = ["--data", small_zip, "--duration=1", "--cond=1", *TINY, "--batch-gpu=16", "--mem-eval=16"]
    for precision in ["bf16", "fp32"]:
        out = run_cli(train.main, ["--outdir", tmp_path / precision, *args, f"--precision={precision}"]).output
        assert f"ddpmpp, edm, {precision}" in out
    (a,), (b,) = ((tmp_path / precision).iterdir() for precision in ["bf16", "fp32"])
    assert a.name.endswith("-batch32-bf16") and b.name.endswith("-batch32-fp32")
    assert json.loads((a / "training_options.json").read_text())["precision"] == "bf16"
    losses = [[line["Loss/loss"]["mean"] for line in stats(run_dir)] for run_dir in (a, b)]
    assert losses[0] != losses[1] and losses[0] == pytest.approx(losses[1], rel=0.02)
    assert all("Memorization/ratio" in line for line in stats(a)[1:])
    x, y = weights(last_snapshot(a)), weights(last_snapshot(b))
    assert all(x[name].dtype == torch.float32 for name in x) and any(not torch.equal(x[name], y[name]) for name in x)


def test_resume_goes_on_in_its_precision(small_zip, tmp_path, run_cli):
    more = ["--dump=1", "--precision=bf16"]
    run(run_cli, tmp_path / "whole", small_zip, *more, "--duration=2")
    run(run_cli, tmp_path / "part", small_zip, *more)
    state = tmp_path / "part" / "training-state-000001.pt"
    for other in ["fp32", "tf32"]:
        result = run(
            run_cli, tmp_path / "x", small_zip, "--resume", state, f"--precision={other}", "--duration=2", code=1
        )
        assert "another precision; resume with --precision=bf16" in result.stderr or "CUDA" in result.stderr
    assert not (tmp_path / "x").exists()
    # Nothing said: its own.
    run(run_cli, tmp_path / "rest", small_zip, "--resume", state, "--duration=2")
    assert json.loads((tmp_path / "rest" / "training_options.json").read_text())["precision"] == "bf16"
    a, b = weights(last_snapshot(tmp_path / "whole")), weights(last_snapshot(tmp_path / "rest"))
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize(
    "backend, extra", [("eager", ["--augment=0", "--batch-gpu=16", "--mem-eval=16"]), ("aot_eager", ["--dropout=0"])]
)
def test_compiled_run(backend, extra, small_zip, tmp_path, run_cli, monkeypatch):
    """These backends compute what was traced, kernel by kernel: the numbers are those of the plain run."""
    torch.compiler.reset()
    monkeypatch.setattr(training.precision, "BACKEND", backend)
    run(run_cli, tmp_path / "plain", small_zip, *extra)
    run(run_cli, tmp_path / "compiled", small_zip, *extra, "--compile")
    assert json.loads((tmp_path / "compiled" / "training_options.json").read_text())["compile"] is True
    a, b = ([line["Loss/loss"]["mean"] for line in stats(tmp_path / name)] for name in ["plain", "compiled"])
    assert a == pytest.approx(b, rel=1e-4)
    a, b = (weights(last_snapshot(tmp_path / name)) for name in ["plain", "compiled"])
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-3, atol=1e-4)


def _rank(rank, port, args):
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "False"}
    torch.set_num_threads(1)
    training.precision.BACKEND = "eager"
    train.main(args, standalone_mode=False)


@pytest.mark.slow
def test_two_compiled_processes_in_bf16(small_zip, tmp_path):
    """With gradient accumulation, dropout and augmentation; the moving average is the same on both ranks' disk."""
    with socket.socket() as sock:
        sock.bind(("localhost", 0))
        port = sock.getsockname()[1]
    args = [f"--outdir={tmp_path}", f"--data={small_zip}", "--duration=0.5", *TINY, "--batch-gpu=8"]
    args += ["--compile", "--precision=bf16"]
    context = multiprocessing.get_context("spawn")
    ranks = [context.Process(target=_rank, args=(rank, port, args)) for rank in range(2)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(120)
    assert [process.exitcode for process in ranks] == [0, 0]
    (run_dir,) = tmp_path.iterdir()
    assert run_dir.name.endswith("-gpus2-batch32-bf16")
    losses = [line["Loss/loss"] for line in stats(run_dir)]
    assert sum(loss["num"] for loss in losses) == 1024 * 64 and losses[-1]["mean"] < losses[0]["mean"]


@pytest.mark.parametrize(
    "change, code, message",
    [
        (["--precision=fp8"], 2, "--precision"),
        (["--precision=tf32"], 1, "--precision=tf32 needs a CUDA device"),
        (["--precision=fp16"], 1, "--precision=fp16 needs a CUDA device"),
        (["--fp16=1", "--precision=bf16"], 1, "--fp16=1 and --precision=bf16 exclude each other"),
    ],
)
def test_wrong_options(change, code, message, small_zip, tmp_path, run_cli):
    assert message in run(run_cli, tmp_path / "x", small_zip, *change, code=code).stderr
    assert not (tmp_path / "x").exists()


def test_precision_is_a_factor(tmp_path):
    """Runs from before it was an option have float32, or float16 by the published option."""
    base = {"dataset_kwargs": {"max_size": 8}, "network_kwargs": {"use_fp16": False}}
    more = [{"precision": "bf16"}, {}, {"network_kwargs": {"use_fp16": True}}]
    runs = [Run(tmp_path, base | options) for options in more]
    assert factor_values(runs, "precision")[0] == ["bf16", "fp32", "fp16"]


# ----------------------------------------------------------------------------
# Sampling and measuring.


@pytest.fixture(scope="module")
def measured_run(tmp_path_factory):
    """Two snapshots of one network with other weights."""
    run_dir = tmp_path_factory.mktemp("measured")
    for kimg in (1, 2):
        save_snapshot(run_dir / f"network-snapshot-{kimg:06d}.safetensors", make_net(kimg), kimg, dict(path="x.zip"))
    return run_dir


def test_records_of_another_precision_are_others(measured_run, small_zip, run_cli, monkeypatch):
    """And those from before it was recorded count as float32."""
    torch.compiler.reset()
    monkeypatch.setattr(training.precision, "BACKEND", "eager")
    compiled = []
    monkeypatch.setattr(
        torch, "compile", lambda *args, real=torch.compile, **kw: compiled.append(1) or real(*args, **kw)
    )
    base = ["--expdir", measured_run, "--knn-ref", small_zip, "--seeds=0-19", "--steps=3", "--batch=32", "--device=cpu"]
    log = measured_run / "mem_traj.jsonl"

    def measure(*options):
        out = run_cli(mem_ratio.main, [*base, *options]).output
        return out, [json.loads(line) for line in log.read_text().splitlines()]

    out, records = measure()
    assert "bf16" not in out and [(r["precision"], r["compile"]) for r in records] == [("fp32", False)] * 2
    old = [{key: value for key, value in r.items() if key not in ("precision", "compile")} for r in records]
    log.write_text("".join(json.dumps(r) + "\n" for r in old))
    for options in ([], ["--precision=fp32"]):
        out, records = measure(*options)
        assert out.count("measured before") == 2 and records == old

    out, records = measure("--precision=bf16")
    assert "measured before" not in out and out.count("(bf16)") >= 2 and len(records) == 4
    assert records[0]["mean_distance"] != records[2]["mean_distance"]
    assert records[0]["mean_distance"] == pytest.approx(records[2]["mean_distance"], rel=0.01)
    out, records = measure("--compile")  # this backend does not round differently
    assert "measured before" not in out and len(records) == 6 and compiled == [1]  # for both snapshots
    assert [r["mean_distance"] for r in records[4:]] == [r["mean_distance"] for r in old]
    out, records = measure("--threshold=0.5", "--precision=bf16")  # from the rows on disk, which are of --compile
    assert len(records) == 6 and all("thresholds" in r for r in records[2:4])

    command = measure_command(records[2], measured_run)
    assert "--precision=bf16" in command and "--compile" in measure_command(records[4], measured_run)
    assert not [word for word in measure_command(old[0], measured_run) if "precision" in word or "compile" in word]


def test_generate_in_bf16_and_compiled(measured_run, tmp_path, run_cli, monkeypatch):
    torch.compiler.reset()
    monkeypatch.setattr(training.precision, "BACKEND", "eager")
    base = ["--network", measured_run / "network-snapshot-000002.safetensors", "--steps=3", "--device=cpu"]
    images = {}
    for name, options in dict(plain=[], bf16=["--precision=bf16"], compiled=["--compile", "--batch=16"]).items():
        run_cli(generate.main, [*base, "--outdir", tmp_path / name, "--seeds=0-19", *options])
        images[name] = {p.name: p.read_bytes() for p in sorted((tmp_path / name).glob("*.png"))}
    assert len(images["plain"]) == 20 and images["plain"] == images["compiled"] and images["plain"] != images["bf16"]
    result = run_cli(generate.main, [*base, "--outdir", tmp_path / "x", "--precision=tf32"], code=1)
    assert "--precision=tf32 needs a CUDA device" in result.stderr and not (tmp_path / "x").exists()


def test_the_optimum_has_its_own_arithmetic(small_zip, tmp_path, run_cli):
    base = ["--network", small_zip, "--log", tmp_path / "mem_traj.log", "--device=cpu"]
    for option in ["--compile", "--precision=bf16"]:
        assert "the optimum has its own" in run_cli(mem_ratio.main, [*base, option], code=2).stderr
    with pytest.raises(ValueError, match="the optimum has its own"):
        prepare_denoiser(load_optimum(small_zip), "bf16")


def test_noise_drawn_ahead_is_the_same():
    plain = StackedRandomGenerator("cpu", [3, 1, 4])
    with ThreadPoolExecutor(1) as pool:
        ahead = DrawnAhead(StackedRandomGenerator("cpu", [3, 1, 4]), pool)
        for _ in range(4):
            like = torch.empty(3, 2, dtype=torch.float64)
            assert torch.equal(ahead.randn_like(like), plain.randn_like(like))


def test_batches_end_where_they_must():
    assert split_batches(range(10), 4) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert split_batches(range(10), 4, ends=[3, 3, 10, 0]) == [[0, 1, 2], [3, 4, 5, 6], [7, 8, 9]]
    assert split_batches([], 4) == []


def test_an_error_in_the_writing_thread_is_raised(tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("training.generation.save_png", full)
    with pytest.raises(OSError, match="No space left"), PngWriter(tmp_path) as writer:
        writer.save([0], torch.zeros(1, 1, 8, 8, dtype=torch.uint8))


def load_benchmark(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_benchmark_of_training(tmp_path, run_cli):
    """Both loops begin with the same loss, and the faster one is no other training."""
    args = ["--device=cpu", "--steps=1", "--turns=1", "--batch=4", f"--out={tmp_path / 'a.json'}"]
    out = run_cli(load_benchmark("bench_train").main, args).output
    found = json.loads((tmp_path / "a.json").read_text())
    assert found["first_losses"][0] == pytest.approx(found["first_losses"][1], rel=1e-4)
    assert "demo, batch 4, fp32" in out and 0 < found["convolution_share"] < 1


def test_effect_of_precision(measured_run, small_zip, tmp_path, run_cli):
    (measured_run / "training_options.json").write_text(json.dumps({"precision": "bf16"}))
    args = [measured_run, measured_run / ".." / measured_run.name, f"--knn-ref={small_zip}", "--seeds=0-7"]
    args += ["--device=cpu", f"--out={tmp_path / 'a'}"]
    out = run_cli(load_benchmark("precision_effect").main, args).output
    found = json.loads((tmp_path / "a").read_text())
    assert [r.get("measured") for r in found] == ["fp32", "bf16", "fp32", "bf16", None]
    assert "trained bf16  measured fp32" in out and found[1]["mean_pixel_change"] > 0 and 0 <= found[1]["flips"] <= 1
    assert found[4]["difference"] == 0 and found[4]["ci_low"] < 0 < found[4]["ci_high"]
