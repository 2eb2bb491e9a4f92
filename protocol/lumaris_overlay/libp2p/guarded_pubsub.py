"""libp2p's pubsub, made safe to read strangers' bytes with.

Stock, bytes that do not parse end the process, every message becomes a task of its own, nothing
bounds what one peer may ask for, topics that we never joined fill our tables, and a verdict is kept
by the hash of the data alone, so that the same data under a wrong topic bars the honest message.
Here one task per peer reads, pays a toll for what it is asked to do, and judges message by message.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Any

import trio
from libp2p.io.exceptions import IncompleteReadError, IOException, MessageTooLarge
from libp2p.network.connection.exceptions import RawConnError
from libp2p.network.exceptions import SwarmException
from libp2p.network.stream.exceptions import StreamError
from libp2p.peer.id import ID
from libp2p.pubsub.gossipsub import GossipSub
from libp2p.pubsub.pb import rpc_pb2
from libp2p.pubsub.pubsub import Pubsub
from libp2p.pubsub.utils import maybe_consume_signed_record
from libp2p.pubsub.validators import signature_validator
from libp2p.utils.varint import read_varint_prefixed_bytes_limited

from lumaris_overlay.validate import TokenBuckets
from lumaris_protocol.limits import (
    GOSSIP_COST_BURST_PER_PEER,
    GOSSIP_COST_PER_S_PER_PEER,
    OVERLAY_CONNECTIONS_MAX,
)

logger = logging.getLogger(__name__)

# Opening a stream to a connection that ends meanwhile may never return.
_GREET_S = 15.0
_RESET_S = 1.0
# A peer over its rate is read this much later each time; after some seconds of it, it is a flood.
_WAIT_S = 0.1
_WAITS_PER_S, _WAITS_BURST = 2, 50
# Message ids in IHAVE and IWANT cost a look-up each; a message costs two signatures.
_IDS_PER_COST = 8
# Nobody holds more messages for us than a few heartbeats bring.
_IDS_MAX = 1_000


class Judgement(Enum):
    """What becomes of a gossiped document: passed on, dropped, or held against its forwarder."""

    PASS = 1
    IGNORE = 2
    REJECT = 3


@dataclass(frozen=True)
class Manners:
    """Who may gossip, and whom to tell of a fault: `fault(peer, kind)`."""

    admitted: Callable[[str], bool] = lambda peer: True
    fault: Callable[[str, str], None] = lambda peer, kind: None


class GuardedRouter(GossipSub):
    """GossipSub without the parts that forget nothing or doubt honest peers."""

    def _check_equivocation(self, msg: rpc_pb2.Message) -> bool:
        # Sequence numbers begin at the clock's second, so a restarted peer may use one twice; the
        # documents inside have sequence numbers of their own.
        return True

    async def publish(self, msg_forwarder: ID, pubsub_msg: rpc_pb2.Message) -> None:
        """Forward a message. The times of all deliveries, kept for ever, are let go of."""
        await super().publish(msg_forwarder, pubsub_msg)
        self.recent_message_deliveries.clear()


class _Queues(dict[ID, Any]):
    """The queue of each peer. One that is replaced is closed, or its sender would wait for ever."""

    def __setitem__(self, peer: ID, queue: Any) -> None:
        earlier = self.get(peer)
        super().__setitem__(peer, queue)
        if earlier is not None and earlier is not queue:
            earlier.close()


class GuardedPubsub(Pubsub):
    """Pubsub among members. `judges` decide, by topic, on documents; each is cheap and pure."""

    def __init__(self, *args: Any, manners: Manners, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.peer_queues = _Queues()
        self.judges: dict[str, Callable[[str, bytes], Judgement]] = {}
        self._manners = manners
        self._reading: dict[ID, Any] = {}
        self._greeting: dict[ID, trio.Lock] = {}
        self._tolls = TokenBuckets(
            per_s=GOSSIP_COST_PER_S_PER_PEER,
            burst=GOSSIP_COST_BURST_PER_PEER,
            names_max=OVERLAY_CONNECTIONS_MAX,
        )
        self._waits = TokenBuckets(
            per_s=_WAITS_PER_S, burst=_WAITS_BURST, names_max=OVERLAY_CONNECTIONS_MAX
        )

    # --- who ---

    def welcome(self, peer: ID) -> None:
        """Gossip with a connected peer from now on, on a new stream."""
        if peer in self.peers:
            self._handle_dead_peer(peer)
        self._schedule_peer_stream_retry(peer)

    async def part(self, peer: ID) -> None:
        """Gossip with a connected peer no longer."""
        for stream in (self._reading.get(peer), self.peers.get(peer)):
            if stream is not None:
                await _reset(stream)
        self._handle_dead_peer(peer)

    async def _handle_new_peer(self, peer_id: ID) -> None:
        if not self._manners.admitted(str(peer_id)):
            return
        # One at a time: of two streams opened at once the peer may keep the one that we drop.
        lock = self._greeting.setdefault(peer_id, trio.Lock())
        try:
            with trio.move_on_after(_GREET_S) as greeting:
                async with lock:
                    if not self.writes_to(peer_id):
                        self._drop_stream(peer_id)
                        await super()._handle_new_peer(peer_id)
        finally:
            if not lock.locked():
                self._greeting.pop(peer_id, None)
        if greeting.cancelled_caught:
            raise SwarmException("the gossip stream did not open in time")

    def writes_to(self, peer: ID) -> bool:
        """Whether our stream to a peer can be written to, as far as is known here."""
        stream: Any = self.peers.get(peer)
        if stream is None or stream.muxed_stream.reset_received:
            return False
        return not stream.muxed_conn.is_closed

    def _drop_stream(self, peer: ID) -> None:
        """Forget a stream that is written to no longer, before the next one takes its place."""
        if peer in self.peers:
            del self.peers[peer]
            if (queue := self.peer_queues.pop(peer, None)) is not None:
                queue.close()
            self.router.remove_peer(peer)
            # What it may have missed is sent again.
            self._replayed_recent_topics.pop(peer, None)

    def _handle_dead_peer(self, peer_id: ID) -> None:
        topics = [topic for topic, peers in self.peer_topics.items() if peer_id in peers]
        super()._handle_dead_peer(peer_id)
        # Only our stream ended: on its own the peer said once what it follows, and won't repeat it.
        if peer_id in self._reading and self._peer_is_connected(peer_id):
            for topic in topics:
                self.peer_topics.setdefault(topic, set()).add(peer_id)
            if topics:
                self._peer_subscription_count[peer_id] = len(topics)

    # --- reading ---

    async def continuously_read_stream(self, stream: Any) -> None:
        """Read one peer's messages until it leaves or sends nonsense. Its latest stream counts."""
        peer = stream.muxed_conn.peer_id
        earlier, self._reading[peer] = self._reading.get(peer), stream
        if earlier is not None:
            await _reset(earlier)
        try:
            await self._read(stream, peer)
            await _reset(stream)  # no longer a member: its writes must fail
        except MessageTooLarge:
            await self._refuse(stream, peer, "gossip_oversize")
        except (StreamError, IOException, RawConnError, IncompleteReadError) as error:
            logger.debug("gossip stream of peer=%s ended: %r", peer, error)
        except Exception as error:
            logger.debug("gossip of peer=%s does not parse: %r", peer, error)
            await self._refuse(stream, peer, "gossip_rpc")
        finally:
            if self._reading.get(peer) is stream:
                del self._reading[peer]

    async def _refuse(self, stream: Any, peer: ID, kind: str) -> None:
        self._manners.fault(str(peer), kind)
        await _reset(stream)
        self._handle_dead_peer(peer)

    async def _read(self, stream: Any, peer: ID) -> None:
        record = b""
        while self.manager.is_running and self._manners.admitted(str(peer)):
            data = await read_varint_prefixed_bytes_limited(stream, self.max_inbound_rpc_size)
            rpc = rpc_pb2.RPC.FromString(data)
            await self._pay(peer, rpc)
            # Every RPC repeats the sender's signed addresses; each version is checked once.
            if rpc.senderRecord and rpc.senderRecord != record:
                if not maybe_consume_signed_record(rpc, self.host, peer):
                    self._manners.fault(str(peer), "gossip_record")
                    continue
                record = rpc.senderRecord
            rpc.ClearField("senderRecord")
            for message in rpc.publish:
                await self.push_msg(peer, message)
            if len(rpc.subscriptions) <= self.max_subscriptions_per_rpc:
                for subscription in rpc.subscriptions:
                    self.handle_subscription(peer, subscription)
            if rpc.HasField("control"):
                self._strip(rpc.control)
                await self.router.handle_rpc(rpc, peer)

    async def _pay(self, peer: ID, rpc: rpc_pb2.RPC) -> None:
        """Wait until this peer may make us do so much. Raises ValueError when it never may."""
        ids = sum(len(entry.messageIDs) for entry in rpc.control.ihave)
        ids += sum(len(entry.messageIDs) for entry in rpc.control.iwant)
        cost = 1 + len(rpc.publish) + ids // _IDS_PER_COST
        cost += len(rpc.control.graft) + len(rpc.control.prune) + len(rpc.subscriptions)
        if cost > GOSSIP_COST_BURST_PER_PEER or ids > _IDS_MAX:
            raise ValueError("an RPC that asks for too much")
        name = str(peer)
        while not self._tolls.take(name, trio.current_time(), cost):
            if not self._waits.take(name, trio.current_time()):
                self._manners.fault(name, "gossip_flood")
            await trio.sleep(_WAIT_S)

    def _strip(self, control: rpc_pb2.ControlMessage) -> None:
        """Leave only what is about topics we follow, and each id once."""
        control.ClearField("idontwant")
        for field in ("ihave", "graft", "prune"):
            entries = list(getattr(control, field))
            kept = [entry for entry in entries if entry.topicID in self.judges]
            if len(kept) != len(entries):
                control.ClearField(field)
                getattr(control, field).extend(kept)
        for wanted in control.iwant:
            names = list(dict.fromkeys(wanted.messageIDs))
            wanted.ClearField("messageIDs")
            wanted.messageIDs.extend(names)

    # --- judging ---

    async def push_msg(self, msg_forwarder: ID, msg: rpc_pb2.Message) -> None:
        """Take one message in and pass it on, when it is new and sound."""
        if self._is_msg_seen(msg):
            return
        ours = msg_forwarder == self.my_id
        if not ours:
            judgement = self._judge(msg_forwarder, msg)
            if judgement is Judgement.REJECT:
                for topic in set(msg.topicIDs) & self.judges.keys():
                    self.router.scorer.on_invalid_message(msg_forwarder, topic)  # type: ignore[attr-defined]
                self._manners.fault(str(msg_forwarder), "gossip_message")
            if judgement is not Judgement.PASS:
                return
        self._mark_msg_seen(msg)
        if not ours:
            self.router.scorer.on_first_delivery(msg_forwarder, msg.topicIDs[0])  # type: ignore[attr-defined]
        await self.router.publish(msg_forwarder, msg)

    def _judge(self, forwarder: ID, msg: rpc_pb2.Message) -> Judgement:
        """The cheap checks first: a bad message must cost its sender more than us."""
        topics = list(msg.topicIDs)
        if len(topics) != 1 or not self._manners.admitted(str(forwarder)):
            return Judgement.REJECT
        judge = self.judges.get(topics[0])
        if judge is None:
            return Judgement.IGNORE  # we may have left the topic
        if not self.router.scorer.allow_publish(forwarder, topics):  # type: ignore[attr-defined]
            self._manners.fault(str(forwarder), "gossip_muted")
            return Judgement.IGNORE
        if ID(msg.from_id) == self.my_id:
            return Judgement.IGNORE  # an echo of what we said before a restart
        try:
            if not signature_validator(msg):
                return Judgement.REJECT
        except Exception:
            return Judgement.REJECT
        return judge(str(forwarder), msg.data)


async def _reset(stream: Any) -> None:
    try:
        with trio.move_on_after(_RESET_S):
            await stream.reset()
    except Exception as error:
        logger.debug("resetting a gossip stream: %r", error)
