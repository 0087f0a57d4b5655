"""A block's weights are read while the block before it is computed with, and nothing else changes by it."""

from __future__ import annotations

import dataclasses
import itertools
import re
import threading
import weakref
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from peel_agent.capture import PastBlocks, open_trace
from peel_agent.capture.ahead import ReadAhead
from peel_agent.capture.trace import BlockwiseTrace
from peel_agent.errors import TornCheckpoint
from peel_agent.peel import Comparison, peel
from peel_agent.records import Findings, Plan, Weights
from tests import zoo
from tests.waiting import wait_for

EVERYTHING = Plan(frozenset({"margin", "bounds", "headroom", "redundancy"}), ("skip", "affine", "previous"), "ends")


class Watched:
    """A checkpoint's weights, with what was read of them, by which threads, and what of it is still held."""

    def __init__(self, weights: Weights, fault: Callable[[str], None] = lambda _: None) -> None:
        self._weights = weights
        self._fault = fault
        self.names: list[str] = []
        self.threads: list[threading.Thread] = []
        self.held: dict[int, list[weakref.ref[Tensor]]] = {}
        self.dtype: torch.dtype | None = None
        self.at_once = self._reading = 0

    def config(self) -> Mapping[str, Any]:
        return self._weights.config()

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return self._weights.shapes()

    def read(self, name: str) -> Tensor:
        self._reading += 1
        self.at_once = max(self.at_once, self._reading)
        try:
            self.names.append(name)
            self.threads.append(threading.current_thread())
            self._fault(name)
            tensor = self._weights.read(name)
            self.dtype = tensor.dtype
            if (block := block_of(name)) is not None:
                self.held.setdefault(block, []).append(weakref.ref(tensor))
            return tensor
        finally:
            self._reading -= 1

    @property
    def blocks(self) -> list[int]:
        """The blocks that were read, in order, as often as they were begun."""
        return [block for block, _ in itertools.groupby(map(block_of, self.names)) if block is not None]

    def blocks_held(self) -> set[int]:
        return {block for block, tensors in self.held.items() if any(own() is not None for own in tensors)}

    def whole(self, block: int) -> bool:
        return len(self.held.get(block, [])) == len(self.held[0])


def block_of(name: str) -> int | None:
    number = re.search(r"\.(?:layers|h)\.(\d+)\.", name)
    return None if number is None else int(number[1])


def watched(path: Path, fault: Callable[[str], None] = lambda _: None) -> tuple[BlockwiseTrace, Watched]:
    snapshot = zoo.snapshot_of(path)
    weights = Watched(snapshot.weights, fault)
    return open_trace(dataclasses.replace(snapshot, weights=weights), zoo.probe()), weights


def peeled(now: Path, before: Path) -> Findings:
    trace = zoo.trace_of(now)
    comparison = Comparison(PastBlocks(zoo.snapshot_of(before), 10, trace), None, dtype="bfloat16", keep=True)
    return peel(trace, EVERYTHING, itertools.count().__next__, comparison=comparison)


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=str)
def stored(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return zoo.save(zoo.build("llama", steps=10).to(request.param), tmp_path_factory.mktemp("stored"))


def test_every_number_is_the_same_to_the_bit(stored: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a peel measures, with the checkpoint before at hand too, hangs on nothing of who reads when."""
    before = zoo.save(zoo.build("llama", steps=5), tmp_path)
    ahead = peeled(stored, before)
    monkeypatch.setattr(ReadAhead, "begin", lambda _ahead, _names: None)
    assert dataclasses.replace(peeled(stored, before), timing=ahead.timing) == ahead


def test_the_next_block_is_read_during_this_one_and_no_other(stored: Path) -> None:
    """While a block is in use the next one arrives, and the one after it does not begin."""
    trace, weights = watched(stored)
    for block in trace.blocks():
        following = block.index + 1
        if following < zoo.BLOCKS:
            wait_for(lambda following=following: weights.whole(following))
            assert weights.threads[-1] is not threading.main_thread()
        assert weights.blocks == list(range(min(following + 1, zoo.BLOCKS)))


def test_two_blocks_are_held_at_most(stored: Path) -> None:
    """The one in use and the next one as stored; of the one in use what is stored in another dtype is gone."""
    trace, weights = watched(stored)
    for block in trace.blocks():
        following = block.index + 1
        if following < zoo.BLOCKS:
            wait_for(lambda following=following: weights.whole(following))
        expected = {following} if following < zoo.BLOCKS else set()
        if weights.dtype == torch.float32:
            expected |= {block.index}
        wait_for(lambda expected=expected: weights.blocks_held() == expected)
        del block
    wait_for(lambda: weights.blocks_held() == set())


def test_one_weight_is_read_at_a_time(stored: Path) -> None:
    """Loops within a loop read the same files: a format need not bear two threads at once."""
    trace, weights = watched(stored)
    for outer in trace.blocks():
        for _ in trace.blocks(outer.index + 1):
            pass
    assert weights.at_once == 1
    assert len(weights.blocks) > zoo.BLOCKS


def raises(error: Exception, block: int, times: int) -> Callable[[str], None]:
    """A fault: the first reads of this block fail, after its first weight came."""
    reads = itertools.count()

    def fault(name: str) -> None:
        if block_of(name) == block and 1 <= next(reads) <= times:
            raise error

    return fault


@pytest.mark.parametrize(
    ("error", "times"),
    [
        (TornCheckpoint("model.safetensors changed while it was read", remedy="nothing to do"), 1),
        (OSError(5, "Input/output error"), 1),
        (KeyError("a weight that is missing"), 1),
        (MemoryError("no room"), 10**9),
    ],
    ids=lambda value: type(value).__name__,
)
@pytest.mark.parametrize("block", range(zoo.BLOCKS))
def test_an_error_comes_at_the_turn_of_its_block(stored: Path, block: int, error: Exception, times: int) -> None:
    """The blocks before are not lost to what is read ahead, and the error is the reading's own."""
    trace, _ = watched(stored, raises(error, block, times))
    visited = []
    with pytest.raises(type(error)) as raised:
        visited.extend(own.index for own in trace.blocks())
    assert raised.value is error
    assert visited == list(range(block))


@pytest.mark.parametrize("error", [MemoryError("no room"), torch.OutOfMemoryError("no room")])
def test_what_did_not_fit_ahead_is_read_at_its_turn(stored: Path, error: Exception) -> None:
    """Memory that suffices for one block after the other suffices, as without reading ahead."""
    trace, weights = watched(stored, raises(error, 2, 1))
    plain, _ = watched(stored)
    for one, other in zip(trace.blocks(), plain.blocks(), strict=True):
        assert all(torch.equal(one.parameters[name], other.parameters[name]) for name in other.parameters)
    assert weights.threads[weights.names.index(last_of(weights, 2))] is threading.main_thread()


def last_of(weights: Watched, block: int) -> str:
    return [name for name in weights.names if block_of(name) == block][-1]


def test_no_thread_to_be_had(stored: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where no thread can be started every block is read at its turn."""

    def refused(_thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refused)
    trace, weights = watched(stored)
    assert [block.index for block in trace.blocks()] == list(range(zoo.BLOCKS))
    assert set(weights.threads) == {threading.main_thread()}


@pytest.mark.parametrize("leave", [lambda blocks: blocks.close(), lambda blocks: None], ids=["closed", "dropped"])
def test_leaving_a_loop_ends_the_reading(stored: Path, leave: Callable[[Any], None]) -> None:
    """The thread is gone with the loop, after the weight that it was at."""
    at_weight, may_go_on = threading.Event(), threading.Event()

    def fault(name: str) -> None:
        if block_of(name) == 1:
            at_weight.set()
            may_go_on.wait()

    trace, weights = watched(stored, fault)
    threads: Collection[threading.Thread] = set(threading.enumerate())
    blocks: Any = trace.blocks()
    next(blocks)
    at_weight.wait()
    threading.Timer(0.2, may_go_on.set).start()
    leave(blocks)
    del blocks
    assert sum(block_of(name) == 1 for name in weights.names) == 1
    wait_for(lambda: set(threading.enumerate()) <= set(threads))


def test_blocks_of_the_checkpoint_before_are_read_ahead_in_order(stored: Path) -> None:
    """Asked for one after the other, the next one is there; asked for in any order, it is the one asked for."""
    trace, snapshot = zoo.trace_of(stored), zoo.snapshot_of(stored)
    weights = Watched(snapshot.weights)
    past = PastBlocks(dataclasses.replace(snapshot, weights=weights), 10, trace)
    expected = [dict(block.parameters) for block in trace.blocks()]
    for turn, index in enumerate((0, 1, 2, 3, 0, 2, 3, 1)):
        if turn == zoo.BLOCKS:
            assert weights.blocks == list(range(zoo.BLOCKS))
            assert weights.threads[-1] is not threading.main_thread()
        found = past.block(index).effective
        assert all(torch.equal(found[name], expected[index][name]) for name in expected[index])
