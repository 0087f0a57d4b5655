"""Reference solutions for one block (method.md 2): `affine` and `refit`; `skip` is the identity."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from peel_agent.peel.numerics.least_squares import GRAM_SHARE, RIDGES, Gram, Solution, shortfall
from peel_agent.peel.numerics.losses import logits
from peel_agent.peel.numerics.meter import Meter
from peel_agent.peel.numerics.streams import Streams, pieces, through
from peel_agent.precision import round_in_gram
from peel_agent.records import Block, Chunk, Projection, Trace, WeightSet


@dataclass(frozen=True)
class Affine:
    """A linear map with bias from a part's input to what it adds: weight [d, d], bias [d]."""

    weight: Tensor
    bias: Tensor

    def __call__(self, h: Tensor) -> Tensor:
        """What the map adds to the stream, [..., d]."""
        return h @ self.weight + self.bias


def pick_affine(solutions: Sequence[Solution], targets: slice, h: Tensor, added: Tensor) -> Affine:
    """The solution whose map has the least squared error on `select`: h and `added` are [N_s, S, d].

    `targets` says which columns of the solved system belong to this map. method.md 2: min ||[H,1]A - (T-H)||^2 +
    lambda ||A||^2, lambda picked on select.
    """

    def squared_error(solution: Solution) -> float:
        return float((_as_affine(solution, targets, h)(h) - added).double().square().sum())

    return _as_affine(min(solutions, key=squared_error), targets, h)


def _as_affine(solution: Solution, targets: slice, like: Tensor) -> Affine:
    weight = solution.weight[:, targets].to(like.dtype)
    return Affine(weight[:-1], weight[-1])


@dataclass(frozen=True)
class Refit:
    """A trained block with its two output projections solved anew; everything else stays as trained.

    `mid` [N_f, S, d] is the stream between its parts on `fit`: what the MLP part of the block now gets. `select`
    [N_s, S, d] is its output on `select`.
    """

    block: Block
    attention: Projection
    mlp: Projection
    mid: Tensor
    select: Tensor

    def run(self, h: Tensor) -> Tensor:
        return self.block.run(h, attention=self.attention, mlp=self.mlp)


def refit(block: Block, inputs: Streams, targets: Sequence[Streams], chunk: Chunk) -> Iterator[Refit]:
    """The block refitted to map `inputs` to each of `targets`: its attention output projection, then its MLP's.

    Each step solves for the *change* of one projection that explains what the block so far misses of the target, so
    a ridge pulls toward the trained weights; the strength, or no change at all, is picked on `select` by the output
    that the block then has. A projection in a weight set is rounded into it in the metric of its inputs. The first
    steps share the block's features and one factor; the second step sees the first one's output, for what a change of
    the projection adds to the stream between the parts is linear in it.
    """
    fit, select = (_Seen.of(block, h, chunk) for h in (inputs.fit, inputs.select))
    width = inputs.fit.shape[-1]
    gram = _gram_of(block.attention_projection, len(targets))
    for features, output, *wanted in _rows(chunk, fit.features, fit.output, *(target.fit for target in targets)):
        gram.update(features, torch.cat([aim - output for aim in wanted], dim=-1))
    solutions = gram.solve()
    for place, target in enumerate(targets):
        columns = slice(place * width, (place + 1) * width)
        changes = _changes(solutions, columns, block.attention_projection, gram, block.attention_set)
        outputs = [select.output] + [_with_change(block, select, change, chunk) for change in changes[1:]]
        change = _nearest(changes, outputs, target.select)[0]
        attention = _changed(block.attention_projection, change)
        mid = fit.mid + logits(fit.features, change)
        mlp, output = _refit_mlp(block, mid, select.mid + logits(select.features, change), target, chunk)
        yield Refit(block, attention, mlp, mid, output)


@dataclass(frozen=True)
class _Seen:
    """A block on one part of the probe: attention features, stream between the parts and output, [N, S, .] each."""

    features: Tensor
    mid: Tensor
    output: Tensor

    @classmethod
    def of(cls, block: Block, h: Tensor, chunk: Chunk) -> _Seen:
        seen = pieces(block.features, chunk, h)
        return cls(*(torch.cat(parts) for parts in zip(*((s.attention, s.mid, s.output) for s in seen), strict=True)))


def _with_change(block: Block, seen: _Seen, change: Projection, chunk: Chunk) -> Tensor:
    """The block's output with this change of its attention projection."""
    return through(block.run_mlp_part, seen.mid + logits(seen.features, change), chunk)


def _nearest(changes: Sequence[Projection], outputs: Sequence[Tensor], target: Tensor) -> tuple[Projection, Tensor]:
    """The change whose output has the least squared error to the target, with that output."""
    errors = [float((output - target).double().square().sum()) for output in outputs]
    best = errors.index(min(errors))
    return changes[best], outputs[best]


def _refit_mlp(block: Block, mid: Tensor, selected: Tensor, target: Streams, chunk: Chunk) -> tuple[Projection, Tensor]:
    """The second step, from the stream between the parts on `fit` and on `select`; the output on `select` with it."""
    gram = _gram_of(block.mlp_projection)
    for (features, output), wanted in pieces(
        lambda piece, wanted: (block.observe_mlp_part(piece), wanted), chunk, mid, target.fit
    ):
        gram.update(features, wanted - output)
    scored = list(pieces(block.observe_mlp_part, chunk, selected))
    features, output = (torch.cat(parts) for parts in zip(*scored, strict=True))
    changes = _changes(gram.solve(), slice(None), block.mlp_projection, gram, block.mlp_set)
    best, reached = _nearest(changes, [output + logits(features, change) for change in changes], target.select)
    return _changed(block.mlp_projection, best), reached


REFIT_TOKENS = 8192
REFIT_TOKENS_PER_COLUMN = 4
"""A stand-in by refit, whose Gram is the dearest, is solved on the first fit tokens only: the larger of these."""

REFIT_SELECT_TOKENS = 2048
"""Its ridges are tried on the first select tokens only: a squared error needs no more to tell them apart."""


def refit_tokens(columns: int) -> int:
    """The fit tokens on which a stand-in of so many columns is solved."""
    return max(REFIT_TOKENS, REFIT_TOKENS_PER_COLUMN * columns)


def refit_work(trace: Trace, block: Block, meter: Meter) -> float:
    """What one refit costs in forward passes: features, sums, solutions, and each ridge tried on `select`."""
    probe, width = trace.probe, trace.width
    tokens = refit_tokens(columns_of_refit(block))
    fit, select = min(tokens, probe.fit.size), min(REFIT_SELECT_TOKENS, probe.select.size)
    passes = (2 + len(RIDGES)) * meter.blocks(select, probe.sequence_length) + 2 * meter.blocks(
        fit, probe.sequence_length
    )
    for columns in (_columns(block.attention_projection), _columns(block.mlp_projection)):
        passes += meter.products(fit, columns, GRAM_SHARE * columns + width)
        passes += len(RIDGES) * meter.products(columns, columns, columns / 3 + width)
    return passes


def refit_fault(trace: Trace) -> str | None:
    """Why no block of this model can be refitted with this probe; None when they can."""
    block = next(iter(trace.blocks(stop=1)))
    if not block.has_projections:
        return "this architecture's blocks have no output projections that are added to the stream as they are"
    return shortfall(trace.probe.fit.size, columns_of_refit(block))


def columns_of_refit(block: Block) -> int:
    """Unknowns a row of the larger of the two least-squares problems in `refit`."""
    return max(_columns(block.attention_projection), _columns(block.mlp_projection))


def _columns(projection: Projection) -> int:
    return len(projection.weight) + int(projection.bias is not None)


def _gram_of(projection: Projection, targets: int = 1) -> Gram:
    """An empty Gram for changes of this projection toward so many targets at once."""
    rows, columns = projection.weight.shape
    return Gram(rows, targets * columns, intercept=projection.bias is not None, device=projection.weight.device)


def _rows(chunk: Chunk, *streams: Tensor) -> Iterator[tuple[Tensor, ...]]:
    return pieces(lambda *rows: rows, chunk, *streams)


def _changes(
    solutions: Sequence[Solution], columns: slice, trained: Projection, gram: Gram, weight_set: WeightSet
) -> list[Projection]:
    """The changes of a projection to choose among: none, and one a ridge, each within the projection's weight set."""
    none = Projection(
        torch.zeros_like(trained.weight), None if trained.bias is None else torch.zeros_like(trained.bias)
    )
    changes = [none]
    for solution in solutions:
        change = solution.weight[:, columns]
        bias = None if trained.bias is None else change[-1].to(trained.bias.dtype)
        weight = change if trained.bias is None else change[:-1]
        if weight_set.restricts:
            weight = within(trained.weight.double() + weight, gram, weight_set) - trained.weight.double()
        changes.append(Projection(weight.to(trained.weight.dtype), bias))
    return changes


def within(wanted: Tensor, gram: Gram, weight_set: WeightSet) -> Tensor:
    """A projection's wanted weight [in, out], float64, rounded into its set in the metric of its inputs."""
    return round_in_gram(wanted.T, gram.metric, weight_set).T if weight_set.restricts else wanted


def _changed(trained: Projection, change: Projection) -> Projection:
    bias = None if trained.bias is None or change.bias is None else trained.bias + change.bias
    return Projection(trained.weight + change.weight, bias)
