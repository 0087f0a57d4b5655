"""Bounds of a fully connected ReLU network: YES-0..YES-(K-1), the running minimum, the gap and the zone (method.md 7).

YES-k is the least loss of a network whose layers are fitted, one after another, to at most k of the trained network's
hidden states (its way-points) and then to the targets; YES-0 is fitted to the targets alone.

References are fitted on `fit`, the best subset of way-points is picked on `select`, and every published number is
measured on `confirm` (method.md 1). A loss is the squared error of one sample, summed over the outputs. So YES-k falls
with k, and from checkpoint to checkpoint, on `select`; its published value follows the choice and may rise a little.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from peel_agent.errors import CheckpointError, ConfigurationError
from peel_agent.peel.fully_connected.feedforward import Net, Precision, Waypoints, constructions
from peel_agent.peel.numerics.intervals import estimate
from peel_agent.peel.numerics.least_squares import tokens_needed
from peel_agent.records import Best, Estimate, Samples, Skipped, YesMemory, Zone

SampleLosses: TypeAlias = NDArray[np.float64]


@dataclass(frozen=True)
class YesValue:
    """YES-k on confirm; the way-points that won on select are hidden states of this or of an `earlier` checkpoint."""

    label: str
    value: Estimate
    waypoints: Waypoints
    earlier: bool
    within_class: bool


@dataclass(frozen=True)
class YesBounds:
    """One checkpoint of a fully connected network against its bounds; losses in squared error a sample.

    `gap` is loss - YES-(K-1), paired by sample. Without values, `skipped` says why.
    """

    loss: Estimate
    values: tuple[YesValue, ...]
    gap: Estimate | None
    zone: Zone
    memory: YesMemory | None
    skipped: tuple[Skipped, ...]


def measure_feedforward(
    trained: Net, samples: Samples, *, precision: Precision = "full", earlier: YesMemory | None = None
) -> YesBounds:
    """Bounds of one checkpoint; `earlier` is the memory of the one before.

    Raises ConfigurationError when the samples do not fit the network or way-points are too many, CheckpointError when
    the network's loss is not a number.
    """
    _check(trained, samples)
    score = torch.cat([samples.select.X, samples.confirm.X], dim=1), torch.cat([samples.select.Y, samples.confirm.Y], 1)
    selecting = samples.select.X.shape[1]
    trained_losses = sample_losses(trained, *score)
    if not (np.isfinite(trained_losses).all() and all(bool(layer.isfinite().all()) for layer in trained.layers)):
        raise CheckpointError(
            "the loss of this checkpoint is not a finite number",
            remedy="its weights hold NaN or infinity, or the training diverged: take an earlier checkpoint",
        )
    loss = estimate(trained_losses[selecting:])
    why = _shortfall(trained, samples)
    if why is not None:
        return YesBounds(loss, (), None, "undecided", earlier, (Skipped("YES bounds", why),))
    scored = (
        _best(waypoints, net, sample_losses(net, *score), selecting, trained)
        for waypoints, net in constructions(trained, samples.fit.X, samples.fit.Y, precision)
    )
    best_now = best_by_size(scored, len(trained.layers))
    network = f"{trained.widths} {'biased' if trained.biased else 'unbiased'} {precision}"
    memory = remember(YesMemory(samples.fingerprint, network, best_now), earlier)
    values = tuple(
        YesValue(f"yes-{k}", estimate(np.array(best.confirm)), best.waypoints, best not in best_now, best.within_class)
        for k, best in enumerate(memory.best)
    )
    beyond = [
        estimate(trained_losses[selecting:] - np.array(best.confirm)) for best in (memory.best[0], memory.best[-1])
    ]
    return YesBounds(loss, values, beyond[1], zone_of(*beyond), memory, ())


def sample_losses(net: Net, X: Tensor, Y: Tensor) -> SampleLosses:
    """The squared error of each sample [N], summed over the outputs."""
    errors: SampleLosses = ((Y.double() - net.outputs(X)[-1]) ** 2).sum(dim=0).cpu().numpy()
    return errors


def best_by_size(candidates: Iterable[Best], depth: int) -> tuple[Best, ...]:
    """For k = 0..depth - 1 the construction of at most k way-points with the least loss on select; ties to fewer."""
    exact: dict[int, Best] = {}
    for candidate in candidates:
        size = len(candidate.waypoints)
        if size not in exact or candidate.select < exact[size].select:
            exact[size] = candidate
    best = [exact[0]]
    for size in range(1, depth):
        best.append(min(best[-1], exact[size], key=lambda candidate: candidate.select))
    return tuple(best)


def remember(current: YesMemory, earlier: YesMemory | None) -> YesMemory:
    """The running minimum on select, for each k: this checkpoint's construction or the earlier best; ties to that."""
    if earlier is None or (earlier.probe, earlier.network) != (current.probe, current.network):
        return current
    pairs = zip(earlier.best, current.best, strict=True)
    return YesMemory(current.probe, current.network, tuple(min(pair, key=lambda best: best.select) for pair in pairs))


def zone_of(beyond_first: Estimate, beyond_last: Estimate) -> Zone:
    """The zone, from loss - YES-0 and loss - YES-(K-1) with their intervals; one that holds 0 decides nothing.

    `ineffective` (red): proven worse than YES-0. `caution` (yellow): proven better than YES-0 and worse than YES-(K-1).
    `effective` (green): proven better than both, which says only that no construction of this suite is better. On
    `confirm` YES-(K-1) may lie above YES-0; being worse than either is the fact, and wins.
    """
    if beyond_first.low > 0.0:
        return "ineffective"
    if beyond_first.high >= 0.0:
        return "undecided"
    if beyond_last.low > 0.0:
        return "caution"
    return "effective" if beyond_last.high < 0.0 else "undecided"


def _best(waypoints: Waypoints, net: Net, losses: SampleLosses, selecting: int, trained: Net) -> Best:
    spare = [trained_width - width for width, trained_width in zip(net.widths, trained.widths, strict=True)]
    within = min(spare) >= 0
    if trained.one_bit:  # one bit has no 0, but two copies of a unit that leave with +lambda and -lambda cancel
        within = within and net.one_bit and all(units % 2 == 0 for units in spare)
    return Best(waypoints, float(losses[:selecting].mean()), tuple(losses[selecting:].tolist()), within)


def _check(trained: Net, samples: Samples) -> None:
    """Raises ConfigurationError unless every part has samples, finite, of the network's width and the target's."""
    rows = trained.widths[0], trained.widths[-1]
    for name, part in (("fit", samples.fit), ("select", samples.select), ("confirm", samples.confirm)):
        shapes = tuple(part.X.shape), tuple(part.Y.shape)
        count = part.X.shape[-1]
        if shapes != ((rows[0], count), (rows[1], count)) or count == 0:
            raise ConfigurationError(
                f"`{name}` has X {shapes[0]} and Y {shapes[1]}; the network maps {rows[0]} inputs to {rows[1]} outputs",
                remedy="give X as [inputs, samples] and Y as [outputs, samples], a sample a column",
            )
        if not bool(part.X.isfinite().all() & part.Y.isfinite().all()):
            raise ConfigurationError(
                f"`{name}` holds values that are not finite numbers", remedy="leave those samples out"
            )


def _shortfall(trained: Net, samples: Samples) -> str | None:
    """Why fits to so few samples cannot be trusted (method.md 2); a construction's layers are as wide as net or Y."""
    columns = max(trained.widths) + trained.biased
    count, needed = samples.fit.X.shape[1], tokens_needed(columns)
    return None if count >= needed else f"{count:,} fit samples; a fit of {columns:,} columns needs {needed:,}"
