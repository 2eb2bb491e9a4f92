"""The overlay with links: streams between two programs share one connection, TLS when possible.

It stands before any other overlay inside a program. Discovery goes straight through; a stream to a
peer that speaks links becomes a lane of the pair's link, and to one that does not (another
implementation) the plain stream of the overlay that it is.
"""

from __future__ import annotations

import ipaddress
import logging
import secrets
from collections import Counter, OrderedDict
from collections.abc import AsyncGenerator, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager, suppress
from typing import TYPE_CHECKING

import trio

from lumaris_overlay.links import direct, wire
from lumaris_overlay.links.carrier import LOST, Carrier
from lumaris_overlay.links.lane import Lane
from lumaris_overlay.links.link import BEGIN_S, GoneError, Link, Means, Timing
from lumaris_overlay.links.wire import Address, Attach, Kind, Target
from lumaris_overlay.ports import (
    AdvertEvent,
    DemandEvent,
    Notice,
    Overlay,
    OverlayStream,
    PeerInfo,
    Ping,
    Reachability,
    StreamHandler,
)
from lumaris_overlay.serving import HandlerTable
from lumaris_overlay.tasks import background
from lumaris_protocol.errors import LumarisError, RemoteError
from lumaris_protocol.keys import PeerId
from lumaris_protocol.limits import (
    ADDRESSES_MAX,
    LINK_LANES_MAX,
    LINKS_MAX,
    LINKS_PER_PEER_MAX,
    LINKS_UNREAD_BYTES_MAX,
)
from lumaris_protocol.messages.negotiation import Requirements
from lumaris_protocol.protocols import LINK

if TYPE_CHECKING:
    from lumaris_overlay.bulk.gate import BulkGate

logger = logging.getLogger(__name__)

# A peer that does not speak links is not asked again for this long.
_LINKLESS_S = 60.0
# How every overlay says that a connected peer does not know the protocol.
_NO_LINKS = f"does not answer {LINK}"
_LINKLESS_MAX = 1_024
_ID_BYTES = 16


@asynccontextmanager
async def open_links(
    inner: Overlay,
    *,
    listen: tuple[str, int] | None,
    answer: bool = True,
    gate: BulkGate | None = None,
    timing: Timing | None = None,
) -> AsyncGenerator[LinkedOverlay]:
    """The overlay with links while the context lasts.

    `listen` is where other programs may dial this one (port 0: any); `answer` is False for a
    program that only opens streams, so that several may share one overlay process. Raises
    LumarisError `port_in_use` or `config_invalid` for `listen`.
    """
    async with background() as nursery, AsyncExitStack() as stack:
        overlay = LinkedOverlay(inner, nursery, answer=answer, gate=gate, timing=timing or Timing())
        if listen is not None:
            await overlay.listen(*listen)
        stack.push_async_callback(overlay.aclose)
        if answer:
            await stack.enter_async_context(inner.serve(LINK, overlay.answer_link))
        yield overlay


class LinkedOverlay:
    """Implements `ports.Overlay` on another overlay. Made by `open_links`."""

    def __init__(
        self,
        inner: Overlay,
        nursery: trio.Nursery,
        *,
        answer: bool,
        gate: BulkGate | None,
        timing: Timing,
    ) -> None:
        self.listener: direct.Listener | None = None
        self._inner, self._nursery = inner, nursery
        self._answers, self._gate, self._timing = answer, gate, timing
        self._handlers = HandlerTable()
        self._outgoing: dict[PeerId, Link] = {}
        self._incoming: dict[str, Link] = {}
        self._beginning: dict[str, trio.Lock] = {}
        self._linkless: OrderedDict[str, float] = OrderedDict()
        self._running: Counter[PeerId] = Counter()  # handlers of lanes, also of links that ended

    # --- links ---

    @property
    def links(self) -> tuple[Link, ...]:
        """Every link there is, on either side."""
        return (*self._outgoing.values(), *self._incoming.values())

    async def listen(self, ip: str, port: int) -> None:
        """Let other programs dial this one. Raises LumarisError."""
        self.listener = await direct.open_listener(ip, port, self._attach_direct, self._gate)
        self._nursery.start_soon(self.listener.run, self._nursery)

    async def aclose(self) -> None:
        """End every link in order."""
        with trio.CancelScope(shield=True):
            async with trio.open_nursery() as nursery:
                for link in self.links:
                    nursery.start_soon(link.close)

    async def answer_link(self, stream: OverlayStream) -> None:
        """Take a connection of a link inside the overlay, new or resumed, until it is dropped."""
        carrier = Carrier(stream, direct=False)
        attach = None
        with trio.move_on_after(BEGIN_S), suppress(*LOST):
            attach = wire.decode_json(await carrier.frame(), Kind.ATTACH, Attach)
        if attach is None:
            await stream.reset()
            return
        link = self._begun(stream.peer, attach) if attach.fresh else self._incoming.get(attach.link)
        if (
            link is None
            or not link.alive
            or link.peer != stream.peer
            or not link.opens(attach.proof, by_token=False)
        ):
            await carrier.send(wire.encode(Kind.REFUSED))
            return
        link.offer(carrier)
        await carrier.dropped.wait()

    def _attach_direct(self, carrier: Carrier, attach: Attach) -> bool:
        link = self._incoming.get(attach.link)
        if link is None or not link.alive or attach.fresh:
            return False
        if not link.opens(attach.proof, by_token=True):
            return False
        link.offer(carrier)
        return True

    def _begun(self, peer: PeerId, attach: Attach) -> Link | None:
        """A link that the peer begins, when there is room for it."""
        if attach.link in self._incoming:
            return None
        of_peer = [link for link in self._incoming.values() if link.peer == peer]
        if len(of_peer) >= LINKS_PER_PEER_MAX and not self._retire(of_peer):
            return None
        incoming = list(self._incoming.values())
        if len(incoming) >= LINKS_MAX and not (
            self._retire(incoming) or self._even_out(len(of_peer))
        ):
            return None
        means = Means(
            make_target=None if self.listener is None else self._make_target,
            on_lane=self._on_lane,
            on_received=self._bound_unread,
            gate=self._gate,
            timing=self._timing,
        )
        link = self._incoming[attach.link] = Link(peer, attach.link, attach.proof, means)
        link.mux.say_serves(self._handlers.protocols)
        self._nursery.start_soon(self._run_incoming, link)
        return link

    async def _run_incoming(self, link: Link) -> None:
        try:
            await link.run()
        finally:
            if self._incoming.get(link.number) is link:
                del self._incoming[link.number]

    async def _run_outgoing(self, link: Link) -> None:
        try:
            await link.run()
        finally:
            if self._outgoing.get(link.peer) is link:
                del self._outgoing[link.peer]

    def _retire(self, links: list[Link]) -> bool:
        """Make room: end the link that has been idle longest, if any is."""
        idle = [link for link in links if link.idle and link.alive]
        if not idle:
            return False
        self._end_oldest(idle)
        return True

    def _even_out(self, links: int) -> bool:
        """Make room for a peer with so many links: end one of the peer that has most.

        Only where that leaves the other with no fewer than the newcomer will have.
        """
        peer, most = Counter(link.peer for link in self._incoming.values()).most_common(1)[0]
        if most < links + 2:
            return False
        logger.info("link peer=%s event=made_room links=%d", peer, most)
        self._end_oldest([link for link in self._incoming.values() if link.peer == peer])
        return True

    def _end_oldest(self, links: list[Link]) -> None:
        oldest = min(links, key=lambda link: link.used_at)
        for table in (self._incoming, self._outgoing):
            for key in [key for key, link in table.items() if link is oldest]:
                del table[key]  # type: ignore[arg-type]
        self._nursery.start_soon(oldest.close)

    def _on_lane(self, lane: Lane) -> bool:
        if lane.protocol not in self._handlers:
            return False
        if self._running[lane.peer] >= LINKS_PER_PEER_MAX * LINK_LANES_MAX:
            return False
        self._running[lane.peer] += 1
        self._nursery.start_soon(self._answer_lane, lane)
        return True

    async def _answer_lane(self, lane: Lane) -> None:
        try:
            await self._handlers.answer(lane)
        finally:
            self._running[lane.peer] -= 1
            if not self._running[lane.peer]:
                del self._running[lane.peer]

    def _bound_unread(self) -> None:
        links = self.links
        if sum(link.mux.unread for link in links) > LINKS_UNREAD_BYTES_MAX:
            largest = max(links, key=lambda link: link.mux.unread)
            logger.warning("link peer=%s event=unread_bytes ended", largest.peer)
            largest.stop()

    async def _make_target(self) -> Target | None:
        listener = self.listener
        assert listener is not None, "only links of a program that listens ask for it"
        ips = [listener.ip]
        if listener.everywhere:
            try:
                ips = _ips((await self._inner.reachability()).addresses)
            except LumarisError:
                return None
        if not ips:
            return None
        addresses = tuple(Address(ip, listener.port) for ip in ips[:ADDRESSES_MAX])
        return Target(addresses=addresses, pin=listener.pin, token=secrets.token_hex(_ID_BYTES))

    async def _link_to(self, peer: str, addresses: Sequence[str]) -> Link | None:
        """The link to a peer, begun when there is none; None when the peer takes none.

        Raises RemoteError `unreachable`.
        """
        lock = self._beginning.setdefault(peer, trio.Lock())
        try:
            async with lock:
                link = self._outgoing.get(PeerId(peer))
                if link is not None and link.alive:
                    return link
                if self._linkless.get(peer, 0.0) > trio.current_time():
                    return None
                return await self._begin(peer, addresses)
        finally:
            if not lock.statistics().tasks_waiting and not lock.locked():
                self._beginning.pop(peer, None)

    async def _begin(self, peer: str, addresses: Sequence[str]) -> Link | None:
        try:
            stream = await self._inner.open_stream(peer, LINK, addresses=addresses)
        except RemoteError as error:
            if peer not in [info.peer for info in await self._inner.peers()]:
                raise
            # The peer is there. Too slow now says nothing about the next time.
            if _NO_LINKS in error.message:
                self._note_linkless(peer)
            return None
        if len(self._outgoing) >= LINKS_MAX and not self._retire(list(self._outgoing.values())):
            await stream.reset()
            raise RemoteError("unreachable", "There are too many links to other peers.")
        number, secret = secrets.token_hex(_ID_BYTES), secrets.token_hex(_ID_BYTES)

        async def open_inner() -> OverlayStream:
            return await self._inner.open_stream(peer, LINK, addresses=addresses)

        means = Means(open_inner=open_inner, on_received=self._bound_unread, timing=self._timing)
        link = Link(PeerId(stream.peer), number, secret, means)
        carrier = Carrier(stream, direct=False)
        try:
            attached = await link.ask(carrier, secret, fresh=True)
        except GoneError:
            logger.info("link peer=%s event=refused", peer)
            return None
        except (*LOST, trio.TooSlowError) as error:
            raise RemoteError("unreachable", f"The peer {peer} does not answer.") from error
        link.offer(carrier, attached)
        self._outgoing[link.peer] = link
        self._nursery.start_soon(self._run_outgoing, link)
        with trio.move_on_after(BEGIN_S):
            await link.ready.wait()
        return link

    def _note_linkless(self, peer: str) -> None:
        self._linkless[peer] = trio.current_time() + _LINKLESS_S
        self._linkless.move_to_end(peer)
        while len(self._linkless) > _LINKLESS_MAX:
            self._linkless.popitem(last=False)

    # --- the port ---

    @property
    def peer_id(self) -> PeerId:
        """Our own peer id."""
        return self._inner.peer_id

    async def open_stream(
        self, peer: str, protocol: str, *, addresses: Sequence[str] = ()
    ) -> OverlayStream:
        """A lane to a peer, or a plain stream when it speaks no links. Raises RemoteError."""
        await trio.lowlevel.checkpoint()
        link = self._outgoing.get(PeerId(peer))
        if link is None or not link.alive or not link.ready.is_set():
            link = await self._link_to(peer, addresses)
        if link is None or protocol not in (link.mux.serves or ()):
            return await self._inner.open_stream(peer, protocol, addresses=addresses)
        lane = link.open(protocol)
        if lane is None:
            raise RemoteError("unreachable", f"Too many streams to the peer {peer}.")
        return lane

    @asynccontextmanager
    async def _serve(self, protocol: str, handler: StreamHandler) -> AsyncGenerator[None]:
        async with self._inner.serve(protocol, handler):
            try:
                async with self._handlers.serve(protocol, handler):
                    self._say_serves()
                    yield
            finally:
                self._say_serves()

    def _say_serves(self) -> None:
        for link in self._incoming.values():
            link.mux.say_serves(self._handlers.protocols)

    def serve(self, protocol: str, handler: StreamHandler) -> AbstractAsyncContextManager[None]:
        """Answer lanes and plain streams of a protocol while the context lasts."""
        if not self._answers:
            return self._inner.serve(protocol, handler)
        return self._serve(protocol, handler)

    async def present(self, certificate: bytes) -> None:
        """Show this membership certificate from now on."""
        await self._inner.present(certificate)

    async def present_shards(self, envelope: bytes) -> None:
        """Divide the market by this signed shard map from now on. Raises EnvelopeError."""
        await self._inner.present_shards(envelope)

    async def seek(self, needs: Requirements) -> None:
        """Have the adverts that may fit these requirements in the directory."""
        await self._inner.seek(needs)

    async def publish_advert(self, envelope: bytes) -> None:
        """Gossip our signed advert. Raises EnvelopeError when it is not valid."""
        await self._inner.publish_advert(envelope)

    def adverts(self) -> AbstractAsyncContextManager[trio.MemoryReceiveChannel[AdvertEvent]]:
        """First every advert the directory holds, then each change."""
        return self._inner.adverts()

    async def publish_demand(self, envelope: bytes) -> None:
        """Gossip our signed demand. Raises EnvelopeError when it is not valid."""
        await self._inner.publish_demand(envelope)

    def demands(self) -> AbstractAsyncContextManager[trio.MemoryReceiveChannel[DemandEvent]]:
        """Each demand of other peers from now on."""
        return self._inner.demands()

    async def publish_notice(self, envelope: bytes) -> None:
        """Gossip what a coordinator signed for everybody. Raises EnvelopeError."""
        await self._inner.publish_notice(envelope)

    def notices(self) -> AbstractAsyncContextManager[trio.MemoryReceiveChannel[Notice]]:
        """First what is known of the coordinators' notices, then each new one."""
        return self._inner.notices()

    async def find_peer(self, peer: str) -> bytes | None:
        """The newest signed record of a peer."""
        return await self._inner.find_peer(peer)

    async def ping(self, peer: str, *, addresses: Sequence[str] = ()) -> Ping:
        """Ask a peer for its time."""
        return await self._inner.ping(peer, addresses=addresses)

    async def connect(self, addresses: Sequence[str]) -> int:
        """Connect to peers by address; the number that answered."""
        return await self._inner.connect(addresses)

    async def peers(self) -> tuple[PeerInfo, ...]:
        """The peers the overlay is connected to."""
        return await self._inner.peers()

    async def reachability(self) -> Reachability:
        """Where we can be reached."""
        return await self._inner.reachability()


def _ips(addresses: Sequence[str]) -> list[str]:
    """The IP addresses in multiaddresses, without those of relays."""
    ips: list[str] = []
    for address in addresses:
        parts = address.split("/")
        if len(parts) > 3 and parts[1] in ("ip4", "ip6") and "p2p-circuit" not in parts:
            try:
                ip = str(ipaddress.ip_address(parts[2]))
            except ValueError:
                continue
            if ip not in ips:
                ips.append(ip)
    return ips
