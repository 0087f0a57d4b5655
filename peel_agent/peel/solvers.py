"""How a block of a chain is fitted to a hidden state: `closed_form` (refit) or the paper's `descent` (METHOD 2, 3)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from peel_agent.errors import ConfigurationError
from peel_agent.peel.references import refit
from peel_agent.peel.streams import Streams
from peel_agent.records import Block

DESCENT_STEPS = 6
DESCENT_LEARNING_RATE = 1e-3

Run = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Solver:
    """`solve` fits a block that is fed `inputs` to `targets` and returns the fitted block's function.

    `warm` solvers start from the trained block, so that one aimed at its own output, and fed its own input, stays as it
    is. `least_squares` solvers need enough fit tokens for their widths.
    """

    name: str
    solve: Callable[[Block, Streams, Streams, int], Run]
    warm: bool
    least_squares: bool


def solver_named(name: str) -> Solver:
    """The solver of this name; ConfigurationError lists those that there are."""
    if name not in SOLVERS:
        raise ConfigurationError(f"no solver is called `{name}`", remedy=f"use one of: {', '.join(SOLVERS)}")
    return SOLVERS[name]


def _closed_form(block: Block, inputs: Streams, targets: Streams, chunk: int) -> Run:
    return refit(block, inputs, targets, chunk).run


def _descent(block: Block, inputs: Streams, targets: Streams, chunk: int) -> Run:
    return descend(block, block.parameters, inputs, targets, chunk)


def _descent_cold(block: Block, inputs: Streams, targets: Streams, chunk: int) -> Run:
    return descend(block, block.initial_parameters(), inputs, targets, chunk)


SOLVERS = {
    solver.name: solver
    for solver in (
        Solver("closed_form", _closed_form, warm=True, least_squares=True),
        Solver("descent", _descent, warm=True, least_squares=False),
        Solver("descent_cold", _descent_cold, warm=False, least_squares=False),
    )
}


def descend(block: Block, start: Mapping[str, Tensor], inputs: Streams, targets: Streams, chunk: int) -> Run:
    """The paper's fit: 6 AdamW steps at 1e-3 on the mean squared error to the target over all of `fit`.

    Every parameter of the block is free. Each step uses the gradient over the whole of `fit`, added up chunk by chunk.
    """
    free = {name: tensor.detach().clone().requires_grad_() for name, tensor in start.items()}
    optimiser = torch.optim.AdamW(free.values(), lr=DESCENT_LEARNING_RATE, weight_decay=0.0)
    elements = inputs.fit.numel()
    for _ in range(DESCENT_STEPS):
        optimiser.zero_grad()
        for h, target in zip(inputs.fit.split(chunk), targets.fit.split(chunk), strict=True):
            loss = (block.run_with(h, free) - target).square().sum() / elements
            loss.backward()
        optimiser.step()
    fitted = {name: tensor.detach() for name, tensor in free.items()}
    return lambda h: block.run_with(h, fitted)
