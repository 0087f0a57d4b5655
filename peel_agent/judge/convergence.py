"""Whether a training loss has stopped falling, as far as its noise lets anybody see."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

BINS = 10
"""Points are averaged in so many stretches of steps: those near each other are not independent."""

LEAST_POINTS = 2 * BINS

T_95 = 2.306
"""Student's t for a 95 % interval with BINS - 2 degrees of freedom."""


@dataclass(frozen=True)
class Fall:
    """By how much a loss fell over a window, in nats per token, with its 95 % interval; `level` is its mean."""

    value: float
    low: float
    high: float
    level: float


def fall_of(points: Sequence[tuple[int, float]]) -> Fall | None:
    """The fall of the straight line through (step, loss) points, from the first step to the last.

    Ordinary least squares on the means of BINS stretches of equal length in steps. None for fewer than LEAST_POINTS,
    and where a stretch is empty.
    """
    if len(points) < LEAST_POINTS:
        return None
    first, last = points[0][0], points[-1][0]
    if last <= first:
        return None
    stretches: list[list[tuple[int, float]]] = [[] for _ in range(BINS)]
    for step, loss in points:
        stretches[min(BINS - 1, BINS * (step - first) // (last - first))].append((step, loss))
    if not all(stretches):
        return None
    x = [fmean((step - first) / (last - first) for step, _ in stretch) for stretch in stretches]
    y = [fmean(loss for _, loss in stretch) for stretch in stretches]
    mean_x, mean_y = fmean(x), fmean(y)
    spread = sum((abscissa - mean_x) ** 2 for abscissa in x)
    slope = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True)) / spread
    residuals = (b - mean_y - slope * (a - mean_x) for a, b in zip(x, y, strict=True))
    error = (sum(residual**2 for residual in residuals) / (BINS - 2) / spread) ** 0.5
    return Fall(-slope, -slope - T_95 * error, -slope + T_95 * error, mean_y)
