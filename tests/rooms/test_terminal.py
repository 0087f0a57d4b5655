"""What people see: plain text in a pipe, tables that fit on a terminal, and nothing that a name can do to either."""

from __future__ import annotations

import dataclasses
import io
import re
from collections.abc import Callable

import pytest

from peel_agent.cli import compare, scan, watch
from peel_agent.cli.terminal import show
from peel_agent.contrast import contrast, contrast_runs
from peel_agent.publish import Sheet, plain_text
from peel_agent.records import Comparable, LayerReport, PeelReport
from tests import histories

CODES = re.compile("\x1b\\[[0-9;]*m")
"""What colours are made of."""

HOSTILE = (
    *histories.HOSTILE,
    "[red]name[/red]",
    "[link=http://x]name[/link]",
    ":bomb:",
    "\x1b]8;;http://x\x07name\x1b]8;;\x07",
    "\x9b31mname",
    "a\rb\x08\nc\tdown",
    "x" * 5000,
)


class Terminal(io.StringIO):
    """A stream that says that it is a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NO_COLOR", "FORCE_COLOR", "COLORTERM", "TTY_COMPATIBLE", "TTY_INTERACTIVE", "CLICOLOR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")


def named(name: str) -> PeelReport:
    """A report in which everything that can have a name has this one."""
    one = histories.report(400)
    layers: list[LayerReport] = [
        dataclasses.replace(layer, name=name, best_reference=name, hint=name, finding=layer.finding and
                            dataclasses.replace(layer.finding, subject=name, words=name, causes=(name,)))
        for layer in one.layers
    ]  # fmt: skip
    model = dataclasses.replace(one.model, family=name, precision=name)
    skipped = tuple(dataclasses.replace(left_out, what=name, why=name) for left_out in one.skipped)
    checkpoint = dataclasses.replace(one.checkpoint, path=name)
    return dataclasses.replace(one, checkpoint=checkpoint, layers=tuple(layers), model=model, skipped=skipped)


def compared(name: str) -> Sheet:
    ends = Comparable(name, histories.report(100)), Comparable(name, named(name))
    return compare.whole_sheet(contrast(*ends, paired=None, notes=(name,)))


def compared_runs(_name: str) -> Sheet:
    history = histories.hostile_history()
    return compare.whole_sheet(contrast_runs(history, history, where=("a", "b")))


SHEETS: dict[str, Callable[[str], Sheet]] = {
    "scan": lambda name: scan.whole_sheet(named(name)),
    "watch": lambda name: watch.brief_sheet(named(name)),
    "compare": compared,
    "compare runs": compared_runs,
}

each_sheet = pytest.mark.parametrize("make", SHEETS.values(), ids=SHEETS)


def on_terminal(parts: Sheet, monkeypatch: pytest.MonkeyPatch, width: int) -> str:
    monkeypatch.setenv("COLUMNS", str(width))
    stream = Terminal()
    show(parts, stream)
    return stream.getvalue()


@each_sheet
@pytest.mark.parametrize("name", HOSTILE, ids=[repr(name)[:20] for name in HOSTILE])
def test_a_hostile_name_is_inert(make: Callable[[str], Sheet], name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """No name moves the cursor, colours, links, or is read as markup: it is shown as text, in a pipe and on a terminal.

    The only codes on a terminal are those of our own colours, which end with their line.
    """
    piped = io.StringIO()
    show(make(name), piped)
    assert all(one.isprintable() for line in piped.getvalue().splitlines() for one in line)
    shown = on_terminal(make(name), monkeypatch, 100)
    bare = CODES.sub("", shown)
    assert all(one.isprintable() for line in bare.splitlines() for one in line)
    for line in shown.splitlines():
        codes = CODES.findall(line)
        assert not codes or codes[-1] == "\x1b[0m"
    if name.startswith(("[", ":")):
        for text in (piped.getvalue(), bare):
            assert name in re.sub(r"\s+", " ", text) or make is compared_runs


@each_sheet
@pytest.mark.parametrize("width", [30, 40, 60, 80, 132, 200])
def test_every_width_is_kept(make: Callable[[str], Sheet], width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """No line is wider than the terminal, and every word of the verdict and every layer's status is still there."""
    parts = make("model.layers.x")
    shown = CODES.sub("", on_terminal(parts, monkeypatch, width))
    assert max(len(line.rstrip()) for line in shown.splitlines()) <= width
    words = re.sub(r"\s+", "", shown)
    verdict = plain_text(parts).splitlines()[0]
    assert re.sub(r"\s+", "", verdict) in words


@pytest.mark.parametrize("width", [40, 80, 200])
def test_nothing_is_left_out_in_silence(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A column that has no room is named, with where it is to be had; a list on a narrow terminal has them all."""
    parts = scan.whole_sheet(histories.report(400))
    shown = CODES.sub("", on_terminal(parts, monkeypatch, width))
    header = next((line for line in shown.splitlines() if line.startswith("block ")), None)
    columns = {"stand-in", "attention", "mlp", "share", "finding"}
    if header is None:
        assert width == 40
        assert all(f"  {column} " in shown for column in columns)
        return
    told = " ".join(shown.split())
    gone = {column for column in columns if column not in header}
    assert bool(gone) == (width == 80)
    for column in gone:
        assert re.search(rf"no room for [^:]*\b{re.escape(column)}\b", told)


@pytest.mark.parametrize(
    ("variable", "value", "coloured"),
    [("NO_COLOR", "1", False), ("TERM", "dumb", False), ("TERM", "xterm-256color", True)],
)
def test_colours(variable: str, value: str, coloured: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a terminal there are colours, unless NO_COLOR is set or the terminal is dumb: then there is no code at all."""
    monkeypatch.setenv(variable, value)
    shown = on_terminal(scan.whole_sheet(histories.report(400)), monkeypatch, 120)
    assert ("\x1b" in shown) == coloured


@pytest.mark.parametrize("variable", ["FORCE_COLOR", "TTY_COMPATIBLE"])
def test_a_pipe_gets_plain_text(variable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is no terminal gets no code and no width, whatever the environment says."""
    monkeypatch.setenv(variable, "1")
    monkeypatch.setenv("COLUMNS", "20")
    parts = scan.whole_sheet(histories.report(400))
    piped = io.StringIO()
    show(parts, piped)
    assert piped.getvalue() == plain_text(parts) + "\n"
    assert "\x1b" not in piped.getvalue()


def test_the_verdict_comes_first() -> None:
    """The first line of `scan` says in plain words what is wrong with which layer, before any number."""
    first, second = plain_text(scan.whole_sheet(histories.report(400))).splitlines()[:2]
    assert first == "At step 400: model.layers.3 earns less than a cheap stand-in."
    assert second.startswith("Loss ")


def test_watch_shows_what_stands_out() -> None:
    """Of a checkpoint a terminal sees the blocks with a finding or an open question, and how many more there are."""
    text = plain_text(watch.brief_sheet(histories.report(200, layers=40)))
    assert "model.layers.3 " in text
    assert "model.layers.4 " in text  # undecided
    assert "model.layers.5 " not in text
    assert "and 38 more blocks" in text
