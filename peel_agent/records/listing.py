"""What is at one place, as formats are shown it, and what a format says of it."""

from __future__ import annotations

import functools
import itertools
import os
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

Strength = Literal["specific", "generic", "declined", "begun"]


@dataclass(frozen=True)
class Claim:
    """What a format says of a listing that it knows.

    The strongest claim has the checkpoint. `specific`: a mark that one producer alone writes. `generic`: files that
    many producers write. `declined`: known and not read; `fault` says what it is, `remedy` the way out. `begun`: a name
    or a mark of a checkpoint, and nothing yet that is read.

    `needs` are the names, below the listing, of what `inspect`, `step` and `open` read or look for among what is there
    now: so much is fetched of an object store. It is empty for a single file, which is needed itself. The config.json
    and tokenizer.json in the folder, or above it, always come too. `awaits` are names that must come before the
    checkpoint is whole.
    """

    strength: Strength
    needs: frozenset[str] = frozenset()
    fault: str = ""
    remedy: str = ""
    awaits: tuple[str, ...] = ()


class Listing(Protocol):
    """A file or a folder by its names, on this machine or in an object store. No method raises.

    What cannot be seen is not there: a folder that is gone, is none, or cannot be listed has no names.
    """

    @property
    def name(self) -> str:
        """The last part of its path; empty for the root of a file system."""

    @property
    def is_folder(self) -> bool:
        """True for a folder; False for a file and for what is gone."""

    @property
    def is_alias(self) -> bool:
        """True for a link to another entry of its own folder, such as Lightning's `last.ckpt`."""

    @property
    def parent(self) -> Listing:
        """The folder that it is in. Only `is_file`, `is_folder_at`, `size` and `read` are cheap there."""

    def names(self) -> frozenset[str]:
        """The names of a folder's entries, hidden ones too. Asked for once, the folder is listed once."""

    def is_file(self, name: str) -> bool:
        """True for a regular file of this name in the folder, or a link to one."""

    def is_folder_at(self, name: str) -> bool:
        """True for a folder of this name in the folder, or a link to one."""

    def is_link(self, name: str) -> bool:
        """True for a link of this name, wherever it leads."""

    def folder(self, name: str) -> Listing:
        """What is in the folder of this name; empty where there is none."""

    def size(self, name: str) -> int:
        """Bytes of a file in the folder; 0 where there is none."""

    def read(self, name: str, most: int) -> bytes | None:
        """A file's content; None when it has more than `most` bytes, is not there, or has yet to be fetched."""


class LocalListing:
    """The `Listing` of a path on this machine, as it was when it was first asked: make a new one for every look.

    Of a folder with more than `most` entries, and of those in it, so many are seen. `denied` says that it may not be
    listed.
    """

    def __init__(self, path: Path, parent: LocalListing | None = None, *, most: int | None = None) -> None:
        self.path = path
        self.denied = False
        self._parent = parent
        self._most = most
        self._children: dict[str, LocalListing] = {}

    @property
    def name(self) -> str:
        return self.path.name

    @functools.cached_property
    def is_folder(self) -> bool:
        return stat.S_ISDIR(_mode(self.path)) if self._parent is None else self._parent.is_folder_at(self.name)

    @functools.cached_property
    def is_alias(self) -> bool:
        try:
            return self.path.is_symlink() and self.path.resolve().parent == self.path.parent.resolve()
        except (OSError, RuntimeError):
            return False

    @property
    def parent(self) -> LocalListing:
        if self._parent is None:
            self._parent = LocalListing(self.path.parent)
        return self._parent

    def names(self) -> frozenset[str]:
        return frozenset(self._entries)

    def is_file(self, name: str) -> bool:
        """As of `Listing`. A folder that was not listed yet is not listed for it."""
        return stat.S_ISREG(self._mode_of(name))

    def is_folder_at(self, name: str) -> bool:
        """As of `Listing`. A folder that was not listed yet is not listed for it."""
        return stat.S_ISDIR(self._mode_of(name))

    def is_link(self, name: str) -> bool:
        entry = self._entries.get(name)
        return entry is not None and entry.is_symlink()

    def folder(self, name: str) -> LocalListing:
        if name not in self._children:
            self._children[name] = LocalListing(self.path / name, self, most=self._most)
        return self._children[name]

    def size(self, name: str) -> int:
        try:
            return (self.path / name).stat().st_size
        except (OSError, ValueError):
            return 0

    def read(self, name: str, most: int) -> bytes | None:
        try:
            # Without O_NONBLOCK a named pipe of this name would hold the caller for ever.
            descriptor = os.open(self.path / name, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        except (OSError, ValueError):
            return None
        with os.fdopen(descriptor, "rb") as file:
            try:
                status = os.fstat(descriptor)
                if not stat.S_ISREG(status.st_mode) or status.st_size > most:
                    return None
                return file.read(most)
            except OSError:
                return None

    def _mode_of(self, name: str) -> int:
        if "_entries" not in self.__dict__:
            return _mode(self.path / name)
        entry = self._entries.get(name)
        try:
            if entry is None or entry.is_symlink():
                return 0 if entry is None else _mode(self.path / name)
            return stat.S_IFDIR if entry.is_dir() else stat.S_IFREG if entry.is_file() else 0
        except OSError:
            return 0

    @functools.cached_property
    def _entries(self) -> dict[str, os.DirEntry[str]]:
        try:
            with os.scandir(self.path) as entries:
                return {entry.name: entry for entry in itertools.islice(entries, self._most)}
        except (OSError, ValueError) as error:
            self.denied = isinstance(error, PermissionError)
            return {}


def _mode(path: Path) -> int:
    """The mode of what a path leads to; 0 where nothing is to be seen. Path.is_dir raises for a stale handle."""
    try:
        return path.stat().st_mode
    except (OSError, ValueError):
        return 0
