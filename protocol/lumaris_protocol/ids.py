"""Identifiers: prefixed random ids and content digests."""

from __future__ import annotations

import base64
import hashlib
from typing import Final

ID_RANDOM_BYTES: Final = 15  # 120 bits, 24 base32 characters without padding

PREFIXES: Final = {
    "request": "rfq",
    "quote": "qte",
    "agreement": "agr",
    "session": "ses",
    "job": "job",
    "grant": "grt",
    "receipt": "rcp",
    "dispute": "dsp",
    "demand": "dmd",
    "account": "acc",
    "user": "usr",
    "transfer": "trf",
    "challenge": "chl",
    "webhook": "whk",
}

# `\Z` and not `$`, which would also let a line break follow.
ID_PATTERN: Final = r"^[a-z]{3}_[a-z2-7]{24}\Z"
DIGEST_PATTERN: Final = r"^sha256:[0-9a-f]{64}\Z"


def make_id(kind: str, entropy: bytes) -> str:
    """An id such as `job_…` from 15 random bytes supplied by the caller.

    Raises KeyError for an unknown kind and ValueError for the wrong amount of entropy.
    """
    if len(entropy) != ID_RANDOM_BYTES:
        raise ValueError(f"an id takes {ID_RANDOM_BYTES} random bytes, not {len(entropy)}")
    return f"{PREFIXES[kind]}_{base64.b32encode(entropy).decode().lower()}"


def derive_id(kind: str, seed: bytes) -> str:
    """An id that follows from `seed`, for things whose identity is another document's hash."""
    return make_id(kind, hashlib.sha256(seed).digest()[:ID_RANDOM_BYTES])


def digest(data: bytes) -> str:
    """`sha256:<hex>` of some bytes; how documents, files and modules are named everywhere."""
    return f"sha256:{hashlib.sha256(data).hexdigest()}"
