"""One MLflow run, written through `MlflowClient` and the run's id only.

`mlflow.start_run` would set the run to RUNNING and end it with this process; the client touches neither. Metrics of a
re-sent publication fall on the points they made before, since key, step, value and timestamp are the same.
"""

from __future__ import annotations

import json
import os
import re
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from peel_agent.errors import DeliveryError, DestinationDenied
from peel_agent.records import Check, KeptRun, Pages, Publication, TrainingLog
from peel_agent.spi import TrackerPlugin, setting

from .mlflow_failure import Stage, Where, failure, is_known, must_be, run_of, shown
from .mlflow_models import model_of
from .mlflow_pages import write_pages
from .mlflow_training import keep_status, training_log

REQUEST_TIMEOUT_SECONDS = 15
REQUEST_RETRIES = 1
"""MLflow's own defaults block a call on a dead server for four minutes; trying again later is the sender's part."""

DIRECTORY_TAG = "peel.checkpoint_dir"
TIME_TAG = "peel.committed_ms"
FILES_TIME_TAG = "peel.files_ms"
"""The same of the files that stand for the whole run: they may come long after the metrics."""

OWN_FILES = "peel/checkpoints/"
"""Files of one checkpoint; all others stand for the whole run."""

CREATED_TAG = "peel.created_by"
"""Tells a run that was created here from one of the training's."""

CREATOR = "peel-agent"

NOTE_TAG = "mlflow.note.content"
NOTE_END = "\n\nWritten by peel-agent after each checkpoint; a text of yours in this place is kept."
NOTE_LENGTH = 4000
"""Characters of a note: MLflow takes 5,000 of a tag on some servers."""

STATE_FILE = "mlflow-run.json"

MODEL_TRAINING = {"mlflow.experimentKind": "custom_model_development"}
"""What MLflow's pages open as model training: without it one is asked, or shown the pages of GenAI."""

_finding_run = threading.Lock()
"""Two connections of one run must not both create it."""


@dataclass(frozen=True)
class MlflowSettings:
    """`[tracker.mlflow]`: the server, and the run or the experiment to write into."""

    tracking_uri: str | None = setting(None)
    run_id: str | None = setting(None, environment="MLFLOW_RUN_ID", pins_run=True)
    experiment: str | None = setting(None, environment="MLFLOW_EXPERIMENT_NAME", instead_of="experiment_id")
    experiment_id: str | None = setting(None, environment="MLFLOW_EXPERIMENT_ID", instead_of="experiment")
    run_name: str | None = setting(None)
    end_run: bool = setting(False)
    """The training is over: a run that was created here is ended with each publication."""
    logged_models: bool = setting(False)
    """The logged model of the same step gets the numbers and the tags too."""


class MlflowTracker:
    """Writes to the run that is found, in this order: option `run_id`; the newest run of the experiment tagged
    `peel.checkpoint_dir` with the absolute checkpoint directory; the run created earlier; else a new run. The
    experiment is the one of option `experiment`, or of `experiment_id`, else MLflow's `Default`.

    Never touched: status and `mlflow.note.content` of a run that was not created here, and every key outside `peel`,
    but for the images of the heat maps and MLflow's own mark `mlflow.loggedImages`, without which it shows none. A run
    created here has the latest verdict as its note, until somebody writes another; it is RUNNING until the training is
    over, as far as its checkpoints show or the user says, and again when more comes of it.
    """

    def __init__(self, settings: MlflowSettings, checkpoint_dir: str, state_dir: Path) -> None:
        self._settings = settings
        self._directory = checkpoint_dir
        self._state_file = state_dir / STATE_FILE
        self._uri = settings.tracking_uri or ""
        self._name = settings.experiment or (None if settings.experiment_id else "Default")
        self.experiment = repr(self._name) if self._name else f"of id {settings.experiment_id}"
        """What to call the experiment."""
        self._client: Any = None
        self._run_id = ""
        self._artifacts = ""

    def prepare(self) -> None:
        _mlflow()

    def publish(self, publication: Publication) -> None:
        mlflow = _mlflow()
        stage: Stage = "run"
        try:
            run = self._writable_run(mlflow)
            tags, at = run.data.tags, publication.timestamp_ms
            stage = "numbers"
            is_late = at < int(tags.get(TIME_TAG, at))
            model_id = model_of(self._client, run, publication.step) if self._settings.logged_models else None
            self._write_numbers(publication, mlflow.entities, _note(publication, tags), model_id, is_late=is_late)
            if tags.get(CREATED_TAG) == CREATOR:
                keep_status(self._client, run, publication, is_over=self._settings.end_run, is_late=is_late)
            stage = "files"
            self._write_files(publication, is_late=at < int(tags.get(FILES_TIME_TAG, at)))
        except Exception as error:
            if not is_known(mlflow, error, stage):
                raise
            # `from None`: the library's own message may hold the URI with its password.
            raise self.failure(error, stage) from None

    def show(self, pages: Pages) -> None:
        mlflow = _mlflow()
        stage: Stage = "run"
        try:
            run = self._writable_run(mlflow)
            stage = "files"
            write_pages(self._client, run, pages)
        except Exception as error:
            if not is_known(mlflow, error, stage):
                raise
            raise self.failure(error, stage) from None

    def training(self, loss_keys: Sequence[str]) -> TrainingLog:
        """As it was when it was written to last."""
        return training_log(self._client, self._client.get_run(self._run_id), loss_keys)

    def where(self) -> str:
        at = shown(self._uri) or "its default tracking URI"
        return f"MLflow run {self._run_id} at {at}" if self._run_id else f"MLflow at {at}"

    def close(self) -> None:
        self._client = None

    def check(self, now: Callable[[], float]) -> tuple[Check, ...]:
        """Asks the server, finds the run, and leaves one tag and one small file in it."""
        from .mlflow_check import checks

        return tuple(checks(self, _mlflow(), now))

    def look(self) -> tuple[Check, ...]:
        """Asks the server, and finds the run."""
        from .mlflow_check import looks

        return tuple(looks(self, _mlflow()))

    def read_back(self, folder: Path) -> KeptRun:
        """What was published to the run of `run_id`."""
        from .mlflow_history import kept_run, unreadable

        mlflow = _mlflow()
        stage: Stage = "run"
        try:
            client = mlflow.MlflowClient(tracking_uri=self.given_uri(mlflow))
            self._run_id = self._settings.run_id or self.existing_run(client)
            run = run_of(client, self._run_id)
            stage = "files"
            return kept_run(client, run, folder)
        except Exception as error:
            if not is_known(mlflow, error, stage):
                raise
            raise unreadable(error, self.where(), self._uri) from None

    def given_uri(self, mlflow: Any) -> str:
        """The tracking URI, MLflow's own default where none is configured; raises DestinationDenied for no URI."""
        self._uri = self._uri or str(mlflow.get_tracking_uri()).strip()
        if not _can_be_split(self._uri):
            raise DestinationDenied(
                "MLflow's tracking URI is no address that can be used (it is not shown: it may hold a secret)",
                remedy="write it as http://host:port, in [tracker.mlflow] tracking_uri, --tracking-uri or "
                "MLFLOW_TRACKING_URI",
            )
        if re.fullmatch(r"[\w.-]+:\d+(/.*)?", self._uri):
            raise DestinationDenied(
                f"the tracking URI {self._uri} does not say how to speak to it",
                remedy=f"write http://{self._uri}, or https://, in [tracker.mlflow] tracking_uri, --tracking-uri or "
                "MLFLOW_TRACKING_URI",
            )
        return self._uri

    def _writable_run(self, mlflow: Any) -> Any:
        if self._client is None:
            client = mlflow.MlflowClient(tracking_uri=self.given_uri(mlflow))
            with _finding_run:
                self._run_id = self._find_run(client)
            self._client = client
        run = run_of(self._client, self._run_id)
        self._artifacts = shown(run.info.artifact_uri or "")
        if run.info.lifecycle_stage == "deleted":  # it would refuse metrics and tags, yet take files
            raise DestinationDenied(
                f"{self.where()} is deleted",
                remedy=f"restore it (`mlflow runs restore --run-id {self._run_id}`), or name another run_id",
            )
        return run

    def _write_numbers(
        self, publication: Publication, entities: Any, note: dict[str, str], model_id: str | None, *, is_late: bool
    ) -> None:
        point: dict[str, Any] = {"timestamp": publication.timestamp_ms, "step": publication.step}
        point |= {"model_id": model_id, "run_id": self._run_id} if model_id else {}
        metrics = [entities.Metric(key, value, **point) for key, value in publication.metrics.items()]
        # Sent again late: what stands for the whole run already comes from a later checkpoint.
        tags = {} if is_late else {**publication.tags, **note}
        tags |= {TIME_TAG: str(publication.timestamp_ms)} if tags else {}
        if metrics or tags:
            self._client.log_batch(
                self._run_id, metrics, tags=[entities.RunTag(*tag) for tag in tags.items()], synchronous=True
            )

        if model_id and publication.tags:
            self._client.set_logged_model_tags(model_id, dict(publication.tags))

    def _write_files(self, publication: Publication, *, is_late: bool) -> None:
        for path, text in publication.files.items():
            if path.startswith(OWN_FILES):
                self._client.log_text(self._run_id, text, path)
            elif not is_late:
                self._client.log_text(self._run_id, text, path)
                self._client.set_tag(self._run_id, FILES_TIME_TAG, str(publication.timestamp_ms))

    def _find_run(self, client: Any) -> str:
        run_id = self.existing_run(client)
        if run_id:
            return run_id
        experiment = self._experiment(client)
        if experiment is None:
            experiment_id = str(client.create_experiment(self._name, tags=MODEL_TRAINING))
            must_be(bool(experiment_id), "a new experiment has no id")
        else:
            experiment_id = experiment.experiment_id
        return self._create(client, experiment_id)

    def existing_run(self, client: Any) -> str:
        """The run that is found, "" when one is to be created. Raises DestinationDenied for a deleted experiment."""
        if self._settings.run_id:
            return self._settings.run_id
        experiment = self._experiment(client)
        if experiment is None:
            return self._remembered(client)
        if experiment.lifecycle_stage == "deleted":
            raise DestinationDenied(
                f"MLflow experiment {self.experiment} at {shown(self._uri)} is deleted",
                remedy=f"restore it (`mlflow experiments restore -x {experiment.experiment_id}`), or name another",
            )
        return self._tagged(client, experiment.experiment_id) or self._remembered(client)

    def _experiment(self, client: Any) -> Any:
        """The experiment that is configured; None for a name that nobody has yet."""
        wanted = self._settings.experiment_id
        if not self._name:
            return self._experiment_of_id(client, str(wanted))
        experiment = client.get_experiment_by_name(self._name)
        if experiment is not None:
            must_be(bool(experiment.name and experiment.experiment_id), "an experiment has no name")
        if wanted and (experiment is None or str(experiment.experiment_id) != wanted):
            clash = "there is none of that name" if experiment is None else f"its id is {experiment.experiment_id}"
            raise DestinationDenied(
                f"MLflow at {shown(self._uri)} is told two experiments, {self._name!r} and the id {wanted}: {clash}",
                remedy="name one of them: MLFLOW_EXPERIMENT_NAME or MLFLOW_EXPERIMENT_ID, or [tracker.mlflow] "
                "experiment or experiment_id, which go before both",
            )
        return experiment

    def _experiment_of_id(self, client: Any, wanted: str) -> Any:
        try:
            experiment = client.get_experiment(wanted)
        except _mlflow().exceptions.MlflowException as error:
            if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
                raise
            raise DestinationDenied(
                f"there is no MLflow experiment of the id {wanted} at {shown(self._uri)}",
                remedy="correct MLFLOW_EXPERIMENT_ID or [tracker.mlflow] experiment_id (`mlflow experiments search` "
                "lists them)",
            ) from None
        must_be(bool(experiment.experiment_id), "an experiment has no id")
        return experiment

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
            run = run_of(client, run_id)
        except _mlflow().exceptions.MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            return ""
        return str(run.info.run_id) if run.info.lifecycle_stage == "active" else ""

    def _create(self, client: Any, experiment_id: str) -> str:
        name = self._settings.run_name or self._directory.rstrip("/").rpartition("/")[2]
        run = client.create_run(
            experiment_id, tags={DIRECTORY_TAG: self._directory, CREATED_TAG: CREATOR}, run_name=name
        )
        must_be(bool(run.info.run_id), "a new run has no id")
        self._remember(run.info.run_id)
        return str(run.info.run_id)

    def _place(self) -> dict[str, str]:
        """What a run was created for: no other is continued in it."""
        return {
            "tracking_uri": shown(self._uri),
            "experiment": self._name or self.experiment,
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
        return failure(error, stage, Where(self.where(), self._uri, self._artifacts))


class MlflowPlugin:
    name = "mlflow"
    settings = MlflowSettings
    shows_pages = True

    def connect(self, settings: MlflowSettings, *, checkpoint_dir: str, state_dir: Path) -> MlflowTracker:
        """A tracker for the run that writes `checkpoint_dir`; without `tracking_uri`, MLflow's own default counts."""
        return MlflowTracker(settings, checkpoint_dir, state_dir)


PLUGIN: TrackerPlugin = MlflowPlugin()


def _note(publication: Publication, tags: Mapping[str, str]) -> dict[str, str]:
    """The note of a run that was created here, as a tag; none over a text that somebody else wrote."""
    note = tags.get(NOTE_TAG, "")
    if not publication.headline or tags.get(CREATED_TAG) != CREATOR or (note and not note.endswith(NOTE_END)):
        return {}
    return {NOTE_TAG: publication.headline[:NOTE_LENGTH] + NOTE_END}


def _can_be_split(uri: str) -> bool:
    try:
        return urlsplit(uri).port != 0
    except ValueError:
        return False


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
