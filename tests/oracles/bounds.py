"""Bounds of the run: chains of refitted blocks with a refitted head (method.md 3)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from tests.oracles.decoder import Array, Decoder, Ids, project, token_nll
from tests.oracles.intervals import Interval, paired
from tests.oracles.references import Streams, refit

if TYPE_CHECKING:
    from collections.abc import Sequence

LEARNING_RATE, BETA1, BETA2, EPSILON = 5e-4, 0.9, 0.999, 1e-8
BATCH, EPOCHS = 1024, 8


def chain(decoder: Decoder, streams: Streams, pi: Sequence[int]) -> list[tuple[Array, Array, Array]]:
    """[g_0, ..., g_L'], each a triple of streams on fit, select and confirm.

    Block index k-1 is refitted, fed by g_{k-1}, toward the trained h_{pi(k)}; pi is 1-based.
    """
    links = [(streams.fit[0], streams.select[0], streams.confirm[0])]
    for i, goal in enumerate(pi):
        fit, select, confirm = links[-1]
        attention, mlp = refit(decoder, i, fit, streams.fit[goal], select, streams.select[goal])
        links.append(
            (
                decoder.block(i, fit, attention=attention, mlp=mlp),
                decoder.block(i, select, attention=attention, mlp=mlp),
                decoder.block(i, confirm, attention=attention, mlp=mlp),
            )
        )
    return links


def head_gradient(x: Array, targets: Ids, head: Array, head_bias: Array | None) -> Array:
    """Gradient [d, V] of the mean cross-entropy of rows x [B, d] with targets [B]."""
    logits = project(x, (head, head_bias))
    probabilities = np.exp(logits - logits.max(axis=1, keepdims=True))
    probabilities = probabilities / probabilities.sum(axis=1, keepdims=True)
    probabilities[np.arange(len(x)), targets] -= 1.0
    gradient: Array = x.T @ probabilities / len(x)
    return gradient


def fit_head(
    x_fit: Array, fit: Ids, x_select: Array, select: Ids, head: Array, head_bias: Array | None
) -> tuple[Array, list[float]]:
    """The head [d, V] of the epoch with the least mean select loss, and that loss before and after each epoch.

    x_fit and x_select are normalised features [N, S, d]. AdamW without decay; stops when an epoch does not help.
    """
    rows = x_fit[:, :-1].reshape(-1, x_fit.shape[-1])
    targets = fit[:, 1:].reshape(-1)
    current, best_head = head.copy(), head
    losses = [float(token_nll(x_select, select, head, head_bias).mean())]
    first_moment, second_moment, step = np.zeros_like(head), np.zeros_like(head), 0
    rng = np.random.default_rng(0)
    for _ in range(EPOCHS):
        order = rng.permutation(len(rows))
        for start in range(0, len(rows), BATCH):
            batch = order[start : start + BATCH]
            gradient = head_gradient(rows[batch], targets[batch], current, head_bias)
            step += 1
            first_moment = BETA1 * first_moment + (1 - BETA1) * gradient
            second_moment = BETA2 * second_moment + (1 - BETA2) * gradient**2
            mean = first_moment / (1 - BETA1**step)
            variance = second_moment / (1 - BETA2**step)
            current = current - LEARNING_RATE * mean / (np.sqrt(variance) + EPSILON)
        loss = float(token_nll(x_select, select, current, head_bias).mean())
        improved = loss < min(losses)
        losses.append(loss)
        if not improved:
            break
        best_head = current
    return best_head, losses


def bound_of_map(decoder: Decoder, fit: Ids, select: Ids, confirm: Ids, pi: Sequence[int]) -> dict[str, Any]:
    """The chain of the 1-based target map pi with its fitted head, from token ids [N, S].

    `map`; `value` (Interval on confirm); `confirm_losses` [N] and `select_losses` [N] per sequence; `links` as `chain`
    gives them; `head` [d, V]; `head_select_losses` as `fit_head` gives them.
    """
    streams = Streams(decoder.streams(fit), decoder.streams(select), decoder.streams(confirm))
    links = chain(decoder, streams, pi)
    x_fit, x_select, x_confirm = (decoder.normalise(g) for g in links[-1])
    head, history = fit_head(x_fit, fit, x_select, select, decoder.head(), decoder.head_bias)
    confirm_losses = token_nll(x_confirm, confirm, head, decoder.head_bias).mean(axis=1)
    return {
        "map": tuple(pi),
        "value": paired(confirm_losses),
        "confirm_losses": confirm_losses,
        "select_losses": token_nll(x_select, select, head, decoder.head_bias).mean(axis=1),
        "links": links,
        "head": head,
        "head_select_losses": history,
    }


def suite(decoder: Decoder, fit: Ids, select: Ids, confirm: Ids, maps: Sequence[Sequence[int]]) -> dict[str, Any]:
    """All maps, and the trained model against the winner by select (the first of equals).

    `bounds`: one dict per map as `bound_of_map` gives it; `winner`: its position; `loss`, `bound`, `gap`: Intervals on
    confirm; `zone`.
    """
    trained = decoder.nll(decoder.streams(confirm)[-1], confirm)
    bounds = [bound_of_map(decoder, fit, select, confirm, pi) for pi in maps]
    winner = int(np.argmin([bound["select_losses"].mean() for bound in bounds]))
    gap = paired(trained - bounds[winner]["confirm_losses"])
    return {
        "bounds": bounds,
        "winner": winner,
        "loss": paired(trained),
        "bound": bounds[winner]["value"],
        "gap": gap,
        "zone": zone(gap),
    }


def zone(gap: Interval) -> str:
    """`caution`: the construction beats the run; `effective`: the run beats it; else `undecided`."""
    if gap.low > 0:
        return "caution"
    return "effective" if gap.high < 0 else "undecided"
