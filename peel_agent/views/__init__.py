"""What people look at, from a run's history: a page in one file, and the heat map as an image. Pure: text out."""

from peel_agent.views.difference_page import difference_page
from peel_agent.views.drawing import EXTRA, heat_map_png, lacks, redundancy_png
from peel_agent.views.frame import Provenance
from peel_agent.views.page import report_page
from peel_agent.views.verdict import standing, verdict

__all__ = [
    "EXTRA",
    "Provenance",
    "difference_page",
    "heat_map_png",
    "lacks",
    "redundancy_png",
    "report_page",
    "standing",
    "verdict",
]
