"""The sinks that post to an address, webhook and slack: what they send, what they refuse, and faults of receivers."""

from __future__ import annotations

import contextlib
import json
import runpy
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from cloudevents.core.bindings.http import HTTPMessage, from_structured
from cloudevents.core.formats.json import JSONFormat

from peel_agent.errors import ConfigurationError, DeliveryError, DestinationDenied, DestinationUnavailable
from peel_agent.records import Notice, NoticeGroup, restored
from peel_agent.testing.sinks import CHECKS, Connect, Read, example_group
from peel_plugins.redaction import redacted
from peel_plugins.sinks import slack, webhook
from peel_plugins.sinks.network import Exchange, is_private
from peel_plugins.sinks.slack import SlackSettings, chat_message
from peel_plugins.sinks.webhook import WebhookSettings, WebhookSink
from tests import receivers
from tests.receivers import Act, Certificates, Receiver, http_receiver, reply

HOST = "hook.example"
EXAMPLE = Path(__file__).parents[2] / "deploy" / "examples" / "webhook_signature.py"
Sink = Any


@pytest.fixture(scope="module")
def tls(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return receivers.certificates(tmp_path_factory.mktemp("tls"), HOST)


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with http_receiver() as one:
        yield one


def local(receiver: Receiver, path: str = "/hook", **options: Any) -> WebhookSettings:
    return WebhookSettings(
        f"http://127.0.0.1:{receiver.port}{path}", **{"allow_private": True, "timeout_seconds": 60.0, **options}
    )


def secure(receiver: Receiver, tls: Certificates, host: str = "localhost", **options: Any) -> WebhookSettings:
    given = {"allow_private": True, "timeout_seconds": 60.0, "ca_file": tls.ca_file, **options}
    return WebhookSettings(f"https://{host}:{receiver.port}/hook", **given)


def sink(settings: WebhookSettings, clock: Callable[[], float] = lambda: 1_700_000_100.9) -> WebhookSink:
    return WebhookSink(settings, clock)


def texts(receiver: Receiver) -> str:
    """What a receiver's user would read, in order."""
    bodies = [json.loads(one.body) for one in receiver.requests]
    return "\n".join(
        str(body.get("text") or body["data"]["text"]).replace("&lt;", "<").replace("&gt;", ">") for body in bodies
    )


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("plugin", [webhook.PLUGIN, slack.PLUGIN], ids=lambda plugin: plugin.name)
def test_conforms(plugin: Any, check: Callable[[Connect, Read], None], receiver: Receiver, tmp_path: Path) -> None:
    """Both pass every check of the kit."""
    settings = plugin.settings(f"http://127.0.0.1:{receiver.port}/hook", allow_private=True)
    check(lambda: plugin.connect(settings, state_dir=tmp_path), lambda: texts(receiver))


# ---------------------------------------------------------------- what a webhook is sent


def test_it_is_a_cloud_event(receiver: Receiver) -> None:
    """The CloudEvents library reads it as version 1.0: the group's id, run, time, and all of the group as data."""
    sink(local(receiver)).deliver(example_group("one"))
    (request,) = receiver.requests
    assert (request.method, request.target) == ("POST", "/hook")
    assert request.headers["content-type"] == "application/cloudevents+json"
    event = from_structured(HTTPMessage(request.headers, request.body), JSONFormat())
    assert event.get_id() == "group-one"
    assert event.get_source() == "peel-agent/a%20run"
    assert event.get_type() == "peel-agent.notices.v1"
    assert event.get_specversion() == "1.0"
    assert event.get_time().timestamp() == example_group("one").at
    assert restored(NoticeGroup, event.get_data()) == example_group("one")


def test_the_same_group_is_the_same_event(receiver: Receiver) -> None:
    """Sent again, byte by byte."""
    for _ in range(2):
        sink(local(receiver)).deliver(example_group("one"))
    assert receiver.requests[0].body == receiver.requests[1].body


def test_the_signature_can_be_checked(receiver: Receiver) -> None:
    """The example for receivers takes what was signed just now, of this body, and nothing else."""
    sink(local(receiver, signing_secret="s3cret")).deliver(example_group("one"))
    (request,) = receiver.requests
    header, body, at = request.headers["x-peel-signature"], request.body, 1_700_000_100.0
    is_genuine = runpy.run_path(str(EXAMPLE))["is_genuine"]
    assert is_genuine(header, body, "s3cret", at)
    assert is_genuine(header, body, "s3cret", at + 299)
    assert not is_genuine(header, body, "s3cret", at + 301)
    assert not is_genuine(header, body, "s3cret", at - 301)
    assert not is_genuine(header, body + b" ", "s3cret", at)
    assert not is_genuine(header, body, "other", at)
    assert not is_genuine(header.replace("t=17000001", "t=17000002"), body, "s3cret", at + 100_000)
    for broken in (
        "",
        "t=,v1=",
        "v1=",
        "t=x,v1=y",
        "t=1700000100",
        "t=1700000100,v1=\u00e4",
        "t=\u0661,v1=",
        "nonsense",
    ):
        assert not is_genuine(broken, body, "s3cret", at)


def test_a_token_and_a_query_arrive(receiver: Receiver) -> None:
    """Nothing of the address is lost, and a token is a bearer's; without them there is no header of that kind."""
    sink(local(receiver, "/a%20b?key=1&k=2", token="t0ken")).deliver(example_group("one"))
    sink(local(receiver)).deliver(example_group("one"))
    first, second = receiver.requests
    assert first.target == "/a%20b?key=1&k=2"
    assert first.headers["authorization"] == "Bearer t0ken"
    assert first.headers["host"] == f"127.0.0.1:{receiver.port}"
    assert {"authorization", "x-peel-signature"} & set(second.headers) == set()


# ---------------------------------------------------------------- faults of the receiver

UNAVAILABLE, DENIED, NEVER = DestinationUnavailable, DestinationDenied, DeliveryError

STATUSES = [
    (500, UNAVAILABLE), (502, UNAVAILABLE), (503, UNAVAILABLE), (599, UNAVAILABLE),
    (408, UNAVAILABLE), (425, UNAVAILABLE), (429, UNAVAILABLE),
    (301, DENIED), (302, DENIED), (307, DENIED), (308, DENIED), (304, DENIED),
    (401, DENIED), (403, DENIED), (404, DENIED), (405, DENIED), (410, DENIED), (415, DENIED), (451, DENIED),
    (400, NEVER), (413, NEVER), (422, NEVER),
]  # fmt: skip


@pytest.mark.parametrize(("status", "kind"), STATUSES)
def test_every_status_has_its_consequence(status: int, kind: type[DeliveryError], receiver: Receiver) -> None:
    """Later for what may pass, slowly for what somebody must change, never for a body that is not taken."""
    receiver.acts = [reply(status, b"because of \x1b[31m it")]
    with pytest.raises(DeliveryError) as caught:
        sink(local(receiver)).deliver(example_group("one"))
    assert type(caught.value) is kind
    assert str(status) in caught.value.what
    assert f"http://127.0.0.1:{receiver.port}" in caught.value.what
    assert caught.value.remedy
    if status >= 400:
        assert "because of" in caught.value.what
    assert "\x1b" not in str(caught.value)


@pytest.mark.parametrize("status", [200, 201, 202, 204])
def test_taken_is_taken(status: int, receiver: Receiver) -> None:
    """Any 2xx."""
    receiver.acts = [reply(status)]
    sink(local(receiver)).deliver(example_group("one"))


@pytest.mark.parametrize("status", [429, 503])
def test_retry_after_is_told(status: int, receiver: Receiver) -> None:
    """What the receiver asks for is in the words, for who reads the log."""
    receiver.acts = [reply(status, Retry_After="120")]
    with pytest.raises(DestinationUnavailable, match="Retry-After 120"):
        sink(local(receiver)).deliver(example_group("one"))


def test_a_redirect_is_refused_by_name(receiver: Receiver) -> None:
    """The place that it leads to is named, without its path, and gets nothing."""
    with http_receiver() as other:
        receiver.acts = [reply(302, Location=f"http://127.0.0.1:{other.port}/steal?x=1")]
        with pytest.raises(DestinationDenied, match="redirects are not followed") as caught:
            sink(local(receiver)).deliver(example_group("one"))
        assert f"http://127.0.0.1:{other.port}:" in caught.value.what
        assert "steal" not in caught.value.what
        assert other.connections == 0


FAULTS: dict[str, tuple[Act, str]] = {
    "hang": (receivers.hang, "did not finish within 0.5 s"),
    "slow head": (receivers.dripping(b"HTTP/1.1 200 OK\r\nX: "), "did not finish within 0.5 s"),
    "reset": (receivers.reset, "Connection reset by peer"),
    "nothing": (receivers.says(b""), "was cut off|Connection reset|does not answer"),
    "half a head": (receivers.says(b"HTTP/1.1 20"), "does not answer as HTTP"),
    "not http": (receivers.says(b"SSH-2.0-OpenSSH_9.2\r\n"), "does not answer as HTTP"),
    "endless line": (receivers.says(b"HTTP/1.1 200 OK\r\nX: " + b"y" * 200_000), "does not answer as HTTP"),
    "a thousand headers": (receivers.says(b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 1000), "does not answer as HTTP"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_receiver_that_breaks_is_tried_again(fault: str, receiver: Receiver) -> None:
    """A hang, a reset, nonsense: an error in words, within the time that the settings give, and the next one lands."""
    act, words = FAULTS[fault]
    receiver.acts = [act, reply(204)]
    with pytest.raises(DestinationUnavailable, match=words):
        sink(local(receiver, timeout_seconds=0.5 if "0.5 s" in words else 60.0)).deliver(example_group("one"))
    sink(local(receiver, timeout_seconds=60.0)).deliver(example_group("one"))


@pytest.mark.parametrize(
    "act",
    [
        receivers.dripping(b"HTTP/1.1 200 OK\r\n\r\n"),
        receivers.dripping(b"HTTP/1.1 202 OK\r\nContent-Length: 9999\r\n\r\n"),
    ],
)
def test_what_was_accepted_is_delivered_however_slow_the_rest(act: Act, receiver: Receiver) -> None:
    """The status says it; the body of an acceptance is not read."""
    receiver.acts = [act]
    sink(local(receiver, timeout_seconds=60)).deliver(example_group("one"))


def test_a_slow_refusal_is_a_refusal(receiver: Receiver) -> None:
    """Its status stands, though its reason never came whole."""
    receiver.acts = [receivers.dripping(b"HTTP/1.1 410 Gone\r\nContent-Length: 9999\r\n\r\n")]
    with pytest.raises(DestinationDenied, match="410"):
        sink(local(receiver, timeout_seconds=2.0)).deliver(example_group("one"))


def test_a_flood_is_read_up_to_a_bound(receiver: Receiver) -> None:
    """Of a body without an end a short piece is told."""
    receiver.acts = [receivers.flood]
    with pytest.raises(DestinationDenied, match="flood flood") as caught:
        sink(local(receiver)).deliver(example_group("one"))
    assert len(caught.value.what) < 400


def test_nobody_there(receiver: Receiver) -> None:
    """A port that nobody listens on is named."""
    gone = local(receiver)
    receiver_port = receiver.port
    with socket.create_server(("127.0.0.1", 0)) as listener:
        free = listener.getsockname()[1]
    with pytest.raises(DestinationUnavailable, match="Connection refused"):
        sink(WebhookSettings(f"http://127.0.0.1:{free}/", allow_private=True)).deliver(example_group("one"))
    assert gone.url.endswith(f":{receiver_port}/hook")


def test_a_name_without_an_address(monkeypatch: pytest.MonkeyPatch) -> None:
    """The name is told; it is tried again, since name servers come back."""

    def unknown(*_: Any, **__: Any) -> None:
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    with pytest.raises(DestinationUnavailable, match=r"hook\.example has no address: Name or service not known"):
        sink(WebhookSettings(f"https://{HOST}/x")).deliver(example_group("one"))


# ---------------------------------------------------------------- TLS


def test_tls_with_an_authority_of_ones_own(tls: Certificates) -> None:
    """With `ca_file` a server that it signed is trusted, and the check says so without posting."""
    with http_receiver(tls=tls.right) as receiver:
        one = sink(secure(receiver, tls))
        one.deliver(example_group("one"))
        (check,) = one.check(lambda: 0.0)
        assert check.ok
        assert "its certificate is right" in check.words
        assert len(receiver.requests) == 1


@pytest.mark.parametrize(
    ("which", "words"),
    [
        ("other_name", "Hostname mismatch"),
        ("unknown", "unable to get local issuer|self-signed"),
        ("right", "local issuer"),
    ],
)
def test_a_wrong_certificate_gets_nothing(which: str, words: str, tls: Certificates) -> None:
    """Of another host, or of an authority that is not trusted: refused with the reason, until somebody changes it."""
    with http_receiver(tls=getattr(tls, which)) as receiver:
        one = sink(secure(receiver, tls, **({"ca_file": None} if which == "right" else {})))
        with pytest.raises(DestinationDenied, match=words) as caught:
            one.deliver(example_group("one"))
        assert "certificate" in caught.value.what
        assert "ca_file" in caught.value.remedy
        (check,) = one.check(lambda: 0.0)
        assert (check.ok, check.words) == (False, caught.value.what)
        assert receiver.requests == []


@pytest.mark.parametrize(
    ("greeting", "words"),
    [(b"220 mail.example ESMTP\r\n", "no TLS connection .*WRONG_VERSION"), (b"", "did not finish within 0.5 s")],
)
def test_a_port_without_tls(greeting: bytes, words: str, tls: Certificates) -> None:
    """A server that speaks first, or waits for something else, is told from one that is away."""
    with http_receiver(greeting=greeting) as receiver, pytest.raises(DestinationUnavailable, match=words):
        sink(secure(receiver, tls, timeout_seconds=60.0 if greeting else 0.5)).deliver(example_group("one"))


@pytest.mark.parametrize("content", [None, "nonsense"])
def test_a_ca_file_that_cannot_be_read(content: str | None, tls: Certificates, tmp_path: Path) -> None:
    """It is named."""
    file = tmp_path / "mine.pem"
    if content is not None:
        file.write_text(content)
    with http_receiver(tls=tls.right) as receiver, pytest.raises(DestinationDenied, match=r"ca_file .*mine\.pem"):
        sink(secure(receiver, tls, ca_file=file)).deliver(example_group("one"))


# ---------------------------------------------------------------- addresses

PRIVATE = [
    "127.0.0.1", "127.9.9.9", "10.1.2.3", "172.16.0.1", "192.168.1.1", "169.254.169.254", "100.64.0.1", "0.0.0.0",
    "224.0.0.1", "224.0.1.1", "255.255.255.255", "240.0.0.1", "192.0.2.1", "198.18.0.1", "::1", "::", "fe80::1",
    "fe80::1%lo", "fc00::1", "fd12:3456::1", "ff02::1", "ff0e::1", "::ffff:127.0.0.1", "::ffff:10.0.0.1",
    "::ffff:169.254.169.254", "64:ff9b::7f00:1", "64:ff9b::a00:1", "2002:7f00:1::", "2002:a00:1::1", "2001:db8::1",
    "::127.0.0.1",
]  # fmt: skip
PUBLIC = ["8.8.8.8", "1.1.1.1", "2606:4700:4700::1111", "::ffff:8.8.8.8", "64:ff9b::808:808", "2002:808:808::1"]


@pytest.mark.parametrize(("address", "private"), [*((one, True) for one in PRIVATE), *((one, False) for one in PUBLIC)])
def test_which_addresses_are_private(address: str, private: bool) -> None:
    """Also those that are wrapped in another."""
    assert is_private(address) is private


@pytest.mark.parametrize("host", ["127.0.0.1", "[::1]", "[::ffff:10.0.0.1]", "169.254.169.254", "10.0.0.5:8443"])
def test_a_private_address_is_an_error_at_load(host: str) -> None:
    """Unless it is allowed."""
    with pytest.raises(ConfigurationError, match="private network") as caught:
        WebhookSettings(f"https://{host}/hook")
    assert "allow_private = true" in caught.value.remedy
    assert WebhookSettings(f"https://{host}/hook", allow_private=True)


def lookups(monkeypatch: pytest.MonkeyPatch, *answers: tuple[str, ...]) -> list[str]:
    """Has names looked up in turn as these addresses; the hosts that were asked for."""
    real, asked = socket.getaddrinfo, []

    def look_up(host: str, port: int, **options: Any) -> Any:
        asked.append(host)
        now = answers[min(len(asked), len(answers)) - 1]
        return [entry for address in now for entry in real(address, port, **options)]

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    return asked


@pytest.mark.parametrize("address", ["127.0.0.1", "::1", "::ffff:127.0.0.1"])
def test_a_name_of_a_private_address_is_refused(
    address: str, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The host and the address that it has are named; nothing connects to it; the check tells it too."""
    lookups(monkeypatch, (address,))
    one = sink(WebhookSettings(f"https://{HOST}:{receiver.port}/hook"))
    with pytest.raises(DestinationDenied, match=r"hook\.example \(.*private network") as caught:
        one.deliver(example_group("one"))
    assert address in caught.value.what
    (check,) = one.check(lambda: 0.0)
    assert not check.ok
    assert receiver.connections == 0


def test_what_was_looked_at_is_connected_to(tls: Certificates, monkeypatch: pytest.MonkeyPatch) -> None:
    """A name is looked up once and TLS still asks for it by name; a second answer would change nothing."""
    with http_receiver(tls=tls.right) as receiver:
        asked = lookups(monkeypatch, ("127.0.0.1",), ("203.0.113.1",))
        sink(secure(receiver, tls, HOST)).deliver(example_group("one"))
        assert asked == [HOST]
        assert receiver.requests[0].headers["host"] == f"{HOST}:{receiver.port}"


def test_a_name_that_turns_private(receiver: Receiver, monkeypatch: pytest.MonkeyPatch) -> None:
    """A name server that shows a public address to the check and a private one to the connection gains nothing."""
    went: list[Any] = []

    def refuse(_: socket.socket, address: Any) -> None:
        went.append(address[0])
        raise ConnectionRefusedError(111, "Connection refused")

    asked = lookups(monkeypatch, ("8.8.8.8", "127.0.0.1"), ("127.0.0.1",))
    monkeypatch.setattr(socket.socket, "connect", refuse)
    with pytest.raises(DestinationUnavailable, match="Connection refused"):
        sink(WebhookSettings(f"https://{HOST}:{receiver.port}/hook")).deliver(example_group("one"))
    assert (asked, went) == ([HOST], ["8.8.8.8"])


def test_the_next_address_is_tried(receiver: Receiver, monkeypatch: pytest.MonkeyPatch) -> None:
    """One of a name's addresses that refuses is passed over."""
    lookups(monkeypatch, ("127.1.2.3", "127.0.0.1"))
    sink(WebhookSettings(f"http://{HOST}:{receiver.port}/hook", allow_private=True)).deliver(example_group("one"))
    assert len(receiver.requests) == 1


BAD_URLS = [
    "", "hook", "ftp://hook.example/secret", "https://", "https:///secret", "https://hook.example:port/secret",
    "https://hook.example:0/secret", "https://hook.example:99999/secret", "https://hook.example/sec ret",
    "https://hook.example/secret\r\nX: y", "https://hook.exämple/secret", "https://[::1/secret", "file:///secret",
    "https://user:secret@hook.example/", "https://hook.example/#secret", "http://hook.example/secret",
]  # fmt: skip


@pytest.mark.parametrize("url", BAD_URLS)
def test_an_address_that_cannot_be_used_is_an_error_at_load(url: str) -> None:
    """With what to do, and without the address, which may be a secret."""
    for settings in (WebhookSettings, SlackSettings):
        with pytest.raises(ConfigurationError) as caught:
            settings(url)
        assert "secret" not in str(caught.value).replace("hold a secret", "")
        assert caught.value.remedy


@pytest.mark.parametrize(
    "options",
    [
        {"timeout_seconds": 0.0},
        {"timeout_seconds": 1e9},
        {"timeout_seconds": float("nan")},
        {"token": "a\r\nb: c"},
        {"token": "ä"},
        {"token": " "},
        {"signing_secret": ""},
        {"proxy": "socks5://secret"},
        {"proxy": "nonsense"},
    ],
)
def test_an_option_that_cannot_be_used_is_an_error_at_load(options: dict[str, Any]) -> None:
    """Each says which it is."""
    with pytest.raises(ConfigurationError, match=next(iter(options))):
        WebhookSettings("https://hook.example/", **options)


# ---------------------------------------------------------------- proxies


def tunnel(target: int) -> Act:
    """What a proxy does with CONNECT: it passes everything on, here to this port."""

    def pass_on(receiver: Receiver, connection: socket.socket) -> None:
        with socket.create_connection(("127.0.0.1", target)) as onward:
            connection.sendall(b"HTTP/1.1 200 Established\r\n\r\n")

            def back() -> None:
                with contextlib.suppress(OSError):  # one side has ended
                    while piece := onward.recv(65536):
                        connection.sendall(piece)
                    connection.shutdown(socket.SHUT_RDWR)

            threading.Thread(target=back).start()
            while piece := connection.recv(65536):
                onward.sendall(piece)

    return pass_on


def test_a_proxy_is_used_when_it_is_named(tls: Certificates) -> None:
    """It is asked for a tunnel, with its password; TLS is with the server itself, which the proxy looks up."""
    with http_receiver(tls=tls.right) as receiver, http_receiver(tunnel(receiver.port)) as proxy:
        settings = secure(
            receiver, tls, HOST, allow_private=False, proxy=f"http://me:pass%21word@127.0.0.1:{proxy.port}"
        )
        sink(settings).deliver(example_group("one"))
        assert len(receiver.requests) == 1
        (request,) = proxy.requests
        assert (request.method, request.target) == ("CONNECT", f"{HOST}:{receiver.port}")
        assert request.headers["proxy-authorization"] == "Basic bWU6cGFzcyF3b3Jk"
        (check,) = sink(settings).check(lambda: 0.0)
        assert "the proxy 127.0.0.1" in check.words


def test_a_proxy_of_the_environment_is_not(tls: Certificates, monkeypatch: pytest.MonkeyPatch) -> None:
    """What others set for themselves changes nothing here."""
    with http_receiver(tls=tls.right) as receiver, http_receiver() as proxy:
        for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY"):
            monkeypatch.setenv(name, f"http://127.0.0.1:{proxy.port}")
        sink(secure(receiver, tls)).deliver(example_group("one"))
        assert (len(receiver.requests), proxy.connections) == (1, 0)


def test_a_proxy_that_refuses(tls: Certificates) -> None:
    """It and its answer are named."""
    with http_receiver(reply(407)) as proxy:
        settings = WebhookSettings(f"https://{HOST}/", proxy=f"http://me:canary@127.0.0.1:{proxy.port}")
        with pytest.raises(DestinationDenied, match=r"proxy 127\.0\.0\.1 answered 407") as caught:
            sink(settings).deliver(example_group("one"))
        assert "canary" not in str(caught.value)


# ---------------------------------------------------------------- chats


def notice(text: str, subject: str = "model.layers.3", **fields: Any) -> Notice:
    return Notice("n", "layer_below", "warning", "firing", subject, 800, text, **fields)


def group(*notices: Notice, run: str = "a run") -> NoticeGroup:
    return NoticeGroup("g", run, 1_700_000_000.0, notices, "\n".join(one.text for one in notices))


def test_a_chat_message(receiver: Receiver, tmp_path: Path) -> None:
    """The run and the counts, then each notice with what is the matter and its causes; and the same as blocks."""
    slack.PLUGIN.connect(
        SlackSettings(f"http://127.0.0.1:{receiver.port}/services/x", allow_private=True), state_dir=tmp_path
    ).deliver(
        group(
            notice(
                "It earns 0.01 nats less.",
                causes=("it is frozen",),
                unchecked=("its headroom",),
                command="peel-agent scan x",
            )
        )
    )
    (request,) = receiver.requests
    assert request.headers["content-type"] == "application/json"
    message = json.loads(request.body)
    assert message["text"] == (
        "[peel-agent] a run: 1 firing, 0 resolved\n\n"
        "FIRING (warning) model.layers.3 at step 800 [layer_below]\n"
        "It earns 0.01 nats less.\nLikely causes:\n- it is frozen\nNot checked: its headroom\nMore: peel-agent scan x"
    )
    header, section = message["blocks"]
    assert header["text"] == {"type": "plain_text", "text": "[peel-agent] a run: 1 firing, 0 resolved"}
    assert section["text"]["text"] in message["text"]
    assert section["text"]["verbatim"] is True


def test_blocks_can_be_left_out() -> None:
    """For a chat that does not take them."""
    assert set(chat_message(group(notice("x")), with_blocks=False)) == {"text"}


@pytest.mark.parametrize(
    "words",
    ["<!channel>", "<@U123>", "<http://evil|click>", "@channel", "@everyone", "@here", "a & b", "&lt;!here&gt;"],
)
def test_names_call_nobody(words: str) -> None:
    """What a chat reads as a link or a mention is taken apart, wherever it stands."""
    message = json.dumps(
        chat_message(group(notice(words, subject=words, causes=(words,)), run=words), with_blocks=True),
        ensure_ascii=False,
    )
    assert words not in message
    assert "<" not in message
    assert not any(one in message for one in ("@channel", "@everyone", "@here", "@U123"))


@pytest.mark.parametrize("count", [0, 1, 3, 48, 49, 400])
def test_a_message_stays_within_what_chats_take(count: int) -> None:
    """Discord takes 2,000 characters; Slack 50 blocks of 3,000 and a header of 150; what is left out is counted."""
    for letters in ("w " * 10, "w " * 5000, "&" * 5000, "@" * 5000, "\n" * 500):
        message: Any = chat_message(group(*[notice(letters)] * count, run="r" * 500), with_blocks=True)
        assert 0 < len(message["text"]) <= 2000
        assert len(message["blocks"]) <= 50
        assert len(message["blocks"][0]["text"]["text"]) <= 150
        assert all(0 < len(block["text"]["text"]) <= 3000 for block in message["blocks"])
        told = message["text"].count("FIRING")
        assert told == count or f"... and {count - told} more" in message["text"]


# ---------------------------------------------------------------- the parts


def test_an_exchange_that_ran_out_of_time_connects_no_more(receiver: Receiver) -> None:
    """A look-up that hung does not go on to post when it comes back: the group may be on its way again."""
    looked_up, ended = threading.Event(), threading.Event()
    exchange = Exchange(0.05)
    outcome: list[Exception] = []

    def work() -> None:
        looked_up.wait()
        try:
            exchange.connect("127.0.0.1", receiver.port, lambda _: True)
        except Exception as error:
            outcome.append(error)
        ended.set()

    with pytest.raises(TimeoutError):
        exchange.run(work)
    looked_up.set()
    assert ended.wait(60)
    assert [type(error) for error in outcome] == [TimeoutError]


@pytest.mark.parametrize("form", ["canary/one", "canary%2Fone", "Y2FuYXJ5L29uZQ==", "Y2FuYXJ5L29uZQ"])
def test_redaction(form: str) -> None:
    """A secret is taken out in each form that a server may repeat it in; the rest stays, on one line and short."""
    assert redacted(f"no such\n token: {form}!", ["canary/one", ""]) == "no such token: ***!"
    assert len(redacted("x" * 10_000, [])) < 210
