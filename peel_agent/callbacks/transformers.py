"""The callback for transformers' Trainer."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from transformers.trainer_callback import TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from peel_agent.callbacks.directory_tag import DirectoryTag
from peel_agent.callbacks.marker import STABLE, Marker

_log = logging.getLogger("peel_agent.callbacks")

_UNFINISHED = "checkpoint-is-incomplete.txt"
"""Trainer's own sign in a checkpoint that it began to save as it was told to end."""


class PeelAgentCallback(TrainerCallback):  # type: ignore[misc] # transformers is untyped here
    """Writes an empty file `marker` into each `checkpoint-N` once every rank has saved its part, and tags the
    training's MLflow run with the directory of the checkpoints. It starts nothing.

    Without a `marker`, only the tag is set. `checkpoint_dir` is that directory as the sidecar sees it, where that is
    not `output_dir`. Raises ConfigurationError for a marker that is no file name.
    """

    def __init__(self, marker: str | None = STABLE, checkpoint_dir: str | Path | None = None) -> None:
        self._marker = Marker(marker)
        self._tag = DirectoryTag(checkpoint_dir)
        self._began_at = 0
        self._told: set[int] = set()
        self._marked_before: set[int] = set()

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Called after the callback of MLflow, which begins the run."""
        self._put_tag(args, state)
        self._began_at, self._told = state.global_step, set()
        saved = _saved(args) if args.should_save else {}
        self._marked_before = {step for step, folder in saved.items() if self._marker.is_in(folder)}

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Called before a save at this step, which may be over a checkpoint that an earlier run marked."""
        if state.global_step in self._marked_before:
            self._marker.remove(_folder(args, state.global_step))

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._put_tag(args, state)
        self._told.add(state.global_step)
        _wait_for_every_rank()
        folder = _folder(args, state.global_step)
        if args.should_save and _is_whole(folder):
            self._marker.write(folder)
        elif args.should_save:
            _log.warning(
                "there is no whole checkpoint in %s: nothing is marked there; look above for why the save failed",
                folder,
            )

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Marks what Trainer saved without `on_save`, as it does when it is told to end (`enable_jit_checkpoint`)."""
        _wait_for_every_rank()
        for step, folder in _saved(args).items() if args.should_save else ():
            if self._began_at <= step <= state.global_step and step not in self._told and _is_whole(folder):
                self._marker.write(folder)

    def _put_tag(self, args: Any, state: Any) -> None:
        if state.is_world_process_zero:
            self._tag.put(args.output_dir)


def _folder(args: Any, step: int) -> Path:
    return Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{step}"


def _saved(args: Any) -> dict[int, Path]:
    """The folders of checkpoints by their step."""
    folders = Path(args.output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*")
    return {int(number): folder for folder in folders if (number := folder.name.rpartition("-")[2]).isdecimal()}


def _is_whole(folder: Path) -> bool:
    # Trainer writes its state last.
    return (folder / "trainer_state.json").exists() and not (folder / _UNFINISHED).exists()


def _wait_for_every_rank() -> None:
    # Rank 0 is told of a save as soon as its own part is written. Each rank is told of each save, so all come here.
    import torch.distributed

    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.barrier()
