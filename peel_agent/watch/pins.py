"""Holds on to the files of a checkpoint until it is peeled, by links or copies in a private folder.

A rotated checkpoint can then still be read, by the next start of the agent too. A hard link shows whatever the trainer
writes into the file later; a file that is rewritten in place is therefore held by a copy.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import fcntl
import hashlib
import json
import os
import shutil
import stat
from collections.abc import Callable
from pathlib import Path

from peel_agent.errors import NoRoom, TornCheckpoint
from peel_agent.mounts import same_mount
from peel_agent.records import CheckpointRef, FileStamp, plain, restored
from peel_agent.watch.reserve import ROOM, USUAL, Reserve

FOLDER = "_peel_agent_pins"
"""Inside the watched root, when state and root are on different file systems. transformers uploads no name with `_`."""

COMPANIONS = ("config.json", "tokenizer.json")
"""Kept too where they lie in the checkpoint or beside it: several checkpoints of a run may share them."""

MAX_COMPANION = 64 * 2**20

NO_LINK = "a link cannot lead from one mount or file system to another, and the watched one may only be read"

PIECE = 8 * 2**20
"""Bytes that are copied at once."""

_FICLONE = 0x40049409  # linux/fs.h: the new file shares the old one's blocks until either is written

Keep = Callable[[int, Path, Path], None]
"""Makes the third path hold what the open file, which is at the second path, holds now."""


class Pins:
    """A folder of pins for one watched root, with one owner.

    `folder` is in `state_dir` when its files may be links to the root's, or when the root may not be written to; or
    else it is in the root itself. What was held for the state folder `earlier` is taken over.
    """

    def __init__(self, root: Path, state_dir: Path, earlier: Path | None = None, reserve: Reserve = USUAL) -> None:
        self._reserve = reserve
        is_apart = root.exists() and not same_mount(state_dir, root)
        if is_apart and os.access(_folder_of(root), os.W_OK):
            self.folder = _beside(root, state_dir)
        else:
            self.folder = state_dir / "pins"
        self.why_not: str | None = None
        """Why the checkpoint that was pinned last is not held; None when it is."""
        # Whoever may write to the root could make it a link to anywhere.
        self._usable = not self.folder.parent.is_symlink() and not self.folder.is_symlink()
        if earlier is not None and self._usable and self.folder.parent.name == FOLDER and not self.folder.exists():
            with contextlib.suppress(OSError):  # there is mostly none
                _beside(root, earlier).rename(self.folder)

    def pin(
        self, ref: CheckpointRef, *, copy: bool = False, stopping: Callable[[], bool] = lambda: False
    ) -> CheckpointRef:
        """The same checkpoint with its files held; not held, and `why_not` says why, where that cannot be done.

        They are held by reflinks; where the file system has none, by hard links, or with `copy` by copies, which end
        when the agent is `stopping`. Raises TornCheckpoint when the files are not those of the reference any more, and
        NoRoom when a copy would not leave the reserve free.
        """
        self.why_not = None
        if not self._usable:
            self.why_not = f"{self.folder} is a link"
            return ref.released()
        try:
            pinned = _kept(ref, self.folder / ref.fingerprint, self._copying(ref, stopping) if copy else _link)
        except OSError as error:
            self.why_not = NO_LINK if error.errno == errno.EXDEV else error.strerror or str(error)
            return ref.released()
        try:
            self._note(pinned)
        except OSError as error:
            self.release(pinned)
            self.why_not = error.strerror or str(error)
            return ref.released()
        return pinned

    def _copying(self, ref: CheckpointRef, stopping: Callable[[], bool]) -> Keep:
        """Copies files, once there is known to be room for all of the checkpoint."""
        size, has_room = sum(stamp.size for stamp in ref.own_files), False

        def keep(descriptor: int, _source: Path, target: Path) -> None:
            nonlocal has_room
            if _cloned(descriptor, target):
                return
            has_room = has_room or self._reserve.leaves_room(target.parent, size)
            if not has_room:
                raise NoRoom(f"{self.folder} has no room for a copy of {ref.label}", remedy=ROOM)
            _copy(descriptor, target, stopping)

        return keep

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

    def is_whole(self, ref: CheckpointRef) -> bool:
        """Whether the files that are to be read of a checkpoint still are its own."""
        folder = _folder_of(ref.in_place().path)
        try:
            return not any(_not((folder / stamp.name).stat(), stamp) for stamp in ref.own_files)
        except OSError:
            return False

    def release(self, ref: CheckpointRef) -> None:
        """The files are not needed any more."""
        _forget(self.folder / ref.fingerprint)
        self._tidy()

    def release_all(self, but: tuple[CheckpointRef, ...] = ()) -> None:
        """No file is held any more `but` those of some checkpoints."""
        if not self._usable:
            return
        kept = {f"{ref.fingerprint}{end}" for ref in but for end in ("", ".json")}
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
        """Whether less than the reserve is free where the pins are: the training needs what is left."""
        try:
            return not self._reserve.leaves_room(self.folder)
        except OSError:
            return False


def _beside(root: Path, state_dir: Path) -> Path:
    """The folder of pins of a state folder inside a watched root."""
    return _folder_of(root) / FOLDER / hashlib.sha256(str(state_dir.resolve()).encode()).hexdigest()[:12]


def _folder_of(place: Path) -> Path:
    return place if place.is_dir() else place.parent


def _kept(ref: CheckpointRef, home: Path, keep: Keep) -> CheckpointRef:
    held = home / ref.path.name
    _forget(home)
    try:
        home.mkdir(parents=True)
        _keep_files(ref, held, keep)
    except OSError as error:
        _forget(home)
        if not ref.path.exists():
            raise TornCheckpoint(f"{ref.path} was removed", remedy="nothing to do: it is gone") from error
        raise
    except BaseException:
        _forget(home)
        raise
    return dataclasses.replace(ref, held=held)


def _forget(home: Path) -> None:
    shutil.rmtree(home, ignore_errors=True)
    for file in (home, home.with_name(f"{home.name}.json")):
        with contextlib.suppress(OSError):
            file.unlink(missing_ok=True)


def _keep_files(ref: CheckpointRef, held: Path, keep: Keep) -> None:
    is_folder = ref.path.is_dir()
    source_folder, held_folder = (ref.path, held) if is_folder else (ref.path.parent, held.parent)
    held_folder.mkdir(exist_ok=True)
    for stamp in ref.own_files:
        target = held_folder / stamp.name
        target.parent.mkdir(parents=True, exist_ok=True)
        if not _keep(source_folder, stamp.name, target, keep, stamp=stamp):
            raise TornCheckpoint(f"{ref.path}: {stamp.name} changed", remedy="it is read again once it is at rest")
    for source, target in (
        ((source_folder, held_folder), (source_folder.parent, held_folder.parent))
        if is_folder
        else ((source_folder, held_folder),)
    ):
        for name in COMPANIONS:
            if not (target / name).exists():
                with contextlib.suppress(FileNotFoundError):
                    _keep(source, name, target / name, keep)


def _keep(folder: Path, name: str, target: Path, keep: Keep, *, stamp: FileStamp | None = None) -> bool:
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
    if not _cloned(descriptor, target):
        os.link(source, target, follow_symlinks=False)


def _cloned(descriptor: int, target: Path) -> bool:
    """Whether the file system could make a reflink."""
    try:
        with target.open("xb") as new:
            fcntl.ioctl(new.fileno(), _FICLONE, descriptor)
        _stamp(target, os.fstat(descriptor))
    except OSError:
        target.unlink(missing_ok=True)
        return False
    return True


def _copy(descriptor: int, target: Path, stopping: Callable[[], bool]) -> None:
    with os.fdopen(os.dup(descriptor), "rb", buffering=0) as old, target.open("xb") as new:
        while piece := old.read(PIECE):
            if stopping():
                raise OSError(errno.ECANCELED, "the agent ends")
            new.write(piece)
    _stamp(target, os.fstat(descriptor))


def _stamp(target: Path, like: os.stat_result) -> None:
    """Gives the target the times of the file that it holds; they tell one save from the next."""
    os.utime(target, ns=(like.st_atime_ns, like.st_mtime_ns))
    if target.stat().st_mtime_ns != like.st_mtime_ns:
        raise OSError(errno.ENOTSUP, "its file system rounds modification times")
