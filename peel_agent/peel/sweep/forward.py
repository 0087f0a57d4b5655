"""The forward sweep (method.md 8): each block is visited once; at each visit its references are solved and spliced in.

A spliced stream leaves the trained one at its block and is carried through every later trained block; at the end the
trained head scores all streams at once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from peel_agent.peel.numerics.losses import Losses, sequence_losses
from peel_agent.peel.numerics.stopwatch import Stopwatch
from peel_agent.peel.numerics.streams import Streams, embedded, pieces, score_ids
from peel_agent.peel.past.comparison import Comparison, affordable
from peel_agent.peel.references import refit_fault
from peel_agent.peel.sweep.splices import TARGETS, Site, Splice, Target, Variant
from peel_agent.peel.sweep.stand_ins import stand_ins_of
from peel_agent.peel.sweep.tails import Tails
from peel_agent.peel.sweep.visits import Dead, Visit, visit_block
from peel_agent.records import Block, PartName, Plan, Skipped, Trace

TAIL_SHARE = 1
"""Spliced streams may take so many times the memory of one hidden state over `fit`."""


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

    `trained`: losses of the trained model per score sequence, select first. `variants`: losses of each variant, NaN on
    the rows that were not asked for; `progress` the same of earlier weights. `solved`: the splice of each variant, to
    carry it again. `visited`: what was seen of each block. `hidden`: the trained hidden states that were asked for.
    `seconds_per_work`: what it takes to run one spliced sequence through one block.
    """

    trained: Losses
    variants: Mapping[Variant, Losses]
    progress: Mapping[Variant, Losses]
    solved: Mapping[Variant, Splice]
    visited: tuple[Visited, ...]
    hidden: Mapping[int, Streams]
    skipped: tuple[Skipped, ...]
    seconds_per_work: float


def sweep(
    trace: Trace,
    plan: Plan,
    rows: NDArray[np.int64],
    keep: frozenset[int],
    stopwatch: Stopwatch,
    *,
    comparison: Comparison | None = None,
) -> Sweep:
    """Visits every block once; splices the plan's references (none: only the trained streams) into each block.

    `rows` are the places of the score sequences on which variants are scored; hidden states `keep` are kept. Each block
    is shown to the `comparison` with the checkpoint before, whose weights are spliced in on confirm rows of these.
    """
    skipped: dict[Skipped, None] = {}
    plan = _possible(trace, plan, skipped)
    with stopwatch("capture"):
        h = embedded(trace)
    hidden = {0: h} if 0 in keep else {}
    solved: dict[Variant, Splice] = {}
    visited: list[Visited] = []
    previous: Visit | None = None
    targets, earlier_rows = _earlier_rows(trace, plan, rows)
    stand_ins, earlier = _Lane.of(trace, rows), _Lane.of(trace, earlier_rows)
    depth = len(trace.block_names)
    stopwatch.progress("blocks", 0, depth)
    for block in stopwatch.each("capture", trace.blocks()):
        if plan.references and not stopwatch.affords(_seconds_ahead((stand_ins, earlier), block, depth, stopwatch)):
            skipped[Skipped(f"margins of {block.name} and the blocks after it", stopwatch.refusal())] = None
            plan = replace(plan, references=())
        with stopwatch("capture"):
            visit = visit_block(trace, block, h, plan, skipped)
            if comparison is not None:
                comparison.visit(block)
        with stopwatch("solve"):
            spliced = stand_ins_of(trace, visit, previous, plan)
        compared = comparison.progress(block, targets) if comparison is not None and plan.references else {}
        with stopwatch("score"):
            stand_ins.take(spliced, visit, previous)
            earlier.take(compared, visit, previous)
        solved |= spliced | compared
        visited.append(Visited(visit.stream_share(), visit.added(), visit.dead))
        h, previous = visit.after, visit
        hidden |= {block.index + 1: h} if block.index + 1 in keep else {}
        stopwatch.progress("blocks", block.index + 1, depth)
    with stopwatch("score"):
        trained = sequence_losses(trace, h.score, score_ids(trace.probe))
        stand_ins.tails.score()
        earlier.tails.score()
    if earlier.tails.losses and plan.parts and "mlp" not in targets:
        skipped[Skipped("progress of parts", "with blocks so many, or sequences so long, it costs too much")] = None
    return Sweep(
        trained=trained,
        variants=stand_ins.losses(len(trained)),
        progress=earlier.losses(len(trained)),
        solved=solved,
        visited=tuple(visited),
        hidden=hidden,
        skipped=tuple(skipped),
        seconds_per_work=_seconds_per_work((stand_ins, earlier), stopwatch),
    )


def _possible(trace: Trace, plan: Plan, skipped: dict[Skipped, None]) -> Plan:
    """The plan without what this probe or architecture cannot have, which is told."""
    why = refit_fault(trace) if "previous" in plan.references else None
    if why is None:
        return plan
    skipped[Skipped("`previous` references", why)] = None
    return replace(plan, references=tuple(name for name in plan.references if name != "previous"))


@dataclass(frozen=True)
class _Lane:
    """Variants of one kind, all scored on the score sequences `rows`."""

    trace: Trace
    rows: NDArray[np.int64]
    tails: Tails

    @classmethod
    def of(cls, trace: Trace, rows: NDArray[np.int64]) -> _Lane:
        share = TAIL_SHARE * trace.probe.fit.size * trace.width
        return cls(trace, rows, Tails(trace, score_ids(trace.probe)[rows], share))

    def take(self, splices: Mapping[Variant, Splice], visit: Visit, previous: Visit | None) -> None:
        """Runs the block on every stream that was spliced before it, and adds those that leave at it."""
        rows = torch.from_numpy(self.rows)
        before = None if previous is None else (previous.block, previous.before.score[rows])
        self.tails.advance(visit.block)
        self.tails.splice(
            splices, Site(visit.block, visit.before.score[rows], visit.mid[rows], before, self.trace.chunk)
        )

    def losses(self, count: int) -> dict[Variant, Losses]:
        """Losses of each variant on its rows among so many score sequences, NaN on the others."""
        spread = {variant: np.full(count, np.nan) for variant in self.tails.losses}
        for variant, losses in self.tails.losses.items():
            spread[variant][self.rows] = losses
        return spread


def _earlier_rows(trace: Trace, plan: Plan, rows: NDArray[np.int64]) -> tuple[tuple[Target, ...], NDArray[np.int64]]:
    """Of which places the earlier weights are spliced in first, and on which of these score sequences."""
    probe = trace.probe
    confirm = rows[rows >= len(probe.select)]
    sequences = len(probe.fit) + len(probe.select) + len(probe.confirm)
    targets, count = affordable(sequences, len(confirm), len(trace.block_names))
    return (targets if plan.parts else TARGETS[:1]), confirm[:count]


def _seconds_ahead(lanes: Sequence[_Lane], block: Block, depth: int, stopwatch: Stopwatch) -> float:
    """How long the sweep would still take if this block were the last to have references, by what it took so far."""
    ahead, done = depth - block.index, max(1, block.index)
    each = (stopwatch.seconds("capture") + stopwatch.seconds("solve")) / done
    sequences = sum(lane.tails.waiting + lane.tails.spliced / done for lane in lanes)
    return ahead * each + ahead * sequences * _seconds_per_work(lanes, stopwatch)


def _seconds_per_work(lanes: Sequence[_Lane], stopwatch: Stopwatch) -> float:
    return stopwatch.seconds("score") / max(1, sum(lane.tails.work for lane in lanes))


def carry(
    trace: Trace, chosen: Mapping[Variant, Splice], rows: NDArray[np.int64], stopwatch: Stopwatch
) -> dict[Variant, Losses]:
    """Losses of the chosen variants, solved by an earlier sweep, on these score sequences."""
    ids = score_ids(trace.probe)[rows]
    with stopwatch("score"):
        h = trace.embed(ids)
        tails = Tails(trace, ids, TAIL_SHARE * trace.probe.fit.size * trace.width)
        before: tuple[Block, Tensor] | None = None
        stopwatch.progress("open margins, blocks", 0, len(trace.block_names))
        for block in trace.blocks():
            seen = list(pieces(block.observe, trace.chunk, h))
            site = Site(block, h, torch.cat([one.mid for one in seen]), before, trace.chunk)
            tails.advance(block)
            tails.splice({v: splice for v, splice in chosen.items() if v.block == block.index}, site)
            before, h = (block, h), torch.cat([one.output for one in seen])
            stopwatch.progress("open margins, blocks", block.index + 1, len(trace.block_names))
        tails.score()
    return tails.losses
