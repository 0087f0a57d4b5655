"""The backward sweep (method.md 5, 8): the loss's gradient carried from the head to the embeddings, block by block.

Only every so many hidden states are kept from the way forward; those between are computed anew, so that memory grows
with the square root of the depth.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from math import isqrt

import torch
from torch import Tensor
from torch.nn import functional

from peel_agent.peel.numerics.least_squares import Gram
from peel_agent.peel.numerics.losses import logits
from peel_agent.peel.numerics.streams import Streams, embedded, pieces
from peel_agent.records import Block, Chunk, Projection, TokenIds, Trace


def backwards(trace: Trace) -> Iterator[tuple[Block, Streams, Tensor, Callable[[Tensor], None]]]:
    """Every block from the last to the first, with the streams that enter it and the gradient at its output on `fit`.

    The gradient [N_f, S, d] is that of the summed cross-entropy of all predicted positions. The consumer hands the
    gradient at the block's input to the function that comes with them, before it asks for the next block.
    """
    depth = len(trace.block_names)
    stride = isqrt(max(0, depth - 1)) + 1
    h = embedded(trace)
    kept = {}
    for block in trace.blocks():
        if block.index % stride == 0:
            kept[block.index] = h
        h = h.through(block.run, trace.chunk)
    waiting = [loss_gradient(trace, h.fit, trace.probe.fit)]
    for start in reversed(range(0, depth, stride)):
        entering = [kept.pop(start)]
        for block in trace.blocks(start, min(start + stride, depth) - 1):
            entering.append(entering[-1].through(block.run, trace.chunk))
        while entering:
            index = start + len(entering) - 1
            (block,) = trace.blocks(index, index + 1)
            yield block, entering.pop(), waiting.pop(), waiting.append


def loss_gradient(trace: Trace, stream: Tensor, ids: TokenIds) -> Tensor:
    """Gradient [N, S, d] of the summed next-token cross-entropy with respect to the last stream [N, S, d]."""

    def gradient(h: Tensor, ids: Tensor) -> Tensor:
        with torch.enable_grad():
            h = h.detach().requires_grad_()
            features = trace.normalise(h)[:, :-1].flatten(0, 1)
            loss = functional.cross_entropy(logits(features, trace.head), ids[:, 1:].flatten(), reduction="sum")
            (of_stream,) = torch.autograd.grad(loss, h)
        return of_stream

    return torch.cat(list(pieces(gradient, trace.chunk, stream, torch.from_numpy(ids).to(stream.device))))


@dataclass(frozen=True)
class Descent:
    """Normal equations of a projection's inputs against the gradient at its output, over `fit`.

    `typical` is the Frobenius norm over `fit` of what the same part of a typical block adds to the stream.
    """

    projection: Projection
    gram: Gram
    typical: float


def descents(
    block: Block, h: Tensor, gradient: Tensor, chunk: Chunk, typical: Mapping[str, float]
) -> tuple[Descent, Descent, Tensor]:
    """The two output projections of a block, attention first, and the gradient [N, S, d] at its input h [N, S, d]."""
    projections = (block.attention_projection, block.mlp_projection)
    grams = [
        Gram(*projection.weight.shape, intercept=projection.bias is not None, device=projection.weight.device)
        for projection in projections
    ]
    entering = []
    for seen, outgoing in pieces(lambda x, g: (block.backward(x, g), g), chunk, h, gradient):
        grams[0].update(seen.attention_features, seen.mid)
        grams[1].update(seen.mlp_features, outgoing)
        entering.append(seen.input)
    attention, mlp = (
        Descent(projection, gram, typical[part])
        for projection, gram, part in zip(projections, grams, ("attention", "mlp"), strict=True)
    )
    return attention, mlp, torch.cat(entering)
