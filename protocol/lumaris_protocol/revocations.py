"""Whom a coordinator no longer vouches for. Time is an argument.

A revocation matters only while a certificate from before it may still be valid; then it is let go.
"""

from __future__ import annotations

from lumaris_protocol.limits import (
    CERTIFICATE_LIFETIME_S_MAX,
    CLOCK_SKEW_S,
    REVOCATIONS_REMEMBERED_MAX,
)
from lumaris_protocol.messages.notice import Revocations

# From the moment of a revocation: no certificate issued before it outlives this.
REMEMBERED_S = CERTIFICATE_LIFETIME_S_MAX + 2 * CLOCK_SKEW_S


class RevokedSet:
    """Revoked certificates, and peers of which every certificate is revoked."""

    def __init__(self) -> None:
        # (peer, serial) -> when; the oldest to be learnt comes first.
        self._entries: dict[tuple[str, int], int] = {}
        self._known: dict[str, int] = {}

    def __len__(self) -> int:
        return len(self._entries)

    def known(self, coordinator: str) -> int:
        """The number up to which every revocation of a coordinator has been seen."""
        return self._known.get(coordinator, 0)

    def add(self, message: Revocations, now: float) -> frozenset[str]:
        """Take a checked document in; the peers of which it says something new.

        One that leaves a gap counts as well: what it says is true, and `known` does not move.
        """
        self._forget(now)
        fresh: set[str] = set()
        for each in message.revoked:
            name = (each.peer, each.serial)
            if each.at + REMEMBERED_S < now or self._entries.get(name, -1) >= each.at:
                continue
            self._entries.pop(name, None)
            while len(self._entries) >= REVOCATIONS_REMEMBERED_MAX:
                del self._entries[next(iter(self._entries))]
            self._entries[name] = each.at
            fresh.add(each.peer)
        if message.after <= self.known(message.coordinator) < message.seq:
            self._known[message.coordinator] = message.seq
        return frozenset(fresh)

    def covers(self, peer: str, *, serial: int, issued_at: int) -> bool:
        """Whether this certificate is revoked: it, or every one that the peer had by then."""
        whole = self._entries.get((peer, 0))
        return (peer, serial) in self._entries or (whole is not None and issued_at <= whole)

    def names(self, peer: str) -> bool:
        """Whether the peer itself was revoked; a certificate issued later makes it good again."""
        return (peer, 0) in self._entries

    def ends(self, *peers: str, agreed_at: int) -> bool:
        """Whether what these peers agreed on ends: one of them was revoked since. One that was
        reinstated makes new agreements; a buyer's clock may be ahead of the coordinator's."""
        found = (self._entries.get((peer, 0)) for peer in peers)
        return any(at is not None and agreed_at - CLOCK_SKEW_S <= at for at in found)

    def _forget(self, now: float) -> None:
        ended = [name for name, at in self._entries.items() if at + REMEMBERED_S < now]
        for name in ended:
            del self._entries[name]
