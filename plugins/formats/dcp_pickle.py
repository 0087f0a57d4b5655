"""A pickle read as data: words, and what they are applied to. Nothing in it is imported, looked up or called.

Python's own Unpickler is not used even with a closed `find_class`: it reserves memory for whatever memo index a file
names, and lets a file change the classes that it was allowed. The opcodes here are those that Python writes for the
plain objects of a checkpoint, in protocols 2 to 5; any other is refused.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Container
from dataclasses import dataclass
from pickletools import opcodes

from peel_agent.errors import CheckpointError, IncompleteCheckpoint

from .checkpoint_folder import WAIT

MAX_MEMORY = 3 * 2**30
"""Bytes that the objects of one pickle may take, by an estimate from above; 10^6 chunks take most of it."""

REFUSED = "do not open this checkpoint with torch either, unless you know who wrote it; then save it again"
ORDERED_DICT = ("collections", "OrderedDict")
GETATTR = ("builtins", "getattr")


@dataclass(frozen=True, slots=True)
class Word:
    """The name of a class or function."""

    module: str
    name: str


@dataclass(eq=False, slots=True)
class Applied:
    """A word with arguments: what the writer wanted to be called, and the state it was to be given then."""

    word: Word
    arguments: tuple[object, ...]
    state: object = None


@dataclass(eq=False, slots=True)
class Reference:
    """A persistent id: something that the writer stored outside the pickle."""

    what: object


def read_pickle(
    data: bytes | bytearray,
    what: str,
    words: Container[tuple[str, str]],
    *,
    memory: int = MAX_MEMORY,
    references: bool = False,
) -> object:
    """The one object of a pickle, as Words, Applied, References and plain values; `what` names it in errors.

    An empty OrderedDict is read as a dict. Raises IncompleteCheckpoint when the pickle ends too early, CheckpointError
    for a word that is not in `words` as (module, name), for an opcode that is not read, and for a pickle that takes
    more than `memory` bytes; persistent ids need `references`.
    """
    machine = _Machine(data, what, words, references)
    handlers = _HANDLERS
    size = len(data)
    try:
        while True:
            position = machine.position
            if position >= size:
                raise machine.ended()
            code = data[position]
            machine.position = position + 1
            if code == _STOP:
                break
            handlers[code](machine)
            if machine.spent > memory:
                raise machine.refused(f"takes more than the {memory:,} bytes of memory that it may")
        (result,) = machine.stack
    except KeyError as error:
        opcode = _NAMES.get(code, f"{code:#04x}")
        raise machine.refused(f"has the opcode {opcode} at byte {position:,}, which is not read") from error
    except (IndexError, ValueError, TypeError) as error:
        if machine.position >= size and code != _STOP:
            raise machine.ended() from error
        raise machine.refused(f"is no pickle that Python writes: byte {position:,} does not fit") from error
    if machine.position != size:
        raise machine.refused(f"has {size - machine.position:,} bytes after its end")
    return result


class _Machine:
    """The pickle machine's stack, marks and memo. `spent` is an upper estimate of the memory that all objects take."""

    def __init__(self, data: bytes | bytearray, what: str, words: Container[tuple[str, str]], references: bool) -> None:
        self.data = data
        self.what = what
        self.words = words
        self.references = references
        self.position = 0
        self.spent = 0
        self.stack: list[object] = []
        self.marks: list[int] = []
        self.memo: list[object] = []
        self.known: dict[tuple[str, str], Word] = {}

    def refused(self, fault: str) -> CheckpointError:
        return CheckpointError(f"{self.what} {fault}", remedy=REFUSED)

    def ended(self) -> IncompleteCheckpoint:
        return IncompleteCheckpoint(f"{self.what} ends after {len(self.data):,} bytes, before its end", remedy=WAIT)

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

    def since_mark(self) -> list[object]:
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

    # One method an opcode, under the opcode's name.

    def proto(self) -> None:
        if self.byte() > 5:
            raise self.refused("is of a pickle protocol above 5")

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
        self._extend([self.stack.pop()])

    def appends(self) -> None:
        self._extend(self.since_mark())

    def _extend(self, items: list[object]) -> None:
        target = self.stack[-1]
        if not isinstance(target, list):
            raise TypeError
        self.spent += 9 * len(items)
        target.extend(items)

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
        self._update([key, value])

    def setitems(self) -> None:
        self._update(self.since_mark())

    def _update(self, items: list[object]) -> None:
        target = self.stack[-1]
        if not isinstance(target, dict) or len(items) % 2:
            raise TypeError
        for key in items[::2]:
            # Nothing whose hash or comparison could be made to take for ever, as a tuple of tuples of tuples does.
            if type(key) is not str and type(key) is not Applied:
                raise self.refused(f"has a dict with a {type(key).__name__} as a key, which is not read")
        self.spent += 50 * len(items)
        target.update(zip(items[::2], items[1::2], strict=True))

    def global_(self) -> None:
        module, name = (self._line() for _ in range(2))
        self.push(self._word(module, name), 0)

    def stack_global(self) -> None:
        name, module = self.stack.pop(), self.stack.pop()
        self.push(self._word(module, name), 0)

    def _line(self) -> str:
        end = self.data.find(b"\n", self.position)
        if end < 0:
            raise self.ended()
        line = self.take(end - self.position).decode()
        self.position += 1
        return line

    def _word(self, module: object, name: object) -> Word:
        if not isinstance(module, str) or not isinstance(name, str):
            raise TypeError
        key = (module, name)
        if key not in self.words:
            raise self.refused(f"names {_shown(module, name)}, which is no part of it and is not read")
        return self.known.setdefault(key, Word(module, name))

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
            raise self.refused(f"applies {word.name} to something else than a word")
        self.push(Applied(word, arguments), 56)

    def build(self) -> None:
        state, target = self.stack.pop(), self.stack[-1]
        if not isinstance(target, Applied) or target.state is not None:
            raise TypeError
        target.state = state

    def memoize(self) -> None:
        self.spent += 9
        self.memo.append(self.stack[-1])

    def binput(self) -> None:
        self._put(self.byte())

    def long_binput(self) -> None:
        self._put(self.number(4))

    def _put(self, index: int) -> None:
        if index != len(self.memo):  # as Python numbers them; any other could ask for a memo of any size
            raise IndexError
        self.memoize()

    def binget(self) -> None:
        self.push(self.memo[self.byte()], 0)

    def long_binget(self) -> None:
        self.push(self.memo[self.number(4)], 0)

    def binpersid(self) -> None:
        if not self.references:
            raise self.refused("has a persistent id, which is no part of it and is not read")
        self.push(Reference(self.stack.pop()), 40)


def _shown(module: str, name: str) -> str:
    return ascii(f"{module}.{name}"[:120])[1:-1]


_STOP = ord(".")
_OPCODES = (
    "proto frame mark none newtrue newfalse binint binint1 binint2 long1 binfloat short_binunicode binunicode "
    "empty_list append appends empty_tuple tuple tuple1 tuple2 tuple3 empty_dict setitem setitems global_ stack_global "
    "reduce build memoize binput long_binput binget long_binget binpersid"
)
_NAMES = {ord(opcode.code): opcode.name for opcode in opcodes}
_CODES = {name.lower(): code for code, name in _NAMES.items()}
_HANDLERS: dict[int, Callable[[_Machine], None]] = {
    _CODES[name.rstrip("_")]: getattr(_Machine, name) for name in _OPCODES.split()
} | {_CODES["newobj"]: _Machine.reduce}
