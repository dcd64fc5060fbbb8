"""Writes the published layout of snapshots with Python's own pickler, for the tests of the reader.

Running in the program that reads it, such a pickle would need the published modules; here their names are put into
place while it is written.
"""

import contextlib
import io
import pickle
import pickletools
import sys
import types

import torch


class Record:
    """A persistence record: what the published `_reconstruct_persistent_obj` is called with."""

    def __init__(self, class_name, state, **meta):
        self.meta = dict(type="class", version=6, module_src="", class_name=class_name, state=state) | meta

    def __reduce__(self):
        return sys.modules["torch_utils.persistence"]._reconstruct_persistent_obj, (self.meta,)


def module_state(module, **attributes):
    """State of a module, its children as records. The hooks are real."""
    state = dict(torch.nn.Module().__dict__)
    children = {name: as_record(child) for name, child in module._modules.items()}
    state.update(training=False, _parameters=dict(module._parameters), _buffers=dict(module._buffers))
    state.update(_modules=children, **attributes)
    return state


def as_record(module, **attributes):
    if module is None:
        return None
    if isinstance(module, torch.nn.ModuleDict):
        container = torch.nn.ModuleDict()
        container.__dict__.update(module_state(module))
        return container
    return Record(type(module).__name__, module_state(module, _init_args=(), _init_kwargs={}, **attributes))


def snapshot_of(net, **content):
    """The dict that is pickled, for a network of `training.networks.build_network`."""
    kwargs = {k: v for k, v in net.init_kwargs.items() if k != "class_name"}
    ema = as_record(net)
    ema.meta["state"].update(_init_kwargs=kwargs)
    return dict(ema=ema, loss_fn=None, augment_pipe=None, dataset_kwargs=dict(path="x.zip")) | content


def dumps(value, protocol=4, pickler=pickle.Pickler):
    """Pickle `value`, in the names of the published modules."""
    buffer = io.BytesIO()
    with _published_modules():
        pickler(buffer, protocol).dump(value)
    return buffer.getvalue()


def without_frames(data):
    """The same pickle without FRAME opcodes, whose lengths an edit would make wrong."""
    starts = [(op.name, pos) for op, _, pos in pickletools.genops(data)] + [("", len(data))]
    return b"".join(data[a:b] for (name, a), (_, b) in zip(starts, starts[1:]) if name != "FRAME")


@contextlib.contextmanager
def _published_modules():
    module = types.ModuleType("torch_utils.persistence")

    def _reconstruct_persistent_obj(meta):
        raise AssertionError("a published module was called")

    _reconstruct_persistent_obj.__module__ = module.__name__
    _reconstruct_persistent_obj.__qualname__ = "_reconstruct_persistent_obj"
    module._reconstruct_persistent_obj = _reconstruct_persistent_obj
    before = sys.modules.get(module.__name__)
    sys.modules[module.__name__] = module
    try:
        yield
    finally:
        del sys.modules[module.__name__]
        if before is not None:
            sys.modules[module.__name__] = before
