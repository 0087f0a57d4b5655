"""The pickle in a file of torch.save, read as data: tensors as they are described, all other objects not made.

A training's state holds objects of any class beside the weights, so words are only refused that no trainer writes.
"""

from __future__ import annotations

import re
from collections.abc import Container, Mapping
from dataclasses import dataclass
from typing import Any

from .machine import (
    MAX_MEMORY,
    OPCODES,
    ORDERED_DICT,
    Applied,
    Fault,
    Machine,
    Word,
    steps_of,
)
from .torch_tensors import DTYPE_BYTES, STORAGES, is_count
from .torch_zip import refused, shown

MAX_PICKLE_BYTES = 64 << 20
MAX_OPERATIONS = 3_000_000  # 45 write one tensor
_MAX_NAMES = 10_000

UNTYPED = ("torch.storage", "UntypedStorage")
REBUILD_TENSOR = (("torch._utils", "_rebuild_tensor_v2"), ("torch._utils", "_rebuild_tensor_v3"))
_PARAMETERS = (("torch._utils", "_rebuild_parameter"), ("torch._utils", "_rebuild_parameter_with_state"))
_OF_TYPE = Word("torch._tensor", "_rebuild_from_type_v2")
_PLAIN_TYPES = (Word("torch", "Tensor"), Word("torch.nn.parameter", "Parameter"))

_ATTACK = re.compile(
    r"(?:os|posix|nt|subprocess|pty|runpy|commands)\..*"
    r"|(?:builtins|__builtin__)\.(?:eval|exec|execfile|compile|open|__import__)|_?io\.open"
)
"""Nothing here could run it; whoever loads the file elsewhere should know."""


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


class Table(dict[str, Any]):
    """A dict. Keys that are no text are not kept, only counted: hashing foreign values is not safe."""

    unnamed = 0


@dataclass(frozen=True)
class Content:
    """What a pickle holds, and every storage that it mentions anywhere by its key.

    A tensor is the function of REBUILD_TENSOR that makes it, Applied to its arguments, which nobody has checked yet.
    """

    value: Any
    storages: Mapping[str, Storage]


def read_pickle(
    data: bytes, what: str, *, words: Container[tuple[str, str]] | None = None, memory: int = MAX_MEMORY
) -> Content:
    """The value of a pickle; `what` is for the errors.

    Raises CheckpointError for what torch.save does not write, for a pickle that takes more than `memory` bytes, and,
    when `words` are given, for any other word than these.
    """
    machine = _TorchMachine(data, words)
    try:
        return Content(machine.run(_STEPS, memory=memory, operations=MAX_OPERATIONS), machine.storages)
    except Fault as fault:
        raise refused(what, str(fault)) from fault


class _TorchMachine(Machine):
    def __init__(self, data: bytes, words: Container[tuple[str, str]] | None) -> None:
        super().__init__(data, words or ())
        self.restricted = words is not None
        self.memo = {}
        self.storages: dict[str, Storage] = {}

    def check(self, word: Word) -> None:
        if self.restricted:
            super().check(word)
        if _ATTACK.fullmatch(word.text):
            raise Fault(f"names {shown(word.text)}, which runs code or commands where it is loaded: no trainer does")
        if len(self.known) == _MAX_NAMES:
            raise Fault(f"names more than {_MAX_NAMES:,} classes and functions")

    def text(self, count: int) -> None:
        self.push(self.take(count).decode("utf-8", "surrogatepass"), 49 + 4 * count)

    def remember(self, index: int) -> None:
        self.spent += 100
        self.memo[index] = self.stack[-1]

    def memoize(self) -> None:
        self.remember(len(self.memo))

    def empty_dict(self) -> None:
        self.push(Table(), 184)

    def update(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if len(items) % 2:
            raise TypeError
        if type(target) is not Table:
            return
        self.spent += 50 * len(items)
        for key, value in zip(items[::2], items[1::2], strict=True):
            if type(key) is str:
                target[key] = value
            else:
                target.unnamed += 1

    def extend(self, items: list[Any]) -> None:
        if type(self.stack[-1]) is list:
            super().extend(items)

    def reduce(self) -> None:
        arguments, function = self.stack.pop(), self.stack.pop()
        self.push(_reduced(function, arguments), 256)

    def newobj(self) -> None:
        self.opaque(2)

    def build(self) -> None:
        self.stack.pop()  # the state is dropped

    def binpersid(self) -> None:
        identity = self.stack.pop()
        if type(identity) is not tuple or len(identity) != 5 or identity[:1] != ("storage",):
            raise Fault("has a persistent id that is no storage")
        _, kind, key, _, count = identity
        dtype = STORAGES.get(kind.name) if type(kind) is Word and kind.module == "torch" else None
        if dtype is None and (type(kind) is not Word or (kind.module, kind.name) != UNTYPED):
            raise Fault(f"has a storage of the unknown kind {shown(_text(kind))}")
        if type(key) is not str or not is_count(count):
            raise Fault("has a storage without a key and a count of elements")
        storage = Storage(key, dtype, count * (DTYPE_BYTES[dtype] if dtype else 1))
        known = self.storages.setdefault(key, storage)
        if known.size != storage.size:
            raise Fault(f"says of storage {shown(key)} both {known.size:,} and {storage.size:,} bytes")
        self.push(known if known == storage else storage, 256)

    # Opcodes that are only read here.

    def opaque(self, count: int) -> None:
        """An object that is not made in place of a class and what it is made of, `count` values in all."""
        made = self.stack[-count]
        del self.stack[-count:]
        self.push(Opaque(_text(made)), 256)

    def newobj_ex(self) -> None:
        self.opaque(3)

    def skip(self, count: int) -> None:
        self.take(count)
        self.push(Opaque("bytes"), 256)

    def short_binbytes(self) -> None:
        self.skip(self.byte())

    def binbytes(self) -> None:
        self.skip(self.number(4))

    def binbytes8(self) -> None:
        self.skip(self.number(8))

    short_binstring, binstring, bytearray8 = short_binbytes, binbytes, binbytes8

    def binunicode8(self) -> None:
        self.text(self.number(8))

    def empty_set(self) -> None:
        self.push(Opaque("set"), 256)

    def additems(self) -> None:
        self.since_mark()

    def frozenset(self) -> None:
        self.push(Opaque(f"frozenset of {len(self.since_mark())}"), 256)

    def pop(self) -> None:
        self.stack.pop()

    def pop_mark(self) -> None:
        self.since_mark()

    def dup(self) -> None:
        self.push(self.stack[-1], 0)


def _reduced(function: Any, arguments: Any) -> Any:
    """What calling `function` would make, without calling it."""
    if type(function) is not Word or type(arguments) is not tuple:
        return Opaque(_text(function))
    key = (function.module, function.name)
    if key in REBUILD_TENSOR:
        return Applied(function, arguments)
    if key == ORDERED_DICT and not arguments:
        return Table()
    first = arguments[0] if arguments else None
    # Handed on as they are: copying here would let a short file make much of little.
    if (key == ("torch", "Size") and type(first) is tuple) or (key in _PARAMETERS and type(first) is Applied):
        return first
    if function == _OF_TYPE and len(arguments) == 4 and arguments[1] in _PLAIN_TYPES and first != _OF_TYPE:
        return _reduced(first, arguments[2])
    return Opaque(function.text)


def _text(value: Any) -> str:
    return value.text if type(value) in (Word, Opaque) else type(value).__name__


_STEPS = steps_of(
    _TorchMachine,
    f"{OPCODES} newobj_ex short_binbytes binbytes binbytes8 short_binstring binstring bytearray8 binunicode8 "
    "empty_set additems frozenset pop pop_mark dup",
)
