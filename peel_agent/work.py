"""A checkpoint in work: what a run has of its agent for it, and how often it is tried."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass

from peel_agent.errors import PeelError, WorkerError, printable
from peel_agent.journal import Journal
from peel_agent.ledger import LastObserved
from peel_agent.records import Before, CheckpointRef, DeviceLease, Peeled, Request
from peel_agent.watch import Observed

DEATHS = 3
"""How often a checkpoint is tried whose worker dies, before it is given up."""

DEATH_PAUSE_SECONDS = (0.0, 60.0)
"""The pauses before the second and the third try."""

INTERRUPTIONS = 20
"""How often a checkpoint is tried during whose peel the agent itself ends: perhaps it takes the agent with it."""

AWAY_PAUSE_SECONDS = 30.0
"""The pause before a checkpoint is tried again whose file system went away meanwhile."""

LONGEST_PAUSE = 2 * max(DEATH_PAUSE_SECONDS)
"""A next try that is further off was set by another clock."""


@dataclass(frozen=True)
class Services:
    """What a run has of its agent.

    `lease` gives the device for one peel of a run whose worst margin was this at last (None: not known), or None while
    it is not its turn; `submit` starts it; `give_back` takes the device
    again. `owed` is called when destinations are owed something. `emit` gets each report's line.
    """

    journal: Journal
    lease: Callable[[str, float | None], DeviceLease | None]
    submit: Callable[[Request], Future[Peeled]]
    give_back: Callable[[DeviceLease], None]
    owed: Callable[[], None] = lambda: None
    emit: Callable[[str], None] | None = None


@dataclass(frozen=True)
class Work:
    """A checkpoint in work, and what will come of it; `peeled` once its answer is on disk."""

    ref: CheckpointRef
    lease: DeviceLease | None = None
    answer: Future[Peeled] | None = None
    peeled: Peeled | None = None


def lost_of(left: dict[str, CheckpointRef], observed: Observed) -> list[CheckpointRef]:
    """Takes out of `left` those that are gone, or have another checkpoint in their place now."""
    places = {ref.path: ref.fingerprint for ref in observed.ready}
    lost = [
        ref
        for ref in left.values()
        if not ref.path.exists() or places.get(ref.path, ref.fingerprint) != ref.fingerprint
    ]
    for ref in lost:
        del left[ref.fingerprint]
    return lost


def before_of(
    ref: CheckpointRef, last: LastObserved | None, held: CheckpointRef | None, *, is_observation: bool
) -> Before:
    """What a checkpoint is held against: the one observed `last`, unless that is of a later step.

    `held` is where the files of that one are, while they are held.
    """
    if not is_observation:
        return Before(why_not="it has no place in the order of the run: no step, or an earlier one that came late")
    if last is None:
        return Before(why_not="it is the first checkpoint of this run")
    if last.step is not None and ref.step is not None and last.step >= ref.step:
        return Before(why_not=f"the run went back: the checkpoint before is of step {last.step}")
    return Before(last.step, held, last.sketches)


def result_of(answer: Future[Peeled]) -> Peeled | PeelError:
    """What an engine answered; whatever it raised is an error of the tree."""
    try:
        return answer.result()
    except PeelError as error:
        return error
    except Exception as error:  # a bug of an engine, or of what it runs: it counts as a death
        return WorkerError(f"{type(error).__name__}: {error}", remedy="please report it")


def name_of(ref: CheckpointRef) -> str:
    """What to call a checkpoint in a message: many saves may have one path, so its step too."""
    return printable(ref.label) + ("" if ref.step is None else f" (step {ref.step})")


def in_a_line(error: PeelError) -> str:
    """An error and its remedy."""
    return f"{error.what} -> {error.remedy}"
