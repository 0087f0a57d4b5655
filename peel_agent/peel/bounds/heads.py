"""A construction's output matrix, fitted by cross-entropy on `fit` and stopped on `select` (method.md 3, step 3)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from peel_agent.peel.numerics.losses import Losses, logits, position_losses, sequence_losses
from peel_agent.peel.numerics.streams import Streams, score_ids, through
from peel_agent.precision import coarse_products, quantise, straight_through
from peel_agent.records import HeadPiece, Projection, TokenIds, Trace

LEARNING_RATE = 5e-4
BATCH_POSITIONS = 1024
MAX_EPOCHS = 8
SHUFFLE_SEED = 0


def fit_head(trace: Trace, ends: Streams, alive: Callable[[], None] = lambda: None) -> Projection:
    """The trained head refitted to the last streams `ends` of a construction; blocks and final norm stay as they are.

    AdamW at the paper's 5e-4 from the trained head; one in a weight set is fitted by its latents, as it was trained.
    After each epoch the loss on `select` is measured; the first epoch that does not lower it ends the fit. Returns the
    head with the least loss on `select`: at worst the trained one. `alive` is called after each step: an epoch over a
    large vocabulary takes long.
    """
    probe = trace.probe
    features, targets = _positions(trace, ends.fit, probe.fit)
    select_features, select_targets = _positions(trace, ends.select, probe.select)
    best = trace.head
    weight_set = trace.head_set
    best_loss = float(position_losses(select_features, select_targets, best).mean())
    weight = trace.head_latents.clone().requires_grad_()
    optimiser = torch.optim.AdamW([weight], lr=LEARNING_RATE, weight_decay=0.0)
    generator = np.random.default_rng(SHUFFLE_SEED)
    for _ in range(MAX_EPOCHS):
        with coarse_products(weight.device):  # gradients; what the head is worth is measured in float32
            _run_epoch(
                head=lambda: replace(trace.head, weight=straight_through(weight.T, weight_set).T),
                optimiser=optimiser,
                features=features,
                targets=targets,
                generator=generator,
                alive=alive,
            )
        head = replace(trace.head, weight=quantise(weight.detach().T, weight_set).T.clone())
        loss = float(position_losses(select_features, select_targets, head).mean())
        if not loss < best_loss:
            break
        best, best_loss = head, loss
    return best


def head_losses(trace: Trace, piece: HeadPiece, alive: Callable[[], None] = lambda: None) -> Losses:
    """Losses per score sequence of a construction, with the head that is fitted to its last streams."""
    device = trace.head.weight.device
    fit, score = (torch.tensor(stream, device=device) for stream in (piece.fit, piece.score))  # in torch's alignment
    head = fit_head(trace, Streams(fit, score, piece.selecting), alive)
    return sequence_losses(trace, score, score_ids(trace.probe), head)


def _positions(trace: Trace, stream: Tensor, ids: TokenIds) -> tuple[Tensor, Tensor]:
    """Head features [n, d] and next tokens [n] of every predicted position, row by row."""
    features = through(trace.normalise, stream, trace.chunk)[:, :-1].flatten(0, 1)
    return features, torch.from_numpy(ids[:, 1:]).to(features.device).flatten()


def _run_epoch(
    *,
    head: Callable[[], Projection],
    optimiser: torch.optim.Optimizer,
    features: Tensor,
    targets: Tensor,
    generator: np.random.Generator,
    alive: Callable[[], None],
) -> None:
    order = torch.from_numpy(generator.permutation(len(targets))).to(targets.device)
    for batch in order.split(BATCH_POSITIONS):
        optimiser.zero_grad()
        loss = functional.cross_entropy(logits(features[batch], head()), targets[batch])
        loss.backward()
        optimiser.step()
        alive()
