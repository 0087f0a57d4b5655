"""The format `declined`: what it knows by names, what it says, and that it takes nothing that another format reads.

NeMo, Orbax, TensorFlow and the like are not installed here: their folders are laid out by hand, after their sources
(Orbax's and Flax's after what orbax-checkpoint 0.11 and flax 0.12 wrote).
"""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp

from peel_agent import registry
from peel_agent.errors import CheckpointError, IncompleteCheckpoint
from peel_agent.pipeline import locate
from peel_agent.records import CheckpointRef, LocalListing
from peel_agent.watch import scan
from peel_plugins.formats.declined.format import FORMAT, KINDS
from tests import zoo

LEVANTER = json.dumps({"step": 100, "timestamp": "2026-11-24T12:00:00", "is_temporary": False})


def lay_out(path: Path, *files: str, **texts: str) -> Path:
    """Makes a folder with empty files, or a file where none is named; `texts` have dots as two underscores."""
    for file in files:
        (path / file).parent.mkdir(parents=True, exist_ok=True)
        (path / file).touch()
    path.mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        (path / name.replace("__", ".")).write_text(text)
    return path


def single(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"something")
    return path


ORBAX = ("_METADATA", "_sharding", "manifest.ocdbt", "d/0a2d", "ocdbt.process_0/manifest.ocdbt", "array_metadatas/p0")
NEMO_2 = ("weights/.metadata", "weights/__0_0.distcp", "weights/metadata.json", "context/model.yaml", "context/io.json")
TF = ("checkpoint", "model.ckpt-100.index", "model.ckpt-100.data-00000-of-00001", "model.ckpt-100.meta")

DECLINED: dict[str, tuple[Callable[[Path], Path], str, str]] = {
    "NeMo 1": (lambda root: single(root / "gpt.nemo"), r"\.nemo archive of NeMo", r"convert_llama_nemo_to_hf\.py"),
    "NeMo 1, unpacked": (
        lambda root: lay_out(root / "gpt", "model_config.yaml", "model_weights/metadata.json"),
        "archive of NeMo, or one unpacked",
        r"convert_llama_nemo_to_hf\.py",
    ),
    "NeMo 2": (
        lambda root: lay_out(root / "llama--step=99", *NEMO_2),
        "a checkpoint of NeMo 2",
        r'llm\.export_ckpt\(path=FOLDER, target="hf", output_path=NEW\); or .*weights/',
    ),
    "Megatron-LM": (
        lambda root: lay_out(root / "iter_0000100", "mp_rank_00/model_optim_rng.pt", "mp_rank_01/model_optim_rng.pt"),
        "Megatron-LM's older layout",
        "--ckpt-convert-format torch_dist --ckpt-convert-save",
    ),
    "Megatron-LM, pipeline": (
        lambda root: lay_out(root / "release", "mp_rank_00_000/model_optim_rng.pt", "mp_rank_00_001/distrib_optim.pt"),
        "Megatron-LM's older layout",
        "--ckpt-convert-format torch_dist",
    ),
    "LitGPT": (
        lambda root: lay_out(root / "step-500", "lit_model.pth", "model_config.yaml", "hyperparameters.yaml"),
        "a checkpoint of LitGPT",
        "litgpt convert_from_litgpt FOLDER NEW",
    ),
    "Meta": (
        lambda root: lay_out(root / "7B", "consolidated.00.pth", "params.json", "checklist.chk"),
        r"layout of Meta or Mistral",
        r"convert_llama_weights_to_hf\.py",
    ),
    "Mistral": (
        lambda root: lay_out(root / "checkpoint-9", "consolidated.safetensors", "params.json", "tekken.json"),
        r"layout of Meta or Mistral",
        r"convert_mistral_weights_to_hf\.py",
    ),
    "torchtune": (
        lambda root: lay_out(root / "out", "hf_model_0001_0.pt", "hf_model_0002_0.pt", "recipe_state.pt"),
        "files of torchtune",
        "FullModelHFCheckpointer",
    ),
    "FSDP, one file a rank": (
        lambda root: lay_out(root / "checkpoint-8", "pytorch_model_fsdp_rank0.bin", "pytorch_model_fsdp_rank1.bin"),
        r"one a rank \(FSDP's LOCAL_STATE_DICT\)",
        "SHARDED_STATE_DICT or FULL_STATE_DICT",
    ),
    "MLX": (lambda root: lay_out(root / "mlx", "weights.npz", "config.json"), "weights of MLX", r"mlx_lm\.convert"),
    "MLX, an adapter": (
        lambda root: lay_out(
            root / "adapters", "adapters.safetensors", "adapter_config.json", "0000100_adapters.safetensors"
        ),
        "an adapter of MLX",
        r"mlx_lm\.fuse",
    ),
    "Levanter": (
        lambda root: lay_out(root / "step-100", "model/transformer/.zarray", metadata__json=LEVANTER),
        "of Levanter",
        r"levanter\.main\.export_lm_to_hf",
    ),
    "Levanter, ocdbt": (
        lambda root: lay_out(root / "step-100", "manifest.ocdbt", "d/0", metadata__json=LEVANTER),
        "of Levanter",
        r"levanter\.main\.export_lm_to_hf",
    ),
    "Orbax, a step": (
        lambda root: lay_out(root / "100", "_CHECKPOINT_METADATA", "commit_success.txt", "default/manifest.ocdbt"),
        r"of Orbax \(JAX, Flax, MaxText\)",
        r"to_huggingface\.py",
    ),
    "Orbax, an item": (lambda root: lay_out(root / "default", *ORBAX), "of Orbax", r"safetensors\.flax\.save_file"),
    "Orbax, aggregated": (lambda root: lay_out(root / "100", "_METADATA", "checkpoint"), "of Orbax", "to_huggingface"),
    "Flax, a folder": (
        lambda root: lay_out(root / "checkpoint_100", "checkpoint"),
        "msgpack checkpoint of Flax",
        "flax",
    ),
    "Flax, a file": (lambda root: single(root / "checkpoint_100"), "msgpack checkpoint of Flax", "safetensors"),
    "Flax for transformers": (
        lambda root: lay_out(root / "out", "flax_model.msgpack", "config.json", "tokenizer.json"),
        "weights of Flax for transformers",
        "transformers below 5: from_pretrained.*from_flax=True",
    ),
    "Flax for transformers, sharded": (
        lambda root: lay_out(root / "out", "flax_model.msgpack.index.json", "flax_model-00001-of-00002.msgpack"),
        "weights of Flax for transformers",
        "from_flax=True",
    ),
    "Keras for transformers": (
        lambda root: lay_out(root / "out", "tf_model.h5", "config.json"),
        r"tf_model\.h5",
        "from_tf=True",
    ),
    "TensorFlow": (lambda root: lay_out(root / "run", *TF), r"of TensorFlow \(\.index and \.data\)", "from_tf=True"),
    "Keras": (lambda root: single(root / "model.weights.h5"), "a file of Keras", r"safetensors\.numpy\.save_file"),
    "Keras 3": (lambda root: single(root / "epoch-3.keras"), "a file of Keras", "load it with keras"),
    "HDF5": (lambda root: single(root / "best_model.hdf5"), "a file of Keras", "load it with keras"),
    "GGUF": (lambda root: single(root / "model-Q4_K_M.gguf"), r"GGUF file of llama\.cpp", "gguf_file=NAME"),
    "ONNX": (lambda root: single(root / "model.onnx"), "an ONNX graph", "the checkpoint that it was exported from"),
}


def reader_of(path: Path) -> str | None:
    """The name of the format that has a path."""
    winner = registry.claimed(LocalListing(path), registry.formats())
    return None if winner is None else winner[0].name


@pytest.mark.parametrize("name", DECLINED)
def test_declined_by_name(name: str, tmp_path: Path) -> None:
    """Each is recognised, damaged with its producer and a way out in the reason, and open says the same."""
    make, producer, way_out = DECLINED[name]
    path = make(tmp_path)
    assert reader_of(path) == "declined"
    readiness = FORMAT.inspect(LocalListing(path))
    assert readiness.state == "damaged"
    with pytest.raises(CheckpointError, match=producer) as caught:
        FORMAT.open(CheckpointRef(path, None, "declined", "unchecked", 0.0))
    assert not isinstance(caught.value, IncompleteCheckpoint)
    assert caught.value.what.startswith(path.name)
    assert (readiness.reason, readiness.remedy) == (caught.value.what, caught.value.remedy)
    with pytest.raises(CheckpointError, match=way_out):
        locate(path)


def test_every_kind_is_tested(tmp_path: Path) -> None:
    """Every kind that is declined has a folder or a file in these tests, and only one kind fits it."""
    seen = set()
    for number, (make, _, _) in enumerate(DECLINED.values()):
        path = make(tmp_path / str(number))
        seen.add(next(kind.what for kind in KINDS if kind.fits(LocalListing(path))))
    assert seen == {kind.what for kind in KINDS}


# ---------------------------------------------------------------- what others read, and what is no checkpoint


def trainer(root: Path) -> Path:
    return zoo.save(zoo.build("llama", steps=0), root, step=4)


def pretrained(root: Path) -> Path:
    return zoo.save(zoo.build("llama", steps=0), root / "out")


def saved(root: Path, name: str) -> Path:
    model = zoo.build("gpt2", steps=0)
    model.config.save_pretrained(root)
    torch.save({"state": {"model": model.state_dict()}, "model": model.state_dict()}, root / name)
    return root / name


def distributed(root: Path) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that torch.distributed is not initialised
        dcp.save({"state": {"model": {"w": torch.zeros(2)}}}, checkpoint_id=root / "ep0-ba10")
    return root / "ep0-ba10"


OTHERS = ("flax_model.msgpack", "tf_model.h5", "model.onnx", *TF, "_METADATA", "manifest.ocdbt")
READ: dict[str, tuple[Callable[[Path], Path], str]] = {
    "Trainer": (trainer, "transformers"),
    "save_pretrained": (pretrained, "safetensors"),
    "Composer's .pt": (lambda root: saved(root, "ep0-ba10-rank0.pt"), "torch"),
    "Lightning's .ckpt": (lambda root: saved(root, "epoch=0-step=10.ckpt"), "torch"),
    "Composer, sharded": (distributed, "dcp"),
    "DeepSpeed": (
        lambda root: lay_out(root / "global_step10", "mp_rank_00_model_states.pt", "zero_pp_rank_0_optim_states.pt"),
        "deepspeed",
    ),
    "Megatron-core": (
        lambda root: lay_out(root / "iter_0000100", "common.pt", "__0_0.distcp", ".metadata"),
        "megatron",
    ),
}


@pytest.mark.parametrize("name", READ)
def test_what_another_format_reads_is_left_to_it(name: str, tmp_path: Path) -> None:
    """A checkpoint that another format recognises is its own, also when files of Flax, TensorFlow or ONNX are in it."""
    make, reader = READ[name]
    path = make(tmp_path)
    for _ in range(2):
        assert reader_of(path) == reader
        if path.is_dir():
            lay_out(path, *OTHERS)
            (path.with_name(f"{path.name}-unfinished")).touch()


ORDINARY = {
    "tensorboard": ("events.out.tfevents.1700000000.host.1.0", "version_0/hparams.yaml"),
    "tokenizer": ("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "special_tokens_map.json"),
    "wandb": ("run-abc.wandb", "files/config.yaml", "files/wandb-metadata.json", "logs/debug.log"),
    "mlflow": ("meta.yaml", "metrics/loss", "params/lr", "tags/name", "artifacts/model/MLmodel"),
    "logs": ("train.log", "metadata.json", "config.yaml", "checkpoints.txt", "latest_checkpointed_iteration.txt"),
    "data": ("train.h5", "tokens.hdf5", "train.bin", "index.json", "words.index", "other.data-00000-of-00001"),
    "sources": ("model.py", "weights.py", "context/a.py", "setup.py", ".git/index"),
    "hydra": (".hydra/config.yaml", "context/x", "model/notes.txt"),
    "a run of DeepSpeed": ("latest", "zero_to_fp32.py", "global_step10/mp_rank_00_model_states.pt"),
    "nothing": (),
}


@pytest.mark.parametrize("name", ORDINARY)
def test_ordinary_folders_are_not_taken(name: str, tmp_path: Path) -> None:
    """Logs, tokenizers, data and sources are no checkpoints, neither the folder nor anything in it."""
    path = lay_out(tmp_path / name.replace(" ", "-"), *ORDINARY[name])
    assert not FORMAT.claim(LocalListing(path))
    assert scan(path, (FORMAT,)) == ()


def test_metadata_of_something_else_is_no_levanter(tmp_path: Path) -> None:
    """A metadata.json without Levanter's step and timestamp, or none that parses, is nobody's."""
    for text in ('{"step": 3}', "[]", "{", "null"):
        assert not FORMAT.claim(LocalListing(lay_out(tmp_path / "some", "model/x", metadata__json=text)))


# ---------------------------------------------------------------- still being written, gone


def test_orbax_is_still_writing(tmp_path: Path) -> None:
    """A folder of Orbax's temporary name is incomplete, and damaged under its final one."""
    for name in ("100.orbax-checkpoint-tmp", "100.orbax-checkpoint-tmp-1700000000"):
        path = lay_out(tmp_path / name, "default/d/0a2d")
        assert FORMAT.claim(LocalListing(path))
        readiness = FORMAT.inspect(LocalListing(path))
        assert readiness.state == "incomplete"
        assert readiness.reason == f"{name} is Orbax's name for one that is still being written"
        with pytest.raises(IncompleteCheckpoint, match="Orbax's name"):
            FORMAT.open(CheckpointRef(path, None, "declined", "unchecked", 0.0))
    (path / "_CHECKPOINT_METADATA").touch()
    assert FORMAT.inspect(LocalListing(path.rename(tmp_path / "100"))).state == "damaged"


def test_nemo_is_still_writing(tmp_path: Path) -> None:
    """A folder, begun or not, with NeMo's mark beside it is incomplete by the mark's name, and damaged without."""
    mark = tmp_path / "llama--step=99-unfinished"
    mark.touch()
    path = lay_out(tmp_path / "llama--step=99", "weights/common.pt")
    for _ in range(2):
        assert FORMAT.claim(LocalListing(path))
        readiness = FORMAT.inspect(LocalListing(path))
        assert readiness.state == "incomplete"
        assert readiness.reason == f"{mark.name} is there: NeMo is still writing, or was stopped"
        lay_out(path, *NEMO_2)
    mark.unlink()
    assert FORMAT.inspect(LocalListing(path)).state == "damaged"
    single(tmp_path / "gpt.nemo")
    (tmp_path / "gpt-unfinished").touch()
    assert FORMAT.inspect(LocalListing(tmp_path / "gpt.nemo")).state == "incomplete"


def test_a_mark_alone_is_nothing(tmp_path: Path) -> None:
    """NeMo's mark, the folder it is in, and a folder whose mark is a folder are no checkpoints."""
    (tmp_path / "llama-unfinished").touch()
    lay_out(tmp_path / "other-unfinished", "x")
    lay_out(tmp_path / "other", "y")
    assert scan(tmp_path, (FORMAT,)) == ()


def test_progress_shows(tmp_path: Path) -> None:
    """While it is written, what is there is stamped, so that something that changes is not given up."""
    path = lay_out(tmp_path / "100.orbax-checkpoint-tmp", "_METADATA")
    assert [stamp.name for stamp in FORMAT.inspect(LocalListing(path)).files] == ["_METADATA"]


@pytest.mark.parametrize("name", ["gone", "gone.nemo", "gone.gguf", "gone.orbax-checkpoint-tmp", "mp_rank_00"])
def test_what_vanished_is_incomplete(name: str, tmp_path: Path) -> None:
    """A path that is gone is incomplete, and no method raises but open."""
    path = tmp_path / name
    assert not FORMAT.claim(LocalListing(path))
    assert FORMAT.inspect(LocalListing(path)).state == "incomplete"
    assert FORMAT.step(LocalListing(path)) is None
    with pytest.raises(IncompleteCheckpoint, match="is gone"):
        FORMAT.open(CheckpointRef(path, None, "declined", "unchecked", 0.0))


@pytest.mark.parametrize(
    ("name", "step"), [("step-100", 100), ("100", 100), ("checkpoint_100", 100), ("model.gguf", None)]
)
def test_the_step_in_a_name(name: str, step: int | None) -> None:
    """The step is the number in the name, if one is there."""
    assert FORMAT.step(LocalListing(Path("runs") / name)) == step


def test_a_run_with_some_of_each(tmp_path: Path) -> None:
    """In a folder with an Orbax step, a GGUF export and logs, the first two are each reported with their reason."""
    lay_out(tmp_path / "100", "_CHECKPOINT_METADATA")
    single(tmp_path / "model.gguf")
    lay_out(tmp_path / "logs", "events.out.tfevents.1")
    states = {sighting.path.name: sighting.readiness.state for sighting in scan(tmp_path, registry.formats())}
    assert states == {"100": "damaged", "model.gguf": "damaged"}


def test_the_parent_imports_no_torch(tmp_path: Path) -> None:
    """Claim, inspect and step import no torch."""
    path = lay_out(tmp_path / "100", "_CHECKPOINT_METADATA")
    program = (
        "import sys, pathlib; from peel_plugins.formats.declined.format import FORMAT\n"
        "from peel_agent.records import LocalListing; listing = LocalListing(pathlib.Path(sys.argv[1]))\n"
        "FORMAT.claim(listing), FORMAT.inspect(listing), FORMAT.step(listing); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program, str(path)], check=False).returncode == 0
