"""One look after another at a watched root: what is found is queued, peeled, judged and made final in the ledger.

The clock, the workers and the loop itself are the daemon's.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path

from peel_agent.config import Settings, worker_environment
from peel_agent.diagnose import lineage
from peel_agent.errors import ConfigurationError, PeelError, TornCheckpoint, WorkerError, printable
from peel_agent.ledger import Ledger
from peel_agent.pipeline import conclude
from peel_agent.publish import alert_line, headline, report_from_json, report_line
from peel_agent.records import Before, CheckpointRef, Peeled
from peel_agent.watch import Observed, Pins, Queue, Source
from peel_agent.worker import Request

ATTEMPTS = 3
"""How often a checkpoint is tried whose worker dies, before it is given up."""

Submit = Callable[[Request], "Future[Peeled]"]


@dataclass(frozen=True)
class _Job:
    """A checkpoint in work, and what will come of it."""

    ref: CheckpointRef
    answer: Future[Peeled]


@dataclass
class Rounds:
    """The rounds over one source, by a backlog's `policy`; `submit` starts a worker.

    `say` gets lines for people, `emit` each report's line.
    """

    source: Source
    policy: str
    settings: Settings
    ledger: Ledger
    submit: Submit
    say: Callable[[str], None]
    emit: Callable[[str], None] | None = None
    _job: _Job | None = None
    _attempts: dict[str, int] = field(default_factory=dict)
    _refused: set[str] = field(default_factory=set)
    _rewritten: set[Path] = field(default_factory=set)
    _told: set[tuple[str, str]] = field(default_factory=set)
    _last_observed: CheckpointRef | None = None
    """Held until the next one is peeled, which is held against it."""

    def __post_init__(self) -> None:
        self._pins = Pins(self.source.root, self.ledger.state_dir)
        self._queue = Queue(self._pins, self.policy)
        last = self.ledger.last_observed()
        for ref in self._pins.left():
            if last is not None and ref.fingerprint == last.fingerprint:
                self._last_observed = ref
            elif self._is_due(ref):
                self._queue.put_back(ref)
        self._pins.release_all(but=self._needed())

    def _needed(self) -> tuple[CheckpointRef, ...]:
        """Those whose files are held: they wait, are in work, or the next one is to be held against them."""
        working = [] if self._job is None else [self._job.ref]
        last = [] if self._last_observed is None else [self._last_observed]
        return (*self._queue.held(), *working, *last)

    def make(self, now: float) -> Observed:
        """One round at the time `now`, in Unix seconds. Raises ConfigurationError when nothing can be peeled so."""
        self._conclude_job()
        observed = self.source.look(now)
        self._take(observed)
        self._start_job()
        return observed

    def is_idle(self, observed: Observed) -> bool:
        """Whether nothing of what was observed is left to wait for."""
        busy = self._job is not None or self._queue or observed.waiting
        return not busy and not any(map(self._is_due, observed.ready))

    def close(self) -> None:
        """Lets go of every file that the next start will not need."""
        self._pins.release_all(but=self._needed())

    def _take(self, observed: Observed) -> None:
        for ref in observed.ready:
            if self._is_due(ref) and ref not in self._queue and not self._queue.add(ref):
                if ref.path.exists():
                    self.say(f"{_name(ref)} changed before it could be held; the next scan looks again")
                else:
                    self._miss(ref)
        for ref in (*observed.vanished, *self._queue.gone()):
            if self._is_due(ref) and ref not in self._queue:
                self._miss(ref)
        last = self._last_observed
        if last is not None and last.held is not None and self._pins.crowded():
            self._pins.release(last)
            self._last_observed = None
            self.say(
                f"the file system of {self._pins.folder} is nearly full: the last checkpoint is not kept for "
                "comparison; how far weights changed is estimated from their sketches"
            )
        if full := self._queue.make_room():
            self.say(f"the file system of {full} is nearly full: waiting checkpoints are not kept from rotation now")
        for path, reason in observed.unreadable:
            if (path, reason) not in self._told:
                self._told.add((path, reason))
                self.say(f"cannot read {printable(path)}: {reason}")

    def _is_due(self, ref: CheckpointRef) -> bool:
        """Neither in work, nor done, nor given up in this session."""
        if self._job is not None and self._job.ref.fingerprint == ref.fingerprint:
            return False
        # What was refused in an earlier session may have had its cause elsewhere: a library, a factory, a config.json.
        if ref.fingerprint in self._refused or self._attempts.get(ref.fingerprint, 0) >= ATTEMPTS:
            return False
        done = ("peeled",) if self.policy == "all" else ("peeled", "passed over")
        return self.ledger.outcome(ref.fingerprint) not in done

    def _start_job(self) -> None:
        if self._job is not None or not self._queue:
            return
        ref, passed = self._queue.next()
        for older in passed:
            self.ledger.pass_over(older, f"backlog = {self.policy}")
            self.source.done(older)
            self.say(f'passed over {_name(older)}: a newer one waits; [watch] backlog = "all" peels every one')
        self._job = _Job(ref, self.submit(self._request(ref)))

    def _request(self, ref: CheckpointRef) -> Request:
        settings = self.settings
        _, device = worker_environment(settings.device.select)
        return Request(
            ref=ref,
            probe=settings.probe,
            peel=settings.peel,
            model=settings.model,
            device=device,
            nice=settings.device.nice,
            memory_fraction=settings.device.memory_fraction,
            copy_to=self._pins.folder if ref.path in self._rewritten else None,
            earlier=self.ledger.bound_memory() if self._is_observation(ref) else None,
            before=self._before(ref),
            keep_sketches=self._is_observation(ref),
        )

    def _before(self, ref: CheckpointRef) -> Before:
        """What this checkpoint is held against: the one observed last, unless that is of a later step."""
        last = self.ledger.last_observed()
        if not self._is_observation(ref):
            return Before(why_not="it has no place in the order of the run: no step, or an earlier one that came late")
        if last is None:
            return Before(why_not="it is the first checkpoint of this run")
        if last.step is not None and ref.step is not None and last.step >= ref.step:
            return Before(why_not=f"the run went back: the checkpoint before is of step {last.step}")
        held = self._last_observed
        return Before(last.step, None if held is None else self._pins.newest(held), last.sketches)

    def _conclude_job(self) -> None:
        if self._job is None or not self._job.answer.done():
            return
        job, self._job = self._job, None
        ref = job.ref
        try:
            peeled = job.answer.result()
        except TornCheckpoint as error:
            self._torn(ref, error)
        except WorkerError as error:
            self._try_again(ref, error.what)
            if self._attempts[ref.fingerprint] < ATTEMPTS:
                self._queue.put_back(ref)  # held as it is: the trainer may have rotated it
                return
        except ConfigurationError as error:
            if not self.ledger.count("peeled"):
                raise  # it is the user's, and no checkpoint would do
            self._refuse(ref, error)
        except PeelError as error:
            self._refuse(ref, error)
        else:
            self._finish(ref, peeled)
        self._let_go(ref)
        if self.ledger.outcome(ref.fingerprint) is not None or self._attempts.get(ref.fingerprint, 0) >= ATTEMPTS:
            self.source.done(ref)

    def _refuse(self, ref: CheckpointRef, error: PeelError) -> None:
        self._refused.add(ref.fingerprint)
        self.ledger.refuse(ref, str(error))
        self.say(f"cannot use {_name(ref)}: {error}")

    def _torn(self, ref: CheckpointRef, error: TornCheckpoint) -> None:
        """One rewritten in place is copied the next time: the trainer may rewrite it faster than it is peeled."""
        if not ref.path.exists():
            self._miss(ref)
            return
        self._rewritten.add(ref.path)
        self._try_again(ref, error.what)

    def _miss(self, ref: CheckpointRef) -> None:
        self.ledger.miss(ref)
        self.say(f"{_name(ref)} was whole, and removed before it was peeled ({self.ledger.count('vanished')} so far)")

    def _try_again(self, ref: CheckpointRef, why: str) -> None:
        """What may have other causes than the checkpoint is no verdict on it: the next start tries it anew."""
        attempts = self._attempts[ref.fingerprint] = self._attempts.get(ref.fingerprint, 0) + 1
        rest = "trying again" if attempts < ATTEMPTS else f"left after {attempts} attempts, until the next start"
        self.say(f"{_name(ref)}: {why}; {rest}")

    def _is_observation(self, ref: CheckpointRef) -> bool:
        """Whether it counts for alerts and for the running minimum of the bounds.

        An export without a step, at the end of a run, repeats another one; one that comes after a later one is history.
        """
        return ref.step is not None and not self.ledger.is_late(ref)

    def _finish(self, ref: CheckpointRef, peeled: Peeled) -> None:
        """Judged, made final in the ledger, and told; what the trackers get is in the outbox by then."""
        observed = self._is_observation(ref)
        report, verdict, sent = conclude(
            peeled.report,
            ref,
            observed=observed,
            history=lineage(map(report_from_json, self.ledger.history()), ref.step),
            rules=self.settings.rules,
            states=self.ledger.rule_states(),
            alerts_log=self.ledger.alerts_log(),
            max_series=self.settings.tracker.max_series,
        )
        line = report_line(report)
        self.ledger.record(
            ref,
            report=line,
            verdict=verdict,
            alert_lines={notice.id: alert_line(notice) for notice in verdict.notices},
            memory=peeled.memory if observed else None,
            publications=dict.fromkeys(self.settings.tracker.use, sent),
            observed=observed,
            sketches=peeled.sketches,
        )
        if observed:
            self._keep_for_next(ref)
        self.say(headline(report))
        for notice in verdict.notices:
            self.say(f"ALERT {notice.state}: {notice.text}")
        if self.emit is not None:
            self.emit(line)

    def _let_go(self, ref: CheckpointRef) -> None:
        if self._last_observed is None or ref.fingerprint != self._last_observed.fingerprint:
            self._pins.release(ref)

    def _keep_for_next(self, ref: CheckpointRef) -> None:
        """Holds on to this checkpoint, and lets go of the one before it."""
        earlier, self._last_observed = self._last_observed, ref
        if earlier is not None and earlier.fingerprint != ref.fingerprint:
            self._pins.release(earlier)


def _name(ref: CheckpointRef) -> str:
    return printable(ref.label)
