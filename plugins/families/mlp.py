"""Fully connected ReLU networks: `{"model_type": "mlp"}` in config.json, layers as torch.nn.Sequential saves them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from peel_agent.records import Stack


class MLPFamily:
    name = "mlp"
    model_types = frozenset({"mlp"})

    def anatomy(self, config: Mapping[str, Any]) -> Stack:  # noqa: ARG002 - the weights themselves say the rest
        return Stack()


FAMILY = MLPFamily()
