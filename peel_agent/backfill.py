"""The end of `watch --once`: what was read, and where the findings are."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

from peel_agent import registry
from peel_agent.dispatch import Dispatch
from peel_agent.errors import printable
from peel_agent.journal import Journal
from peel_agent.ledger import Lane
from peel_agent.run import Run
from peel_agent.spi import Declining

DRAIN_SECONDS = 300.0
"""How long everything that is owed may take to be sent, or to fail, once."""


def end(
    runs: Iterable[Run],
    dispatch: Dispatch,
    journal: Journal,
    name_of: Callable[[str], str],
    *,
    stopping: Callable[[], bool],
) -> int:
    """Tells what was read and where it is. The exit status: 0; 3 nothing readable; 1 not everything could be sent."""
    of_runs = list(runs)
    status = tell_where(dispatch, of_runs[0].ledger.folder.parent.parent, journal, name_of, stopping=stopping)
    return max(status, *(tell_what_was_read(run, journal) for run in of_runs))


def tell_what_was_read(run: Run, journal: Journal) -> int:
    """0 when the run has reports; else 3, and why."""
    ledger, name = run.ledger, run.settings.name
    if ledger.count("peeled"):
        return 0
    read = (form for form in registry.formats(run.settings.watch.format) if not isinstance(form, Declining))
    formats = ", ".join(form.name for form in read)
    words = f"nothing readable in {run.source.label}: expected checkpoints of one of the formats {formats}"
    journal.tell("unreadable", f"{words}, such as checkpoint-N", run=name, level="error")
    for path, reason in ledger.refused():
        journal.tell("refused", f"refused: {printable(path)}: {reason}", run=name, level="error")
    return 3


def tell_where(
    dispatch: Dispatch,
    state_dir: Path,
    journal: Journal,
    name_of: Callable[[str], str],
    *,
    stopping: Callable[[], bool],
) -> int:
    """Everything owed is sent once more, and where it is is told: 0; else 1, what waits, and how it is sent."""
    ends = {Lane(**end["lane"]): end for end in dispatch.drain(DRAIN_SECONDS, stopping=stopping) or ()}
    unsent = dispatch.unsent()
    for lane, end in ends.items():
        if end["sent"] and lane not in unsent:
            journal.tell("delivered", f"findings are in {end['where']}", run=name_of(lane.run))
    for lane, (alive, dead) in sorted(unsent.items()):
        where = ends[lane]["where"] if lane in ends else lane.destination
        words = f"{alive + dead} {lane.kind} are kept in {state_dir}, not yet in {where}: "
        again = "the next `peel-agent watch` on it, with --once or without, sends them"
        if dead:
            resend = f"`peel-agent deliveries resend --state {state_dir}`"
            again = f"{dead} were given up; {resend} puts them in line again, and {again}"
        journal.tell("delivery failed", words + again, run=name_of(lane.run), level="error")
    return int(bool(unsent or dispatch.not_there))
