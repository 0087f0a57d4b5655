"""The format `deepspeed`: the conformance kit on what two ranks of DeepSpeed really write, and hostile folders."""

from __future__ import annotations

import functools
import gc
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from peel_agent import registry
from peel_agent.errors import CheckpointError, IncompleteCheckpoint, TornCheckpoint
from peel_agent.load import open_snapshot
from peel_agent.records import CheckpointRef, LocalListing, Weights
from peel_agent.testing.formats import CHECKS, FormatCase, check_complete_once_written
from peel_agent.watch.scan import scan
from peel_plugins.formats.deepspeed import format as deepspeed_folder
from peel_plugins.formats.deepspeed import zero3 as deepspeed_zero3
from peel_plugins.formats.deepspeed.format import FORMAT
from peel_plugins.formats.files import held_files
from tests import servers

ENTRY = "peel_plugins.formats.deepspeed.format:FORMAT"
REPOSITORY = Path(__file__).parents[2]


# ---------------------------------------------------------------- what two processes write


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which two ranks wrote, once for all tests."""
    root = tmp_path_factory.mktemp("deepspeed")
    port = str(servers.free_port())
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    command = [sys.executable, "-m", "tests.contracts.deepspeed_producer"]
    ranks = [
        subprocess.Popen(
            [*command, rank, port, str(root)],
            cwd=REPOSITORY,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        for rank in ("0", "1")
    ]
    said = [rank.communicate(timeout=240)[0].decode() for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], "\n".join(said)[-5000:]
    return root


def copied(label: str, written: Path, path: Path, *, config: str = ".") -> Mapping[str, Tensor]:
    """Puts a checkpoint of the fixture to `path`, its config.json into `config`; returns what the engine held."""
    source = written / label
    shutil.copytree(source / ("checkpoint-3" if label == "trainer" else "global_step3"), path)
    if label != "trainer":
        shutil.copy(source / "config.json", path / config)
    held: Mapping[str, Tensor] = load_file(source / "held.safetensors")
    return held


CASES: Mapping[str, tuple[str, str, str]] = {  # folder, where config.json is, files with tensors
    "plain-0": ("global_step3", ".", "mp_rank_00_model_states.pt"),
    "plain-1": ("global_step3", "..", "mp_rank_00_model_states.pt"),
    "plain-2": ("global_step3", ".", "mp_rank_00_model_states.pt"),
    "plain-3": ("global_step3", ".", "*_states.pt"),
    "odd-2": ("global_step3", "..", "mp_rank_00_model_states.pt"),
    "odd-3": ("global_step3", "..", "*_states.pt"),
    "trainer": ("checkpoint-3", ".", "*/*_states.pt"),
}

# In a folder inside Trainer's, stamps are paths, where that one check wants file names: see below.
CHECKED = [(check, name) for check in CHECKS for name in CASES if (check, name) != (CHECKS[0], "trainer")]


@pytest.mark.parametrize(("check", "name"), CHECKED, ids=lambda part: getattr(part, "__name__", part))
def test_conformance(check: Callable[[FormatCase, Path], None], name: str, written: Path, tmp_path: Path) -> None:
    """Every check of the kit holds for what two ranks wrote in each stage, and the bits are those the engine held."""
    folder, config, weights = CASES[name]
    produce = functools.partial(copied, name, written, config=config)
    check(FormatCase(FORMAT, ENTRY, produce, folder, 3, weights), tmp_path)


def test_inside_a_trainer_s_folder(written: Path, tmp_path: Path) -> None:
    """Trainer's `checkpoint-3` with `global_step3` in it is one checkpoint, stamped by paths in it."""
    assert CHECKS[0] is check_complete_once_written
    path = tmp_path / "checkpoint-3"
    copied("trainer", written, path)
    assert FORMAT.claim(LocalListing(path))
    assert FORMAT.step(LocalListing(path)) == 3
    states = [f"zero_pp_rank_{rank}_mp_rank_00_{kind}_states.pt" for rank in (0, 1) for kind in ("model", "optim")]
    assert [stamp.name for stamp in reference(path).files] == [
        "config.json",
        *(f"global_step3/{name}" for name in states),
        "latest",
    ]


def test_what_the_fixture_wrote(written: Path) -> None:
    """The odd model has what is cut unevenly, frozen, tied and a buffer, in several groups; ranks have bfloat16."""
    held = load_file(written / "odd-3" / "held.safetensors")
    assert held["model.layers.1.mlp.up_proj.bias"].shape == (25,)
    assert torch.equal(held["lm_head.weight"], held["model.embed_tokens.weight"])
    assert held["counts"].tolist() == [3, 1, 4]
    assert {tensor.dtype for tensor in held.values()} == {torch.bfloat16, torch.int64}
    layout = deepspeed_folder._read(LocalListing(written / "odd-3" / "global_step3"))
    frozen = layout.tensors["model.layers.0.mlp.gate_proj.bias"]
    trained = layout.tensors["model.layers.1.mlp.gate_proj.bias"]
    assert [len(part.vectors) for part in trained.partitions] == [5, 5]  # type: ignore[union-attr]
    assert [part.ends for part in frozen.partitions] == [(13,), (13,)]  # type: ignore[union-attr]
    assert (trained.stored.dtype, trained.dtype, frozen.stored.dtype) == ("float32", "bfloat16", "bfloat16")


@pytest.mark.parametrize("label", ["plain-1", "plain-3", "trainer"])
def test_the_loader_builds_the_model(label: str, written: Path, tmp_path: Path) -> None:
    """The load room finds every weight of the model, and nothing else, in each kind of folder."""
    path = tmp_path / CASES[label][0]
    held = copied(label, written, path)
    snapshot = open_snapshot(reference(path), FORMAT, registry.family)
    assert snapshot.family == "llama"
    assert set(snapshot.weights.shapes()) == set(held)
    assert snapshot.precision == ("bfloat16" if label == "plain-1" else "float32")


def test_what_the_watch_room_sees(written: Path) -> None:
    """`global_stepN` beside `latest`, and Trainer's folders, are found once each, by this format, with their steps."""
    formats = registry.formats()
    for label, name in (("plain-2", "global_step3"), ("plain-3", "global_step3"), ("trainer", "checkpoint-3")):
        sightings = [sighting for sighting in scan(written / label, formats) if sighting.format == "deepspeed"]
        assert [(sighting.path.name, sighting.step) for sighting in sightings] == [(name, 3)]
        assert sightings[0].readiness.state == "complete"
    inside = scan(written / "trainer" / "checkpoint-3", formats)
    assert [(sighting.path.name, sighting.format) for sighting in inside] == [("checkpoint-3", "deepspeed")]


@pytest.mark.parametrize("label", ["plain-2", "odd-3", "trainer"])
def test_the_stamped_files_are_all_that_is_needed(label: str, written: Path, tmp_path: Path) -> None:
    """A copy of the stamped files alone, with a config.json above, is read bit for bit: nothing else is asked for."""
    path = tmp_path / "whole" / CASES[label][0]
    held = copied(label, written, path)
    ref = reference(path)
    for stamp in ref.files:
        target = tmp_path / "copy" / path.name / stamp.name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(path / stamp.name, target)
    shutil.copy(written / label / "config.json", tmp_path / "copy")
    weights = FORMAT.open(CheckpointRef(tmp_path / "copy" / path.name, 3, "deepspeed", "", 0.0, ref.files))
    assert all(torch.equal(weights.read(name), tensor) for name, tensor in held.items())


NEVER_OPENED: Mapping[str, set[str]] = {
    "plain-2": {"zero_pp_rank_0_mp_rank_00_optim_states.pt", "zero_pp_rank_1_mp_rank_00_optim_states.pt"},
    "plain-3": set(),
    "trainer": {
        *("scheduler.pt", "rng_state_0.pth", "rng_state_1.pth", "training_args.bin", "generation_config.json"),
        *("zero_to_fp32.py", "zero_to_torch.py"),
    },
}


@pytest.mark.parametrize("label", NEVER_OPENED)
def test_which_files_are_opened(label: str, written: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Claiming, inspecting and reading opens the files with weights and what says about them, and none besides."""
    path = tmp_path / CASES[label][0]
    held = copied(label, written, path)
    real, names = os.open, set()

    def noting(file: Any, *arguments: Any, **options: Any) -> int:
        names.add(Path(file).name)
        return real(file, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", noting)
        ref = reference(path)
        weights = FORMAT.open(ref)
        for name in held:
            weights.read(name)
    said = {"trainer_state.json"} if label == "trainer" else set()  # it tells the step, and is no part of the weights
    assert names == {Path(stamp.name).name for stamp in ref.files} | said
    assert {file.name for file in path.rglob("*") if file.is_file()} - names == NEVER_OPENED[label]


def test_a_tensor_is_read_without_its_neighbours(written: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the optimizer states the float32 numbers of the tensor asked for are read, no padding and no moments."""
    sizes = []
    real = os.preadv

    def counting(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        sizes.append(sum(len(buffer) for buffer in buffers))
        return real(descriptor, buffers, offset)

    weights = FORMAT.open(reference(written / "odd-3" / "global_step3"))
    monkeypatch.setattr(os, "preadv", counting)
    weights.read("model.layers.1.mlp.up_proj.bias")
    assert sizes == [13 * 4, 12 * 4]


def test_real_secondary_partitions_are_refused(written: Path) -> None:
    """A training with hpZ is refused by name, with the way out."""
    error = refuses(written / "hpz-3" / "global_step3", "damaged", r"ZeRO\+\+ with secondary partitions \(hpZ\)")
    assert "python zero_to_fp32.py" in error.remedy


# ---------------------------------------------------------------- a small saving of ZeRO 3, to be broken

W, V, F = torch.arange(6.0).reshape(2, 3), torch.arange(10.0, 15.0), torch.arange(20.0, 23.0).bfloat16()
GROUPS = ((W.view(-1)[:3], V[:3]), (W.view(-1)[3:], torch.cat([V[3:], torch.zeros(1)])))
FRAGMENTS = (F[:2].clone(), torch.cat([F[2:], torch.zeros(1).bfloat16()]))
MODEL, OPTIMIZER = "zero_pp_rank_{}_mp_rank_00_model_states.pt", "bf16_zero_pp_rank_{}_mp_rank_00_optim_states.pt"
M0, M1, O0, O1 = MODEL.format(0), MODEL.format(1), OPTIMIZER.format(0), OPTIMIZER.format(1)
PIECES = "mp_rank_00_model_states.pt"


def empty(dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(0, dtype=dtype)


def model_states(rank: int, **changes: Any) -> dict[str, Any]:
    """The model states of one of two ranks, to the layout of DeepSpeedEngine._save_checkpoint."""
    return {
        "module": {name: empty() for name in ("w", "v", "f", "tied")} | {"counts": torch.tensor([3, 1])},
        "buffer_names": ["counts"],
        "optimizer": None,
        "param_shapes": [{"w": torch.Size([2, 3])}, {"v": torch.Size([5])}],
        "frozen_param_shapes": {"f": torch.Size([3])},
        "frozen_param_fragments": {"f": FRAGMENTS[rank]},
        "shared_params": {"tied": "w"} if rank == 0 else {},
        "global_steps": 7,
        "dp_world_size": 2,
        "mp_world_size": 1,
        "checkpoint_parallel_dimensions": {"pp_degree": 1, "tp_degree": 1},
        "ds_config": {"zero_optimization": {"stage": 3}},
        **changes,
    }


def optimizer_states(rank: int, **changes: Any) -> dict[str, Any]:
    """The optimizer states of one of two ranks, to the layout of DeepSpeedZeroOptimizer_Stage3._rigid_state_dict."""
    moments = {0: {"exp_avg": torch.ones(6), "step": torch.tensor(7.0)}}
    states = {
        "zero_stage": 3,
        "partition_count": 2,
        "optimizer_state_dict": {"state": moments, "param_groups": [{"lr": 1e-3, "params": [0]}]},
        "fp32_flat_groups": [group.clone().requires_grad_() for group in GROUPS[rank]],
    }
    return {"optimizer_state_dict": states | changes, "ds_config": {}, "ds_version": "0.19.8"}


def saving(tmp_path: Path, name: str = "global_step7", **files: Any) -> Path:
    """A sound saving in the folder `name`; `files` replaces what is in M0, M1, O0 or O1, or leaves it out."""
    folder = tmp_path / name
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    sound = {"M0": model_states(0), "M1": model_states(1), "O0": optimizer_states(0), "O1": optimizer_states(1)}
    for key, content in (sound | files).items():
        if content is not None:
            torch.save(content, folder / {"M0": M0, "M1": M1, "O0": O0, "O1": O1}[key])
    return folder


def whole(tmp_path: Path, name: str = "global_step7", **changes: Any) -> Path:
    """A saving of ZeRO 2 without its optimizer states."""
    folder = tmp_path / name
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    torch.save(model_states(0, **{"module": {"w": W}, **changes}), folder / PIECES)
    return folder


def reference(path: Path) -> CheckpointRef:
    readiness = FORMAT.inspect(LocalListing(path))
    assert readiness.state == "complete", readiness.reason
    return CheckpointRef(path, FORMAT.step(LocalListing(path)), "deepspeed", "unchecked", 0.0, readiness.files)


def refuses(path: Path, state: str, reason: str) -> CheckpointError:
    """Asserts that both the look and the opening give this reason, and returns the error."""
    readiness = FORMAT.inspect(LocalListing(path))
    assert readiness.state == state, readiness.reason
    with pytest.raises(CheckpointError, match=reason) as caught:
        FORMAT.open(CheckpointRef(path, None, "deepspeed", "unchecked", 0.0))
    assert caught.value.what == readiness.reason
    assert isinstance(caught.value, IncompleteCheckpoint) == (state == "incomplete")
    assert caught.value.remedy
    return caught.value


def test_the_small_saving_is_sound(tmp_path: Path) -> None:
    """Written to the documented layout: what the broken ones are made from is whole and has the expected bits."""
    weights = FORMAT.open(reference(saving(tmp_path)))
    expected = {"w": W.bfloat16(), "v": V.bfloat16(), "f": F, "tied": W.bfloat16(), "counts": torch.tensor([3, 1])}
    assert weights.shapes() == {name: tuple(tensor.shape) for name, tensor in expected.items()}
    for name, tensor in expected.items():
        read = weights.read(name)
        assert read.dtype == tensor.dtype
        assert torch.equal(read, tensor), name


def test_flat_groups_cut_elsewhere(tmp_path: Path) -> None:
    """Written to the documented layout: a weight that lies in two flat groups is read, as zero_to_fp32.py reads it."""
    cut = []
    for rank in (0, 1):
        flat = torch.cat(GROUPS[rank])
        cut.append(optimizer_states(rank, fp32_flat_groups=[flat[:1], flat[1:1], flat[1:5], flat[5:]]))
    weights = FORMAT.open(reference(saving(tmp_path, O0=cut[0], O1=cut[1])))
    assert weights.read("w").float().tolist() == W.tolist()
    assert weights.read("v").float().tolist() == V.tolist()


def test_a_model_in_float32_and_one_that_does_not_say(tmp_path: Path) -> None:
    """Written to the documented layout: masters are rounded only where the module's state dict names another dtype."""
    fine = torch.tensor([1 + 2**-20, 2.0, 3.0])
    first = optimizer_states(0, fp32_flat_groups=[fine, GROUPS[0][1]])
    module = {"v": empty(torch.float32), "f": empty()}
    weights = FORMAT.open(reference(saving(tmp_path, M0=model_states(0, module=module), O0=first)))
    assert weights.read("w").view(-1)[0].item() == 1 + 2**-20
    assert weights.read("v").dtype == torch.float32
    module = {"w": empty(torch.float16), "f": empty()}
    weights = FORMAT.open(reference(saving(tmp_path / "half", M0=model_states(0, module=module), O0=first)))
    assert torch.equal(weights.read("w").view(-1)[:3], fine.half())


def test_a_weight_without_numbers_and_a_scalar(tmp_path: Path) -> None:
    """Written to the documented layout: shapes () and (0, 3) are put together like any other."""
    shapes = [{"w": torch.Size([2, 3]), "one": torch.Size([])}, {"v": torch.Size([5])}]
    frozen = {"frozen_param_shapes": {"none": torch.Size([0, 3])}, "frozen_param_fragments": {"none": empty()}}
    states = [model_states(rank, param_shapes=shapes, module={}, **frozen) for rank in (0, 1)]
    groups = [[torch.cat([GROUPS[rank][0], torch.tensor([8.0 - rank])]), GROUPS[rank][1]] for rank in (0, 1)]
    optimizers = [optimizer_states(rank, fp32_flat_groups=groups[rank]) for rank in (0, 1)]
    folder = saving(tmp_path, M0=states[0], M1=states[1], O0=optimizers[0], O1=optimizers[1])
    weights = FORMAT.open(reference(folder))
    assert weights.read("one").item() == 8.0
    assert weights.read("none").shape == (0, 3)
    assert weights.read("v").tolist() == V.tolist()


# ---------------------------------------------------------------- names, places, steps


class TestRecognition:
    @pytest.mark.parametrize(
        ("path", "files", "by"),
        [
            ("global_step5", [PIECES], "deepspeed"),
            ("global_step5", [M0], "deepspeed"),
            ("global_step5", [O1], "deepspeed"),
            ("epoch-3", [PIECES], "deepspeed"),
            ("checkpoint-5", [PIECES], "deepspeed"),
            ("global_step5", ["layer_00-model_00-model_states.pt"], "deepspeed"),
            ("global_step5", ["layer_0_expert_3_mp_rank_00_model_states.pt"], "deepspeed"),
            ("checkpoint-5", [f"global_step5/{M0}", "latest"], "deepspeed"),
            ("checkpoint-5", [f"global_step5/{M0}"], "deepspeed"),
            ("checkpoint-5", ["latest"], "deepspeed"),
            ("checkpoint-5", [f"global_step5/{PIECES}", "latest", "model.safetensors"], "transformers"),
            ("checkpoint-5", [f"global_step5/{PIECES}", "latest", "model-00001-of-00002.safetensors"], "transformers"),
            ("checkpoint-5", [f"global_step5/{PIECES}", "latest", "pytorch_model.bin"], "torch"),
            ("checkpoint-5", ["config.json"], "transformers"),
            ("epoch=1-step=5.ckpt", [f"checkpoint/{PIECES}", "latest"], "deepspeed"),
            ("checkpoint_5", [f"pytorch_model/{M0}"], "deepspeed"),
            ("checkpoint_5", [f"pytorch_model/{M0}", "model.safetensors"], "safetensors"),
            ("global_step5", [PIECES, "model.safetensors", "config.json"], "safetensors"),
            ("global_step5", ["mp_rank_00/model_optim_rng.pt"], None),
            ("global_step5", ["config.json"], None),
            ("run", ["latest", f"global_step5/{M0}"], None),
        ],
    )
    def test_by_names(self, path: str, files: list[str], by: str | None, tmp_path: Path) -> None:
        """A folder of states, or of Trainer, Lightning or Accelerate with one in it, unless it has other weights."""
        for file in files:
            (tmp_path / path / file).parent.mkdir(exist_ok=True, parents=True)
            (tmp_path / path / file).touch()
        assert (FORMAT.claim(LocalListing(tmp_path / path)) is not None) == (by == "deepspeed")
        names = ("deepspeed", "safetensors", "torch", "transformers")
        formats = [form for form in registry.formats() if form.name in names]
        claimants = [form.name for form in formats if form.claim(LocalListing(tmp_path / path))]
        assert claimants[:1] == ([by] if by else [])

    def test_what_is_inside_another_s_folder_is_part_of_it(self, tmp_path: Path) -> None:
        """The states inside a folder that is a checkpoint are not a second one."""
        for path in ("checkpoint-5/global_step5", "x.ckpt/checkpoint", "checkpoint_0/pytorch_model"):
            assert not FORMAT.claim(LocalListing(saving(tmp_path, path)))

    def test_what_is_not_there(self, tmp_path: Path) -> None:
        """A path that vanished, or is a file, is no checkpoint; the rest does not raise."""
        (tmp_path / "file").touch()
        for name in ("gone", "file", "checkpoint-5"):
            assert not FORMAT.claim(LocalListing(tmp_path / name))
            assert FORMAT.step(LocalListing(tmp_path / name)) is None
            assert FORMAT.inspect(LocalListing(tmp_path / name)).state == "incomplete"


@pytest.mark.parametrize(
    ("stored", "read"),
    [
        (("module.model.w", "module.lm_head.weight"), {"model.w", "lm_head.weight"}),
        (("_orig_mod.model.w", "_orig_mod.lm_head.weight"), {"model.w", "lm_head.weight"}),
        (("module._orig_mod.a", "module._orig_mod.b"), {"a", "b"}),
        (("model.w", "lm_head.weight"), {"model.w", "lm_head.weight"}),
    ],
)
def test_prefixes(stored: tuple[str, str], read: set[str], tmp_path: Path) -> None:
    """Written to the documented layout: wrappers' prefixes are stripped as the format `torch` does, in ZeRO 2 and 3."""
    first, second = stored
    folder = whole(tmp_path)
    torch.save(model_states(0, module=dict.fromkeys(stored, W)), folder / PIECES)
    assert set(FORMAT.open(reference(folder)).shapes()) == read
    changes: dict[str, Any] = {
        "module": {},
        "param_shapes": [{first: torch.Size([2, 3]), second: torch.Size([5])}],
        "shared_params": {},
        "frozen_param_shapes": {},
    }
    folder = saving(tmp_path, "global_step8", M0=model_states(0, **changes), M1=model_states(1, **changes))
    assert set(FORMAT.open(reference(folder)).shapes()) == read


def test_the_step(tmp_path: Path) -> None:
    """The step is the number in the name, and under any other name DeepSpeed's own count; one that is none is None."""
    assert FORMAT.step(LocalListing(whole(tmp_path, "global_step12"))) == 12
    assert FORMAT.step(LocalListing(saving(tmp_path, "epoch-1"))) == 7
    assert FORMAT.step(LocalListing(whole(tmp_path, "best"))) == 7
    for count, odd in enumerate(("7", -1, True, 2**70, None)):
        assert FORMAT.step(LocalListing(whole(tmp_path, f"odd{count}", global_steps=odd))) is None


@pytest.mark.parametrize("name", ["epoch=1-step=9.ckpt/checkpoint", "checkpoint_4/pytorch_model"])
def test_lightning_s_and_accelerate_s_folders(name: str, tmp_path: Path) -> None:
    """Written to the documented layout: the folder around the states is the checkpoint; the step is DeepSpeed's count.

    What Lightning calls `model.` is stripped where it is a wrapper.
    """
    folder = saving(tmp_path, name).parent
    module = {"model.model.w": W, "model.lm_head.weight": W}
    for file in (M0, M1, O0, O1, "config.json"):
        (tmp_path / name / file).unlink()
    torch.save(model_states(0, module=module), tmp_path / name / PIECES)
    assert FORMAT.claim(LocalListing(folder))
    refuses(folder, "incomplete", r"config\.json is not there: the model cannot be built")
    (folder / "config.json").write_text("{}")
    assert FORMAT.step(LocalListing(folder)) == 7
    assert set(FORMAT.open(reference(folder)).shapes()) == {"model.w", "lm_head.weight"}


def trainer_folder(tmp_path: Path) -> Path:
    """A Trainer's folder around the small saving."""
    folder = saving(tmp_path, "checkpoint-7/global_step7").parent
    (folder / "global_step7" / "config.json").rename(folder / "config.json")
    (folder / "latest").write_text("global_step7")
    (folder / "trainer_state.json").write_text('{"global_step": 7}')
    assert FORMAT.inspect(LocalListing(folder)).state == "complete"
    return folder


@pytest.mark.parametrize(
    ("file", "content", "state", "reason"),
    [
        ("latest", None, "incomplete", "latest is not there"),
        ("latest", "", "incomplete", "latest is empty"),
        ("latest", "global_step14", "incomplete", "latest names the folder global_step14, which is not there"),
        ("latest", "../other", "damaged", r"latest holds '\.\./other', which is not the name of a folder"),
        ("latest", "/etc", "damaged", "latest holds '/etc'"),
        ("latest", "..", "damaged", r"latest holds '\.\.'"),
        ("latest", "a\x1b[31m", "damaged", r"latest holds 'a\\x1b\[31m'"),
        ("latest", "x" * 10_000, "damaged", "latest holds 'xxx"),
        ("training_args.bin", "", "incomplete", r"trainer_state\.json is not there"),
        ("trainer_state.json", '{"global_step": 8}', "damaged", "says global_step 8 in checkpoint-7"),
        ("checkpoint-is-incomplete.txt", "", "incomplete", r"checkpoint-is-incomplete\.txt is there"),
        ("config.json", None, "incomplete", r"config\.json is not there: the model cannot be built"),
        ("config.json", "[]", "damaged", r"config\.json holds a JSON list, not an object"),
    ],
)
def test_a_faulty_trainer_s_folder(file: str, content: str | None, state: str, reason: str, tmp_path: Path) -> None:
    """What Trainer may still write is incomplete; a `latest` that leads elsewhere and another run's state are not."""
    folder = trainer_folder(tmp_path)
    if file == "training_args.bin":
        (folder / "trainer_state.json").unlink()
    if content is None:
        (folder / file).unlink()
    else:
        (folder / file).write_text(content)
    refuses(folder, state, reason)


# ---------------------------------------------------------------- layouts that are refused


@pytest.mark.parametrize(
    ("name", "reason", "way_out"),
    [
        ("mp_rank_01_model_states.pt", "mp_rank_01.* of another rank than mp_rank_00: .*tensor parallel", "conversion"),
        ("zero_pp_rank_0_mp_rank_03_model_states.pt", "mp_rank_03.*tensor parallelism", "conversion script"),
        ("layer_00-model_00-model_states.pt", "layers of one pipeline stage", "conversion script"),
        ("layer_0_expert_3_mp_rank_00_model_states.pt", r"experts of a mixture \(MoE\)", "conversion script"),
        ("expp_rank_0_mp_rank_00_optim_states.pt", r"experts of a mixture \(MoE\)", "conversion script"),
        ("zero/", "folder `zero`: a universal checkpoint", "ds_to_universal.py"),
        ("offloaded_tensors/", "folder `offloaded_tensors`: parts of the state were on NVMe", "save_16bit_model"),
    ],
)
@pytest.mark.parametrize("stage", [2, 3])
def test_a_layout_that_is_not_read(stage: int, name: str, reason: str, way_out: str, tmp_path: Path) -> None:
    """Written to the documented names: tensor and pipeline parallelism, experts, universal and NVMe are refused."""
    folder = whole(tmp_path) if stage == 2 else saving(tmp_path)
    (folder / name).mkdir() if name.endswith("/") else (folder / name).touch()
    assert FORMAT.claim(LocalListing(folder))
    assert way_out in refuses(folder, "damaged", reason).remedy


def config_of(**zero: Any) -> dict[str, Any]:
    return {"ds_config": {"zero_optimization": {"stage": 3, **zero}}}


@pytest.mark.parametrize(
    ("changes", "reason", "way_out"),
    [
        ({"mp_world_size": 2}, "has mp_world_size 2: weights cut by model parallelism", "conversion script"),
        ({"checkpoint_parallel_dimensions": {"tp_degree": 2}}, "has tp_degree 2", "conversion script"),
        ({"checkpoint_parallel_dimensions": {"pp_degree": 4}}, "has pp_degree 4", "conversion script"),
        ({"num_experts": [4]}, "mixture of experts", "conversion script"),
        ({"ds_autoep_layers": [{"num_experts": 4}]}, "mixture of experts", "conversion script"),
        ({"module": None}, "has no module: a pipeline", "conversion script"),
        (config_of(zero_hpz_partition_size=8), "hpZ", "python zero_to_fp32.py"),
        (config_of(mics_shard_size=8), "is of MiCS", "save_16bit_model"),
        (config_of(offload_param={"device": "nvme"}), "with offload_param on NVMe", "save_16bit_model"),
        (config_of(offload_optimizer={"device": "nvme"}), "with offload_optimizer on NVMe", "save_16bit_model"),
    ],
)
def test_states_that_say_so(changes: dict[str, Any], reason: str, way_out: str, tmp_path: Path) -> None:
    """Written to the documented layout: what the states themselves say of other partitionings is refused by name."""
    folder = saving(tmp_path, M0=model_states(0, **changes))
    assert way_out in refuses(folder, "damaged", rf"rank_0_mp_rank_00_model_states\.pt: data\.pkl.*{reason}").remedy
    if "ds_config" not in changes:
        refuses(whole(tmp_path, "two", **changes), "damaged", rf"^mp_rank_00_model_states\.pt: data\.pkl.*{reason}")


def test_configurations_that_are_read(tmp_path: Path) -> None:
    """Written to the documented layout: offloading to the CPU, hpZ of one and a configuration by path are read."""
    for count, changes in enumerate(
        (
            config_of(offload_param={"device": "cpu"}, offload_optimizer={"device": "cpu"}),
            config_of(zero_hpz_partition_size=1, mics_shard_size=-1),
            {"ds_config": "ds.json"},
            {"num_experts": [], "checkpoint_parallel_dimensions": None},
        )
    ):
        assert (
            FORMAT.inspect(LocalListing(saving(tmp_path, f"g{count}", M0=model_states(0, **changes)))).state
            == "complete"
        )


# ---------------------------------------------------------------- broken and hostile


class Runs:
    """What runs when it is unpickled."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.what = (function, arguments)

    def __reduce__(self) -> Any:
        return self.what


def size_of(*sizes: Any) -> Runs:
    return Runs(torch.Size, tuple(sizes))


def model0(**changes: Any) -> dict[str, Any]:
    return {"M0": model_states(0, **changes)}


def both(**changes: Any) -> dict[str, Any]:
    return {"M0": model_states(0, **changes), "M1": model_states(1, **changes)}


def optimizer1(**changes: Any) -> dict[str, Any]:
    return {"O1": optimizer_states(1, **changes)}


SHAPES = model_states(0)["param_shapes"]
BROKEN: Mapping[str, tuple[dict[str, Any], str, str]] = {
    "no model 0": ({"M0": None}, "incomplete", "zero_pp_rank_0_mp_rank_00_model_states.pt is not there"),
    "no model 1": ({"M1": None}, "incomplete", "zero_pp_rank_1_mp_rank_00_model.* is not there: .*dp_world_size 2"),
    "no optimizer 0": ({"O0": None}, "incomplete", "zero_pp_rank_0_mp_rank_00_optim_states.pt is not there"),
    "no optimizer 1": ({"O1": None}, "incomplete", "zero_pp_rank_1_mp_rank_00_optim_states.pt is not there"),
    "no optimizer": ({"O0": None, "O1": None}, "incomplete", "zero_pp_rank_0_mp_rank_00_optim.* is not there"),
    "a list": ({"M0": [1]}, "damaged", "data.pkl is no dict"),
    "an optimizer list": ({"O0": [1]}, "damaged", "rank_0.*optim_states.pt: data.pkl is no dict"),
    "empty optimizer": ({"O0": {}}, "damaged", "optim_states.pt: optimizer_state_dict is missing"),
    "one rank more": (both(dp_world_size=3), "incomplete", "zero_pp_rank_2_mp_rank_00_model.* dp_world_size 3"),
    "one rank less": (both(dp_world_size=1), "damaged", "rank_1_.* is there, yet .*dp_world_size 1: two savings"),
    "another world": ({"M1": model_states(1, dp_world_size=4)}, "damaged", "says dp_world_size 4, .* 2: two savings"),
    "another count": (optimizer1(partition_count=4), "damaged", "says partition_count 4, .* dp_world_size 2: two"),
    "counts of ZeRO 2": (optimizer1(partition_count=[2]), "damaged", "says partition_count list, "),
    "a true count": (
        {**both(dp_world_size=1), "M1": None, **optimizer1(partition_count=True)},
        "damaged",
        "two savings",
    ),
    "no world": (model0(dp_world_size=None), "damaged", "has dp_world_size NoneType, not 1 to 4,096 ranks"),
    "a world of none": (model0(dp_world_size=0), "damaged", "has dp_world_size 0, not 1 to"),
    "an absurd world": (model0(dp_world_size=2**60), "damaged", "has dp_world_size 1,152,921,504,606,846,976, not"),
    "no shapes": (both(param_shapes=None), "damaged", "param_shapes is no list of dicts"),
    "shapes of text": (both(param_shapes=["w"]), "damaged", "param_shapes is no dict"),
    "shapes by number": (both(param_shapes=[{1: torch.Size([1])}]), "damaged", "param_shapes has 1 names that are no"),
    "a shape of text": (both(param_shapes=[{"w": "2x3"}]), "damaged", "param_shapes: `w` has a shape that is no tuple"),
    "a negative shape": (both(param_shapes=[{"w": size_of(-2, 3)}]), "damaged", "`w` has a shape that is no tuple"),
    "a shape of booleans": (both(param_shapes=[{"w": (True, 6)}]), "damaged", "`w` has a shape that is no tuple"),
    "65 dimensions": (both(param_shapes=[{"w": (1,) * 65}]), "damaged", "`w` has a shape larger than any tensor"),
    "absurd numbers": (both(param_shapes=[{"w": (2**40, 2**40)}]), "damaged", "`w` has a shape larger than any"),
    "absurd nothing": (both(param_shapes=[{"w": (0, 2**62, 2**62)}]), "damaged", "`w` has a shape larger than any"),
    "large numbers": (both(param_shapes=[{"w": (2**31, 2**31)}]), "damaged", "has 6 numbers where .* need 2,305,843,0"),
    "a name twice": (both(param_shapes=[*SHAPES, SHAPES[0]]), "damaged", "param_shapes has a name twice"),
    "shapes too large": (
        both(param_shapes=[{"w": torch.Size([3, 3])}, SHAPES[1]]),
        "damaged",
        "rank_0_.*fp32_flat_groups has 6 numbers where param_shapes in .*rank_0.* need 8",
    ),
    "shapes too small": (both(param_shapes=SHAPES[:1]), "damaged", "has 6 numbers where .* need 3"),
    "shapes of one rank": (
        {"M1": model_states(1, param_shapes=[{"w": torch.Size([3, 2])}, SHAPES[1]])},
        "damaged",
        "rank_1_.*has other param_shapes than .*rank_0_.*: two savings",
    ),
    "shapes in another order": (
        {"M1": model_states(1, param_shapes=[SHAPES[1], SHAPES[0]])},
        "damaged",
        "rank_1_.*has other param_shapes than",
    ),
    "partition too short": (
        optimizer1(fp32_flat_groups=[torch.zeros(5)]),
        "damaged",
        "rank_1_.*fp32_flat_groups has 5 numbers where .* need 6",
    ),
    "partition too long": (optimizer1(fp32_flat_groups=[torch.zeros(7)]), "damaged", "has 7 numbers where .* need 6"),
    "no partition": (optimizer1(fp32_flat_groups=[]), "damaged", "fp32_flat_groups is no list of tensors"),
    "partition of text": (optimizer1(fp32_flat_groups=["x"]), "damaged", "fp32_flat_groups is a str, not a tensor"),
    "partition not flat": (optimizer1(fp32_flat_groups=[torch.zeros(2, 3)]), "damaged", r"shape \(2, 3\), not a flat"),
    "one number for all": (optimizer1(fp32_flat_groups=[torch.zeros(1).expand(6)]), "damaged", "storage of 1"),
    "every second": (optimizer1(fp32_flat_groups=[torch.zeros(12)[::2]]), "damaged", "not a flat vector"),
    "whole numbers": (optimizer1(fp32_flat_groups=[torch.zeros(6).long()]), "damaged", "has the dtypes int64"),
    "two dtypes": (
        optimizer1(fp32_flat_groups=[torch.zeros(3), torch.zeros(3).half()]),
        "damaged",
        "has the dtypes float16, float32",
    ),
    "ranks of two dtypes": (
        optimizer1(fp32_flat_groups=[torch.zeros(6).half()]),
        "damaged",
        "`w` is in parts of float16 and float32",
    ),
    "a module of integers": (model0(module={"w": empty(torch.int8)}), "damaged", "`w` is of int8, which ZeRO does not"),
    "a module of text": (model0(module="x"), "damaged", "rank_0_.*module is no dict"),
    "a module by number": (model0(module={1: empty()}), "damaged", "module has 1 names that are no text"),
    "a module of numbers": (model0(module={"w": 5}), "damaged", "module: `w` is a int, not a tensor"),
    "nothing for a name": (model0(module={"x": empty()}), "damaged", "`x` has no numbers in any file"),
    "frozen without parts": (both(frozen_param_fragments=None), "damaged", "frozen_param_fragments is missing"),
    "frozen without one": (both(frozen_param_fragments={}), "damaged", "frozen_param_fragments: `f` is missing"),
    "frozen too short": (
        {"M1": model_states(1, frozen_param_fragments={"f": F[:1].clone()})},
        "damaged",
        r"rank_1_.*: `f` has 1 numbers where shape \(3,\) needs 2",
    ),
    "frozen and trained": (
        both(frozen_param_shapes={"w": (2, 3)}, frozen_param_fragments={"w": torch.zeros(3)}),
        "damaged",
        "`w` is both trained and frozen",
    ),
    "tied to itself": (model0(shared_params={"w": "v"}), "damaged", "shared_params: `w` has weights of its own too"),
    "tied to a number": (model0(shared_params={"x": 5}), "damaged", "shared_params: `x` has weights of its own"),
    "ties of text": (model0(shared_params="x"), "damaged", "shared_params is no dict"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_saving(name: str, tmp_path: Path) -> None:
    """Written to the documented layout: what is missing is incomplete, what cannot be right is refused by name."""
    files, state, reason = BROKEN[name]
    refuses(saving(tmp_path, **files), state, reason)


@pytest.mark.parametrize("place", ["module", "param_shapes", "dp_world_size", "w", "shape", "groups", "group", "top"])
@pytest.mark.parametrize("way", ["os.system", "another"])
def test_code_in_the_pickles(place: str, way: str, tmp_path: Path) -> None:
    """Code in any place of the states is never run; what runs commands is named, any other object is not a dict."""
    mark = tmp_path / "ran"
    code = Runs(os.system, f"touch {mark}") if way == "os.system" else Runs(Path.touch, mark)
    at: dict[str, dict[str, Any]] = {
        "module": model0(module=code),
        "param_shapes": model0(param_shapes=code),
        "dp_world_size": model0(dp_world_size=code),
        "w": model0(module={"w": code}),
        "shape": both(param_shapes=[{"w": code}]),
        "groups": optimizer1(fp32_flat_groups=code),
        "group": optimizer1(fp32_flat_groups=[code]),
        "top": {"O0": code},
    }
    folder = saving(tmp_path, **at[place])
    named = (
        r"names `posix\.system`, which runs code" if way == "os.system" else "is no|has dp_world_size|, not a tensor"
    )
    refuses(folder, "damaged", named + "|has a shape that is no tuple")
    assert not mark.exists()
    torch.load(folder / next(name for name in (M0, M1, O0, O1) if _names_code(folder / name)), weights_only=False)
    assert mark.exists()  # so it would have been seen


def _names_code(file: Path) -> bool:
    content = file.read_bytes()
    return b"posix" in content or b"touch" in content


@pytest.mark.parametrize("name", [M0, M1, O0, O1])
def test_a_file_cut_short_or_replaced(name: str, tmp_path: Path) -> None:
    """A zip that lacks its end is incomplete; something else of that name is refused; each names the file."""
    folder = saving(tmp_path)
    content = (folder / name).read_bytes()
    for size in (0, 3, 500, len(content) - 1):
        (folder / name).write_bytes(content[:size])
        refuses(folder, "incomplete", f"^{name}")
    (folder / name).write_bytes(b"x" * 1000)
    refuses(folder, "damaged", f"^{name} begins with .*: it is no zip archive")
    (folder / name).unlink()
    os.mkfifo(folder / name)
    refuses(folder, "damaged", f"^{name} is not a regular file")


@pytest.mark.parametrize("name", [M1, O0, PIECES])
def test_a_link_out_of_the_checkpoint(name: str, tmp_path: Path) -> None:
    """A file of states that is a link out of the checkpoint is refused by name, with a remedy."""
    folder = whole(tmp_path) if name == PIECES else saving(tmp_path)
    (folder / name).rename(tmp_path / "outside")
    (folder / name).symlink_to(tmp_path / "outside")
    assert "cp -rL" in refuses(folder, "damaged", f"{name} is a link to .*outside, outside").remedy


def test_a_folder_of_states_that_is_a_link_out(tmp_path: Path) -> None:
    """A Trainer's folder whose `global_stepN` is a link out of it is refused."""
    folder = trainer_folder(tmp_path)
    (folder / "global_step7").rename(tmp_path / "outside")
    (folder / "global_step7").symlink_to(tmp_path / "outside")
    refuses(folder, "damaged", r"^global_step7/.* is a link to .*outside/.*, outside")


def test_two_savings_in_one_folder(tmp_path: Path) -> None:
    """Files of another precision, stage or world that were left in the folder are refused, whichever are newer."""
    folder = saving(tmp_path)
    shutil.copy(folder / O0, folder / O0.removeprefix("bf16_"))
    refuses(folder, "damaged", f"both {O0} and zero_pp_rank_0.* are there: two savings in one folder")
    (folder / O0.removeprefix("bf16_")).rename(folder / OPTIMIZER.format(2))
    refuses(folder, "damaged", f"{OPTIMIZER.format(2)} is there, yet .* says dp_world_size 2: two savings")
    (folder / OPTIMIZER.format(2)).unlink()
    torch.save({}, folder / PIECES)
    refuses(folder, "damaged", r"both mp_rank_00.* \(ZeRO 0 to 2\) and zero_pp_rank_0.* \(ZeRO 3\) are there")


def test_optimizer_states_of_zero_2(tmp_path: Path) -> None:
    """Beside whole weights they need not be there, and are not opened; some without the others are not yet all."""
    folder = whole(tmp_path)
    assert FORMAT.inspect(LocalListing(folder)).state == "complete"
    (folder / O1).write_bytes(b"not read")
    refuses(folder, "incomplete", "zero_pp_rank_0_mp_rank_00_optim_states.pt is not there, as that of rank 1 is")
    (folder / O0).write_bytes(b"not read")
    assert [stamp.name for stamp in reference(folder).files] == [PIECES, "config.json"][::-1]


def test_too_many_pickles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Many ranks' pickles are read up to a limit in all."""
    folder = saving(tmp_path)
    monkeypatch.setattr(deepspeed_zero3, "MAX_PICKLE_BYTES", 2000)
    refuses(folder, "damaged", "is one of several with more than 2,000 bytes of pickles")


def test_what_was_looked_at_is_not_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each version of the states is read once, sound or not; a new version, and a new name beside it, is seen."""
    folder = saving(tmp_path)
    for _ in range(2):
        before = FORMAT.inspect(LocalListing(folder))
        with monkeypatch.context() as patch:
            patch.setattr(deepspeed_folder, "merge", None)
            assert FORMAT.inspect(LocalListing(folder)) == before
        torch.save([1], folder / M1)
    assert FORMAT.inspect(LocalListing(folder)).state == "damaged"
    torch.save(model_states(1), folder / M1)
    assert FORMAT.inspect(LocalListing(folder)).state == "complete"
    (folder / "zero").mkdir()
    assert FORMAT.inspect(LocalListing(folder)).state == "damaged"


def test_a_failing_disk_is_not_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """States that could not be read once are incomplete, and read at the next look though they did not change."""
    folder = saving(tmp_path)

    def fail(*_: object) -> None:
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr("peel_plugins.formats.pickles.torch_zip.read_into", fail)
        refuses(folder, "incomplete", f"{M0} cannot be read: Input/output error")
    assert FORMAT.inspect(LocalListing(folder)).state == "complete"


# ---------------------------------------------------------------- reading while the trainer goes on


class TestTorn:
    def later(self, file: Path) -> None:
        """Puts the modification time forward, as a later write does, whatever the clock's grain is."""
        stamp = file.stat().st_mtime_ns + 10**9
        os.utime(file, ns=(stamp, stamp))

    @pytest.mark.parametrize("held", [256, 1])
    @pytest.mark.parametrize("file", [O0, O1])
    def test_rewritten_in_place(self, file: str, held: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """One rank's file rewritten under an open checkpoint is torn at the next read, and that can be tried again."""
        monkeypatch.setattr(held_files, "MAX_OPEN", held)
        folder = saving(tmp_path)
        weights = FORMAT.open(reference(folder))
        weights.read("w")
        self.later(folder / file)
        with pytest.raises(TornCheckpoint, match=f"{file} changed while it was read") as caught:
            weights.read("w")
        assert caught.value.retryable

    def test_truncated(self, tmp_path: Path) -> None:
        """A file truncated under an open checkpoint is torn; the process lives on."""
        folder = saving(tmp_path)
        weights = FORMAT.open(reference(folder))
        os.truncate(folder / O1, 100)
        with pytest.raises(TornCheckpoint, match=f"{O1} ended before byte"):
            weights.read("v")

    def test_rotated_away(self, tmp_path: Path) -> None:
        """A checkpoint removed while it is open is read to its end."""
        folder = saving(tmp_path)
        weights = FORMAT.open(reference(folder))
        shutil.rmtree(folder)
        assert weights.read("v").float().tolist() == V.tolist()

    def test_rotated_away_with_more_files_than_are_held(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """With more files than are held open every bit is the same; removed, it is torn and not broken."""
        monkeypatch.setattr(held_files, "MAX_OPEN", 1)
        folder = saving(tmp_path)
        weights = FORMAT.open(reference(folder))
        assert weights.read("v").float().tolist() == V.tolist()
        assert len(held(folder)) == 1
        shutil.rmtree(folder)
        with pytest.raises(TornCheckpoint, match="is gone"):
            weights.read("v")

    @pytest.mark.parametrize("file", [M1, O0, "config.json"])
    def test_changed_before_it_was_opened(self, file: str, tmp_path: Path) -> None:
        """A file that changed between the look and the opening is torn, by name, and no file stays open."""
        folder = saving(tmp_path)
        ref = reference(folder)
        self.later(folder / file)
        with pytest.raises(TornCheckpoint, match=f"global_step7 changed.*: {file} is another file than before"):
            FORMAT.open(ref)
        gc.collect()
        assert held(folder) == []

    def test_nothing_is_mapped_and_everything_is_closed(self, tmp_path: Path) -> None:
        """Reading maps no file into memory, holds those with numbers, and dropping the weights closes them."""
        folder = saving(tmp_path)
        weights: Weights | None = FORMAT.open(reference(folder))
        assert weights is not None
        assert sorted(file.name for file in held(folder)) == sorted([M0, M1, O0, O1])
        assert str(folder) not in Path("/proc/self/maps").read_text()
        with pytest.raises(CheckpointError, match="has no tensor `exp_avg`"):
            weights.read("exp_avg")
        weights = None
        gc.collect()
        assert held(folder) == []


def held(folder: Path) -> list[Path]:
    """Files of this folder that the process holds open."""
    links = [Path(f"/proc/self/fd/{number}") for number in range(256)]
    return [link.readlink() for link in links if link.is_symlink() and link.readlink().is_relative_to(folder)]


def test_the_parent_reads_no_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Recognising, inspecting and asking for the step of large weights reads directories and pickles alone."""
    folder = saving(
        tmp_path,
        **both(param_shapes=[{"w": torch.Size([1000, 1000])}], module={}, shared_params={}),
        O0=optimizer_states(0, fp32_flat_groups=[torch.zeros(500_000)]),
        O1=optimizer_states(1, fp32_flat_groups=[torch.zeros(500_000)]),
    )
    sizes = []
    real = os.preadv

    def counting(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        sizes.append(sum(len(buffer) for buffer in buffers))
        return real(descriptor, buffers, offset)

    monkeypatch.setattr(os, "preadv", counting)
    assert FORMAT.claim(LocalListing(folder))
    assert FORMAT.inspect(LocalListing(folder)).state == "complete"
    assert FORMAT.step(LocalListing(folder)) == 7
    assert sum(sizes) < 40_000


def test_the_configuration_above_belongs_to_all(tmp_path: Path) -> None:
    """Writing the config.json of the folder above again does not change a checkpoint; one of its own does."""
    folder = saving(tmp_path)
    (folder / "config.json").rename(tmp_path / "config.json")
    before = reference(folder)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    assert reference(folder).files == before.files
    assert FORMAT.open(before).config() == {"model_type": "llama"}
    (folder / "config.json").write_text("{}")
    assert FORMAT.open(reference(folder)).config() == {}
    assert reference(folder).files != before.files
