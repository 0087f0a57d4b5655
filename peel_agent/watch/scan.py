"""What is under the watched root now: every checkpoint that a format claims, whole or not."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from peel_agent.errors import ConfigurationError, PluginError
from peel_agent.records import LocalListing, Readiness
from peel_agent.registry import claimed, claims, failed
from peel_agent.spi import Format
from peel_agent.watch.links import REMEDY, NotFollowed, target_of
from peel_agent.watch.pins import FOLDER as PINS

STAGING = re.compile(
    r"(?:tmp|temp)[-_.].*|.*[-_.](?:tmp|temp|part|partial|incomplete|unfinished)(?:[-_.]\d+)?", re.IGNORECASE
)
"""Names under which checkpoints are put together before they are renamed; those are passed over."""

LEVELS = 1
"""How far below the root checkpoints are looked for. No deeper: the folders of two runs must not become one series."""


@dataclass(frozen=True)
class Sighting:
    """A path that a format claimed, and what that format says about it.

    `lacking` are the marker files of the configuration that are not in its folder.
    """

    path: Path
    format: str
    readiness: Readiness
    step: int | None
    lacking: tuple[str, ...] = ()


def scan(root: Path, formats: Sequence[Format], markers: Sequence[str] = ()) -> tuple[Sighting, ...]:
    """Every checkpoint at the root or directly below it, in absolute paths, those inside a folder before it.

    The format with the strongest claim has a path. A claimed folder is one checkpoint, so its files are not looked at
    again; its sub-folders are, because Trainer ends a run by saving the model beside its checkpoints: the
    `checkpoint-N` come first, then that last export. Hidden names are passed over. A link is followed one step (see
    `target_of`): what it leads to has its own path, and is seen once. What vanishes meanwhile is no error; a root that
    may not be listed is ConfigurationError. `markers` are names of files that a checkpoint's folder must have; a single
    file needs none.
    """
    root = root.resolve()
    if os.access(root, os.F_OK) and not os.access(root, os.R_OK):
        raise ConfigurationError(
            f"{root} may not be listed", remedy="give the user of peel-agent read and search permission on it"
        )
    return tuple(_Scan(root, formats, markers).sightings(LocalListing(root), LEVELS))


@dataclass(frozen=True)
class _Scan:
    root: Path
    formats: Sequence[Format]
    markers: Sequence[str]

    def sightings(self, listing: LocalListing, levels: int) -> Iterator[Sighting]:
        answer = claims(listing, self.formats)
        winner = answer.winner
        names = sorted(name for name in listing.names() if not is_aside(name)) if levels > 0 else []
        for name in names:
            if listing.is_link(name):
                continue
            if listing.is_folder_at(name):
                yield from self.sightings(listing.folder(name), levels - 1)
            elif winner is None:
                yield from self.sightings(listing.folder(name), 0)
        yield from self._behind_links(listing, [name for name in names if listing.is_link(name)])
        if winner is not None:
            yield self._sighting(listing, winner[0])
        elif answer.failure is not None and listing.path != self.root:  # what is in the root is asked for by itself
            yield _of_failure(listing, "", answer.failure)

    def _sighting(self, listing: LocalListing, form: Format) -> Sighting:
        try:
            readiness = inspected(listing, form)
            step = form.step(listing) if readiness.state == "complete" else None
        except Exception as error:  # somebody else's plug-in may raise anything; the others' checkpoints are still read
            return _of_failure(listing, form.name, failed(form, listing, error))
        return Sighting(listing.path, form.name, readiness, step, _lacking(listing, self.markers))

    def _behind_links(self, folder: LocalListing, names: Sequence[str]) -> Iterator[Sighting]:
        seen: set[Path] = set()
        for name in names:
            link = folder.path / name
            try:
                target = target_of(link, self.root)
            except NotFollowed as answer:
                yield from self._refused(link, str(answer))
                continue
            is_seen = target.path in seen or target.path.parent == folder.path
            seen.add(target.path)
            if not is_seen and not is_aside(target.name):
                yield from self.sightings(target, 0)

    def _refused(self, link: Path, reason: str) -> Iterator[Sighting]:
        """A link that is not followed, when there is a checkpoint behind it that is not seen otherwise."""
        real = Path(os.path.realpath(link))
        if real.is_dir() and real.parent != link.parent and not self.root.is_relative_to(real):
            winner = claimed(LocalListing(real), self.formats)
            if winner is not None:
                yield Sighting(link, winner[0].name, Readiness("damaged", f"{link.name} {reason}", remedy=REMEDY), None)


def _of_failure(listing: LocalListing, format_name: str, failure: PluginError) -> Sighting:
    return Sighting(listing.path, format_name, Readiness("damaged", failure.what, remedy=failure.remedy), None)


def inspected(listing: LocalListing, form: Format) -> Readiness:
    """What a format says of a path; of a folder that may not be listed, that, and how to mend it."""
    listing.names()
    if listing.denied:
        return Readiness(
            "incomplete",
            f"{listing.path} may not be listed",
            remedy="give the user that peel-agent runs as the right to list and search it (chmod, setfacl)",
        )
    return form.inspect(listing)


def _lacking(listing: LocalListing, markers: Sequence[str]) -> tuple[str, ...]:
    """The markers that are not in a folder; a file needs none."""
    return tuple(name for name in markers if name not in listing.names()) if markers and listing.is_folder else ()


def is_aside(name: str) -> bool:
    """True for a name that is passed over: hidden, our own, or that of a checkpoint still being put together."""
    return name.startswith(".") or name == PINS or STAGING.fullmatch(name) is not None
