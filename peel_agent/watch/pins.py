"""Holds on to the files of a checkpoint until it is peeled, by links or copies in a private folder.

A rotated checkpoint can then still be read. A link shares the trainer's file, so one that is rewritten in place changes
here too: that is noticed by its stamps, and such a checkpoint is copied the next time.
"""

from __future__ import annotations

import dataclasses
import fcntl
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from peel_agent.errors import TornCheckpoint
from peel_agent.records import CheckpointRef, FileStamp

FOLDER = "_peel_agent_pins"
"""Inside the watched root, when state and root are on different file systems. transformers uploads no name with `_`."""

COMPANIONS = ("config.json", "tokenizer.json")
"""Kept too where they lie in the checkpoint or beside it: several checkpoints of a run may share them."""

MAX_COMPANION = 64 * 2**20

SPARE = 0.1
"""The part of a file system that pins leave free."""

_FICLONE = 0x40049409  # linux/fs.h: the new file shares the old one's blocks until either is written


class Pins:
    """A folder of pins for one watched root; it has one owner, and what an earlier one left there is removed.

    `state_dir` is used when it is on the root's file system, or else a folder of the root itself.
    """

    def __init__(self, root: Path, state_dir: Path) -> None:
        same = not root.exists() or state_dir.stat().st_dev == root.stat().st_dev
        self.folder = state_dir / "pins" if same else root / FOLDER / state_dir.name
        self.release_all()

    def pin(self, ref: CheckpointRef) -> CheckpointRef:
        """The same checkpoint held by reflinks or hard links; left in place where the file system has neither.

        Raises TornCheckpoint when the files are not those of the reference any more.
        """
        return _kept(ref, self.folder, _link)

    def release(self, ref: CheckpointRef) -> None:
        """The files are not needed any more."""
        shutil.rmtree(self.folder / ref.fingerprint, ignore_errors=True)

    def release_all(self) -> None:
        """No file is held any more."""
        shutil.rmtree(self.folder, ignore_errors=True)
        if self.folder.parent.name == FOLDER:
            shutil.rmtree(self.folder.parent, ignore_errors=True)

    def crowded(self) -> bool:
        """Whether the pins are on a file system that is nearly full: the training needs what is left."""
        try:
            usage = shutil.disk_usage(self.folder)
        except OSError:
            return False
        return usage.free < SPARE * usage.total


def copied(ref: CheckpointRef, folder: Path) -> CheckpointRef:
    """The same checkpoint as a copy in a folder of pins; left in place where there is no room. Raises as `Pins.pin`."""
    folder.mkdir(parents=True, exist_ok=True)
    usage = shutil.disk_usage(folder)
    if usage.free - sum(stamp.size for stamp in ref.files) < SPARE * usage.total:
        return ref.released()
    return _kept(ref, folder, _copy)


def _kept(ref: CheckpointRef, folder: Path, keep: Callable[[Path, Path], None]) -> CheckpointRef:
    home = folder / ref.fingerprint
    held = home / ref.path.name
    shutil.rmtree(home, ignore_errors=True)
    try:
        home.mkdir(parents=True)
        _keep_files(ref, held, keep)
    except TornCheckpoint:
        shutil.rmtree(home, ignore_errors=True)
        raise
    except OSError as error:
        shutil.rmtree(home, ignore_errors=True)
        if not ref.path.exists():
            raise TornCheckpoint(f"{ref.path} was removed", remedy="nothing to do: it is gone") from error
        return ref.released()
    return dataclasses.replace(ref, held=held)


def _keep_files(ref: CheckpointRef, held: Path, keep: Callable[[Path, Path], None]) -> None:
    is_folder = ref.path.is_dir()
    here, there = (ref.path, held) if is_folder else (ref.path.parent, held.parent)
    there.mkdir(exist_ok=True)
    for stamp in ref.files:
        target = there / stamp.name
        target.parent.mkdir(parents=True, exist_ok=True)
        source = Path(os.path.realpath(here / stamp.name))
        keep(source, target)
        if not _is(target, stamp) or not _is(source, stamp):
            raise TornCheckpoint(f"{ref.path}: {stamp.name} changed", remedy="it is read again once it is at rest")
    for source, target in ((here, there), (here.parent, there.parent)) if is_folder else ((here, there),):
        for name in COMPANIONS:
            if _is_companion(source, name) and not (target / name).exists():
                keep(Path(os.path.realpath(source / name)), target / name)


def _is_companion(folder: Path, name: str) -> bool:
    """A file of the folder itself, not a link out of it, and of a size that one has."""
    real = Path(os.path.realpath(folder / name))
    return real.is_relative_to(os.path.realpath(folder)) and real.is_file() and real.stat().st_size <= MAX_COMPANION


def _is(file: Path, stamp: FileStamp) -> bool:
    status = file.stat()
    return (status.st_size, status.st_mtime_ns) == (stamp.size, stamp.mtime_ns)


def _link(source: Path, target: Path) -> None:
    try:
        with source.open("rb") as old, target.open("xb") as new:
            fcntl.ioctl(new.fileno(), _FICLONE, old.fileno())
        shutil.copystat(source, target)
    except OSError:
        target.unlink(missing_ok=True)
        os.link(source, target)


def _copy(source: Path, target: Path) -> None:
    shutil.copy2(source, target)
