"""Links in a watched folder: one is followed one step, to a plain folder, where nobody can lead the agent astray."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from peel_agent.errors import printable
from peel_agent.records import LocalListing

REMEDY = "put the folder itself there, or watch the folder that it is in"


class NotFollowed(Exception):
    """A link that is not followed, and why; the reason ends a sentence that begins with the link's name."""


def target_of(link: Path, root: Path) -> LocalListing:
    """The plain folder that a link in the watched folder `root` names; raises NotFollowed.

    Whoever may write to the watched folder could else have the agent read, and publish numbers of, what they may not
    read: the folder must belong to the owner of the watched one. It is no link, and does not hold the watched folder.
    """
    try:
        named = link.parent / link.readlink()
        folder = Path(os.path.realpath(named.parent)) / named.name if named.name not in ("", "..") else None
        if folder is None or folder == root or root.is_relative_to(folder):
            raise NotFollowed(f"is a link to {_shown(named)}, which leads back to the watched folder")
        status = folder.lstat()
        owner = root.stat().st_uid
    except OSError as error:
        raise NotFollowed(f"is a link that leads nowhere ({error.strerror})") from error
    if stat.S_ISLNK(status.st_mode):
        raise NotFollowed(f"is a link to {_shown(named)}, which is itself a link, and one step is followed")
    if not stat.S_ISDIR(status.st_mode):
        raise NotFollowed(f"is a link to {_shown(named)}, which is no folder, and only those to folders are followed")
    if status.st_uid != owner:
        raise NotFollowed(f"is a link to {_shown(named)}, which belongs to another user than the watched folder")
    return LocalListing(folder)


def _shown(path: Path) -> str:
    return printable(str(path))
