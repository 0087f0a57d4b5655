"""MLflow's own pages in a real browser: a run's charts, its image slider, and what its artifact tab opens."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

PATIENCE = 120_000
"""Milliseconds for what a loaded machine draws."""


@contextmanager
def browsing(chromium: str, *, height: int = 2200, width: int = 1280) -> Iterator[Any]:
    """A page of a browser that is in MLflow's mode for model training, with its assistant closed.

    MLflow draws the charts that are in sight: the page is high enough for a section.
    """
    from playwright.sync_api import sync_playwright

    keep = {"mlflow.workflowType_v1": '"machine_learning"', "mlflow.assistant.panelOpen_v1": "false"}
    keep["mlflow.assistant.fab.autoOpenedOnFirstLoad_v1"] = "true"
    script = "".join(f"localStorage.setItem({name!r}, {text!r});" for name, text in keep.items())
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        context = browser.new_context(viewport={"width": width, "height": height})
        context.add_init_script(script)
        page = context.new_page()
        page.set_default_timeout(PATIENCE)
        yield page
        browser.close()


def address(uri: str, run: Any, tab: str) -> str:
    """Where MLflow shows a tab of a run."""
    return f"{uri}/#/experiments/{run.info.experiment_id}/runs/{run.info.run_id}/{tab}"


def open_charts(page: Any, uri: str, run: Any) -> None:
    """The run's charts, once the first of them is drawn."""
    page.goto(address(uri, run, "model-metrics"))
    page.locator(".js-plotly-plot .scatterlayer").first.wait_for()


def sections(page: Any) -> dict[str, int]:
    """The sections of charts by name, in order, with how many charts each has."""
    heads = re.findall(r"^(.+)\n\((\d+)\)\nAdd chart$", page.inner_text("body"), flags=re.MULTILINE)
    return {name: int(count) for name, count in heads}


def open_report(page: Any, uri: str, run: Any) -> Any:
    """The report page as the artifact tab shows it, once its charts are drawn: the frame."""
    page.goto(address(uri, run, "artifacts"))
    page.get_by_text("peel", exact=True).last.click()
    page.get_by_text("report.html", exact=True).click()
    frame = page.frame_locator("iframe")
    frame.locator("html[data-drawn]").wait_for()
    return frame


def darkest_row(image: Path, layers: int) -> int:
    """The layer whose block is darkest at the last step of a heat map as trackers get it."""
    with Image.open(image) as drawn:
        pixels = np.asarray(drawn.convert("RGB")).astype(int)
    column = pixels[:, int(0.96 * pixels.shape[1])]
    colored = np.flatnonzero(np.ptp(column, axis=1) > 30)  # neither ground nor letters
    top, bottom = colored[0], colored[-1] + 1
    height = (bottom - top) / layers
    # The block has the upper half of its layer's row; its middle is in no frame.
    return int(np.argmin([column[int(top + (layer + 0.25) * height)].sum() for layer in range(layers)]))
