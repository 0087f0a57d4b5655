"""What `peel-agent doctor` found out about one thing that a run needs."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Check:
    """One thing that was looked at: `what` it is, and in `words` what was found.

    `ok` is None where it could not be told. `remedy` says what to do; one that is not ok has one.
    """

    what: str
    ok: bool | None
    words: str
    remedy: str | None = None
