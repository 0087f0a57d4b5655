"""What people see of a run in MLflow: a real agent writes to a real server, and a real browser looks at it."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests import histories, servers
from tests.runs.mlflow_pages import browsing, darkest_row, open_charts, open_report, sections
from tests.runs.sidecar import Sidecar
from tests.waiting import wait_for

pytest.importorskip("playwright.sync_api")

mlflow_uri = servers.mlflow_uri

CHROMIUM = shutil.which("chromium")

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(CHROMIUM is None, reason="needs Debian's chromium (apt-get install chromium)"),
]

LAYERS = 6
STEPS = (100, 200, 300)


class Shown(NamedTuple):
    uri: str
    client: Any
    run: Any
    pictures: Path


@pytest.fixture(scope="module")
def shown(mlflow_uri: str, tmp_path_factory: pytest.TempPathFactory) -> Shown:
    """A run of three checkpoints, each shown before the next comes; pictures of the browser are kept in a folder."""
    folder = tmp_path_factory.mktemp("shown")
    destination = f'[tracker.mlflow]\ntracking_uri = "{mlflow_uri}"\nexperiment = "seen by people"\n'
    sidecar = Sidecar(folder, f'[tracker]\nuse = ["mlflow"]\n{destination}', REPORTS="tests.histories:peeled")
    with sidecar.running():
        for count, step in enumerate(STEPS, 1):
            sidecar.write(step)
            sidecar.wait_for_steps(*STEPS[:count])
            wait_for(lambda: sidecar.owed() == 0)
    client = servers.mlflow_client(mlflow_uri)
    (run,) = client.search_runs([client.get_experiment_by_name("seen by people").experiment_id])
    pictures = tmp_path_factory.mktemp("pictures")
    return Shown(mlflow_uri, client, run, pictures)


@pytest.fixture
def page() -> Iterator[Any]:
    assert CHROMIUM is not None
    with browsing(CHROMIUM) as page:
        yield page


def test_the_charts_stand_in_few_sections(shown: Shown, page: Any) -> None:
    """The run's charts are in `peel` first, with both heat maps, and a section for each kind of number of a layer."""
    open_charts(page, shown.uri, shown.run)
    page.locator("[role=slider]").first.wait_for()
    page.screenshot(path=shown.pictures / "charts.png")
    charts_by_section = sections(page)
    assert list(charts_by_section)[:4] == ["peel", "peel/margin", "peel/margin_attention", "peel/margin_mlp"]
    assert [charts_by_section[name] for name in list(charts_by_section)[:4]] == [11, LAYERS, LAYERS, LAYERS - 1]
    assert not [name for name in charts_by_section if name.startswith("peel/margin/")]


def test_the_slider_goes_over_the_steps(shown: Shown, page: Any) -> None:
    """The newest heat map is there at once, and each step of the slider shows the image of another checkpoint."""
    open_charts(page, shown.uri, shown.run)
    slider = page.locator("[role=slider]").first
    image = slider.locator("xpath=ancestor::*[.//img][1]//img").first
    image.wait_for()
    seen = [(slider.get_attribute("aria-valuenow"), image.get_attribute("src"))]
    slider.focus()
    for step in STEPS:
        page.keyboard.press("ArrowRight")
        page.wait_for_function("([one, step]) => one.ariaValueNow == step", arg=[slider.element_handle(), step])
        wait_for(lambda: image.get_attribute("src") not in (None, seen[-1][1]))
        seen.append((slider.get_attribute("aria-valuenow"), image.get_attribute("src")))
    page.screenshot(path=shown.pictures / "slider.png")
    assert [at for at, _ in seen] == ["0", *map(str, STEPS)]
    sources = [source for _, source in seen]
    assert len(set(sources[1:])) == len(STEPS)


def test_the_layer_that_is_held_back_is_darkest(shown: Shown, tmp_path: Path) -> None:
    """In every image that the run has, the row of the layer that never learned is the darkest."""
    run_id = shown.run.info.run_id
    names = [entry.path for entry in shown.client.list_artifacts(run_id, "images") if "~margins" in entry.path]
    whole = [name for name in names if name.endswith(".png")]
    assert len(whole) == 1 + len(STEPS)
    for name in [*whole, "peel/margins.png"]:
        image = Path(shown.client.download_artifacts(run_id, name, str(tmp_path)))
        assert darkest_row(image, LAYERS) == histories.HELD_BACK, name


def test_the_report_opens_from_the_artifact_tab(shown: Shown, page: Any) -> None:
    """MLflow's preview runs the page under its policy: the verdict names the layer, and every chart is drawn."""
    frame = open_report(page, shown.uri, shown.run)
    page.screenshot(path=shown.pictures / "report.png")
    assert "At step 300: model.layers.3" in frame.locator("#verdict").inner_text()
    assert frame.locator("figure").count() == frame.locator("figure canvas").count() > 3
