"""Whatever bytes they are given, the readers answer with a result or with a ValueError or OSError in one line."""

import contextlib
import io
import json
import os
import warnings
from pathlib import Path

import numpy as np
import pytest
from bad_files import PNG, change_snapshot, dataset_zip, make_zip
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from dataset_utils.sources import open_source
from dnnlib.images import ImageFiles, decode_image, label_array
from dnnlib.util import parse_int_list
from memorization.records import format_int_list, read_records
from memorization.runs import read_run
from training.dataset import ImageFolderDataset
from training.networks import build_network
from training.snapshots.snapshot import load_network, save_snapshot
from training.trace import read_trace

EXAMPLES = settings(max_examples=150, deadline=None, derandomize=True, database=None,
                    suppress_health_check=[HealthCheck.function_scoped_fixture])  # fmt: skip

# A few bytes changed, a part cut out, a part put in: of these, damage is made.
DAMAGE = st.lists(
    st.tuples(st.floats(0, 1), st.integers(0, 40), st.binary(max_size=12)), min_size=1, max_size=4
)  # (where, bytes that go, bytes that come)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda values: st.lists(values, max_size=4) | st.dictionaries(st.text(max_size=8), values, max_size=4),
    max_leaves=12,
)


def damage(data, changes):
    data = bytearray(data)
    for where, gone, come in changes:
        at = int(where * len(data))
        data[at : at + gone] = come
    return bytes(data)


@contextlib.contextmanager
def answers():
    """What is refused is refused in one line."""
    with warnings.catch_warnings(action="ignore"):
        try:
            yield
        except (ValueError, OSError) as err:
            assert str(err).strip() and "\n" not in str(err).strip()


# ----------------------------------------------------------------------------
# Snapshots.


@pytest.fixture(scope="module")
def snapshot(tmp_path_factory):
    net = build_network(
        "EDMPrecond", img_resolution=8, img_channels=1, label_dim=0, model_type="SongUNet", model_channels=8,
        channel_mult=[1], num_blocks=1, attn_resolutions=[], dropout=0,
    )  # fmt: skip
    path = tmp_path_factory.mktemp("fuzz") / "x.safetensors"
    save_snapshot(path, net, 1, {"path": "data.zip"})
    return path.read_bytes()


@EXAMPLES
@given(changes=DAMAGE, early=st.booleans())
def test_damaged_snapshot(snapshot, tmp_path, changes, early):
    """Damage anywhere, half of it within the header."""
    if early:
        changes = [(where * 4000 / len(snapshot), gone, come) for where, gone, come in changes]
    (tmp_path / "x.safetensors").write_bytes(damage(snapshot, changes))
    with answers():
        load_network(tmp_path / "x.safetensors")


@EXAMPLES
@given(data=st.binary(max_size=300))
def test_any_bytes_as_a_snapshot(tmp_path, data):
    (tmp_path / "x.safetensors").write_bytes(data)
    with pytest.raises((ValueError, OSError)):
        load_network(tmp_path / "x.safetensors")


@EXAMPLES
@given(content=JSON | st.dictionaries(st.sampled_from(["format", "network", "dataset", "kimg"]), JSON | st.just(1)))
def test_any_header_in_a_snapshot(snapshot, tmp_path, content):
    (tmp_path / "x.safetensors").write_bytes(change_snapshot(snapshot, header=lambda _: json.dumps(content)))
    with pytest.raises((ValueError, OSError)):
        load_network(tmp_path / "x.safetensors")


@EXAMPLES
@given(
    name=st.sampled_from(["class_name", "img_resolution", "img_channels", "label_dim", "model_type", "model_channels",
                          "channel_mult", "num_blocks", "attn_resolutions", "dropout", "sigma_data", "more"]),
    value=JSON | st.integers(0, 64) | st.lists(st.integers(0, 4), max_size=4),
)  # fmt: skip
def test_any_argument_in_a_snapshot(snapshot, tmp_path, name, value):
    def change(header):
        header["network"][name] = value

    (tmp_path / "x.safetensors").write_bytes(change_snapshot(snapshot, header=change))
    with answers():
        load_network(tmp_path / "x.safetensors")


# ----------------------------------------------------------------------------
# Datasets.

GOOD = {"stored": dataset_zip(3), "deflated": make_zip(("a/0.png", PNG), ("a/1.png", PNG), method=8)}


def read_all(path):
    """Everything that a dataset can be asked for, by both of its readers."""
    with answers():
        dataset = ImageFolderDataset(path, use_labels=True)
        assert dataset.images().dtype == np.uint8 and len(dataset.labels()) == len(dataset) == len(dataset.images())
        dataset.groups()
    with answers(), open_source(path) as source:
        for image, _ in source:
            assert image.dtype == np.uint8


@EXAMPLES
@given(kind=st.sampled_from(list(GOOD)), changes=DAMAGE)
def test_damaged_zip(tmp_path, kind, changes):
    (tmp_path / "x.zip").write_bytes(damage(GOOD[kind], changes))
    read_all(tmp_path / "x.zip")
    assert os.listdir(tmp_path) == ["x.zip"]


LABEL = (
    st.none() | st.booleans() | st.integers(-2, 5) | st.floats() | st.lists(st.integers(0, 3) | st.floats(), max_size=3)
)
NAMES = [f"00000/img{i:08d}.png" for i in range(3)]


@EXAMPLES
@given(content=JSON | st.fixed_dictionaries(
    {}, optional={"labels": JSON | st.lists(st.tuples(st.sampled_from([*NAMES, "x"]), LABEL), max_size=4),
                  "groups": JSON | st.lists(st.tuples(st.sampled_from(NAMES), st.text(max_size=3) | JSON), max_size=4)},
))  # fmt: skip
@example(content={"labels": [[name, 1] for name in NAMES], "groups": [[name, "a"] for name in NAMES]})
def test_any_dataset_json(tmp_path, content):
    (tmp_path / "x.zip").write_bytes(dataset_zip(3, json.dumps(content).encode()))
    read_all(tmp_path / "x.zip")


@EXAMPLES
@given(text=st.binary(max_size=200))
def test_any_bytes_as_dataset_json(tmp_path, text):
    (tmp_path / "x.zip").write_bytes(dataset_zip(3, text))
    with answers():
        ImageFiles(tmp_path / "x.zip").labels()


@EXAMPLES
@given(labels=st.lists(LABEL, min_size=1, max_size=4))
def test_any_labels(labels):
    with answers():
        array = label_array(labels, "x")
        assert array.shape[0] == len(labels) and np.isfinite(array).all()


def encoded(form):
    import PIL.Image

    buffer = io.BytesIO()
    PIL.Image.fromarray(np.arange(768, dtype=np.uint8).reshape(16, 16, 3)).save(buffer, form)
    return buffer.getvalue()


PICTURES = {form: encoded(form) for form in ("png", "jpeg", "gif", "bmp", "tiff", "webp", "ppm")}


@EXAMPLES
@given(form=st.sampled_from(list(PICTURES)), changes=DAMAGE)
def test_damaged_image(form, changes):
    with answers():
        image = decode_image(damage(PICTURES[form], changes), f"x.{form}")
        assert image.dtype == np.uint8 and image.ndim in (2, 3) and image.size


# ----------------------------------------------------------------------------
# Lists, records, traces.


@EXAMPLES
@given(text=st.text(alphabet="0123456789,- x٣", max_size=12) | st.text(max_size=12))
@example(text="0-9999999")
@example(text="1,,2")
@example(text="٣")
def test_any_text_as_a_list(text):
    with answers():
        numbers = parse_int_list(text)
        assert numbers and all(type(n) is int and n >= 0 for n in numbers)
        if len(numbers) < 1000:
            assert sorted(set(numbers)) == parse_int_list(format_int_list(set(numbers)))


@EXAMPLES
@given(numbers=st.sets(st.integers(0, 50), min_size=1))
def test_lists_come_back(numbers):
    assert parse_int_list(format_int_list(numbers)) == sorted(numbers)


RECORD = {"kimg": 1, "num_memorized": 3, "num_samples": 4, "snapshot": "a", "seeds": "0-3", "sampler": {}}
OPTIONS = {"dataset_kwargs": {"max_size": 4}, "network_kwargs": {}, "total_nimg": 1000}


def run_folder(path, options, records):
    Path(path, "training_options.json").write_bytes(options)
    Path(path, "mem_traj.jsonl").write_bytes(records)
    return path


@EXAMPLES
@given(changes=st.fixed_dictionaries({}, optional=dict.fromkeys([*RECORD, "adaptive", "gap", "thresholds"], JSON)))
def test_any_record(tmp_path, changes):
    records = json.dumps({**RECORD, **changes}).encode()
    with answers():
        point = read_run(run_folder(tmp_path, json.dumps(OPTIONS).encode(), records))
        assert 0 <= point.ratio <= 1 and point.size == 4


@EXAMPLES
@given(
    changes=st.fixed_dictionaries({}, optional=dict.fromkeys(OPTIONS, JSON | st.fixed_dictionaries({"max_size": JSON})))
)
def test_any_options(tmp_path, changes):
    options = json.dumps({**OPTIONS, **changes}).encode()
    with answers():
        assert read_run(run_folder(tmp_path, options, json.dumps(RECORD).encode())).size >= 1


@EXAMPLES
@given(changes=DAMAGE)
def test_damaged_records(tmp_path, changes):
    lines = b"".join(json.dumps({**RECORD, "kimg": i}).encode() + b"\n" for i in range(3))
    (tmp_path / "mem_traj.jsonl").write_bytes(damage(lines, changes))
    with answers():
        assert len(read_records(tmp_path / "mem_traj.jsonl", report=lambda _: None)) <= 12


@EXAMPLES
@given(changes=DAMAGE)
def test_damaged_trace(tmp_path, changes):
    text = b"size,seed,step,sigma,effective_number,nearest_index,weight\n" + b"4,0,0,8.0,4.0,0,0.25\n" * 4
    (tmp_path / "t.csv").write_bytes(damage(text, changes))
    with answers():
        assert all(np.isfinite(column).all() for column in read_trace(tmp_path / "t.csv").values())
