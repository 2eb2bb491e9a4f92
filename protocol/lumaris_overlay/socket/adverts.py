"""Keeps a follower of the adverts told across restarts of the overlay process."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable

import trio

from lumaris_overlay.feed import AdvertFeed
from lumaris_overlay.frame_reader import FrameReader
from lumaris_overlay.ports import AdvertEvent
from lumaris_overlay.socket import wire
from lumaris_overlay.socket.wire import Reply, Request
from lumaris_overlay.tasks import background
from lumaris_protocol.errors import EnvelopeError, LumarisError
from lumaris_protocol.keys import PeerId

logger = logging.getLogger(__name__)

RETRY_S = 0.05
# A seller that a restarted overlay has not heard of again after this long is taken to have left.
_MISSED_S = 30.0

LOST = (EnvelopeError, OSError, trio.BrokenResourceError, trio.ClosedResourceError)
"""How a connection to the overlay process ends when that goes away."""

Ask = Callable[[Request], Awaitable[tuple[trio.SocketStream, FrameReader]]]


class AdvertFollower:
    """One follower; `ask` begins a call that lasts."""

    def __init__(self, ask: Ask, feed: AdvertFeed) -> None:
        self._ask = ask
        self._feed = feed
        self._known: dict[PeerId, int] = {}

    async def run(self) -> None:
        """Tell the feed of every change, until cancelled."""
        missing: dict[PeerId, int] = {}
        while True:
            try:
                pipe, reader = await self._ask(Request("adverts"))
            except LumarisError:
                await trio.sleep(RETRY_S)
                continue
            async with background() as nursery:
                nursery.start_soon(self._give_up_on, missing)
                try:
                    async with pipe:
                        while (frame := await reader.next()) is not None:
                            self._tell(wire.decode_reply(frame), missing)
                except (*LOST, LumarisError) as error:
                    logger.info("adverts lost=%r", error)
            missing.update(self._known)

    def _tell(self, said: Reply, missing: dict[PeerId, int]) -> None:
        seller = PeerId(said.seller)
        missing.pop(seller, None)
        if said.envelope is None:
            if self._known.pop(seller, None) is not None:
                self._feed.tell(AdvertEvent(seller, None, said.seq))
        elif said.seq > self._known.get(seller, -1):
            self._known[seller] = said.seq
            self._feed.tell(AdvertEvent(seller, said.envelope, said.seq))

    async def _give_up_on(self, missing: dict[PeerId, int]) -> None:
        if not missing:
            return
        await trio.sleep(_MISSED_S)
        for seller, seq in list(missing.items()):
            if self._known.pop(seller, None) is not None:
                self._feed.tell(AdvertEvent(seller, None, seq))
        missing.clear()
