"""What is in a watched folder, and one or two levels below it, when no checkpoint is found where they are looked for.

No link is followed, and a large tree is not looked through to its end.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from peel_agent.errors import printable
from peel_agent.records import Claim, LocalListing
from peel_agent.registry import claimed
from peel_agent.spi import Declining, Format
from peel_agent.watch.scan import LEVELS, STAGING

DEEPER = 2
"""How many levels below those that `scan` looks at."""

MAX_ENTRIES = 2_000
MAX_SENTENCES = 6
SHOWN = 3


@dataclass(frozen=True)
class _Entry:
    path: Path
    is_link: bool
    is_folder: bool


@dataclass
class _Seen:
    """What was met on the way down, in the order in which it was met."""

    below: dict[Path, list[str]] = field(default_factory=dict)
    declined: list[tuple[Path, Claim]] = field(default_factory=list)
    staged: list[Path] = field(default_factory=list)
    links: list[Path] = field(default_factory=list)
    left: int = MAX_ENTRIES


def nearby(root: Path, formats: Sequence[Format]) -> tuple[str, ...]:
    """Sentences that say what is there instead of checkpoints; none for an empty folder, or one that cannot be listed.

    To be asked when `scan` found nothing whole: a folder too high, a link, a folder of other things.
    """
    root = root.resolve()
    return misplaced(root, formats) or contents(root, formats)


def misplaced(root: Path, formats: Sequence[Format]) -> tuple[str, ...]:
    """Sentences on what only somebody's doing can mend: checkpoints further below, links; at most six."""
    seen = _Seen()
    _look(root.resolve(), formats, 0, seen)
    sentences = [_too_high(folder, names) for folder, names in seen.below.items()]
    sentences += [f"in {_shown(path.parent)}, {claim.fault}; {claim.remedy}" for path, claim in seen.declined]
    sentences += [
        f"{_shown(path)} has the name of a checkpoint that is still being put together" for path in seen.staged
    ]
    sentences += [_link(path) for path in seen.links]
    if len(sentences) > MAX_SENTENCES:
        return (*sentences[: MAX_SENTENCES - 1], f"and {len(sentences) - MAX_SENTENCES + 1} more such places")
    return tuple(sentences)


def contents(root: Path, formats: Sequence[Format]) -> tuple[str, ...]:
    """One sentence on what a folder holds when nothing of it is a checkpoint; none for an empty one."""
    entries = _entries(root.resolve(), MAX_ENTRIES)
    if not entries or any(_is_recognised(path, formats) for path in (root, *(entry.path for entry in entries))):
        return ()
    names = [entry.path.name + ("/" if entry.is_folder else "") for entry in entries]
    known = ", ".join(sorted(form.name for form in formats if not isinstance(form, Declining)))
    count = f"{len(names):,} entries" + (" or more" if len(names) >= MAX_ENTRIES else "")
    return (f"{_shown(root)} holds {count} ({_some(names)}), and no checkpoint of a format that is read: {known}",)


def _look(folder: Path, formats: Sequence[Format], level: int, seen: _Seen) -> None:
    """`level` is how far the folder is below the root."""
    entries = _entries(folder, seen.left)
    seen.left -= len(entries)
    for entry in entries:
        if entry.is_link:
            if level <= LEVELS:
                seen.links.append(entry.path)
        elif entry.is_folder and STAGING.fullmatch(entry.path.name):
            seen.staged.append(entry.path)
        elif not entry.path.name.startswith("."):
            _look_at(entry, formats, level, seen)


def _look_at(entry: _Entry, formats: Sequence[Format], level: int, seen: _Seen) -> None:
    """One file or folder that is no link. What is higher than the levels of `scan` is told by that."""
    winner = claimed(LocalListing(entry.path), formats)
    if winner is not None and level >= LEVELS:
        if winner[1].strength == "declined":
            seen.declined.append((entry.path, winner[1]))
        else:
            seen.below.setdefault(entry.path.parent, []).append(entry.path.name)
    elif winner is None and entry.is_folder and level < LEVELS + DEEPER - 1 and seen.left > 0:
        _look(entry.path, formats, level + 1, seen)


def _is_recognised(path: Path, formats: Sequence[Format]) -> bool:
    return claimed(LocalListing(path), formats) is not None


def _entries(folder: Path, most: int) -> list[_Entry]:
    """At most so many entries of a folder, in the order of their names; none of one that cannot be listed."""
    found: list[_Entry] = []
    try:
        with os.scandir(folder) as listed:
            for entry in listed:
                if len(found) >= most:
                    break
                found.append(_Entry(Path(entry.path), entry.is_symlink(), entry.is_dir(follow_symlinks=False)))
    except OSError:
        return []
    return sorted(found, key=lambda entry: entry.path.name)


def _too_high(folder: Path, names: Sequence[str]) -> str:
    what = "is a checkpoint" if len(names) == 1 else f"are {len(names)} checkpoints"
    return (
        f"in {_shown(folder)} there {what} ({_some(names)}): too deep to be seen from the folder that was given; "
        "give that one"
    )


def _link(path: Path) -> str:
    try:
        target = printable(str(path.readlink()))
    except OSError:
        target = "elsewhere"
    return f"{_shown(path)} is a link to {target}, and no link is followed: give the folder that it names"


def _some(names: Sequence[str]) -> str:
    more = ", ..." if len(names) > SHOWN else ""
    return printable(", ".join(names[:SHOWN])) + more


def _shown(path: Path) -> str:
    return printable(str(path))
