"""A local file of lines, each there once, and on disk when `append` returns."""

from __future__ import annotations

import os
import threading
from hashlib import sha256
from pathlib import Path

_APPENDING: dict[Path, threading.Lock] = {}


class DurableLines:
    """Appends lines to a file; one whose bytes are there already is not appended again.

    A last line that a crash left without its newline was never acknowledged to the sender, who will send it again: it
    is cut off. Several threads of one process may write to one file, each with an object of its own. Raises OSError.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._written: set[bytes] | None = None
        self._appending = _APPENDING.setdefault(path, threading.Lock())

    def append(self, line: bytes) -> None:
        """`line` ends with a newline."""
        with self._appending:
            self._append(line)

    def _append(self, line: bytes) -> None:
        digest = sha256(line).digest()
        written = self._written if self._ends_whole() else None
        written = self._whole_lines() if written is None else written
        self._written = None  # unknown until this append is known to be whole
        if digest not in written:
            with self._path.open("ab") as file:
                file.write(line)
                file.flush()
                os.fsync(file.fileno())
            written.add(digest)
        self._written = written

    def close(self) -> None:
        self._written = None

    def _ends_whole(self) -> bool:
        """Whether the file is there and ends with a newline, whoever wrote to it last."""
        try:
            with self._path.open("rb") as file:
                file.seek(-1, os.SEEK_END)
                return file.read(1) == b"\n"
        except OSError:  # there is none, it is empty, or it cannot be read, which the next step tells
            return False

    def _whole_lines(self) -> set[bytes]:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        digests, end = set(), 0
        with self._path.open("a+b") as file:
            file.seek(0)
            for line in file:
                if line.endswith(b"\n"):
                    digests.add(sha256(line).digest())
                    end += len(line)
            file.truncate(end)
        _sync_directory(self._path.parent)  # a file just created is as durable as its directory
        return digests


def _sync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
