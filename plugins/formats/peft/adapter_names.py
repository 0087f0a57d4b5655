"""The names in an adapter's file: which tensor belongs to which module of the base model, and as what."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from .adapter_config import refused

PREFIX = "base_model.model."
"""What PEFT puts before the names of the base model's modules."""

_WRAPPERS = frozenset({"_orig_mod", "module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
_PAIR = frozenset({"lora_A", "lora_B"})
_ALONE = frozenset({"lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector", "trainable_tokens_delta"})
TOKENS = "trainable_tokens_delta"
_WRAPPED = frozenset({"base_layer", "modules_to_save", "original_module", "token_adapter"})


@dataclass
class AdapterNames:
    """The tensors of an adapter: `parts` has those of each module (`lora_A`, `lora_B`, `lora_B.bias`, ...) by their
    place in it, `replacements` those that take the place of a tensor of the base model, by that tensor's name.
    """

    parts: dict[str, dict[str, str]] = field(default_factory=dict)
    replacements: dict[str, str] = field(default_factory=dict)


def without_wrappers(name: str) -> str:
    """A name without what torch.compile, DistributedDataParallel, FSDP and checkpointing put into it."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def sort_names(names: Iterable[str]) -> AdapterNames:
    """Every tensor's module and place; raises CheckpointError for a name that PEFT does not write for LoRA."""
    adapter_names = AdapterNames()
    adapters: set[str] = set()
    wholes: list[tuple[str, list[str], int]] = []
    for name in names:
        plain = without_wrappers(name)
        if not plain.startswith(PREFIX):
            raise refused(f"the adapter's tensor `{name}`", f"has a name that does not begin with {PREFIX}")
        path = plain.removeprefix(PREFIX).split(".")
        place = next((at for at, part in enumerate(path) if part in _WRAPPED or part.startswith("lora_")), None)
        if place is not None and path[place] == "modules_to_save":
            wholes.append((name, path, place))
        elif place is None:
            _add(adapter_names.replacements, ".".join(path), name)
        else:
            _sort(name, path, place, adapter_names, adapters)
    if len(adapters) > 1:
        raise refused("the adapter's file", f"holds several adapters: {', '.join(sorted(adapters)[:4])}")
    for name, path, place in wholes:
        rest = path[place + 1 :]
        rest = rest[1:] if rest[:1] in ([adapter] for adapter in {"default", *adapters}) else rest
        # peft may save such a module a second time under its plain name.
        adapter_names.replacements.setdefault(".".join((*path[:place], *rest)), name)
    return adapter_names


def _sort(name: str, path: list[str], place: int, adapter_names: AdapterNames, adapters: set[str]) -> None:
    module, part, rest = ".".join(path[:place]), path[place], path[place + 1 :]
    if part == "original_module":  # the base model's own, as it was
        return
    if part == "token_adapter" and rest[:1] in (["base_layer"], [TOKENS]):
        part, rest = rest[0], rest[1:]
    if part == "base_layer":
        _add(adapter_names.replacements, ".".join((module, *rest)), name)
        return
    if part in _PAIR and rest and rest[-1] in ("weight", "bias"):
        part, rest = part if rest[-1] == "weight" else f"{part}.bias", rest[:-1]
    elif part == "lora_magnitude_vector" and rest[-1:] == ["weight"]:
        rest = rest[:-1]
    elif part not in _ALONE:
        raise refused(f"the adapter's tensor `{name}`", "has a name that is not known of LoRA")
    if len(rest) > 1 or not module:
        raise refused(f"the adapter's tensor `{name}`", "has a name that is not known of LoRA")
    adapters.update(rest)
    _add(adapter_names.parts.setdefault(module, {}), part, name)


def _add(table: dict[str, str], key: str, name: str) -> None:
    if key in table:
        raise refused(f"the adapter's tensors `{table[key]}` and `{name}`", "are one and the same tensor twice")
    table[key] = name
