"""How documents spread between simulated hosts: by shard, from neighbour to neighbour.

A real host that enters a shard asks the DHT for its index peers; here the network keeps the list.
A document is verified once for the whole network, since the answer is the same everywhere; a market
of ten thousand hosts would otherwise be nothing but signature checks.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Set
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING

from lumaris_overlay.advert_filter import AdvertFacts, facts_of
from lumaris_overlay.validate import AdvertGate, refuse_revoked_seller
from lumaris_protocol.codec import Signed
from lumaris_protocol.keys import PeerId
from lumaris_protocol.limits import CLOCK_SKEW_S, DIRECTORY_ADVERTS_MAX, INDEX_PEERS_MAX
from lumaris_protocol.messages.advert import Advert
from lumaris_protocol.revocations import RevokedSet

if TYPE_CHECKING:
    from lumaris_overlay.simulated.network import SimulatedOverlay


@dataclass(frozen=True)
class _Known:
    """A verified advert, and while it is sure to be good."""

    signed: Signed[Advert]
    facts: AdvertFacts
    since: float
    until: float


class SharedGate(AdvertGate):
    """The gate of all hosts of one network: the same bytes are verified once."""

    def __init__(self, network: str, coordinator_keys: Set[PeerId]) -> None:
        super().__init__(network, coordinator_keys)
        self._known: dict[bytes, _Known] = {}

    def check(self, data: bytes, now: float) -> Signed[Advert]:
        """The advert inside `data`. Raises EnvelopeError with the code of what is wrong."""
        return self._look_up(data, now).signed

    def facts(self, data: bytes, now: float) -> AdvertFacts:
        """What filters and shards look at in the advert. Raises EnvelopeError."""
        return self._look_up(data, now).facts

    def _look_up(self, data: bytes, now: float) -> _Known:
        found = self._known.get(data)
        if found is not None and found.since <= now <= found.until:
            return found
        signed = super().check(data, now)
        while len(self._known) >= 2 * DIRECTORY_ADVERTS_MAX:
            del self._known[next(iter(self._known))]
        # Good from now until the advert ends: at either edge the times are looked at again.
        found = _Known(signed, facts_of(signed.message), now, self._good_until(signed))
        self._known[data] = found
        return found

    def _good_until(self, signed: Signed[Advert]) -> float:
        certificate = self._members.check(
            signed.message.certificate, signed.signer, signed.message.issued_at
        ).message
        return min(signed.message.expires_at, certificate.expires_at) + CLOCK_SKEW_S


class HostGate(AdvertGate):
    """The shared gate, and whom this one host knows to be revoked."""

    def __init__(self, shared: SharedGate, revoked: RevokedSet) -> None:
        super().__init__(shared.network, frozenset())
        self._shared, self._revoked = shared, revoked

    def check(self, data: bytes, now: float) -> Signed[Advert]:
        """The advert inside `data`. Raises EnvelopeError with the code of what is wrong."""
        signed = self._shared.check(data, now)
        refuse_revoked_seller(self._revoked, signed.message)
        return signed

    def facts(self, data: bytes, now: float) -> AdvertFacts:
        """What filters and shards look at in the advert. Raises EnvelopeError."""
        return self._shared.facts(data, now)


class ShardMembers:
    """Which hosts are in which shard."""

    def __init__(self) -> None:
        self._members: dict[int, dict[PeerId, SimulatedOverlay]] = {}

    def enter(self, host: SimulatedOverlay, shard: int) -> list[SimulatedOverlay]:
        """Add a host; a few who were there before, the latest first."""
        found = self._members.setdefault(shard, {})
        others = list(islice(reversed(found.values()), INDEX_PEERS_MAX))
        found[host.peer_id] = host
        return others

    def leave(self, host: SimulatedOverlay, shard: int) -> None:
        """Remove a host."""
        self._members.get(shard, {}).pop(host.peer_id, None)

    def some(self, shard: int) -> list[SimulatedOverlay]:
        """A few hosts of a shard."""
        return list(islice(reversed(self._members.get(shard, {}).values()), INDEX_PEERS_MAX))


def flood(start: SimulatedOverlay, take: Callable[[SimulatedOverlay], bool]) -> None:
    """Hand something from neighbour to neighbour, as far as `take` says that it was news.

    Breadth first and without recursion: a path may be as long as the market is large.
    """
    visited = {start.peer_id}
    waiting: deque[SimulatedOverlay] = deque((start,))
    while waiting:
        for neighbour in tuple(waiting.popleft().neighbours.values()):
            if neighbour.peer_id not in visited:
                visited.add(neighbour.peer_id)
                if take(neighbour):
                    waiting.append(neighbour)
