"""The headroom and redundancy oracles obey what must hold whatever the model."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from tests.oracles import headroom, margins
from tests.oracles.decoder import Decoder
from tests.oracles.intervals import Interval, paired
from tests.oracles.random_decoders import (
    BLOCKS,
    CONFIRM,
    FIT,
    SELECT,
    VOCABULARY,
    WIDTH,
    either_family,
    gpt2_weights,
    llama_weights,
    loss,
    silence,
    store,
)
from tests.oracles.redundancy import redundancy
from tests.oracles.references import PARTS, Part, loss_after
from tests.oracles.weight_sets import round_in_gram

PROBE = (FIT, SELECT, CONFIRM)
SCORE = np.concatenate([SELECT, CONFIRM])
INT4: dict[Part, str] = {"attention": "int4-channel", "mlp": "int4-channel"}


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
    gradients = headroom.gradients(decoder, i, seen.mid, FIT)
    assert gradients.value == pytest.approx(summed_loss(decoder, i, seen.out), rel=1e-12)

    rng, step = np.random.default_rng(20), 1e-5
    tangents = list(rng.normal(size=(4, *seen.mid.shape)))
    for token in range(FIT.shape[1]):
        tangent = np.zeros_like(seen.mid)
        tangent[rng.integers(len(FIT)), token] = rng.normal(size=seen.mid.shape[-1])
        tangents.append(tangent)
    for tangent in tangents:
        at_out = [summed_loss(decoder, i, seen.out + sign * step * tangent) for sign in (1, -1)]
        at_mid = [summed_loss(decoder, i, decoder.mlp_part(i, seen.mid + sign * step * tangent)) for sign in (1, -1)]
        for (up, down), gradient in ((at_out, gradients.at_out), (at_mid, gradients.at_mid)):
            np.testing.assert_allclose((gradient * tangent).sum(), (up - down) / (2 * step), rtol=1e-6, atol=1e-7)


@either_family
def test_the_last_token_has_no_gradient(model: Any) -> None:
    """Nothing is predicted from the last token of a sequence."""
    decoder = Decoder(*model)
    gradients = headroom.gradients(decoder, 1, decoder.inside(1, decoder.streams(FIT)[1]).mid, FIT)
    assert not gradients.at_mid[:, -1].any()
    assert not gradients.at_out[:, -1].any()


@either_family
@pytest.mark.parametrize("target", headroom.TARGETS)
def test_a_step_descends_at_the_rate_of_its_direction(model: Any, target: str) -> None:
    """A tiny step along D lowers the loss on fit by eta <D, X'G>, weights and bias, with X'G = (X'X + lam I) D."""
    decoder = Decoder(*model)
    of_part = headroom.steps(decoder, 1, FIT, SCORE)
    for r in headroom.RIDGES:
        length, slope, changed = 1e-5, 0.0, {}
        for part in headroom.TARGETS[target]:
            trained, X, directions, unit = of_part[part]
            D = directions[r]
            eta = length * unit / np.linalg.norm(X @ D)
            gram = X.T @ X
            slope += eta * (D * ((gram + r * np.diag(gram).mean() * np.eye(len(gram))) @ D)).sum()
            changed[part] = headroom.stepped(of_part[part], r, length)
            assert (trained[1] is None) == (changed[part][1] is None)
        drop = fit_loss(decoder, 1, {}) - fit_loss(decoder, 1, changed)
        assert slope > 0
        assert drop == pytest.approx(slope, rel=1e-2)


@either_family
def test_a_step_has_its_length(model: Any) -> None:
    """Per position of fit a step changes the output by length times what the median block's same part adds on score."""
    decoder = Decoder(*model)
    added: dict[str, list[Any]] = {"attention": [], "mlp": []}
    for ids in SCORE:  # one sequence at a time: what is added, squared and summed over channels
        streams = decoder.streams(ids[None])
        mids = [decoder.inside(i, streams[i]).mid for i in range(BLOCKS)]
        added["attention"].append([((mids[i] - streams[i]) ** 2).sum(axis=-1).mean() for i in range(BLOCKS)])
        added["mlp"].append([((streams[i + 1] - mids[i]) ** 2).sum(axis=-1).mean() for i in range(BLOCKS)])
    typical = {part: sorted(np.sqrt(np.mean(of_part, axis=0)))[BLOCKS // 2] for part, of_part in added.items()}

    h = decoder.streams(FIT)[1]
    trained = decoder.inside(1, h)
    of_part = headroom.steps(decoder, 1, FIT, SCORE)
    for length in headroom.FREE_LENGTHS:
        changed = decoder.inside(1, h, attention=headroom.stepped(of_part["attention"], 1e-1, length))
        size = np.sqrt(((changed.mid - trained.mid) ** 2).sum(axis=-1).mean())
        assert size == pytest.approx(length * typical["attention"])
        changed = decoder.inside(1, h, mlp=headroom.stepped(of_part["mlp"], 1e-3, length))
        size = np.sqrt(((changed.out - trained.out) ** 2).sum(axis=-1).mean())
        assert size == pytest.approx(length * typical["mlp"])


def test_the_typical_addition_is_a_norm_over_channels() -> None:
    """MLPs that add 1, 2 and 9 times the vector (3, 4, 0, ...) everywhere have the typical addition 10."""
    weights, config = gpt2_weights(np.random.default_rng(3))
    for i, scale in enumerate((2.0, 1.0, 9.0)):
        matrix, bias = np.zeros_like(weights[f"transformer.h.{i}.mlp.c_proj.weight"]), np.zeros(WIDTH)
        bias[:2] = 3 * scale, 4 * scale
        weights = store(weights, config, i, 1, matrix, bias)
    assert headroom.typical_additions(Decoder(weights, config), SCORE)["mlp"] == pytest.approx(10.0)


@either_family
def test_a_silent_part_has_a_step(model: Any) -> None:
    """A part that adds nothing today is stepped by what is typical of all blocks, itself included."""
    weights, config = model
    for part, name in enumerate(PARTS):
        decoder = Decoder(silence(weights, config, 1, part), config)
        typical = headroom.typical_additions(decoder, SCORE)
        h = decoder.streams(FIT)[1]
        seen = decoder.inside(1, h)
        assert not np.any(seen.mid - h if part == 0 else seen.out - seen.mid)
        assert typical[name] > 0
        step = headroom.steps(decoder, 1, FIT, SCORE)[name]
        weight, bias = headroom.stepped(step, 1e-3, 0.3)
        moved = step.X @ (weight if bias is None else np.vstack([weight, bias]))
        assert np.linalg.norm(moved) == pytest.approx(0.3 * typical[name] * np.sqrt(FIT.size))


def test_a_part_without_features_has_no_step() -> None:
    """Where all features are zero and there is no bias to move, the projection stays as it is."""
    weights, config = llama_weights(np.random.default_rng(3))
    name = "model.layers.1.mlp.up_proj.weight"
    decoder = Decoder(weights | {name: np.zeros_like(weights[name])}, config)
    step = headroom.steps(decoder, 1, FIT, SCORE)["mlp"]
    assert not step.X.any()
    np.testing.assert_array_equal(headroom.stepped(step, 1e-3, 1.0)[0], decoder.projections(1)[1][0])


@either_family
def test_candidates_come_in_their_order(model: Any) -> None:
    """No change, then the strong ridge before the weak one with growing steps; a target changes its own parts only."""
    decoder = Decoder(*model)
    of_part = headroom.steps(decoder, 1, FIT, SCORE)
    for target, parts in headroom.TARGETS.items():
        tried = headroom.candidates(of_part, target)
        assert tried[0] == {}
        assert [set(changed) for changed in tried[1:]] == [set(parts)] * 10
        lengths = (0.01, 0.03, 0.1, 0.3, 1.0)
        for k, (r, length) in enumerate([(r, length) for r in (0.1, 0.001) for length in lengths]):
            for part in parts:
                expected = headroom.stepped(of_part[part], r, length)[0]
                np.testing.assert_array_equal(tried[1 + k][part][0], expected)


# ---------------------------------------------------------------- headroom and shares


@either_family
def test_headroom_is_judged_on_confirm(model: Any) -> None:
    """The winner is the best on select, never worse there than the trained block, and confirm decides its value."""
    decoder = Decoder(*model)
    of_part = headroom.steps(decoder, 1, FIT, SCORE)
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
    of_part = headroom.steps(Decoder(*model), 1, FIT, SCORE)
    for r, length in [(r, length) for r in headroom.RIDGES for length in headroom.SET_LENGTHS]:
        for part, name in INT4.items():
            weight, bias = headroom.stepped(of_part[part], r, length, name)
            assert max(len(np.unique(np.round(row, 9))) for row in weight.T) <= 15 * max(1, weight.shape[0] // 4)
            np.testing.assert_array_equal(bias, headroom.stepped(of_part[part], r, length)[1])


@either_family
def test_set_candidates_are_the_compensated_roundings_of_the_free_ones(model: Any) -> None:
    """In order: the free step's weights, rounded in the Gram matrix of the trained block's features without ones."""
    decoder = Decoder(*model)
    of_part = headroom.steps(decoder, 1, FIT, SCORE)
    sets: dict[Part, str] = {"attention": "sign", "mlp": "int3-g7"}
    seen = decoder.inside(1, decoder.streams(FIT)[1])
    features: dict[Part, Any] = {"attention": seen.attention_features, "mlp": seen.mlp_features}
    tried = headroom.candidates(of_part, "block", sets)
    for k, (r, length) in enumerate([(r, length) for r in (0.1, 0.001) for length in (0.1, 0.3, 1.0)]):
        for part, name in sets.items():
            H = np.einsum("nsp,nsq->pq", features[part], features[part])
            expected = round_in_gram(headroom.stepped(of_part[part], r, length)[0].T, H, name).T
            np.testing.assert_allclose(tried[1 + k][part][0], expected, atol=1e-10)


@either_family
def test_a_fine_set_is_no_set(model: Any) -> None:
    """At 20 bits the candidates shared by the two grids of steps have the losses of the unrestricted ones."""
    decoder = Decoder(*model)
    fine = headroom.headroom(decoder, 1, *PROBE, sets={"attention": "int20-channel", "mlp": "int20-channel"})
    free = headroom.headroom(decoder, 1, *PROBE)
    for target in headroom.TARGETS:
        shared = [free[target]["select_losses"][k] for k in (0, 3, 4, 5, 8, 9, 10)]
        np.testing.assert_allclose([fine[target]["select_losses"][k] for k in range(7)], shared, atol=1e-4)


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
    shares = headroom.shares(decoder, 1, *PROBE, INT4)
    total = sum(share.value for share in shares.values())
    assert total == pytest.approx(headroom.headroom(decoder, 1, *PROBE)["block"]["estimate"].value, abs=1e-12)


@either_family
def test_the_lengths_are_a_choice(model: Any) -> None:
    """Given lengths stand in for the default ones, the free ones without sets and the others with them."""
    decoder = Decoder(*model)
    lengths: dict[str, Any] = {"free_lengths": (0.1,), "set_lengths": (0.3, 1.0)}
    free = headroom.headroom(decoder, 1, *PROBE, **lengths)["mlp"]["select_losses"]
    inside = headroom.headroom(decoder, 1, *PROBE, sets=INT4, **lengths)["mlp"]["select_losses"]
    default = headroom.headroom(decoder, 1, *PROBE)["mlp"]["select_losses"]
    default_inside = headroom.headroom(decoder, 1, *PROBE, sets=INT4)["mlp"]["select_losses"]
    assert free == [default[k] for k in (0, 3, 8)]
    assert inside == [default_inside[k] for k in (0, 2, 3, 5, 6)]


# ---------------------------------------------------------------- a trained decoder


def markov_ids(sequences: int, seed: int) -> Any:
    """Token ids [N, 16] in which the two tokens before favour the next one, three times in four."""
    favoured = np.random.default_rng(30).integers(0, VOCABULARY, size=(VOCABULARY, VOCABULARY))
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, VOCABULARY, size=(sequences, 16))
    for s in range(2, ids.shape[1]):
        kept = rng.random(sequences) < 0.75
        ids[kept, s] = favoured[ids[kept, s - 2], ids[kept, s - 1]]
    return ids


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def trained(request: pytest.FixtureRequest) -> tuple[dict[str, Any], dict[str, Any]]:
    """Weights and configuration of a decoder of three blocks after 200 steps of AdamW."""
    torch.manual_seed(0)
    model: Any
    config: dict[str, Any]
    if request.param == "llama":
        config = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": BLOCKS, "num_attention_heads": 2}
        model = LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, num_key_value_heads=1, **config))
    else:
        config = {"n_embd": 32, "n_layer": BLOCKS, "n_head": 2, "n_positions": 16}
        config |= dict.fromkeys(("embd_pdrop", "attn_pdrop", "resid_pdrop"), 0.0)
        config |= dict.fromkeys(("bos_token_id", "eos_token_id"), None)
        model = GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, **config))
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3, weight_decay=0.01)
    for step in range(200):
        ids = torch.from_numpy(markov_ids(64, 1000 + step))
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    weights = {name: value.detach().double().numpy() for name, value in model.state_dict().items()}
    return weights, model.config.to_dict()


@pytest.mark.parametrize("i", range(BLOCKS))
def test_a_dead_mlp_has_headroom(trained: tuple[dict[str, Any], dict[str, Any]], i: int) -> None:
    """Where a trained decoder's block i got a zero MLP output projection, one step of it surely lowers the loss."""
    weights, config = trained
    probe = markov_ids(48, 31), markov_ids(24, 32), markov_ids(64, 33)
    healthy = Decoder(weights, config)
    assert loss(healthy, probe[2]).mean() < 0.6 * np.log(VOCABULARY)
    decoder = Decoder(silence(weights, config, i, 1), config)
    assert loss(decoder, probe[2]).mean() > loss(healthy, probe[2]).mean() + 0.05
    report = headroom.headroom(decoder, i, *probe)["mlp"]
    assert report["candidate"] > 0
    assert report["estimate"].low > 0
    assert report["estimate"].value > 2 * headroom.headroom(healthy, i, *probe)["mlp"]["estimate"].value


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
