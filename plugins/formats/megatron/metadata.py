"""What Megatron-core's distributed checkpoints say about themselves: metadata.json, `.metadata` and common.pt.

Runs in the parent daemon. `.metadata` is that of torch.distributed.checkpoint, with Megatron's own names and its plans
of the saving in it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from pickletools import genops

from peel_agent.errors import CheckpointError
from peel_agent.records import FileStamp, Listing

from ..dcp import metadata as dcp_metadata
from ..dcp.metadata import SHARD, Contents
from ..files.checkpoint_folder import keys_of, opened, read_json
from ..pickles.torch_zip import read_archive, refused

BACKEND = "metadata.json"
COMMON = "common.pt"
READ_BACKEND = "torch_dist"
BRIDGE = (
    "convert it to a transformers folder with Megatron Bridge (AutoBridge.from_hf_pretrained(MODEL).export_ckpt("
    "MEGATRON_FOLDER, HF_FOLDER)) and peel that folder"
)
UNTRACED = {
    "apply_layernorm_1p": "its norms are stored less one",
    "layernorm_zero_centered_gamma": "its norms are stored less one",
    "rotary_interleaved": "its queries and keys are rotated in neighbouring pairs, not in halves as transformers does",
    "qk_l2_norm": "it normalises queries and keys without weights",
    "apply_residual_connection_post_layernorm": "its residual stream starts behind the norms",
}
"""Switches of Megatron's that change the model and leave no trace in names and shapes, by their names in common.pt."""

MAX_COMMON_BYTES = 4 << 20
MAX_BACKEND_BYTES = 1 << 16
_ITERATION = re.compile(r"iter_([0-9]{1,18})")
_PLANNER = "torch.distributed.checkpoint.planner"
_STRATEGY = "megatron.core.dist_checkpointing.strategies.torch"
_OWN_METADATA = "MCoreMetadata"
_PLANS = frozenset(
    {
        *((_PLANNER, name) for name in ("SavePlan", "WriteItem", "WriteItemType", "TensorWriteData")),
        *((_STRATEGY, name) for name in (_OWN_METADATA, "MCoreSavePlan")),  # up to release 0.15
    }
)
_ASIDE = re.compile(r"(?:chained_\d+\.)?optim(?:izers?)?(?:_\w+)?\..*|.*\._extra_state(?:/.*)?|rng_state.*")
"""Tensors of the optimizer, of Transformer Engine and of random generators."""


def is_megatron_folder(listing: Listing) -> bool:
    """True for a folder with `sharded_backend` in its metadata.json, and for one in which Megatron began to write.

    common.pt is written first, metadata.json last.
    """
    names = listing.names()
    if COMMON in names and (_ITERATION.fullmatch(listing.name) or any(map(SHARD.fullmatch, names))):
        return True
    return BACKEND in names and "sharded_backend" in keys_of(listing, BACKEND, MAX_BACKEND_BYTES)


def iteration(name: str) -> int | None:
    """N of a folder `iter_N`."""
    named = _ITERATION.fullmatch(name)
    return int(named[1]) if named else None


def check_backend(path: Path) -> FileStamp:
    """The stamp of metadata.json. Raises CheckpointError when it names another backend than torch_dist."""
    value, stamp = read_json(path, BACKEND, most=MAX_BACKEND_BYTES)
    backend, version = value.get("sharded_backend"), value.get("sharded_backend_version", 1)
    if backend != READ_BACKEND or version != 1:
        shown = ascii(backend)[:60] if isinstance(backend, str) else f"a {type(backend).__name__}"
        raise CheckpointError(
            f"{BACKEND} says sharded_backend {shown} of version {ascii(version)[:20]}; only '{READ_BACKEND}' of "
            "version 1 is read",
            remedy="load it with the Megatron-core that wrote it and save it again with --ckpt-format torch_dist",
        )
    return stamp


def read_contents(pickle: bytes | bytearray) -> Contents:
    """The model's tensors in a `.metadata`, under Megatron's names; raises as dcp_metadata.read_contents does."""
    return dcp_metadata.read_contents(
        pickle,
        words=dcp_metadata.WORDS | _PLANS,
        kinds=("Metadata", _OWN_METADATA),
        naming=lambda names, _: {name: name for name in names if not _ASIDE.fullmatch(name)},
    )


def check_common(path: Path) -> FileStamp:
    """The stamp of common.pt. Raises CheckpointError when one of the switches of UNTRACED is on in it.

    Only its pickle's opcodes are looked through, for those names before a True: nothing is built from it.
    """
    with opened(path, COMMON) as (descriptor, stamp):
        pickle = read_archive(descriptor, COMMON, stamp.size).content("data.pkl", MAX_COMMON_BYTES)
    try:
        switch = next(_switched_on(pickle), None)
    except ValueError as error:
        raise refused(COMMON, f"has a data.pkl that is no pickle: {error}") from error
    if switch is not None:
        raise CheckpointError(f"{COMMON} says {switch}=True: {UNTRACED[switch]}, which is not mapped", remedy=BRIDGE)
    return stamp


def _switched_on(pickle: bytes) -> Iterator[str]:
    text: object = None
    texts: dict[int, str] = {}
    puts = 0
    for opcode, argument, _ in genops(pickle):
        if opcode.name in ("MEMOIZE", "BINPUT", "LONG_BINPUT"):
            if text in UNTRACED:
                texts[puts if argument is None else argument] = str(text)
            puts += 1
        elif opcode.name in ("BINGET", "LONG_BINGET"):
            text = texts.get(argument or 0)
        elif opcode.name == "NEWTRUE" and text in UNTRACED:
            yield str(text)
        else:
            text = argument if type(argument) is str else None
