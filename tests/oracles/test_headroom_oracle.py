"""The headroom and redundancy oracles obey what must hold whatever the model."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.oracles import headroom, margins
from tests.oracles.decoder import Decoder
from tests.oracles.intervals import Interval, paired
from tests.oracles.random_decoders import BLOCKS, CONFIRM, FIT, SELECT, either_family, loss, silence
from tests.oracles.redundancy import redundancy
from tests.oracles.references import loss_after
from tests.oracles.weight_sets import round_in_gram

PROBE = (FIT, SELECT, CONFIRM)
INT4 = {"attention": "int4-channel", "mlp": "int4-channel"}


def summed_loss(decoder: Decoder, i: int, out: Any) -> float:
    """J on fit when `out` follows block i."""
    return float(loss_after(decoder, i, out, FIT).sum() * (FIT.shape[1] - 1))


def fit_loss(decoder: Decoder, i: int, changed: headroom.Change) -> float:
    return float(headroom.losses(decoder, i, decoder.streams(FIT)[i], FIT, changed).sum() * (FIT.shape[1] - 1))


# ---------------------------------------------------------------- gradients and steps


@either_family
@pytest.mark.parametrize("i", range(BLOCKS))
def test_gradients_are_the_slopes_of_the_loss(model: Any, i: int) -> None:
    """Both gradients agree with central differences of the numpy decoder at every token and along random directions."""
    decoder = Decoder(*model)
    seen = decoder.inside(i, decoder.streams(FIT)[i])
    found = headroom.gradients(decoder, i, seen.mid, FIT)
    assert found.value == pytest.approx(summed_loss(decoder, i, seen.out), rel=1e-12)

    rng, step = np.random.default_rng(20), 1e-5
    tangents = list(rng.normal(size=(4, *seen.mid.shape)))
    for token in range(FIT.shape[1]):
        tangent = np.zeros_like(seen.mid)
        tangent[rng.integers(len(FIT)), token] = rng.normal(size=seen.mid.shape[-1])
        tangents.append(tangent)
    for tangent in tangents:
        at_out = [summed_loss(decoder, i, seen.out + sign * step * tangent) for sign in (1, -1)]
        at_mid = [summed_loss(decoder, i, decoder.mlp_part(i, seen.mid + sign * step * tangent)) for sign in (1, -1)]
        for (up, down), gradient in ((at_out, found.at_out), (at_mid, found.at_mid)):
            np.testing.assert_allclose((gradient * tangent).sum(), (up - down) / (2 * step), rtol=1e-6, atol=1e-7)


@either_family
def test_the_last_token_has_no_gradient(model: Any) -> None:
    """Nothing is predicted from the last token of a sequence."""
    decoder = Decoder(*model)
    found = headroom.gradients(decoder, 1, decoder.inside(1, decoder.streams(FIT)[1]).mid, FIT)
    assert not found.at_mid[:, -1].any()
    assert not found.at_out[:, -1].any()


@either_family
@pytest.mark.parametrize("target", headroom.TARGETS)
def test_a_step_descends_at_the_rate_of_its_direction(model: Any, target: str) -> None:
    """A tiny step along D lowers the loss on fit by eta <D, X'G>, weights and bias, with X'G = (X'X + lam I) D."""
    decoder = Decoder(*model)
    of_part = headroom.steps(decoder, 1, FIT)
    for r in headroom.RIDGES:
        rho, slope, changed = 1e-5, 0.0, {}
        for part in headroom.TARGETS[target]:
            trained, X, directions, norm = of_part[part]
            D = directions[r]
            eta = rho * norm / np.linalg.norm(X @ D)
            gram = X.T @ X
            slope += eta * (D * ((gram + r * np.diag(gram).mean() * np.eye(len(gram))) @ D)).sum()
            changed[part] = headroom.stepped(of_part[part], r, rho)
            assert (trained[1] is None) == (changed[part][1] is None)
        drop = fit_loss(decoder, 1, {}) - fit_loss(decoder, 1, changed)
        assert slope > 0
        assert drop == pytest.approx(slope, rel=1e-2)


@either_family
def test_a_step_has_its_relative_length(model: Any) -> None:
    """The change of the part's output on fit has rho times the norm of that output."""
    decoder = Decoder(*model)
    h = decoder.streams(FIT)[1]
    trained = decoder.inside(1, h)
    of_part = headroom.steps(decoder, 1, FIT)
    for rho in headroom.FREE_STEPS:
        changed = decoder.inside(1, h, attention=headroom.stepped(of_part["attention"], 1e-1, rho))
        assert np.linalg.norm(changed.mid - trained.mid) == pytest.approx(rho * np.linalg.norm(trained.mid - h))
        changed = decoder.inside(1, h, mlp=headroom.stepped(of_part["mlp"], 1e-3, rho))
        assert np.linalg.norm(changed.out - trained.out) == pytest.approx(
            rho * np.linalg.norm(trained.out - trained.mid)
        )


@either_family
def test_candidates_come_in_their_order(model: Any) -> None:
    """No change, then the strong ridge before the weak one with growing steps; a target changes its own parts only."""
    decoder = Decoder(*model)
    of_part = headroom.steps(decoder, 1, FIT)
    for target, parts in headroom.TARGETS.items():
        tried = headroom.candidates(of_part, target)
        assert tried[0] == {}
        assert [set(changed) for changed in tried[1:]] == [set(parts)] * 6
        for k, (r, rho) in enumerate([(r, rho) for r in (0.1, 0.001) for rho in (0.03, 0.1, 0.3)]):
            for part in parts:
                expected = headroom.stepped(of_part[part], r, rho)[0]
                np.testing.assert_array_equal(tried[1 + k][part][0], expected)


# ---------------------------------------------------------------- headroom and shares


@either_family
def test_headroom_is_judged_on_confirm(model: Any) -> None:
    """The winner is the best on select, never worse there than the trained block, and confirm decides its value."""
    decoder = Decoder(*model)
    of_part = headroom.steps(decoder, 1, FIT)
    for target, report in headroom.headroom(decoder, 1, *PROBE).items():
        winner = headroom.candidates(of_part, target)[report["candidate"]]
        h = decoder.streams(CONFIRM)[1]
        expected = loss(decoder, CONFIRM) - headroom.losses(decoder, 1, h, CONFIRM, winner)
        assert report["estimate"] == paired(expected)
        ordered = sorted(report["select_losses"])
        assert report["select_losses"][report["candidate"]] == ordered[0] <= loss(decoder, SELECT).mean()
        assert report["margin_on_select"] == ordered[1] - ordered[0]


@either_family
def test_the_random_block_has_headroom(model: Any) -> None:
    """An untrained decoder is improved by every target, on tokens that it has not seen."""
    for report in headroom.headroom(Decoder(*model), 1, *PROBE).values():
        assert report["candidate"] > 0
        assert report["estimate"].low > 0


@either_family
def test_a_flat_loss_has_no_headroom(model: Any) -> None:
    """Where the head ignores the stream, all candidates are equal: the first one, no change, wins."""
    weights, config = model
    weights = {name: np.zeros_like(value) if name == "lm_head.weight" else value for name, value in weights.items()}
    norm = "model.norm" if config["model_type"] == "llama" else "transformer.ln_f"
    weights |= {name: np.zeros_like(weights[name]) for name in (f"{norm}.weight", f"{norm}.bias") if name in weights}
    for report in headroom.headroom(Decoder(weights, config), 1, *PROBE).values():
        assert report["candidate"] == 0
        assert report["estimate"] == Interval(0.0, 0.0, 0.0)
        assert report["margin_on_select"] == 0.0


@either_family
def test_set_candidates_lie_in_their_sets(model: Any) -> None:
    """Inside int sets a changed weight matrix has no more levels a row than codes; the bias is as free as without."""
    of_part = headroom.steps(Decoder(*model), 1, FIT)
    for r, rho in [(r, rho) for r in headroom.RIDGES for rho in headroom.SET_STEPS]:
        for part, name in INT4.items():
            weight, bias = headroom.stepped(of_part[part], r, rho, name)
            assert max(len(np.unique(np.round(row, 9))) for row in weight.T) <= 15 * max(1, weight.shape[0] // 4)
            np.testing.assert_array_equal(bias, headroom.stepped(of_part[part], r, rho)[1])


@either_family
def test_set_candidates_are_the_compensated_roundings_of_the_free_ones(model: Any) -> None:
    """In order: the free step's weights, rounded in the Gram matrix of the trained block's features without ones."""
    decoder = Decoder(*model)
    of_part, sets = headroom.steps(decoder, 1, FIT), {"attention": "sign", "mlp": "int3-g7"}
    seen = decoder.inside(1, decoder.streams(FIT)[1])
    features = {"attention": seen.attention_features, "mlp": seen.mlp_features}
    tried = headroom.candidates(of_part, "block", sets)
    for k, (r, rho) in enumerate([(r, rho) for r in (0.1, 0.001) for rho in (0.1, 0.3, 1.0)]):
        for part, name in sets.items():
            H = np.einsum("nsp,nsq->pq", features[part], features[part])
            expected = round_in_gram(headroom.stepped(of_part[part], r, rho)[0].T, H, name).T
            np.testing.assert_allclose(tried[1 + k][part][0], expected, atol=1e-10)


@either_family
def test_a_fine_set_is_no_set(model: Any) -> None:
    """At 20 bits the candidates shared by the two grids of steps have the losses of the unrestricted ones."""
    decoder = Decoder(*model)
    fine = headroom.headroom(decoder, 1, *PROBE, sets={"attention": "int20-channel", "mlp": "int20-channel"})
    free = headroom.headroom(decoder, 1, *PROBE)
    for target in headroom.TARGETS:
        shared = [free[target]["select_losses"][k] for k in (0, 2, 3, 5, 6)]
        np.testing.assert_allclose([fine[target]["select_losses"][k] for k in (0, 1, 2, 4, 5)], shared, atol=1e-4)


@either_family
def test_a_part_without_a_set_is_free(model: Any) -> None:
    """A set for the MLP leaves the target "attention" as it is without sets."""
    decoder = Decoder(*model)
    mixed = headroom.headroom(decoder, 1, *PROBE, sets={"mlp": "sign"})["attention"]
    assert mixed["select_losses"] == headroom.headroom(decoder, 1, *PROBE)["attention"]["select_losses"]


@either_family
def test_the_shares_add_up_to_the_free_headroom(model: Any) -> None:
    """Optimization share + quantization share = headroom of the block without a set."""
    decoder = Decoder(*model)
    found = headroom.shares(decoder, 1, *PROBE, INT4)
    total = sum(share.value for share in found.values())
    assert total == pytest.approx(headroom.headroom(decoder, 1, *PROBE)["block"]["estimate"].value, abs=1e-12)


# ---------------------------------------------------------------- redundancy


@either_family
def test_redundancy_of_two_blocks_is_the_previous_reference(model: Any) -> None:
    """Block l in place of l and l+1 loses what the margin of block l+1 reports for its reference `previous`."""
    decoder = Decoder(*model)
    matrix = redundancy(decoder, *PROBE)
    assert not np.tril(matrix).any()
    for block in margins.block_margins(decoder, *PROBE)[1:]:
        i = block["index"]
        assert matrix[i - 1, i] == pytest.approx(block["references"]["previous"], abs=1e-12)


@either_family
def test_silent_blocks_are_redundant(model: Any) -> None:
    """The block before a run of blocks that pass the stream on replaces them at no loss."""
    weights, config = model
    for i in (1, 2):
        for part in (0, 1):
            weights = silence(weights, config, i, part)
    matrix = redundancy(Decoder(weights, config), *PROBE)
    np.testing.assert_array_equal(matrix, np.zeros((BLOCKS, BLOCKS)))
