"""The views room: a history as tables, charts and one page; no browser, which tests/runs/test_report_page.py has."""

from __future__ import annotations

import dataclasses
import json
import re
import sys
from html.parser import HTMLParser
from typing import Any

import pytest

from peel_agent.errors import ConfigurationError
from peel_agent.records import Finding, Gap, History
from peel_agent.views import Provenance, heat_map_png, report_page
from peel_agent.views.content import content_of
from peel_agent.views.lifetimes import lifetimes
from peel_agent.views.table import Table
from peel_agent.views.timeline import Span, timeline
from peel_agent.views.verdict import standing, verdict
from tests import histories

MADE = Provenance("peel-agent report run --out report.html", "2026-01-01 00:00:00 UTC", {"peel-agent": "0.1.0"})


class Page(HTMLParser):
    """What a browser would make of it: tags, the text of each, and the policy."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self._open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        while self._open and self._open.pop() != tag:
            pass

    def handle_data(self, data: str) -> None:
        if not {"script", "style"} & set(self._open):
            self.texts.append(data)

    @property
    def text(self) -> str:
        return " ".join(self.texts)


def data_of(page: str) -> dict[str, Any]:
    """What a program reads out of the page."""
    (text,) = re.findall(r'<script type="application/json" id="peel-data">(.*?)</script>', page, flags=re.DOTALL)
    return json.loads(text)


def records(form: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of one table, with its texts."""
    texts = form["texts"]
    return [
        {
            name: texts[name][value] if name in texts and value is not None else value
            for name, value in zip(form["columns"], row, strict=True)
        }
        for row in form["rows"]
    ]


@pytest.fixture(scope="module")
def page() -> str:
    return report_page(histories.run_history(), MADE)


def test_the_page_has_all_of_a_run(page: str) -> None:
    """Verdict, every chart with a table behind it, what fires, what was not checked, and how to make it again."""
    shown = Page(page)
    assert "At step 1,200: model.layers.3 earns less than a cheap stand-in." in shown.text
    charts = {attrs["data-chart"] for tag, attrs in shown.tags if tag == "figure"}
    assert charts == {"loss", "heat_map", "alerts", "gaps", "layer", "shares", "redundancy"}
    assert sum(tag == "table" for tag, _ in shown.tags) == len(charts)
    for words in (
        "layer_below: model.layers.3",
        "perhaps it was held back",
        "the time budget was spent",
        MADE.command,
        "peel-agent scan run/checkpoint-800 --probe heldout.npy",
        "beef: 65,536 tokens to fit",
        "Alerts: 1 firing, 1 over.",
        "9 checkpoints peeled, 3 without a report.",
        "overtaken",
    ):
        assert words in shown.text, words


def test_a_program_reads_the_page(page: str) -> None:
    """The embedded data holds the reports' numbers, to the digits that it names, and every gap and alert."""
    data = data_of(page)
    history = histories.run_history()
    assert data["schema"] == "peel-agent/history/1"
    rows = records(data["tables"]["checkpoints"])
    assert [row["step"] for row in rows] == [report.checkpoint.step for report in history.reports]
    assert [row["loss"] for row in rows] == pytest.approx([report.loss.value for report in history.reports], rel=1e-4)
    cells = {(row["step"], row["layer"], row["band"]): row for row in records(data["tables"]["cells"])}
    for report in history.reports:
        for layer in report.layers:
            block_row = cells[report.checkpoint.step, layer.index, "block"]
            assert layer.margin is not None
            assert block_row["margin"] == pytest.approx(layer.margin.value, rel=1e-4)
            assert (block_row["status"], block_row["stand_in"]) == (layer.status, layer.best_reference)
    assert (100, 0, "mlp") not in cells, "what was not measured has no cell"
    assert {row["step"]: row["cause"] for row in records(data["tables"]["gaps"])} == {
        500: "rotated", 600: "refused", 900: "overtaken",
    }  # fmt: skip
    assert [row["state"] for row in records(data["tables"]["alerts"])] == ["firing", "over"]


def test_the_page_is_one_file_that_asks_nobody(page: str) -> None:
    """No tag has an address but the empty icon, and the policy allows two scripts and one style by their hashes."""
    addresses = [
        value for _, attrs in Page(page).tags for name, value in attrs.items() if name in ("src", "href", "action")
    ]
    assert set(addresses) == {"#content", "data:,"}
    (policy,) = [attrs["content"] for tag, attrs in Page(page).tags if attrs.get("http-equiv")]
    assert policy is not None
    assert "unsafe" not in policy
    assert policy.startswith("default-src 'none'; ")
    assert len(re.findall(r"'sha256-[A-Za-z0-9+/]{43}='", policy)) == 3


def test_hostile_names_are_text() -> None:
    """Names that try to be HTML, script, a template or a terminal's codes are shown as they are, and are nothing else.

    The page has the same tags as with plain names, no name is in a chart's specification, and no control character is
    left.
    """
    hostile = report_page(histories.hostile_history(), MADE)
    shown = Page(hostile).text + str(data_of(hostile))
    assert not [character for character in shown if not character.isprintable() and character != "\n"]
    for name in ("script", "img", "b"):
        expected = 3 if name == "script" else 0
        assert sum(tag == name for tag, _ in Page(hostile).tags) == expected, name
    for text in (histories.HOSTILE[0], histories.HOSTILE[1], "\\x1b[31mred", "{{ 7 * 7 }}", "\\u202egnp.exe"):
        assert text in shown, text
    for key, chart in data_of(hostile)["charts"].items():
        assert not [name for name in histories.HOSTILE if name in json.dumps(chart["spec"])], key


def test_a_long_deep_run_stays_small() -> None:
    """96 layers and 2,000 checkpoints are under 5 MB: what is drawn is thinned, and the page says so.

    The first, the last and those with an alert are drawn, and the margin of each layer at every checkpoint is kept.
    """
    history = histories.run_history(checkpoints=2000, layers=96)
    page = report_page(history, MADE)
    assert len(page.encode()) < 5_000_000
    data = data_of(page)
    drawn = {row["step"] for row in records(data["tables"]["columns"])}
    assert {100, 300, 800, 200_000} <= drawn
    assert len(drawn) == data["drawn"]["in_detail"] < data["drawn"]["checkpoints"] == len(history.reports)
    assert f"Thinned: {len(drawn)} of 1,997 checkpoints" in Page(page).text
    margins = records(data["tables"]["margins"])
    assert len(margins) == len(history.reports)
    assert len(margins[0]) == 1 + 96


def test_the_heat_map_is_an_image_of_the_same_chart() -> None:
    """The PNG is drawn from the page's own specification; without a margin there is none."""
    assert (heat_map_png(histories.run_history()) or b"").startswith(b"\x89PNG")
    bare = tuple(dataclasses.replace(report, layers=()) for report in histories.run_history().reports)
    assert heat_map_png(dataclasses.replace(histories.run_history(), reports=bare)) is None


@pytest.mark.parametrize("package", ["vl_convert", "jinja2"])
def test_without_the_extra_it_says_how_to_install_it(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A package of the extra that is not there is named, with the command that installs it."""
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ConfigurationError, match=package) as caught:
        report_page(histories.run_history(), MADE)
    assert caught.value.remedy == 'pip install "peel-agent[report]"'


LEAST = histories.report(100, layers=0)


@pytest.mark.parametrize(
    "history",
    [
        pytest.param(History("r", "p", (LEAST,)), id="one report without layers"),
        pytest.param(History("r", "p", (histories.report(None),)), id="an export without a step"),
        pytest.param(History("r", "p", (dataclasses.replace(LEAST, bound=None, gap=None, bounds=()),)), id="no bound"),
        pytest.param(History("r", "p", (histories.report(0), histories.report(0))), id="step 0, twice"),
        pytest.param(History("r", "p", (LEAST,), gaps=(Gap(None, "x", "refused", "y"),)), id="a gap without a step"),
    ],
)
def test_little_is_shown_too(history: History) -> None:
    """The page of a history that has hardly anything is made, and its data can be read."""
    data = data_of(report_page(history, MADE))
    assert all("rows" in table for table in data["tables"].values())


@pytest.mark.parametrize(
    ("findings", "words"),
    [
        ([], "At step 100, nothing was found in any of 2 layers."),
        (["a is idle"], "At step 100: a is idle."),
        (["a", "b", "c", "d"], "At step 100: a; b; c; and 1 more is listed below."),
        (["a", "b", "c", "d", "e"], "At step 100: a; b; c; and 2 more are listed below."),
    ],
)
def test_the_verdict_is_one_sentence(findings: list[str], words: str) -> None:
    """It names at most three findings, and counts the others."""
    layers = histories.report(100, layers=max(2, len(findings))).layers
    named_layers = [
        dataclasses.replace(layer, finding=Finding("below", layer.name, findings[i]) if i < len(findings) else None)
        for i, layer in enumerate(layers)
    ]
    assert verdict(dataclasses.replace(LEAST, layers=tuple(named_layers))) == words


@pytest.mark.parametrize(
    ("status", "words"),
    [
        ("not_measured", "At step 100, margins were not measured, so nothing is known of single layers."),
        ("undecided", "At step 100, nothing was found in 0 of 2 layers, and 2 could not be decided."),
    ],
)
def test_the_verdict_does_not_call_it_well(status: str, words: str) -> None:
    """What was not measured or not decided is not said to be in order."""
    layers = tuple(dataclasses.replace(layer, status=status) for layer in histories.report(100, layers=2).layers)
    assert verdict(dataclasses.replace(LEAST, layers=layers)) == words


def test_a_gap_of_the_head_is_not_called_the_layers() -> None:
    """Where a refitted output matrix alone is the bound, the sentence does not accuse the layers."""
    of_head = dataclasses.replace(LEAST, zone="caution", bound_label="head")
    assert "the gap is not the layers'" in standing(of_head)
    assert "built from the run's own layers" in standing(dataclasses.replace(of_head, bound_label="1-2"))


def test_what_is_missing_stays_blank_on_the_axis() -> None:
    """A checkpoint reaches half-way to its neighbour, and to one that is missing; a long pause stays blank too."""
    reports = tuple(histories.report(step) for step in (100, 200, 400, 500, 900))
    line = timeline(History("r", "p", reports, gaps=(Gap(300, "x", "rotated", "y"),)), bands=1)
    # The usual distance is 150.
    assert line.spans == {
        100: Span(25, 150), 200: Span(150, 250), 400: Span(350, 450), 500: Span(450, 575), 900: Span(825, 975),
    }  # fmt: skip


def test_alerts_live_from_the_step_that_they_are_about_to_their_end() -> None:
    """A notice that repeats an alert is the same alert, in newer words; one that comes after its end is another."""
    told = [
        histories.notice("firing", 300),
        dataclasses.replace(histories.notice("firing", 500), text="it is idle still"),
        histories.notice("resolved", 800),
        histories.notice("firing", 1100),
        histories.notice("resolved", 900, subject="run"),
    ]
    lives = lifetimes(told)
    assert [(one.since, one.until, one.is_over) for one in lives] == [(200, 800, True), (1000, None, False)]
    assert lives[0].text == "it is idle still"


def test_content_speaks_of_the_last_step() -> None:
    """The page speaks of the report with the greatest step, however late an earlier one was peeled."""
    late = History("r", "p", tuple(histories.report(step) for step in (300, 100)))
    assert content_of(late).newest.checkpoint.step == 300


def test_a_table_says_texts_once() -> None:
    """Texts of a column are kept once, and numbers to five digits."""
    form = Table(("n", "text"), [(0.123456789, "a"), (None, "b"), (2.0, "a"), (1, None)]).form()
    rows = [[0.12346, 0], [None, 1], [2, 0], [1, None]]
    assert form == {"columns": ["n", "text"], "texts": {"text": ["a", "b"]}, "rows": rows}
