"""peel: Trace -> Findings, the reference solutions and what they say. Pure: no files, no clock, no configuration."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial

import numpy as np

from peel_agent.errors import CheckpointError
from peel_agent.peel.bounds.bounds import NONE, measure_bounds
from peel_agent.peel.bounds.chains import chained, hidden_states_of
from peel_agent.peel.bounds.heads import head_losses
from peel_agent.peel.bounds.maps import suite
from peel_agent.peel.bounds.solvers import solver_named
from peel_agent.peel.elsewhere import ALONE
from peel_agent.peel.fully_connected.network import peel_network
from peel_agent.peel.headroom.headroom import Headroom, headrooms
from peel_agent.peel.headroom.improve import Improvement, earlier_block, improve
from peel_agent.peel.layers import Measured, layer_reports
from peel_agent.peel.margins.race import Raced, race
from peel_agent.peel.numerics.intervals import estimate
from peel_agent.peel.numerics.least_squares import tokens_needed
from peel_agent.peel.numerics.losses import Losses
from peel_agent.peel.numerics.stopwatch import Stopwatch
from peel_agent.peel.numerics.streams import out_of_memory
from peel_agent.peel.pairs import paired_differences, sequence_losses_of
from peel_agent.peel.past.comparison import Comparison
from peel_agent.peel.redundancy import redundancy
from peel_agent.peel.sweep.tails import tail_losses
from peel_agent.records import (
    Block,
    BoundMemory,
    Findings,
    HeadPiece,
    Helpers,
    LayerReport,
    Piece,
    Plan,
    Progress,
    Skipped,
    Trace,
)

__all__ = [
    "ALONE",
    "Comparison",
    "Improvement",
    "earlier_block",
    "improve",
    "losses_of_piece",
    "out_of_memory",
    "paired_differences",
    "peel",
    "peel_network",
    "tokens_needed",
]


def peel(
    trace: Trace,
    plan: Plan,
    clock: Callable[[], float],
    *,
    earlier: BoundMemory | None = None,
    progress: Progress | None = None,
    comparison: Comparison | None = None,
    step: int | None = None,
    helpers: Helpers = ALONE,
) -> Findings:
    """Peels one checkpoint, that of `step`, as planned, beside the one before it if there is a `comparison`.

    `earlier` are the best bounds that the checkpoint before handed on, `progress` is told how far the work is.
    `helpers` compute pieces of it elsewhere; the numbers are the same.

    Raises ConfigurationError for maps that this model cannot have, CheckpointError when its loss is not a number.
    """
    stopwatch = Stopwatch(clock, progress, budget=plan.seconds)
    solver = solver_named(plan.solver)
    depth = len(trace.block_names)
    maps = suite(plan.maps, depth) if "bounds" in plan.quantities else {}
    if "margin" not in plan.quantities:
        plan = replace(plan, references=())
    plan, skipped = _possible(plan, next(iter(trace.blocks(stop=1))))
    keep = hidden_states_of(chained(maps, depth, solver), solver) | {depth} if maps else frozenset[int]()
    raced = race(trace, plan, keep, stopwatch, comparison=comparison, helpers=helpers)
    swept = raced.swept
    _check_finite(swept.trained)
    selecting = len(trace.probe.select)
    skipped += swept.skipped
    measured = partial(measure_bounds, trace, maps, solver=solver, hidden=swept.hidden, trained=swept.trained)
    bounds = measured(earlier=earlier, stopwatch=stopwatch, step=step, helpers=helpers) if maps else NONE
    rooms, left_out = _headrooms(trace, plan, raced, stopwatch)
    layers, further = _layers(trace, plan, raced, rooms, comparison)
    skipped += bounds.skipped + left_out + further
    matrix = None
    if "redundancy" in plan.quantities:
        matrix, left_out = redundancy(trace, swept.trained, stopwatch)
        skipped += left_out
    return Findings(
        loss=estimate(swept.trained[selecting:]),
        bound=bounds.bound,
        gap=bounds.gap,
        zone=bounds.zone,
        bounds=bounds.reports,
        layers=layers,
        redundancy=matrix,
        memory=bounds.memory,
        skipped=skipped,
        timing=stopwatch.timing(),
        sketches=comparison.sketches() if comparison else None,
        work=raced.work,
        bound_label=bounds.memory.label if bounds.memory else None,
        bound_step=bounds.memory.step if bounds.memory else None,
        losses=sequence_losses_of(trace.probe.fingerprint, swept.trained[selecting:], raced.margins, rooms),
    )


def losses_of_piece(trace: Trace, piece: Piece, alive: Callable[[], None]) -> Losses:
    """What a helper answers: the losses of a piece of this checkpoint. `alive` is called between steps of a long one.

    It runs as many sequences at once as was done where the piece was made.
    """
    trace.chunk.sequences = piece.sequences
    if isinstance(piece, HeadPiece):
        return head_losses(trace, piece, alive)
    return tail_losses(trace, piece, alive)


def _check_finite(trained: Losses) -> None:
    if not np.isfinite(trained).all():
        raise CheckpointError(
            "the loss of this checkpoint is not a finite number",
            remedy="its weights hold NaN or infinity, or the training diverged: take an earlier checkpoint",
        )


def _headrooms(
    trace: Trace, plan: Plan, raced: Raced, stopwatch: Stopwatch
) -> tuple[Mapping[int, Headroom], tuple[Skipped, ...]]:
    """The headroom of every block when it is planned, and what was left out of it."""
    if "headroom" not in plan.quantities:
        return {}, ()
    added = [visited.added for visited in raced.swept.visited]
    return headrooms(trace, raced.swept.trained, added, stopwatch)


def _layers(
    trace: Trace, plan: Plan, raced: Raced, rooms: Mapping[int, Headroom], comparison: Comparison | None
) -> tuple[tuple[LayerReport, ...], tuple[Skipped, ...]]:
    """What is reported of every block; and what was left out of it."""
    swept = raced.swept
    left_out: tuple[Skipped, ...] = ()
    if comparison is None:
        measured = Measured(raced.margins, rooms, {}, {}, raced.first)
    else:
        measured = Measured(raced.margins, rooms, comparison.changes(), raced.progress, raced.first)
        left_out += comparison.skipped
    if not (plan.references or measured):
        return (), left_out
    if not plan.references:
        left_out += _not_asked_for(plan, comparison)
    parts_open = not plan.parts and next(iter(trace.blocks(stop=1))).has_parts
    return layer_reports(measured, trace.block_names, swept.visited, parts_open=parts_open), left_out


def _not_asked_for(plan: Plan, comparison: Comparison | None) -> tuple[Skipped, ...]:
    """What a report of blocks lacks when their margins were not asked for."""
    asked = ", ".join(sorted(plan.quantities))
    margins = Skipped("margins of blocks and parts", f"not asked for: the quantities are {asked}")
    progress = Skipped("progress", "it is measured beside margins, which were not asked for")
    return (margins, progress) if comparison is not None and comparison.stands else (margins,)


def _possible(plan: Plan, block: Block) -> tuple[Plan, tuple[Skipped, ...]]:
    """The plan without what this architecture has no place for, which is told; other checks stay as they are."""
    skipped = []
    if plan.references and not (plan.parts and block.has_parts):
        why = "effort quick judges whole blocks" if not plan.parts else "this architecture adds both parts at once"
        skipped.append(Skipped("margins of attention and MLP parts", why))
        plan = replace(plan, parts=False)
    if plan.references and not plan.parts and "previous" not in plan.references:
        why = "effort quick has `skip` and `affine` only: with `previous` too, a margin may be lower"
        skipped.append(Skipped("`previous` references", why))
    if "previous" in plan.references and not block.has_projections:
        skipped.append(Skipped("`previous` references", "this architecture has no output projections to refit"))
        plan = replace(plan, references=tuple(reference for reference in plan.references if reference != "previous"))
    return plan, tuple(skipped)
