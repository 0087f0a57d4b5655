"""A layer against its own past (method.md 4b): change, progress and drop since an earlier checkpoint.

A place is a block or one of its two parts. Tensors carry their names inside the block (`mlp.down_proj.weight`), so that
the same name is the same matrix in every block.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

from tests.oracles.decoder import Decoder
from tests.oracles.intervals import Interval, paired
from tests.oracles.references import PARTS, Part

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from numpy.typing import NDArray

    from tests.oracles.decoder import Array, Ids

Place = Literal["block", "attention", "mlp"]
PLACES: tuple[Place, ...] = ("block", "attention", "mlp")
STEMS = {"llama": "model.layers", "gpt2": "transformer.h"}
MLP_PREFIXES = ("mlp.", "post_attention_layernorm.", "ln_2.")


class Matrix(NamedTuple):
    """One matrix of one block: the name of the tensor that it belongs to, and its values now and before."""

    tensor: str
    now: Array
    before: Array


class Change(NamedTuple):
    """A relative update, and that over the median of its like in the other blocks (None without such a median)."""

    update: float
    ratio: float | None


class PlaceChange(NamedTuple):
    """The change of all tensors of a place at once, and the (name, ratio) of its tensor with the largest ratio."""

    update: float
    ratio: float | None
    worst: tuple[str, float] | None


class BlockChange(NamedTuple):
    """One block: its matrices by name, the whole of it, and its parts; a place without tensors is None."""

    matrices: dict[str, Change]
    block: PlaceChange | None
    parts: dict[Part, PlaceChange | None]


# ---------------------------------------------------------------- change


def update(now: Iterable[Array], before: Iterable[Array]) -> float:
    """sqrt(sum ||W - W'||^2) / sqrt(sum ||W'||^2) over matrices W now and W' before.

    Where every W' is zero: 1.0 if some W is not, else 0.0.
    """
    pairs = list(zip(now, before, strict=True))
    if not any(old.any() for _, old in pairs):
        return 1.0 if any(new.any() for new, _ in pairs) else 0.0
    moved = sum(float(((new - old) ** 2).sum()) for new, old in pairs)
    size = sum(float((old**2).sum()) for _, old in pairs)
    return float(np.sqrt(moved) / np.sqrt(size))


def ratio(moved: float, others: Sequence[float]) -> float | None:
    """own / median(others); None where there are no others or their median is 0."""
    if not others or np.median(others) == 0:
        return None
    return float(moved / np.median(others))


def worst(ratios: Mapping[str, float | None]) -> tuple[str, float] | None:
    """The first of the largest ratios with its name; None if there is none."""
    known = [(name, value) for name, value in ratios.items() if value is not None]
    return max(known, key=lambda entry: entry[1]) if known else None


def matrices(now: Mapping[str, NDArray[Any]], before: Mapping[str, NDArray[Any]]) -> dict[str, Matrix]:
    """The matrices of one block in the order of `now`; [experts, rows, columns] is one matrix an expert, `name[e]`."""
    by_name: dict[str, Matrix] = {}
    for name, tensor in now.items():
        new, old = np.asarray(tensor, dtype=np.float64), np.asarray(before[name], dtype=np.float64)
        assert new.shape == old.shape, f"{name} has shape {new.shape} now and {old.shape} before"
        if new.ndim == 3:
            by_name |= {f"{name}[{e}]": Matrix(name, new[e], old[e]) for e in range(len(new))}
        else:
            by_name[name] = Matrix(name, new, old)
    return by_name


def matrix_changes(blocks: Sequence[Mapping[str, Matrix]]) -> list[dict[str, Change]]:
    """Per block the change of each matrix, its ratio to all matrices of the same tensor in the other blocks."""
    updates = [{name: update([matrix.now], [matrix.before]) for name, matrix in block.items()} for block in blocks]
    reports = []
    for i, block in enumerate(blocks):
        report = {}
        for name, matrix in block.items():
            others = []
            for j in range(len(blocks)):
                for other_name, other in blocks[j].items():
                    if j != i and other.tensor == matrix.tensor:
                        others.append(updates[j][other_name])
            report[name] = Change(updates[i][name], ratio(updates[i][name], others))
        reports.append(report)
    return reports


def place_changes(
    blocks: Sequence[Mapping[str, Matrix]], changes: Sequence[Mapping[str, Change]]
) -> list[PlaceChange | None]:
    """The change of one place, given its matrices and their changes in every block; None where it has no matrices."""
    updates = [update([m.now for m in block.values()], [m.before for m in block.values()]) for block in blocks]
    reports: list[PlaceChange | None] = []
    for i, block in enumerate(blocks):
        others = [updates[j] for j in range(len(blocks)) if j != i and blocks[j]]
        largest = worst({name: changes[i][name].ratio for name in block if name.rpartition(".")[2] != "bias"})
        reports.append(PlaceChange(updates[i], ratio(updates[i], others), largest) if block else None)
    return reports


def change(
    now: Sequence[Mapping[str, NDArray[Any]]],
    before: Sequence[Mapping[str, NDArray[Any]]],
    parts: Sequence[Mapping[Part, Sequence[str]]],
) -> list[BlockChange]:
    """The changes of every block since the checkpoint before.

    `now` and `before` hold a mapping name -> tensor per block, `parts` the tensor names of each part of it. Of equal
    ratios the worst is the first in the order of `now` (experts in theirs); a bias is never the worst.
    """
    blocks = [matrices(new, old) for new, old in zip(now, before, strict=True)]
    changes = matrix_changes(blocks)
    of_block = place_changes(blocks, changes)
    of_part = {}
    for part in PARTS:
        matrices_of_part = [
            {name: matrix for name, matrix in block.items() if matrix.tensor in names[part]}
            for block, names in zip(blocks, parts, strict=True)
        ]
        of_part[part] = place_changes(matrices_of_part, changes)
    return [
        BlockChange(changes[i], of_block[i], {part: of_part[part][i] for part in PARTS}) for i in range(len(blocks))
    ]


# ---------------------------------------------------------------- progress


def names_of(names: Iterable[str], model_type: str, i: int, place: Place) -> list[str]:
    """The state_dict names of block i or of its part: the MLP has the norm in front of it, attention all the rest."""
    stem = f"{STEMS[model_type]}.{i}."
    of_block = [name for name in names if name.startswith(stem)]
    of_mlp = [name for name in of_block if name.removeprefix(stem).startswith(MLP_PREFIXES)]
    if place == "block":
        return of_block
    return of_mlp if place == "mlp" else [name for name in of_block if name not in of_mlp]


def progress(
    now: Mapping[str, NDArray[Any]], before: Mapping[str, NDArray[Any]], config: Mapping[str, Any], confirm: Ids
) -> list[dict[Place, Interval]]:
    """Per block and place: loss with its tensors of the earlier checkpoint put back - trained loss, nats per token.

    `now` and `before` are state dicts under transformers' names, `confirm` token ids [N, S].
    """
    trained = _losses(Decoder(now, config), confirm)
    reports = []
    for i in range(Decoder(now, config).block_count):
        report: dict[Place, Interval] = {}
        for place in PLACES:
            earlier = {name: before[name] for name in names_of(now, config["model_type"], i, place)}
            report[place] = paired(_losses(Decoder({**now, **earlier}, config), confirm) - trained)
        reports.append(report)
    return reports


def _losses(decoder: Decoder, ids: Ids) -> Array:
    return decoder.nll(decoder.streams(ids)[-1], ids)


# ---------------------------------------------------------------- drop


def drop(now: Interval, before: Sequence[Interval]) -> float | None:
    """(least low of `before` - now.high) / median value of `before`; None where that median is not above 0.

    `before` holds the margins of the same place at earlier checkpoints, oldest first. Below 0: no certain fall.
    """
    if not before:
        return None
    typical = float(np.median([margin.value for margin in before]))
    if typical <= 0:
        return None
    return (min(margin.low for margin in before) - now.high) / typical
