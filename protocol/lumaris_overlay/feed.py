"""Hands the directory's changes to any number of followers, none of which can hold up another.

A follower that is slow gets, per seller, only the newest change: what waits for it is bounded by
the number of sellers, and it can never miss the state a seller is in.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterable
from contextlib import asynccontextmanager

import trio

from lumaris_overlay.ports import AdvertEvent
from lumaris_protocol.keys import PeerId


class _Follower:
    def __init__(self) -> None:
        self.pending: dict[PeerId, AdvertEvent] = {}
        self.changed = trio.Event()

    def put(self, event: AdvertEvent) -> None:
        self.pending.pop(event.seller, None)  # the newest change goes to the end of the line
        self.pending[event.seller] = event
        self.changed.set()

    async def pump(self, send: trio.MemorySendChannel[AdvertEvent]) -> None:
        async with send:
            while True:
                while self.pending:
                    event = self.pending.pop(next(iter(self.pending)))
                    try:
                        await send.send(event)
                    except trio.BrokenResourceError:
                        return
                self.changed = trio.Event()
                await self.changed.wait()


class AdvertFeed:
    """Followers of the directory; their tasks live in the overlay's nursery."""

    def __init__(self, nursery: trio.Nursery) -> None:
        self._nursery = nursery
        self._followers: set[_Follower] = set()

    def tell(self, event: AdvertEvent) -> None:
        """Hand a change to every follower; never blocks."""
        for follower in self._followers:
            follower.put(event)

    @asynccontextmanager
    async def follow(
        self, present: Iterable[AdvertEvent]
    ) -> AsyncGenerator[trio.MemoryReceiveChannel[AdvertEvent]]:
        """A channel that first carries `present`, then each change."""
        follower = _Follower()
        for event in present:
            follower.put(event)
        self._followers.add(follower)
        send, receive = trio.open_memory_channel[AdvertEvent](0)
        scope = trio.CancelScope()

        async def pump() -> None:
            with scope:
                await follower.pump(send)

        self._nursery.start_soon(pump)
        try:
            async with receive:
                yield receive
        finally:
            self._followers.discard(follower)
            scope.cancel()
