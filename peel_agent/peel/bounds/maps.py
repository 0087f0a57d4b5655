"""Target maps (method.md 3): which hidden state each block of a chain is fitted to. 1-based, as in the paper."""

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
        for own in maps:
            check(own, depth)
            labelled[label(own)] = own
    elif maps == "direct":
        labelled["direct"] = direct
    elif maps == "ends":
        labelled |= {label(own): own for own in ends(depth)}
    elif maps == "paper":
        labelled |= {label(own): own for own in paper(depth)}
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
    return tuple(dict.fromkeys(own for own in wanted if is_valid(own, depth) and own != tuple(range(1, depth + 1))))


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
    return tuple(dict.fromkeys(_scaled(own, base, depth) for own in lists))


def _scaled(own: TargetMap, base: int, depth: int) -> TargetMap:
    """A map for `base` blocks carried over to `depth`: its length too when it has an entry for every block."""
    length = depth if len(own) == base else min(len(own), depth)
    scaled: list[int] = []
    for place in range(1, length + 1):
        entry = own[-(-place * len(own) // length) - 1]
        target = -(-entry * depth // base)
        scaled.append(max(place, target, *scaled[-1:]))
    return tuple(scaled)


def is_valid(own: TargetMap, depth: int) -> bool:
    """method.md 3: L' <= L, values within 1..L, non-decreasing, and pi(i) >= i."""
    return _fault(own, depth) is None


def check(own: TargetMap, depth: int) -> None:
    """Raises ConfigurationError with the reason when the map is not a target map for `depth` blocks."""
    fault = _fault(own, depth)
    if fault is not None:
        raise ConfigurationError(
            f"{list(own)} is no target map for {depth} blocks: {fault}",
            remedy="list, for each block of the chain, the hidden state (1..L) it is fitted to, never decreasing",
        )


def _fault(own: TargetMap, depth: int) -> str | None:
    if not 1 <= len(own) <= depth:
        return f"it has {len(own)} entries, the model {depth} blocks"
    for place, target in enumerate(own, 1):
        if not 1 <= target <= depth:
            return f"entry {place} is {target}, outside 1..{depth}"
        if target < place:
            return f"entry {place} is {target}: block {place} cannot aim at a hidden state before its own"
        if place > 1 and target < own[place - 2]:
            return f"entry {place} is {target}, less than the {own[place - 2]} before it"
    return None


def label(own: TargetMap) -> str:
    """A short lossless name, fit for a metric key: `1-4`; `1..26` for 1,2,...,26; `1-2-26x3` for 1,2,26,26,26."""
    pieces = []
    start = 0
    while start < len(own):
        same = _run(own, start, step=0)
        rising = _run(own, start, step=1)
        if same >= 3:
            pieces.append(f"{own[start]}x{same}")
        elif rising >= 3:
            pieces.append(f"{own[start]}..{own[start + rising - 1]}")
        else:
            pieces.append(str(own[start]))
        start += max(same if same >= 3 else 1, rising if same < 3 <= rising else 1)
    return "-".join(pieces)


def _run(own: TargetMap, start: int, step: int) -> int:
    """Length of the run from `start` in which each entry is `step` more than the one before."""
    end = start + 1
    while end < len(own) and own[end] == own[end - 1] + step:
        end += 1
    return end - start


def count(depth: int) -> int:
    """How many target maps there are for `depth` blocks, of every length L' <= L.

    Maps of length k are lattice paths under a diagonal; the ballot theorem gives C(L+k, k) (L-k+1) / (L+1).
    """
    return sum(comb(depth + k, k) * (depth - k + 1) // (depth + 1) for k in range(1, depth + 1))
