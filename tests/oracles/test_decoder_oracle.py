"""The oracle decoder is transformers' own forward pass, in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM
from transformers.models.llama import modeling_llama

from tests.oracles.decoder import Decoder, Projection

VOCABULARY = 19
LLAMA = {
    "vocab_size": VOCABULARY,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
}
GPT2 = {"vocab_size": VOCABULARY, "n_embd": 24, "n_layer": 3, "n_head": 3, "n_positions": 32}
CONFIGS = {
    "llama with grouped keys": lambda: LlamaConfig(**LLAMA),
    "llama with biases, tied head, own head_dim and theta": lambda: LlamaConfig(
        **LLAMA,
        attention_bias=True,
        mlp_bias=True,
        tie_word_embeddings=True,
        head_dim=8,
        rope_parameters={"rope_theta": 300.0, "rope_type": "default"},
    ),
    "gpt2": lambda: GPT2Config(**GPT2),
}


class Float64Torch:
    """The torch module with float32 read as float64: transformers' Llama drops to float32 in norms and softmax."""

    float32 = float = torch.float64

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


def tiny_model(config: Any, attention: str = "eager") -> Any:
    """A random model whose every parameter, biases and norms included, is far from its initial value."""
    torch.manual_seed(0)
    config._attn_implementation = attention
    kind = LlamaForCausalLM if config.model_type == "llama" else GPT2LMHeadModel
    model = kind(config).double().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if "norm" in name or "ln_" in name else 0.0, 0.4)
    return model


def decoder_of(model: Any, config: dict[str, Any] | None = None) -> Decoder:
    weights = {name: value.detach().numpy().copy() for name, value in model.state_dict().items()}
    return Decoder(weights, config or model.config.to_dict())


def some_ids() -> Any:
    return np.random.default_rng(1).integers(0, VOCABULARY, size=(3, 12))


def forward(model: Any, ids: Any) -> Any:
    with torch.no_grad():
        return model(torch.from_numpy(ids), output_hidden_states=True, use_cache=False)


def block_modules(model: Any, i: int) -> tuple[Any, Any, Any]:
    """Block i, its attention output projection and its MLP output projection."""
    if model.config.model_type == "llama":
        block = model.model.layers[i]
        return block, block.self_attn.o_proj, block.mlp.down_proj
    block = model.transformer.h[i]
    return block, block.attn.c_proj, block.mlp.c_proj


@pytest.fixture
def float64_islands(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(modeling_llama, "torch", Float64Torch())


@pytest.fixture(params=CONFIGS)
def model(request: pytest.FixtureRequest, float64_islands: None) -> Any:
    return tiny_model(CONFIGS[request.param]())


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_logits_and_hidden_states(config: Any, attention: str, float64_islands: None) -> None:
    """Every hidden state and the logits agree with transformers to 1e-9, whichever attention it uses."""
    model, ids = tiny_model(config(), attention), some_ids()
    decoder, expected = decoder_of(model), forward(model, ids)
    streams = decoder.streams(ids)
    for stream, hidden in zip(streams[:-1], expected.hidden_states[:-1], strict=True):
        np.testing.assert_allclose(stream, hidden.numpy(), rtol=0, atol=1e-9)
    features = decoder.normalise(streams[-1])
    np.testing.assert_allclose(features, expected.hidden_states[-1].numpy(), rtol=0, atol=1e-9)
    np.testing.assert_allclose(features @ decoder.head(), expected.logits.numpy(), rtol=0, atol=1e-9)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_untouched_transformers_differs_by_its_own_float32_only(config: Any) -> None:
    """Without reading its float32 as float64, transformers' double model is within float32 rounding."""
    model, ids = tiny_model(config()), some_ids()
    decoder, expected = decoder_of(model), forward(model, ids)
    logits = decoder.normalise(decoder.streams(ids)[-1]) @ decoder.head()
    np.testing.assert_allclose(logits, expected.logits.numpy(), rtol=0, atol=2e-5 * np.abs(logits).max())


def test_inner_features(model: Any) -> None:
    """What enters the two output projections, the stream between the parts, and the MLP part alone are the model's."""
    ids = some_ids()
    seen: dict[str, Any] = {}
    block, attention, mlp = block_modules(model, 1)
    hooks = [
        block.register_forward_pre_hook(lambda _, args: seen.update(h=args[0])),
        attention.register_forward_pre_hook(lambda _, args: seen.update(attention=args[0])),
        attention.register_forward_hook(lambda _, args, output: seen.update(attended=output)),
        mlp.register_forward_pre_hook(lambda _, args: seen.update(mlp=args[0])),
        block.register_forward_hook(lambda _, args, output: seen.update(out=output)),
    ]
    forward(model, ids)
    for hook in hooks:
        hook.remove()
    seen = {name: value.numpy() for name, value in seen.items()}
    decoder = decoder_of(model)
    inside = decoder.inside(1, seen["h"])
    mid = seen["h"] + seen["attended"]
    np.testing.assert_allclose(inside.attention_features, seen["attention"], rtol=0, atol=1e-9)
    np.testing.assert_allclose(inside.mid, mid, rtol=0, atol=1e-9)
    np.testing.assert_allclose(inside.mlp_features, seen["mlp"], rtol=0, atol=1e-9)
    np.testing.assert_allclose(inside.out, seen["out"], rtol=0, atol=1e-9)
    np.testing.assert_allclose(decoder.block(1, seen["h"]), seen["out"], rtol=0, atol=1e-9)
    np.testing.assert_allclose(decoder.mlp_part(1, mid), seen["out"], rtol=0, atol=1e-9)


def test_replacement_projections_are_those_weights_in_the_model(model: Any) -> None:
    """A block run with other projections is transformers' block after those weights were written into it."""
    ids, decoder, rng = some_ids(), decoder_of(model), np.random.default_rng(2)
    h = decoder.streams(ids)[1]
    replacements: list[Projection] = []
    for module, (weight, bias) in zip(block_modules(model, 1)[1:], decoder.projections(1), strict=True):
        new_weight = rng.normal(size=weight.shape)
        new_bias = None if bias is None else rng.normal(size=bias.shape)
        replacements.append((new_weight, new_bias))
        stored = new_weight if model.config.model_type == "gpt2" else new_weight.T
        with torch.no_grad():
            module.weight.copy_(torch.from_numpy(stored))
            if new_bias is not None:
                module.bias.copy_(torch.from_numpy(new_bias))
    attention, mlp = replacements
    expected = forward(model, ids).hidden_states[2].numpy()
    np.testing.assert_allclose(decoder.block(1, h, attention=attention, mlp=mlp), expected, rtol=0, atol=1e-9)
    by_parts = decoder_of(model).mlp_part(1, decoder.inside(1, h, attention=attention).mid)
    np.testing.assert_allclose(by_parts, expected, rtol=0, atol=1e-9)


def test_nll_is_the_mean_cross_entropy_of_each_sequence(model: Any) -> None:
    """nll is torch's cross-entropy of the S-1 predicted tokens, one mean per sequence."""
    ids, decoder = some_ids(), decoder_of(model)
    logits = forward(model, ids).logits
    expected = [
        torch.nn.functional.cross_entropy(logits[n, :-1], torch.from_numpy(ids[n, 1:])).item() for n in range(len(ids))
    ]
    np.testing.assert_allclose(decoder.nll(decoder.streams(ids)[-1], ids), expected, rtol=0, atol=1e-9)


def test_both_spellings_of_rope_theta() -> None:
    """`rope_theta` at the top of the configuration means the same as inside `rope_parameters`."""
    model, ids = (
        tiny_model(LlamaConfig(**LLAMA, rope_parameters={"rope_theta": 77.0, "rope_type": "default"})),
        some_ids(),
    )
    new = model.config.to_dict()
    old = {key: value for key, value in new.items() if key != "rope_parameters"} | {"rope_theta": 77.0}
    np.testing.assert_array_equal(decoder_of(model, new).streams(ids)[-1], decoder_of(model, old).streams(ids)[-1])


@pytest.mark.parametrize(
    "change",
    [
        {"model_type": "mamba"},
        {"hidden_act": "gelu"},
        {"rope_parameters": {"rope_theta": 1e4, "rope_type": "linear", "factor": 2.0}},
        {"rope_scaling": {"type": "linear", "factor": 2.0}},
    ],
)
def test_uncovered_models_are_refused(change: dict[str, Any]) -> None:
    """A configuration that the oracle does not compute is refused, never computed as something else."""
    model = tiny_model(LlamaConfig(**LLAMA))
    with pytest.raises(ValueError, match="does not cover"):
        decoder_of(model, model.config.to_dict() | change)
