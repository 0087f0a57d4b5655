"""From the ledger's outbox to the trackers: in order, and gone from the outbox only when taken."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from peel_agent.errors import TrackerError, TrackerUnavailable
from peel_agent.ledger import Ledger
from peel_agent.spi import Tracker

FIRST_RETRY_SECONDS = 5.0
LAST_RETRY_SECONDS = 300.0


@dataclass
class _Outlet:
    """A tracker and when it may be tried again; `refused` says that it will never take what is first in line."""

    name: str
    tracker: Tracker
    retry_at: float = 0.0
    delay: float = FIRST_RETRY_SECONDS
    refused: bool = False
    sent: bool = False


class Delivery:
    """Sends what waits in `ledger` to `trackers` (by name). `now` gives seconds; `say` gets lines for people."""

    def __init__(
        self, ledger: Ledger, trackers: dict[str, Tracker], *, now: Callable[[], float], say: Callable[[str], None]
    ) -> None:
        self._ledger = ledger
        self._outlets = [_Outlet(name, tracker) for name, tracker in trackers.items()]
        self._now = now
        self._say = say

    def deliver(self) -> None:
        """Sends everything that waits to every tracker that may be tried now, oldest first."""
        for outlet in self._outlets:
            if not outlet.refused and self._now() >= outlet.retry_at:
                self._deliver_to(outlet)

    def _deliver_to(self, outlet: _Outlet) -> None:
        for receipt, publication in self._ledger.waiting(outlet.name):
            try:
                outlet.tracker.publish(publication)
            except TrackerUnavailable as error:
                self._postpone(outlet, error.what)
                return
            except TrackerError as error:
                outlet.refused = True
                self._say(f"{outlet.name}: {error}\n  findings are kept in {self._ledger.state_dir}")
                return
            except Exception as error:  # a plug-in's library may raise anything; it must not end the watch
                self._postpone(outlet, f"{type(error).__name__}: {error}")
                return
            self._ledger.sent(receipt)
            outlet.delay, outlet.retry_at, outlet.sent = FIRST_RETRY_SECONDS, 0.0, True

    def _postpone(self, outlet: _Outlet, why: str) -> None:
        """Exponential back-off with jitter."""
        pause = outlet.delay * random.uniform(0.8, 1.2)  # noqa: S311 - jitter, not a secret
        outlet.retry_at = self._now() + pause
        outlet.delay = min(2 * outlet.delay, LAST_RETRY_SECONDS)
        self._say(
            f"{outlet.name}: {why}; {self._waiting(outlet)} kept in {self._ledger.state_dir}, next try in {pause:.0f} s"
        )

    def close(self) -> None:
        """Says where the findings are, or where those wait that could not be sent, and closes the trackers."""
        for outlet in self._outlets:
            if self._ledger.waiting(outlet.name):
                self._say(
                    f"{self._waiting(outlet)} in {self._ledger.state_dir}, not yet in {outlet.tracker.where()}; "
                    "the next `peel-agent watch` sends them"
                )
            elif outlet.sent:
                self._say(f"findings are in {outlet.tracker.where()}")
            outlet.tracker.close()

    def _waiting(self, outlet: _Outlet) -> str:
        count = len(self._ledger.waiting(outlet.name))
        return f"{count} finding{'s' if count != 1 else ''}"
