"""Two checkpoints paired by sequence: the interval is that of the differences (method.md 4c)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import product

import numpy as np
from numpy.typing import NDArray

from peel_agent.peel.headroom.headroom import Headroom
from peel_agent.peel.margins.margin import Margin, Place
from peel_agent.peel.numerics.intervals import estimate
from peel_agent.peel.numerics.losses import Losses
from peel_agent.records import Estimate, PairedDifference, PairedDifferences, SequenceLosses

FEWEST = 2
"""A paired interval needs so many sequences."""


def sequence_losses_of(
    probe: str, trained: Losses, margins: Mapping[Place, Margin], headrooms: Mapping[int, Headroom]
) -> SequenceLosses:
    """What a checkpoint is paired with another by: `trained` are its losses [n] on confirm."""
    return SequenceLosses(
        probe=probe,
        loss=tuple(trained.tolist()),
        margins={
            _key(place): {name: _known(losses) for name, losses in margin.by_sequence.items()}
            for place, margin in margins.items()
        },
        headroom={
            _key((index, target)): tuple(losses.tolist())
            for index, headroom in headrooms.items()
            for target, losses in headroom.by_sequence.items()
        },
        cuts={_key(place): margin.cut for place, margin in margins.items() if margin.cut is not None},
    )


def _key(place: Place) -> str:
    index, target = place
    return str(index) if target == "block" else f"{index}/{target}"


def _known(losses: Losses) -> tuple[float | None, ...]:
    return tuple(value if np.isfinite(value) else None for value in losses.tolist())


def paired_differences(a: SequenceLosses, b: SequenceLosses) -> PairedDifferences:
    """The differences b - a of what both have, over the sequences that both were measured on, as far as they
    were on the same tokens of these.

    ValueError for two that were measured on different probes.
    """
    if a.probe != b.probe or len(a.loss) != len(b.loss):
        raise ValueError(f"two probes cannot be paired: {a.probe} and {b.probe}")
    margins = {
        place: _of_margins(stand_ins, b.margins[place])
        for place, stand_ins in a.margins.items()
        if place in b.margins and a.cuts.get(place) == b.cuts.get(place)
    }
    headroom = {place: _difference(a.headroom[place], b.headroom[place]) for place in a.headroom if place in b.headroom}
    loss = _difference(a.loss, b.loss)
    assert loss is not None  # confirm has more sequences than FEWEST
    return PairedDifferences(
        loss,
        {place: difference for place, difference in margins.items() if difference is not None},
        {place: difference for place, difference in headroom.items() if difference is not None},
    )


def _of_margins(
    a: Mapping[str, Sequence[float | None]], b: Mapping[str, Sequence[float | None]]
) -> PairedDifference | None:
    """The difference of the best stand-ins; the interval spans those of all that may be the best, of either side.

    The first stand-in of each side is the one that was picked.
    """
    spanned = [_difference(of_a, of_b) for of_a, of_b in product(a.values(), b.values())]
    known = [difference for difference in spanned if difference is not None]
    if not known or spanned[0] is None:
        return None
    value = spanned[0].value.value
    low = min(difference.value.low for difference in known)
    high = max(difference.value.high for difference in known)
    return PairedDifference(Estimate(value, low, high), min(difference.sequences for difference in known))


def _difference(a: Sequence[float | None], b: Sequence[float | None]) -> PairedDifference | None:
    differences = _numbers(b) - _numbers(a)
    measured = differences[np.isfinite(differences)]
    return None if len(measured) < FEWEST else PairedDifference(estimate(measured), len(measured))


def _numbers(values: Sequence[float | None]) -> NDArray[np.float64]:
    return np.array([np.nan if value is None else value for value in values], dtype=np.float64)
