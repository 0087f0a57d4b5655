"""A better block as a witness (method.md 5): the weights that the headroom of one block was measured with."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from peel_agent.errors import NoWitness
from peel_agent.peel.headroom.headroom import headrooms
from peel_agent.peel.numerics.intervals import estimate
from peel_agent.peel.numerics.meter import Meter
from peel_agent.peel.numerics.stopwatch import Stopwatch
from peel_agent.peel.past.comparison import EARLIER
from peel_agent.peel.sweep.forward import sweep
from peel_agent.peel.sweep.heats import Heat, nowhere
from peel_agent.peel.sweep.lanes import carry
from peel_agent.peel.sweep.splices import Variant, with_weights
from peel_agent.precision import latents_of
from peel_agent.records import Block, Estimate, Past, Plan, Progress, Projection, Trace, WeightSet


@dataclass(frozen=True)
class Improvement:
    """Weights under the model's own names that make one block better, latents where the block is low-bit.

    `loss` is the trained model's on confirm, `headroom` what the weights win there; nats per token.
    """

    weights: Mapping[str, Tensor]
    loss: Estimate
    headroom: Estimate


def improve(trace: Trace, index: int, clock: Callable[[], float], progress: Progress | None = None) -> Improvement:
    """The better block `index`; NoWitness when its win cannot be told from 0."""
    stopwatch = Stopwatch(clock, progress)
    nothing = Plan(frozenset(), (), "direct")
    swept = sweep(trace, nothing, nowhere(trace), frozenset(), stopwatch)
    trained, added = swept.trained, [visited.added for visited in swept.visited]
    rooms, skipped = headrooms(trace, trained, added, stopwatch, only=index)
    if index not in rooms:
        raise NoWitness(f"no better block can be solved for: {skipped[0].why}", remedy="give a larger probe")
    won, better = rooms[index].won["block"], rooms[index].better["block"]
    if not won.low > 0.0:
        raise NoWitness(
            f"{trace.block_names[index]} has no proven headroom: {won} nats per token",
            remedy="nothing was written; take another block, or a larger probe for a narrower interval",
        )
    (block,) = trace.blocks(index, index + 1)
    stored = block.stored(
        attention=_storable(better.attention, block.attention_set), mlp=_storable(better.mlp, block.mlp_set)
    )
    weights = {f"{block.name}.{key}": weight.contiguous() for key, weight in _without_same(block, stored).items()}
    return Improvement(weights, estimate(trained[len(trace.probe.select) :]), won)


def earlier_block(
    trace: Trace, past: Past, index: int, clock: Callable[[], float], progress: Progress | None = None
) -> Improvement:
    """Block `index` as it was at an earlier checkpoint; NoWitness when its win cannot be told from 0."""
    stopwatch = Stopwatch(clock, progress)
    nothing = Plan(frozenset(), (), "direct")
    trained = sweep(trace, nothing, nowhere(trace), frozenset(), stopwatch).trained
    (block,) = trace.blocks(index, index + 1)
    variant = Variant(index, "block", EARLIER)
    confirm = Heat(np.arange(len(trace.probe.select), len(trained)), trace.probe.sequence_length)
    splices = {variant: with_weights(lambda: past.block(index).effective)}
    (carried,) = carry(trace, [(confirm, splices)], stopwatch, Meter(trace, block))
    won = estimate(-carried[variant].losses[confirm.rows])
    if not won.low > 0.0:
        raise NoWitness(
            f"{block.name} of the earlier checkpoint is not proven better: {won} nats per token",
            remedy="nothing was written; take another block or checkpoint, or a larger probe for a narrower interval",
        )
    stored = _without_same(block, past.block(index).stored)
    weights = {f"{block.name}.{key}": weight.contiguous() for key, weight in stored.items()}
    return Improvement(weights, estimate(trained[confirm.rows]), won)


def _storable(projection: Projection | None, weight_set: WeightSet) -> Projection | None:
    """A projection whose weights are what is stored for it: latents when it is in a weight set."""
    if projection is None or not weight_set.restricts:
        return projection
    return Projection(latents_of(projection.weight.T, weight_set).T, projection.bias)


def _without_same(block: Block, stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
    trained = {**block.parameters, **block.latents}
    return {key: weight for key, weight in stored.items() if not weight.equal(trained[key])}
