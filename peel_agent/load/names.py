"""The tensors of a checkpoint under the names of the model that they belong to, every one accounted for."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import chain, islice
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from peel_agent.errors import WeightsMismatch
from peel_agent.records import AdjacentPairs, Experts, Weights

Stored: TypeAlias = str | Experts | AdjacentPairs


class NamedWeights:
    """The tensors of a checkpoint under the names of the model's own state dict, tied names resolved.

    A weight is stored under the model's own name or as `stored_as` says (records.Anatomy); what it is put together from
    is read when it is asked for, and nothing else.
    """

    def __init__(
        self,
        stored: Weights,
        model: nn.Module,
        stored_as: Mapping[str, Stored],
        *,
        tied: Mapping[str, str] | None = None,
        ignored: Iterable[str] = (),
    ) -> None:
        self._stored = stored
        self._shapes = stored.shapes()
        self._expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        self._ignored = [re.compile(pattern) for pattern in ignored]
        self.tied = dict(tied or {})
        self._renamed = _renamed(self._shapes, self._expected, stored_as)
        self._pieces = {name: self._pieces_of(name) for name in self._expected}
        for name, other in self.tied.items():
            if not self._pieces[name].names:
                self._pieces[name] = self._pieces[other]

    def config(self) -> Mapping[str, Any]:
        return self._stored.config()

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return self._expected

    def _pieces_of(self, name: str) -> _Pieces:
        if name in self._shapes:
            return _Pieces(self._expected[name], names={0: name})
        renamed = self._renamed.get(name)
        return renamed if renamed is not None and renamed.names else _Pieces(self._expected[name])

    def read(self, name: str) -> Tensor:
        pieces = self._pieces[name]
        first = self._stored.read(pieces.names[0])
        if pieces.count == 1:
            return _halves(first, pieces.heads) if pieces.heads else first.reshape(self._expected[name])
        whole = torch.empty((pieces.count, *pieces.shape), dtype=first.dtype)
        for place in range(pieces.count):
            piece = self._stored.read(pieces.names[place]) if place else first
            if piece.dtype != first.dtype:
                raise WeightsMismatch(
                    f"{pieces.names[0]} is {first.dtype}, but {pieces.names[place]} is {piece.dtype}",
                    remedy="save all experts of a block in one dtype",
                )
            whole[place] = piece
        return whole.reshape(self._expected[name])

    def check(self) -> None:
        """Raises WeightsMismatch unless every weight of the model is there once, in its shape, and nothing else."""
        problems = []
        if missing := sum(pieces.count - len(pieces.names) for pieces in self._pieces.values()):
            absent = chain.from_iterable(pieces.absent(name) for name, pieces in self._pieces.items())
            problems.append(f"missing {_some(absent, missing)}")
        every = chain(self._pieces.values(), self._renamed.values())
        known = self._expected.keys() | {name for pieces in every for name in pieces.names.values()}
        extra = [name for name in self._shapes if name not in known and not any(p.search(name) for p in self._ignored)]
        if extra:
            problems.append(f"unexpected {_some(extra, len(extra))}")
        wrong = [
            f"{name} {list(self._shapes[name])} instead of {list(pieces.shape)}"
            for pieces in self._pieces.values()
            for name in pieces.names.values()
            if self._shapes[name] != pieces.shape
        ]
        if wrong:
            problems.append(f"misshapen {_some(wrong, len(wrong))}")
        twice = [
            f"{name} and {min(pieces.names.values())}"
            for name, pieces in self._renamed.items()
            if name in self._shapes and pieces.names
        ]
        if twice:
            problems.append(f"stored under two names {_some(twice, len(twice))}")
        if problems:
            raise WeightsMismatch(
                "the weights do not fit config.json: " + "; ".join(problems),
                remedy="config.json and the weights must come from the same model, saved with save_pretrained",
            )


@dataclass
class _Pieces:
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

    def __init__(self, own: str, stored: Stored) -> None:
        self._own = own
        self._by_expert = isinstance(stored, Experts)
        self._heads = stored.heads if isinstance(stored, AdjacentPairs) else 0
        self._parts = stored.parts if isinstance(stored, Experts) else (_name_of(stored),)
        self._own_pattern = _pattern(own)
        self._patterns = [_pattern(part) for part in self._parts]

    def pieces(self, name: str, shape: tuple[int, ...]) -> _Pieces | None:
        """The pieces of a weight of the model, none of them found yet; None when the rule is not about it."""
        match = self._own_pattern.fullmatch(name)
        if match is None:
            return None
        templates = tuple(_filled(part, match) for part in self._parts)
        if not self._by_expert:
            return _Pieces(shape, 1, templates, self._heads)
        experts, rows, columns = shape
        return _Pieces((rows // len(templates), columns), experts * len(templates), templates)

    def place(self, stored: str) -> tuple[str, int] | None:
        """The weight of the model that a stored tensor is a piece of, and its place there; None when of none."""
        for part, pattern in enumerate(self._patterns):
            if match := pattern.fullmatch(stored):
                expert = int(match.groupdict().get("expert", 0))
                return _filled(self._own, match), expert * len(self._parts) + part
        return None


def _name_of(stored: str | AdjacentPairs) -> str:
    return stored.name if isinstance(stored, AdjacentPairs) else stored


def _halves(pairs: Tensor, heads: int) -> Tensor:
    """[heads * head_dim, d] with the first rows of all pairs of a head before their second ones."""
    return pairs.reshape(heads, -1, 2, pairs.shape[1]).transpose(1, 2).reshape(pairs.shape)


def _pattern(template: str) -> re.Pattern[str]:
    """What fits a name in which `{block}` and `{expert}` stand for numbers, written in one way only."""
    return re.compile(re.sub(r"\\\{(block|expert)\\\}", r"(?P<\1>0|[1-9][0-9]{0,8})", re.escape(template)))


def _filled(template: str, match: re.Match[str]) -> str:
    return template.replace("{block}", match.groupdict().get("block", ""))


def _renamed(
    stored: Iterable[str], expected: Mapping[str, tuple[int, ...]], stored_as: Mapping[str, Stored]
) -> dict[str, _Pieces]:
    """The pieces of each weight that `stored_as` is about, by the model's name.

    Time grows with what is stored, however many experts config.json claims.
    """
    rules = [_Rule(own, other) for own, other in stored_as.items()]
    found = {name: pieces for name, shape in expected.items() for rule in rules if (pieces := rule.pieces(name, shape))}
    for name in stored:
        for own, place in filter(None, (rule.place(name) for rule in rules)):
            if own in found and place < found[own].count:
                found[own].names[place] = name
    return found


def _some(names: Iterable[str], count: int, limit: int = 4) -> str:
    shown = ", ".join(islice(names, limit))
    return shown if count <= limit else f"{shown} and {count - limit} more"
