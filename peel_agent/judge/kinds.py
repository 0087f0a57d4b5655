"""What each rule kind reads in a report. Another kind is one more entry in KINDS."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

from peel_agent.records import FindingKind, LayerReport, PartName, PeelReport, RuleKind

Speaks = Literal["for", "against", "neither"]


PLAIN: frozenset[FindingKind] = frozenset({"never_trained", "dead"})
"""Findings that stand on a number that is exactly, or all but, zero: a second checkpoint could say no more."""


@dataclass(frozen=True)
class Testimony:
    """What a report says about one subject: for the alert, against it, or neither, and the evidence in words.

    One that is `plain` needs no second checkpoint, unless the rule asks for it.
    """

    speaks: Speaks
    words: str
    plain: bool = False
    causes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Reading:
    """A rule kind reads findings of some kinds; `refutes` says whether a place without one speaks against them, and
    `gone` what is so then, in words. Findings that `hide` it are told instead of it: then it is neither there nor gone.
    """

    findings: frozenset[FindingKind]
    refutes: Callable[[LayerReport, PartName | None], bool]
    gone: str
    hide: frozenset[FindingKind] = frozenset()
    direct: bool = False
    """Whether `refutes` goes by a number that stands whatever else is found, of the run as a whole too."""

    def __call__(self, report: PeelReport) -> dict[str, Testimony]:
        """Testimony by subject, for each block and each part of one; a run in trouble clears nothing."""
        troubled = report.finding is not None and not self.direct
        return {
            subject: self._testimony(layer, part, subject, hidden=troubled)
            for layer, part, subject in _subjects(report)
        }

    def _testimony(self, layer: LayerReport, part: PartName | None, subject: str, *, hidden: bool) -> Testimony:
        finding = layer.finding
        if finding is not None and finding.subject == subject and finding.kind in self.findings:
            return Testimony("for", finding.words, finding.kind in PLAIN, finding.causes)
        explained = finding is not None and (finding.kind == "victim" or finding.kind in self.hide)
        if hidden or explained or not self.refutes(layer, part):
            return Testimony("neither", "")
        return Testimony("against", f"{subject} {self.gone}")


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

KINDS: Mapping[RuleKind, Reading] = {
    "layer_below": Reading(
        frozenset({"below", "never_trained", "dead"}), _earns, "certainly earns more than a cheap stand-in", direct=True
    ),
    "layer_changed": Reading(frozenset({"changed"}), _has("change"), "changes as usual again"),
    "layer_regressed": Reading(
        frozenset({"regressed"}), _has("progress"), "is no worse than at the checkpoint before", frozenset({"changed"})
    ),
    "layer_dropped": Reading(frozenset({"dropped"}), _has("margin"), "earns what it earned again", _SURER),
    "layer_stalled": Reading(frozenset({"stalled"}), _has("change"), "learns again", _SURER | {"dropped"}),
    "layer_flooding": Reading(frozenset({"flooding"}), _has("margin"), "leaves room in the stream for the others"),
    "layer_improvable": Reading(
        frozenset({"improvable"}), _has("headroom"), "has no outstanding headroom now", _SURER | {"dropped", "below"}
    ),
}
