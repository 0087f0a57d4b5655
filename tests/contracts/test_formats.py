"""The two checkpoint formats: the conformance kit on what transformers really writes, and hostile files."""

from __future__ import annotations

import dataclasses
import functools
import gc
import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import peel_agent
from peel_agent import registry
from peel_agent.errors import CheckpointError, IncompleteCheckpoint, TornCheckpoint
from peel_agent.pipeline import locate
from peel_agent.records import CheckpointRef, Claim, Listing, LocalListing, Readiness, Weights
from peel_agent.spi import Format
from peel_agent.testing import formats as kit
from peel_agent.testing.formats import CHECKS, FormatCase

(SAFETENSORS,) = registry.formats("safetensors")
(TRANSFORMERS,) = registry.formats("transformers")
ENTRIES = {
    "safetensors": "peel_plugins.formats.safetensors.format:FORMAT",
    "transformers": "peel_plugins.formats.transformers.format:FORMAT",
}


@functools.cache
def tiny_llama() -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=19,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=32,
    )
    return LlamaForCausalLM(config)


def save(path: Path, *, shard_size: str = "1GB", step: int | None = None) -> Mapping[str, Tensor]:
    """Writes with save_pretrained; with `step`, adds what Trainer writes last."""
    model = tiny_llama()
    model.save_pretrained(path, max_shard_size=shard_size)
    if step is not None:
        (path / "optimizer.pt").write_bytes(b"not read")
        (path / "trainer_state.json").write_text(json.dumps({"global_step": step, "log_history": []}))
    state: Mapping[str, Tensor] = model.state_dict()
    return state


def save_single_file(path: Path) -> Mapping[str, Tensor]:
    model = tiny_llama()
    model.config.save_pretrained(path.parent)
    save_file(model.state_dict(), path)
    state: Mapping[str, Tensor] = model.state_dict()
    return state


def case(form: Format, produce: kit.Producer, name: str, step: int | None) -> FormatCase:
    return FormatCase(form, ENTRIES[form.name], produce, name, step)


CASES = {
    "trainer": case(TRANSFORMERS, functools.partial(save, step=5), "checkpoint-5", 5),
    "trainer, sharded": case(
        TRANSFORMERS, functools.partial(save, shard_size="6KB", step=1200), "checkpoint-1200", 1200
    ),
    "folder": case(SAFETENSORS, save, "step_800", 800),
    "folder, sharded": case(SAFETENSORS, functools.partial(save, shard_size="6KB"), "final", None),
    "file": case(SAFETENSORS, save_single_file, "iter7.safetensors", 7),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_conformance(check: Callable[[FormatCase, Path], None], name: str, tmp_path: Path) -> None:
    """Every check of the kit holds for checkpoints as transformers writes them, in one file and in shards."""
    check(CASES[name], tmp_path)


def test_the_files_of_a_checkpoint(tmp_path: Path) -> None:
    """Config, index and every shard are stamped: what is read. The optimizer, which may be deleted, is not, nor
    Trainer's state, which may come later.
    """
    path, _ = CASES["trainer, sharded"].write(tmp_path)
    shards = sorted(file.name for file in path.glob("model-*.safetensors"))
    assert len(shards) > 1
    assert [stamp.name for stamp in TRANSFORMERS.inspect(LocalListing(path)).files] == [
        "config.json",
        *shards,
        "model.safetensors.index.json",
    ]


class Sabotaged:
    """A format that does what it should not: the kit must see each fault."""

    name = "safetensors"

    def __init__(self, fault: str) -> None:
        self.fault = fault
        self._seen: Readiness | None = None

    def claim(self, listing: Listing) -> Claim | None:
        return SAFETENSORS.claim(listing) if self.fault != "blind" else None

    def inspect(self, listing: LocalListing) -> Readiness:
        if self.fault == "trusting" and self._seen is not None:
            return self._seen
        if self.fault == "frail" and not listing.path.exists():
            raise FileNotFoundError(listing.path)
        self._seen = SAFETENSORS.inspect(listing)
        return self._seen

    def step(self, listing: LocalListing) -> int | None:
        return 1 if self.fault == "miscounting" else SAFETENSORS.step(listing)

    def open(self, ref: CheckpointRef) -> Weights:
        return Altered(SAFETENSORS.open(ref)) if self.fault == "altering" else SAFETENSORS.open(ref)


@dataclasses.dataclass
class Altered:
    """Weights in which one bit of one tensor differs."""

    true: Weights

    def config(self) -> Mapping[str, Any]:
        return self.true.config()

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return self.true.shapes()

    def read(self, name: str) -> Tensor:
        tensor = self.true.read(name)
        if name == "model.norm.weight":
            tensor.view(torch.uint8)[0] ^= 1
        return tensor


@pytest.mark.parametrize(
    ("check", "fault"),
    [
        (kit.check_complete_once_written, "blind"),
        (kit.check_complete_once_written, "miscounting"),
        (kit.check_truncation_is_never_complete, "trusting"),
        (kit.check_missing_file_is_never_complete, "trusting"),
        (kit.check_stamps_follow_changes, "trusting"),
        (kit.check_vanished_is_incomplete, "frail"),
        (kit.check_reads_what_was_written, "altering"),
    ],
)
def test_the_kit_sees_a_fault(check: Callable[[FormatCase, Path], None], fault: str, tmp_path: Path) -> None:
    """Each check of the kit fails for a format with the fault that it is there to find."""
    check(dataclasses.replace(CASES["folder"], format=Sabotaged("none")), tmp_path / "sound")
    form = Sabotaged(fault)
    form.inspect(LocalListing(CASES["folder"].write(tmp_path / "other")[0]))
    with pytest.raises((AssertionError, FileNotFoundError)):
        check(dataclasses.replace(CASES["folder"], format=form), tmp_path / "faulty")


def test_the_kit_sees_torch_in_the_parent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A format whose module imports torch fails the kit."""
    (tmp_path / "heavy_format.py").write_text(
        "import torch\nfrom peel_plugins.formats.safetensors.format import FORMAT\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(AssertionError, match="torch was imported"):
        kit.check_parent_imports_no_torch(dataclasses.replace(CASES["folder"], entry="heavy_format:FORMAT"), tmp_path)


# ---------------------------------------------------------------- recognition and step


class TestRecognition:
    @pytest.mark.parametrize(
        ("path", "files", "by"),
        [
            ("checkpoint-5", [], "transformers"),
            ("checkpoint-5", ["config.json", "model.safetensors"], "transformers"),
            ("checkpoint-5", ["config.json", "pytorch_model.bin"], None),
            ("final", ["config.json", "pytorch_model.bin"], None),
            ("final", ["config.json", "pytorch_model.bin", "model.safetensors"], "safetensors"),
            ("checkpoint-last", ["config.json", "model.safetensors"], "safetensors"),
            ("final", ["config.json", "model.safetensors.index.json"], "safetensors"),
            ("final", ["config.json", "model-00001-of-00002.safetensors"], "safetensors"),
            ("final", ["model.safetensors"], "safetensors"),
            ("final", ["config.json"], None),
            ("final", ["tokenizer.json", "weights.pt"], None),
            ("final/a.safetensors", [], "safetensors"),
            ("final/model-00001-of-00002.safetensors", [], None),
            ("final/a.bin", [], None),
        ],
    )
    def test_each_path_has_at_most_one_format(
        self, path: str, files: list[str], by: str | None, tmp_path: Path
    ) -> None:
        """By names alone, a path is of one format or of none, whichever is asked first."""
        target = tmp_path / path
        if target.suffix:
            target.parent.mkdir()
            target.touch()
        else:
            target.mkdir()
        for name in files:
            (target / name).touch()
        assert [form.name for form in (SAFETENSORS, TRANSFORMERS) if form.claim(LocalListing(target))] == (
            [by] if by else []
        )

    @pytest.mark.parametrize("name", ["checkpoint-5", "final", "a.safetensors"])
    def test_what_is_not_there_is_not_recognised(self, name: str, tmp_path: Path) -> None:
        """A path that vanished is no checkpoint."""
        assert not SAFETENSORS.claim(LocalListing(tmp_path / name))
        assert not TRANSFORMERS.claim(LocalListing(tmp_path / name))

    @pytest.mark.parametrize(
        ("name", "step"),
        [
            ("checkpoint-800", 800),
            ("step_800", 800),
            ("iter800", 800),
            ("global_step800", 800),
            ("800", 800),
            ("iter_0000800", 800),
            ("epoch=1-step=800", 800),
            ("llama-ckpt-800.safetensors", 800),
            ("800.safetensors", 800),
            ("final", None),
            ("llama-7b", None),
            ("llama-3", None),
            ("epoch-3", None),
            ("v2-step-", None),
            ("footstep800", None),
            ("step-" + "9" * 19, None),
        ],
    )
    def test_the_step_in_a_name(self, name: str, step: int | None) -> None:
        """A name that looks like a step says it; any other says nothing."""
        assert SAFETENSORS.step(LocalListing(Path("runs") / name)) == step


# ---------------------------------------------------------------- headers


def header_file(header: object, data: int = 0) -> bytes:
    """A safetensors file with this header (JSON, or bytes as they are) and `data` bytes of tensors."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + bytes(data)


def entry(dtype: object = "U8", shape: object = (4,), offsets: object = (0, 4)) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


HOSTILE = {
    "empty": (b"", "incomplete", "model.safetensors has 0 of at least 8 bytes"),
    "three bytes": (b"abc", "incomplete", "model.safetensors has 3 of at least 8 bytes"),
    "header cut": (header_file({"w": entry()}, 4)[:20], "incomplete", "has 20 of at least"),
    "data cut": (header_file({"w": entry()}, 3), "incomplete", r"has \d+ of \d+ bytes"),
    "out of the file": (header_file({"w": entry(shape=[2**50], offsets=[0, 2**50])}), "incomplete", "of 1,125,8"),
    "too long": (header_file({"w": entry()}, 5), "damaged", r"has \d+ bytes where its header says \d+"),
    "absurd header": ((100_000_001).to_bytes(8, "little") + b"{}", "damaged", "header has 100,000,001 bytes"),
    "largest header": (b"\xff" * 8, "damaged", "header has 18,446,744,073,709,551,615 bytes"),
    "zeros": (bytes(100), "damaged", "does not parse"),
    "not JSON": (header_file(b"{'w'}"), "damaged", "does not parse"),
    "not UTF-8": (header_file(b'{"\xff": 1}'), "damaged", "does not parse"),
    "deep": (header_file(b"[" * 200_000), "damaged", "does not parse"),
    "a list": (header_file([1]), "damaged", "a JSON list"),
    "flood": (header_file(b"{" + b'"w":{},' * 1_000_002 + b"}"), "damaged", "more than 300,000 tensors"),
    "tensor is a list": (header_file({"w": [1]}), "damaged", "`w` is not described by an object"),
    "unknown dtype": (header_file({"w": entry("F4")}, 4), "damaged", "`w` has the unknown dtype 'F4'"),
    "dtype is a list": (header_file({"w": entry(["U8"])}, 4), "damaged", "unknown dtype"),
    "no shape": (header_file({"w": entry(shape=None)}, 4), "damaged", "`w` has a shape"),
    "negative shape": (header_file({"w": entry(shape=[-4])}, 4), "damaged", "`w` has a shape"),
    "shape of booleans": (header_file({"w": entry(shape=[True] * 4)}, 4), "damaged", "`w` has a shape"),
    "shape of fractions": (header_file({"w": entry(shape=[4.0])}, 4), "damaged", "`w` has a shape"),
    "65 dimensions": (header_file({"w": entry(shape=[1] * 65, offsets=[0, 1])}, 1), "damaged", "`w` has a shape"),
    "huge dimension": (header_file({"w": entry(shape=[2**63, 0], offsets=[0, 0])}), "damaged", "`w` has a shape"),
    "offsets reversed": (header_file({"w": entry(offsets=[4, 0])}, 4), "damaged", "`w` has data_offsets"),
    "one offset": (header_file({"w": entry(offsets=[0])}, 4), "damaged", "`w` has data_offsets"),
    "negative offset": (header_file({"w": entry(offsets=[-4, 0])}, 4), "damaged", "`w` has data_offsets"),
    "offsets beside shape": (header_file({"w": entry(offsets=[0, 3])}, 3), "damaged", r"`w` has 3 bytes where shape"),
    "overlap": (header_file({"v": entry(), "w": entry(offsets=[3, 7])}, 7), "damaged", "`w` .*overlaps"),
    "the same place": (header_file({"v": entry(), "w": entry()}, 4), "damaged", "`w` .*overlaps"),
    "gap": (header_file({"v": entry(), "w": entry(offsets=[5, 9])}, 9), "damaged", "`w` .*leaves a gap"),
    "gap at the start": (header_file({"w": entry(offsets=[1, 5])}, 5), "damaged", "`w` .*leaves a gap"),
}


def refuses(form: Format, path: Path, state: str, reason: str) -> CheckpointError:
    """Inspect says `state` with the reason, and open raises the matching error with the same reason."""
    readiness = form.inspect(LocalListing(path))
    assert readiness.state == state, readiness.reason
    ref = CheckpointRef(path, None, form.name, "unchecked", 0.0)
    with pytest.raises(CheckpointError, match=reason) as caught:
        form.open(ref)
    assert caught.value.what == readiness.reason
    assert caught.value.remedy
    assert isinstance(caught.value, IncompleteCheckpoint) == (state == "incomplete")
    return caught.value


def folder_with(tmp_path: Path, files: Mapping[str, bytes], name: str = "final") -> Path:
    folder = tmp_path / name
    folder.mkdir()
    for file, content in {"config.json": b"{}", **files}.items():
        (folder / file).write_bytes(content)
    return folder


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_header_is_refused_by_name(name: str, tmp_path: Path) -> None:
    """Truncation is incomplete, every other fault of a header is damaged; the reason names the file and the values."""
    content, state, reason = HOSTILE[name]
    folder = folder_with(tmp_path, {"model.safetensors": content})
    refuses(SAFETENSORS, folder, state, "model.safetensors.*" + reason.removeprefix("model.safetensors"))


def test_a_header_with_metadata_and_padding_is_read(tmp_path: Path) -> None:
    """Metadata, padding, unsorted and empty tensors are as the format allows them."""
    header = {
        "__metadata__": {"format": "pt"},
        "w": entry("I16", [2], [4, 8]),
        "empty": entry("F32", [0, 3], [4, 4]),
        "v": entry(),
    }
    content = header_file(json.dumps(header).encode() + b"   ", 8)
    folder = folder_with(tmp_path, {"model.safetensors": content})
    assert SAFETENSORS.inspect(LocalListing(folder)).state == "complete"
    weights = SAFETENSORS.open(reference(SAFETENSORS, folder))
    assert weights.shapes() == {"w": (2,), "empty": (0, 3), "v": (4,)}


DTYPES = (
    "float64 float32 float16 bfloat16 int64 int32 int16 int8 uint64 uint32 uint16 uint8 bool float8_e4m3fn float8_e5m2"
)


@pytest.mark.parametrize("dtype", DTYPES.split())
def test_every_dtype_is_read_bit_for_bit(dtype: str, tmp_path: Path) -> None:
    """Tensors, scalars and empty tensors of each dtype are read as safetensors wrote them."""
    kind = getattr(torch, dtype)
    bits = torch.arange(kind.itemsize * 6, dtype=torch.uint8) % 2 if dtype == "bool" else None
    raw = torch.randint(0, 256, (kind.itemsize * 6,), dtype=torch.uint8) if bits is None else bits
    written = {"matrix": raw.view(kind).reshape(2, 3), "scalar": raw.view(kind)[0].clone(), "none": raw[:0].view(kind)}
    (tmp_path / "config.json").write_text("{}")
    path = tmp_path / "x.safetensors"
    save_file(written, path)
    weights = SAFETENSORS.open(reference(SAFETENSORS, path))
    for name, tensor in written.items():
        read = weights.read(name)
        assert (read.dtype, read.shape) == (tensor.dtype, tensor.shape)
        assert torch.equal(read.reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8))


# ---------------------------------------------------------------- index, config, state


def index_file(weight_map: object) -> bytes:
    return json.dumps({"metadata": {}, "weight_map": weight_map}).encode()


SHARDS = {
    "model-00001-of-00002.safetensors": header_file({"v": entry()}, 4),
    "model-00002-of-00002.safetensors": header_file({"w": entry()}, 4),
}
ONE, TWO = SHARDS
INDEX = "model.safetensors.index.json"


@pytest.mark.parametrize(
    ("index", "shards", "state", "reason"),
    [
        (b'{"weight_map": {', SHARDS, "incomplete", f"{INDEX} does not parse"),
        (b"[]", SHARDS, "damaged", f"{INDEX} holds a JSON list"),
        (b"{}", SHARDS, "damaged", "no weight_map"),
        (index_file([ONE]), SHARDS, "damaged", "no weight_map"),
        (index_file({"v": 1}), SHARDS, "damaged", "no weight_map"),
        (index_file({"v": "../other/model.safetensors"}), SHARDS, "damaged", r"the shard '\.\./other"),
        (index_file({"v": "sub/model.safetensors"}), SHARDS, "damaged", "the shard 'sub/"),
        (index_file({"v": "/tmp/model.safetensors"}), SHARDS, "damaged", "the shard '/tmp"),
        (index_file({"v": "a\\b.safetensors"}), SHARDS, "damaged", "the shard"),
        (index_file({"v": "a\0b.safetensors"}), SHARDS, "damaged", "the shard"),
        (index_file({"v": "pytorch_model.bin"}), SHARDS, "damaged", "the shard 'pytorch_model.bin'"),
        (index_file({"v": ONE, "w": TWO}), {ONE: SHARDS[ONE]}, "incomplete", f"{TWO} is not there"),
        (index_file({"v": ONE, "w": TWO}), SHARDS | {TWO: SHARDS[TWO][:-1]}, "incomplete", rf"{TWO} has \d+ of \d+"),
        (
            index_file({"v": ONE, "w": TWO}),
            SHARDS | {TWO: SHARDS[ONE]},
            "damaged",
            f"`v` is both in {ONE} and in {TWO}",
        ),
        (index_file({"v": TWO, "w": ONE}), SHARDS, "damaged", f"{TWO} holds `v`; it does not"),
        (index_file({"v": ONE, "x": TWO}), SHARDS, "damaged", f"{TWO} holds `x`; it does not"),
    ],
)
def test_a_faulty_index(index: bytes, shards: Mapping[str, bytes], state: str, reason: str, tmp_path: Path) -> None:
    """An index that may still be written, or whose shards may, is incomplete; one that lies or escapes is damaged."""
    refuses(SAFETENSORS, folder_with(tmp_path, {INDEX: index, **shards}), state, reason)


WEIGHTS = {"model.safetensors": header_file({"v": entry()}, 4)}


@pytest.mark.parametrize(
    ("config", "state", "reason"),
    [
        (b'{"model_type":', "incomplete", "config.json does not parse"),
        (b"", "incomplete", "config.json does not parse"),
        (b'["llama"]', "damaged", "config.json holds a JSON list, not an object"),
    ],
)
def test_a_faulty_config(config: bytes, state: str, reason: str, tmp_path: Path) -> None:
    """A config.json that is not a JSON object is refused."""
    refuses(SAFETENSORS, folder_with(tmp_path, {"config.json": config, **WEIGHTS}), state, reason)


@pytest.mark.parametrize("single", [True, False])
def test_without_config_the_remedy_is_said(single: bool, tmp_path: Path) -> None:
    """Weights without config.json are refused with where to put it."""
    folder = folder_with(tmp_path, WEIGHTS)
    (folder / "config.json").unlink()
    path = folder / "model.safetensors" if single else folder
    error = refuses(SAFETENSORS, path, "incomplete", "config.json is not there")
    assert f"put the model's config.json into {folder}" in error.remedy


def test_an_absurd_json_file_is_not_read(tmp_path: Path) -> None:
    """A JSON file of more than 100 MB is refused by its size."""
    folder = folder_with(tmp_path, WEIGHTS)
    os.truncate(folder / "config.json", 100_000_001)
    refuses(SAFETENSORS, folder, "damaged", "config.json has 100,000,001 bytes")


STATE = {"trainer_state.json": b'{"global_step": 5}'}


@pytest.mark.parametrize(
    ("files", "state", "reason"),
    [
        (
            WEIGHTS | {"training_args.bin": b""},
            "incomplete",
            "trainer_state.json is not there, which Trainer writes last",
        ),
        (WEIGHTS | {"optimizer.pt": b""}, "incomplete", r"writes last \(optimizer.pt is there\)"),
        (WEIGHTS | {"rng_state_3.pth": b""}, "incomplete", "trainer_state.json is not there"),
        (WEIGHTS | {"scheduler.pt": b""}, "incomplete", "trainer_state.json is not there"),
        (WEIGHTS | {"trainer_state.json": b'{"global_step": 5'}, "incomplete", "trainer_state.json does not parse"),
        (WEIGHTS | {"trainer_state.json": b'{"global_step": 6}'}, "damaged", "says global_step 6 in checkpoint-5"),
        (WEIGHTS | {"trainer_state.json": b'{"global_step": "5"}'}, "damaged", "global_step '5', not a count"),
        (WEIGHTS | {"trainer_state.json": b'{"global_step": -5}'}, "damaged", "global_step -5, not a count"),
        (WEIGHTS | {"trainer_state.json": b"{}"}, "damaged", "global_step None, not a count"),
        (
            WEIGHTS | STATE | {"checkpoint-is-incomplete.txt": b""},
            "incomplete",
            "checkpoint-is-incomplete.txt is there",
        ),
        (STATE, "incomplete", "neither model.safetensors nor model.safetensors.index.json is there"),
    ],
)
def test_a_faulty_trainer_checkpoint(files: Mapping[str, bytes], state: str, reason: str, tmp_path: Path) -> None:
    """What Trainer may still write is incomplete; another run's state is damaged."""
    refuses(TRANSFORMERS, folder_with(tmp_path, files, "checkpoint-5"), state, reason)


def test_a_sound_trainer_checkpoint_beside_those(tmp_path: Path) -> None:
    """The files that the faulty cases are made from are complete together."""
    assert (
        TRANSFORMERS.inspect(LocalListing(folder_with(tmp_path, WEIGHTS | STATE, "checkpoint-5"))).state == "complete"
    )


ACCELERATES = {"random_states_0.pkl": b"x", "optimizer.bin": b"x", "scheduler.bin": b"x", "sampler.bin": b"x"}


@pytest.mark.parametrize("beside", [{}, {"tokenizer.json": b"{}"}, ACCELERATES, {"user_content.pt": b"x"}])
def test_a_checkpoint_of_ones_own_loop(beside: Mapping[str, bytes], tmp_path: Path) -> None:
    """A `checkpoint-5` that Trainer did not write is whole without trainer_state.json, its step the N of its name; that
    file, and an optimizer's, may come later and change nothing that is known of it.
    """
    folder = folder_with(tmp_path, {**WEIGHTS, **beside}, "checkpoint-5")
    before = reference(TRANSFORMERS, folder)
    assert before.step == 5
    for name, content in {**STATE, "optimizer.pt": b"x", "training_args.bin": b"x"}.items():
        (folder / name).write_bytes(content)
        after = reference(TRANSFORMERS, folder)
        assert (after.step, after.files) == (5, before.files)
    assert TRANSFORMERS.open(before).read("v").tolist() == [0, 0, 0, 0]


def test_accelerates_configuration_is_above(tmp_path: Path) -> None:
    """A `checkpoint-5` of Accelerate's save_state is read with the config.json above; the mark of Accelerate is held
    with it, so that what is held is read as it was.
    """
    folder = folder_with(tmp_path, {**WEIGHTS, **ACCELERATES}, "checkpoint-5")
    (folder / "config.json").rename(tmp_path / "config.json")
    (where := tmp_path / "held" / "checkpoint-5").mkdir(parents=True)
    ref = reference(TRANSFORMERS, folder)
    for stamp in ref.files:
        shutil.copy2(folder / stamp.name, where / stamp.name)
    refuses(TRANSFORMERS, where, "incomplete", "config.json is not there")
    shutil.copy2(tmp_path / "config.json", where.parent)
    assert [stamp.name for stamp in ref.files] == ["model.safetensors", "random_states_0.pkl"]
    assert [stamp.name for stamp in reference(TRANSFORMERS, where).files] == [stamp.name for stamp in ref.files]


NOT_YET: dict[str, tuple[dict[str, bytes], str, str]] = {
    "an optimizer": (
        {"optimizer.bin": b"x", "scheduler.bin": b"x"},
        r"the state of a training \(opt.*and no weights",
        "save",
    ),
    "random states": (
        {"random_states_0.pkl": b"x"},
        r"the state of a training \(random_states_0",
        "model.save_pretrained",
    ),
    "Trainer's": (
        {"optimizer.pt": b"x", "training_args.bin": b"x"},
        "the state of a training",
        "model.save_pretrained",
    ),
    "a tokenizer": (
        {"tokenizer.json": b"{}", "merges.txt": b""},
        "there is a tokenizer .* and no weights",
        "save_pretrained",
    ),
    "shards": ({ONE: SHARDS[ONE]}, "neither .* which says what is in the shards", "saved again with save_pretrained"),
    "a configuration": ({"config.json": b"{}"}, "neither model.safetensors nor", "wait"),
}


@pytest.mark.parametrize("folder", ["checkpoint-5", "step_5"])
@pytest.mark.parametrize("name", NOT_YET)
def test_what_is_missing_is_named(name: str, folder: str, tmp_path: Path) -> None:
    """A folder named by its step in which there are no weights, or not all, says what it holds and what to do."""
    files, reason, remedy = NOT_YET[name]
    path = folder_with(tmp_path, files, folder)
    if "config.json" not in files:
        (path / "config.json").unlink()
    winner = registry.claimed(LocalListing(path), registry.formats())
    if (folder, name) == ("step_5", "a configuration"):  # that is no checkpoint yet, whatever its name
        assert winner is None
        return
    assert winner is not None
    assert winner[1].strength == ("generic" if name == "shards" else "begun")
    readiness = winner[0].inspect(LocalListing(path))
    assert readiness.state == "incomplete"
    assert re.search(reason, readiness.reason)
    assert remedy in readiness.remedy


@pytest.mark.parametrize(
    ("beside", "newer", "said"),
    [
        ({}, False, ""),
        ({INDEX: b"{}", ONE: SHARDS[ONE]}, False, f"{INDEX} is there too and is not read: model.safetensors is"),
        ({ONE: SHARDS[ONE], INDEX: b"{}"}, True, "newer, and is not read.*remove model.safetensors if the shards are"),
        (
            {"pytorch_model.bin": b"x"},
            True,
            "pytorch_model.bin is there too and is not read: the weights in safetensors",
        ),
    ],
)
def test_other_weights_beside_are_said(beside: Mapping[str, bytes], newer: bool, said: str, tmp_path: Path) -> None:
    """Weights of an earlier or later save beside those that are read, as transformers reads them, are said."""
    path = folder_with(tmp_path, {**WEIGHTS, **beside})
    for name in beside:
        time = (path / "model.safetensors").stat().st_mtime_ns + (10**9 if newer else -(10**9))
        os.utime(path / name, ns=(time, time))
    readiness = SAFETENSORS.inspect(LocalListing(path))
    assert readiness.state == "complete"
    assert re.search(said, readiness.beside) if said else readiness.beside == ""
    assert locate(path).beside == readiness.beside


def test_other_weights_beside_are_in_the_report(tmp_path: Path) -> None:
    """A scan's report says among what was skipped which weights were there and not read."""
    save(tmp_path / "final")
    (tmp_path / "final" / "pytorch_model.bin").write_bytes(b"an older save")
    np.save(tmp_path / "probe.npy", np.random.default_rng(0).integers(0, 19, (64, 32)))
    report = peel_agent.scan(tmp_path / "final", probe=tmp_path / "probe.npy", quantities=())
    (said,) = [skipped.why for skipped in report.skipped if skipped.what == "other weights in the folder"]
    assert said.startswith("pytorch_model.bin is there too and is not read")


def test_the_state_is_read_again_when_it_changed(tmp_path: Path) -> None:
    """The step follows a trainer_state.json that is rewritten: what was read before is not kept past its stamp."""
    folder = folder_with(tmp_path, WEIGHTS | STATE, "checkpoint-5")
    assert TRANSFORMERS.step(LocalListing(folder)) == 5
    (folder / "trainer_state.json").write_text('{"global_step": 66}')
    assert TRANSFORMERS.step(LocalListing(folder)) == 66


# ---------------------------------------------------------------- links and special files


class TestLinks:
    @pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
    def test_a_link_out_of_the_checkpoint(self, name: str, tmp_path: Path) -> None:
        """A file that is a link out of the checkpoint is refused by name, with a remedy."""
        folder = folder_with(tmp_path, WEIGHTS)
        (folder / name).rename(tmp_path / "outside")
        (folder / name).symlink_to(tmp_path / "outside")
        error = refuses(SAFETENSORS, folder, "damaged", f"{name} is a link to .*outside, outside")
        assert "cp -rL" in error.remedy

    def test_a_link_inside_the_checkpoint(self, tmp_path: Path) -> None:
        """A file that is a link to another file of the same folder is read."""
        folder = folder_with(tmp_path, WEIGHTS)
        (folder / "model.safetensors").rename(folder / "blob")
        (folder / "model.safetensors").symlink_to("blob")
        assert SAFETENSORS.open(reference(SAFETENSORS, folder)).read("v").tolist() == [0, 0, 0, 0]

    def test_a_link_to_itself(self, tmp_path: Path) -> None:
        """A link that leads nowhere is incomplete."""
        folder = folder_with(tmp_path, {})
        (folder / "model.safetensors").symlink_to("model.safetensors")
        refuses(SAFETENSORS, folder, "incomplete", "model.safetensors cannot be read: Too many levels")

    @pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
    def test_something_else_than_a_file(self, make: Callable[[Path], None], tmp_path: Path) -> None:
        """A named pipe or a folder in a file's place is refused and does not hold the reader."""
        folder = folder_with(tmp_path, {})
        make(folder / "model.safetensors")
        refuses(SAFETENSORS, folder, "damaged", "model.safetensors is not a regular file")


# ---------------------------------------------------------------- reading while the trainer goes on


def reference(form: Format, path: Path) -> CheckpointRef:
    readiness = form.inspect(LocalListing(path))
    assert readiness.state == "complete", readiness.reason
    return CheckpointRef(path, form.step(LocalListing(path)), form.name, "unchecked", 0.0, readiness.files)


class TestTorn:
    NAME = "model.norm.weight"

    @pytest.fixture
    def checkpoint(self, tmp_path: Path) -> Path:
        save(tmp_path / "checkpoint-5", step=5)
        return tmp_path / "checkpoint-5"

    def later(self, file: Path) -> None:
        """Puts the modification time forward, as a later write does, whatever the clock's grain is."""
        stamp = file.stat().st_mtime_ns + 10**9
        os.utime(file, ns=(stamp, stamp))

    def test_rewritten_in_place(self, checkpoint: Path) -> None:
        """A file rewritten under an open checkpoint is torn at the next read, and that can be tried again."""
        weights = TRANSFORMERS.open(reference(TRANSFORMERS, checkpoint))
        weights.read(self.NAME)
        file = checkpoint / "model.safetensors"
        with file.open("r+b") as stream:
            stream.seek(-4, os.SEEK_END)
            stream.write(b"\xff\xff\xff\xff")
        self.later(file)
        with pytest.raises(TornCheckpoint, match=r"model\.safetensors changed while it was read") as caught:
            weights.read(self.NAME)
        assert caught.value.retryable

    def test_truncated(self, checkpoint: Path) -> None:
        """A file truncated under an open checkpoint is torn; the process lives on."""
        weights = TRANSFORMERS.open(reference(TRANSFORMERS, checkpoint))
        os.truncate(checkpoint / "model.safetensors", 100)
        with pytest.raises(TornCheckpoint, match=r"model\.safetensors ended before byte"):
            weights.read(self.NAME)

    @pytest.mark.parametrize("how", ["rotated", "replaced"])
    def test_rotated_away_or_replaced(self, checkpoint: Path, tmp_path: Path, how: str) -> None:
        """A checkpoint removed, or replaced by renaming, while it is open is read to its end as it was."""
        weights = TRANSFORMERS.open(reference(TRANSFORMERS, checkpoint))
        if how == "replaced":
            (tmp_path / "new").write_bytes(b"new")
            (tmp_path / "new").replace(checkpoint / "model.safetensors")
        else:
            shutil.rmtree(checkpoint)
        for name, tensor in tiny_llama().state_dict().items():
            assert torch.equal(weights.read(name), tensor)

    @pytest.mark.parametrize("file", ["model.safetensors", "config.json"])
    def test_changed_before_it_was_opened(self, checkpoint: Path, file: str) -> None:
        """A file that changed between the look and the opening is torn, by name."""
        ref = reference(TRANSFORMERS, checkpoint)
        self.later(checkpoint / file)
        with pytest.raises(TornCheckpoint, match=f"checkpoint-5 changed.*: {file} is another file than before"):
            TRANSFORMERS.open(ref)

    def test_gone_before_it_was_opened(self, checkpoint: Path) -> None:
        """A checkpoint rotated away between the look and the opening is torn, not broken."""
        ref = reference(TRANSFORMERS, checkpoint)
        shutil.rmtree(checkpoint)
        with pytest.raises(TornCheckpoint, match="checkpoint-5 changed after it was found whole"):
            TRANSFORMERS.open(ref)

    def test_nothing_is_mapped_and_everything_is_closed(self, checkpoint: Path) -> None:
        """Reading maps no file into memory, and dropping the weights closes their files."""
        weights = TRANSFORMERS.open(reference(TRANSFORMERS, checkpoint))
        tensor = weights.read(self.NAME)
        assert held(checkpoint) == [checkpoint / "model.safetensors"]
        assert str(checkpoint) not in Path("/proc/self/maps").read_text()
        del weights
        gc.collect()
        assert held(checkpoint) == []
        assert torch.equal(tensor, tiny_llama().state_dict()[self.NAME])

    def test_what_is_refused_is_closed(self, checkpoint: Path) -> None:
        """Opening a checkpoint that changed leaves no file open."""
        ref = reference(TRANSFORMERS, checkpoint)
        self.later(checkpoint / "model.safetensors")
        with pytest.raises(TornCheckpoint):
            TRANSFORMERS.open(ref)
        gc.collect()
        assert held(checkpoint) == []


def held(folder: Path) -> list[Path]:
    """Files of this folder that the process holds open."""
    links = [Path(f"/proc/self/fd/{number}") for number in range(256)]
    return [link.readlink() for link in links if link.is_symlink() and link.readlink().is_relative_to(folder)]
