"""What a training has logged to its own MLflow run, its loss and whether it has ended; and the end of a run of ours."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from peel_agent.records import Publication, TrainingLog

ENDED = frozenset({"FINISHED", "FAILED", "KILLED"})


def training_log(client: Any, run: Any, loss_keys: Sequence[str]) -> TrainingLog:
    """The history of the first of these metrics that the run has, the last value of each step; and its end."""
    status = str(run.info.status)
    key = next((key for key in loss_keys if key in run.data.metrics), None)
    history = [] if key is None else client.get_metric_history(run.info.run_id, key)
    points = {point.step: point.value for point in sorted(history, key=lambda point: point.timestamp)}
    loss = tuple((step, value) for step, value in sorted(points.items()) if math.isfinite(value))
    return TrainingLog(loss, status if status in ENDED else None)


ENDED_TAG = "peel.ended_ms"
"""The checkpoint's time at which a run that was created here was ended."""


def keep_status(client: Any, run: Any, publication: Publication, *, is_over: bool, is_late: bool) -> None:
    """A run that was created here is FINISHED when the training is over, and RUNNING again when more comes of it."""
    run_id, has_ended = run.info.run_id, str(run.info.status) in ENDED
    if is_late:
        return
    if is_over or publication.training_ended:
        if not has_ended:
            client.set_tag(run_id, ENDED_TAG, str(publication.timestamp_ms))
            client.set_terminated(run_id)
    elif publication.metrics and publication.timestamp_ms > int(run.data.tags.get(ENDED_TAG, publication.timestamp_ms)):
        client.update_run(run_id, status="RUNNING")
        client.delete_tag(run_id, ENDED_TAG)
