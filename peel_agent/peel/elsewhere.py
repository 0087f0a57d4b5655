"""Pieces of a peel that others may compute: what is done with those that are out, and what is done without helpers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from peel_agent.peel.numerics.losses import Losses
from peel_agent.records import HandedOut, Helpers, Piece

WAIT_SECONDS = 30.0

Key = TypeVar("Key")


class Alone:
    """No helpers: everything is computed here, as it comes."""

    def hand_out(self, make: Callable[[], Piece]) -> None:  # noqa: ARG002
        return None

    def wait(self, seconds: float) -> None:
        """Nothing is out."""


ALONE: Helpers = Alone()


def collected(out: Mapping[Key, HandedOut], helpers: Helpers, compute: Callable[[Any], Losses]) -> dict[Key, Losses]:
    """The losses of all pieces that are out. What nobody has begun is taken back and computed here meanwhile, the last
    first: a helper that comes late, or never, is not waited for.
    """
    losses: dict[Key, Losses] = {}
    waiting = dict(out)
    while waiting:
        for key, piece in list(waiting.items()):
            if (answer := piece.losses()) is not None:
                losses[key] = answer
                del waiting[key]
        taken = next((key for key in reversed(waiting) if waiting[key].withdraw()), None)
        if taken is not None:
            losses[taken] = compute(waiting.pop(taken).piece)
        elif waiting:
            helpers.wait(WAIT_SECONDS)
    return losses
