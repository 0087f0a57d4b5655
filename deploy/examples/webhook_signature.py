"""How a receiver of the `webhook` sink knows that a request is from its peel-agent, and new. Copy it."""

import hashlib
import hmac


def is_genuine(header: str, body: bytes, secret: str, now: float, tolerance_seconds: float = 300.0) -> bool:
    """Whether the header X-Peel-Signature, `t=<Unix seconds>,v1=<hex>`, is of this body and was made just now.

    `body` is the request's, byte for byte, before anything parses it. A request that is genuine may come twice: its
    CloudEvents `id` is the same then.
    """
    fields = dict(part.partition("=")[::2] for part in header.split(","))
    stamp, signature = fields.get("t", ""), fields.get("v1", "")
    if not (stamp.isascii() and stamp.isdigit()) or abs(now - int(stamp)) > tolerance_seconds:
        return False
    wanted = hmac.new(secret.encode(), stamp.encode() + b"." + body, hashlib.sha256).hexdigest()
    return hmac.compare_digest(wanted.encode(), signature.encode())
