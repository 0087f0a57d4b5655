"""What a peel is asked to do: the sections of the configuration that travel to a worker with a request."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias

from peel_agent.records.precision import WeightSet

Factory: TypeAlias = str
Precision: TypeAlias = Mapping[str, WeightSet]


@dataclass(frozen=True)
class ModelSettings:
    """`[model]`: `factory` makes models of your own, `package.module:callable`; None (`auto`) is transformers.

    `precision` says by glob which matrices hold the latents of a quantiser, and of which.
    """

    factory: Factory | None = None
    precision: Precision = field(default_factory=dict)


ID_DTYPES = ("uint16", "uint32", "int32", "int64")
"""What token ids in a file without a header may be."""


@dataclass(frozen=True)
class ProbeSettings:
    """`[probe]`: held-out token ids or text from the training distribution.

    `dtype` is that of ids in a file without a header; None is the one that its content shows. `text_key` is the key or
    the column of the text.
    """

    path: Path | None = None
    tokenizer: Path | None = None
    sequence_length: int | None = None
    fit_tokens: int = 65_536
    select_tokens: int = 8_192
    confirm_tokens: int = 16_384
    dtype: str | None = None
    text_key: str = "text"


QUANTITIES: Mapping[str, tuple[str, ...]] = {
    "quick": ("margin",),
    "standard": ("margin", "bounds"),
    "full": ("margin", "bounds", "headroom", "redundancy"),
}
"""What each effort computes."""


@dataclass(frozen=True)
class PeelSettings:
    """`[peel]`: what to compute; what `time_budget_seconds` do not suffice for is left out and said.

    `budget_passes` is the same for margins and progress alone, in plain forward passes over the whole probe; 0 is no
    limit.
    """

    effort: str = "standard"
    quantities: tuple[str, ...] | None = None
    maps: str | tuple[tuple[int, ...], ...] = "ends"
    solver: str = "closed_form"
    time_budget_seconds: float | None = None
    budget_passes: float = 8.0

    @property
    def computed(self) -> tuple[str, ...]:
        """The quantities that are computed: those named, or the effort's own."""
        return QUANTITIES[self.effort] if self.quantities is None else self.quantities
