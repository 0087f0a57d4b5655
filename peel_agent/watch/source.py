"""Where checkpoints come from: a folder of this machine, or the copy of one in an object store."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from peel_agent.errors import StoreUnavailable
from peel_agent.records import CheckpointRef
from peel_agent.spi import Format
from peel_agent.watch.mirror import Mirror
from peel_agent.watch.nearby import nearby, of_folder
from peel_agent.watch.scan import scan
from peel_agent.watch.settle import Observed, Settling, Unread
from peel_agent.watch.units import ROOT


class Source(Protocol):
    """A watched place. `root` is where its checkpoints are on this machine, `label` what to call it.

    `away` says after a look why the place could not be seen, None when it was.
    """

    root: Path
    label: str
    away: str | None

    def look(self, now: float) -> Observed:
        """What is there at the time `now`, in Unix seconds."""

    def near(self) -> tuple[str, ...]:
        """Sentences on what is there instead, when the last look found nothing."""

    def done(self, ref: CheckpointRef) -> None:
        """The checkpoint is not needed any more."""


class Folder:
    """A folder that trainers write to; `settling` says when what is in it is at rest, `markers` what each must have."""

    def __init__(self, root: Path, formats: Sequence[Format], settling: Settling, markers: Sequence[str] = ()) -> None:
        self.root = root
        self.label = str(root)
        self.away: str | None = None
        self._formats = formats
        self._settling = settling
        self._markers = tuple(markers)

    def look(self, now: float) -> Observed:
        # An unmounted file system says nothing of what is on it.
        self.away = None if self.root.exists() else f"{self.label}: it is not there now"
        if self.away is not None:
            return Observed((), (Unread(self.label, "it is not there now"),), ())
        return self._settling.observe(scan(self.root, self._formats, self._markers), now)

    def near(self) -> tuple[str, ...]:
        return nearby(of_folder(self.root), str(self.root.resolve()), self._formats)

    def done(self, ref: CheckpointRef) -> None:
        """The trainer's own files stay."""


@dataclass
class Bucket:
    """A folder of an object store, seen through a mirror."""

    mirror: Mirror
    formats: Sequence[Format]
    settle_seconds: float
    newest_only: bool
    stopping: Callable[[], bool]

    def __post_init__(self) -> None:
        self.root = self.mirror.root
        self.label = self.mirror.url(ROOT)
        self._settling = Settling(0.0, 0.0)  # it settled, and had its markers, before it was copied
        self.away: str | None = None

    def look(self, now: float) -> Observed:
        try:
            synced = self.mirror.sync(now, self.settle_seconds, newest_only=self.newest_only, stopping=self.stopping)
        except StoreUnavailable as error:
            self.away = error.what
            waiting, refused = [Unread(self.label, error.what, error.remedy)], list[Unread]()
        else:
            self.away = None
            more = [Unread(self.label, "more checkpoints are to be fetched")] if synced.more else []
            waiting, refused = [*synced.waiting, *more], [*synced.refused]
        observed = self._settling.observe(scan(self.root, self.formats), now)
        for unread in observed.unreadable:
            self.mirror.drop(Path(unread.place))
        return Observed(
            ready=tuple(dataclasses.replace(ref, url=self._url(ref.path)) for ref in observed.ready),
            waiting=(*observed.waiting, *waiting),
            unreadable=(
                *(unread._replace(place=self._url(Path(unread.place))) for unread in observed.unreadable),
                *refused,
            ),
        )

    def near(self) -> tuple[str, ...]:
        return nearby(self.mirror.listing(), self.label, self.formats)

    def done(self, ref: CheckpointRef) -> None:
        self.mirror.drop(ref.path)

    def _url(self, path: Path) -> str:
        return self.mirror.url(path.relative_to(self.root).as_posix())
