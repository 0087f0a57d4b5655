"""`peel-agent alerts`, in process, on a real ledger; and what the ledger keeps for rules."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest

from peel_agent.cli import main
from peel_agent.ledger import Alerting, Ledger, RunLedger, silence, silences, unsilence
from peel_agent.records import RuleState, Verdict
from peel_plugins.sinks.jsonl_file import JsonlSink
from tests.rooms.test_ledger import checkpoint, record

FIRING = RuleState("layer_below", "model.layers.3", "firing", 0, 400, "400/f", "it is below", ("why",), "critical", 1)
SOON = RuleState("layer_changed", "model.layers.2", "pending", 1, 500, "500/f", "it changed")
CALM = RuleState("lag", "run", "inactive", 0, None)


@pytest.fixture
def run(tmp_path: Path) -> Iterator[RunLedger]:
    with closing(Ledger(tmp_path / "state")) as ledger:
        yield ledger.run("key", "mine", "/runs/mine")


@pytest.fixture
def ask(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    def ask(*arguments: str) -> tuple[int, str]:
        status = main(["alerts", *arguments, "--state", str(tmp_path / "state")])
        said = capsys.readouterr()
        return status, said.out + said.err

    return ask


def test_what_fires_is_listed(run: RunLedger, ask: Callable[..., tuple[int, str]]) -> None:
    """What fires and what may fire soon, with its words; what is inactive is not."""
    assert ask("list") == (0, "nothing fires\n")
    run.keep_verdict(Verdict((FIRING, SOON, CALM), ()), {}, ())
    assert ask("list") == (
        0,
        "mine: CRITICAL firing since step 400: layer_below: it is below\n"
        "mine: WARNING pending since step 500: layer_changed: it changed\n",
    )
    form = json.loads(ask("list", "--json")[1])
    assert [(one["run"], one["rule"], one["causes"]) for one in form["alerts"]] == [
        ("mine", "layer_below", ["why"]),
        ("mine", "layer_changed", []),
    ]


def test_a_silence_is_made_shown_and_ended(run: RunLedger, ask: Callable[..., tuple[int, str]]) -> None:
    """Its number ends it; the alert that it holds back is shown with it."""
    run.keep_verdict(Verdict((FIRING,), ()), {}, ())
    status, said = ask("silence", "--for", "2h", "--rule", "layer_*", "--why", "maintenance")
    assert (status, said.split(" until")[0]) == (0, "silence 1")
    assert 7100 < run.alerting.silences(time.time())[0].until - time.time() < 7300
    listed = ask("list")[1]
    assert "firing since step 400 (silence 1): layer_below" in listed
    assert "run *, rule layer_*, subject *: maintenance" in listed
    assert ask("unsilence", "1")[0] == 0
    assert run.alerting.silences(time.time()) == ()
    assert ask("unsilence", "1")[0] == 1


def test_a_silence_says_how_much_it_is_for(run: RunLedger, ask: Callable[..., tuple[int, str]]) -> None:
    """A name with a slip of the pen is for nothing that fires, and the answer shows it."""
    run.keep_verdict(Verdict((FIRING, SOON), ()), {}, ())
    for glob, count in (("layer_below", 1), ("layer_belw", 0), ("*", 1)):
        status, said = ask("silence", "--for", "2h", "--rule", glob)
        assert (status, said.splitlines()[1]) == (0, f"alerts that fire now, and that it is for: {count}")


def test_numbers_that_no_silence_has(run: RunLedger, ask: Callable[..., tuple[int, str]]) -> None:
    """However large; one that is given twice is ended once."""
    ids = [silence(run._database, run="*", rule="*", subject="*", until=1e12, why="") for _ in range(2)]
    status, said = ask("unsilence", str(ids[0]), str(ids[0]))
    assert (status, said.split(";")[0]) == (0, "silences ended: 1")
    for number in ("0", "7", str(2**63), "9" * 40):
        status, said = ask("unsilence", number)
        assert (status, said.split(";")[0]) == (1, "silences ended: 0")
        assert "`peel-agent alerts list` shows" in said
    assert [one.id for one in run.alerting.silences(0.0)] == ids[1:]


def test_texts_that_no_terminal_should_get(run: RunLedger, ask: Callable[..., tuple[int, str]]) -> None:
    """Bytes that are no text and control characters, in what is given and in what is listed, are escaped."""
    run.keep_verdict(Verdict((replace(FIRING, words="it is \x1b[31m below"),), ()), {}, ())
    assert ask("silence", "--for", "2h", "--rule", "\udcff*", "--why", "\udcff\x1b[31m")[0] == 0
    status, said = ask("list")
    assert (status, "\x1b" in said, "\udcff" in said) == (0, False, False)
    assert said.endswith("rule \\udcff*, subject *: \\udcff\\x1b[31m\n")


def test_a_sink_that_raises_anything_is_named(
    tmp_path: Path, ask: Callable[..., tuple[int, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Somebody else's plug-in; the next one is tried all the same."""
    monkeypatch.setattr(JsonlSink, "deliver", lambda _sink, _group: {}["a bug"])
    file = tmp_path / "peel.toml"
    file.write_text('[[sink]]\nuse = "jsonl"\npath = "~/notices"\n[[sink]]\nuse = "stderr"\n')
    status, said = ask("test", "-c", str(file))
    assert status == 1
    assert "jsonl failed: KeyError: 'a bug'" in said
    assert "sent to stderr" in said


@pytest.mark.parametrize("text", ["0m", "2", "h", "2w", "-1h", "1.5h"])
def test_a_time_that_is_none(text: str, run: RunLedger, ask: Callable[..., tuple[int, str]]) -> None:
    """A time without a unit, or of another one, is refused with what to write."""
    del run
    status, said = ask("silence", f"--for={text}")
    assert status == 2
    assert f"--for is `{text}`" in said
    assert "30m, 8h or 2d" in said


def test_a_test_notice_reaches_the_sinks(tmp_path: Path, ask: Callable[..., tuple[int, str]]) -> None:
    """Every sink of the file gets one; one that cannot take it is named with the remedy, and the exit status is 1."""
    config = tmp_path / "peel.toml"
    (tmp_path / "folder").mkdir()
    config.write_text(
        f'[[sink]]\nuse = "jsonl"\nname = "good"\npath = "{tmp_path}/notices"\n'
        f'[[sink]]\nuse = "jsonl"\nname = "bad"\npath = "{tmp_path}/folder"\n'
    )
    status, said = ask("test", "-c", str(config))
    assert status == 1
    assert f"sent to good: notices in {tmp_path}/notices" in said
    assert f"bad: notices cannot be written to {tmp_path}/folder" in said
    (line,) = (tmp_path / "notices").read_text().splitlines()
    assert [one["subject"] for one in json.loads(line)["notices"]] == ["agent"]
    assert ask("test", "-c", str(config), "--sink", "good")[0] == 0
    status, said = ask("test", "-c", str(config), "--sink", "other")
    assert (status, "there is no sink `other`" in said, "good, bad" in said) == (2, True, True)


def test_a_test_without_sinks_says_what_to_add(tmp_path: Path, ask: Callable[..., tuple[int, str]]) -> None:
    """No sink is configured: refused, with what to add."""
    config = tmp_path / "peel.toml"
    config.write_text("")
    status, said = ask("test", "-c", str(config))
    assert status == 2
    assert "add a [[sink]]" in said


# ---------------------------------------------------------------- what the ledger keeps for rules


def test_silences_end_by_themselves(run: RunLedger) -> None:
    """One that is over is not in force; the first to end comes first."""
    database = run._database
    late = silence(database, run="a", rule="b", subject="c", until=200.0, why="x")
    early = silence(database, run="*", rule="*", subject="*", until=100.0, why="")
    assert [one.id for one in silences(database, 50.0)] == [early, late]
    assert [one.id for one in silences(database, 100.0)] == [late]
    assert unsilence(database, [late, 99]) == 1
    assert silences(database, 50.0)[0].id == early


def test_how_the_watching_stands(run: RunLedger) -> None:
    """The newest checkpoint and the longest pause, what waits, what the newest one that ended came to."""
    standing = run.alerting.observed(0.0)
    assert (standing.last_checkpoint_at, standing.longest_pause, standing.waiting, standing.unusable) == (
        None,
        None,
        0,
        None,
    )
    for step, at in ((1, 100.0), (2, 160.0), (3, 400.0)):
        record(run, checkpoint(step, at))
    run.await_turn(checkpoint(4, 410.0))
    standing = run.alerting.observed(0.0)
    assert (standing.last_checkpoint_at, standing.last_step, standing.longest_pause) == (410.0, 4, 240.0)
    assert (standing.waiting, standing.unusable, standing.ended) == (1, None, None)
    run.refuse(checkpoint(4, 410.0), "it is damaged")
    assert run.alerting.observed(0.0).unusable == "the checkpoint of step 4 could not be peeled: it is damaged"
    record(run, checkpoint(5, 420.0))
    assert run.alerting.observed(0.0).unusable is None


def test_the_trainings_end_is_known_by_its_tracker_or_its_last_save(run: RunLedger) -> None:
    """A status that ends a run, until the tracker has it running again; or a save without a step after all others."""
    record(run, checkpoint(1, 100.0))
    run.alerting.keep_training([(1, 2.0)], ended="FINISHED")
    assert run.alerting.observed(0.0).ended == "the tracker has it as FINISHED"
    run.alerting.keep_training([], ended=None)
    assert run.alerting.observed(0.0).ended is None
    record(run, checkpoint(None, 200.0))
    assert run.alerting.observed(0.0).ended is not None


def test_the_training_loss_is_kept_once_a_step(run: RunLedger, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the order of steps, the newest value of each, and only the last points; each run its own."""
    monkeypatch.setattr("peel_agent.ledger.alerting.TRAINING_POINTS", 3)
    run.alerting.keep_training([(3, 1.0), (1, 3.0)], ended=None)
    run.alerting.keep_training([(3, 1.5), (2, 2.0), (4, 0.5)], ended=None)
    assert run.alerting.training_loss() == ((2, 2.0), (3, 1.5), (4, 0.5))
    assert Alerting(run._database, "other").training_loss() == ()
