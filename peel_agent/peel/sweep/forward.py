"""The forward sweep (method.md 8): each block is visited once; at each visit its references are solved and spliced in.

A spliced stream leaves the trained one at its block and is carried through every later trained block; at the end the
trained head scores all streams at once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from peel_agent.peel.elsewhere import ALONE
from peel_agent.peel.numerics.losses import Excess, Losses, sequence_losses
from peel_agent.peel.numerics.meter import Meter
from peel_agent.peel.numerics.stopwatch import Stopwatch
from peel_agent.peel.numerics.streams import Streams, embedded, score_ids
from peel_agent.peel.past.comparison import BUDGET_PASSES, Comparison, affordable
from peel_agent.peel.references import refit_fault, refit_work
from peel_agent.peel.sweep.heats import Heat
from peel_agent.peel.sweep.lanes import Lane, Trained
from peel_agent.peel.sweep.splices import TARGETS, Splice, Target, Variant
from peel_agent.peel.sweep.stand_ins import stand_ins_of, variants_per_block
from peel_agent.peel.sweep.visits import Dead, Visit, trained_work, visit_block
from peel_agent.records import Block, Helpers, PartName, Plan, Skipped, Trace

PARTS_TOO_DEAR = Skipped(
    "progress of parts", f"it costs more than {BUDGET_PASSES:g} forward passes; that of whole blocks was measured"
)

TRAINED = "trained streams and affine fits"
"""The stage of the work that a meter counts at each visit."""


@dataclass(frozen=True)
class Visited:
    """One block's share of the stream, the root mean square over positions of what each part adds to the stream, and
    why a part adds nothing.
    """

    stream_share: float
    added: Mapping[PartName, float]
    dead: Mapping[PartName, Dead]


@dataclass(frozen=True)
class Sweep:
    """What one sweep found.

    `trained`: losses of the trained model per score sequence, select first. `variants`: how much higher each stand-in's
    losses are, on the heat; `progress`: the same of the weights of the checkpoint before. `solved`: the splice of each
    variant, to carry it again. `visited`: what was seen of each block. `hidden`: the trained hidden states that were
    asked for. `seconds_per_pass`: the time that spliced streams take for the work of one plain forward pass over the
    whole probe.
    """

    trained: Losses
    variants: Mapping[Variant, Excess]
    progress: Mapping[Variant, Excess]
    solved: Mapping[Variant, Splice]
    visited: tuple[Visited, ...]
    hidden: Mapping[int, Streams]
    skipped: tuple[Skipped, ...]
    seconds_per_pass: float


def sweep(
    trace: Trace,
    plan: Plan,
    heat: Heat,
    keep: frozenset[int],
    stopwatch: Stopwatch,
    *,
    meter: Meter | None = None,
    comparison: Comparison | None = None,
    helpers: Helpers = ALONE,
) -> Sweep:
    """Visits every block once; splices the plan's references (none: only the trained streams) into each block.

    Variants are scored on the `heat`; hidden states `keep` are kept. Each block is shown to the `comparison` with the
    checkpoint before; that one's weights are spliced in on confirm rows of the heat. The `meter` counts the work.
    `helpers` run streams from their block to the head.
    """
    skipped: dict[Skipped, None] = {}
    plan = _possible(trace, plan, skipped)
    meter = meter or Meter(trace, next(iter(trace.blocks(stop=1))))
    with stopwatch("capture"):
        h = embedded(trace)
    hidden = {0: h} if 0 in keep else {}
    solved: dict[Variant, Splice] = {}
    visited: list[Visited] = []
    previous: Visit | None = None
    targets, earlier_heat = _earlier_heat(trace, plan, heat, meter)
    stand_ins = Lane.of(trace, heat, meter, "first heat", helpers=helpers)
    earlier = Lane.of(trace, earlier_heat, meter, "progress", helpers=helpers)
    leaving = ((stand_ins, variants_per_block(plan)), (earlier, len(targets) if comparison is not None else 0))
    depth = len(trace.block_names)
    stopwatch.progress("blocks", 0, depth)
    for block in stopwatch.each("capture", trace.blocks()):
        if plan.references and (why := _refusal(leaving, block, stopwatch)) is not None:
            skipped[Skipped(f"margins of {block.name} and the blocks after it", why)] = None
            plan = replace(plan, references=())
        with stopwatch("capture"):
            visit = visit_block(trace, block, h, plan, skipped)
            meter.spend(trained_work(trace, plan, meter), TRAINED)
            if comparison is not None:
                comparison.visit(block)
        with stopwatch("solve"):
            spliced = stand_ins_of(trace, visit, previous, plan)
            if Variant(block.index, "block", "previous") in spliced:
                meter.spend(refit_work(trace, block, meter), "`previous` fits")
        compared = comparison.progress(block, targets) if comparison is not None and plan.references else {}
        with stopwatch("score"):
            streams = _trained_streams(visit, previous)
            stand_ins.take(spliced, streams)
            earlier.take(compared, streams)
        solved |= spliced | compared
        visited.append(Visited(visit.stream_share(), visit.added(), visit.dead))
        h, previous = visit.after, visit
        hidden |= {block.index + 1: h} if block.index + 1 in keep else {}
        stopwatch.progress("blocks", block.index + 1, depth)
    ids = score_ids(trace.probe)
    meter.spend(meter.head(ids.size), TRAINED)
    with stopwatch("score"):
        trained = sequence_losses(trace, h.score, ids)
        variants, progress = (lane.excesses(h.score) for lane in (stand_ins, earlier))
    if progress and plan.parts and "mlp" not in targets:
        skipped[PARTS_TOO_DEAR] = None
    return Sweep(
        trained=trained,
        variants=variants,
        progress=progress,
        solved=solved,
        visited=tuple(visited),
        hidden=hidden,
        skipped=tuple(skipped),
        seconds_per_pass=_seconds_per_pass((stand_ins, earlier), stopwatch),
    )


def _possible(trace: Trace, plan: Plan, skipped: dict[Skipped, None]) -> Plan:
    """The plan without what this probe or architecture cannot have, which is told."""
    why = refit_fault(trace) if "previous" in plan.references else None
    if why is None:
        return plan
    skipped[Skipped("`previous` references", why)] = None
    return replace(plan, references=tuple(name for name in plan.references if name != "previous"))


def _earlier_heat(trace: Trace, plan: Plan, heat: Heat, meter: Meter) -> tuple[tuple[Target, ...], Heat]:
    """In which targets of each block the earlier weights are spliced in first, and on which tokens of this heat."""
    confirm = heat.rows[heat.rows >= len(trace.probe.select)]
    each = sum(meter.tail(block, heat.length, heat.length) for block in range(meter.depth))
    targets, count = affordable(each, len(confirm))
    return (targets if plan.parts else TARGETS[:1]), Heat(confirm[:count], heat.length)


def _trained_streams(visit: Visit, previous: Visit | None) -> Trained:
    before = None if previous is None else (previous.block, previous.before.score)
    return Trained(visit.block, visit.before.score, visit.mid, before)


def _refusal(lanes: Sequence[tuple[Lane, int]], block: Block, stopwatch: Stopwatch) -> str | None:
    """Why this block and those after it get no references; None when the time suffices for this block.

    Held against it is what would be left to do if this block were the last with references. The lanes come with how
    many variants leave at the block. A budget of forward passes never leaves out the first look at a block.
    """
    ahead, done = lanes[0][0].meter.depth - block.index, max(1, block.index)
    tails = sum(lane.passes_ahead(block.index, variants) for lane, variants in lanes)
    each = (stopwatch.seconds("capture") + stopwatch.seconds("solve")) / done
    seconds = tails * _seconds_per_pass([lane for lane, _ in lanes], stopwatch)
    return None if stopwatch.affords(ahead * each + seconds) else stopwatch.refusal()


def _seconds_per_pass(lanes: Sequence[Lane], stopwatch: Stopwatch) -> float:
    work = sum(lane.tails.work for lane in lanes)
    return stopwatch.seconds("score") / work if work > 0.0 else 0.0
