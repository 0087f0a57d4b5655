"""One lane of deliveries: what is owed, in order, with patience, and past what will never be taken."""

from __future__ import annotations

import dataclasses
import json
import math
import random
import re
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, cast

from peel_agent.destinations import Address
from peel_agent.errors import DeliveryError, DestinationDenied, DestinationUnavailable, printable
from peel_agent.ledger import Extent, Lane, Outbox, Owed
from peel_agent.publish import publication_of_the_past, report_from_json
from peel_agent.records import NoticeGroup, Publication, plain, restored
from peel_agent.rendering import MOST_REPORTS, Order, pages
from peel_agent.spi import Showing, Sink, Tracker, TrainingReader

AWAY_SECONDS = (5.0, 300.0)
"""The first and the longest pause before a destination that cannot be reached is tried again."""

DENIED_SECONDS = (60.0, 900.0)
"""And before one that refuses us."""

LONGEST_PAUSE = 1.3 * max(*AWAY_SECONDS, *DENIED_SECONDS)
"""A next try that is further off was set by another clock."""

ALERTS_FILE = "peel/alerts.jsonl"

Frozen = TypeVar("Frozen", NoticeGroup, Publication)


@dataclass(frozen=True)
class Outcome:
    """What came of one look at a lane: `wait` seconds until the next is worth while, None when nothing is owed.

    `trouble` says in words what is wrong; `passed` that it is over; `buried` what was given up.
    """

    wait: float | None = 0.0
    sent: bool = False
    trouble: str | None = None
    passed: bool = False
    buried: str | None = None


class Carrier:
    """Serves one lane. `now` gives Unix seconds."""

    def __init__(self, lane: Lane, address: Address, outbox: Outbox, now: Callable[[], float]) -> None:
        self.lane = lane
        self._outbox = outbox
        self._now = now
        self._loss_keys = address.loss_keys
        self._folder = address.state_dir
        self._tracker: Tracker | None = address.tracker() if address.kind == "tracker" else None
        self._sink: Sink | None = address.sink() if address.kind == "sink" else None

    def prepare(self) -> None:
        """Loads what the destination needs, before anything is owed."""
        if self._tracker is not None:
            self._tracker.prepare()

    def where(self) -> str:
        """Where it goes, for people."""
        end = self._tracker if self._tracker is not None else self._sink
        assert end is not None
        return end.where()

    def step(self, *, at_once: bool = False) -> Outcome:
        """Sends what is first in line, if it is its time, or `at_once`. Raises sqlite3.Error."""
        owed = self._outbox.head(self.lane)
        if owed is None:
            return Outcome(wait=None)
        pause = owed.next_try - self._now()
        if 0 < pause <= LONGEST_PAUSE and not at_once:
            return Outcome(wait=pause)
        try:
            self._send(owed)
        except (DestinationDenied, DestinationUnavailable) as error:
            return self._postpone(owed, error)
        except DeliveryError as error:
            self._outbox.bury(owed, error.what)
            return Outcome(buried=f"{self._name()}: {error.what}; it was given up: peel-agent deliveries list")
        except Exception as error:  # a plug-in's library may raise anything; it must not end the lane
            return self._postpone(owed, error)
        self._outbox.sent(owed)
        return Outcome(sent=True, passed=owed.attempts > 0)

    def _send(self, owed: Owed) -> None:
        if self._sink is not None:
            self._sink.deliver(_thawed(NoticeGroup, owed.body))
            return
        if self.lane.kind == "pages":
            self._show(owed.body)
            return
        body = self._of_a_report(owed.body) if "report" in owed.body else dict(owed.body)
        until = body.pop("alerts_until", None)
        if until is not None:
            alerts = self._outbox.alerts_log(self.lane.run, until)
            body["files"] = {**body.get("files", {}), ALERTS_FILE: alerts}
        assert self._tracker is not None
        self._tracker.publish(_thawed(Publication, body))
        if self.lane.kind == "numbers" and isinstance(self._tracker, TrainingReader):
            self._read_training(self._tracker)

    def _show(self, body: Mapping[str, Any]) -> None:
        """Made now: of several that were owed only the last is left."""
        extent = Extent(body["history_until"], body.get("alerts_until"), most=MOST_REPORTS)
        with tempfile.TemporaryDirectory(prefix="peel-pages-") as folder:
            rendered = pages(Order(self._folder.parents[1], self.lane.run, extent, Path(folder)))
            if rendered is not None and isinstance(self._tracker, Showing):
                self._tracker.show(rendered)

    def _of_a_report(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """The publication of a checkpoint that was peeled before this tracker was there; its report is what is frozen.

        Raises DeliveryError when that cannot be read any more.
        """
        file = self._folder / "reports" / str(body["report"])
        try:
            report = report_from_json(json.loads(file.read_text(encoding="utf-8")))
            sent = publication_of_the_past(
                report,
                committed_at=body["committed_at"],
                max_series=body["max_series"],
                charted=self._outbox.series(self.lane.run),
            )
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise DeliveryError(
                f"the report {file} cannot be read: {error}", remedy="put it back, then peel-agent deliveries resend"
            ) from error
        kept = {"files": {}} if self.lane.kind == "numbers" else {"metrics": {}, "tags": {}, "headline": ""}
        return cast("dict[str, Any]", plain(dataclasses.replace(sent, **kept)))  # type: ignore[arg-type]

    def _read_training(self, tracker: TrainingReader) -> None:
        """What rules know of the training. It is no part of the delivery, which has been made."""
        try:
            log = tracker.training(self._loss_keys)
            loss = [(step, value) for step, value in log.loss if math.isfinite(value)]
            self._outbox.alerting(self.lane.run).keep_training(loss, ended=log.ended)
        except Exception:  # rules go without: missing data neither raises nor clears
            return

    def _postpone(self, owed: Owed, error: Exception) -> Outcome:
        """Exponential back-off with jitter."""
        first, longest = DENIED_SECONDS if isinstance(error, DestinationDenied) else AWAY_SECONDS
        pause = min(first * 2.0 ** min(owed.attempts, 20), longest) * random.uniform(0.8, 1.2)  # noqa: S311 - no secret
        what = error.what if isinstance(error, DeliveryError) else in_words(error)
        self._outbox.postpone(owed, self._now() + pause, what)
        remedy = f" -> {error.remedy}" if isinstance(error, DeliveryError) else ""
        return Outcome(wait=pause, trouble=f"{self._name()}: {what}{remedy}")

    def _name(self) -> str:
        return f"{self.lane.kind} for {self.lane.destination}"

    def close(self) -> None:
        end = self._tracker if self._tracker is not None else self._sink
        if end is not None:
            end.close()


def in_words(error: Exception) -> str:
    """What a plug-in's library said, without the user and the password of any address in it."""
    return printable(re.sub(r"://[^/\s]*@", "://", f"{type(error).__name__}: {error}"))


def _thawed(kind: type[Frozen], body: Mapping[str, Any]) -> Frozen:
    """The record that was owed; DeliveryError for one that this version cannot read, which time does not mend."""
    try:
        return restored(kind, body)
    except (TypeError, ValueError, AttributeError) as error:
        raise DeliveryError(
            f"it is no {kind.__name__} that this version of peel-agent can read: {error}",
            remedy="use the version that wrote it, then peel-agent deliveries resend",
        ) from error
