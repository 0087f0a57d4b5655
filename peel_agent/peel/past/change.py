"""How far each weight moved since the checkpoint before, beside the same weight of the other blocks (method.md 4b)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import sqrt
from statistics import median

from torch import Tensor

from peel_agent.peel.margins.margin import Place
from peel_agent.records import Change, PartName, WorstMatrix

SAME = 1e-12
"""A squared relative difference below this is none: sums in another order give as much."""


@dataclass(frozen=True)
class Moved:
    """Squared Frobenius norms of W - W' and of W', where W' is the weight of the checkpoint before."""

    difference: float
    before: float

    def __add__(self, other: Moved) -> Moved:
        return Moved(self.difference + other.difference, self.before + other.before)

    @property
    def relative(self) -> float:
        """||W - W'|| / ||W'||; 1 for a weight that was all zero and is not any more."""
        if self.before == 0.0:
            return float(self.difference > 0.0)
        squared = self.difference / self.before
        return sqrt(squared) if squared > SAME else 0.0


def matrices(weights: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Every weight by name; stacked experts [experts, rows, columns] one by one, as `name[expert]`."""
    for name, weight in weights.items():
        if not weight.is_floating_point():
            continue
        if weight.dim() == 3:
            yield from ((f"{name}[{expert}]", of_expert) for expert, of_expert in enumerate(weight))
        else:
            yield name, weight


def moved(now: Mapping[str, Tensor], before: Mapping[str, Tensor]) -> dict[str, Moved]:
    """How far each matrix of one block moved, both given by the same names."""
    earlier = dict(matrices(before))
    return {
        name: Moved(_squared(weight.double() - earlier[name].double()), _squared(earlier[name]))
        for name, weight in matrices(now)
    }


def _squared(weight: Tensor) -> float:
    return float(weight.double().square().sum())


def changes(
    blocks: Sequence[Mapping[str, Moved]], part_names: Sequence[Mapping[PartName, Sequence[str]]]
) -> dict[Place, Change]:
    """The change of every block and part by place, from how far each matrix of each block moved.

    A place has none when the other blocks did not move at all, or there are none.
    """
    ratios = _matrix_ratios(blocks)
    by_place: dict[Place, Change] = {}
    for target in ("block", "attention", "mlp"):
        inside = [_names_of(moved, parts, target) for moved, parts in zip(blocks, part_names, strict=True)]
        sums = [_total(moved, names) for moved, names in zip(blocks, inside, strict=True)]
        for index, names in enumerate(inside):
            others = [total.relative for place, total in enumerate(sums) if place != index and inside[place]]
            if not names or not others or median(others) == 0.0:
                continue
            # Biases begin at zero: how far they move beside others of that name says little at first.
            weights = (name for name in names if name in ratios[index] and not name.endswith("bias"))
            judged = [WorstMatrix(name, ratios[index][name]) for name in weights]
            worst = max(judged, key=lambda one: one.ratio, default=None)
            by_place[index, target] = Change(sums[index].relative / median(others), worst)
    return by_place


def _names_of(moved: Mapping[str, Moved], parts: Mapping[PartName, Sequence[str]], target: str) -> list[str]:
    if target == "block":
        return list(moved)
    wanted = set(dict(parts).get(target, ()))  # type: ignore[call-overload]
    return [name for name in moved if _tensor(name) in wanted]


def _total(moved: Mapping[str, Moved], names: Sequence[str]) -> Moved:
    return sum((moved[name] for name in names), Moved(0.0, 0.0))


def _matrix_ratios(blocks: Sequence[Mapping[str, Moved]]) -> list[dict[str, float]]:
    """Each matrix's relative change over the median of the same matrix in the other blocks, where that is not 0."""
    ratios: list[dict[str, float]] = []
    for index, moved in enumerate(blocks):
        elsewhere: dict[str, list[float]] = {}
        for place, other in enumerate(blocks):
            for name, one in other.items() if place != index else ():
                elsewhere.setdefault(_tensor(name), []).append(one.relative)
        typical = {name: median(values) for name, values in elsewhere.items()}
        ratios.append(
            {name: one.relative / typical[_tensor(name)] for name, one in moved.items() if typical.get(_tensor(name))}
        )
    return ratios


def _tensor(name: str) -> str:
    """The tensor's name, without the number of an expert."""
    return name.partition("[")[0]
