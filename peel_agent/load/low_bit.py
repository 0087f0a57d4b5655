"""Which weights are low-bit, in words and checked against the model; and weights replaced by a patch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from peel_agent.errors import CheckpointError, ConfigurationError, WeightsMismatch
from peel_agent.load.names import NamedWeights
from peel_agent.precision import Quantisers
from peel_agent.records import Anatomy, WeightSet, glob_fits


def check_globs(sets: Mapping[str, WeightSet], shapes: Mapping[str, tuple[int, ...]], *, transposed: bool) -> None:
    """Raises ConfigurationError for a glob that fits no matrix, one whose groups do not divide a matrix's width, or one
    that fits experts, which are stacked and would be left as they are.
    """
    stacked = [name for name, shape in shapes.items() if len(shape) == 3]
    for glob in sets:
        if fitting := [name for name in stacked if glob_fits(glob, name)]:
            raise ConfigurationError(
                f"`{glob}` names latents among the experts of a mixture, {fitting[0]}; those are not quantised here",
                remedy="name the matrices outside the experts only; experts in low bits are not covered yet",
            )
    matrices = {name: shape[0 if transposed else 1] for name, shape in shapes.items() if len(shape) == 2}
    for glob, weight_set in sets.items():
        fitting = [name for name in matrices if glob_fits(glob, name)]
        if not fitting:
            raise ConfigurationError(
                f"`{glob}` (of [model] precision, --precision or config.json) fits no matrix of this model",
                remedy=f"use a glob over the names of modules or weights, such as {list(matrices)[-1]}",
            )
        for name in fitting:
            if weight_set.unit == "group" and matrices[name] % weight_set.group:
                raise ConfigurationError(
                    f"`{weight_set.name}` cannot be used for {name}: groups of {weight_set.group} do not divide "
                    f"{matrices[name]}",
                    remedy="choose a group size that divides the matrix's inputs",
                )


def precision_in_words(
    name: str, stored: Tensor, sets: Mapping[str, WeightSet], anatomy: Anatomy, *, packed: str = ""
) -> str:
    """What a block's matrix is stored as and stands for: `bfloat16`, `float32 latents of ternary`.

    `packed` says it of weights that were dequantised; whether references keep to their grid is added.
    """
    quantisers = Quantisers(sets, transposed=anatomy.projection_layout == "in_out")
    if packed:
        return packed + ("" if quantisers.of(name, stored).restricts else "; references are not held to that grid")
    dtype, weight_set = str(stored.dtype).removeprefix("torch."), quantisers.of(name, stored)
    if not weight_set.restricts:
        return dtype
    return f"{dtype} {'latents of' if quantisers.named(name) else 'in'} {weight_set.name}"


class PatchedWeights:
    """See records.Weights: those of a checkpoint by the model's names, some replaced by a safetensors file.

    A weight that is tied is replaced under both of its names. Raises CheckpointError for a file that cannot be read,
    WeightsMismatch for a name or a shape that the model has not.
    """

    def __init__(self, below: NamedWeights, patch: Path) -> None:
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        self._below = below
        try:
            self._patch: dict[str, Tensor] = load_file(patch)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"the patch {patch} cannot be read: {error}", remedy="write it again") from error
        shapes = below.shapes()
        for name, tensor in self._patch.items():
            if shapes.get(name) != tuple(tensor.shape):
                of_model = f"is {list(shapes[name])} in the model" if name in shapes else "is no weight of the model"
                raise WeightsMismatch(
                    f"the patch {patch} has `{name}` {list(tensor.shape)}, which {of_model}",
                    remedy="take a patch that `peel-agent witness` wrote for a checkpoint of this model",
                )
        self._patch |= {
            other: tensor
            for name, tensor in self._patch.items()
            for other in below.tied
            if below.tied[other] == name and below.same_tensor(other) is not None
        }

    def config(self) -> Mapping[str, Any]:
        return self._below.config()

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return self._below.shapes()

    def read(self, name: str) -> Tensor:
        return self._patch[name] if name in self._patch else self._below.read(name)
