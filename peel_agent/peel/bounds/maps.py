"""Target maps (method.md 3): which hidden state each block of a chain is fitted to. 1-based, as in the paper.

The map (2, 4) is a cheap model of two blocks: the first is fitted to give what the trained model has after its block 2,
the second, fed by the first, what it has after its block 4.
"""

from __future__ import annotations

from math import comb

from peel_agent.errors import ConfigurationError

TargetMap = tuple[int, ...]

HEAD = "head"
"""The label of the construction in which only the head is fitted anew; it has the direct map."""


def suite(maps: str | tuple[TargetMap, ...], depth: int) -> dict[str, TargetMap]:
    """Labelled maps for a model of `depth` blocks; `head` (refitted head only) is always the first.

    `maps` is the name of a suite (`direct`, `ends`, `paper`) or a tuple of maps. Labels are the same at every
    checkpoint. Raises ConfigurationError.
    """
    direct = tuple(range(1, depth + 1))
    labelled = {HEAD: direct}
    if isinstance(maps, tuple):
        for target_map in maps:
            check(target_map, depth)
            labelled[label(target_map)] = target_map
    elif maps == "direct":
        labelled["direct"] = direct
    elif maps == "ends":
        labelled |= {label(target_map): target_map for target_map in ends(depth)}
    elif maps == "paper":
        labelled |= {label(target_map): target_map for target_map in paper(depth)}
    elif maps == "all":
        raise ConfigurationError(
            f"all target maps of {depth} blocks are {count(depth):,}",
            remedy="choose a suite (direct, ends, paper) or give your own maps, such as [[1, 4], [2, 4]]",
        )
    else:
        raise ConfigurationError(
            f"no suite of maps is called `{maps}`",
            remedy="use direct, ends, paper, or your own maps, such as [[1, 4], [2, 4]]",
        )
    return labelled


def ends(depth: int) -> tuple[TargetMap, ...]:
    """At most seven maps that emphasise the first and the last layers, the same in kind at any depth (ours)."""
    last = depth
    wanted = (
        (last,),
        (1, last),
        (last, last),
        (1, 2, last),
        (1, last, last),
        (1, last - 1, last),
        (1, 2, last - 1, last),
    )
    return tuple(
        dict.fromkeys(
            target_map
            for target_map in wanted
            if is_valid(target_map, depth) and target_map != tuple(range(1, depth + 1))
        )
    )


PAPER_FOUR_BLOCKS = (
    *((1, 2), (2, 2), (1, 3), (1, 4), (3, 3), (4, 4), (2, 4), (3, 4)),
    *((1, 2, 3, 4), (3, 3, 3, 4), (4, 4, 4, 4), (1, 2, 4, 4)),
)
PAPER_26_BLOCKS = (
    *((1, 2, 26, 26, 26), (2, 3, 6, 8, 10), (1, 4, 5, 9, 10), (3, 4, 6, 25, 26), (1, 3, 5, 7, 9), (2, 4, 6, 25, 26)),
    *((1, 2, 3, 4, 25), (10, 10, 25, 25, 26), (1, 2, 10, *(26,) * 23), tuple(range(1, 27))),
)
"""The lists that arXiv 2605.02853 spells out for its two depths (method.md 3)."""


def paper(depth: int) -> tuple[TargetMap, ...]:
    """The paper's lists scaled to `depth` blocks: the 4-block ones up to 8 blocks, above that the 26-block ones.

    At 4 and at 26 blocks they are the paper's own.
    """
    lists, base = (PAPER_FOUR_BLOCKS, 4) if depth <= 8 else (PAPER_26_BLOCKS, 26)
    return tuple(dict.fromkeys(_scaled(target_map, base, depth) for target_map in lists))


def _scaled(target_map: TargetMap, base: int, depth: int) -> TargetMap:
    """A map for `base` blocks carried over to `depth`: its length too when it has an entry for every block."""
    length = depth if len(target_map) == base else min(len(target_map), depth)
    scaled: list[int] = []
    for place in range(1, length + 1):
        entry = target_map[-(-place * len(target_map) // length) - 1]
        target = -(-entry * depth // base)
        scaled.append(max(place, target, *scaled[-1:]))
    return tuple(scaled)


def is_valid(target_map: TargetMap, depth: int) -> bool:
    """Whether it is a target map: at most `depth` entries, none above `depth` or below the one before, entry i >= i."""
    return _fault(target_map, depth) is None


def check(target_map: TargetMap, depth: int) -> None:
    """Raises ConfigurationError with the reason when the map is not a target map for `depth` blocks."""
    fault = _fault(target_map, depth)
    if fault is not None:
        raise ConfigurationError(
            f"{list(target_map)} is no target map for {depth} blocks: {fault}",
            remedy="list, for each block of the chain, the hidden state (1..L) it is fitted to, never decreasing",
        )


def _fault(target_map: TargetMap, depth: int) -> str | None:
    if not 1 <= len(target_map) <= depth:
        return f"it has {len(target_map)} entries, the model {depth} blocks"
    for place, target in enumerate(target_map, 1):
        if not 1 <= target <= depth:
            return f"entry {place} is {target}, outside 1..{depth}"
        if target < place:
            return f"entry {place} is {target}: block {place} cannot aim at a hidden state before its own"
        if place > 1 and target < target_map[place - 2]:
            return f"entry {place} is {target}, less than the {target_map[place - 2]} before it"
    return None


def label(target_map: TargetMap) -> str:
    """A short lossless name, fit for a metric key: `1-4`; `1..26` for 1,2,...,26; `1-2-26x3` for 1,2,26,26,26."""
    pieces = []
    start = 0
    while start < len(target_map):
        same = _run(target_map, start, step=0)
        rising = _run(target_map, start, step=1)
        if same >= 3:
            pieces.append(f"{target_map[start]}x{same}")
        elif rising >= 3:
            pieces.append(f"{target_map[start]}..{target_map[start + rising - 1]}")
        else:
            pieces.append(str(target_map[start]))
        start += max(same if same >= 3 else 1, rising if same < 3 <= rising else 1)
    return "-".join(pieces)


def _run(target_map: TargetMap, start: int, step: int) -> int:
    """Length of the run from `start` in which each entry is `step` more than the one before."""
    end = start + 1
    while end < len(target_map) and target_map[end] == target_map[end - 1] + step:
        end += 1
    return end - start


def count(depth: int) -> int:
    """How many target maps there are for `depth` blocks, of every length L' <= L.

    Maps of length k are lattice paths under a diagonal; the ballot theorem gives C(L+k, k) (L-k+1) / (L+1).
    """
    return sum(comb(depth + k, k) * (depth - k + 1) // (depth + 1) for k in range(1, depth + 1))
