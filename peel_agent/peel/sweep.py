"""The forward sweep (METHOD 8): each block is visited once; at each visit its references are solved and spliced in.

A spliced stream leaves the trained one at its block and is carried through every later trained block; at the end the
trained head scores all streams at once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from peel_agent.peel import splices
from peel_agent.peel.least_squares import Gram, shortfall
from peel_agent.peel.losses import sequence_losses
from peel_agent.peel.references import Affine, columns_of_refit, pick_affine, refit
from peel_agent.peel.splices import Site, Splice, Target, Variant
from peel_agent.peel.stopwatch import Stopwatch
from peel_agent.peel.streams import Streams, embedded, score_ids, through
from peel_agent.records import Block, Skipped, Trace

Losses = NDArray[np.float64]

REFIT_TOKENS = 8192
REFIT_TOKENS_PER_COLUMN = 4
"""`previous`, whose Gram is by far the dearest, is solved on the first fit tokens only: the larger of these two."""

TARGETS: tuple[Target, ...] = ("block", "attention", "mlp")


@dataclass(frozen=True)
class Sweep:
    """What one sweep found.

    `trained`: losses of the trained model per score sequence, select first. `variants`: losses of each variant on the
    rows that were asked for. `solved`: the splice of each variant, to carry it again. `hidden`: the trained hidden
    states that were asked for.
    """

    trained: Losses
    variants: Mapping[Variant, Losses]
    solved: Mapping[Variant, Splice]
    stream_shares: tuple[float, ...]
    hidden: Mapping[int, Streams]
    skipped: tuple[Skipped, ...]


@dataclass(frozen=True)
class _Visit:
    """One block seen on the trained streams. The Grams are None when an affine fit could not be trusted."""

    block: Block
    before: Streams
    mid: Tensor
    after: Streams
    input_gram: Gram | None
    mid_gram: Gram | None


def sweep(
    trace: Trace, references: tuple[str, ...], rows: NDArray[np.int64], keep: frozenset[int], stopwatch: Stopwatch
) -> Sweep:
    """Visits every block once; splices `references` (none: only the trained streams) into each block and its parts.

    `rows` are the places of the score sequences on which variants are scored; hidden states `keep` are kept.
    """
    with stopwatch("capture"):
        h = embedded(trace)
    hidden = {0: h} if 0 in keep else {}
    streams: dict[Variant, Tensor] = {}
    solved: dict[Variant, Splice] = {}
    shares = []
    skipped: dict[Skipped, None] = {}
    previous: _Visit | None = None
    scored = torch.from_numpy(rows)
    depth = len(trace.block_names)
    stopwatch.progress("blocks", 0, depth)
    for block in stopwatch.each("capture", trace.blocks()):
        with stopwatch("capture"):
            visit = _visit(trace, block, h, references, skipped)
        with stopwatch("solve"):
            found = _solve(trace, visit, previous, references, skipped)
        with stopwatch("score"):
            before = None if previous is None else (previous.block, previous.before.score[scored])
            site = Site(block, h.score[scored], visit.mid[scored], before, trace.chunk)
            _carry(block, streams, found, site)
        solved |= found
        h = visit.after
        shares.append(_stream_share(visit))
        if block.index + 1 in keep:
            hidden[block.index + 1] = h
        previous = visit
        stopwatch.progress("blocks", block.index + 1, depth)
    ids = score_ids(trace.probe)
    with stopwatch("score"):
        trained = sequence_losses(trace, h.score, ids)
        losses = {variant: sequence_losses(trace, stream, ids[rows]) for variant, stream in streams.items()}
    return Sweep(trained, losses, solved, tuple(shares), hidden, tuple(skipped))


def carry(
    trace: Trace, chosen: Mapping[Variant, Splice], rows: NDArray[np.int64], stopwatch: Stopwatch
) -> dict[Variant, Losses]:
    """Losses of the chosen variants, solved by an earlier sweep, on these score sequences."""
    ids = score_ids(trace.probe)[rows]
    streams: dict[Variant, Tensor] = {}
    with stopwatch("score"):
        h = trace.embed(ids)
        before: tuple[Block, Tensor] | None = None
        stopwatch.progress("open margins, blocks", 0, len(trace.block_names))
        for block in trace.blocks():
            seen = [block.observe(part) for part in h.split(trace.chunk)]
            site = Site(block, h, torch.cat([one.mid for one in seen]), before, trace.chunk)
            _carry(block, streams, {v: splice for v, splice in chosen.items() if v.block == block.index}, site)
            before, h = (block, h), torch.cat([one.output for one in seen])
            stopwatch.progress("open margins, blocks", block.index + 1, len(trace.block_names))
        return {variant: sequence_losses(trace, stream, ids) for variant, stream in streams.items()}


def _carry(block: Block, streams: dict[Variant, Tensor], found: Mapping[Variant, Splice], site: Site) -> None:
    """Runs the block on all streams spliced earlier, in one batch, and adds those that leave the trained one here."""
    if streams:
        batch = torch.cat(list(streams.values()))
        streams |= zip(streams, through(block.run, batch, site.chunk).split(len(site.h)), strict=True)
    for variant, splice in found.items():
        streams[variant] = splice(site)


def _visit(
    trace: Trace, block: Block, before: Streams, references: tuple[str, ...], skipped: dict[Skipped, None]
) -> _Visit:
    """Runs the block on the trained streams, adding up the Grams that its affine references need."""
    input_gram = mid_gram = None
    if "affine" in references and _trusted(trace, "affine references", trace.width + 1, skipped):
        device = before.fit.device
        input_gram = Gram(trace.width, 2 * trace.width, intercept=True, device=device)
        mid_gram = Gram(trace.width, trace.width, intercept=True, device=device)
    outputs = []
    for h in before.fit.split(trace.chunk):
        seen = block.observe(h)
        outputs.append(seen.output)
        if input_gram is not None and mid_gram is not None:
            input_gram.update(h, torch.cat([seen.output - h, seen.mid - h], dim=-1))
            mid_gram.update(seen.mid, seen.output - seen.mid)
    scored = [block.observe(h) for h in before.score.split(trace.chunk)]
    after = Streams(torch.cat(outputs), torch.cat([seen.output for seen in scored]), before.selecting)
    return _Visit(block, before, torch.cat([seen.mid for seen in scored]), after, input_gram, mid_gram)


def _solve(
    trace: Trace,
    visit: _Visit,
    previous: _Visit | None,
    references: tuple[str, ...],
    skipped: dict[Skipped, None],
) -> dict[Variant, Splice]:
    """The splice of every reference for this block and its parts."""
    if not references:
        return {}
    index = visit.block.index
    found = {Variant(index, target, "skip"): splices.skip(target) for target in TARGETS}
    for target, added in _affine_maps(trace, visit).items():
        found[Variant(index, target, "affine")] = splices.affine(target, added)
    if "previous" in references and previous is not None:
        columns = columns_of_refit(previous.block)
        if _trusted(trace, "`previous` references", columns, skipped):
            tokens = max(REFIT_TOKENS, REFIT_TOKENS_PER_COLUMN * columns)
            inputs, targets = (own.first(tokens) for own in (previous.before, visit.after))
            reaching = refit(previous.block, inputs, targets, trace.chunk)
            found[Variant(index, "block", "previous")] = splices.previous(reaching.attention, reaching.mlp)
    return found


def _affine_maps(trace: Trace, visit: _Visit) -> dict[Target, Affine]:
    """The affine references of the block and its parts; the block's and the attention's share one Gram factor."""
    if visit.input_gram is None or visit.mid_gram is None:
        return {}
    selecting, width = visit.before.selecting, trace.width
    h, mid, after = visit.before.select, visit.mid[:selecting], visit.after.select
    solutions = visit.input_gram.solve()
    return {
        "block": pick_affine(solutions, slice(0, width), h, after - h),
        "attention": pick_affine(solutions, slice(width, None), h, mid - h),
        "mlp": pick_affine(visit.mid_gram.solve(), slice(0, width), mid, after - mid),
    }


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
