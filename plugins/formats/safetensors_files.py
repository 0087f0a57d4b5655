"""Weights in safetensors outside transformers' Trainer: one file, or a folder written by save_pretrained."""

from __future__ import annotations

import re
from pathlib import Path

from peel_agent.records import CheckpointRef, Readiness, Weights

from .checkpoint_folder import CONFIG, is_file, names_in
from .safetensors_reader import (
    INDEX,
    WEIGHTS,
    Layout,
    inspect_layout,
    open_weights,
    read_files,
    read_folder,
    saved_by_accelerate,
)
from .transformers_checkpoint import is_trainer_folder

_SHARD = re.compile(r".*-\d+-of-\d+\.safetensors")
_STEP = re.compile(
    r"(?:.*[-_.=])?(?:checkpoint|ckpt|global[-_]?step|step|iteration|iter)[-_.=]?([0-9]{1,18})|([0-9]{1,18})",
    re.IGNORECASE,
)


COUNTED_SAVES = re.compile(r"checkpoint_\d+")


class SafetensorsFormat:
    """A `*.safetensors` file with config.json beside it, or config.json with model.safetensors or its shards.

    A folder named `checkpoint-N` is left to the `transformers` format; a shard alone is no checkpoint.
    """

    name = "safetensors"

    def recognise(self, path: Path) -> bool:
        if is_trainer_folder(path):
            return False
        if path.suffix == ".safetensors" and not _SHARD.fullmatch(path.name) and is_file(path):
            return True
        return any(name in (WEIGHTS, INDEX) or _SHARD.fullmatch(name) for name in names_in(path))

    def inspect(self, path: Path) -> Readiness:
        if path.suffix == ".safetensors":
            return inspect_layout(_read, path, path.parent, frozenset({CONFIG, path.name}))
        return inspect_layout(_read, path, path, names_in(path))

    def step(self, path: Path) -> int | None:
        """The number in a name such as `checkpoint-800`, `step_800`, `iter800`, `global_step800` or `800`.

        Accelerate's `checkpoint_8` counts savings and not steps.
        """
        if COUNTED_SAVES.fullmatch(path.name) and saved_by_accelerate(names_in(path)):
            return None
        found = _STEP.fullmatch(path.name.removesuffix(".safetensors"))
        return int(found[1] or found[2]) if found else None

    def open(self, ref: CheckpointRef) -> Weights:
        return open_weights(ref, lambda: _read(ref.path))


def _read(path: Path) -> Layout:
    # By name, not by what is there now: a file that vanished is still a file that is missing.
    if path.suffix == ".safetensors":
        return read_files(path.parent, (path.name,), own_config=False)
    return read_folder(path)


FORMAT = SafetensorsFormat()
