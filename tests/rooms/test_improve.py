"""A better block is handed out only when it is proven."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from peel_agent.errors import NoWitness
from peel_agent.peel import improve
from tests import zoo


def test_no_gradient_no_witness(tmp_path: Path) -> None:
    """A model whose head is all zeros cannot be improved by any block: refused, with the interval."""
    model = zoo.build("llama", steps=0)
    model.lm_head.weight.data.zero_()
    trace = zoo.trace_of(zoo.save(model, tmp_path))
    with pytest.raises(NoWitness, match=r"model.layers.1 has no proven headroom: 0.0000 \[0.0000, 0.0000\]"):
        improve(trace, 1, itertools.count().__next__)


def test_too_few_tokens_no_witness(tmp_path: Path) -> None:
    """Where no fit can be trusted the number of tokens needed is told."""
    trace = zoo.trace_of(zoo.save(zoo.build("llama"), tmp_path), zoo.probe(fit=2))
    with pytest.raises(NoWitness, match=r"24 fit tokens; a fit of 24 columns needs 48"):
        improve(trace, 1, itertools.count().__next__)


def test_only_what_changes_is_handed_out(tmp_path: Path) -> None:
    """The weights are the two output projections under the model's names, in its own layout, and nothing else."""
    for kind, names in (
        ("llama", {"model.layers.2.self_attn.o_proj.weight", "model.layers.2.mlp.down_proj.weight"}),
        ("gpt2", {f"transformer.h.2.{part}.c_proj.{kind}" for part in ("attn", "mlp") for kind in ("weight", "bias")}),
    ):
        model = zoo.build(kind, steps=40)
        improvement = improve(
            zoo.trace_of(zoo.save(model, tmp_path / kind), zoo.probe(200, 40, 80)), 2, itertools.count().__next__
        )
        assert set(improvement.weights) == names
        assert all(weight.shape == model.state_dict()[name].shape for name, weight in improvement.weights.items())
        assert improvement.headroom.low > 0
