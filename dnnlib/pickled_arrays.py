"""The names that numpy arrays of numbers have in a pickle, and what stands for them; see `dnnlib.pickles`."""

import math
from typing import Any

import numpy as np

from dnnlib.pickles import Budget, Inert, Name, take_args, text_of

_TYPES = {"b1", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8"}


class Dtype(Inert):
    """A numpy.dtype of numbers: ("f8", False, True), then the state (version, byte order, ...)."""

    def __init__(self, args: tuple):
        code = text_of(args[0]) if args else None
        if type(code) is not str or code not in _TYPES:
            raise ValueError("holds numpy values that are no numbers")
        self.dtype = np.dtype("<" + code)

    def build(self, state: Any) -> None:
        order = text_of(state[1]) if type(state) is tuple and len(state) > 1 else None
        if type(order) is not str or order not in ("<", ">", "|"):
            raise ValueError("holds a numpy type without a byte order")
        self.dtype = self.dtype.newbyteorder(order)


class Array(Inert):
    """A numpy.ndarray of numbers."""

    def __init__(self, limit: int, budget: Budget, values: np.ndarray | None = None):
        self._limit, self._budget, self.values = limit, budget, values

    def build(self, state: Any) -> None:
        _, shape, dtype, fortran, data = take_args(state, [int, tuple, Dtype, bool, memoryview])
        self.values = _array(data, dtype, shape, "F" if fortran else "C", self._limit, self._budget)

    def plain(self) -> Any:
        if self.values is None:
            raise ValueError("holds a numpy array without values")
        return self.values.tolist()


def _array(data: memoryview, dtype: Dtype, shape: tuple, order: str, limit: int, budget: Budget) -> np.ndarray:
    if len(shape) > 8 or any(type(n) is not int or not 0 <= n < 1 << 31 for n in shape):
        raise ValueError("holds a numpy array without a proper shape")
    if math.prod(shape) * dtype.dtype.itemsize != len(data):
        raise ValueError("holds a numpy array of another size than it says")
    if math.prod(shape) > limit:
        raise ValueError(f"holds a numpy array of more than {limit} numbers")
    budget.spend(arrays=len(data))
    return np.ndarray(shape, dtype.dtype, data, order=order).copy()


def numpy_names(limit: int, budget: Budget) -> dict[tuple[str, str], Name]:
    """What numpy 1 and 2 call in a pickle of an array or a scalar, of any protocol from 2.

    Parameters
    ----------
    limit : numbers that one array may have
    budget : what all of them may take; is diminished
    """

    def frombuffer(args: tuple) -> Array:
        """Bytes, type, shape, order (protocol 5)."""
        data, dtype, shape, order = take_args(args, [memoryview, Dtype, tuple, str])
        return Array(limit, budget, _array(data, dtype, shape, "F" if order == "F" else "C", limit, budget))

    def scalar(args: tuple) -> bool | int | float:
        dtype, data = take_args(args, [Dtype, memoryview])
        return _array(data, dtype, (1,), "C", limit, budget).item()

    def encode(args: tuple) -> memoryview:
        """Bytes in a pickle that Python 3 wrote in protocol 2: text, "latin1"."""
        text, codec = take_args(args, [str, str])
        if codec != "latin1" or (text and max(text) > "\xff"):
            raise ValueError("holds bytes in an unknown form")
        budget.spend(arrays=len(text))
        return memoryview(text.encode("latin1"))

    def reconstruct(args: tuple) -> Array:
        """What it is made of comes with the state."""
        return Array(limit, budget)

    calls = {("_codecs", "encode"): encode, ("numpy", "dtype"): Dtype, ("numpy", "ndarray"): None}
    for core in ("numpy.core", "numpy._core"):
        calls[f"{core}.multiarray", "scalar"] = scalar
        calls[f"{core}.multiarray", "_reconstruct"] = reconstruct
        calls[f"{core}.numeric", "_frombuffer"] = frombuffer
    return {(module, name): Name(f"{module}.{name}", call=call) for (module, name), call in calls.items()}
