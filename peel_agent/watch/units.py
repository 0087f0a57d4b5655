"""Which objects of a run's folder make up a checkpoint, and which of them a model needs: told by names and sizes."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import re
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from peel_agent.spi import Format
from peel_agent.watch.store import RemoteObject, name_fault

ROOT = "."
"""The name of the unit that is the watched folder itself."""

MAX_FILES = 20_000
_TOP_BYTES = 100_000_000  # the longest JSON that the formats read
_BELOW_BYTES = 1 << 20

_TENSORS = re.compile(r"\.metadata|.+\.(?:safetensors|bin|pt|pth|ckpt|distcp)")
_SAFETENSORS = re.compile(r"model\.safetensors|.*-\d+-of-\d+\.safetensors")
_PICKLES = re.compile(r"pytorch_model\.bin|pytorch_model.*-\d+-of-\d+\.bin")
_DISTRIBUTED = re.compile(r"\.metadata|.+\.distcp")
_STATE = re.compile(  # not `*_optim_states`: DeepSpeed keeps the weights of a partitioned model in them
    r"(?:optim(?:izer)?|(?:lr[-_])?scheduler|scaler|sampler|dataloader|rng[-_]state|random[-_]states?|training[-_]args"
    r"|distrib[-_]optim)(?:[-_.].*)?",
    re.IGNORECASE,
)
_DATA = re.compile(r"(?:train|val(?:id)?|test|heldout)\d*", re.IGNORECASE)


@dataclass(frozen=True)
class Unit:
    """What is fetched, and dropped, as one: a folder below the root, a single file in it, or the root's own files.

    `signature` is over names, sizes, versions and times of all its objects, `objects` are those that are needed, with
    names below the root. `fault` says why it is refused.
    """

    name: str
    signature: str
    objects: tuple[RemoteObject, ...]
    newest_ns: int
    fault: str | None = None

    @property
    def number(self) -> int | None:
        """The last number in the name, which is the step of most."""
        found = re.search(r"(\d{1,18})\D*$", self.name)
        return int(found[1]) if found else None

    @property
    def size(self) -> int:
        """Bytes of the objects that are needed."""
        return sum(remote.size for remote in self.objects)

    def versions(self) -> dict[str, str]:
        """What tells each file of tensors from another of the same name."""
        tensors = (remote for remote in self.objects if is_tensors(remote.name))
        return {remote.name: identity(remote) for remote in tensors}


def identity(remote: RemoteObject) -> str:
    """A file name that another object, or another version of the same one, does not have."""
    facts = [remote.name, remote.size, remote.version, remote.modified_ns]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:32]


def is_tensors(name: str) -> bool:
    """Whether an object holds tensors, or says where they are, by its name."""
    return _TENSORS.fullmatch(name.rpartition("/")[2]) is not None


def needed(objects: Iterable[RemoteObject], inside: str = "") -> tuple[RemoteObject, ...]:
    """Those objects of one checkpoint's folder, whose names begin with `inside`, that a format may read.

    Files of tensors by their suffix, whatever their size, since a `.distcp` or DeepSpeed's `*_optim_states.pt` holds
    weights too; other files up to 100 MB, in sub-folders up to 1 MiB. Never what only a restart of the training needs
    (optimizer, scheduler, rng_state, ...). Beside transformers' own safetensors, or its pickles, no other weights.
    """
    kept = {}
    for remote in objects:
        name = remote.name.removeprefix(inside)
        limit = _BELOW_BYTES if "/" in name else _TOP_BYTES
        if not _is_aside(name) and (is_tensors(name) or remote.size <= limit):
            kept[name] = remote
    top = [name for name in kept if "/" not in name]
    for own in (_SAFETENSORS, _PICKLES):
        if any(map(own.fullmatch, top)) and not any(map(_DISTRIBUTED.fullmatch, top)):
            # transformers and the formats prefer them in this order; what is below is a training's state.
            return tuple(kept[name] for name in top if own.fullmatch(name) or not is_tensors(name))
    return tuple(kept.values())


def _is_aside(name: str) -> bool:
    *folders, file = name.split("/")
    stem = file.rpartition(".")[0] or file
    return any(map(_STATE.fullmatch, [*folders, stem])) or _DATA.fullmatch(stem) is not None


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
    """Divides a listing into units as `scan` would: by what the formats recognise in folders of the same names.

    Empty files stand in for the objects, in a temporary folder of `folder`. Formats recognise by names; and what one of
    them calls damaged there will not be whole whatever the files hold, so it is refused and not fetched.
    """

    def __init__(self, root_name: str, folder: Path, formats: Sequence[Format]) -> None:
        self._root_name = root_name
        self._folder = folder
        self._formats = formats
        self._known: dict[str, Unit | None] = {}
        self._root: tuple[object, tuple[Unit, ...]] = (None, ())

    def units(self, listing: Sequence[RemoteObject]) -> tuple[Unit, ...]:
        """The units in the order of the numbers in their names, those without one last."""
        top = [remote for remote in listing if "/" not in remote.name]
        children: dict[str, list[RemoteObject]] = defaultdict(list)
        for remote in listing:
            if "/" in remote.name:
                children[remote.name.partition("/")[0]].append(remote)
        both = {remote.name for remote in top} & set(children)
        files = [remote for remote in top if remote.name not in both]
        folders = frozenset(children) - both
        if self._root[0] != (files, folders):
            self._root = ((files, folders), tuple(self._of_root(files, folders)))
        units = [*self._root[1], *self._of_children(children, both)]
        return tuple(sorted(units, key=_in_order))

    def _of_children(self, children: Mapping[str, Sequence[RemoteObject]], both: set[str]) -> Iterator[Unit]:
        before, self._known = self._known, {}
        for name, objects in children.items():
            if _STATE.fullmatch(name) or (name.startswith(".") and name != ".."):
                continue  # `scan` passes over what is hidden too
            unit = _unit(name, objects, needed(objects, f"{name}/"))
            key = f"{name in both} {unit.signature}"
            if key not in before:
                before[key] = self._judged(unit, objects, clash=name in both)
            self._known[key] = known = before[key]
            if known is not None:
                yield known

    def _judged(self, unit: Unit, objects: Sequence[RemoteObject], *, clash: bool) -> Unit | None:
        """The unit with what is to be said against it, or None for no checkpoint."""
        if name_fault(unit.name) is not None:
            return unit if any(is_tensors(remote.name) for remote in unit.objects) else None
        with tempfile.TemporaryDirectory(dir=self._folder) as skeleton:
            form, fault = self._recognised(_stand_ins(Path(skeleton), objects) / unit.name)
        if clash:
            fault = f"{ascii(unit.name)[:80]} is both an object and a folder"
        return _refused(unit, fault) if form is not None else None

    def _of_root(self, top: Sequence[RemoteObject], folders: Iterable[str]) -> Iterator[Unit]:
        writable = tuple(remote for remote in needed(top) if name_fault(remote.name) is None)
        with tempfile.TemporaryDirectory(dir=self._folder) as skeleton:
            root = _stand_ins(Path(skeleton) / self._root_name, top)
            for name in folders:
                if name_fault(name) is None:
                    (root / name).mkdir()
            form, fault = self._recognised(root)
            if form is not None and (fault is not None or any(is_tensors(remote.name) for remote in writable)):
                yield _refused(_unit(ROOT, top, writable), fault)
            for remote in top if form is None else ():
                if name_fault(remote.name) is None:
                    form_of_file, fault = self._recognised(root / remote.name)
                    if form_of_file is not None:
                        yield _refused(_unit(remote.name, [remote], (remote,)), fault)

    def _recognised(self, path: Path) -> tuple[Format | None, str | None]:
        form = next((form for form in self._formats if form.recognise(path)), None)
        readiness = form.inspect(path) if form is not None else None
        return form, readiness.reason if readiness is not None and readiness.state == "damaged" else None


def _unit(name: str, objects: Sequence[RemoteObject], chosen: tuple[RemoteObject, ...]) -> Unit:
    facts = sorted((remote.name, remote.size, remote.version, remote.modified_ns) for remote in objects)
    signature = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:32]
    newest = max((remote.modified_ns for remote in objects), default=0)
    return Unit(name, signature, chosen, newest, fault_of(chosen if name == ROOT else objects))


def _refused(unit: Unit, fault: str | None) -> Unit:
    return dataclasses.replace(unit, fault=unit.fault or fault)


def _stand_ins(root: Path, objects: Sequence[RemoteObject]) -> Path:
    root.mkdir(exist_ok=True)
    for remote in objects[:MAX_FILES]:
        if name_fault(remote.name) is None:
            with contextlib.suppress(FileExistsError, NotADirectoryError):  # `a` and `a/b`: refused elsewhere
                (root / remote.name).parent.mkdir(parents=True, exist_ok=True)
                (root / remote.name).touch()
    return root


def _in_order(unit: Unit) -> tuple[bool, int, int, str]:
    # As the watch sorts what it found: a run's checkpoints by step, then an export made at its end.
    return (unit.number is None, unit.number or 0, unit.newest_ns, unit.name)
