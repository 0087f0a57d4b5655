"""What a report becomes outside: its JSON form, and the Publication that trackers write. No network."""

from peel_agent.publish.debts import to_those_that_show, to_trackers
from peel_agent.publish.difference import difference_line, difference_sheet
from peel_agent.publish.form import alert_line, report_from_json, report_json, report_line
from peel_agent.publish.history import history_of
from peel_agent.publish.meter import Meter
from peel_agent.publish.publication import alert_tags, publication, publication_of_the_past, series_of, worst_margin
from peel_agent.publish.sheet import Column, Grid, Lines, Sheet, plain_text, sheet
from peel_agent.publish.words import headline, layer_grid, report_sheet

__all__ = [
    "Column",
    "Grid",
    "Lines",
    "Meter",
    "Sheet",
    "alert_line",
    "alert_tags",
    "difference_line",
    "difference_sheet",
    "headline",
    "history_of",
    "layer_grid",
    "plain_text",
    "publication",
    "publication_of_the_past",
    "report_from_json",
    "report_json",
    "report_line",
    "report_sheet",
    "series_of",
    "sheet",
    "to_those_that_show",
    "to_trackers",
    "worst_margin",
]
