"""W&B: one run, kept as offline runs of this machine, which `wandb sync` uploads.

W&B drops rows whose own step goes back, keeps no second value of a step, and acknowledges nothing before a run is
finished. So each publication is a finished offline run of its own, all with the one id by which W&B joins them; every
row bears the training's step as `peel/step`, which is the axis of each chart, and W&B's own step only counts rows.
"""

from __future__ import annotations

import json
import os
import shutil
import threading
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from peel_agent.errors import DeliveryError, DestinationDenied, DestinationUnavailable
from peel_agent.records import Check, Publication
from peel_agent.spi import TrackerPlugin, setting

from .local_files import sync, try_to_write, write_whole

INSTALL = 'pip install "peel-agent[wandb]"'
STATE_FILE = "wandb-run.json"
STEP = "peel/step"

OWN_FILES = "peel/checkpoints/"
"""Files of one checkpoint; all others stand for the whole run."""

_writing = threading.Lock()
"""Numbers and files come from two threads, and W&B's library has one service a process."""


@dataclass(frozen=True)
class WandbSettings:
    """`[tracker.wandb]`: the project, and where the offline runs are kept."""

    project: str = setting("peel-agent", environment="WANDB_PROJECT")
    entity: str | None = setting(None, environment="WANDB_ENTITY")
    run_name: str | None = setting(None)
    folder: Path | None = setting(None)


class WandbTracker:
    """Writes finished offline runs to `wandb` in its folder, one of a publication's numbers and one of its files.

    They are made in another folder, and moved when they are whole: what is there is never half. Which were written, and
    the run's id, are kept in the state folder, so that `wandb clean` after an upload brings nothing back.
    """

    def __init__(self, settings: WandbSettings, checkpoint_dir: str, state_dir: Path) -> None:
        self._settings = settings
        self._name = settings.run_name or checkpoint_dir.rstrip("/").rpartition("/")[2]
        self._folder = settings.folder or state_dir / "wandb"
        self._state_file = state_dir / STATE_FILE

    def prepare(self) -> None:
        _wandb()

    def publish(self, publication: Publication) -> None:
        wandb = _wandb()
        try:
            with _writing:
                if publication.metrics or publication.tags:
                    self._write(wandb, "numbers", publication, _write_numbers)
                if publication.files:
                    self._write(wandb, "files", publication, _write_files)
        except (OSError, wandb.errors.Error) as error:
            why = getattr(error, "strerror", None) or error
            raise DestinationUnavailable(
                f"W&B's offline runs cannot be written to {self._folder}: {why}",
                remedy="make the folder writable and its disk have room, or set [tracker.wandb] folder; "
                "it is tried again",
            ) from error

    def where(self) -> str:
        return f"W&B's offline runs in {self._folder}; to upload them: cd {self._folder} && wandb sync"

    def check(self, now: Callable[[], float]) -> tuple[Check, ...]:  # noqa: ARG002 -- the protocol's
        try:
            _wandb()
            try_to_write(self._folder / "wandb" / "check")
        except DeliveryError as error:
            return (Check("package", False, error.what, error.remedy),)
        except OSError as error:
            what = f"W&B's offline runs cannot be written to {self._folder}: {error.strerror or error}"
            return (Check("folder", False, what, "make the folder writable, or set [tracker.wandb] folder"),)
        return (Check("folder", True, f"{self._folder} can be written to"),)

    def look(self) -> tuple[Check, ...]:
        return self.check(lambda: 0.0)

    def close(self) -> None:
        """Nothing is held open."""

    def _write(self, wandb: Any, kind: str, publication: Publication, write: Callable[[Any, _Row], None]) -> None:
        state = self._state()
        step, at_ms = publication.step, publication.timestamp_ms
        if [kind, step, at_ms] in state["written"]:
            return
        is_late = any(written == kind and then > at_ms for written, _, then in state["written"])
        summary = dict(publication.tags) if publication.tags and not is_late else state["summary"]
        row = _Row(publication, len(state["written"]), summary, is_late)
        stamp = datetime.fromtimestamp(at_ms / 1000, UTC).strftime("%Y%m%d_%H%M%S")
        place = self._folder / "wandb" / f"offline-run-{stamp}-{state['id']}-{kind}-{step}-{at_ms}"
        if not place.exists():  # else it was moved there, and that was not noted any more
            self._make(wandb, place, state["id"], lambda run: write(run, row))
        self._note({**state, "summary": summary, "written": [*state["written"], [kind, step, at_ms]]})

    def _make(self, wandb: Any, place: Path, run_id: str, write: Callable[[Any], None]) -> None:
        work = self._folder / "unfinished"
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
        run = wandb.init(
            project=self._settings.project,
            entity=self._settings.entity,
            name=self._name,
            id=run_id,
            dir=str(work),
            resume="allow",  # `wandb sync` appends to what was uploaded before
            reinit="create_new",
            settings=_quiet_settings(wandb),
        )
        try:
            write(run)
        finally:
            run.finish()
        (run_folder,) = (work / "wandb").glob("offline-run-*")
        (log,) = run_folder.glob("*.wandb")
        sync(log)
        place.parent.mkdir(parents=True, exist_ok=True)
        run_folder.rename(place)
        sync(place.parent)
        shutil.rmtree(work, ignore_errors=True)

    def _state(self) -> dict[str, Any]:
        """The run's id, the latest summary, and what was written of which publication."""
        if self._state_file.exists():
            state: dict[str, Any] = json.loads(self._state_file.read_text(encoding="utf-8"))
            return state
        state = {"id": uuid.uuid4().hex[:12], "summary": {}, "written": []}
        self._note(state)
        return state

    def _note(self, state: dict[str, Any]) -> None:
        write_whole(self._state_file, json.dumps(state).encode())


class WandbPlugin:
    name = "wandb"
    settings = WandbSettings
    needs = ("wandb", INSTALL)

    def connect(self, settings: WandbSettings, *, checkpoint_dir: str, state_dir: Path) -> WandbTracker:
        return WandbTracker(settings, checkpoint_dir, state_dir)


PLUGIN: TrackerPlugin = WandbPlugin()


@dataclass(frozen=True)
class _Row:
    """What is written of a publication: as W&B's step `number`, and with the `summary` of the latest checkpoint."""

    publication: Publication
    number: int
    summary: Mapping[str, str]
    is_late: bool


def _write_numbers(run: Any, row: _Row) -> None:
    """One row, with the training's step as the axis of every chart; the tags are the run's summary."""
    sent = row.publication
    run.define_metric(STEP, hidden=True)
    run.define_metric("peel/*", step_metric=STEP)
    run.log({STEP: sent.step, **sent.metrics, "_timestamp": sent.timestamp_ms / 1000}, step=row.number)
    run.summary.update(dict(row.summary))


def _write_files(run: Any, row: _Row) -> None:
    for path, text in row.publication.files.items():
        if row.is_late and not path.startswith(OWN_FILES):
            continue
        file = Path(run.dir) / path
        write_whole(file, text.encode())
        run.save(str(file), base_path=run.dir, policy="now")
    run.summary.update(dict(row.summary))  # an upload without it would empty the run's


def _quiet_settings(wandb: Any) -> Any:
    """Offline, without a word on the terminal and without what tells of this machine."""
    return wandb.Settings(
        mode="offline",
        silent=True,
        console="off",
        disable_git=True,
        disable_code=True,
        save_code=False,
        x_disable_stats=True,
        x_disable_meta=True,
        x_disable_machine_info=True,
        x_save_requirements=False,
        host="",
    )


def _wandb() -> Any:
    """The library, imported late, without its reports of errors. Raises DestinationDenied without it."""
    os.environ["WANDB_ERROR_REPORTING"] = "false"  # it is read as the library is imported
    try:
        import wandb
    except ImportError as error:
        raise DestinationDenied(
            f"the package wandb cannot be imported: {error}", remedy=f"install it: {INSTALL}"
        ) from error
    return wandb
