"""`peel-agent report`: from a state folder, from a watched directory, and what it says where there is nothing."""

from __future__ import annotations

import dataclasses
import json
import math
from contextlib import closing
from pathlib import Path

import pytest

from peel_agent.cli import main
from peel_agent.errors import NoReport
from peel_agent.ledger import Ledger, kept_run
from peel_agent.publish import alert_line, history_of, report_line
from peel_agent.records import Gap, KeptRun, Verdict
from tests import histories
from tests.rooms.test_ledger import checkpoint
from tests.rooms.test_views import data_of, records

STEPS = (100, 200, 400)


def fill(ledger: Ledger, name: str, place: str) -> Path:
    """A run with three reports, one checkpoint of each other outcome and two notices; the folder of its reports."""
    run = ledger.run(name, name, place)
    for step in STEPS:
        told = [histories.notice("firing", step)] if step == 200 else []
        lines = {notice.id: alert_line(notice) for notice in told}
        one = report_line(histories.report(step))
        run.record(
            checkpoint(step, float(step)), report=one, verdict=Verdict((), ()), alert_lines=lines, memory=None, debts=()
        )
    run.miss(checkpoint(300, 300.0))
    run.refuse(checkpoint(310, 310.0), "a tensor is missing")
    run.fail(checkpoint(320, 320.0), "its worker died three times")
    run.pass_over(checkpoint(330, 330.0), "a newer one was there")
    run.forget(checkpoint(340, 340.0), why="torn")
    return run.reports_dir


@pytest.fixture
def state(tmp_path: Path) -> Path:
    folder = tmp_path / "state"
    with closing(Ledger(folder)) as ledger:
        fill(ledger, "one", "/runs/one")
    return folder


def test_a_history_is_read_from_the_ledger(state: Path) -> None:
    """Reports in order, the notices, and every checkpoint without a report with its cause in words."""
    history = history_of(kept_run(state, None))
    assert (history.name, history.place, history.torn, history.unreadable) == ("one", "/runs/one", 1, 0)
    assert history.reports == tuple(histories.report(step) for step in STEPS)
    assert history.notices == (histories.notice("firing", 200),)
    assert history.gaps is not None
    assert [(gap.step, gap.cause, gap.why) for gap in history.gaps] == [
        (300, "rotated", "removed before it was peeled"),
        (310, "refused", "a tensor is missing"),
        (320, "given up", "its worker died three times"),
        (330, "overtaken", "a newer one was there"),
    ]


def test_it_is_read_beside_a_running_agent(state: Path) -> None:
    """The agent holds its ledger meanwhile, and its next checkpoint is in the next history."""
    with closing(Ledger(state)) as ledger:
        assert len(kept_run(state, None).reports) == len(STEPS)
        ledger.run("one", "one", "/runs/one").record(
            checkpoint(500, 500.0), report="{}", verdict=Verdict((), ()), alert_lines={}, memory=None, debts=()
        )
        assert len(kept_run(state, None).reports) == len(STEPS) + 1


def test_a_report_that_is_gone_is_a_gap(state: Path) -> None:
    """The file of a report that somebody removed is named; the others are shown."""
    (file,) = (state / "runs").rglob("step-000000200.json")
    file.unlink()
    history = history_of(kept_run(state, None))
    assert [report.checkpoint.step for report in history.reports] == [100, 400]
    assert history.gaps is not None
    (gap,) = [gap for gap in history.gaps if gap.cause == "unreadable report"]
    assert gap.step == 200
    assert str(file) in gap.why


FORM = json.loads(report_line(histories.report(100)))
LAYER = FORM["layers"][0]


def changed(**fields: object) -> str:
    return json.dumps(FORM | fields)


UNFIT = {
    "no JSON": "{",
    "a list": "[]",
    "depth": "[" * 100_000,
    "another schema": changed(schema="peel-agent/report/9"),
    "nothing else": '{"schema": "peel-agent/report/1"}',
    "NaN": changed(loss={"value": math.nan, "low": 0, "high": 0}),
    "infinity": changed(loss={"value": math.inf, "low": 0, "high": 0}),
    "1e999": changed(loss={"value": 0, "low": 0, "high": 0}).replace('"value": 0', '"value": 1e999', 1),
    "text for a loss": changed(loss={"value": "<b>", "low": 0, "high": 0}),
    "no loss": changed(loss=None),
    "a step that is text": changed(checkpoint=FORM["checkpoint"] | {"step": "<b>"}),
    "a negative step": changed(checkpoint=FORM["checkpoint"] | {"step": -1}),
    "a step past a browser's numbers": changed(checkpoint=FORM["checkpoint"] | {"step": 2**60}),
    "a path that is a list": changed(checkpoint=FORM["checkpoint"] | {"path": []}),
    "a list for layers": changed(layers=[[1]]),
    "a layer too far off": changed(layers=[LAYER | {"index": 10**9}]),
    "a name that is a number": changed(layers=[LAYER | {"name": 7}]),
    "a status that is an object": changed(layers=[LAYER | {"status": {}}]),
    "a part without a status": changed(layers=[LAYER | {"parts": {"mlp": {"status": None, "margin": None}}}]),
    "a finding that is text": changed(layers=[LAYER | {"finding": "<b>"}]),
    "a share that is true": changed(layers=[LAYER | {"optimization_share": True}]),
    "skipped that is text": changed(skipped="<b>"),
    "a redundancy of texts": changed(redundancy=[["<b>"]]),
    "a model without a size": changed(model=FORM["model"] | {"parameters": "many"}),
}


@pytest.mark.parametrize("text", UNFIT.values(), ids=UNFIT)
def test_what_is_no_report_is_named_and_left_out(text: str) -> None:
    """A file of a tracker that anybody may write to: it becomes a gap that says why, and the rest is shown."""
    good = report_line(histories.report(200))
    history = history_of(KeptRun("r", "p", (("bad\x1b.json", text), ("good.json", good)), ("{", "[]", "{}")))
    assert [report.checkpoint.step for report in history.reports] == [200]
    assert history.unreadable == 3
    assert history.gaps is not None
    (gap,) = history.gaps
    assert (gap.path, gap.cause) == ("bad\\x1b.json", "unreadable report")
    assert gap.why.isprintable()


def test_the_command_makes_the_page(state: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A state folder gives the page and the image; what was made is said, with its size."""
    out, image = tmp_path / "report.html", tmp_path / "map.png"
    assert main(["report", str(state), "--out", str(out), "--heat-map", str(image)]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith(f"wrote {out}: 3 checkpoints of the run one, 0.")
    assert said[1] == f"{image}: the heat map"
    assert image.read_bytes().startswith(b"\x89PNG")
    data = data_of(out.read_text())
    assert [row["step"] for row in records(data["tables"]["checkpoints"])] == list(STEPS)
    assert data["made"]["command"] == f"peel-agent report {state} --out {out}"
    assert not list(tmp_path.glob("*.part"))


def test_the_watched_directory_is_enough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The directory that the agent watches leads to its state, and so does the folder that was given with --state."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "home"))
    watched = tmp_path / "checkpoints"
    watched.mkdir()
    from peel_agent.config import load_settings
    from peel_agent.sources import with_absolute_places
    from peel_agent.state import state_dir_of

    state_dir = state_dir_of(with_absolute_places(load_settings(None, {"watch.path": str(watched)})), None)
    with closing(Ledger(state_dir)) as ledger:
        fill(ledger, "checkpoints", str(watched))
    for arguments in ([str(watched)], ["--state", str(state_dir)], [str(watched), "--state", str(state_dir)]):
        assert main(["report", *arguments, "--out", str(tmp_path / "report.html")]) == 0


def test_one_of_several_runs_is_named(state: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A page shows one run: of several one is named, and those that there are are told."""
    with closing(Ledger(state)) as ledger:
        fill(ledger, "two", "/runs/two")
    out = str(tmp_path / "report.html")
    assert main(["report", str(state), "--out", out]) == 3
    assert "--run: one, two" in capsys.readouterr().err
    assert main(["report", str(state), "--run", "three", "--out", out]) == 3
    assert "no run `three`" in capsys.readouterr().err
    assert main(["report", str(state), "--run", "two", "--out", out]) == 0
    assert data_of(Path(out).read_text())["run"] == {"name": "two", "place": "/runs/two"}


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (["nowhere"], 2, "nowhere is no directory, and no run id of MLflow"),
        (["."], 3, "no agent has kept anything in"),
        ([], 2, "it is not said which agent is meant"),
        (["0" * 32, "--tracker", "jsonl"], 2, "jsonl"),
    ],
)
def test_what_cannot_be_reported_on(
    arguments: list[str], status: int, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """Each wrong place has its sentence and its way out, and no file is left."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    assert main(["report", *arguments, "--out", "report.html"]) == status
    said = capsys.readouterr().err
    assert words in said
    assert "->" in said
    assert not (tmp_path / "report.html").exists()


def test_nothing_peeled_yet(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A run whose checkpoints were all refused has no page: exit status 3, and the last reason is told."""
    with closing(Ledger(tmp_path / "state")) as ledger:
        ledger.run("one", "one", "/runs/one").refuse(checkpoint(1, 1.0), "a tensor is missing")
    assert main(["report", str(tmp_path / "state"), "--out", str(tmp_path / "report.html")]) == 3
    said = capsys.readouterr().err
    assert "there is no report of one (/runs/one)" in said
    assert "a tensor is missing" in said


def test_a_file_that_cannot_be_written(state: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A folder that is not there is told with its name."""
    assert main(["report", str(state), "--out", str(tmp_path / "no" / "report.html")]) == 1
    assert "no/report.html cannot be written" in capsys.readouterr().err


def test_a_lost_report_alone(state: Path) -> None:
    """Gaps of a tracker's files are told although which checkpoints were missed is not known."""
    kept = dataclasses.replace(kept_run(state, None), gaps=None)
    assert history_of(kept).gaps is None
    with pytest.raises(NoReport, match="no run `x`"):
        kept_run(state, "x")
    assert Gap(1, "p", "rotated", "w").cause == "rotated"
