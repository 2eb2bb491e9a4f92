"""Keeps an overlay told of how the market is divided."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable

import trio

from lumaris_overlay.ports import Overlay
from lumaris_protocol.errors import LumarisError
from lumaris_protocol.limits import SHARD_MAP_CHECK_S

log = logging.getLogger(__name__)


async def keep_shards(overlay: Overlay, fetch: Callable[[], Awaitable[bytes]]) -> None:
    """Tell the overlay what `fetch` returns, now and whenever that may have changed."""
    while True:
        try:
            await overlay.present_shards(await fetch())
        except LumarisError as error:  # the overlay goes on with the map it has
            log.info("shard map not taken code=%s", error.code)
        await trio.sleep(SHARD_MAP_CHECK_S)
