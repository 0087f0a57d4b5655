"""One lock file a device, so that two agents of a machine do not take the same one."""

from __future__ import annotations

import fcntl
import os
import re
from contextlib import suppress
from pathlib import Path

from peel_agent.errors import printable


class DeviceLock:
    """The lock on one device, held until `release`, or until this process ends."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor: int | None = descriptor

    def release(self) -> None:
        """Gives the lock back; the file stays, since another agent may be waiting on it. A second call does nothing."""
        if self._descriptor is None:
            return
        descriptor, self._descriptor = self._descriptor, None
        with suppress(OSError):  # another user's file, which could only be opened for reading
            os.ftruncate(descriptor, 0)
        os.close(descriptor)


def lock(folder: Path, uuid: str) -> DeviceLock | str:
    """The lock on this device, or why it cannot be had. The file holds the process number of its holder."""
    path = folder / f"{re.sub(r'[^A-Za-z0-9.-]', '_', uuid)}.lock"
    try:
        _make(folder)
        descriptor = _opened(path)
    except OSError as error:
        return printable(f"it cannot be locked: {path}: {error.strerror}")
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        holder = printable(os.read(descriptor, 20).decode(errors="replace").strip())
        os.close(descriptor)
        return f"another agent holds it (process {holder})" if holder else "another agent holds it"
    with suppress(OSError):  # another user's file, or a full disk: the lock itself holds
        os.fchmod(descriptor, 0o644)
        os.ftruncate(descriptor, 0)
        os.write(descriptor, f"{os.getpid()}\n".encode())
    return DeviceLock(descriptor)


def _make(folder: Path) -> None:
    """The folder, open to the agents of other users, as /tmp is."""
    if not folder.is_dir():
        folder.mkdir(parents=True, exist_ok=True)
        folder.chmod(0o1777)


def _opened(path: Path) -> int:
    """Open for writing, or only for reading where the file is another user's; never through a link."""
    flags = os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        return os.open(path, os.O_RDWR | os.O_CREAT | flags, 0o644)
    except PermissionError:
        return os.open(path, os.O_RDONLY | flags)
