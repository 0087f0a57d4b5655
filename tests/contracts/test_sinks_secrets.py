"""No sink tells a secret, whatever goes wrong, also when the other side repeats all that it was told."""

from __future__ import annotations

import base64
import dataclasses
import logging
import socket
import sqlite3
import ssl
import traceback
from collections.abc import Callable
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from peel_agent import registry
from peel_agent.config import load_settings
from peel_agent.deliver import Carrier
from peel_agent.destinations import Address, sink_settings
from peel_agent.errors import PeelError
from peel_agent.ledger import FILE, Lane, Ledger, Outbox, open_beside
from peel_agent.notify import to_sinks
from peel_agent.records import CheckpointRef, Notice, Verdict, plain
from peel_agent.testing.sinks import example_group
from tests import receivers
from tests.receivers import Act, Certificates, Receiver, http_receiver, mail_server, reply

pytestmark = [
    pytest.mark.filterwarnings("ignore:'imghdr' is deprecated"),  # a library that Apprise loads
    pytest.mark.filterwarnings("ignore:Requiring AUTH while not requiring TLS"),  # aiosmtpd, of TLS from the first byte
]

CANARY = "canary"
"""Part of every secret, and of nothing else."""

SECRETS = {
    "PATH_SECRET": "T0canary/B1canary%2Fq",
    "TOKEN": "Canary-Token",
    "SIGNING": "canary signing",
    "PASSWORD": "canary-pass-word",
    "PROXY": "canary%40proxy",
}


@pytest.fixture(scope="module")
def tls(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return receivers.certificates(tmp_path_factory.mktemp("tls"))


def echo_everything(receiver: Receiver, connection: socket.socket) -> None:
    """A refusal that holds the request as it came, its address also on its own."""
    asked = receiver.requests[-1]
    words = f"{asked.target} {asked.target.rsplit('/', 1)[-1]} {asked.headers} ".encode() + asked.body
    reply(401, words, Retry_After=asked.target)(receiver, connection)


def redirect_to_itself(receiver: Receiver, connection: socket.socket) -> None:
    """A redirect to the same address elsewhere, with the secrets in its host as well."""
    asked = receiver.requests[-1]
    host = asked.headers.get("authorization", "x").rpartition(" ")[2]
    reply(302, Location=f"https://{host}.example{asked.target}")(receiver, connection)


def busy_with_it(receiver: Receiver, connection: socket.socket) -> None:
    """A pause whose words repeat the address."""
    reply(503, b"busy", Retry_After=receiver.requests[-1].target)(receiver, connection)


HTTP_FAULTS: dict[str, Act] = {
    "it repeats everything": echo_everything,
    "it redirects": redirect_to_itself,
    "it is busy": busy_with_it,
    "500": reply(500),
    "404": reply(404),
    "it hangs": receivers.hang,
    "it resets": receivers.reset,
    "it is not HTTP": receivers.says(b"nonsense\r\n\r\n"),
    "it floods": receivers.flood,
}


def repeating_login(mechanism: str) -> Act:
    """A mail server that answers the password with what it got, and with what that decodes to."""

    def repeat(_: Receiver, connection: socket.socket) -> None:
        connection.sendall(f"250-mail\r\n250 AUTH {mechanism}\r\n".encode())
        while words := connection.recv(65536).decode("ascii").split():
            if words[:2] == ["AUTH", "LOGIN"]:
                connection.sendall(b"334 UGFzc3dvcmQ6\r\n")
                continue
            decoded = base64.b64decode(words[-1]).replace(b"\0", b" ").decode()
            connection.sendall(f"535 {' '.join(words)} {decoded}\r\n".encode())

    return repeat


@dataclass(frozen=True)
class Case:
    """A [[sink]] of the configuration, written for a port, and what its server does wrong."""

    toml: str
    act: Act
    tls: str | None = None
    greeting: bytes = b""
    brief: bool = False
    """Whether the time-out is what goes wrong."""

    def written(self, folder: Path, port: int, ca_file: Path) -> Path:
        """The configuration with this sink alone."""
        text = self.toml.replace("FOLDER", str(folder)).replace("AUTHORITY", str(ca_file)).replace("PORT", str(port))
        file = folder / "peel.toml"
        file.write_text(f'[[sink]]\nname = "mine"\n{text.replace("SECONDS", "0.3" if self.brief else "60")}')
        return file


def http_case(use: str, act: Act, *, extra: str = "", tls: str | None = "right", brief: bool = False) -> Case:
    toml = f"""
        use = "{use}"
        url = "file:FOLDER/url"
        allow_private = true
        ca_file = "AUTHORITY"
        timeout_seconds = SECONDS
        {extra}
    """
    return Case(toml, act, tls, brief=brief or act is receivers.hang)


WITH_SECRETS = 'token = "${TOKEN}"\nsigning_secret = "${SIGNING}"'
MAIL = """
    use = "email"
    host = "localhost"
    port = PORT
    security = "tls"
    user = "us"
    password = "${PASSWORD}"
    sender = "a@b.example"
    to = ["c@d.example"]
    ca_file = "AUTHORITY"
    timeout_seconds = SECONDS
"""
APPRISE = """
    use = "apprise"
    urls = ["file:FOLDER/apprise"]
    timeout_seconds = SECONDS
"""
EXEC = """
    use = "exec"
    command = ["FOLDER/hook", "--key", "${TOKEN}"]
    enabled = true
    timeout_seconds = SECONDS
"""

CASES: dict[str, Case] = {
    **{f"webhook: {name}": http_case("webhook", act, extra=WITH_SECRETS) for name, act in HTTP_FAULTS.items()},
    **{f"slack: {name}": http_case("slack", act) for name, act in HTTP_FAULTS.items()},
    "webhook: another host's certificate": http_case("webhook", reply(204), extra=WITH_SECRETS, tls="other_name"),
    "webhook: an unknown authority": http_case("webhook", reply(204), extra=WITH_SECRETS, tls="unknown"),
    "webhook: no TLS": http_case("webhook", reply(204), extra=WITH_SECRETS, tls=None, brief=True),
    "webhook: a proxy that repeats everything": http_case(
        "webhook", echo_everything, extra='proxy = "file:FOLDER/proxy"', tls=None
    ),
    "webhook: a private address": Case('use = "webhook"\nurl = "file:FOLDER/url"', reply(204), "right"),
    **{
        f"email: it repeats the login by {name}": Case(MAIL, repeating_login(name), "right", b"220 mail\r\n")
        for name in ("PLAIN", "LOGIN")
    },
    "email: it hangs": Case(MAIL, receivers.hang, "right", b"220 mail\r\n", brief=True),
    "email: it resets": Case(MAIL, receivers.reset, "right", b"220 mail\r\n"),
    "email: no mail server": Case(MAIL, receivers.says(b"HTTP/1.1 400\r\n"), "right", b"HTTP/1.1 400 Bad\r\n"),
    "email: another host's certificate": Case(MAIL, receivers.hang, "other_name", b"220 mail\r\n"),
    **{
        f"apprise: {name}": Case(APPRISE, HTTP_FAULTS[name], brief=name == "it hangs")
        for name in ("it repeats everything", "500", "it hangs", "it resets")
    },
    "exec: it repeats its arguments": Case(EXEC, reply(204)),
}


@pytest.fixture
def told(caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]) -> Callable[[], str]:
    """All that was logged or printed."""
    caplog.set_level(logging.DEBUG)
    return lambda: caplog.text + "".join(capfd.readouterr())


def prepare(folder: Path, port: int, tls: Certificates, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, text in SECRETS.items():
        monkeypatch.setenv(name, text)
    (folder / "url").write_text(f"https://localhost:{port}/services/{SECRETS['PATH_SECRET']}?key=canary-query\n")
    (folder / "proxy").write_text(f"http://us:{SECRETS['PROXY']}@127.0.0.1:{port}")
    (folder / "apprise").write_text(f"json://us:canary-apprise@127.0.0.1:{port}/canary-path?+X-Key=canary-header")
    (folder / "hook").write_text('#!/bin/sh\necho "no: $*" >&2\nexit 1\n')
    (folder / "hook").chmod(0o755)


@pytest.mark.parametrize("name", CASES)
def test_no_secret_is_told(
    name: str, tls: Certificates, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, told: Callable[[], str]
) -> None:
    """Not in what is said of the settings, of the place, of a check or of a delivery, nor in its ledger or any log."""
    case = CASES[name]
    with ExitStack() as stack:
        context: ssl.SSLContext | None = getattr(tls, case.tls) if case.tls else None
        server = stack.enter_context(http_receiver(case.act, tls=context, greeting=case.greeting))
        prepare(tmp_path, server.port, tls, monkeypatch)
        (sink,) = load_settings(case.written(tmp_path, server.port, tls.ca_file), {}).sinks
        settings = sink_settings(sink)
        said = [
            repr(sink),
            repr(settings),
            *told_by(Address("sink", "mine", sink.use, plain(settings), "run", "/run", tmp_path)),
        ]
    for text in [*said, told()]:
        assert CANARY not in text.lower(), text
        assert base64.b64encode(SECRETS["PASSWORD"].encode()).decode().rstrip("=") not in text, text


def told_by(address: Address) -> list[str]:
    """What a sink says of itself, of its checks, and of a delivery that fails, directly and to the courier."""
    with closing(address.sink()) as sink:
        said = [sink.where(), repr(sink)]
        with pytest.raises(PeelError) as caught:
            sink.deliver(example_group("one"))
        said += [str(caught.value), repr(caught.value), "".join(traceback.format_exception(caught.value))]
        if hasattr(sink, "check"):
            said += [repr(check) for check in sink.check(lambda: 0.0)]
    with (
        closing(Ledger(address.state_dir)) as ledger,
        closing(open_beside(address.state_dir, writing=True)) as database,
    ):
        owe(ledger)
        carrier = Carrier(Lane("run", "mine", "notices"), address, Outbox(database), lambda: 1e9)
        outcome = carrier.step()
        carrier.close()
        assert (outcome.trouble, outcome.buried) != (None, None)
        said += [repr(outcome), carrier.where()]
    with closing(sqlite3.connect(address.state_dir / FILE)) as database:
        said += list(database.iterdump())
    return said


def owe(ledger: Ledger) -> None:
    notice = Notice("n", "r", "warning", "firing", "model.layers.3", 1, "text", 1)
    ledger.run("run", "a run", "/run").record(
        CheckpointRef(Path("/c-1"), 1, "f", "f1", 1.0),
        report="{}",
        verdict=Verdict((), (notice,)),
        alert_lines={notice.id: "{}"},
        memory=None,
        debts=to_sinks([notice], ["mine"], (), run="a run", at=1.0),
    )


def test_the_canaries_are_there(tls: Certificates, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The servers of these tests do get the secrets: what is not told was known."""
    with http_receiver(reply(204), tls=tls.right) as server:
        prepare(tmp_path, server.port, tls, monkeypatch)
        case = http_case("webhook", reply(204), extra=WITH_SECRETS)
        (sink,) = load_settings(case.written(tmp_path, server.port, tls.ca_file), {}).sinks
        settings: Any = sink_settings(sink)
        Address("sink", "mine", "webhook", plain(settings), "run", "/run", tmp_path).sink().deliver(
            example_group("one")
        )
        (request,) = server.requests
    assert SECRETS["PATH_SECRET"] in request.target
    assert request.headers["authorization"] == f"Bearer {SECRETS['TOKEN']}"
    assert (settings.signing_secret, settings.timeout_seconds) == (SECRETS["SIGNING"], 60.0)


def test_a_login_that_works_is_not_told(
    tls: Certificates, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, told: Callable[[], str]
) -> None:
    """Nor is one that is right."""
    with mail_server("tls", tls.right, password=SECRETS["PASSWORD"]) as server:
        prepare(tmp_path, server.port, tls, monkeypatch)
        (sink,) = load_settings(Case(MAIL, reply(204)).written(tmp_path, server.port, tls.ca_file), {}).sinks
        mail = Address("sink", "mine", "email", plain(sink_settings(sink)), "run", "/run", tmp_path).sink()
        mail.deliver(example_group("one"))
        assert len(server.messages) == 1
        assert CANARY not in repr(mail.check(lambda: 0.0)) + told()  # type: ignore[attr-defined]


def test_which_fields_are_secrets() -> None:
    """What must not stand in a file that others read is marked, and nothing else."""
    marked = {
        use: {one.name for one in dataclasses.fields(registry.sink(use).settings) if one.metadata.get("secret")}
        for use in ("stderr", "jsonl", "webhook", "slack", "email", "apprise", "exec")
    }
    assert {use: names for use, names in marked.items() if names} == {
        "webhook": {"url", "token", "signing_secret"},
        "slack": {"url"},
        "email": {"password"},
        "apprise": {"urls"},
    }
