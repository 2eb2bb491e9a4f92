"""Challenges that cost nothing to hand out.

A challenge carries its own time and a keyed tag over the peer, so none is stored until it is used;
a stranger who asks for a million of them fills nothing. Layout of the 16 bytes: 4 time, 3 random,
9 tag (72 bits, guessed online at most once per request).
"""

from __future__ import annotations

import hashlib
import hmac
import secrets

from lumaris_protocol.errors import LumarisError
from lumaris_protocol.limits import CHALLENGE_LIFETIME_S

_HEAD, _TAG = 7, 9


class Challenges:
    """Makes and checks challenges under a secret of this coordinator."""

    def __init__(self, seed: bytes) -> None:
        self._secret = hashlib.blake2b(seed, person=b"lumaris-challen").digest()

    def make(self, peer: str, *, now: int) -> tuple[str, int]:
        """A challenge for a peer, and the time until which it can be answered."""
        head = now.to_bytes(4, "big") + secrets.token_bytes(_HEAD - 4)
        return (head + self._tag(head, peer)).hex(), now + CHALLENGE_LIFETIME_S

    def check(self, challenge: str, peer: str, *, now: int) -> int:
        """The expiry of a challenge made for this peer.

        Raises LumarisError: `unauthorized` for one we did not make, `expired`.
        """
        data = bytes.fromhex(challenge)
        head, tag = data[:_HEAD], data[_HEAD:]
        if not hmac.compare_digest(tag, self._tag(head, peer)):
            raise LumarisError("unauthorized", "The challenge was not made here for this peer.")
        expires_at = int.from_bytes(head[:4], "big") + CHALLENGE_LIFETIME_S
        if now > expires_at:
            raise LumarisError("expired", "The challenge was not answered in time.")
        return expires_at

    def _tag(self, head: bytes, peer: str) -> bytes:
        return hashlib.blake2b(head + peer.encode(), key=self._secret, digest_size=_TAG).digest()
