"""The findings of a report: at most one a layer, and one of the run (method.md 4b)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from peel_agent.diagnose import signs
from peel_agent.diagnose.lineage import comparable
from peel_agent.diagnose.places import Case, Place, places
from peel_agent.records import Finding, LayerReport, PeelReport

Sign = Callable[[Case, Place], Finding | None]

EVENTS: tuple[Sign, ...] = (signs.changed, signs.regressed)
"""What happened since the checkpoint before; the block is named unless only a part of it shows the sign."""

STATES: tuple[Sign, ...] = (signs.dead, signs.dropped, signs.still, signs.below, signs.improvable)
"""What is so now, the surest first."""

OF_FLOODS: tuple[Sign, ...] = (signs.dropped, signs.below)
"""What a flooded stream explains in the blocks after it."""

OF_CHANGES: tuple[Sign, ...] = (signs.regressed, signs.dropped)
"""What a layer that broke explains in the others, which adapt to it."""


@dataclass(frozen=True)
class Culprits:
    """Layers whose fault shows in other layers too: one that floods the stream, and those that changed of late."""

    flood: Finding | None
    changed: Mapping[str, Finding]

    def explain(self, sign: Sign, place: Place) -> Finding | None:
        """The culprit behind a sign of another layer, None when it is the layer's own."""
        if self.flood is not None and sign in OF_FLOODS:
            return self.flood
        if place.layer.name in self.changed or sign not in OF_CHANGES:
            return None
        return next(iter(self.changed.values()), None)


def diagnose(report: PeelReport, history: Sequence[PeelReport]) -> PeelReport:
    """The report with its findings; `history` holds the reports of earlier steps of the run, oldest first.

    While the model guesses, and while the run is early, has collapsed or diverged, no layer is accused but one whose
    change stands out; what another layer's fault explains is a victim.
    """
    case = Case(report, comparable(history, report))
    guessing = signs.guessing(case)
    flood = signs.flooding(case) if guessing is None else None
    culprits = Culprits(flood, _changed_of_late(case))
    run = None if flood is not None else guessing or signs.early(case) or _diverged(case)
    layers = tuple(replace(layer, finding=_finding(case, layer, culprits, run)) for layer in report.layers)
    return replace(report, layers=layers, finding=run)


def _diverged(case: Case) -> Finding | None:
    """The run diverged, unless a layer that changed at the checkpoint before explains it."""
    before = case.history[-1].layers if case.history else ()
    explained = any(layer.finding is not None and layer.finding.kind == "changed" for layer in before)
    return None if explained else signs.diverged(case)


def _changed_of_late(case: Case) -> dict[str, Finding]:
    """The layers that changed unusually since the checkpoint before, or in the interval before that."""
    now = (_narrowest(case, Place(layer, None), signs.changed) for layer in case.report.layers)
    earlier = (layer.finding for layer in (case.history[-1].layers if case.history else ()))
    changed = [finding for finding in (*now, *earlier) if finding is not None and finding.kind == "changed"]
    return {finding.subject.partition("/")[0]: finding for finding in reversed(changed)}


def _finding(case: Case, layer: LayerReport, culprits: Culprits, run: Finding | None) -> Finding | None:
    if run is not None:
        stands_out = any(signs.stands_out(case, place) for place in places(layer))
        return _narrowest(case, Place(layer, None), signs.changed) if stands_out else None
    if culprits.flood is not None and layer.name == culprits.flood.subject:
        return culprits.flood
    whole = Place(layer, None)
    for sign in (*EVENTS, *STATES):
        shown = _narrowest(case, whole, sign)
        if shown is not None:
            culprit = culprits.explain(sign, whole)
            return shown if culprit is None else signs.victim(culprit, whole)
    return None


def _narrowest(case: Case, whole: Place, sign: Sign) -> Finding | None:
    """The sign at the block; at one of its parts when only that part shows it, or shows it while the block does not."""
    at_block, *at_parts = (sign(case, place) for place in places(whole.layer))
    shown = [finding for finding in at_parts if finding is not None]
    if at_block is None:
        return shown[0] if shown else None
    return shown[0] if len(shown) == 1 and sign in EVENTS else at_block
