"""One block seen on the trained streams: what its stand-ins are solved from, and what each part of it adds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from peel_agent.peel.numerics.least_squares import GRAM_SHARE, RIDGES, Gram, shortfall
from peel_agent.peel.numerics.meter import Meter
from peel_agent.peel.numerics.streams import Streams, pieces
from peel_agent.records import Block, PartName, Plan, Skipped, Trace

ROUNDING = 1e-5
"""Relative to a feature's largest value: attention over equal values is equal to about a tenth of this."""


@dataclass(frozen=True)
class Dead:
    """Why a part adds the same to every token. A `featureless` one cannot be mended through its output matrix."""

    words: str
    featureless: bool


@dataclass(frozen=True)
class Visit:
    """One block seen on the trained streams. The Grams are None where no affine fit is wanted or to be trusted."""

    block: Block
    before: Streams
    mid: Tensor
    after: Streams
    dead: Mapping[PartName, Dead]
    input_gram: Gram | None
    mid_gram: Gram | None

    def stream_share(self) -> float:
        """||h_{l+1} - h_l|| / ||h_{l+1}|| over the confirm tokens: what the block adds to the stream."""
        return _norm(self.after.confirm - self.before.confirm) / _norm(self.after.confirm)

    def added(self) -> dict[PartName, float]:
        """Root mean square over the score positions of what each part adds, as vectors of the stream."""
        if not self.block.has_parts:
            return {}
        positions = self.mid.shape[0] * self.mid.shape[1]
        attention, mlp = self.mid - self.before.score, self.after.score - self.mid
        return {"attention": _norm(attention) / positions**0.5, "mlp": _norm(mlp) / positions**0.5}


def visit_block(trace: Trace, block: Block, before: Streams, plan: Plan, skipped: dict[Skipped, None]) -> Visit:
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
    mids, scored, alive = [], [], dict.fromkeys(block.part_names, _Signs())
    for mid, output, signs in pieces(lambda h: _looked_into(block, h), trace.chunk, before.score):
        mids.append(mid)
        scored.append(output)
        alive = {part: alive[part] | signs[part] for part in alive}
    after = Streams(torch.cat(outputs), torch.cat(scored), before.selecting)
    dead = {part: why for part, signs in alive.items() if (why := _dead(block, part, signs)) is not None}
    return Visit(block, before, torch.cat(mids), after, dead, input_gram, mid_gram)


def trained_work(trace: Trace, plan: Plan, meter: Meter) -> float:
    """What a visit costs in forward passes: the trained streams through one block, the sums for its affine maps and
    their solutions, one a ridge, each tried on `select`.
    """
    probe, columns, width = trace.probe, trace.width + 1, trace.width
    tokens = probe.fit.size + probe.select.size + probe.confirm.size
    passes = meter.blocks(tokens, probe.sequence_length)
    if "affine" in plan.references and shortfall(probe.fit.size, columns) is None:
        for targets in (2 * width, width) if plan.parts else (width,):
            passes += meter.products(probe.fit.size, columns, GRAM_SHARE * columns + targets)
            passes += len(RIDGES) * meter.products(probe.select.size + columns, columns, targets)
            passes += len(RIDGES) * meter.products(columns, columns, columns) / 3
    return passes


def _looked_into(block: Block, h: Tensor) -> tuple[Tensor, Tensor, dict[PartName, _Signs]]:
    """The stream between the parts and the output; and which signs of life each part shows."""
    if not block.has_projections:
        seen = block.observe(h)
        added: dict[PartName, Tensor] = {"attention": seen.mid - h, "mlp": seen.output - seen.mid}
        return seen.mid, seen.output, {part: _Signs(_varies(added[part]), True) for part in block.part_names}
    inner = block.features(h)
    features: dict[PartName, Tensor] = {"attention": inner.attention, "mlp": inner.mlp}
    outputs = {"attention": block.attention_projection, "mlp": block.mlp_projection}
    signs = {part: _Signs(_varies(features[part]), bool(outputs[part].weight.any())) for part in block.part_names}
    return inner.mid, inner.output, signs


def _varies(features: Tensor) -> bool:
    """Whether features [B, S, p] differ between any two tokens by more than sums in another order do."""
    return bool(((features - features[:1, :1]).abs() > ROUNDING * features.abs().amax(dim=(0, 1))).any())


@dataclass(frozen=True)
class _Signs:
    """Whether a part's features differ between tokens, and whether its output matrix lets anything through."""

    features: bool = False
    output: bool = False

    def __or__(self, other: _Signs) -> _Signs:
        return _Signs(self.features or other.features, self.output or other.output)


def _dead(block: Block, part: PartName, signs: _Signs) -> Dead | None:
    """Why a part adds the same to every token, naming the first of its weights that is all zero; None if it lives."""
    if signs.features and signs.output:
        return None
    zero = [name for name in block.part_names[part] if not name.endswith("bias") and not block.parameters[name].any()]
    what = "its output is zero" if signs.features else "what it computes is the same for every token"
    return Dead(what + (f": `{zero[0]}` is all zero" if zero else ""), featureless=not signs.features)


def _trusted(trace: Trace, what: str, columns: int, skipped: dict[Skipped, None]) -> bool:
    """Are there enough fit tokens for a least-squares fit of so many columns? If not, it is told once."""
    why = shortfall(trace.probe.fit.size, columns)
    if why is not None:
        skipped[Skipped(what, why)] = None
    return why is None


def _norm(stream: Tensor) -> float:
    return float(stream.double().norm())
