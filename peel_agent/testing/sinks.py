"""What every sink plug-in must do, as checks that raise AssertionError. Needs no test framework.

    @pytest.mark.parametrize("check", CHECKS)
    def test_conforms(check, tmp_path):
        check(lambda: PLUGIN.connect(PLUGIN.settings(...), state_dir=tmp_path), read)

Each check wants a fresh place: a channel or a file that holds no notices yet.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from peel_agent.records import Notice, NoticeGroup
from peel_agent.spi import Sink

Connect = Callable[[], Sink]
"""Opens the sink, each time with the same settings and folder."""

Read = Callable[[], str]
"""Reads back everything that the place holds of what was delivered, in order, as one text."""


def example_group(name: str, *, notices: int = 2) -> NoticeGroup:
    """What changed at one moment: a group whose ids and words all hold its name."""
    all_of_it = tuple(
        Notice(
            id=f"{name}-{number}",
            rule="layer_below",
            severity="critical",
            state="firing" if number % 2 == 0 else "resolved",
            subject=f"model.layers.{number}",
            step=100,
            text=f"<{name}, notice {number}> earns less than a cheap stand-in would",
            since_step=100,
            causes=("it does nothing yet",),
        )
        for number in range(notices)
    )
    return NoticeGroup(
        id=f"group-{name}",
        run="a run",
        at=1_700_000_000.0,
        notices=all_of_it,
        text="\n".join(f"a run: {notice.state}: {notice.text}" for notice in all_of_it),
    )


def a_group_lands_whole(connect: Connect, read: Read) -> None:
    """Every notice of a group is there, in order, with its run, and the sink says where."""
    sink = connect()
    sink.deliver(example_group("one", notices=3))
    _expect(bool(sink.where().strip()), "where() says where the notices go", sink.where())
    sink.close()
    _expect_in_order(read(), *(f"<one, notice {number}>" for number in range(3)))
    _expect("a run" in read(), "the run is named", read())


def groups_keep_their_order(connect: Connect, read: Read) -> None:
    """Groups delivered one after the other are there in that order."""
    sink = connect()
    for name in ("one", "two", "three"):
        sink.deliver(example_group(name))
    sink.close()
    _expect_in_order(read(), "<one, notice 1>", "<two, notice 0>", "<two, notice 1>", "<three, notice 0>")


def repetition_loses_nothing(connect: Connect, read: Read) -> None:
    """A group that comes again, as after a crash, is no error, keeps those after it coming, and is there."""
    sink = connect()
    sink.deliver(example_group("one"))
    sink.deliver(example_group("one"))
    sink.close()
    again = connect()
    again.deliver(example_group("one"))
    again.deliver(example_group("two"))
    again.close()
    _expect_in_order(read(), "<one, notice 0>", "<two, notice 0>")
    _expect(read().count("<two, notice 0>") in (1, 2), "what was delivered once is not multiplied", read())


def reconnection_continues(connect: Connect, read: Read) -> None:
    """A sink opened again with the same settings delivers to the same place."""
    for name in ("one", "two"):
        sink = connect()
        sink.deliver(example_group(name))
        place = sink.where()
        sink.close()
    _expect(connect().where() == place, f"a reconnected sink is still at {place}", connect().where())
    _expect_in_order(read(), "<one, notice 0>", "<two, notice 0>")


HOSTILE = (
    "\r\nBcc: x@y.example\r\n\r\n\x00\x1b[31m\ud800 <!channel> @everyone 'x' \"y\" \\ ${HOME} $(id) {} %s ä 语 "
    + "z" * 5000
)
"""What a checkpoint, a run or a plug-in may have for a name."""


def hostile_words_do_no_harm(connect: Connect, read: Read) -> None:
    """A group whose run, subject and text hold line ends, control characters or markup is taken, and so is the next."""
    sink = connect()
    notice = replace(example_group("hostile").notices[0], subject=HOSTILE, text=HOSTILE, causes=(HOSTILE,))
    sink.deliver(replace(example_group("hostile"), run=HOSTILE, notices=(notice,), text=f"{HOSTILE}: {HOSTILE}"))
    sink.deliver(example_group("two"))
    sink.close()
    _expect_in_order(read(), "<two, notice 0>", "<two, notice 1>")


CHECKS: tuple[Callable[[Connect, Read], None], ...] = (
    a_group_lands_whole,
    groups_keep_their_order,
    repetition_loses_nothing,
    reconnection_continues,
    hostile_words_do_no_harm,
)


def _expect_in_order(text: str, *phrases: str) -> None:
    at = -1
    for phrase in phrases:
        at = text.find(phrase, at + 1)
        _expect(at >= 0, f"{phrase!r} is there, after what was delivered before it", text)


def _expect(holds: bool, claim: str, actual: object) -> None:
    if not holds:
        raise AssertionError(f"{claim}; found {actual!r}")
