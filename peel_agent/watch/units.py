"""Which objects of a run's folder make up a checkpoint, and which of them its format needs: told by the formats."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from peel_agent.records import Claim
from peel_agent.registry import claimed, claims
from peel_agent.spi import Format
from peel_agent.watch.objects import ObjectListing
from peel_agent.watch.pins import COMPANIONS, MAX_COMPANION
from peel_agent.watch.scan import is_aside
from peel_agent.watch.store import RemoteObject, name_fault

ROOT = "."
"""The name of the unit that is the watched folder itself."""

MAX_FILES = 20_000
RENAME = "remove or rename the object, or save the checkpoint again"
_MAX_JSON_BYTES = 100_000_000


@dataclass(frozen=True)
class Unit:
    """What is fetched, and dropped, as one: a folder below the root, a single file in it, or the root's own files.

    `signature` is over names, sizes, versions and times of all its objects, `objects` are those that are needed, with
    names below the root. `fault` says why it is refused and `remedy` what to do, `awaits` what is yet to come.
    """

    name: str
    signature: str
    objects: tuple[RemoteObject, ...]
    newest_ns: int
    fault: str | None = None
    remedy: str = ""
    awaits: tuple[str, ...] = ()

    @property
    def content(self) -> str:
        """What tells the needed objects from those of another version."""
        return _signature(self.objects)

    @property
    def number(self) -> int | None:
        """The last number in the name, which is the step of most."""
        match = re.search(r"(\d{1,18})\D*$", self.name)
        return int(match[1]) if match else None

    @property
    def size(self) -> int:
        """Bytes of the objects that are needed."""
        return sum(remote.size for remote in self.objects)

    def versions(self) -> dict[str, str]:
        """What tells each file that is not JSON from another of the same name."""
        return {remote.name: identity(remote) for remote in self.objects if not remote.name.endswith(".json")}


def identity(remote: RemoteObject) -> str:
    """A file name that another object, or another version of the same one, does not have."""
    facts = [remote.name, remote.size, remote.version, remote.modified_ns]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:32]


def companions_of(objects: Iterable[RemoteObject]) -> tuple[RemoteObject, ...]:
    """Those of a folder's objects that the checkpoints in it share."""
    return tuple(remote for remote in objects if remote.name in COMPANIONS and remote.size <= MAX_COMPANION)


def fault_of(objects: Sequence[RemoteObject]) -> str | None:
    """Why these objects are not written to disk; None when they can be."""
    if len(objects) > MAX_FILES:
        return f"it has {len(objects):,} files, more than the {MAX_FILES:,} that are fetched"
    names = {remote.name for remote in objects}
    for name in sorted(names):
        fault = name_fault(name)
        if fault is not None:
            return f"the object's name {ascii(name)[:80]} {fault}"
        above = name.rpartition("/")[0]
        while above:
            if above in names:
                return f"{ascii(above)[:80]} is both an object and the folder of {ascii(name)[:80]}"
            above = above.rpartition("/")[0]
    return None


class Division:
    """Divides a store's objects into units as `scan` would a folder: by the formats' claims on their names.

    What a claim finds wrong with the names alone is refused and not fetched.
    """

    def __init__(self, root_name: str, formats: Sequence[Format]) -> None:
        self._root_name = root_name
        self._formats = formats
        self._known: dict[str, Unit | None] = {}

    def units(self, objects: Sequence[RemoteObject]) -> tuple[Unit, ...]:
        """The units in the order of the numbers in their names, those without one last."""
        root = ObjectListing(self._root_name, objects)
        return tuple(sorted([*self._of_root(root), *self._of_folders(root)], key=_in_order))

    def _of_folders(self, root: ObjectListing) -> Iterator[Unit]:
        before, self._known = self._known, {}
        for name in sorted(filter(root.is_folder_at, root.names())):
            if is_aside(name) and name_fault(name) is None:  # what no folder may be called is refused by name
                continue
            folder, clash = root.folder(name), root.is_file(name)
            key = f"{clash} {_signature(folder.objects())} {name}"
            self._known[key] = known = before[key] if key in before else self._judged(folder, clash=clash)
            if known is not None:
                yield known

    def _judged(self, folder: ObjectListing, *, clash: bool) -> Unit | None:
        """The unit that a folder is, or None for no checkpoint."""
        answer = claims(folder, self._formats)
        if answer.winner is not None:
            claim = answer.winner[1]
        elif answer.failure is not None:
            claim = Claim("declined", fault=answer.failure.what, remedy=answer.failure.remedy)
        else:
            return None
        fault = f"{ascii(folder.name)[:80]} is both an object and a folder" if clash else fault_of(folder.objects())
        return _unit(folder.name, folder.objects(), claim, fault, inside=f"{folder.name}/")

    def _of_root(self, root: ObjectListing) -> Iterator[Unit]:
        files = [remote for remote in root.objects() if "/" not in remote.name and not root.is_folder_at(remote.name)]
        winner = claimed(root, self._formats)
        if winner is not None:
            unit = _unit(ROOT, files, winner[1], None)  # what is below is a unit of its own
            if unit.fault is not None or any(remote.name in winner[1].needs for remote in files):
                fault = fault_of(unit.objects)
                yield unit if fault is None else dataclasses.replace(unit, fault=fault, remedy=RENAME)
            return
        for remote in files:
            winner = claimed(root.folder(remote.name), self._formats)
            if winner is not None and name_fault(remote.name) is None:
                yield dataclasses.replace(_unit(remote.name, [remote], winner[1], None), objects=(remote,))


def _unit(name: str, objects: Sequence[RemoteObject], claim: Claim, fault: str | None, *, inside: str = "") -> Unit:
    """The unit of these objects, of which those are needed that the claim names in the folder `inside`."""
    wanted = {inside + below for below in (*claim.needs, *COMPANIONS)} if claim.needs else set()
    needed = tuple(remote for remote in objects if remote.name in wanted and _is_fit(remote))
    newest = max((remote.modified_ns for remote in objects), default=0)
    remedy = RENAME if fault else claim.remedy
    return Unit(name, _signature(objects), needed, newest, fault or claim.fault or None, remedy, claim.awaits)


def _is_fit(remote: RemoteObject) -> bool:
    return not remote.name.endswith(".json") or remote.size <= _MAX_JSON_BYTES


def _signature(objects: Iterable[RemoteObject]) -> str:
    facts = sorted((remote.name, remote.size, remote.version, remote.modified_ns) for remote in objects)
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:32]


def _in_order(unit: Unit) -> tuple[bool, int, int, str]:
    # As the watch sorts what it found: a run's checkpoints by step, then an export made at its end.
    return (unit.number is None, unit.number or 0, unit.newest_ns, unit.name)
