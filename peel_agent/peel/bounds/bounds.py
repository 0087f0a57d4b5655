"""Bounds of the run: the suite's values, the select-winner, running minimum, gap and zone (method.md 3, steps 4, 5).

A bound is the loss of a cheap model made of the run's own blocks, one for each target map; a run whose loss is above
its bound has been shown a better model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from peel_agent.peel.bounds.chains import chain_ends, chained, is_direct
from peel_agent.peel.bounds.heads import fit_head, head_losses
from peel_agent.peel.bounds.maps import HEAD, TargetMap
from peel_agent.peel.bounds.solvers import Solver
from peel_agent.peel.elsewhere import ALONE, collected
from peel_agent.peel.numerics.intervals import estimate
from peel_agent.peel.numerics.losses import Losses, sequence_losses
from peel_agent.peel.numerics.stopwatch import Stopwatch
from peel_agent.peel.numerics.streams import Streams, score_ids
from peel_agent.peel.references import refit_fault
from peel_agent.records import BoundMemory, BoundReport, Estimate, HandedOut, HeadPiece, Helpers, Skipped, Trace, Zone


@dataclass(frozen=True)
class Bounds:
    """The suite measured on `confirm`; `memory` is the best construction so far, kept for the next checkpoint."""

    reports: tuple[BoundReport, ...]
    bound: Estimate | None
    gap: Estimate | None
    zone: Zone
    memory: BoundMemory | None
    skipped: tuple[Skipped, ...]


NONE = Bounds((), None, None, "undecided", None, ())


def measure_bounds(
    trace: Trace,
    labelled: Mapping[str, TargetMap],
    *,
    solver: Solver,
    hidden: Mapping[int, Streams],
    trained: Losses,
    earlier: BoundMemory | None,
    stopwatch: Stopwatch,
    step: int | None = None,
    helpers: Helpers = ALONE,
) -> Bounds:
    """Bounds for the labelled maps; `hidden` holds the trained hidden states they need, `trained` the model's losses
    per score sequence [N_s + N_c], select first, `earlier` the best of the checkpoints before, `step` is this one's.
    `helpers` fit heads.
    """
    labelled, skipped = _trusted(trace, labelled, solver)
    losses = _suite_losses(trace, labelled, solver, hidden, stopwatch, helpers=helpers)
    skipped += tuple(Skipped(f"map {label}", stopwatch.refusal()) for label in labelled if label not in losses)
    selecting = len(trace.probe.select)
    memory = remember(losses, selecting, trace.probe.fingerprint, earlier, step=step)
    confirm = np.array(memory.confirm)
    gap = estimate(trained[selecting:] - confirm)
    signs = any(weight_set.kind == "sign" for weight_set in next(iter(trace.blocks(stop=1))).sets.values())
    reports = tuple(
        BoundReport(
            label=label,
            map=target_map,
            solver=solver.name,
            value=estimate(losses[label][selecting:]),
            best=memory.best[label],
            within_class=within_class(trace, target_map, signs=signs),
        )
        for label, target_map in labelled.items()
        if label in losses
    )
    return Bounds(reports, estimate(confirm), gap, zone_of(gap), memory, skipped)


def remember(
    losses: Mapping[str, Losses],
    selecting: int,
    fingerprint: str,
    earlier: BoundMemory | None,
    *,
    step: int | None = None,
) -> BoundMemory:
    """The running minimum: the construction with the least loss on `select`, of this suite or of an earlier checkpoint.

    Of equal ones the first is taken, and an earlier one before all: `head` comes first in every suite, so that it is
    named where a longer construction wins nothing beyond it.

    `losses` holds each construction's losses per score sequence, the first `selecting` of which are `select`. An
    earlier memory counts only when it was measured on the same probe.
    """
    label = min(losses, key=lambda name: float(losses[name][:selecting].mean()))
    winner = losses[label]
    best = {label: float(values[selecting:].mean()) for label, values in losses.items()}
    memory = BoundMemory(
        fingerprint, float(winner[:selecting].mean()), tuple(winner[selecting:].tolist()), best, label, step
    )
    if earlier is None or earlier.probe != fingerprint:
        return memory
    lowest = {**earlier.best, **{label: min(value, earlier.best.get(label, value)) for label, value in best.items()}}
    ahead = earlier if earlier.select <= memory.select else memory
    return replace(ahead, best=lowest)


def within_class(trace: Trace, target_map: TargetMap, *, signs: bool) -> bool:
    """Whether the model itself could hold the construction (method.md 9).

    A head fitted apart from tied embeddings is outside; so is a chain shorter than a model whose signs leave no block
    that does nothing (`signs`).
    """
    return not trace.tied_head and not (signs and len(target_map) < len(trace.block_names))


def zone_of(gap: Estimate) -> Zone:
    """`caution`: a cheap construction is proven better than the run. `effective`: none in this suite is."""
    if gap.low > 0.0:
        return "caution"
    return "effective" if gap.high < 0.0 else "undecided"


def _suite_losses(
    trace: Trace,
    labelled: Mapping[str, TargetMap],
    solver: Solver,
    hidden: Mapping[int, Streams],
    stopwatch: Stopwatch,
    *,
    helpers: Helpers,
) -> dict[str, Losses]:
    """Losses per score sequence of each map's construction: its chain, and a head fitted to the chain's last stream.

    Without the maps that the time budget does not suffice for; `head` is always there.
    """
    depth = len(trace.block_names)
    needed = chained(labelled, depth, solver)
    ends = chain_ends(trace, needed, hidden, solver, stopwatch)
    ids, by_map, out = score_ids(trace.probe), dict[TargetMap, Losses](), dict[TargetMap, HandedOut]()

    def tell(done: int) -> None:
        stopwatch.progress("bounds, maps", done, len(ends) + 1)

    tell(0)
    for done, (target_map, streams) in enumerate({(): hidden[depth], **ends}.items(), 1):
        if (by_map or out) and not stopwatch.affords(stopwatch.last("solve")):
            break
        if (taken := helpers.hand_out(partial(_head_piece, trace, streams))) is not None:
            out[target_map] = taken
            continue
        with stopwatch("solve"):
            head = fit_head(trace, streams, partial(tell, done - 1))
        with stopwatch("score"):
            by_map[target_map] = sequence_losses(trace, streams.score, ids, head)
        tell(done)
    with stopwatch("solve"):
        by_map |= collected(out, helpers, partial(head_losses, trace))
    map_by_label = {
        label: target_map if target_map in needed and label != HEAD else () for label, target_map in labelled.items()
    }
    return {label: by_map[target_map] for label, target_map in map_by_label.items() if target_map in by_map}


def _head_piece(trace: Trace, streams: Streams) -> HeadPiece:
    fit, score = streams.fit.cpu().numpy(), streams.score.cpu().numpy()
    return HeadPiece(trace.chunk.sequences, fit, score, streams.selecting)


def _trusted(
    trace: Trace, labelled: Mapping[str, TargetMap], solver: Solver
) -> tuple[dict[str, TargetMap], tuple[Skipped, ...]]:
    """Only the maps whose fits can be trusted with this probe: with too few fit tokens, those without a solve."""
    solved = [label for label, target_map in labelled.items() if label != HEAD and not is_direct(target_map)]
    if not solver.least_squares or not solved:
        return dict(labelled), ()
    why = refit_fault(trace)
    if why is None:
        return dict(labelled), ()
    kept = {label: target_map for label, target_map in labelled.items() if label not in solved}
    return kept, tuple(Skipped(f"map {label}", why) for label in solved)
