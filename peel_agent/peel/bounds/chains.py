"""Chains of fitted blocks along target maps (method.md 3); a prefix that maps share is solved once."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from peel_agent.peel.bounds.maps import HEAD, TargetMap
from peel_agent.peel.bounds.solvers import Solver
from peel_agent.peel.numerics.stopwatch import Stopwatch
from peel_agent.peel.numerics.streams import Streams
from peel_agent.records import Trace


def is_direct(prefix: TargetMap) -> bool:
    """Whether every block so far aims at its own hidden state."""
    return prefix == tuple(range(1, len(prefix) + 1))


def costs_nothing(prefix: TargetMap, solver: Solver) -> bool:
    """Whether the chain so far is the trained model: a warm solver leaves a block aimed at its own output as it is."""
    return solver.warm and is_direct(prefix)


def chained(labelled: Mapping[str, TargetMap], depth: int, solver: Solver) -> set[TargetMap]:
    """The maps that need a chain; `head`, and one of full depth that costs nothing, are the trained blocks."""
    maps = {target_map for label, target_map in labelled.items() if label != HEAD}
    return {target_map for target_map in maps if len(target_map) < depth or not costs_nothing(target_map, solver)}


def hidden_states_of(maps: Iterable[TargetMap], solver: Solver) -> frozenset[int]:
    """The trained hidden states (transformers' numbering) that the chains of these maps start from or aim at."""
    needed = {0}
    for target_map in maps:
        for place in range(1, len(target_map) + 1):
            needed.add(place if costs_nothing(target_map[:place], solver) else target_map[place - 1])
    return frozenset(needed)


def chain_ends(
    trace: Trace, maps: Iterable[TargetMap], hidden: Mapping[int, Streams], solver: Solver, stopwatch: Stopwatch
) -> dict[TargetMap, Streams]:
    """The last stream of each map's chain: block i is fed by the chain, fitted to h_{pi(i)}, then frozen.

    `hidden` holds the trained hidden states named by `hidden_states_of`. Blocks are visited once for all maps.
    Maps that the time budget does not suffice for are not among the results.
    """
    wanted = set(maps)
    if not wanted:
        return {}
    level: dict[TargetMap, Streams] = {(): hidden[0]}
    ends: dict[TargetMap, Streams] = {}
    deepest = max(len(target_map) for target_map in wanted)
    stopwatch.progress("bounds, blocks", 0, deepest)
    for block in trace.blocks(stop=deepest):
        place = block.index + 1
        above, level = level, {}
        prefixes = dict.fromkeys(target_map[:place] for target_map in wanted if len(target_map) >= place)
        for parent, inputs in above.items():
            grown = [prefix for prefix in prefixes if prefix[:-1] == parent and not costs_nothing(prefix, solver)]
            if grown and not stopwatch.affords(stopwatch.last("solve")):
                return ends
            if grown:
                targets = [hidden[prefix[-1]] for prefix in grown]
                with stopwatch("solve"):
                    level |= zip(grown, solver.solve(block, inputs, targets, trace.chunk), strict=True)
        level |= {prefix: hidden[place] for prefix in prefixes if costs_nothing(prefix, solver)}
        ends |= {prefix: streams for prefix, streams in level.items() if prefix in wanted}
        stopwatch.progress("bounds, blocks", place, deepest)
    return ends
