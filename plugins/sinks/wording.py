"""A group of notices in words for people, fit for a mail or a chat: a few lines each, without control characters."""

from __future__ import annotations

from peel_agent.errors import printable
from peel_agent.records import Notice, NoticeGroup

LONGEST_NAME = 80


def headline(group: NoticeGroup) -> str:
    """One line: the run, how many alerts fire, and how many have ended."""
    firing = sum(notice.state == "firing" for notice in group.notices)
    resolved = len(group.notices) - firing
    run = printable(group.run)
    run = run if len(run) <= LONGEST_NAME else f"{run[:LONGEST_NAME]}..."
    return f"[peel-agent] {run}: {firing} firing, {resolved} resolved"


def paragraphs(group: NoticeGroup) -> tuple[str, ...]:
    """Each notice as a few lines: what it is about, what is the matter, likely causes, and what shows more."""
    return tuple("\n".join(_lines(notice)) for notice in group.notices)


def _lines(notice: Notice) -> list[str]:
    at = "" if notice.step is None else f" at step {notice.step}"
    title = f"{notice.state.upper()} ({notice.severity}) {notice.subject}{at} [{notice.rule}]"
    causes = ["Likely causes:", *(f"- {cause}" for cause in notice.causes)] if notice.causes else []
    unchecked = [f"Not checked: {'; '.join(notice.unchecked)}"] if notice.unchecked else []
    command = [f"More: {notice.command}"] if notice.command else []
    return [printable(line) for line in (title, *notice.text.splitlines(), *causes, *unchecked, *command)]
