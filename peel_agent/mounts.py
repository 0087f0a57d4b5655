"""What kind of file system a path is on."""

from __future__ import annotations

import re
from pathlib import Path

SILENT = frozenset({"nfs", "nfs4", "lustre", "gpfs", "cifs", "smb3", "beegfs", "ceph", "9p", "virtiofs", "fuse"})
"""File systems on which other machines write: inotify hears nothing of that, and a shared memory map is not safe."""

MOUNTINFO = Path("/proc/self/mountinfo")


def kind_of(path: Path, mountinfo: Path = MOUNTINFO) -> str:
    """The type of the file system that holds a path, "" where it cannot be told; all of type `fuse.*` are `fuse`."""
    try:
        text = mountinfo.read_text(encoding="utf-8", errors="surrogateescape")
    except OSError:
        return ""  # not Linux
    kind = file_system_of(path.resolve(), text)
    return "fuse" if kind.startswith("fuse.") else kind


def same_mount(first: Path, second: Path, mountinfo: Path = MOUNTINFO) -> bool:
    """Whether a file of one folder may be linked into the other: not across mounts, though it be the same device."""
    if first.stat().st_dev != second.stat().st_dev:
        return False
    try:
        text = mountinfo.read_text(encoding="utf-8", errors="surrogateescape")
    except OSError:
        return True  # not Linux
    return mount_of(first.resolve(), text)[0] == mount_of(second.resolve(), text)[0]


def file_system_of(path: Path, mountinfo: str) -> str:
    """The type of the file system that holds an absolute path, from the text of /proc/self/mountinfo; "" if unknown."""
    return mount_of(path, mountinfo)[1]


def mount_of(path: Path, mountinfo: str) -> tuple[str, str]:
    """The mount's number and its file system's type, each "" if unknown, of an absolute path.

    The longest mount point above the path counts; of two at the same place, the later, which hides the earlier.
    """
    best, number, kind = -1, "", ""
    for line in mountinfo.splitlines():
        before, _, after = line.partition(" - ")
        fields = before.split(" ")
        if len(fields) < 5 or not after:
            continue
        point = Path(_unescape(fields[4]))
        if path.is_relative_to(point) and len(point.parts) >= best:
            best, number, kind = len(point.parts), fields[0], after.split(" ")[0]
    return number, kind


def _unescape(mount_point: str) -> str:
    """Undoes the kernel's octal escapes of blanks and backslashes."""
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), mount_point)
