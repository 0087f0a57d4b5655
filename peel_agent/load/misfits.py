"""What to do about weights that do not fit the model that config.json describes."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

Shape = tuple[int, ...]

FLAT = "flat_param"
"""How FSDP's name of a flattened tensor ends."""

SAME_MODEL = "config.json and the weights must come from the same model, saved with save_pretrained"


def remedy_for(
    config: Mapping[str, Any],
    *,
    missing: Collection[str],
    unexpected: Collection[str],
    misshapen: Mapping[str, tuple[Shape, Shape]],
    twice: Collection[str],
) -> str:
    """The way out that fits the names; `misshapen` has the stored shape and the model's."""
    if twice:
        return "save each weight once: two of the stored names are one weight of the model"
    if misshapen and not missing and not unexpected:
        return _of_shapes(config.get("vocab_size"), misshapen.values())
    if set(missing) == {"lm_head.weight"} and not unexpected and not misshapen:
        return (
            "save the causal language model (AutoModelForCausalLM), not its body alone; where the head is the "
            "embeddings, set tie_word_embeddings to true in config.json"
        )
    if any(name.endswith(FLAT) for name in unexpected):
        return (
            "save the full state dict (StateDictType.FULL_STATE_DICT) or with torch.distributed.checkpoint: FSDP has "
            "flattened the weights, and only the wrapped model can take them apart"
        )
    return SAME_MODEL


def _of_shapes(vocabulary: object, shapes: Collection[tuple[Shape, Shape]]) -> str:
    rows = {stored[0] for stored, own in shapes if _only_rows_differ(stored, own) and own[0] == vocabulary}
    if len(rows) == 1 and all(_only_rows_differ(stored, own) and own[0] == vocabulary for stored, own in shapes):
        return (
            f"set vocab_size to {rows.pop()} in config.json: the embeddings have as many rows; the probe stays as it is"
        )
    if all(len(stored) == 2 and stored == own[::-1] for stored, own in shapes):
        return (
            "the matrices are stored the other way round, as nanoGPT's are: transpose them, or build the model that "
            "wrote them with `[model] factory`"
        )
    return SAME_MODEL


def _only_rows_differ(stored: Shape, own: Shape) -> bool:
    return len(stored) == len(own) > 0 and stored[1:] == own[1:]
