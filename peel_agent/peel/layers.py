"""What is reported of every block: margin, headroom and share of the stream, its two parts included."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from peel_agent.peel.headroom.headroom import Headroom
from peel_agent.peel.margins.margin import Margin, Place, of_target, statuses
from peel_agent.peel.sweep.splices import TARGETS, Target
from peel_agent.records import LayerReport, PartName, PartReport

PARTS: tuple[PartName, ...] = ("attention", "mlp")


def layer_reports(
    margins: Mapping[Place, Margin],
    headrooms: Mapping[int, Headroom],
    names: Sequence[str],
    stream_shares: Sequence[float],
) -> tuple[LayerReport, ...]:
    """One report a block, its parts included; `undecided` without a margin where none was measured."""
    verdicts = {target: _verdicts(margins, headrooms, target) for target in TARGETS}
    nothing = PartReport("undecided", None)
    found = []
    for index, name in enumerate(names):
        own = margins.get((index, "block"))
        whole = verdicts["block"].get(index, nothing)
        room = headrooms.get(index)
        quantisation, optimisation = (room and room.shares) or (None, None)
        found.append(
            LayerReport(
                index=index,
                name=name,
                status=whole.status,
                margin=whole.margin,
                best_reference=None if own is None else own.best,
                references={} if own is None else own.references,
                parts={part: verdicts[part].get(index, nothing) for part in PARTS},
                stream_share=stream_shares[index],
                headroom=whole.headroom,
                quantization_share=quantisation,
                optimization_share=optimisation,
            )
        )
    return tuple(found)


def _verdicts(
    margins: Mapping[Place, Margin], headrooms: Mapping[int, Headroom], target: Target
) -> dict[int, PartReport]:
    """Status, margin and headroom of everything of one kind, by block."""
    own = of_target(margins, target)
    status = dict(zip(own, statuses(list(own.values())), strict=True))
    room = {index: found.won[target] for index, found in headrooms.items()}
    return {
        index: PartReport(
            status.get(index, "undecided"), own[index].estimate if index in own else None, room.get(index)
        )
        for index in own.keys() | room.keys()
    }
