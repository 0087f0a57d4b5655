"""The rule kinds that are about a block or a part of one: each reads the findings of a report."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from peel_agent.judge.testimony import SILENCE, Testimony
from peel_agent.records import (
    Finding,
    FindingKind,
    LayerReport,
    PartName,
    PeelReport,
    ReportObservation,
    Rule,
    RuleKind,
)

PLAIN: frozenset[FindingKind] = frozenset({"never_trained", "dead"})
"""Findings that stand on a number that is exactly, or all but, zero: a second checkpoint could say no more."""


@dataclass(frozen=True)
class Reading:
    """A rule kind reads findings of some kinds; `refutes` says whether a place without one speaks against them, and
    `gone` what is so then, in words. Findings that `hide` it are told instead of it: then it is neither there nor gone.
    A rule's threshold is held against the number `evidence` of the finding: `most` says whether it is the most that
    number may be, or the least.
    """

    findings: frozenset[FindingKind]
    evidence: str
    most: bool
    refutes: Callable[[LayerReport, PartName | None], bool]
    gone: str
    hide: frozenset[FindingKind] = frozenset()
    direct: bool = False
    """Whether `refutes` goes by a number that stands whatever else is found, of the run as a whole too."""

    def __call__(self, observed: ReportObservation, rule: Rule) -> dict[str, Testimony]:
        """Testimony by subject, for each block and each part of one; a run in trouble clears nothing."""
        report = observed.report
        troubled = report.finding is not None and not self.direct
        return {
            subject: self._testimony(layer, part, subject, rule, hidden=troubled)
            for layer, part, subject in _subjects(report)
        }

    def _testimony(
        self, layer: LayerReport, part: PartName | None, subject: str, rule: Rule, *, hidden: bool
    ) -> Testimony:
        finding = layer.finding
        if finding is not None and finding.subject == subject and finding.kind in self.findings:
            if not self._reaches(finding, rule.threshold):
                return SILENCE
            return Testimony("for", finding.words, finding.kind in PLAIN, finding.causes)
        explained = finding is not None and (finding.kind == "victim" or finding.kind in self.hide)
        if hidden or explained or not self.refutes(layer, part):
            return SILENCE
        return Testimony("against", f"{subject} {self.gone}")

    def _reaches(self, finding: Finding, threshold: float | None) -> bool:
        """Whether a finding is as grave as the rule asks; one without that number (a dead part) is."""
        number = finding.evidence.get(self.evidence)
        if threshold is None or number is None:
            return True
        return number <= threshold if self.most else abs(number) >= threshold


def _subjects(report: PeelReport) -> list[tuple[LayerReport, PartName | None, str]]:
    subjects: list[tuple[LayerReport, PartName | None, str]] = []
    for layer in report.layers:
        subjects.append((layer, None, layer.name))
        subjects += [(layer, part, f"{layer.name}/{part}") for part in layer.parts]
    return subjects


def _earns(layer: LayerReport, part: PartName | None) -> bool:
    status = layer.status if part is None else layer.parts[part].status
    return status == "above"


def _has(what: str) -> Callable[[LayerReport, PartName | None], bool]:
    """Whether this number was measured of the place: without the finding it then does not show it any more."""
    return lambda layer, part: getattr(layer if part is None else layer.parts[part], what) is not None


_EVENTS: frozenset[FindingKind] = frozenset({"changed", "regressed"})
_SURER: frozenset[FindingKind] = _EVENTS | {"dead"}

LAYER_KINDS: Mapping[RuleKind, Reading] = {
    "layer_below": Reading(
        frozenset({"below", "never_trained", "dead"}),
        "margin",
        most=True,
        refutes=_earns,
        gone="certainly does more than a cheap stand-in would",
        direct=True,
    ),
    "layer_changed": Reading(
        frozenset({"changed"}), "change", most=False, refutes=_has("change"), gone="changes no more than usual"
    ),
    "layer_regressed": Reading(
        frozenset({"regressed"}),
        "progress",
        most=False,
        refutes=_has("progress"),
        gone="is no worse than at the checkpoint before",
        hide=frozenset({"changed"}),
    ),
    "layer_dropped": Reading(
        frozenset({"dropped"}),
        "margin",
        most=True,
        refutes=_has("margin"),
        gone="does as much as before again",
        hide=_SURER,
    ),
    "layer_stalled": Reading(
        frozenset({"stalled"}),
        "change",
        most=True,
        refutes=_has("change"),
        gone="learns again",
        hide=_SURER | {"dropped"},
    ),
    "layer_flooding": Reading(
        frozenset({"flooding"}),
        "stream_share",
        most=False,
        refutes=_has("margin"),
        gone="leaves room in the stream for the others",
    ),
    "layer_improvable": Reading(
        frozenset({"improvable"}),
        "headroom",
        most=False,
        refutes=_has("headroom"),
        gone="has no outstanding headroom now",
        hide=_SURER | {"dropped", "below"},
    ),
}
