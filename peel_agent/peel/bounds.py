"""Bounds of the run: the suite's values, the select-winner, gap and zone (METHOD 3, steps 4 and 5)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from peel_agent.peel.chains import SOLVER, chain_ends, is_direct, most_columns
from peel_agent.peel.heads import fit_head
from peel_agent.peel.intervals import estimate
from peel_agent.peel.least_squares import tokens_needed
from peel_agent.peel.losses import sequence_losses
from peel_agent.peel.maps import TargetMap
from peel_agent.peel.stopwatch import Stopwatch
from peel_agent.peel.streams import Streams, score_ids
from peel_agent.peel.sweep import Losses
from peel_agent.records import BoundReport, Estimate, Skipped, Trace, Zone


@dataclass(frozen=True)
class Bounds:
    """The suite measured on `confirm`; `bound` is the value of the map with the least loss on `select`."""

    reports: tuple[BoundReport, ...]
    bound: Estimate | None
    gap: Estimate | None
    zone: Zone
    skipped: tuple[Skipped, ...]


def measure_bounds(
    trace: Trace,
    labelled: Mapping[str, TargetMap],
    hidden: Mapping[int, Streams],
    trained: Losses,
    stopwatch: Stopwatch,
) -> Bounds:
    """Bounds for the labelled maps; `hidden` holds the trained hidden states they need, `trained` the model's losses
    per score sequence [N_s + N_c], select first.
    """
    labelled, skipped = _trusted(trace, labelled)
    with stopwatch("solve"):
        ends = chain_ends(trace, labelled.values(), hidden)
        heads = {own: fit_head(trace, streams) for own, streams in ends.items()}
    with stopwatch("score"):
        ids = score_ids(trace.probe)
        losses = {own: sequence_losses(trace, streams.score, ids, heads[own]) for own, streams in ends.items()}
    selecting = len(trace.probe.select)
    winner = min(losses.values(), key=lambda own: float(own[:selecting].mean()))
    gap = estimate((trained - winner)[selecting:])
    reports = tuple(
        _report(label, own, losses[own][selecting:], tied_head=trace.tied_head) for label, own in labelled.items()
    )
    return Bounds(reports, estimate(winner[selecting:]), gap, zone_of(gap), skipped)


def zone_of(gap: Estimate) -> Zone:
    """`caution`: a cheap construction is proven better than the run. `effective`: none in this suite is."""
    if gap.low > 0.0:
        return "caution"
    return "effective" if gap.high < 0.0 else "undecided"


def _report(label: str, own: TargetMap, confirm: Losses, *, tied_head: bool) -> BoundReport:
    """A head fitted apart from tied embeddings leaves the model's own class; everything else here stays within it."""
    value = estimate(confirm)
    return BoundReport(label, own, SOLVER, value, best=value.value, within_class=not tied_head)


def _trusted(trace: Trace, labelled: Mapping[str, TargetMap]) -> tuple[dict[str, TargetMap], tuple[Skipped, ...]]:
    """Only the maps whose fits can be trusted with this probe: with too few fit tokens, those without a solve."""
    tokens, columns = trace.probe.fit.size, most_columns(trace)
    solved = [label for label, own in labelled.items() if not is_direct(own)]
    if tokens >= tokens_needed(columns) or not solved:
        return dict(labelled), ()
    why = f"{tokens:,} fit tokens; a fit of {columns:,} columns needs {tokens_needed(columns):,}"
    kept = {label: own for label, own in labelled.items() if label not in solved}
    return kept, tuple(Skipped(f"map {label}", why) for label in solved)
