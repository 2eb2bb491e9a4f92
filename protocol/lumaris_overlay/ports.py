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
from typing import Protocol

import trio

from lumaris_protocol.keys import PeerId


class OverlayStream(trio.abc.HalfCloseableStream):
    """A byte stream to an authenticated peer.

    `receive_some` returns b"" at the peer's end of stream and raises trio.BrokenResourceError when
    the connection is lost; `aclose` never blocks for long.
    """

    peer: PeerId
    protocol: str

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
class PeerInfo:
    """A peer we hold a connection to."""

    peer: PeerId
    addresses: tuple[str, ...]


@dataclass(frozen=True)
class Reachability:
    """Where we listen, and how many peers we are connected to."""

    addresses: tuple[str, ...]
    peers: int


StreamHandler = Callable[[OverlayStream], Awaitable[None]]


class Overlay(Protocol):
    """The peer network. Every call has its own deadline; failures are RemoteError `unreachable`."""

    @property
    def peer_id(self) -> PeerId:
        """Our own peer id."""
        ...

    async def publish_advert(self, envelope: bytes) -> None:
        """Gossip our signed advert and keep it in our own directory.

        Raises EnvelopeError when it would be refused by any honest peer.
        """
        ...

    def adverts(self) -> AbstractAsyncContextManager[trio.MemoryReceiveChannel[AdvertEvent]]:
        """First every advert the directory holds, then each change, in order."""
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
