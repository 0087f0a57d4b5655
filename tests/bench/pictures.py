"""Makes the pictures of docs/images again: `python -m tests.bench.pictures DIR`, of a `peel-agent demo --keep DIR`.

The run's charts as MLflow shows them, and the report page in MLflow's artifact tab.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from PIL import Image

from tests import servers
from tests.runs.mlflow_pages import browsing, open_charts, open_report

IMAGES = Path(__file__).parents[2] / "docs" / "images"

COLORS = 200


def _save(picture: Path, name: str) -> None:
    """In few colours, which charts need no more of."""
    IMAGES.mkdir(parents=True, exist_ok=True)
    with Image.open(picture) as taken:
        taken.convert("RGB").quantize(COLORS).save(IMAGES / name, "PNG", optimize=True)
    print(f"{IMAGES / name}: {(IMAGES / name).stat().st_size:,} bytes")


def main(folder: Path) -> None:
    chromium = shutil.which("chromium")
    assert chromium is not None, "needs Debian's chromium (apt-get install chromium)"
    with servers.mlflow_server(folder, servers.free_port()) as uri, browsing(chromium) as page:
        client = servers.mlflow_client(uri)
        (run,) = client.search_runs([client.get_experiment_by_name("peel-demo").experiment_id])
        taken = folder / "taken.png"
        open_charts(page, uri, run)
        page.get_by_placeholder("Search metric charts").fill("peel/")
        slider = page.locator("[role=slider]").first
        image = slider.locator("xpath=ancestor::*[.//img][1]//img").last
        image.wait_for()
        image.scroll_into_view_if_needed()  # MLflow lists the run's parameters before it
        page.wait_for_timeout(5000)  # every chart is drawn
        last = page.locator("[role=slider]").last.bounding_box()
        height = 1000 if last is None else last["y"] + 60
        page.screenshot(path=taken, clip={"x": 0, "y": 0, "width": 1280, "height": height})
        _save(taken, "mlflow.png")
        frame = open_report(page, uri, run)
        map_box = frame.locator("figure[data-chart=heat_map]").bounding_box()
        height = 1800 if map_box is None else min(2200, map_box["y"] + map_box["height"] + 20)
        page.screenshot(path=taken, clip={"x": 0, "y": 0, "width": 1280, "height": height})
        _save(taken, "report.png")
        taken.unlink()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
