"""Files of a checkpoint held open, so that one that is rotated away can be read to its end."""

from __future__ import annotations

import os
import weakref
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from peel_agent.errors import CheckpointError, IncompleteCheckpoint, TornCheckpoint
from peel_agent.records import FileStamp

from .checkpoint_folder import open_inside, read_into

MAX_OPEN = 256
"""Files held open at once. A run on more ranks has more files; the rest are opened for each read."""


class HeldFiles:
    """The files of `needed`, which are in `folder` under `inside` + their name, and as `stamps` have them.

    Every access raises TornCheckpoint when its file is not that one any more. They are closed with the last reference.
    """

    def __init__(self, folder: Path, stamps: Iterable[FileStamp], needed: Iterable[str], *, inside: str = "") -> None:
        self._folder = folder
        self._inside = inside
        self._stamps = {stamp.name: stamp for stamp in stamps}
        self._descriptors: dict[str, int] = {}
        weakref.finalize(self, _close_all, self._descriptors)
        for file in sorted(needed)[:MAX_OPEN]:
            self._descriptors[file] = self._open(file)

    def read(self, file: str, buffer: memoryview, offset: int) -> None:
        """Fills `buffer` from the file's byte `offset` on."""
        with self.opened(file) as descriptor:
            read_into(descriptor, buffer, offset, file)

    @contextmanager
    def opened(self, file: str) -> Iterator[int]:
        """The descriptor of a file. Whatever goes wrong, a file that changed meanwhile is torn and not damaged."""
        held = self._descriptors.get(file)
        descriptor = self._open(file) if held is None else held
        try:
            yield descriptor
        except OSError as error:
            raise _torn(file, f"cannot be read any more: {error.strerror}") from error
        except TornCheckpoint:
            raise
        except CheckpointError:
            self._check(file, descriptor)
            raise
        else:
            self._check(file, descriptor)
        finally:
            if held is None:
                os.close(descriptor)

    def _open(self, file: str) -> int:
        try:
            descriptor, _ = open_inside(self._folder, self._inside + file)
        except IncompleteCheckpoint as error:
            raise _torn(file, f"is gone: {error.what}") from error
        try:
            self._check(file, descriptor)
        except TornCheckpoint:
            os.close(descriptor)
            raise
        return descriptor

    def _check(self, file: str, descriptor: int) -> None:
        name, status = self._inside + file, os.fstat(descriptor)
        if FileStamp(name, status.st_size, status.st_mtime_ns, status.st_ino) != self._stamps[name]:
            raise _torn(file, "changed while it was read")


def _torn(file: str, how: str) -> TornCheckpoint:
    return TornCheckpoint(f"{file} {how}", remedy="nothing to do: it is tried again once it is whole")


def _close_all(descriptors: Mapping[str, int]) -> None:
    for descriptor in descriptors.values():
        os.close(descriptor)
