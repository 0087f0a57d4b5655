"""Notices by e-mail: a message a group, to a mail server over TLS."""

from __future__ import annotations

import re
import smtplib
import socket
from base64 import b64encode
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from email.errors import HeaderParseError
from email.headerregistry import Address
from email.message import EmailMessage
from email.policy import SMTP
from email.utils import format_datetime
from hashlib import sha256
from pathlib import Path
from typing import TypeVar

from peel_agent.errors import ConfigurationError, DeliveryError, DestinationDenied, DestinationUnavailable
from peel_agent.records import Check, NoticeGroup
from peel_agent.spi import SinkPlugin, setting

from ..redaction import redacted  # noqa: TID252 -- shared by sinks and trackers
from .limits import check_timeout
from .network import AddressRefused, Exchange, failure, is_private, trusted, within_tls
from .taken import Taken
from .wording import headline, paragraphs

PORTS = {"starttls": 587, "tls": 465, "none": 25}
LONGEST_TIMEOUT = 300.0

Said = TypeVar("Said")
Refused = dict[str, tuple[int, bytes]]
"""Recipients that the server refused, each with its code and words."""


@dataclass(frozen=True)
class MailSettings:
    """`[[sink]]` with use = "email": the server, how it is spoken to, and from whom to whom."""

    host: str
    sender: str
    to: tuple[str, ...]
    port: int | None = setting(None)
    security: str = setting("starttls")
    user: str | None = setting(None)
    password: str | None = setting(None, secret=True)
    timeout_seconds: float = setting(30.0)
    ca_file: Path | None = setting(None)

    def __post_init__(self) -> None:
        if self.security not in PORTS:
            raise ConfigurationError(
                f"`security` of an e-mail sink is `{self.security}`", remedy=f"it must be one of: {', '.join(PORTS)}"
            )
        if not re.fullmatch(r"[\w.-]+|[0-9A-Fa-f:.]+(%\w+)?", self.host):
            raise ConfigurationError(
                "`host` of an e-mail sink is no name of a host (it is not shown: it may hold a secret)",
                remedy="write the name alone; `port`, `security`, `user` and `password` are keys of their own",
            )
        for key, addresses in (("sender", (self.sender,)), ("to", self.to)):
            for address in addresses:
                _check_address(key, address)
        if not self.to:
            raise ConfigurationError("`to` of an e-mail sink is empty", remedy='list who is written to: ["a@b.org"]')
        if (self.user is None) != (self.password is None):
            raise ConfigurationError(
                "an e-mail sink has one of `user` and `password`, and not the other", remedy="give both, or neither"
            )
        if not (self.password or "").isascii() or not (self.user or "").isascii():
            raise ConfigurationError(
                "`user` or `password` of an e-mail sink is not ASCII (neither is shown)",
                remedy="choose ones that are: mail servers disagree on the rest",
            )
        if self.security == "none" and self.password is not None:
            raise ConfigurationError(
                'an e-mail sink would send its password in clear text: `security` is "none"',
                remedy='set security = "starttls" or "tls", or take `user` and `password` out',
            )
        check_timeout(self.timeout_seconds, LONGEST_TIMEOUT, of="an e-mail sink")


class _Server(smtplib.SMTP):
    """smtplib's, over a connection that is there already."""

    def __init__(self, connection: socket.socket, host: str, port: int) -> None:
        self._connection = connection
        super().__init__(host, port)

    def _get_socket(self, host: str, port: int, timeout: object) -> socket.socket:  # noqa: ARG002 -- smtplib's
        return self._connection


class MailSink:
    """Without TLS only a server with a private address is written to, and never a password."""

    def __init__(self, settings: MailSettings) -> None:
        self._settings = settings
        self._port = settings.port or PORTS[settings.security]
        self._place = f"the mail server {settings.host}:{self._port}"
        password = settings.password or ""
        plain_login = b64encode(f"\0{settings.user}\0{password}".encode()).decode()
        self._secrets = (password, plain_login) if password else ()
        self._taken = Taken()

    def deliver(self, group: NoticeGroup) -> None:
        recipients = self._taken.lack(group.id, self._settings.to)
        if not recipients:
            return
        message = mail(group, sender=self._settings.sender, to=self._settings.to)
        refused = self._spoken(lambda server: _sent(server, message, self._settings.sender, recipients))
        for address in recipients:
            if address not in refused:
                self._taken.add(address)
        if refused:
            raise self._not_to_all(refused)

    def where(self) -> str:
        shown = ", ".join(self._settings.to[:3]) + (" and others" if len(self._settings.to) > 3 else "")
        return f"e-mail to {shown} by {self._settings.host}"

    def check(self, now: Callable[[], float]) -> tuple[Check, ...]:  # noqa: ARG002 -- the protocol's
        """Whether the server is there, speaks TLS, and knows us. No mail is sent."""
        try:
            self._spoken(lambda _: None)
        except DeliveryError as error:
            return (Check("connection", False, error.what, error.remedy),)
        login = "takes the password" if self._settings.password else "was asked for no login"
        secure = "in clear text" if self._settings.security == "none" else "over TLS, its certificate is right"
        return (Check("connection", True, f"{self._place} answers {secure}, and {login}; no mail was sent"),)

    def close(self) -> None:
        """Each delivery has a connection of its own."""

    def _spoken(self, say: Callable[[smtplib.SMTP], Said]) -> Said:
        """What `say` answers, said to the server after the login."""
        exchange = Exchange(self._settings.timeout_seconds)
        try:
            return exchange.run(lambda: self._session(exchange, say))
        except smtplib.SMTPException as error:
            raise self._failure(error) from None
        except AddressRefused as error:
            raise DestinationDenied(
                f"{self._place} has the address {error.address}, which is not private, and `security` is none",
                remedy='set security = "starttls" or "tls": mail in clear text stays within a network of your own',
            ) from None
        except (OSError, DeliveryError) as error:
            raise failure(self._place, error, seconds=self._settings.timeout_seconds) from None

    def _session(self, exchange: Exchange, say: Callable[[smtplib.SMTP], Said]) -> Said:
        settings = self._settings
        context = None if settings.security == "none" else trusted(settings.ca_file)
        connection = exchange.connect(
            settings.host, self._port, lambda address: context is not None or is_private(address)
        )
        if context is not None and settings.security == "tls":
            connection = within_tls(connection, context, settings.host)
        server = _Server(connection, settings.host, self._port)
        try:
            if context is not None and settings.security == "starttls":
                server.starttls(context=context)
            server.ehlo_or_helo_if_needed()
            if settings.user is not None and settings.password is not None:
                server.login(settings.user, settings.password)
            said = say(server)
            with suppress(OSError, smtplib.SMTPException):
                server.putcmd("QUIT")  # what it answers changes nothing, and is not waited for
            return said
        finally:
            server.close()

    def _failure(self, error: smtplib.SMTPException) -> DeliveryError:
        if isinstance(error, smtplib.SMTPServerDisconnected):
            return DestinationUnavailable(
                f"{self._place} hung up", remedy="check the port and `security`; it is tried again"
            )
        if not isinstance(error, smtplib.SMTPResponseException):  # it lacks what is needed
            return DestinationDenied(
                f"{self._place} offers no {'STARTTLS' if self._lacks_tls(error) else 'login that we know'}",
                remedy='check `security` ("tls" for a port that begins with TLS), and whether a password is needed',
            )
        answered = f"{self._place} answered {self._words(error.smtp_code, error.smtp_error)}"
        if error.smtp_code < 500:
            return DestinationUnavailable(answered, remedy="see what the server says of it; it is tried again")
        if isinstance(error, smtplib.SMTPDataError):
            return DeliveryError(answered, remedy="see why it takes no such mail; then peel-agent deliveries resend")
        return DestinationDenied(
            answered, remedy="check `user`, `password` and `sender`, and what the server lets us do"
        )

    def _lacks_tls(self, error: smtplib.SMTPException) -> bool:
        return self._settings.security == "starttls" and "STARTTLS" in str(error)

    def _not_to_all(self, refused: Refused) -> DeliveryError:
        words = "; ".join(f"{address}: {self._words(*refused[address])}" for address in sorted(refused)[:3])
        what = f"{self._place} does not take mail for {words}"
        if any(code < 500 for code, _ in refused.values()):
            return DestinationUnavailable(what, remedy="nothing to do yet: it is tried again")
        if len(refused) == len(self._settings.to):
            return DestinationDenied(what, remedy="correct `to`, or have the server take it")
        return DeliveryError(f"{what}; the others have it", remedy="take these addresses out of `to`, or correct them")

    def _words(self, code: int, said: bytes | str) -> str:
        text = said.decode("utf-8", "replace") if isinstance(said, bytes) else said
        return f"{code} {redacted(text, self._secrets)}".rstrip()


def mail(group: NoticeGroup, *, sender: str, to: Sequence[str]) -> EmailMessage:
    """The message for a group: the same whenever it is sent, so that a mail program shows a repetition once."""
    message = EmailMessage(policy=SMTP)
    message["From"] = sender
    message["To"] = ", ".join(to)
    message["Subject"] = headline(group)
    message["Date"] = format_datetime(datetime.fromtimestamp(group.at, UTC))
    message["Message-ID"] = f"<{_word(group.id)}@{sender.rpartition('@')[2]}>"
    message["Auto-Submitted"] = "auto-generated"
    message.set_content("\n\n".join([headline(group), *paragraphs(group)]) + "\n")
    return message


def _sent(server: smtplib.SMTP, message: EmailMessage, sender: str, to: Sequence[str]) -> Refused:
    try:
        return server.send_message(message, sender, to)
    except smtplib.SMTPRecipientsRefused as error:
        return error.recipients


def _word(text: str) -> str:
    """The same text where a Message-ID may hold it, else one made of it."""
    return text if re.fullmatch(r"[\w-]{1,64}", text, re.ASCII) else sha256(text.encode("utf-8", "replace")).hexdigest()


def _check_address(key: str, address: str) -> None:
    try:
        valid = address.isascii() and bool(Address(addr_spec=address).domain)
    except (ValueError, IndexError, HeaderParseError):
        valid = False
    if not valid:
        raise ConfigurationError(
            f"`{key}` of an e-mail sink has `{address}`", remedy="write each address as name@host, in plain ASCII"
        )


class MailPlugin:
    name = "email"
    settings = MailSettings

    def connect(self, settings: MailSettings, *, state_dir: Path) -> MailSink:  # noqa: ARG002 -- the protocol's
        return MailSink(settings)


PLUGIN: SinkPlugin = MailPlugin()
