"""Pickles read as data: nothing that they name is imported, called or changed.

A pickle is a program for a stack machine. Python's own machine looks names up in modules, calls what it finds, and
sets the attributes of the results; a restricted `find_class` narrows the names only. Here the machine is another
one: a closed list of opcodes, those with which protocols 2 to 5 write plain data, over values that can do nothing.

- A name (GLOBAL, STACK_GLOBAL) is looked up in the table of the caller and nowhere else. It stands for a function of
  this project, which is called with the arguments (REDUCE, NEWOBJ), or for nothing but itself. BUILD works on
  values of class `Inert` alone, by their method `build`. All other names are refused and told.
- Not in the list, and hence refused: INST and OBJ, the extension registry (EXT), NEWOBJ_EX, out-of-band buffers,
  the text opcodes of protocols 0 and 1, and integers of more than 255 bytes.
- Bytes are views of the input, so that no announced length allocates anything. Opcodes and letters of text are
  counted: at most `Budget` allows, in all streams of a file together. Each opcode makes at most one small object.
- Keys and members of sets are text, or bytes of Python 2 that become text: hashing them is linear, calls nothing.
- The machine does not recurse. A value can hold itself, or grow exponentially when it is written out, since
  parts of it can be shared; so whoever walks through values must count the steps, as `plain` does.
"""

import pickletools
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

_MAX_NAME = 256  # bytes of a module or of a name
_MAX_TEXT = 1 << 24  # bytes of one text; the source text of a module has 10^5


@dataclass(frozen=True, eq=False)
class Name:
    """What stands for a name in a pickle: `call` for calling it, `new` for making an instance without state.

    Both take the tuple of arguments, trust nothing in it, and raise ValueError. Without them it is an argument only.
    """

    text: str
    call: Callable[[tuple], Any] | None = None
    new: Callable[[tuple], Any] | None = None


class UnknownName(ValueError):
    """A pickle asks for a name that is not in the table."""


class Inert:
    """A value that stands for an object of another program."""

    def build(self, state: Any) -> None:
        """What BUILD does with it."""
        raise ValueError(f"sets the state of a {type(self).__name__.lower()}, which has none")

    def plain(self) -> Any:
        """The value as numbers, text and lists, if it is that."""
        raise ValueError(f"holds a {type(self).__name__.lower()} where plain values belong")


@dataclass
class Budget:
    """What reading a file may still cost. The largest published networks take 10^5 opcodes and 10^5 letters."""

    opcodes: int = 500_000
    text: int = 1 << 26  # bytes
    arrays: int = 1 << 26  # bytes of what is copied: one row of bytes in the input can be named any number of times

    def spend(self, opcodes: int = 0, text: int = 0, arrays: int = 0) -> None:
        """Take away from what is left.

        Raises
        ------
        ValueError
            If that is not enough.
        """
        self.opcodes -= opcodes
        self.text -= text
        self.arrays -= arrays
        if min(self.opcodes, self.text, self.arrays) < 0:
            raise ValueError("is larger than it needs to be: too many opcodes, too much text or too many arrays")


def read_pickle(
    data: memoryview,
    names: Mapping[tuple[str, str], Name],
    budget: Budget,
    persistent: Callable[[Any], Any] | None = None,
) -> tuple[Any, int]:
    """Run the pickle at the beginning of `data`.

    Parameters
    ----------
    data : bytes [n], of which all bytes objects in the result are views
    names : (module, name) -> what stands for it
    budget : what this may cost; is diminished
    persistent : makes a value of a persistent id (BINPERSID)

    Returns
    -------
    value : made of None, bool, int, float, str, memoryview, tuple, list, dict, set, `Name` and what `names` make
    end : number of bytes up to and with its last opcode

    Raises
    ------
    ValueError
        The reason, as a phrase that goes on after the name of the file ("is cut short").
        `UnknownName` if it asks for something that is not in `names`.
    """
    if bytes(data[:1]) not in (b"\x80", b"c", b"(", b""):  # c and (: protocols 0 and 1, to tell the name
        raise ValueError("is no pickle")
    machine = _Machine(data, names, budget, persistent)
    while not machine.done:
        budget.spend(opcodes=1)
        code = machine.take(1)[0]
        step = _STEPS.get(code)
        if step is None:
            machine.refuse(code)
        step(machine)
    return machine.result(), machine.at


def plain(value: Any, steps: int = 10_000, depth: int = 8) -> Any:
    """Copy a value made of None, bool, int, float, str, tuples, lists and dicts; tuples become lists.

    Raises
    ------
    ValueError
        If it holds anything else, is nested more deeply than `depth`, or has more than `steps` parts. Each 100
        letters of text count as a part.
    """
    left = steps

    def copy(value: Any, depth: int) -> Any:
        nonlocal left
        texts = [value] if type(value) is str else value if type(value) is dict else ()
        left -= 1 + sum(len(text) // 100 for text in texts)
        if left < 0 or depth < 0:
            raise ValueError("holds plain values that are too large, nested too deeply or contain themselves")
        if isinstance(value, Inert):
            value = value.plain()
        if value is None or type(value) in (bool, int, float, str):
            return value
        if type(value) in (tuple, list):
            return [copy(v, depth - 1) for v in value]
        if type(value) is dict:
            return {k: copy(v, depth - 1) for k, v in value.items()}
        what = value.text if isinstance(value, Name) else f"a value of type {type(value).__name__}"
        raise ValueError(f"holds {what} where plain values belong")

    return copy(value, depth)


def show(text: str, limit: int = 100) -> str:
    """`text` as it may stand in a message: one line, printable, not long."""
    text = text if text.isascii() and text.isprintable() else ascii(text)[1:-1]
    return text if len(text) <= limit else text[:limit] + "..."


def take_args(args: Any, kinds: list[type | None]) -> tuple:
    """`args` if it is a tuple of values of exactly these types; None takes any value."""
    if type(args) is not tuple or len(args) != len(kinds):
        raise ValueError("calls a function with the wrong number of arguments")
    for value, kind in zip(args, kinds):
        if kind is not None and type(value) is not kind:
            raise ValueError(
                f"gives a function a {type(value).__name__.lower()} where it takes a {kind.__name__.lower()}"
            )
    return args


# ----------------------------------------------------------------------------
# The machine.


class _Machine:
    def __init__(
        self,
        data: memoryview,
        names: Mapping[tuple[str, str], Name],
        budget: Budget,
        persistent: Callable[[Any], Any] | None,
    ):
        self.data, self.names, self.budget, self.persistent = data, names, budget, persistent
        self.at = 0  # next byte
        self.stack: list[Any] = []
        self.marks: list[int] = []  # heights of the stack
        self.memo: dict[int, Any] = {}
        self.done = False

    # Input.

    def take(self, size: int) -> memoryview:
        end = self.at + size
        if end > len(self.data):
            raise ValueError("is cut short")
        taken = self.data[self.at : end]
        self.at = end
        return taken

    def number(self, layout: str) -> Any:
        return struct.unpack(layout, self.take(struct.calcsize(layout)))[0]

    def line(self) -> str:
        end = bytes(self.data[self.at : self.at + _MAX_NAME + 1]).find(b"\n")
        if end < 0:
            raise ValueError("holds a name without end, or is cut short")
        return _decode(self.take(end + 1)[:-1])

    # Stack.

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def pop(self) -> Any:
        if len(self.stack) <= (self.marks[-1] if self.marks else 0):
            raise ValueError("takes a value from an empty stack")
        return self.stack.pop()

    def pop_to_mark(self) -> list[Any]:
        if not self.marks:
            raise ValueError("takes values up to a mark that it has not set")
        height = self.marks.pop()
        values = self.stack[height:]
        del self.stack[height:]
        return values

    def top(self, kind: type) -> Any:
        value = self.pop()
        if type(value) is not kind:
            raise ValueError(f"adds to a {type(value).__name__} as if it were a {kind.__name__}")
        self.push(value)
        return value

    def result(self) -> Any:
        value = self.pop()
        if self.stack or self.marks:
            raise ValueError("ends with more than one value")
        return value

    # Names.

    def find(self, module: Any, name: Any) -> Name:
        if type(module) is not str or type(name) is not str:
            raise ValueError("asks for a name that is not text")
        found = self.names.get((module, name))
        if found is None:
            raise UnknownName(f"asks for {show(module)}.{show(name)}")
        return found

    def refuse(self, code: int) -> NoReturn:
        op = pickletools.code2op.get(chr(code))
        if op is None:
            raise ValueError(f"is damaged: {code} is no opcode")
        if op.name == "INST":
            raise UnknownName(f"asks for {show(self.line())}.{show(self.line())}")
        raise ValueError(f"uses the opcode {op.name}, which no network needs")


def _decode(data: memoryview) -> str:
    try:
        return str(data, "utf-8")
    except UnicodeDecodeError:
        raise ValueError("holds text that is not UTF-8") from None


_STEPS: dict[int, Callable[[_Machine], None]] = {}  # by opcode


def _step(opcode: str) -> Callable[[Callable], Callable]:
    def register(function: Callable[[_Machine], None]) -> Callable[[_Machine], None]:
        (code,) = [op.code for op in pickletools.opcodes if op.name == opcode]
        _STEPS[ord(code)] = function
        return function

    return register


@_step("PROTO")
def _proto(m: _Machine) -> None:
    version = m.number("B")
    if not 2 <= version <= 5:
        raise ValueError(f"is a pickle of protocol {version}; 2 to 5 are read")


@_step("FRAME")
def _frame(m: _Machine) -> None:
    if m.number("<Q") > len(m.data) - m.at:
        raise ValueError("is cut short")


@_step("STOP")
def _stop(m: _Machine) -> None:
    m.done = True


# Numbers and text.


def _constant(opcode: str, value: Any) -> None:
    _step(opcode)(lambda m: m.push(value))


def _number(opcode: str, layout: str) -> None:
    _step(opcode)(lambda m: m.push(m.number(layout)))


def _text(opcode: str, layout: str) -> None:
    def step(m: _Machine) -> None:
        size = m.number(layout)
        if size > _MAX_TEXT:
            raise ValueError(f"holds a text of {size} bytes, or is damaged")
        m.budget.spend(text=size)
        m.push(_decode(m.take(size)))

    _step(opcode)(step)


def _bytes(opcode: str, layout: str) -> None:
    _step(opcode)(lambda m: m.push(m.take(m.number(layout))))


_constant("NONE", None)
_constant("NEWTRUE", True)
_constant("NEWFALSE", False)
_constant("EMPTY_TUPLE", ())
_number("BININT", "<i")
_number("BININT1", "<B")
_number("BININT2", "<H")
_number("BINFLOAT", ">d")
_text("SHORT_BINUNICODE", "<B")
_text("BINUNICODE", "<I")
_bytes("SHORT_BINSTRING", "<B")  # a str of Python 2
_bytes("BINSTRING", "<I")
_bytes("SHORT_BINBYTES", "<B")
_bytes("BINBYTES", "<I")
_bytes("BINBYTES8", "<Q")
_bytes("BYTEARRAY8", "<Q")


@_step("LONG1")
def _long1(m: _Machine) -> None:
    m.push(int.from_bytes(m.take(m.number("B")), "little", signed=True))


# Containers.


@_step("MARK")
def _mark(m: _Machine) -> None:
    m.marks.append(len(m.stack))


@_step("TUPLE")
def _tuple(m: _Machine) -> None:
    m.push(tuple(m.pop_to_mark()))


def _short_tuple(opcode: str, size: int) -> None:
    _step(opcode)(lambda m: m.push(tuple([m.pop() for _ in range(size)][::-1])))


_short_tuple("TUPLE1", 1)
_short_tuple("TUPLE2", 2)
_short_tuple("TUPLE3", 3)
_step("EMPTY_LIST")(lambda m: m.push([]))
_step("EMPTY_DICT")(lambda m: m.push({}))
_step("EMPTY_SET")(lambda m: m.push(set()))


@_step("APPEND")
def _append(m: _Machine) -> None:
    value = m.pop()
    m.top(list).append(value)


@_step("APPENDS")
def _appends(m: _Machine) -> None:
    values = m.pop_to_mark()
    m.top(list).extend(values)


def text_of(value: Any) -> Any:
    """The str that stands for it if it is a short row of bytes, as Python 2 wrote names; else itself."""
    return str(value, "latin1") if type(value) is memoryview and len(value) <= _MAX_NAME else value


def _key(value: Any) -> str:
    value = text_of(value)
    if type(value) is not str:
        raise ValueError(f"has a key of type {type(value).__name__}, which is not text")
    return value


@_step("SETITEM")
def _setitem(m: _Machine) -> None:
    value, key = m.pop(), m.pop()
    m.top(dict)[_key(key)] = value


@_step("SETITEMS")
def _setitems(m: _Machine) -> None:
    values = m.pop_to_mark()
    if len(values) % 2:
        raise ValueError("has a key without a value")
    m.top(dict).update((_key(key), value) for key, value in zip(values[::2], values[1::2]))


@_step("ADDITEMS")
def _additems(m: _Machine) -> None:
    values = m.pop_to_mark()
    m.top(set).update(_key(value) for value in values)


# Memo.


def _get(opcode: str, layout: str) -> None:
    def step(m: _Machine) -> None:
        index = m.number(layout)
        if index not in m.memo:
            raise ValueError(f"refers to value {index}, which it has not made")
        m.push(m.memo[index])

    _step(opcode)(step)


def _put(m: _Machine, index: int) -> None:
    value = m.pop()
    m.push(value)
    m.memo[index] = value


_get("BINGET", "<B")
_get("LONG_BINGET", "<I")
_step("BINPUT")(lambda m: _put(m, m.number("<B")))
_step("LONG_BINPUT")(lambda m: _put(m, m.number("<I")))
_step("MEMOIZE")(lambda m: _put(m, len(m.memo)))


# What another machine would run.


@_step("GLOBAL")
def _global(m: _Machine) -> None:
    module, name = m.line(), m.line()
    m.push(m.find(module, name))


@_step("STACK_GLOBAL")
def _stack_global(m: _Machine) -> None:
    name, module = m.pop(), m.pop()
    m.push(m.find(module, name))


def _apply(m: _Machine, how: str) -> None:
    args, name = m.pop(), m.pop()
    function = getattr(name, how) if isinstance(name, Name) else None
    if function is None or type(args) is not tuple:
        what = name.text if isinstance(name, Name) else f"a {type(name).__name__.lower()}"
        raise ValueError(f"calls {what} in a way that is not known")
    m.push(function(args))


_step("REDUCE")(lambda m: _apply(m, "call"))
_step("NEWOBJ")(lambda m: _apply(m, "new"))


@_step("BUILD")
def _build(m: _Machine) -> None:
    state, value = m.pop(), m.pop()
    if not isinstance(value, Inert):
        raise ValueError(f"sets the state of a {type(value).__name__.lower()}, which has none")
    value.build(state)
    m.push(value)


@_step("BINPERSID")
def _binpersid(m: _Machine) -> None:
    if m.persistent is None:
        raise ValueError("refers to values outside of it (BINPERSID)")
    m.push(m.persistent(m.pop()))
