"""What stays free of a file system for the training, before the agent holds, copies or fetches a checkpoint."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

GIB = 2**30

USUAL_MOST = 50 * GIB

ROOM = "make room there, or lower [watch] keep_free_gb"
"""What to do where it would not stay free."""


@dataclass(frozen=True)
class Reserve:
    """`gib` GiB of any file system; None is a tenth of each, at most 50 GiB."""

    gib: float | None = None

    def of(self, total: int) -> int:
        """Bytes that stay free of a file system of `total` bytes; they may be more than it has."""
        return min(total // 10, USUAL_MOST) if self.gib is None else int(self.gib * GIB)

    def leaves_room(self, folder: Path, size: int = 0) -> bool:
        """Whether it stays free of the folder's file system beside `size` bytes more. Raises OSError."""
        usage = shutil.disk_usage(folder)
        return usage.free - size >= self.of(usage.total)


USUAL = Reserve()
