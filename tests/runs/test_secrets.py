"""No secret leaves the agent but to the place that it is for: one agent with every sink and a tracker, all of which
refuse it and repeat what they were told.
"""

from __future__ import annotations

import base64
import contextlib
import json
import subprocess
import sys
import time
import traceback
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from peel_agent.cli.main import _parser
from peel_agent.config import load_settings
from peel_agent.courier import Orders
from peel_agent.destinations import addresses
from peel_agent.doctor.destinations import check_sinks, check_trackers
from peel_agent.errors import PeelError
from peel_agent.ledger import FILE
from peel_agent.records import plain
from tests import receivers
from tests.contracts.test_sinks_secrets import echo_everything, redirect_to_itself, repeating_login
from tests.receivers import Act, Certificates, Receiver, http_receiver, reply
from tests.runs.sidecar import Sidecar
from tests.servers import free_port

pytestmark = pytest.mark.filterwarnings("ignore:'imghdr' is deprecated")  # a library that Apprise loads

CANARY = "canary"
"""Part of every secret, and of nothing else."""

SECRETS = {
    "MLFLOW": "us:canary-mlflow%2Fpass",
    "MLFLOW_TRACKING_TOKEN": "canary-mlflow-token",
    "HOOK_PATH": "T0canary/B1canary%2Fq",
    "HOOK_TOKEN": "Canary-Hook-Token",
    "SIGNING": "canary signing",
    "CHAT_PATH": "services/T0/canary-chat",
    "MAIL_PASSWORD": "canary-pass-word",
    "MANAGER": "us:canary-manager",
    "MANAGER_TOKEN": "canary-manager-token",
    "APPRISE": "us:canary-apprise",
    "PROGRAM_KEY": "canary-program-key",
}

CONFIGURATION = """
[tracker]
use = ["mlflow"]
[tracker.mlflow]
tracking_uri = "${URI}"
experiment = "ours"

[[sink]]
use = "webhook"
url = "${HOOK}"
token = "${HOOK_TOKEN}"
signing_secret = "${SIGNING}"
allow_private = true
ca_file = "AUTHORITY"

[[sink]]
use = "slack"
url = "${CHAT}"
allow_private = true
ca_file = "AUTHORITY"

[[sink]]
use = "email"
host = "localhost"
port = MAIL_PORT
security = "tls"
user = "us"
password = "file:FOLDER/mail-password"
sender = "a@b.example"
to = ["c@d.example"]
ca_file = "AUTHORITY"

[[sink]]
use = "alertmanager"
url = "${MANAGER_URL}"
token = "${MANAGER_TOKEN}"
ca_file = "AUTHORITY"

[[sink]]
use = "apprise"
urls = ["${APPRISE_URL}"]

[[sink]]
use = "exec"
command = ["FOLDER/hook", "--key", "${PROGRAM_KEY}"]
enabled = true

[[sink]]
use = "jsonl"

[[sink]]
use = "stderr"
"""

SINKS = ("webhook", "slack", "email", "alertmanager", "apprise", "exec")
"""Those that hold a secret."""


def refuse_for_good(receiver: Receiver, connection: object) -> None:
    """422, which puts the delivery aside, with the request as it came."""
    asked = receiver.requests[-1]
    reply(422, f"{asked.target} {asked.headers} ".encode() + asked.body)(receiver, connection)  # type: ignore[arg-type]


def spelled(secret: str) -> set[str]:
    """A secret as it may stand somewhere: as it is, as an address has it, as a header has it."""
    plain_text = urllib.parse.unquote(secret)
    encoded = {base64.b64encode(one.encode()).decode().rstrip("=") for one in (secret, plain_text)}
    return {secret.lower(), plain_text.lower(), urllib.parse.quote(secret).lower()} | encoded


def assert_silent(said: Mapping[str, str]) -> None:
    """No secret is in any of these texts."""
    for what, text in said.items():
        at = text.lower().find(CANARY)
        assert at < 0, f"{what}: ...{text[max(0, at - 200) : at + 100]}..."
        assert not [one for secret in SECRETS.values() for one in spelled(secret) if one in text], what


def ways(server_act: Act, final: Act) -> tuple[Act, ...]:
    """A first notice that is put aside, and then refusals that are tried again."""
    return (final, server_act)


@contextlib.contextmanager
def places(folder: Path, tls: Certificates) -> Iterator[tuple[dict[str, str], dict[str, Receiver]]]:
    """Variables with addresses that hold the secrets, and the servers there: all repeat what they were told."""
    with contextlib.ExitStack() as stack:
        secure = {
            "webhook": ways(echo_everything, refuse_for_good),
            "slack": ways(redirect_to_itself, refuse_for_good),
            "alertmanager": ways(echo_everything, refuse_for_good),
        }
        servers = {name: stack.enter_context(http_receiver(*acts, tls=tls.right)) for name, acts in secure.items()}
        servers |= {name: stack.enter_context(http_receiver(echo_everything)) for name in ("mlflow", "apprise")}
        mail = repeating_login("PLAIN")
        servers["email"] = stack.enter_context(http_receiver(mail, tls=tls.right, greeting=b"220 mail\r\n"))
        port = {name: server.port for name, server in servers.items()}
        variables = {
            **SECRETS,
            "URI": f"http://{SECRETS['MLFLOW']}@127.0.0.1:{port['mlflow']}",
            "HOOK": f"https://localhost:{port['webhook']}/{SECRETS['HOOK_PATH']}?key=canary-query",
            "CHAT": f"https://localhost:{port['slack']}/{SECRETS['CHAT_PATH']}",
            "MANAGER_URL": f"https://localhost:{port['alertmanager']}/canary-path",
            "APPRISE_URL": f"json://{SECRETS['APPRISE']}@127.0.0.1:{port['apprise']}/canary-path?+X-Key=canary-header",
        }
        (folder / "mail-password").write_text(SECRETS["MAIL_PASSWORD"])
        (folder / "hook").write_text('#!/bin/sh\necho "no: $*" >&2\nexit 1\n')
        (folder / "hook").chmod(0o755)
        yield variables, servers


@pytest.fixture(scope="module")
def tls(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return receivers.certificates(tmp_path_factory.mktemp("tls"))


class Watched(Sidecar):
    """The agent with a page, whose address is in `page`."""

    def configure(self, more: str) -> None:
        super().configure(more)
        self.page = f"127.0.0.1:{free_port()}"
        self.file.write_text(self.file.read_text().replace('listen = ""', f'listen = "{self.page}"'))

    def pages(self) -> dict[str, str]:
        return {path: self._page(path) for path in ("/healthz", "/readyz", "/metrics", "/elsewhere")}

    def _page(self, path: str) -> str:
        try:
            with urllib.request.urlopen(f"http://{self.page}{path}") as answer:
                return str(answer.read().decode())
        except urllib.error.HTTPError as error:
            return error.read().decode()

    def commands(self) -> dict[str, str]:
        """What each command that looks at the agent says."""
        said = {}
        for words in (
            "status", "status --json", "alerts list", "alerts list --json", "alerts test", "deliveries list",
            "deliveries show",
        ):  # fmt: skip
            done = self.command(*words.split())
            said[words] = done.stdout + done.stderr
        return said

    def once(self) -> subprocess.CompletedProcess[str]:
        """`watch --once --json`, with the engine that answers at once."""
        command = [sys.executable, "-m", self.module, "watch", "-c", str(self.file), "--once", "--json"]
        return subprocess.run(command, check=False, capture_output=True, text=True, env=self.environment)

    def files(self) -> dict[str, str]:
        """Everything beneath the state folder, as bytes; also what SQLite keeps beside its file."""
        kept = [path for path in self.state.rglob("*") if path.is_file()]
        return {str(path): path.read_bytes().decode("latin-1") for path in kept}


def doctor_says(sidecar: Sidecar) -> str:
    """Of the tracker and the sinks; without looking at the checkpoints, which takes long."""
    settings = load_settings(sidecar.file, {})
    (run,) = settings.runs
    to_sinks = check_sinks(settings.sinks, sidecar.state, time.time)
    to_trackers = check_trackers(run, sidecar.state, "", time.time, alone=True)
    return "\n".join(repr(check) for check in (*to_sinks, *to_trackers))


def courier_says(sidecar: Sidecar, environment: Mapping[str, str]) -> str:
    """Stdout and stderr of a courier that is told to send all that is owed."""
    settings = load_settings(sidecar.file, {})
    (run,) = settings.runs
    (key,) = {key for (key,) in sidecar.read("SELECT DISTINCT run FROM deliveries")}
    ends = addresses(run, settings, key=key, folder=sidecar.state / "runs" / key, state_dir=sidecar.state)
    orders = Orders(sidecar.state, ends)
    lines = [json.dumps(plain(orders)), *(json.dumps({"say": say}) for say in ("look", "drain"))]
    command = [sys.executable, "-m", "peel_agent.courier"]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
    ) as courier:
        assert courier.stdin is not None
        assert courier.stdout is not None
        courier.stdin.write("\n".join(lines) + "\n")
        courier.stdin.flush()
        told = []
        for line in courier.stdout:
            told.append(line)
            if line.startswith('{"drained"'):
                break
        courier.stdin.close()
    return "".join(told)


def test_the_agent_tells_no_secret(tls: Certificates, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not in its log in either form, on its pages, in any file of its state, in what any command says beside it or
    after it, nor in what its courier tells it, while every place refuses and repeats what it was told.
    """
    with places(tmp_path, tls) as (variables, servers):
        form = CONFIGURATION.replace("AUTHORITY", str(tls.ca_file)).replace("FOLDER", str(tmp_path))
        form = form.replace("MAIL_PORT", str(servers["email"].port))
        sidecar = Watched(tmp_path, form, **variables)
        for name, text in variables.items():
            monkeypatch.setenv(name, text)
        with sidecar.running():
            sidecar.write(100, 200, 300)
            sidecar.wait_for_steps(100, 200, 300)
            for name in SINKS:
                sidecar.wait_for_words(f"notices for {name}")
            sidecar.wait_for_words("numbers for mlflow")
            assert_silent(sidecar.pages())
            assert_silent(sidecar.commands())
            assert_silent(sidecar.files())
        dead = {name for (name,) in sidecar.read("SELECT destination FROM deliveries WHERE dead = 1")}
        assert {"webhook", "slack", "alertmanager"} <= dead
        sidecar.file.write_text(sidecar.file.read_text() + '[log]\nformat = "json"\n')
        sidecar.write(500, 600)
        again = sidecar.once()
        assert sidecar.steps() == [100, 200, 300, 500, 600], again.stderr
        assert_silent(
            {
                "the log": sidecar.said(),
                "--once": again.stdout + again.stderr,
                "doctor": doctor_says(sidecar),
                "the courier": courier_says(sidecar, sidecar.environment),
                **sidecar.commands(),
                **sidecar.files(),
            }
        )
        for name, server in servers.items():
            assert server.requests, name
        assert (sidecar.state / FILE).is_file()


DAMAGED = {
    "no address": "us:canary@localhost",
    "two lines": "https://us:canary\nx@localhost/",
    "a bracket": "https://us:canary@[/",
    "no host": "https://us:canary@/",
    "no port": "https://us:canary@localhost:many/",
    "another scheme": "gopher://us:canary@localhost/",
}
KEYS = {
    "mlflow": ("tracker", "tracking_uri", ""),
    "webhook": ("sink", "url", ""),
    "webhook's proxy": ("sink", "proxy", 'url = "https://localhost"'),
    "webhook's switch": ("sink", "allow_private", 'url = "https://localhost"'),
    "webhook's time": ("sink", "timeout_seconds", 'url = "https://localhost"'),
    "webhook's token": ("sink", "token", 'url = "https://localhost"'),
    "slack": ("sink", "url", ""),
    "alertmanager": ("sink", "url", ""),
    "alertmanager's token": ("sink", "token", 'url = "https://localhost"'),
    "apprise": ("sink", "urls", ""),
    "email's host": ("sink", "host", 'sender = "a@b.example"\nto = ["c@d.example"]'),
    "email's port": ("sink", "port", 'host = "localhost"\nsender = "a@b.example"\nto = ["c@d.example"]'),
    "email's security": ("sink", "security", 'host = "localhost"\nsender = "a@b.example"\nto = ["c@d.example"]'),
    "email's sender": ("sink", "sender", 'host = "localhost"\nto = ["c@d.example"]'),
    "email's receiver": ("sink", "to", 'host = "localhost"\nsender = "a@b.example"'),
}


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("damage", DAMAGED)
def test_what_a_secret_is_no_good_for_is_said_without_it(
    key: str, damage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where a secret stands at the wrong key: at the start, when it is connected, and by doctor."""
    monkeypatch.setenv("VALUE", DAMAGED[damage])
    use, (kind, name, more) = key.partition("'")[0], KEYS[key]
    value = '["${VALUE}"]' if name in ("urls", "to") else '"${VALUE}"'
    table = f"[tracker.{use}]\n{name} = {value}" if kind == "tracker" else f'[[sink]]\nuse = "{use}"\n{name} = {value}'
    (tmp_path / "peel.toml").write_text(f'[watch]\npath = "{tmp_path}"\n{table}\n{more}\n')
    settings = load_settings(tmp_path / "peel.toml", {})
    (run,) = settings.runs
    said = [repr(settings)]
    try:
        for address in addresses(run, settings, key="k", folder=tmp_path, state_dir=tmp_path):
            if address.kind == kind:
                end = address.sink() if kind == "sink" else address.tracker()
                said += [repr(address), repr(end), end.where()]
    except PeelError as error:
        said += [str(error), "".join(traceback.format_exception(error))]
    if kind == "sink":
        said += [repr(check) for check in check_sinks(settings.sinks, tmp_path, lambda: 0.0)]
    else:
        said += [repr(check) for check in check_trackers(run, tmp_path, "", lambda: 0.0, alone=True)]
    assert_silent({str(number): text for number, text in enumerate(said)})


def test_help_says_nothing_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """No option's default comes from a secret."""
    for name, text in SECRETS.items():
        monkeypatch.setenv(name, text)
    parser = _parser()
    texts = {"peel-agent": parser.format_help()}
    for action in parser._actions:
        for name, one in (action.choices or {}).items() if isinstance(action.choices, dict) else ():
            texts[name] = one.format_help()
    assert len(texts) > 10
    assert_silent(texts)
