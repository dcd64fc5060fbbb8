"""Published network snapshots (`.pkl` of EDM and DiffMemorize), read without running anything in them.

Such a file is the pickle of a dict: `ema`, the network; `loss_fn` and `augment_pipe`; `dataset_kwargs`. Each of its
modules is a persistence record: the name of a class, the source text of that class, and the state of the instance.
The published code executes the source text. Here it is not looked at: the class name selects a network of this
project, which takes its constructor arguments and its tensors from the record (`training.snapshots.snapshot`).

`dnnlib.pickles` is the reader; the names that it knows are those in `_names`. A tensor consists of a storage, and a
storage of a stream inside the file, in the format of torch before 1.6, which is read with the same reader. Sizes,
strides, offsets and types are compared with the bytes that are there before anything is made of them.

Files differ by what wrote them, and all are read: numpy 1 and 2 (`numpy.core`, `numpy._core`), typed and untyped
storages (torch 1.12 to now), protocols 3 to 5 (of the streams of storages: 2).
"""

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dnnlib.pickled_arrays import numpy_names
from dnnlib.pickles import Budget, Inert, Name, UnknownName, plain, read_pickle, show, take_args

MAX_FILE = 1 << 33  # bytes; the largest published snapshot has 1.2e9
_MAX_DEPTH = 16  # of modules in modules
_MAX_ENTRIES = 100_000  # modules and tensors
_MAX_NAME = 300  # letters of a tensor's name
_MAX_NUMBERS = 10_000  # of a numpy array among the arguments

# The positional arguments of the published constructors.
_COMMON = ("img_resolution", "img_channels", "label_dim", "use_fp16")
_POSITIONAL = dict(
    VPPrecond=(*_COMMON, "beta_d", "beta_min", "M", "epsilon_t", "model_type"),
    VEPrecond=(*_COMMON, "sigma_min", "sigma_max", "model_type"),
    iDDPMPrecond=(*_COMMON, "C_1", "C_2", "M", "model_type"),
    EDMPrecond=(*_COMMON, "sigma_min", "sigma_max", "sigma_data", "model_type"),
)
_LAYERS = {
    "Conv2d", "DhariwalUNet", "FourierEmbedding", "GroupNorm", "Linear", "PositionalEmbedding", "SongUNet",
    "UNetBlock",
}  # fmt: skip


@dataclass(frozen=True)
class Published:
    """What a published snapshot holds."""

    network: dict[str, Any]  # class_name and the constructor's arguments, of which only names are known to be good
    tensors: dict[str, torch.Tensor]  # by their names in the network's state_dict
    dataset: dict[str, Any]  # arguments of the training set
    loss: dict[str, Any] | None  # class_name and arguments
    augment: dict[str, Any] | None


def read_published(path: str | os.PathLike, source: str | None = None) -> Published:
    """Read a published snapshot; nothing in it is executed.

    Parameters
    ----------
    path : the file
    source : what errors call it; by default the path

    Raises
    ------
    OSError, ValueError
        If it cannot be read, is damaged, or holds anything but what belongs there. Nothing is loaded in part.
    """
    source = os.fspath(path) if source is None else source
    try:
        return _read(Path(path))
    except UnknownName as err:
        raise ValueError(f'"{source}" {err}; a snapshot holds only networks, so nothing of it was loaded.') from err
    except ValueError as err:
        raise ValueError(f'"{source}" {err}; nothing of it was loaded.') from err


def _read(path: Path) -> Published:
    if not path.is_file():
        raise ValueError("is not a file")
    if path.stat().st_size > MAX_FILE:
        raise ValueError(f"has {path.stat().st_size} bytes; the limit is {MAX_FILE}")
    data = path.read_bytes()
    if data.startswith(b"PK\x03\x04"):
        raise ValueError("is a zip archive, as torch.save writes it, and not a published snapshot")
    budget = Budget()
    content, end = read_pickle(memoryview(data), _names(budget), budget)
    if end != len(data):
        raise ValueError(f"goes on for {len(data) - end} bytes after its end")

    if type(content) is not dict or type(content.get("ema")) is not Record:
        raise ValueError('holds no network called "ema"')
    ema = content["ema"]
    network = _network_arguments(ema)
    found = dict(_find_tensors(ema))
    if sum(t.nbytes for t in found.values()) > len(data):
        raise ValueError("uses the bytes of a tensor several times")
    return Published(
        network=network,
        tensors={name: t.to_torch() for name, t in found.items()},
        dataset=plain(content["dataset_kwargs"]) if type(content.get("dataset_kwargs")) is dict else {},
        loss=_arguments(content.get("loss_fn")),
        augment=_arguments(content.get("augment_pipe")),
    )


# ----------------------------------------------------------------------------
# Records.


class Record(Inert):
    """An instance of a published class: its name and its attributes."""

    def __init__(self, args: tuple):
        (meta,) = take_args(args, [dict])
        self.meta = meta  # looked at when the whole file is read: till then it may change

    @property
    def class_name(self) -> str:
        name = self.meta.get("class_name")
        if type(name) is not str or self.meta.get("type") != "class":
            raise ValueError("holds a record without the name of a class")
        return name

    @property
    def state(self) -> dict[str, Any]:
        state = self.meta.get("state")
        if type(state) is not dict:
            raise ValueError(f"holds a {show(self.class_name)} without a state")
        return state


class Container(Inert):
    """A torch.nn.ModuleDict."""

    class_name = "ModuleDict"

    def __init__(self, args: tuple):
        take_args(args, [])
        self.state: dict[str, Any] = {}

    def build(self, state: Any) -> None:
        if type(state) is not dict:
            raise ValueError("holds a ModuleDict without a state")
        self.state = state


def _arguments(record: Any) -> dict[str, Any] | None:
    """Class name and keyword arguments of a loss or an augmentation pipe, as plain values."""
    if record is None:
        return None
    if type(record) is not Record:
        raise ValueError(f"holds a value of type {type(record).__name__} where a loss or augmentation pipe belongs")
    return _dict(record.state, "_init_kwargs") | {"class_name": show(record.class_name)}


def _dict(state: dict[str, Any], key: str) -> dict[str, Any]:
    """Plain copy of a dict in a record's state; an empty one where there is none."""
    value = plain(state.get(key, {}))
    if type(value) is not dict:
        raise ValueError(f"holds {key} that are no dict")
    return value


def _network_arguments(ema: Record) -> dict[str, Any]:
    """class_name and arguments of the network, as the published loader would come to them.

    The loader restores attributes instead of calling the constructor; so attributes that are arguments, too, count.
    """
    name = ema.class_name
    if name not in _POSITIONAL:
        raise ValueError(f"holds a network of class {show(name)}; known are {', '.join(_POSITIONAL)}")
    args = plain(ema.state.get("_init_args", ()))
    if type(args) is not list or len(args) > len(_POSITIONAL[name]):
        raise ValueError(f"holds arguments of {name} that are not its own")
    kwargs = dict(zip(_POSITIONAL[name], args)) | _dict(ema.state, "_init_kwargs")
    model = ema.state.get("_modules", {})
    model = model.get("model") if type(model) is dict else None
    if type(model) is not Record:
        raise ValueError(f"holds a {name} without a model")
    attributes = {k: ema.state[k] for k in _POSITIONAL[name] if k in ema.state}
    attributes["model_type"] = model.class_name
    if model.class_name == "SongUNet" and model.state.get("skip_connections") is not None:
        attributes["skip_connections"] = model.state["skip_connections"]
    return kwargs | plain(attributes) | {"class_name": name}


def _find_tensors(ema: Record) -> Iterator[tuple[str, "Tensor"]]:
    """(name, tensor) of all parameters and buffers, named as in a state_dict."""
    pending: list[tuple[str, Any, int]] = [("", ema, 0)]  # prefix, module, depth
    entries, seen = 0, set()
    while pending:
        prefix, module, depth = pending.pop()
        if depth > _MAX_DEPTH or type(module) not in (Record, Container):
            raise ValueError("holds modules in modules too deeply, or something else in their place")
        if depth and type(module) is Record and module.class_name not in _LAYERS:
            raise ValueError(f"holds a layer of class {show(module.class_name)}, which no known network has")
        for kind in ("_parameters", "_buffers", "_modules"):
            members = module.state.get(kind, {})
            if type(members) is not dict:
                raise ValueError(f"holds {kind} that are no dict")
            entries += len(members)
            if entries > _MAX_ENTRIES:
                raise ValueError(f"holds more than {_MAX_ENTRIES} modules and tensors")
            for key, value in members.items():
                if value is None:
                    continue
                if len(prefix) + len(key) > _MAX_NAME:
                    raise ValueError(f"holds names of more than {_MAX_NAME} letters")
                if kind == "_modules":
                    pending.append((f"{prefix}{key}.", value, depth + 1))
                    continue
                name = prefix + key
                if type(value) is not Tensor or name in seen:
                    raise ValueError(f"holds no tensor, or two, called {show(name)}")
                seen.add(name)
                yield name, value


# ----------------------------------------------------------------------------
# Tensors.

_DTYPES = {
    "float64": "<f8",
    "float32": "<f4",
    "float16": "<f2",
    "bfloat16": "<u2",
    "int64": "<i8",
    "int32": "<i4",
    "int16": "<i2",
    "int8": "<i1",
    "uint8": "<u1",
    "bool": "<u1",
}  # fmt: skip (bytes as numpy sees them)
_STORAGES = {
    "DoubleStorage": "float64", "FloatStorage": "float32", "HalfStorage": "float16", "BFloat16Storage": "bfloat16",
    "LongStorage": "int64", "IntStorage": "int32", "ShortStorage": "int16", "CharStorage": "int8",
    "ByteStorage": "uint8", "BoolStorage": "bool",
}  # fmt: skip
_MAGIC = 0x1950A86A20F9469CFC6C  # torch's legacy stream
_STREAM_VERSION = 1001


@dataclass(frozen=True, eq=False)
class Storage(Inert):
    """Numbers in a row."""

    dtype: str | None  # of torch; None: untyped, bytes
    data: memoryview


@dataclass(frozen=True, eq=False)
class Tensor(Inert):
    """A view of a storage; all of it lies inside."""

    dtype: str
    data: memoryview
    offset: int  # in elements, as are the strides
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * np.dtype(_DTYPES[self.dtype]).itemsize

    def to_torch(self) -> torch.Tensor:
        """The tensor, a copy."""
        dtype = np.dtype(_DTYPES[self.dtype])
        strides = [s * dtype.itemsize for s in self.strides]
        view = np.ndarray(self.shape, dtype, self.data, self.offset * dtype.itemsize, strides)
        tensor = torch.from_numpy(np.array(view, dtype.newbyteorder("="), order="C"))
        return tensor.view(torch.bfloat16) if self.dtype == "bfloat16" else tensor


def _read_storage(args: tuple, budget: Budget) -> Storage:
    """torch.storage._load_from_bytes: magic number, version, machine, storage, keys; then its size and its bytes."""
    (data,) = take_args(args, [memoryview])
    if bytes(data[:4]) == b"PK\x03\x04":
        raise ValueError("holds a zip archive where the bytes of a tensor belong")

    def read(data: memoryview, kind: type, **kwargs: Any) -> tuple[Any, memoryview]:
        value, end = read_pickle(data, _storage_names(), budget, **kwargs)
        if type(value) is not kind:
            raise ValueError(f"holds a {type(value).__name__.lower()} where a {kind.__name__.lower()} belongs")
        return value, data[end:]

    magic, data = read(data, int)
    version, data = read(data, int)
    if magic != _MAGIC or version != _STREAM_VERSION:
        raise ValueError("holds a tensor in an unknown format")
    machine, data = read(data, dict)
    if machine.get("little_endian") is not True:
        raise ValueError("comes from a big-endian machine, whose files are not read")
    claim, data = read(data, _Claim, persistent=_Claim)
    keys, data = read(data, list)
    if len(keys) != 1 or type(keys[0]) is not str or keys[0] != claim.key:
        raise ValueError("holds a tensor with the numbers of another one")
    itemsize = np.dtype(_DTYPES[claim.dtype or "uint8"]).itemsize
    if len(data) != 8 + claim.size * itemsize or int.from_bytes(data[:8], "little", signed=True) != claim.size:
        raise ValueError(f"announces {show(str(claim.size))} numbers of a tensor and holds another number of them")
    return Storage(claim.dtype, data[8:])


class _Claim(Inert):
    """What the persistent id in a storage's stream says of it."""

    def __init__(self, pid: Any):
        if type(pid) is not tuple:
            raise ValueError("refers to values outside of it")
        tag, storage, self.key, _, self.size, view = take_args(pid, [str, Name, str, str, int, None])
        if tag != "storage" or self.size < 0 or view is not None:
            raise ValueError("holds a tensor in an unknown format")
        self.dtype = _STORAGES.get(storage.text.removeprefix("torch."))


def _tensor(args: tuple) -> Tensor:
    """torch._utils._rebuild_tensor_v2 and _v3: storage, offset, size, stride, requires_grad, hooks[, dtype][, ...]."""
    storage, offset, shape, strides, _, _ = take_args(args[:6], [Storage, int, tuple, tuple, None, None])
    dtype = storage.dtype
    if len(args) > 6 and isinstance(args[6], Name):
        dtype = args[6].text.removeprefix("torch.")
    if dtype not in _DTYPES or dtype != (storage.dtype or dtype):
        raise ValueError("holds a tensor whose type is not that of its numbers")
    if len(shape) != len(strides) or len(shape) > 8 or {type(n) for n in (*shape, *strides)} - {int}:
        raise ValueError("holds a tensor without a proper shape")
    if offset < 0 or min(shape, default=1) < 1 or min(strides, default=1) < 0:
        raise ValueError("holds a tensor with a negative or empty shape")
    available = len(storage.data) // np.dtype(_DTYPES[dtype]).itemsize
    last = offset + sum((n - 1) * s for n, s in zip(shape, strides))
    if last >= available or math.prod(shape) > available:
        raise ValueError(f"holds a tensor of which a part lies outside of its {available} numbers")
    return Tensor(dtype, storage.data, offset, shape, strides)


def _parameter(args: tuple) -> Tensor:
    """torch._utils._rebuild_parameter: tensor, requires_grad, hooks."""
    return take_args(args, [Tensor, None, None])[0]


# ----------------------------------------------------------------------------
# The names.


def _empty_dict(args: tuple) -> dict:
    take_args(args, [])
    return {}


def _set(args: tuple) -> set:
    """How protocols 2 and 3 write a set: a list of its members."""
    (members,) = take_args(args, [list])
    if any(type(v) is not str for v in members):
        raise ValueError("holds a set of something else than text")
    return set(members)


def _names(budget: Budget) -> dict[tuple[str, str], Name]:
    """All names that a snapshot may use, and what stands for them."""
    names: dict[tuple[str, str], Name] = {}

    def add(module: str, name: str, **kwargs: Any) -> None:
        names[module, name] = Name(f"{module}.{name}", **kwargs)

    add("torch_utils.persistence", "_reconstruct_persistent_obj", call=Record)
    add("torch.nn.modules.container", "ModuleDict", new=Container)
    add("torch._utils", "_rebuild_parameter", call=_parameter)
    add("torch._utils", "_rebuild_tensor_v2", call=_tensor)
    add("torch._utils", "_rebuild_tensor_v3", call=_tensor)
    add("torch.storage", "_load_from_bytes", call=lambda args: _read_storage(args, budget))
    for dtype in _DTYPES:
        add("torch", dtype)
    add("collections", "OrderedDict", call=_empty_dict)
    add("dnnlib.util", "EasyDict", call=_empty_dict, new=_empty_dict)
    for module in ("builtins", "__builtin__"):
        add(module, "set", call=_set)
    return names | numpy_names(_MAX_NUMBERS, budget)


def _storage_names() -> dict[tuple[str, str], Name]:
    """The names in the stream of a storage."""
    names = {("torch", name): Name(f"torch.{name}") for name in (*_STORAGES, "UntypedStorage")}
    for name in ("UntypedStorage", "_UntypedStorage"):
        names["torch.storage", name] = Name(f"torch.storage.{name}")
    return names
