"""What draws: Vega and Vega-Lite as one script for the page, and the same specification as an image."""

from __future__ import annotations

import copy
import re
from functools import cache
from importlib.util import find_spec
from types import ModuleType

from peel_agent.errors import ConfigurationError
from peel_agent.records import History
from peel_agent.views.content import Content, content_of
from peel_agent.views.specs import Chart

VEGA_LITE = "6.4"

IMAGE_PIXELS = 1100

IMAGE_SCALE = 1.5

CARD = {"width": 520, "height": 400}
"""Pixels of the image in a tracker's card, which is about square and small."""

EXTRA = 'pip install "peel-agent[report]"'


def vega_script() -> str:
    """Vega, Vega-Lite and vega-embed as one script (BSD-3-Clause). Raises ConfigurationError without the extra."""
    return _inlined(_vl_convert())


@cache
def _inlined(vl_convert: ModuleType) -> str:
    script: str = vl_convert.javascript_bundle(vl_version=VEGA_LITE)
    # In a page a script ends at this tag wherever it stands; what is compared with < is left alone.
    return re.sub(r"<(?=/script|!--|script)", r"\\x3c", script, flags=re.IGNORECASE).replace("\r", "")


def lacks() -> str | None:
    """What is not installed that pages need, None when all is. Nothing is imported for that."""
    missing = [name for name in ("jinja2", "vl_convert") if find_spec(name) is None]
    return " and ".join(missing) or None


def heat_map_png(history: History, *, card: bool = False) -> bytes | None:
    """The heat map of margins as a PNG image, None where none was measured; for a `card` of a tracker it is squarer.

    Raises ConfigurationError without the extra.
    """
    return _png(history, "heat_map", card=card)


def redundancy_png(history: History, *, card: bool = False) -> bytes | None:
    """What it costs to let one block stand in for several, as a PNG image of the newest report that has it; or None.

    Raises ConfigurationError without the extra.
    """
    return _png(history, "redundancy", card=card)


def _png(history: History, key: str, *, card: bool) -> bytes | None:
    vl_convert = _vl_convert()
    content = content_of(history)
    chart = next((candidate for candidate in content.charts if candidate.key == key), None)
    if chart is None:
        return None
    spec = _image_spec(chart, content) | (CARD if card else {})
    image: bytes = vl_convert.vegalite_to_png(spec, vl_version=VEGA_LITE, scale=IMAGE_SCALE)
    return image


def _image_spec(chart: Chart, content: Content) -> dict[str, object]:
    spec = copy.deepcopy(chart.spec)
    step = content.newest.checkpoint.step
    title = chart.title if step is None else f"{chart.title}, up to step {step:,}"
    datasets = {name: content.tables[name].records() for name in chart.tables}
    return {**spec, "width": IMAGE_PIXELS, "background": "white", "title": title, "datasets": datasets}


def _vl_convert() -> ModuleType:
    try:
        import vl_convert
    except ImportError as error:
        raise ConfigurationError(f"the report page needs what is not installed: {error}", remedy=EXTRA) from error
    return vl_convert
