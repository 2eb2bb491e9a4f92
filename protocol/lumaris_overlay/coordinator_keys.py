"""The coordinators' keys as one peer knows them: what it was started with, and their key lists."""

from __future__ import annotations

from collections.abc import Iterator, Set

from lumaris_protocol.keys import PeerId
from lumaris_protocol.messages.notice import KeyList


class CoordinatorKeys(Set[PeerId]):
    """Whatever shares it follows a rotation at once.

    A key that a list names counts until that list revokes it. When a key begins and ends is not
    looked at: what it signs here lives for days, and a list soon drops what has ended.
    """

    def __init__(self, first: Set[PeerId]) -> None:
        self._first = frozenset(first)
        self._lists: dict[str, KeyList] = {}  # by root

    def learn(self, message: KeyList) -> None:
        """Take in a checked list of a known root; one that goes back is passed over."""
        held = self._lists.get(message.root)
        if held is None or message.seq > held.seq:
            self._lists[message.root] = message

    def _now(self) -> frozenset[PeerId]:
        listed = [key for message in self._lists.values() for key in message.keys]
        revoked = {key.peer for key in listed if key.revoked_at}
        return (self._first | {PeerId(key.peer) for key in listed}) - revoked

    def __contains__(self, peer: object) -> bool:
        return peer in self._now()

    def __iter__(self) -> Iterator[PeerId]:
        return iter(sorted(self._now()))

    def __len__(self) -> int:
        return len(self._now())
