"""`peel-agent compare`: what A and B are, where the answer goes, and the exit status."""

from __future__ import annotations

import json
import shlex
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import torch

from peel_agent import comparing
from peel_agent.cli import main
from peel_agent.ledger import Ledger
from peel_agent.records import DifferenceReport, restored
from tests import histories, zoo
from tests.rooms.test_report_command import STEPS, fill
from tests.rooms.test_views import Page, data_of, records


@pytest.fixture
def state(tmp_path: Path) -> Path:
    """Two runs of one agent."""
    folder = tmp_path / "state"
    with closing(Ledger(folder)) as ledger:
        fill(ledger, "one", "/runs/one")
        fill(ledger, "two", "/runs/two")
    return folder


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two checkpoints and a probe; the head of the second is turned over, so that its loss is higher for certain."""
    folder = tmp_path_factory.mktemp("compare")
    model = zoo.build("llama", steps=10)
    zoo.save(model, folder, step=10)
    with torch.no_grad():
        model.lm_head.weight.neg_()
    zoo.save(model, folder, step=60)
    np.save(folder / "probe.npy", np.concatenate([zoo.token_ids(150, seed) for seed in range(3)]))
    return folder


def arguments(place: Path, *more: str, steps: tuple[int, int] = (10, 60)) -> list[str]:
    ends = [str(place / f"checkpoint-{step}") for step in steps]
    return ["compare", *ends, "--probe", str(place / "probe.npy"), "--effort", "quick", *more]


def test_two_checkpoints_as_a_table_as_json_and_as_a_page(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Data is on stdout, or in the file and nothing on stdout; the three forms hold the same numbers."""
    assert main(arguments(place, "--format", "json")) == 0
    told = capsys.readouterr()
    (line,) = told.out.splitlines()
    report = restored(DifferenceReport, json.loads(line))
    assert (report.kind, report.a.checkpoint.step, report.b.checkpoint.step) == ("checkpoints", 10, 60)
    difference = report.loss.difference
    assert difference is not None
    assert difference.low > 0.0
    assert main(arguments(place)) == 0
    table = capsys.readouterr().out.splitlines()
    assert table[0].startswith(f"B has a higher loss than A: B - A is {difference} nats per token, paired over ")
    for layer in report.layers:
        (row,) = [one for one in table if one.startswith(f"{layer.name} ")]
        assert str(layer.block.margin.difference) in row
    out = tmp_path / "page.html"
    assert main(arguments(place, "--format", "html", "--out", str(out))) == 0
    assert capsys.readouterr().out == ""
    data = data_of(out.read_text())
    assert (data["schema"], data["loss"]) == ("peel-agent/compare/1", json.loads(line)["loss"])
    rows = {row["layer"]: row for row in records(data["tables"]["margins"]) if row["part"] == "block"}
    for layer in report.layers:
        assert layer.block.margin.difference is not None
        assert rows[layer.index]["difference"] == pytest.approx(layer.block.margin.difference.value, rel=1e-4)
    assert main(arguments(place, "--out", str(tmp_path / "table.txt"))) == 0
    assert (tmp_path / "table.txt").read_text().splitlines() == table


@pytest.mark.parametrize(
    ("steps", "what", "status"),
    [((10, 60), "worse", 1), ((60, 10), "worse", 0), ((10, 10), "worse", 0), ((60, 60), "below", 0)],
)
def test_fail_on(
    steps: tuple[int, int], what: str, status: int, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A loss that is higher for certain fails; the better checkpoint, and the same one, do not."""
    assert main(arguments(place, "--fail-on", what, steps=steps)) == status
    assert "B - A" in capsys.readouterr().out


def test_two_runs(state: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Runs are known by their state, need no probe, and are compared without pairs, which is said."""
    assert main(["compare", str(state), str(state), "--run", "one", "--run", "two", "--format", "json"]) == 0
    report = restored(DifferenceReport, json.loads(capsys.readouterr().out))
    assert (report.kind, report.pairing, report.a.run, report.b.run) == ("runs", "none", "one", "two")
    assert [step.step for step in report.steps] == list(STEPS)
    assert main(["compare", str(state), str(state), "--run", "two"]) == 0
    told = capsys.readouterr().out
    assert "not paired: the half-widths of both intervals added" in told
    assert "at every common step" in told
    assert sum(line.startswith(tuple(f"{step} " for step in STEPS)) for line in told.splitlines()) == len(STEPS)


def test_the_page_says_how_to_make_it_again(state: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its command has every option that was given, one that was repeated twice, and no password."""
    given = ["--run", "one", "--run", "two", "--tracking-uri", "http://me:secret@tracker:5000", "--format", "html"]
    assert main(["compare", str(state), str(state), *given]) == 0
    page = capsys.readouterr().out
    without_password = [text.replace("me:secret@", "") for text in given]
    assert data_of(page)["made"]["command"] == shlex.join(
        ["peel-agent", "compare", str(state), str(state), *without_password]
    )
    assert "secret" not in page


def test_the_watched_directory_is_a_run(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A directory of checkpoints that an agent has watched is a run; a checkpoint in it is none."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "home"))
    assert main(["compare", str(place), str(place)]) == 2  # nothing has watched it: it is taken for a checkpoint
    assert "no probe is named" in capsys.readouterr().err
    from peel_agent.config import load_settings
    from peel_agent.sources import with_absolute_places
    from peel_agent.state import state_dir_of

    state_dir = state_dir_of(with_absolute_places(load_settings(None, {"watch.path": str(place)})), None)
    with closing(Ledger(state_dir)) as ledger:
        fill(ledger, "place", str(place))
    assert main(["compare", str(place), str(state_dir), "--format", "json"]) == 0
    assert json.loads(capsys.readouterr().out)["kind"] == "runs"
    assert main(["compare", str(place), str(place / "checkpoint-10"), "--probe", str(place / "probe.npy")]) == 2
    assert "is a run and" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "status", "words"),
    [
        (["{place}/checkpoint-10", "{place}/checkpoint-60"], 2, "no probe is named"),
        (["{place}/checkpoint-10", "{place}/none", "--probe", "{place}/probe.npy"], 3, "no checkpoint at {place}/none"),
        (
            [
                "{place}/checkpoint-10",
                "{place}/checkpoint-60",
                "--probe",
                "{place}/probe.npy",
                "--quantities",
                "bounds",
            ],
            2,
            "not compared by bounds",
        ),
        (["{place}/checkpoint-10", "{state}", "--probe", "{place}/probe.npy"], 2, "is a run and"),
        (["{state}", "{state}"], 3, "--run: one, two"),
        (["{state}", "{state}", "--run", "one", "--run", "two", "--run", "one"], 2, "--run is given 3 times"),
        (["{state}", "{state}", "--run", "one", "--probe", "{place}/probe.npy"], 2, "measured on another probe"),
        (["{state}", "{state}", "--run", "one", "--out", "{place}/no/file"], 2, "its folder is not there"),
        (["0" * 32, "1" * 32, "--tracker", "jsonl"], 2, "jsonl"),
        (["0" * 32, "{place}/checkpoint-10"], 2, "is a run and"),
    ],
)
def test_what_cannot_be_compared(
    given: list[str], status: int, words: str, place: Path, state: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each has the exit status of its kind, a sentence and a way out, and nothing on stdout."""
    filled = [text.format(place=place, state=state) for text in given]
    assert main(["compare", *filled]) == status
    told = capsys.readouterr()
    assert words.format(place=place, state=state) in told.err
    assert "->" in told.err
    assert told.out == ""


def test_one_of_three_arguments_is_a_usage_error(capsys: pytest.CaptureFixture[str]) -> None:
    """A alone is compared with nothing."""
    with pytest.raises(SystemExit) as ended:
        main(["compare", "A"])
    assert ended.value.code == 2
    assert "usage:" in capsys.readouterr().err


def test_an_interrupt_leaves_nothing(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Ctrl-C while the second one is measured: status 130, a sentence that says how far it was, and no file."""
    measure = comparing.measure
    calls: list[Path] = []

    def interrupted(ref: comparing.CheckpointRef, **options: object) -> object:
        calls.append(ref.path)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return measure(ref, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(comparing, "measure", interrupted)
    assert main(arguments(place, "--out", str(tmp_path / "out.txt"))) == 130
    assert "interrupted before both were measured (A: " in capsys.readouterr().err
    assert not (tmp_path / "out.txt").exists()


def test_a_hostile_run_makes_an_inert_page() -> None:
    """Names that try to be HTML, a script or a template are text in the page of a comparison, and in no chart."""
    from peel_agent.contrast import contrast_runs, difference_verdict
    from peel_agent.views import Provenance, difference_page

    history = histories.hostile_history()
    report = contrast_runs(history, history, where=(histories.HOSTILE[0], histories.HOSTILE[1]))
    made = Provenance("peel-agent compare", "2026-01-01", {})
    page = difference_page(report, difference_verdict(report), made)
    shown = Page(page).text + str(data_of(page))
    assert not [character for character in shown if not character.isprintable() and character != "\n"]
    for name in ("script", "img", "b"):
        assert sum(tag == name for tag, _ in Page(page).tags) == (3 if name == "script" else 0), name
    assert histories.HOSTILE[0] in shown
    for chart in data_of(page)["charts"].values():
        assert not [name for name in histories.HOSTILE if name in json.dumps(chart["spec"])]
