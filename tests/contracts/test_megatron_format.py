"""The format `megatron`: the conformance kit on what Megatron-core itself writes, the mapping, hostile files."""

from __future__ import annotations

import argparse
import functools
import io
import json
import os
import pickle
import random
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from peel_agent import registry
from peel_agent.errors import CheckpointError, IncompleteCheckpoint, TornCheckpoint
from peel_agent.load import open_snapshot, read_tokens
from peel_agent.records import CheckpointRef, LocalListing
from peel_agent.testing.formats import CHECKS, FormatCase
from peel_plugins.formats.dcp import weights as dcp_weights
from peel_plugins.formats.dcp.format import FORMAT as DCP
from peel_plugins.formats.dcp.tiling import intersection
from peel_plugins.formats.dcp.weights import DcpWeights
from peel_plugins.formats.megatron.format import FORMAT, _read
from peel_plugins.formats.megatron.metadata import UNTRACED, read_contents
from peel_plugins.formats.megatron.names import MAX_LAYERS, model_parts, model_sizes
from tests import servers
from tests.contracts import megatron_producer
from tests.contracts.megatron_producer import CASES, ITERATION, READABLE, REFERENCE, STEP

ENTRY = "peel_plugins.formats.megatron.format:FORMAT"
PRODUCE = "import sys, pathlib; from tests.contracts.megatron_producer import write; "
PRODUCE += "write(int(sys.argv[1]), int(sys.argv[2]), pathlib.Path(sys.argv[3]))"


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which two processes of Megatron-core wrote every case, once for all tests."""
    root = tmp_path_factory.mktemp("megatron")
    for name, case in CASES.items():
        megatron_producer.write_reference(case, root / name / REFERENCE)
    port = str(servers.free_port())
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", PRODUCE, rank, port, str(root)],
            cwd=Path(__file__).parents[2],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        for rank in ("0", "1")
    ]
    said = [rank.communicate(timeout=180)[0].decode() for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], "\n".join(said)
    return root


def put(name: str, written: Path, path: Path, *, config: str = ".") -> Mapping[str, Tensor]:
    """Copies a case to `path`, its config.json into `config`; returns what transformers has of the same weights."""
    path.parent.mkdir(parents=True, exist_ok=True)
    shutil.copytree(written / name / ITERATION, path)
    shutil.copy(written / name / REFERENCE / "config.json", path / config)
    return load_file(written / name / REFERENCE / "model.safetensors")


@pytest.fixture
def checkpoint(written: Path, tmp_path: Path) -> Path:
    """A Llama on two tensor-parallel ranks, with its optimizer, config.json beside it."""
    put("llama", written, tmp_path / "run" / ITERATION)
    return tmp_path / "run" / ITERATION


def reference(path: Path) -> CheckpointRef:
    readiness = FORMAT.inspect(LocalListing(path))
    assert readiness.state == "complete", readiness.reason
    return CheckpointRef(path, STEP, "megatron", "unchecked", 0.0, readiness.files)


# ---------------------------------------------------------------- what Megatron-core writes


@pytest.mark.parametrize("name", ["llama", "llama-bfloat16", "qwen3", "gpt2"])
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_conformance(check: Callable[[FormatCase, Path], None], name: str, written: Path, tmp_path: Path) -> None:
    """Every check of the kit holds for what Megatron-core wrote, and the bits are those of the transformers model."""
    check(FormatCase(FORMAT, ENTRY, functools.partial(put, name, written), ITERATION, STEP, "*.distcp"), tmp_path)


@pytest.mark.parametrize("name", READABLE)
def test_the_weights_are_those_of_the_transformers_model(name: str, written: Path, tmp_path: Path) -> None:
    """Names, dtypes and bits: two tensor or pipeline ranks, stacked or numbered layers, split gates, tied or not."""
    expected = put(name, written, tmp_path / ITERATION)
    weights = FORMAT.open(reference(tmp_path / ITERATION))
    assert dict(weights.shapes()) == {weight: tuple(tensor.shape) for weight, tensor in expected.items()}
    for weight, tensor in expected.items():
        read = weights.read(weight)
        assert read.dtype == tensor.dtype
        assert torch.equal(read, tensor), weight


@pytest.mark.parametrize("name", [name for name in READABLE if CASES[name].dtype == "float32"])
def test_the_logits_are_those_of_megatron(name: str, written: Path, tmp_path: Path) -> None:
    """Megatron's model and transformers' with the weights that are read give the same logits: both mean the same."""
    put(name, written, tmp_path / ITERATION)
    weights = FORMAT.open(reference(tmp_path / ITERATION))
    model = AutoModelForCausalLM.from_config(
        AutoModelForCausalLM.from_pretrained(written / name / REFERENCE).config, attn_implementation="eager"
    )
    model.load_state_dict({weight: weights.read(weight) for weight in weights.shapes()}, strict=not CASES[name].tied)
    model.tie_weights()
    with torch.no_grad():
        logits = model.eval()(megatron_producer.token_ids()).logits
    theirs = load_file(written / name / "logits.safetensors")["logits"][..., :19]
    assert theirs.abs().max() > 1
    torch.testing.assert_close(logits, theirs, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", READABLE)
def test_the_loader_builds_the_model(name: str, written: Path, tmp_path: Path) -> None:
    """The load room finds every weight of the model, and nothing else."""
    put(name, written, tmp_path / ITERATION)
    snapshot = open_snapshot(reference(tmp_path / ITERATION), FORMAT, registry.family)
    assert snapshot.vocabulary == 19
    assert snapshot.tied_head == CASES[name].tied


def test_two_ranks_really_cut(written: Path) -> None:
    """The checkpoints of these tests hold what they are to prove: layers in stacks, cut in two, and an optimizer."""
    llama = read_contents((written / "llama" / ITERATION / ".metadata").read_bytes()).tensors
    qkv = llama["decoder.layers.self_attention.linear_qkv.weight"]
    assert qkv.shape == (4, 32, 16)
    assert {chunk.sizes for chunk in qkv.chunks} == {(1, 16, 16)}
    assert len(llama["decoder.layers.mlp.linear_fc1.weight"].chunks) == 4 * 2 * 2
    assert llama["output_layer.weight"].shape == (24, 16)
    assert not any(name.startswith("optimizer") for name in llama)
    raw = pickle.loads((written / "llama" / ITERATION / ".metadata").read_bytes())
    assert any(name.startswith("optimizer.state.exp_avg") for name in raw.state_dict_metadata)
    qwen3 = read_contents((written / "qwen3" / ITERATION / ".metadata").read_bytes()).tensors
    assert "decoder.layers.3.self_attention.q_layernorm.weight" in qwen3
    mistral = read_contents((written / "mistral" / ITERATION / ".metadata").read_bytes()).tensors
    assert "decoder.layers.0.mlp.linear_fc1.weight_w" in mistral


def test_experts_are_declined_by_name(written: Path, tmp_path: Path) -> None:
    """A real mixture of experts is damaged with its tensor's name and the way to a format that is read."""
    put("experts", written, tmp_path / ITERATION)
    error = refuses(tmp_path / ITERATION, "damaged", r"experts.* belongs to a mixture of experts")
    assert "Megatron Bridge" in error.remedy


def test_only_what_is_asked_for_is_read(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One layer's keys out of a stack of layers cost their own bytes, and no other layer's, query's or rank's."""
    weights = FORMAT.open(reference(checkpoint))
    lengths: list[int] = []
    real = dcp_weights.read_into

    def counting(descriptor: int, buffer: memoryview, offset: int, name: str) -> None:
        lengths.append(len(buffer))
        real(descriptor, buffer, offset, name)

    monkeypatch.setattr(dcp_weights, "read_into", counting)
    key = weights.read("model.layers.2.self_attn.k_proj.weight")
    assert sum(lengths) == key.numel() * key.element_size()
    lengths.clear()
    gate = weights.read("model.layers.3.mlp.gate_proj.weight")
    assert sum(lengths) == gate.numel() * gate.element_size()
    lengths.clear()
    embedding = weights.read("model.embed_tokens.weight")
    assert sum(lengths) == embedding.numel() * embedding.element_size()


def test_parts_of_tensors(checkpoint: Path) -> None:
    """Any box of a tensor is read as it is in the whole; one that is not inside is refused."""
    raw = DcpWeights(_read(checkpoint))
    chance = random.Random(0)
    for name, shape in raw.shapes().items():
        whole = raw.read(name)
        for _ in range(6):
            ends = [sorted(chance.sample(range(length + 1), 2)) for length in shape]
            box = tuple(start for start, _ in ends), tuple(stop - start for start, stop in ends)
            part = raw.read_part(name, box)
            assert part.is_contiguous()
            assert torch.equal(part, whole[tuple(slice(*pair) for pair in ends)]), (name, box)
    with pytest.raises(CheckpointError, match=r"`output_layer\.weight` of shape \(24, 16\) has no part"):
        raw.read_part("output_layer.weight", ((20, 0), (5, 16)))


def test_parts_of_turned_tensors(tmp_path: Path) -> None:
    """A box of a tensor whose numbers lie in another order than its dimensions is read as it is in the whole."""
    whole = torch.arange(24.0).reshape(2, 3, 4).permute(2, 0, 1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that torch.distributed is not initialised
        dcp.save({"turned": whole}, checkpoint_id=tmp_path)
    (tmp_path / "config.json").write_text("{}")
    weights = DCP.open(CheckpointRef(tmp_path, None, "dcp", "unchecked", 0.0))
    assert isinstance(weights, DcpWeights)
    assert torch.equal(weights.read_part("turned", ((1, 0, 1), (2, 2, 2))), whole[1:3, :, 1:3])


def test_intersection() -> None:
    """What two boxes have in common, or None when they only touch."""
    assert intersection(((0, 0), (4, 4)), ((2, 3), (4, 4))) == ((2, 3), (2, 1))
    assert intersection(((0, 0), (4, 4)), ((4, 0), (4, 4))) is None
    assert intersection(((), ()), ((), ())) == ((), ())


# ---------------------------------------------------------------- recognition, step, where it lies


class TestRecognition:
    @pytest.mark.parametrize(
        ("folder", "files", "recognised"),
        [
            (ITERATION, {"common.pt": ""}, True),
            ("any", {"common.pt": "", "__0_0.distcp": ""}, True),
            ("any", {"metadata.json": '{"sharded_backend": "torch_dist"}'}, True),
            ("any", {"metadata.json": '{"sharded_backend": "zarr"}'}, True),
            ("any", {"common.pt": ""}, False),
            ("any", {"metadata.json": '{"step": 3}'}, False),
            ("any", {"metadata.json": "{"}, False),
            ("any", {"metadata.json": "[]"}, False),
            ("any", {"metadata.json": '{"sharded_backend": "torch_dist"}' + " " * 2**16}, False),
            (ITERATION, {}, False),
            ("any", {".metadata": "", "__0_0.distcp": ""}, False),
        ],
    )
    def test_by_names(self, folder: str, files: Mapping[str, str], recognised: bool, tmp_path: Path) -> None:
        """common.pt in a folder that Megatron names or shards, or metadata.json with a backend; `dcp` leaves it."""
        (tmp_path / folder).mkdir()
        for file, text in files.items():
            (tmp_path / folder / file).write_text(text)
        assert (FORMAT.claim(LocalListing(tmp_path / folder)) is not None) == recognised
        assert not (recognised and DCP.claim(LocalListing(tmp_path / folder)))

    def test_no_other_format_has_it(self, checkpoint: Path) -> None:
        """Of all installed formats only this one recognises Megatron's folder, whole or begun, and not the run's."""
        for gone in ("config.json", "metadata.json", ".metadata"):
            assert [form.name for form in registry.formats() if form.claim(LocalListing(checkpoint))] == ["megatron"]
            (checkpoint / gone).unlink()
        assert not any(form.claim(LocalListing(checkpoint.parent)) for form in registry.formats())

    @pytest.mark.parametrize(
        ("name", "step"),
        [("iter_0000007", 7), ("iter_1234567", 1234567), ("iter_12345678", 12345678), ("release", None), ("w", None)],
    )
    def test_the_step_in_the_name(self, name: str, step: int | None) -> None:
        """The step is N of iter_N."""
        assert FORMAT.step(LocalListing(Path("runs") / name)) == step


def test_one_config_for_the_run(written: Path, tmp_path: Path) -> None:
    """config.json in the folder above serves, and is no file of the checkpoint."""
    expected = put("qwen2", written, tmp_path / "run" / ITERATION, config="..")
    ref = reference(tmp_path / "run" / ITERATION)
    assert "config.json" not in {stamp.name for stamp in ref.files}
    name = "model.layers.3.self_attn.v_proj.bias"
    assert torch.equal(FORMAT.open(ref).read(name), expected[name])


def test_the_weights_folder_of_nemo_2(written: Path, tmp_path: Path) -> None:
    """`weights/` of a NeMo 2 checkpoint, whose names begin with `module.`, is read where it is pointed at."""
    expected = put("gpt2", written, tmp_path / "run" / "weights")
    rewrite_metadata(tmp_path / "run" / "weights", lambda name: f"module.{name}")
    weights = FORMAT.open(reference(tmp_path / "run" / "weights"))
    for name, tensor in expected.items():
        assert torch.equal(weights.read(name), tensor), name


def rewrite_metadata(path: Path, rename: Callable[[str], str], cls: type | None = None) -> None:
    """Writes `.metadata` again with other names, as an instance of another class."""
    metadata = pickle.loads((path / ".metadata").read_bytes())
    metadata.state_dict_metadata = {rename(name): value for name, value in metadata.state_dict_metadata.items()}
    metadata.storage_data = {
        type(index)(rename(index.fqn), index.offset, index.index): value
        for index, value in metadata.storage_data.items()
    }
    if cls is not None:
        older = cls()
        older.__dict__.update(metadata.__dict__, mcore_data={})
        metadata = older
    (path / ".metadata").write_bytes(pickle.dumps(metadata))


def test_the_metadata_class_of_older_releases(checkpoint: Path) -> None:
    """`.metadata` that is Megatron's own class, as releases up to 0.15 write it, is read."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Megatron's, of Apex
        from megatron.core.dist_checkpointing.strategies.torch import MCoreMetadata

    before = FORMAT.open(reference(checkpoint)).shapes()
    rewrite_metadata(checkpoint, lambda name: name, MCoreMetadata)
    assert b"MCoreMetadata" in (checkpoint / ".metadata").read_bytes()
    assert FORMAT.open(reference(checkpoint)).shapes() == before


def test_the_optimizer_of_several_is_passed_over(checkpoint: Path) -> None:
    """Moments of a chained optimizer, and Transformer Engine's extra state, are no weights."""
    rewrite_metadata(checkpoint, lambda name: name.replace("optimizer.", "chained_0.optimizer.", 1))
    assert set(FORMAT.open(reference(checkpoint)).shapes()) > {"model.norm.weight", "lm_head.weight"}


# ---------------------------------------------------------------- incomplete, damaged, hostile


def refuses(path: Path, state: str, reason: str) -> CheckpointError:
    """Inspect says `state` with the reason, and open raises the matching error with the same reason."""
    readiness = FORMAT.inspect(LocalListing(path))
    assert readiness.state == state, readiness.reason
    with pytest.raises(CheckpointError, match=reason) as caught:
        FORMAT.open(CheckpointRef(path, STEP, "megatron", "unchecked", 0.0))
    assert readiness.reason.startswith(caught.value.what)
    assert caught.value.remedy
    assert isinstance(caught.value, IncompleteCheckpoint) == (state == "incomplete")
    return caught.value


def saved(value: object) -> bytes:
    stream = io.BytesIO()
    torch.save(value, stream)
    return stream.getvalue()


def common(**switches: bool) -> bytes:
    """common.pt of Megatron-LM, with its arguments."""
    return saved({"args": argparse.Namespace(num_layers=4, bf16=True, **switches), "iteration": STEP})


class Payload:
    """What makes a folder when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, (str(self.path),)


def edit(path: Path, **changes: object) -> None:
    """Changes keys of config.json."""
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | changes))


def cut(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])


Fault = tuple[Callable[[Path], object], str, str]
FAULTS: Mapping[str, Fault] = {
    "no metadata.json": (
        lambda path: (path / "metadata.json").unlink(),
        "incomplete",
        r"^metadata\.json is not there",
    ),
    "half a metadata.json": (
        lambda path: cut(path / "metadata.json", 20),
        "incomplete",
        r"^metadata\.json does not parse",
    ),
    "metadata.json is a list": (
        lambda path: (path / "metadata.json").write_text("[]"),
        "damaged",
        "holds a JSON list, not an object",
    ),
    "zarr": (
        lambda path: (path / "metadata.json").write_text('{"sharded_backend": "zarr", "sharded_backend_version": 1}'),
        "damaged",
        r"sharded_backend 'zarr' of version 1; only 'torch_dist'",
    ),
    "fsdp_dtensor": (
        lambda path: (path / "metadata.json").write_text('{"sharded_backend": "fsdp_dtensor"}'),
        "damaged",
        "sharded_backend 'fsdp_dtensor'",
    ),
    "a later version": (
        lambda path: (path / "metadata.json").write_text(
            '{"sharded_backend": "torch_dist", "sharded_backend_version": 2}'
        ),
        "damaged",
        r"sharded_backend 'torch_dist' of version 2",
    ),
    "a backend that is no text": (
        lambda path: (path / "metadata.json").write_text('{"sharded_backend": ["torch_dist"]}'),
        "damaged",
        "sharded_backend a list",
    ),
    "a very long metadata.json": (
        lambda path: (path / "metadata.json").write_text('{"sharded_backend": "torch_dist"}' + " " * 2**16),
        "damaged",
        r"^metadata\.json has 65,569 bytes, more than the 65,536 that are read",
    ),
    "no .metadata": (lambda path: (path / ".metadata").unlink(), "incomplete", r"^\.metadata is not there"),
    "half a .metadata": (lambda path: cut(path / ".metadata", 3000), "incomplete", r"^\.metadata ends after 3,000"),
    ".metadata runs code": (
        lambda path: (path / ".metadata").write_bytes(pickle.dumps(Payload(path / "made"))),
        "damaged",
        r"^\.metadata names posix\.mkdir",
    ),
    ".metadata is an open door": (
        lambda path: (path / ".metadata").write_bytes(
            pickle.dumps(__import__("torch.distributed.checkpoint.planner", fromlist=["_"]).SavePlan([]))
        ),
        "damaged",
        r"^\.metadata is no Metadata",
    ),
    "only an optimizer": (
        lambda path: rewrite_metadata(path, lambda name: f"optimizer.{name}"),
        "damaged",
        "names no tensor of a model",
    ),
    "a shard outside": (
        lambda path: (path / ".metadata").write_bytes(
            (path / ".metadata").read_bytes().replace(b"__0_0.distcp", b"../0_0.dstcp")
        ),
        "damaged",
        "which is not the name of a .distcp file beside it",
    ),
    "no shard": (lambda path: (path / "__1_1.distcp").unlink(), "incomplete", r"^__1_1\.distcp is not there"),
    "half a shard": (lambda path: cut(path / "__0_1.distcp", 400), "incomplete", r"^__0_1\.distcp has 400 of [\d,]+"),
    "no common.pt": (lambda path: (path / "common.pt").unlink(), "incomplete", r"^common\.pt is not there"),
    "half a common.pt": (
        lambda path: cut(path / "common.pt", 300),
        "incomplete",
        r"^common\.pt lacks the zip directory at its end",
    ),
    "common.pt is no zip": (
        lambda path: (path / "common.pt").write_bytes(b"no zip"),
        "damaged",
        r"^common\.pt begins with b'no z'",
    ),
    "common.pt is a link out": (
        lambda path: ((path / "common.pt").unlink(), (path / "common.pt").symlink_to("/etc/hostname")),
        "damaged",
        r"^common\.pt is a link to .*, outside",
    ),
    "no config.json": (
        lambda path: (path / "config.json").unlink(),
        "incomplete",
        "the model cannot be built without it",
    ),
    "another architecture": (
        lambda path: edit(path, model_type="nemotron"),
        "damaged",
        r"is mapped for llama, mistral, qwen2, qwen3, gpt2; config\.json has model_type 'nemotron'",
    ),
    "model_type is a list": (lambda path: edit(path, model_type=["llama"]), "damaged", r"has model_type \['llama'\]"),
    "another depth": (
        lambda path: edit(path, num_hidden_layers=3),
        "damaged",
        r"of shape \(4, 16\) is no stack of the 3 layers",
    ),
    "a depth beyond reason": (
        lambda path: edit(path, num_hidden_layers=10**12),
        "damaged",
        "num_hidden_layers 1000000000000, not a count from 1 to 2,000",
    ),
    "another number of heads": (
        lambda path: edit(path, num_key_value_heads=4),
        "damaged",
        r"linear_qkv\.weight` has 32 rows where config\.json has 4 heads in 4 groups of size 4, 48 rows",
    ),
    "heads that do not divide": (lambda path: edit(path, num_key_value_heads=3), "damaged", "4 heads in 3 groups"),
    "negative heads": (lambda path: edit(path, num_attention_heads=-4), "damaged", "num_attention_heads -4, not a"),
    "a larger vocabulary": (
        lambda path: edit(path, vocab_size=25),
        "damaged",
        r"word_embeddings\.weight` has 24 rows where config\.json has vocab_size 25",
    ),
    "a tensor without a place": (
        lambda path: rewrite_metadata(path, lambda name: name.replace("layers.mlp.linear_fc2", "layers.mlp.other")),
        "damaged",
        r"`decoder\.layers\.mlp\.other\.weight` has no place in a llama of 4 layers",
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_what_is_refused(name: str, checkpoint: Path) -> None:
    """Each fault makes it incomplete or damaged with the words that name the cause, and nothing in it is run."""
    fault, state, reason = FAULTS[name]
    fault(checkpoint)
    assert FORMAT.claim(LocalListing(checkpoint)) or name == "no metadata.json"
    refuses(checkpoint, state, reason)
    assert not (checkpoint / "made").exists()


class TestCommon:
    @pytest.mark.parametrize("switch", UNTRACED)
    def test_a_switch_that_tensors_do_not_show(self, switch: str, checkpoint: Path) -> None:
        """A model that Megatron computes otherwise than transformers, of the same tensors, is refused by the switch."""
        (checkpoint / "common.pt").write_bytes(common(**{switch: True}))
        error = refuses(checkpoint, "damaged", rf"^common\.pt says {switch}=True: it")
        assert "Megatron Bridge" in error.remedy
        (checkpoint / "common.pt").write_bytes(common(**{switch: False}))
        assert FORMAT.inspect(LocalListing(checkpoint)).state == "complete"

    def test_a_switch_by_reference(self, checkpoint: Path) -> None:
        """The switch is found too where the pickle names it a second time only by its memo."""
        name = "rotary_interleaved"
        (checkpoint / "common.pt").write_bytes(saved([{name: False}, {name: True}]))
        refuses(checkpoint, "damaged", r"says rotary_interleaved=True")

    def test_it_is_never_run(self, checkpoint: Path) -> None:
        """A common.pt that runs code where it is loaded is looked through, and nothing of it is run."""
        (checkpoint / "common.pt").write_bytes(saved({"args": Payload(checkpoint / "made")}))
        FORMAT.open(reference(checkpoint)).read("model.norm.weight")
        assert not (checkpoint / "made").exists()

    def test_a_pickle_without_end(self, checkpoint: Path) -> None:
        """A common.pt with a pickle of more than 4 MiB is refused and not looked through."""
        (checkpoint / "common.pt").write_bytes(saved({"args": "x" * (4 << 20)}))
        refuses(checkpoint, "damaged", r"^common\.pt has [\d,]+ bytes of `data\.pkl`, more than the 4,194,304")

    def test_a_pickle_that_is_none(self, checkpoint: Path) -> None:
        """A common.pt whose pickle does not parse is damaged."""
        content = common()
        at = content.index(b"\x80\x02}")
        (checkpoint / "common.pt").write_bytes(content[:at] + b"\xff\xff\xff" + content[at + 3 :])
        refuses(checkpoint, "damaged", r"^common\.pt has a data\.pkl that is no pickle")


FOREIGN = {
    "decoder.layers.0.mlp.router.weight": "a mixture of experts",
    "decoder.layers.mlp.shared_experts.linear_fc1.weight": "a mixture of experts",
    "decoder.layers.self_attention.linear_kv_down_proj.weight": r"multi-head latent attention \(MLA\)",
    "mtp.layers.0.eh_proj.weight": r"multi-token prediction \(MTP\)",
    "vision_model.conv1.weight": "a multi-modal model",
    "language_model.decoder.final_layernorm.weight": "a multi-modal model",
    "decoder.layers.0.mixer.in_proj.weight": "a state-space",
    "encoder.layers.self_attention.linear_qkv.weight": "an encoder",
    "decoder.layers.self_attention.linear_qkv.adapter.linear_in.weight": "an adapter",
    "model0.decoder.final_layernorm.weight": "chunks of a virtual pipeline",
}


@pytest.mark.parametrize("name", FOREIGN)
def test_layouts_that_are_declined_by_name(name: str) -> None:
    """A tensor of an architecture that is not mapped is refused with what it belongs to and Megatron Bridge."""
    config = {
        "model_type": "llama",
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "vocab_size": 19,
    }
    shapes = {"decoder.final_layernorm.weight": (16,), name: (4, 4)}
    with pytest.raises(CheckpointError, match=FOREIGN[name]) as caught:
        model_parts(model_sizes(config), shapes)
    assert "Megatron Bridge" in caught.value.remedy


@pytest.mark.parametrize(
    ("name", "shape", "reason"),
    [
        ("decoder.layers.mlp.linear_fc1.weight", (2, 7, 16), "has 7 rows where config.json has a gated MLP"),
        ("decoder.layers.mlp.linear_fc2.weight", (2, 2, 8, 16), "not that of a weight"),
        ("decoder.final_layernorm.weight", (), "not that of a weight"),
        ("decoder.layers.mlp.linear_fc2.weight", (), r"of shape \(\) is no stack"),
    ],
)
def test_shapes_that_cannot_be(name: str, shape: tuple[int, ...], reason: str) -> None:
    """A tensor of another number of dimensions, or with no two halves, is refused by name."""
    config = {"model_type": "llama", "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4}
    with pytest.raises(CheckpointError, match=reason):
        model_parts(model_sizes(config | {"vocab_size": 19}), {name: shape})


def test_many_groups_in_many_layers_take_little_memory() -> None:
    """The deepest model that is read, with 4,096 heads, is mapped: the rows are kept once for all layers."""
    config = {"model_type": "llama", "hidden_size": 4096, "num_attention_heads": 4096, "num_hidden_layers": MAX_LAYERS}
    shapes = {"decoder.layers.self_attention.linear_qkv.weight": (MAX_LAYERS, 3 * 4096, 4096)}
    parts = model_parts(model_sizes(config | {"vocab_size": 19}), shapes)
    assert len(parts) == 3 * MAX_LAYERS
    rows = {id(part.rows) for name, part in parts.items() if "q_proj" in name}
    assert len(rows) == 1


# ---------------------------------------------------------------- changed while it is read


def test_torn(checkpoint: Path) -> None:
    """A shard written again before it is opened, or while it is read, is torn and not damaged."""
    ref = reference(checkpoint)
    weights = FORMAT.open(ref)
    os.utime(checkpoint / "__0_0.distcp", ns=(1, 1))
    os.utime(checkpoint / "__1_0.distcp", ns=(1, 1))
    with pytest.raises(TornCheckpoint, match="changed"):
        weights.read("model.embed_tokens.weight")
    with pytest.raises(TornCheckpoint, match="is another file than before"):
        FORMAT.open(ref)


def test_a_rotated_checkpoint_is_read_to_its_end(checkpoint: Path) -> None:
    """Once open, the weights can be read though the folder was removed."""
    weights = FORMAT.open(reference(checkpoint))
    expected = weights.read("model.layers.1.mlp.up_proj.weight")
    shutil.rmtree(checkpoint)
    assert torch.equal(weights.read("model.layers.1.mlp.up_proj.weight"), expected)


def test_one_look_parses_once(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint that does not change is parsed at the first look only, also when it is refused."""
    calls: list[str] = []

    def counting(pickle: bytes) -> Any:
        calls.append("parsed")
        return read_contents(pickle)

    monkeypatch.setattr("peel_plugins.formats.megatron.format.read_contents", counting)
    edit(checkpoint, vocab_size=25)
    for _ in range(3):
        assert FORMAT.inspect(LocalListing(checkpoint)).state == "damaged"
    assert calls == ["parsed"]


@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.int64])
def test_a_pair_of_its_builder_is_a_probe(tmp_path: Path, dtype: type[np.integer]) -> None:
    """The .bin and .idx that Megatron's own builder writes hold the ids of all documents, in order."""
    ids = np.arange(1600) % 19
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Megatron's, of Apex and of numpy
        from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

        builder = IndexedDatasetBuilder(str(tmp_path / "held_out.bin"), dtype=dtype)
        for number, document in enumerate(np.split(ids, 16)):
            builder.add_document(torch.from_numpy(document), [40, 60] if number == 3 else [100])
        builder.finalize(str(tmp_path / "held_out.idx"))
    for file in ("held_out.bin", "held_out.idx"):
        tokens = read_tokens(
            tmp_path / file, vocabulary=19, tokenizer=None, dtype=None, text_key="text", limit=len(ids)
        )
        assert np.array_equal(tokens.stream, ids)
