"""Published .pkl snapshots: they load, give the published outputs, and convert; and what does not fit is refused."""

import inspect
import json
import pickle
import pickletools
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT
from published_pickles import as_record, dumps, snapshot_of, without_frames

import generate
import train
from dnnlib.util import EasyDict
from memorization.measure.subjects import snapshot_subjects
from training import networks
from training.networks import build_network
from training.snapshots import snapshot
from training.snapshots.arguments import CHECKS, check_arguments
from training.snapshots.published import read_published
from training.snapshots.snapshot import load_network

REFERENCE = ROOT / "tests" / "reference" / "edm_pickles"
NAMES = ["adm-cond-edm", "ddpmpp-augment-vp", "ddpmpp-uncond-edm", "ncsnpp-cond-ve"]
KWARGS = dict(img_resolution=8, img_channels=1, model_type="SongUNet", model_channels=4, channel_mult=[1], num_blocks=1)


@pytest.fixture(scope="module")
def small():
    torch.manual_seed(1)
    return build_network("EDMPrecond", **KWARGS, attn_resolutions=[8], dropout=0)


def state(net):
    return {name: t.clone() for name, t in net.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) and a[k].dtype == b[k].dtype for k in a)


def write(path, content, **kwargs):
    path.write_bytes(dumps(content, **kwargs))
    return path


@pytest.mark.parametrize("name", NAMES)
def test_outputs_are_the_published_ones(name, tmp_path):
    net, header = load_network(REFERENCE / f"{name}.pkl")
    data = {k: torch.from_numpy(v) for k, v in np.load(REFERENCE / f"{name}.npz").items()}
    out = net(data["x"], data["sigma"], data.get("class_labels"))
    assert (out - data["out"]).abs().max() <= 1e-4 * data["out"].abs().max()
    assert not net.training and header["dataset"]["path"] == "datasets/x.zip" and header["kimg"] is None
    assert (header["augment"] is None) == ("augment" not in name)

    # Converted, it is the same network.
    path = tmp_path / "network-snapshot-000001.safetensors"
    snapshot._write(path, net, header)
    again, header_again = load_network(path)
    assert same(state(net), state(again)) and header_again == header
    assert torch.equal(again(data["x"], data["sigma"], data.get("class_labels")), out)


@pytest.mark.slow
@pytest.mark.parametrize("run", ["-m training.snapshots.snapshot", "training/snapshots/snapshot.py"])
def test_command_line(run, tmp_path):
    source = tmp_path / "network-snapshot-001234.pkl"
    source.write_bytes((REFERENCE / "ddpmpp-augment-vp.pkl").read_bytes())
    dest = tmp_path / "converted.safetensors"
    command = [sys.executable, *run.split(), str(source), f"--dest={dest}"]
    lines = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout.splitlines()
    values = {line[:12].strip(): line[12:] for line in lines}
    assert values["network"].startswith("VPPrecond img_resolution=16, ") and "model_type='SongUNet'" in lines[0]
    assert values["size"] == "189491 parameters, 147 tensors, float32"
    assert "path='datasets/x.zip'" in values["dataset"] and values["kimg"] == "1234"
    assert values["loss"] == "VPLoss" and values["augment"].startswith("AugmentPipe p=0.12")
    assert lines[-1] == f'Wrote "{dest}".' and load_network(dest)[1]["kimg"] == 1234


def test_command_line_errors(tmp_path, run_cli):
    good = REFERENCE / "adm-cond-edm.pkl"
    assert "must end in .safetensors" in run_cli(snapshot.main, [good, f"--dest={tmp_path / 'x.pkl'}"], code=2).stderr
    bad = tmp_path / "bad.pkl"
    bad.write_bytes(good.read_bytes()[:-1])
    dest = tmp_path / "x.safetensors"
    assert "bad.pkl" in run_cli(snapshot.main, [bad, f"--dest={dest}"], code=1).stderr and not dest.exists()


# ----------------------------------------------------------------------------
# What other versions write.


@pytest.mark.parametrize("protocol", [3, 4, 5])
def test_protocols(protocol, small, tmp_path):
    path = write(tmp_path / "a.pkl", snapshot_of(small), protocol=protocol)
    assert same(state(load_network(path)[0]), state(small))


@pytest.mark.parametrize("protocol", [3, 4, 5])
@pytest.mark.parametrize("package", ["numpy.core", "numpy._core"])
def test_numpy_values_in_the_arguments(protocol, package, small, tmp_path, monkeypatch):
    values = dict(a=np.float64(0.5), b=np.int64(-3), c=np.bool_(True), d=np.arange(6.0).reshape(2, 3), e=np.float16(2))
    values.update(f=np.asfortranarray(values["d"]), g=np.arange(3, dtype=">i4"), h=EasyDict(x=EasyDict(y=(1, None))))
    data = dumps(snapshot_of(small, dataset_kwargs=values), protocol=3)
    if protocol > 3:
        data = dumps(snapshot_of(small, dataset_kwargs=values), protocol=protocol)
    # A name has its length before it in protocols 4 and 5.
    for module in ("multiarray", "numeric"):
        old, new = (f"{p}.{module}".encode() for p in ("numpy._core", package))
        data = data.replace(b"c" + old + b"\n", b"c" + new + b"\n")
        data = data.replace(bytes([len(old)]) + old, bytes([len(new)]) + new)
    path = tmp_path / "a.pkl"
    path.write_bytes(without_frames(data))
    assert read_published(path).dataset == dict(
        a=0.5, b=-3, c=True, d=[[0, 1, 2], [3, 4, 5]], e=2, f=[[0, 1, 2], [3, 4, 5]], g=[0, 1, 2],
        h=dict(x=dict(y=[1, None])),
    )  # fmt: skip


class Weight:
    """A tensor that pickles as another version of torch, or another program, would write it."""

    def __init__(self, function, *args):
        self.how = function, args

    def __reduce__(self):
        return self.how


def variants(t):
    import torch._utils as u
    from torch.storage import TypedStorage

    storage = TypedStorage(wrap_storage=t.untyped_storage(), dtype=t.dtype, _internal=True)
    rest = (0, tuple(t.shape), t.stride(), False, {})
    yield "untyped, with a dtype", Weight(u._rebuild_tensor_v3, t.untyped_storage(), *rest, t.dtype)
    yield "typed, with metadata", Weight(u._rebuild_tensor_v2, storage, *rest, {})
    yield "not contiguous", t.t().contiguous().t() if t.ndim == 2 else t
    padded = torch.cat([torch.full([3], torch.nan), t.flatten(), torch.full([2], torch.nan)])
    yield "part of a storage", padded[3:-2].reshape(t.shape)
    yield "not a parameter", t.detach().clone()


@pytest.mark.parametrize("which", range(5))
def test_ways_to_write_a_tensor(which, small, tmp_path):
    content = snapshot_of(small)
    layer = content["ema"].meta["state"]["_modules"]["model"].meta["state"]["_modules"]["map_layer0"]
    parameters = layer.meta["state"]["_parameters"]
    for name, p in list(parameters.items()):
        parameters[name] = list(variants(p.detach()))[which][1]
    path = write(tmp_path / "a.pkl", content)
    assert same(state(load_network(path)[0]), state(small))


def test_names_of_torch_1_12(small, tmp_path):
    """There untyped storages are torch.storage._UntypedStorage."""
    content = snapshot_of(small)
    parameters = content["ema"].meta["state"]["_modules"]["model"].meta["state"]["_modules"]["map_layer0"].meta
    parameters = parameters["state"]["_parameters"]
    parameters["bias"] = list(variants(parameters["bias"].detach()))[0][1]
    data = dumps(content, protocol=3)
    typed, untyped = b"ctorch.storage\nUntypedStorage\n", b"ctorch.storage\n_UntypedStorage\n"
    at = data.index(typed)
    start = data.rindex(b"B", 0, data.rindex(b"\x80\x02\x8a\n", 0, at))  # BINBYTES and its length, of this storage
    size = int.from_bytes(data[start + 1 : start + 5], "little")
    assert data[start + 5 : start + 5 + size].count(typed) == 1
    data = data[: start + 1] + (size + 1).to_bytes(4, "little") + data[start + 5 :].replace(typed, untyped)
    (tmp_path / "a.pkl").write_bytes(data)
    assert same(state(load_network(tmp_path / "a.pkl")[0]), state(small))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_weights(dtype, small, tmp_path):
    half = build_network(**small.init_kwargs).to(dtype)
    net, _ = load_network(write(tmp_path / "a.pkl", snapshot_of(half)))
    assert same(state(net), {k: t.float() for k, t in half.state_dict().items()})


@pytest.mark.parametrize("class_name", list(networks.PRECONDS))
def test_all_networks(class_name, tmp_path):
    """Every preconditioner, and use_fp16, on an ADM network with labels and augmentation."""
    kwargs = KWARGS | dict(model_type="DhariwalUNet", label_dim=3, use_fp16=True, augment_dim=2, attn_resolutions=[])
    net = build_network(class_name, **kwargs)
    again, header = load_network(write(tmp_path / "a.pkl", snapshot_of(net)))
    assert type(again) is type(net) and again.use_fp16 and same(state(again), state(net))
    assert (again.sigma_min, again.sigma_max) == (net.sigma_min, net.sigma_max)
    assert {t.device.type for t in state(again).values()} == {"cpu"}


def test_skips_are_all_ones_where_the_record_does_not_say(small, tmp_path):
    content = snapshot_of(small)
    assert "skip_connections" not in content["ema"].meta["state"]["_init_kwargs"]
    assert load_network(write(tmp_path / "a.pkl", content))[0].model.skip_connections == [1, 1]
    content["ema"].meta["state"]["_modules"]["model"].meta["state"]["skip_connections"] = [0, 1]
    assert load_network(write(tmp_path / "a.pkl", content))[0].model.skip_connections == [0, 1]


def test_class_among_the_arguments_is_not_taken_for_the_class(small, tmp_path):
    content = snapshot_of(small)
    kwargs(class_name="VPPrecond")(content)
    assert load_network(write(tmp_path / "a.pkl", content))[1]["network"]["class_name"] == "EDMPrecond"


def test_attributes_count_more_than_arguments(small, tmp_path):
    """As in the published loader, which restores attributes."""
    content = snapshot_of(small)
    content["ema"].meta["state"].update(sigma_data=0.25, _init_args=(8, 1))
    net, header = load_network(write(tmp_path / "a.pkl", content))
    assert net.sigma_data == header["network"]["sigma_data"] == 0.25


# ----------------------------------------------------------------------------
# Where a snapshot is taken.


@pytest.fixture
def run_dir(tmp_path):
    path = tmp_path / "run" / "network-snapshot-000100.pkl"
    path.parent.mkdir()
    path.write_bytes((REFERENCE / "ddpmpp-uncond-edm.pkl").read_bytes())
    return path.parent


def test_generate(run_dir, tmp_path, run_cli):
    path = run_dir / "network-snapshot-000100.pkl"
    args = ["--seeds=0,1", "--steps=2", "--device=cpu"]
    run_cli(generate.main, [f"--network={path}", f"--outdir={tmp_path / 'a'}", *args])
    run_cli(snapshot.main, [path, f"--dest={tmp_path / 'b.safetensors'}"])
    run_cli(generate.main, [f"--network={tmp_path / 'b.safetensors'}", f"--outdir={tmp_path / 'b'}", *args])
    images = [sorted((tmp_path / folder).glob("*.png")) for folder in "ab"]
    assert len(images[0]) == 2 and [p.read_bytes() for p in images[0]] == [p.read_bytes() for p in images[1]]


def test_a_run_folder_of_the_published_code(run_dir):
    (subject,) = snapshot_subjects(run_dir, "cpu")
    assert (subject.kimg, subject.load()[1]["kimg"]) == (100, 100)


def test_transfer(small, digits_zip, tmp_path, run_cli):
    path = write(tmp_path / "a.pkl", snapshot_of(small))
    args = [f"--outdir={tmp_path / 'runs'}", f"--data={digits_zip}", "--precond=edm", "--cres=1", "--num-channels=4"]
    args += ["--num-blocks=1", "--augment=0", "--device=cpu", "--dry-run", f"--transfer={path}"]
    run_cli(train.main, [*args, "--attn-resolutions=8"])
    assert "lacks" in run_cli(train.main, [*args, "--attn-resolutions=8", "--num-blocks=2"], code=1).stderr


# ----------------------------------------------------------------------------
# What does not fit.


def test_every_argument_has_a_check():
    names = {"class_name"}
    for cls in (*networks.PRECONDS.values(), *networks.UNETS.values(), networks._Precond):
        names |= {n for n, p in inspect.signature(cls).parameters.items() if p.kind is p.POSITIONAL_OR_KEYWORD}
        names |= {n for n, p in inspect.signature(cls).parameters.items() if p.kind is p.KEYWORD_ONLY}
    assert names - {"in_channels", "out_channels"} == CHECKS.keys()
    for reference in json.loads((ROOT / "tests/reference/networks.json").read_text()).values():
        kwargs = reference.get("kwargs", {})
        check_arguments({"class_name": "x"} | {k: v for k, v in kwargs.items() if k in CHECKS})


def in_state(record, *steps):
    for step in steps:
        record = record.meta["state"]["_modules"][step]
    return record.meta["state"]


def kwargs(**change):
    return lambda c: c["ema"].meta["state"]["_init_kwargs"].update(change)


def weight(make):
    def change(c):
        parameters = in_state(c["ema"], "model", "map_layer0")["_parameters"]
        parameters["weight"] = make(parameters["weight"].detach())

    return change


WRONG = {
    "no network": (lambda c: c.pop("ema"), "ema"),
    "network is a number": (lambda c: c.update(ema=1), "ema"),
    "another class": (lambda c: c["ema"].meta.update(class_name="Precond"), "class Precond; known are"),
    "a class that is a path": (lambda c: c["ema"].meta.update(class_name="os.system"), "class os.system"),
    "class name is a number": (lambda c: c["ema"].meta.update(class_name=3), "without the name of a class"),
    "a function": (lambda c: c["ema"].meta.update(type="func"), "without the name of a class"),
    "state is a list": (lambda c: c["ema"].meta.update(state=[]), "without a state"),
    "unknown layer": (
        lambda c: in_state(c["ema"], "model")["_modules"]["map_layer0"].meta.update(class_name="Dense"), "class Dense"),
    "no model": (lambda c: in_state(c["ema"])["_modules"].clear(), "without a model"),
    "another U-Net than it says": (
        lambda c: in_state(c["ema"])["_modules"]["model"].meta.update(class_name="DhariwalUNet"), "a.pkl"),
    "tensor missing": (lambda c: in_state(c["ema"], "model", "map_layer0")["_parameters"].pop("bias"), "lacks"),
    "tensor too many": (
        lambda c: in_state(c["ema"], "model")["_buffers"].update(x=torch.zeros(2)), "unexpected"),
    "tensor is a number": (
        lambda c: in_state(c["ema"], "model")["_parameters"].update(x=3), "no tensor"),
    "two tensors of one name": (
        lambda c: in_state(c["ema"], "model")["_parameters"].update({"map_layer0.bias": torch.zeros(16)}), "or two"),
    "shape": (weight(lambda t: t[:-1].clone()), "has shape [15, 4], the network needs [16, 4]"),
    "integers": (weight(lambda t: t.long()), "torch.int64"),
    "doubles": (weight(lambda t: t.double()), "torch.float64"),
    "complex": (weight(lambda t: t.to(torch.complex64)), "a.pkl"),
    "modules without end": (lambda c: in_state(c["ema"], "model")["_modules"].update(x=c["ema"]), "a.pkl"),
    "very long name": (lambda c: in_state(c["ema"], "model")["_buffers"].update({"n" * 999: torch.ones(1)}), "letters"),
    "unknown argument": (kwargs(attention="yes"), "attention is no argument"),
    "channels": (kwargs(model_channels=10**6), "model_channels must be a whole number from 1 to 65536"),
    "many channels": (kwargs(model_channels=65536), "the network needs"),
    "many blocks": (kwargs(num_blocks=10**9), "num_blocks must be"),
    "more blocks": (kwargs(num_blocks=60), "lacks"),
    "large images": (kwargs(img_resolution=10**12), "img_resolution must be"),
    "nan": (kwargs(dropout=float("nan")), "dropout must be"),
    "text for a number": (kwargs(model_channels="4"), "model_channels must be"),
    "true for a number": (kwargs(model_channels=True), "model_channels must be"),
    "number for a list": (kwargs(channel_mult=2), "channel_mult must be"),
    "long list": (kwargs(channel_mult=[1] * 1000), "channel_mult must be"),
    "list of text": (kwargs(channel_mult=["1"]), "channel_mult must be"),
    "skips": (kwargs(skip_connections=[1] * 7), "skip_connections must be 2"),
    "arguments by position": (
        lambda c: c["ema"].meta["state"].update(_init_args=tuple(range(20))), "that are not its own"),
    "arguments are text": (lambda c: c["ema"].meta["state"].update(_init_kwargs="x"), "_init_kwargs"),
    "loss is text": (lambda c: c.update(loss_fn="EDMLoss"), "loss"),
    "a tensor among the dataset's arguments": (
        lambda c: c["dataset_kwargs"].update(x=torch.zeros(1)), "tensor where plain values"),
}  # fmt: skip


@pytest.mark.parametrize("which", WRONG)
def test_what_does_not_fit_is_refused(which, small, tmp_path):
    change, message = WRONG[which]
    content = snapshot_of(small)
    change(content)
    path = write(tmp_path / "a.pkl", content)
    with pytest.raises(ValueError, match="a.pkl") as caught:
        load_network(path)
    assert message in str(caught.value) and "\n" not in str(caught.value) and len(str(caught.value)) < 400


def test_headers_of_safetensors_are_checked_the_same_way(small, tmp_path):
    """No memory is taken for a network that does not fit its tensors."""
    header = dict(format=1, network=small.init_kwargs | dict(model_channels=65536, channel_mult=[1024]), dataset={})
    path = tmp_path / "a.safetensors"
    snapshot._write(path, small, header)
    with pytest.raises(ValueError, match="lacks"):
        load_network(path)
    header["network"] |= dict(num_blocks=10**9)
    snapshot._write(path, small, header)
    with pytest.raises(ValueError, match="num_blocks must be"):
        load_network(path)


def test_other_files(tmp_path):
    for name, content, message in [
        ("zip.pkl", None, "zip archive"),
        ("text.pkl", b"hello", "no pickle"),
        ("empty.pkl", b"", "cut short"),
        ("list.pkl", pickle.dumps([1]), "ema"),
        ("noname", pickle.dumps([1]), "ema"),
        ("noname2", b"hello", "not a safetensors file"),
    ]:
        path = tmp_path / name
        if content is None:
            torch.save({"ema": 1}, path)
        else:
            path.write_bytes(content)
        with pytest.raises(ValueError, match=message):
            load_network(path)


def test_records_survive_a_round_trip_of_the_test_writer(small):
    """The writer of these tests makes what the reference files hold: the same names."""

    def names(data):
        strings = {arg for op, arg, _ in pickletools.genops(data) if op.name == "SHORT_BINUNICODE"}
        return {s for s in strings if s.startswith(("torch", "_rebuild", "_load", "_reconstruct", "collections"))}

    reference = names((REFERENCE / "ddpmpp-uncond-edm.pkl").read_bytes())
    assert names(dumps(snapshot_of(small))) == reference and as_record(None) is None
