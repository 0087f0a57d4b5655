"""What an adapter makes of each tensor of its base model, decided from names and shapes. Imports no torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .adapter_config import CONFIG, LoraSettings, refused
from .adapter_names import TOKENS, sort_names
from .base_names import BaseNames, Shapes

Shape = tuple[int, ...]

CONV1D_TYPES = frozenset({"gpt2", "openai-gpt", "imagegpt", "decision_transformer"})
"""Values of model_type whose projections are Conv1D: their weights are stored [inputs, outputs]."""

_OF_MATRICES = frozenset({"lora_A", "lora_B", "lora_B.bias", "lora_magnitude_vector"})
_PAIR_OF_EMBEDDINGS = frozenset({"lora_embedding_A", "lora_embedding_B"})
_OF_EMBEDDINGS = _PAIR_OF_EMBEDDINGS | {"lora_magnitude_vector"}


@dataclass(frozen=True)
class Pair:
    """`scaling` * B A, added to a matrix, or its transpose to one that is stored [inputs, outputs].

    `a` [rank, inputs] and `b` [outputs, rank] are names in the adapter, as is `magnitude` [outputs]: with it (DoRA) the
    weights of each output are then scaled to that length.
    """

    a: str
    b: str
    scaling: float
    is_transposed: bool
    magnitude: str | None = None


@dataclass(frozen=True)
class Origin:
    """Where one tensor of the merged model comes from.

    It begins as the tensor `base` of the base model, or as `replacement` of the adapter. To it the product of `pair` is
    added, or `scaling` times the adapter's `bias`, or its rows `tokens` become those of the adapter's `rows`.
    """

    shape: Shape
    base: str = ""
    replacement: str = ""
    pair: Pair | None = None
    bias: str = ""
    scaling: float = 0.0
    rows: str = ""
    tokens: Sequence[int] = ()

    @property
    def is_changed(self) -> bool:
        return bool(self.replacement or self.pair or self.bias or self.rows)


@dataclass(frozen=True)
class Merger:
    """The tensors of the merged model by the names of the base model, and its config.json."""

    origins: Mapping[str, Origin]
    config: Mapping[str, Any]


def plan(settings: LoraSettings, adapter: Shapes, base: Shapes, config: Mapping[str, Any]) -> Merger:
    """What becomes of each tensor of `base`; raises CheckpointError, by its name, for what does not fit it."""
    planner = _Planner(settings, adapter, base, config)
    sorted_names = sort_names(adapter)
    for target, tensor in sorted_names.replacements.items():
        planner.replace(target, tensor)
    for module, parts in sorted_names.parts.items():
        planner.add(module, parts)
    return planner.merger()


class _Planner:
    def __init__(self, settings: LoraSettings, adapter: Shapes, base: Shapes, config: Mapping[str, Any]) -> None:
        self._settings = settings
        self._adapter = adapter
        self._base = base
        self._config = config
        self._names = BaseNames(base, config)
        self._origins = {name: Origin(shape, base=name) for name, shape in base.items()}

    def replace(self, target: str, tensor: str) -> None:
        """A tensor of the adapter replaces one of the base model (of modules_to_save, a bias, an embedding)."""
        stored = self._stored(target)
        origin, shape = self._origins[stored], self._adapter[tensor]
        may_grow = len(shape) == 2 and origin.shape[0] == self._config.get("vocab_size")
        if shape != origin.shape and not (may_grow and shape[1] == origin.shape[1]):
            raise self._misshapen(tensor, origin.shape)
        self._origins[stored] = Origin(shape, replacement=tensor)

    def add(self, module: str, parts: Mapping[str, str]) -> None:
        """What the adapter's pair of matrices, and its bias, add to those of a module; or its rows of tokens."""
        if parts.keys() == {TOKENS}:
            self._set_rows(module, parts[TOKENS])
            return
        is_embedding = not _PAIR_OF_EMBEDDINGS.isdisjoint(parts)
        a, b = ("lora_embedding_A", "lora_embedding_B") if is_embedding else ("lora_A", "lora_B")
        if strange := sorted(parts.keys() - (_OF_EMBEDDINGS if is_embedding else _OF_MATRICES)):
            raise refused(f"the adapter's tensor `{parts[strange[0]]}`", "is of a kind that is not merged here")
        if missing := sorted({a, b} - parts.keys()):
            raise refused(f"the adapter's module `{module}`", f"has no {missing[0]}")
        has_magnitude = "lora_magnitude_vector" in parts
        if has_magnitude != self._settings.by_magnitude:
            raise refused(
                f"the adapter's module `{module}`",
                f"has {'a' if has_magnitude else 'no'} magnitude (DoRA), and {CONFIG} says otherwise",
            )
        stored = self._stored(f"{module}.weight")
        pair = self._pair(module, parts[a], parts[b], self._origins[stored].shape, is_embedding=is_embedding)
        if has_magnitude:
            pair = dataclasses.replace(pair, magnitude=parts["lora_magnitude_vector"])
            self._check_shape(pair.magnitude, self._adapter[pair.b][:1])
        self._origins[stored] = dataclasses.replace(self._origins[stored], pair=pair)
        if "lora_B.bias" in parts:
            self._add_bias(module, parts["lora_B.bias"], pair.scaling)

    def _pair(self, module: str, a: str, b: str, shape: Shape, *, is_embedding: bool) -> Pair:
        shape_a, shape_b, rank = self._adapter[a], self._adapter[b], self._settings.rank_of(module)
        if len(shape_a) != 2 or shape_a[0] != rank:
            raise refused(f"the adapter's tensor `{a}`", f"has shape {list(shape_a)}; {CONFIG} says rank {rank}")
        if len(shape_b) != 2 or shape_b[1] != rank:
            raise refused(f"the adapter's tensor `{b}`", f"has shape {list(shape_b)}; {CONFIG} says rank {rank}")
        product = (shape_b[0], shape_a[1])
        # peft decides by the class of the module; a matrix that is not square shows which it is.
        is_square = product[0] == product[1]
        is_conv1d = self._config.get("model_type") in CONV1D_TYPES or self._settings.fan_in_fan_out
        is_transposed = is_embedding or (is_conv1d if is_square else shape != product)
        if shape != (product[::-1] if is_transposed else product):
            raise refused(
                f"the adapter's module `{module}`",
                f"has matrices for a weight of {list(product)}; that of its base model is {list(shape)}",
            )
        return Pair(a, b, self._settings.scaling_of(module), is_transposed)

    def _add_bias(self, module: str, tensor: str, scaling: float) -> None:
        stored = self._stored(f"{module}.bias")
        origin = self._origins[stored]
        self._check_shape(tensor, origin.shape)
        self._origins[stored] = dataclasses.replace(origin, bias=tensor, scaling=scaling)

    def _set_rows(self, module: str, tensor: str) -> None:
        stored = self._stored(f"{module}.weight")
        origin, tokens = self._origins[stored], self._settings.tokens_of(module)
        self._check_shape(tensor, (len(tokens), *origin.shape[1:]))
        if max(tokens, default=0) >= origin.shape[0]:
            raise refused(CONFIG, f"has the token {max(tokens)} in trainable_token_indices; {stored} ends before it")
        self._origins[stored] = dataclasses.replace(origin, rows=tensor, tokens=tokens)

    def _stored(self, target: str) -> str:
        """The name of the base model's tensor that the adapter means by `target`; a tied head is given one."""
        if self._names.is_tied_head(target):
            return self._own_head(target)
        stored = self._names.find(target)
        if stored is None:
            raise refused(
                f"the adapter changes `{target}`",
                "which its base model does not store: it is the adapter of another model",
            )
        return stored

    def _own_head(self, target: str) -> str:
        """The name of the head's weight, which is apart from the embedding that it was tied to from now on."""
        assert self._names.embedding is not None
        head = self._names.head or target
        origin = self._origins.get(head)
        if origin is None or not origin.is_changed:
            self._origins[head] = Origin(self._base[self._names.embedding], base=self._names.embedding)
        return head

    def merger(self) -> Merger:
        """What was planned, as a whole."""
        if not any(origin.is_changed for origin in self._origins.values()):
            raise refused("the adapter", "changes no tensor of its base model")
        config = dict(self._config)
        embedding = self._names.embedding
        if self._names.is_tied and embedding is not None and self._is_untied(embedding):
            self._own_head(self._names.head or "lm_head.weight")
            config["tie_word_embeddings"] = False
        rows = {self._origins[name].shape[0] for name in (embedding, self._names.head) if name is not None}
        if len(rows) > 1:
            raise refused("the adapter", f"leaves the embedding and the head with {sorted(rows)} rows")
        if rows and embedding is not None and rows != {self._base[embedding][0]}:
            config["vocab_size"] = rows.pop()
        return Merger(self._origins, config)

    def _is_untied(self, embedding: str) -> bool:
        """Whether the head's weights are not the embedding's any more: peft changes each module on its own."""
        head = self._origins.get(self._names.head or "lm_head.weight")
        if head is not None and (self._names.head is None or head.is_changed):
            return True
        changed = self._origins[embedding]
        # peft gives the rows of tokens to a tied head too, and so does resizing the vocabulary.
        return changed.is_changed and not changed.rows and changed.shape == self._base[embedding]

    def _check_shape(self, tensor: str | None, shape: Shape) -> None:
        if tensor is not None and self._adapter[tensor] != shape:
            raise self._misshapen(tensor, shape)

    def _misshapen(self, tensor: str, shape: Shape) -> Exception:
        shape_there = list(self._adapter[tensor])
        return refused(f"the adapter's tensor `{tensor}`", f"has shape {shape_there} instead of {list(shape)}")
