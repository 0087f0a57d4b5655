"""What each tracker is owed, frozen."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from peel_agent.records import Debt, Publication, plain

PAGES = "pages"
"""The key of pages: of several that are owed only the last is made."""


def to_those_that_show(trackers: Sequence[str]) -> tuple[Debt, ...]:
    """The page and the images of a run for each tracker that shows them."""
    return tuple(
        Debt(name, "pages", PAGES, {}, with_alerts=True, replaces=True, with_history=True) for name in trackers
    )


def to_trackers(sent: Publication, trackers: Sequence[str], *, key: str, with_alerts: bool) -> tuple[Debt, ...]:
    """A publication for each tracker: its numbers and tags in one lane, its files in another.

    With `with_alerts` the log of alerts is one of the files.
    """
    numbers = plain(dataclasses.replace(sent, files={}))
    files = plain(dataclasses.replace(sent, metrics={}, tags={}, headline="", training_ended=False))
    debts = []
    for tracker in trackers:
        if sent.metrics or sent.tags or sent.training_ended:
            debts.append(Debt(tracker, "numbers", key, numbers))
        if sent.files or with_alerts:
            debts.append(Debt(tracker, "files", key, files, with_alerts=with_alerts))
    return tuple(debts)
