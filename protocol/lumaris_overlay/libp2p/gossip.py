"""Gossip of signed documents by GossipSub: a topic per kind and shard.

Each document is judged by a synchronous function before anything is passed on. The message id is
the hash of topic and document, so the same one from two publishers is one message. libp2p's own
spam protection stays off: it counts by forwarder and loses honest messages; `guarded_pubsub` bounds
what one peer can make us do instead.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Mapping
from typing import Any

import trio
from libp2p.custom_types import TProtocol
from libp2p.pubsub.score import ScoreParams, TopicScoreParams
from libp2p.tools.anyio_service import background_trio_service

from lumaris_overlay.libp2p.guarded_pubsub import GuardedPubsub, GuardedRouter, Judgement, Manners
from lumaris_protocol.limits import (
    ADVERT_BYTES_MAX,
    ADVERT_REFRESH_S,
    DEMAND_BYTES_MAX,
    NOTICE_BYTES_MAX,
    SHARD_ID_MAX,
    SHARDS_FOLLOWED_MAX,
)

logger = logging.getLogger(__name__)

_RPC_BYTES_MAX = 64 * 1024
_HEARTBEAT_S = 1
_DEGREE_LOW = 4
# 1.2 and later double the cost of a 1 kB message; 1.1 and 1.0 are what other libp2ps share.
_PROTOCOLS = [TProtocol("/meshsub/1.1.0"), TProtocol("/meshsub/1.0.0")]
# A peer follows its shards' topics; some room is left for a change of the shard map.
_SUBSCRIPTIONS_MAX = 8 * SHARDS_FOLLOWED_MAX

ADVERTS, DEMANDS, NOTICES = "adverts", "demands", "notices"
_BYTES_MAX = {
    ADVERTS: ADVERT_BYTES_MAX,
    DEMANDS: DEMAND_BYTES_MAX,
    NOTICES: NOTICE_BYTES_MAX,
}
# Notices are for everybody: their one topic is not divided, and ends with a version instead.
NOTICES_SHARD = 1

# What becomes of a document in this shard from this forwarder.
Judge = Callable[[int, str, bytes], Judgement]


def topic_of(network: str, kind: str, shard: int = 0) -> str:
    """The topic of a kind of document in a shard."""
    return f"/lumaris/{network}/{kind}/{shard}"


def _message_id(message: Any) -> bytes:
    """While a new shard map spreads, the same advert stands in two topics: two messages."""
    name = "\n".join((*message.topicIDs, "")).encode()
    return hashlib.sha256(name + message.data).digest()


class _OurTopics:
    """The topics a peer may tell us that it follows: those of our kinds, in any shard."""

    def __init__(self, prefixes: tuple[str, ...]) -> None:
        self._prefixes = prefixes

    def __contains__(self, topic: str) -> bool:
        prefix, _, shard = topic.rpartition("/")
        known = f"{prefix}/" in self._prefixes and len(shard) <= len(str(SHARD_ID_MAX))
        return known and shard.isascii() and shard.isdecimal() and str(int(shard)) == shard


def score_params() -> ScoreParams:
    """What a peer's conduct is worth to its neighbours.

    Penalty weights are positive here: libp2p subtracts them. Six invalid messages mute a peer, ten
    make its grafts refused; half of it is forgiven in about seven heartbeats.
    """
    return ScoreParams(
        p2_first_message_deliveries=TopicScoreParams(weight=0.5, cap=20.0, decay=0.9),
        p4_invalid_messages=TopicScoreParams(weight=10.0, cap=100.0, decay=0.9),
        p5_behavior_penalty_weight=1.0,
        p5_behavior_penalty_decay=0.9,
        p5_behavior_penalty_threshold=10.0,
        gossip_threshold=-20.0,
        publish_threshold=-50.0,
        graylist_threshold=-80.0,
        accept_px_threshold=0.0,
    )


class Gossip:
    """The topics that one host follows. `judges` decide, by kind, what is passed on."""

    def __init__(
        self,
        host: Any,
        network: str,
        judges: Mapping[str, Judge],
        *,
        manners: Manners | None = None,
    ) -> None:
        self._network, self._judges = network, dict(judges)
        self._joined: set[str] = set()
        self._router = GuardedRouter(
            protocols=_PROTOCOLS,
            degree=6,
            degree_low=_DEGREE_LOW,
            degree_high=12,
            gossip_window=3,
            gossip_history=5,
            heartbeat_initial_delay=0.1,
            heartbeat_interval=_HEARTBEAT_S,
            score_params=score_params(),
            # It would change degrees and heartbeat by a notion of health of its own.
            adaptive_gossip_enabled=False,
            spam_protection_enabled=False,
            # Its test wants peers of three IP networks; a market of one office has one.
            eclipse_protection_enabled=False,
        )
        prefixes = tuple(f"/lumaris/{network}/{kind}/" for kind in judges)
        self._pubsub = GuardedPubsub(
            host,
            self._router,
            seen_ttl=2 * ADVERT_REFRESH_S,
            msg_id_constructor=_message_id,
            max_inbound_rpc_size=_RPC_BYTES_MAX,
            max_subscriptions_per_rpc=_SUBSCRIPTIONS_MAX,
            max_subscriptions_per_peer=_SUBSCRIPTIONS_MAX,
            manners=manners or Manners(),
        )
        self._pubsub.allowed_topics = _OurTopics(prefixes)  # type: ignore[assignment]  # only `in`

    async def run(self, task_status: Any = trio.TASK_STATUS_IGNORED) -> None:
        """Gossip until cancelled; started once the first shard's topics are joined."""
        async with background_trio_service(self._pubsub), background_trio_service(self._router):
            await self._pubsub.wait_until_ready()
            for kind in self._judges:
                await self.join(kind, NOTICES_SHARD if kind == NOTICES else 0)
            task_status.started()
            await trio.sleep_forever()

    async def join(self, kind: str, shard: int = 0) -> None:
        """Follow a topic, while `run` is running. Raises ValueError for a shard that cannot be."""
        if not 0 <= shard <= SHARD_ID_MAX:
            raise ValueError(f"a shard is at most {SHARD_ID_MAX}")
        topic = topic_of(self._network, kind, shard)
        if topic in self._joined:
            return
        self._joined.add(topic)
        judge, bytes_max = self._judges[kind], _BYTES_MAX[kind]

        def judge_size_first(forwarder: str, data: bytes) -> Judgement:
            return judge(shard, forwarder, data) if len(data) <= bytes_max else Judgement.REJECT

        self._pubsub.judges[topic] = judge_size_first
        # The judge takes the documents in; nothing comes by the subscription itself.
        await self._pubsub.subscribe(topic)

    async def leave(self, kind: str, shard: int = 0) -> None:
        """Follow a topic no longer."""
        topic = topic_of(self._network, kind, shard)
        if topic in self._joined:
            self._joined.discard(topic)
            await self._pubsub.unsubscribe(topic)
            del self._pubsub.judges[topic]

    def topics(self) -> tuple[str, ...]:
        """The topics that are followed now."""
        return tuple(self._joined)

    async def publish(self, kind: str, data: bytes, shard: int = 0) -> None:
        """Gossip a document that has been checked."""
        await self._pubsub.publish(topic_of(self._network, kind, shard), data)

    def followers(self, kind: str, shard: int) -> list[Any]:
        """The connected peers that follow a topic."""
        found = self._pubsub.peer_topics.get(topic_of(self._network, kind, shard), ())
        return [peer for peer in found if self.knows(peer)]

    def in_mesh(self, peer: Any, kind: str = ADVERTS, shard: int = 0) -> bool:
        """Whether gossip reaches this peer directly."""
        return bool(peer in self._router.mesh.get(topic_of(self._network, kind, shard), ()))

    def reaches(self, peer: Any, kind: str, shard: int) -> bool:
        """Whether gossip gets to a peer: directly, or it follows and others have it from us."""
        mesh = self._router.mesh.get(topic_of(self._network, kind, shard), ())
        if not self.knows(peer):
            return False
        return peer in mesh or (len(mesh) >= _DEGREE_LOW and peer in self.followers(kind, shard))

    def knows(self, peer: Any) -> bool:
        """Whether a peer has taken our gossip stream and not reset it."""
        return self._pubsub.writes_to(peer)

    def admit(self, peer: Any) -> None:
        """Begin to gossip with a peer that was a stranger when it connected."""
        self._pubsub.welcome(peer)

    async def part(self, peer: Any) -> None:
        """Stop gossiping with a connected peer that is no longer a member."""
        await self._pubsub.part(peer)
