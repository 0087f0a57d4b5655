"""Real text that every Python has: the standard library's own sources, as bytes; some files held out for the probe."""

from __future__ import annotations

import sysconfig
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from peel_agent.records import TokenIds

VOCABULARY = 256
HELD_OUT_EVERY = 8
_PACKAGES = (".", "asyncio", "email", "http", "json", "logging", "unittest", "xml")


def corpus() -> tuple[TokenIds, TokenIds]:
    """Training and held-out token ids (one a byte, int64, 1-D), split by file."""
    import numpy as np

    root = Path(sysconfig.get_path("stdlib"))
    files = [path for package in _PACKAGES for path in sorted((root / package).glob("*.py"))]
    held_out = files[::HELD_OUT_EVERY]
    training = [path for path in files if path not in set(held_out)]

    def joined(paths: list[Path]) -> TokenIds:
        data = b"".join(path.read_bytes() for path in paths)
        return np.frombuffer(data, dtype=np.uint8).astype(np.int64)

    return joined(training), joined(held_out)
