"""The child process that delivers: a thread for each lane, with a ledger connection of its own.

Trackers' libraries need much memory and may hang: neither is the agent's concern. It is told on stdin, one JSON object
a line: first `Orders`, then `{"say": "wake" | "look" | "stay" | "rest" | "drain" | "stop"}`; it answers so on stdout.
It ends when stdin does, or when nothing is due for a while and it was not told to stay.
"""

from __future__ import annotations

import json
import queue
import sqlite3
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peel_agent.deliver import Carrier, Outcome, in_words
from peel_agent.destinations import Address
from peel_agent.errors import PeelError, printable
from peel_agent.ledger import FILE, Lane, Outbox, open_beside
from peel_agent.records import plain, restored
from peel_agent.spi import Looking
from peel_agent.worker import end_with_parent, quiet_libraries

IDLE_SECONDS = 30.0
LEDGER_SECONDS = 5.0
"""Pause after the ledger could not be read or written."""

LOOK_SECONDS = 5.0
"""Others may make something due (`peel-agent deliveries resend`): each lane looks as often as this."""


@dataclass(frozen=True)
class Orders:
    """What a courier begins with."""

    state_dir: Path
    addresses: tuple[Address, ...]


def look_trouble(run: str, destination: str) -> str:
    """The trouble's name while a destination is not there."""
    return f"delivery/{run}/{destination}/look"


class _LookThread(threading.Thread):
    """Finds out whether one destination is there, with a connection of its own, and tells it."""

    def __init__(self, address: Address, tell: Any) -> None:
        super().__init__(name=f"look {address.name}", daemon=True)
        self._address = address
        self._tell = tell

    def run(self) -> None:
        address = self._address
        try:
            tracker = address.tracker()
            if not isinstance(tracker, Looking):
                return
            try:
                checks = tracker.look()
            finally:
                tracker.close()
        except Exception as error:  # a plug-in may raise anything; it is told when something is to be sent
            self._tell({"note": f"{address.name} could not be looked for: {in_words(error)}"})
            return
        if checks:
            self._tell({"looked": address.name, "run": address.run, "checks": [plain(check) for check in checks]})


class _LaneThread(threading.Thread):
    """Serves one lane until it is told to stop."""

    def __init__(self, carrier: Carrier, tell: Any) -> None:
        super().__init__(name=str(carrier.lane), daemon=True)
        self.carrier = carrier
        self._tell = tell
        self._wakes: queue.SimpleQueue[str] = queue.SimpleQueue()
        self.due: float | None = 0.0
        """Seconds until the next try; None when nothing is owed."""
        self.drained = threading.Event()
        self.has_sent = False

    def wake(self, say: str = "wake") -> None:
        if say == "drain":
            self.drained.clear()
        self._wakes.put(say)

    def run(self) -> None:
        self._prepare()
        at_once = False
        while True:
            outcome = self._step(at_once=at_once)
            self.due = outcome.wait
            if outcome.sent or outcome.buried is not None:
                continue
            if at_once:
                self.drained.set()
                at_once = False
            wait = LOOK_SECONDS if outcome.wait is None else min(outcome.wait, LOOK_SECONDS)
            try:
                at_once = self._wakes.get(timeout=wait) == "drain"
            except queue.Empty:
                continue

    def _prepare(self) -> None:
        try:
            self.carrier.prepare()
        except Exception as error:  # it is told when something is to be sent
            self._tell({"note": in_words(error)})

    def _step(self, *, at_once: bool) -> Outcome:
        lane = self.carrier.lane
        try:
            outcome = self.carrier.step(at_once=at_once)
        except sqlite3.Error as error:
            self._tell({"began": "ledger", "words": f"the ledger cannot be used for deliveries: {error}", "run": None})
            return Outcome(wait=LEDGER_SECONDS)
        trouble = f"delivery/{lane.run}/{lane.destination}/{lane.kind}"
        if outcome.trouble is not None:
            self._tell({"began": trouble, "words": outcome.trouble, "run": lane.run})
        if outcome.buried is not None:
            self._tell({"buried": outcome.buried, "run": lane.run})
            words = f"{lane.kind} for {lane.destination}: what kept them back was given up"
            self._tell({"ended": trouble, "words": words, "run": lane.run})
        if outcome.sent:
            self.has_sent = True
            self._tell({"ended": "ledger", "words": "the ledger can be used for deliveries again", "run": None})
            words = f"{lane.kind} for {lane.destination} are taken again: {self.carrier.where()}"
            self._tell({"ended": trouble, "words": words, "run": lane.run})
            self._tell({"ended": look_trouble(lane.run, lane.destination), "words": words, "run": lane.run})
        return outcome


class Courier:
    """All lanes of all runs. `write` takes a line for the agent."""

    def __init__(self, orders: Orders, write: Any) -> None:
        self._outbox = Outbox(open_beside(orders.state_dir, writing=True))
        self._file = orders.state_dir / FILE
        self._opened = _number(self._file)
        self._write = write
        self._writing = threading.Lock()
        self._lanes = [lane for one in orders.addresses for lane in self._lanes_to(one)]
        self._looks: list[_LookThread] = []
        self._addresses = orders.addresses
        self._staying = True
        self._idle_since = time.monotonic()

    def _lanes_to(self, address: Address) -> list[_LaneThread]:
        """The lanes of one destination; none when its plug-in fails, which concerns no other."""
        trouble = f"delivery/{address.run}/{address.name}/connect"
        try:
            lanes = [Lane(address.run, address.name, kind) for kind in address.lanes]
            carriers = [Carrier(lane, address, self._outbox, time.time) for lane in lanes]
        except Exception as error:  # a plug-in may raise anything
            what = f"{printable(address.name)} cannot be connected: {in_words(error)}"
            self.tell({"began": trouble, "words": what, "run": address.run})
            return []
        self.tell({"ended": trouble, "words": f"{address.name} can be connected again", "run": address.run})
        return [_LaneThread(carrier, self.tell) for carrier in carriers]

    def tell(self, message: dict[str, Any]) -> None:
        with self._writing:
            self._write(json.dumps(message) + "\n")

    def serve(self, told: queue.SimpleQueue[str | None]) -> None:
        """Until the agent ends, says stop, nothing is to be done, or another file took the ledger's place."""
        for lane in self._lanes:
            lane.start()
        while not self._is_idle() and _number(self._file) == self._opened:
            try:
                say = told.get(timeout=1.0)
            except queue.Empty:
                continue
            if say is None or say == "stop":
                return
            self._obey(say)

    def _obey(self, say: str) -> None:
        self._idle_since = time.monotonic()
        if say in ("stay", "rest"):
            self._staying = say == "stay"
            return
        if say == "look":
            self._looks = [_LookThread(one, self.tell) for one in self._addresses if one.kind == "tracker"]
            for look in self._looks:
                look.start()
            return
        for lane in self._lanes:
            lane.wake(say)
        if say == "drain":
            threading.Thread(target=self._drain, daemon=True).start()

    def _drain(self) -> None:
        """Tells, once each lane has tried all it owes or failed to, and all was looked for, where things are."""
        for lane in self._lanes:
            lane.drained.wait()
        for look in self._looks:
            look.join()
        ends = [
            {"lane": plain(lane.carrier.lane), "where": lane.carrier.where(), "sent": lane.has_sent}
            for lane in self._lanes
        ]
        self.tell({"drained": ends})

    def _is_idle(self) -> bool:
        soonest = min((lane.due for lane in self._lanes if lane.due is not None), default=None)
        is_looking = any(look.is_alive() for look in self._looks)
        if self._staying or is_looking or (soonest is not None and soonest < IDLE_SECONDS):
            self._idle_since = time.monotonic()
        return time.monotonic() - self._idle_since > IDLE_SECONDS


def _number(file: Path) -> int | None:
    """Which file this is: a ledger that is put back from its copy is another one."""
    try:
        return file.stat().st_ino
    except OSError:
        return None


def main() -> int:
    """Serves until stdin ends."""
    end_with_parent()
    orders = restored(Orders, json.loads(sys.stdin.readline()))
    output = sys.stdout

    def write(line: str) -> None:
        output.write(line)
        output.flush()

    told: queue.SimpleQueue[str | None] = queue.SimpleQueue()

    def listen() -> None:
        for line in sys.stdin:
            told.put(json.loads(line)["say"])
        told.put(None)

    threading.Thread(target=listen, daemon=True).start()
    with quiet_libraries():
        try:
            Courier(orders, write).serve(told)
        except (PeelError, sqlite3.Error) as error:
            write(json.dumps({"note": printable(str(error))}) + "\n")
            return 1
        except BrokenPipeError:
            return 0
    return 0


if __name__ == "__main__":
    sys.exit(main())
