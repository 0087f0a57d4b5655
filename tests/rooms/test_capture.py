"""Running a checkpoint block by block is running it as transformers does."""

from __future__ import annotations

import gc
import itertools
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch

from peel_agent import registry
from peel_agent.peel import peel
from peel_agent.peel.numerics.losses import logits
from peel_agent.records import Plan, Projection
from tests import zoo


@pytest.fixture(scope="module", params=sorted(zoo.CONFIGS))
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    """A model of each family, as transformers has it and as a Trace."""
    model = zoo.build(request.param, steps=10)
    return model, zoo.trace_of(zoo.save(model, tmp_path_factory.mktemp(request.param)))


def test_every_family_gives_margins_and_bounds(pair: tuple[Any, Any]) -> None:
    """Each architecture is peeled to the end: a margin a block, the head's bound, and reasons for what is left out."""
    _, trace = pair
    plan = Plan(frozenset({"margin", "bounds", "headroom", "redundancy"}), ("skip", "affine", "previous"), "ends")
    findings = peel(trace, plan, itertools.count().__next__)
    assert all(layer.margin is not None for layer in findings.layers)
    block = next(iter(trace.blocks(stop=1)))
    left_out = {skipped.what for skipped in findings.skipped}
    assert ("margins of attention and MLP parts" in left_out) == (not block.has_parts)
    for what in ("headroom", "redundancy", "`previous` references"):
        assert (what in left_out) == (not block.has_projections)
    assert (len(findings.bounds) > 1) == block.has_projections


def test_every_model_type_is_in_the_zoo() -> None:
    """Each model type that a first-party family claims is proven below against transformers' own forward."""
    claimed = set()
    for kind in zoo.CONFIGS.values():
        claimed |= registry.family(kind.model_type).model_types
    assert claimed == {config.model_type for config in zoo.CONFIGS.values()}


def test_hidden_states_and_logits(pair: tuple[Any, Any]) -> None:
    """Embeddings, every block's output, the final norm and the head agree with transformers' forward."""
    model, trace = pair
    ids = zoo.token_ids(7, 9)
    with torch.no_grad():
        expected = model(torch.from_numpy(ids), output_hidden_states=True)
    h = trace.embed(ids)
    torch.testing.assert_close(h, expected.hidden_states[0])
    for index, block in enumerate(trace.blocks()):
        h = block.run(h)
        if index < zoo.BLOCKS - 1:  # transformers' last hidden state is taken after the final norm
            torch.testing.assert_close(h, expected.hidden_states[index + 1])
    torch.testing.assert_close(trace.normalise(h), expected.hidden_states[-1])
    torch.testing.assert_close(logits(trace.normalise(h), trace.head), expected.logits)


def test_parts_add_up(pair: tuple[Any, Any]) -> None:
    """The MLP part, run on the stream between the parts, gives the block's output.

    Where there are output projections, the features multiplied by them are what the two parts add to the stream.
    """
    _, trace = pair
    h = trace.embed(zoo.token_ids(5, 4))
    for block in trace.blocks():
        seen = block.observe(h)
        torch.testing.assert_close(seen.output, block.run(h))
        torch.testing.assert_close(block.run_mlp_part(seen.mid) if block.has_parts else block.run(h), seen.output)
        assert block.has_parts == (not torch.equal(seen.mid, h))
        if block.has_projections:
            inner = block.features(h)
            torch.testing.assert_close(h + logits(inner.attention, block.attention_projection), seen.mid)
            torch.testing.assert_close(seen.mid + logits(inner.mlp, block.mlp_projection), seen.output)
        h = seen.output


def test_what_each_architecture_has() -> None:
    """Which families have a stream between their parts, and output projections that can be refitted."""
    by_kind = {}
    for kind, config in zoo.CONFIGS.items():
        anatomy = registry.family(config.model_type).anatomy(config.to_dict())
        by_kind[kind] = (bool(anatomy.mlp_path), anatomy.attention_output is not None)
    assert {kind for kind, (parts, _) in by_kind.items() if not parts} == {"gpt_neox"}
    assert {kind for kind, (_, linear) in by_kind.items() if not linear} == {"gpt_neox", "olmo2", "gemma2", "gemma3"}


def test_substitute_projections(pair: tuple[Any, Any]) -> None:
    """Projections of zeros silence a part; the trained weights come back afterwards."""
    _, trace = pair
    h = trace.embed(zoo.token_ids(5, 4))
    block = next(iter(trace.blocks(stop=1)))
    before = block.run(h)
    if not block.has_projections:
        assert not (hasattr(block, "attention_projection") and hasattr(block, "mlp_projection"))
        return

    def zeros(trained: Projection) -> Projection:
        bias = None if trained.bias is None else torch.zeros_like(trained.bias)
        return Projection(torch.zeros_like(trained.weight), bias)

    silent = block.run(h, attention=zeros(block.attention_projection), mlp=zeros(block.mlp_projection))
    torch.testing.assert_close(silent, h)
    torch.testing.assert_close(block.run(h), before)


def test_weights_live_as_long_as_their_block(pair: tuple[Any, Any]) -> None:
    """A visited block's weights are dropped with it: one block is in memory while a loop looks at the next."""
    _, trace = pair
    alive: list[weakref.ref[torch.Tensor]] = []
    for block in trace.blocks():
        alive.append(weakref.ref(block.parameters[next(iter(block.parameters))]))
        assert sum(reference() is not None for reference in alive) <= 2  # the loop's variable, and the one being read
    del block
    gc.collect()
    assert all(reference() is None for reference in alive)
    assert all(next(block.parameters()).device.type == "meta" for block in trace._blocks)


def test_blocks_from_the_middle(pair: tuple[Any, Any]) -> None:
    """Any stretch of blocks can be visited, again and again."""
    _, trace = pair
    assert [block.index for block in trace.blocks(1, 3)] == [1, 2]
    assert [block.index for block in trace.blocks(2)] == list(range(2, zoo.BLOCKS))


def test_global_random_state_is_left_alone(tmp_path: Path) -> None:
    """Peeling in a process that also trains does not change its random numbers."""
    path = zoo.save(zoo.build("llama", steps=0), tmp_path)
    state = torch.get_rng_state()
    zoo.trace_of(path)
    assert torch.equal(torch.get_rng_state(), state)
