"""The sink for Prometheus's Alertmanager against a real one; and the rules that are shipped for Prometheus itself."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
import shutil
import subprocess
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from peel_agent.errors import ConfigurationError, DeliveryError
from peel_agent.health.metrics import registry_of
from peel_agent.records import Notice, NoticeGroup
from peel_agent.testing.sinks import CHECKS, Connect, Read
from peel_plugins.sinks.alertmanager import PLUGIN, AlertmanagerSettings, alert
from tests.receivers import Receiver, http_receiver
from tests.rooms.test_health import FIGURES
from tests.servers import free_port, wait_until_it_answers
from tests.waiting import wait_for

SHIPPED = Path(__file__).parents[2] / "deploy" / "prometheus"
needs_alertmanager = pytest.mark.skipif(
    not shutil.which("prometheus-alertmanager"), reason="apt-get install prometheus-alertmanager"
)
needs_promtool = pytest.mark.skipif(not shutil.which("promtool"), reason="apt-get install prometheus")


def notice(state: str, subject: str = "model.layers.3", **changed: Any) -> Notice:
    known = Notice("id", "layer_below", "critical", state, subject, 400, "it is below", 300, ("why",), (), "scan it")
    return dataclasses.replace(known, **changed)


def group(*notices: Notice, at: float = 1_700_000_000.0, standing: bool = False) -> NoticeGroup:
    return NoticeGroup("group", "a run", at, notices, "text", standing)


@contextlib.contextmanager
def alertmanager(folder: Path, hook: str, resolve_timeout: str = "2s") -> Iterator[str]:
    """A real one, which hands each group on at once; what it does not hear of for so long has ended for it."""
    settings = {
        "global": {"resolve_timeout": resolve_timeout},
        "route": {
            "receiver": "hook",
            "group_by": ["run", "alertname"],
            "group_wait": "100ms",
            "group_interval": "200ms",
            "repeat_interval": "1h",
        },
        "receivers": [{"name": "hook", "webhook_configs": [{"url": hook, "send_resolved": True}]}],
    }
    (folder / "alertmanager.yml").write_text(yaml.safe_dump(settings))
    port, log = free_port(), folder / "log"
    command = ["prometheus-alertmanager", f"--config.file={folder}/alertmanager.yml", f"--storage.path={folder}/data"]
    command += [f"--web.listen-address=127.0.0.1:{port}", "--cluster.listen-address="]
    with log.open("wb") as output:
        server = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
    try:
        wait_until_it_answers(f"http://127.0.0.1:{port}/-/ready", server, log)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait(timeout=60)


def active(url: str) -> list[dict[str, Any]]:
    with urllib.request.urlopen(f"{url}/api/v2/alerts") as answer:
        alerts: list[dict[str, Any]] = json.load(answer)
    return alerts


def passed_on(receiver: Receiver) -> list[tuple[str, str]]:
    """Status and subject of every alert that Alertmanager handed on."""
    bodies = [json.loads(request.body) for request in receiver.requests]
    return [(one["status"], one["labels"]["subject"]) for body in bodies for one in body["alerts"]]


@needs_alertmanager
def test_a_real_alertmanager_receives_groups_and_resolves(tmp_path: Path) -> None:
    """Two alerts of one rule are one group; one that ends is handed on as resolved, the other goes on as long as it is
    told again, and ends by itself when it is not.
    """
    with http_receiver() as hook, alertmanager(tmp_path, f"http://127.0.0.1:{hook.port}/") as url:
        sink = PLUGIN.connect(AlertmanagerSettings(url), state_dir=tmp_path)
        assert all(check.ok for check in sink.check(lambda: 0.0))
        sink.deliver(group(notice("firing"), notice("firing", "model.layers.4")))
        wait_for(lambda: len(active(url)) == 2)
        (one,) = [received for received in active(url) if received["labels"]["subject"] == "model.layers.3"]
        assert one["labels"] == {
            "alertname": "layer_below", "job": "peel-agent", "run": "a run", "severity": "critical",
            "subject": "model.layers.3",
        }  # fmt: skip
        assert one["annotations"] == {"summary": "it is below", "step": "400", "causes": "why", "command": "scan it"}
        assert one["startsAt"].startswith("2023-11-14T22:13:20")
        wait_for(lambda: {("firing", "model.layers.3"), ("firing", "model.layers.4")} <= set(passed_on(hook)))
        sink.deliver(group(notice("resolved"), at=1_700_000_100.0))
        again = group(notice("firing", "model.layers.4"), at=1_700_000_101.0, standing=True)

        def goes_on() -> bool:
            sink.deliver(again)
            return ("resolved", "model.layers.3") in passed_on(hook)

        wait_for(goes_on)
        assert ("resolved", "model.layers.4") not in passed_on(hook)
        wait_for(lambda: ("resolved", "model.layers.4") in passed_on(hook))
        sink.close()


def test_it_conforms(tmp_path: Path) -> None:
    """The sink passes every check of the kit."""
    for check in CHECKS:
        with http_receiver() as receiver:
            connect, read = _connected(receiver, tmp_path)
            check(connect, read)


def _connected(receiver: Receiver, folder: Path) -> tuple[Connect, Read]:
    settings = AlertmanagerSettings(f"http://127.0.0.1:{receiver.port}/")

    def read() -> str:
        return "\n".join(request.body.decode().replace("\\u003c", "<") for request in receiver.requests)

    return (lambda: PLUGIN.connect(settings, state_dir=folder)), read


def test_an_alert_is_known_by_the_same_labels_as_long_as_it_lasts() -> None:
    """Firing, told again and resolved differ in their times alone; only the end has an end."""
    fired, again, ended = (
        alert(notice("firing"), group()),
        alert(notice("firing"), group(standing=True)),
        alert(notice("resolved", causes=(), command=None), group()),
    )
    assert fired["labels"] == again["labels"] == ended["labels"]
    assert [sorted(set(one) - {"labels", "annotations"}) for one in (fired, again, ended)] == [
        ["startsAt"],
        [],
        ["endsAt"],
    ]


def test_each_cause_has_a_line_of_its_own() -> None:
    """A reader can tell one likely cause from the next."""
    annotations = alert(notice("firing", causes=("one\x1b", "other")), group())["annotations"]
    assert isinstance(annotations, dict)
    assert annotations["causes"] == "one\\x1b\nother"


def test_hostile_names_make_harmless_labels() -> None:
    """Control characters and endless names come out of checkpoints."""
    made = alert(notice("firing", "x\x1b[31m\n" + "y" * 999, text="\x07words"), group())
    labels, annotations = made["labels"], made["annotations"]
    assert isinstance(labels, dict)
    assert isinstance(annotations, dict)
    assert all(len(text) <= 200 and text.isprintable() for text in labels.values())
    assert all(text.isprintable() for text in annotations["summary"])


def test_no_secret_is_said(tmp_path: Path) -> None:
    """Not in where(), not in an error, not in the settings' repr."""
    port = free_port()
    settings = AlertmanagerSettings(f"http://127.0.0.1:{port}/canary-path-token", token="canary-token")
    sink = PLUGIN.connect(settings, state_dir=tmp_path)
    with pytest.raises(DeliveryError) as caught:
        sink.deliver(group(notice("firing")))
    for said in (sink.where(), str(caught.value), repr(settings)):
        assert "canary" not in said
    with pytest.raises(ConfigurationError) as refused:
        AlertmanagerSettings(f"http://127.0.0.1:{port}", token="canary\n")
    assert "canary" not in str(refused.value)


# ---------------------------------------------------------------- what is shipped for Prometheus


@needs_promtool
@pytest.mark.parametrize(
    "command",
    [
        ("promtool", "check", "rules", "peel-agent.rules.yml"),
        ("promtool", "test", "rules", "peel-agent.test.yml"),
        ("promtool", "check", "config", "prometheus.yml"),
    ],
    ids=lambda command: " ".join(command[1:]),
)
def test_promtool_takes_what_is_shipped(command: tuple[str, ...]) -> None:
    """The rules are well formed, raise what their tests say and nothing else, and the configuration loads."""
    done = subprocess.run(command, cwd=SHIPPED, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@needs_alertmanager
def test_the_shipped_alertmanager_configuration_loads() -> None:
    """amtool reads it."""
    done = subprocess.run(
        ["amtool", "check-config", "alertmanager.yml"], cwd=SHIPPED, check=False, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_metric_of_the_rules_exists() -> None:
    """The rules read what the agent really serves."""
    served = {metric.name for metric in registry_of(lambda: FIGURES).collect()}
    text = (SHIPPED / "peel-agent.rules.yml").read_text()
    read = set(re.findall(r"\bpeel_[a-z_]+", text))
    assert read
    assert {name.removesuffix("_total") for name in read} <= served


def test_every_shipped_rule_has_a_test() -> None:
    """Each alert of the rules is in the file of their tests, raised and not raised."""
    rules = yaml.safe_load((SHIPPED / "peel-agent.rules.yml").read_text())
    names = {rule["alert"] for one in rules["groups"] for rule in one["rules"]}
    tests = yaml.safe_load((SHIPPED / "peel-agent.test.yml").read_text())["tests"]
    cases = [case for one in tests for case in one["alert_rule_test"]]
    for name in names:
        assert {bool(case["exp_alerts"]) for case in cases if case["alertname"] == name} == {True, False}, name
