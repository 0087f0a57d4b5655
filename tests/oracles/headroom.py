"""Headroom of a block's two output projections along one preconditioned gradient step, free and inside weight sets."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch.nn import functional

from tests.oracles.intervals import Interval, paired
from tests.oracles.least_squares import tokens
from tests.oracles.references import PARTS, Part, change, columns, loss_after
from tests.oracles.weight_sets import round_in_gram

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

    from tests.oracles.decoder import Array, Decoder, Ids, Projection

RIDGES = (1e-1, 1e-3)
FREE_LENGTHS = (0.01, 0.03, 0.1, 0.3, 1.0)
SET_LENGTHS = (0.1, 0.3, 1.0)
TARGETS: dict[str, tuple[Part, ...]] = {"attention": ("attention",), "mlp": ("mlp",), "block": PARTS}

Change = dict[Part, "Projection"]
"""The projections that a candidate puts in the place of the trained ones."""


class Loss(NamedTuple):
    """The summed cross-entropy J on token ids and its gradients at block i, both [N, S, d]."""

    value: float
    at_mid: Array
    at_out: Array


class Step(NamedTuple):
    """What one part of block i is changed with: per ridge r the direction D [p, d], for its inputs X [N_f S, p] on fit.

    A step of length 1 changes the output on fit by `unit`, in Frobenius norm over all N_f S positions.
    """

    trained: Projection
    X: Array
    directions: dict[float, Array]
    unit: float


class _Torch:
    """The decoder once more in torch float64, for its gradients only."""

    def __init__(self, decoder: Decoder) -> None:
        self.family: Any = decoder._family
        self.head, self.head_bias = _tensor(decoder.head()), _tensor(decoder.head_bias)
        self.llama = hasattr(self.family, "kv_heads")

    def norm(self, name: str, x: Tensor) -> Tensor:
        weight, bias = (_tensor(self.family.weights.get(f"{name}.{part}")) for part in ("weight", "bias"))
        if self.llama:
            return functional.rms_norm(x, x.shape[-1:], weight, self.family.epsilon)
        return functional.layer_norm(x, x.shape[-1:], weight, bias, self.family.epsilon)

    def linear(self, name: str, x: Tensor) -> Tensor:
        weight, bias = self.family.linear(name)
        return functional.linear(x, _tensor(weight.T), _tensor(bias))

    def rotate(self, x: Tensor) -> Tensor:
        """Positions as complex phases: the pair (j, j + head_dim/2) of [N, heads, S, head_dim] is one number."""
        half = x.shape[-1] // 2
        frequencies = self.family.theta ** (-torch.arange(half, dtype=torch.float64) / half)
        angles = torch.outer(torch.arange(x.shape[-2], dtype=torch.float64), frequencies)
        turned = torch.complex(x[..., :half], x[..., half:]) * torch.polar(torch.ones_like(angles), angles)
        return torch.cat([turned.real, turned.imag], dim=-1)

    def attention(self, i: int, h: Tensor) -> Tensor:
        if self.llama:
            name = f"model.layers.{i}"
            x = self.norm(f"{name}.input_layernorm", h)
            flat = [self.linear(f"{name}.self_attn.{which}_proj", x) for which in "qkv"]
            kv_heads, output = self.family.kv_heads, f"{name}.self_attn.o_proj"
        else:
            name = f"transformer.h.{i}"
            flat = list(self.linear(f"{name}.attn.c_attn", self.norm(f"{name}.ln_1", h)).chunk(3, dim=-1))
            kv_heads, output = self.family.heads, f"{name}.attn.c_proj"
        heads = (self.family.heads, kv_heads, kv_heads)
        q, k, v = (x.unflatten(-1, (count, -1)).transpose(1, 2) for x, count in zip(flat, heads, strict=True))
        if self.llama:
            q, k = self.rotate(q), self.rotate(k)
        k, v = (x.repeat_interleave(self.family.heads // kv_heads, dim=1) for x in (k, v))
        seen = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return h + self.linear(output, seen.transpose(1, 2).flatten(-2))

    def mlp(self, i: int, mid: Tensor) -> Tensor:
        if self.llama:
            name = f"model.layers.{i}"
            x = self.norm(f"{name}.post_attention_layernorm", mid)
            gate = functional.silu(self.linear(f"{name}.mlp.gate_proj", x))
            return mid + self.linear(f"{name}.mlp.down_proj", gate * self.linear(f"{name}.mlp.up_proj", x))
        name = f"transformer.h.{i}"
        inner = self.linear(f"{name}.mlp.c_fc", self.norm(f"{name}.ln_2", mid))
        return mid + self.linear(f"{name}.mlp.c_proj", functional.gelu(inner, approximate="tanh"))

    def loss(self, h: Tensor, ids: Ids) -> Tensor:
        x = self.norm("model.norm" if self.llama else "transformer.ln_f", h)
        logits = functional.linear(x[:, :-1], self.head.T, self.head_bias)
        return functional.cross_entropy(logits.flatten(0, 1), torch.tensor(ids[:, 1:]).flatten(), reduction="sum")


def _tensor(x: Array | None) -> Any:
    return None if x is None else torch.tensor(x, dtype=torch.float64)


def gradients(decoder: Decoder, i: int, mid: Array, ids: Ids) -> Loss:
    """J over all predicted positions of `ids`, and dJ/d mid_i and dJ/d h_{i+1} where mid_i is `mid` [N, S, d]."""
    model = _Torch(decoder)
    at_mid = _tensor(mid).requires_grad_()
    at_out = model.mlp(i, at_mid)
    at_out.retain_grad()
    h = at_out
    for j in range(i + 1, decoder.block_count):
        h = model.mlp(j, model.attention(j, h))
    value = model.loss(h, ids)
    value.backward()
    assert at_out.grad is not None
    return Loss(value.item(), at_mid.grad.numpy(), at_out.grad.numpy())


def direction(X: Array, G: Array, r: float) -> Array:
    """(X'X + r mean(diag X'X) I)^-1 X'G; zero where X is."""
    gram = X.T @ X
    if not gram.any():
        return np.zeros((X.shape[1], G.shape[1]))
    return np.linalg.solve(gram + r * np.diag(gram).mean() * np.eye(len(gram)), X.T @ G)


def typical_additions(decoder: Decoder, score: Ids) -> dict[Part, float]:
    """Per part the median over all blocks of the root mean square, over positions, of what it adds to the stream.

    One position counts with its Euclidean norm over the channels; `score` is token ids [N, S].
    """
    of_part: dict[Part, list[float]] = {"attention": [], "mlp": []}
    for i, h in enumerate(decoder.streams(score)[:-1]):
        seen = decoder.inside(i, h)
        of_part["attention"].append(float(np.linalg.norm(seen.mid - h) / np.sqrt(score.size)))
        of_part["mlp"].append(float(np.linalg.norm(seen.out - seen.mid) / np.sqrt(score.size)))
    return {part: float(np.median(sizes)) for part, sizes in of_part.items()}


def steps(decoder: Decoder, i: int, fit: Ids, score: Ids) -> dict[Part, Step]:
    """The directions of both parts of block i from the trained model on fit, their unit from `score` (ids [N, S])."""
    h = decoder.streams(fit)[i]
    seen = decoder.inside(i, h)
    loss = gradients(decoder, i, seen.mid, fit)
    attention, mlp = decoder.projections(i)
    typical = typical_additions(decoder, score)
    of_part: dict[Part, tuple[Projection, Array, Array]] = {
        "attention": (attention, seen.attention_features, loss.at_mid),
        "mlp": (mlp, seen.mlp_features, loss.at_out),
    }
    result: dict[Part, Step] = {}
    for part, (trained, features, gradient) in of_part.items():
        X = columns(features, trained)
        directions = {r: direction(X, tokens(gradient), r) for r in RIDGES}
        result[part] = Step(trained, X, directions, typical[part] * float(np.sqrt(fit.size)))
    return result


def stepped(step: Step, r: float, length: float, name: str | None = None) -> Projection:
    """The projection after the step of that length (in units); with a set's name, its weights are rounded into it."""
    D = step.directions[r]
    moved = float(np.linalg.norm(step.X @ D))
    eta = length * step.unit / moved if moved > 0 else 0.0
    weight, bias = change(step.trained, -eta * D)
    if name is None:
        return weight, bias
    inputs = step.X[:, : len(weight)]
    return round_in_gram(weight.T, inputs.T @ inputs, name).T, bias


def candidates(
    of_part: Mapping[Part, Step],
    target: str,
    sets: Mapping[Part, str] | None = None,
    free_lengths: Sequence[float] = FREE_LENGTHS,
    set_lengths: Sequence[float] = SET_LENGTHS,
) -> list[Change]:
    """No change, then every r and, inside it, every length; parts without a set are unrestricted.

    The lengths are `set_lengths` when a part of the target has a set, else `free_lengths`.
    """
    parts, sets = TARGETS[target], sets or {}
    lengths = set_lengths if any(part in sets for part in parts) else free_lengths
    tried = [(r, length) for r in RIDGES for length in lengths]
    return [{}] + [{part: stepped(of_part[part], r, length, sets.get(part)) for part in parts} for r, length in tried]


def losses(decoder: Decoder, i: int, h: Array, ids: Ids, changed: Change) -> Array:
    """Loss of each sequence [N] with the changed block i on h [N, S, d] and the trained blocks after it."""
    out = decoder.block(i, h, attention=changed.get("attention"), mlp=changed.get("mlp"))
    return loss_after(decoder, i, out, ids)


def headroom(
    decoder: Decoder,
    i: int,
    fit: Ids,
    select: Ids,
    confirm: Ids,
    sets: Mapping[Part, str] | None = None,
    free_lengths: Sequence[float] = FREE_LENGTHS,
    set_lengths: Sequence[float] = SET_LENGTHS,
) -> dict[str, dict[str, Any]]:
    """Per target "attention", "mlp" and "block" a dict, from token ids [N, S]; `sets` maps a part to a weight set.

    `estimate` (Interval): trained loss - winner's loss on confirm; `candidate`: the winner's place in the order of
    `candidates`; `margin_on_select`: runner-up's mean loss - winner's; `select_losses`: mean loss of each candidate;
    `losses`: the winner's loss of each sequence of confirm.
    """
    of_part = steps(decoder, i, fit, np.concatenate([select, confirm]))
    h_select, h_confirm = decoder.streams(select)[i], decoder.streams(confirm)[i]
    trained = losses(decoder, i, h_confirm, confirm, {})
    reports = {}
    for target in TARGETS:
        tried = candidates(of_part, target, sets, free_lengths, set_lengths)
        on_select = [float(losses(decoder, i, h_select, select, changed).mean()) for changed in tried]
        winner = int(np.argmin(on_select))
        best, second = sorted(on_select)[:2]
        on_confirm = losses(decoder, i, h_confirm, confirm, tried[winner])
        reports[target] = {
            "estimate": paired(trained - on_confirm),
            "candidate": winner,
            "margin_on_select": second - best,
            "select_losses": on_select,
            "losses": on_confirm,
        }
    return reports


def shares(
    decoder: Decoder,
    i: int,
    fit: Ids,
    select: Ids,
    confirm: Ids,
    sets: Mapping[Part, str],
    free_lengths: Sequence[float] = FREE_LENGTHS,
    set_lengths: Sequence[float] = SET_LENGTHS,
) -> dict[str, Interval]:
    """`optimization_share`: what block i can gain inside its sets; `quantization_share`: what they cost it beyond."""
    inside = headroom(decoder, i, fit, select, confirm, sets, free_lengths, set_lengths)["block"]
    free = headroom(decoder, i, fit, select, confirm, None, free_lengths, set_lengths)["block"]
    return {
        "optimization_share": inside["estimate"],
        "quantization_share": paired(inside["losses"] - free["losses"]),
    }
