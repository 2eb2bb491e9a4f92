"""Hands what happens to any number of followers; a slow one loses the oldest, never the newest."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterable
from contextlib import asynccontextmanager
from typing import Generic, TypeVar

import trio

E = TypeVar("E")

# A demand is worth answering for seconds, and a coordinator says a few things a minute: who is this
# far behind is too late anyway. It holds all notices that are kept, so the first ones are not lost.
_WAITING_MAX = 256


class LatestFeed(Generic[E]):
    """Followers of what other peers gossip."""

    def __init__(self) -> None:
        self._followers: set[tuple[trio.MemorySendChannel[E], trio.MemoryReceiveChannel[E]]] = set()

    def tell(self, event: E) -> None:
        """Hand an event to every follower; never blocks."""
        for send, oldest in self._followers:
            try:
                send.send_nowait(event)
            except trio.WouldBlock:
                oldest.receive_nowait()
                send.send_nowait(event)

    @asynccontextmanager
    async def follow(
        self, present: Iterable[E] = ()
    ) -> AsyncGenerator[trio.MemoryReceiveChannel[E]]:
        """A channel that first carries `present`, then each event told from now on."""
        send, receive = trio.open_memory_channel[E](_WAITING_MAX)
        for event in present:
            send.send_nowait(event)
        ends = (send, receive.clone())
        self._followers.add(ends)
        try:
            async with receive:
                yield receive
        finally:
            self._followers.discard(ends)
            send.close()
            ends[1].close()
