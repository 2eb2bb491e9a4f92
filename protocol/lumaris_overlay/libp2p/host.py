"""The real network behind the port: a libp2p host with its gossip, index, dialling and streams."""

from __future__ import annotations

import logging
import random
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import trio
from libp2p.abc import INotifee
from libp2p.custom_types import TProtocol
from libp2p.peer.id import ID
from libp2p.peer.peerinfo import PeerInfo as Libp2pPeerInfo
from libp2p.peer.peerinfo import info_from_p2p_addr
from multiaddr import Multiaddr

from lumaris_overlay.directory import Directory
from lumaris_overlay.feed import AdvertFeed
from lumaris_overlay.libp2p import build, index
from lumaris_overlay.libp2p.gossip import AdvertGossip
from lumaris_overlay.libp2p.overrides import ClosingTCP, strangers
from lumaris_overlay.libp2p.peerbook import PeerBook
from lumaris_overlay.libp2p.streams import Libp2pStream
from lumaris_overlay.ports import (
    AdvertEvent,
    OverlayStream,
    PeerInfo,
    Reachability,
    StreamHandler,
)
from lumaris_overlay.serving import HandlerTable
from lumaris_overlay.tasks import background, shielded
from lumaris_overlay.validate import AdvertGate, TokenBuckets
from lumaris_protocol import limits
from lumaris_protocol.envelope import decode
from lumaris_protocol.errors import EnvelopeError, RemoteError
from lumaris_protocol.keys import KeyPair, PeerId

logger = logging.getLogger(__name__)

_DIAL_S = 6.0
_OPEN_S = 10.0
_EXPIRY_CHECK_S = 1.0
_REDIAL_CHECK_S = 0.5
_BACKOFF_S_MIN, _BACKOFF_S_MAX = 0.5, 60.0
# Below this many peers, remembered ones are dialled too: enough for a gossip mesh.
_PEERS_WANTED = 8
_PULL_AGAIN_S = 60.0
_SHUTDOWN_S = 2.0
# An honest peer can pass these on: its clock differs, or the fault is ours.
_NOT_HOSTILE = frozenset({"directory_full", "expired", "not_yet_valid"})


@dataclass(frozen=True)
class HostConfig:
    """What a host is started with. Port 0 lets the system choose."""

    key: KeyPair
    network: str
    coordinator_keys: frozenset[PeerId]
    listen_ip: str = "127.0.0.1"
    listen_port: int = 0
    bootstrap: tuple[str, ...] = ()
    state_dir: Path | None = None


@asynccontextmanager
async def open_host(config: HostConfig) -> AsyncGenerator[Libp2pOverlay]:
    """A listening host. Raises LumarisError `port_in_use` or `config_invalid`."""
    address = build.listen_address(config.listen_ip, config.listen_port)
    if config.listen_port:
        build.refuse_used_port(config.listen_ip, config.listen_port)
    transport = ClosingTCP()
    host = build.build_host(config.key, build.dialable, transport)
    try:
        async with host.run([address]), background() as nursery:
            overlay = Libp2pOverlay(config, host, nursery)
            try:
                await overlay.start()
                yield overlay
            finally:
                with shielded(_SHUTDOWN_S):
                    await overlay.stop()
    finally:
        with trio.CancelScope(shield=True):
            await transport.close_all()


class _ConnectionWatch(INotifee):
    """Tells the overlay of new connections; libp2p awaits each call, so each returns at once."""

    def __init__(self, overlay: Libp2pOverlay) -> None:
        self._overlay = overlay

    async def connected(self, network: Any, conn: Any) -> None:
        self._overlay.greet(conn.muxed_conn.peer_id)

    async def disconnected(self, network: Any, conn: Any) -> None:
        pass

    async def opened_stream(self, network: Any, stream: Any) -> None:
        pass

    async def closed_stream(self, network: Any, stream: Any) -> None:
        pass

    async def listen(self, network: Any, multiaddr: Any) -> None:
        pass

    async def listen_close(self, network: Any, multiaddr: Any) -> None:
        pass


class Libp2pOverlay:
    """A libp2p host; implements `ports.Overlay`."""

    def __init__(self, config: HostConfig, host: Any, nursery: trio.Nursery) -> None:
        self.host = host
        self.directory = Directory(AdvertGate(config.network, config.coordinator_keys))
        self._config = config
        self._nursery = nursery
        self._feed = AdvertFeed(nursery)
        self._handlers = HandlerTable()
        self._gossip = AdvertGossip(host, config.network, self._accept_gossip)
        state = config.state_dir
        self._book = PeerBook(state / "peers.json" if state is not None else None)
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
        self._dialling: set[str] = set()
        self._pulled_at: list[float] = []
        self._retry: dict[str, tuple[float, float]] = {}

    @property
    def peer_id(self) -> PeerId:
        """Our own peer id."""
        return self._config.key.peer_id

    async def start(self) -> None:
        """Join the topic, answer the index and begin to keep connections."""
        self.host.set_stream_handler(TProtocol(index.PROTOCOL), self._serve_index)
        self.host.get_network().register_notifee(_ConnectionWatch(self))
        await self._nursery.start(self._gossip.run)
        self._nursery.start_soon(self._expire)
        self._nursery.start_soon(self._keep_connected)

    async def stop(self) -> None:
        """Close all connections at once; libp2p alone takes 0.2 s for each."""
        network = self.host.get_network()
        async with trio.open_nursery() as nursery:
            for peer in list(network.connections):
                nursery.start_soon(self._drop, peer)
        await self.host.close()

    # --- adverts ---

    async def publish_advert(self, envelope: bytes) -> None:
        """Gossip our advert. Raises EnvelopeError when an honest peer would refuse it."""
        event = self.directory.offer(envelope, time.time())
        if event is not None:
            self._feed.tell(event)
        if not self.directory.holds(envelope):
            await trio.lowlevel.checkpoint()
            return
        seller = PeerId(decode(envelope).signer)
        self._own.pop(seller, None)
        self._own[seller] = envelope
        while len(self._own) > index.PUSHED_MAX:
            del self._own[next(iter(self._own))]
        # A connection younger than a heartbeat is not in the mesh yet: tell those peers directly.
        for peer in list(self.host.get_network().connections)[: limits.INDEX_PEERS_MAX * 4]:
            if not self._gossip.in_mesh(peer):
                self._nursery.start_soon(self._exchange, peer, False)
        await self._gossip.publish(envelope)

    def adverts(self) -> AbstractAsyncContextManager[trio.MemoryReceiveChannel[AdvertEvent]]:
        """First every advert the directory holds, then each change."""
        return self._feed.follow(self.directory.events())

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
                self._nursery.start_soon(self._drop, ID.from_base58(forwarder))
            return None
        if event is not None:
            self._feed.tell(event)
        return event

    async def _expire(self) -> None:
        while True:
            await trio.sleep(_EXPIRY_CHECK_S)
            for event in self.directory.expire(time.time()):
                self._feed.tell(event)

    # --- the index ---

    def greet(self, peer: Any) -> None:
        """A connection is up: exchange what each side knows."""
        text = str(peer)
        now = trio.current_time()
        self._pulled_at = [then for then in self._pulled_at if now - then < _PULL_AGAIN_S]
        dialled = text in self._dialling
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
            self._remember(peer)
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
            await self._gossip.publish(data)

    # --- connections ---

    async def connect(self, addresses: Sequence[str]) -> int:
        """Connect to peers by address; the number that answered."""
        answered = 0

        async def one(address: str) -> None:
            nonlocal answered
            answered += await self._dial(address)

        async with trio.open_nursery() as nursery:
            for address in addresses[: limits.PEERS_REMEMBERED_MAX]:
                nursery.start_soon(one, address)
        return answered

    async def peers(self) -> tuple[PeerInfo, ...]:
        """The peers we are connected to."""
        await trio.lowlevel.checkpoint()
        return tuple(
            PeerInfo(PeerId(str(peer)), self._known_addresses(peer)) for peer in self._connected()
        )

    async def reachability(self) -> Reachability:
        """Where we listen and how many are connected."""
        await trio.lowlevel.checkpoint()
        addresses = tuple(str(address) for address in self.host.get_addrs())
        return Reachability(addresses, len(self._connected()))

    def _connected(self) -> list[Any]:
        connections = self.host.get_network().connections
        return [
            peer for peer, held in list(connections.items()) if any(not c.is_closed for c in held)
        ]

    def _known_addresses(self, peer: Any) -> tuple[str, ...]:
        try:
            found = self.host.get_peerstore().addrs(peer)
        except Exception:
            return ()
        suffix = f"/p2p/{peer}"
        texts = {str(a) if str(a).endswith(suffix) else f"{a}{suffix}" for a in found}
        return tuple(sorted(t for t in texts if "/0.0.0.0/" not in t))[: limits.ADDRESSES_MAX]

    def _remember(self, peer: Any) -> None:
        self._book.remember(str(peer), self._known_addresses(peer))

    async def _dial(self, address: str) -> bool:
        """Connect to one address; whether a connection to its peer is up afterwards."""
        try:
            info = info_from_p2p_addr(Multiaddr(address))
        except Exception:
            return False
        peer = info.peer_id
        if str(peer) == self.peer_id:
            return False
        if peer in self._connected():
            return True
        network = self.host.get_network()
        self._dialling.add(str(peer))
        try:
            # Of several TCP addresses libp2p tries one, so it is given one at a time; and it
            # refuses a peer for a minute after a failure, while our back-off decides that here.
            self.host.get_peerstore().clear_addrs(peer)
            network.unblock_peer(peer)
            with trio.fail_after(_DIAL_S):
                await self.host.connect(Libp2pPeerInfo(peer, info.addrs))
        except Exception as error:
            logger.debug("dial address=%s error=%r", address, error)
            return peer in self._connected()
        finally:
            self._dialling.discard(str(peer))
        return True

    async def _keep_connected(self) -> None:
        while True:
            now = trio.current_time()
            connected = {str(peer) for peer in self._connected()}
            wanted = {
                address.rpartition("/p2p/")[2]: [address] for address in self._config.bootstrap
            }
            if len(connected) < _PEERS_WANTED:
                for peer, addresses in self._book.addresses().items():
                    wanted.setdefault(peer, []).extend(addresses)
            for peer, targets in wanted.items():
                if peer in connected:
                    self._retry.pop(peer, None)
                    continue
                delay, due = self._retry.get(peer, (_BACKOFF_S_MIN / 2, now))
                if due > now or peer in self._dialling:
                    continue
                delay = min(delay * 2, _BACKOFF_S_MAX)
                # Jitter spreads the return of a whole market after a bootstrap peer's restart.
                due = now + _DIAL_S + delay * random.uniform(0.5, 1.5)  # noqa: S311 - not a secret
                self._retry[peer] = (delay, due)
                self._nursery.start_soon(self._redial, peer, targets, delay)
            await trio.sleep(_REDIAL_CHECK_S)

    async def _redial(self, peer: str, addresses: list[str], delay: float) -> None:
        for address in dict.fromkeys(addresses):
            if await self._dial(address):
                return
        due = trio.current_time() + delay * random.uniform(0.5, 1.5)  # noqa: S311 - not a secret
        self._retry[peer] = (delay, due)

    async def _drop(self, peer: Any) -> None:
        try:
            await self.host.get_network().close_peer(peer)
        except Exception as error:
            logger.debug("closing peer=%s error=%r", peer, error)

    # --- streams ---

    async def open_stream(
        self, peer: str, protocol: str, *, addresses: Sequence[str] = ()
    ) -> OverlayStream:
        """A new stream; dials when not connected."""
        try:
            with trio.fail_after(_OPEN_S):
                await self._reach(peer, addresses)
                return await self._new_stream(peer, protocol)
        except trio.TooSlowError:
            raise RemoteError("unreachable", f"The peer {peer} did not answer in time.") from None

    async def _reach(self, peer: str, addresses: Sequence[str]) -> None:
        if any(str(known) == peer for known in self._connected()):
            return
        suffix = f"/p2p/{peer}"
        known = (*addresses, *self.directory.addresses(peer), *self._book.addresses().get(peer, ()))
        for address in dict.fromkeys(known):
            full = address if "/p2p/" in address else address + suffix
            if full.endswith(suffix) and await self._dial(full):
                return
        raise RemoteError("unreachable", f"The peer {peer} cannot be reached.")

    async def _new_stream(self, peer: str, protocol: str) -> Libp2pStream:
        try:
            stream = await self.host.new_stream(ID.from_base58(peer), [TProtocol(protocol)])
        except Exception as error:
            raise RemoteError(
                "unreachable", f"The peer {peer} does not answer {protocol}."
            ) from error
        return Libp2pStream(stream, protocol, self._nursery)

    @asynccontextmanager
    async def serve(self, protocol: str, handler: StreamHandler) -> AsyncGenerator[None]:
        """Answer streams of a protocol while the context lasts."""

        async def answer(net_stream: Any) -> None:
            await self._handlers.answer(Libp2pStream(net_stream, protocol, self._nursery))

        async with self._handlers.serve(protocol, handler):
            self.host.set_stream_handler(TProtocol(protocol), answer)
            try:
                yield
            finally:
                self.host.remove_stream_handler(TProtocol(protocol))
