"""What is owed to destinations: in order within a lane, and gone only when taken."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from peel_agent.ledger.alerting import Alerting
from peel_agent.ledger.database import Database
from peel_agent.ledger.run import series, tally


@dataclass(frozen=True, order=True)
class Lane:
    """What must arrive in order: one kind of thing (`numbers`, `files`, `notices`) of one run for one destination."""

    run: str
    destination: str
    kind: str


@dataclass(frozen=True)
class Owed:
    """One thing owed, frozen when it was owed; it is tried again at the time `next_try`, in Unix seconds."""

    id: int
    lane: Lane
    key: str
    body: dict[str, Any]
    attempts: int
    next_try: float
    why: str | None


class Outbox:
    """The deliveries of a ledger, through a connection of one's own."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def alerting(self, run: str) -> Alerting:
        """What is kept of a run for its rules."""
        return Alerting(self._database, run)

    def series(self, run: str) -> frozenset[str]:
        """The keys of all metrics that a run was ever published under."""
        return series(self._database, run)

    def lanes(self) -> tuple[Lane, ...]:
        """Those that owe anything."""
        rows = self._database.query("SELECT DISTINCT run, destination, lane FROM deliveries WHERE dead = 0")
        return tuple(sorted(Lane(*row) for row in rows))

    def head(self, lane: Lane) -> Owed | None:
        """What is first in line."""
        rows = self._database.query(
            "SELECT id, key, body, attempts, next_try, why FROM deliveries "
            "WHERE run = ? AND destination = ? AND lane = ? AND dead = 0 ORDER BY id LIMIT 1",
            (lane.run, lane.destination, lane.kind),
        )
        if not rows:
            return None
        number, key, body, attempts, next_try, why = rows[0]
        return Owed(number, lane, key, json.loads(body), attempts, next_try, why)

    def next_tries(self) -> dict[Lane, float]:
        """When each lane that owes anything may be tried, in Unix seconds; bodies are not read for that."""
        rows = self._database.query(
            "SELECT run, destination, lane, next_try FROM deliveries WHERE id IN "
            "(SELECT min(id) FROM deliveries WHERE dead = 0 GROUP BY run, destination, lane)"
        )
        return {Lane(*row[:3]): float(row[3]) for row in rows}

    def next_try(self) -> float | None:
        """When the first of the lanes may be tried, in Unix seconds; None when nothing is owed."""
        return min(self.next_tries().values(), default=None)

    def alerts_log(self, run: str, until: int) -> str:
        """A run's alerts up to this position, one JSON object a line."""
        rows = self._database.query(
            "SELECT line FROM alerts WHERE run = ? AND position <= ? ORDER BY position", (run, until)
        )
        return "".join(f"{line}\n" for (line,) in rows)

    def sent(self, owed: Owed) -> None:
        """The destination took it."""
        with self._database.transaction() as db:
            db.execute("DELETE FROM deliveries WHERE id = ?", (owed.id,))
            tally(db, owed.lane.run, f"delivered/{owed.lane.destination}/{owed.lane.kind}")

    def postpone(self, owed: Owed, next_try: float, why: str) -> None:
        """It is tried again then, and what comes after it waits."""
        with self._database.transaction() as db:
            db.execute(
                "UPDATE deliveries SET attempts = attempts + 1, next_try = ?, why = ? WHERE id = ?",
                (next_try, why, owed.id),
            )
            tally(db, owed.lane.run, f"postponed/{owed.lane.destination}/{owed.lane.kind}")

    def bury(self, owed: Owed, why: str) -> None:
        """It will never be taken as it is: what comes after it goes on."""
        with self._database.transaction() as db:
            db.execute("UPDATE deliveries SET dead = 1, attempts = attempts + 1, why = ? WHERE id = ?", (why, owed.id))

    def dead(self) -> tuple[Owed, ...]:
        """What was given up, oldest first."""
        rows = self._database.query(
            "SELECT id, run, destination, lane, key, body, attempts, next_try, why FROM deliveries WHERE dead = 1 "
            "ORDER BY id"
        )
        return tuple(Owed(row[0], Lane(*row[1:4]), row[4], json.loads(row[5]), *row[6:]) for row in rows)

    def retry(self, numbers: tuple[int, ...] | None = None) -> int:
        """What was given up, or put off, is tried now: these, or all of it. Returns how many."""
        chosen = "" if numbers is None else f" AND id IN ({', '.join(map(str, map(int, numbers)))})"
        with self._database.transaction() as db:
            sql = f"UPDATE deliveries SET dead = 0, next_try = 0 WHERE (dead = 1 OR next_try > 0){chosen}"  # noqa: S608
            return db.execute(sql).rowcount

    def owed(self) -> dict[Lane, tuple[int, int]]:
        """How much each lane owes, and how much of it was given up."""
        rows = self._database.query(
            "SELECT run, destination, lane, sum(1 - dead), sum(dead) FROM deliveries GROUP BY run, destination, lane"
        )
        return {Lane(*row[:3]): (int(row[3]), int(row[4])) for row in rows}
