"""Adverts by GossipSub: one topic, checked by a synchronous validator before anything is passed on.

The message id is the hash of the advert, so the same advert from two publishers is one message.
libp2p's own spam protection stays off: it counts by forwarder and loses honest messages.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

import trio
from libp2p.custom_types import TProtocol
from libp2p.pubsub.gossipsub import GossipSub
from libp2p.tools.anyio_service import background_trio_service

from lumaris_overlay.libp2p.overrides import GuardedPubsub
from lumaris_protocol.limits import ADVERT_BYTES_MAX, ADVERT_REFRESH_S

_RPC_BYTES_MAX = 64 * 1024
_HEARTBEAT_S = 1
# 1.2 and later double the cost of a 1 kB message; 1.1 and 1.0 are what other libp2ps share.
_PROTOCOLS = [TProtocol("/meshsub/1.1.0"), TProtocol("/meshsub/1.0.0")]

Validator = Callable[[str, bytes], bool]


def topic_of(network: str) -> str:
    """The topic of a network's first shard."""
    return f"/lumaris/{network}/adverts/0"


class AdvertGossip:
    """The advert topic on one host. `accept(forwarder, data)` decides what is passed on."""

    def __init__(self, host: Any, network: str, accept: Validator) -> None:
        self.topic = topic_of(network)
        self._me = host.get_id()
        self._accept = accept
        self._router = GossipSub(
            protocols=_PROTOCOLS,
            degree=6,
            degree_low=4,
            degree_high=12,
            gossip_window=3,
            gossip_history=5,
            heartbeat_initial_delay=0.1,
            heartbeat_interval=_HEARTBEAT_S,
            spam_protection_enabled=False,
            # Its test wants peers of three IP networks; a market of one office has one.
            eclipse_protection_enabled=False,
        )
        self._pubsub = GuardedPubsub(
            host,
            self._router,
            seen_ttl=2 * ADVERT_REFRESH_S,
            msg_id_constructor=lambda message: hashlib.sha256(message.data).digest(),
            max_inbound_rpc_size=_RPC_BYTES_MAX,
            allowed_topics={self.topic},
        )
        self._pubsub.set_topic_validator(self.topic, self._validate, is_async_validator=False)

    async def run(self, task_status: Any = trio.TASK_STATUS_IGNORED) -> None:
        """Gossip until cancelled; started once the topic is joined."""
        async with background_trio_service(self._pubsub), background_trio_service(self._router):
            await self._pubsub.wait_until_ready()
            subscription = await self._pubsub.subscribe(self.topic)
            task_status.started()
            while True:
                # The validator has taken the advert in; the queue is only kept from filling.
                await subscription.get()

    async def publish(self, data: bytes) -> None:
        """Gossip a document that has been checked."""
        await self._pubsub.publish(self.topic, data)

    def in_mesh(self, peer: Any) -> bool:
        """Whether gossip reaches this peer directly."""
        return bool(peer in self._router.mesh.get(self.topic, ()))

    def _validate(self, forwarder: Any, message: Any) -> bool:
        if list(message.topicIDs) != [self.topic] or len(message.data) > ADVERT_BYTES_MAX:
            return bool(forwarder == self._me)
        return bool(forwarder == self._me) or self._accept(str(forwarder), message.data)
