"""What is in a watched place, and one or two levels below it, when no checkpoint is found where they are looked for.

Nothing behind a link is looked at, and a large tree is not looked through to its end.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from peel_agent.errors import printable
from peel_agent.records import Claim, Listing, LocalListing
from peel_agent.registry import claimed
from peel_agent.spi import Declining, Format
from peel_agent.watch.links import NotFollowed, target_of
from peel_agent.watch.scan import LEVELS, STAGING

DEEPER = 2
"""How many levels below those that `scan` looks at."""

MAX_ENTRIES = 2_000
MAX_SENTENCES = 6
SHOWN = 3


@dataclass
class _Seen:
    """What was met on the way down from `root`, in the order in which it was met, by the places' names."""

    root: Path | None
    formats: Sequence[Format]
    below: dict[str, list[str]] = field(default_factory=dict)
    declined: list[tuple[str, Claim]] = field(default_factory=list)
    staged: list[str] = field(default_factory=list)
    links: list[str] = field(default_factory=list)
    left: int = MAX_ENTRIES


def of_folder(root: Path) -> LocalListing:
    """A folder of this machine to be looked at here: not to the end of one with many entries."""
    return LocalListing(root.resolve(), most=MAX_ENTRIES)


def nearby(root: Listing, label: str, formats: Sequence[Format]) -> tuple[str, ...]:
    """Sentences that say what is there instead of checkpoints; none for an empty place, or one that cannot be listed.

    To be asked when nothing whole was found: a folder too high, a link that is not followed, a folder of other things.
    `label` is what to call the place.
    """
    return misplaced(root, label, formats) or contents(root, label, formats)


def misplaced(root: Listing, label: str, formats: Sequence[Format]) -> tuple[str, ...]:
    """Sentences on what only somebody's doing can mend: checkpoints further below, links; at most six."""
    seen = _Seen(root.path if isinstance(root, LocalListing) else None, formats)
    _look(root, label, 0, seen)
    sentences = [_too_high(folder, names) for folder, names in seen.below.items()]
    sentences += [f"in {printable(place)}, {claim.fault}; {claim.remedy}" for place, claim in seen.declined]
    sentences += [
        f"{printable(place)} has the name of a checkpoint that is still being put together" for place in seen.staged
    ]
    sentences += seen.links
    if len(sentences) > MAX_SENTENCES:
        return (*sentences[: MAX_SENTENCES - 1], f"and {len(sentences) - MAX_SENTENCES + 1} more such places")
    return tuple(sentences)


def contents(root: Listing, label: str, formats: Sequence[Format]) -> tuple[str, ...]:
    """One sentence on what a folder holds when nothing of it is a checkpoint; none for an empty one."""
    names = sorted(root.names())
    listings = (root, *(root.folder(name) for name in names))
    if not names or any(claimed(listing, formats) is not None for listing in listings):
        return ()
    shown = [name + ("/" if _is_folder(root, name) else "") for name in names]
    known = ", ".join(sorted(form.name for form in formats if not isinstance(form, Declining)))
    count = f"{len(names):,} entries" + (" or more" if len(names) >= MAX_ENTRIES else "")
    return (f"{printable(label)} holds {count} ({_some(shown)}), and no checkpoint of a format that is read: {known}",)


def _look(folder: Listing, label: str, level: int, seen: _Seen) -> None:
    """`level` is how far the folder is below the root."""
    names = sorted(folder.names())[: seen.left]
    seen.left -= len(names)
    for name in names:
        place = f"{label}/{name}"
        if folder.is_link(name):
            if level <= LEVELS and isinstance(folder, LocalListing) and seen.root is not None:
                seen.links.append(_link(folder.path / name, seen.root))
        elif _is_folder(folder, name) and STAGING.fullmatch(name):
            seen.staged.append(place)
        elif not name.startswith("."):
            _look_at(folder, name, label, level, seen)


def _look_at(folder: Listing, name: str, label: str, level: int, seen: _Seen) -> None:
    """One file or folder that is no link. What is no deeper than `scan` looks is told by that."""
    winner = claimed(folder.folder(name), seen.formats)
    if winner is not None and level >= LEVELS:
        if winner[1].strength == "declined":
            seen.declined.append((label, winner[1]))
        else:
            seen.below.setdefault(label, []).append(name)
    elif winner is None and _is_folder(folder, name) and level < LEVELS + DEEPER - 1 and seen.left > 0:
        _look(folder.folder(name), f"{label}/{name}", level + 1, seen)


def _is_folder(folder: Listing, name: str) -> bool:
    return folder.is_folder_at(name) and not folder.is_link(name)


def _too_high(folder: str, names: Sequence[str]) -> str:
    what = "is a checkpoint" if len(names) == 1 else f"are {len(names)} checkpoints"
    return (
        f"in {printable(folder)} there {what} ({_some(names)}): too deep to be seen from the folder that was given; "
        "give that one"
    )


def _link(link: Path, root: Path) -> str:
    try:
        target = target_of(link, root).path
    except NotFollowed as answer:
        return f"{printable(str(link))} {answer}: give the folder that it names"
    return f"{printable(str(link))} is a link to {printable(str(target))}, which is no checkpoint: give that folder"


def _some(names: Sequence[str]) -> str:
    more = ", ..." if len(names) > SHOWN else ""
    return printable(", ".join(names[:SHOWN])) + more
