"""Target maps the naive way: every map by itself, every hidden state computed anew, every solve by a pseudo-inverse."""

from __future__ import annotations

import torch
from torch import Tensor

from peel_agent.peel.bounds.maps import TargetMap
from peel_agent.peel.numerics.streams import embedded, through
from peel_agent.records import Block, Projection, Trace


def naive_chain(trace: Trace, target_map: TargetMap) -> tuple[Tensor, Tensor]:
    """The last streams (fit, score) of one map's chain of refitted blocks: nothing shared or streamed, no ridge."""
    start = embedded(trace)
    hidden = [start.fit]
    for block in trace.blocks():
        hidden.append(through(block.run, hidden[-1], trace.chunk))
    fit, score = start.fit, start.score
    for block, target in zip(trace.blocks(stop=len(target_map)), target_map, strict=True):
        attention, mlp = _refitted(block, fit, hidden[target])
        fit, score = (block.run(stream, attention=attention, mlp=mlp) for stream in (fit, score))
    return fit, score


def _refitted(block: Block, stream: Tensor, target: Tensor) -> tuple[Projection, Projection]:
    """The block's output projections, attention first, each refitted so that the block's output is near the target."""
    seen = block.features(stream)
    attention, change = _solved(block.attention_projection, seen.attention, target - seen.output)
    mlp_features, output = block.observe_mlp_part(seen.mid + seen.attention @ change)
    mlp, _ = _solved(block.mlp_projection, mlp_features, target - output)
    return attention, mlp


def _solved(trained: Projection, features: Tensor, missing: Tensor) -> tuple[Projection, Tensor]:
    """A projection that adds what is missing, and the change of its weight."""
    change = torch.linalg.pinv(features.flatten(0, 1).double()) @ missing.flatten(0, 1).double()
    return Projection(trained.weight + change.float(), trained.bias), change.float()
