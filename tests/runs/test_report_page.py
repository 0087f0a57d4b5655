"""The report page in a real browser, as a file, without a network; and the command that makes it."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from peel_agent.contrast import contrast_runs, difference_verdict
from peel_agent.records import History
from peel_agent.views import Provenance, difference_page, report_page
from tests import histories

sync_api = pytest.importorskip("playwright.sync_api")

CHROMIUM = shutil.which("chromium")

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(CHROMIUM is None, reason="needs Debian's chromium (apt-get install chromium)"),
]

MADE = Provenance("peel-agent report run --out report.html", "2026-01-01 00:00:00 UTC", {"peel-agent": "0.1.0"})

Open = Callable[..., Any]

ONE = histories.report(100)
LITTLE = [
    pytest.param(History("r", "p", (ONE,)), id="one checkpoint"),
    pytest.param(History("r", "p", (dataclasses.replace(ONE, layers=(), bounds=()),)), id="no layers"),
    pytest.param(History("r", "p", (dataclasses.replace(ONE, bound=None, gap=None, bounds=()),)), id="no bound"),
    pytest.param(
        History("r", "p", (dataclasses.replace(ONE, layers=tuple(
            dataclasses.replace(layer, status="not_measured", margin=None, parts={}) for layer in ONE.layers
        )),)), id="no margins",
    ),
    pytest.param(
        History("r", "p", (dataclasses.replace(ONE, layers=tuple(
            dataclasses.replace(layer, status="undecided", parts={}) for layer in ONE.layers
        )),)), id="all undecided",
    ),
    pytest.param(History("r", "p", (histories.report(None),)), id="no step"),
]  # fmt: skip


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield running
        running.close()


@pytest.fixture
def opened(browser: Any, tmp_path: Path) -> Iterator[Open]:
    """Opens the page of a history from its file; fails when the browser complained, or asked for anything else."""
    complaints: list[str] = []
    contexts: list[Any] = []

    def open_page(shown: History | str, *, scheme: str = "light", width: int = 1100) -> Any:
        file = tmp_path / "report.html"
        file.write_text(shown if isinstance(shown, str) else report_page(shown, MADE))
        viewport = {"width": width, "height": 800}
        context = browser.new_context(offline=True, color_scheme=scheme, viewport=viewport)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: complaints.append(f"{message.type}: {message.text}"))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("dialog", lambda dialog: complaints.append(dialog.message))
        page.on("request", lambda request: None if request.url.startswith("file:") else complaints.append(request.url))
        page.goto(file.as_uri())
        page.wait_for_selector("html[data-drawn]", timeout=120_000)
        return page

    yield open_page
    for context in contexts:
        context.close()
    asked = [complaint for complaint in complaints if complaint != "data:,"]
    assert asked == []


def is_drawn(page: Any) -> bool:
    """Whether each figure has a canvas, and none says that it cannot be drawn."""
    figures = page.locator("figure").count()
    return bool(page.locator("figure canvas").count() == figures and not page.get_by_text("cannot be drawn").count())


def over(page: Any, layer: float, step: float) -> Any:
    """The pointer over a place of the heat map; what is said there."""
    place = page.evaluate(
        """([layer, step]) => {
            const view = peelViews.heat_map, origin = view.origin();
            return [origin[0] + view.scale('x')(step), origin[1] + view.scale('y')(layer)];
        }""",
        [layer, step],
    )
    canvas = page.locator("figure[data-chart=heat_map] canvas")
    canvas.scroll_into_view_if_needed()
    canvas.hover(position={"x": place[0], "y": place[1]}, force=True)
    tooltip = page.locator("#vg-tooltip-element.visible")
    tooltip.wait_for()
    return tooltip.inner_text()


def colors(page: Any, layer: float, step: float) -> list[int]:
    """Red, green and blue of a place of the heat map."""
    return page.evaluate(
        """([layer, step]) => {
            const view = peelViews.heat_map, origin = view.origin();
            const canvas = document.querySelector('figure[data-chart=heat_map] canvas');
            const ratio = canvas.width / canvas.clientWidth;
            const copy = new OffscreenCanvas(canvas.width, canvas.height).getContext('2d', {willReadFrequently: true});
            copy.drawImage(canvas, 0, 0);
            const x = origin[0] + view.scale('x')(step), y = origin[1] + view.scale('y')(layer);
            return Array.from(copy.getImageData(x * ratio, y * ratio, 1, 1).data).slice(0, 3);
        }""",
        [layer, step],
    )


@pytest.mark.parametrize("history", [histories.run_history(), histories.hostile_history()], ids=["usual", "hostile"])
def test_the_page_of_a_comparison(opened: Open, history: History) -> None:
    """Every chart of two runs held against each other is drawn, nothing in a name runs, and axe-core finds nothing."""
    report = contrast_runs(history, history, where=("a", "b"))
    page = opened(difference_page(report, difference_verdict(report), MADE))
    assert is_drawn(page)
    assert page.locator("figure").count() == 2
    assert page.evaluate("window.ran") is None
    axe = pytest.importorskip("axe_playwright_python.sync_playwright").Axe()
    results = axe.run(page)
    assert results.violations_count == 0, results.generate_report()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_draws_everything_without_a_network(opened: Open, scheme: str) -> None:
    """All charts are drawn under the policy, from a file, offline; nothing is said in the console."""
    page = opened(histories.run_history(), scheme=scheme)
    assert is_drawn(page)
    assert page.locator("#verdict").inner_text() == "At step 1,200: model.layers.3 earns less than a cheap stand-in."


@pytest.mark.parametrize("history", LITTLE)
def test_little_is_drawn_without_a_complaint(opened: Open, history: History) -> None:
    """Where there is no bound, no layer, or one checkpoint alone, what there is is drawn, and nothing is said."""
    assert is_drawn(opened(history))


def test_the_pointer_shows_interval_and_stand_in(opened: Open) -> None:
    """Over a cell stand the layer, the step, the margin with its interval, and the stand-in beside which it is."""
    said = over(opened(histories.run_history()), 3.25, 700)
    for words in ("model.layers.3", "700", "below", "0.0010 [\u22120.0030, 0.0050]", "skip"):
        assert words in said, said


def test_the_layer_that_is_held_back_is_darkest(opened: Open) -> None:
    """The row of the layer that never learned is darkest at the last step; what is undecided has no colour."""
    page = opened(histories.run_history())
    light = {layer: sum(colors(page, layer + 0.25, 1190)) for layer in range(6)}
    assert min(light, key=lambda layer: light[layer]) == histories.HELD_BACK
    red, green, blue = colors(page, 4.55, 105)
    assert max(red, green, blue) - min(red, green, blue) < 12, "grey strokes or the ground"


def test_one_layer_is_chosen_by_keyboard(opened: Open) -> None:
    """The list of layers is reached and used with keys alone, and each table opens with them."""
    page = opened(histories.run_history())
    page.locator(".vega-bind select").focus()
    before = page.evaluate("peelViews.layer.signal('layer')")
    page.keyboard.press("ArrowDown")
    page.wait_for_function("before => peelViews.layer.signal('layer') != before", arg=before)
    page.locator("summary").first.focus()
    page.keyboard.press("Enter")
    assert page.locator("details[open] table").first.is_visible()


def test_hostile_names_do_not_run(opened: Open) -> None:
    """Names that try to be script are neither run nor made tags, in the page and under the pointer."""
    page = opened(histories.hostile_history())
    assert is_drawn(page)
    assert histories.HOSTILE[1] in over(page, 1.25, 200)
    assert page.evaluate("window.ran") is None
    assert page.locator("img").count() == 0


def test_a_phone_shows_all_of_it(opened: Open) -> None:
    """At 390 pixels nothing reaches over the side: what is wider scrolls by itself."""
    page = opened(histories.run_history(), width=390)
    assert is_drawn(page)
    page.evaluate("for (const one of document.querySelectorAll('details')) one.open = true")
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing(opened: Open, scheme: str) -> None:
    """axe-core, which tests what screen readers and weak eyes need, finds no violation with all tables open."""
    axe = pytest.importorskip("axe_playwright_python.sync_playwright").Axe()
    page = opened(histories.run_history(), scheme=scheme)
    page.evaluate("for (const one of document.querySelectorAll('details')) one.open = true")
    results = axe.run(page)
    assert results.violations_count == 0, results.generate_report()
