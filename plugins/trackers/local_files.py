"""Files of this machine that trackers write: whole or not at all, and on disk when a call returns."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path


def try_to_write(path: Path) -> None:
    """Raises OSError where the file could not be appended to, or made; leaves nothing behind."""
    if path.is_file() or path.is_dir():  # a folder cannot be opened so, and says why
        with path.open("ab"):
            return
    folder = next(above for above in path.absolute().parents if above.exists())
    with tempfile.TemporaryFile(dir=folder) as file:
        file.write(b"x")
        file.flush()


def write_whole(path: Path, content: bytes, *, at_ms: int | None = None) -> None:
    """Puts the file there, or in the place of the one that is there; `at_ms` is the time that it then bears.

    Raises OSError; then what was there before is there still.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        if at_ms is not None:
            os.utime(temporary, ns=(at_ms * 1_000_000, at_ms * 1_000_000))
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    sync(path.parent)


def write_if_newer(path: Path, content: bytes, at_ms: int) -> None:
    """As `write_whole`, unless the file that is there bears a later time. Raises OSError."""
    try:
        if path.stat().st_mtime_ns > at_ms * 1_000_000:
            return
    except FileNotFoundError:
        pass
    write_whole(path, content, at_ms=at_ms)


def sync(path: Path) -> None:
    """Has a file, or a folder, on disk: a file just made is as durable as its folder. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
