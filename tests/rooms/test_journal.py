"""What happens, told once: lines of the log, events that are kept, and what is wrong now."""

from __future__ import annotations

import json
from typing import Any, get_args

import pytest

from peel_agent.journal import AGAIN_SECONDS, REMEMBERED, Journal
from peel_agent.records import Event, Level

AT = 1_700_000_000.0


class Desk:
    """A journal with a clock that is set by hand, and what came of it."""

    def __init__(self, **options: Any) -> None:
        self.now, self.lines, self.events = AT, list[str](), list[Event]()
        self.journal = Journal(self.lines.append, lambda: self.now, keep=self.events.append, **options)


def test_a_line_has_time_level_run_and_words() -> None:
    """In text for people; what happens to no run is the agent's."""
    desk = Desk()
    desk.journal.tell("found", "found a checkpoint", run="mine", step=5)
    desk.journal.tell("device", "the GPU is gone", level="error")
    assert desk.lines == [
        "2023-11-14T22:13:20Z INFO    mine: found a checkpoint",
        "2023-11-14T22:13:20Z ERROR   agent: the GPU is gone",
    ]
    assert desk.events == [
        Event("found", "found a checkpoint", AT, "mine", 5, "info"),
        Event("device", "the GPU is gone", AT, None, None, "error"),
    ]


def test_a_line_for_machines_is_one_json_object() -> None:
    """With its step and its kind."""
    desk = Desk(form="json")
    desk.journal.tell("found", 'found "x"', run="mine", step=5, level="warning")
    (line,) = desk.lines
    assert json.loads(line) == {
        "time": "2023-11-14T22:13:20Z",
        "level": "warning",
        "run": "mine",
        "step": 5,
        "event": "found",
        "message": 'found "x"',
    }


@pytest.mark.parametrize("level", get_args(Level))
def test_events_below_the_level_are_kept_and_not_written(level: Level) -> None:
    """The log is as quiet as it was asked to be; `status` still knows."""
    desk = Desk(level=level)
    levels: tuple[Level, ...] = ("info", "warning", "error")
    for one in levels:
        desk.journal.tell("found", f"of {one}", level=one)
    assert [line.split()[1].lower() for line in desk.lines] == list(levels[levels.index(level) :])
    assert [event.level for event in desk.events] == list(levels)


@pytest.mark.parametrize("form", ["text", "json"])
def test_names_out_of_a_hostile_checkpoint_stay_on_their_line(form: str) -> None:
    """No control character and no end of a line reaches the log or what is kept, and no text without bound."""
    desk = Desk(form=form)
    desk.journal.tell("found", "a\nb\x1b[31m\u202e" + "x" * 10_000)
    (line,) = desk.lines
    assert "\n" not in line
    assert "\x1b" not in line
    assert "\u202e" not in line
    assert len(line) < 3000
    assert len(desk.events[0].words) < 3000


AGAIN: dict[str, tuple[float, dict[str, Any], int]] = {
    "at once": (0.0, {}, 1),
    "within the minute": (AGAIN_SECONDS - 1, {}, 1),
    "after it": (AGAIN_SECONDS, {}, 2),
    "of another run": (0.0, {"run": "other"}, 2),
    "in other words": (0.0, {"words": "another"}, 2),
    "of another kind": (0.0, {"kind": "missed"}, 2),
    "of another step": (0.0, {"step": 6}, 1),
    "by a clock that went back": (-86_400.0, {}, 2),
}


@pytest.mark.parametrize("case", AGAIN)
def test_the_same_is_not_told_twice_a_minute(case: str) -> None:
    """The same words of the same run and kind come once within the minute, in the log and in what is kept."""
    later, changed, count = AGAIN[case]
    desk = Desk()
    told: dict[str, Any] = {"kind": "found", "words": "found it", "run": "mine", "step": 5}
    desk.journal.tell(**told)
    desk.now += later
    desk.journal.tell(**{**told, **changed})
    assert (len(desk.lines), len(desk.events)) == (count, count)


def test_what_was_told_is_not_remembered_without_end() -> None:
    """Weeks of different words take no more memory than a minute of them."""
    desk = Desk()
    for number in range(3 * REMEMBERED):
        desk.journal.tell("found", f"number {number}")
        desk.now += 1.0
    assert len(desk.journal._told) <= REMEMBERED + 1
    assert len(desk.lines) == 3 * REMEMBERED


# ---------------------------------------------------------------- troubles


def test_a_trouble_is_told_when_it_begins_and_when_it_ends() -> None:
    """However often it is met meanwhile; until it ends it is among what is wrong now."""
    desk = Desk()
    for _ in range(100):
        desk.journal.begin("store/mine", "the store is away", run="mine")
        desk.now += 30.0
    assert desk.journal.troubles == ("the store is away",)
    for _ in range(3):
        desk.journal.end("store/mine", "the store is back", run="mine")
    assert desk.journal.troubles == ()
    assert [(event.kind, event.level, event.run) for event in desk.events] == [
        ("trouble began", "warning", "mine"),
        ("trouble ended", "info", "mine"),
    ]


def test_a_trouble_that_changes_is_told_again() -> None:
    """First away, then denied: both are told, and the last words are what is wrong now."""
    desk = Desk()
    for words in ("away", "denied", "denied"):
        desk.journal.begin("store", words)
    assert [event.words for event in desk.events] == ["away", "denied"]
    assert desk.journal.troubles == ("denied",)


def test_a_trouble_of_changing_numbers_is_told_once_an_hour() -> None:
    """A GPU that is busy, looked at each second for two hours and a half; what is wrong now has the last number."""
    desk = Desk()
    for second in range(9000):
        desk.journal.begin("device", f"GPU 0 is not free: its utilisation is {50 + second % 40} %")
        desk.now += 1.0
    assert [event.words for event in desk.events] == [
        f"GPU 0 is not free: its utilisation is {percent} %" for percent in (50, 50, 50)
    ]
    assert desk.journal.troubles == ("GPU 0 is not free: its utilisation is 89 %",)
    desk.journal.begin("device", "GPU 0 is not free: process 12 computes on it")
    assert len(desk.events) == 4


def test_an_end_without_a_beginning_is_nothing() -> None:
    """Every delivery says that all is well: nobody hears of it."""
    desk = Desk()
    desk.journal.end("delivery/a", "taken again")
    assert desk.lines == desk.events == []


def test_troubles_are_apart_by_name() -> None:
    """One that ends leaves another, and all of a run that is not watched any more are dropped without a word."""
    desk = Desk()
    for name in ("run/a/place", "run/a/ledger", "run/ab/place", "delivery/x"):
        desk.journal.begin(name, f"trouble of {name}")
    desk.journal.end("delivery/x", "well again")
    told = len(desk.lines)
    desk.journal.drop("run/a/")
    assert desk.journal.troubles == ("trouble of run/ab/place",)
    assert len(desk.lines) == told
    desk.journal.end("run/a/place", "well again")
    assert len(desk.lines) == told
