"""What one weight of a model is put together from where checkpoints store it otherwise (records.Anatomy.stored_as)."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

from torch import Tensor

from peel_agent.records import AdjacentPairs, Experts

Stored: TypeAlias = str | Experts | AdjacentPairs


@dataclass
class Pieces:
    """What one weight of the model is put together from: `count` stored tensors of one shape, one after another.

    `names` has those that are there by their place; `templates` are the names of one expert's, or of the only one.
    `heads` says how many have their rows in adjacent pairs.
    """

    shape: tuple[int, ...]
    count: int = 1
    templates: tuple[str, ...] = ()
    heads: int = 0
    names: dict[int, str] = field(default_factory=dict)

    def absent(self, name: str) -> Iterator[str]:
        """The names of the pieces that are not there, or that of the weight itself when none is."""
        if not self.names:
            return iter((name,))
        return (self._called(place) for place in range(self.count) if place not in self.names)

    def _called(self, place: int) -> str:
        expert, part = divmod(place, len(self.templates))
        return self.templates[part].replace("{expert}", str(expert))


class _Rule:
    """One entry of `stored_as`: the weights of the model that it is about, and their pieces in a checkpoint."""

    def __init__(self, weight: str, stored: Stored) -> None:
        self._weight = weight
        self._by_expert = isinstance(stored, Experts)
        self._heads = stored.heads if isinstance(stored, AdjacentPairs) else 0
        self._parts = stored.parts if isinstance(stored, Experts) else (_name_of(stored),)
        self._weight_pattern = _pattern(weight)
        self._patterns = [_pattern(part) for part in self._parts]

    def pieces(self, name: str, shape: tuple[int, ...]) -> Pieces | None:
        """The pieces of a weight of the model, none of them found yet; None when the rule is not about it."""
        match = self._weight_pattern.fullmatch(name)
        if match is None:
            return None
        templates = tuple(_filled(part, match) for part in self._parts)
        if not self._by_expert:
            return Pieces(shape, 1, templates, self._heads)
        experts, rows, columns = shape
        return Pieces((rows // len(templates), columns), experts * len(templates), templates)

    def place(self, stored: str) -> tuple[str, int] | None:
        """The weight of the model that a stored tensor is a piece of, and its place there; None when of none."""
        for part, pattern in enumerate(self._patterns):
            if match := pattern.fullmatch(stored):
                expert = int(match.groupdict().get("expert", 0))
                return _filled(self._weight, match), expert * len(self._parts) + part
        return None


def _name_of(stored: str | AdjacentPairs) -> str:
    return stored.name if isinstance(stored, AdjacentPairs) else stored


def halves(pairs: Tensor, heads: int) -> Tensor:
    """[heads * head_dim, d] with the first rows of all pairs of a head before their second ones."""
    return pairs.reshape(heads, -1, 2, pairs.shape[1]).transpose(1, 2).reshape(pairs.shape)


def _pattern(template: str) -> re.Pattern[str]:
    """What fits a name in which `{block}` and `{expert}` stand for numbers, written in one way only."""
    return re.compile(re.sub(r"\\\{(block|expert)\\\}", r"(?P<\1>0|[1-9][0-9]{0,8})", re.escape(template)))


def _filled(template: str, match: re.Match[str]) -> str:
    return template.replace("{block}", match.groupdict().get("block", ""))


class StoredAs:
    """All of `stored_as`."""

    def __init__(self, stored_as: Mapping[str, Stored], expected: Mapping[str, tuple[int, ...]]) -> None:
        self._rules = [_Rule(weight, stored) for weight, stored in stored_as.items()]
        self._expected = expected

    def composed(self) -> dict[str, Pieces]:
        """The pieces of each weight that a rule is about, none of them found yet."""
        every = ((name, rule.pieces(name, shape)) for name, shape in self._expected.items() for rule in self._rules)
        return {name: pieces for name, pieces in every if pieces is not None}

    def places(self, stored: str) -> list[tuple[str, int]]:
        return [place for rule in self._rules if (place := rule.place(stored)) is not None]
