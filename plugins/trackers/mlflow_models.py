"""The logged model (MLflow 3) that a training has made of its run at one step."""

from __future__ import annotations

from typing import Any

MOST_MODELS = 500
"""Logged models of a run that are looked through, the newest ones."""


def model_of(client: Any, run: Any, step: int) -> str | None:
    """The id of the newest logged model that the run has at this step; None where there is none, or it is deleted."""
    outputs = getattr(run, "outputs", None)
    at_step = [output.model_id for output in (outputs.model_outputs if outputs else ()) if output.step == step]
    if not at_step:
        return None
    # One that is deleted is in the run's outputs still, and refuses everything; it is in no search.
    models = client.search_logged_models(
        [run.info.experiment_id], f"source_run_id = '{run.info.run_id}'", max_results=MOST_MODELS
    )
    times = {model.model_id: model.creation_timestamp for model in models if model.model_id in at_step}
    return max(times, key=lambda model_id: times[model_id], default=None)
