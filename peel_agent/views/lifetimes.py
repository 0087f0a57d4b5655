"""Alerts as lifetimes: from the step that each is about to the step at which it ended."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

from peel_agent.records import Notice


@dataclass(frozen=True)
class Lifetime:
    """One alert: from step `since` until step `until`, None while it fires; None of both for one without steps."""

    rule: str
    subject: str
    severity: str
    since: int | None
    until: int | None
    is_over: bool
    text: str


def lifetimes(notices: Sequence[Notice]) -> tuple[Lifetime, ...]:
    """One for each alert, in the order in which they began; a notice that repeats one has its newest words."""
    lives: list[Lifetime] = []
    open_at: dict[tuple[str, str], int] = {}
    for notice in notices:
        key = (notice.rule, notice.subject)
        place = open_at.get(key)
        if notice.state == "resolved":
            if place is not None:
                lives[place] = dataclasses.replace(lives[place], until=notice.step, is_over=True)
                del open_at[key]
            continue
        if place is None:
            since = notice.step if notice.since_step is None else notice.since_step
            place = open_at[key] = len(lives)
            lives.append(Lifetime(*key, notice.severity, since, None, is_over=False, text=notice.text))
        lives[place] = dataclasses.replace(lives[place], severity=notice.severity, text=notice.text)
    return tuple(lives)
