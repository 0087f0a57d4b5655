"""What is reported of every block: margin, headroom, change, progress and share of the stream, its parts included."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from peel_agent.peel.headroom.headroom import Headroom
from peel_agent.peel.margins.margin import Margin, Place, far_under, of_target, statuses
from peel_agent.peel.sweep.forward import Visited
from peel_agent.peel.sweep.splices import TARGETS
from peel_agent.peel.sweep.visits import Dead
from peel_agent.records import Change, Estimate, FirstMargin, LayerReport, PartName, PartReport, Status

PARTS: tuple[PartName, ...] = ("attention", "mlp")


@dataclass(frozen=True)
class Measured:
    """Everything that was measured of blocks and parts, by place; headrooms by block."""

    margins: Mapping[Place, Margin]
    headrooms: Mapping[int, Headroom]
    changes: Mapping[Place, Change]
    progress: Mapping[Place, Estimate]
    first: Mapping[Place, Margin] = field(default_factory=dict)
    """Margins as the first heat had them."""

    def first_margin(self, place: Place) -> FirstMargin | None:
        """The margin of the first heat, if that was on cuts."""
        first = self.first.get(place)
        return None if first is None or first.cut is None else FirstMargin(first.cut, first.estimate)

    def __bool__(self) -> bool:
        return bool(self.margins or self.headrooms or self.changes)


def layer_reports(
    measured: Measured, names: Sequence[str], visited: Sequence[Visited], *, parts_open: bool = False
) -> tuple[LayerReport, ...]:
    """One report a block, its parts included; `not_measured` where there is no margin.

    With `parts_open` the blocks have parts that were not judged. One of them may earn nothing in a block that is above
    because of the other: a block that earns far less than its neighbours is then left `undecided`, with a hint.
    """
    status_by_place: dict[Place, Status] = {}
    for target in TARGETS:
        margins = of_target(measured.margins, target)
        judged = statuses(list(margins.values()))
        status_by_place |= {(index, target): status for index, status in zip(margins, judged, strict=True)}
    reports = [
        _layer_report(measured, status_by_place, index, name, visited[index]) for index, name in enumerate(names)
    ]
    weak = far_under(of_target(measured.margins, "block")) if parts_open else frozenset()
    return tuple(
        replace(report, status="undecided", hint=_hint(report))
        if report.index in weak and report.status == "above"
        else report
        for report in reports
    )


def _hint(layer: LayerReport) -> str:
    what = f"{layer.name} earns far less than the blocks beside it"
    return f"{what}: effort standard tells whether a part of it earns nothing"


def _layer_report(
    measured: Measured, status_by_place: Mapping[Place, Status], index: int, name: str, visited: Visited
) -> LayerReport:
    place: Place = (index, "block")
    margin, room = measured.margins.get(place), measured.headrooms.get(index)
    quantisation, optimisation = (room and room.shares) or (None, None)
    return LayerReport(
        index=index,
        name=name,
        status=status_by_place.get(place, "not_measured"),
        margin=margin.estimate if margin else None,
        best_reference=margin.best if margin else None,
        references=margin.references if margin else {},
        parts={part: _part_report(measured, status_by_place, (index, part), visited.dead.get(part)) for part in PARTS},
        stream_share=visited.stream_share,
        headroom=room.won["block"] if room else None,
        quantization_share=quantisation,
        optimization_share=optimisation,
        change=measured.changes.get(place),
        progress=measured.progress.get(place),
        cut=margin.cut if margin else None,
        first=measured.first_margin(place),
    )


def _part_report(
    measured: Measured, status_by_place: Mapping[Place, Status], place: Place, dead: Dead | None
) -> PartReport:
    margin, room = measured.margins.get(place), measured.headrooms.get(place[0])
    return PartReport(
        status=status_by_place.get(place, "not_measured"),
        margin=margin.estimate if margin else None,
        # A dead part has no step through its output: 0.0000 would read as if nothing were to be won.
        headroom=room.won[place[1]] if room and not (dead and dead.featureless) else None,
        change=measured.changes.get(place),
        progress=measured.progress.get(place),
        dead=dead.words if dead else None,
        cut=margin.cut if margin else None,
        first=measured.first_margin(place),
    )
