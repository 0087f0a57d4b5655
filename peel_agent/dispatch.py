"""The agent's end of the courier: started when something is owed, listened to, and replaced when it dies."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

from peel_agent.courier import Orders, look_trouble
from peel_agent.deliver import LONGEST_PAUSE
from peel_agent.destinations import Address
from peel_agent.journal import Journal
from peel_agent.ledger import Lane, Ledger
from peel_agent.records import Check, plain, restored

STOP_SECONDS = 5.0
"""How long a courier may end what it is sending when the agent ends."""

RESTART_SECONDS = 10.0
"""A courier that died is not started again sooner."""

DUE_SECONDS = 1.0

LOOK_AGAIN_SECONDS = 60.0
"""A destination that was not there is looked for again after this time, and before when something is sent to it."""

DRAIN_LOOK_SECONDS = 0.5
"""While everything is sent at the end, the agent looks so often whether it was told to stop."""


class Dispatch:
    """Sends what the ledger owes to these addresses through a courier. `now` gives Unix seconds.

    Used by the agent's loop, and `owed` and `busy` by its runs.
    """

    def __init__(
        self,
        ledger: Ledger,
        environment: Mapping[str, str],
        journal: Journal,
        now: Callable[[], float],
        names: Callable[[str], str],
    ) -> None:
        self._ledger = ledger
        self._environment = environment
        self._journal = journal
        self._now = now
        self._names = names
        self._addresses: tuple[Address, ...] = ()
        self._child: subprocess.Popen[str] | None = None
        self._lock = threading.RLock()
        self._busy: set[str] = set()
        self._started_at: float | None = None
        self._drained: list[Any] | None = None
        self._next_look: float | None = None
        self._not_there: set[str] = set()
        """The names of the troubles of those that the last look did not find."""
        self._has_drained = threading.Event()

    def address(self, addresses: Sequence[Address]) -> None:
        """The destinations from now on."""
        with self._lock:
            if tuple(addresses) != self._addresses:
                self._addresses = tuple(addresses)
                self._end()
                self._tell_stranded()

    def _tell_stranded(self) -> None:
        """What is owed to a destination that was renamed or taken out waits, and somebody must know."""
        runs = {one.run for one in self._addresses}
        named = {(one.run, one.name) for one in self._addresses}
        for lane, (alive, _) in sorted(self._ledger.outbox.owed().items()):
            if alive and lane.run in runs and (lane.run, lane.destination) not in named:
                words = (
                    f"{lane.kind} that wait for {lane.destination}: {alive}; no tracker and no sink is called so now; "
                    "they are kept, and sent when one is called so again"
                )
                self._journal.tell("delivery failed", words, run=self._names(lane.run), level="warning")

    def look(self) -> None:
        """Whether each destination is there is to be found out now, and told; the courier does it, nobody waits."""
        with self._lock:
            self._next_look = self._now()

    @property
    def not_there(self) -> bool:
        """Whether a destination was found not to be there when it was looked for last."""
        return any(look_trouble(one.run, one.name) in self._not_there for one in self._addresses)

    def unsent(self) -> dict[Lane, tuple[int, int]]:
        """How much each lane to a destination of today owes, and how much of it was given up."""
        mine = {(one.run, one.name) for one in self._addresses}
        owed = self._ledger.outbox.owed().items()
        return {lane: counts for lane, counts in owed if (lane.run, lane.destination) in mine and any(counts)}

    def busy(self, run: str, *, is_busy: bool) -> None:
        """While a run peels, a courier stands by: what it loads takes longer than what is sent may wait."""
        with self._lock:
            before = bool(self._busy)
            (self._busy.add if is_busy else self._busy.discard)(run)
            if self._busy and self._child is None:
                self._start()
            elif before != bool(self._busy):
                self._say("stay" if self._busy else "rest")

    def owed(self) -> None:
        """Something is owed now."""
        with self._lock:
            if not self._say("wake"):
                self._start()

    def tick(self) -> None:
        """Starts a courier when something is due and none is there."""
        with self._lock:
            if self._child is not None and self._child.poll() is not None:
                self._bury()
            is_look_due = self._is_look_due()
            if self._child is None and self._addresses and (is_look_due or self._is_due()):
                self._start()
            if is_look_due and self._say("look"):
                self._next_look = None

    def _is_look_due(self) -> bool:
        """A time that is further off than a pause can be was set by another clock."""
        return self._next_look is not None and not 0 < self._next_look - self._now() <= LOOK_AGAIN_SECONDS

    def drain(self, seconds: float, *, stopping: Callable[[], bool] = lambda: False) -> list[Any] | None:
        """Everything is tried once, now; where it is afterwards, None when that took longer, or we are to stop."""
        with self._lock:
            self._has_drained.clear()
            if self._child is None:
                if self._ledger.outbox.next_try() is None and not self._is_look_due():
                    return None
                self._start()
            if self._is_look_due() and self._say("look"):
                self._next_look = None
            if not self._say("drain"):
                return None
        looks = max(1, math.ceil(seconds / DRAIN_LOOK_SECONDS))
        any(self._has_drained.wait(seconds / looks) or stopping() for _ in range(looks))
        return self._drained if self._has_drained.is_set() else None

    def close(self) -> None:
        """Lets the courier end what it is sending."""
        with self._lock:
            self._end()
            self._addresses = ()

    def _is_due(self) -> bool:
        mine = {(one.run, one.name) for one in self._addresses}
        next_tries = self._ledger.outbox.next_tries().items()
        pauses = [at - self._now() for lane, at in next_tries if (lane.run, lane.destination) in mine]
        return any(not DUE_SECONDS <= pause <= LONGEST_PAUSE for pause in pauses)

    def _start(self) -> None:
        if not self._addresses:
            return
        now = self._now()
        if self._started_at is not None and 0 <= now - self._started_at < RESTART_SECONDS and not self._busy:
            return
        self._started_at = now
        child = subprocess.Popen(
            [sys.executable, "-P", "-m", "peel_agent.courier"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=self._environment,
            process_group=0,  # Ctrl-C is for the agent, which lets the courier end what it is sending
        )
        self._child = child
        self._write(json.dumps(plain(Orders(self._ledger.state_dir, self._addresses))))
        self._say("stay" if self._busy else "rest")
        threading.Thread(target=self._listen, args=(child,), name="courier", daemon=True).start()

    def _say(self, what: str) -> bool:
        return self._write(json.dumps({"say": what}))

    def _write(self, line: str) -> bool:
        child = self._child
        if child is None or child.poll() is not None or child.stdin is None:
            return False
        try:
            child.stdin.write(line + "\n")
            child.stdin.flush()
        except (OSError, ValueError):  # it ended just now
            return False
        return True

    def _listen(self, child: subprocess.Popen[str]) -> None:
        assert child.stdout is not None
        with child.stdout:
            for line in child.stdout:
                try:
                    self._hear(json.loads(line))
                except ValueError:  # a library wrote there
                    self._journal.tell("delivery failed", f"the courier said: {line.strip()}")
        self._has_drained.set()

    def _hear(self, told: Mapping[str, Any]) -> None:
        run = self._names(told["run"]) if told.get("run") else None
        if "began" in told:
            self._journal.begin(told["began"], told["words"], run=run)
        elif "ended" in told:
            self._not_there.discard(told["ended"])  # something was sent there
            self._journal.end(told["ended"], told["words"], run=run)
        elif "buried" in told:
            self._journal.tell("delivery dead", told["buried"], run=run, level="error")
        elif "drained" in told:
            self._drained = list(told["drained"])
            self._has_drained.set()
        elif "looked" in told:
            self._note_look(told["run"], told["looked"], [restored(Check, form) for form in told["checks"]])
        elif "note" in told:
            self._journal.tell("delivery failed", told["note"], level="warning")

    def _note_look(self, run: str, destination: str, checks: Sequence[Check]) -> None:
        """What is not there is a trouble, and looked for again; what is there, or will be made, is told once."""
        trouble, name = look_trouble(run, destination), self._names(run)
        faults = [check for check in checks if check.ok is False]
        for fault in faults:
            self._not_there.add(trouble)
            self._journal.begin(trouble, f"{destination}: {fault.words} -> {fault.remedy}", run=name)
            self._next_look = self._now() + LOOK_AGAIN_SECONDS
        if not faults:
            last = checks[-1]
            remedy = f" -> {last.remedy}" if last.ok is None and len(checks) == 1 else ""  # nothing could be asked
            self._not_there.discard(trouble)
            self._journal.end(trouble, f"{destination} is there: {last.words}", run=name)
            self._journal.tell("started", f"{destination}: {last.words}{remedy}", run=name)

    def _bury(self) -> None:
        child, self._child = self._child, None
        assert child is not None
        self._has_drained.set()
        _hang_up(child)
        status = child.wait()
        if status != 0:
            words = f"the courier ended with status {status}; what is owed is kept, and another one follows"
            self._journal.tell("delivery failed", words, level="warning")

    def _end(self) -> None:
        child, self._child = self._child, None
        self._started_at = None
        if child is None:
            return
        _hang_up(child)
        try:
            child.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            child.kill()
            try:
                child.wait(1.0)
            except subprocess.TimeoutExpired:
                return


def _hang_up(child: subprocess.Popen[str]) -> None:
    """A courier ends with its stdin."""
    if child.stdin is not None:
        with suppress(OSError):
            child.stdin.close()
