"""Hints from the file system that a scan may be worth while. A timed scan decides; events only make it prompt."""

from __future__ import annotations

import queue
from pathlib import Path
from types import TracebackType
from typing import Self

from watchdog.events import (
    DirCreatedEvent,
    DirModifiedEvent,
    DirMovedEvent,
    FileClosedEvent,
    FileCreatedEvent,
    FileModifiedEvent,
    FileMovedEvent,
    FileSystemEvent,
    FileSystemEventHandler,
)
from watchdog.observers import Observer
from watchdog.observers.api import BaseObserver

from peel_agent.errors import ConfigurationError
from peel_agent.mounts import MOUNTINFO, SILENT, kind_of

# Not opened and not closed_no_write: our own reads would raise them.
_TELLING: list[type[FileSystemEvent]] = [
    DirCreatedEvent,
    DirModifiedEvent,
    DirMovedEvent,
    FileClosedEvent,
    FileCreatedEvent,
    FileModifiedEvent,
    FileMovedEvent,
]


class Hints(FileSystemEventHandler):
    """`with Hints(root) as hints`: `hints.wait(seconds)` ends early when something was written below the root.

    Without a root there is nothing to hear of. `status` says in words whether there are events at all. Raises
    ConfigurationError when the root does not exist.
    """

    def __init__(self, root: Path | None, mountinfo: Path = MOUNTINFO) -> None:
        if root is not None and not root.exists():
            raise ConfigurationError(
                f"the watched path {root} does not exist",
                remedy="correct it, or create it before the training does: mkdir -p",
            )
        self.status = "not started"
        self._root = None if root is None else root.resolve()
        self._mountinfo = mountinfo
        self._watched: tuple[int, int] | None = None
        self._observer: BaseObserver | None = None
        # Not an Event: put() may be called by a signal handler that interrupts wait() in the same thread.
        self._hints: queue.SimpleQueue[None] = queue.SimpleQueue()

    def __enter__(self) -> Self:
        if self._root is None:
            self.status = "timed scans only: an object store reports no events"
            return self
        kind = kind_of(self._root, self._mountinfo)
        if kind in SILENT:
            self.status = f"timed scans only: {kind} reports no events"
            return self
        self._watched = _identity(self._root)
        try:
            self._observer = _observe(self._root, self)
            self.status = "events and timed scans"
        except OSError as error:
            self.status = (
                f"timed scans only: {error.strerror}; "
                "raise fs.inotify.max_user_watches and fs.inotify.max_user_instances to have events"
            )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._observer is not None:
            self._observer.stop()
            self._observer.join()
            self._observer = None

    def refresh(self) -> None:
        """Watches the root anew when it is another folder than before: one that was removed and made again."""
        if self._observer is None or self._root is None or (now := _identity(self._root)) is None:
            return
        # A folder made again may have the inode of the one before; the emitter of a removed one has ended.
        if now != self._watched or not all(emitter.is_alive() for emitter in self._observer.emitters):
            self.__exit__(None, None, None)
            self.__enter__()
            self._hints.put(None)

    def wait(self, seconds: float) -> bool:
        """Waits for a hint, at most `seconds`; True when there was one since the last wait, or `wake` was called."""
        try:
            self._hints.get(timeout=max(seconds, 0.0))
        except queue.Empty:
            return False
        while not self._hints.empty():
            self._hints.get()
        return True

    def wake(self) -> None:
        """Ends the wait; may be called from another thread or from a signal handler."""
        self._hints.put(None)

    def on_any_event(self, _event: FileSystemEvent) -> None:
        if self._hints.empty():  # one is enough: a long save raises thousands
            self._hints.put(None)


def _identity(root: Path) -> tuple[int, int] | None:
    try:
        status = root.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino


def _observe(root: Path, handler: FileSystemEventHandler) -> BaseObserver:
    observer = Observer()
    try:
        observer.schedule(
            handler, root if root.is_dir() else root.parent, recursive=root.is_dir(), event_filter=_TELLING
        )
        observer.start()
    except OSError:
        observer.stop()
        raise
    return observer
