"""The signature of a delivery, as the Standard Webhooks specification has it.

`webhook-signature: v1,<base64 of HMAC-SHA256 over "<id>.<timestamp>.<body>">`, keyed with the bytes
after `whsec_`. The receiver also checks the timestamp, so an old delivery cannot be sent again.
"""

from __future__ import annotations

import base64
import hmac
import secrets
from typing import Final

SECRET_PREFIX: Final = "whsec_"  # noqa: S105 - the public prefix of every secret
_SECRET_BYTES: Final = 32


def make_secret() -> str:
    """A new endpoint's secret."""
    return SECRET_PREFIX + base64.b64encode(secrets.token_bytes(_SECRET_BYTES)).decode()


def sign(secret: str, *, message_id: str, timestamp: int, body: bytes) -> dict[str, str]:
    """The three headers of a delivery."""
    key = base64.b64decode(secret.removeprefix(SECRET_PREFIX))
    signed = f"{message_id}.{timestamp}.".encode() + body
    tag = base64.b64encode(hmac.digest(key, signed, "sha256")).decode()
    return {
        "webhook-id": message_id,
        "webhook-timestamp": str(timestamp),
        "webhook-signature": f"v1,{tag}",
    }
