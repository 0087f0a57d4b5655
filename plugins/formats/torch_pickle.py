"""The pickle in a file of torch.save, read as data: a machine that knows no class and calls nothing.

pickle.Unpickler with a strict find_class runs no foreign code, yet a hostile file still makes it hash a tuple nested
a million deep (the process dies) or reserve memory for a memo of 2**32 places. So this is an interpreter of its own
for the opcodes that torch.save writes, in which every step costs a bounded amount of memory, and nothing is hashed but
short text. Names of classes and functions stay names.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from .torch_zip import refused, shown

MAX_PICKLE_BYTES = 64 << 20
MAX_OPERATIONS = 3_000_000  # 45 write one tensor
_MAX_NAMES = 10_000
_MAX_NAME_BYTES = 4096

DTYPE_BYTES: Mapping[str, int] = {
    **dict.fromkeys(("complex128",), 16),
    **dict.fromkeys(("float64", "int64", "uint64", "complex64"), 8),
    **dict.fromkeys(("float32", "int32", "uint32"), 4),
    **dict.fromkeys(("float16", "bfloat16", "int16", "uint16"), 2),
    **dict.fromkeys(("int8", "uint8", "bool", "float8_e4m3fn", "float8_e5m2"), 1),
    **dict.fromkeys(("float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e8m0fnu"), 1),
}
_UNTYPED = "torch.storage.UntypedStorage"
_STORAGES: Mapping[str, str] = {
    "torch.DoubleStorage": "float64",
    "torch.FloatStorage": "float32",
    "torch.HalfStorage": "float16",
    "torch.BFloat16Storage": "bfloat16",
    "torch.LongStorage": "int64",
    "torch.IntStorage": "int32",
    "torch.ShortStorage": "int16",
    "torch.CharStorage": "int8",
    "torch.ByteStorage": "uint8",
    "torch.BoolStorage": "bool",
    "torch.ComplexFloatStorage": "complex64",
    "torch.ComplexDoubleStorage": "complex128",
}
_TENSORS = {"torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_tensor_v3"}
_PARAMETERS = {"torch._utils._rebuild_parameter", "torch._utils._rebuild_parameter_with_state"}
_OF_TYPE = "torch._tensor._rebuild_from_type_v2"
_PLAIN_TYPES = {"torch.Tensor", "torch.nn.parameter.Parameter"}

_ATTACK = re.compile(
    r"(?:os|posix|nt|subprocess|pty|runpy|commands)\..*"
    r"|(?:builtins|__builtin__)\.(?:eval|exec|execfile|compile|open|__import__)|_?io\.open"
)
"""Nothing here could run it; whoever loads the file elsewhere should know."""


@dataclass(frozen=True, slots=True)
class Name:
    """A class or function that the pickle names."""

    text: str


@dataclass(frozen=True, slots=True)
class Opaque:
    """An object that is not made: what it would have been."""

    text: str


@dataclass(frozen=True, slots=True)
class Storage:
    """The member `data/<key>` of `size` bytes; `dtype` is None when the storage does not say it."""

    key: str
    dtype: str | None
    size: int


@dataclass(frozen=True, slots=True)
class Rebuild:
    """A tensor as the pickle describes it, not yet checked: the arguments of torch._utils._rebuild_tensor_v2 or _v3."""

    function: str
    arguments: tuple[Any, ...]


class Table(dict[str, Any]):
    """A dict. Keys that are no text are not kept, only counted: hashing foreign values is not safe."""

    unnamed = 0


@dataclass(frozen=True)
class Content:
    """What a pickle holds, and every storage that it mentions anywhere by its key."""

    value: Any
    storages: Mapping[str, Storage]


def read_pickle(data: bytes, what: str) -> Content:
    """The value of a pickle; `what` is for the errors. Raises CheckpointError for what torch.save does not write."""
    machine = _Machine(data)
    try:
        return Content(machine.run(), machine.storages)
    except _Fault as fault:
        raise refused(what, str(fault)) from fault
    except (IndexError, KeyError, TypeError, ValueError, struct.error) as error:
        raise refused(what, f"does not parse near byte {machine.at:,}") from error


class _Fault(Exception):
    pass


class _Machine:
    def __init__(self, data: bytes) -> None:
        self.data = data
        self.at = 0
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}
        self.names: dict[str, Name] = {}
        self.storages: dict[str, Storage] = {}

    def run(self) -> Any:
        for _ in range(MAX_OPERATIONS):
            code = self.data[self.at]
            self.at += 1
            if code == ord("."):
                return self.stack.pop()
            step = _STEPS.get(code)
            if step is None:
                raise _Fault(f"has the opcode {bytes([code])!r}, which torch.save does not write")
            step(self)
        raise _Fault(f"has more than {MAX_OPERATIONS:,} operations")

    def take(self, size: int) -> bytes:
        taken = self.data[self.at : self.at + size]
        if len(taken) < size:
            raise _Fault(f"ends inside a value of {size:,} bytes")
        self.at += size
        return taken

    def number(self, form: struct.Struct) -> Any:
        (value,) = form.unpack(self.take(form.size))
        return value

    def line(self) -> str:
        end = self.data.find(b"\n", self.at, self.at + _MAX_NAME_BYTES)
        if end < 0:
            raise _Fault(f"has a name of more than {_MAX_NAME_BYTES:,} bytes")
        text = self.take(end - self.at).decode()
        self.at += 1
        return text

    def since_mark(self) -> list[Any]:
        start = self.marks.pop()
        items = self.stack[start:]
        del self.stack[start:]
        return items

    def push_tuple(self, size: int) -> None:
        if len(self.stack) < size:
            raise _Fault("takes more from its stack than is there")
        items = tuple(self.stack[-size:])
        self.stack[-size:] = [items]

    def push_name(self, module: Any, name: Any) -> None:
        if type(module) is not str or type(name) is not str or len(module) + len(name) > _MAX_NAME_BYTES:
            raise _Fault("names a class by something else than text")
        text = f"{module}.{name}"
        if text not in self.names:
            if _ATTACK.fullmatch(text):
                raise _Fault(f"names {shown(text)}, which runs code or commands where it is loaded: no trainer does")
            if len(self.names) == _MAX_NAMES:
                raise _Fault(f"names more than {_MAX_NAMES:,} classes and functions")
            self.names[text] = Name(text)
        self.stack.append(self.names[text])

    def set_items(self, pairs: list[Any]) -> None:
        target = self.stack[-1]
        if len(pairs) % 2:
            raise _Fault("sets a key without a value")
        if type(target) is not Table:
            return
        for key, value in zip(pairs[::2], pairs[1::2], strict=True):
            if type(key) is str:
                target[key] = value
            else:
                target.unnamed += 1

    def append(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if type(target) is list:
            target.extend(items)

    def build(self, count: int) -> None:
        """Makes of a class and its `count` arguments an object that is not made."""
        made = self.stack[-1 - count]
        self.stack[-1 - count :] = [Opaque(_text(made))]

    def reduce(self) -> None:
        arguments = self.stack.pop()
        self.stack[-1] = _reduced(self.stack[-1], arguments)

    def storage(self) -> None:
        identity = self.stack.pop()
        if type(identity) is not tuple or len(identity) != 5 or identity[:1] != ("storage",):
            raise _Fault("has a persistent id that is no storage")
        _, kind, key, _, count = identity
        if type(kind) is not Name or (kind.text not in _STORAGES and kind.text != _UNTYPED):
            raise _Fault(f"has a storage of the unknown kind {shown(_text(kind))}")
        if type(key) is not str or type(count) is not int or not 0 <= count < 2**63:
            raise _Fault("has a storage without a key and a count of elements")
        dtype = _STORAGES.get(kind.text)
        storage = Storage(key, dtype, count * (DTYPE_BYTES[dtype] if dtype else 1))
        known = self.storages.setdefault(key, storage)
        if known.size != storage.size:
            raise _Fault(f"says of storage {shown(key)} both {known.size:,} and {storage.size:,} bytes")
        self.stack.append(known if known == storage else storage)


def _reduced(function: Any, arguments: Any) -> Any:
    """What calling `function` would make, without calling it."""
    text = _text(function)
    if type(function) is not Name or type(arguments) is not tuple:
        return Opaque(text)
    if text in _TENSORS:
        return Rebuild(text, arguments)
    if text == "collections.OrderedDict" and not arguments:
        return Table()
    first = arguments[0] if arguments else None
    # Handed on as they are: copying here would let a short file make much of little.
    if (text == "torch.Size" and type(first) is tuple) or (text in _PARAMETERS and type(first) is Rebuild):
        return first
    if text == _OF_TYPE and len(arguments) == 4 and _text(arguments[1]) in _PLAIN_TYPES and _text(first) != _OF_TYPE:
        return _reduced(first, arguments[2])
    return Opaque(text)


def _text(value: Any) -> str:
    return value.text if type(value) in (Name, Opaque) else type(value).__name__


_Step: TypeAlias = Callable[[_Machine], object]
_U8, _U16, _U32, _U64 = (struct.Struct(form) for form in ("<B", "<H", "<I", "<Q"))
_I32, _F64 = struct.Struct("<i"), struct.Struct(">d")


def _constant(make: Callable[[], Any]) -> _Step:
    return lambda machine: machine.stack.append(make())


def _number(form: struct.Struct) -> _Step:
    return lambda machine: machine.stack.append(machine.number(form))


def _string(length: struct.Struct) -> _Step:
    return lambda machine: machine.stack.append(machine.take(machine.number(length)).decode("utf-8", "surrogatepass"))


def _bytes(length: struct.Struct) -> _Step:
    def skip(machine: _Machine) -> None:
        machine.take(machine.number(length))
        machine.stack.append(Opaque("bytes"))

    return skip


def _put(form: struct.Struct) -> _Step:
    return lambda machine: machine.memo.__setitem__(machine.number(form), machine.stack[-1])


def _get(form: struct.Struct) -> _Step:
    return lambda machine: machine.stack.append(machine.memo[machine.number(form)])


_STEPS: Mapping[int, _Step] = {
    ord(code): step
    for code, step in {
        "\x80": lambda machine: machine.take(1),  # PROTO
        "\x95": lambda machine: machine.take(8),  # FRAME
        "N": _constant(lambda: None),
        "\x88": _constant(lambda: True),
        "\x89": _constant(lambda: False),
        ")": _constant(tuple),
        "]": _constant(list),
        "}": _constant(Table),
        "\x8f": _constant(lambda: Opaque("set")),
        "J": _number(_I32),
        "K": _number(_U8),
        "M": _number(_U16),
        "G": _number(_F64),
        "\x8a": lambda m: m.stack.append(int.from_bytes(m.take(m.number(_U8)), "little", signed=True)),  # LONG1
        "X": _string(_U32),
        "\x8c": _string(_U8),
        "\x8d": _string(_U64),
        "U": _bytes(_U8),
        "T": _bytes(_U32),
        "C": _bytes(_U8),
        "B": _bytes(_U32),
        "\x8e": _bytes(_U64),
        "\x96": _bytes(_U64),
        "q": _put(_U8),
        "r": _put(_U32),
        "\x94": lambda machine: machine.memo.__setitem__(len(machine.memo), machine.stack[-1]),  # MEMOIZE
        "h": _get(_U8),
        "j": _get(_U32),
        "(": lambda machine: machine.marks.append(len(machine.stack)),
        "0": lambda machine: machine.stack.pop(),
        "1": lambda machine: machine.since_mark(),
        "2": lambda machine: machine.stack.append(machine.stack[-1]),
        "t": lambda machine: machine.stack.append(tuple(machine.since_mark())),
        "\x85": lambda machine: machine.push_tuple(1),
        "\x86": lambda machine: machine.push_tuple(2),
        "\x87": lambda machine: machine.push_tuple(3),
        "a": lambda machine: machine.append([machine.stack.pop()]),
        "e": lambda machine: machine.append(machine.since_mark()),
        "s": lambda machine: machine.set_items([machine.stack.pop(-2), machine.stack.pop()]),
        "u": lambda machine: machine.set_items(machine.since_mark()),
        "\x90": lambda machine: machine.since_mark(),  # ADDITEMS, to a set that is not made
        "\x91": lambda machine: machine.stack.append(Opaque(f"frozenset of {len(machine.since_mark())}")),
        "c": lambda machine: machine.push_name(machine.line(), machine.line()),
        "\x93": lambda machine: machine.push_name(machine.stack.pop(-2), machine.stack.pop()),
        "R": _Machine.reduce,
        "b": lambda machine: machine.stack.pop(),  # BUILD: the state is dropped
        "\x81": lambda machine: machine.build(1),
        "\x92": lambda machine: machine.build(2),
        "Q": _Machine.storage,
    }.items()
}
