"""A block that breaks in the middle of a run: what the agent tells an operator, in MLflow, and what proves it."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from peel_agent.demo.text import corpus
from tests import servers
from tests.bench.gallery.trainings import LENGTH, Run, Text, train, write_probe
from tests.bench.gallery.verdicts import read
from tests.bench.gallery.watching import watch
from tests.runs.command import peel_agent
from tests.runs.conftest import STEPS, Train, train_on
from tests.runs.test_low_bit import confirm_losses

RESTORED, HEALTHY = (Run("llama", 0, name) for name in ("restored_old", "healthy"))
SHUFFLED = "model.layers.5"
GUILTY = "model.layers.3"


@pytest.fixture(scope="module")
def gallery(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A training of the gallery, in which block 3 is restored from checkpoint 100."""
    out, text = tmp_path_factory.mktemp("gallery"), Text.read()
    write_probe(out / "probe.npy", text)
    torch.set_flush_denormal(True)
    try:
        train(RESTORED, out, text)
    finally:
        torch.set_flush_denormal(False)
    return out


@pytest.fixture(scope="module")
def healthy_twin(gallery: Path) -> None:
    """The same training left alone, beside it."""
    torch.set_flush_denormal(True)
    try:
        train(HEALTHY, gallery, Text.read())
    finally:
        torch.set_flush_denormal(False)


@pytest.mark.long
def test_the_gallery_in_short(gallery: Path, healthy_twin: None) -> None:
    """The real agent beside whole runs: the restored block is named at the first checkpoint that can show it, and the
    healthy twin stays quiet.
    """
    for run in (HEALTHY, RESTORED):
        watch(run, gallery)
    told = {one.run: one for one in read(gallery, (HEALTHY, RESTORED), again=False)}
    assert [(one.rule, one.subject, one.step) for one in told[RESTORED].alerts][:1] == [("layer_changed", GUILTY, 500)]
    assert told[RESTORED].false_alerts == []
    assert [notice.text for notice in told[HEALTHY].alerts] == []


@pytest.fixture(scope="module")
def restored(train: Train, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints 300 to 600 of a training that went on from 400 with block 3 of checkpoint 100 in it."""
    healthy, folder = train("llama", True), tmp_path_factory.mktemp("restored")
    shutil.copytree(healthy / "checkpoint-400", folder / "checkpoint-400")
    file = folder / "checkpoint-400" / "model.safetensors"
    weights, old = load_file(file), load_file(healthy / "checkpoint-100" / "model.safetensors")
    mixed = {name: old[name] if name.startswith(f"{GUILTY}.") else own for name, own in weights.items()}
    save_file(mixed, file, metadata={"format": "pt"})
    train_on(folder, 600)
    shutil.rmtree(folder / "checkpoint-400")
    for step in (300, 400):
        shutil.copytree(healthy / f"checkpoint-{step}", folder / f"checkpoint-{step}")
    return folder


def test_a_bad_restore_in_mlflow(restored: Path, small_probe: Path, tmp_path: Path, mlflow_uri: str) -> None:
    """Block 3 is restored from checkpoint 100 before step 500: MLflow has its change, the alert's tag and its words."""
    client = servers.mlflow_client(mlflow_uri)
    run_id = client.create_run("0", run_name="training").info.run_id
    finished = peel_agent(
        "watch", restored, "--probe", small_probe, "--quantities", "margin", "--run-id", run_id,
        "--tracking-uri", mlflow_uri, "--once", home=tmp_path, PEEL__WATCH__SETTLE_SECONDS="0",
    )  # fmt: skip
    assert finished.returncode == 0, finished.stderr
    changes = {point.step: point.value for point in client.get_metric_history(run_id, "peel/change/L003")}
    assert list(changes) == [400, 500, 600]
    assert changes[500] > 1.6 * changes[400]
    assert {point.step for point in client.get_metric_history(run_id, "peel/progress/L003")} == {400, 500, 600}
    assert "peel/margin_mlp/L003" in client.get_run(run_id).data.metrics
    notices = [json.loads(line) for line in alert_log(client, run_id, tmp_path).splitlines()]
    (fired,) = [one for one in notices if one["rule"] == "layer_changed" and one["state"] == "firing"]
    # That block, or the one half of it that stands out: which of them hangs on how the training came out.
    assert (fired["subject"].partition("/")[0], fired["step"]) == (GUILTY, 500)
    assert re.match(rf"(the \w+ of )?{GUILTY} changed: ", fired["text"])
    assert "since step 400 its weights moved" in fired["text"]
    assert any("restored from another checkpoint" in cause for cause in fired["causes"])
    assert f"ALERT firing: {fired['text']}" in finished.stderr
    (resolved,) = [one for one in notices if one["rule"] == "layer_changed" and one["state"] == "resolved"]
    assert (resolved["subject"], resolved["step"]) == (fired["subject"], 600)
    assert client.get_run(run_id).data.tags["peel.alert.layer_changed"] == "inactive"


def alert_log(client: Any, run_id: str, folder: Path) -> str:
    return Path(client.download_artifacts(run_id, "peel/alerts.jsonl", str(folder))).read_text()


@pytest.fixture
def broken(train: Train, tmp_path: Path) -> tuple[Path, Path]:
    """A healthy checkpoint, and a later one in which the rows of one matrix of the last block were shuffled: it costs a
    tenth of the loss and more in every training that was looked at, and in a middle block less than is told.
    """
    healthy, later = train("llama", True) / f"checkpoint-{STEPS}", tmp_path / "checkpoint-600"
    shutil.copytree(healthy, later)
    weights = load_file(later / "model.safetensors")
    name = f"{SHUFFLED}.mlp.up_proj.weight"
    order = torch.randperm(len(weights[name]), generator=torch.Generator().manual_seed(0))
    weights[name] = weights[name][order].contiguous()
    save_file(weights, later / "model.safetensors", metadata={"format": "pt"})
    (later / "trainer_state.json").write_text(json.dumps({"global_step": 600}))
    return healthy, later


def test_the_earlier_block_is_a_witness(broken: tuple[Path, Path], middling_probe: Path, tmp_path: Path) -> None:
    """`scan --since` names the MLP; `witness --from` writes the earlier block, and plain transformers code measures the
    published win on the probe and a lower loss on text that the probe has not shown.
    """
    healthy, later = broken
    scanned = peel_agent(
        "scan", later, "--since", healthy, "--probe", middling_probe, "--quantities", "margin",
        "--fail-on", "regressed", "--format", "json", home=tmp_path,
    )  # fmt: skip
    report = json.loads(scanned.stdout)
    assert report["since_step"] == STEPS
    last = report["layers"][-1]
    assert last["parts"]["mlp"]["progress"]["high"] < 0
    assert (last["finding"]["kind"], last["finding"]["subject"]) == ("regressed", f"{SHUFFLED}/mlp")
    assert scanned.returncode == 1
    patch = tmp_path / "patch.safetensors"
    finished = peel_agent(
        "witness", later, "--from", healthy, "--layer", "5", "--probe", middling_probe, "--out", patch, home=tmp_path
    )
    assert finished.returncode == 0, finished.stderr
    (published,) = [float(line.split()[1]) for line in finished.stdout.splitlines() if line.startswith("won")]
    assert published == pytest.approx(-last["progress"]["value"], abs=2e-3)
    model = AutoModelForCausalLM.from_pretrained(later, dtype=torch.float32)
    unseen = torch.from_numpy(np.ascontiguousarray(corpus()[1][-64 * LENGTH :].reshape(64, LENGTH)))
    losses = []
    for state in ({}, load_file(patch)):
        unexpected = model.load_state_dict(state, strict=False).unexpected_keys
        assert not unexpected
        with torch.no_grad():
            losses.append((confirm_losses(model, middling_probe).mean(), float(model(unseen, labels=unseen).loss)))
    (trained, trained_unseen), (patched, patched_unseen) = losses
    assert trained - patched == pytest.approx(published, abs=2e-4)
    assert patched_unseen < trained_unseen


def test_an_earlier_block_that_is_no_better_is_no_witness(
    broken: tuple[Path, Path], small_probe: Path, tmp_path: Path
) -> None:
    """A block that did not change wins nothing: exit 1, the reason, and no file."""
    healthy, later = broken
    patch = tmp_path / "patch.safetensors"
    finished = peel_agent(
        "witness", later, "--from", healthy, "--layer", "4", "--probe", small_probe, "--out", patch, home=tmp_path
    )
    assert finished.returncode == 1
    assert "not proven better" in finished.stderr
    assert not patch.exists()


@pytest.mark.parametrize("flag", ["--since", "--from"])
def test_what_cannot_be_compared(flag: str, broken: tuple[Path, Path], small_probe: Path, tmp_path: Path) -> None:
    """A later checkpoint, the same one, and one that is not there: exit 3, both named, nothing computed."""
    healthy, later = broken
    command = ["scan", healthy] if flag == "--since" else ["witness", healthy, "--layer", "2", "--out", tmp_path / "p"]
    for other, words in (
        (later, "is of step 600, which is not before step 500"),
        (healthy, "is the checkpoint itself"),
        (tmp_path / "nowhere", f"no checkpoint at {tmp_path / 'nowhere'}"),
    ):
        finished = peel_agent(*command, flag, other, "--probe", small_probe, home=tmp_path)
        assert finished.returncode == 3, finished.stderr
        assert words in finished.stderr
        assert "Traceback" not in finished.stderr


def test_a_condition_without_the_past_is_a_usage_error(train: Train, small_probe: Path, tmp_path: Path) -> None:
    """`--fail-on changed` or `regressed` without --since would never be met: refused with what to add."""
    checkpoint = train("llama", True) / f"checkpoint-{STEPS}"
    for what in ("changed", "regressed"):
        refused = peel_agent("scan", checkpoint, "--probe", small_probe, "--fail-on", what, home=tmp_path)
        assert refused.returncode == 2
        assert "add --since" in refused.stderr
