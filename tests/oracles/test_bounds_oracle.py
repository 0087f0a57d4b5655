"""The bound oracle obeys what must hold of the method whatever the model."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from tests.oracles import bounds, intervals, least_squares, references
from tests.oracles.decoder import Decoder
from tests.oracles.intervals import Interval
from tests.oracles.random_decoders import CONFIRM, FIT, SELECT, VOCABULARY, WIDTH, either_family, loss, streams_of


@either_family
def test_the_direct_chain_is_the_trained_model(model: Any) -> None:
    """Each block of the direct map is fitted to its own output: the chain is the trained streams to the last bit."""
    decoder = Decoder(*model)
    streams = streams_of(decoder)
    for j, link in enumerate(bounds.chain(decoder, streams, [1, 2, 3])):
        for part, stream in zip(link, streams, strict=True):
            np.testing.assert_array_equal(part, stream[j])


@either_family
def test_a_chain_is_fed_by_itself(model: Any) -> None:
    """Block 2 of the map [3, 3] sees the refitted block 1's output, and comes closer to h_3 than block 1 did."""
    decoder = Decoder(*model)
    streams = streams_of(decoder)
    first, second = bounds.chain(decoder, streams, [3, 3])[1:]
    attention, mlp = references.refit(decoder, 1, first[0], streams.fit[3], first[1], streams.select[3])
    np.testing.assert_array_equal(second[2], decoder.block(1, first[2], attention=attention, mlp=mlp))
    errors = [least_squares.mean_squared_error(g[0], streams.fit[3]) for g in (first, second)]
    assert errors[1] < errors[0]


def test_the_head_is_fitted_as_torch_would() -> None:
    """The head is that of torch's AdamW in float64 on the same batches, kept from the best epoch."""
    rng = np.random.default_rng(13)
    sequences, steps = 90, 25  # 2160 positions: two full batches and a smaller one
    fit, select = (rng.integers(0, VOCABULARY, size=(n, steps)) for n in (sequences, 8))
    directions = rng.normal(size=(VOCABULARY, WIDTH))
    x_fit, x_select = (
        np.concatenate([directions[ids[:, 1:]], np.zeros((len(ids), 1, WIDTH))], axis=1)
        + rng.normal(size=(*ids.shape, WIDTH))
        for ids in (fit, select)
    )
    head, bias = 0.1 * rng.normal(size=(WIDTH, VOCABULARY)), rng.normal(size=VOCABULARY)
    fitted, losses = bounds.fit_head(x_fit, fit, x_select, select, head, bias)

    parameter = torch.nn.Parameter(torch.from_numpy(head.copy()))
    optimiser = torch.optim.AdamW([parameter], lr=5e-4, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)
    rows, targets = torch.from_numpy(x_fit[:, :-1].reshape(-1, WIDTH)), torch.from_numpy(fit[:, 1:].reshape(-1))
    order_rng = np.random.default_rng(0)
    for _ in range(8):
        order = torch.from_numpy(order_rng.permutation(len(rows)))
        for batch in torch.tensor_split(order, [1024, 2048]):
            optimiser.zero_grad()
            logits = rows[batch] @ parameter + torch.from_numpy(bias)
            torch.nn.functional.cross_entropy(logits, targets[batch]).backward()  # type: ignore[no-untyped-call]
            optimiser.step()
    assert len(losses) == 9
    assert losses == sorted(losses, reverse=True)
    np.testing.assert_allclose(fitted, parameter.detach().numpy(), rtol=0, atol=1e-12)


def test_a_head_that_cannot_improve_is_kept() -> None:
    """When the first epoch does not lower the loss on select, the trained head stays and fitting stops."""
    rng = np.random.default_rng(14)
    fit, select = np.full((4, 9), 1), np.full((4, 9), 0)
    features, head = np.abs(rng.normal(size=(4, 9, WIDTH))), rng.normal(size=(WIDTH, VOCABULARY))
    fitted, losses = bounds.fit_head(features, fit, features, select, head, None)
    np.testing.assert_array_equal(fitted, head)
    assert len(losses) == 2
    assert losses[1] > losses[0]


@either_family
def test_suite_picks_on_select_and_publishes_on_confirm(model: Any) -> None:
    """The winner has the least select loss; bound, gap and zone are its numbers on confirm."""
    decoder = Decoder(*model)
    suite = bounds.suite(decoder, FIT, SELECT, CONFIRM, [[1, 2, 3], [3, 3], [2, 3], [3]])
    select_losses = [bound["select_losses"].mean() for bound in suite["bounds"]]
    best = suite["bounds"][suite["winner"]]
    assert select_losses[suite["winner"]] == min(select_losses)
    np.testing.assert_allclose(suite["loss"].value, loss(decoder, CONFIRM).mean(), atol=1e-12)
    assert suite["bound"] == intervals.paired(best["confirm_losses"])
    assert suite["gap"] == intervals.paired(loss(decoder, CONFIRM) - best["confirm_losses"])
    assert suite["zone"] == bounds.zone(suite["gap"])
    assert select_losses[0] <= loss(decoder, SELECT).mean()
    for bound in suite["bounds"]:
        np.testing.assert_allclose(bound["select_losses"].mean(), min(bound["head_select_losses"]), atol=1e-12)
    alone = bounds.bound_of_map(decoder, FIT, SELECT, CONFIRM, [2, 3])
    np.testing.assert_array_equal(alone["confirm_losses"], suite["bounds"][2]["confirm_losses"])


@pytest.mark.parametrize(
    ("gap", "expected"),
    [
        (Interval(0.2, 0.1, 0.3), "caution"),
        (Interval(-0.2, -0.3, -0.1), "effective"),
        (Interval(0.1, -0.1, 0.3), "undecided"),
        (Interval(0.0, 0.0, 0.0), "undecided"),
    ],
)
def test_zone(gap: Interval, expected: str) -> None:
    """A zone is only named when the whole interval of the gap lies on one side of 0."""
    assert bounds.zone(gap) == expected
