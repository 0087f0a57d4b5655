"""What several sinks check of their settings."""

from __future__ import annotations

from peel_agent.errors import ConfigurationError


def check_timeout(seconds: float, longest: float, *, of: str) -> None:
    """Raises ConfigurationError for a `timeout_seconds` that no delivery could keep to; `of` is the sink, in words."""
    if not 0 < seconds <= longest:
        raise ConfigurationError(
            f"`timeout_seconds` of {of} is {seconds:g}", remedy=f"it must be more than 0, and at most {longest:g}"
        )


def check_token(token: str | None, *, of: str) -> None:
    """Raises ConfigurationError, without the token, for one that cannot stand in a header."""
    if token is not None and not (token.isascii() and token.isprintable() and token.strip()):
        raise ConfigurationError(
            f"the `token` of {of} holds what no header can (it is not shown: it is a secret)",
            remedy="give it as one line of ASCII characters",
        )


def bearer(token: str | None) -> dict[str, str]:
    """The header that shows a token; none without one."""
    return {} if token is None else {"Authorization": f"Bearer {token}"}
