"""What people look at, from a run's history: a page in one file, and the heat map as an image. Pure: text out."""

from peel_agent.views.drawing import EXTRA, heat_map_png, lacks, redundancy_png
from peel_agent.views.page import Made, report_page

__all__ = ["EXTRA", "Made", "heat_map_png", "lacks", "redundancy_png", "report_page"]
