"""The dashboard of deploy/grafana, as code: `python -m tests.dashboard` writes it anew.

It shows the agent: whether it follows, what it delivers, what it takes. What it finds in the layers is in the tracker
and on the report page.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from grafana_foundation_sdk.builders import dashboard, prometheus, stat, timeseries
from grafana_foundation_sdk.builders.common import ReduceDataOptions, VizLegendOptions, VizTooltipOptions
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.common import (
    BigValueColorMode,
    LegendDisplayMode,
    LegendPlacement,
    TooltipDisplayMode,
)
from grafana_foundation_sdk.models.dashboard import (
    DashboardCursorSync,
    DataSourceRef,
    Threshold,
    ThresholdsMode,
    VariableRefresh,
    VariableSort,
)

FILE = Path(__file__).parents[1] / "deploy" / "grafana" / "peel-agent.json"
SOURCE = DataSourceRef(type_val="prometheus", uid="${datasource}")
OF_RUN = 'run=~"$run"'
HEIGHT = 7
SECONDS, BYTES, COUNT = "s", "bytes", "short"


def _query(expression: str, legend: str) -> prometheus.Dataquery:
    return prometheus.Dataquery().expr(expression).legend_format(legend).datasource(SOURCE)


def _number(title: str, about: str, unit: str, expression: str, *, bad_from: float | None = None) -> stat.Panel:
    """One number, now; it is red from `bad_from` on."""
    steps = [Threshold(value=None, color="green")]
    if bad_from is not None:
        steps.append(Threshold(value=bad_from, color="red"))
    return (
        stat.Panel()
        .title(title)
        .description(about)
        .unit(unit)
        .datasource(SOURCE)
        .span(6)
        .height(4)
        .color_mode(BigValueColorMode.VALUE)
        .reduce_options(ReduceDataOptions().calcs(["lastNotNull"]).values(False))
        .thresholds(dashboard.ThresholdsConfig().mode(ThresholdsMode.ABSOLUTE).steps(steps))
        .with_target(_query(expression, ""))
    )


def _lines(title: str, about: str, unit: str, *queries: tuple[str, str]) -> timeseries.Panel:
    """Series over time: each query with the legend of its series."""
    panel = (
        timeseries.Panel()
        .title(title)
        .description(about)
        .unit(unit)
        .min(0)
        .datasource(SOURCE)
        .span(12)
        .height(HEIGHT)
        .legend(
            VizLegendOptions()
            .display_mode(LegendDisplayMode.LIST)
            .placement(LegendPlacement.BOTTOM)
            .show_legend(True)
            .calcs([])
        )
        .tooltip(VizTooltipOptions().mode(TooltipDisplayMode.MULTI))
    )
    for expression, legend in queries:
        panel = panel.with_target(_query(expression, legend))
    return panel


def _overview() -> Iterator[Any]:
    yield _number("Agents that are not ready", "`peel-agent status` says why.", COUNT,
                  'count(up{job="peel-agent"} == 0 or peel_ready == 0) or vector(0)', bad_from=1)  # fmt: skip
    yield _number("Alerts that fire", "Layers and runs, all rules.", COUNT,
                  f"sum(peel_alerts_firing{{{OF_RUN}}}) or vector(0)", bad_from=1)  # fmt: skip
    yield _number("Checkpoints that wait", "All runs.", COUNT, f"sum(peel_checkpoints_waiting{{{OF_RUN}}})")
    yield _number("Longest wait", "The age of the oldest checkpoint in a queue.", SECONDS,
                  f"max(peel_lag_seconds{{{OF_RUN}}})", bad_from=6 * 3600)  # fmt: skip


def _following() -> Iterator[Any]:
    yield _lines("Wait of the oldest checkpoint", "It grows where peels are slower than the training saves.", SECONDS,
                 (f"peel_lag_seconds{{{OF_RUN}}}", "{{run}}"))  # fmt: skip
    yield _lines("Checkpoints that wait", "With backlog = latest the older ones are passed over.", COUNT,
                 (f"peel_checkpoints_waiting{{{OF_RUN}}}", "{{run}}"))  # fmt: skip
    yield _lines("Checkpoints by what became of them", "In each interval.", COUNT,
                 (f"sum by (outcome) (increase(peel_checkpoints_total{{{OF_RUN}}}[$__rate_interval]))",
                  "{{outcome}}"))  # fmt: skip
    yield _lines("Time since the last peel", "By run.", SECONDS,
                 (f"time() - peel_last_peeled_timestamp_seconds{{{OF_RUN}}}", "{{run}}"))  # fmt: skip
    yield _lines("Step of the checkpoint peeled last", "By run.", COUNT,
                 (f"peel_last_step{{{OF_RUN}}}", "{{run}}"))  # fmt: skip
    yield _lines("Alerts that fire, by rule", "The words are with Alertmanager and in the tracker.", COUNT,
                 (f"sum by (run, rule) (peel_alerts_firing{{{OF_RUN}}})", "{{run}}: {{rule}}"))  # fmt: skip


def _delivering() -> Iterator[Any]:
    yield _lines("Deliveries that wait", "A lane that grows has a destination that does not take it.", COUNT,
                 (f"peel_deliveries_owed{{{OF_RUN}}}", "{{run}}: {{lane}} for {{destination}}"))  # fmt: skip
    yield _lines("Deliveries by what became of them", "In each interval; `dead` were given up.", COUNT,
                 (f"sum by (destination, outcome) (increase(peel_deliveries_total{{{OF_RUN}}}[$__rate_interval]))",
                  "{{destination}}: {{outcome}}"))  # fmt: skip


def _taking() -> Iterator[Any]:
    yield _lines("Seconds of a second that a stage takes", "One device is busy where they add up to 1.", COUNT,
                 (f"sum by (stage) (rate(peel_stage_seconds_total{{{OF_RUN}}}[$__rate_interval]))",
                  "{{stage}}"))  # fmt: skip
    yield _lines("Memory", "Of the agent, and of the child that peels.", BYTES,
                 ('process_resident_memory_bytes{job="peel-agent"}', "agent {{instance}}"),
                 ("peel_child_memory_bytes", "peeling {{instance}}"))  # fmt: skip
    yield _lines("Processors that the agent itself takes", "Not the child that peels.", COUNT,
                 ('rate(process_cpu_seconds_total{job="peel-agent"}[$__rate_interval])', "{{instance}}"))  # fmt: skip
    yield _lines("Series that are not shown", "There are too many runs, or too many series of one.", COUNT,
                 ("peel_series_left_out", "{{instance}}"))  # fmt: skip


def made() -> str:
    """The dashboard's JSON, as it lies in FILE."""
    runs = (
        dashboard.QueryVariable("run")
        .label("Run")
        .query("label_values(peel_checkpoints_waiting, run)")
        .datasource(SOURCE)
        .refresh(VariableRefresh.ON_TIME_RANGE_CHANGED)
        .sort(VariableSort.ALPHABETICAL_ASC)
        .multi(True)
        .include_all(True)
        .all_value(".*")
    )
    board = (
        dashboard.Dashboard("peel-agent")
        .uid("peel-agent")
        .tags(["peel-agent"])
        .refresh("1m")
        .time("now-24h", "now")
        .timezone("browser")
        .tooltip(DashboardCursorSync.CROSSHAIR)
        .with_variable(dashboard.DatasourceVariable("datasource").label("Data source").type("prometheus"))
        .with_variable(runs)
    )
    rows = {"Now": _overview, "Following the runs": _following, "Deliveries": _delivering, "The agent itself": _taking}
    number = itertools.count(1)
    for title, panels in rows.items():
        board = board.with_row(dashboard.Row(title).id(next(number)))
        for panel in panels():
            board = board.with_panel(panel.id(next(number)))
    return JSONEncoder(sort_keys=True, indent=2).encode(board.build()) + "\n"


if __name__ == "__main__":
    FILE.write_text(made())
