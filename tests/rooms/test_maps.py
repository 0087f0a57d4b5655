"""Target maps: which are valid, how many there are, what they are called."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from peel_agent.errors import ConfigurationError
from peel_agent.peel.bounds.chains import hidden_states_of, is_direct
from peel_agent.peel.bounds.maps import check, count, ends, is_valid, label, paper, suite
from peel_agent.peel.bounds.solvers import SOLVERS

PAPER_FOUR_BLOCKS = [
    (1, 2), (2, 2), (1, 3), (1, 4), (3, 3), (4, 4), (2, 4), (3, 4),
    (1, 2, 3, 4), (3, 3, 3, 4), (4, 4, 4, 4), (1, 2, 4, 4),
]  # fmt: skip


def every_map(depth: int) -> list[tuple[int, ...]]:
    """By brute force over method.md 3's conditions."""
    return [
        target_map
        for length in range(1, depth + 1)
        for target_map in itertools.product(range(1, depth + 1), repeat=length)
        if list(target_map) == sorted(target_map) and all(target >= place for place, target in enumerate(target_map, 1))
    ]


@pytest.mark.parametrize("depth", [1, 2, 3, 4, 5])
def test_count_and_validity(depth: int) -> None:
    """The count is that of the maps which satisfy the conditions, and those are the valid ones."""
    expected = every_map(depth)
    assert count(depth) == len(expected)
    assert all(is_valid(target_map, depth) for target_map in expected)


@pytest.mark.parametrize("target_map", PAPER_FOUR_BLOCKS)
def test_the_paper_s_maps_are_valid(target_map: tuple[int, ...]) -> None:
    """Every 4-block list of the paper is a target map."""
    check(target_map, 4)


@pytest.mark.parametrize(
    ("target_map", "words"),
    [
        ((), "0 entries"),
        ((1, 2, 3, 4, 4), "5 entries, the model 4 blocks"),
        ((1, 5), "entry 2 is 5, outside 1..4"),
        ((0, 2), "entry 1 is 0, outside 1..4"),
        ((1, 1), "entry 2 is 1: block 2 cannot aim at a hidden state before its own"),
        ((3, 2), "entry 2 is 2, less than the 3 before it"),
    ],
)
def test_invalid_maps_say_why(target_map: tuple[int, ...], words: str) -> None:
    """The reason names the entry."""
    with pytest.raises(ConfigurationError, match=words):
        check(target_map, 4)


def test_enumerating_all_is_refused_with_the_count() -> None:
    """All maps of 26 blocks are too many; the message says how many."""
    with pytest.raises(ConfigurationError, match=f"{count(26):,}"):
        suite("all", 26)


@pytest.mark.parametrize("depth", [1, 2, 3, 4, 6, 26, 120])
def test_ends(depth: int) -> None:
    """The default suite has at most eight valid maps at any depth, `head` first and with the direct map."""
    labelled = suite("ends", depth)
    assert next(iter(labelled)) == "head"
    assert labelled["head"] == tuple(range(1, depth + 1))
    assert len(labelled) <= 8
    assert all(is_valid(target_map, depth) for target_map in labelled.values())
    assert len(set(ends(depth))) == len(ends(depth))


@pytest.mark.parametrize("depth", [1, 2, 3, 4, 6, 8, 9, 12, 26, 40])
def test_paper_suite(depth: int) -> None:
    """The paper's lists are valid at any depth, one with an entry a block; at 4 and 26 blocks they are its own."""
    maps = paper(depth)
    assert all(is_valid(target_map, depth) for target_map in maps)
    assert any(len(target_map) == depth for target_map in maps)
    assert len(maps) <= 12
    if depth == 4:
        assert list(maps) == PAPER_FOUR_BLOCKS
    if depth == 26:
        assert (10, 10, 25, 25, 26) in maps
        assert (1, 2, 10) + (26,) * 23 in maps


def test_direct_and_own_maps() -> None:
    """The direct suite names the direct map; own maps come with `head` beside them."""
    assert suite("direct", 3) == {"head": (1, 2, 3), "direct": (1, 2, 3)}
    assert suite(((1, 3), (3,)), 3) == {"head": (1, 2, 3), "1-3": (1, 3), "3": (3,)}
    with pytest.raises(ConfigurationError, match="no suite of maps is called `end`"):
        suite("end", 3)


@given(st.integers(1, 6).flatmap(lambda depth: st.lists(st.sampled_from(every_map(depth)), min_size=2, max_size=2)))
def test_labels_are_lossless(pair: list[tuple[int, ...]]) -> None:
    """Two maps have the same label only when they are the same map; a label fits a metric key."""
    first, second = pair
    assert (label(first) == label(second)) == (first == second)
    assert set(label(first)) <= set("0123456789-.x")


def test_long_labels_are_short() -> None:
    """Runs are written as runs."""
    assert label((1, 2, 10) + (26,) * 23) == "1-2-10-26x23"
    assert label(tuple(range(1, 27))) == "1..26"
    assert label((1, 4, 5, 9, 10)) == "1-4-5-9-10"


def test_hidden_states_needed() -> None:
    """A chain needs its targets and the trained streams that it starts from, and no other."""
    assert hidden_states_of([(1, 4), (3, 3)], SOLVERS["closed_form"]) == {0, 1, 3, 4}
    assert hidden_states_of([(1, 2)], SOLVERS["descent_cold"]) == {0, 1, 2}
    assert is_direct((1, 2))
    assert not is_direct((2,))
