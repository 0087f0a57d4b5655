"""What a probe's file holds, before it is cut into sequences."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

from peel_agent.records import Skipped

Ids: TypeAlias = np.ndarray[tuple[int, ...], np.dtype[np.integer]]


@dataclass(frozen=True)
class Tokens:
    """Token ids of a file: one stream [T], rows [N, S], or a tuple of pieces [T_i] of several lengths.

    A stream may be cut anywhere. A row or a piece begins where its text begins, so no sequence goes over its end.
    `left_out` says what of the file is not used, and why. `row_length` is that of the rows which the pieces come from,
    where they had one.
    """

    ids: Ids | tuple[Ids, ...]
    left_out: tuple[Skipped, ...] = ()
    row_length: int | None = None

    @property
    def stream(self) -> Ids | None:
        """The ids [T] when they are one stream, as a single row or column is too; tokenizers return [1, T]."""
        if isinstance(self.ids, tuple) or (self.ids.ndim == 2 and 1 not in self.ids.shape):
            return None
        return self.ids.reshape(-1)
