"""`peft`: a folder with an adapter of PEFT, read as its base model with the adapter merged into it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from peel_agent.errors import CheckpointError
from peel_agent.records import CheckpointRef, Claim, FileStamp, Listing, LocalListing, Readiness, Weights

from ..files.checkpoint_folder import as_found, by_name, not_whole, stamps_of
from ..files.remembered import Remembered, check_seen
from ..files.steps import step_in_name
from ..files.trainer import SENTINEL, STATE, awaited, is_trainer_name, marks_of_trainer
from .adapter_config import CONFIG, refused
from .adapter_files import WEIGHTS, Adapter, read_adapter
from .base_model import BaseModel, find_base

_NEEDED = frozenset({CONFIG, *WEIGHTS, STATE, SENTINEL})


class PeftFormat:
    """An adapter as save_pretrained of PEFT or Trainer write it, beside a base model in a local folder.

    It is complete when its settings are merged here and its tensors and its base model are whole; a folder of Trainer's
    needs trainer_state.json besides. The base model's files are part of its stamps.
    """

    name = "peft"

    def claim(self, listing: Listing) -> Claim | None:
        if not listing.is_folder:
            return Claim("specific") if listing.name in WEIGHTS and listing.parent.is_file(listing.name) else None
        names = listing.names()
        if not names & {CONFIG, *WEIGHTS}:
            return None
        # Settings alone may be another's (MLX has a file of the same name), or left beside the merged model.
        if names.isdisjoint(WEIGHTS):
            return Claim("begun", names & _NEEDED)
        return Claim("specific", names & _NEEDED, awaits=awaited(names) if is_trainer_name(listing.name) else ())

    def inspect(self, listing: LocalListing) -> Readiness:
        try:
            adapter = _look(listing)
            base = find_base(adapter.base, listing.path)
        except CheckpointError as error:
            return not_whole(error, stamps_of(listing.path, listing.names()))
        files = by_name(adapter.files, base.files)
        return Readiness("complete", f"{len(files)} files of adapter and base model have their sizes", files)

    def step(self, listing: LocalListing) -> int | None:
        """Trainer's count in a folder of its own, else the number in the name."""
        try:
            step = _look(listing).step
        except CheckpointError:
            step = None
        return step_in_name(listing.name) if step is None else step

    def open(self, ref: CheckpointRef) -> Weights:
        """The weights of the base model with the adapter merged into them, under the base model's names."""
        from .merger import plan
        from .weights import MergedWeights  # imports torch

        whole = as_found(ref, lambda: _read(LocalListing(ref.path)))
        base, adapter = whole.base.open(), whole.adapter.open()
        merger = plan(whole.adapter.settings, adapter.shapes(), base.shapes(), base.config())
        return MergedWeights(ref.path, base, adapter, merger)


@dataclass(frozen=True)
class _Whole:
    """An adapter and its base model, both found whole."""

    adapter: Adapter
    base: BaseModel

    @property
    def files(self) -> tuple[FileStamp, ...]:
        return by_name(self.adapter.files, self.base.files)


def _read(listing: LocalListing) -> _Whole:
    _check_folder(listing)
    adapter = read_adapter(listing.path, listing.names())
    return _Whole(adapter, find_base(adapter.settings.base, listing.path))


def _check_folder(listing: LocalListing) -> None:
    if not listing.is_folder and listing.name in WEIGHTS:
        raise refused(f"{listing.name} is a part of a LoRA adapter", "of PEFT", remedy="give the folder that it is in")


@dataclass(frozen=True)
class _Examined:
    """What is remembered of an adapter's files."""

    base: str | None
    files: tuple[FileStamp, ...]
    step: int | None


def _look(listing: LocalListing) -> _Examined:
    _check_folder(listing)
    names = listing.names()
    names = names & _NEEDED | marks_of_trainer(names)
    stamps = stamps_of(listing.path, names)
    # What has no stamp may go or come without a change of the stamps, so nothing is remembered of it.
    examine = _examine if len(stamps) == len(names) else _examine.anew
    return examine(listing.path, names, stamps)


def _examine_files(path: Path, names: frozenset[str], stamps: tuple[FileStamp, ...]) -> _Examined:
    adapter = read_adapter(path, names)
    check_seen(path, adapter.files, stamps)
    return _Examined(adapter.settings.base, adapter.files, adapter.step)


_examine = Remembered(_examine_files, incomplete=False)

FORMAT = PeftFormat()
