"""How adverts come and go on one host: gossip, the index exchange, and the directory they fill."""

from __future__ import annotations

import logging
import time
from collections.abc import Awaitable, Callable
from typing import Any

import trio
from libp2p.custom_types import TProtocol
from libp2p.peer.id import ID

from lumaris_overlay.directory import Directory
from lumaris_overlay.feed import AdvertFeed
from lumaris_overlay.libp2p import index
from lumaris_overlay.libp2p.connections import Connections
from lumaris_overlay.libp2p.gossip import AdvertGossip
from lumaris_overlay.libp2p.overrides import strangers
from lumaris_overlay.libp2p.streams import Libp2pStream
from lumaris_overlay.ports import AdvertEvent
from lumaris_overlay.validate import TokenBuckets
from lumaris_protocol import limits
from lumaris_protocol.envelope import decode
from lumaris_protocol.errors import EnvelopeError, RemoteError
from lumaris_protocol.keys import PeerId

logger = logging.getLogger(__name__)

_EXPIRY_CHECK_S = 1.0
_PULL_AGAIN_S = 60.0
# An honest peer can pass these on: its clock differs, or the fault is ours.
_NOT_HOSTILE = frozenset({"directory_full", "expired", "not_yet_valid"})

NewStream = Callable[[str, str], Awaitable[Libp2pStream]]


class AdvertExchange:
    """Publishes, accepts, asks for and serves adverts."""

    def __init__(
        self,
        host: Any,
        network: str,
        directory: Directory,
        connections: Connections,
        nursery: trio.Nursery,
        *,
        new_stream: NewStream,
    ) -> None:
        self.directory = directory
        self.feed = AdvertFeed(nursery)
        self._host, self._connections, self._nursery = host, connections, nursery
        self._new_stream = new_stream
        self.gossip = AdvertGossip(host, network, self._accept_gossip)
        self._own: dict[PeerId, bytes] = {}
        self._bad = TokenBuckets(
            per_s=limits.BAD_ADVERTS_PER_S_PER_PEER,
            burst=limits.BAD_ADVERTS_BURST_PER_PEER,
            names_max=limits.OVERLAY_CONNECTIONS_MAX,
        )
        self._rates = TokenBuckets(
            per_s=limits.ADVERTS_PER_S_PER_SELLER,
            burst=limits.ADVERTS_BURST_PER_SELLER,
            names_max=limits.DIRECTORY_ADVERTS_MAX,
        )
        self._asks = TokenBuckets(
            per_s=limits.INDEX_ASKS_PER_S_PER_PEER,
            burst=limits.INDEX_ASKS_BURST_PER_PEER,
            names_max=limits.OVERLAY_CONNECTIONS_MAX,
        )
        self._pulled_at: list[float] = []

    async def start(self) -> None:
        """Join the topic and answer the index."""
        self._host.set_stream_handler(TProtocol(index.PROTOCOL), self._serve_index)
        await self._nursery.start(self.gossip.run)
        self._nursery.start_soon(self._expire)

    async def publish(self, envelope: bytes) -> None:
        """Gossip our advert. Raises EnvelopeError when an honest peer would refuse it."""
        event = self.directory.offer(envelope, time.time())
        if event is not None:
            self.feed.tell(event)
        if not self.directory.holds(envelope):
            await trio.lowlevel.checkpoint()
            return
        seller = PeerId(decode(envelope).signer)
        self._own.pop(seller, None)
        self._own[seller] = envelope
        while len(self._own) > index.PUSHED_MAX:
            del self._own[next(iter(self._own))]
        # A connection younger than a heartbeat is not in the mesh yet: tell those peers directly.
        for peer in list(self._host.get_network().connections)[: limits.INDEX_PEERS_MAX * 4]:
            if not self.gossip.in_mesh(peer):
                self._nursery.start_soon(self._exchange, peer, False)
        await self.gossip.publish(envelope)

    def _accept_gossip(self, forwarder: str, data: bytes) -> bool:
        event = self._take(forwarder, data)
        if not self.directory.holds(data):
            return False
        return event is None or self._rates.take(event.seller, trio.current_time())

    def _take(self, forwarder: str, data: bytes) -> AdvertEvent | None:
        try:
            event = self.directory.offer(data, time.time())
        except EnvelopeError as error:
            strangers.note(forwarder, error.code, error.message)
            if error.code in _NOT_HOSTILE:
                return None
            if not self._bad.take(forwarder, trio.current_time()):
                strangers.note(forwarder, "disconnected", "too many bad documents")
                self._nursery.start_soon(self._connections.drop, ID.from_base58(forwarder))
            return None
        if event is not None:
            self.feed.tell(event)
        return event

    async def _expire(self) -> None:
        while True:
            await trio.sleep(_EXPIRY_CHECK_S)
            for event in self.directory.expire(time.time()):
                self.feed.tell(event)

    def greet(self, peer: Any, dialled: bool) -> None:
        """A connection is up: exchange what each side knows."""
        now = trio.current_time()
        self._pulled_at = [then for then in self._pulled_at if now - then < _PULL_AGAIN_S]
        pull = len(self._pulled_at) < limits.INDEX_PEERS_MAX
        if pull:
            self._pulled_at.append(now)
        if pull or dialled or self._own:
            self._nursery.start_soon(self._exchange, peer, pull)

    async def _exchange(self, peer: Any, pull: bool) -> None:
        text = str(peer)
        query = index.Query(count=limits.INDEX_PAGE_ADVERTS_MAX if pull else 0)
        try:
            for _ in range(limits.INDEX_PAGES_MAX):
                stream = await self._new_stream(text, index.PROTOCOL)
                async with stream:
                    answer = await index.exchange(
                        stream,
                        query,
                        tuple(self._own.values()),
                        lambda data: self._take(text, data),
                    )
                if not answer.next or answer.next <= query.after:
                    break
                query = index.Query(answer.next, query.count)
            self._connections.remember(peer)
        except (EnvelopeError, trio.TooSlowError) as error:
            strangers.note(text, "index", error)
        except (RemoteError, trio.BrokenResourceError, trio.ClosedResourceError) as error:
            logger.debug("index peer=%s error=%r", text, error)

    async def _serve_index(self, net_stream: Any) -> None:
        stream = Libp2pStream(net_stream, index.PROTOCOL, self._nursery)
        if not self._asks.take(stream.peer, trio.current_time()):
            strangers.note(stream.peer, "index", "asks too often")
            await stream.reset()
            return
        news: list[bytes] = []

        def take(data: bytes) -> None:
            event = self._take(stream.peer, data)
            # A peer's word about itself reached only us, so far: pass it on.
            if event is not None and event.seller == stream.peer and event.envelope is not None:
                news.append(data)

        try:
            await index.serve(stream, self.directory, take)
            await stream.aclose()
        except (EnvelopeError, trio.TooSlowError) as error:
            strangers.note(stream.peer, "index", error)
            await stream.reset()
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            await stream.reset()
        for data in news[:1]:
            await self.gossip.publish(data)
