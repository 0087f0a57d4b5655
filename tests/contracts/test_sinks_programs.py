"""The sinks that hand notices to other programs: exec, Apprise with a local receiver, and stderr for the journal."""

from __future__ import annotations

import builtins
import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from peel_agent.config import load_settings
from peel_agent.destinations import sink_settings
from peel_agent.errors import ConfigurationError, DeliveryError, DestinationDenied, DestinationUnavailable
from peel_agent.records import Notice, NoticeGroup, plain
from peel_agent.testing.sinks import CHECKS, Connect, Read, example_group
from peel_plugins.sinks import apprise_services, program, stderr
from peel_plugins.sinks.apprise_services import AppriseSettings, AppriseSink
from peel_plugins.sinks.program import ProgramSettings, ProgramSink
from peel_plugins.sinks.stderr import StderrSettings, StderrSink
from tests import receivers
from tests.receivers import Receiver, http_receiver, reply
from tests.waiting import wait_for

pytestmark = pytest.mark.filterwarnings("ignore:'imghdr' is deprecated")
"""A library that Apprise loads for its mail service uses it where it is still there."""

checks = pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)


# ---------------------------------------------------------------- exec


def script(folder: Path, text: str) -> str:
    """A program of the shell's that runs this."""
    file = folder / "hook"
    file.write_text(f"#!/bin/sh\n{textwrap.dedent(text)}\n")
    file.chmod(0o755)
    return str(file)


def run(*command: str, **options: Any) -> ProgramSink:
    return ProgramSink(ProgramSettings(command, enabled=True, **options))


@checks
def test_exec_conforms(check: Callable[[Connect, Read], None], tmp_path: Path) -> None:
    """A program that appends what it reads passes every check of the kit."""
    told = tmp_path / "told"
    settings = ProgramSettings((script(tmp_path, f'cat >> "{told}"'),), enabled=True)
    check(lambda: program.PLUGIN.connect(settings, state_dir=tmp_path), told.read_text)


def test_the_program_gets_json_its_arguments_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The group on stdin, arguments as they are without a shell, and five variables: no secret of the agent's."""
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "canary")
    text = (
        f'cat > "{tmp_path}/in"; env > "{tmp_path}/env"; pwd > "{tmp_path}/cwd"; printf "%s|" "$@" > "{tmp_path}/args"'
    )
    run(script(tmp_path, text), "$(touch x); *", "b c", path="/usr/bin:/bin", home="/h", lang="C").deliver(
        example_group("one")
    )
    assert json.loads((tmp_path / "in").read_text()) == plain(example_group("one"))
    assert (tmp_path / "args").read_text() == "$(touch x); *|b c|"
    assert (tmp_path / "cwd").read_text() == "/\n"
    environment = dict(line.split("=", 1) for line in (tmp_path / "env").read_text().splitlines())
    for name in ("PWD", "SHLVL", "_", "OLDPWD"):  # the shell's own
        environment.pop(name, None)
    wanted = {"PATH": "/usr/bin:/bin", "HOME": "/h", "LANG": "C", "PEEL_RUN": "a run", "PEEL_STATE": "firing"}
    assert environment == wanted


def test_the_state_is_resolved_when_nothing_fires(tmp_path: Path) -> None:
    """And a run's name is fit for a variable."""
    text = f'printf "%s %s" "$PEEL_STATE" "$PEEL_RUN" > "{tmp_path}/state"'
    notice = Notice("n", "r", "info", "resolved", "run", 1, "over")
    run(script(tmp_path, text)).deliver(NoticeGroup("g", "a\0b", 0.0, (notice,), "over"))
    assert (tmp_path / "state").read_text() == r"resolved a\x00b"


@pytest.mark.parametrize(
    ("text", "kind", "words"),
    [
        ("echo busy >&2; exit 75", DestinationUnavailable, "exit status 75: busy"),
        ("printf 'no \\033[31m pager' >&2; exit 1", DeliveryError, r"exit status 1: no \\x1b\[31m pager"),
        ("exit 3", DeliveryError, r"exit status 3\n"),
        ("kill -9 $$", DeliveryError, "by signal 9"),
        ("yes why | head -c 3000000 >&2; exit 1", DeliveryError, "why why"),
    ],
)
def test_the_exit_status_decides(text: str, kind: type[DeliveryError], words: str, tmp_path: Path) -> None:
    """75 is tried again, any other is given up, with a short printable piece of what it said."""
    with pytest.raises(DeliveryError, match=words) as caught:
        run(script(tmp_path, text)).deliver(example_group("one"))
    assert type(caught.value) is kind
    assert len(caught.value.what) < 600


def test_stdin_need_not_be_read_and_what_is_said_may_be_much(tmp_path: Path) -> None:
    """Neither a large group nor a large output holds it up."""
    notice = Notice("n", "r", "info", "firing", "run", 1, "x" * 1_000_000)
    run(script(tmp_path, "yes | head -c 3000000; yes | head -c 3000000 >&2; exit 0")).deliver(
        NoticeGroup("g", "a run", 0.0, (notice,), "x")
    )


def is_running(process: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False


def test_a_program_that_hangs_is_ended_with_its_children(tmp_path: Path) -> None:
    """At its time-out the whole process group goes, also a child that ignores the polite signal."""
    text = f"""
        trap '' TERM
        (trap '' TERM; while :; do sleep 100; done) &
        echo $! > "{tmp_path}/child"
        wait
    """
    with pytest.raises(DestinationUnavailable, match=r"did not end within 2 s, and was killed"):
        run(script(tmp_path, text), timeout_seconds=2.0).deliver(example_group("one"))
    wait_for(lambda: not is_running(int((tmp_path / "child").read_text())))


def test_what_a_program_leaves_behind_is_ended_too(tmp_path: Path) -> None:
    """A child in the background that holds stderr open does not hold up the lane."""
    run(script(tmp_path, f'sleep 1000 & echo $! > "{tmp_path}/child"')).deliver(example_group("one"))
    wait_for(lambda: not is_running(int((tmp_path / "child").read_text())))


def test_a_program_that_is_not_there(tmp_path: Path) -> None:
    """It waits until somebody installs it; the check tells, and runs nothing."""
    (tmp_path / "text").write_text("not executable")
    (tmp_path / "odd").write_text("#!/no/such/interpreter\n")
    (tmp_path / "odd").chmod(0o755)
    for name in ("no-such-program", str(tmp_path / "text"), str(tmp_path / "none")):
        with pytest.raises(DestinationDenied, match="is not there, or may not be run"):
            run(name).deliver(example_group("one"))
        (check,) = run(name).check(lambda: 0.0)
        assert not check.ok
    with pytest.raises(DestinationDenied, match="cannot be started"):
        run(str(tmp_path / "odd")).deliver(example_group("one"))
    (check,) = run(script(tmp_path, f'touch "{tmp_path}/ran"')).check(lambda: 0.0)
    assert check.ok
    assert not (tmp_path / "ran").exists()


def test_a_name_is_found_on_the_path(tmp_path: Path) -> None:
    """On the one of the settings."""
    script(tmp_path, f'/bin/cat > "{tmp_path}/in"')
    run("hook", path=str(tmp_path)).deliver(example_group("one"))
    assert (tmp_path / "in").exists()


def test_exec_is_off_until_it_is_enabled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A configuration that names a program, and does not enable it, is refused at load; so is one without a program."""
    monkeypatch.setenv("PATH", "/mine")
    monkeypatch.setenv("HOME", "/me")
    monkeypatch.delenv("LANG", raising=False)
    file = tmp_path / "peel.toml"
    file.write_text('[[sink]]\nuse = "exec"\ncommand = ["page", "a,b"]\n')
    (sink,) = load_settings(file, {}).sinks
    with pytest.raises(ConfigurationError, match="would run page") as caught:
        sink_settings(sink)
    assert "enabled = true" in caught.value.remedy
    file.write_text('[[sink]]\nuse = "exec"\ncommand = ["page", "a,b"]\nenabled = true\n')
    (sink,) = load_settings(file, {}).sinks
    assert sink_settings(sink) == ProgramSettings(("page", "a,b"), True, path="/mine", home="/me", lang="C.UTF-8")
    for options, words in (({"command": ()}, "command"), ({"command": ("x",), "timeout_seconds": 0.0}, "timeout")):
        with pytest.raises(ConfigurationError, match=words):
            ProgramSettings(enabled=True, **options)


# ---------------------------------------------------------------- Apprise


def json_url(receiver: Receiver, path: str = "hook") -> str:
    return f"json://127.0.0.1:{receiver.port}/{path}"


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with http_receiver(reply(200)) as one:
        yield one


def bodies(receiver: Receiver) -> list[dict[str, str]]:
    return [json.loads(one.body) for one in receiver.requests]


@checks
def test_apprise_conforms(check: Callable[[Connect, Read], None], receiver: Receiver, tmp_path: Path) -> None:
    """Through the real library to a local receiver it passes every check of the kit."""
    settings = AppriseSettings((json_url(receiver),))
    check(
        lambda: apprise_services.PLUGIN.connect(settings, state_dir=tmp_path),
        lambda: "\n".join(f"{one['title']}\n{one['message']}" for one in bodies(receiver)),
    )


@pytest.mark.parametrize(
    ("severity", "state", "kind"),
    [
        ("critical", "firing", "failure"),
        ("warning", "firing", "warning"),
        ("info", "firing", "info"),
        ("critical", "resolved", "success"),
    ],
)
def test_apprise_is_told_how_grave_it_is(severity: Any, state: Any, kind: str, receiver: Receiver) -> None:
    """Title, words, and a kind by the gravest that fires."""
    notice = Notice("n", "r", severity, state, "run", 1, "It is so.", causes=("a cause",))
    AppriseSink(AppriseSettings((json_url(receiver),))).deliver(NoticeGroup("g", "a run", 0.0, (notice,), "x"))
    (body,) = bodies(receiver)
    assert body["type"] == kind
    assert body["title"].startswith("[peel-agent] a run: ")
    assert "It is so.\nLikely causes:\n- a cause" in body["message"]


def test_apprise_sends_to_each_that_lacks_it(receiver: Receiver) -> None:
    """When one of two fails it is named by number and kind, and only that one is tried again."""
    with http_receiver(reply(500), reply(200)) as broken:
        sink = AppriseSink(AppriseSettings((json_url(receiver), json_url(broken, "canary"))))
        with pytest.raises(DestinationUnavailable, match=r"number 2 \(json\), of 2") as caught:
            sink.deliver(example_group("one"))
        assert "canary" not in str(caught.value)
        sink.deliver(example_group("one"))
        assert (len(receiver.requests), len(broken.requests)) == (1, 2)
        sink.deliver(example_group("two"))
        assert (len(receiver.requests), len(broken.requests)) == (2, 3)


def test_apprise_follows_no_redirect(receiver: Receiver) -> None:
    """What a service does not take where it is, is not taken."""
    elsewhere = reply(307, Location=f"http://127.0.0.1:{receiver.port}/steal")
    with http_receiver(elsewhere) as turning, pytest.raises(DestinationUnavailable):
        AppriseSink(AppriseSettings((json_url(turning),))).deliver(example_group("one"))
    assert receiver.requests == []


def test_a_service_that_hangs_holds_one_thread_at_most() -> None:
    """Its time is up; until Apprise lets go of it nothing more is begun."""
    with http_receiver(receivers.dripping(b"HTTP/1.1 200 OK\r\n\r\n")) as slow:
        sink = AppriseSink(AppriseSettings((json_url(slow),), timeout_seconds=2.0))
        with pytest.raises(DestinationUnavailable, match="did not finish within 2 s"):
            sink.deliver(example_group("one"))
        with pytest.raises(DestinationUnavailable, match="still sending"):
            sink.deliver(example_group("one"))
        assert slow.connections == 1
    wait_for(lambda: not sink._sending.locked())


def test_apprise_keeps_its_words_to_itself(
    receiver: Receiver, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    """Its log would tell of hosts and paths; nothing of it comes out."""
    receiver.acts = [reply(500)]
    with pytest.raises(DestinationUnavailable):
        AppriseSink(AppriseSettings((json_url(receiver, "canary"),))).deliver(example_group("one"))
    assert "canary" not in capfd.readouterr().err + caplog.text


def test_a_url_that_apprise_does_not_know() -> None:
    """It is named by number; the check tells it for each, and sends nothing."""
    sink = AppriseSink(AppriseSettings(("json://localhost/", "nosuch://canary", "slack://canary")))
    assert sink.where() == "Apprise: json, nosuch, slack"
    with pytest.raises(DestinationDenied, match=r"number 2 \(nosuch\)"):
        sink.deliver(example_group("one"))
    told = sink.check(lambda: 0.0)
    assert [check.ok for check in told] == [True, False, False]
    assert "canary" not in repr(told)


def test_apprise_is_an_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the package the error says how to get it."""
    real = builtins.__import__

    def without(name: str, *rest: Any, **named: Any) -> Any:
        if name == "apprise":
            raise ImportError
        return real(name, *rest, **named)

    monkeypatch.setattr(builtins, "__import__", without)
    sink = AppriseSink(AppriseSettings(("json://localhost/",)))
    with pytest.raises(DestinationDenied, match="not installed") as caught:
        sink.deliver(example_group("one"))
    assert "peel-agent[apprise]" in caught.value.remedy
    (check,) = sink.check(lambda: 0.0)
    assert not check.ok


@pytest.mark.parametrize(
    "options", [{"urls": ()}, {"urls": ("canary",)}, {"urls": ("json://x",), "timeout_seconds": -1.0}]
)
def test_apprise_settings_that_cannot_be_right(options: dict[str, Any]) -> None:
    """An error at load, without the URL."""
    with pytest.raises(ConfigurationError) as caught:
        AppriseSettings(**options)
    assert "canary" not in str(caught.value)


# ---------------------------------------------------------------- stderr, for the journal


def notices(*kinds: tuple[str, str]) -> NoticeGroup:
    all_notices: Any = tuple(
        Notice(f"n{n}", "r", s, state, "run", 1, f"text {n}") for n, (s, state) in enumerate(kinds)
    )  # type: ignore[arg-type]
    return NoticeGroup("g", "a run", 0.0, all_notices, "\n".join(one.text for one in all_notices))


def test_priorities(capsys: pytest.CaptureFixture[str]) -> None:
    """With journal = true each line begins with its notice's priority, also one that goes on; else with the gravest."""
    sink = StderrSink(StderrSettings(journal=True))
    group = notices(("critical", "firing"), ("warning", "firing"), ("info", "firing"), ("critical", "resolved"))
    sink.deliver(group)
    assert capsys.readouterr().err == "<3>text 0\n<4>text 1\n<6>text 2\n<5>text 3\n"
    for text, priorities in (
        ("one\n  perhaps a\n  more: b\ntwo", "4446"),
        ("one\ntwo\nthree", "444"),
        (" one\ntwo", "44"),
    ):
        sink.deliver(NoticeGroup("g", "a run", 0.0, group.notices[1:3], text))
        assert [line[:3] for line in capsys.readouterr().err.splitlines()] == [f"<{one}>" for one in priorities]


def test_a_terminal_gets_no_priorities(capsys: pytest.CaptureFixture[str]) -> None:
    """Nor does a stderr that is not the stream that systemd names, or no file at all."""
    for settings in (StderrSettings(), StderrSettings(journal_stream="8:1"), StderrSettings(journal_stream="")):
        StderrSink(settings).deliver(notices(("critical", "firing")))
        assert capsys.readouterr().err == "text 0\n"


def test_a_name_moves_no_cursor(capsys: pytest.CaptureFixture[str]) -> None:
    """Control characters and half characters come out as their escapes."""
    StderrSink(StderrSettings()).deliver(NoticeGroup("g", "a run", 0.0, (), "a\x1b[31m b\ud800\n  c"))
    assert capsys.readouterr().err == "a\\x1b[31m b\\ud800\n  c\n"


def test_the_journal_is_known_by_its_stream(tmp_path: Path) -> None:
    """When JOURNAL_STREAM names the device and inode of stderr, as systemd sets it, lines have priorities."""
    config = tmp_path / "peel.toml"
    config.write_text('[[sink]]\nuse = "stderr"\n')
    statement = (
        "from peel_agent.config import load_settings\nfrom peel_agent.destinations import sink_settings\n"
        "from pathlib import Path\nfrom peel_agent.testing.sinks import example_group\n"
        "from peel_plugins.sinks.stderr import PLUGIN\n"
        f"(sink,) = load_settings(Path({str(config)!r}), {{}}).sinks\n"
        "PLUGIN.connect(sink_settings(sink), state_dir=Path()).deliver(example_group('one', notices=1))\n"
    )
    for named in (True, False):
        log = tmp_path / f"log-{named}"
        with log.open("wb") as stream:
            about = os.fstat(stream.fileno())
            name = f"{about.st_dev}:{about.st_ino if named else 0}"
            environment = {**os.environ, "JOURNAL_STREAM": name}
            subprocess.run([sys.executable, "-c", statement], stderr=stream, env=environment, check=True)
        assert log.read_text().startswith("<3>a run: firing") == named


def test_stderr_is_the_plug_in(tmp_path: Path) -> None:
    """It enters with its settings."""
    assert stderr.PLUGIN.connect(StderrSettings(journal=True), state_dir=tmp_path).where() == "stderr"
