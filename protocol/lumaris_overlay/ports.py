"""The overlay's port: what the rest of Lumaris may ask of the peer network.

Three implementations keep one contract (`tests/overlay/conformance.py`): `simulated` (in memory,
for tests and simulations), `libp2p` (the real network, only inside the overlay process) and
`socket` (the client of that process, which nodes and buyers use).
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

import trio

from lumaris_protocol.keys import PeerId
from lumaris_protocol.messages.negotiation import Requirements

if TYPE_CHECKING:
    from lumaris_overlay.bulk.gate import BulkGate
    from lumaris_overlay.links.target import DirectTarget


class OverlayStream(trio.abc.HalfCloseableStream):
    """A byte stream to an authenticated peer.

    `receive_some` returns b"" at the peer's end of stream and raises trio.BrokenResourceError when
    the connection is lost; `aclose` never blocks for long.
    """

    peer: PeerId
    protocol: str
    # Set by a link whose two programs can reach each other: where the peer's program can be
    # dialled for bulk data, and where the peer may dial ours.
    direct: DirectTarget | None = None
    gate: BulkGate | None = None

    @abstractmethod
    async def reset(self) -> None:
        """Give the stream up at once: the peer's reads and writes break. Never raises."""


@dataclass(frozen=True)
class AdvertEvent:
    """A change of the directory: a new or newer advert (its envelope bytes), or a departure."""

    seller: PeerId
    envelope: bytes | None  # None: withdrawn or expired
    seq: int


@dataclass(frozen=True)
class DemandEvent:
    """A buyer's signed request to every seller of a shard (its envelope bytes)."""

    buyer: PeerId
    envelope: bytes


@dataclass(frozen=True)
class Notice:
    """What a coordinator tells everybody (its envelope bytes). `kind` is the document's type."""

    kind: str
    signer: PeerId
    seq: int
    envelope: bytes


@dataclass(frozen=True)
class PeerInfo:
    """A peer we hold a connection to; `relayed` when it runs through another peer."""

    peer: PeerId
    addresses: tuple[str, ...]
    relayed: bool = False


Verdict = Literal["unknown", "public", "private"]


@dataclass(frozen=True)
class Reachability:
    """Who can reach us and how.

    `addresses` is what others are told; `confirmed_by` dialled us back there; `relays` hold a
    reservation for us; `observed` is where our connections seem to come from.
    """

    addresses: tuple[str, ...]
    peers: int
    verdict: Verdict = "unknown"
    confirmed_by: tuple[PeerId, ...] = ()
    relays: tuple[PeerId, ...] = ()
    observed: tuple[str, ...] = ()


@dataclass(frozen=True)
class Ping:
    """One exchange with a peer. The offset is the peer's clock minus ours, in seconds."""

    round_trip_s: float
    clock_offset_s: float
    relayed: bool


StreamHandler = Callable[[OverlayStream], Awaitable[None]]


class Overlay(Protocol):
    """The peer network. Every call has its own deadline; failures are RemoteError `unreachable`."""

    @property
    def peer_id(self) -> PeerId:
        """Our own peer id."""
        ...

    async def present(self, certificate: bytes) -> None:
        """Show this membership certificate from now on; connections are made once there is one.

        Raises EnvelopeError when it is not a coordinator's word on our own key.
        """
        ...

    async def present_shards(self, envelope: bytes) -> None:
        """Divide the market by this signed shard map from now on; kept over restarts.

        Raises EnvelopeError: `map_stale` when a newer one is known, else what is wrong with it.
        """
        ...

    async def seek(self, needs: Requirements) -> None:
        """Have the adverts that may fit these requirements in the directory.

        Follows the shards they are in, and asks index peers where those are too many. Returns at
        once in an undivided market, and after some seconds in any case.
        """
        ...

    async def publish_advert(self, envelope: bytes) -> None:
        """Gossip our signed advert and keep it in our own directory.

        Raises EnvelopeError when it would be refused by any honest peer.
        """
        ...

    def adverts(self) -> AbstractAsyncContextManager[trio.MemoryReceiveChannel[AdvertEvent]]:
        """First every advert the directory holds, then each change, in order."""
        ...

    async def publish_demand(self, envelope: bytes) -> None:
        """Gossip our signed demand to the sellers. Raises EnvelopeError when it is not valid."""
        ...

    def demands(self) -> AbstractAsyncContextManager[trio.MemoryReceiveChannel[DemandEvent]]:
        """Each demand of other peers from now on; the oldest are dropped when nobody takes them."""
        ...

    async def publish_notice(self, envelope: bytes) -> None:
        """Gossip what a coordinator signed for everybody, and heed it.

        Raises EnvelopeError when it would be refused by any honest peer.
        """
        ...

    def notices(self) -> AbstractAsyncContextManager[trio.MemoryReceiveChannel[Notice]]:
        """First what is known of the coordinators' notices, then each new one."""
        ...

    async def find_peer(self, peer: str) -> bytes | None:
        """The newest signed record (its envelope) of a peer, from the directory or the DHT."""
        ...

    async def ping(self, peer: str, *, addresses: Sequence[str] = ()) -> Ping:
        """Ask a peer for its time; dials when not connected."""
        ...

    async def open_stream(
        self, peer: str, protocol: str, *, addresses: Sequence[str] = ()
    ) -> OverlayStream:
        """A new stream; dials when not connected, using `addresses` and those of its advert."""
        ...

    def serve(self, protocol: str, handler: StreamHandler) -> AbstractAsyncContextManager[None]:
        """Answer streams of a protocol while the context lasts.

        Each handler runs in its own task; what it raises is logged and resets its stream only.
        """
        ...

    async def connect(self, addresses: Sequence[str]) -> int:
        """Connect to peers by address (`/ip4/…/tcp/…/p2p/…`); the number that answered."""
        ...

    async def peers(self) -> tuple[PeerInfo, ...]:
        """The peers we are connected to."""
        ...

    async def reachability(self) -> Reachability:
        """Where we can be reached."""
        ...
