"""The empty file in a checkpoint's folder that says that the save is whole."""

from __future__ import annotations

import logging
import os
from pathlib import Path, PurePath

from peel_agent.errors import ConfigurationError

STABLE = "STABLE"
"""What the marker is called, unless the user says otherwise."""

_log = logging.getLogger("peel_agent.callbacks")


class Marker:
    """A file of this name, for `[watch] ready_markers`; without a name, none is written.

    Raises ConfigurationError for a name that is no file's name. What fails later is logged and ends no training.
    """

    def __init__(self, name: str | None) -> None:
        if name and (PurePath(name).name != name or name == ".."):
            raise ConfigurationError(
                f"the marker {name!r} is no file name",
                remedy=f"give a name without folders, such as {STABLE}, and the same under [watch] ready_markers",
            )
        self._name = name or ""

    def is_in(self, folder: Path) -> bool:
        return bool(self._name) and (folder / self._name).exists()

    def write(self, folder: Path) -> None:
        """Marks the checkpoint in `folder`. An empty file is there in one step: nobody can see a part of it."""
        if not self._name:
            return
        try:
            os.close(os.open(folder / self._name, os.O_CREAT | os.O_WRONLY, 0o644))
        except OSError as error:
            _log.warning(
                "%s cannot be marked with %s: %s; a sidecar with [watch] ready_markers will not read it until you make "
                "that empty file by hand",
                folder, self._name, error,
            )  # fmt: skip

    def remove(self, folder: Path) -> None:
        """Takes the marker away from a checkpoint that is about to be saved over."""
        if not self._name:
            return
        try:
            (folder / self._name).unlink(missing_ok=True)
        except OSError as error:
            _log.warning(
                "the marker of an earlier save, %s, cannot be removed: %s; remove it by hand, or a sidecar may "
                "read the checkpoint before it is whole",
                folder / self._name, error,
            )  # fmt: skip
