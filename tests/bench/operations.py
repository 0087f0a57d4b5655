"""What a peel costs in multiplications and additions: counted in real peels of small models, and a law fitted to them.

Counts are the same on any machine, however busy. The law is a sum of terms that each have a reason (TERMS); its factors
are fitted to the counts, and held against models that they were not fitted to.
"""

from __future__ import annotations

import dataclasses
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from scipy.optimize import nnls
from torch.utils.flop_counter import FlopCounterMode

from peel_agent.capture.trace import BlockwiseTrace
from peel_agent.peel import peel
from peel_agent.peel.margins.heats import usual_sequences
from peel_agent.records import Plan, Probe
from tests.bench.shapes import Shape, compared, earning, idle, step_back, trace_at

QUICK = Plan(frozenset({"margin"}), ("skip", "affine"), "ends", parts=False, few_sequences=True)
MARGINS = Plan(frozenset({"margin"}), ("skip", "affine", "previous"), "ends")
BOUNDS = Plan(frozenset({"bounds"}), (), "ends")


@dataclass(frozen=True)
class Size:
    """A decoder and its probe, as far as they decide what a peel costs.

    `block` counts the weights of a block, `inner` is the width of its MLP; `fit`, `select` and `confirm` are sequences
    of `context` tokens.
    """

    width: int
    blocks: int
    inner: int
    vocabulary: int
    block: int
    context: int
    fit: int
    select: int
    confirm: int

    @property
    def score(self) -> int:
        """Tokens that are scored."""
        return self.context * (self.select + self.confirm)

    @property
    def heat(self) -> int:
        """Tokens of the race's first heat where it takes whole sequences."""
        return self.context * sum(usual_sequences(self.select, self.confirm))

    def through_block(self, tokens: float) -> float:
        """A block on so many tokens: two for each weight, and attention's two products of context by width."""
        return tokens * (2 * self.block + 4 * self.context * self.width)

    def through_head(self, tokens: float) -> float:
        return tokens * 2 * self.width * self.vocabulary

    def forward(self) -> float:
        """One plain forward pass over the whole probe, loss included."""
        tokens = self.context * self.fit + self.score
        return self.blocks * self.through_block(tokens) + self.through_head(tokens)


TERMS: Mapping[str, Callable[[Size, int], float]] = {
    "blocks on the whole probe": lambda size, heat: (
        size.blocks * size.through_block(size.context * size.fit + size.score)
    ),
    "copies of the stream through all later blocks": lambda size, heat: (
        size.blocks * (size.blocks - 1) / 2 * size.through_block(heat)
    ),
    "copies scored by the head": lambda size, heat: size.blocks * size.through_head(heat),
    "the head on the whole probe": lambda size, heat: size.through_head(size.context * size.fit + size.score),
    "one block on the whole probe": lambda size, heat: size.through_block(size.context * size.fit + size.score),
    "normal equations of the stream": lambda size, heat: size.blocks * size.context * size.fit * size.width**2,
    "normal equations of the MLP": lambda size, heat: size.blocks * size.context * size.fit * size.inner**2,
    "normal equations of the MLP, one block": lambda size, heat: size.context * size.fit * size.inner**2,
    "solutions in the stream": lambda size, heat: size.blocks * float(size.width) ** 3,
    "solutions in the MLP": lambda size, heat: size.blocks * float(size.inner) ** 3,
    "solutions in the MLP, one block": lambda size, heat: float(size.inner) ** 3,
}
"""Operations of each kind, for a model and the tokens on which copies of the stream are run."""


def size_of(shape: Shape, probe: Probe) -> Size:
    """A bench model with its probe, its weights counted."""
    layer = shape.model().model.layers[0]
    block = sum(weight.numel() for weight in layer.parameters() if weight.ndim == 2)
    counts = (len(probe.fit), len(probe.select), len(probe.confirm))
    return Size(shape.width, shape.blocks, shape.inner * shape.width, shape.vocabulary, block, shape.sequence, *counts)


# ---------------------------------------------------------------- counted


@dataclass(frozen=True)
class Counted:
    """What peels of one model did: operations, and how often each block was read, by plan."""

    size: Size
    operations: Mapping[str, float]
    reads: Mapping[str, float]


def _attention(query: Sequence[int], key: Sequence[int], value: Sequence[int], *_: Any, **__: Any) -> int:
    batch, heads, rows, width = query
    return 2 * batch * heads * rows * key[-2] * (width + value[-1])


OPERATIONS = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    torch.ops.aten.linalg_cholesky_ex: lambda matrix, *_, **__: matrix[-1] ** 3 // 3,
    torch.ops.aten.cholesky_solve: lambda wanted, factor, *_, **__: 2 * factor[-1] ** 2 * wanted[-1],
    torch.ops.aten._linalg_eigh: lambda matrix, *_, **__: 9 * matrix[-1] ** 3,
}
"""What torch's counter does not count by itself."""


def counted(work: Callable[[], object]) -> float:
    """Multiplications and additions of matrix products, attention and factorisations, as torch ran them."""
    with FlopCounterMode(display=False, custom_mapping=OPERATIONS) as counter:
        work()
    return float(counter.get_total_flops())


def count(shape: Shape, *, early: bool = False) -> Counted:
    """Peels a model in which every block earns its place, or `early` in a run, in which none does yet."""
    with tempfile.TemporaryDirectory() as name:
        now, before = Path(name) / "now", Path(name) / "before"
        probe = idle(now, shape) if early else earning(now, shape, "cpu")
        step_back(now, before)
        work = {
            "quick": lambda: peel(trace_at(now, probe, "cpu"), QUICK, time.perf_counter),
            "margins": lambda: compared(now, before, probe, MARGINS),
            "bounds": lambda: peel(trace_at(now, probe, "cpu"), BOUNDS, time.perf_counter),
        }
        operations, reads = {}, {}
        for plan, run in work.items():
            with mock.patch.object(BlockwiseTrace, "_block", autospec=True, side_effect=BlockwiseTrace._block) as visit:
                operations[plan] = counted(run)
            reads[plan] = visit.call_count / shape.blocks
        return Counted(size_of(shape, probe), operations, reads)


# ---------------------------------------------------------------- fitted


@dataclass(frozen=True)
class Law:
    """Operations of a plan: factors of TERMS, none below 0. `worst` is the largest relative error on other models."""

    factors: Mapping[str, float]
    worst: float = 0.0

    def operations(self, size: Size, *, early: bool = False) -> float:
        """With every block earning; with `early` no block does yet, and every stand-in is measured on all sequences."""
        heat = size.score if early else size.heat
        return sum(factor * TERMS[term](size, heat) for term, factor in self.factors.items())


def fitted(plan: str, seen: Sequence[Counted], held_out: Sequence[Counted]) -> Law:
    """The law of a plan from the counts `seen`, least squares in relative errors; and its error on those `held_out`."""
    rows = [[term(one.size, one.size.heat) / one.operations[plan] for term in TERMS.values()] for one in seen]
    factors, _ = nnls(np.array(rows), np.ones(len(rows)))
    law = Law({term: float(factor) for term, factor in zip(TERMS, factors, strict=True) if factor > 0})
    errors = [abs(law.operations(one.size) / one.operations[plan] - 1) for one in held_out]
    return dataclasses.replace(law, worst=max(errors, default=0.0))


BASE = Shape(width=64, blocks=4, tokens=11_264, vocabulary=256, sequence=32)
SEEN = (
    BASE,
    dataclasses.replace(BASE, blocks=8),
    dataclasses.replace(BASE, blocks=14),
    dataclasses.replace(BASE, width=128),
    dataclasses.replace(BASE, width=192, blocks=3),
    dataclasses.replace(BASE, width=128, inner=3, blocks=6),
    dataclasses.replace(BASE, inner=2, blocks=6),
    dataclasses.replace(BASE, tokens=22_528),
    dataclasses.replace(BASE, sequence=128, tokens=22_528),
    dataclasses.replace(BASE, vocabulary=2048),
    dataclasses.replace(BASE, width=128, vocabulary=1024, blocks=10),
    dataclasses.replace(BASE, sequence=64, blocks=10),
)
HELD_OUT = (
    dataclasses.replace(BASE, width=128, blocks=16),
    dataclasses.replace(BASE, width=192, blocks=8, inner=3, vocabulary=512),
    dataclasses.replace(BASE, width=64, blocks=20, sequence=64, tokens=16_384),
)
"""Larger than any of SEEN in what they differ in."""


def laws(seen: Sequence[Counted], held_out: Sequence[Counted]) -> dict[str, Law]:
    """The law of every plan."""
    return {plan: fitted(plan, seen, held_out) for plan in seen[0].operations}
