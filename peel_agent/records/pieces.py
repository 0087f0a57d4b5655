"""Pieces of one checkpoint's work that another process may compute: plain numbers and arrays, as bytes on their way.

What computes a piece opens the same checkpoint itself, and reads the weights that it needs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from io import BytesIO
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


@dataclass(frozen=True)
class TailPiece:
    """Streams [V n, S, d] of V variants that run through the blocks from `block` on and are scored by the head.

    Each variant has n streams, for the token ids [n, S]. `sequences` is how many are run at once (Chunk). The answer
    are their losses, [V n].
    """

    sequences: int
    block: int
    stream: NDArray[np.float32]
    ids: NDArray[np.int64]


@dataclass(frozen=True)
class HeadPiece:
    """The last streams of a construction, `fit` [N_f, S, d] and `score` [N_s + N_c, S, d], to which a head is fitted.

    The first `selecting` sequences of `score` are select. The answer are the losses with that head, [N_s + N_c].
    """

    sequences: int
    fit: NDArray[np.float32]
    score: NDArray[np.float32]
    selecting: int


Piece: TypeAlias = TailPiece | HeadPiece

_KINDS: tuple[type[Piece], ...] = (TailPiece, HeadPiece)


def packed(piece: Piece) -> bytes:
    """A piece as bytes: its kind, then each field as an array in numpy's own format."""
    import numpy as np

    written = BytesIO()
    for value in (_KINDS.index(type(piece)), *vars(piece).values()):
        np.save(written, np.asarray(value), allow_pickle=False)
    return written.getvalue()


def unpacked(data: bytes) -> Piece:
    """The piece again."""
    import numpy as np

    reading = BytesIO(data)

    def value() -> Any:
        array = np.load(reading, allow_pickle=False)
        return array if array.ndim else int(array)

    kind = _KINDS[value()]
    piece: Piece = kind(**{field.name: value() for field in fields(kind)})
    return piece


class HandedOut(Protocol):
    """A piece that is with helpers."""

    piece: Piece

    def losses(self) -> NDArray[np.float64] | None:
        """What it was answered; None until then."""

    def withdraw(self) -> bool:
        """Takes it back, unless somebody computes it now or has answered: then False."""


class Helpers(Protocol):
    """Processes elsewhere that compute pieces of this checkpoint beside this one."""

    def hand_out(self, make: Callable[[], Piece]) -> HandedOut | None:
        """Gives a piece away; None, and none is made, when as many as may be are out, or when there are no helpers."""

    def wait(self, seconds: float) -> None:
        """Returns when something has become of a piece since the last call, and after so many seconds at most."""
