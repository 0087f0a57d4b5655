"""The end of `watch --once`: what was read, and where the findings are."""

from __future__ import annotations

from collections.abc import Callable

from peel_agent import registry
from peel_agent.dispatch import Dispatch
from peel_agent.errors import printable
from peel_agent.journal import Journal
from peel_agent.ledger import Lane, Ledger
from peel_agent.run import Run

DRAIN_SECONDS = 300.0
"""How long everything that is owed may take to be sent, or to fail, once."""


def tell_what_was_read(run: Run, journal: Journal) -> int:
    """0 when the run has reports; else 3, and why."""
    ledger, name = run.ledger, run.settings.name
    if ledger.count("peeled"):
        return 0
    formats = ", ".join(form.name for form in registry.formats(run.settings.watch.format))
    words = f"nothing readable in {run.source.label}: expected checkpoints of one of the formats {formats}"
    journal.tell("unreadable", f"{words}, such as checkpoint-N", run=name, level="error")
    for path, reason in ledger.refused():
        journal.tell("refused", f"refused: {printable(path)}: {reason}", run=name, level="error")
    return 3


def tell_where(
    dispatch: Dispatch,
    ledger: Ledger,
    journal: Journal,
    name_of: Callable[[str], str],
    *,
    stopping: Callable[[], bool],
) -> None:
    """Everything owed is sent once more, and where it is is told; or where that waits which could not be sent."""
    for end in dispatch.drain(DRAIN_SECONDS, stopping=stopping) or ():
        lane = Lane(**end["lane"])
        waiting = sum(ledger.outbox.owed().get(lane, (0, 0)))
        if waiting:
            words = f"{waiting} {lane.kind} are kept in {ledger.state_dir}, not yet in {end['where']}; "
            journal.tell("delivery failed", words + "the next `peel-agent watch` sends them", level="warning")
        elif end["sent"]:
            journal.tell("delivered", f"findings are in {end['where']}", run=name_of(lane.run))
