"""The page and the images of a run, as MLflow shows them: artifacts, and image charts with a slider over the steps.

An image chart is what MLflow's pages find in the folder `images`: for each image a PNG and a small copy, whose names
hold the series, the step and the time (`MlflowClient.log_image` of MLflow 3). The names here hold nothing else that
changes: the same image sent again lands on the same files.
"""

from __future__ import annotations

import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from peel_agent.records import Pages

PAGES_TIME_TAG = "peel.pages_ms"
"""The time of the last checkpoint that the pages show."""

IMAGES_TAG = "mlflow.loggedImages"
"""MLflow looks for images only in runs that have it."""

SMALL_PIXELS = 256
"""The longer side of the small copy, which MLflow shows in its grids."""


def write_pages(client: Any, run: Any, pages: Pages) -> None:
    """Writes the pages and images to the run, unless those of a later checkpoint are there."""
    run_id = run.info.run_id
    if pages.timestamp_ms < int(run.data.tags.get(PAGES_TIME_TAG, pages.timestamp_ms)):
        return
    for path, file in pages.files.items():
        _copy(client, run_id, file, path)
    for series, file in pages.images.items():
        with tempfile.TemporaryDirectory(prefix="peel-image-") as folder:
            whole, small = Path(folder) / "whole.png", Path(folder) / "small.webp"
            _compress(file, whole, small)
            for name in _image_names(series, pages, run_id):
                _copy(client, run_id, whole, f"images/{name}.png")
                _copy(client, run_id, small, f"images/{name}+compressed.webp")
    if pages.images and IMAGES_TAG not in run.data.tags:
        client.set_tag(run_id, IMAGES_TAG, True)
    client.set_tag(run_id, PAGES_TIME_TAG, str(pages.timestamp_ms))


def _image_names(series: str, pages: Pages, run_id: str) -> Iterator[str]:
    """As `log_image` names it, with an identifier that is the same when it is sent again.

    The newest is at step 0 too, where MLflow's slider stands when the run is opened.
    """
    places = {(0, 0), (pages.step, pages.timestamp_ms)} if pages.keep and pages.step else {(0, 0)}
    for step, timestamp in sorted(places):
        same = uuid.uuid5(uuid.NAMESPACE_URL, f"{run_id}/{series}/{step}/{timestamp}")
        yield f"{series.replace('/', '~')}+step+{step}+timestamp+{timestamp}+{same}"


def _compress(image: Path, whole: Path, small: Path) -> None:
    """The image in 256 colours, which takes a tenth of the bytes, and its small copy: a run keeps hundreds of them."""
    from PIL import Image

    with Image.open(image) as drawn:
        colored = drawn.convert("RGB")
    colored.quantize(256).save(whole, "PNG", optimize=True)
    colored.thumbnail((SMALL_PIXELS, SMALL_PIXELS))
    colored.save(small, "WEBP")


def _copy(client: Any, run_id: str, file: Path, path: str) -> None:
    """The file as the artifact of this path; the client gives an artifact the name that its file has."""
    folder, _, name = path.rpartition("/")
    with tempfile.TemporaryDirectory(prefix="peel-artifact-") as temporary:
        named = Path(temporary) / name
        named.symlink_to(file)
        client.log_artifact(run_id, str(named), folder)
