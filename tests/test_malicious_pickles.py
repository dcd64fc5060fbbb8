"""Hostile .pkl snapshots: nothing in them runs, and each is refused in one line, soon and without much memory.

Each of `RUNS` would make a file if it ran; a control lets Python's own loader run them all, in another process, and
finds the files.
"""

import functools
import io
import json
import marshal
import os
import pickle
import struct
import subprocess
import sys
import time
import tracemalloc

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from published_pickles import dumps, snapshot_of, without_frames

from dnnlib.pickles import Budget, Name, plain, read_pickle
from training.networks import build_network
from training.snapshots import published
from training.snapshots.published import read_published
from training.snapshots.snapshot import load_network

# ----------------------------------------------------------------------------
# A small assembler: each function returns opcodes that push one value.

PROTO, STOP = b"\x80\x04", b"."


def text(s):
    data = s.encode()
    return b"\x8c" + bytes([len(data)]) + data if len(data) < 256 else b"X" + struct.pack("<I", len(data)) + data


def blob(data):
    return b"B" + struct.pack("<I", len(data)) + data


def number(n):
    return b"J" + struct.pack("<i", n) if -(1 << 31) <= n < 1 << 31 else b"\x8a\x0b" + n.to_bytes(11, "little")


def name(module, attribute):
    return f"c{module}\n{attribute}\n".encode()


def stack_name(module, attribute):
    return text(module) + text(attribute) + b"\x93"


def items(*values):
    return b"(" + b"".join(values) + b"t"


def call(function, *args):
    return function + items(*args) + b"R"


def mapping(**values):
    return b"}(" + b"".join(text(k) + v for k, v in values.items()) + b"u"


def module(which):
    return call(name("builtins", "__import__"), text(which))


def attribute(value, which):
    return call(name("builtins", "getattr"), value, text(which))


EMPTY, TRUE, NONE = b")", b"\x88", b"N"


class Reduce:
    """What the textbook writes: an object that asks to be rebuilt by a call."""

    def __init__(self, function, *args):
        self.how = function, args

    def __reduce__(self):
        return self.how


# ----------------------------------------------------------------------------
# Programs that would run. Each takes the path of the file that it would make, and returns a value's opcodes.


def shell(path):
    return text(f"touch {path}")


def code(path):
    return text(f"open({path!r}, 'w').close()")


def legacy_stream(path):
    """What torch.storage._load_from_bytes is given, with a program in place of the magic number."""
    return PROTO + call(name("os", "system"), shell(path)) + STOP


def legacy_object(path):
    """The same, with the program in place of the storage."""
    machine = mapping(protocol_version=number(1001), little_endian=TRUE, type_sizes=b"}")
    magic = b"\x8a\x0a" + (0x1950A86A20F9469CFC6C).to_bytes(10, "little")
    streams = [magic, number(1001), machine, call(name("os", "system"), shell(path))]
    return b"".join(b"\x80\x02" + s + STOP for s in streams)


def zip_archive(path):
    """The same as torch writes it since 1.6: a zip archive with a pickle."""
    buffer = io.BytesIO()
    torch.save(Reduce(os.system, f"touch {path}"), buffer)
    return buffer.getvalue()


def function_of(path):
    compiled = compile(f"open({str(path)!r}, 'w').close()", "x", "exec")
    made = call(name("marshal", "loads"), blob(marshal.dumps(compiled)))
    return call(name("types", "FunctionType"), made, mapping(__builtins__=name("builtins", "__dict__")))


RUNS = {
    "os.system": lambda p: call(name("os", "system"), shell(p)),
    "posix.system": lambda p: call(name("posix", "system"), shell(p)),
    "os.system by stack": lambda p: call(stack_name("os", "system"), shell(p)),
    "subprocess": lambda p: call(name("subprocess", "check_call"), b"](" + text("touch") + text(p) + b"e"),
    "subprocess.getoutput": lambda p: call(name("subprocess", "getoutput"), shell(p)),
    "os.mkdir": lambda p: call(name("os", "mkdir"), text(p)),
    "open": lambda p: call(name("builtins", "open"), text(p), text("w")),
    "io.open": lambda p: call(name("io", "open"), text(p), text("w")),
    "eval": lambda p: call(name("builtins", "eval"), code(p)),
    "exec": lambda p: call(name("builtins", "exec"), code(p)),
    "eval of python 2": lambda p: b"\x80\x02" + call(name("__builtin__", "eval"), code(p)),
    "__import__ and getattr": lambda p: call(attribute(module("os"), "system"), shell(p)),
    "importlib": lambda p: call(
        attribute(call(name("importlib", "import_module"), text("os")), "system"), shell(p)),
    "sys.modules": lambda p: call(attribute(
        call(stack_name("sys", "modules.get"), text("os")), "system"), shell(p)),
    "attribute of an allowed module": lambda p: call(stack_name("torch", "os.system"), shell(p)),
    "attribute of a module in it": lambda p: call(stack_name("torch._utils", "torch.os.system"), shell(p)),
    "operator.attrgetter": lambda p: call(
        call(call(name("operator", "attrgetter"), text("system")), module("os")), shell(p)),
    "operator.methodcaller": lambda p: call(
        call(name("operator", "methodcaller"), text("system"), shell(p)), module("os")),
    "functools.partial": lambda p: call(call(name("functools", "partial"), name("os", "system"), shell(p))),
    "functools.reduce": lambda p: call(
        name("functools", "reduce"), name("os", "mkdir"), b"](" + text(p) + number(0o700) + b"e"),
    "map": lambda p: call(
        name("builtins", "list"), call(name("builtins", "map"), name("os", "system"), b"]" + shell(p) + b"a")),
    "types.FunctionType": lambda p: call(function_of(p)),
    "pickle.loads": lambda p: call(
        name("_pickle", "loads"), blob(PROTO + call(name("os", "system"), shell(p)) + STOP)),
    "runpy": lambda p: call(name("timeit", "timeit"), text("0"), code(p), name("time", "perf_counter"), number(1)),
    "NEWOBJ": lambda p: call(
        name("functools", "partial") + items(name("os", "system"), shell(p)) + b"\x81"),
    "NEWOBJ_EX": lambda p: call(
        name("functools", "partial") + items(name("os", "system"), shell(p)) + b"}" + b"\x92"),
    "INST": lambda p: b"(" + shell(p) + b"ios\nsystem\n",
    "OBJ": lambda p: b"(" + name("os", "system") + shell(p) + b"o",
    "BUILD sets __setstate__": lambda p: name("types", "SimpleNamespace") + EMPTY + b"\x81"
    + mapping(__setstate__=name("os", "system")) + b"b" + shell(p) + b"b",
    "BUILD with slots": lambda p: name("argparse", "Namespace") + EMPTY + b"\x81"
    + NONE + mapping(__setstate__=name("os", "system")) + b"\x86b" + shell(p) + b"b",
    "memo": lambda p: name("os", "system") + b"q\x07" + b"0" + shell(p) + b"\x94" + b"0" + b"h\x07"
    + b"h\x01\x85R",
    "in a tuple": lambda p: items(number(1), items(call(name("os", "system"), shell(p)))),
    "in the hooks of a tensor": lambda p: call(
        name("torch._utils", "_rebuild_parameter"), call(name("os", "system"), shell(p)), TRUE, EMPTY),
    "in a persistence record": lambda p: mapping(
        a=number(1), b=call(name("os", "system"), shell(p)), module_src=code(p)),
    "torch stream, magic": lambda p: call(name("torch.storage", "_load_from_bytes"), blob(legacy_stream(p))),
    "torch stream, object": lambda p: call(name("torch.storage", "_load_from_bytes"), blob(legacy_object(p))),
    "torch zip archive": lambda p: call(name("torch.storage", "_load_from_bytes"), blob(zip_archive(p))),
}  # fmt: skip
PROTOCOLS = {f"protocol {p}": p for p in range(6)}
INVISIBLE = {  # what is asked for is deeper than a name at the top level, or has no name
    "INST": "os.system", "OBJ": "os.system", "runpy": "timeit.timeit", "pickle.loads": "_pickle.loads",
    "torch zip archive": "zip archive",
}  # fmt: skip


def program(which, path):
    path = str(path)
    if which in PROTOCOLS:
        return pickle.dumps(Reduce(os.system, f"touch {path}"), protocol=PROTOCOLS[which])
    return PROTO + RUNS[which](path) + STOP


ALL = [*RUNS, *PROTOCOLS]


def refused(data, tmp_path, load=load_network):
    """Load `data` as a snapshot; it must be refused in one line. Returns the line."""
    path = tmp_path / "x.pkl"
    path.write_bytes(data)
    start = time.process_time()
    with pytest.raises(ValueError) as caught:
        load(path)
    message = str(caught.value)
    assert message.startswith(f'"{path}" ') and "\n" not in message and len(message) < len(str(path)) + 300
    assert message.isprintable() and time.process_time() - start < 5
    return message


@pytest.mark.parametrize("which", ALL)
def test_what_would_run_does_not(which, tmp_path):
    trace = tmp_path / "ran"
    data = program(which, trace)
    message = refused(data, tmp_path)
    assert not trace.exists()
    if "system" in which or which in PROTOCOLS:
        assert "asks for " in message and "a snapshot holds only networks, so nothing of it was loaded" in message
        assert "os.system" in message or "posix.system" in message
    assert INVISIBLE.get(which, "") in message

    # The same inside of a network: as an argument, beside the weights, and as a weight.
    if which in RUNS:
        for place in (b"MARKER-A", b"MARKER-B", b"MARKER-C"):
            refused(genuine().replace(text(place.decode()), RUNS[which](str(trace))), tmp_path)
            assert not trace.exists()


@functools.cache
def genuine():
    """A good snapshot, without frames, in three places of which stands a marker."""
    content = snapshot_of(small_network(), loss_fn="MARKER-B", dataset_kwargs=dict(path="MARKER-A"))
    content["ema"].meta["state"]["_modules"]["model"].meta["state"]["_parameters"]["x"] = "MARKER-C"
    return without_frames(dumps(content))


def small_network():
    torch.manual_seed(0)
    return build_network(
        "EDMPrecond", img_resolution=4, img_channels=1, model_type="SongUNet", model_channels=4, channel_mult=[1],
        num_blocks=0, attn_resolutions=[],
    )  # fmt: skip


@pytest.mark.slow
def test_control_the_programs_do_run(tmp_path):
    """Python's own loader runs them all."""
    for i, which in enumerate(ALL):
        (tmp_path / f"{i}.pkl").write_bytes(program(which, tmp_path / f"ran{i}"))
    script = (
        "import pickle, sys, torch, warnings\n"
        "warnings.simplefilter('ignore')\n"
        "load = torch.load\n"
        "torch.load = lambda f, **kw: load(f, **(kw | dict(weights_only=False)))\n"  # as torch before 2.6 did
        "for i in range(int(sys.argv[1])):\n"
        "    try:\n"
        "        pickle.load(open(f'{i}.pkl', 'rb'))\n"
        "    except BaseException:\n"
        "        pass\n"
    )
    subprocess.run([sys.executable, "-c", script, str(len(ALL))], cwd=tmp_path, check=True, capture_output=True)
    assert [which for i, which in enumerate(ALL) if not (tmp_path / f"ran{i}").exists()] == []


def test_source_text_of_a_record_is_not_looked_at(tmp_path):
    """The published loader executes it; here the snapshot loads, and nothing happens."""
    trace = tmp_path / "ran"
    content = snapshot_of(small_network())
    content["ema"].meta["module_src"] = f"open({str(trace)!r}, 'w').close()"
    (tmp_path / "x.pkl").write_bytes(dumps(content))
    load_network(tmp_path / "x.pkl")
    assert not trace.exists()


# ----------------------------------------------------------------------------
# Allowed names with hostile arguments.

TENSOR = name("torch._utils", "_rebuild_tensor_v2")
STORAGE = name("torch.storage", "_load_from_bytes")
DTYPE = name("numpy", "dtype")
F8 = call(DTYPE, text("f8"), b"\x89", TRUE)
RECONSTRUCT = name("numpy._core.multiarray", "_reconstruct")
SCALAR = name("numpy._core.multiarray", "scalar")
RECORD = name("torch_utils.persistence", "_reconstruct_persistent_obj")
DICT = name("collections", "OrderedDict")
MAGIC = b"\x8a\x0a" + (0x1950A86A20F9469CFC6C).to_bytes(10, "little")


def storage(claim=4, raw=4, kind="FloatStorage", key="0", keys="0", data=None, endian=TRUE, magic=MAGIC, version=1001):
    pid = items(text("storage"), name("torch", kind), text(key), text("cpu"), number(claim), NONE) + b"Q"
    machine = mapping(protocol_version=number(1001), little_endian=endian, type_sizes=b"}")
    streams = [magic, number(version), machine, pid, b"]" + text(keys) + b"a"]
    raw = raw.to_bytes(8, "little", signed=True) + (bytes(16) if data is None else data)
    return call(STORAGE, blob(b"".join(PROTO + s + STOP for s in streams) + raw))


def tensor(offset=0, shape=(4,), strides=(1,), of=None):
    def numbers(values):
        return items(*map(number, values)) if isinstance(values, tuple) else values

    return call(TENSOR, of or storage(), number(offset), numbers(shape), numbers(strides), b"\x89", call(DICT))


HOSTILE = {
    "tensor without arguments": (call(TENSOR), "number of arguments"),
    "tensor of text": (tensor(of=text("x")), "gives a function a str"),
    "tensor of a list": (tensor(of=b"]"), "gives a function a list"),
    "tensor of a tensor": (tensor(of=tensor()), "gives a function a tensor"),
    "negative offset": (tensor(offset=-1), "negative"),
    "offset outside": (tensor(offset=1), "outside of its 4"),
    "huge offset": (tensor(offset=1 << 80), "outside"),
    "shape outside": (tensor(shape=(5,)), "outside"),
    "negative shape": (tensor(shape=(-4,)), "negative"),
    "empty shape": (tensor(shape=(0, 1 << 80), strides=(1, 1)), "empty"),
    "huge shape": (tensor(shape=(1 << 40, 1 << 40), strides=(0, 0)), "outside"),
    "expanded": (tensor(shape=(1 << 33,), strides=(0,)), "outside"),
    "strides outside": (tensor(shape=(2, 2), strides=(3, 1)), "outside"),
    "negative strides": (tensor(strides=(-1,)), "negative"),
    "strides missing": (tensor(strides=()), "proper shape"),
    "shape of text": (tensor(shape=items(text("4"))), "proper shape"),
    "shape of flags": (tensor(shape=items(TRUE)), "proper shape"),
    "shape is a list": (tensor(shape=b"]" + number(4) + b"a"), "takes a tuple"),
    "many dimensions": (tensor(shape=(1,) * 99, strides=(1,) * 99), "proper shape"),
    "storage of text": (call(STORAGE, text("x")), "takes a memoryview"),
    "storage of nothing": (call(STORAGE, blob(b"")), "cut short"),
    "storage with more numbers than bytes": (tensor(of=storage(claim=5, raw=5)), "announces 5"),
    "storage with more bytes than numbers": (tensor(of=storage(claim=3, raw=3)), "announces 3"),
    "storage with two sizes": (tensor(of=storage(raw=-1)), "announces"),
    "storage of negative size": (tensor(of=storage(claim=-4, raw=-4)), "unknown format"),
    "storage of doubles in half the bytes": (tensor(of=storage(kind="DoubleStorage")), "announces"),
    "storage of an unknown type": (tensor(of=storage(kind="QInt8Storage")), "asks for torch.QInt8Storage"),
    "storage of another key": (tensor(of=storage(keys="1")), "another one"),
    "storage from another machine": (tensor(of=storage(endian=b"\x89")), "big-endian"),
    "storage of another version": (tensor(of=storage(version=1002)), "unknown format"),
    "storage of another magic": (tensor(of=storage(magic=number(1))), "unknown format"),
    "storage with a program": (tensor(of=storage(magic=call(name("os", "system"), text("x")))), "asks for os.system"),
    "untyped storage without a type": (tensor(of=storage(16, 16, "UntypedStorage")), "type"),
    "object type": (call(SCALAR, call(DTYPE, text("O8"), b"\x89", TRUE), blob(b"x")), "no numbers"),
    "object array": (
        call(RECONSTRUCT, name("numpy", "ndarray"), items(number(0)), blob(b"b"))
        + items(number(1), items(number(1)), call(DTYPE, text("O"), b"\x89", TRUE), b"\x89", b"]Na") + b"b",
        "no numbers"),
    "structured type": (call(DTYPE, b"]" + items(text("a"), text("f8")) + b"a", b"\x89", TRUE), "no numbers"),
    "type of a path": (call(DTYPE, text("os.system"), b"\x89", TRUE), "no numbers"),
    "byte order": (F8 + items(number(3), text("?")) + b"b", "byte order"),
    "short number": (call(SCALAR, F8, blob(b"1234")), "another size"),
    "huge array": (
        call(RECONSTRUCT, name("numpy", "ndarray"), items(number(0)), blob(b"b"))
        + items(number(1), items(number(1 << 60)), F8, b"\x89", blob(b"x")) + b"b", "proper shape"),
    "array subclass": (call(RECONSTRUCT, name("numpy", "matrix"), items(number(0)), blob(b"b")), "numpy.matrix"),
    "record without arguments": (call(RECORD), "number of arguments"),
    "record of text": (call(RECORD, text("x")), "takes a dict"),
    "OrderedDict of pairs": (call(DICT, b"]"), "number of arguments"),
    "OrderedDict by NEWOBJ": (DICT + EMPTY + b"\x81", "calls collections.OrderedDict in a way"),
    "ModuleDict by REDUCE": (call(name("torch.nn.modules.container", "ModuleDict")), "in a way that is not known"),
    "set of lists": (call(name("builtins", "set"), b"]]a"), "something else than text"),
    "call of a dict": (b"}" + EMPTY + b"R", "calls a dict"),
    "call of text": (text("os.system") + EMPTY + b"R", "calls a str"),
    "call with a list": (DICT + b"]R", "in a way that is not known"),
    "state of a dict": (call(DICT) + mapping(__class__=NONE) + b"b", "sets the state of a dict"),
    "state of a tensor": (tensor() + mapping(data=NONE) + b"b", "sets the state of a tensor"),
    "state of a record": (call(RECORD, b"}") + mapping(__dict__=b"}") + b"b", "sets the state of a record"),
    "state of a name": (DICT + mapping(__code__=NONE) + b"b", "sets the state of a name"),
    "name that is a number": (number(1) + text("x") + b"\x93", "not text"),
    "name with dots": (stack_name("collections", "OrderedDict.fromkeys"), "asks for collections.OrderedDict.fromkeys"),
    "name without end": (b"cos" + b"s" * 1000, "name without end"),
    "name with control characters": (stack_name("os\n\x1b[2J", "sy\x07stem"), "asks for os\\n\\x1b[2J.sy\\x07stem"),
    "long name": (stack_name("a" * 5000, "b" * 5000), "..."),
    "empty name": (stack_name("", ""), "asks for ."),
}  # fmt: skip
MACHINE = {
    "EXT1": (b"\x82\x01", "EXT1"),
    "EXT2": (b"\x83\x01\x00", "EXT2"),
    "EXT4": (b"\x84\x01\x00\x00\x00", "EXT4"),
    "PERSID": (b"Pos.system\n", "PERSID"),
    "BINPERSID": (text("os.system") + b"Q", "BINPERSID"),
    "NEXT_BUFFER": (b"\x97", "NEXT_BUFFER"),
    "LONG4 of 2 GB": (b"\x8b\xff\xff\xff\x7f", "LONG4"),
    "LONG of many digits": (b"L" + b"9" * 100_000 + b"L\n", "LONG"),
    "INT": (b"I01\n", "INT"),
    "STRING": (b"S'x'\n", "STRING"),
    "unknown opcode": (b"\xff", "255 is no opcode"),
    "frame of 2^63": (b"\x95" + b"\xff" * 7 + b"\x7f", "cut short"),
    "bytes of 2^63": (b"\x8e" + b"\xff" * 7 + b"\x7f" + b"x", "cut short"),
    "byte array of 2^40": (b"\x96" + struct.pack("<Q", 1 << 40) + b"x", "cut short"),
    "text of 4 GB": (b"X\xff\xff\xff\xff" + b"x", "text of 4294967295 bytes"),
    "text of 2^62": (b"\x8d" + struct.pack("<Q", 1 << 62) + b"x", "BINUNICODE8"),
    "text that is not UTF-8": (b"\x8c\x02\xff\xff", "UTF-8"),
    "value that was not made": (b"h\x05", "value 5"),
    "value of a huge number": (b"j\xff\xff\xff\xff", "value 4294967295"),
    "empty stack": (b"0", "POP"),
    "empty tuple of three": (b"\x87", "empty stack"),
    "below the mark": (b"N(\x85", "empty stack"),
    "no mark": (b"Nt", "mark"),
    "marks that stay": (b"N((", "empty stack"),
    "two values": (b"NN", "more than one value"),
    "key that is a list": (b"}]Ns", "key of type list"),
    "key that is a tuple": (b"})Ns", "key of type tuple"),
    "key without value": (b"}(" + text("a") + b"u", "without a value"),
    "appending to a tuple": (b")Na", "as if it were a list"),
    "adding to a dict": (b"}(" + text("a") + b"\x90", "as if it were a set"),
    "setting in a list": (b"]" + text("a") + b"Ns", "as if it were a dict"),
    "memo of nothing": (b"\x94", "empty stack"),
}
WHOLE = {
    "nothing": (b"", "cut short"),
    "only a header": (PROTO, "cut short"),
    "protocol 9": (b"\x80\x09N.", "protocol 9"),
    "after the end": (PROTO + b"}." + b"cos\nsystem\n(tR.", "goes on for"),
    "two pickles": (PROTO + b"}." + PROTO + b"}.", "goes on for"),
    "zip": (b"PK\x03\x04" + bytes(100), "zip archive"),
    "tar": (b"x.txt" + bytes(507), "no pickle"),
    "gzip": (b"\x1f\x8b\x08" + bytes(100), "no pickle"),
    "png": (b"\x89PNG\r\n\x1a\n" + bytes(100), "no pickle"),
    "a list that holds itself": (PROTO + b"]\x94h\x00a.", "ema"),
    "marks without end": (PROTO + b"(" * 60_000, "too many opcodes"),
    "lists in lists": (PROTO + b"]" * 20_000 + b"a" * 19_999 + b".", "ema"),
    "tuples in tuples": (PROTO + b")" + b"\x85" * 40_000 + b".", "ema"),
    "sets without end": (PROTO + b"(" + b"\x8f" * 60_000, "too many opcodes"),
}


@pytest.mark.parametrize("which", [*HOSTILE, *MACHINE])
def test_hostile_values_are_refused(which, tmp_path):
    value, message = {**HOSTILE, **MACHINE}[which]
    assert message in refused(PROTO + value + STOP, tmp_path)
    if value not in (b"N((", b"NN") and message not in ("empty stack", "mark"):
        refused(genuine().replace(text("MARKER-C"), value), tmp_path)


@pytest.mark.parametrize("which", WHOLE)
def test_hostile_files_are_refused(which, tmp_path, monkeypatch):
    """With a tenth of the opcodes that are allowed, and hence of the memory, since counting memory is slow."""
    assert Budget().opcodes == 500_000
    monkeypatch.setattr(published, "Budget", lambda: Budget(opcodes=50_000))
    data, message = WHOLE[which]
    tracemalloc.start()
    try:
        assert message in refused(data, tmp_path)
        assert tracemalloc.get_traced_memory()[1] < 15e6
    finally:
        tracemalloc.stop()


def laughs(levels=60):
    """A list of ten times the list before, that often."""
    data = b"]\x94"
    for i in range(levels):
        data += b"](" + (b"h" + bytes([i])) * 10 + b"e\x94"
    return data


@pytest.mark.parametrize(
    "value", [laughs(), b"]\x94h\x00a", b"}\x94" + text("a") + b"h\x00s", tensor(), text("x" * 2_000_000)]
)
def test_values_that_grow(value, tmp_path):
    """Exponential or endless when written out; where plain values belong, too."""
    data = PROTO + mapping(ema=call(RECORD, mapping(class_name=text("EDMPrecond"), state=b"}")), x=value) + STOP
    refused(data, tmp_path)
    content = mapping(
        ema=call(RECORD, mapping(
            type=text("class"), class_name=text("EDMPrecond"),
            state=mapping(_init_kwargs=mapping(dropout=value), _modules=mapping(model=value)))),
        dataset_kwargs=mapping(x=value),
    )  # fmt: skip
    refused(PROTO + content + STOP, tmp_path)


def test_shared_modules_do_not_grow(tmp_path):
    """Modules that hold one and the same module ten times, 12 times over: 10^12 of them."""
    record = call(RECORD, mapping(type=text("class"), class_name=text("Linear"), state=b"}"))
    for _ in range(12):
        children = [text(str(i)) + (b"h\x01" if i else record + b"q\x01") for i in range(10)]
        children = b"}(" + b"".join(children) + b"u"
        record = call(RECORD, mapping(type=text("class"), class_name=text("Linear"), state=mapping(_modules=children)))
    model = call(
        RECORD,
        mapping(type=text("class"), class_name=text("SongUNet"), state=mapping(_modules=mapping(x=record))),
    )
    ema = call(
        RECORD,
        mapping(type=text("class"), class_name=text("EDMPrecond"), state=mapping(_modules=mapping(model=model))),
    )
    assert "modules and tensors" in refused(PROTO + mapping(ema=ema) + STOP, tmp_path)


def test_one_storage_for_many_tensors(tmp_path):
    """A file of 1 MB cannot be a network of 1 GB."""
    large = storage(1 << 18, 1 << 18, data=bytes(1 << 20))
    weights = b"}(" + text("0") + tensor(0, (1 << 18,), (1,), large) + b"q\x01"
    weights += b"".join(text(str(i)) + b"h\x01" for i in range(1, 1000)) + b"u"
    model = call(RECORD, mapping(type=text("class"), class_name=text("SongUNet"), state=mapping(_parameters=weights)))
    ema = call(
        RECORD,
        mapping(type=text("class"), class_name=text("EDMPrecond"), state=mapping(_modules=mapping(model=model))),
    )
    assert "several times" in refused(PROTO + mapping(ema=ema) + STOP, tmp_path)


def test_large_files_are_refused_unread(tmp_path):
    path = tmp_path / "x.pkl"
    with open(path, "wb") as file:
        file.truncate(1 << 34)  # sparse
    with pytest.raises(ValueError, match="the limit is"):
        load_network(path)


def test_no_file(tmp_path):
    os.mkfifo(tmp_path / "x.pkl")
    with pytest.raises(OSError, match="is no regular file"):
        load_network(tmp_path / "x.pkl")


# ----------------------------------------------------------------------------
# The reader by itself.


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers(-(1 << 500), 1 << 500) | st.floats(allow_nan=False) | st.text(),
        lambda inner: st.lists(inner) | st.lists(inner).map(tuple) | st.dictionaries(st.text(), inner),
        max_leaves=30,
    ),
    st.sampled_from([2, 3, 4, 5]),
)
@settings(max_examples=100, derandomize=True, deadline=None)
def test_reads_what_python_writes(value, protocol):
    data = pickle.dumps(value, protocol)
    got, end = read_pickle(memoryview(data), {}, Budget())
    assert got == value and end == len(data)
    assert json.dumps(plain(value, depth=99)) == json.dumps(value)


def test_calls_only_what_the_table_holds():
    calls = []
    table = {("a", "f"): Name("a.f", call=lambda args: calls.append(args))}
    read_pickle(memoryview(PROTO + call(name("a", "f"), number(7)) + STOP), table, Budget())
    assert calls == [(7,)]


@functools.cache
def fuzzed():
    return genuine().replace(text("MARKER-A"), text("a")).replace(text("MARKER-B"), b"N").replace(
        text("MARKER-C"), b"N")  # fmt: skip


OPCODES = b"\x80\x81\x82\x85\x86\x87\x88\x89\x8a\x8c\x8e\x8f\x90\x92\x93\x94\x95()*.0BCGJKMNQRX]abcehijqrstu}"


@given(st.data())
@settings(
    max_examples=200, derandomize=True, deadline=None, database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)  # fmt: skip
def test_fuzz(tmp_path, data):
    """A changed snapshot loads or is refused; there is no other error, no program that runs, and no endless loop."""
    good = fuzzed()
    changed = bytearray(good)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(changed) - 1))
        kind = data.draw(st.sampled_from(["flip", "opcode", "insert", "remove", "copy", "cut"]))
        if kind == "flip":
            changed[at] ^= 1 << data.draw(st.integers(0, 7))
        elif kind == "opcode":
            changed[at] = data.draw(st.sampled_from(OPCODES))
        elif kind == "insert":
            changed[at:at] = data.draw(st.binary(min_size=1, max_size=4))
        elif kind == "remove":
            del changed[at : at + data.draw(st.integers(1, 20))]
        elif kind == "copy":
            source = data.draw(st.integers(0, len(changed) - 1))
            changed[at:at] = changed[source : source + data.draw(st.integers(1, 50))]
        else:
            del changed[at:]
        changed = changed or bytearray(b"N")
    path = tmp_path / "x.pkl"
    path.write_bytes(changed)
    start = time.process_time()
    try:
        load_network(path)
    except (ValueError, OSError) as err:
        assert str(err).startswith(f'"{path}" ') or f'"{path}"' in str(err)
        assert "\n" not in str(err)
    assert time.process_time() - start < 5


def test_the_fuzzed_snapshot_is_good(tmp_path):
    (tmp_path / "x.pkl").write_bytes(fuzzed())
    assert len(read_published(tmp_path / "x.pkl").tensors) == len(small_network().state_dict())
    assert load_network(tmp_path / "x.pkl")[1]["dataset"] == {"path": "a"}
