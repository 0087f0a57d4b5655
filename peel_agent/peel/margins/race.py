"""Margins by a race (method.md 8): every reference is scored on a few tokens first. Where even the cheapest reference
costs more than the threshold, the block or part is cleared. The others go on to more tokens, with those references that
may still be the best, and at last to all whole sequences: no block is accused on fewer. What the budget does not
suffice for stays open, and is named.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from peel_agent.peel.margins.heats import first_heat, longer_heats
from peel_agent.peel.margins.margin import (
    Margin,
    Place,
    Threshold,
    by_place,
    margins_of,
    may_be_better,
    of_target,
    thresholds,
)
from peel_agent.peel.numerics.intervals import estimate
from peel_agent.peel.numerics.losses import Excess
from peel_agent.peel.numerics.meter import Meter
from peel_agent.peel.numerics.stopwatch import Stopwatch
from peel_agent.peel.past.comparison import EARLIER, Comparison
from peel_agent.peel.sweep.forward import Sweep, sweep
from peel_agent.peel.sweep.heats import Heat
from peel_agent.peel.sweep.lanes import carry, restream, union
from peel_agent.peel.sweep.splices import TARGETS, Variant
from peel_agent.peel.sweep.stand_ins import variants_per_block
from peel_agent.records import Estimate, Plan, Skipped, Trace

LEAST_WORSE, MOST_WORSE = 3, 8
"""How many blocks and parts that seem to have got worse are measured on all of confirm, at least and at most."""

RESERVED = 0.5
"""While first tokens are run, at most this fraction of what is left of the budget is kept for whole sequences."""


@dataclass(frozen=True)
class Raced:
    """What a race found.

    `swept`: the sweep that solved the stand-ins. `excesses`: how much more each stand-in loses than the trained model,
    on the last tokens it was run on. `margins`: of every block and part. `first`: their margins on the first heat,
    whose tokens are the same at every checkpoint. `progress`: over the checkpoint before. `passes`: the work of all of
    it, in plain forward passes.
    """

    swept: Sweep
    excesses: Mapping[Variant, Excess]
    margins: Mapping[Place, Margin]
    first: Mapping[Place, Margin]
    progress: Mapping[Place, Estimate]
    passes: float


Entry = tuple[Place, Heat, tuple[Variant, ...]]
"""A place, and those of its variants that are to be scored on a heat."""


def race(
    trace: Trace,
    plan: Plan,
    keep: frozenset[int],
    stopwatch: Stopwatch,
    *,
    comparison: Comparison | None = None,
) -> Raced:
    """Margins as planned, and progress over the checkpoint before if there is a comparison with it.

    The sweep keeps the hidden states `keep`.
    """
    meter = Meter(trace, next(iter(trace.blocks(stop=1))), plan.passes)
    shortest = first_heat(trace, meter, variants_per_block(plan))
    swept = sweep(trace, plan, shortest, keep, stopwatch, meter=meter, comparison=comparison)
    if not np.isfinite(swept.trained).all():
        return Raced(swept, {}, {}, {}, {}, meter.spent)  # there is nothing to hold against anything
    standings = _Standings(trace, plan, swept, stopwatch, meter)
    first = standings.margins()
    for longer in longer_heats(trace.probe, shortest):
        standings.clear_on(longer)
    standings.measure_in_full()
    return Raced(
        replace(swept, skipped=(*swept.skipped, *standings.left_out())),
        {**standings.stand_ins, **standings.earlier},
        standings.margins(),
        first,
        # What was measured before the comparison fell counts for nothing: its files may be torn.
        standings.progress() if comparison is not None and comparison.stands else {},
        meter.spent,
    )


class _Standings:
    """What is known so far: the excess losses of stand-ins, and of `earlier` weights, on the last tokens of each."""

    def __init__(self, trace: Trace, plan: Plan, swept: Sweep, stopwatch: Stopwatch, meter: Meter) -> None:
        self.stand_ins = dict(swept.variants)
        self.earlier = dict(swept.progress)
        self._trace, self._plan, self._swept, self._stopwatch, self._meter = trace, plan, swept, stopwatch, meter
        self._selecting = len(trace.probe.select)
        self._refused: dict[Place, str] = {}

    def margins(self) -> dict[Place, Margin]:
        return margins_of(
            self.stand_ins, self._plan.references, self._selecting, unsure_of_best=self._plan.few_sequences
        )

    def progress(self) -> dict[Place, Estimate]:
        measured = {variant: excess.losses[self._selecting :] for variant, excess in self.earlier.items()}
        return {
            (variant.block, variant.target): estimate(losses[np.isfinite(losses)])
            for variant, losses in measured.items()
            if np.isfinite(losses).any()
        }

    def clear_on(self, heat: Heat) -> None:
        """Runs open places on the first tokens of sequences: not those that seem below, which only whole ones can tell.

        The highest margins come first, for they are cleared soonest, as long as enough of the budget is left for those
        that seem below.
        """
        margins = self.margins()
        suspects = seeming_below(margins)
        straddling = [place for place in still_open(margins) if place not in suspects]
        straddling.sort(key=lambda place: -margins[place].estimate.value)
        whole = self._whole(suspects, margins)
        self._carry([(place, heat, self._contending(place, margins)) for place in straddling], reserved=whole)

    def measure_in_full(self) -> None:
        """Measures open places on whole sequences, the lowest margins first, and those that seem to have got worse."""
        margins = self.margins()
        worse = seeming_worse(self.progress())
        confirm = np.arange(self._selecting, len(self._swept.trained))
        entries = [
            ((variant.block, variant.target), self._unmeasured(self.earlier[variant], confirm), (variant,))
            for variant in worse
        ]
        lowest = sorted(still_open(margins), key=lambda place: margins[place].estimate.high)
        self._refused = self._carry([*entries, *self._whole(lowest, margins)])

    def left_out(self) -> tuple[Skipped, ...]:
        """What stayed open, and on what the margins are that were cleared on cuts."""
        skipped = []
        for why in dict.fromkeys(self._refused.values()):
            names = [self._name(place) for place, reason in self._refused.items() if reason == why]
            skipped.append(Skipped(f"open margins on all sequences: {', '.join(names)}", why))
        cleared = {place: margin.cut for place, margin in self.margins().items() if place not in self._refused}
        cuts = [cut for cut in cleared.values() if cut is not None]
        if cuts:
            what = f"whole sequences for the margins of {len(cuts)} blocks and parts"
            tokens = f"{min(cuts)}" if min(cuts) == max(cuts) else f"{min(cuts)} to {max(cuts)}"
            why = f"they are far enough above the threshold on the first {tokens} tokens, and are reported from there"
            skipped.append(Skipped(what, why))
        return tuple(skipped)

    def _name(self, place: Place) -> str:
        name = self._trace.block_names[place[0]]
        return name if place[1] == "block" else f"{name}/{place[1]}"

    def _contending(self, place: Place, margins: Mapping[Place, Margin]) -> tuple[Variant, ...]:
        return contenders(self.stand_ins, {place: margins[place]})

    def _whole(self, places: Iterable[Place], margins: Mapping[Place, Margin]) -> list[Entry]:
        """The places on all sequences; on confirm alone where one contender is left: nothing is to be picked."""
        everything = np.arange(len(self._swept.trained))
        entries = []
        for place in places:
            contending = self._contending(place, margins)
            rows = everything if len(contending) > 1 else everything[self._selecting :]
            entries.append((place, self._unmeasured(self.stand_ins[contending[0]], rows), contending))
        return entries

    def _unmeasured(self, excess: Excess, rows: NDArray[np.int64]) -> Heat:
        """These rows as whole sequences, without those on which the excess was measured so already."""
        known = excess.measured.nonzero()[0] if excess.cut is None else rows[:0]
        return Heat(np.setdiff1d(rows, known), self._trace.probe.sequence_length)

    def _carry(self, entries: Sequence[Entry], reserved: Sequence[Entry] = ()) -> dict[Place, str]:
        """Runs as many entries as are afforded, in their order; says of the others why not."""
        entries = [entry for entry in entries if len(entry[1].rows)]
        kept_back = min(self._price(reserved), RESERVED * self._meter.left) if reserved else 0.0
        taken = len(entries)
        while taken and self._refusal(self._price(entries[:taken]) + kept_back) is not None:
            taken -= 1
        lanes: dict[tuple[int, ...], tuple[Heat, list[Variant]]] = {}
        for _, heat, variants in entries[:taken]:
            lanes.setdefault(tuple(heat.rows), (heat, []))[1].extend(variants)
        if lanes:
            chosen = [
                (heat, {variant: self._swept.solved[variant] for variant in variants})
                for heat, variants in lanes.values()
            ]
            for excesses in carry(self._trace, chosen, self._stopwatch, self._meter):
                self._learn(excesses)
        rest = entries[taken:]
        why = self._refusal(self._price(rest[:1]) + kept_back) if rest else None
        return {place: why or "" for place, _, _ in rest}

    def _learn(self, excesses: Mapping[Variant, Excess]) -> None:
        for variant, new in excesses.items():
            known = self.earlier if variant.reference == EARLIER else self.stand_ins
            old = known[variant]
            both = np.where(new.measured, new.losses, old.losses) if old.cut == new.cut else new.losses
            known[variant] = replace(new, losses=both)

    def _price(self, entries: Sequence[Entry]) -> float:
        """What these cost in plain forward passes, the trained streams included."""
        if not entries:
            return 0.0
        tails = sum(
            self._meter.tail(place[0], len(variants) * heat.tokens, heat.length) for place, heat, variants in entries
        )
        return restream(union([heat for _, heat, _ in entries]), self._meter) + tails

    def _refusal(self, passes: float) -> str | None:
        """Why so many forward passes are not afforded; None when they are."""
        if not self._meter.affords(passes):
            return self._meter.refusal()
        afforded = self._stopwatch.affords(passes * self._swept.seconds_per_pass)
        return None if afforded else self._stopwatch.refusal()


def seeming_worse(progress: Mapping[Place, Estimate]) -> tuple[Variant, ...]:
    """What is to be measured on all of confirm: the places that seem worse than at the checkpoint before.

    Those that are worse for certain on a few sequences, MOST_WORSE of them at most, and the next lowest up to
    LEAST_WORSE; the lowest first.
    """
    falling = [place for place in progress if progress[place].value < 0.0]
    lowest = sorted(falling, key=lambda place: progress[place].value)
    certain = sum(progress[place].high < 0.0 for place in lowest)
    return tuple(Variant(*place, EARLIER) for place in lowest[: min(MOST_WORSE, max(LEAST_WORSE, certain))])


def contenders(variants: Mapping[Variant, Excess], margins: Mapping[Place, Margin]) -> tuple[Variant, ...]:
    """The references of these places that may yet be the best."""
    excesses = by_place(variants)
    return tuple(
        Variant(*place, name)
        for place, margin in margins.items()
        for name, excess in excesses[place].items()
        if may_be_better(excess, excesses[place][margin.best])
    )


def still_open(margins: Mapping[Place, Margin]) -> tuple[Place, ...]:
    """The blocks and parts that were not measured in full, and that some reference which may be the best leaves not
    certainly above their threshold.
    """
    return tuple(
        place
        for place, margin, limits in _with_thresholds(margins)
        if margin.least <= limits.above and not margin.whole
    )


def seeming_below(margins: Mapping[Place, Margin]) -> tuple[Place, ...]:
    """The open blocks and parts that are under their threshold as far as they were measured."""
    return tuple(
        place
        for place, margin, limits in _with_thresholds(margins)
        if margin.estimate.high < limits.above and not margin.whole
    )


def _with_thresholds(margins: Mapping[Place, Margin]) -> list[tuple[Place, Margin, Threshold]]:
    """Every place with its margin and what that is held against: blocks against blocks, parts against the same part."""
    held: list[tuple[Place, Margin, Threshold]] = []
    for target in TARGETS:
        by_block = of_target(margins, target)
        held += [
            ((index, target), by_block[index], limits)
            for index, limits in zip(by_block, thresholds(list(by_block.values())), strict=True)
        ]
    return held
