"""What a report becomes outside: its JSON form, and the Publication that trackers write. No network."""

from peel_agent.publish.debts import to_those_that_show, to_trackers
from peel_agent.publish.form import alert_line, report_from_json, report_json, report_line
from peel_agent.publish.history import history_of
from peel_agent.publish.meter import Meter
from peel_agent.publish.publication import alert_tags, publication, publication_of_the_past, series_of
from peel_agent.publish.words import headline, table

__all__ = [
    "Meter",
    "alert_line",
    "alert_tags",
    "headline",
    "history_of",
    "publication",
    "publication_of_the_past",
    "report_from_json",
    "report_json",
    "report_line",
    "series_of",
    "table",
    "to_those_that_show",
    "to_trackers",
]
