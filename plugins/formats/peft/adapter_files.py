"""The files of one adapter: its settings and where its tensors lie. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from peel_agent.errors import IncompleteCheckpoint
from peel_agent.records import FileStamp, Weights

from ..files.checkpoint_folder import WAIT, by_name, opened, read_json
from ..files.steps import step_in_name
from ..files.trainer import check_written, is_trainer_name, trainer_step
from ..pickles.torch_archive import View, read_saved_model
from ..safetensors.header import Extent, read_header
from ..safetensors.reader import LocatedTensors
from .adapter_config import CONFIG, LoraSettings, read_settings

SAFETENSORS = "adapter_model.safetensors"
PICKLED = "adapter_model.bin"
WEIGHTS = (SAFETENSORS, PICKLED)
"""Where PEFT keeps an adapter's tensors; it reads the first that is there."""

MAX_CONFIG_BYTES = 4 * 2**20


@dataclass(frozen=True)
class Adapter:
    """An adapter found whole: `layout` says where its tensors lie, `views` how those of a pickled file are laid out."""

    settings: LoraSettings
    layout: LocatedTensors
    views: Mapping[str, View] | None
    step: int | None

    @property
    def files(self) -> tuple[FileStamp, ...]:
        return self.layout.files

    def open(self) -> Weights:
        """Its tensors, its files held open; imports torch."""
        from ..safetensors.weights import SafetensorsWeights
        from ..torch.weights import TorchWeights

        raw = SafetensorsWeights(self.layout)
        return raw if self.views is None else TorchWeights(raw, self.views)


def read_adapter(folder: Path, names: frozenset[str]) -> Adapter:
    """The adapter in a folder, in which there are files of these names.

    Raises IncompleteCheckpoint for what may still be written, CheckpointError for an adapter that is refused.
    """
    is_trainers = is_trainer_name(folder.name)
    if is_trainers:
        check_written(folder)
    config, stamp = read_json(folder, CONFIG, most=MAX_CONFIG_BYTES)
    settings = read_settings(config)
    name = next((name for name in WEIGHTS if name in names), None)
    if name is None:
        raise IncompleteCheckpoint(f"neither {SAFETENSORS} nor {PICKLED} is there", remedy=WAIT)
    tensors, views, weights = _tensors(folder, name)
    step = trainer_step(folder, names) if is_trainers else step_in_name(folder.name)
    return Adapter(settings, LocatedTensors(folder, {}, tensors, by_name((stamp, weights))), views, step)


def _tensors(folder: Path, name: str) -> tuple[dict[str, tuple[str, Extent]], Mapping[str, View] | None, FileStamp]:
    if name == SAFETENSORS:
        with opened(folder, name) as (descriptor, stamp):
            header = read_header(descriptor, name, stamp.size)
        return {tensor: (name, extent) for tensor, extent in header.tensors.items()}, None, stamp
    saved = read_saved_model(folder, name)
    # As bytes: TorchWeights makes dtype, shape and strides of them.
    extents = {
        tensor: (name, Extent("uint8", (view.size,), view.offset, view.size)) for tensor, view in saved.tensors.items()
    }
    return extents, saved.tensors, saved.stamp
