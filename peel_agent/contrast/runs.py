"""Two runs by their reports: at every common step, and at the last checkpoint of each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from peel_agent.contrast.contrast import contrast
from peel_agent.errors import ConfigurationError, printable
from peel_agent.records import Comparable, DifferenceReport, History, PeelReport, StepDifference


def contrast_runs(a: History, b: History, *, where: tuple[str, str]) -> DifferenceReport:
    """Two histories with at least one report each; ConfigurationError when they were not measured on one probe."""
    last_a, last_b = _last(a), _last(b)
    if last_a.probe != last_b.probe:
        raise ConfigurationError(
            f"the runs were measured on two probes: {a.name} on {last_a.probe.fingerprint}, "
            f"{b.name} on {last_b.probe.fingerprint}",
            remedy="compare two of their checkpoints with --probe FILE, which measures both on the same tokens",
        )
    steps_a, steps_b = _by_step(a, last_a), _by_step(b, last_b)
    common = sorted(steps_a.keys() & steps_b.keys())
    steps = tuple(_at(step, steps_a[step], steps_b[step]) for step in common)
    notes = []
    if last_a.checkpoint.step != last_b.checkpoint.step:
        notes.append(f"the last checkpoint of A is {_step(last_a)}, that of B {_step(last_b)}")
    if not common:
        notes.append("the two runs have no step in common: only their last checkpoints are held against each other")
    left_out = [sum(report.probe != last_a.probe for report in history.reports) for history in (a, b)]
    notes += [
        f"{count} reports of {name} are of another probe, and are left out"
        for name, count in zip("AB", left_out, strict=True)
        if count
    ]
    ends = [
        Comparable(place, last, printable(history.name))
        for place, last, history in zip(where, (last_a, last_b), (a, b), strict=True)
    ]
    return replace(contrast(*ends, paired=None, notes=notes), steps=steps)


def _last(history: History) -> PeelReport:
    """The report of the last step; the last one at all, where none has a step."""
    stepped = [report for report in history.reports if report.checkpoint.step is not None]
    return max(stepped, key=lambda report: report.checkpoint.step or 0, default=history.reports[-1])


def _by_step(history: History, last: PeelReport) -> Mapping[int, PeelReport]:
    """The last report of each step, of those on the probe of the last one."""
    return {
        report.checkpoint.step: report
        for report in history.reports
        if report.checkpoint.step is not None and report.probe == last.probe
    }


def _at(step: int, a: PeelReport, b: PeelReport) -> StepDifference:
    difference = contrast(Comparable("", a, ""), Comparable("", b, ""), paired=None)
    places = [place for layer in difference.layers for place in layer.places.values()]
    return StepDifference(
        step, difference.loss, sum(place.status_changed for place in places), difference.first_by_margin
    )


def _step(report: PeelReport) -> str:
    return "without a step" if report.checkpoint.step is None else f"of step {report.checkpoint.step:,}"
