"""The weight sets of a model's matrices: named by the user for latents, else told from the values."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from peel_agent.precision.quantise import quantise
from peel_agent.precision.recognise import recognise
from peel_agent.records import FULL_PRECISION, WeightSet, glob_fits


class Quantisers:
    """Applies the sets that `named` gives to weights by glob; `transposed` matrices are stored [in, out].

    For the weights of one checkpoint: what was told from a weight's values is kept by its name.
    """

    def __init__(self, named: Mapping[str, WeightSet], *, transposed: bool) -> None:
        self._named = named
        self._transposed = transposed
        self._recognised: dict[str, WeightSet] = {}

    def named(self, name: str) -> WeightSet | None:
        """The set that the first glob which fits this weight gives to it."""
        return next((weight_set for glob, weight_set in self._named.items() if glob_fits(glob, name)), None)

    def of(self, name: str, stored: Tensor) -> WeightSet:
        """The set of a block's weight: as named, else recognised from its values. Only matrices have one."""
        if stored.dim() != 2:
            return FULL_PRECISION
        weight_set = self.named(name) or self._recognised.get(name)
        if weight_set is None:
            weight_set = self._recognised[name] = recognise(self._upright(stored))
        return weight_set

    def effective(self, stored: Tensor, weight_set: WeightSet) -> Tensor:
        """The weight that the forward pass uses, in the layout it is stored in."""
        return self._upright(quantise(self._upright(stored), weight_set)) if weight_set.restricts else stored

    def _upright(self, matrix: Tensor) -> Tensor:
        return matrix.T if self._transposed else matrix
