"""The tensors of a checkpoint under the names of the model that they belong to, every one accounted for."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from peel_agent.errors import WeightsMismatch
from peel_agent.load.misfits import remedy_for
from peel_agent.load.pieces import Pieces, Stored, StoredAs, halves
from peel_agent.load.spellings import Buffers, Spellings
from peel_agent.records import Weights

MOST_ABSENT = 4
"""Names that are shown of one weight's missing pieces."""


class NamedWeights:
    """The tensors of a checkpoint under the names of the model's own state dict, tied names resolved.

    A weight is stored under the model's own name, under another that stands for it (spellings.py), or as `stored_as`
    says (records.Anatomy); what it is put together from is read when it is asked for, and nothing else.
    """

    def __init__(
        self,
        stored: Weights,
        model: nn.Module,
        stored_as: Mapping[str, Stored],
        *,
        tied: Mapping[str, str] | None = None,
        ignored: Iterable[str] = (),
        base_prefix: str = "",
    ) -> None:
        self._stored = stored
        self._shapes = stored.shapes()
        self._expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        self.tied = dict(tied or {})
        spellings = Spellings(self._expected, base_prefix)
        buffers = Buffers((name for name, _ in model.named_buffers()), ignored)
        self._assigned = _assigned(self._shapes, spellings, StoredAs(stored_as, self._expected))
        self._unexpected = [
            name
            for name in self._assigned.unknown
            if not any(buffers.hold(spelling, self._shapes[name]) for spelling in spellings.of(name))
        ]
        self._pieces = {name: self._pieces_of(name) for name in self._expected}
        for name, other in [*self.tied.items(), *((other, name) for name, other in self.tied.items())]:
            if not self._pieces[name].names:
                self._pieces[name] = self._pieces[other]

    def config(self) -> Mapping[str, Any]:
        return self._stored.config()

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return self._expected

    def same_tensor(self, name: str) -> str | None:
        """The other name of a weight that is tied; None for one that is not, or whose two names hold two tensors."""
        other = self.tied.get(name)
        if other is None:
            return None
        if self._pieces[name] is self._pieces[other]:
            return other
        one, two = self.read(name), self.read(other)
        return other if torch.equal(one, two.to(one.dtype)) else None

    def _pieces_of(self, name: str) -> Pieces:
        if name in self._assigned.whole:
            return Pieces(self._expected[name], names={0: self._assigned.whole[name]})
        composed = self._assigned.composed.get(name)
        return composed if composed is not None and composed.names else Pieces(self._expected[name])

    def read(self, name: str) -> Tensor:
        pieces = self._pieces[name]
        first = self._stored.read(pieces.names[0])
        if pieces.count == 1:
            return halves(first, pieces.heads) if pieces.heads else first.reshape(self._expected[name])
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
        absent = [part for name, pieces in self._pieces.items() for part in islice(pieces.absent(name), MOST_ABSENT)]
        if missing := sum(pieces.count - len(pieces.names) for pieces in self._pieces.values()):
            problems.append(f"missing {_some(absent, missing)}")
        if self._unexpected:
            problems.append(f"unexpected {_some(self._unexpected, len(self._unexpected))}")
        misshapen = {
            name: pieces.shape
            for pieces in self._pieces.values()
            for name in pieces.names.values()
            if self._shapes[name] != pieces.shape
        }
        if misshapen:
            wrong = [f"{name} {list(self._shapes[name])} instead of {list(shape)}" for name, shape in misshapen.items()]
            problems.append(f"misshapen {_some(wrong, len(wrong))}")
        if twice := self._assigned.stored_twice():
            problems.append(f"stored under two names {_some(twice, len(twice))}")
        if problems:
            raise WeightsMismatch(
                "the weights do not fit config.json: " + "; ".join(problems),
                remedy=remedy_for(
                    self.config(),
                    missing=absent,
                    unexpected=self._unexpected,
                    misshapen={name: (self._shapes[name], shape) for name, shape in misshapen.items()},
                    twice=twice,
                ),
            )


@dataclass
class _Assigned:
    """Which weight of the model each stored tensor is.

    `whole` has the stored name of a weight that is stored as it is, `composed` the pieces of one that `stored_as` is
    about; `repeated` are pairs of stored names that are one weight, `unknown` those that are none.
    """

    composed: dict[str, Pieces]
    whole: dict[str, str] = field(default_factory=dict)
    repeated: list[tuple[str, str]] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)

    def stored_twice(self) -> list[str]:
        both = [
            (self.whole[name], min(pieces.names.values()))
            for name, pieces in self.composed.items()
            if name in self.whole and pieces.names
        ]
        return [f"{one} and {other}" for one, other in [*self.repeated, *both]]


def _assigned(shapes: Iterable[str], spellings: Spellings, rules: StoredAs) -> _Assigned:
    """Every stored name by the first of its spellings that is a weight of the model, or a piece of one.

    Time grows with what is stored, however many experts config.json claims.
    """
    assigned = _Assigned(rules.composed())
    for stored in shapes:
        for spelling in spellings.of(stored):
            if (weight := spellings.meant(spelling)) is not None:
                first = assigned.whole.setdefault(weight, stored)
                assigned.repeated.extend([(first, stored)] if first != stored else [])
                break
            if places := [place for place in rules.places(spelling) if place[1] < _count(assigned.composed, place[0])]:
                for weight, place in places:
                    first = assigned.composed[weight].names.setdefault(place, stored)
                    assigned.repeated.extend([(first, stored)] if first != stored else [])
                break
        else:
            assigned.unknown.append(stored)
    return assigned


def _count(composed: Mapping[str, Pieces], name: str) -> int:
    return composed[name].count if name in composed else 0


def _some(names: Iterable[str], count: int, limit: int = 4) -> str:
    shown = ", ".join(islice(names, limit))
    return shown if count <= limit else f"{shown} and {count - limit} more"
