"""The agent's figures as Prometheus metrics, in a registry of their own."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily, Metric
from prometheus_client.process_collector import ProcessCollector
from prometheus_client.registry import Collector

from peel_agent.errors import printable
from peel_agent.records.figures import AgentFigures, DeliveryFigures, RunFigures

RUNS = 200
"""Runs that are shown."""

SERIES_OF_A_RUN = 150
"""Series of one run that are shown; a run with 3 destinations and 20 firing rules has about 75."""

LABEL_LENGTH = 128
"""Characters of a label's value."""


def registry_of(figures: Callable[[], AgentFigures]) -> CollectorRegistry:
    """A registry of `figures`, read anew at each collection, and of this process (`process_*`)."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_AgentCollector(figures))
    ProcessCollector(registry=registry)
    return registry


def label(text: str) -> str:
    """`text` as a label's value: printable, at most LABEL_LENGTH characters.

    What had to be changed ends in a hash of the whole text, so that two names never become one series.
    """
    if len(text) <= LABEL_LENGTH and text.isprintable():
        return text
    mark = hashlib.sha256(text.encode(errors="backslashreplace")).hexdigest()[:12]
    return f"{printable(text)[: LABEL_LENGTH - 13]}~{mark}"


class _AgentCollector(Collector):
    def __init__(self, figures: Callable[[], AgentFigures]) -> None:
        self._figures = figures

    def collect(self) -> Iterable[Metric]:
        figures = self._figures()
        families = _Families()
        for run in figures.runs:
            families.show_run(run)
        for delivery in figures.deliveries:
            families.show_delivery(delivery)
        for run in figures.runs:  # last: the one mapping whose length an operator sets
            families.show_alerts(run)
        yield from families.of_runs
        yield from _of_agent(figures, families.left_out)


def _of_agent(figures: AgentFigures, left_out: int) -> Iterable[Metric]:
    yield GaugeMetricFamily("peel_ready", "Whether the agent can do its work: 1 or 0.", float(figures.ready))
    if figures.child_memory_bytes is not None:
        yield GaugeMetricFamily(
            "peel_child_memory_bytes", "Resident memory of the peeling child.", figures.child_memory_bytes
        )
    yield GaugeMetricFamily("peel_series_left_out", "Series of runs that are not shown: there are too many.", left_out)
    yield InfoMetricFamily("peel", "The agent's version.", {"version": label(figures.version)})


class _Families:
    """The metric families of all runs. Every series goes through `_add`, which bounds their number."""

    def __init__(self) -> None:
        self._checkpoints = CounterMetricFamily(
            "peel_checkpoints", "Checkpoints, by what became of them.", labels=("run", "outcome")
        )
        self._waiting = GaugeMetricFamily("peel_checkpoints_waiting", "Checkpoints in the queue.", labels=("run",))
        self._lag = GaugeMetricFamily("peel_lag_seconds", "Age of the oldest checkpoint in the queue.", labels=("run",))
        self._last_step = GaugeMetricFamily(
            "peel_last_step", "Training step of the checkpoint peeled last.", labels=("run",)
        )
        self._last_peeled = GaugeMetricFamily(
            "peel_last_peeled_timestamp_seconds", "When a checkpoint was last peeled.", labels=("run",)
        )
        self._stages = CounterMetricFamily("peel_stage_seconds", "Time spent in a stage.", labels=("run", "stage"))
        self._deliveries = CounterMetricFamily(
            "peel_deliveries",
            "Deliveries: delivered, postponed (attempts put off) or dead (given up).",
            labels=("run", "destination", "lane", "outcome"),
        )
        self._owed = GaugeMetricFamily(
            "peel_deliveries_owed", "Deliveries still to be made.", labels=("run", "destination", "lane")
        )
        self._firing = GaugeMetricFamily("peel_alerts_firing", "Alerts firing.", labels=("run", "rule"))
        self._series_of_run = Counter[str]()
        self._shown = set[tuple[str, ...]]()
        self.left_out = 0

    @property
    def of_runs(self) -> tuple[Metric, ...]:
        return (
            self._checkpoints,
            self._waiting,
            self._lag,
            self._last_step,
            self._last_peeled,
            self._stages,
            self._deliveries,
            self._owed,
            self._firing,
        )

    def show_run(self, run: RunFigures) -> None:
        self._add(self._waiting, run.waiting, run.run)
        self._add(self._lag, run.lag_seconds, run.run)
        if run.last_step is not None:
            self._add(self._last_step, run.last_step, run.run)
        if run.last_peeled_at is not None:
            self._add(self._last_peeled, run.last_peeled_at, run.run)
        for outcome, count in run.outcomes.items():
            self._add(self._checkpoints, count, run.run, outcome)
        for stage, seconds in run.seconds_by_stage.items():
            self._add(self._stages, seconds, run.run, stage)

    def show_delivery(self, delivery: DeliveryFigures) -> None:
        lane = (delivery.run, delivery.destination, delivery.lane)
        self._add(self._owed, delivery.owed, *lane)
        self._add(self._deliveries, delivery.delivered, *lane, "delivered")
        self._add(self._deliveries, delivery.postponed, *lane, "postponed")
        self._add(self._deliveries, delivery.dead, *lane, "dead")

    def show_alerts(self, run: RunFigures) -> None:
        for rule, count in run.firing.items():
            self._add(self._firing, count, run.run, rule)

    def _add(self, family: CounterMetricFamily | GaugeMetricFamily, value: float, run: str, *more: str) -> None:
        """Adds a series unless its run, or the run's series, are too many, or the series is there already."""
        values = [label(run), *map(label, more)]
        series = (family.name, *values)
        many_runs = run not in self._series_of_run and len(self._series_of_run) >= RUNS
        if many_runs or self._series_of_run[run] >= SERIES_OF_A_RUN or series in self._shown:
            self.left_out += 1
            return
        self._series_of_run[run] += 1
        self._shown.add(series)
        family.add_metric(values, value)
