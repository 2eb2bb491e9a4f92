"""Who asks: what every route is told about the holder of a token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from lumaris_protocol.errors import LumarisError

Scope = Literal["read", "write", "operator"]


@dataclass(frozen=True)
class Caller:
    """Whom a token belongs to, and what it allows.

    `peer` is empty for a user; `account` owns its wallet; `peers` are those whose things it may
    see: itself, or the user's own.
    """

    kind: Literal["peer", "user", "operator"]
    id: str
    peer: str
    account: str
    peers: frozenset[str]
    scopes: frozenset[str]
    # What its requests are counted by, and how many a second it may make; 0 is the default rate.
    counted_as: str = ""
    rate: int = 0
    # When an API key ends; 0 for what a login gave. What a key makes ends with it at the latest.
    ends_at: int = 0

    def may_see(self, *peers: str) -> bool:
        """Whether one of these parties is the caller or belongs to it."""
        return self.id in peers or not self.peers.isdisjoint(peers)

    def require(self, scope: Scope) -> None:
        """Raises LumarisError `forbidden` without the scope."""
        if scope not in self.scopes:
            raise LumarisError("forbidden", f"These credentials lack the scope `{scope}`.")


def peer_caller(peer: str, account: str) -> Caller:
    """A peer with its own token: it may do all that concerns itself."""
    return Caller(
        "peer", peer, peer, account, frozenset((peer,)), frozenset(("read", "write")), peer
    )
