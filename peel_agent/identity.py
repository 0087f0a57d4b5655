"""What makes a run, and an agent, the same at its next start."""

from __future__ import annotations

import hashlib
import json
import re


def run_key(name: str, place: str, pinned: str) -> str:
    """The run's key in the ledger, and its folder's name: from its name, its place, and what the user pinned.

    No other option of a tracker counts: a rotated password or a second tracker must not orphan what is known.
    """
    digest = hashlib.sha256(json.dumps([name, place, pinned]).encode()).hexdigest()[:8]
    return f"{re.sub(r'[^A-Za-z0-9._-]', '_', name)[:60]}-{digest}"
