"""Checkpoints that are known and not read: each is declined with its producer's name and a way to one that is read."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import PurePath

from peel_agent.errors import CheckpointError, IncompleteCheckpoint
from peel_agent.records import CheckpointRef, Claim, Listing, LocalListing, Readiness, Weights

from ..files.checkpoint_folder import keys_of, stamps_of
from ..files.steps import step_in_name

UNFINISHED = "-unfinished"
LATER = "wait until it is written; it is not read then either"
_MAX_METADATA_BYTES = 1 << 16
_ORBAX_MARKS = frozenset({"_CHECKPOINT_METADATA", "manifest.ocdbt"})
_ORBAX_TEMPORARY = ".orbax-checkpoint-tmp"
_FLAX_FILE = re.compile(r"checkpoint_[0-9]+")
_FLAX_WEIGHTS = re.compile(r"flax_model(?:-\d+-of-\d+)?\.msgpack(?:\.index\.json)?")
_TF_INDEX, _TF_DATA = re.compile(r"(.+)\.index"), re.compile(r"(.+)\.data-\d{5}-of-\d{5}")
_KERAS = re.compile(r"(?:.+[._-])?(?:model|weights|checkpoint|ckpt)(?:[._-].+)?\.(?:h5|hdf5)|.+\.keras", re.IGNORECASE)
_CONSOLIDATED = re.compile(r"consolidated(?:[.-].+)?\.(?:pth|safetensors)")
_TORCHTUNE = re.compile(r"(?:hf|meta|torchtune)_model_\d+(?:_\d+)?\.pt")
_FSDP_RANK = re.compile(r"pytorch_model_fsdp(?:_\d+)?_rank\d+\.bin")
_MLX, _MLX_ADAPTER = re.compile(r"weights(?:\.\d+)?\.npz"), re.compile(r"(?:\d+_)?adapters\.(?:safetensors|npz)")
_MEGATRON_RANK = re.compile(r"mp_rank_\d\d(?:_\d{3}){0,2}")
_OLD_TRANSFORMERS = "with transformers below 5: from_pretrained(FOLDER, {}=True).save_pretrained(NEW)"


@dataclass(frozen=True)
class Kind:
    """What a producer writes: how it is known by its names, and what to do with it instead."""

    what: str
    way_out: str
    fits: Callable[[Listing], bool]


def _is_single(listing: Listing, *suffixes: str) -> bool:
    """True for a file, of one of these suffixes if there are any."""
    is_named = not suffixes or PurePath(listing.name).suffix in suffixes
    return is_named and not listing.is_folder and listing.parent.is_file(listing.name)


def _is_nemo_1(listing: Listing) -> bool:
    unpacked = "model_config.yaml" in listing.names() and bool(
        listing.names() & {"model_weights", "model_weights.ckpt"}
    )
    return unpacked or _is_single(listing, ".nemo")


def _is_nemo_2(listing: Listing) -> bool:
    return listing.names() >= {"weights", "context"} and all(map(listing.is_folder_at, ("weights", "context")))


def _is_orbax(listing: Listing) -> bool:
    names = listing.names()
    if names & _ORBAX_MARKS or names >= {"_METADATA", "checkpoint"}:
        return not listing.name.startswith("ocdbt.process_")  # one process's part of such a folder
    return _ORBAX_TEMPORARY in listing.name and listing.is_folder


def _is_flax(listing: Listing) -> bool:
    if listing.is_folder:
        return listing.names() == {"checkpoint"} and listing.is_file("checkpoint")
    return _FLAX_FILE.fullmatch(listing.name) is not None and _is_single(listing)


def _is_levanter(listing: Listing) -> bool:
    names = listing.names()
    if "metadata.json" not in names or not names & {"model", "manifest.ocdbt", "training_state"}:
        return False
    return keys_of(listing, "metadata.json", _MAX_METADATA_BYTES) >= {"step", "timestamp"}


def _is_tensorflow(listing: Listing) -> bool:
    names = listing.names()
    indexed = {index[1] for index in map(_TF_INDEX.fullmatch, names) if index}
    return any(data[1] in indexed for data in map(_TF_DATA.fullmatch, names) if data)


def _is_old_megatron(listing: Listing) -> bool:
    return any(map(listing.is_folder_at, filter(_MEGATRON_RANK.fullmatch, listing.names())))


def _is_keras(listing: Listing) -> bool:
    named = _KERAS.fullmatch(listing.name) is not None and listing.name != "tf_model.h5"
    return named and _is_single(listing)


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
        "a checkpoint of LitGPT (lit_model.pth)",
        "litgpt convert_from_litgpt FOLDER NEW; put the model's config.json into NEW, and point at NEW/model.pth",
        lambda listing: "lit_model.pth" in listing.names(),
    ),
    Kind(
        "weights in the layout of Meta or Mistral (consolidated and params.json)",
        "transformers' convert_llama_weights_to_hf.py (or convert_mistral_weights_to_hf.py) --input_dir FOLDER "
        "--output_dir NEW, and peel NEW",
        lambda listing: "params.json" in listing.names() and any(map(_CONSOLIDATED.fullmatch, listing.names())),
    ),
    Kind(
        "parts of a model in files of torchtune (hf_model_0001_0.pt and the like)",
        "save it with torchtune's FullModelHFCheckpointer and safe_serialization: true, put the model's config.json "
        "into that folder, and point at it",
        lambda listing: any(map(_TORCHTUNE.fullmatch, listing.names())),
    ),
    Kind(
        "parts of a model, one a rank (FSDP's LOCAL_STATE_DICT)",
        "save with fsdp_state_dict_type SHARDED_STATE_DICT or FULL_STATE_DICT (Accelerate, Trainer): both are read",
        lambda listing: any(map(_FSDP_RANK.fullmatch, listing.names())),
    ),
    Kind(
        "an adapter of MLX (adapters.safetensors)",
        "fuse it into its model and peel NEW: mlx_lm.fuse --model MODEL --adapter-path FOLDER --save-path NEW",
        lambda listing: any(map(_MLX_ADAPTER.fullmatch, listing.names())),
    ),
    Kind(
        "weights of MLX in .npz files",
        "convert the model again with a newer mlx_lm.convert, which writes safetensors, or peel the model that it was "
        "made from",
        lambda listing: any(map(_MLX.fullmatch, listing.names())),
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
        lambda listing: any(map(_FLAX_WEIGHTS.fullmatch, listing.names())),
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
        lambda listing: "tf_model.h5" in listing.names(),
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
        lambda listing: _is_single(listing, ".gguf"),
    ),
    Kind(
        "an ONNX graph",
        "peel the checkpoint that it was exported from: a graph for inference has no blocks to replace",
        lambda listing: _is_single(listing, ".onnx"),
    ),
)


class DeclinedFormat:
    """What the producers of KINDS write; nothing of it is read.

    It is `damaged` with the reason and a way out, or `incomplete` while a producer's mark of an unfinished one is
    there. Whatever another format reads is left to that: this one's claims are `declined`.
    """

    name = "declined"
    declines = tuple(kind.what for kind in KINDS)

    def claim(self, listing: Listing) -> Claim | None:
        if _unfinished(listing) is not None:
            return Claim("declined")
        kind = _kind(listing)
        return None if kind is None else Claim("declined", fault=_words(listing, kind), remedy=kind.way_out)

    def inspect(self, listing: LocalListing) -> Readiness:
        unfinished = _unfinished(listing)
        if unfinished is not None:
            return Readiness("incomplete", unfinished, stamps_of(listing.path, listing.names()), LATER)
        kind = _kind(listing)
        if kind is None:
            return Readiness("incomplete", f"{listing.name} is not there, or not yet what it will be", ())
        return Readiness("damaged", _words(listing, kind), remedy=kind.way_out)

    def step(self, listing: LocalListing) -> int | None:
        """The number in the name, as for `safetensors`."""
        return step_in_name(listing.name)

    def open(self, ref: CheckpointRef) -> Weights:
        listing = LocalListing(ref.path)
        kind = _kind(listing)
        unfinished = _unfinished(listing)
        if unfinished is not None or kind is None:
            raise IncompleteCheckpoint(unfinished or f"{ref.path.name} is gone", remedy=LATER)
        raise CheckpointError(_words(listing, kind), remedy=kind.way_out)


def _words(listing: Listing, kind: Kind) -> str:
    return f"{listing.name} is {kind.what}, which is not read"


def _kind(listing: Listing) -> Kind | None:
    return next((kind for kind in KINDS if kind.fits(listing)), None)


def _unfinished(listing: Listing) -> str | None:
    """What says that a producer is still writing a folder, or a file of NeMo."""
    if _ORBAX_TEMPORARY in listing.name:
        return f"{listing.name} is Orbax's name for one that is still being written" if listing.is_folder else None
    mark = listing.name.removesuffix(".nemo").removesuffix(".ckpt") + UNFINISHED
    if not listing.parent.is_file(mark) or not (listing.is_folder or _is_single(listing, ".nemo", ".ckpt")):
        return None
    return f"{mark} is there: NeMo is still writing, or was stopped"


FORMAT = DeclinedFormat()
