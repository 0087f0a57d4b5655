"""What is under the watched root now: every checkpoint that a format recognises, whole or not."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from peel_agent.errors import ConfigurationError
from peel_agent.records import LocalListing, Readiness
from peel_agent.registry import claimed
from peel_agent.spi import Format
from peel_agent.watch.pins import FOLDER as PINS

STAGING = re.compile(
    r"(?:tmp|temp)[-_.].*|.*[-_.](?:tmp|temp|part|partial|incomplete|unfinished)(?:[-_.]\d+)?", re.IGNORECASE
)
"""Names under which checkpoints are put together before they are renamed; those are passed over."""

LEVELS = 1
"""How far below the root checkpoints are looked for. No deeper: the folders of two runs must not become one series."""


@dataclass(frozen=True)
class Sighting:
    """A path that a format recognised, and what that format says about it.

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
    `checkpoint-N` come first, then that last export. Links and hidden names are passed over: what is inside the root
    is found under its own name. What vanishes meanwhile is no error; a root that may not be listed is
    ConfigurationError. `markers` are names of files that a checkpoint's folder must have; a single file needs none.
    """
    root = root.resolve()
    if os.access(root, os.F_OK) and not os.access(root, os.R_OK):
        raise ConfigurationError(
            f"{root} may not be listed", remedy="give the user of peel-agent read and search permission on it"
        )
    return tuple(_sightings(LocalListing(root), formats, LEVELS, markers))


def _sightings(
    listing: LocalListing, formats: Sequence[Format], levels: int, markers: Sequence[str]
) -> Iterator[Sighting]:
    winner = claimed(listing, formats)
    for name in _children(listing) if levels > 0 else ():
        if listing.is_folder_at(name):
            yield from _sightings(listing.folder(name), formats, levels - 1, markers)
        elif winner is None:
            yield from _sightings(listing.folder(name), formats, 0, markers)
    if winner is not None:
        form = winner[0]
        readiness = form.inspect(listing)
        step = form.step(listing) if readiness.state == "complete" else None
        yield Sighting(listing.path, form.name, readiness, step, _lacking(listing, markers))


def _lacking(listing: LocalListing, markers: Sequence[str]) -> tuple[str, ...]:
    """The markers that are not in a folder; a file needs none."""
    return tuple(name for name in markers if name not in listing.names()) if markers and listing.is_folder else ()


def is_aside(name: str) -> bool:
    """True for a name that is passed over: hidden, our own, or that of a checkpoint still being put together."""
    return name.startswith(".") or name == PINS or STAGING.fullmatch(name) is not None


def _children(folder: LocalListing) -> list[str]:
    """Each child that is no link, not hidden and not still put together."""
    return sorted(name for name in folder.names() if not is_aside(name) and not folder.is_link(name))
