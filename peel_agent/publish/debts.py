"""What each tracker is owed, frozen."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from peel_agent.records import Debt, Publication, plain


def to_trackers(sent: Publication, trackers: Sequence[str], *, key: str, with_alerts: bool) -> tuple[Debt, ...]:
    """A publication for each tracker: its numbers and tags in one lane, its files in another.

    With `with_alerts` the log of alerts is one of the files.
    """
    numbers = plain(dataclasses.replace(sent, files={}))
    files = plain(dataclasses.replace(sent, metrics={}, tags={}, headline=""))
    debts = []
    for tracker in trackers:
        if sent.metrics or sent.tags:
            debts.append(Debt(tracker, "numbers", key, numbers))
        if sent.files or with_alerts:
            debts.append(Debt(tracker, "files", key, files, with_alerts=with_alerts))
    return tuple(debts)
