"""What is under the watched root now: every checkpoint that a format recognises, whole or not."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from peel_agent.errors import ConfigurationError
from peel_agent.records import Readiness
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

    The first format that recognises a path has it. A recognised folder is one checkpoint, so its files are not looked
    at again; its sub-folders are, because Trainer ends a run by saving the model beside its checkpoints: the
    `checkpoint-N` come first, then that last export. Links and hidden names are passed over: what is inside the root
    is found under its own name. What vanishes meanwhile is no error; a root that may not be listed is
    ConfigurationError. `markers` are names of files that a checkpoint's folder must have; a single file needs none.
    """
    root = root.resolve()
    if os.access(root, os.F_OK) and not os.access(root, os.R_OK):
        raise ConfigurationError(
            f"{root} may not be listed", remedy="give the user of peel-agent read and search permission on it"
        )
    return tuple(_sightings(root, formats, LEVELS, markers))


def _sightings(path: Path, formats: Sequence[Format], levels: int, markers: Sequence[str]) -> Iterator[Sighting]:
    form = next((candidate for candidate in formats if candidate.recognise(path)), None)
    for child, is_folder in _children(path) if levels > 0 else ():
        if is_folder:
            yield from _sightings(child, formats, levels - 1, markers)
        elif form is None:
            yield from _sightings(child, formats, 0, markers)
    if form is not None:
        readiness = form.inspect(path)
        step = form.step(path) if readiness.state == "complete" else None
        yield Sighting(path, form.name, readiness, step, _lacking(path, markers) if markers else ())


def _lacking(path: Path, markers: Sequence[str]) -> tuple[str, ...]:
    """The markers that are not in a folder; all of them when it cannot be seen now. A file needs none."""
    try:
        return tuple(name for name in markers if not (path / name).exists()) if path.is_dir() else ()
    except OSError:
        return tuple(markers)


def _is_aside(name: str) -> bool:
    return name.startswith(".") or name == PINS or STAGING.fullmatch(name) is not None


def _children(folder: Path) -> list[tuple[Path, bool]]:
    """Each child that is no link, not hidden and not still put together, and whether it is a folder.

    None when the folder vanished.
    """
    try:
        with os.scandir(folder) as entries:
            return sorted(
                (Path(entry.path), entry.is_dir(follow_symlinks=False))
                for entry in entries
                if not _is_aside(entry.name) and not entry.is_symlink()
            )
    except OSError:
        return []
