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
    since_step: int | None = None


@dataclass(frozen=True)
class Reading:
    """A rule kind reads findings of some kinds; `refutes` says whether a place without one speaks against them."""

    findings: frozenset[FindingKind]
    refutes: Callable[[LayerReport, PartName | None], bool]

    def __call__(self, report: PeelReport) -> dict[str, Testimony]:
        """Testimony by subject, for every block and every part of one."""
        return {subject: self._testimony(layer, part, subject) for layer, part, subject in _subjects(report)}

    def _testimony(self, layer: LayerReport, part: PartName | None, subject: str) -> Testimony:
        finding = layer.finding
        if finding is not None and finding.subject == subject and finding.kind in self.findings:
            return Testimony("for", finding.words, finding.kind in PLAIN, finding.causes, finding.since_step)
        # What another finding explains, such as a flooded stream, is neither there nor gone.
        explained = finding is not None and finding.kind == "victim"
        if explained or not self.refutes(layer, part):
            return Testimony("neither", "")
        return Testimony("against", f"{subject} does not show it any more")


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


KINDS: Mapping[RuleKind, Reading] = {
    "layer_below": Reading(frozenset({"below", "never_trained", "dead"}), _earns),
    "layer_changed": Reading(frozenset({"changed"}), _has("change")),
    "layer_regressed": Reading(frozenset({"regressed"}), _has("progress")),
    "layer_dropped": Reading(frozenset({"dropped"}), _has("margin")),
    "layer_stalled": Reading(frozenset({"stalled"}), _has("change")),
    "layer_flooding": Reading(frozenset({"flooding"}), _has("margin")),
    "layer_improvable": Reading(frozenset({"improvable"}), _has("headroom")),
}
