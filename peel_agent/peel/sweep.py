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
from peel_agent.peel.references import Affine, columns_of_refit, pick_affine, refit
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
class Order:
    """What a sweep is to splice: `references` into every block and part, or only into `only`, scored on `rows`.

    `rows` are places in the score sequences (select first, confirm after); `selecting` of them are select.
    """

    references: tuple[str, ...]
    rows: NDArray[np.int64]
    selecting: int
    only: frozenset[tuple[int, Target]] | None = None

    def wants(self, block: int, target: Target) -> bool:
        return bool(self.references) and (self.only is None or (block, target) in self.only)


@dataclass(frozen=True)
class Sweep:
    """What one sweep found: losses of the trained model per score sequence (select first), losses of each variant on
    the order's rows, and the hidden states that were asked for.
    """

    trained: Losses
    variants: Mapping[Variant, Losses]
    stream_shares: tuple[float, ...]
    hidden: Mapping[int, Streams]
    skipped: tuple[Skipped, ...]


@dataclass(frozen=True)
class _Visit:
    """One block seen on the trained streams. A Gram is None when nothing asks for it, or its fit cannot be trusted."""

    block: Block
    before: Streams
    mid: Tensor
    after: Streams
    input_gram: Gram | None
    mid_gram: Gram | None


def sweep(trace: Trace, order: Order, keep: frozenset[int], stopwatch: Stopwatch) -> Sweep:
    """Visits every block once, splicing as ordered; keeps the trained hidden states `keep`."""
    with stopwatch("capture"):
        h = embedded(trace)
    hidden = {0: h} if 0 in keep else {}
    streams: dict[Variant, Tensor] = {}
    shares = []
    skipped: dict[Skipped, None] = {}
    previous: _Visit | None = None
    for block in stopwatch.each("capture", trace.blocks()):
        with stopwatch("capture"):
            visit = _visit(trace, block, h, order, skipped)
        with stopwatch("score"):
            for variant, stream in streams.items():
                streams[variant] = through(block.run, stream, trace.chunk)
        with stopwatch("solve"):
            streams |= dict(_variants(trace, visit, previous, order, skipped))
        h = visit.after
        shares.append(_stream_share(visit))
        if block.index + 1 in keep:
            hidden[block.index + 1] = h
        previous = visit
    ids = score_ids(trace.probe)
    with stopwatch("score"):
        trained = sequence_losses(trace, h.score, ids)
        losses = {variant: sequence_losses(trace, stream, ids[order.rows]) for variant, stream in streams.items()}
    return Sweep(trained, losses, tuple(shares), hidden, tuple(skipped))


def _visit(trace: Trace, block: Block, before: Streams, order: Order, skipped: dict[Skipped, None]) -> _Visit:
    """Runs the block on the trained streams, adding up the Grams that its affine references need."""
    input_gram, mid_gram = _affine_grams(trace, block.index, before.fit.device, order, skipped)
    outputs = []
    for h in before.fit.split(trace.chunk):
        seen = block.observe(h)
        outputs.append(seen.output)
        if input_gram is not None:
            input_gram.update(h, torch.cat([seen.output - h, seen.mid - h], dim=-1))
        if mid_gram is not None:
            mid_gram.update(seen.mid, seen.output - seen.mid)
    scored = [block.observe(h) for h in before.score.split(trace.chunk)]
    after = Streams(torch.cat(outputs), torch.cat([seen.output for seen in scored]), before.selecting)
    return _Visit(block, before, torch.cat([seen.mid for seen in scored]), after, input_gram, mid_gram)


def _affine_grams(
    trace: Trace, index: int, device: torch.device, order: Order, skipped: dict[Skipped, None]
) -> tuple[Gram | None, Gram | None]:
    """The Gram of the block's input, for the block and its attention, and that of the stream between its parts."""
    if "affine" not in order.references or not _trusted(trace, "affine references", trace.width + 1, skipped):
        return None, None
    of_input = order.wants(index, "block") or order.wants(index, "attention")
    return (
        Gram(trace.width, 2 * trace.width, intercept=True, device=device) if of_input else None,
        Gram(trace.width, trace.width, intercept=True, device=device) if order.wants(index, "mlp") else None,
    )


def _variants(
    trace: Trace, visit: _Visit, previous: _Visit | None, order: Order, skipped: dict[Skipped, None]
) -> Iterator[tuple[Variant, Tensor]]:
    """The score streams behind this block with each reference in its place, or in the place of one of its parts."""
    index, rows = visit.block.index, torch.from_numpy(order.rows)
    h, mid, run_mlp_part = visit.before.score[rows], visit.mid[rows], visit.block.run_mlp_part
    affine = _affine_maps(trace, visit)
    if order.wants(index, "block"):
        yield Variant(index, "block", "skip"), h
        if (whole := affine.get("block")) is not None:
            yield Variant(index, "block", "affine"), h + whole(h)
        if "previous" in order.references and previous is not None:
            columns = columns_of_refit(previous.block)
            if _trusted(trace, "`previous` references", columns, skipped):
                reaching = refit(previous.block, previous.before, visit.after, trace.chunk)
                yield (
                    Variant(index, "block", "previous"),
                    through(reaching.run, previous.before.score[rows], trace.chunk),
                )
    if order.wants(index, "attention"):
        yield Variant(index, "attention", "skip"), through(run_mlp_part, h, trace.chunk)
        if (attention := affine.get("attention")) is not None:
            yield Variant(index, "attention", "affine"), through(run_mlp_part, h + attention(h), trace.chunk)
    if order.wants(index, "mlp"):
        yield Variant(index, "mlp", "skip"), mid
        if (mlp := affine.get("mlp")) is not None:
            yield Variant(index, "mlp", "affine"), mid + mlp(mid)


def _affine_maps(trace: Trace, visit: _Visit) -> dict[Target, Affine]:
    """The affine references of the block and its parts; the block's and the attention's share one Gram factor."""
    selecting, width = visit.before.selecting, trace.width
    h, mid, after = visit.before.select, visit.mid[:selecting], visit.after.select
    maps: dict[Target, Affine] = {}
    if visit.input_gram is not None:
        solutions = visit.input_gram.solve()
        maps["block"] = pick_affine(solutions, slice(0, width), h, after - h)
        maps["attention"] = pick_affine(solutions, slice(width, None), h, mid - h)
    if visit.mid_gram is not None:
        maps["mlp"] = pick_affine(visit.mid_gram.solve(), slice(0, width), mid, after - mid)
    return maps


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
