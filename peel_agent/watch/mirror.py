"""A private local copy of the checkpoints in an object store that are at rest and still wanted, for `scan` to look at.

Below the mirror's folder: `root/<name>/` is what `scan` is given; `objects/` holds every object fetched, under a
name of its version, and the root has hard links to them, so that no version is fetched twice; `mirror.json` is what is
remembered.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
from collections.abc import Callable, Iterable, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peel_agent.errors import CheckpointError, NoRoom, TornCheckpoint
from peel_agent.spi import Format
from peel_agent.watch.fetch import check_space, check_unchanged, download
from peel_agent.watch.objects import ObjectListing
from peel_agent.watch.pins import COMPANIONS
from peel_agent.watch.reserve import USUAL, Reserve
from peel_agent.watch.settle import GIVE_UP_SECONDS, Unread, waits_for
from peel_agent.watch.store import RemoteObject, Store, torn
from peel_agent.watch.units import ROOT, Division, Unit, companions_of, identity

PARTLY_SECONDS = 3600.0
"""So long an overwritten checkpoint with tensors of the old version beside new ones is held to be in the making."""

REMEDY_FOR_AWAITED = "let whoever writes the checkpoint upload that too, or save the checkpoint again"
REMEMBERED = 10_000


@dataclass(frozen=True)
class Synced:
    """What one `sync` found: the local root for `scan`, and by their URLs what waits and what is refused.

    `more` says that a further checkpoint is at rest and wanted: the next `sync` fetches it.
    """

    root: Path
    waiting: tuple[Unread, ...]
    refused: tuple[Unread, ...]
    more: bool


@dataclass(frozen=True)
class _Done:
    """A unit whose copy is held or was dropped, as it was then: `signature` is its `content`."""

    signature: str
    versions: dict[str, str]


class Mirror:
    """Copies of one store's checkpoints in `folder`, which has one owner and is used by one thread at a time.

    A checkpoint is copied when its listing (names, sizes, versions, times) has not changed for the time to settle, and
    is dropped when the caller is done with it. What was dropped is not fetched again before it is overwritten, and
    whole objects survive an outage and a restart. One in a folder that lacks an object of `markers` is not copied; it
    is refused when it has not changed for `marker_seconds`.
    """

    def __init__(
        self,
        store: Store,
        folder: Path,
        formats: Sequence[Format],
        markers: Sequence[str] = (),
        marker_seconds: float = math.inf,
        *,
        reserve: Reserve = USUAL,
    ) -> None:
        self._store = store
        self._reserve = reserve
        self._markers = tuple(markers)
        self._marker_seconds = marker_seconds
        folder = folder.resolve()
        self._folder = folder
        self._objects = folder / "objects"
        self.root = folder / "root" / store.name
        self._memory = folder / "mirror.json"
        self._held: dict[str, _Done] = {}
        self._done: dict[str, _Done] = {}
        self._rests: dict[str, tuple[str, float]] = {}
        self._written = ""
        self._listed: Sequence[RemoteObject] = ()
        self._recall()
        for path in (self._objects, self.root.parent):
            path.mkdir(parents=True, exist_ok=True)
        self._division = Division(store.name, formats)

    def sync(
        self,
        now: float,
        settle_seconds: float,
        *,
        newest_only: bool = False,
        stopping: Callable[[], bool] = lambda: False,
    ) -> Synced:
        """Brings the copy up to date at `now`, in Unix seconds; fetches one checkpoint at most, the oldest first.

        With `newest_only` what has been overtaken is never fetched. One seen for the first time counts as unchanged
        since its newest object. `stopping` is asked between windows of 32 MiB. A copy whose checkpoint is not in the
        store any more is removed; files that somebody holds open, or has links to, stay. Raises StoreUnavailable, after
        which everything is as it was, and ConfigurationError.
        """
        listing = self._listed = self._store.list()
        units = self._division.units(listing)
        companions = companions_of(listing)
        self._forget(units, companions)
        self._accompany(companions, stopping)
        waiting, refused, due = self._sort(units, now, settle_seconds, {remote.name for remote in listing})
        due = self._newest(units, due) if newest_only else due
        while due:
            unit = due.pop(0)
            try:
                if self._fetch(unit, companions, stopping):
                    break
            except TornCheckpoint as error:
                self._rests[unit.name] = ("", now)  # settles anew, as it is at the next look
                waiting.append(self._unread(unit, error.what, error.remedy))
            except NoRoom as error:  # there may be when what is held is done with
                (waiting if self._held else refused).append(self._unread(unit, error.what, error.remedy))
            except CheckpointError as error:
                if error.retryable:
                    raise
                refused.append(self._unread(unit, error.what, error.remedy))
            if stopping():
                break
        return Synced(self.root, tuple(waiting), tuple(refused), bool(due))

    def drop(self, path: Path) -> None:
        """Removes the copy of a checkpoint, a path at or below `root`; the same version is not fetched again."""
        name = path.relative_to(self.root).as_posix()
        held = self._held.pop(name, None)
        if held is None:
            return
        self._done.pop(name, None)
        self._done[name] = held
        self._remember()
        self._remove(name)

    def listing(self) -> ObjectListing:
        """What was in the store when it was last listed."""
        return ObjectListing(self._store.name, self._listed)

    def url(self, name: str) -> str:
        """Where in the store the unit of this name is."""
        return self._store.url if name == ROOT else f"{self._store.url}/{name}"

    # ------------------------------------------------------------ what is due

    def _newest(self, units: Sequence[Unit], due: Sequence[Unit]) -> list[Unit]:
        """The last of those due behind what is or was copied; an export without a number only when no other is."""
        reached = max((index for index, unit in enumerate(units) if self._has(unit)), default=-1)
        later = [unit for unit in units[reached + 1 :] if unit in due]
        return ([unit for unit in later if unit.number is not None] or later)[-1:]

    def _sort(
        self, units: Sequence[Unit], now: float, settle_seconds: float, names: AbstractSet[str]
    ) -> tuple[list[Unread], list[Unread], list[Unit]]:
        waiting: list[Unread] = []
        refused: list[Unread] = []
        due: list[Unit] = []
        before, self._rests = self._rests, {}
        for unit in units:
            signature, since = before.get(unit.name, (unit.signature, min(now, unit.newest_ns / 1e9)))
            since = min(since, now) if signature == unit.signature else now
            self._rests[unit.name] = (unit.signature, since)
            if self._has(unit) or not (unit.objects or unit.fault):
                continue
            if unit.fault is not None:
                refused.append(self._unread(unit, unit.fault, unit.remedy))
            elif lacking := self._lacking(unit, names):
                is_over = now - since >= self._marker_seconds
                (refused if is_over else waiting).append(self._unread(unit, waits_for(lacking)))
            elif unit.awaits:
                is_over = now - since >= GIVE_UP_SECONDS
                words = waits_for(unit.awaits)
                (refused if is_over else waiting).append(self._unread(unit, words, REMEDY_FOR_AWAITED))
            elif now - since < settle_seconds:
                waiting.append(self._unread(unit, f"it changed less than {settle_seconds:g} s ago"))
            elif now - since < PARTLY_SECONDS and (old := self._left_over(unit)):
                waiting.append(self._unread(unit, f"it is overwritten in part: {old} is of the version before"))
            else:
                due.append(unit)
        return waiting, refused, due

    def _unread(self, unit: Unit, reason: str, remedy: str = "") -> Unread:
        return Unread(self.url(unit.name), reason, remedy)

    def _lacking(self, unit: Unit, names: AbstractSet[str]) -> tuple[str, ...]:
        """The markers that are not in the unit's folder; a single object needs none."""
        inside = "" if unit.name == ROOT else f"{unit.name}/"
        return () if unit.name in names else tuple(name for name in self._markers if inside + name not in names)

    def _has(self, unit: Unit) -> bool:
        return _same(self._held.get(unit.name), unit) or _same(self._done.get(unit.name), unit)

    def _left_over(self, unit: Unit) -> str | None:
        """A file of tensors that is as it was when others, of the same names as before, are not.

        Objects come one by one, minutes apart when they are large: at rest between two of them, the folder would look
        like a whole checkpoint.
        """
        known = self._held.get(unit.name) or self._done.get(unit.name)
        before, now = known.versions if known is not None else {}, unit.versions()
        both = before.keys() & now.keys()
        same = sorted(name for name in both if before[name] == now[name])
        return same[0] if same and len(same) < len(both) else None

    # ------------------------------------------------------------ fetching

    def _fetch(self, unit: Unit, companions: Sequence[RemoteObject], stopping: Callable[[], bool]) -> bool:
        """Whether the copy is there now; raises TornCheckpoint when the store changed meanwhile."""
        objects = tuple({remote.name: remote for remote in (*unit.objects, *companions)}.values())
        missing = [remote for remote in objects if not self._is_fetched(remote)]
        check_space(self._reserve, self._folder, sum(remote.size for remote in missing), self.url(unit.name))
        for remote in missing:
            if not download(self._store, remote, self._objects / identity(remote), stopping):
                return False
        now = self._store.list()
        check_unchanged(objects, now, self.url(unit.name))
        if unit.signature not in {again.signature for again in self._division.units(now) if again.name == unit.name}:
            raise torn(f"{self.url(unit.name)} changed while it was fetched")
        if self._held.pop(unit.name, None) is not None:
            self._remember()  # so that a copy half replaced is not taken for one after a crash
        self._link(unit, companions)
        self._held[unit.name] = _Done(unit.content, unit.versions())
        self._done.pop(unit.name, None)
        self._remember()
        return True

    def _accompany(self, companions: Iterable[RemoteObject], stopping: Callable[[], bool]) -> None:
        """Brings what copies share up to date: a config.json may come after the checkpoints that need it."""
        if not self._held or ROOT in self._held:  # the root's own files are replaced together
            return
        for remote in companions:
            place, fetched = self.root / remote.name, self._objects / identity(remote)
            if not (self._is_fetched(remote) or self._get(remote, stopping)):
                continue
            if place.exists() and place.samefile(fetched):
                continue
            _clear(place)
            os.link(fetched, place)

    def _get(self, remote: RemoteObject, stopping: Callable[[], bool]) -> bool:
        try:
            return download(self._store, remote, self._objects / identity(remote), stopping)
        except CheckpointError as error:
            if isinstance(error, TornCheckpoint) or not error.retryable:
                return False  # the next look finds what became of it
            raise

    def _is_fetched(self, remote: RemoteObject) -> bool:
        return (self._objects / identity(remote)).exists()  # it has this name when it is whole

    def _link(self, unit: Unit, companions: Iterable[RemoteObject]) -> None:
        """Puts the objects in their place under their names; a folder below the root appears whole."""
        part = self._folder / "part"
        shutil.rmtree(part, ignore_errors=True)
        for remote in (*companions, *unit.objects):
            target = part / remote.name
            target.parent.mkdir(parents=True, exist_ok=True)
            if not target.exists():
                os.link(self._objects / identity(remote), target)
        if unit.name == ROOT:
            self._remove(ROOT)
        self.root.mkdir(exist_ok=True)
        for child in sorted(part.iterdir(), key=lambda child: child.name not in COMPANIONS):
            _clear(self.root / child.name)
            child.replace(self.root / child.name)
        shutil.rmtree(part)

    # ------------------------------------------------------------ letting go

    def _forget(self, units: Sequence[Unit], companions: Iterable[RemoteObject]) -> None:
        """Removes copies of what is not in the store any more, and objects that no unit needs."""
        names = {unit.name for unit in units}
        for name in sorted(set(self._held) - names):
            del self._held[name]
            self._remove(name)
        for name in set(self._done) - names:
            self._done[name] = _Done(self._done[name].signature, {})
        left = [unit for unit in units if not _same(self._done.get(unit.name), unit)]
        kept = {identity(remote) for unit in left for remote in (*unit.objects, *companions)}
        for entry in self._objects.iterdir():
            if entry.name not in kept:
                entry.unlink()
        self._remember()

    def _remove(self, name: str) -> None:
        if name != ROOT:
            _clear(self.root / name)
        kept = {*self._held, *(COMPANIONS if self._held else ())}
        if name == ROOT or not self._held:
            for path in self.root.iterdir() if self.root.is_dir() else ():
                if path.name not in kept and not path.is_dir():
                    path.unlink()
        if not self._held:
            with contextlib.suppress(OSError):  # a folder that somebody else put there stays
                self.root.rmdir()

    def _recall(self) -> None:
        try:
            state = json.loads(self._memory.read_text())
            if state["store"] != self._store.url:
                raise ValueError(state["store"])
            self._held = _parsed(state["held"])
            self._done = _parsed(state["done"])
        except (
            OSError,
            ValueError,
            KeyError,
            TypeError,
            AttributeError,
        ):  # none yet, another store's, or damaged: begun anew
            self._held, self._done = {}, {}
            for folder in (self._objects, self.root.parent):
                shutil.rmtree(folder, ignore_errors=True)
        self._held = {name: held for name, held in self._held.items() if (self.root / name).exists()}
        for path in self.root.iterdir() if self.root.is_dir() else ():
            if path.name not in self._held and not (path.is_file() and (ROOT in self._held or path.name in COMPANIONS)):
                _clear(path)

    def _remember(self) -> None:
        while len(self._done) > REMEMBERED:
            del self._done[next(iter(self._done))]
        state = {
            "store": self._store.url,
            "held": {name: [held.signature, held.versions] for name, held in self._held.items()},
            "done": {name: [done.signature, done.versions] for name, done in self._done.items()},
        }
        text = json.dumps(state)
        if text == self._written:
            return
        part = self._memory.with_suffix(".tmp")
        with part.open("w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        part.replace(self._memory)
        self._written = text


def _parsed(units: dict[str, Any]) -> dict[str, _Done]:
    return {
        str(name): _Done(str(signature), {str(file): str(version) for file, version in versions.items()})
        for name, (signature, versions) in units.items()
    }


def _same(known: _Done | None, unit: Unit) -> bool:
    return known is not None and known.signature == unit.content


def _clear(place: Path) -> None:
    if place.is_dir():
        shutil.rmtree(place)
    else:
        place.unlink(missing_ok=True)
