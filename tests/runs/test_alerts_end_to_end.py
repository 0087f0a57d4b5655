"""The demo's alert, as an on-call person gets it: at a real Alertmanager, as a mail and at a webhook, and its end."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests import receivers
from tests.contracts.test_alertmanager import active, alertmanager, needs_alertmanager
from tests.receivers import MailServer, Receiver, http_receiver, mail_server
from tests.runs.command import environment_of
from tests.runs.conftest import HELD_BACK, Train
from tests.waiting import wait_for

BLOCK = f"model.layers.{HELD_BACK}"
PATIENCE = 900.0
"""Seconds before a test gives up: peels wait for whoever else is at work on the machine."""

RELEASED = "model.layers.5"
RELEASED_AT, SAVE_EVERY, STEPS = 300, 150, 1500
"""A block that begins late is needed late: the others have learned to do without it."""

Told = tuple[str, str, str]
"""State, rule and subject of a notice."""

CONFIGURATION = """
[watch]
path = "{root}"
settle_seconds = 1
poll_seconds = 0.5
backlog = "all"

[probe]
path = "{probe}"
{sizes}

[peel]
quantities = ["margin"]

[device]
nice = 0

[state]
path = "{folder}/state"

[tracker]
use = ["jsonl"]

[health]
listen = ""

[[sink]]
use = "alertmanager"
url = "{manager}"

[[sink]]
use = "webhook"
url = "http://127.0.0.1:{hook}/peel"
allow_private = true

[[sink]]
use = "email"
host = "localhost"
port = {mail}
security = "tls"
user = "peel"
password = "${{MAIL_PASSWORD}}"
sender = "peel@example.org"
to = ["oncall@example.org"]
ca_file = "{authority}"
"""

SMALL = """
fit_tokens = 4096
select_tokens = 2048
confirm_tokens = 8192
sequence_length = 64
"""
"""Sizes of the probe that say enough of a block that does nothing."""

ONLY_BELOW = """
[[rule]]
name = "layer_below"
kind = "layer_below"
severity = "critical"
"""


@dataclass(frozen=True)
class OnCall:
    """The three places where notices arrive, and the agent that sends them."""

    manager: str
    behind: Receiver
    """Gets what Alertmanager hands on."""
    hook: Receiver
    mail: MailServer
    log: Path

    def arrived(self) -> dict[str, list[Told]]:
        """Each notice that came, by place, in order."""
        titles = [line for line in self.mail.text().splitlines() if line.startswith(("FIRING (", "RESOLVED ("))]
        handed_on = [one for request in self.behind.requests for one in json.loads(request.body)["alerts"]]
        return {
            "alertmanager": list(dict.fromkeys((one["status"], *_named(one["labels"])) for one in handed_on)),
            "webhook": [(one["state"], one["rule"], one["subject"]) for one in self.notices()],
            "mail": [(words[0].lower(), words[-1].strip("[]"), words[2]) for words in map(str.split, titles)],
        }

    def wait_for(self, state: str, subject: str) -> None:
        """Until all three know that the alert of this block is in this state."""
        told = (state, "layer_below", subject)
        wait_for(lambda: all(told in came for came in self.arrived().values()), PATIENCE)

    def notices(self) -> list[dict[str, Any]]:
        """All notices, as the webhook got them."""
        return [one for request in self.hook.requests for one in json.loads(request.body)["data"]["notices"]]


def _named(labels: dict[str, str]) -> tuple[str, str]:
    return labels["alertname"], labels["subject"]


@contextmanager
def on_call(folder: Path, root: Path, probe: Path, *, sizes: str = "", rules: str = "") -> Iterator[OnCall]:
    """The real agent on the checkpoints in `root`, with all three places."""
    tls = receivers.certificates(folder)
    with ExitStack() as stack:
        behind, hook = (stack.enter_context(http_receiver()) for _ in range(2))
        mail = stack.enter_context(mail_server("tls", tls.right, user="peel", password="of the mail"))
        manager = stack.enter_context(alertmanager(folder, f"http://127.0.0.1:{behind.port}/", resolve_timeout="5m"))
        form = CONFIGURATION.format(
            root=root, probe=probe, sizes=sizes, folder=folder, manager=manager, hook=hook.port, mail=mail.port,
            authority=tls.ca_file,
        )  # fmt: skip
        (folder / "peel.toml").write_text(form + rules)
        command = [sys.executable, "-m", "peel_agent", "watch", "-c", str(folder / "peel.toml")]
        with (folder / "log-of-agent").open("wb") as log:
            environment = environment_of(folder, MAIL_PASSWORD="of the mail")
            agent = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
        try:
            yield OnCall(manager, behind, hook, mail, folder / "log-of-agent")
        finally:
            agent.terminate()
            assert agent.wait(60) == 0, (folder / "log-of-agent").read_text()


def add(root: Path, training: Path, step: int, *, as_step: int) -> None:
    """A checkpoint of a training, as one of another step."""
    making = root.parent / "making"
    shutil.copytree(training / f"checkpoint-{step}", making)
    state = json.loads((making / "trainer_state.json").read_text())
    (making / "trainer_state.json").write_text(json.dumps(state | {"global_step": as_step}))
    making.rename(root / f"checkpoint-{as_step}")


@needs_alertmanager
@pytest.mark.filterwarnings("ignore:Requiring AUTH while not requiring TLS")  # aiosmtpd, of TLS from the first byte
def test_the_alert_arrives_and_ends_everywhere(train: Train, probe_file: Path, tmp_path: Path) -> None:
    """Of a block that does nothing, and then does as much as the others: two checkpoints of the training that held it
    back, then two of the one that did not. Each place is told once that it fires and once that it ended.
    """
    held_back, whole = train("llama", False), train("llama", True)
    root = tmp_path / "checkpoints"
    root.mkdir()
    with on_call(tmp_path, root, probe_file, sizes=SMALL, rules=ONLY_BELOW) as person:
        for step in (400, 500):
            add(root, held_back, step, as_step=step)
        person.wait_for("firing", BLOCK)
        (alert,) = active(person.manager)
        assert (alert["labels"]["subject"], alert["labels"]["severity"]) == (BLOCK, "critical")
        for step in (400, 500):
            add(root, whole, step, as_step=step + 200)
        person.wait_for("resolved", BLOCK)
        for came in person.arrived().values():
            assert came == [("firing", "layer_below", BLOCK), ("resolved", "layer_below", BLOCK)]
        assert active(person.manager) == []


@needs_alertmanager
@pytest.mark.long
@pytest.mark.filterwarnings("ignore:Requiring AUTH while not requiring TLS")
def test_the_alert_ends_when_the_block_is_released_in_the_middle_of_the_run(probe_file: Path, tmp_path: Path) -> None:
    """A training in which the last block is frozen up to step 300 and then learns, the shipped rules, the agent beside
    it: no other block is accused, and the end comes after the release.
    """
    root = tmp_path / "checkpoints"
    training = [sys.executable, "-m", "peel_agent.demo.train", str(root), "--steps", str(STEPS)]
    training += ["--save-every", str(SAVE_EVERY), "--hold-back", RELEASED[-1], "--release-at", str(RELEASED_AT)]
    with on_call(tmp_path, root, probe_file) as person:
        finished = subprocess.run(training, check=False, capture_output=True, text=True)
        assert finished.returncode == 0, finished.stderr
        person.wait_for("resolved", RELEASED)
        below = [notice for notice in person.notices() if notice["rule"] == "layer_below"]
        assert [(notice["state"], notice["subject"]) for notice in below] == [
            ("firing", RELEASED),
            ("resolved", RELEASED),
        ]
        assert below[0]["step"] <= RELEASED_AT < below[1]["step"]
        for came in person.arrived().values():
            assert {subject for _, _, subject in came} <= {RELEASED, "run"}
