"""The base model of an adapter: a local folder that holds a whole checkpoint.

Its path comes out of the adapter's own file, which may be hostile. What is read there is what the other formats read
of a checkpoint, by their rules, and nothing of it is written anywhere.
"""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass
from pathlib import Path

from peel_agent.errors import CheckpointError, IncompleteCheckpoint
from peel_agent.records import CheckpointRef, FileStamp, LocalListing, Weights
from peel_agent.spi import Format

from ..files.checkpoint_folder import WAIT
from ..safetensors.format import FORMAT as SAFETENSORS
from ..torch.format import FORMAT as TORCH
from ..transformers.format import FORMAT as TRANSFORMERS
from .adapter_config import CONFIG, MERGE, refused

READ: tuple[Format, ...] = (TRANSFORMERS, SAFETENSORS, TORCH)
"""The formats of a base model's folder."""

NAME_IT = "put the absolute path of the base model's folder into base_model_name_or_path, or " + MERGE


@dataclass(frozen=True)
class BaseModel:
    """A base model found whole.

    `files` are its stamps as those of the adapter: absolute names for a folder elsewhere, relative ones for a folder
    inside the adapter's.
    """

    ref: CheckpointRef
    form: Format
    files: tuple[FileStamp, ...]

    def open(self) -> Weights:
        """Its tensors; raises CheckpointError for quantised ones, TornCheckpoint when its files changed meanwhile."""
        weights = self.form.open(self.ref)
        if weights.config().get("quantization_config"):
            raise refused(
                f"the LoRA adapter's base model {self.ref.path}",
                "is stored quantised (quantization_config); an adapter is merged into plain weights only",
                remedy=f"name the folder of the model before it was quantised in base_model_name_or_path, or {MERGE}",
            )
        return weights


def find_base(named: str | None, adapter: Path) -> BaseModel:
    """The base model that the adapter in the folder `adapter` names.

    Raises IncompleteCheckpoint while it is not whole, CheckpointError when there is none to be read.
    """
    folder = _folder(named, adapter)
    listing = LocalListing(folder)
    form = next((form for form in READ if form.claim(listing) is not None), None)
    if form is None:
        raise refused(
            f"the LoRA adapter's base model {folder}",
            "is no folder with weights and config.json, as save_pretrained writes",
            remedy=NAME_IT,
        )
    readiness = form.inspect(listing)
    if readiness.state == "incomplete":
        raise IncompleteCheckpoint(
            f"the LoRA adapter's base model {folder} is not whole: {readiness.reason}", remedy=readiness.remedy or WAIT
        )
    if readiness.state == "damaged":
        raise refused(
            f"the LoRA adapter's base model {folder}",
            f"cannot be used: {readiness.reason}",
            remedy=readiness.remedy or NAME_IT,
        )
    # By how it was named and not by where it is: an adapter that is held elsewhere keeps its fingerprint.
    inside = folder if Path(named or "").is_absolute() else folder.relative_to(adapter)
    files = (dataclasses.replace(stamp, name=str(inside / stamp.name)) for stamp in readiness.files)
    ref = CheckpointRef(folder, None, form.name, "", 0.0, readiness.files)
    return BaseModel(ref, form, tuple(files))


def _folder(named: str | None, adapter: Path) -> Path:
    """The folder of a base model, links in an absolute path followed: the file could as well name their target."""
    if not named:
        raise refused(CONFIG, "names no base model: this PEFT (LoRA) adapter cannot be merged", remedy=NAME_IT)
    if "\0" in named:
        raise _not_local(named)
    path = Path(named)
    if path.is_absolute():
        if not LocalListing(path).is_folder:
            raise refused(
                f"the LoRA adapter's base model {path}", "is no folder that is there and readable", remedy=NAME_IT
            )
        return Path(os.path.realpath(path))
    adapter_path, base_path = Path(os.path.realpath(adapter)), Path(os.path.realpath(adapter / path))
    if adapter_path not in base_path.parents or not LocalListing(base_path).is_folder:
        raise _not_local(named)
    return adapter / base_path.relative_to(adapter_path)


def _not_local(named: str) -> CheckpointError:
    return refused(
        f"the LoRA adapter's base model `{named}`",
        "is a name on the Hub, or relative to where the training ran: there is no such folder in the adapter's",
        remedy=NAME_IT,
    )
