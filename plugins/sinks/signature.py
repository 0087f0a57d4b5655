"""The signature of a webhook's body, by which its receiver knows the sender and the time of sending."""

from __future__ import annotations

import hashlib
import hmac

HEADER = "X-Peel-Signature"


def signature(secret: str, body: bytes, at: float) -> str:
    """`t=<Unix seconds>,v1=<hex>`: HMAC-SHA256, with the secret as key, of the time, a full stop and the body."""
    stamp = str(int(at))
    digest = hmac.new(secret.encode(), f"{stamp}.".encode() + body, hashlib.sha256).hexdigest()
    return f"t={stamp},v1={digest}"
