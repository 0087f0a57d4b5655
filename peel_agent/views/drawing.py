"""What draws: Vega and Vega-Lite as one script for the page, and the same specification as an image."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from types import ModuleType

from peel_agent.errors import ConfigurationError
from peel_agent.records import History
from peel_agent.views.charts import Chart
from peel_agent.views.content import content_of
from peel_agent.views.table import Table

VEGA_LITE = "6.4"

IMAGE_PIXELS = 1100

EXTRA = "pip install 'peel-agent[report]'"


def vega_script() -> str:
    """Vega, Vega-Lite and vega-embed as one script (BSD-3-Clause). Raises ConfigurationError without the extra."""
    script: str = _vl_convert().javascript_bundle(vl_version=VEGA_LITE)
    # In a page a script ends at this tag wherever it stands; what is compared with < is left alone.
    return re.sub(r"<(?=/script|!--|script)", r"\\x3c", script, flags=re.IGNORECASE).replace("\r", "")


def heat_map_png(history: History) -> bytes | None:
    """The heat map of margins as a PNG image, None where no margin was measured.

    Raises ConfigurationError without the extra.
    """
    vl_convert = _vl_convert()
    content = content_of(history)
    chart = next((one for one in content.charts if one.key == "heat_map"), None)
    if chart is None:
        return None
    image: bytes = vl_convert.vegalite_to_png(_image_spec(chart, content.tables), vl_version=VEGA_LITE, scale=1.5)
    return image


def _image_spec(chart: Chart, tables: Mapping[str, Table]) -> dict[str, object]:
    spec = copy.deepcopy(chart.spec)
    datasets = {name: tables[name].records() for name in chart.tables}
    return {**spec, "width": IMAGE_PIXELS, "background": "white", "title": chart.title, "datasets": datasets}


def _vl_convert() -> ModuleType:
    try:
        import vl_convert
    except ImportError as error:
        raise ConfigurationError(f"the report page needs what is not installed: {error}", remedy=EXTRA) from error
    return vl_convert
