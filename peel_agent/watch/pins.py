"""Holds on to the files of a checkpoint until it is peeled, by links or copies in a private folder.

A rotated checkpoint can then still be read, by the next start of the agent too. A link shares the trainer's file, so
that one rewritten in place changes here too: its stamps tell, and such a checkpoint is copied the next time.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
import shutil
import stat
from collections.abc import Callable
from pathlib import Path

from peel_agent.errors import TornCheckpoint
from peel_agent.mounts import same_mount
from peel_agent.records import CheckpointRef, FileStamp, plain, restored

FOLDER = "_peel_agent_pins"
"""Inside the watched root, when state and root are on different file systems. transformers uploads no name with `_`."""

COMPANIONS = ("config.json", "tokenizer.json")
"""Kept too where they lie in the checkpoint or beside it: several checkpoints of a run may share them."""

MAX_COMPANION = 64 * 2**20

_FICLONE = 0x40049409  # linux/fs.h: the new file shares the old one's blocks until either is written


def spare_bytes(total: int) -> int:
    """What is left free of a file system of `total` bytes: the training needs it."""
    return min(total // 10, 50 * 2**30)


class Pins:
    """A folder of pins for one watched root, with one owner.

    `state_dir` is used when its files may be links to the root's, or else a folder of the root itself. What was held
    for the state folder `earlier` is taken over.
    """

    def __init__(self, root: Path, state_dir: Path, earlier: Path | None = None) -> None:
        if not root.exists() or same_mount(state_dir, root):
            self.folder = state_dir / "pins"
        else:
            self.folder = _beside(root, state_dir)
        # Whoever may write to the root could make it a link to anywhere.
        self._usable = not self.folder.parent.is_symlink() and not self.folder.is_symlink()
        if earlier is not None and self._usable and self.folder.parent.name == FOLDER and not self.folder.exists():
            with contextlib.suppress(OSError):  # there is mostly none
                _beside(root, earlier).rename(self.folder)

    def pin(self, ref: CheckpointRef) -> CheckpointRef:
        """The same checkpoint held by reflinks or hard links; left in place where the file system has neither.

        Raises TornCheckpoint when the files are not those of the reference any more.
        """
        if not self._usable:
            return ref.released()
        pinned = _kept(ref, self.folder / ref.fingerprint, _link)
        if pinned.held is None:
            return pinned
        try:
            self._note(pinned)
        except OSError:
            self.release(pinned)
            return ref.released()
        return pinned

    def _note(self, pinned: CheckpointRef) -> None:
        """What the next owner needs in order to take the pin up."""
        note = self.folder / f"{pinned.fingerprint}.json"
        part = note.with_suffix(".part")
        part.write_text(json.dumps(plain(pinned)), encoding="utf-8")
        part.replace(note)

    def left(self) -> tuple[CheckpointRef, ...]:
        """The checkpoints that an earlier owner held and did not come to peel."""
        refs = []
        for note in sorted(self.folder.glob("*.json")) if self._usable else ():
            with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
                ref = restored(CheckpointRef, json.loads(note.read_text(encoding="utf-8")))
                # The folder itself may have been moved.
                held = None if ref.held is None else self.folder / ref.held.parent.name / ref.held.name
                if held is not None and held.is_relative_to(self.folder) and held.exists():
                    refs.append(dataclasses.replace(ref, held=held))
        return tuple(refs)

    def newest(self, ref: CheckpointRef) -> CheckpointRef:
        """The reference to what is held of a checkpoint: its copy, where one had to be made."""
        copy = self.folder / f"{ref.fingerprint}.copy" / ref.path.name
        return dataclasses.replace(ref, held=copy) if copy.exists() else ref

    def release(self, ref: CheckpointRef) -> None:
        """The files are not needed any more."""
        for name in (ref.fingerprint, f"{ref.fingerprint}.copy"):
            _forget(self.folder / name)
        self._tidy()

    def release_all(self, but: tuple[CheckpointRef, ...] = ()) -> None:
        """No file is held any more `but` those of some checkpoints."""
        if not self._usable:
            return
        kept = {f"{ref.fingerprint}{end}" for ref in but for end in ("", ".json", ".copy")}
        for child in self.folder.glob("*"):
            if child.name not in kept:
                _forget(child)
        self._tidy()

    def _tidy(self) -> None:
        with contextlib.suppress(OSError):  # not empty
            self.folder.rmdir()
            if self.folder.parent.name == FOLDER:
                self.folder.parent.rmdir()

    def crowded(self) -> bool:
        """Whether the pins are on a file system that is nearly full: the training needs what is left."""
        try:
            usage = shutil.disk_usage(self.folder)
        except OSError:
            return False
        return usage.free < spare_bytes(usage.total)


def _beside(root: Path, state_dir: Path) -> Path:
    """The folder of pins of a state folder inside a watched root."""
    return root / FOLDER / hashlib.sha256(str(state_dir.resolve()).encode()).hexdigest()[:12]


def copied(ref: CheckpointRef, folder: Path) -> CheckpointRef:
    """The same checkpoint as a copy in a folder of pins; as it is where there is no room. Raises as `Pins.pin`."""
    folder.mkdir(parents=True, exist_ok=True)
    usage = shutil.disk_usage(folder)
    if usage.free - sum(stamp.size for stamp in ref.own_files) < spare_bytes(usage.total):
        return ref
    copy = _kept(ref.in_place(), folder / f"{ref.fingerprint}.copy", _copy)
    return ref if copy.held is None else dataclasses.replace(ref, held=copy.held)


def _kept(ref: CheckpointRef, home: Path, keep: Callable[[int, Path, Path], None]) -> CheckpointRef:
    held = home / ref.path.name
    _forget(home)
    try:
        home.mkdir(parents=True)
        _keep_files(ref, held, keep)
    except TornCheckpoint:
        _forget(home)
        raise
    except OSError as error:
        _forget(home)
        if not ref.path.exists():
            raise TornCheckpoint(f"{ref.path} was removed", remedy="nothing to do: it is gone") from error
        return ref.released()
    return dataclasses.replace(ref, held=held)


def _forget(home: Path) -> None:
    shutil.rmtree(home, ignore_errors=True)
    for file in (home, home.with_name(f"{home.name}.json")):
        with contextlib.suppress(OSError):
            file.unlink(missing_ok=True)


def _keep_files(ref: CheckpointRef, held: Path, keep: Callable[[int, Path, Path], None]) -> None:
    is_folder = ref.path.is_dir()
    here, there = (ref.path, held) if is_folder else (ref.path.parent, held.parent)
    there.mkdir(exist_ok=True)
    for stamp in ref.own_files:
        target = there / stamp.name
        target.parent.mkdir(parents=True, exist_ok=True)
        if not _keep(here, stamp.name, target, keep, stamp=stamp):
            raise TornCheckpoint(f"{ref.path}: {stamp.name} changed", remedy="it is read again once it is at rest")
    for source, target in ((here, there), (here.parent, there.parent)) if is_folder else ((here, there),):
        for name in COMPANIONS:
            if not (target / name).exists():
                with contextlib.suppress(FileNotFoundError):
                    _keep(source, name, target / name, keep)


def _keep(
    folder: Path, name: str, target: Path, keep: Callable[[int, Path, Path], None], *, stamp: FileStamp | None = None
) -> bool:
    """Keeps one regular file of a folder, not one that a link out of it names; False for any other, or another."""
    real = Path(os.path.realpath(folder / name))
    if not real.is_relative_to(os.path.realpath(folder)):
        return False
    # Without O_NONBLOCK a named pipe of this name would hold the caller for ever.
    descriptor = os.open(real, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        before = os.fstat(descriptor)
        if not stat.S_ISREG(before.st_mode) or (
            before.st_size > MAX_COMPANION if stamp is None else _not(before, stamp)
        ):
            return False
        keep(descriptor, real, target)
        return stamp is None or not (_not(os.fstat(descriptor), stamp) or _not(target.lstat(), stamp))
    finally:
        os.close(descriptor)


def _not(status: os.stat_result, stamp: FileStamp) -> bool:
    return not stat.S_ISREG(status.st_mode) or (status.st_size, status.st_mtime_ns) != (stamp.size, stamp.mtime_ns)


def _link(descriptor: int, source: Path, target: Path) -> None:
    try:
        with target.open("xb") as new:
            fcntl.ioctl(new.fileno(), _FICLONE, descriptor)
        _stamp(target, os.fstat(descriptor))
    except OSError:
        target.unlink(missing_ok=True)
        os.link(source, target, follow_symlinks=False)


def _copy(descriptor: int, _source: Path, target: Path) -> None:
    with os.fdopen(os.dup(descriptor), "rb") as old, target.open("xb") as new:
        shutil.copyfileobj(old, new, 8 * 2**20)
    _stamp(target, os.fstat(descriptor))


def _stamp(target: Path, like: os.stat_result) -> None:
    os.utime(target, ns=(like.st_atime_ns, like.st_mtime_ns))
