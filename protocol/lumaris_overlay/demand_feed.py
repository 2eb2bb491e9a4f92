"""Hands demands to any number of followers; a slow one loses the oldest, never the newest."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

import trio

from lumaris_overlay.ports import DemandEvent

# A demand is worth answering for seconds: who is this far behind answers too late anyway.
_WAITING_MAX = 256

_Ends = tuple[
    "trio.MemorySendChannel[DemandEvent]",
    "trio.MemoryReceiveChannel[DemandEvent]",
]


class DemandFeed:
    """Followers of the demands that other peers gossip."""

    def __init__(self) -> None:
        self._followers: set[_Ends] = set()

    def tell(self, event: DemandEvent) -> None:
        """Hand a demand to every follower; never blocks."""
        for send, oldest in self._followers:
            try:
                send.send_nowait(event)
            except trio.WouldBlock:
                oldest.receive_nowait()
                send.send_nowait(event)

    @asynccontextmanager
    async def follow(self) -> AsyncGenerator[trio.MemoryReceiveChannel[DemandEvent]]:
        """A channel that carries each demand told from now on."""
        send, receive = trio.open_memory_channel[DemandEvent](_WAITING_MAX)
        ends = (send, receive.clone())
        self._followers.add(ends)
        try:
            async with receive:
                yield receive
        finally:
            self._followers.discard(ends)
            send.close()
            ends[1].close()
