"""Files beside the ledger's own: whole, or as they were."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


def write_durably(path: Path, text: str) -> None:
    """The file has all of the text or its old content, whatever happens: temporary file, fsync, rename, fsync."""
    temporary = path.with_name(path.name + ".part")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def read_json(file: Path) -> dict[str, Any] | None:
    """The JSON object in a file; None for one that was removed or damaged."""
    try:
        form = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return form if isinstance(form, dict) else None
