"""The forward sweep (METHOD 8): each block is visited once; at each visit its references are solved and spliced in.

A spliced stream leaves the trained one at its block and is carried through every later trained block; at the end the
trained head scores all streams at once.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from peel_agent.peel.least_squares import Gram, tokens_needed
from peel_agent.peel.losses import sequence_losses
from peel_agent.peel.references import columns_of_refit, pick_affine, refit
from peel_agent.peel.stopwatch import Stopwatch
from peel_agent.peel.streams import Streams, embedded, score_ids, through
from peel_agent.records import Block, Skipped, Trace

Target = Literal["block", "attention", "mlp"]
Losses = NDArray[np.float64]


class Variant(NamedTuple):
    """The trained model with one block, or one part of a block, replaced by a reference."""

    block: int
    target: Target
    reference: str


@dataclass(frozen=True)
class Sweep:
    """What one sweep found: losses per score sequence (select first), and the hidden states that were asked for."""

    trained: Losses
    variants: Mapping[Variant, Losses]
    stream_shares: tuple[float, ...]
    hidden: Mapping[int, Streams]
    skipped: tuple[Skipped, ...]


@dataclass(frozen=True)
class _Visit:
    """One block seen on the trained streams. The Grams are None when the fit could not be trusted."""

    block: Block
    before: Streams
    mid: Tensor
    after: Streams
    input_gram: Gram | None
    mid_gram: Gram | None


def sweep(trace: Trace, references: tuple[str, ...], keep: frozenset[int], stopwatch: Stopwatch) -> Sweep:
    """Visits every block once, solving `references` (none: only the trained streams); keeps hidden states `keep`."""
    h = embedded(trace)
    hidden = {0: h} if 0 in keep else {}
    streams: dict[Variant, Tensor] = {}
    shares = []
    skipped: dict[Skipped, None] = {}
    previous: _Visit | None = None
    for block in trace.blocks():
        with stopwatch("capture"):
            visit = _visit(trace, block, h, references, skipped)
        with stopwatch("score"):
            for variant, stream in streams.items():
                streams[variant] = through(block.run, stream, trace.chunk)
        with stopwatch("solve"):
            streams |= dict(_variants(trace, visit, previous, references, skipped))
        h = visit.after
        shares.append(_stream_share(visit))
        if block.index + 1 in keep:
            hidden[block.index + 1] = h
        previous = visit
    ids = score_ids(trace.probe)
    with stopwatch("score"):
        trained = sequence_losses(trace, h.score, ids)
        losses = {variant: sequence_losses(trace, stream, ids) for variant, stream in streams.items()}
    return Sweep(trained, losses, tuple(shares), hidden, tuple(skipped))


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


def _variants(
    trace: Trace,
    visit: _Visit,
    previous: _Visit | None,
    references: tuple[str, ...],
    skipped: dict[Skipped, None],
) -> Iterator[tuple[Variant, Tensor]]:
    """The score streams behind this block with each reference in its place, or in the place of one of its parts."""
    if not references:
        return
    index, h, mid = visit.block.index, visit.before.score, visit.mid
    yield Variant(index, "block", "skip"), h
    yield Variant(index, "attention", "skip"), through(visit.block.run_mlp_part, h, trace.chunk)
    yield Variant(index, "mlp", "skip"), mid
    yield from _affine_variants(trace, visit)
    if "previous" in references and previous is not None:
        columns = columns_of_refit(previous.block)
        if _trusted(trace, "`previous` references", columns, skipped):
            reaching = refit(previous.block, previous.before, visit.after, trace.chunk)
            yield Variant(index, "block", "previous"), through(reaching.run, previous.before.score, trace.chunk)


def _affine_variants(trace: Trace, visit: _Visit) -> Iterator[tuple[Variant, Tensor]]:
    """`affine` for the block and its parts; the block's and the attention's targets share one Gram factor."""
    if visit.input_gram is None or visit.mid_gram is None:
        return
    index, h, mid, width = visit.block.index, visit.before.score, visit.mid, trace.width
    selecting = visit.before.selecting
    from_input, from_mid = visit.input_gram.solve(), visit.mid_gram.solve()
    h_select, mid_select, after_select = h[:selecting], mid[:selecting], visit.after.select

    whole = pick_affine(from_input, slice(0, width), h_select, after_select - h_select)
    yield Variant(index, "block", "affine"), h + whole(h)
    attention = pick_affine(from_input, slice(width, None), h_select, mid_select - h_select)
    yield Variant(index, "attention", "affine"), through(visit.block.run_mlp_part, h + attention(h), trace.chunk)
    mlp = pick_affine(from_mid, slice(0, width), mid_select, after_select - mid_select)
    yield Variant(index, "mlp", "affine"), mid + mlp(mid)


def _trusted(trace: Trace, what: str, columns: int, skipped: dict[Skipped, None]) -> bool:
    """Are there enough fit tokens for a least-squares fit of so many columns? If not, it is told once."""
    tokens, needed = trace.probe.fit.size, tokens_needed(columns)
    if tokens >= needed:
        return True
    skipped[Skipped(what, f"{tokens:,} fit tokens; a fit of {columns:,} columns needs {needed:,}")] = None
    return False


def _stream_share(visit: _Visit) -> float:
    """||h_{l+1} - h_l|| / ||h_{l+1}|| over the confirm tokens: what the block adds to the stream."""
    added = (visit.after.confirm - visit.before.confirm).double().norm()
    return float(added / visit.after.confirm.double().norm())
