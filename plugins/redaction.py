"""What another program says, without our secrets: servers and scripts like to repeat what they were given."""

from __future__ import annotations

import re
from base64 import b64encode
from collections.abc import Iterable
from urllib.parse import quote, unquote

SHORTEST = 4
"""A shorter secret is no secret, and is found in every sentence."""

SHOWN = 200
"""Characters of somebody else's words that are shown."""


def redacted(text: str, secrets: Iterable[str], *, shown: int = SHOWN) -> str:
    """The beginning of the text, with every secret in it, plain, quoted for a URL or in base64, replaced by ***."""
    forms = {form for secret in secrets if len(secret) >= SHORTEST for form in _forms(secret)}
    for form in sorted(forms, key=len, reverse=True):
        text = re.sub(re.escape(form), "***", text, flags=re.IGNORECASE)  # hosts come back in small letters
    text = " ".join(text.split())
    return text if len(text) <= shown else f"{text[:shown]} ..."


def _forms(secret: str) -> set[str]:
    encoded = b64encode(secret.encode()).decode()
    return {secret, quote(secret), quote(secret, safe=""), unquote(secret), encoded, encoded.rstrip("=")}
