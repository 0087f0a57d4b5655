"""The tag by which the sidecar finds the training's run in MLflow."""

from __future__ import annotations

import importlib
import logging
import os
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

DIRECTORY_TAG = "peel.checkpoint_dir"

VARIABLE = "PEEL_CHECKPOINT_DIR"
"""Names the directory as the sidecar sees it, where the training knows it by another path."""

_log = logging.getLogger("peel_agent.callbacks")


class TrackedRun(NamedTuple):
    """A run in MLflow, and the `MlflowClient` that reaches it."""

    client: Any
    run_id: str


def active_run() -> TrackedRun | None:
    """The run that MLflow logs to in this thread, else that of MLFLOW_RUN_ID; None without either.

    A training that does not use MLflow does not import it here.
    """
    mlflow: Any = sys.modules.get("mlflow")
    run = mlflow.active_run() if mlflow is not None else None
    run_id = run.info.run_id if run is not None else os.environ.get("MLFLOW_RUN_ID", "").strip()
    if not run_id:
        return None
    return TrackedRun((mlflow or importlib.import_module("mlflow")).MlflowClient(), run_id)


class DirectoryTag:
    """Puts `peel.checkpoint_dir` on the training's run, once; what fails is logged, and ends no training.

    `checkpoint_dir` goes before PEEL_CHECKPOINT_DIR, and that before the directory that the training names.
    """

    def __init__(self, checkpoint_dir: str | Path | None) -> None:
        self._checkpoint_dir = str(checkpoint_dir or os.environ.get(VARIABLE, "")).strip()
        self._is_done = False

    def put(self, directory: str | Path, find_run: Callable[[], TrackedRun | None] = active_run) -> None:
        """Tags the run that is found. Where there is none yet, the next call looks again."""
        if self._is_done:
            return
        place = _as_watched(self._checkpoint_dir or str(directory))
        drawn = random.getstate()  # MLflow's client draws how long it waits before it tries again
        try:
            run = find_run()
            if run is not None:
                self._is_done = True
                run.client.set_tag(run.run_id, DIRECTORY_TAG, place)
        except Exception as error:
            self._is_done = True
            # Without the library's own words, which may hold an address with its password.
            _log.warning(
                "the training's MLflow run could not be tagged with %s (%s); set the tag to %s by hand, or give "
                "peel-agent the run's id with --run-id",
                DIRECTORY_TAG, type(error).__name__, place,
            )  # fmt: skip
        finally:
            random.setstate(drawn)


def _as_watched(place: str) -> str:
    """A directory as `peel-agent watch` names it: a URL as it stands, a path absolute and without links."""
    return place if "://" in place else str(Path(place).expanduser().resolve())
