"""Arithmetic of a network: fp32, tf32, bf16 or fp16, and torch.compile. fp32 is the published default.

Only the network computes in another type. Its weights, their moving average, the loss, the optimizer and the
preconditioning stay float32, the sampler float64, and nearest neighbours are exact in any case.

To sample or measure in a precision: `prepare_denoiser(net, "bf16", compile=True)`, and use what it returns in place
of `net`. To train: `set_precision(net, "bf16")`, then forward and backward within `with arithmetic("bf16"):`, where
`compile_step` may have compiled what computes the loss.
"""

import contextlib
import functools
import shutil
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

PRECISIONS = ("fp32", "tf32", "bf16", "fp16")
_DTYPES = dict(fp32=torch.float32, tf32=torch.float32, bf16=torch.bfloat16, fp16=torch.float16)
_ON_CUDA = ("tf32", "fp16")  # the others work on any device
BACKEND = "inductor"  # of torch.compile
SMALL_IMAGES = 16  # pixels up to which kernels are so small that starting them takes longer: CUDA graphs


def check_precision(precision: str | None, device: torch.device | str, compile: bool = False) -> None:
    """Raise ValueError if a network cannot compute like this on `device`."""
    kind = torch.device(device).type
    if precision is not None and precision not in PRECISIONS:
        raise ValueError(f'The precision must be one of {", ".join(PRECISIONS)}, not "{precision}".')
    if precision in _ON_CUDA and kind != "cuda":
        raise ValueError(f"--precision={precision} needs a CUDA device; take fp32 or bf16 on the CPU.")
    if compile and kind == "cpu" and BACKEND == "inductor" and not any(map(shutil.which, ("g++", "clang++"))):
        raise ValueError("--compile needs a C++ compiler (g++ or clang++) on the PATH; install one or leave it out.")


def own_precision(net: torch.nn.Module, device: torch.device | str) -> str:
    """The precision in which `net` computes on `device` unless told otherwise."""
    fp16 = getattr(net, "use_fp16", False) and torch.device(device).type == "cuda"
    return getattr(net, "precision", None) or ("fp16" if fp16 else "fp32")


def set_precision(net: torch.nn.Module, precision: str | None) -> None:
    """Let a network of `training.networks` compute in `precision`; None: as it was made (`use_fp16`).

    Its parameters stay float32. For tf32 also call it within `arithmetic`.
    """
    net.precision = precision
    net.compute_dtype = None if precision is None else _DTYPES[precision]


@contextlib.contextmanager
def arithmetic(precision: str | None) -> Iterator[None]:
    """Let float32 products and convolutions on CUDA use TF32 tensor cores within, if `precision` is "tf32"."""
    if precision != "tf32":
        yield
        return
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def compile_step(
    function: Callable,
    net: torch.nn.Module,  # What it calls; its memory format is set.
    device: torch.device | str,
    graphs: bool = True,  # CUDA graphs are allowed: all that a call returns is done with before the next one.
) -> Callable:
    """`torch.compile` of a function that calls `net`, for one shape of its arguments.

    On CUDA channels come last, which is faster compiled, but for float32 without TF32, where it is far slower; and
    small images are computed by CUDA graphs.
    """
    cuda = torch.device(device).type == "cuda"
    net.channels_last = cuda and own_precision(net, device) != "fp32"
    options: dict[str, Any] = dict(backend=BACKEND, dynamic=False)
    if cuda and graphs and BACKEND == "inductor" and net.img_resolution <= SMALL_IMAGES:
        options["mode"] = "reduce-overhead"
    return torch.compile(function, **options)


class Denoiser(torch.nn.Module):
    """A network that samples in another precision, or compiled; it shares the weights. See `prepare_denoiser`."""

    def __init__(self, net: torch.nn.Module, precision: str, compiled: Callable | None):
        super().__init__()
        self.net = net
        self.precision = precision
        self._call = net if compiled is None else compiled
        self.compiled = compiled is not None  # batches of one size are compiled once

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("net"), name)  # sigma_min, label_dim, ...

    def take(self, net: torch.nn.Module) -> bool:
        """Take over the weights of another network, which then need not be compiled; False if it is of another kind."""
        if net.init_kwargs != self.net.init_kwargs:
            return False
        self.net.load_state_dict(net.state_dict())
        return True

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """As that of the network."""
        with arithmetic(self.precision):
            denoised = self._call(*args, **kwargs)
        return denoised.clone() if self.compiled else denoised  # the next call overwrites what a CUDA graph returns


def prepare_denoiser(
    net: torch.nn.Module,  # of `training.networks`, in eval mode
    precision: str | None = None,  # of PRECISIONS; None: the network's own
    compile: bool = False,
    device: torch.device | str | None = None,  # where it lies; None: where its first parameter does
) -> torch.nn.Module:
    """`net` in `precision`, to sample from or to measure: itself, or a `Denoiser` around it with the same interface.

    Raises
    ------
    ValueError
        If the device or the network cannot do it: a closed-form optimum has an exact arithmetic of its own.
    """
    if device is None:
        device = next((p.device for p in net.parameters()), torch.device("cpu"))
    check_precision(precision, device, compile)
    if not hasattr(net, "compute_dtype"):
        if compile or precision not in (None, "fp32"):
            raise ValueError("--precision and --compile belong to networks; the optimum has its own exact arithmetic.")
        return net
    if precision is not None:
        set_precision(net, precision)
    precision = own_precision(net, device)
    if not compile:
        return net if precision != "tf32" else Denoiser(net, precision, None)
    call = compile_step(functools.partial(_denoise, net), net, device)
    return Denoiser(net, precision, call)


def _denoise(net: torch.nn.Module, *args: Any, **kwargs: Any) -> Tensor:
    return net(*args, **kwargs)


def saved_precision(options: dict[str, Any]) -> str:
    """The precision of a run by its options or its training state; runs from before it was an option count, too."""
    network = options.get("network_kwargs", options.get("network"))
    fp16 = isinstance(network, dict) and network.get("use_fp16")
    return options.get("precision") or ("fp16" if fp16 else "fp32")
