"""How documents come and go on one host: gossip, the index exchange, and what they fill."""

from __future__ import annotations

import logging
import time
from collections.abc import Awaitable, Callable, Mapping
from functools import partial
from typing import Any

import trio
from libp2p.custom_types import TProtocol
from msgspec import structs

from lumaris_overlay.advert_file import AdvertFile
from lumaris_overlay.advert_filter import AdvertFacts, AdvertFilter, facts_of, passes
from lumaris_overlay.directory import Directory
from lumaris_overlay.feed import AdvertFeed
from lumaris_overlay.latest_feed import LatestFeed
from lumaris_overlay.libp2p import index
from lumaris_overlay.libp2p.admission import Admission
from lumaris_overlay.libp2p.conduct import Conduct
from lumaris_overlay.libp2p.connections import Connections
from lumaris_overlay.libp2p.gossip import ADVERTS, DEMANDS, Gossip, Judge
from lumaris_overlay.libp2p.guarded_pubsub import Judgement, Manners
from lumaris_overlay.libp2p.overrides import strangers
from lumaris_overlay.libp2p.streams import Libp2pStream
from lumaris_overlay.ports import AdvertEvent, DemandEvent
from lumaris_overlay.shard_desk import ShardDesk
from lumaris_overlay.validate import DemandGate, TokenBuckets
from lumaris_protocol import codec, limits
from lumaris_protocol.envelope import decode
from lumaris_protocol.errors import EnvelopeError, RemoteError
from lumaris_protocol.keys import PeerId
from lumaris_protocol.messages.advert import Advert

logger = logging.getLogger(__name__)

_EXPIRY_CHECK_S = 1.0
_SAVE_CHECK_S = 60.0
# Checking an advert costs two signatures; other tasks run between batches.
_LOAD_BATCH = 8
_PULL_AGAIN_S = 60.0
# An honest peer can pass these on: its clock or its news differ, or the fault is ours.
_NOT_HOSTILE = frozenset({"directory_full", "expired", "not_yet_valid", "revoked"})

NewStream = Callable[[str, str], Awaitable[Libp2pStream]]

_ANY = AdvertFilter()
_NOTHING = index.Query()


class AdvertExchange:
    """Publishes, accepts, asks for and serves adverts; publishes and accepts demands."""

    def __init__(
        self,
        host: Any,
        network: str,
        directory: Directory,
        connections: Connections,
        nursery: trio.Nursery,
        *,
        new_stream: NewStream,
        admission: Admission,
        conduct: Conduct,
        demand_gate: DemandGate,
        desk: ShardDesk,
        saved: AdvertFile | None = None,
        judges: Mapping[str, Judge] | None = None,
    ) -> None:
        self.directory = directory
        self._saved = saved
        self._written: list[bytes] = []
        self._desk = desk
        self.feed = AdvertFeed(nursery)
        self.demands = LatestFeed[DemandEvent]()
        self._admission, self._conduct, self._demand_gate = admission, conduct, demand_gate
        self._host, self._connections, self._nursery = host, connections, nursery
        self._new_stream = new_stream
        self.gossip = Gossip(
            host,
            network,
            {ADVERTS: self._judge_advert, DEMANDS: self._judge_demand, **(judges or {})},
            manners=Manners(admission.admitted, conduct.fault),
        )
        self._own: dict[PeerId, bytes] = {}
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
        if self._saved is not None:
            self._nursery.start_soon(self._keep_saved, self._saved)

    async def stop(self) -> None:
        """Keep what is known for the next start."""
        if self._saved is not None:
            await self._save(self._saved, now=True)

    async def _keep_saved(self, saved: AdvertFile) -> None:
        """Match with what was known at the last stop until the network has said what is new."""
        documents = await trio.to_thread.run_sync(saved.load)
        for number, data in enumerate(documents):
            try:
                event = self.directory.offer(data, time.time())
            except EnvelopeError as error:  # expired meanwhile, most likely
                logger.debug("saved advert code=%s", error.code)
                continue
            if event is not None:
                self.feed.tell(event)
            if number % _LOAD_BATCH == 0:
                await trio.lowlevel.checkpoint()
        while True:
            await trio.sleep(_SAVE_CHECK_S)
            await self._save(saved)

    async def _save(self, saved: AdvertFile, *, now: bool = False) -> None:
        documents = self.directory.snapshot()
        if documents == self._written:
            return
        try:
            await trio.to_thread.run_sync(partial(saved.save, documents, now=now))
            self._written = documents
        except OSError as error:  # a convenience: a full disk must not stop the overlay
            logger.warning("adverts not saved error=%r", error)

    async def publish(
        self, envelope: bytes, *, before: Callable[[Advert], Awaitable[None]] | None = None
    ) -> None:
        """Gossip our advert, once `before` has been done with it.

        Raises EnvelopeError when an honest peer would refuse it.
        """
        event = self.directory.offer(envelope, time.time())
        if event is not None:
            self.feed.tell(event)
        if not self.directory.holds(envelope):
            await trio.lowlevel.checkpoint()
            return
        if before is not None:
            await before(_advert_of(envelope))
        seller = PeerId(decode(envelope).signer)
        self._own.pop(seller, None)
        self._own[seller] = envelope
        while len(self._own) > index.PUSHED_MAX:
            del self._own[next(iter(self._own))]
        # A connection younger than a heartbeat is not in the mesh yet: tell those peers directly.
        for peer in self._connections.live()[: limits.INDEX_PEERS_MAX * 4]:
            if self._admission.admitted(str(peer)) and not self._reaches(peer):
                self._nursery.start_soon(self._exchange, peer, _NOTHING)
        await self._spread(envelope)

    async def publish_again(self) -> None:
        """Say what is ours once more: the shards have changed."""
        for envelope in tuple(self._own.values()):
            await self._spread(envelope)

    def _reaches(self, peer: Any) -> bool:
        """Whether gossip of any of our shards gets to this peer."""
        return any(
            self.gossip.reaches(peer, ADVERTS, shard) for shard in self._desk.joined(time.time())
        )

    async def _spread(self, envelope: bytes) -> None:
        for shard in self._desk.published_in(_advert_of(envelope), time.time()):
            await self.gossip.publish(ADVERTS, envelope, shard)

    async def publish_demand(self, envelope: bytes) -> None:
        """Gossip our demand. Raises EnvelopeError when an honest peer would refuse it."""
        now = time.time()
        demand = self._demand_gate.check(envelope, now).message
        for shard in self._desk.demanded_in(demand.requirements, now):
            await self.gossip.publish(DEMANDS, envelope, shard)

    def _judge_advert(self, shard: int, forwarder: str, data: bytes) -> Judgement:
        try:
            # Whose map differs passes on honestly what is wrong here: refused, not held against it.
            if not self._belongs(shard, data):
                return Judgement.IGNORE
            event = self._offer(data)
        except EnvelopeError as error:
            return _judgement_of(error)
        if not self.directory.holds(data):
            return Judgement.IGNORE  # an older one came late
        if event is not None and not self._rates.take(event.seller, trio.current_time()):
            return Judgement.IGNORE
        return Judgement.PASS

    def _belongs(self, shard: int, data: bytes) -> bool:
        now = time.time()
        return not self._desk.divided(now) or shard in self._desk.published_in(
            _advert_of(data), now
        )

    def _judge_demand(self, shard: int, forwarder: str, data: bytes) -> Judgement:
        try:
            signed = self._demand_gate.check(data, time.time())
        except EnvelopeError as error:
            return _judgement_of(error)
        if not self._demand_gate.admit(signed.signer, trio.current_time()):
            return Judgement.IGNORE
        self.demands.tell(DemandEvent(signed.signer, data))
        return Judgement.PASS

    def _take(self, source: str, data: bytes) -> AdvertEvent | None:
        """What a peer said over the index; a bad document is held against it."""
        try:
            return self._offer(data)
        except EnvelopeError as error:
            if error.code in _NOT_HOSTILE:
                strangers.note(source, error.code, error.message)
            else:
                self._conduct.fault(source, error.code, error.message)
            return None

    def _offer(self, data: bytes) -> AdvertEvent | None:
        event = self.directory.offer(data, time.time())
        if event is not None:
            self.feed.tell(event)
            self._renew(event.seller, data)
        return event

    def _renew(self, seller: PeerId, data: bytes) -> None:
        """A member's advert carries its newest certificate, which keeps the member admitted."""
        if self._admission.member(seller) is not None:
            self._admission.admit(seller, _advert_of(data).certificate)

    async def _expire(self) -> None:
        while True:
            await trio.sleep(_EXPIRY_CHECK_S)
            for event in self.directory.expire(time.time()):
                self.feed.tell(event)

    def greet(self, peer: Any, dialled: bool) -> None:
        """A connection is up: exchange what each side knows."""
        now = trio.current_time()
        divided = self._desk.divided(time.time())
        shards = self._desk.joined(time.time()) if divided else ()
        self._pulled_at = [then for then in self._pulled_at if now - then < _PULL_AGAIN_S]
        # Who follows no shard of a divided market wants no directory.
        pull = len(self._pulled_at) < limits.INDEX_PEERS_MAX and (bool(shards) or not divided)
        if pull:
            self._pulled_at.append(now)
        if pull or dialled or self._own:
            query = _everything(shards) if pull else _NOTHING
            self._nursery.start_soon(self._exchange, peer, query)

    async def pull(self, peer: Any, shards: tuple[int, ...], wanted: AdvertFilter) -> None:
        """Ask a peer for the adverts of these shards that pass a filter. Never raises."""
        await self._exchange(peer, _everything(shards, wanted))

    async def _exchange(self, peer: Any, query: index.Query) -> None:
        text = str(peer)

        def take(data: bytes) -> None:
            if self._asked_for(text, query, data):
                self._take(text, data)

        try:
            for _ in range(limits.INDEX_PAGES_MAX):
                stream = await self._new_stream(text, index.PROTOCOL)
                async with stream:
                    answer = await index.exchange(
                        stream,
                        query,
                        tuple(self._own.values()),
                        take,
                    )
                if not answer.next or answer.next <= query.after:
                    break
                query = structs.replace(query, after=answer.next)
            self._connections.remember(peer)
        except EnvelopeError as error:
            self._broken(text, error)
        except trio.TooSlowError as error:
            strangers.note(text, "index", error)
        except (RemoteError, trio.BrokenResourceError, trio.ClosedResourceError) as error:
            logger.debug("index peer=%s error=%r", text, error)

    def _asked_for(self, source: str, query: index.Query, data: bytes) -> bool:
        """Whether a peer's answer is one to the query; another is held against it."""
        if query.shards == () and query.wanted == _ANY:
            return True
        try:
            advert = _advert_of(data)
        except EnvelopeError:
            return True  # its fault is found where it is taken in
        facts = facts_of(advert)
        # A withdrawal comes whatever was asked for: it takes back what may have fitted.
        if not advert.withdrawn and not passes(query.wanted, facts):
            self._conduct.fault(source, "index", "answers something else than was asked")
            return False
        return not query.shards or self._among(query.shards, facts)

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
            await index.serve(stream, self.directory, take, self._among)
            await stream.aclose()
        except EnvelopeError as error:
            self._broken(stream.peer, error)
            await stream.reset()
        except trio.TooSlowError as error:
            strangers.note(stream.peer, "index", error)
            await stream.reset()
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            await stream.reset()
        for data in news[:1]:
            await self._spread(data)

    def _broken(self, peer: str, error: EnvelopeError) -> None:
        """The peer broke the format; one whose process ended midway did nothing wrong."""
        if error.code == "truncated":
            strangers.note(peer, "index", error)
        else:
            self._conduct.fault(peer, "index", error)

    def _among(self, shards: tuple[int, ...], facts: AdvertFacts) -> bool:
        return self._desk.belongs(facts, shards, time.time())


def _everything(shards: tuple[int, ...], wanted: AdvertFilter = _ANY) -> index.Query:
    return index.Query(count=limits.INDEX_PAGE_ADVERTS_MAX, shards=shards, wanted=wanted)


def _advert_of(data: bytes) -> Advert:
    """The advert in an envelope whose signature is not checked here. Raises EnvelopeError."""
    return codec.decode_payload(decode(data).payload, Advert)


def _judgement_of(error: EnvelopeError) -> Judgement:
    return Judgement.IGNORE if error.code in _NOT_HOSTILE else Judgement.REJECT
