"""One watched place: each look queues what is found, starts the next peel, and makes what was answered final.

The clock, the devices and the loop itself are the agent's.
"""

from __future__ import annotations

import dataclasses
import sqlite3
from collections.abc import Mapping
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field

from peel_agent.config import DeviceSettings, RunSettings
from peel_agent.destinations import showing
from peel_agent.errors import (
    CheckpointError,
    ConfigurationError,
    GaveWay,
    PeelError,
    TornCheckpoint,
    WorkerError,
)
from peel_agent.intake import Intake
from peel_agent.judging import Judging
from peel_agent.ledger import RunLedger
from peel_agent.publish import headline
from peel_agent.records import CheckpointRef, DeviceLease, EventKind, Level, Peeled, Request
from peel_agent.watch import Earlier, Observed, Pins, Queue, Reserve, Source
from peel_agent.work import (
    AWAY_PAUSE_SECONDS,
    DEATH_PAUSE_SECONDS,
    DEATHS,
    INTERRUPTIONS,
    LONGEST_PAUSE,
    Services,
    Work,
    before_of,
    in_a_line,
    name_of,
    result_of,
)


@dataclass
class Run:
    """The rounds over one source, by a backlog's `policy`, which is not the settings' own with `once`.

    `sinks` are those that get notices (see Judging); `ended` says why nothing of it is watched any more; no
    peel begins when it `is_ending`. Used by one thread.
    """

    settings: RunSettings
    device: DeviceSettings
    source: Source
    policy: str
    ledger: RunLedger
    services: Services
    sinks: Mapping[str, float | None] = field(default_factory=dict)
    once: bool = False
    ended: str | None = None
    work: Work | None = None
    is_ending: bool = False
    _refused: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        reserve = Reserve(self.settings.watch.keep_free_gb)
        self._pins = Pins(self.source.root, self.ledger.folder, self.ledger.folder.parent.parent, reserve)
        self._queue = Queue(self._pins, self.policy)
        self._earlier = Earlier(self._pins)
        self._intake = Intake(
            self.source,
            self.settings.name,
            self.ledger,
            self._pins,
            self._queue,
            self._earlier,
            self.services.journal,
            self._tell,
            self._is_due,
            lambda: self.is_ending,
            self.once,
        )
        self._judging = Judging(
            self.settings,
            self.ledger,
            lambda: self.sinks,
            self.services.journal,
            self.services.owed,
            showing=showing(self.settings.tracker),
            once=self.once,
        )
        if self.ended is not None:
            self.withdraw_all(self.ended)
            self.let_go()
            return
        self._take_up()

    def _take_up(self) -> None:
        """What an earlier agent left: an answer is judged, what was held waits on, the rest is looked for."""
        self._judging.owe_past()
        last = self.ledger.last_observed()
        held = {ref.fingerprint: ref for ref in self._pins.left()}
        if last is not None:
            self._earlier.ref = held.pop(last.fingerprint, None)
        for job in self.ledger.jobs():
            ref = held.pop(job.ref.fingerprint, None) or job.ref.released()
            if job.state == "answered":
                self.work = Work(ref, peeled=self.ledger.answer(ref))
            elif job.interruptions >= INTERRUPTIONS:
                self._give_up(ref, f"the agent ended {job.interruptions} times while it was peeled")
            elif ref.held is not None or job.deaths:
                self._queue.put_off(ref, job.not_before)
            else:
                self._intake.left[ref.fingerprint] = ref
        for ref in held.values():  # of an agent of version 0.1, which kept no jobs
            if self._is_due(ref):
                self.ledger.await_turn(ref)
                self._queue.add(ref)
        self._pins.release_all(but=self._needed())

    @property
    def kept_in(self) -> str:
        """Where the findings are, and where the files of checkpoints that wait."""
        return f"{self.ledger.folder}, files of checkpoints that wait in {self._pins.folder}"

    def withdraw_all(self, reason: str) -> None:
        """Nothing of this run is watched any more: what fires is resolved."""
        self._judging.withdraw_all(reason, self.services.journal.now())

    def let_go(self) -> None:
        """No file is held for it any more."""
        self._pins.release_all()

    def close(self) -> None:
        """Lets go of every file that the next start will not need; what is in work then waits, and is not blamed."""
        if self.work is not None and self.work.answer is not None and self.work.peeled is None:
            with suppress(sqlite3.Error):  # it counts as an interruption
                self._leave(self.work.ref, self.work.answer)
            if self.work.lease is not None:
                lease = self.work.lease
                self.work.answer.add_done_callback(lambda _: self.services.give_back(lease))
        self._pins.release_all(but=self._needed())

    def _leave(self, ref: CheckpointRef, answer: Future[Peeled]) -> None:
        """The next start judges the answer that is there, or peels it."""
        if answer.done() and not answer.cancelled() and answer.exception() is None:
            self.ledger.answered(ref, answer.result())
        else:
            self.ledger.put_back(ref)

    def _needed(self) -> tuple[CheckpointRef, ...]:
        """Those whose files are held: they wait, are in work, or the next one is to be held against them."""
        working = [] if self.work is None else [self.work.ref]
        earlier = [] if self._earlier.ref is None else [self._earlier.ref]
        return (*self._queue.held(), *working, *earlier)

    def round(self, now: float) -> Observed:
        """One round at the time `now`, in Unix seconds. Raises ConfigurationError when nothing can be peeled so.

        Alerts go by the clock after a round that failed too: that rounds fail is what one of them is about.
        """
        try:
            self._conclude(now)
            observed = self.source.look(now)
            self._intake.take(observed)
            self._intake.mind_space()
            self._start(now)
        finally:
            self.tick(now)
        return observed

    def tick(self, now: float) -> None:
        """Alerts that go by the clock are judged, with or without a look at the place."""
        self._judging.tick(now)

    def is_idle(self, observed: Observed) -> bool:
        """Whether nothing of what was observed is left to wait for."""
        busy = self.work is not None or self._queue or observed.waiting
        return not busy and not any(map(self._is_due, observed.ready))

    def _is_due(self, ref: CheckpointRef) -> bool:
        """Neither in work, nor done, nor refused in this session."""
        if self.work is not None and self.work.ref.fingerprint == ref.fingerprint:
            return False
        # What was refused in an earlier session may have had its cause elsewhere: a library, a factory, a config.json.
        if ref.fingerprint in self._refused:
            return False
        done = ("peeled", "failed") if self.policy == "all" else ("peeled", "failed", "passed over")
        return self.ledger.outcome(ref.fingerprint) not in done

    # ---------------------------------------------------------------- a peel begins

    def _start(self, now: float) -> None:
        self._queue.come_due(now, LONGEST_PAUSE)
        if self.work is not None or not self._queue.has_next or self.is_ending:
            return
        lease = self.services.lease(self.ledger.run, self._judging.worst_margin())
        if lease is None:
            return
        ref, passed = self._queue.next()
        left = list(passed)
        try:
            while left:
                self.ledger.pass_over(left[0], f"backlog = {self.policy}")
                self._intake.end_passed(left.pop(0))
            self.work = Work(ref, lease, self._submitted(self._request(ref, lease)))
        except BaseException:
            self.services.give_back(lease)
            for waiting in (*left, ref):
                self._queue.add(waiting)
            raise
        self._tell("peeling", f"peeling {name_of(ref)} on {lease.label}", ref)

    def _submitted(self, request: Request) -> Future[Peeled]:
        self.ledger.begin(request.ref)
        try:
            return self.services.submit(request)
        except BaseException:
            with suppress(sqlite3.Error):  # it counts as an interruption
                self.ledger.put_back(request.ref)
            raise

    def _request(self, ref: CheckpointRef, lease: DeviceLease) -> Request:
        settings = self.settings
        is_observation = self._is_observation(ref)
        return Request(
            ref=ref,
            probe=settings.probe,
            peel=settings.peel,
            model=settings.model,
            lease=lease,
            nice=self.device.nice,
            memory_fraction=self.device.memory_fraction,
            earlier=self.ledger.bound_memory() if is_observation else None,
            before=before_of(ref, self.ledger.last_observed(), self._earlier.ref, is_observation=is_observation),
            keep_sketches=is_observation,
        )

    def _is_observation(self, ref: CheckpointRef) -> bool:
        """Whether alerts are judged by this checkpoint, and it enters the series.

        A save without a step (a final export) has no place in the order of the run, and a checkpoint of an earlier step
        that comes after a later one is history.
        """
        return ref.step is not None and not self.ledger.is_late(ref)

    def _conclude(self, now: float) -> None:
        """The work stays as it is until what came of it is on disk: a full disk costs a round, not an answer."""
        work = self.work
        if work is None:
            return
        if work.peeled is None:
            assert work.answer is not None
            if not work.answer.done():
                return
            peeled = result_of(work.answer)
            if isinstance(peeled, PeelError):
                self._return_device()
                self._went_wrong(work.ref, peeled, now)
                return
            self.ledger.answered(work.ref, peeled)
            self._return_device()
            self.work = work = dataclasses.replace(work, lease=None, peeled=peeled)
        assert work.peeled is not None
        self._finish(work.ref, work.peeled, now)

    def _return_device(self) -> None:
        if self.work is not None and self.work.lease is not None:
            self.services.give_back(self.work.lease)
            self.work = dataclasses.replace(self.work, lease=None)

    def _went_wrong(self, ref: CheckpointRef, error: PeelError, now: float) -> None:
        if isinstance(error, TornCheckpoint):
            self._torn(ref, error, now)
        elif isinstance(error, GaveWay):
            self.ledger.put_back(ref, why="gave_way")
            self._wait_again(ref, now)
            self._tell("gave way", f"stopped peeling {name_of(ref)}: {error.what}; it is peeled again later", ref)
        elif isinstance(error, WorkerError):
            self._died(ref, error, now)
        elif isinstance(error, ConfigurationError) and not self.ledger.count("peeled"):
            self.ledger.put_back(ref)
            self._wait_again(ref, now)
            raise error  # it is the user's, and no checkpoint would do
        else:
            self.ledger.refuse(ref, str(error))
            self._refused.add(ref.fingerprint)
            self._end_work()
            self._tell("refused", f"cannot use {name_of(ref)}: {in_a_line(error)}", ref, level="warning")

    def _wait_again(self, ref: CheckpointRef, not_before: float) -> None:
        self.work = None
        self._queue.put_off(ref, not_before)  # held as it is: the trainer may have rotated it

    def _torn(self, ref: CheckpointRef, error: TornCheckpoint, now: float) -> None:
        """One rewritten in place is copied the next time: the trainer may rewrite it faster than it is peeled."""
        if self._intake.is_away():
            self.ledger.put_back(ref)
            self._wait_again(ref, now + AWAY_PAUSE_SECONDS)
        elif not ref.path.exists():
            self.ledger.miss(ref)
            self._end_work()
            self._intake.tell_missed(ref)
        else:
            self._intake.rewritten.add(ref.path)
            self.ledger.forget(ref, why="torn")
            self._end_work(comes_back=True)
            self._tell(
                "torn", f"{name_of(ref)}: {error.what}; it is read again when it is at rest", ref, level="warning"
            )

    def _died(self, ref: CheckpointRef, error: WorkerError, now: float) -> None:
        counted = self.ledger.count_deaths(ref)
        deaths = counted + 1
        if deaths >= DEATHS:
            if counted < DEATHS:
                self.ledger.died(ref, now)
            self._give_up(ref, f"{error.what}, {DEATHS} times -> {error.remedy}")
            return
        pause = 0.0 if self.once else DEATH_PAUSE_SECONDS[deaths - 1]
        self.ledger.died(ref, now + pause)
        again = "at once" if not pause else f"in {pause:.0f} s"
        words = f"{name_of(ref)}: {in_a_line(error)}; try {deaths + 1} of {DEATHS} follows {again}"
        self._wait_again(ref, now + pause)
        self._tell("worker died", words, ref, level="warning")

    def _give_up(self, ref: CheckpointRef, reason: str) -> None:
        self.ledger.fail(ref, reason)
        if self.work is not None and self.work.ref.fingerprint == ref.fingerprint:
            self._end_work()
        self._tell(
            "failed", f"gave up {name_of(ref)}: {reason}; `peel-agent scan` peels it by hand", ref, level="error"
        )

    def _end_work(self, *, comes_back: bool = False) -> None:
        """The files are let go of once what came of them is on disk."""
        work, self.work = self.work, None
        if work is None:
            return
        ref = work.ref
        if not self._earlier.is_it(ref):
            self._pins.release(ref)
        if not comes_back:
            self.source.done(ref)

    def _finish(self, ref: CheckpointRef, peeled: Peeled, now: float) -> None:
        """Judged, made final in the ledger, and told; what destinations get is owed by then."""
        observed = self._is_observation(ref)
        try:
            finished = self._judging.finish(ref, peeled, observed=observed, now=now)
        except CheckpointError as error:
            self._went_wrong(ref, error, now)
            return
        if observed:
            self._earlier.replace(ref)
        self._end_work()  # from here on nothing that fails makes it judged again
        self.services.owed()
        self._tell("measured", headline(finished.report), ref)
        self._judging.tell(finished.notices)
        if self.services.emit is not None:
            self.services.emit(finished.line)

    def _tell(self, kind: EventKind, words: str, ref: CheckpointRef | None = None, *, level: Level = "info") -> None:
        step = None if ref is None else ref.step
        self.services.journal.tell(kind, words, run=self.settings.name, step=step, level=level)
