"""The zip directory of a file that torch.save wrote: which members there are, and where the bytes of each lie.

Torch stores its members uncompressed and writes the directory last, with no comment behind it. Everything else that
the zip format allows (compression, encryption, comments, members that share bytes) is refused.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial

from peel_agent.errors import IncompleteCheckpoint

from ..files import checkpoint_folder
from ..files.checkpoint_folder import WAIT, read_into

MAX_MEMBERS = 200_000
MAX_DIRECTORY_BYTES = 64 << 20
SAVE_AGAIN = "save the model's state_dict() again with torch.save, or take the file out of the watched folder"

_LOCAL = struct.Struct("<4sHHHHHIIIHH")
_ENTRY = struct.Struct("<4sHHHHHHIIIHHHHHII")
_END = struct.Struct("<4sHHHHIIH")
_END_64 = struct.Struct("<4sQHHIIQQQQ")
_LOCATOR_64 = struct.Struct("<4sIQI")
_PICKLE = re.compile(r"[^/]+/data\.pkl")
_STORED, _ENCRYPTED = 0, 1
_FULL_16, _FULL_32 = 0xFFFF, 0xFFFFFFFF  # the value is in a zip64 field


@dataclass(frozen=True, slots=True)
class Member:
    """One member: its local header is at byte `header`, its `size` bytes end at or before byte `end`."""

    name: bytes
    header: int
    size: int
    end: int


@dataclass(frozen=True)
class Archive:
    """An archive of torch.save, which begins at byte `start` of an open file.

    `members` are by name without the archive's own folder: `data.pkl`, `data/0`.
    """

    descriptor: int
    name: str
    start: int
    members: Mapping[str, Member]

    def offset(self, member: str) -> int:
        """The byte of the file at which a member's content begins. Raises CheckpointError when it cannot be there."""
        entry = self.members[member]
        header = _read(self.descriptor, self.start + entry.header, _LOCAL.size + len(entry.name), self.name)
        signature, _, flags, method, _, _, _, _, _, name_length, extra_length = _LOCAL.unpack_from(header)
        same = signature == b"PK\x03\x04" and name_length == len(entry.name) and header[_LOCAL.size :] == entry.name
        if not same or method != _STORED or flags & _ENCRYPTED:
            raise refused(self.name, f"has another header before {shown(member)} than its directory says")
        offset = entry.header + _LOCAL.size + len(entry.name) + int(extra_length)
        if offset + entry.size > entry.end:
            raise refused(self.name, f"has {shown(member)} reach beyond byte {entry.end:,}, where something else is")
        return self.start + offset

    def content(self, member: str, limit: int) -> bytes:
        """A member's bytes. Raises CheckpointError when it is not there or longer than `limit`."""
        if member not in self.members:
            raise refused(self.name, f"has no {shown(member)}")
        size = self.members[member].size
        if size > limit:
            raise refused(self.name, f"has {size:,} bytes of {shown(member)}, more than the {limit:,} that are read")
        return _read(self.descriptor, self.offset(member), size, self.name)


def read_archive(descriptor: int, name: str, size: int, *, start: int = 0, most: int = MAX_DIRECTORY_BYTES) -> Archive:
    """The directory, of at most `most` bytes, of the archive in an open file's `size` bytes from byte `start` on.

    `name` is for the errors. Raises IncompleteCheckpoint for an archive that lacks its end, CheckpointError for what
    torch.save does not write and for big-endian numbers.
    """
    _check_start(_read(descriptor, start, min(size, 4), name), name)
    directory_at, directory_size, count = _find_directory(descriptor, name, size, start)
    if count > MAX_MEMBERS or directory_size > most:
        raise refused(name, f"has {count:,} members in a directory of {directory_size:,} bytes; {most:,} are read")
    directory = _read(descriptor, start + directory_at, directory_size, name)
    members = _without_folder(_check_apart(_entries(directory, count, name), directory_at, name), name)
    archive = Archive(descriptor, name, start, members)
    if "byteorder" in members and archive.content("byteorder", 16) != b"little":
        raise refused(name, "holds big-endian numbers, which are not read")
    return archive


refused = partial(checkpoint_folder.refused, remedy=SAVE_AGAIN)
"""The error of a file of torch.save."""


def shown(text: str) -> str:
    """A name out of a file that may be hostile, fit for one line of a terminal."""
    return "`" + text[:120].encode("unicode_escape").decode("ascii") + "`"


def _check_start(start: bytes, name: str) -> None:
    if start[:1] == b"\x80":
        raise refused(
            name,
            "is a bare pickle: torch before 1.6 wrote such files, and they are not read",
            remedy="load it with the torch that wrote it and save it again with torch.save of 1.6 or newer",
        )
    if not b"PK\x03\x04".startswith(start):
        raise refused(name, f"begins with {start!r}: it is no zip archive, as torch.save writes")
    if len(start) < 4:
        raise IncompleteCheckpoint(f"{name} has {len(start)} of at least {_END.size} bytes", remedy=WAIT)


def _find_directory(descriptor: int, name: str, archive_size: int, start: int) -> tuple[int, int, int]:
    """First byte of the directory in the archive, its size, and how many members it says there are."""
    tail_size = min(archive_size, _END_64.size + _LOCATOR_64.size + _END.size)
    tail_at = archive_size - tail_size
    tail = _read(descriptor, start + tail_at, tail_size, name)
    end = tail_size - _END.size
    if end < 0 or not tail.startswith(b"PK\x05\x06", end) or not tail.endswith(b"\0\0"):
        raise IncompleteCheckpoint(f"{name} lacks the zip directory at its end: it is not all there", remedy=WAIT)
    _, disk, first_disk, count_here, count, size, at, _ = _END.unpack_from(tail, end)
    locator = end - _LOCATOR_64.size
    if locator >= _END_64.size and tail.startswith(b"PK\x06\x07", locator):
        end = locator - _END_64.size
        if _LOCATOR_64.unpack_from(tail, locator) != (b"PK\x06\x07", 0, tail_at + end, 1):
            raise refused(name, "has a zip64 directory in another place than torch.save puts it")
        signature, length, _, _, disk, first_disk, count_here, count, size, at = _END_64.unpack_from(tail, end)
        if signature != b"PK\x06\x06" or length != _END_64.size - 12:
            raise refused(name, "has a zip64 directory that torch.save does not write")
    if (disk, first_disk) != (0, 0) or count_here != count or at + size != tail_at + end:
        raise refused(name, f"says that its zip directory is {size:,} bytes at {at:,}, which it is not")
    return at, size, count


def _entries(directory: bytes, count: int, name: str) -> Iterator[tuple[bytes, int, int]]:
    """Name, local header's byte and size of every member."""
    at = 0
    for number in range(count):
        if at + _ENTRY.size > len(directory) or not directory.startswith(b"PK\x01\x02", at):
            raise refused(name, f"has a zip directory of {number:,} members where it says {count:,}")
        entry = _ENTRY.unpack_from(directory, at)
        flags, method, (packed, size, name_length, extra_length, comment_length) = *entry[3:5], entry[8:13]
        at += _ENTRY.size
        member, extra = directory[at : at + name_length], directory[at + name_length : at + name_length + extra_length]
        at += name_length + extra_length + comment_length
        size, packed, header = _wide(size, packed, entry[16], extra, name)
        if method != _STORED or packed != size or flags & _ENCRYPTED:
            raise refused(
                name, f"has {shown(member.decode('latin-1'))} compressed or encrypted; torch.save does neither"
            )
        yield member, header, size
    if at != len(directory):
        raise refused(name, f"has a zip directory of {len(directory):,} bytes where its members need {at:,}")


def _wide(size: int, packed: int, header: int, extra: bytes, name: str) -> tuple[int, int, int]:
    """Sizes and offset as they are in the zip64 field, for those that are there."""
    values = [size, packed, header]
    if _FULL_32 not in values:
        return size, packed, header
    at = 0
    while at + 4 <= len(extra):
        kind, length = struct.unpack_from("<HH", extra, at)
        if kind == 1:
            wide = iter(struct.unpack_from(f"<{min(length, len(extra) - at - 4) // 8}Q", extra, at + 4))
            values = [next(wide, -1) if value == _FULL_32 else value for value in values]
            break
        at += 4 + length
    if _FULL_32 in values or -1 in values:
        raise refused(name, "has a member of more than 4 GiB without its zip64 field")
    return values[0], values[1], values[2]


def _check_apart(entries: Iterator[tuple[bytes, int, int]], directory_at: int, name: str) -> list[Member]:
    """The members, when each ends before the next and the last before the directory."""
    ordered = sorted(entries, key=lambda entry: entry[1])
    ends = [*(header for _, header, _ in ordered[1:]), directory_at]
    for (member, header, size), end in zip(ordered, ends, strict=True):
        if header + _LOCAL.size + len(member) + size > end:
            raise refused(
                name, f"has {shown(member.decode('latin-1'))} reach beyond byte {end:,}, where something else is"
            )
    return [Member(*entry, end) for entry, end in zip(ordered, ends, strict=True)]


def _without_folder(members: list[Member], name: str) -> dict[str, Member]:
    named: dict[str, Member] = {}
    for member in members:
        try:
            full = member.name.decode()
        except UnicodeDecodeError:
            full = ""
        if not full or full.startswith("/") or "\\" in full or "\0" in full or ".." in full.split("/"):
            raise refused(name, f"has a member of the name {shown(member.name.decode('latin-1'))}")
        if full in named:
            raise refused(name, f"has two members of the name {shown(full)}")
        named[full] = member
    pickles = [full for full in named if _PICKLE.fullmatch(full)]
    if len(pickles) != 1:
        raise refused(name, f"has {len(pickles)} members data.pkl: it is no archive that torch.save writes")
    folder = pickles[0].removesuffix("data.pkl")
    if folder + "constants.pkl" in named:
        raise refused(name, "is a TorchScript program, not a checkpoint")
    return {full.removeprefix(folder): member for full, member in named.items() if full.startswith(folder)}


def _read(descriptor: int, offset: int, size: int, name: str) -> bytes:
    content = bytearray(size)
    read_into(descriptor, memoryview(content), offset, name)
    return bytes(content)
