"""What the watch room finds."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Literal


@dataclass(frozen=True)
class FileStamp:
    """One file of a checkpoint as seen in its directory entry: enough to notice a later change.

    `name` is relative to the checkpoint's folder. An absolute one is of a file elsewhere that the weights are made of
    too, such as an adapter's base model: it is watched for changes, and neither held nor copied with the checkpoint.
    """

    name: str
    size: int
    mtime_ns: int
    inode: int

    @property
    def is_elsewhere(self) -> bool:
        """Whether the file is none of the checkpoint's own."""
        return self.name.startswith("/")


@dataclass(frozen=True)
class Readiness:
    """What a format plug-in found at a path.

    `complete`: marker parses and every indexed file has its expected size. `incomplete`: may still become complete.
    `damaged`: never will, whatever is written next. `reason` names the file and the two values that disagree, `remedy`
    says what to do. `beside` says what is there too and is not read, of a checkpoint that is.
    """

    state: Literal["complete", "incomplete", "damaged"]
    reason: str
    files: tuple[FileStamp, ...] = ()
    remedy: str = ""
    beside: str = ""


@dataclass(frozen=True)
class CheckpointRef:
    """A checkpoint that was whole when it was last looked at.

    `step` is the training step (None when nothing in the checkpoint says so), `committed_at` the newest modification
    time of its own files in Unix seconds, `fingerprint` a digest of names, sizes and times of all of `files`. `held` is
    the path of a private copy, linked or real, that is to be read instead of `path`, if there is one. `url` is where it
    is in an object store, if it came from one. `beside` is as of its Readiness.
    """

    path: Path
    step: int | None
    format: str
    fingerprint: str
    committed_at: float
    files: tuple[FileStamp, ...] = ()
    held: Path | None = None
    url: str | None = None
    beside: str = ""

    @property
    def own_files(self) -> tuple[FileStamp, ...]:
        """The files of the checkpoint itself: what is held, copied and counted."""
        return tuple(stamp for stamp in self.files if not stamp.is_elsewhere)

    @property
    def label(self) -> str:
        """What to call it: its URL or path."""
        return self.url or str(self.path)

    def released(self) -> CheckpointRef:
        """The reference without its private copy."""
        return dataclasses.replace(self, held=None)

    def in_place(self) -> CheckpointRef:
        """The reference whose `path` is where its files are to be read."""
        return self if self.held is None else dataclasses.replace(self, path=self.held, held=None)
