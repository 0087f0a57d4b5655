"""Tags the runs that a training begins with its checkpoint directory, so that the sidecar finds them by itself.

MLflow loads this in the training's own process (entry point group `mlflow.run_context_provider`), as it is imported:
this module imports nothing but the standard library, and asks the environment only.
"""

from __future__ import annotations

import os
from pathlib import Path

VARIABLE = "PEEL_CHECKPOINT_DIR"
"""The directory, or the URL, that the training writes its checkpoints to."""

DIRECTORY_TAG = "peel.checkpoint_dir"


class CheckpointDirectory:
    """A run context provider of MLflow's: `mlflow.start_run`, and what asks it, add its tags to a new run."""

    def in_context(self) -> bool:
        return bool(os.environ.get(VARIABLE, "").strip())

    def tags(self) -> dict[str, str]:
        """The tag by which `peel-agent watch` finds the run: a URL as it stands, a directory without links."""
        place = os.environ[VARIABLE].strip()
        is_url = "://" in place
        return {DIRECTORY_TAG: place if is_url else str(Path(place).expanduser().resolve())}
