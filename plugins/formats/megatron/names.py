"""Which part of Megatron-core's tensors each weight of a transformers model is.

Megatron stacks the layers of a GPTModel in one tensor or numbers them, keeps queries, keys and values in one matrix,
group by group, gate and up in another, fuses norms into the projection behind them, and pads the vocabulary.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from peel_agent.errors import CheckpointError

from .metadata import BRIDGE
from .places import FOREIGN, MODELS, Kind, Place

Rows = tuple[tuple[int, int], ...]
"""First row and the one after the last, of stretches that follow one another."""

MAX_LAYERS = 2_000
CONFIG_FIX = "put the config.json of this very model beside it or in the folder above"
_STACK = "decoder.layers."


@dataclass(frozen=True, slots=True)
class Part:
    """A weight of shape `shape`: `rows` of the tensor `stored`, or of its `layer`; turned, if `transposed`."""

    stored: str
    layer: int | None
    rows: Rows
    shape: tuple[int, ...]
    transposed: bool


@dataclass(frozen=True, slots=True)
class ModelSizes:
    """What of a config.json decides how Megatron lays out the weights; `kind` is its model_type."""

    kind: str
    layers: int
    vocabulary: int
    heads: int
    groups: int
    head_size: int


def model_sizes(config: Mapping[str, Any]) -> ModelSizes:
    """The sizes in a config.json. Raises CheckpointError for a model that is not mapped, and for what is no count."""
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in MODELS:
        raise CheckpointError(
            f"the layout of Megatron-core is mapped for {', '.join(MODELS)}; config.json has model_type "
            f"{ascii(kind)[:60]}",
            remedy=BRIDGE,
        )
    gpt2 = kind == "gpt2"
    width = _count(config, "n_embd" if gpt2 else "hidden_size")
    layers = _count(config, "n_layer" if gpt2 else "num_hidden_layers", MAX_LAYERS)
    heads = _count(config, "n_head" if gpt2 else "num_attention_heads")
    grouped = not gpt2 and config.get("num_key_value_heads") is not None
    groups = _count(config, "num_key_value_heads") if grouped else heads
    sized = not gpt2 and config.get("head_dim") is not None
    head_size = _count(config, "head_dim") if sized else width // heads
    if heads % groups:
        raise CheckpointError(
            f"config.json has {heads} heads in {groups} groups, which is no whole number", remedy=CONFIG_FIX
        )
    return ModelSizes(kind, layers, _count(config, "vocab_size", 2**31), heads, groups, head_size)


def _count(config: Mapping[str, Any], key: str, limit: int = 1_000_000) -> int:
    value = config.get(key)
    if type(value) is not int or not 0 < value <= limit:
        raise CheckpointError(
            f"config.json has {key} {ascii(value)[:60]}, not a count from 1 to {limit:,}", remedy=CONFIG_FIX
        )
    return value


def model_parts(model: ModelSizes, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Part]:
    """The part of a stored tensor that each weight of a model is, by transformers' name.

    `shapes` are those of the stored tensors. Weights that the checkpoint lacks are left out, for the load room to
    name. Raises CheckpointError for a stored tensor that has no place in the model, and for shapes that do not fit.
    """
    blocks, top, layer = MODELS[model.kind]
    prefix = _prefix(shapes)
    finder = _Finder({name.removeprefix(prefix): shape for name, shape in shapes.items()}, model, prefix)
    parts = dict(finder.top(top))
    for number in range(model.layers):
        parts |= {f"{blocks}{number}.{weight}": part for weight, part in finder.layer(layer, number)}
    strange = sorted(finder.shapes.keys() - finder.used)
    if strange:
        raise _strange(strange, model)
    return parts


def _strange(names: list[str], model: ModelSizes) -> CheckpointError:
    shown = ascii(names[0][:200])[1:-1]
    for pattern, what in FOREIGN.items():
        foreign = next((name for name in names if re.search(pattern, name)), None)
        if foreign is not None:
            return CheckpointError(
                f"`{ascii(foreign[:200])[1:-1]}` belongs to {what}, whose Megatron layout is not mapped", remedy=BRIDGE
            )
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return CheckpointError(
        f"`{shown}`{more} has no place in a {model.kind} of {model.layers} layers as config.json describes it",
        remedy=f"{CONFIG_FIX}; or {BRIDGE}",
    )


def _prefix(names: Mapping[str, object]) -> str:
    """What NeMo and wrappers put before every name."""
    for prefix in ("module.", "model."):
        if all(name.startswith(prefix) for name in names):
            return prefix
    return ""


class _Finder:
    """Finds places among the stored tensors, and keeps in `used` which of these were found."""

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], model: ModelSizes, prefix: str) -> None:
        self.shapes = shapes
        self.model = model
        self.prefix = prefix
        self.used: set[str] = set()

    def top(self, places: tuple[Place, ...]) -> Iterator[tuple[str, Part]]:
        for place in places:
            for name, kind in place.among:
                if name in self.shapes:
                    yield place.weight, self._part(name, None, self.shapes[name], kind, place)
                    break

    def layer(self, places: tuple[Place, ...], number: int) -> Iterator[tuple[str, Part]]:
        for place in places:
            for name, kind in place.among:
                single, stacked = f"{_STACK}{number}.{name}", _STACK + name
                if single in self.shapes:
                    yield place.weight, self._part(single, None, self.shapes[single], kind, place)
                    break
                if stacked in self.shapes:
                    yield place.weight, self._part(stacked, number, self._in_stack(stacked), kind, place)
                    break

    def _in_stack(self, name: str) -> tuple[int, ...]:
        shape = self.shapes[name]
        if shape[:1] != (self.model.layers,):
            raise CheckpointError(
                f"`{name}` of shape {shape} is no stack of the {self.model.layers} layers that config.json has",
                remedy=CONFIG_FIX,
            )
        return shape[1:]

    def _part(self, name: str, layer: int | None, shape: tuple[int, ...], kind: Kind, place: Place) -> Part:
        self.used.add(name)
        if not shape or len(shape) > 2:
            raise CheckpointError(f"`{name}` has the shape {self.shapes[name]}, not that of a weight", remedy=BRIDGE)
        rows = self._rows(name, shape[0], kind)
        shape_of_rows = (sum(stop - start for start, stop in rows), *shape[1:])
        turned = place.transposed and len(shape_of_rows) == 2
        return Part(self.prefix + name, layer, rows, shape_of_rows[::-1] if turned else shape_of_rows, turned)

    def _rows(self, name: str, stored: int, kind: Kind) -> Rows:
        """Which of the `stored` rows of a tensor are meant."""
        model = self.model
        if kind == "whole":
            return ((0, stored),)
        if kind == "vocabulary":
            if stored < model.vocabulary:
                raise _misfit(name, stored, f"vocab_size {model.vocabulary}")
            return ((0, model.vocabulary),)
        if kind in ("gate", "up"):
            if stored % 2:
                raise _misfit(name, stored, "a gated MLP, gate and up of equal size")
            return ((0, stored // 2),) if kind == "gate" else ((stored // 2, stored),)
        needed = (model.heads + 2 * model.groups) * model.head_size
        if stored != needed:
            wanted = f"{model.heads} heads in {model.groups} groups of size {model.head_size}, {needed} rows"
            raise _misfit(name, stored, wanted)
        return _grouped(kind, model.heads // model.groups, model.groups, model.head_size)


def _misfit(name: str, stored: int, wanted: str) -> CheckpointError:
    return CheckpointError(f"`{name}` has {stored} rows where config.json has {wanted}", remedy=CONFIG_FIX)


# One object for all layers: a thousand groups in a thousand layers would be millions.
@lru_cache(maxsize=64)
def _grouped(kind: str, queries: int, groups: int, head_size: int) -> Rows:
    """Rows of queries, keys or values where each group has its queries, its key and its value side by side."""
    first = {"query": 0, "key": queries, "value": queries + 1}
    rows: list[tuple[int, int]] = []
    for part in kind.split():
        heads = queries if part == "query" else 1
        for group in range(groups):
            start = (group * (queries + 2) + first[part]) * head_size
            rows.append((start, start + heads * head_size))
    return tuple(rows)
