"""Keeps one host in the shards it ought to be in: topics, a snapshot on entry, and neighbours.

`ShardDesk` decides; this acts. Entering a shard means to join its topics and to ask a few of its
members for all they know; members are the peers that follow its topic, else the index peers that
the DHT names. A shard that is only asked costs one filtered query and is not joined.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import trio
from libp2p.peer.id import ID

from lumaris_overlay.advert_filter import AdvertFilter, filter_of
from lumaris_overlay.libp2p.advert_exchange import AdvertExchange
from lumaris_overlay.libp2p.connections import Connections
from lumaris_overlay.libp2p.gossip import ADVERTS, DEMANDS
from lumaris_overlay.records import PeerRecord
from lumaris_overlay.shard_desk import ShardDesk
from lumaris_protocol.errors import EnvelopeError, RemoteError
from lumaris_protocol.limits import INDEX_PEERS_MAX
from lumaris_protocol.messages.advert import Advert
from lumaris_protocol.messages.negotiation import Requirements

logger = logging.getLogger(__name__)

_CHECK_S = 1.0
# A caller of `seek` goes on with what is there after this long.
_SEEK_S = 5.0
# The same question about a shard that is not followed is asked again after this long.
_ASK_AGAIN_S = 30.0
_ASKED_MAX = 64
# A shard in which we know less than this many peers may be cut off by the next departure.
_NEIGHBOURS_MIN = 2
_BACKOFF_S_MIN, _BACKOFF_S_MAX = 4.0, 120.0

FindIndexPeers = Callable[[int], Awaitable[tuple[bytes, ...]]]
Check = Callable[[bytes], PeerRecord]


@dataclass
class _Member:
    """Our membership in one shard."""

    filled: trio.Event
    delay: float = _BACKOFF_S_MIN
    due: float = 0.0


class ShardFollower:
    """The shards of one host. `changed` is called when it is in others than before."""

    def __init__(
        self,
        desk: ShardDesk,
        exchange: AdvertExchange,
        connections: Connections,
        nursery: trio.Nursery,
        *,
        find_index_peers: FindIndexPeers,
        check: Check,
        changed: Callable[[], None],
    ) -> None:
        self.desk = desk
        self._exchange, self._connections, self._nursery = exchange, connections, nursery
        self._find_index_peers, self._check, self._changed = find_index_peers, check, changed
        # The gossip joins the first shard by itself.
        self._members: dict[int, _Member] = {0: _Member(trio.Event())}
        self._asked: dict[tuple[int, AdvertFilter], float] = {}
        self._lock = trio.Lock()

    async def run(self, task_status: Any = trio.TASK_STATUS_IGNORED) -> None:
        """Follow time and the desk until cancelled; started once the topics are joined."""
        await self.update()
        task_status.started()
        while True:
            await trio.sleep(_CHECK_S)
            await self.update()
            if self.desk.divided(time.time()):
                self._look_for_neighbours()

    async def adopt(self, envelope: bytes) -> None:
        """Divide the market by this map. Raises EnvelopeError."""
        if self.desk.adopt(envelope, time.time()):
            await self.update()
            await self._exchange.publish_again()
        await trio.lowlevel.checkpoint()

    async def sell(self, advert: Advert) -> None:
        """Be in the shards of a seller of ours before its advert goes out."""
        self.desk.sell(advert)
        await self.update()

    async def seek(self, needs: Requirements) -> None:
        """Have what may fit in the directory, or what could be had of it in some seconds."""
        now = time.time()
        sought = self.desk.seek(needs, now)
        await self.update()
        if not self.desk.divided(now):
            return
        with trio.move_on_after(_SEEK_S):
            async with trio.open_nursery() as nursery:
                for shard in sought.asked:
                    nursery.start_soon(self._ask, shard, filter_of(needs))
                for shard in sought.followed:
                    if shard in self._members:
                        nursery.start_soon(self._members[shard].filled.wait)

    async def update(self) -> None:
        """Join and leave topics until they are those of the desk."""
        async with self._lock:
            wanted = self.desk.joined(time.time())
            gossip = self._exchange.gossip
            fresh = [shard for shard in wanted if shard not in self._members]
            stale = [shard for shard in self._members if shard not in wanted]
            for shard in fresh:
                for kind in (ADVERTS, DEMANDS):
                    await gossip.join(kind, shard)
                self._members[shard] = _Member(trio.Event())
                self._nursery.start_soon(self._enter, shard, self._members[shard])
            for shard in stale:
                del self._members[shard]
                for kind in (ADVERTS, DEMANDS):
                    await gossip.leave(kind, shard)
        if fresh or stale:
            logger.info("shards event=changed joined=%s", wanted)
            self._changed()

    async def _enter(self, shard: int, member: _Member) -> None:
        """Ask members of a shard for all they know."""
        try:
            await self._pull(shard, AdvertFilter())
        finally:
            member.filled.set()

    async def _ask(self, shard: int, wanted: AdvertFilter) -> None:
        now = trio.current_time()
        if now - self._asked.get((shard, wanted), -_ASK_AGAIN_S) < _ASK_AGAIN_S:
            return
        self._asked.pop((shard, wanted), None)
        while len(self._asked) >= _ASKED_MAX:
            del self._asked[next(iter(self._asked))]
        self._asked[shard, wanted] = now
        await self._pull(shard, wanted)

    async def _pull(self, shard: int, wanted: AdvertFilter) -> None:
        peers = await self._peers_of(shard)
        async with trio.open_nursery() as nursery:
            for peer in peers:
                nursery.start_soon(self._exchange.pull, peer, (shard,), wanted)

    async def _peers_of(self, shard: int) -> list[Any]:
        """A few connected members of a shard; those the DHT names are dialled when too few are."""
        found = self._exchange.gossip.followers(ADVERTS, shard)
        if len(found) < _NEIGHBOURS_MIN:
            for data in await self._find_index_peers(shard):
                if len(found) >= INDEX_PEERS_MAX:
                    break
                peer = await self._dial(data)
                if peer is not None and peer not in found:
                    found.append(peer)
        return found[:INDEX_PEERS_MAX]

    async def _dial(self, data: bytes) -> Any | None:
        try:
            record = self._check(data)
            await self._connections.reach(record.peer, record.addresses)
        except (EnvelopeError, RemoteError) as error:
            logger.debug("shards event=index_peer_unreachable error=%s", error)
            return None
        return ID.from_base58(record.peer)

    def _look_for_neighbours(self) -> None:
        now = trio.current_time()
        for shard, member in self._members.items():
            if len(self._exchange.gossip.followers(ADVERTS, shard)) >= _NEIGHBOURS_MIN:
                member.delay = _BACKOFF_S_MIN
            elif member.filled.is_set() and now >= member.due:
                member.due = now + member.delay
                member.delay = min(2 * member.delay, _BACKOFF_S_MAX)
                self._nursery.start_soon(self._enter, shard, member)
