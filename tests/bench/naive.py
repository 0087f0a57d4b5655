"""Target maps the naive way: every map by itself, every hidden state computed anew, every solve by a pseudo-inverse."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from peel_agent.peel.bounds.maps import TargetMap
from peel_agent.peel.numerics.streams import embedded, through
from peel_agent.records import Block, Projection, Trace


def naive_chain(trace: Trace, own: TargetMap) -> tuple[Tensor, Tensor]:
    """The last streams (fit, score) of one map's chain of refitted blocks: nothing shared or streamed, no ridge."""
    start = embedded(trace)
    hidden = [start.fit]
    for block in trace.blocks():
        hidden.append(through(block.run, hidden[-1], trace.chunk))
    fit, score = start.fit, start.score
    for block, target in zip(trace.blocks(stop=len(own)), own, strict=True):
        attention = _solved(block, fit, hidden[target], block.attention_projection, None)
        mlp = _solved(block, fit, hidden[target], block.mlp_projection, attention)
        fit, score = (block.run(stream, attention=attention, mlp=mlp) for stream in (fit, score))
    return fit, score


def _solved(block: Block, stream: Tensor, target: Tensor, solved: Projection, attention: Any) -> Projection:
    seen = block.observe(stream, attention=attention)
    features = seen.attention_features if attention is None else seen.mlp_features
    missing = (target - seen.output).flatten(0, 1).double()
    change = torch.linalg.pinv(features.flatten(0, 1).double()) @ missing
    return Projection(solved.weight + change.float(), None)
