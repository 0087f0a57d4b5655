"""One MLflow run, written through `MlflowClient` and the run's id only.

`mlflow.start_run` would set the run to RUNNING and end it with this process; the client touches neither. Metrics of a
re-sent publication fall on the points they made before, since key, step, value and timestamp are the same.
"""

from __future__ import annotations

import errno
import json
import os
import re
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from peel_agent.errors import DeliveryError, DestinationDenied, DestinationUnavailable
from peel_agent.records import Check, Publication, TrainingLog
from peel_agent.spi import TrackerPlugin, setting

from .mlflow_training import training_log

REQUEST_TIMEOUT_SECONDS = 15
REQUEST_RETRIES = 1
"""MLflow's own defaults block a call on a dead server for four minutes; trying again later is the sender's part."""

DIRECTORY_TAG = "peel.checkpoint_dir"
TIME_TAG = "peel.committed_ms"
FILES_TIME_TAG = "peel.files_ms"
"""The same of the files that stand for the whole run: they may come long after the metrics."""

OWN_FILES = "peel/checkpoints/"
"""Files of one checkpoint; all others stand for the whole run."""

STATE_FILE = "mlflow-run.json"

_TRANSIENT = frozenset(
    {
        "INTERNAL_ERROR",  # also what the client says when nobody answers
        "TEMPORARILY_UNAVAILABLE",
        "DEADLINE_EXCEEDED",
        "REQUEST_LIMIT_EXCEEDED",
        "RESOURCE_EXHAUSTED",
        "RESOURCE_ALREADY_EXISTS",  # another sidecar created the same experiment just now: it will be found
        "ABORTED",
        "CANCELLED",
    }
)


_NEVER = frozenset({"INVALID_PARAMETER_VALUE", "BAD_REQUEST", "MALFORMED_REQUEST"})
"""What the server will say of the same request again, whatever anybody changes."""

_FORBIDDEN = frozenset({errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT, errno.ENOTDIR, errno.EISDIR})
"""What a folder of artifacts that is written to directly says until somebody changes something."""

Stage = Literal["run", "numbers", "files"]

_finding_run = threading.Lock()
"""Two connections of one run must not both create it."""


@dataclass(frozen=True)
class MlflowSettings:
    """`[tracker.mlflow]`: the server, and the run or the experiment to write into."""

    tracking_uri: str | None = setting(None)
    run_id: str | None = setting(None, environment="MLFLOW_RUN_ID", pins_run=True)
    experiment: str | None = setting(None)
    run_name: str | None = setting(None)


class MlflowTracker:
    """Writes to the run that is found, in this order: option `run_id`; the newest run of the experiment tagged
    `peel.checkpoint_dir` with the absolute checkpoint directory; the run created earlier; else a new run.

    Never touched: the status, `mlflow.note.content` and every key outside `peel`. A run created here stays RUNNING,
    since a restarted sidecar goes on in it and only the user knows when the training is over.
    """

    def __init__(self, settings: MlflowSettings, checkpoint_dir: str, state_dir: Path) -> None:
        self._settings = settings
        self._directory = checkpoint_dir
        self._state_file = state_dir / STATE_FILE
        self._uri = settings.tracking_uri or ""
        self.experiment = settings.experiment or "Default"
        self._client: Any = None
        self._run_id = ""
        self._artifacts = ""

    def prepare(self) -> None:
        _mlflow()

    def publish(self, publication: Publication) -> None:
        mlflow = _mlflow()
        from sqlalchemy.exc import SQLAlchemyError

        stage: Stage = "run"
        try:
            run = self._writable_run(mlflow)
            tags, at = run.data.tags, publication.timestamp_ms
            stage = "numbers"
            self._write_numbers(publication, mlflow.entities, is_late=at < int(tags.get(TIME_TAG, at)))
            stage = "files"
            self._write_files(publication, is_late=at < int(tags.get(FILES_TIME_TAG, at)))
        except (mlflow.exceptions.MlflowException, SQLAlchemyError, OSError, ImportError) as error:
            # `from None`: the library's own message may hold the URI with its password.
            raise self.failure(error, stage) from None

    def training(self, loss_keys: Sequence[str]) -> TrainingLog:
        """As it was when it was written to last."""
        return training_log(self._client, self._client.get_run(self._run_id), loss_keys)

    def where(self) -> str:
        at = _shown(self._uri) or "its default tracking URI"
        return f"MLflow run {self._run_id} at {at}" if self._run_id else f"MLflow at {at}"

    def close(self) -> None:
        self._client = None

    def check(self, now: Callable[[], float]) -> tuple[Check, ...]:
        """Asks the server, finds the run, and leaves one tag and one small file in it."""
        from .mlflow_check import checks

        mlflow = _mlflow()
        self._uri = self._uri or mlflow.get_tracking_uri()
        return tuple(checks(self, mlflow, self._uri, now))

    def _writable_run(self, mlflow: Any) -> Any:
        if self._client is None:
            self._uri = self._uri or mlflow.get_tracking_uri()
            client = mlflow.MlflowClient(tracking_uri=self._uri)
            with _finding_run:
                self._run_id = self._find_run(client)
            self._client = client
        run = self._client.get_run(self._run_id)
        self._artifacts = _shown(run.info.artifact_uri or "")
        if run.info.lifecycle_stage == "deleted":  # it would refuse metrics and tags, yet take files
            raise DestinationDenied(
                f"{self.where()} is deleted",
                remedy=f"restore it (`mlflow runs restore --run-id {self._run_id}`), or name another run_id",
            )
        return run

    def _write_numbers(self, publication: Publication, entities: Any, *, is_late: bool) -> None:
        point = {"timestamp": publication.timestamp_ms, "step": publication.step}
        metrics = [entities.Metric(key, value, **point) for key, value in publication.metrics.items()]
        # Sent again late: what stands for the whole run already comes from a later checkpoint.
        tags = {} if is_late else dict(publication.tags)
        tags |= {TIME_TAG: str(publication.timestamp_ms)} if tags else {}
        if metrics or tags:
            self._client.log_batch(
                self._run_id, metrics, tags=[entities.RunTag(*tag) for tag in tags.items()], synchronous=True
            )

    def _write_files(self, publication: Publication, *, is_late: bool) -> None:
        for path, text in publication.files.items():
            if path.startswith(OWN_FILES):
                self._client.log_text(self._run_id, text, path)
            elif not is_late:
                self._client.log_text(self._run_id, text, path)
                self._client.set_tag(self._run_id, FILES_TIME_TAG, str(publication.timestamp_ms))

    def _find_run(self, client: Any) -> str:
        found = self.existing_run(client)
        if found:
            return found
        experiment = client.get_experiment_by_name(self.experiment)
        experiment_id = client.create_experiment(self.experiment) if experiment is None else experiment.experiment_id
        return self._create(client, experiment_id)

    def existing_run(self, client: Any) -> str:
        """The run that is found, "" when one is to be created. Raises DestinationDenied for a deleted experiment."""
        if self._settings.run_id:
            return self._settings.run_id
        experiment = client.get_experiment_by_name(self.experiment)
        if experiment is None:
            return self._remembered(client)
        if experiment.lifecycle_stage == "deleted":
            raise DestinationDenied(
                f"MLflow experiment {self.experiment!r} at {_shown(self._uri)} is deleted",
                remedy=f"restore it (`mlflow experiments restore -x {experiment.experiment_id}`), or name another",
            )
        return self._tagged(client, experiment.experiment_id) or self._remembered(client)

    def _tagged(self, client: Any, experiment_id: str) -> str:
        directory = self._directory
        # MLflow's filters have no way to escape a quote: a wildcard stands for what could end the text, and the
        # runs found are compared again.
        pattern = re.sub(r"['\"`\\]", "_", directory)
        runs = client.search_runs(
            [experiment_id], f"tags.`{DIRECTORY_TAG}` LIKE '{pattern}'", order_by=["attributes.start_time DESC"]
        )
        return next((str(run.info.run_id) for run in runs if run.data.tags[DIRECTORY_TAG] == directory), "")

    def _remembered(self, client: Any) -> str:
        """The run created here before, unless it was for another place or is gone."""
        if not self._state_file.exists():
            return ""
        state = json.loads(self._state_file.read_text(encoding="utf-8"))
        run_id = state.pop("run_id")
        if state != self._place():
            return ""
        try:
            run = client.get_run(run_id)
        except _mlflow().exceptions.MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            return ""
        return str(run.info.run_id) if run.info.lifecycle_stage == "active" else ""

    def _create(self, client: Any, experiment_id: str) -> str:
        name = self._settings.run_name or self._directory.rstrip("/").rpartition("/")[2]
        run = client.create_run(experiment_id, tags={DIRECTORY_TAG: self._directory}, run_name=name)
        self._remember(run.info.run_id)
        return str(run.info.run_id)

    def _place(self) -> dict[str, str]:
        """What a run was created for: no other is continued in it."""
        return {
            "tracking_uri": _shown(self._uri),
            "experiment": self.experiment,
            "checkpoint_dir": self._directory,
        }

    def _remember(self, run_id: str) -> None:
        self._state_file.parent.mkdir(parents=True, exist_ok=True)
        temporary = self._state_file.with_suffix(".tmp")
        with temporary.open("w", encoding="utf-8") as file:
            json.dump({"run_id": run_id, **self._place()}, file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(self._state_file)

    def failure(self, error: Exception, stage: Stage) -> DeliveryError:
        """What is raised for an error that the library raised at this stage."""
        is_file = stage == "files"
        place = f"the artifact store of {self.where()} ({self._artifacts})" if is_file else self.where()
        cause = _cause(error, self._uri)
        if _is_transient(error):
            mend = "start the server, or correct [tracker.mlflow] tracking_uri; it is tried again"
            if is_file:
                mend = "see that it is up and has room; metrics and tags are written all the same, it is tried again"
            return DestinationUnavailable(f"{place} cannot be reached: {cause}", remedy=mend)
        code = getattr(error, "error_code", "")
        if stage == "numbers" and code in _NEVER:
            return DeliveryError(f"{place} will never take these metrics: {cause}", remedy="please report it")
        if is_file:
            return DestinationDenied(
                f"{place} refused files, while metrics and tags are written all the same: {cause}",
                remedy="give this user the right to write there, or serve artifacts through the tracking server; "
                "it is tried again",
            )
        if code == "RESOURCE_DOES_NOT_EXIST":
            return DestinationDenied(
                f"{place} does not exist: {cause}",
                remedy="correct [tracker.mlflow] run_id, or leave it out to have the run found or created",
            )
        return DestinationDenied(
            f"{place} refused the results: {cause}",
            remedy="correct [tracker.mlflow], or the server's permissions, after the reason given; it is tried again",
        )


class MlflowPlugin:
    name = "mlflow"
    settings = MlflowSettings

    def connect(self, settings: MlflowSettings, *, checkpoint_dir: str, state_dir: Path) -> MlflowTracker:
        """A tracker for the run that writes `checkpoint_dir`; without `tracking_uri`, MLflow's own default counts."""
        return MlflowTracker(settings, checkpoint_dir, state_dir)


PLUGIN: TrackerPlugin = MlflowPlugin()


def _mlflow() -> Any:
    """The library, imported late since it takes seconds, with bounded requests and without telemetry."""
    import mlflow

    settings = mlflow.environment_variables
    settings.MLFLOW_HTTP_REQUEST_TIMEOUT.set(REQUEST_TIMEOUT_SECONDS)
    settings.MLFLOW_HTTP_REQUEST_MAX_RETRIES.set(REQUEST_RETRIES)
    settings.MLFLOW_HTTP_RESPECT_RETRY_AFTER_HEADER.set(False)  # a server may ask for an hour
    if not settings.MLFLOW_DISABLE_TELEMETRY.get():
        settings.MLFLOW_DISABLE_TELEMETRY.set(True)
        mlflow.telemetry.set_telemetry_client()  # drops the client that the import made
    return mlflow


def _is_transient(error: Exception) -> bool:
    code = getattr(error, "error_code", None)
    if code is not None:
        return code in _TRANSIENT
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status is not None:  # an upload answered by the artifact store
        return bool(status >= 500 or status in (408, 429))
    from sqlalchemy.exc import OperationalError

    if isinstance(error, OSError) and error.errno in _FORBIDDEN:
        return False
    return isinstance(error, (OSError, OperationalError))


def _shown(uri: str) -> str:
    """The URI without user, password and query. A local database's path may hold an `@` and is left alone."""
    return re.sub(r"://[^/].*@", "://", uri).split("?")[0]


def _cause(error: Exception, uri: str) -> str:
    """The system's own words when it is a connection that failed, else the first line of the error without secrets."""
    root: BaseException = error
    while root.__context__ is not None:
        root = root.__context__
    if isinstance(root, OSError) and root.strerror and root.filename is None:
        return root.strerror
    text = (str(error).splitlines() or [""])[0] or type(error).__name__
    if uri:
        text = text.replace(uri.rstrip("/"), _shown(uri).rstrip("/"))
    return re.sub(r"://[^/\s]\S*@", "://", text)[:400]
