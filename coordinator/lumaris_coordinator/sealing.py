"""Secrets that must be read again later, kept so that a copy of the database does not tell them."""

from __future__ import annotations

import hashlib

from nacl.exceptions import CryptoError
from nacl.secret import SecretBox

from lumaris_protocol.errors import LumarisError


class Sealer:
    """Seals under a key that follows from the seed of the coordinator's first key."""

    def __init__(self, seed: bytes) -> None:
        self._box = SecretBox(
            hashlib.blake2b(seed, person=b"lumaris-seal", digest_size=32).digest()
        )

    def seal(self, data: bytes) -> bytes:
        """The data, readable for this coordinator only."""
        return bytes(self._box.encrypt(data))

    def open(self, sealed: bytes) -> bytes:
        """What was sealed. Raises LumarisError `internal` for bytes of another key."""
        try:
            return self._box.decrypt(sealed)
        except CryptoError:
            raise LumarisError(
                "internal", "A stored secret was sealed under another key."
            ) from None
