"""The forward sweep (method.md 8): each block is visited once; at each visit its references are solved and spliced in.

A spliced stream leaves the trained one at its block and is carried through every later trained block; at the end the
trained head scores all streams at once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from peel_agent.peel.numerics.least_squares import Gram, shortfall
from peel_agent.peel.numerics.losses import Losses, sequence_losses
from peel_agent.peel.numerics.stopwatch import Stopwatch
from peel_agent.peel.numerics.streams import Streams, embedded, pieces, score_ids
from peel_agent.peel.references import Affine, columns_of_refit, pick_affine, refit, refit_fault, refit_tokens
from peel_agent.peel.sweep import splices
from peel_agent.peel.sweep.splices import TARGETS, Site, Splice, Target, Variant
from peel_agent.peel.sweep.tails import Tails
from peel_agent.records import Block, Plan, Skipped, Trace

TAIL_SHARE = 1
"""Spliced streams may take so many times the memory of one hidden state over `fit`."""


@dataclass(frozen=True)
class Sweep:
    """What one sweep found.

    `trained`: losses of the trained model per score sequence, select first. `variants`: losses of each variant, NaN on
    the rows that were not asked for. `solved`: the splice of each variant, to carry it again. `hidden`: the trained
    hidden states that were asked for. `seconds_per_work`: what it takes to run one spliced sequence through one block.
    """

    trained: Losses
    variants: Mapping[Variant, Losses]
    solved: Mapping[Variant, Splice]
    stream_shares: tuple[float, ...]
    hidden: Mapping[int, Streams]
    skipped: tuple[Skipped, ...]
    seconds_per_work: float


@dataclass(frozen=True)
class _Visit:
    """One block seen on the trained streams. The Grams are None where no affine fit is wanted or to be trusted."""

    block: Block
    before: Streams
    mid: Tensor
    after: Streams
    input_gram: Gram | None
    mid_gram: Gram | None


def sweep(trace: Trace, plan: Plan, rows: NDArray[np.int64], keep: frozenset[int], stopwatch: Stopwatch) -> Sweep:
    """Visits every block once; splices the plan's references (none: only the trained streams) into each block.

    `rows` are the places of the score sequences on which variants are scored; hidden states `keep` are kept.
    """
    with stopwatch("capture"):
        h = embedded(trace)
    hidden = {0: h} if 0 in keep else {}
    solved: dict[Variant, Splice] = {}
    shares = []
    skipped: dict[Skipped, None] = {}
    why = refit_fault(trace) if "previous" in plan.references else None
    if why is not None:
        skipped[Skipped("`previous` references", why)] = None
        plan = replace(plan, references=tuple(own for own in plan.references if own != "previous"))
    previous: _Visit | None = None
    ids, scored = score_ids(trace.probe), torch.from_numpy(rows)
    tails = Tails(trace, ids[rows], TAIL_SHARE * h.fit.numel())
    depth = len(trace.block_names)
    stopwatch.progress("blocks", 0, depth)
    for block in stopwatch.each("capture", trace.blocks()):
        if plan.references and not stopwatch.affords(_seconds_ahead(tails, block.index, depth, stopwatch)):
            skipped[Skipped(f"margins of {block.name} and the blocks after it", stopwatch.refusal())] = None
            plan = replace(plan, references=())
        with stopwatch("capture"):
            visit = _visit(trace, block, h, plan, skipped)
        with stopwatch("solve"):
            found = _solve(trace, visit, previous, plan)
        with stopwatch("score"):
            before = None if previous is None else (previous.block, previous.before.score[scored])
            tails.advance(block)
            tails.splice(found, Site(block, h.score[scored], visit.mid[scored], before, trace.chunk))
        solved |= found
        h = visit.after
        shares.append(_stream_share(visit))
        if block.index + 1 in keep:
            hidden[block.index + 1] = h
        previous = visit
        stopwatch.progress("blocks", block.index + 1, depth)
    with stopwatch("score"):
        trained = sequence_losses(trace, h.score, ids)
        tails.score()
    return Sweep(
        trained=trained,
        variants={variant: _spread(losses, rows, len(ids)) for variant, losses in tails.losses.items()},
        solved=solved,
        stream_shares=tuple(shares),
        hidden=hidden,
        skipped=tuple(skipped),
        seconds_per_work=_seconds_per_work(tails, stopwatch),
    )


def _spread(losses: Losses, rows: NDArray[np.int64], count: int) -> Losses:
    """Losses on these rows among so many, NaN on the others."""
    spread = np.full(count, np.nan)
    spread[rows] = losses
    return spread


def _seconds_ahead(tails: Tails, index: int, depth: int, stopwatch: Stopwatch) -> float:
    """How long the sweep would still take if this block were the last to have references, by what it took so far."""
    ahead = depth - index
    each = (stopwatch.seconds("capture") + stopwatch.seconds("solve")) / max(1, index)
    new = tails.spliced / max(1, index)
    return ahead * each + ahead * (tails.waiting + new) * _seconds_per_work(tails, stopwatch)


def _seconds_per_work(tails: Tails, stopwatch: Stopwatch) -> float:
    return stopwatch.seconds("score") / max(1, tails.work)


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


def _visit(trace: Trace, block: Block, before: Streams, plan: Plan, skipped: dict[Skipped, None]) -> _Visit:
    """Runs the block on the trained streams, adding up the Grams that its affine references need."""
    input_gram = mid_gram = None
    if "affine" in plan.references and _trusted(trace, "affine references", trace.width + 1, skipped):
        device = before.fit.device
        input_gram = Gram(trace.width, (2 if plan.parts else 1) * trace.width, intercept=True, device=device)
        if plan.parts:
            mid_gram = Gram(trace.width, trace.width, intercept=True, device=device)
    outputs = []
    for h, seen in pieces(lambda h: (h, block.observe(h)), trace.chunk, before.fit):
        outputs.append(seen.output)
        if input_gram is not None:
            added = seen.output - h
            input_gram.update(h, torch.cat([added, seen.mid - h], dim=-1) if plan.parts else added)
        if mid_gram is not None:
            mid_gram.update(seen.mid, seen.output - seen.mid)
    scored = list(pieces(block.observe, trace.chunk, before.score))
    after = Streams(torch.cat(outputs), torch.cat([seen.output for seen in scored]), before.selecting)
    return _Visit(block, before, torch.cat([seen.mid for seen in scored]), after, input_gram, mid_gram)


def _solve(
    trace: Trace,
    visit: _Visit,
    previous: _Visit | None,
    plan: Plan,
) -> dict[Variant, Splice]:
    """The splice of every reference for this block and, if planned, its parts."""
    index = visit.block.index
    found: dict[Variant, Splice] = {}
    if "skip" in plan.references:
        targets = TARGETS if plan.parts else TARGETS[:1]
        found |= {Variant(index, target, "skip"): splices.skip(target) for target in targets}
    for target, added in _affine_maps(trace, visit).items():
        found[Variant(index, target, "affine")] = splices.affine(target, added)
    if "previous" in plan.references and previous is not None:
        tokens = refit_tokens(columns_of_refit(previous.block))
        inputs, aim = (own.first(tokens) for own in (previous.before, visit.after))
        (reaching,) = refit(previous.block, inputs, [aim], trace.chunk)
        found[Variant(index, "block", "previous")] = splices.previous(reaching.attention, reaching.mlp)
    return found


def _affine_maps(trace: Trace, visit: _Visit) -> dict[Target, Affine]:
    """The affine references of the block and its parts; the block's and the attention's share one Gram factor."""
    if visit.input_gram is None:
        return {}
    selecting, width = visit.before.selecting, trace.width
    h, mid, after = visit.before.select, visit.mid[:selecting], visit.after.select
    solutions = visit.input_gram.solve()
    found: dict[Target, Affine] = {"block": pick_affine(solutions, slice(0, width), h, after - h)}
    if visit.mid_gram is not None:
        found["attention"] = pick_affine(solutions, slice(width, None), h, mid - h)
        found["mlp"] = pick_affine(visit.mid_gram.solve(), slice(0, width), mid, after - mid)
    return found


def _trusted(trace: Trace, what: str, columns: int, skipped: dict[Skipped, None]) -> bool:
    """Are there enough fit tokens for a least-squares fit of so many columns? If not, it is told once."""
    why = shortfall(trace.probe.fit.size, columns)
    if why is not None:
        skipped[Skipped(what, why)] = None
    return why is None


def _stream_share(visit: _Visit) -> float:
    """||h_{l+1} - h_l|| / ||h_{l+1}|| over the confirm tokens: what the block adds to the stream."""
    added = (visit.after.confirm - visit.before.confirm).double().norm()
    return float(added / visit.after.confirm.double().norm())
