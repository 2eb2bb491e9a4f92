"""Tokens and API keys: made from random bytes, kept as keyed hashes only.

A keyed fast hash suffices: they are 160 random bits or more, there is nothing to guess. An API key
is `lum_<network>_<id>_<secret>_<crc>`: the id finds its row, and the checksum tells a mistyped key
from a wrong one before anything is looked up.
"""

from __future__ import annotations

import base64
import hashlib
import re
import secrets
import zlib
from dataclasses import dataclass
from typing import Final

TOKEN_PREFIX: Final = "lum_"  # noqa: S105 - the public prefix of every token
_TOKEN_BYTES: Final = 24
_TOKEN: Final = re.compile(r"lum_[A-Za-z0-9_-]{32}")
_KEY: Final = re.compile(
    r"lum_[a-z0-9][a-z0-9._-]{0,62}_(?P<id>[a-z2-7]{8})_[a-z2-7]{32}_(?P<crc>[0-9a-f]{8})"
)


@dataclass(frozen=True)
class ApiKeyText:
    """A new key: its id, and the text that is shown once."""

    id: str
    text: str


class Vault:
    """Hashes under a secret of this coordinator: a copy of the database is no help in guessing."""

    def __init__(self, seed: bytes) -> None:
        self._key = hashlib.blake2b(seed, person=b"lumaris-token").digest()

    def hash(self, secret: str) -> bytes:
        """What is kept of a token or key."""
        data = secret.encode(errors="replace")
        return hashlib.blake2b(data, key=self._key, digest_size=32).digest()


def make_token() -> str:
    """A new token."""
    return TOKEN_PREFIX + secrets.token_urlsafe(_TOKEN_BYTES)


def is_token(text: str) -> bool:
    """Whether it looks like a token."""
    return _TOKEN.fullmatch(text) is not None


def make_key(network: str) -> ApiKeyText:
    """A new API key."""
    name, secret = _base32(5), _base32(20)
    body = f"lum_{network}_{name}_{secret}"
    return ApiKeyText(name, f"{body}_{zlib.crc32(body.encode()):08x}")


def key_id(text: str) -> str | None:
    """The id in an API key; None for what is none, or was mistyped."""
    found = _KEY.fullmatch(text) if len(text) <= 128 else None
    if found is None:
        return None
    body, _, crc = text.rpartition("_")
    return found["id"] if f"{zlib.crc32(body.encode()):08x}" == crc else None


def _base32(size: int) -> str:
    return base64.b32encode(secrets.token_bytes(size)).decode().lower()
