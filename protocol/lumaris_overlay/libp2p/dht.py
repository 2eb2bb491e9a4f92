"""Kademlia on one host: peer id to newest signed record, and the index peers of a shard.

The wire is libp2p's, under a protocol id of this network; the node is our own. libp2p's `KadDHT`
answers look-ups from a cache that nobody refreshes, asks every peer it hears of, believes any
address it is told, keeps strangers' provider records, never times an inbound stream out, and takes
its protocol id from a constant. Here a look-up always asks the network, on three walks that share
no peer, and the newest validly signed record wins; what answers hold is checked, never cached.
"""

from __future__ import annotations

import logging
import random
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from typing import Any

import trio
from libp2p.custom_types import TProtocol
from libp2p.peer.id import ID

from lumaris_overlay.libp2p import dht_lookup, dht_wire
from lumaris_overlay.libp2p.addresses import DialPace, dialable
from lumaris_overlay.libp2p.connections import Connections
from lumaris_overlay.libp2p.dht_lookup import Lookup
from lumaris_overlay.libp2p.dht_store import RecordStore
from lumaris_overlay.libp2p.dht_table import RoutingTable
from lumaris_overlay.libp2p.dht_wire import Answer, MessageReader, Named, Question
from lumaris_overlay.libp2p.overrides import strangers
from lumaris_overlay.libp2p.streams import Libp2pStream
from lumaris_overlay.records import PeerRecord, RecordGate, newest
from lumaris_overlay.tasks import shielded
from lumaris_overlay.validate import TokenBuckets
from lumaris_protocol.errors import EnvelopeError, LumarisError, RemoteError
from lumaris_protocol.keys import PeerId, public_key_of
from lumaris_protocol.limits import DHT_INDEX_PEERS_MAX, OVERLAY_CONNECTIONS_MAX

logger = logging.getLogger(__name__)

_LOOKUP_S = 8.0
_ASK_S = 2.5
_STARTS = 4 * dht_lookup.PATHS
# Look-ups at once: each has up to six questions in flight, at 4 ms of CPU a question.
_LOOKUPS_MAX = 8
_LOOKUPS_WAITING_MAX = 64
# A connection made only to ask is kept for the next look-up: at most this many, and not for long,
# since its health checks soon cost more than dialling again. A host with few peers keeps them.
_BORROWED_MAX = 16
_BORROWED_S = 60.0
_PEERS_KEPT = 16
_IN_PASSING = ("/meshsub/", "/ipfs/ping/", "/ipfs/id/", "/lumaris/hello/")

# Inbound: a question costs about 3 ms, so this is 6 % of a core for one peer that never stops.
_ASKS_PER_S_PER_PEER, _ASKS_BURST_PER_PEER = 20, 100
# A put costs two signatures; an honest peer puts its own record a few times an hour.
_PUTS_PER_S_PER_PEER, _PUTS_BURST_PER_PEER = 1, 20
_STREAMS_MAX, _STREAMS_MAX_PER_PEER = 64, 4
_SERVE_S = 10.0
_QUESTIONS_PER_STREAM = 16

# Our own record is put on change, when the table has doubled, and about this often.
_PUT_AGAIN_S = 1_800.0
_PUTS_PER_S, _PUTS_BURST = 1 / 120, 3
_COPIES_MIN = 4
_REFRESH_S = 900.0
# Below this everybody knows everybody.
_REFRESH_PEERS_MIN = 3
# Puts and the first refresh wait about this long, so that ten newcomers cause one put, not ten.
_SETTLE_S = 3.0
_TIDY_S = 10.0
_RETRY_S = 1.0

# Signs our endpoint, later than this time; None while we have no certificate.
MakeEndpoint = Callable[[int], bytes | None]
NewStream = Callable[[str, str], Awaitable[Libp2pStream]]


class DhtRecords:
    """Puts our record, finds others', and answers for what is kept here.

    `admitted` says who is a member; nobody else is asked, answered or named. `known` is the
    directory's document of a peer.
    """

    def __init__(
        self,
        host: Any,
        gate: RecordGate,
        connections: Connections,
        nursery: trio.Nursery,
        *,
        new_stream: NewStream,
        admitted: Callable[[str], bool],
        known: Callable[[str], bytes | None],
        make_endpoint: MakeEndpoint,
        paths: int = dht_lookup.PATHS,
        rng: random.Random | None = None,
    ) -> None:
        self.me = PeerId(str(host.get_id()))
        self.protocol = dht_wire.protocol_of(gate.network)
        self.table = RoutingTable(self.me)
        self.store = RecordStore(self.me, gate)
        # What happened, by name: asked, bad_answers, differs, refused, look_ups.
        self.counts: Counter[str] = Counter()
        self._host, self._gate, self._connections, self._nursery = host, gate, connections, nursery
        self._new_stream = new_stream
        self._admitted, self._known, self._make_endpoint = admitted, known, make_endpoint
        self._paths = paths
        self._rng = rng or random.SystemRandom()
        self._own: PeerRecord | None = None
        self._wake, self._grown = trio.Event(), trio.Event()
        self._changed = False
        self._size_at_put = 0
        self._lookups = trio.CapacityLimiter(_LOOKUPS_MAX)
        self._putting = trio.Lock()
        self._borrowed: dict[str, float] = {}
        self._pace = DialPace()
        self._serving: Counter[str] = Counter()
        self._asks = TokenBuckets(
            per_s=_ASKS_PER_S_PER_PEER,
            burst=_ASKS_BURST_PER_PEER,
            names_max=OVERLAY_CONNECTIONS_MAX,
        )
        self._puts = TokenBuckets(
            per_s=_PUTS_PER_S_PER_PEER,
            burst=_PUTS_BURST_PER_PEER,
            names_max=OVERLAY_CONNECTIONS_MAX,
        )

    async def run(self, task_status: Any = trio.TASK_STATUS_IGNORED) -> None:
        """Answer, put and refresh until cancelled."""
        self._host.set_stream_handler(TProtocol(self.protocol), self._serve)
        task_status.started()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._keep_put)
            nursery.start_soon(self._keep_fresh)
            while True:
                await trio.sleep(_TIDY_S)
                self.store.expire(time.time())
                await self._give_back()

    def seen(self, peer: str) -> None:
        """A peer is connected, or has just been admitted."""
        if not self._admitted(peer):
            return
        addresses = self._connections.addresses_of(ID.from_base58(peer))
        self.table.seen(peer, addresses, trio.current_time())
        self._wake.set()
        if len(self.table) >= _REFRESH_PEERS_MIN:
            self._grown.set()

    async def put_own(self, envelope: bytes) -> None:
        """Make this our record, if it is newer, and put it soon. Raises EnvelopeError."""
        record = self.store.check_peer(self.me, envelope, time.time())
        self._own = newest(self._own, record)
        self._changed = True
        self._wake.set()
        await trio.lowlevel.checkpoint()

    def put_again(self) -> None:
        """What our records say of us has changed: put them soon."""
        self._changed = True
        self._wake.set()

    async def publish(self) -> int:
        """Put our records now; the number of peers that keep our newest one."""
        async with self._putting:  # a put overtaken by a newer one would be refused
            return await self._publish()

    async def _publish(self) -> int:
        now = time.time()
        own = self._own if self._own is not None and self._own.alive(now) else None
        endpoint = self._endpoint(own, now)
        if own is None or own.withdrawn:
            own = newest(own, endpoint)
        if own is None:
            await trio.lowlevel.checkpoint()
            return 0
        kept = await self._put(dht_wire.peer_key(self.me), own.data)
        if endpoint is not None and "index" in endpoint.services:
            for shard in endpoint.shards:
                await self._put(dht_wire.index_key(shard), dht_wire.pack([endpoint.data]))
        return kept

    async def find(self, peer: str) -> bytes | None:
        """The newest record of a peer that the network or our directory holds.

        Takes at most `_LOOKUP_S`. A record told by several is believed for its signature alone.
        """
        try:
            public_key_of(peer)
        except ValueError:
            return None
        listed = self._listed(peer)
        best = newest(listed, self.store.peer(peer, time.time()))
        busy = self._lookups.statistics().tasks_waiting >= _LOOKUPS_WAITING_MAX
        if peer != self.me and not busy:
            found: PeerRecord | None = None

            def take(value: bytes) -> None:
                nonlocal found
                found = newest(found, self.store.check_peer(peer, value, time.time()))

            async with self._lookups:
                await self._look_up(dht_wire.peer_key(peer), take)
            if listed is not None and found is not None and listed.data != found.data:
                self.counts["differs"] += 1
                strangers.note(peer, "dht_differs", "the directory and the DHT hold two records")
            best = newest(best, found)
        await trio.lowlevel.checkpoint()
        return None if best is None else best.data

    def check(self, envelope: bytes) -> PeerRecord:
        """What a record says, with those of its addresses that we dial. Raises EnvelopeError."""
        record = self._gate.check(envelope, time.time())
        return replace(record, addresses=self._dialable(record.addresses))

    async def find_index_peers(self, shard: int) -> tuple[bytes, ...]:
        """The endpoints of index peers of a shard: the newest of each, nearest first."""
        key = dht_wire.index_key(shard)
        found: dict[str, PeerRecord] = {}

        def take(value: bytes) -> None:
            for record in self.store.check_index(
                shard, value, time.time(), count_max=DHT_INDEX_PEERS_MAX
            ):
                best = newest(found.get(record.peer), record)
                assert best is not None
                found[record.peer] = best

        own = self.store.get(key, time.time())
        if own is not None:
            take(own)
        async with self._lookups:
            await self._look_up(key, take)
        place = dht_wire.place_of_key(key)
        chosen = sorted(found, key=lambda peer: dht_wire.place_of(peer) ^ place)
        return tuple(found[peer].data for peer in chosen[:DHT_INDEX_PEERS_MAX])

    # --- our own record ---

    def _endpoint(self, own: PeerRecord | None, now: float) -> PeerRecord | None:
        after = own.issued_at if own is not None and own.withdrawn else 0
        data = self._make_endpoint(after)
        return None if data is None else self.store.check_peer(self.me, data, now)

    async def _put(self, key: bytes, value: bytes) -> int:
        try:
            self.store.put(key, value, time.time())
        except EnvelopeError as error:
            logger.warning("dht own record error=%r", error)
            return 0
        async with self._lookups:
            lookup = await self._look_up(key, lambda held: None)
        question = Question(dht_wire.PUT, key, value)
        kept = 0

        async def one(named: Named) -> None:
            nonlocal kept
            answer = await self._ask(named, question)
            kept += answer is not None

        with trio.move_on_after(_LOOKUP_S):
            async with trio.open_nursery() as nursery:
                for named in lookup.nearest(dht_lookup.ENOUGH):
                    nursery.start_soon(one, named)
        return kept

    async def _keep_put(self) -> None:
        bucket = TokenBuckets(per_s=_PUTS_PER_S, burst=_PUTS_BURST, names_max=1)
        while True:
            with trio.move_on_after(_PUT_AGAIN_S * self._rng.uniform(0.8, 1.2)):
                while not self._put_due():
                    self._wake = trio.Event()
                    await self._wake.wait()
            await trio.sleep(_SETTLE_S * self._rng.uniform(0.2, 1.0))
            while not bucket.take("", trio.current_time()):  # noqa: ASYNC110 - time brings it
                await trio.sleep(_RETRY_S)
            self._changed = False
            self._size_at_put = len(self.table)
            try:
                # A table that grew because the put met these peers is no reason to put again.
                kept = await self.publish()
                self._size_at_put = max(self._size_at_put, kept)
                # So few copies are soon lost: put again when the next put may be.
                self._changed |= kept < min(_COPIES_MIN, len(self.table))
            except (EnvelopeError, ValueError) as error:
                logger.warning("dht own record error=%r", error)

    def _put_due(self) -> bool:
        """Whether our record changed, or the table has doubled: newcomers are nearer to it now."""
        return len(self.table) > 0 and (self._changed or len(self.table) >= 2 * self._size_at_put)

    async def _keep_fresh(self) -> None:
        """Look for ourselves, so that those near us know us, and then for places of no meaning."""
        await self._grown.wait()
        await trio.sleep(_SETTLE_S * self._rng.uniform(0.2, 1.0))
        key = ID.from_base58(self.me).to_bytes()
        while True:
            async with self._lookups:
                await self._walk_to(key)
            await trio.sleep(_REFRESH_S * self._rng.uniform(0.8, 1.2))
            key = self._rng.randbytes(32)

    async def _walk_to(self, key: bytes) -> None:
        question = Question(dht_wire.FIND_NODE, key)

        async def ask(named: Named) -> Sequence[Named] | None:
            answer = await self._ask(named, question)
            return None if answer is None else answer.closer

        await self._run(dht_wire.place_of_key(key), ask, paths=1)

    # --- asking ---

    async def _look_up(self, key: bytes, take: Callable[[bytes], None]) -> Lookup:
        """Ask for a key on all walks; `take` raises EnvelopeError for a value that is a lie."""
        question = Question(dht_wire.GET, key)
        self.counts["look_ups"] += 1
        told: set[bytes] = set()

        async def ask(named: Named) -> Sequence[Named] | None:
            answer = await self._ask(named, question)
            if answer is None:
                return None
            if answer.value is not None and answer.value not in told:
                try:
                    take(answer.value)
                except EnvelopeError as error:
                    # It may have expired on the way; all else no honest peer would keep.
                    if error.code != "expired":
                        self._distrust(named.peer, error)
                        return None
                else:
                    told.add(answer.value)
            return answer.closer

        return await self._run(dht_wire.place_of_key(key), ask, paths=self._paths)

    async def _run(self, place: int, ask: dht_lookup.Ask, *, paths: int) -> Lookup:
        starts = self.table.starts(place, _STARTS, self._rng)
        lookup = Lookup(place, self.me, starts, ask, rng=self._rng, paths=paths)
        with trio.move_on_after(_LOOKUP_S):
            await lookup.run()
        return lookup

    async def _ask(self, named: Named, question: Question) -> Answer | None:
        """One question to one peer; None when it did not answer, and then it leaves the table."""
        self.counts["asked"] += 1
        answer = None
        with trio.move_on_after(_ASK_S):
            try:
                answer = await self._exchange(named, question)
            except EnvelopeError as error:
                self._distrust(named.peer, error)
            except (RemoteError, trio.BrokenResourceError, trio.ClosedResourceError) as error:
                logger.debug("dht peer=%s error=%r", named.peer, error)
        if answer is not None:
            addresses = self._connections.addresses_of(ID.from_base58(named.peer))
            self.table.seen(named.peer, addresses or named.addresses, trio.current_time())
        elif question.kind != dht_wire.PUT:  # a put is refused by whoever holds something newer
            self.table.drop(named.peer)
        return answer

    async def _exchange(self, named: Named, question: Question) -> Answer:
        if not self._connected(named.peer):
            await self._dial(named)
            self._borrowed[named.peer] = trio.current_time()
            await self._give_back()
        if not self._admitted(named.peer):
            raise RemoteError("unreachable", f"{named.peer} is no member.")
        stream = await self._new_stream(named.peer, self.protocol)
        done = False
        try:
            await stream.send_all(dht_wire.encode_question(question))
            data = await MessageReader(stream, dht_wire.ANSWER_BYTES_MAX).next()
            if data is None:
                raise EnvelopeError("truncated", "The peer ended the stream without an answer.")
            answer = dht_wire.decode_answer(data, question)
            done = True
        finally:
            with shielded(1.0):
                await (stream.aclose() if done else stream.reset())
        return answer

    async def _dial(self, named: Named) -> None:
        """Be connected to a peer: where we know it to be, else where others say it is."""
        known = self.table.addresses_of(named.peer)
        told = self._dialable([each for each in named.addresses if each not in known])
        try:
            await self._connections.reach(named.peer, known)
            return
        except RemoteError:
            told = self._pace.admit(told, trio.current_time())
            if not told:
                raise
        await self._connections.reach(named.peer, told)
        self._pace.answered(told)

    def _dialable(self, named: Sequence[str]) -> tuple[str, ...]:
        relays = {str(peer) for peer in self._connections.live()}
        return dialable(named, own=map(str, self._host.get_addrs()), relays=relays)

    async def _give_back(self) -> None:
        """Close borrowed connections that are old or too many, and that nobody uses."""
        before = trio.current_time() - _BORROWED_S
        for peer, since in list(self._borrowed.items()):
            if since > before and len(self._borrowed) <= _BORROWED_MAX:
                return
            if self._borrowed.pop(peer, None) is None:
                continue  # another task gave it back meanwhile
            if not self._in_use(peer) and len(self._connections.live()) > _PEERS_KEPT:
                await self._connections.drop(ID.from_base58(peer))

    def _in_use(self, peer: str) -> bool:
        held = self._host.get_network().connections.get(ID.from_base58(peer), ())
        protocols = {str(s.get_protocol()) for each in held for s in each.get_streams()}
        return any(not p.startswith(_IN_PASSING) for p in protocols)

    def _connected(self, peer: str) -> bool:
        return any(str(live) == peer for live in self._connections.live())

    def _distrust(self, peer: str, error: LumarisError) -> None:
        self.counts["bad_answers"] += 1
        strangers.note(peer, "dht", error)

    def _listed(self, peer: str) -> PeerRecord | None:
        """What the directory holds of a peer."""
        data = self._known(peer)
        if data is None:
            return None
        try:
            return self._gate.check(data, time.time())
        except EnvelopeError:
            return None  # expired a moment ago

    # --- answering ---

    async def _serve(self, net_stream: Any) -> None:
        stream = Libp2pStream(net_stream, self.protocol, self._nursery)
        peer = stream.peer
        if (
            not self._admitted(peer)
            or self._serving.total() >= _STREAMS_MAX
            or self._serving[peer] >= _STREAMS_MAX_PER_PEER
        ):
            self.counts["refused"] += 1
            await stream.reset()
            return
        self._serving[peer] += 1
        done = False
        try:
            with trio.move_on_after(_SERVE_S):
                self.seen(peer)
                done = await self._converse(stream)
        except EnvelopeError as error:
            self.counts["refused"] += 1
            strangers.note(peer, "dht", error)
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            pass  # the peer went away
        finally:
            self._serving[peer] -= 1
            if not self._serving[peer]:
                del self._serving[peer]
            with shielded(1.0):
                await (stream.aclose() if done else stream.reset())

    async def _converse(self, stream: Libp2pStream) -> bool:
        """Answer the questions on a stream; whether it ended in order."""
        reader = MessageReader(stream, dht_wire.REQUEST_BYTES_MAX)
        for _ in range(_QUESTIONS_PER_STREAM):
            data = await reader.next()
            if data is None:
                return True
            if not self._asks.take(stream.peer, trio.current_time()):
                raise EnvelopeError("malformed", "asks too often")
            answer = self._answer(stream.peer, dht_wire.decode_question(data))
            if answer is None:
                return False
            await stream.send_all(answer)
        return False

    def _answer(self, peer: str, question: Question) -> bytes | None:
        now = time.time()
        if question.kind == dht_wire.PUT:
            if not self._puts.take(peer, trio.current_time()):
                raise EnvelopeError("malformed", "puts too often")
            if not self.store.put(question.key, question.value, now):
                return None
            return dht_wire.encode_answer(question, question.value, ())
        if question.kind == dht_wire.PING:
            return dht_wire.encode_answer(question, None, ())
        value = self.store.get(question.key, now) if question.kind == dht_wire.GET else None
        place = dht_wire.place_of_key(question.key)
        nearest = self.table.closest(place, dht_wire.CLOSER_MAX + 1)
        closer = [self._current(named) for named in nearest if named.peer != peer]
        return dht_wire.encode_answer(
            question, value, [n for n in closer if n.addresses][: dht_wire.CLOSER_MAX]
        )

    def _current(self, named: Named) -> Named:
        addresses = self._connections.addresses_of(ID.from_base58(named.peer))
        return Named(named.peer, addresses or named.addresses)
