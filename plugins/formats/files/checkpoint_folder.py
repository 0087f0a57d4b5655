"""Reads the files of one checkpoint's folder, and nothing outside it: by offset, never mapped into memory.

A mapped file that its trainer rewrites gives wrong numbers, and one that is truncated kills the process.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, TypeVar

from peel_agent.errors import CheckpointError, IncompleteCheckpoint, TornCheckpoint
from peel_agent.records import CheckpointRef, FileStamp, Listing, Readiness

CONFIG = "config.json"
MAX_JSON_BYTES = 64 * 2**20
MAX_JSON_ITEMS = 2_000_000
MAX_CONFIG_BYTES = 4 * 2**20

WAIT = "wait until the trainer has written it, or save the checkpoint again"
PERMIT = "give the user that peel-agent runs as the right to read it and to search its folder (chmod, setfacl)"
SAVE_AGAIN = "save the checkpoint again with save_pretrained, or take it out of the watched folder"


def refused(what: str, fault: str, *, remedy: str = SAVE_AGAIN) -> CheckpointError:
    """The error of a file, or of something in it, that is not read whatever is written next."""
    return CheckpointError(f"{what} {fault}", remedy=remedy)


def open_inside(folder: Path, name: str) -> tuple[int, FileStamp]:
    """A descriptor of the regular file `name` in `folder`, for the caller to close, and its stamp.

    Raises IncompleteCheckpoint when it is not there, CheckpointError for a link out of the folder or anything but a
    regular file.
    """
    real = Path(os.path.realpath(folder / name))
    if not real.is_relative_to(os.path.realpath(folder)):
        raise CheckpointError(
            f"{name} is a link to {real}, outside {folder}",
            remedy="copy the checkpoint with the files that its links name (cp -rL), and point at the copy",
        )
    try:
        # Without O_NONBLOCK a named pipe of this name would hold the caller for ever.
        descriptor = os.open(real, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError as error:
        raise IncompleteCheckpoint(f"{name} is not there", remedy=WAIT) from error
    except OSError as error:
        raise _unreadable(name, error) from error
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode):
        os.close(descriptor)
        raise refused(name, "is not a regular file")
    return descriptor, FileStamp(name, status.st_size, status.st_mtime_ns, status.st_ino)


def _unreadable(name: str, error: OSError) -> IncompleteCheckpoint:
    remedy = PERMIT if isinstance(error, PermissionError) else WAIT
    return IncompleteCheckpoint(f"{name} cannot be read: {error.strerror}", remedy=remedy)


@contextmanager
def opened(folder: Path, name: str) -> Iterator[tuple[int, FileStamp]]:
    """`open_inside` for the length of a `with`; a failing disk in its body is IncompleteCheckpoint too."""
    descriptor, stamp = open_inside(folder, name)
    try:
        yield descriptor, stamp
    except OSError as error:
        raise _unreadable(name, error) from error
    finally:
        os.close(descriptor)


def read_into(descriptor: int, buffer: memoryview, offset: int, name: str) -> None:
    """Fills `buffer` from the file's byte `offset` on. Raises TornCheckpoint when the file ends before that."""
    done = 0
    while done < len(buffer):
        count = os.preadv(descriptor, [buffer[done:]], offset + done)
        if count == 0:
            raise TornCheckpoint(
                f"{name} ended before byte {offset + len(buffer):,}, up to which it was read",
                remedy="it was rewritten in the meantime; it is tried again once it is whole",
            )
        done += count


def stamp_of(folder: Path, name: str) -> FileStamp:
    """The stamp of one file; raises as `open_inside` does."""
    with opened(folder, name) as (_, stamp):
        return stamp


def stamps_of(folder: Path, names: Iterable[str]) -> tuple[FileStamp, ...]:
    """Stamps of those names that are regular files inside the folder now, in the order of their names."""
    stamps = []
    for name in sorted(names):
        try:
            stamps.append(stamp_of(folder, name))
        except CheckpointError:
            continue  # gone, a folder, or refused: no evidence of progress in it
    return tuple(stamps)


def read_config(folder: Path, inside: str = "", *, above: bool = False) -> tuple[dict[str, Any], tuple[FileStamp, ...]]:
    """A model's config.json and, if it is the checkpoint's own, its stamp; raises as `read_json` does.

    With `above` it may be in `folder` under `inside`, in `folder`, or in the one above. That one belongs to several
    checkpoints: writing it again with the next does not change this one.
    """
    for name in dict.fromkeys((inside + CONFIG, CONFIG)) if above else ():
        if os.path.lexists(folder / name):
            config, stamp = read_json(folder, name, most=MAX_CONFIG_BYTES)
            return config, (stamp,)
    try:
        config, stamp = read_json(folder.parent if above else folder, CONFIG, most=MAX_CONFIG_BYTES)
    except IncompleteCheckpoint as error:
        raise IncompleteCheckpoint(
            f"{error.what}: the model cannot be built without it",
            remedy=f"put the model's {CONFIG} into {folder / inside} (model.config.save_pretrained writes it)"
            + (", or into the folder above for all checkpoints of the run" if above else ""),
        ) from error
    return config, () if above else (stamp,)


def read_json(folder: Path, name: str, *, most: int = MAX_JSON_BYTES) -> tuple[dict[str, Any], FileStamp]:
    """A JSON object of at most `most` bytes and the stamp of its file.

    Raises IncompleteCheckpoint when it is not there or does not parse (it may be half written), CheckpointError when
    it is too long or parses to something else than an object.
    """
    with opened(folder, name) as (descriptor, stamp):
        if stamp.size > most:
            raise refused(name, f"has {stamp.size:,} bytes, more than the {most:,} that are read")
        text = bytearray(stamp.size)
        read_into(descriptor, memoryview(text), 0, name)
    if text.count(b"[") + text.count(b"{") + text.count(b",") > MAX_JSON_ITEMS:
        raise refused(name, f"has more than {MAX_JSON_ITEMS:,} items")
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise IncompleteCheckpoint(f"{name} does not parse: {error}", remedy=WAIT) from error
    if not isinstance(value, dict):
        raise refused(name, f"holds a JSON {type(value).__name__}, not an object")
    return value, stamp


def keys_of(listing: Listing, name: str, most: int) -> frozenset[str]:
    """The keys of a small JSON object in a folder; none where it is not there or is something else."""
    try:
        value = json.loads(listing.read(name, most) or b"")
    except (ValueError, RecursionError):
        return frozenset()
    return frozenset(value) if isinstance(value, dict) else frozenset()


def by_name(*stamps: Iterable[FileStamp]) -> tuple[FileStamp, ...]:
    """All stamps in the order of their names."""
    return tuple(sorted((stamp for stamps_of_one in stamps for stamp in stamps_of_one), key=lambda stamp: stamp.name))


def not_whole(error: CheckpointError, files: tuple[FileStamp, ...]) -> Readiness:
    """What an error says about a checkpoint of which these files are there."""
    unfinished = isinstance(error, IncompleteCheckpoint | TornCheckpoint)
    return Readiness("incomplete" if unfinished else "damaged", error.what, files, error.remedy)


class HasFiles(Protocol):
    """A checkpoint found whole, of whatever layout."""

    @property
    def files(self) -> tuple[FileStamp, ...]: ...


Whole = TypeVar("Whole", bound=HasFiles)


def as_found(ref: CheckpointRef, read: Callable[[], Whole]) -> Whole:
    """The layout of a checkpoint, read again.

    Raises TornCheckpoint when its files are not those of `ref.files` any more, otherwise as `read` does.
    """
    try:
        layout = read()
    except IncompleteCheckpoint as error:
        if ref.files:
            raise _torn(ref, error.what) from error
        raise
    now = {stamp.name: (stamp.size, stamp.mtime_ns) for stamp in layout.files}
    then = {stamp.name: (stamp.size, stamp.mtime_ns) for stamp in ref.files}
    changed = sorted(name for name in now.keys() | then.keys() if now.get(name) != then.get(name))
    if then and changed:
        raise _torn(ref, f"{changed[0]} is another file than before")
    return layout


def _torn(ref: CheckpointRef, how: str) -> TornCheckpoint:
    return TornCheckpoint(
        f"{ref.path} changed after it was found whole: {how}",
        remedy="nothing to do: it is tried again once it is whole; raise settle_seconds if this is frequent",
    )


def unknown_tensor(folder: Path, name: str) -> CheckpointError:
    """The error of a tensor that a checkpoint does not have."""
    return refused(str(folder), f"has no tensor `{name}`", remedy="ask for one of the names in shapes()")
