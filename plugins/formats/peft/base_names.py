"""The names of a base model's tensors, as the modules of an adapter mean them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .adapter_names import without_wrappers

Shapes = Mapping[str, tuple[int, ...]]

HEADS = ("lm_head", "embed_out")
"""Modules that turn the last hidden state into logits; a tied one is not stored."""


class BaseNames:
    """Finds the tensor of a base model that an adapter means.

    PEFT names the modules of the model that was trained; its files may lack the name of the base model before them
    (`h.0.attn` for `transformer.h.0.attn`), or have one more, as from_pretrained allows.
    """

    def __init__(self, shapes: Shapes, config: Mapping[str, Any]) -> None:
        self._stored = {without_wrappers(name): name for name in shapes}
        self._by_rest: dict[str, list[str]] = {}
        for plain, name in self._stored.items():
            self._by_rest.setdefault(plain.partition(".")[2], []).append(name)
        self.embedding = self._embedding(shapes, config.get("vocab_size"))
        self.head = next((stored_name for head in HEADS if (stored_name := self.find(f"{head}.weight"))), None)
        self.is_tied = self.embedding is not None and (
            config.get("tie_word_embeddings") is True
            or (config.get("tie_word_embeddings") is None and self.head is None)
        )

    def find(self, name: str) -> str | None:
        """The stored name of a tensor, None when it is not stored."""
        rest = name.partition(".")[2]
        longer = self._by_rest.get(name, [])
        return self._stored.get(name) or self._stored.get(rest) or (longer[0] if len(longer) == 1 else None)

    def is_tied_head(self, name: str) -> bool:
        """Whether a name is that of the head's weight, which is the embedding's."""
        return self.is_tied and name in {f"{head}.weight" for head in HEADS}

    def _embedding(self, shapes: Shapes, vocabulary: object) -> str | None:
        """The embedding of tokens: the one matrix besides the head with a row for each; None when it is not clear."""
        rows = [
            name
            for plain, name in self._stored.items()
            if len(shapes[name]) == 2 and shapes[name][0] == vocabulary and plain.split(".")[-2] not in HEADS
        ]
        named = [name for name in rows if "embed" in name or "wte" in name]
        return next(iter(rows if len(rows) == 1 else named), None) if len(rows) == 1 or len(named) == 1 else None
