"""Hosts in memory that gossip, dial and answer by the rules of the real network.

A host sees the adverts of those it is connected to, directly or through others. `connect` merges
directories at once, as the index exchange does; `cut` and `kill` break streams as lost
connections do. The clock is the caller's, so that a simulation decides what time it is.
"""

from __future__ import annotations

import logging
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager

import trio

from lumaris_overlay.directory import Directory
from lumaris_overlay.feed import AdvertFeed
from lumaris_overlay.ports import (
    AdvertEvent,
    OverlayStream,
    PeerInfo,
    Reachability,
    StreamHandler,
)
from lumaris_overlay.serving import HandlerTable
from lumaris_overlay.simulated.stream import SimulatedStream, stream_pair
from lumaris_overlay.tasks import background
from lumaris_overlay.validate import AdvertGate
from lumaris_protocol.errors import EnvelopeError, RemoteError
from lumaris_protocol.keys import KeyPair, PeerId
from lumaris_protocol.limits import DIRECTORY_ADVERTS_MAX

logger = logging.getLogger(__name__)

_EXPIRY_CHECK_S = 1.0


class SimulatedNetwork:
    """The medium between simulated hosts."""

    def __init__(
        self,
        nursery: trio.Nursery,
        network: str,
        coordinator_keys: frozenset[PeerId],
        now: Callable[[], float],
    ) -> None:
        self.nursery = nursery
        self.network = network
        self.coordinator_keys = coordinator_keys
        self.now = now
        self._hosts: dict[PeerId, SimulatedOverlay] = {}
        self._ports = 0

    def host(self, key: KeyPair) -> SimulatedOverlay:
        """A new host on this network, connected to nobody."""
        self._ports += 1
        address = f"/ip4/10.0.0.1/tcp/{self._ports}/p2p/{key.peer_id}"
        host = SimulatedOverlay(self, key, address)
        self._hosts[key.peer_id] = host
        return host

    def find(self, peer: str) -> SimulatedOverlay | None:
        """The live host with this peer id."""
        return self._hosts.get(PeerId(peer))

    def kill(self, host: SimulatedOverlay) -> None:
        """End a host as a power cut would: its streams break, its peers notice."""
        self._hosts.pop(host.peer_id, None)
        for other in list(host.neighbours.values()):
            self.cut(host, other)

    def cut(self, one: SimulatedOverlay, other: SimulatedOverlay) -> None:
        """Lose the connection between two hosts."""
        one.neighbours.pop(other.peer_id, None)
        other.neighbours.pop(one.peer_id, None)
        one.lose_streams(other.peer_id)
        other.lose_streams(one.peer_id)

    async def tick(self) -> None:
        """Let every host drop what has expired."""
        for host in list(self._hosts.values()):
            host.expire()
        await trio.lowlevel.checkpoint()


@asynccontextmanager
async def open_network(
    network: str,
    coordinator_keys: frozenset[PeerId],
    *,
    now: Callable[[], float] = time.time,
) -> AsyncGenerator[SimulatedNetwork]:
    """A simulated network whose tasks live as long as the context."""
    async with background() as nursery:
        simulated = SimulatedNetwork(nursery, network, coordinator_keys, now)

        async def expire() -> None:
            while True:
                await trio.sleep(_EXPIRY_CHECK_S)
                await simulated.tick()

        nursery.start_soon(expire)
        yield simulated


class SimulatedOverlay:
    """One host's view of a simulated network; implements `ports.Overlay`."""

    def __init__(self, network: SimulatedNetwork, key: KeyPair, address: str) -> None:
        self.address = address
        self.neighbours: dict[PeerId, SimulatedOverlay] = {}
        self._network = network
        self._key = key
        self._directory = Directory(AdvertGate(network.network, network.coordinator_keys))
        self._feed = AdvertFeed(network.nursery)
        self._handlers = HandlerTable()
        self._streams: dict[PeerId, set[SimulatedStream]] = {}

    @property
    def peer_id(self) -> PeerId:
        """Our own peer id."""
        return self._key.peer_id

    async def publish_advert(self, envelope: bytes) -> None:
        """Take our advert in and pass it on. Raises EnvelopeError when it is not valid."""
        await trio.lowlevel.checkpoint()
        event = self._directory.offer(envelope, self._network.now())
        self._pass_on(envelope, event)

    def receive_advert(self, envelope: bytes) -> None:
        """What a neighbour gossips to us; invalid documents go no further."""
        if self._directory.holds(envelope):
            return
        try:
            event = self._directory.offer(envelope, self._network.now())
        except EnvelopeError as error:
            logger.debug("dropped an advert: %s", error)
            return
        self._pass_on(envelope, event)

    def _pass_on(self, envelope: bytes, event: AdvertEvent | None) -> None:
        if event is not None:
            self._feed.tell(event)
        if self._directory.holds(envelope):
            for neighbour in list(self.neighbours.values()):
                neighbour.receive_advert(envelope)

    def documents(self) -> list[bytes]:
        """All that a newcomer is told, withdrawals too."""
        return self._directory.page("", DIRECTORY_ADVERTS_MAX)[0]

    def expire(self) -> None:
        """Drop what has expired."""
        for event in self._directory.expire(self._network.now()):
            self._feed.tell(event)

    def adverts(self) -> AbstractAsyncContextManager[trio.MemoryReceiveChannel[AdvertEvent]]:
        """First every advert the directory holds, then each change."""
        return self._feed.follow(self._directory.events())

    async def open_stream(
        self, peer: str, protocol: str, *, addresses: Sequence[str] = ()
    ) -> OverlayStream:
        """A new stream to a live host that can be reached by address, advert or connection."""
        await trio.lowlevel.checkpoint()
        host = self._network.find(peer)
        if host is None or not (
            host.peer_id in self.neighbours
            or host.address in (*addresses, *self._directory.addresses(peer))
        ):
            raise RemoteError("unreachable", f"The peer {peer} cannot be reached.")
        self._join(host)
        near, far = stream_pair(self.peer_id, host.peer_id, protocol)
        host.answer(far)
        self._streams.setdefault(host.peer_id, set()).add(near)
        return near

    def answer(self, stream: SimulatedStream) -> None:
        """Run the handler of an inbound stream, as its own task.

        Raises RemoteError `unreachable` when the protocol is not answered here.
        """
        if stream.protocol not in self._handlers:
            raise RemoteError("unreachable", f"The peer does not answer {stream.protocol}.")
        self._streams.setdefault(stream.peer, set()).add(stream)
        self._network.nursery.start_soon(self._run, stream)

    async def _run(self, stream: SimulatedStream) -> None:
        try:
            await self._handlers.answer(stream)
        finally:
            self._streams.get(stream.peer, set()).discard(stream)

    def serve(self, protocol: str, handler: StreamHandler) -> AbstractAsyncContextManager[None]:
        """Answer streams of a protocol while the context lasts."""
        return self._handlers.serve(protocol, handler)

    async def connect(self, addresses: Sequence[str]) -> int:
        """Connect to the hosts at these addresses; the number that answered."""
        await trio.lowlevel.checkpoint()
        answered = 0
        for address in addresses:
            host = self._network.find(address.rpartition("/p2p/")[2])
            if host is not None and host is not self and host.address == address:
                self._join(host)
                answered += 1
        return answered

    async def peers(self) -> tuple[PeerInfo, ...]:
        """The hosts we are connected to."""
        await trio.lowlevel.checkpoint()
        return tuple(PeerInfo(host.peer_id, (host.address,)) for host in self.neighbours.values())

    async def reachability(self) -> Reachability:
        """Where we can be reached."""
        await trio.lowlevel.checkpoint()
        return Reachability((self.address,), len(self.neighbours))

    def lose_streams(self, peer: PeerId) -> None:
        """Break every stream with a peer."""
        for stream in self._streams.pop(peer, set()):
            stream.lose()

    def _join(self, host: SimulatedOverlay) -> None:
        if host.peer_id in self.neighbours or host is self:
            return
        self.neighbours[host.peer_id] = host
        host.neighbours[self.peer_id] = self
        for one, other in ((self, host), (host, self)):
            for envelope in one.documents():
                other.receive_advert(envelope)
