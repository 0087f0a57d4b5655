"""What a training has logged to its own MLflow run: its loss, and whether it has ended."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from peel_agent.records import TrainingLog

ENDED = frozenset({"FINISHED", "FAILED", "KILLED"})


def training_log(client: Any, run: Any, loss_keys: Sequence[str]) -> TrainingLog:
    """The history of the first of these metrics that the run has, the last value of each step; and its end."""
    status = str(run.info.status)
    key = next((key for key in loss_keys if key in run.data.metrics), None)
    history = [] if key is None else client.get_metric_history(run.info.run_id, key)
    points = {point.step: point.value for point in sorted(history, key=lambda point: point.timestamp)}
    loss = tuple((step, value) for step, value in sorted(points.items()) if math.isfinite(value))
    return TrainingLog(loss, status if status in ENDED else None)
