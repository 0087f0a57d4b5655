"""The format `dcp`: the conformance kit on what torch.distributed.checkpoint really writes, and hostile files."""

from __future__ import annotations

import copy
import functools
import gc
import io
import json
import os
import pickle
import shutil
import struct
import subprocess
import sys
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from peel_agent import registry
from peel_agent.errors import CheckpointError, IncompleteCheckpoint, TornCheckpoint, WeightsMismatch
from peel_agent.load import open_snapshot
from peel_agent.records import CheckpointRef, LocalListing
from peel_agent.testing.formats import CHECKS, FormatCase, check_complete_once_written
from peel_plugins.formats.dcp import metadata as dcp_metadata
from peel_plugins.formats.dcp.format import FORMAT
from peel_plugins.formats.dcp.metadata import read_pickle
from peel_plugins.formats.dcp.names import model_names
from peel_plugins.formats.dcp.tiling import check_tiling
from peel_plugins.formats.files import held_files
from peel_plugins.formats.pickles.machine import Applied, Word
from peel_plugins.formats.safetensors.format import FORMAT as SAFETENSORS
from tests import servers, zoo

ENTRY = "peel_plugins.formats.dcp.format:FORMAT"


# ---------------------------------------------------------------- what two processes write


def train(rank: int, port: int, root: Path) -> None:
    """One of two ranks of a training with FSDP2 that writes every kind of checkpoint once."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE="2")
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    try:
        for dtype in (torch.float32, torch.bfloat16):
            torch.manual_seed(0)
            model = zoo.build("llama", steps=0).to(dtype)
            name = str(dtype).removeprefix("torch.")
            if rank == 0:
                model.save_pretrained(root / f"safetensors-{name}")
            (fsdp2 if dtype == torch.float32 else sharded_by_column)(model, root, name)
        parts(root)
    finally:
        torch.distributed.destroy_process_group()
    os._exit(0)  # threads of the libraries may abort a process that ends in the usual way


def fsdp2(model: Any, root: Path, name: str) -> None:
    """As Accelerate and as torchtitan save: FSDP2 cuts along the first dimension, 19 rows into 10 and 9."""
    from torch.distributed.checkpoint.state_dict import get_state_dict
    from torch.distributed.fsdp import fully_shard

    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (2,))
    for block in model.model.layers:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimiser = torch.optim.AdamW(model.parameters(), lr=0.0, weight_decay=0.0)
    ids = torch.from_numpy(zoo.token_ids(4, 0))
    model(ids, labels=ids).loss.backward()
    optimiser.step()
    weights, moments = get_state_dict(model, optimiser)
    dcp.save({"model": weights}, checkpoint_id=root / f"accelerate-{name}")
    dcp.save({"app": {"model": weights, "optim": moments}, "step": 3}, checkpoint_id=root / f"app-{name}")
    flat = {**weights, "optimizer": moments, "train_state": {"step": torch.tensor(3)}, "lr_scheduler": {"last": 1}}
    writer = dcp.FileSystemWriter(root / f"titan-{name}", thread_count=2)
    dcp.async_save(flat, storage_writer=writer).result()


def sharded_by_column(model: Any, root: Path, name: str) -> None:
    """Cut along the last dimension, as tensor parallelism does: a rank's part is not side by side in the whole."""
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (2,))
    weights = {
        key: distribute_tensor(tensor, mesh, [Shard(tensor.ndim - 1)]) for key, tensor in model.state_dict().items()
    }
    dcp.save({"state": {"model": weights}}, checkpoint_id=root / f"columns-{name}")


def parts(root: Path) -> None:
    """Tensors of which a rank has nothing, or which are stored in another order than their dimensions'."""
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (2,))
    one = distribute_tensor(torch.arange(5.0).reshape(1, 5), mesh, [Shard(0)])
    turned = distribute_tensor(torch.arange(12.0).reshape(3, 4), mesh, [Shard(0)])
    dcp.save({"model": {"one": one, "turned": turned.t()}}, checkpoint_id=root / "parts")


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which two processes wrote, once for all tests."""
    root = tmp_path_factory.mktemp("dcp")
    program = "import sys, pathlib; from tests.contracts.test_dcp_format import train; "
    program += "train(int(sys.argv[1]), int(sys.argv[2]), pathlib.Path(sys.argv[3]))"
    port = str(servers.free_port())
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", program, rank, port, str(root)],
            cwd=Path(__file__).parents[2],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        for rank in ("0", "1")
    ]
    said = [rank.communicate(timeout=120)[0].decode() for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], "\n".join(said)
    return root


def reference_weights(root: Path, dtype: str) -> Mapping[str, Tensor]:
    """The same weights as safetensors has them."""
    path = root / f"safetensors-{dtype}"
    weights = SAFETENSORS.open(CheckpointRef(path, None, "safetensors", "unchecked", 0.0))
    return {name: weights.read(name) for name in weights.shapes()}


def copied(source: str, dtype: str, written: Path, path: Path, *, config: str = ".", within: str = ".") -> Any:
    """Puts a checkpoint of the fixture to `path`; its config.json comes into `config`, its shards into `within`."""
    path.mkdir(parents=True)
    shutil.copytree(written / f"{source}-{dtype}", path / within, dirs_exist_ok=True)
    shutil.copy(written / f"safetensors-{dtype}" / "config.json", path / config)
    return reference_weights(written, dtype)


def single_process(dtype: str, written: Path, path: Path) -> Mapping[str, Tensor]:
    weights = reference_weights(written, dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that torch.distributed is not initialised
        dcp.save(dict(weights), checkpoint_id=path)
    shutil.copy(written / f"safetensors-{dtype}" / "config.json", path)
    return weights


CASES: Mapping[str, tuple[Callable[[Path, Path], Any], str, int | None, str]] = {
    "accelerate": (functools.partial(copied, "accelerate", "float32"), "pytorch_model_fsdp_0", None, "*.distcp"),
    "trainer": (
        functools.partial(copied, "accelerate", "float32", within="pytorch_model_fsdp_0"),
        "checkpoint-40",
        40,
        "*/*.distcp",
    ),
    "torchtitan, async": (functools.partial(copied, "titan", "float32", config=".."), "step-100", 100, "*.distcp"),
    "app": (functools.partial(copied, "app", "float32"), "global_step100", 100, "*.distcp"),
    "columns, bfloat16": (functools.partial(copied, "columns", "bfloat16"), "final", None, "*.distcp"),
    "single process, bfloat16": (functools.partial(single_process, "bfloat16"), "epoch=1-step=7.ckpt", 7, "*.distcp"),
}


# In Accelerate's folder inside a Trainer's, stamps are paths, where that one check wants file names: see below.
CHECKED = [(check, name) for check in CHECKS for name in CASES if (check, name) != (CHECKS[0], "trainer")]


@pytest.mark.parametrize(("check", "name"), CHECKED, ids=lambda part: getattr(part, "__name__", part))
def test_conformance(check: Callable[[FormatCase, Path], None], name: str, written: Path, tmp_path: Path) -> None:
    """Every check of the kit holds for what two processes wrote, and the bits are those that safetensors has."""
    produce, folder, step, weights = CASES[name]
    check(FormatCase(FORMAT, ENTRY, functools.partial(produce, written), folder, step, weights), tmp_path)


def test_accelerate_inside_a_trainer_s_folder(written: Path, tmp_path: Path) -> None:
    """`checkpoint-40` with `pytorch_model_fsdp_0` in it is one checkpoint, stamped by paths in it."""
    assert CHECKS[0] is check_complete_once_written
    produce, name, step, _ = CASES["trainer"]
    produce(written, tmp_path / name)
    assert FORMAT.claim(LocalListing(tmp_path / name))
    assert FORMAT.step(LocalListing(tmp_path / name)) == step
    assert [stamp.name for stamp in reference(tmp_path / name).files] == [
        "config.json",
        *(f"pytorch_model_fsdp_0/{file}" for file in (".metadata", "__0_0.distcp", "__1_0.distcp")),
    ]


def test_two_ranks_really_wrote_and_cut(written: Path) -> None:
    """In the checkpoints of these tests every rank has a file, matrices are cut in two, and an optimizer is there."""
    assert {path.name for path in (written / "titan-float32").iterdir()} == {
        ".metadata",
        *(f"__{rank}_{part}.distcp" for rank in (0, 1) for part in (0, 1)),
    }
    fields = pickle.loads((written / "app-float32" / ".metadata").read_bytes())
    assert any(".exp_avg" in name for name in fields.state_dict_metadata)
    for name in ("app", "columns"):
        dtype = {"app": "float32", "columns": "bfloat16"}[name]
        contents = dcp_metadata.read_contents((written / f"{name}-{dtype}" / ".metadata").read_bytes())
        assert len(contents.tensors["model.layers.0.mlp.up_proj.weight"].chunks) == 2


def reference(path: Path) -> CheckpointRef:
    readiness = FORMAT.inspect(LocalListing(path))
    assert readiness.state == "complete", readiness.reason
    return CheckpointRef(path, None, "dcp", "unchecked", 0.0, readiness.files)


def test_the_loader_builds_the_model(checkpoint: Path) -> None:
    """The load room finds every weight of the model in a checkpoint of two ranks, and nothing else."""
    snapshot = open_snapshot(reference(checkpoint), FORMAT, registry.family)
    assert snapshot.family == "llama"
    assert set(snapshot.weights.shapes()) == set(FORMAT.open(reference(checkpoint)).shapes())


def test_names_of_no_model_are_not_taken_for_others(written: Path, tmp_path: Path) -> None:
    """Weights under other names than the model's are refused by the load room with the names that are missing."""
    weights = reference_weights(written, "float32")
    renamed = {
        name.removeprefix("model.")
        .replace("embed_tokens", "word_embeddings")
        .replace("self_attn.q_proj", "attention.wq"): (tensor)
        for name, tensor in weights.items()
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save(renamed, checkpoint_id=tmp_path / "step-1")
    shutil.copy(written / "safetensors-float32" / "config.json", tmp_path)
    with pytest.raises(WeightsMismatch, match=r"missing model\.embed_tokens\.weight.*unexpected word_embeddings"):
        open_snapshot(reference(tmp_path / "step-1"), FORMAT, registry.family)


def test_a_rank_without_a_share_and_turned_tensors(written: Path, tmp_path: Path) -> None:
    """A tensor of which one rank has nothing and one whose numbers lie in another order are read as they are."""
    shutil.copytree(written / "parts", tmp_path / "parts")
    (tmp_path / "parts" / "config.json").write_text("{}")
    weights = FORMAT.open(reference(tmp_path / "parts"))
    assert torch.equal(weights.read("one"), torch.arange(5.0).reshape(1, 5))
    assert torch.equal(weights.read("turned"), torch.arange(12.0).reshape(3, 4).t())


DTYPES = (
    "float64 float32 float16 bfloat16 int64 int32 int16 int8 uint64 uint32 uint16 uint8 bool complex64 complex128 "
    "float8_e4m3fn float8_e5m2 float8_e4m3fnuz float8_e5m2fnuz float8_e8m0fnu"
)


def test_every_dtype_is_read_bit_for_bit(tmp_path: Path) -> None:
    """Tensors, turned tensors, scalars and empty tensors of each dtype are read as torch wrote them."""
    torch.manual_seed(0)
    state: dict[str, Tensor] = {}
    for dtype in DTYPES.split():
        kind = getattr(torch, dtype)
        high = 2 if dtype == "bool" else 256
        raw = torch.randint(0, high, (kind.itemsize * 6,), dtype=torch.uint8).view(kind)
        state |= {f"{dtype}.matrix": raw.reshape(2, 3), f"{dtype}.turned": raw.reshape(2, 3).t()}
        state |= {f"{dtype}.scalar": raw[0].clone(), f"{dtype}.none": raw[:0].reshape(0, 3)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save(state, checkpoint_id=tmp_path)
    (tmp_path / "config.json").write_text("{}")
    weights = FORMAT.open(reference(tmp_path))
    assert set(weights.shapes()) == set(state)
    for name, tensor in state.items():
        read = weights.read(name)
        assert (read.dtype, read.shape) == (tensor.dtype, tensor.shape)
        bits = tensor.contiguous().reshape(-1).view(torch.uint8)
        assert torch.equal(read.reshape(-1).view(torch.uint8), bits), name


# ---------------------------------------------------------------- recognition, step, names


class TestRecognition:
    @pytest.mark.parametrize(
        ("files", "recognised"),
        [
            ([".metadata", "__0_0.distcp"], True),
            (["__0_0.distcp"], True),
            ([".metadata"], True),
            (["__12_3.distcp", "config.json"], True),
            (["pytorch_model_fsdp_0/.metadata"], True),
            (["pytorch_model_fsdp_0/.metadata", "model.safetensors"], False),
            (["model.safetensors", "config.json"], False),
            (["a.distcp"], False),
            ([".metadata/x"], False),
            ([], False),
        ],
    )
    def test_by_names(self, files: list[str], recognised: bool, tmp_path: Path) -> None:
        """A folder with shards, with a .metadata file or with Accelerate's folder in it is of this format."""
        for file in files:
            (tmp_path / file).parent.mkdir(exist_ok=True)
            (tmp_path / file).touch()
        assert (FORMAT.claim(LocalListing(tmp_path)) is not None) == recognised
        assert not SAFETENSORS.claim(LocalListing(tmp_path)) or not recognised

    def test_what_is_not_there(self, tmp_path: Path) -> None:
        """A path that vanished, or is a file, is no checkpoint."""
        (tmp_path / "file").touch()
        assert not FORMAT.claim(LocalListing(tmp_path / "gone"))
        assert not FORMAT.claim(LocalListing(tmp_path / "file"))

    @pytest.mark.parametrize(
        ("path", "step"),
        [
            ("step-100", 100),
            ("checkpoint-100", 100),
            ("global_step100", 100),
            ("iter_0000100", 100),
            ("epoch=1-step=100.ckpt", 100),
            ("checkpoint-100/pytorch_model_fsdp_0", 100),
            ("checkpoint_3/pytorch_model_fsdp_0", None),
            ("pytorch_model_fsdp_0", None),
            ("final", None),
        ],
    )
    def test_the_step_in_a_name(self, path: str, step: int | None) -> None:
        """The step is in the folder's name; Accelerate's `checkpoint_3` is its third saving, not step 3."""
        assert FORMAT.step(LocalListing(Path("runs") / path)) == step

    def test_savings_are_no_steps(self, tmp_path: Path) -> None:
        """`checkpoint_3` with Accelerate's folder in it says no step."""
        (tmp_path / "checkpoint_3" / "pytorch_model_fsdp_0").mkdir(parents=True)
        assert FORMAT.step(LocalListing(tmp_path / "checkpoint_3")) is None


OPTIMIZER = ("optim.state.norm.weight.exp_avg", "optimizer.state.0.exp_avg", "optimizer_0.state.0.step")
INNER = ("model.embed_tokens.weight", "model.norm.weight")


@pytest.mark.parametrize(
    ("names", "nested_under", "expected"),
    [
        (("model.norm.weight", "model.head.weight"), (), ("norm.weight", "head.weight")),
        (("app.model.norm.weight",), (), ("norm.weight",)),
        (("state.model.norm.weight", "state.optimizers.AdamW.state.0.exp_avg"), (), ("norm.weight",)),
        (("norm.weight", *OPTIMIZER), (), ("norm.weight",)),
        (("layers.0.attention.wq.weight", "train_state.step"), (), ("layers.0.attention.wq.weight",)),
        (("model.norm.weight", "lm_head.weight"), (), ("model.norm.weight", "lm_head.weight")),
        (INNER, (), INNER),
        (INNER, ("model",), ("embed_tokens.weight", "norm.weight")),
        (("model.model.norm.weight", "ema.norm.weight"), ("model",), ("model.norm.weight",)),
        (("_orig_mod.norm.weight", "_orig_mod.head.weight"), (), ("norm.weight", "head.weight")),
        (("model._orig_mod.norm.weight",), ("model",), ("norm.weight",)),
        (("model.a", "ema.a"), (), ("model.a", "ema.a")),
        (OPTIMIZER, (), ()),
    ],
)
def test_names_of_the_model(names: tuple[str, ...], nested_under: tuple[str, ...], expected: tuple[str, ...]) -> None:
    """The key under which a trainer put the model is taken off, the model's own `model.` is not; optimizers go."""
    prefix = ".".join((*nested_under, ""))
    inner = {name: name.removeprefix(prefix) for name in names if nested_under and name.startswith(prefix)}
    paths = {name: (*nested_under, rest) for name, rest in inner.items()}
    assert tuple(model_names(names, paths).values()) == expected


# ---------------------------------------------------------------- still being written


@pytest.fixture
def checkpoint(written: Path, tmp_path: Path) -> Path:
    """A checkpoint of two ranks with its optimizer."""
    copied("app", "float32", written, tmp_path / "step-3")
    return tmp_path / "step-3"


def refuses(path: Path, state: str, reason: str) -> CheckpointError:
    """Inspect says `state` with the reason, and open raises the matching error with the same reason."""
    readiness = FORMAT.inspect(LocalListing(path))
    assert readiness.state == state, readiness.reason
    with pytest.raises(CheckpointError, match=reason) as caught:
        FORMAT.open(CheckpointRef(path, None, "dcp", "unchecked", 0.0))
    assert caught.value.what == readiness.reason
    assert caught.value.remedy
    assert isinstance(caught.value, IncompleteCheckpoint) == (state == "incomplete")
    return caught.value


class TestBeingWritten:
    def test_without_metadata(self, checkpoint: Path) -> None:
        """Shards without .metadata are still being written, and are stamped as the evidence of that."""
        (checkpoint / ".metadata").unlink()
        assert FORMAT.claim(LocalListing(checkpoint))
        refuses(checkpoint, "incomplete", r"^\.metadata is not there")
        assert {stamp.name for stamp in FORMAT.inspect(LocalListing(checkpoint)).files} >= {
            "__0_0.distcp",
            "__1_0.distcp",
        }

    def test_metadata_of_another_name(self, checkpoint: Path) -> None:
        """What torch renames last does not count before it is renamed."""
        (checkpoint / ".metadata").rename(checkpoint / ".metadata.tmp")
        refuses(checkpoint, "incomplete", r"^\.metadata is not there")

    @pytest.mark.parametrize("size", [0, 1, 2, 11, 100, 1000, -1])
    def test_metadata_cut_short(self, checkpoint: Path, size: int) -> None:
        """A .metadata that ends early is incomplete, wherever it ends."""
        content = (checkpoint / ".metadata").read_bytes()
        (checkpoint / ".metadata").write_bytes(content[:size])
        refuses(checkpoint, "incomplete", r"^\.metadata ends after [\d,]+ bytes, before its end")

    def test_a_shard_is_missing(self, checkpoint: Path) -> None:
        """A shard that .metadata names and that is not there makes it incomplete, by name."""
        (checkpoint / "__1_0.distcp").unlink()
        refuses(checkpoint, "incomplete", r"^__1_0\.distcp is not there")

    def test_a_shard_is_cut_short(self, checkpoint: Path) -> None:
        """A shard shorter than its last item is incomplete, with both sizes."""
        size = (checkpoint / "__0_0.distcp").stat().st_size
        os.truncate(checkpoint / "__0_0.distcp", size - 1)
        refuses(checkpoint, "incomplete", rf"^__0_0\.distcp has {size - 1:,} of {size:,} bytes")

    def test_trainer_has_not_finished(self, checkpoint: Path) -> None:
        """Trainer's own mark is respected, and taking it away is seen."""
        (checkpoint / "checkpoint-is-incomplete.txt").touch()
        refuses(checkpoint, "incomplete", "checkpoint-is-incomplete.txt is there")
        (checkpoint / "checkpoint-is-incomplete.txt").unlink()
        assert FORMAT.inspect(LocalListing(checkpoint)).state == "complete"

    def test_without_config(self, checkpoint: Path) -> None:
        """Without config.json here or above it is said where to put it; above is enough, and is no stamp of this."""
        (checkpoint / "config.json").rename(checkpoint / "aside")
        error = refuses(checkpoint, "incomplete", "config.json is not there: the model cannot be built")
        assert "put the model's config.json into" in error.remedy
        (checkpoint / "aside").rename(checkpoint.parent / "config.json")
        assert [stamp.name for stamp in reference(checkpoint).files] == [".metadata", "__0_0.distcp", "__1_0.distcp"]
        assert FORMAT.open(reference(checkpoint)).config()["model_type"] == "llama"

    def test_the_nearer_config_is_taken(self, checkpoint: Path) -> None:
        """config.json beside .metadata goes before the one above; one that does not parse is not passed over."""
        (checkpoint.parent / "config.json").write_text('{"model_type": "above"}')
        assert FORMAT.open(reference(checkpoint)).config()["model_type"] == "llama"
        (checkpoint / "config.json").write_text("{")
        refuses(checkpoint, "incomplete", "config.json does not parse")

    @pytest.mark.parametrize("file", [".metadata", "__1_0.distcp", "config.json"])
    def test_changed_before_it_was_opened(self, checkpoint: Path, file: str) -> None:
        """A file that changed between the look and the opening is torn, by name."""
        ref = reference(checkpoint)
        later(checkpoint / file)
        with pytest.raises(TornCheckpoint, match=f"step-3 changed.*: {file} is another file than before"):
            FORMAT.open(ref)

    def test_gone_before_it_was_opened(self, checkpoint: Path) -> None:
        """A checkpoint rotated away between the look and the opening is torn, not broken."""
        ref = reference(checkpoint)
        shutil.rmtree(checkpoint)
        with pytest.raises(TornCheckpoint, match="step-3 changed after it was found whole"):
            FORMAT.open(ref)

    NAME = "model.layers.0.mlp.up_proj.weight"

    @pytest.mark.parametrize("at_once", [0, 256])
    @pytest.mark.parametrize("how", ["rewritten", "truncated", "garbled"])
    def test_changed_while_it_was_read(
        self, checkpoint: Path, how: str, at_once: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A shard rewritten, truncated or garbled under an open checkpoint is torn, and that can be tried again."""
        monkeypatch.setattr(held_files, "MAX_OPEN", at_once)
        weights = FORMAT.open(reference(checkpoint))
        weights.read(self.NAME)
        file = checkpoint / "__1_0.distcp"
        if how == "truncated":
            os.truncate(file, 10)
        elif how == "garbled":
            with file.open("r+b") as stream:
                stream.write(b"\xff" * file.stat().st_size)
        later(file)
        with pytest.raises(TornCheckpoint, match=r"__1_0\.distcp.* (changed while|ended before)") as caught:
            weights.read(self.NAME)
        assert caught.value.retryable

    def test_rotated_away_while_it_was_read(self, checkpoint: Path) -> None:
        """A checkpoint removed while it is open is read to its end."""
        weights = FORMAT.open(reference(checkpoint))
        before = weights.read(self.NAME)
        shutil.rmtree(checkpoint)
        assert torch.equal(weights.read(self.NAME), before)

    def test_more_files_than_are_held_open(self, checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """With more files than may be open at once the tensors are the same, and a removed file is torn."""
        all_held = FORMAT.open(reference(checkpoint))
        monkeypatch.setattr(held_files, "MAX_OPEN", 1)
        weights = FORMAT.open(reference(checkpoint))
        assert torch.equal(weights.read(self.NAME), all_held.read(self.NAME))
        shutil.rmtree(checkpoint)
        with pytest.raises(TornCheckpoint, match=r"__1_0\.distcp is gone"):
            weights.read(self.NAME)

    def test_everything_is_closed(self, checkpoint: Path) -> None:
        """Reading maps no file into memory, and dropping the weights closes their files."""
        weights = FORMAT.open(reference(checkpoint))
        weights.read(self.NAME)
        assert held(checkpoint) == {checkpoint / "__0_0.distcp", checkpoint / "__1_0.distcp"}
        assert str(checkpoint) not in Path("/proc/self/maps").read_text()
        del weights
        gc.collect()
        assert held(checkpoint) == set()


def later(file: Path) -> None:
    """Puts the modification time forward, as a later write does, whatever the clock's grain is."""
    stamp = file.stat().st_mtime_ns + 10**9
    os.utime(file, ns=(stamp, stamp))


def held(folder: Path) -> set[Path]:
    """Files of this folder that the process holds open."""
    links = [Path(f"/proc/self/fd/{number}") for number in range(256)]
    return {link.readlink() for link in links if link.is_symlink() and link.readlink().is_relative_to(folder)}


# ---------------------------------------------------------------- hostile .metadata


class Run:
    """Pickles to a call of a function, which a plain unpickler runs."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.reduced = (function, arguments)

    def __reduce__(self) -> Any:
        return self.reduced

    def __hash__(self) -> int:
        return 0


def sound() -> Any:
    """What torch would write for {"model": {"w": zeros(2, 3)}} in one file, with an optimizer's entry."""
    size = torch.Size([2, 3])
    tensor = TensorStorageMetadata(
        TensorProperties(), size, [ChunkStorageMetadata(offsets=torch.Size([0, 0]), sizes=size)]
    )
    return Metadata(
        {"model.w": tensor, "optim.step": BytesStorageMetadata()},
        {"model.w": ("model", "w"), "optim.step": ("optim", "step")},
        {
            MetadataIndex("model.w", [0, 0], 0): _StorageInfo("__0_0.distcp", 0, len(ITEM)),
            MetadataIndex("optim.step"): _StorageInfo("__0_0.distcp", len(ITEM), 5),
        },
        StorageMeta(Path("somewhere"), "id"),
        "1.0.0",
    )


def saved(tensor: Any) -> bytes:
    stream = io.BytesIO()
    torch.save(tensor, stream)
    return stream.getvalue()


ITEM = saved(torch.zeros(2, 3))


def folder_of(tmp_path: Path, metadata: object, item: bytes = ITEM) -> Path:
    """A checkpoint of this metadata (an object to pickle, or bytes as they are) and one shard."""
    folder = tmp_path / "step-1"
    folder.mkdir()
    (folder / ".metadata").write_bytes(metadata if isinstance(metadata, bytes) else pickle.dumps(metadata))
    (folder / "__0_0.distcp").write_bytes(item.ljust(len(ITEM), b"\0") + bytes(5))
    (folder / "config.json").write_text("{}")
    return folder


def test_the_sound_checkpoint_from_which_the_hostile_are_made(tmp_path: Path) -> None:
    """What the hostile cases change is complete and read as it is."""
    weights = FORMAT.open(reference(folder_of(tmp_path, sound())))
    assert torch.equal(weights.read("w"), torch.zeros(2, 3))


def changed(**changes: object) -> Any:
    """The sound metadata with attributes replaced, by their paths: `properties__dtype`, `storage_data__length`."""
    metadata = sound()
    tensor = metadata.state_dict_metadata["model.w"]
    index, info = next(iter(metadata.storage_data.items()))
    roots = {
        "root": metadata,
        "tensor": tensor,
        "properties": tensor.properties,
        "chunk": tensor.chunks[0],
        "index": index,
        "info": info,
        "meta": metadata.storage_meta,
    }
    for path, value in changes.items():
        target, _, name = path.partition("__")
        object.__setattr__(roots[target], name, value)
    return metadata


POSITIONS = (
    "root__state_dict_metadata root__planner_data root__storage_data root__storage_meta root__version "
    "tensor__properties tensor__size tensor__chunks properties__dtype properties__layout properties__requires_grad "
    "chunk__offsets chunk__sizes index__fqn index__offset index__index info__relative_path info__offset info__length "
    "info__transform_descriptors meta__checkpoint_id meta__modules"
)


@pytest.mark.parametrize("position", [*POSITIONS.split(), "all", "an entry", "a key", "a stored key", "a path"])
def test_a_call_is_refused_wherever_it_is(position: str, tmp_path: Path) -> None:
    """os.system is refused by name in every position of .metadata, and does not run."""
    bomb: Any = Run(os.system, f"touch {tmp_path}/ran")
    if position == "all":
        metadata = bomb
    elif "__" in position:
        metadata = changed(**{position: bomb})
    else:
        metadata = sound()
        if position == "an entry":
            metadata.state_dict_metadata["optim.other"] = bomb
        elif position == "a key":
            metadata.state_dict_metadata[bomb] = BytesStorageMetadata()
        elif position == "a stored key":
            metadata.storage_data[bomb] = 1
        else:
            metadata.planner_data["model.w"] = ("model", bomb)
    refuses(folder_of(tmp_path, metadata), "damaged", r"^\.metadata names posix\.system, which is no part of it")
    assert not (tmp_path / "ran").exists()
    pickle.loads((tmp_path / "step-1" / ".metadata").read_bytes() if position == "all" else pickle.dumps(bomb))
    assert (tmp_path / "ran").exists(), "the bomb of this test is none"


def test_the_state_of_a_class_is_not_changed(tmp_path: Path) -> None:
    """A pickle that gives a state to a class that it names, to change it for the next reader, is refused."""
    content = b"\x80\x02ctorch\nSize\nN}X\x08\x00\x00\x00__call__K\x01s\x86b."
    refuses(folder_of(tmp_path, content), "damaged", "is no pickle that Python writes: byte 3[0-9] does not fit")


@pytest.mark.parametrize(
    "word",
    [
        "builtins eval",
        "builtins exec",
        "builtins __import__",
        "importlib import_module",
        "subprocess Popen",
        "torch load",
        "torch.hub load",
        "torch.storage _load_from_bytes",
        "torch.serialization load",
        "torch._utils _rebuild_tensor_v2",
        "numpy._core.multiarray _reconstruct",
        "functools partial",
        "operator attrgetter",
        "types CodeType",
        "torch.distributed.checkpoint.metadata os.system",
        "torch.distributed.checkpoint.metadata Metadata.__init__",
        "torch.distributed.checkpoint.filesystem FileSystem",
        "pathlib Path.unlink",
        "__main__ Metadata",
        "torch \x1b[31m",
    ],
)
def test_unknown_words_are_refused(word: str, tmp_path: Path) -> None:
    """Any other global is refused by its name, in printable letters, in either way of writing one."""
    module, name = word.split(" ")
    old = f"c{module}\n{name}\n.".encode()
    new = b"\x80\x04" + b"".join(b"\x8c" + bytes([len(text)]) + text.encode() for text in (module, name)) + b"\x93."
    shown = ascii(f"{module}.{name}")[1:-1]
    for content in (old, new):
        error = refuses(folder_of(tmp_path, content), "damaged", "names .*, which is no part of it")
        assert f"names {shown}," in error.what
        assert error.what.isprintable()
        shutil.rmtree(tmp_path / "step-1")


def deep(depth: int, opening: bytes, closing: bytes) -> bytes:
    return b"\x80\x04" + opening * depth + closing * depth + b"."


def doubled() -> bytes:
    """The empty tuple made a pair of twice itself 60 times: small in memory, but its hash would never be done."""
    return b"".join(b"\x94h" + bytes([number]) + b"\x86" for number in range(60))


PICKLES = {
    "nothing": (b"", "incomplete", "ends after 0 bytes"),
    "garbage": (b"\x00garbage", "damaged", "has the opcode 0x00 at byte 0"),
    "text": (b"{'state_dict_metadata': 1}", "damaged", "has the opcode|is no pickle"),
    "zeros": (bytes(1000), "damaged", "has the opcode 0x00 at byte 0"),
    "protocol 9": (b"\x80\x09N.", "damaged", "protocol above 5"),
    "trailing": (pickle.dumps(None) + b"x", "damaged", "has 1 bytes after its end"),
    "empty stack": (b"\x80\x04.x", "damaged", "does not fit"),
    "two objects": (b"\x80\x04NN.", "damaged", "does not fit"),
    "memo bomb": (b"\x80\x02Nr\xff\xff\xff\xff0.", "damaged", "does not fit"),
    "unwritten memo": (b"\x80\x02j\xff\x00\x00\x00.", "damaged", "does not fit"),
    "long text": (b"\x80\x04X\xff\xff\xff\xffabc.", "incomplete", "ends after"),
    "huge bytes": (b"\x80\x04\x8e" + b"\xff" * 7 + b"\x7f.", "damaged", "the opcode BINBYTES8"),
    "huge array": (b"\x80\x05\x96" + b"\xff" * 7 + b"\x7f.", "damaged", "the opcode BYTEARRAY8"),
    "long number": (b"\x80\x04\x8b\xff\xff\xff\x7f.", "damaged", "the opcode LONG4"),
    "old instance": (b"(cos\nsystem\no.", "damaged", "names os.system"),
    "instance": (b"(ios\nsystem\n.", "damaged", "the opcode INST"),
    "extension": (b"\x80\x02\x82\x01.", "damaged", "the opcode EXT1"),
    "keywords": (b"\x80\x04N)}\x92.", "damaged", "the opcode NEWOBJ_EX"),
    "outside object": (b"\x80\x04NQ.", "damaged", "has a persistent id"),
    "not UTF-8": (b"\x80\x04\x8c\x02\xff\xfe.", "damaged", "does not fit"),
    "a list": (pickle.dumps([1]), "damaged", r"^\.metadata is no Metadata"),
    "another class": (pickle.dumps(StorageMeta()), "damaged", r"^\.metadata is no Metadata"),
    "attribute": (b"\x80\x04cbuiltins\ngetattr\nX\x01\x00\x00\x00aX\x01\x00\x00\x00b\x86R.", "damaged", "getattr"),
    "deep lists": (deep(300_000, b"]", b"a"), "damaged", "does not fit|is no Metadata"),
    "deep tuples": (b"\x80\x04N" + b"\x85" * 300_000 + b".", "damaged", "is no Metadata"),
    "endless key": (b"\x80\x04})" + doubled() + b"Ns.", "damaged", "has a dict with a tuple as a key"),
}


@pytest.mark.parametrize("name", PICKLES)
def test_a_hostile_pickle(name: str, tmp_path: Path) -> None:
    """What ends early is incomplete; opcodes and orders that Python does not write for metadata are damage, by name."""
    content, state, reason = PICKLES[name]
    refuses(folder_of(tmp_path, content), state, reason)


def test_flipped_bits_are_never_more_than_refused(tmp_path: Path) -> None:
    """With any byte of .metadata or of a shard changed, everything is read or refused: nothing else is raised."""
    torch.manual_seed(0)
    folder = folder_of(tmp_path, sound())
    refused = 0
    for name in (".metadata", "__0_0.distcp"):
        content = (folder / name).read_bytes()
        for place in torch.randint(len(content), (250,)).tolist():
            (folder / name).write_bytes(content[:place] + bytes([content[place] ^ 0x41]) + content[place + 1 :])
            try:
                FORMAT.open(CheckpointRef(folder, None, "dcp", "unchecked", 0.0)).read("w")
            except CheckpointError:
                refused += 1
        (folder / name).write_bytes(content)
    assert refused > 200


def test_a_flood_of_objects_is_stopped() -> None:
    """A pickle that makes 200 bytes of memory from each of its own is refused long before its end."""
    with pytest.raises(CheckpointError, match="it takes more than the 1,000,000 bytes of memory"):
        read_pickle(b"\x80\x04" + b"}" * 10_000_000 + b".", "it", frozenset(), memory=1_000_000)


def test_members_of_enums_as_python_3_11_2_writes_them() -> None:
    """An attribute of a word is read as data; of anything else it is refused."""
    words = frozenset({("builtins", "getattr"), ("a", "Enum")})
    read = read_pickle(b"\x80\x02cbuiltins\ngetattr\nca\nEnum\nX\x01\x00\x00\x00b\x86R.", "it", words)
    assert isinstance(read, Applied)
    assert read.arguments == (Word("a", "Enum"), "b")


def chunks(*boxes: tuple[list[int], list[int]]) -> list[ChunkStorageMetadata]:
    return [ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes)) for offsets, sizes in boxes]


def stored(*places: tuple[list[int], int, int], file: str = "__0_0.distcp") -> Any:
    return {MetadataIndex("model.w", at): _StorageInfo(file, offset, length) for at, offset, length in places}


def twice() -> Any:
    metadata = sound()
    metadata.state_dict_metadata["model.v"] = copy.deepcopy(metadata.state_dict_metadata["model.w"])
    metadata.storage_data[MetadataIndex("model.v", [0, 0])] = _StorageInfo("__0_0.distcp", len(ITEM) - 1, len(ITEM))
    return metadata


def stored_twice() -> Any:
    metadata = changed(root__storage_data=stored(([0, 0], 0, len(ITEM)), ([1, 0], 0, len(ITEM))))
    object.__setattr__(list(metadata.storage_data)[1], "offset", torch.Size([0, 0]))
    return metadata


def outside(path: object) -> Callable[[], Any]:
    return lambda: changed(info__relative_path=path)


HALVES = chunks(([0, 0], [1, 3]), ([1, 0], [1, 3]))
LIES: Mapping[str, tuple[Callable[[], Any], str, str]] = {
    "parent": (outside("../__0_0.distcp"), "damaged", r"`model\.w` lies in '\.\./__0_0\.distcp', which is not"),
    "absolute": (outside("/etc/passwd"), "damaged", "lies in '/etc/passwd'"),
    "absolute shard": (outside("/tmp/__0_0.distcp"), "damaged", "lies in '/tmp/__0_0.distcp'"),
    "sub-folder": (outside("sub/__0_0.distcp"), "damaged", "lies in 'sub/__0_0.distcp'"),
    "NUL": (outside("a\0.distcp"), "damaged", r"lies in 'a\\x00\.distcp'"),
    "backslash": (outside("a\\b.distcp"), "damaged", "lies in "),
    "another file": (outside("config.json"), "damaged", "lies in 'config.json'"),
    "no name": (outside(None), "damaged", "lies in a NoneType"),
    "path object": (outside(Path("__0_0.distcp")), "damaged", "lies in a Applied"),
    "negative offset": (lambda: changed(info__offset=-1), "damaged", "`model.w` has no offset and length"),
    "length a bool": (lambda: changed(info__length=True), "damaged", "`model.w` has no offset and length"),
    "huge length": (lambda: changed(info__length=2**62), "incomplete", "of 4,611,686,018,427,387,904 bytes"),
    "huge offset": (lambda: changed(info__offset=2**80), "damaged", "has no offset and length"),
    "short length": (lambda: changed(info__length=24), "damaged", r"has 24 bytes in __0_0\.distcp for 24 bytes of n"),
    "extension": (lambda: changed(info__transform_descriptors=["zstd"]), "damaged", "through an extension"),
    "not stored": (
        lambda: changed(index__fqn="model.v"),
        "damaged",
        r"`model\.w` has a chunk at \(0, 0\) that no file",
    ),
    "stored elsewhere": (lambda: changed(index__offset=torch.Size([1, 0])), "damaged", "that no file holds"),
    "stored twice": (stored_twice, "damaged", "stores a chunk twice"),
    "overlap": (
        lambda: changed(
            tensor__chunks=chunks(([0, 0], [2, 2]), ([0, 1], [2, 2])),
            root__storage_data=stored(([0, 0], 0, 700), ([0, 1], 700, 700)),
        ),
        "damaged",
        r"`model\.w` has chunks at \(0, 0\) of sizes \(2, 2\) and at \(0, 1\) of sizes \(2, 2\) that overlap",
    ),
    "the same chunk twice": (
        lambda: changed(tensor__chunks=chunks(([0, 0], [2, 3]), ([0, 0], [2, 3]))),
        "damaged",
        "that overlap",
    ),
    "gap": (
        lambda: changed(tensor__chunks=chunks(([0, 0], [1, 3]))),
        "damaged",
        r"`model\.w` has chunks of 3 numbers where its shape \(2, 3\) needs 6: a gap",
    ),
    "no chunk": (lambda: changed(tensor__chunks=[]), "damaged", "has chunks of 0 numbers where"),
    "chunk beyond": (lambda: changed(chunk__sizes=torch.Size([3, 3])), "damaged", r"outside its shape \(2, 3\)"),
    "chunk of other dimensions": (lambda: changed(chunk__sizes=torch.Size([6])), "damaged", "of other dimensions"),
    "shared bytes": (
        lambda: changed(
            tensor__chunks=HALVES, root__storage_data=stored(([0, 0], 0, len(ITEM)), ([1, 0], 100, len(ITEM) - 100))
        ),
        "damaged",
        r"has `w` begin at byte 100 of __0_0\.distcp, inside `w`",
    ),
    "shared bytes of two tensors": (twice, "damaged", r"has `v` begin at byte .* inside `w`"),
    "negative size": (
        lambda: changed(tensor__size=Run(torch.Size, (-2, 3))),
        "damaged",
        "not a torch.Size of counts",
    ),
    "fractions": (lambda: changed(tensor__size=Run(torch.Size, (2.0, 3))), "damaged", "not a torch.Size of counts"),
    "booleans": (lambda: changed(tensor__size=Run(torch.Size, (True, 3))), "damaged", "not a torch.Size of counts"),
    "65 dimensions": (lambda: changed(tensor__size=Run(torch.Size, (1,) * 65)), "damaged", "not a torch.Size"),
    "a plain tuple": (lambda: changed(tensor__size=(2, 3)), "damaged", "not a torch.Size of counts"),
    "a size without any": (lambda: changed(tensor__size=Run(torch.Size)), "damaged", "not a torch.Size of counts"),
    "absurd dimension": (lambda: changed(tensor__size=Run(torch.Size, (2**63, 0))), "damaged", "not a torch.Size"),
    "absurd shape": (lambda: changed(tensor__size=torch.Size([2**40, 2**40])), "damaged", "more than any file can"),
    "larger than its chunks": (lambda: changed(tensor__size=torch.Size([2**50, 3])), "damaged", "a gap"),
    "unknown dtype": (lambda: changed(properties__dtype=torch.qint8), "damaged", "names torch.qint8, which is no part"),
    "a word as dtype": (lambda: changed(properties__dtype=StorageMeta), "damaged", "has the unknown dtype StorageMeta"),
    "dtype is text": (lambda: changed(properties__dtype="float32"), "damaged", "`model.w` has no properties"),
    "sparse": (lambda: changed(properties__layout=torch.sparse_coo), "damaged", "`model.w` is not dense"),
    "no properties": (lambda: changed(tensor__properties=None), "damaged", "`model.w` has no properties"),
    "chunks are a dict": (lambda: changed(tensor__chunks={}), "damaged", "`model.w` has no list of chunks"),
    "a chunk is a text": (lambda: changed(tensor__chunks=["x"]), "damaged", "is no ChunkStorageMetadata"),
    "no entries": (lambda: changed(root__state_dict_metadata=None), "damaged", "state_dict_metadata is no dict"),
    "no storage": (lambda: changed(root__storage_data=None), "damaged", "storage_data is no dict"),
    "entry of text": (lambda: changed(root__state_dict_metadata={"a": "b"}), "damaged", "neither as a tensor nor"),
    "entry under a class": (
        lambda: changed(root__state_dict_metadata={StorageMeta: "b"}),
        "damaged",
        "as a key, which is not read",
    ),
    "storage of text": (lambda: changed(root__storage_data={"a": "b"}), "damaged", "is no MetadataIndex"),
    "index without name": (lambda: changed(index__fqn=None), "damaged", "has a key of storage_data without a name"),
    "optimizer alone": (
        lambda: changed(root__state_dict_metadata={"optim.step": BytesStorageMetadata()}),
        "damaged",
        "names no tensor of a model among its 1 entries",
    ),
}


@pytest.mark.parametrize("name", LIES)
def test_metadata_that_lies(name: str, tmp_path: Path) -> None:
    """Paths outside, chunks that do not tile, sizes that cannot be right: each is refused by name, with the values."""
    make, state, reason = LIES[name]
    refuses(folder_of(tmp_path, make()), state, r"^\.metadata.*" + reason if state == "damaged" else reason)


def test_planner_data_that_lies_is_harmless(tmp_path: Path) -> None:
    """What says where entries were nested may be anything: the names are then taken as they are."""
    for lie in (None, [1], {"model.w": 5, "other": ("a",)}, {"model.w": ()}, {"model.w": ("model",)}):
        folder = folder_of(tmp_path, changed(root__planner_data=lie))
        assert set(FORMAT.open(reference(folder)).shapes()) == {"w"}
        shutil.rmtree(folder)


def test_too_many_entries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """More entries, stored items or chunks than the limit are refused with the limit."""
    monkeypatch.setattr(dcp_metadata, "MAX_ENTRIES", 1)
    refuses(folder_of(tmp_path, sound()), "damaged", "state_dict_metadata has 2 entries, more than the 1 that are read")
    metadata = changed(
        tensor__chunks=HALVES, root__storage_data=stored(([0, 0], 0, 600), ([1, 0], 600, 700)), root__planner_data=None
    )
    del metadata.state_dict_metadata["optim.step"]
    with pytest.raises(CheckpointError, match="storage_data has 2 entries, more than the 1"):
        dcp_metadata.read_contents(pickle.dumps(metadata))
    monkeypatch.setattr(dcp_metadata, "_dict", lambda value, _: value)
    with pytest.raises(CheckpointError, match="more than 1 chunks"):
        dcp_metadata.read_contents(pickle.dumps(metadata))


def test_absurd_metadata_is_not_read(tmp_path: Path) -> None:
    """A .metadata above 64 MiB is refused by its size."""
    folder = folder_of(tmp_path, sound())
    os.truncate(folder / ".metadata", 2**26 + 1)
    refuses(folder, "damaged", r"^\.metadata has 67,108,865 bytes, more than the 67,108,864 that are read")


def test_what_is_refused_is_looked_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A .metadata is parsed once for each version of it, whether it is sound or not; a new version is seen."""
    folder = folder_of(tmp_path, b"garbage")
    state = FORMAT.inspect(LocalListing(folder))
    with monkeypatch.context() as patch:
        patch.setattr("peel_plugins.formats.dcp.format.read_contents", None)
        assert FORMAT.inspect(LocalListing(folder)) == state
    (folder / ".metadata").write_bytes(pickle.dumps(sound()))
    assert FORMAT.inspect(LocalListing(folder)).state == "complete"


def test_a_failing_disk_is_not_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A .metadata that could not be read once is incomplete, and read at the next look though it did not change."""
    folder = folder_of(tmp_path, sound())

    def fail(*_: object) -> None:
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr("peel_plugins.formats.dcp.folder.read_into", fail)
        refuses(folder, "incomplete", r"^\.metadata cannot be read: Input/output error")
    assert FORMAT.inspect(LocalListing(folder)).state == "complete"


class TestTiling:
    def test_cuts_in_every_dimension(self) -> None:
        """A mesh of uneven boxes, in any order, tiles; with one of them moved, doubled or missing it does not."""
        cuts = ([0, 3, 4, 10], [0, 5, 6], [0, 7])
        boxes = [
            ((x, y, z), (to_x - x, to_y - y, to_z - z))
            for x, to_x in zip(cuts[0], cuts[0][1:], strict=False)
            for y, to_y in zip(cuts[1], cuts[1][1:], strict=False)
            for z, to_z in zip(cuts[2], cuts[2][1:], strict=False)
        ]
        for order in (boxes, boxes[::-1]):
            assert check_tiling((10, 6, 7), order) is None
        assert "a gap" in str(check_tiling((10, 6, 7), boxes[1:]))
        assert "overlap" in str(check_tiling((10, 6, 7), [*boxes, boxes[2]]))
        moved = ((boxes[0][0][0] + 1, 0, 0), boxes[0][1])
        assert "overlap" in str(check_tiling((10, 6, 7), [moved, *boxes[1:]]))

    def test_a_number_and_nothing(self) -> None:
        """One number is tiled by one box without dimensions, an empty tensor by none."""
        assert check_tiling((), [((), ())]) is None
        assert "overlap" in str(check_tiling((), [((), ()), ((), ())]))
        assert "a gap" in str(check_tiling((), []))
        assert check_tiling((0, 3), []) is None

    def test_a_swarm_side_by_side_is_given_up(self) -> None:
        """Many boxes in two dimensions, for which the check takes long, are refused; many in one, or on a mesh, not."""
        side = 100
        boxes = [((x, y), (1, 1)) for x in range(side) for y in range(side)]
        assert "too many side by side" in str(check_tiling((side, side), boxes))
        rows = [((x, 0), (1, side)) for x in range(100_000)]
        assert check_tiling((100_000, side), rows) is None
        mesh = [((x, 8 * y), (1, 8)) for x in range(512) for y in range(16)]
        assert check_tiling((512, 128), mesh) is None


# ---------------------------------------------------------------- links and hostile shards


def test_a_shard_that_is_a_link_out(tmp_path: Path) -> None:
    """A shard or .metadata that is a link out of the checkpoint is refused by name."""
    folder = folder_of(tmp_path, sound())
    for name in ("__0_0.distcp", ".metadata"):
        (folder / name).rename(tmp_path / "outside")
        (folder / name).symlink_to(tmp_path / "outside")
        error = refuses(folder, "damaged", f"{name} is a link to .*outside, outside")
        assert "cp -rL" in error.remedy
        (folder / name).unlink()
        (tmp_path / "outside").rename(folder / name)


def test_a_pipe_in_a_shard_s_place(tmp_path: Path) -> None:
    """A named pipe is refused and does not hold the reader."""
    folder = folder_of(tmp_path, sound())
    (folder / "__0_0.distcp").unlink()
    os.mkfifo(folder / "__0_0.distcp")
    refuses(folder, "damaged", r"__0_0\.distcp is not a regular file")


def rezipped(*, compression: int = zipfile.ZIP_STORED, **members: bytes | None) -> bytes:
    """ITEM with members replaced, added (`data_1` is data/1) or left out."""
    stream = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(ITEM)) as old, zipfile.ZipFile(stream, "w", compression) as new:
        contents = {name: old.read(name) for name in old.namelist()}
        for name, content in members.items():
            key = "archive/" + {"pickle": "data.pkl", "byteorder": "byteorder"}.get(name, name.replace("_", "/"))
            contents[key] = content
        for name, content in contents.items():
            if content is not None:
                new.writestr(name, content)
    return stream.getvalue()


def tensor_pickle(old: bytes, new: bytes) -> bytes:
    with zipfile.ZipFile(io.BytesIO(ITEM)) as archive:
        content = archive.read("archive/data.pkl")
    assert old in content
    return content.replace(old, new)


def huge_directory() -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as new:
        for number in range(20_000):
            new.writestr(f"archive/{number}", b"")
    return stream.getvalue()


def lying_directory() -> bytes:
    """ITEM whose zip directory says that the numbers begin elsewhere, at the start of another file's header."""
    place = ITEM.rindex(b"PK\x01\x02", 0, ITEM.index(b"archive/data/0", ITEM.index(b"PK\x01\x02")))
    return ITEM[: place + 42] + struct.pack("<I", len(ITEM) * 2) + ITEM[place + 46 :]


SIZES, STRIDES = b"K\x02K\x03\x86", b"K\x03K\x01\x86"
SHARDS: Mapping[str, tuple[Callable[[], bytes], str]] = {
    "zeros": (lambda: bytes(len(ITEM)), "it is no zip archive, as torch.save writes"),
    "garbage": (lambda: os.urandom(len(ITEM)), "it is no zip archive, as torch.save writes"),
    "safetensors": (lambda: json.dumps({"w": {}}).encode() + bytes(500), "it is no zip archive, as torch.save"),
    "cut inside": (lambda: ITEM[: len(ITEM) // 2] + bytes(len(ITEM) // 2), "lacks the zip directory"),
    "compressed": (lambda: rezipped(compression=zipfile.ZIP_DEFLATED), "compressed or encrypted"),
    "no pickle": (lambda: rezipped(pickle=None), "has 0 members data.pkl"),
    "no numbers": (lambda: rezipped(data_0=None), "has no `data/0`, a storage that its data.pkl uses"),
    "too few numbers": (lambda: rezipped(data_0=bytes(20)), "has 20 bytes of `data/0` where its data.pkl says 24"),
    "too many numbers": (lambda: rezipped(data_0=bytes(28)), "has 28 bytes of `data/0` where its data.pkl says 24"),
    "big-endian": (lambda: rezipped(byteorder=b"big"), "big-endian"),
    "a long pickle": (
        lambda: rezipped(pickle=bytes(2**20 + 1)),
        "has 1,048,577 bytes of `data.pkl`, more than the 1,048,576",
    ),
    "huge directory": (huge_directory, "in a directory of 1,168,890 bytes; 1,048,576 are read"),
    "lying directory": (lying_directory, "has `archive/data/0` reach beyond byte"),
    "another dtype": (lambda: saved(torch.zeros(2, 3, dtype=torch.int32)), "holds int32 where .metadata says float32"),
    "another size": (lambda: saved(torch.zeros(3, 2)), r"holds another size than the \(2, 3\) of .metadata"),
    "a dict": (lambda: saved({"w": torch.zeros(2, 3)}), "is a Table, not a tensor"),
    "a parameter": (
        lambda: saved(torch.nn.Parameter(torch.zeros(2, 3))),
        "names torch._utils._rebuild_parameter, which is no part of it",
    ),
    "a view": (
        lambda: saved(torch.zeros(3, 3)[1:]),
        "an offset or a storage by which its numbers are not side by side",
    ),
    "one number for all": (lambda: rezipped(pickle=tensor_pickle(STRIDES, b"K\x00K\x00\x86")), "not side by side"),
    "strides beyond": (
        lambda: rezipped(pickle=tensor_pickle(STRIDES, b"M\xff\xffK\x01\x86")),
        "up to 65,538 in a storage of 6",
    ),
    "negative strides": (
        lambda: rezipped(pickle=tensor_pickle(STRIDES, b"J\xff\xff\xff\xffK\x01\x86")),
        "has strides that",
    ),
    "no storage": (lambda: rezipped(pickle=tensor_pickle(b"Q", b"")), "is a tensor without a storage"),
    "os.system": (
        lambda: rezipped(pickle=tensor_pickle(b"ctorch._utils\n_rebuild_tensor_v2\n", b"cos\nsystem\n")),
        r"data\.pkl names os\.system, which is no part of it",
    ),
    "os.system as a storage": (
        lambda: rezipped(pickle=tensor_pickle(b"ctorch\nFloatStorage\n", b"cos\nsystem\n")),
        "names os.system",
    ),
    "os.system as a hook": (
        lambda: rezipped(pickle=tensor_pickle(b"ccollections\nOrderedDict\n", b"cos\nsystem\n")),
        "names os.system",
    ),
    "pickle cut": (lambda: rezipped(pickle=tensor_pickle(b"", b"")[:-1]), "data.pkl ends after"),
}


@pytest.mark.parametrize("name", SHARDS)
def test_a_hostile_shard(name: str, tmp_path: Path) -> None:
    """A shard whose bytes are not the tensor that .metadata says is refused when it is read, with file and place."""
    make, reason = SHARDS[name]
    item = make()
    folder = folder_of(tmp_path, changed(info__length=len(item)), item)
    weights = FORMAT.open(CheckpointRef(folder, None, "dcp", "unchecked", 0.0))
    with pytest.raises(CheckpointError, match=reason) as caught:
        weights.read("w")
    assert not isinstance(caught.value, TornCheckpoint | IncompleteCheckpoint)
    assert caught.value.what.startswith("__0_0.distcp, ")
    assert caught.value.remedy


def test_old_shards_without_byteorder(tmp_path: Path) -> None:
    """What releases of torch before 2.1 wrote, which do not say the byte order, is read."""
    item = rezipped(byteorder=None)
    folder = folder_of(tmp_path, changed(info__length=len(item)), item)
    assert torch.equal(FORMAT.open(reference(folder)).read("w"), torch.zeros(2, 3))


def test_old_metadata_words(tmp_path: Path) -> None:
    """TensorProperties under the module of older releases of torch is read."""
    from torch.distributed._shard.sharded_tensor.metadata import TensorProperties as Older

    folder = folder_of(tmp_path, changed(tensor__properties=Older(), root__planner_data=OrderedDict()))
    assert torch.equal(FORMAT.open(reference(folder)).read("w"), torch.zeros(2, 3))


def test_an_unknown_name_is_refused(tmp_path: Path) -> None:
    """The optimizer's entries are not handed out, nor is the stored name with its prefix."""
    weights = FORMAT.open(reference(folder_of(tmp_path, sound())))
    for name in ("optim.step", "model.w"):
        with pytest.raises(CheckpointError, match=f"has no tensor `{name}`"):
            weights.read(name)
