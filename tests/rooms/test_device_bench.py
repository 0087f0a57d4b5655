"""The bench of a device runs from end to end, whatever the device (tests/bench/device.py)."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from tests.bench import device, random_llama
from tests.bench.__main__ import is_of_a_device
from tests.bench.stored import over_stored


def results(out: Path, *arguments: str) -> dict[str, Any]:
    """What the bench writes of the smallest shape; everything that it was asked for, and nothing else."""
    device.main(["--shapes", "tiny", "--folder", str(out.parent), "--out", str(out), *arguments])
    return dict(json.loads(out.read_text()))


def check_peel(peel: dict[str, Any]) -> None:
    """A peel of the whole model, with its seconds and its peak."""
    assert sum(peel["blocks"].values()) == device.SHAPES["tiny"].blocks
    assert "not_measured" not in peel["blocks"]
    assert 0 < sum(peel["timing"].values()) <= peel["seconds"] < peel["seconds with start"]
    assert peel["peak GB"] > 0


def test_a_small_model_on_the_cpu(tmp_path: Path) -> None:
    """Written, its probe sampled, and peeled in a process of its own; the rest is the same command."""
    found = results(tmp_path / "out.json", "--device", "cpu", "--parts", "peel")
    assert set(found) == {"settings", "tiny"}
    assert set(found["tiny"]) == {"made", "peel"}
    check_peel(found["tiny"]["peel"])
    assert found["tiny"]["peel"]["on"] == "cpu"
    assert [path.name for path in tmp_path.iterdir()] == ["out.json"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_small_model_on_a_gpu(tmp_path: Path) -> None:
    """All of `python -m tests.bench --device cuda`: kernels were run, and the agent's findings are in MLflow."""
    out = tmp_path / "out.json"
    command = [sys.executable, "-m", "tests.bench", "--device", "cuda", "--shapes", "tiny", "--out", str(out)]
    subprocess.run(command, check=True, cwd=device.ROOT)
    found = json.loads(out.read_text())["tiny"]
    assert {"made", *device.PARTS} <= set(found)
    check_peel(found["peel"])
    assert found["peel"]["on"] == torch.cuda.get_device_name(0)
    assert 0 < found["profile"]["kernels"] < found["profile"]["wall"]
    assert found["profile"]["copies"] > 0
    assert found["watch"]["series in MLflow"] > 0
    assert found["watch"]["of these the peel"] < found["watch"]["from the start of the peel to MLflow"]


def test_the_file_is_what_the_shape_says(tmp_path: Path) -> None:
    """bf16, a shard a block, as many weights as the table of shapes counts, and norms beside."""
    model = device.SHAPES["tiny"]
    size = random_llama.write_checkpoint(tmp_path / "made", model)
    shards = sorted((tmp_path / "made").glob("*.safetensors"))
    assert len(shards) == model.blocks + 1
    weights = {}
    for shard in shards:
        with safe_open(shard, framework="pt") as opened:
            weights |= {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118, it is no mapping
    assert {weight.dtype for weight in weights.values()} == {torch.bfloat16}
    assert sum(weight.numel() for weight in weights.values() if weight.ndim == 2) == model.parameters
    assert sum(weight.nbytes for weight in weights.values()) == size


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ((), False),
        (("--blocks", "6"), False),
        (("--device", "cuda"), True),
        (("--device", "cpu", "--shapes", "124m"), True),
        (("--device", "cuda:1", "--ratios"), False),
    ],
)
def test_which_bench_is_meant(arguments: tuple[str, ...], expected: bool) -> None:
    """Ratios stay what `make bench` measures; a GPU or a size asks for seconds."""
    assert is_of_a_device(arguments) == expected


@pytest.mark.parametrize(
    ("option", "value"), [("--shapes", "9b"), ("--parts", "peel,all"), ("--effort", "some"), ("--device", "cuda:99")]
)
def test_what_is_not_known_is_refused(option: str, value: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Before anything is made, with what there is."""
    with pytest.raises(SystemExit) as ended:
        device.main([option, value])
    assert ended.value.code == 2
    assert value.rsplit(",", maxsplit=1)[-1] in capsys.readouterr().err


@pytest.mark.parametrize(
    ("figures", "stored", "ratios"),
    [
        (3.0, 4.0, 0.75),
        ({"margins": 3.0, "bounds": 5.0}, {"margins": 4.0}, {"margins": 0.75}),
        ({4: {"peak": 8.0}}, {"4": {"peak": 2}}, {"4": {"peak": 4.0}}),
        ({"margins": 3.0}, {"headroom": 3.0}, None),
        (3.0, {"margins": 3.0}, None),
        (3.0, 0.0, None),
        ({"name": "llama"}, {"name": "llama"}, None),
    ],
)
def test_figures_are_held_against_those_stored(figures: Any, stored: Any, ratios: Any) -> None:
    """Number by number; what is new, or was of another shape, has nothing to be held against."""
    assert over_stored(figures, stored) == ratios
