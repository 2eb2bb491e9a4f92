"""Peers that misbehave: counted, then sent away for a while."""

from __future__ import annotations

from collections.abc import Callable

import trio

from lumaris_overlay.libp2p.overrides import strangers
from lumaris_overlay.validate import TokenBuckets
from lumaris_protocol import limits

# Names are free to a key's maker, members' are not: this many are remembered, oldest forgotten.
_BANNED_MAX = 1_024


class Conduct:
    """Counts what no honest peer does. `send_away` is called once with a peer that did too much."""

    def __init__(self) -> None:
        self.send_away: Callable[[str], None] = lambda peer: None
        self._faults = TokenBuckets(
            per_s=limits.BAD_ADVERTS_PER_S_PER_PEER,
            burst=limits.BAD_ADVERTS_BURST_PER_PEER,
            names_max=limits.OVERLAY_CONNECTIONS_MAX,
        )
        self._until: dict[str, float] = {}

    def fault(self, peer: str, kind: str, detail: object = "") -> None:
        """Count one fault."""
        strangers.note(peer, kind, detail)
        if not self._faults.take(peer, trio.current_time()):
            self.ban(peer, "too many faults")

    def ban(self, peer: str, why: str) -> None:
        """Send a peer away and refuse its handshakes for a while."""
        if self.banned(peer):
            return
        strangers.note(peer, "banned", why)
        while len(self._until) >= _BANNED_MAX:
            del self._until[next(iter(self._until))]
        self._until[peer] = trio.current_time() + limits.BAN_S
        self.send_away(peer)

    def banned(self, peer: str) -> bool:
        """Whether a peer is refused now."""
        until = self._until.get(peer)
        if until is None:
            return False
        if until > trio.current_time():
            return True
        del self._until[peer]
        return False
