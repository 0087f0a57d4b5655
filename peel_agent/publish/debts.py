"""What each destination is owed, frozen."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from hashlib import sha256

from peel_agent.records import Debt, Notice, NoticeGroup, Publication, plain


def to_trackers(sent: Publication, trackers: Sequence[str], *, key: str, with_alerts: bool) -> tuple[Debt, ...]:
    """A publication for each tracker: its numbers and tags in one lane, its files in another.

    With `with_alerts` the log of alerts is one of the files.
    """
    numbers = plain(dataclasses.replace(sent, files={}))
    files = plain(dataclasses.replace(sent, metrics={}, tags={}))
    debts = []
    for tracker in trackers:
        if sent.metrics or sent.tags:
            debts.append(Debt(tracker, "numbers", key, numbers))
        if sent.files or with_alerts:
            debts.append(Debt(tracker, "files", key, files, with_alerts=with_alerts))
    return tuple(debts)


def to_sinks(notices: Sequence[Notice], sinks: Sequence[str], *, run: str, at: float) -> tuple[Debt, ...]:
    """All notices of one moment `at`, in Unix seconds, for each sink."""
    if not notices:
        return ()
    group = NoticeGroup(
        id=sha256("".join([run, *(notice.id for notice in notices)]).encode()).hexdigest()[:16],
        run=run,
        at=at,
        notices=tuple(notices),
        text="\n".join(f"{run}: {notice.state}: {notice.text}" for notice in notices),
    )
    return tuple(Debt(sink, "notices", group.id, plain(group)) for sink in sinks)
