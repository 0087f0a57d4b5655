"""What a look finds is held at once, so that nothing that waits is lost; what was lost before is counted and told."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from peel_agent.errors import NoRoom, TornCheckpoint, printable
from peel_agent.journal import Journal
from peel_agent.ledger import RunLedger
from peel_agent.records import CheckpointRef, EventKind, FileStamp, Level
from peel_agent.watch import ROOM, Earlier, Folder, Observed, Pins, Queue, Source, Unread
from peel_agent.work import lost_of, name_of

COMPARED_BY_SKETCHES = (
    "the last checkpoint is not kept for comparison; how far weights changed is estimated from sketches"
)


class Tell(Protocol):
    def __call__(
        self, kind: EventKind, words: str, ref: CheckpointRef | None = None, *, level: Level = "info"
    ) -> None: ...


@dataclass
class Intake:
    """Fills a run's queue from its source.

    `is_due` says whether a checkpoint is still to be peeled, `is_ending` whether the agent ends. With `once` a file is
    copied only after it was seen rewritten: most that is there then is never written again. `left` are those that an
    earlier agent found and could not hold, and that were not seen again yet, by fingerprint.
    """

    source: Source
    name: str
    ledger: RunLedger
    pins: Pins
    queue: Queue
    earlier: Earlier
    journal: Journal
    tell: Tell
    is_due: Callable[[CheckpointRef], bool]
    is_ending: Callable[[], bool]
    once: bool
    left: dict[str, CheckpointRef] = field(default_factory=dict)
    rewritten: set[Path] = field(default_factory=set)
    _stamps: dict[Path, tuple[FileStamp, ...]] = field(default_factory=dict)
    """The files of the checkpoint that was seen last at each path."""
    _gone: list[CheckpointRef] = field(default_factory=list)
    """Whole once, gone now, and not counted yet."""
    _unreadable: set[Unread] = field(default_factory=set)
    _restless: set[str] = field(default_factory=set)
    _said: set[str] = field(default_factory=set)

    def take(self, observed: Observed) -> None:
        """What one look found."""
        for ref in observed.ready:
            self._find(ref)
        if not self.is_away():
            self._gone += (*observed.vanished, *self.queue.lost(), *lost_of(self.left, observed))
            self._forget_paths(observed)
        while self._gone:
            is_missed = self.is_due(self._gone[0]) and self._gone[0] not in self.queue
            if is_missed:
                self.ledger.miss(self._gone[0])
            gone = self._gone.pop(0)
            if is_missed:
                self.tell_missed(gone)
        for unread in observed.unreadable:
            if unread not in self._unreadable:
                self._unreadable.add(unread)
                self.tell("unreadable", f"cannot read {printable(unread.place)}: {unread.words}", level="warning")
        self._tell_restless(observed.restless)

    def is_away(self) -> bool:
        """A file system that is not mounted says nothing of what is on it."""
        return not self.source.root.exists()

    def tell_missed(self, ref: CheckpointRef) -> None:
        became = "written over" if ref.path.exists() else "removed"
        self.tell("missed", f"{name_of(ref)} was {became} before it could be peeled", ref, level="warning")

    def end_passed(self, ref: CheckpointRef) -> None:
        """One that the ledger counts as passed over is let go of, and that is told."""
        self.pins.release(ref)
        self.source.done(ref)
        words = f'passed over {name_of(ref)}: a newer one waits; [watch] backlog = "all" peels every one'
        self.tell("passed over", words, ref)

    # ---------------------------------------------------------------- one that was found

    def _find(self, ref: CheckpointRef) -> None:
        before, self._stamps[ref.path] = self._stamps.get(ref.path, ()), ref.own_files
        if are_rewritten(before, ref.own_files):
            self.rewritten.add(ref.path)
        if not self.is_due(ref) or ref in self.queue:
            return
        self.ledger.await_turn(ref)
        self.left.pop(ref.fingerprint, None)
        try:
            held = self._held(ref)
        except TornCheckpoint:
            self._lose_hold(ref)
            return
        self.queue.add(held)
        if held.held is not None:
            self._overtake(held)

    def _lose_hold(self, ref: CheckpointRef) -> None:
        if ref.path.exists():
            self.ledger.forget(ref, why="torn")
            words = f"{name_of(ref)} changed before it could be held; it is taken when it is at rest again"
            self.tell("torn", words, ref)
        else:
            self._gone.append(ref)

    def _held(self, ref: CheckpointRef) -> CheckpointRef:
        copy = self._is_to_be_copied(ref)
        while True:
            try:
                held = self.pins.pin(ref, copy=copy, stopping=self.is_ending)
            except NoRoom:
                if self._overtake(ref) or self._let_go_of_earlier():
                    continue
                self._say_once(
                    f"there is no room in {self.pins.folder} to copy {printable(ref.label)}, which may be rewritten in "
                    f"place: it is read where it is, and a save during a peel ends that peel; {ROOM}"
                )
                return ref.released()
            break
        if held.held is None and not self.is_ending():
            self._say_once(
                f"files cannot be held in {self.pins.folder}: {self.pins.why_not}; checkpoints are read where they "
                "are, and one that is removed before its turn is lost; if that happens, have the training keep more"
            )
        return held

    def _is_to_be_copied(self, ref: CheckpointRef) -> bool:
        """A link to a file that is rewritten in place shows the next save."""
        if not isinstance(self.source, Folder):  # a mirror replaces files
            return False
        if ref.path in self.rewritten:
            return True
        return not self.once and not names_step(ref, self.source.root)

    def _overtake(self, newer: CheckpointRef) -> bool:
        """Whether there were earlier saves of the same file that are passed over now: copies need room."""
        overtaken = self.queue.overtaken(newer)
        for ref in overtaken:
            self.ledger.pass_over(ref, f"backlog = {self.queue.policy}")
            self.queue.take_out(ref)
            self.end_passed(ref)
        return bool(overtaken)

    def _let_go_of_earlier(self) -> bool:
        """Whether the checkpoint before was held: peeling the next one is worth more than comparing with files."""
        if not self.earlier.let_go():
            return False
        full = f"the file system of {self.pins.folder} has no room for two copies"
        self._say_once(f"{full}: {COMPARED_BY_SKETCHES}; {ROOM}")
        return True

    def mind_space(self) -> None:
        """The training needs what is left of a file system that has too little free."""
        full = f"the file system of {self.pins.folder} has less free than is kept for the training"
        if self.earlier.make_room():
            self.tell("space", f"{full}: {COMPARED_BY_SKETCHES}; {ROOM}", level="warning")
        if self.queue.make_room():
            words = f"{full}: waiting checkpoints are not kept from rotation now; {ROOM}"
            self.tell("space", words, level="warning")

    def _say_once(self, words: str) -> None:
        if words not in self._said:
            self._said.add(words)
            self.tell("space", words, level="warning")

    # ---------------------------------------------------------------- paths

    def _forget_paths(self, observed: Observed) -> None:
        there = {str(ref.path) for ref in observed.ready}
        there |= {unread.place for unread in (*observed.waiting, *observed.unreadable)}
        self._stamps = {path: files for path, files in self._stamps.items() if str(path) in there}

    def _tell_restless(self, restless: Sequence[Unread]) -> None:
        """Once when it begins that saves come too fast to be read, and once when it ends."""
        for unread in restless:
            words = f"{printable(unread.place)}: {unread.words}"
            self.journal.begin(f"run/{self.ledger.run}/restless/{unread.place}", words, run=self.name)
        now = {unread.place for unread in restless}
        for path in self._restless - now:
            words = f"{printable(path)} is at rest between two saves again"
            self.journal.end(f"run/{self.ledger.run}/restless/{path}", words, run=self.name)
        self._restless = now


def names_step(ref: CheckpointRef, root: Path) -> bool:
    """Whether a checkpoint's name has its step, so that the next one gets another name.

    Any number will do, `epoch_3.pt`; in the name of the watched place itself only the step.
    """
    name = ref.path.stem if ref.path.is_file() else ref.path.name
    numbers = {int(number) for number in re.findall(r"\d{1,18}", name)}
    return ref.step in numbers if ref.path == root.resolve() else bool(numbers)


def are_rewritten(before: Sequence[FileStamp], after: Sequence[FileStamp]) -> bool:
    """Whether one of the files holds something else now, and still is the same file."""
    contents = {(stamp.name, stamp.inode): (stamp.size, stamp.mtime_ns) for stamp in before}
    return any(
        contents.get((stamp.name, stamp.inode), (stamp.size, stamp.mtime_ns)) != (stamp.size, stamp.mtime_ns)
        for stamp in after
    )
