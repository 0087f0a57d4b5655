"""The tensors of a checkpoint under the names of the model that they belong to, every one accounted for."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from peel_agent.errors import WeightsMismatch
from peel_agent.records import Weights


class NamedWeights:
    """The tensors of a checkpoint under the names of the model's own state dict, tied names resolved."""

    def __init__(self, stored: Weights, model: nn.Module, stored_as: Mapping[str, str]) -> None:
        self._stored = stored
        self._stored_as = stored_as
        self._expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        self._ignored = [re.compile(p) for p in getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()]
        ties: Mapping[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
        settings: Any = model.config
        self.tied = dict(ties) if settings.tie_word_embeddings else {}

    def config(self) -> Mapping[str, Any]:
        return self._stored.config()

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return self._expected

    def read(self, name: str) -> Tensor:
        return self._stored.read(self._source(name))

    def _source(self, name: str) -> str:
        own = self._stored_as.get(name, name)
        return self.tied[name] if name in self.tied and own not in self._stored.shapes() else own

    def check(self) -> None:
        """Raises WeightsMismatch unless every weight of the model is there once, in its shape, and nothing else."""
        stored = self._stored.shapes()
        problems = []
        missing = [name for name in self._expected if self._source(name) not in stored]
        if missing:
            problems.append(f"missing {_some(missing)}")
        known = {self._stored_as.get(name, name) for name in self._expected}
        extra = [name for name in stored if name not in known and not any(p.search(name) for p in self._ignored)]
        if extra:
            problems.append(f"unexpected {_some(extra)}")
        wrong = [
            f"{name} {list(stored[self._source(name)])} instead of {list(shape)}"
            for name, shape in self._expected.items()
            if self._source(name) in stored and stored[self._source(name)] != shape
        ]
        if wrong:
            problems.append(f"misshapen {_some(wrong)}")
        if problems:
            raise WeightsMismatch(
                "the weights do not fit config.json: " + "; ".join(problems),
                remedy="config.json and the weights must come from the same model, saved with save_pretrained",
            )


def _some(names: list[str], limit: int = 4) -> str:
    shown = ", ".join(names[:limit])
    return shown if len(names) <= limit else f"{shown} and {len(names) - limit} more"
