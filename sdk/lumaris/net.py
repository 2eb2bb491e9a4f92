"""Trying the network: how this machine stands in it, and whether a peer answers."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from typing import Any, Final

import trio

from lumaris.daemon import sellers_of, sentence
from lumaris_overlay.ports import Overlay, Ping, Reachability
from lumaris_protocol.errors import LumarisError, RemoteError
from lumaris_protocol.keys import public_key_of
from lumaris_protocol.limits import CLOCK_SKEW_S

# A process that has just started needs moments to find its peers and to be dialled back by them.
_SETTLE_S = 6.0
_POLL_S = 0.1
_CLOCK_PEERS_MAX = 5
_PING_SPACING_S = 0.3
# Twice as good as what makes others refuse our documents: time to say something.
_CLOCK_WARN_S = CLOCK_SKEW_S / 2
_SUFFIX_CHARS_MIN: Final = 6

OpenOverlay = Callable[[], AbstractAsyncContextManager[Overlay]]


async def netcheck(open_overlay: OpenOverlay) -> dict[str, Any]:
    """How this machine stands on the network, and what to do about it."""
    async with open_overlay() as overlay:
        with trio.move_on_after(_SETTLE_S):
            while (await overlay.reachability()).verdict == "unknown":  # noqa: ASYNC110 - a call
                await trio.sleep(_POLL_S)
        reach = await overlay.reachability()
        peers = await overlay.peers()
        offsets = await _clock_offsets(overlay, [info.peer for info in peers[:_CLOCK_PEERS_MAX]])
    offset_s = _seconds(offsets) if offsets else None
    return {
        "status": sentence(reach),
        "reachability": reach.verdict,
        "addresses": list(reach.addresses),
        "observed": list(reach.observed),
        "confirmed_by": list(reach.confirmed_by),
        "relays": list(reach.relays),
        "peers": [
            {"peer": info.peer, "relayed": info.relayed, "addresses": list(info.addresses)}
            for info in peers
        ],
        "clock_offset_s": offset_s,
        "clock_peers": len(offsets),
        "next": _advice(reach, offset_s),
    }


async def ping(
    open_overlay: OpenOverlay, name: str, *, count: int, on_reply: Callable[[int, Ping], None]
) -> dict[str, Any]:
    """Ask a peer for its time `count` times. `name` is a peer id or the end of one.

    Raises LumarisError `unreachable` when it never answers, `not_found` and `usage` for the name.
    """
    replies: list[Ping] = []
    last: RemoteError | None = None
    async with open_overlay() as overlay:
        peer = await _find(overlay, name)
        for number in range(1, count + 1):
            if number > 1:
                await trio.sleep(_PING_SPACING_S)
            try:
                reply = await overlay.ping(peer)
            except RemoteError as error:
                last = error
                continue
            replies.append(reply)
            on_reply(number, reply)
    if not replies:
        assert last is not None, "count is at least 1"
        raise last
    trips = [reply.round_trip_s for reply in replies]
    return {
        "peer": peer,
        "sent": count,
        "received": len(replies),
        "path": "relayed" if replies[-1].relayed else "direct",
        "round_trip_ms": {
            "min": _ms(min(trips)),
            "median": _ms(statistics.median(trips)),
            "max": _ms(max(trips)),
        },
        "clock_offset_s": _seconds([reply.clock_offset_s for reply in replies]),
    }


def _advice(reach: Reachability, offset_s: float | None) -> str:
    if not reach.peers:
        return (
            "No peer answers. Check that the coordinator names peers that run, and that this"
            " machine may open outgoing TCP connections."
        )
    if offset_s is not None and abs(offset_s) > _CLOCK_WARN_S:
        return (
            f"Set this machine's clock: it is {abs(offset_s):.0f} s"
            f" {'behind' if offset_s > 0 else 'ahead'}, and at {CLOCK_SKEW_S} s others refuse"
            " what it signs."
        )
    if reach.verdict == "private" and not reach.relays:
        return (
            "Buying works. To sell, forward a TCP port of the router to this machine and listen"
            " on it (`--listen`), or wait for a relay."
        )
    if reach.verdict == "private":
        return "Nothing must be done: peers come through a relay. A forwarded TCP port is faster."
    return ""


async def _clock_offsets(overlay: Overlay, peers: list[str]) -> list[float]:
    offsets: list[float] = []

    async def ask(peer: str) -> None:
        try:
            offsets.append((await overlay.ping(peer)).clock_offset_s)
        except RemoteError:
            return  # it has just left

    async with trio.open_nursery() as nursery:
        for peer in peers:
            nursery.start_soon(ask, peer)
    return offsets


async def _find(overlay: Overlay, name: str) -> str:
    """The peer that a name means; one that is not known yet is waited for."""
    whole = _is_peer_id(name)
    if not whole and len(name) < _SUFFIX_CHARS_MIN:
        raise LumarisError("usage", f"Write at least the last {_SUFFIX_CHARS_MIN} characters.")
    if overlay.peer_id.endswith(name):
        raise LumarisError("usage", "That is this peer itself.")
    found: set[str] = set()
    with trio.move_on_after(_SETTLE_S):
        while not found:
            known = {*await sellers_of(overlay), *(info.peer for info in await overlay.peers())}
            found = {peer for peer in known if peer.endswith(name)}
    if whole:
        return name  # the network may find it where our directory does not
    if len(found) > 1:
        raise LumarisError("usage", f"{len(found)} peers end with {name}; write more of it.")
    if not found:
        raise LumarisError(
            "not_found",
            f"No peer is known whose id ends with {name}.",
            hint="`lumaris offers` lists sellers; a whole peer id can be anybody's.",
        )
    return found.pop()


def _is_peer_id(text: str) -> bool:
    try:
        public_key_of(text)
    except ValueError:
        return False
    return True


def _ms(seconds: float) -> float:
    return round(seconds * 1000, 3)


def _seconds(offsets: list[float]) -> float:
    return round(statistics.median(offsets), 3) + 0.0  # never "-0.0"
