"""What publications have left in an MLflow run, read back from its artifacts."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from peel_agent.errors import DestinationUnavailable, NoReport, PeelError
from peel_agent.records import KeptRun

from .mlflow_failure import CREDENTIALS, cause

REPORTS = "peel/checkpoints"
ALERTS = "peel/alerts.jsonl"
DIRECTORY_TAG = "peel.checkpoint_dir"


def kept_run(client: Any, run: Any, folder: Path) -> KeptRun:
    """The reports by their files' names, which sort by step, and the alerts; copies go through `folder`."""
    is_folder_by_path = {entry.path: entry.is_dir for entry in client.list_artifacts(run.info.run_id, "peel")}
    reports: tuple[tuple[str, str], ...] = ()
    if is_folder_by_path.get(REPORTS):
        reports = tuple(sorted(_texts(client, run.info.run_id, REPORTS, folder)))
    alerts = ""
    if is_folder_by_path.get(ALERTS) is False:
        alerts = Path(client.download_artifacts(run.info.run_id, ALERTS, str(folder))).read_text("utf-8", "replace")
    name = run.info.run_name or run.info.run_id
    place = run.data.tags.get(DIRECTORY_TAG, f"MLflow run {run.info.run_id}")
    return KeptRun(name, place, reports, tuple(line for line in alerts.splitlines() if line))


def _texts(client: Any, run_id: str, path: str, folder: Path) -> Iterator[tuple[str, str]]:
    """Name and text of each JSON file; MLflow fetches several at once."""
    copies = Path(client.download_artifacts(run_id, path, str(folder)))
    for copy in copies.glob("*.json"):
        if copy.is_file() and not copy.is_symlink():
            yield copy.name, copy.read_text("utf-8", "replace")


def unreadable(error: Exception, where: str, uri: str) -> PeelError:
    """What is raised for an error that the library raised as it read."""
    if getattr(error, "error_code", "") in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
        return NoReport(
            f"{where} does not exist",
            remedy="give the id that MLflow's page of the training's run shows, and where it is with --tracking-uri",
        )
    return DestinationUnavailable(
        f"{where} cannot be read: {cause(error, uri)}",
        remedy=f"start the server, correct --tracking-uri or the login ({CREDENTIALS}), or make the page from the "
        "agent's state: give the watched directory",
    )
