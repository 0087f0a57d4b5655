"""The e-mail sink with a real mail server: what arrives, what is never sent in clear, and what a server refuses."""

from __future__ import annotations

import email.utils
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from peel_agent.errors import ConfigurationError, DeliveryError, DestinationDenied, DestinationUnavailable
from peel_agent.records import Notice, NoticeGroup
from peel_agent.testing.sinks import CHECKS, Connect, Read, example_group
from peel_plugins.sinks import mail
from peel_plugins.sinks.mail import MailSettings, MailSink
from tests import receivers
from tests.receivers import Certificates, MailServer, http_receiver, mail_server

pytestmark = pytest.mark.filterwarnings("ignore:Requiring AUTH while not requiring TLS")
"""aiosmtpd's, of a server that speaks TLS from the first byte: it looks for STARTTLS only."""

FROM, TO = "peel@runs.example", ("ops@runs.example", "night@runs.example")
PASSWORD = "pass-word-of-ours"


@pytest.fixture(scope="module")
def tls(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return receivers.certificates(tmp_path_factory.mktemp("tls"))


@pytest.fixture(scope="module")
def servers(tls: Certificates) -> Iterator[dict[str, MailServer]]:
    """One server of each kind of security; those with TLS want a password."""
    with (
        mail_server("tls", tls.right, password=PASSWORD) as wrapped,
        mail_server("starttls", tls.right, password=PASSWORD) as upgraded,
        mail_server("none", tls.right) as clear,
    ):
        yield {"tls": wrapped, "starttls": upgraded, "none": clear}


@pytest.fixture(params=["tls", "starttls", "none"])
def server(request: pytest.FixtureRequest, servers: dict[str, MailServer]) -> MailServer:
    one = servers[request.param]
    one.messages.clear()
    one.recipients.clear()
    one.refuse.clear()
    return one


@pytest.fixture
def clear(servers: dict[str, MailServer]) -> MailServer:
    one = servers["none"]
    one.messages.clear()
    one.recipients.clear()
    one.refuse.clear()
    return one


def settings(server: MailServer, tls: Certificates, **options: Any) -> MailSettings:
    given: dict[str, Any] = {"port": server.port, "ca_file": tls.ca_file, "timeout_seconds": 60.0}
    if server.password:
        given |= {"user": server.user, "password": server.password, "security": server.security}
    else:
        given |= {"security": "none"}
    return MailSettings("localhost", FROM, TO, **{**given, **options})


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_conforms(
    check: Callable[[Connect, Read], None], server: MailServer, tls: Certificates, tmp_path: Path
) -> None:
    """It passes every check of the kit: over TLS from the first byte, after STARTTLS, and on this machine in clear."""
    check(lambda: mail.PLUGIN.connect(settings(server, tls), state_dir=tmp_path), server.text)


def test_a_message(server: MailServer, tls: Certificates) -> None:
    """To all at once, dated by the group, with an id that a repetition shares, and marked as written by a program."""
    sink = MailSink(settings(server, tls))
    sink.deliver(example_group("one"))
    MailSink(settings(server, tls)).deliver(example_group("one"))
    first, second = server.messages
    assert server.recipients == [list(TO), list(TO)]
    assert (first["From"], first["To"]) == (FROM, ", ".join(TO))
    assert first["Subject"] == "[peel-agent] a run: 1 firing, 1 resolved"
    assert email.utils.parsedate_to_datetime(first["Date"]).timestamp() == example_group("one").at
    assert first["Message-ID"] == second["Message-ID"] == "<group-one@runs.example>"
    assert first["Auto-Submitted"] == "auto-generated"
    assert first.get_content_type() == "text/plain"
    body = first.get_content()
    assert "FIRING (critical) model.layers.0 at step 100 [layer_below]" in body
    assert "Likely causes:\n- it does nothing yet" in body.replace("\r\n", "\n")
    (check,) = sink.check(lambda: 0.0)
    assert check.ok
    assert ("takes the password" in check.words) == bool(server.password)
    assert len(server.messages) == 2


HOSTILE = "x\r\nBcc: thief@evil.example\r\n\r\nDear reader\x1b[31m\ud800 ä 语 " + "y" * 2000


def test_a_hostile_name_changes_no_header(clear: MailServer, tls: Certificates) -> None:
    """Line ends, control characters and half characters in a run's name, an id or a text stay text."""
    notice = Notice("n", HOSTILE, "critical", "firing", HOSTILE, 1, HOSTILE, causes=(HOSTILE,))
    MailSink(settings(clear, tls)).deliver(NoticeGroup(HOSTILE, HOSTILE, 0.0, (notice,), HOSTILE))
    (message,) = clear.messages
    assert message["Bcc"] is None
    assert set(message.keys()) == {
        "From", "To", "Subject", "Date", "Message-ID", "Auto-Submitted",
        "Content-Type", "Content-Transfer-Encoding", "MIME-Version", "X-Peer", "X-MailFrom", "X-RcptTo",
    } - {"X-Peer", "X-MailFrom", "X-RcptTo"}  # fmt: skip
    assert clear.recipients == [list(TO)]
    assert "\x1b" not in message.get_content()


# ---------------------------------------------------------------- faults


def test_a_wrong_password_waits_for_somebody(servers: dict[str, MailServer], tls: Certificates) -> None:
    """It is refused until it is changed; the password is not told."""
    for security in ("tls", "starttls"):
        sink = MailSink(settings(servers[security], tls, password="canary-canary"))
        with pytest.raises(DestinationDenied, match="535") as caught:
            sink.deliver(example_group("one"))
        assert "canary" not in str(caught.value)
        assert "`password`" in caught.value.remedy
        (check,) = sink.check(lambda: 0.0)
        assert (check.ok, check.words) == (False, caught.value.what)


def test_a_password_to_a_server_that_knows_none(clear: MailServer, tls: Certificates) -> None:
    """STARTTLS that is not offered is not done without: nothing is sent."""
    sink = MailSink(settings(clear, tls, security="starttls", user="us", password=PASSWORD))
    with pytest.raises(DestinationDenied, match="offers no STARTTLS"):
        sink.deliver(example_group("one"))
    assert clear.messages == []


@pytest.mark.parametrize("security", ["tls", "starttls"])
@pytest.mark.parametrize(("which", "words"), [("other_name", "Hostname mismatch"), ("unknown", "unable to get local")])
def test_a_wrong_certificate_gets_nothing(security: str, which: str, words: str, tls: Certificates) -> None:
    """Of another host, or of an authority that is not trusted."""
    with mail_server(security, getattr(tls, which), password=PASSWORD) as server:
        with pytest.raises(DestinationDenied, match=words) as caught:
            MailSink(settings(server, tls)).deliver(example_group("one"))
        assert "ca_file" in caught.value.remedy
        assert server.messages == []


def test_clear_text_stays_within_ones_own_network() -> None:
    """With security "none" a server of the internet is not even connected to."""
    sink = MailSink(MailSettings("8.8.8.8", FROM, TO, security="none", timeout_seconds=5))
    with pytest.raises(DestinationDenied, match=r"8\.8\.8\.8.*not private"):
        sink.deliver(example_group("one"))


REFUSALS: list[tuple[dict[str, str], type[DeliveryError]]] = [
    ({"DATA": "451 4.3.0 later"}, DestinationUnavailable),
    ({"DATA": "554 5.7.1 it looks like spam"}, DeliveryError),
    ({TO[0]: "450 4.2.1 mailbox busy", TO[1]: "450 4.2.1 mailbox busy"}, DestinationUnavailable),
    ({TO[0]: "550 5.1.1 unknown", TO[1]: "550 5.1.1 unknown"}, DestinationDenied),
    ({TO[0]: "550 5.1.1 unknown", TO[1]: "450 4.2.1 mailbox busy"}, DestinationUnavailable),
]


@pytest.mark.parametrize(("refuse", "kind"), REFUSALS)
def test_every_refusal_has_its_consequence(
    refuse: dict[str, str], kind: type[DeliveryError], clear: MailServer, tls: Certificates
) -> None:
    """4xx is tried again, an address that nobody has waits for somebody, a message that is not taken is given up."""
    clear.refuse.update(refuse)
    sink = MailSink(settings(clear, tls))
    with pytest.raises(DeliveryError) as caught:
        sink.deliver(example_group("one"))
    assert type(caught.value) is kind
    assert next(iter(refuse.values()))[:3] in caught.value.what
    clear.refuse.clear()
    sink.deliver(example_group("one"))
    assert clear.recipients == [list(TO)]


def test_who_has_it_does_not_get_it_again(clear: MailServer, tls: Certificates) -> None:
    """When one of two is busy, only that one is tried again; the next group goes to both."""
    clear.refuse[TO[1]] = "450 4.2.1 mailbox busy"
    sink = MailSink(settings(clear, tls))
    with pytest.raises(DestinationUnavailable, match=TO[1]):
        sink.deliver(example_group("one"))
    clear.refuse.clear()
    sink.deliver(example_group("one"))
    sink.deliver(example_group("two"))
    assert clear.recipients == [[TO[0]], [TO[1]], list(TO)]


def test_one_wrong_address_holds_up_no_other(clear: MailServer, tls: Certificates) -> None:
    """It is given up by name, since the others have the message."""
    clear.refuse[TO[1]] = "550 5.1.1 unknown"
    with pytest.raises(DeliveryError, match="the others have it") as caught:
        MailSink(settings(clear, tls)).deliver(example_group("one"))
    assert not caught.value.retryable
    assert clear.recipients == [[TO[0]]]


@pytest.mark.parametrize(
    ("act", "words"),
    [
        (receivers.says(b"220 hello\r\n"), "hung up"),
        (receivers.reset, "hung up|reset by peer"),
        (receivers.hang, "did not finish within 0.5 s"),
        (receivers.dripping(b"250-"), "did not finish within 0.5 s"),
        (receivers.says(b"\xff\xfe nonsense \r\n\r\n"), "answered -1"),
    ],
)
def test_a_server_that_breaks_is_tried_again(act: receivers.Act, words: str) -> None:
    """It hangs up, hangs, drips, or says nonsense: an error in words within the time of the settings."""
    with http_receiver(act, greeting=b"220 mail\r\n") as server:
        options = MailSettings(
            "127.0.0.1", FROM, TO, port=server.port, security="none", timeout_seconds=0.5 if "0.5 s" in words else 60.0
        )
        with pytest.raises(DestinationUnavailable, match=words):
            MailSink(options).deliver(example_group("one"))


def test_a_server_that_hangs_after_it_took_the_message_has_it(clear: MailServer, tls: Certificates) -> None:
    """What it answers to the farewell is not waited for: the message would come twice."""

    async def never(*_: Any) -> str:
        import asyncio

        await asyncio.sleep(3600)
        return "221 Bye"

    clear.__dict__["handle_QUIT"] = never
    MailSink(settings(clear, tls)).deliver(example_group("one"))
    del clear.__dict__["handle_QUIT"]
    assert len(clear.messages) == 1


BAD: list[tuple[dict[str, Any], str]] = [
    ({"security": "ssl"}, "starttls, tls, none"),
    ({"sender": "peel"}, "`sender`"),
    ({"sender": "a@b\r\nBcc: x@y"}, "`sender`"),
    ({"to": ()}, "`to`"),
    ({"to": ("Ops <a@b.org>",)}, "name@host"),
    ({"to": ("a@b.org, c@d.org",)}, "name@host"),
    ({"to": ("ä@b.org",)}, "ASCII"),
    ({"user": "us"}, "give both"),
    ({"password": "canary"}, "give both"),
    ({"user": "us", "password": "canary", "security": "none"}, "clear text"),
    ({"user": "us", "password": "cänary"}, "not ASCII"),
    ({"timeout_seconds": 0.0}, "timeout_seconds"),
    ({"timeout_seconds": 1e9}, "timeout_seconds"),
]


@pytest.mark.parametrize(("options", "words"), BAD)
def test_what_cannot_be_right_is_an_error_at_load(options: dict[str, Any], words: str) -> None:
    """With what to do, and without the password."""
    with pytest.raises(ConfigurationError) as caught:
        MailSettings(**{"host": "mail.example", "sender": FROM, "to": TO, **options})
    assert words in str(caught.value)
    assert "nary" not in str(caught.value)
