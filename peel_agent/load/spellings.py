"""The names that one weight has had: with and without the model's prefix, inside wrappers, and in older releases.

The rules are those of transformers' from_pretrained, and for every format the same. Wrappers' names, which a training
that saves its wrapped model leaves behind, are taken out as well.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping

WRAPPERS = frozenset({"_orig_mod", "module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
"""Modules that torch.compile, DistributedDataParallel, FSDP and activation checkpointing put around others."""

OLDER_ENDINGS = {
    "gamma": "weight",
    "beta": "bias",
    "weight_g": "parametrizations.weight.original0",
    "weight_v": "parametrizations.weight.original1",
}
"""Last parts of names as they were, and are: norms after TensorFlow, weight_norm before torch 2.0."""

Shape = tuple[int, ...]

FORMER_BUFFERS: Mapping[str, Callable[[Shape], bool]] = {
    "inv_freq": lambda _: True,
    "original_inv_freq": lambda _: True,
    "cos_cached": lambda _: True,
    "sin_cached": lambda _: True,
    "position_ids": lambda shape: len(shape) <= 2,
    "masked_bias": lambda shape: math.prod(shape) == 1,
    "version": lambda shape: math.prod(shape) == 1,
    "bias": lambda shape: len(shape) == 4 and shape[:2] == (1, 1) and shape[2] == shape[3],
}
"""What releases of transformers stored and later ones compute, by the last part of the name: rotary tables, positions,
causal masks [1, 1, n, n] and the number that stood for minus infinity in them, fairseq's version. No weight that is
trained has such a name and shape.
"""


class Spellings:
    """Which weight of a model a stored name stands for; `base_prefix` is what transformers calls the model's body."""

    def __init__(self, names: Iterable[str], base_prefix: str = "") -> None:
        self._names = frozenset(names)
        self._prefix = f"{base_prefix}." if base_prefix else ""
        self._by_bare: dict[str, str] = {}
        for name in self._names:
            self._by_bare.setdefault(without_wrappers(name), name)

    def meant(self, name: str) -> str | None:
        """The weight of the model that one spelling is the name of, None for none."""
        return name if name in self._names else self._by_bare.get(name)

    def of(self, stored: str) -> Iterator[str]:
        """The stored name and what it may stand for, nearest first."""
        yield stored
        bare = without_wrappers(stored)
        spellings = [bare, f"{self._prefix}{bare}", bare.removeprefix(self._prefix)]
        stem, _, ending = bare.rpartition(".")
        if stem and ending in OLDER_ENDINGS:
            newer = f"{stem}.{OLDER_ENDINGS[ending]}"
            spellings += [newer, f"{self._prefix}{newer}", newer.removeprefix(self._prefix)]
        yield from (spelling for spelling in dict.fromkeys(spellings) if spelling != stored)


def without_wrappers(name: str) -> str:
    """The name of a weight without the modules that only wrap others."""
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


class Buffers:
    """What a checkpoint may hold and a model needs not: it computes these itself.

    They are the model's own buffers, what transformers leaves out for this class (`patterns`), and former buffers.
    """

    def __init__(self, names: Iterable[str], patterns: Iterable[str]) -> None:
        self._names = frozenset(names)
        self._patterns = [re.compile(pattern) for pattern in patterns]

    def hold(self, name: str, shape: Shape) -> bool:
        former = FORMER_BUFFERS.get(name.rpartition(".")[2])
        return (
            name in self._names
            or (former is not None and former(shape))
            or any(pattern.search(name) for pattern in self._patterns)
        )
