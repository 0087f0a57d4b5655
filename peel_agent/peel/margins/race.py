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

from peel_agent.peel.elsewhere import ALONE
from peel_agent.peel.margins.heats import first_heat, longer_heats, picking_rows, quick_passes
from peel_agent.peel.margins.margin import (
    DROPPED,
    Few,
    Margin,
    Place,
    Threshold,
    by_place,
    margins_of,
    may_be_better,
    of_target,
    over,
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
from peel_agent.peel.sweep.tails import stand_in
from peel_agent.records import Estimate, Helpers, Plan, Skipped, Trace

LEAST_WORSE, MOST_WORSE = 3, 8
"""How many blocks and parts that seem to have got worse are measured on all of confirm, at least and at most."""

MOST_BELOW = 9
"""How many blocks and parts that seem below their threshold are measured on whole sequences whatever the budget: three
blocks with their parts.
"""

CLEARING = 0.5
"""What does not seem to be below is measured while no more than this share of the budget is spent: most of the time the
price of a peel is that share, and the rest is there for what may be found below.
"""

QUICK_GROWTH = 2.0
"""What effort quick may cost in all, as a multiple of what it has cost with the first heat. All of it may be spent on
what does not seem to be below.
"""

CERTAIN = float("inf")
"""The share for what is measured whatever the budget."""


@dataclass(frozen=True)
class Raced:
    """What a race found.

    `swept`: the sweep that solved the stand-ins. `excesses`: how much more each stand-in loses than the trained model,
    on the last tokens it was run on. `margins`: of every block and part. `first`: their margins on the first heat,
    whose tokens are the same at every checkpoint. `progress`: over the checkpoint before. `work`: what each stage of
    it cost, in plain forward passes.
    """

    swept: Sweep
    excesses: Mapping[Variant, Excess]
    margins: Mapping[Place, Margin]
    first: Mapping[Place, Margin]
    progress: Mapping[Place, Estimate]
    work: Mapping[str, float]


Entry = tuple[Place, Heat, tuple[Variant, ...]]
"""A place, and those of its variants that are to be scored on a heat."""


def race(
    trace: Trace,
    plan: Plan,
    keep: frozenset[int],
    stopwatch: Stopwatch,
    *,
    comparison: Comparison | None = None,
    helpers: Helpers = ALONE,
) -> Raced:
    """Margins as planned, and progress over the checkpoint before if there is a comparison with it.

    The sweep keeps the hidden states `keep`.
    """
    meter = Meter(trace, next(iter(trace.blocks(stop=1))), plan.passes)
    shortest = first_heat(trace, meter, variants_per_block(plan), quick_passes(trace, plan, meter))
    swept = sweep(trace, plan, shortest, keep, stopwatch, meter=meter, comparison=comparison, helpers=helpers)
    if not np.isfinite(swept.trained).all():
        return Raced(swept, {}, {}, {}, {}, meter.by_stage)  # there is nothing to hold against anything
    if plan.few_sequences:
        why = "effort quick measures the rest for as much again as its first look costs; effort standard goes on"
        meter.limit(QUICK_GROWTH * meter.spent, why)
    standings = _Standings(trace, plan, swept, stopwatch, meter, helpers=helpers)
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
        meter.by_stage,
    )


class _Standings:
    """What is known so far: the excess losses of stand-ins, and of `earlier` weights, on the last tokens of each."""

    def __init__(
        self, trace: Trace, plan: Plan, swept: Sweep, stopwatch: Stopwatch, meter: Meter, *, helpers: Helpers
    ) -> None:
        self.stand_ins = dict(swept.variants)
        self.earlier = dict(swept.progress)
        self._trace, self._plan, self._swept, self._stopwatch, self._meter = trace, plan, swept, stopwatch, meter
        self._selecting = len(trace.probe.select)
        self._helpers = helpers
        self._refused: dict[Place, str] = {}
        self._clearing = 1.0 if plan.few_sequences else CLEARING
        columns, fit = trace.width + 1, trace.probe.fit.size
        self._few = Few(max(0.0, 1.0 - columns / fit)) if plan.few_sequences else None

    def margins(self) -> dict[Place, Margin]:
        return margins_of(self.stand_ins, self._plan.references, self._selecting, few=self._few)

    def progress(self) -> dict[Place, Estimate]:
        measured = {variant: excess.losses[self._selecting :] for variant, excess in self.earlier.items()}
        return {
            (variant.block, variant.target): estimate(losses[np.isfinite(losses)])
            for variant, losses in measured.items()
            if np.isfinite(losses).any()
        }

    def clear_on(self, heat: Heat) -> None:
        """Runs open places on the first tokens of sequences: not those that seem below, which only whole ones can tell.

        The highest margins come first, for they are cleared soonest.
        """
        margins = self.margins()
        suspects = seeming_below(margins)
        straddling = [place for place in still_open(margins) if place not in suspects]
        straddling.sort(key=lambda place: -margins[place].estimate.value)
        entries = [(place, heat, self._contending(place, margins)) for place in straddling]
        self._carry([(self._clearing, entries)], "longer cuts")

    def measure_in_full(self) -> None:
        """Measures open places on whole sequences, as far as the budget goes: after what is certain to be measured, the
        lowest margins first.
        """
        margins = self.margins()
        certain = self._certain(margins)
        taken = {place for place, _, variants in certain if variants[0].reference != EARLIER}
        # What is held against a threshold is of use only when that is known: the other blocks or parts come first.
        needed = {target for _, target in taken}
        rest = [place for place in still_open(margins) if place not in taken]
        rest.sort(key=lambda place: (place[1] not in needed, margins[place].most))
        low = not_surely_over(margins)
        groups = [
            (CERTAIN, certain),
            (1.0, self._whole([place for place in rest if place in low], margins)),
            (self._clearing, self._whole([place for place in rest if place not in low], margins)),
        ]
        self._refused = self._carry(groups, "whole sequences")

    def _certain(self, margins: Mapping[Place, Margin]) -> list[Entry]:
        """What is measured on whole sequences whatever the budget, so that none makes an alert come later: the blocks,
        then the parts, that seem below their threshold, the lowest first; and the places that seem to have got worse.
        """
        confirm = np.arange(self._selecting, len(self._swept.trained))
        worse = [
            ((variant.block, variant.target), self._unmeasured(self.earlier[variant], confirm), (variant,))
            for variant in seeming_worse(self.progress())
        ]
        below = sorted(seeming_below(margins), key=lambda place: (place[1] != "block", margins[place].most))
        return [*self._whole(below[:MOST_BELOW], margins), *worse]

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
        """The places on all of confirm, and on select where several contenders are left to pick from."""
        everything = np.arange(len(self._swept.trained))
        confirm, few = everything[self._selecting :], everything[: picking_rows(self._trace.probe)]
        entries = []
        for place in places:
            contending = self._contending(place, margins)
            rows = everything if margins[place].cut is None else np.concatenate([few, confirm])
            # With few tokens the interval spans all contenders, whichever is picked.
            rows = rows if len(contending) > 1 and self._few is None else confirm
            entries.append((place, self._unmeasured(self.stand_ins[contending[0]], rows), contending))
        return entries

    def _unmeasured(self, excess: Excess, rows: NDArray[np.int64]) -> Heat:
        """These rows as whole sequences, without those on which the excess was measured so already."""
        known = excess.measured.nonzero()[0] if excess.cut is None else rows[:0]
        return Heat(np.setdiff1d(rows, known), self._trace.probe.sequence_length)

    def _carry(self, groups: Sequence[tuple[float, Sequence[Entry]]], stage: str) -> dict[Place, str]:
        """Runs as many entries as are afforded, in their order; says of the others why not.

        Each group comes with the share of the budget that may be spent before it is left out.
        """
        shared = [(share, entry) for share, entries in groups for entry in entries if len(entry[1].rows)]
        entries = [entry for _, entry in shared]
        taken, why = len(entries), ""
        while taken:
            refusal = self._refusal(self._price(entries[:taken]), shared[taken - 1][0])
            if refusal is None:
                break
            taken, why = taken - 1, refusal
        lanes: dict[tuple[int, ...], tuple[Heat, list[Variant]]] = {}
        for _, heat, variants in entries[:taken]:
            lanes.setdefault(tuple(heat.rows), (heat, []))[1].extend(variants)
        if lanes:
            chosen = [
                (heat, {variant: self._swept.solved[variant] for variant in variants})
                for heat, variants in lanes.values()
            ]
            for excesses in carry(self._trace, chosen, self._stopwatch, self._meter, stage, helpers=self._helpers):
                self._learn(excesses)
        return {place: why for place, _, _ in entries[taken:]}

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
            self._meter.tail(place[0], heat.tokens, heat.length, stand_in(variant, self._meter))
            for place, heat, variants in entries
            for variant in variants
        )
        return restream(union([heat for _, heat, _ in entries]), self._meter) + tails

    def _refusal(self, passes: float, share: float) -> str | None:
        """Why a share of the budget, or the time, does not suffice for so many forward passes; None when they do."""
        if not self._meter.affords(passes, share):
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
        if may_be_better(excess, excesses[place][margin.best], DROPPED)
    )


def still_open(margins: Mapping[Place, Margin]) -> tuple[Place, ...]:
    """The blocks and parts that were not measured in full, and that some reference which may be the best leaves not
    certainly above their threshold.
    """
    return tuple(place for place, margin, _, is_over in _judged(margins) if not (is_over or margin.whole))


def seeming_below(margins: Mapping[Place, Margin]) -> tuple[Place, ...]:
    """The open blocks and parts that are under their threshold as far as they were measured."""
    return tuple(
        place for place, margin, limits, _ in _judged(margins) if margin.most < limits.above and not margin.whole
    )


def not_surely_over(margins: Mapping[Place, Margin]) -> frozenset[Place]:
    """The blocks and parts that may be below their threshold for all that is known."""
    return frozenset(place for place, margin, limits, _ in _judged(margins) if margin.least <= limits.below)


def _judged(margins: Mapping[Place, Margin]) -> list[tuple[Place, Margin, Threshold, bool]]:
    """Every place with its margin, what that is held against, and whether it is over that: blocks against blocks, parts
    against the same part.
    """
    judged: list[tuple[Place, Margin, Threshold, bool]] = []
    for target in TARGETS:
        by_block = of_target(margins, target)
        held = list(by_block.values())
        judged += [
            ((index, target), margin, limits, is_over)
            for index, margin, limits, is_over in zip(by_block, held, thresholds(held), over(held), strict=True)
        ]
    return judged
