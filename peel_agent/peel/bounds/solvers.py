"""How a chain's block is fitted to a hidden state: `closed_form` (refit) or the paper's `descent` (method.md 2, 3)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from peel_agent.errors import ConfigurationError
from peel_agent.peel.numerics.streams import Streams, pieces, through
from peel_agent.peel.references import refit
from peel_agent.records import Block, Chunk

DESCENT_STEPS = 6
DESCENT_LEARNING_RATE = 1e-3

Fit = Callable[[Block, Streams, Sequence[Streams], Chunk], Iterator[Streams]]


@dataclass(frozen=True)
class Solver:
    """`solve(block, inputs, targets, chunk)` fits a block that is fed `inputs` to each target; the fitted outputs.

    `warm` solvers start from the trained block, so that one aimed at its own output, and fed its own input, stays as it
    is. `least_squares` solvers need enough fit tokens for their widths.
    """

    name: str
    solve: Fit
    warm: bool
    least_squares: bool


def solver_named(name: str) -> Solver:
    """The solver of this name; ConfigurationError lists those that there are."""
    if name not in SOLVERS:
        raise ConfigurationError(f"no solver is called `{name}`", remedy=f"use one of: {', '.join(SOLVERS)}")
    return SOLVERS[name]


def _closed_form(block: Block, inputs: Streams, targets: Sequence[Streams], chunk: Chunk) -> Iterator[Streams]:
    for fitted in refit(block, inputs, targets, chunk):
        fit = through(partial(block.run_mlp_part, mlp=fitted.mlp), fitted.mid, chunk)
        confirm = through(fitted.run, inputs.confirm, chunk)
        yield Streams(fit, torch.cat([fitted.select, confirm]), inputs.selecting)


def _descent(block: Block, inputs: Streams, targets: Sequence[Streams], chunk: Chunk) -> Iterator[Streams]:
    return (descend(block, {**block.parameters, **block.latents}, inputs, target, chunk) for target in targets)


def _descent_cold(block: Block, inputs: Streams, targets: Sequence[Streams], chunk: Chunk) -> Iterator[Streams]:
    return (descend(block, block.initial_parameters(), inputs, target, chunk) for target in targets)


SOLVERS = {
    solver.name: solver
    for solver in (
        Solver("closed_form", _closed_form, warm=True, least_squares=True),
        Solver("descent", _descent, warm=True, least_squares=False),
        Solver("descent_cold", _descent_cold, warm=False, least_squares=False),
    )
}


def descend(block: Block, start: Mapping[str, Tensor], inputs: Streams, targets: Streams, chunk: Chunk) -> Streams:
    """The paper's fit: 6 AdamW steps at 1e-3 on the mean squared error to the target over all of `fit`.

    Every parameter of the block is free; those in a weight set are latents, quantised on the way forward and given the
    gradient of the identity. Each step uses the gradient over the whole of `fit`, added up chunk by chunk.
    """
    free = {name: tensor.detach().clone().requires_grad_() for name, tensor in start.items()}
    optimiser = torch.optim.AdamW(free.values(), lr=DESCENT_LEARNING_RATE, weight_decay=0.0)
    elements = inputs.fit.numel()

    def gradients(h: Tensor, target: Tensor) -> tuple[Tensor, ...]:
        loss = (block.run_with(h, free) - target).square().sum() / elements
        return torch.autograd.grad(loss, list(free.values()))

    for _ in range(DESCENT_STEPS):
        optimiser.zero_grad()
        for piece_gradients in pieces(gradients, chunk, inputs.fit, targets.fit):
            for tensor, gradient in zip(free.values(), piece_gradients, strict=True):
                tensor.grad = gradient if tensor.grad is None else tensor.grad + gradient
        optimiser.step()
    fitted = {name: tensor.detach() for name, tensor in free.items()}
    return inputs.through(lambda h: block.run_with(h, fitted), chunk)
