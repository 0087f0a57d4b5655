"""A pickle read as data: words, and what they are applied to. Nothing in it is imported, looked up or called.

Python's own Unpickler is not used even with a closed `find_class`: it hashes whatever a file nests, reserves memory for
whatever memo index a file names, and lets a file change the classes that it was allowed. Here every step costs a
bounded amount of memory, which is summed up, and what a file nests is never hashed. The opcodes are those that Python
writes for the plain objects of a checkpoint, in protocols 2 to 5; a subclass may read more, or read them otherwise.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Container
from dataclasses import dataclass
from pickletools import opcodes
from typing import Any, TypeAlias, TypeVar

MAX_MEMORY = 3 * 2**30
"""Bytes that the objects of one pickle may take, by an estimate from above; 10^6 chunks of a `.metadata` take most."""

MAX_NAME = 4096
"""Characters in the name of a class or function."""

ORDERED_DICT = ("collections", "OrderedDict")
GETATTR = ("builtins", "getattr")


class Fault(Exception):
    """What is wrong with a pickle, as the rest of a sentence that begins with its name."""


class Ended(Fault):
    """The pickle ends too early: it may still be written."""


@dataclass(frozen=True, slots=True)
class Word:
    """The name of a class or function."""

    module: str
    name: str

    @property
    def text(self) -> str:
        return f"{self.module}.{self.name}"


@dataclass(eq=False, slots=True)
class Applied:
    """A word with arguments: what the writer wanted to be called, and the state it was to be given then."""

    word: Word
    arguments: tuple[Any, ...]
    state: object = None


class Machine:
    """The pickle machine's stack, marks and memo. `spent` is an upper estimate of the memory that all objects take.

    Words must be among `words` as (module, name). An empty OrderedDict is read as a dict.
    """

    def __init__(self, data: bytes | bytearray, words: Container[tuple[str, str]]) -> None:
        self.data = data
        self.words = words
        self.position = 0
        self.spent = 0
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: Any = []
        self.known: dict[tuple[str, str], Word] = {}

    def run(self, steps: Steps, *, memory: int = MAX_MEMORY, operations: int | None = None) -> Any:
        """The one object of the pickle. Raises Ended, and Fault for all else that is not read."""
        data, size = self.data, len(self.data)
        position = 0
        try:
            for _ in range(size + 1 if operations is None else operations):
                position = self.position
                if position >= size:
                    raise self.ended()
                code = data[position]
                self.position = position + 1
                if code == _STOP:
                    return self._result()
                steps[code](self)
                if self.spent > memory:
                    raise Fault(f"takes more than the {memory:,} bytes of memory that it may")
        except (IndexError, KeyError, ValueError, TypeError) as error:
            if self.position >= size and code != _STOP:
                raise self.ended() from error
            raise Fault(f"is no pickle that Python writes: byte {position:,} does not fit") from error
        raise Fault(f"has more than {operations:,} operations")

    def _result(self) -> object:
        (result,) = self.stack
        if self.position != len(self.data):
            raise Fault(f"has {len(self.data) - self.position:,} bytes after its end")
        return result

    def ended(self) -> Ended:
        return Ended(f"ends after {len(self.data):,} bytes, before its end")

    def take(self, count: int) -> bytes | bytearray:
        end = self.position + count
        if end > len(self.data):
            raise self.ended()
        taken = self.data[self.position : end]
        self.position = end
        return taken

    def byte(self) -> int:
        value = self.data[self.position]
        self.position += 1
        return value

    def number(self, count: int) -> int:
        return int.from_bytes(self.take(count), "little")

    def push(self, value: object, cost: int) -> None:
        self.spent += 8 + cost
        self.stack.append(value)

    def text(self, count: int) -> None:
        text = self.take(count).decode()
        self.push(text, 49 + (count if text.isascii() else 4 * count))

    def since_mark(self) -> list[Any]:
        start = self.marks.pop()
        items = self.stack[start:]
        del self.stack[start:]
        return items

    def tuple_of(self, count: int) -> None:
        items = tuple(self.stack[-count:])
        if len(items) != count:
            raise IndexError
        del self.stack[-count:]
        self.push(items, 40 + 8 * count)

    def extend(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if not isinstance(target, list):
            raise TypeError
        self.spent += 9 * len(items)
        target.extend(items)

    def update(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if not isinstance(target, dict) or len(items) % 2:
            raise TypeError
        for key in items[::2]:
            # Nothing whose hash or comparison could be made to take for ever, as a tuple of tuples of tuples does.
            if type(key) is not str and type(key) is not Applied:
                raise Fault(f"has a dict with a {type(key).__name__} as a key, which is not read")
        self.spent += 50 * len(items)
        target.update(zip(items[::2], items[1::2], strict=True))

    def remember(self, index: int) -> None:
        if index != len(self.memo):  # as Python numbers them; any other could ask for a memo of any size
            raise IndexError
        self.memoize()

    def word(self, module: object, name: object) -> None:
        if type(module) is not str or type(name) is not str:
            raise TypeError
        word = self.known.get((module, name))
        if word is None:
            if len(module) + len(name) > MAX_NAME:
                raise Fault(f"has a name of more than {MAX_NAME:,} characters")
            word = Word(module, name)
            self.check(word)
            self.known[module, name] = word
        self.push(word, 0)

    def check(self, word: Word) -> None:
        """Raises Fault for a word that is not read."""
        if (word.module, word.name) not in self.words:
            raise Fault(f"names {ascii(word.text[:120])[1:-1]}, which is no part of it and is not read")

    def line(self) -> str:
        end = self.data.find(b"\n", self.position)
        if end < 0:
            raise self.ended()
        line = self.take(end - self.position).decode()
        self.position += 1
        return line

    # One method an opcode, under the opcode's name.

    def proto(self) -> None:
        if self.byte() > 5:
            raise Fault("is of a pickle protocol above 5")

    def frame(self) -> None:
        self.take(8)

    def mark(self) -> None:
        self.spent += 8
        self.marks.append(len(self.stack))

    def none(self) -> None:
        self.push(None, 0)

    def newtrue(self) -> None:
        self.push(True, 0)

    def newfalse(self) -> None:
        self.push(False, 0)

    def binint(self) -> None:
        self.push(int.from_bytes(self.take(4), "little", signed=True), 28)

    def binint1(self) -> None:
        self.push(self.byte(), 0)

    def binint2(self) -> None:
        self.push(self.number(2), 28)

    def long1(self) -> None:
        count = self.byte()
        self.push(int.from_bytes(self.take(count), "little", signed=True), 28 + 2 * count)

    def binfloat(self) -> None:
        self.push(struct.unpack(">d", self.take(8))[0], 24)

    def short_binunicode(self) -> None:
        self.text(self.byte())

    def binunicode(self) -> None:
        self.text(self.number(4))

    def empty_list(self) -> None:
        self.push([], 56)

    def append(self) -> None:
        self.extend([self.stack.pop()])

    def appends(self) -> None:
        self.extend(self.since_mark())

    def empty_tuple(self) -> None:
        self.push((), 0)

    def tuple(self) -> None:
        items = tuple(self.since_mark())
        self.push(items, 40 + 8 * len(items))

    def tuple1(self) -> None:
        self.tuple_of(1)

    def tuple2(self) -> None:
        self.tuple_of(2)

    def tuple3(self) -> None:
        self.tuple_of(3)

    def empty_dict(self) -> None:
        self.push({}, 184)

    def setitem(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self.update([key, value])

    def setitems(self) -> None:
        self.update(self.since_mark())

    def global_(self) -> None:
        self.word(self.line(), self.line())

    def stack_global(self) -> None:
        name, module = self.stack.pop(), self.stack.pop()
        self.word(module, name)

    def reduce(self) -> None:
        arguments, word = self.stack.pop(), self.stack.pop()
        if not isinstance(word, Word) or not isinstance(arguments, tuple):
            raise TypeError
        key = (word.module, word.name)
        if key == ORDERED_DICT and not arguments:
            self.empty_dict()
            return
        # Some releases of Python 3.11 write a member of an enum as an attribute of its class.
        if key == GETATTR and [type(item) for item in arguments] != [Word, str]:
            raise Fault(f"applies {word.name} to something else than a word")
        self.push(Applied(word, arguments), 56)

    def newobj(self) -> None:
        self.reduce()

    def build(self) -> None:
        state, target = self.stack.pop(), self.stack[-1]
        if not isinstance(target, Applied) or target.state is not None:
            raise TypeError
        target.state = state

    def memoize(self) -> None:
        self.spent += 9
        self.memo.append(self.stack[-1])

    def binput(self) -> None:
        self.remember(self.byte())

    def long_binput(self) -> None:
        self.remember(self.number(4))

    def binget(self) -> None:
        self.push(self.memo[self.byte()], 0)

    def long_binget(self) -> None:
        self.push(self.memo[self.number(4)], 0)

    def binpersid(self) -> None:
        raise Fault("has a persistent id, which is no part of it and is not read")


AnyMachine = TypeVar("AnyMachine", bound=Machine)
Steps: TypeAlias = list[Callable[[Any], None]]
"""What to do at each of the 256 opcodes."""

OPCODES = (
    "proto frame mark none newtrue newfalse binint binint1 binint2 long1 binfloat short_binunicode binunicode "
    "empty_list append appends empty_tuple tuple tuple1 tuple2 tuple3 empty_dict setitem setitems global_ stack_global "
    "reduce newobj build memoize binput long_binput binget long_binget binpersid"
)
_STOP = ord(".")
_NAMES = {ord(opcode.code): opcode.name for opcode in opcodes}
_CODES = {name.lower(): code for code, name in _NAMES.items()}


def steps_of(machine: type[AnyMachine], names: str) -> Steps:
    """The methods of a machine for the opcodes of these names; any other opcode is a Fault."""
    steps: Steps = [_unread] * 256
    for name in names.split():
        steps[_CODES[name.rstrip("_")]] = getattr(machine, name)
    return steps


def _unread(machine: Machine) -> None:
    position = machine.position - 1
    code = machine.data[position]
    raise Fault(f"has the opcode {_NAMES.get(code, f'{code:#04x}')} at byte {position:,}, which is not read")


STEPS = steps_of(Machine, OPCODES)
"""For the opcodes that are read in any pickle."""
