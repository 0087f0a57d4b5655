"""The callback for Lightning's Trainer, under either of the names that Lightning is installed by."""

from __future__ import annotations

import importlib
import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from peel_agent.callbacks.directory_tag import DirectoryTag, TrackedRun, active_run
from peel_agent.callbacks.marker import STABLE, Marker

_log = logging.getLogger("peel_agent.callbacks")


def _lightning() -> Any:
    """The package that the training uses: the one that is imported, else `lightning`, else `pytorch_lightning`."""
    names = ("lightning.pytorch", "pytorch_lightning")
    for name in (*(name for name in names if name in sys.modules), *names):
        try:
            return importlib.import_module(name)
        except ImportError:
            continue
    raise ImportError("neither lightning nor pytorch_lightning is installed -> pip install lightning")


_LIGHTNING = _lightning()


class PeelAgentCallback(_LIGHTNING.Callback):  # type: ignore[misc,name-defined] # imported by name
    """Writes an empty file `marker` into each checkpoint of a ModelCheckpoint that is a folder, once it is whole, and
    tags the training's MLflow run with the directory of the checkpoints. It starts nothing.

    A checkpoint that is one file needs no marker, and gets none: Lightning moves it into place when it is whole.
    Without a `marker`, only the tag is set. `checkpoint_dir` is that directory as the sidecar sees it, where that is
    not the first ModelCheckpoint's. Raises ConfigurationError for a marker that is no file name.
    """

    def __init__(self, marker: str | None = STABLE, checkpoint_dir: str | Path | None = None) -> None:
        super().__init__()
        self._marker = Marker(marker)
        self._tag = DirectoryTag(checkpoint_dir)
        self._has_saved = False

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """By now the logger has its run, and ModelCheckpoint its directory."""
        if not trainer.is_global_zero:
            return
        directory = next((saver.dirpath for saver in _savers(trainer) if saver.dirpath), None)
        if directory:
            self._tag.put(directory, lambda: _logged_run(trainer) or active_run())
        if _is_asynchronous(trainer):
            writer = type(trainer.strategy.checkpoint_io.checkpoint_io)
            if writer is not _LIGHTNING.plugins.io.TorchCheckpointIO:  # that writes single files
                _log.warning(
                    "checkpoints are written in the background (AsyncCheckpointIO of %s), and nothing says when a "
                    "folder is whole: folders get no marker; leave out AsyncCheckpointIO, or [watch] ready_markers",
                    writer.__name__,
                )

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Called before anything is written, and not told where: what every save writes over loses its marker."""
        self._has_saved = True
        if trainer.is_global_zero:
            for saver in _savers(trainer):
                if saver.last_model_path and Path(saver.last_model_path).is_dir():
                    self._marker.remove(Path(saver.last_model_path))

    # Lightning has no hook after a save. It lets no rank go on before all have written, so that whatever hook is called
    # next finds whole checkpoints.

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self._mark(trainer)

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        self._mark(trainer)

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        self._mark(trainer)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self._mark(trainer)

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        self._mark(trainer)

    def _mark(self, trainer: Any) -> None:
        if not self._has_saved:
            return
        self._has_saved = False
        if trainer.is_global_zero and not _is_asynchronous(trainer):
            for path in _saved(trainer):
                if path.is_dir():
                    self._marker.write(path)


def _is_asynchronous(trainer: Any) -> bool:
    return isinstance(trainer.strategy.checkpoint_io, _LIGHTNING.plugins.io.AsyncCheckpointIO)


def _savers(trainer: Any) -> list[Any]:
    return [
        callback
        for callback in trainer.checkpoint_callbacks
        if isinstance(callback, _LIGHTNING.callbacks.ModelCheckpoint)
    ]


def _saved(trainer: Any) -> Iterator[Path]:
    """The local checkpoints that are named by what saved them, whether they are there yet or not."""
    for saver in _savers(trainer):
        for path in {saver.best_model_path, saver.last_model_path, *saver.best_k_models} - {""}:
            if "://" not in str(path) and not Path(path).is_symlink():
                yield Path(path)


def _logged_run(trainer: Any) -> TrackedRun | None:
    for logger in trainer.loggers:
        if isinstance(logger, _LIGHTNING.loggers.MLFlowLogger):
            return TrackedRun(logger.experiment, logger.run_id)
    return None
