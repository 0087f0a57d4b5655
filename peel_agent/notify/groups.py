"""All that is told at one moment, as one group for each sink that is to get any of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from hashlib import sha256

from peel_agent.notify.tell import in_text
from peel_agent.records import Debt, Notice, NoticeGroup, Rule, plain


def to_sinks(
    notices: Sequence[Notice], sinks: Sequence[str], rules: Sequence[Rule], *, run: str, at: float
) -> tuple[Debt, ...]:
    """The group that each sink is owed for one moment `at`, in Unix seconds.

    A rule that names sinks is told to those; any other, and one that is not configured any more, to all.
    """
    named = {rule.name: rule.sinks for rule in rules if rule.sinks is not None}
    debts = []
    for sink in sinks:
        for_sink = [notice for notice in notices if sink in named.get(notice.rule, (sink,))]
        if for_sink:
            body = group(for_sink, run=run, at=at)
            debts.append(Debt(sink, "notices", body.id, plain(body)))
    return tuple(debts)


def still_firing(
    notices: Sequence[Notice], sink: str, rules: Sequence[Rule], *, run: str, at: float
) -> tuple[Debt, ...]:
    """All that goes on firing, for a sink that is to be told again and again; only the last such group is owed."""
    return tuple(
        replace(debt, key="standing", replaces=True, body={**debt.body, "standing": True})
        for debt in to_sinks(notices, [sink], rules, run=run, at=at)
    )


def group(notices: Sequence[Notice], *, run: str, at: float) -> NoticeGroup:
    """Notices of one moment; the same ones have the same id."""
    return NoticeGroup(
        id=sha256("".join([run, *(notice.id for notice in notices)]).encode()).hexdigest()[:16],
        run=run,
        at=at,
        notices=tuple(notices),
        text="\n".join(in_text(notice, run) for notice in notices),
    )
