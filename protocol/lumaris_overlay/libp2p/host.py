"""The real network behind the port: a libp2p host with its gossip, index, dialling and streams.

Only members take part (`admission`); a host shows its certificate in every handshake and dials
nobody before it has one.
"""

from __future__ import annotations

import logging
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import trio
from libp2p.custom_types import TProtocol
from libp2p.peer.id import ID

from lumaris_overlay.advert_file import AdvertFile
from lumaris_overlay.directory import Directory
from lumaris_overlay.libp2p import build
from lumaris_overlay.libp2p.admission import Admission, StrangerWatch
from lumaris_overlay.libp2p.advert_exchange import AdvertExchange
from lumaris_overlay.libp2p.conduct import Conduct
from lumaris_overlay.libp2p.connections import Connections
from lumaris_overlay.libp2p.dht import DhtRecords
from lumaris_overlay.libp2p.gossip import NOTICES, NOTICES_SHARD
from lumaris_overlay.libp2p.health import Health
from lumaris_overlay.libp2p.hello import Hello
from lumaris_overlay.libp2p.notice_exchange import NoticeExchange
from lumaris_overlay.libp2p.overrides import ClosingTCP
from lumaris_overlay.libp2p.peerbook import PeerBook
from lumaris_overlay.libp2p.presence import Presence, ReachConfig
from lumaris_overlay.libp2p.reach import Announcer
from lumaris_overlay.libp2p.shard_follower import ShardFollower
from lumaris_overlay.libp2p.streams import Libp2pStream
from lumaris_overlay.notices import NoticeBoard, NoticeGate, revoked_in
from lumaris_overlay.ports import (
    AdvertEvent,
    DemandEvent,
    Notice,
    OverlayStream,
    PeerInfo,
    Ping,
    Reachability,
    StreamHandler,
)
from lumaris_overlay.records import EndpointSigner, RecordGate
from lumaris_overlay.serving import HandlerTable
from lumaris_overlay.shard_desk import ShardDesk
from lumaris_overlay.tasks import background, shielded
from lumaris_overlay.validate import AdvertGate, DemandGate, MembershipGate, TokenBuckets
from lumaris_protocol.envelope import decode
from lumaris_protocol.errors import RemoteError
from lumaris_protocol.keys import KeyPair, PeerId
from lumaris_protocol.limits import ADDRESSES_MAX, NOTICE_BYTES_MAX, NOTICES_KEPT_MAX
from lumaris_protocol.messages.negotiation import Requirements
from lumaris_protocol.protocols import HELLO

logger = logging.getLogger(__name__)

_OPEN_S = 10.0
_SHUTDOWN_S = 2.0
# A look-up for a peer that cannot be reached: callers try again and again, the answer is the same.
_FINDS_PER_S, _FINDS_BURST, _FINDS_MAX = 0.1, 2, 256


@dataclass(frozen=True)
class HostConfig:
    """What a host is started with. Port 0 lets the system choose; a certificate may come later."""

    key: KeyPair
    network: str
    coordinator_keys: frozenset[PeerId]
    listen_ip: str = "127.0.0.1"
    listen_port: int = 0
    bootstrap: tuple[str, ...] = ()
    state_dir: Path | None = None
    certificate: bytes = b""
    reach: ReachConfig = field(default_factory=ReachConfig)
    # The shards whose whole directory this host holds and hands out.
    index_shards: tuple[int, ...] = ()
    # Whose lists of coordinator keys count.
    roots: frozenset[PeerId] = frozenset()


@asynccontextmanager
async def open_host(config: HostConfig) -> AsyncGenerator[Libp2pOverlay]:
    """A listening host. Raises LumarisError: `port_in_use`, `config_invalid`, `not_certified`."""
    address = build.listen_address(config.listen_ip, config.listen_port)
    if config.listen_port:
        build.refuse_used_port(config.listen_ip, config.listen_port)
    transport = ClosingTCP()
    board = NoticeBoard(NoticeGate(config.network, config.coordinator_keys, config.roots))
    admission = Admission(
        MembershipGate(config.network, board.keys, board.revoked), config.key.peer_id
    )
    if config.certificate:
        admission.present(config.certificate)
    conduct = Conduct()
    announcer = Announcer(config.reach.announce)
    host = build.build_host(config.key, announcer, transport, admission, conduct.banned)
    try:
        async with host.run([address]), background() as nursery:
            overlay = Libp2pOverlay(config, host, nursery, admission, conduct, announcer, board)
            try:
                await overlay.start()
                yield overlay
            finally:
                with shielded(_SHUTDOWN_S):
                    await overlay.stop()
    finally:
        with trio.CancelScope(shield=True):
            await transport.close_all()


class Libp2pOverlay:
    """A libp2p host; implements `ports.Overlay`."""

    def __init__(
        self,
        config: HostConfig,
        host: Any,
        nursery: trio.Nursery,
        admission: Admission,
        conduct: Conduct,
        announcer: Announcer,
        board: NoticeBoard,
    ) -> None:
        self.host, self.admission, self.conduct = host, admission, conduct
        self._config = config
        self._nursery = nursery
        self._handlers = HandlerTable()
        state = config.state_dir
        belonging = (config.network, board.keys, board.revoked)
        self.directory = Directory(AdvertGate(*belonging))
        self.presence = Presence(
            host,
            announcer,
            nursery,
            network=config.network,
            config=config.reach,
            admitted=admission.admitted,
            new_stream=self._new_stream,
            dial=self._dial,
            seen_as=self._seen_as,
        )
        self.connections = Connections(
            host,
            self.peer_id,
            nursery,
            PeerBook(state / "peers.json" if state is not None else None),
            bootstrap=config.bootstrap,
            advertised=self.directory.addresses,
            on_connected=self._greet,
            may_dial=lambda: bool(admission.certificate),
            on_left=self._part,
            circuits=self.presence.circuits,
        )
        self.health = Health(host, nursery)
        conduct.send_away = self._send_away
        host.get_network().on_violation = lambda peer: conduct.ban(peer, "window violation")
        self.strangers = StrangerWatch(
            admission,
            live=self.connections.live,
            drop=self.connections.drop,
            expired=self._exclude,
            nursery=nursery,
        )
        self.hello = Hello(
            host,
            admission,
            nursery,
            new_stream=self._new_stream,
            protocols=lambda: self._handlers.protocols,
            on_admitted=self._welcome,
            fault=conduct.fault,
        )
        desk = ShardDesk(
            config.network,
            board.keys,
            state / "shards" if state is not None else None,
        )
        self.notice_board = NoticeExchange(
            host,
            board,
            nursery,
            new_stream=self._new_stream,
            spread=self._spread_notice,
            unreached=self._unreached,
            heed=self._heed,
            fault=conduct.fault,
            saved=None if state is None else _notice_file(state / "notices"),
        )
        self.exchange = AdvertExchange(
            host,
            config.network,
            self.directory,
            self.connections,
            nursery,
            new_stream=self._new_stream,
            admission=admission,
            conduct=conduct,
            demand_gate=DemandGate(*belonging),
            desk=desk,
            saved=AdvertFile(state / "adverts") if state is not None else None,
            judges={NOTICES: self.notice_board.judge},
        )
        self._signer = EndpointSigner(config.key, config.network)
        self._finds = TokenBuckets(per_s=_FINDS_PER_S, burst=_FINDS_BURST, names_max=_FINDS_MAX)
        gate = RecordGate(*belonging)
        self.dht = DhtRecords(
            host,
            gate,
            self.connections,
            nursery,
            new_stream=self._new_stream,
            admitted=admission.admitted,
            known=self.directory.envelope,
            make_endpoint=self._endpoint,
        )
        self.shards = ShardFollower(
            desk,
            self.exchange,
            self.connections,
            nursery,
            find_index_peers=self.dht.find_index_peers,
            check=self.dht.check,
            changed=self.dht.put_again,
        )

    @property
    def peer_id(self) -> PeerId:
        """Our own peer id."""
        return self._config.key.peer_id

    async def start(self) -> None:
        """Join the topics, answer the index and begin to keep connections."""
        self.host.set_stream_handler(TProtocol(HELLO), self.hello.serve)
        self.host.for_strangers.add_handler(TProtocol(HELLO), self.hello.serve)
        self._nursery.start_soon(self.strangers.run)
        await self.notice_board.start()
        await self.exchange.start()
        await self._nursery.start(self.dht.run)
        await self._nursery.start(self.shards.run)
        self.presence.start()
        self.health.start()
        self.connections.start()

    async def stop(self) -> None:
        """Close everything at once."""
        await self.notice_board.stop()
        await self.exchange.stop()
        await self.connections.drop_all()
        await self.host.close()

    async def _dial(self, address: str) -> bool:
        return await self.connections.dial(address)

    def _seen_as(self) -> tuple[str, ...]:
        return self.hello.observed()

    def _greet(self, peer: Any, dialled: bool) -> None:
        """A connection is up. Whoever dialled says hello; strangers get nothing else."""
        if self.admission.admitted(str(peer)):
            self.exchange.greet(peer, dialled)
            self.notice_board.greet(peer)
            self.dht.seen(str(peer))
        else:
            self.strangers.meet(peer)
        if dialled:
            self._nursery.start_soon(self.hello.tell, peer)

    def _welcome(self, peer: str) -> None:
        """A connected stranger has become a member: what was held back at its coming happens."""
        known = ID.from_base58(peer)
        self.exchange.gossip.admit(known)
        self.host._schedule_identify(known, reason="admitted")  # noqa: SLF001 - refused at first
        self.exchange.greet(known, dialled=True)
        self.notice_board.greet(known)
        self.presence.met(known)
        self.dht.seen(peer)

    def _endpoint(self, after: int) -> bytes | None:
        """Our signed endpoint; None before we are members."""
        if not self.admission.certificate:
            return None
        index = tuple({*self._config.index_shards, *self.shards.desk.sold_in(time.time())})
        services = ("index",) * bool(index) + ("relay",) * (self._config.reach.relay is not None)
        return self._signer.sign(
            certificate=self.admission.certificate,
            addresses=self.presence.reachability(0).addresses[:ADDRESSES_MAX],
            now=time.time(),
            after=after,
            services=services,
            shards=index,
        )

    async def _show_certificate(self, peer: Any) -> None:
        """A peer to which we were strangers has refused our gossip so far: try again."""
        await self.hello.tell(peer)
        if self.admission.admitted(str(peer)) and not self.exchange.gossip.knows(peer):
            self._welcome(str(peer))

    async def _exclude(self, peer: Any) -> None:
        """A member's certificate has run out: it is a stranger, for as long as strangers stay."""
        await self.exchange.gossip.part(peer)

    def _part(self, peer: Any) -> None:
        self.admission.part(str(peer))
        self.hello.forget(str(peer))

    def _heed(self, notice: Notice) -> None:
        """What a coordinator says of peers holds from now on, for those connected too."""
        named = revoked_in(notice)
        for event in self.directory.revoke(named, time.time()):
            self.exchange.feed.tell(event)
        for peer in self.connections.live():
            if str(peer) in named and not self.admission.admitted(str(peer)):
                logger.info("revoked peer=%s event=sent_away", peer)
                self._nursery.start_soon(self.connections.drop, peer)

    def _unreached(self) -> list[Any]:
        """Connected members to whom gossip of notices does not get by itself yet."""
        reaches = self.exchange.gossip.reaches
        return [
            peer
            for peer in self.connections.live()
            if self.admission.admitted(str(peer)) and not reaches(peer, NOTICES, NOTICES_SHARD)
        ]

    async def _spread_notice(self, data: bytes) -> None:
        await self.exchange.gossip.publish(NOTICES, data, NOTICES_SHARD)

    def _send_away(self, peer: str) -> None:
        self._nursery.start_soon(self.connections.drop, ID.from_base58(peer))

    # --- the port ---

    async def present(self, certificate: bytes) -> None:
        """Show this certificate from now on, to those we are connected to at once."""
        if not self.admission.present(certificate):
            await trio.lowlevel.checkpoint()
            return
        self.connections.hurry()
        for peer in self.connections.live():
            self._nursery.start_soon(self._show_certificate, peer)
        await trio.lowlevel.checkpoint()

    async def ping(self, peer: str, *, addresses: Sequence[str] = ()) -> Ping:
        """Ask a peer for its time; dials when not connected."""
        try:
            with trio.fail_after(_OPEN_S):
                await self._reach(peer, addresses)
                return await self.hello.ask(peer)
        except trio.TooSlowError:
            raise RemoteError("unreachable", f"The peer {peer} did not answer in time.") from None

    async def present_shards(self, envelope: bytes) -> None:
        """Divide the market by this map. Raises EnvelopeError."""
        await self.shards.adopt(envelope)

    async def seek(self, needs: Requirements) -> None:
        """Follow the shards of what may fit, and ask index peers where those are too many."""
        await self.shards.seek(needs)

    async def publish_demand(self, envelope: bytes) -> None:
        """Gossip our demand. Raises EnvelopeError when an honest peer would refuse it."""
        await self.exchange.publish_demand(envelope)

    def demands(self) -> AbstractAsyncContextManager[trio.MemoryReceiveChannel[DemandEvent]]:
        """Each demand of other peers from now on."""
        return self.exchange.demands.follow()

    async def publish_notice(self, envelope: bytes) -> None:
        """Gossip a coordinator's notice. Raises EnvelopeError when it is not valid."""
        await self.notice_board.publish(envelope)

    def notices(self) -> AbstractAsyncContextManager[trio.MemoryReceiveChannel[Notice]]:
        """First what is known of the coordinators' notices, then each new one."""
        return self.notice_board.feed.follow(self.notice_board.board.notices())

    async def publish_advert(self, envelope: bytes) -> None:
        """Gossip our advert. Raises EnvelopeError when an honest peer would refuse it."""
        await self.exchange.publish(envelope, before=self.shards.sell)
        if decode(envelope).signer == self.peer_id:
            await self.dht.put_own(envelope)

    async def find_peer(self, peer: str) -> bytes | None:
        """The newest signed record of a peer, from the directory or the DHT."""
        return await self.dht.find(peer)

    def adverts(self) -> AbstractAsyncContextManager[trio.MemoryReceiveChannel[AdvertEvent]]:
        """First every advert the directory holds, then each change."""
        return self.exchange.feed.follow(self.directory.events())

    async def connect(self, addresses: Sequence[str]) -> int:
        """Connect to peers by address; the number that answered."""
        return await self.connections.connect(addresses)

    async def peers(self) -> tuple[PeerInfo, ...]:
        """The peers we are connected to."""
        await trio.lowlevel.checkpoint()
        return tuple(i for i in self.connections.infos() if self.admission.admitted(i.peer))

    async def reachability(self) -> Reachability:
        """Who can reach us and how."""
        await trio.lowlevel.checkpoint()
        return self.presence.reachability(len(await self.peers()))

    async def open_stream(
        self, peer: str, protocol: str, *, addresses: Sequence[str] = ()
    ) -> OverlayStream:
        """A new stream; dials when not connected."""
        try:
            with trio.fail_after(_OPEN_S):
                await self._reach(peer, addresses)
                before = self.connections.held(peer)
                try:
                    return await self._new_stream(peer, protocol)
                except RemoteError:
                    # Both sides may have dialled at once: one connection was closed under us.
                    if self.connections.held(peer) == before:
                        raise
                await self._reach(peer, addresses)
                return await self._new_stream(peer, protocol)
        except trio.TooSlowError:
            raise RemoteError("unreachable", f"The peer {peer} did not answer in time.") from None

    async def _reach(self, peer: str, addresses: Sequence[str]) -> None:
        """Be connected to a peer, asking the DHT for its addresses when ours are no good."""
        try:
            await self.connections.reach(peer, addresses)
        except RemoteError:
            if not self._finds.take(peer, trio.current_time()):
                raise
            found = await self.dht.find(peer)
            if found is None:
                raise
            await self.connections.reach(peer, self.dht.check(found).addresses)

    async def _new_stream(self, peer: str, protocol: str) -> Libp2pStream:
        if protocol != HELLO and not self.admission.admitted(peer):
            raise RemoteError("unreachable", f"The peer {peer} shows no valid certificate.")
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


def _notice_file(path: Path) -> AdvertFile:
    return AdvertFile(path, document_bytes_max=NOTICE_BYTES_MAX, documents_max=NOTICES_KEPT_MAX)
