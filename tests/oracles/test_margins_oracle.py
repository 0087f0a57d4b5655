"""The reference and margin oracles obey what must hold of the method whatever the model."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.oracles import least_squares, margins, references
from tests.oracles.decoder import Decoder
from tests.oracles.intervals import Interval
from tests.oracles.random_decoders import (
    CONFIRM,
    FIT,
    SELECT,
    WIDTH,
    either_family,
    loss,
    remove_block,
    silence,
    store,
    streams_of,
)

# ---------------------------------------------------------------- references


@either_family
def test_refit_toward_its_own_output_changes_nothing(model: Any) -> None:
    """A block that already meets its target keeps its trained projections to the last bit."""
    decoder = Decoder(*model)
    fit, select, _ = streams_of(decoder)
    refitted = references.refit(decoder, 1, fit[1], fit[2], select[1], select[2])
    for (weight, bias), (trained_weight, trained_bias) in zip(refitted, decoder.projections(1), strict=True):
        np.testing.assert_array_equal(weight, trained_weight)
        assert (bias is None) == (trained_bias is None)
        if bias is not None and trained_bias is not None:
            np.testing.assert_array_equal(bias, trained_bias)


@either_family
def test_refit_recovers_a_changed_attention_projection(model: Any) -> None:
    """Where the MLP is silent, refit finds the attention projection that made the target, weights and bias."""
    weights, config = model
    decoder = Decoder(silence(weights, config, 1, 1), config)
    weight, bias = decoder.projections(1)[0]
    goal = (weight + 0.3 * np.random.default_rng(9).normal(size=weight.shape), None if bias is None else bias + 0.3)
    fit, select, confirm = streams_of(decoder)
    targets = [decoder.block(1, stream[1], attention=goal) for stream in (fit, select, confirm)]
    attention, mlp = references.refit(decoder, 1, fit[1], targets[0], select[1], targets[1])
    np.testing.assert_allclose(attention[0], goal[0], atol=1e-3)
    output = decoder.block(1, confirm[1], attention=attention, mlp=mlp)
    np.testing.assert_allclose(output, targets[2], atol=1e-3)


@either_family
def test_refit_steps_solve_their_normal_equations(model: Any) -> None:
    """Each step's change dW meets X'(E - X dW) = lam dW for one r of the grid, the second step after the first."""
    decoder = Decoder(*model)
    fit, select, _ = streams_of(decoder)
    attention, mlp = references.refit(decoder, 1, fit[1], fit[3], select[1], select[3])
    trained_attention, trained_mlp = decoder.projections(1)
    first, second = decoder.inside(1, fit[1]), decoder.inside(1, fit[1], attention=attention)
    for features, out, refitted, trained in (
        (first.attention_features, first.out, attention, trained_attention),
        (second.mlp_features, second.out, mlp, trained_mlp),
    ):
        X, E = features.reshape(-1, features.shape[-1]), (fit[3] - out).reshape(-1, WIDTH)
        dW = refitted[0] - trained[0]
        if refitted[1] is not None:
            assert trained[1] is not None
            X, dW = np.hstack([X, np.ones((len(X), 1))]), np.vstack([dW, refitted[1] - trained[1]])
        assert np.abs(dW).max() > 0.01
        forces = [r * (X**2).sum(axis=0).mean() * dW for r in least_squares.GRID]
        assert any(np.allclose(X.T @ (E - X @ dW), force, rtol=0, atol=1e-9) for force in forces)


@either_family
def test_refit_is_never_worse_than_the_trained_block_on_select(model: Any) -> None:
    """Doing nothing is among the candidates, so the error on select cannot rise, even toward noise."""
    decoder = Decoder(*model)
    fit, select, _ = streams_of(decoder)
    rng = np.random.default_rng(10)
    T_fit, T_sel = (stream[2] + rng.normal(size=stream[2].shape) for stream in (fit, select))
    attention, mlp = references.refit(decoder, 1, fit[1], T_fit, select[1], T_sel)
    refitted = decoder.block(1, select[1], attention=attention, mlp=mlp)
    before = least_squares.mean_squared_error(select[2], T_sel)
    assert least_squares.mean_squared_error(refitted, T_sel) <= before


@either_family
def test_trust_begins_at_twice_the_columns(model: Any) -> None:
    """affine needs 2 (d+1) tokens, refit twice its widest problem; one token less is not enough."""
    decoder = Decoder(*model)
    widest = 14 + (model[1]["model_type"] == "gpt2")
    for tokens, affine, refit in (
        (2 * (WIDTH + 1), True, False),
        (2 * (WIDTH + 1) - 1, False, False),
        (2 * widest, True, True),
        (2 * widest - 1, True, False),
    ):
        stream = np.zeros((1, tokens, WIDTH))
        assert references.affine_is_trusted(stream) == affine
        assert references.refit_is_trusted(decoder, 1, stream) == refit


@either_family
def test_spliced_losses_are_those_of_rebuilt_models(model: Any) -> None:
    """skip, previous and the skipped parts give the losses of models whose state dict was changed accordingly."""
    weights, config = model
    decoder = Decoder(weights, config)
    streams = streams_of(decoder)

    def spliced(stand_ins: references.References, name: str) -> Any:
        return references.loss_after(decoder, 1, stand_ins.trusted[name].confirm, CONFIRM)

    stand_ins = references.block_references(decoder, 1, streams)
    expected = loss(remove_block(weights, config, 1), CONFIRM)
    np.testing.assert_allclose(spliced(stand_ins, "skip"), expected, atol=1e-12)

    fit, select, _ = streams
    reaching = references.refit(decoder, 0, fit[0], fit[2], select[0], select[2])
    changed = weights
    for part, (weight, bias) in enumerate(reaching):
        changed = store(changed, config, 0, part, weight, bias)
    expected = loss(remove_block(changed, config, 1), CONFIRM)
    np.testing.assert_allclose(spliced(stand_ins, "previous"), expected, atol=1e-12)

    for number, name in enumerate(references.PARTS):
        expected = loss(Decoder(silence(weights, config, 1, number), config), CONFIRM)
        stand_ins = references.part_references(decoder, 1, name, streams)
        np.testing.assert_allclose(spliced(stand_ins, "skip"), expected, atol=1e-12)


@either_family
def test_the_affine_block_reference_nears_the_output(model: Any) -> None:
    """On select the affine reference is nearer to h_{i+1} than the identity is."""
    decoder = Decoder(*model)
    streams = streams_of(decoder)
    trusted = references.block_references(decoder, 1, streams).trusted
    errors = {name: least_squares.mean_squared_error(trusted[name].select, streams.select[2]) for name in trusted}
    assert errors["affine"] < 0.9 * errors["skip"]


@either_family
@pytest.mark.parametrize("part", references.PARTS)
def test_a_silent_part_is_its_own_affine_reference(model: Any, part: references.Part) -> None:
    """A part that adds nothing is fitted to add nothing: its affine reference is the trained model to the last bit."""
    weights, config = model
    decoder = Decoder(silence(weights, config, 1, references.PARTS.index(part)), config)
    streams = streams_of(decoder)
    affine = references.part_references(decoder, 1, part, streams).trusted["affine"]
    np.testing.assert_array_equal(affine.select, streams.select[2])
    np.testing.assert_array_equal(affine.confirm, streams.confirm[2])


def test_stream_share_is_what_the_block_adds() -> None:
    """A block that turns 3x into 4x adds a quarter of what leaves it."""
    x = np.random.default_rng(15).normal(size=(2, 5, 3))
    np.testing.assert_allclose(references.stream_share(3 * x, 4 * x), 0.25, rtol=1e-12)


# ---------------------------------------------------------------- margins


@either_family
def test_an_identity_block_has_margin_zero(model: Any) -> None:
    """A block with zero output projections loses nothing to any reference, in whole or in part."""
    weights, config = model
    for part in (0, 1):
        weights = silence(weights, config, 1, part)
    report = margins.block_margins(Decoder(weights, config), FIT, SELECT, CONFIRM)[1]
    assert report["references"] == {"skip": 0.0, "affine": 0.0, "previous": 0.0}
    assert report["stream_share"] == 0.0
    for one in (report, *report["parts"].values()):
        assert one["margin"] == Interval(0.0, 0.0, 0.0)
        assert one["best_reference"] == "skip"


@either_family
def test_margins_are_of_the_winner_on_select(model: Any) -> None:
    """The margin is the confirm difference of the least reference on select; without trust one is absent."""
    decoder = Decoder(*model)
    reports = margins.block_margins(decoder, FIT, SELECT, CONFIRM)
    assert [report["index"] for report in reports] == [0, 1, 2]
    for report in reports:
        names = {"skip", "affine"} if report["index"] == 0 else {"skip", "affine", "previous"}
        assert set(report["references"]) == names
        assert report["left_out"] == []
        winner = min(report["select_losses"], key=report["select_losses"].get)
        assert report["best_reference"] == winner
        assert report["margin"].value == report["references"][winner]
    few = margins.block_margins(decoder, FIT[:1], SELECT, CONFIRM)
    assert [report["left_out"] for report in few] == [["affine"], ["affine", "previous"], ["affine", "previous"]]
    assert all(set(report["references"]) == {"skip"} for report in few)
    assert all(part["left_out"] == ["affine"] for report in few for part in report["parts"].values())
    assert "above" not in {report["status"] for report in few}


@pytest.mark.parametrize(
    ("estimate", "others", "left_out", "expected"),
    [
        (Interval(0.0, -0.001, 0.001), [0.1, 0.2, 0.3], False, "below"),
        (Interval(0.0, -0.001, 0.001), [0.1, 0.2, 0.3], True, "below"),
        (Interval(0.0, -0.03, 0.05), [0.25, 0.5, 0.75], False, "undecided"),  # high equals the threshold
        (Interval(0.1, 0.08, 0.12), [0.1, 0.2, 0.3], False, "above"),
        (Interval(0.1, 0.08, 0.12), [0.1, 0.2, 0.3], True, "undecided"),
        (Interval(0.02, 0.01, 0.03), [0.1, 0.2, 0.3], False, "undecided"),
        (Interval(-0.2, -0.3, -0.1), [-5.0, -6.0], False, "below"),  # the threshold is never negative
        (Interval(-0.2, -0.3, 0.1), [-5.0, -6.0], False, "undecided"),
        (Interval(0.1, 0.08, 0.12), [], False, "above"),  # alone: threshold 0
    ],
)
def test_status(estimate: Interval, others: list[float], left_out: bool, expected: str) -> None:
    """A block is judged by its interval against a tenth of the others' median, and never `above` without trust."""
    assert margins.status(estimate, others, left_out) == expected


def test_a_block_is_not_judged_against_itself() -> None:
    """Margins 1.5, 10 and 30: the first is below a tenth of 20; with itself in the median it would be above."""
    reports: list[dict[str, Any]] = [
        {"margin": Interval(m, m - 0.1, m + 0.1), "left_out": []} for m in (1.5, 10.0, 30.0)
    ]
    margins.set_statuses(reports)
    assert [report["status"] for report in reports] == ["below", "above", "above"]
