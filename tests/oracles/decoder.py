"""A second, slow forward pass of Llama and GPT-2 in numpy float64: the oracle for everything that runs a model.

Weights come under transformers' state_dict names, the configuration as a plain dict. Index letters: N sequences,
S tokens, d width, V vocabulary. Block i (0-based) maps h_i to h_{i+1}; h_0 is the embedding output.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from collections.abc import Mapping

Array = NDArray[np.float64]
Ids = NDArray[np.int64]
Projection = tuple[Array, Array | None]
"""(W [in, out], b [out] or None): y = x @ W + b."""


class Inside(NamedTuple):
    """One block seen from inside; every array is [N, S, its width]."""

    attention_features: Array
    mid: Array
    mlp_features: Array
    out: Array


def project(x: Array, projection: Projection) -> Array:
    """x @ W + b."""
    weight, bias = projection
    y: Array = x @ weight
    return y if bias is None else y + bias


def token_nll(features: Array, ids: Ids, head: Array, head_bias: Array | None = None) -> Array:
    """Next-token negative log-likelihood [N, S-1] in nats, from normalised features [N, S, d] and a head [d, V]."""
    logits = project(features[:, :-1], (head, head_bias))
    largest = logits.max(axis=-1, keepdims=True)
    log_normaliser = largest + np.log(np.exp(logits - largest).sum(axis=-1, keepdims=True))
    log_probabilities = logits - log_normaliser
    return -np.take_along_axis(log_probabilities, ids[:, 1:, None], axis=-1)[..., 0]


def causal_attention(query: Array, key: Array, value: Array) -> Array:
    """softmax(q k' / sqrt(head_dim)) v over the past and present; one head, all [N, S, head_dim]."""
    steps, head_dim = query.shape[1:]
    scores = query @ key.transpose(0, 2, 1) / np.sqrt(head_dim)
    seen = np.tril(np.ones((steps, steps), dtype=bool))
    scores = np.where(seen, scores, -np.inf)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    weights = weights / weights.sum(axis=-1, keepdims=True)
    output: Array = weights @ value
    return output


class _Llama:
    """RMSNorm, rotary positions, grouped keys and values, SwiGLU."""

    def __init__(self, weights: Mapping[str, Array], config: Mapping[str, Any]) -> None:
        rope = config.get("rope_parameters") or {}
        _require(config.get("hidden_act", "silu") == "silu", "hidden_act must be silu")
        _require(rope.get("rope_type", "default") == "default", "rope_type must be default")
        _require(config.get("rope_scaling") in (None, rope), "rope_scaling must be absent")
        self.weights = weights
        self.blocks = int(config["num_hidden_layers"])
        self.heads = int(config["num_attention_heads"])
        self.kv_heads = int(config.get("num_key_value_heads") or self.heads)
        self.head_dim = int(config.get("head_dim") or config["hidden_size"] // self.heads)
        self.theta = float(config["rope_theta"] if "rope_theta" in config else rope["rope_theta"])
        self.epsilon = float(config["rms_norm_eps"])
        self.tied = bool(config.get("tie_word_embeddings", False))
        self.embedding_name = "model.embed_tokens.weight"

    def embed(self, ids: Ids) -> Array:
        return self.weights[self.embedding_name][ids]

    def norm(self, name: str, x: Array) -> Array:
        root_mean_square: Array = np.sqrt((x**2).mean(axis=-1, keepdims=True) + self.epsilon)
        return x / root_mean_square * self.weights[f"{name}.weight"]

    def linear(self, name: str) -> Projection:
        return self.weights[f"{name}.weight"].T, self.weights.get(f"{name}.bias")

    def attention_norm(self, i: int, h: Array) -> Array:
        return self.norm(f"model.layers.{i}.input_layernorm", h)

    def mlp_norm(self, i: int, mid: Array) -> Array:
        return self.norm(f"model.layers.{i}.post_attention_layernorm", mid)

    def final_norm(self, h: Array) -> Array:
        return self.norm("model.norm", h)

    def rotate(self, x: Array) -> Array:
        """Turns the pair (j, j + head_dim/2) of position s by the angle s * theta^(-2j/head_dim)."""
        half = self.head_dim // 2
        frequencies = self.theta ** (-2.0 * np.arange(half) / self.head_dim)
        angles = np.arange(x.shape[1])[:, None] * frequencies[None, :]
        first, second = x[..., :half], x[..., half:]
        cos, sin = np.cos(angles), np.sin(angles)
        return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)

    def attention_features(self, i: int, x: Array) -> Array:
        name = f"model.layers.{i}.self_attn"
        q = project(x, self.linear(f"{name}.q_proj"))
        k = project(x, self.linear(f"{name}.k_proj"))
        v = project(x, self.linear(f"{name}.v_proj"))
        outputs = []
        for head in range(self.heads):
            group = head // (self.heads // self.kv_heads)
            of_head = slice(head * self.head_dim, (head + 1) * self.head_dim)
            of_group = slice(group * self.head_dim, (group + 1) * self.head_dim)
            query, key = self.rotate(q[..., of_head]), self.rotate(k[..., of_group])
            outputs.append(causal_attention(query, key, v[..., of_group]))
        return np.concatenate(outputs, axis=-1)

    def mlp_features(self, i: int, x: Array) -> Array:
        gate = project(x, self.linear(f"model.layers.{i}.mlp.gate_proj"))
        up = project(x, self.linear(f"model.layers.{i}.mlp.up_proj"))
        sigmoid = 0.5 * (1.0 + np.tanh(0.5 * gate))  # without overflow
        return gate * sigmoid * up

    def projections(self, i: int) -> tuple[Projection, Projection]:
        return self.linear(f"model.layers.{i}.self_attn.o_proj"), self.linear(f"model.layers.{i}.mlp.down_proj")


class _GPT2:
    """LayerNorm, learned positions, gelu_new; Conv1D stores its weight [in, out]."""

    def __init__(self, weights: Mapping[str, Array], config: Mapping[str, Any]) -> None:
        _require(config.get("activation_function", "gelu_new") == "gelu_new", "activation_function must be gelu_new")
        _require(config.get("scale_attn_weights", True), "scale_attn_weights must be true")
        _require(not config.get("scale_attn_by_inverse_layer_idx"), "scale_attn_by_inverse_layer_idx must be false")
        self.weights = weights
        self.blocks = int(config["n_layer"])
        self.heads = int(config["n_head"])
        self.epsilon = float(config["layer_norm_epsilon"])
        self.tied = bool(config.get("tie_word_embeddings", True))
        self.embedding_name = "transformer.wte.weight"

    def embed(self, ids: Ids) -> Array:
        return self.weights[self.embedding_name][ids] + self.weights["transformer.wpe.weight"][: ids.shape[1]]

    def norm(self, name: str, x: Array) -> Array:
        centred: Array = x - x.mean(axis=-1, keepdims=True)
        deviation: Array = np.sqrt((centred**2).mean(axis=-1, keepdims=True) + self.epsilon)
        return centred / deviation * self.weights[f"{name}.weight"] + self.weights[f"{name}.bias"]

    def linear(self, name: str) -> Projection:
        return self.weights[f"{name}.weight"], self.weights[f"{name}.bias"]

    def attention_norm(self, i: int, h: Array) -> Array:
        return self.norm(f"transformer.h.{i}.ln_1", h)

    def mlp_norm(self, i: int, mid: Array) -> Array:
        return self.norm(f"transformer.h.{i}.ln_2", mid)

    def final_norm(self, h: Array) -> Array:
        return self.norm("transformer.ln_f", h)

    def attention_features(self, i: int, x: Array) -> Array:
        q, k, v = np.split(project(x, self.linear(f"transformer.h.{i}.attn.c_attn")), 3, axis=-1)
        head_dim = x.shape[-1] // self.heads
        outputs = []
        for head in range(self.heads):
            columns = slice(head * head_dim, (head + 1) * head_dim)
            outputs.append(causal_attention(q[..., columns], k[..., columns], v[..., columns]))
        return np.concatenate(outputs, axis=-1)

    def mlp_features(self, i: int, x: Array) -> Array:
        z = project(x, self.linear(f"transformer.h.{i}.mlp.c_fc"))
        inner: Array = np.sqrt(2.0 / np.pi) * (z + 0.044715 * z**3)
        return 0.5 * z * (1.0 + np.tanh(inner))

    def projections(self, i: int) -> tuple[Projection, Projection]:
        return self.linear(f"transformer.h.{i}.attn.c_proj"), self.linear(f"transformer.h.{i}.mlp.c_proj")


class Decoder:
    """A trained decoder as plain float64 functions. `block_count` is the number of its blocks."""

    def __init__(self, weights: Mapping[str, NDArray[Any]], config: Mapping[str, Any]) -> None:
        families: dict[str, type[_Llama | _GPT2]] = {"llama": _Llama, "gpt2": _GPT2}
        _require(config["model_type"] in families, f"model_type {config['model_type']} is not one of {list(families)}")
        self._weights = {name: np.asarray(value, dtype=np.float64) for name, value in weights.items()}
        self._family = families[config["model_type"]](self._weights, config)
        self.block_count = self._family.blocks
        self.head_bias = self._weights.get("lm_head.bias")

    def embed(self, ids: Ids) -> Array:
        """h_0 [N, S, d] for token ids [N, S]."""
        return self._family.embed(ids)

    def projections(self, i: int) -> tuple[Projection, Projection]:
        """The trained attention output projection and MLP output projection of block i."""
        return self._family.projections(i)

    def inside(self, i: int, h: Array, attention: Projection | None = None, mlp: Projection | None = None) -> Inside:
        """Block i on h [N, S, d] with its inner features; `attention` and `mlp` stand in for its projections."""
        trained_attention, trained_mlp = self._family.projections(i)
        attention_features = self._family.attention_features(i, self._family.attention_norm(i, h))
        mid = h + project(attention_features, attention or trained_attention)
        mlp_features = self._family.mlp_features(i, self._family.mlp_norm(i, mid))
        out = mid + project(mlp_features, mlp or trained_mlp)
        return Inside(attention_features, mid, mlp_features, out)

    def block(self, i: int, h: Array, attention: Projection | None = None, mlp: Projection | None = None) -> Array:
        """The output [N, S, d] of block i."""
        return self.inside(i, h, attention=attention, mlp=mlp).out

    def mlp_part(self, i: int, mid: Array) -> Array:
        """mid + mlp(norm(mid)), both [N, S, d]."""
        features = self._family.mlp_features(i, self._family.mlp_norm(i, mid))
        return mid + project(features, self._family.projections(i)[1])

    def streams(self, ids: Ids) -> list[Array]:
        """[h_0, ..., h_L], each [N, S, d]; the last one is before the final norm."""
        streams = [self.embed(ids)]
        for i in range(self.block_count):
            streams.append(self.block(i, streams[-1]))
        return streams

    def normalise(self, h: Array) -> Array:
        """The final norm: the features that the head multiplies."""
        return self._family.final_norm(h)

    def head(self) -> Array:
        """The output matrix [d, V]."""
        name = self._family.embedding_name if self._family.tied else "lm_head.weight"
        return self._weights[name].T

    def nll(self, h: Array, ids: Ids) -> Array:
        """Loss of each sequence [N], nats per predicted token, when h [N, S, d] is the stream after the last block."""
        losses: Array = token_nll(self.normalise(h), ids, self.head(), self.head_bias).mean(axis=-1)
        return losses


def _require(condition: bool, what: str) -> None:
    if not condition:
        raise ValueError(f"the oracle decoder does not cover this model: {what}")
