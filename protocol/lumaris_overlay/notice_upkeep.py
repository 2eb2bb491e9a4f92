"""Keeps a program told of what its coordinators say to everybody."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from typing import Final

import trio

from lumaris_overlay.notices import REVOCATIONS
from lumaris_overlay.ports import Notice, Overlay
from lumaris_protocol import codec, envelope
from lumaris_protocol.errors import LumarisError
from lumaris_protocol.key_list import TrustedKeys
from lumaris_protocol.limits import (
    REVOCATION_PAGES_MAX,
    REVOCATIONS_CHECK_S,
    REVOCATIONS_PER_NOTICE_MAX,
)
from lumaris_protocol.messages.notice import Revocations
from lumaris_protocol.revocations import RevokedSet

log = logging.getLogger(__name__)

_NOBODY: Final[Callable[[Notice, frozenset[str]], None]] = lambda notice, peers: None  # noqa: E731


async def follow_notices(
    overlay: Overlay,
    revoked: RevokedSet,
    *,
    clock: Callable[[], float],
    heard: Callable[[Notice, frozenset[str]], None] = _NOBODY,
) -> None:
    """Fill `revoked` from what the overlay hears, until cancelled.

    `heard` gets every notice, and the peers of whom it revokes something new.
    """
    async with overlay.notices() as notices:
        async for notice in notices:
            peers: frozenset[str] = frozenset()
            if notice.kind == REVOCATIONS:
                # The overlay has checked it; the program takes what its own overlay says.
                payload = envelope.decode(notice.envelope).payload
                peers = revoked.add(codec.decode_payload(payload, Revocations), clock())
                log.info("revoked peers=%d", len(peers))
            heard(notice, peers)


async def keep_revocations(overlay: Overlay, fetch: Callable[[int], Awaitable[bytes]]) -> None:
    """Tell the overlay, until cancelled, of the revocations after the number that `fetch` is given.

    Gossip is quicker; this is for a coordinator that has no overlay, and for what was missed.
    """
    known = 0
    while True:
        try:
            for _ in range(REVOCATION_PAGES_MAX):
                data = await fetch(known)
                # Checked by the overlay, which is given it first.
                await overlay.publish_notice(data)
                payload = envelope.decode(data).payload
                message = codec.decode_payload(payload, Revocations)
                known = max(known, message.seq)
                if len(message.revoked) < REVOCATIONS_PER_NOTICE_MAX:
                    break
        except LumarisError as error:
            log.info("revocations not known code=%s", error.code)
        await trio.sleep(REVOCATIONS_CHECK_S)


async def keep_keys(
    overlay: Overlay, keys: TrustedKeys, fetch: Callable[[], Awaitable[bytes]]
) -> None:
    """Keep `keys` and the overlay at the coordinator's newest list, until cancelled.

    A list that came another way, with a registration, is passed on as well.
    """
    told = b""
    while True:
        try:
            keys.learn(await fetch())
        except LumarisError as error:
            log.info("key list not known code=%s", error.code)
        data = keys.data
        if data != told and await pass_on_keys(overlay, data):
            told = data
        await trio.sleep(REVOCATIONS_CHECK_S)


async def pass_on_keys(overlay: Overlay, data: bytes) -> bool:
    """Publish a coordinator's key list; whether the overlay took it. Nothing for b""."""
    if not data:
        return True
    try:
        await overlay.publish_notice(data)
    except LumarisError as error:
        log.warning("key list not passed on code=%s", error.code)
        return False
    return True
