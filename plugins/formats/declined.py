"""Checkpoints that are known and not read: each is declined with its producer's name and a way to one that is read."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from peel_agent.errors import CheckpointError, IncompleteCheckpoint
from peel_agent.records import CheckpointRef, Readiness, Weights
from peel_agent.spi import Format

from .checkpoint_folder import is_file, is_folder, names_in, read_json, stamps_of
from .deepspeed_folder import FORMAT as DEEPSPEED
from .distributed_checkpoint import FORMAT as DCP
from .megatron_distributed import FORMAT as MEGATRON
from .megatron_metadata import MAX_BACKEND_BYTES
from .safetensors_files import FORMAT as SAFETENSORS
from .torch_file import FORMAT as TORCH
from .transformers_checkpoint import FORMAT as TRANSFORMERS

Names = frozenset[str]

READ: tuple[Format, ...] = (DCP, DEEPSPEED, MEGATRON, SAFETENSORS, TORCH, TRANSFORMERS)
"""The other formats. Most are asked after this one, since it is by their names, and what they recognise is theirs."""

UNFINISHED = "-unfinished"
_ORBAX_MARKS = frozenset({"_CHECKPOINT_METADATA", "manifest.ocdbt"})
_ORBAX_TEMPORARY = ".orbax-checkpoint-tmp"
_FLAX_FILE = re.compile(r"checkpoint_[0-9]+")
_FLAX_WEIGHTS = re.compile(r"flax_model(?:-\d+-of-\d+)?\.msgpack(?:\.index\.json)?")
_TF_INDEX, _TF_DATA = re.compile(r"(.+)\.index"), re.compile(r"(.+)\.data-\d{5}-of-\d{5}")
_KERAS = re.compile(r"(?:.+[._-])?(?:model|weights|checkpoint|ckpt)(?:[._-].+)?\.(?:h5|hdf5)|.+\.keras", re.IGNORECASE)
_MEGATRON_RANK = re.compile(r"mp_rank_\d\d(?:_\d{3}){0,2}")
_OLD_TRANSFORMERS = "with transformers below 5: from_pretrained(FOLDER, {}=True).save_pretrained(NEW)"


@dataclass(frozen=True)
class Kind:
    """What a producer writes: how it is known from a path and the names in it, and what to do with it instead."""

    what: str
    way_out: str
    fits: Callable[[Path, Names], bool]


def _suffix(suffix: str) -> Callable[[Path, Names], bool]:
    return lambda path, _: path.suffix == suffix and is_file(path)


def _is_nemo_1(path: Path, names: Names) -> bool:
    packed = path.suffix == ".nemo" and is_file(path)
    return packed or ("model_config.yaml" in names and not names.isdisjoint({"model_weights", "model_weights.ckpt"}))


def _is_nemo_2(path: Path, names: Names) -> bool:
    return {"weights", "context"} <= names and is_folder(path / "weights") and is_folder(path / "context")


def _is_orbax(path: Path, names: Names) -> bool:
    if names & _ORBAX_MARKS or {"_METADATA", "checkpoint"} <= names:
        return not path.name.startswith("ocdbt.process_")  # one process's part of such a folder
    return _ORBAX_TEMPORARY in path.name and is_folder(path)


def _is_flax(path: Path, names: Names) -> bool:
    alone = names == {"checkpoint"} and is_file(path / "checkpoint")
    return alone or (_FLAX_FILE.fullmatch(path.name) is not None and is_file(path))


def _is_levanter(path: Path, names: Names) -> bool:
    if "metadata.json" not in names or not names & {"model", "manifest.ocdbt", "training_state"}:
        return False
    try:
        return {"step", "timestamp"} <= read_json(path, "metadata.json", most=MAX_BACKEND_BYTES)[0].keys()
    except CheckpointError:
        return False


def _is_tensorflow(_: Path, names: Names) -> bool:
    indexed = {found[1] for found in map(_TF_INDEX.fullmatch, names) if found}
    return any(found[1] in indexed for found in map(_TF_DATA.fullmatch, names) if found)


def _is_old_megatron(path: Path, names: Names) -> bool:
    ranks = (name for name in names if _MEGATRON_RANK.fullmatch(name) and is_folder(path / name))
    return next(ranks, None) is not None


def _is_keras(path: Path, _: Names) -> bool:
    return _KERAS.fullmatch(path.name) is not None and path.name != "tf_model.h5" and is_file(path)


KINDS = (
    Kind(
        "a .nemo archive of NeMo, or one unpacked",
        "NeMo's scripts/checkpoint_converters/convert_llama_nemo_to_hf.py (or its like for another model) "
        "--input_name_or_path MODEL.nemo --output_path NEW",
        _is_nemo_1,
    ),
    Kind(
        "a checkpoint of NeMo 2",
        'nemo.collections.llm.export_ckpt(path=FOLDER, target="hf", output_path=NEW); or put the model\'s config.json '
        "in its folder weights/ and point at that one",
        _is_nemo_2,
    ),
    Kind(
        "a checkpoint of Megatron-LM's older layout, one file a rank",
        "load it in Megatron-LM with --ckpt-convert-format torch_dist --ckpt-convert-save NEW: that layout is read",
        _is_old_megatron,
    ),
    Kind(
        "a checkpoint of Levanter",
        "python -m levanter.main.export_lm_to_hf --checkpoint_path FOLDER --output_dir NEW",
        _is_levanter,
    ),
    Kind(
        "a checkpoint of Orbax (JAX, Flax, MaxText)",
        "MaxText: its checkpoint_conversion/to_huggingface.py; other JAX code: restore it and write the weights with "
        "safetensors.flax.save_file under transformers' names",
        _is_orbax,
    ),
    Kind(
        "weights of Flax for transformers",
        _OLD_TRANSFORMERS.format("from_flax"),
        lambda _, names: any(map(_FLAX_WEIGHTS.fullmatch, names)),
    ),
    Kind(
        "a msgpack checkpoint of Flax",
        "restore it with flax.training.checkpoints and write the weights with safetensors.flax.save_file under "
        "transformers' names",
        _is_flax,
    ),
    Kind(
        "weights of Keras for transformers (tf_model.h5)",
        _OLD_TRANSFORMERS.format("from_tf"),
        lambda _, names: "tf_model.h5" in names,
    ),
    Kind(
        "a checkpoint of TensorFlow (.index and .data)",
        "for a transformers model " + _OLD_TRANSFORMERS.format("from_tf"),
        _is_tensorflow,
    ),
    Kind(
        "a file of Keras (HDF5 or .keras)",
        "load it with keras and write the weights with safetensors.numpy.save_file under transformers' names",
        _is_keras,
    ),
    Kind(
        "a GGUF file of llama.cpp",
        "AutoModelForCausalLM.from_pretrained(FOLDER, gguf_file=NAME).save_pretrained(NEW); it is quantised, so better "
        "take what it was made from",
        _suffix(".gguf"),
    ),
    Kind(
        "an ONNX graph",
        "peel the checkpoint that it was exported from: a graph for inference has no blocks to replace",
        _suffix(".onnx"),
    ),
)


class DeclinedFormat:
    """What NeMo, older Megatron, Orbax, Flax, Levanter, TensorFlow, Keras, GGUF and ONNX write; nothing of it is read.

    It is `damaged` with the reason and a way out, or `incomplete` while a producer's mark of an unfinished one is
    there. Whatever another format recognises is left to that.
    """

    name = "declined"

    def recognise(self, path: Path) -> bool:
        if _kind(path) is None and not _is_begun(path):
            return False
        return not any(form.recognise(path) for form in READ)

    def inspect(self, path: Path) -> Readiness:
        names = names_in(path)
        unfinished = _unfinished(path)
        if unfinished is not None:
            return Readiness("incomplete", unfinished, stamps_of(path, names))
        kind = _kind(path)
        if kind is None:
            return Readiness("incomplete", f"{path.name} is not there, or not yet what it will be", ())
        return Readiness("damaged", f"{path.name} is {kind.what}, which is not read; {kind.way_out}", ())

    def step(self, path: Path) -> int | None:
        """The number in the name, as for `safetensors`."""
        return SAFETENSORS.step(path)

    def open(self, ref: CheckpointRef) -> Weights:
        kind = _kind(ref.path)
        unfinished = _unfinished(ref.path)
        if unfinished is not None or kind is None:
            raise IncompleteCheckpoint(
                unfinished or f"{ref.path.name} is gone", remedy="wait until it is written; it is not read then either"
            )
        raise CheckpointError(f"{ref.path.name} is {kind.what}, which is not read", remedy=kind.way_out)


def _kind(path: Path) -> Kind | None:
    names = names_in(path)
    return next((kind for kind in KINDS if kind.fits(path, names)), None)


def _unfinished(path: Path) -> str | None:
    """What says that a producer is still writing."""
    if _ORBAX_TEMPORARY in path.name:
        return f"{path.name} is Orbax's name for one that is still being written" if is_folder(path) else None
    mark = _mark(path)
    return f"{mark.name} is there: NeMo is still writing, or was stopped" if is_file(mark) else None


def _is_begun(path: Path) -> bool:
    """True for a folder beside NeMo's mark."""
    return is_folder(path) and is_file(_mark(path))


def _mark(path: Path) -> Path:
    """NeMo's mark of an unfinished checkpoint: an empty file beside it."""
    return path.with_name(path.name.removesuffix(".nemo").removesuffix(".ckpt") + UNFINISHED) if path.name else path


FORMAT = DeclinedFormat()
