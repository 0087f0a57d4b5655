"""Blocks and parts of a report under one name each, and the same places in earlier reports."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import median

from peel_agent.records import Change, Estimate, LayerReport, PartName, PeelReport, Status

PARTS: tuple[PartName, ...] = ("attention", "mlp")
PART_WORDS = {"attention": "attention", "mlp": "MLP"}


@dataclass(frozen=True)
class Place:
    """One block, or one part of it, as one report shows it."""

    layer: LayerReport
    part: PartName | None

    @property
    def subject(self) -> str:
        return self.layer.name if self.part is None else f"{self.layer.name}/{self.part}"

    @property
    def words(self) -> str:
        """What to call it in a sentence."""
        return self.layer.name if self.part is None else f"the {PART_WORDS[self.part]} of {self.layer.name}"

    @property
    def status(self) -> Status:
        return self.layer.status if self.part is None else self.layer.parts[self.part].status

    @property
    def margin(self) -> Estimate | None:
        return self.layer.margin if self.part is None else self.layer.parts[self.part].margin

    @property
    def compared(self) -> tuple[int | None, Estimate] | None:
        """The margin to be held against those of other checkpoints, and on how many first tokens it was measured."""
        first = self.layer.first if self.part is None else self.layer.parts[self.part].first
        if first is not None:
            return first.tokens, first.margin
        return None if self.margin is None else (None, self.margin)

    @property
    def change(self) -> Change | None:
        return self.layer.change if self.part is None else self.layer.parts[self.part].change

    @property
    def progress(self) -> Estimate | None:
        return self.layer.progress if self.part is None else self.layer.parts[self.part].progress

    @property
    def headroom(self) -> Estimate | None:
        return self.layer.headroom if self.part is None else self.layer.parts[self.part].headroom

    @property
    def dead(self) -> str | None:
        return None if self.part is None else self.layer.parts[self.part].dead


def places(layer: LayerReport) -> Iterator[Place]:
    """The block, then its parts."""
    yield Place(layer, None)
    yield from (Place(layer, part) for part in PARTS if part in layer.parts)


@dataclass(frozen=True)
class Case:
    """A report with the comparable ones before it, oldest first."""

    report: PeelReport
    history: tuple[PeelReport, ...]

    def before(self, place: Place) -> tuple[Place, ...]:
        """The same place in each earlier report that has it, oldest first."""
        return tuple(
            Place(layer, place.part)
            for report in self.history
            for layer in report.layers
            if layer.name == place.layer.name and _has(layer, place.part)
        )

    def comparable(self, place: Place) -> tuple[Estimate, ...]:
        """The margins of the place in earlier reports that were measured as it is now, oldest first."""
        now = place.compared
        before = (earlier.compared for earlier in self.before(place)) if now is not None else ()
        return tuple(
            compared[1] for compared in before if compared is not None and now is not None and compared[0] == now[0]
        )

    def peers(self, place: Place) -> tuple[Place, ...]:
        """The same place of the other blocks that have it."""
        return tuple(
            Place(layer, place.part)
            for layer in self.report.layers
            if layer.name != place.layer.name and _has(layer, place.part)
        )

    def step_before(self) -> int | None:
        """The step of the report before this one."""
        return self.history[-1].checkpoint.step if self.history else None


def _has(layer: LayerReport, part: PartName | None) -> bool:
    return part is None or part in layer.parts


def usual(values: Sequence[float], default: float) -> float:
    """The median of some values, `default` for none."""
    return median(values) if values else default
