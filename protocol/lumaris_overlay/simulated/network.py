"""Hosts in memory that gossip, dial and answer by the rules of the real network.

A host sees the adverts of those it is connected to, directly or through others. `connect` merges
directories at once, as the index exchange does; `cut` and `kill` break streams as lost
connections do. The clock is the caller's, so that a simulation decides what time it is.

Certificates are checked when they are presented, but everybody is let in: the simulation is for
what happens among members.
"""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager

import trio

from lumaris_overlay.advert_filter import AdvertFilter, filter_of, passes
from lumaris_overlay.directory import Directory
from lumaris_overlay.feed import AdvertFeed
from lumaris_overlay.latest_feed import LatestFeed
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
from lumaris_overlay.records import PeerRecord
from lumaris_overlay.serving import HandlerTable
from lumaris_overlay.shard_desk import ShardDesk
from lumaris_overlay.simulated.gossip import HostGate, ShardMembers, SharedGate, flood
from lumaris_overlay.simulated.records import SimulatedRecords
from lumaris_overlay.simulated.stream import SimulatedStream, stream_pair
from lumaris_overlay.tasks import background
from lumaris_overlay.validate import DemandGate, MembershipGate
from lumaris_protocol.errors import EnvelopeError, RemoteError
from lumaris_protocol.keys import KeyPair, PeerId
from lumaris_protocol.limits import DIRECTORY_ADVERTS_MAX
from lumaris_protocol.messages.negotiation import Requirements

logger = logging.getLogger(__name__)

_EXPIRY_CHECK_S = 1.0
# Demands are passed on once; they are worth answering for seconds.
_DEMANDS_SEEN_MAX = 1_024


class SimulatedNetwork:
    """The medium between simulated hosts."""

    def __init__(
        self,
        nursery: trio.Nursery,
        network: str,
        coordinator_keys: frozenset[PeerId],
        now: Callable[[], float],
        roots: frozenset[PeerId] = frozenset(),
    ) -> None:
        self.nursery = nursery
        self.network = network
        self.notice_gate = NoticeGate(network, coordinator_keys, roots)
        self.coordinator_keys = self.notice_gate.keys  # they follow the lists that anybody hears
        self.now = now
        self.gate = SharedGate(network, self.coordinator_keys)
        self.members = ShardMembers()
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
        for shard in host.shards:
            self.members.leave(host, shard)
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
    roots: frozenset[PeerId] = frozenset(),
) -> AsyncGenerator[SimulatedNetwork]:
    """A simulated network whose tasks live as long as the context."""
    async with background() as nursery:
        simulated = SimulatedNetwork(nursery, network, coordinator_keys, now, roots)

        async def expire() -> None:
            while True:
                began = time.perf_counter()
                await simulated.tick()
                # In a market of thousands a look takes long; it must not take most of the time.
                await trio.sleep(_EXPIRY_CHECK_S + 20 * (time.perf_counter() - began))

        nursery.start_soon(expire)
        yield simulated


class SimulatedOverlay:
    """One host's view of a simulated network; implements `ports.Overlay`."""

    def __init__(self, network: SimulatedNetwork, key: KeyPair, address: str) -> None:
        self.address = address
        self.neighbours: dict[PeerId, SimulatedOverlay] = {}
        self._network = network
        self._key = key
        self._board = NoticeBoard(network.notice_gate)
        self._notices = LatestFeed[Notice]()
        self._gate = HostGate(network.gate, self._board.revoked)
        self._directory = Directory(self._gate)
        self._desk = ShardDesk(network.network, network.coordinator_keys)
        self.shards = frozenset(self._desk.joined(network.now()))
        self._members = MembershipGate(
            network.network, network.coordinator_keys, self._board.revoked
        )
        self._records = SimulatedRecords(key, network.network, network.coordinator_keys)
        self._demand_gate = DemandGate(
            network.network, network.coordinator_keys, self._board.revoked
        )
        self._demands = LatestFeed[DemandEvent]()
        self._demands_seen: dict[bytes, None] = {}
        self._feed = AdvertFeed(network.nursery)
        self._handlers = HandlerTable()
        self._streams: dict[PeerId, set[SimulatedStream]] = {}

    @property
    def peer_id(self) -> PeerId:
        """Our own peer id."""
        return self._key.peer_id

    async def present(self, certificate: bytes) -> None:
        """Check our certificate and let others find us. Raises EnvelopeError when not valid."""
        await trio.lowlevel.checkpoint()
        now = self._network.now()
        self._members.check(certificate, self.peer_id, now)
        record = self._records.sign(certificate, self.address, now)
        for host in self._in_reach():
            host.keep_record(record)

    async def publish_advert(self, envelope: bytes) -> None:
        """Take our advert in and pass it on. Raises EnvelopeError when it is not valid."""
        await trio.lowlevel.checkpoint()
        now = self._network.now()
        event = self._directory.offer(envelope, now)
        if not self._directory.holds(envelope):
            return
        self._desk.sell(self._gate.check(envelope, now).message)
        self.change_shards()
        if event is not None:
            self._feed.tell(event)
        flood(self, lambda host: host.take_advert(envelope))

    def receive_adverts(self, envelopes: Sequence[bytes]) -> None:
        """What another host knows: taken in, and passed on as far as it is news."""
        news = self.take_adverts(envelopes)
        if news:
            flood(self, lambda host: bool(host.take_adverts(news)))

    def take_adverts(self, envelopes: Sequence[bytes]) -> list[bytes]:
        """Take documents in; those that were news."""
        return [envelope for envelope in envelopes if self.take_advert(envelope)]

    def take_advert(self, envelope: bytes, *, of: AdvertFilter | None = None) -> bool:
        """Take in what belongs to our shards, or to the answer of a query; whether it was news."""
        if self._directory.holds(envelope):
            return False
        now = self._network.now()
        try:
            facts = self._gate.facts(envelope, now)
            wanted = (
                self._desk.belongs(facts, self.shards, now) if of is None else passes(of, facts)
            )
            event = self._directory.offer(envelope, now) if wanted else None
        except EnvelopeError as error:
            logger.debug("dropped an advert: %s", error)
            return False
        if event is not None:
            self._feed.tell(event)
        return self._directory.holds(envelope)

    async def present_shards(self, envelope: bytes) -> None:
        """Divide the market by this map. Raises EnvelopeError `map_stale` or what is wrong."""
        await trio.lowlevel.checkpoint()
        self._desk.adopt(envelope, self._network.now())
        self.change_shards()

    async def seek(self, needs: Requirements) -> None:
        """Follow the shards of what may fit, and ask index peers where those are too many."""
        await trio.lowlevel.checkpoint()
        now = self._network.now()
        sought = self._desk.seek(needs, now)
        self.change_shards()
        for shard in sought.asked:
            for host in self._network.members.some(shard):
                for envelope in host.documents_in(shard):
                    self.take_advert(envelope, of=filter_of(needs))

    def documents_in(self, shard: int) -> list[bytes]:
        """The documents of one shard that we hold."""
        now, facts = self._network.now(), self._network.gate.facts
        return [
            envelope
            for envelope in self._directory.snapshot()
            if self._desk.belongs(facts(envelope, now), (shard,), now)
        ]

    def change_shards(self) -> None:
        """Enter the shards we ought to be in and leave the others."""
        now = self._network.now()
        before, self.shards = self.shards, frozenset(self._desk.joined(now))
        if not self._desk.divided(now) or before == self.shards:
            return
        for shard in before - self.shards:
            self._network.members.leave(self, shard)
        for shard in self.shards - before:
            for host in self._network.members.enter(self, shard):
                self._join(host, again=True)

    async def publish_demand(self, envelope: bytes) -> None:
        """Pass our demand on. Raises EnvelopeError when it is not valid."""
        await trio.lowlevel.checkpoint()
        self._demand_gate.check(envelope, self._network.now())
        self._note_demand(envelope)
        flood(self, lambda host: host.take_demand(envelope))

    def take_demand(self, envelope: bytes) -> bool:
        """What a neighbour gossips to us; whether it was news. Invalid ones go no further."""
        if not self._note_demand(envelope):
            return False
        try:
            signed = self._demand_gate.check(envelope, self._network.now())
        except EnvelopeError as error:
            logger.debug("dropped a demand: %s", error)
            return False
        if not self._demand_gate.admit(signed.signer, self._network.now()):
            return False
        self._demands.tell(DemandEvent(signed.signer, envelope))
        return True

    def _note_demand(self, envelope: bytes) -> bool:
        name = hashlib.sha256(envelope).digest()
        if name in self._demands_seen:
            return False
        while len(self._demands_seen) >= _DEMANDS_SEEN_MAX:
            del self._demands_seen[next(iter(self._demands_seen))]
        self._demands_seen[name] = None
        return True

    def demands(self) -> AbstractAsyncContextManager[trio.MemoryReceiveChannel[DemandEvent]]:
        """Each demand of other peers from now on."""
        return self._demands.follow()

    async def publish_notice(self, envelope: bytes) -> None:
        """Heed a coordinator's notice and pass it on. Raises EnvelopeError when it is not valid."""
        await trio.lowlevel.checkpoint()
        notice = self._board.offer(envelope, self._network.now())
        if notice is not None:
            self._heed(notice)
            flood(self, lambda host: host.take_notice(envelope))

    def take_notice(self, envelope: bytes) -> bool:
        """What a neighbour gossips to us; whether it was news. Invalid ones go no further."""
        try:
            notice = self._board.offer(envelope, self._network.now())
        except EnvelopeError as error:
            logger.debug("dropped a notice: %s", error)
            return False
        if notice is not None:
            self._heed(notice)
        return notice is not None

    def receive_notices(self, envelopes: Sequence[bytes]) -> None:
        """What another host knows: taken in, and passed on as far as it is news."""
        for envelope in envelopes:
            if self.take_notice(envelope):
                flood(self, lambda host, news=envelope: host.take_notice(news))  # type: ignore[misc]

    def _heed(self, notice: Notice) -> None:
        self._notices.tell(notice)
        named = revoked_in(notice)
        for event in self._directory.revoke(named, self._network.now()):
            self._feed.tell(event)
        for host in [host for host in self.neighbours.values() if host.peer_id in named]:
            if self.refuses(host.peer_id):
                self._network.cut(self, host)

    def refuses(self, peer: PeerId) -> bool:
        """Whether we talk to this peer no more."""
        return self._board.revoked.names(peer)

    def notices(self) -> AbstractAsyncContextManager[trio.MemoryReceiveChannel[Notice]]:
        """First what is known of the coordinators' notices, then each new one."""
        return self._notices.follow(self._board.notices())

    def notice_documents(self) -> tuple[bytes, ...]:
        """The notices that a newcomer is told."""
        return self._board.documents()

    def documents(self) -> list[bytes]:
        """All that a newcomer is told, withdrawals too."""
        return self._directory.page("", DIRECTORY_ADVERTS_MAX)[0]

    def expire(self) -> None:
        """Drop what has expired, and leave the shards that nobody needs any more."""
        self.change_shards()
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
        host = self._reach(peer, addresses)
        near, far = stream_pair(self.peer_id, host.peer_id, protocol)
        host.answer(far)
        self._streams.setdefault(host.peer_id, set()).add(near)
        return near

    async def ping(self, peer: str, *, addresses: Sequence[str] = ()) -> Ping:
        """Ask a live host for its time: all share the network's clock, and nothing takes long."""
        await trio.lowlevel.checkpoint()
        self._reach(peer, addresses)
        return Ping(round_trip_s=0.0, clock_offset_s=0.0, relayed=False)

    async def find_peer(self, peer: str) -> bytes | None:
        """The newest record of a peer that any host in reach holds."""
        await trio.lowlevel.checkpoint()
        record = self._find_record(peer)
        return None if record is None else record.data

    def _find_record(self, peer: str) -> PeerRecord | None:
        held = {data for host in self._in_reach() for data in host.documents_of(peer)}
        return self._records.newest(held, self._network.now())

    def documents_of(self, peer: str) -> list[bytes]:
        """What we hold of a peer: its newest advert and its newest record."""
        found = (self._directory.envelope(peer), self._records.held(peer))
        return [data for data in found if data is not None]

    def records(self) -> list[PeerRecord]:
        """All records we hold for others."""
        return self._records.all()

    def keep_record(self, record: PeerRecord) -> None:
        """Hold a peer's record for others, as those near it in the DHT do."""
        self._records.keep(record)

    def _in_reach(self) -> list[SimulatedOverlay]:
        """The hosts we can get to over connections, ourselves too."""
        found = {self.peer_id: self}
        waiting = [self]
        while waiting:
            for host in waiting.pop().neighbours.values():
                if host.peer_id not in found:
                    found[host.peer_id] = host
                    waiting.append(host)
        return list(found.values())

    def _reach(self, peer: str, addresses: Sequence[str]) -> SimulatedOverlay:
        host = self._network.find(peer)
        killed = self._network.find(self.peer_id) is not self
        if (
            host is None
            or killed
            or not (
                host.peer_id in self.neighbours
                or host.address in (*addresses, *self._directory.addresses(peer))
                or self._is_found(host)
            )
        ):
            raise RemoteError("unreachable", f"The peer {peer} cannot be reached.")
        if not self._join(host):
            raise RemoteError("unreachable", f"The peer {peer} was revoked, or refuses us.")
        return host

    def _is_found(self, host: SimulatedOverlay) -> bool:
        record = self._find_record(host.peer_id)
        return record is not None and host.address in record.addresses

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
                answered += self._join(host)
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

    def _join(self, host: SimulatedOverlay, *, again: bool = False) -> bool:
        """Be connected to a host and tell each other what is known; whether neither refuses."""
        if self.refuses(host.peer_id) or host.refuses(self.peer_id):
            return False
        if host is self or (host.peer_id in self.neighbours and not again):
            return True
        self.neighbours[host.peer_id] = host
        host.neighbours[self.peer_id] = self
        for one, other in ((self, host), (host, self)):
            other.receive_notices(one.notice_documents())
        if host.peer_id not in self.neighbours:
            return False  # one of us has just heard that the other is revoked
        for one, other in ((self, host), (host, self)):
            other.receive_adverts(one.documents())
            for record in one.records():
                other.keep_record(record)
        return True
