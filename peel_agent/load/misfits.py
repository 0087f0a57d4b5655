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
    if misshapen and all(len(stored) == 2 and stored == expected[::-1] for stored, expected in misshapen.values()):
        return (
            "the matrices are stored the other way round, as nanoGPT's are: transpose them, or build the model that "
            "wrote them with `[model] factory`"
        )
    if (rows := _rows_of_vocabulary(config.get("vocab_size"), misshapen.values())) and not missing and not unexpected:
        return f"set vocab_size to {rows} in config.json: the embeddings have as many rows; the probe stays as it is"
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


def _rows_of_vocabulary(vocabulary: object, shapes: Collection[tuple[Shape, Shape]]) -> int | None:
    """The rows that embeddings and head have instead of `vocabulary`; None where another size differs as well."""
    rows = {
        stored[0] if _differs_in_rows(stored, expected) and expected[0] == vocabulary else None
        for stored, expected in shapes
    }
    return rows.pop() if len(rows) == 1 else None


def _differs_in_rows(stored: Shape, expected: Shape) -> bool:
    return len(stored) == len(expected) > 0 and stored[1:] == expected[1:]
