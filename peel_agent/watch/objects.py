"""The objects of a store as the folders that their names make of them."""

from __future__ import annotations

import functools
from collections.abc import Sequence

from peel_agent.watch.store import RemoteObject


class ObjectListing:
    """The `records.Listing` of a folder of objects, or of one object; nothing of an object is read.

    `objects` are all below `root`, the name of the store's folder; `inside` is where among them this one is, and
    names in it end in `/`. Whatever an object is called, its name is not used as a path.
    """

    def __init__(self, root: str, objects: Sequence[RemoteObject], parent: ObjectListing | None = None) -> None:
        self.name = root
        self._objects = objects
        self._parent = parent
        self._inside: str = "" if parent is None else f"{parent._inside}{root}/"

    @property
    def is_folder(self) -> bool:
        return self._parent is None or bool(self._objects)

    @property
    def is_alias(self) -> bool:
        """False: a store has no links."""
        return False

    @property
    def parent(self) -> ObjectListing:
        return ObjectListing("", ()) if self._parent is None else self._parent

    def objects(self) -> Sequence[RemoteObject]:
        """All objects below, with their names below the store's root."""
        return self._objects

    def names(self) -> frozenset[str]:
        return frozenset((*self._files, *self._folders))

    def is_file(self, name: str) -> bool:
        return name in self._files

    def is_folder_at(self, name: str) -> bool:
        return name in self._folders

    def is_link(self, _name: str) -> bool:
        """False: a store has no links."""
        return False

    def folder(self, name: str) -> ObjectListing:
        return ObjectListing(name, self._folders.get(name, ()), self)

    def size(self, name: str) -> int:
        remote = self._files.get(name)
        return 0 if remote is None else remote.size

    def read(self, name: str, most: int) -> None:
        """None: it has yet to be fetched."""

    @functools.cached_property
    def _files(self) -> dict[str, RemoteObject]:
        below = ((remote.name[len(self._inside) :], remote) for remote in self._objects)
        return {name: remote for name, remote in below if "/" not in name}

    @functools.cached_property
    def _folders(self) -> dict[str, list[RemoteObject]]:
        folders: dict[str, list[RemoteObject]] = {}
        for remote in self._objects:
            name, slash, _ = remote.name[len(self._inside) :].partition("/")
            if slash:
                folders.setdefault(name, []).append(remote)
        return folders
