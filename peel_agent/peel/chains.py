"""Chains of refitted blocks along target maps (METHOD 3); a prefix that maps share is solved once."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from peel_agent.peel.maps import TargetMap
from peel_agent.peel.references import columns_of_refit, refit
from peel_agent.peel.streams import Streams
from peel_agent.records import Trace

SOLVER = "closed_form"


def is_direct(prefix: TargetMap) -> bool:
    """Does every block so far aim at its own hidden state? Then its refit from the trained weights is itself."""
    return prefix == tuple(range(1, len(prefix) + 1))


def hidden_states_of(maps: Iterable[TargetMap]) -> frozenset[int]:
    """The trained hidden states (transformers' numbering) that the chains of these maps start from or aim at."""
    needed = {0}
    for own in maps:
        for place in range(1, len(own) + 1):
            if is_direct(own[:place]):
                needed.add(place)
            else:
                needed.add(own[place - 1])
    return frozenset(needed)


def chain_ends(trace: Trace, maps: Iterable[TargetMap], hidden: Mapping[int, Streams]) -> dict[TargetMap, Streams]:
    """The last stream of each map's chain: block i is fed by the chain, refitted to h_{pi(i)}, then frozen.

    `hidden` holds the trained hidden states named by `hidden_states_of`. A direct prefix costs nothing: it is the
    trained stream. Blocks are visited once for all maps.
    """
    wanted = set(maps)
    level: dict[TargetMap, Streams] = {(): hidden[0]}
    ends: dict[TargetMap, Streams] = {}
    for block in trace.blocks(stop=max(len(own) for own in wanted)):
        place = block.index + 1
        level = {
            prefix: (
                hidden[place]
                if is_direct(prefix)
                else level[prefix[:-1]].through(
                    refit(block, level[prefix[:-1]], hidden[prefix[-1]], trace.chunk).run, trace.chunk
                )
            )
            for prefix in dict.fromkeys(own[:place] for own in wanted if len(own) >= place)
        }
        ends |= {prefix: streams for prefix, streams in level.items() if prefix in wanted}
    return ends


def most_columns(trace: Trace) -> int:
    """Unknowns a row of the largest least-squares problem that a chain of this model solves."""
    return columns_of_refit(next(iter(trace.blocks(stop=1))))
