"""leases: whose turn it is. The worst margin goes first, and nobody waits for ever."""

from __future__ import annotations

import time
from collections import Counter
from concurrent.futures import Future
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from peel_agent.devices import Devices
from peel_agent.errors import DeviceUnavailable
from peel_agent.journal import Journal
from peel_agent.leases import GIVEN_UP_AFTER, PATIENCE, Leases, Turn, next_turn
from peel_agent.records import DeviceLease, Peeled, Request

UNKNOWN = None


class NoEngine:
    """The engine of agents that only lease."""

    capacity = 1

    def submit(self, _request: Request) -> Future[Peeled]:
        raise NotImplementedError

    def give_way(self, _fingerprint: str, _reason: str) -> None:
        raise NotImplementedError

    def memory_bytes(self) -> int | None:
        return None

    def close(self, _seconds: float) -> None:
        return None


class EngineElsewhere(NoEngine):
    """One that has two devices of its own on some other machine, unless that is `away`."""

    def __init__(self) -> None:
        self.free, self.away = ["two", "one"], False

    def acquire(self) -> DeviceLease | None:
        if self.away:
            raise DeviceUnavailable("the cluster is away", remedy="start it")
        return DeviceLease("cpu", "", "the cluster", "it is named", elsewhere=self.free.pop()) if self.free else None

    def release(self, lease: DeviceLease) -> None:
        self.free.append(lease.elsewhere)


def cpu(folder: Path) -> Leases:
    devices = Devices("cpu", 0.5, folder, None, time.monotonic)
    return Leases(devices, NoEngine(), Journal(lambda _: None, lambda: 0.0))


@pytest.mark.parametrize(
    ("waiting", "first"),
    [
        pytest.param([("a", 0.05, 0), ("b", 0.01, 0)], "b", id="the worst margin"),
        pytest.param([("a", 0.01, 0), ("b", -0.01, 0)], "b", id="less than nothing is worse than little"),
        pytest.param([("a", -0.01, 0), ("b", UNKNOWN, 0)], "b", id="one that nothing is known of"),
        pytest.param([("a", UNKNOWN, 1), ("b", UNKNOWN, 0)], "a", id="of two unknown ones the first"),
        pytest.param([("a", 0.01, 0), ("b", 0.01, 3)], "a", id="of equals the first"),
        pytest.param([("a", 0.05, 2 * PATIENCE - 1), ("b", 0.01, 0)], "b", id="not overdue yet"),
        pytest.param([("a", 0.05, 2 * PATIENCE), ("b", 0.01, 0)], "a", id="overdue"),
        pytest.param([("a", 0.05, 9), ("b", 0.01, 8), ("c", UNKNOWN, 0)], "a", id="of two overdue the first"),
    ],
)
def test_whose_turn_it_is(waiting: list[tuple[str, float | None, int]], first: str) -> None:
    """Unknown, then the worst margin, then who waits longest; before all of them who was passed by too often."""
    assert next_turn([Turn(*one) for one in waiting]).run == first


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 12), st.integers(0, 2**32), st.data())
def test_nobody_waits_for_ever(runs: int, seed: int, data: st.DataObject) -> None:
    """Whatever the margins and whoever comes back when: of n runs none is passed by over (PATIENCE + 1) n times."""
    margins = data.draw(st.lists(st.none() | st.floats(-1, 1), min_size=runs, max_size=runs))
    comes_back = data.draw(st.lists(st.integers(0, 5), min_size=runs, max_size=runs))
    waiting: dict[str, int] = {}
    away = {str(run): seed % (run + 1) for run in range(runs)}
    for _ in range(8 * runs):
        for run in [run for run, left in away.items() if left <= 0]:
            del away[run]
            waiting[run] = 0
        away = {run: left - 1 for run, left in away.items()}
        if not waiting:
            continue
        first = next_turn([Turn(run, margins[int(run)], passed) for run, passed in waiting.items()]).run
        del waiting[first]
        waiting = {run: passed + 1 for run, passed in waiting.items()}
        away[first] = comes_back[int(first)]
        assert max(waiting.values(), default=0) <= (PATIENCE + 1) * runs


def test_the_worst_gets_most_and_the_others_a_third_of_an_even_share(tmp_path: Path) -> None:
    """Five runs that always wait: the one with the worst margin is peeled most, and none of the others is left out."""
    leases, served = cpu(tmp_path), Counter[str]()
    margins = {"a": 0.05, "b": 0.04, "worst": -0.01, "c": 0.03, "d": 0.02}
    for _ in range(600):
        leased = None
        while leased is None:
            for run, margin in margins.items():
                if leased is None and (leased := leases.ask(run, margin)) is not None:
                    served[run] += 1
        for run, margin in margins.items():  # the device is in use
            assert leases.ask(run, margin) is None
        leases.give_back(leased)
    assert sum(served.values()) == 600
    assert served.most_common(1)[0][0] == "worst"
    assert min(served.values()) >= 600 / len(margins) / (PATIENCE + 1)


def test_who_asks_more_often_is_not_served_more_often(tmp_path: Path) -> None:
    """Three runs, one of which looks at its place ten times as seldom, take turns on one device."""
    leases = cpu(tmp_path)
    served: Counter[str] = Counter()
    holder, held = None, None
    for turn in range(3000):
        if held is not None and turn % 50 == 7:
            leases.give_back(held)
            holder, held, asking = None, None, ["quick", "other", "slow"]  # all are woken then
        else:
            asking = ["quick", "other", *(["slow"] if turn % 10 == 0 else [])]
        for run in asking:
            if run != holder and held is None and (held := leases.ask(run)) is not None:
                holder = run
                served[run] += 1
            elif run != holder:
                assert leases.ask(run) is None
    shares = [served[run] for run in ("quick", "other", "slow")]
    assert max(shares) - min(shares) <= 1, served


def test_a_run_that_went_away_holds_up_nobody(tmp_path: Path) -> None:
    """One that asked first, and never again, is passed by after some asks of another, or at once when it is ended."""
    leases = cpu(tmp_path)
    lease = leases.ask("at work")
    assert lease is not None
    for ends in (False, True):
        assert leases.ask("gone") is None
        assert leases.ask("here") is None
        leases.give_back(lease)
        if ends:
            leases.forget("gone")
        asks = [leases.ask("here") for _ in range(GIVEN_UP_AFTER + 1)]
        lease = next(one for one in asks if one is not None)
        assert asks.index(lease) == (0 if ends else GIVEN_UP_AFTER)


def test_an_engine_elsewhere_leases_its_own_devices(tmp_path: Path) -> None:
    """As many runs peel at once as it has devices; while it is away none does, which is told once."""
    engine = EngineElsewhere()
    said: list[str] = []
    leases = Leases(Devices("cpu", 0.5, tmp_path, None, time.monotonic), engine, Journal(said.append, lambda: 0.0))
    first, second, third = (leases.ask(run) for run in ("a", "b", "c"))
    assert first is not None
    assert second is not None
    assert (first.elsewhere, second.elsewhere, third) == ("one", "two", None)
    leases.look()  # at no device of this machine
    leases.give_back(first)
    leases.give_back(first)
    engine.away = True
    assert [leases.ask("c") for _ in range(3)] == [None] * 3
    assert sum("the cluster is away -> start it" in line for line in said) == 1
    engine.away = False
    third = leases.ask("c")
    assert third is not None
    assert third.elsewhere == "one"
    assert engine.free == []
