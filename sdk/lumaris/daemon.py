"""The buyer's overlay process, for its user: start it, look at it, end it, try the network with it.

Commands and programs share one process for each state folder. It starts by itself when needed, so
none of this is a must; `up` only makes the next command quick.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any, Final

import trio

from lumaris import membership
from lumaris.coordinator import CoordinatorLink
from lumaris.profile import Profile
from lumaris_overlay import process_file
from lumaris_overlay.ports import Overlay, Ping, Reachability
from lumaris_overlay.private_files import load_or_create_key
from lumaris_overlay.socket import open_socket_overlay
from lumaris_overlay.supervisor import SOCKET_NAME, attach_or_spawn, end_shared, identify
from lumaris_protocol.errors import LumarisError, RemoteError
from lumaris_protocol.keys import public_key_of
from lumaris_protocol.limits import CLOCK_SKEW_S

# The directory is told at once, one advert after the other; then there is silence.
_QUIET_S, _ADVERTS_S = 0.25, 3.0
# A process that has just started needs moments to find its peers and to be dialled back by them.
_SETTLE_S = 6.0
_POLL_S = 0.1
_CLOCK_PEERS_MAX = 5
_PING_SPACING_S = 0.3
# Twice as good as what makes others refuse our documents: time to say something.
_CLOCK_WARN_S = CLOCK_SKEW_S / 2
_SUFFIX_CHARS_MIN: Final = 6


@asynccontextmanager
async def attached(profile: Profile) -> AsyncIterator[Overlay]:
    """The buyer's overlay process, started when there is none. Raises LumarisError."""
    key = load_or_create_key(profile.key_file)
    link = CoordinatorLink(profile.coordinator)
    cache = profile.state / membership.CACHE_NAME
    try:
        standing = await membership.join(link, key, cache, url=profile.coordinator)
        standing = await membership.refresh_bootstrap(link, cache, standing)
    finally:
        with trio.CancelScope(shield=True):
            await link.aclose()
    async with attach_or_spawn(membership.overlay_config(profile, standing)) as overlay:
        await overlay.present(standing.certificate)
        yield overlay


@asynccontextmanager
async def running(folder: Path) -> AsyncIterator[Overlay]:
    """The process of an overlay folder, which must run. Raises LumarisError `not_running`."""
    facts = process_file.holder(folder)
    if facts is None:
        raise LumarisError(
            "not_running",
            f"No overlay process runs for {folder.parent}.",
            hint="`lumaris daemon up` starts it, and so does every command that needs it.",
        )
    if await identify(folder / SOCKET_NAME) is None:
        raise LumarisError(
            "overlay_failed",
            f"The overlay process {facts.pid} runs but does not answer.",
            hint="`lumaris daemon down` ends it.",
        )
    async with open_socket_overlay(folder / SOCKET_NAME) as overlay:
        yield overlay


async def up(profile: Profile) -> dict[str, Any]:
    """Start the process unless it runs; its status, and whether it was `started`."""
    before = process_file.holder(profile.overlay)
    async with attached(profile) as overlay:
        found = await describe(overlay, profile.overlay)
    return {"started": before is None or before.pid != found["pid"], **found}


async def status(folder: Path) -> dict[str, Any]:
    """What the running process does. Raises LumarisError `not_running` or `overlay_failed`."""
    async with running(folder) as overlay:
        return await describe(overlay, folder)


async def down(folder: Path) -> dict[str, Any]:
    """End the process; that none runs is no failure. Raises LumarisError `timeout`."""
    ended = await end_shared(folder)
    return {
        "stopped": ended is not None,
        "pid": ended.pid if ended is not None else None,
        "started_again": ended is not None and process_file.holder(folder) is not None,
        "state": str(folder.parent),
    }


async def describe(overlay: Overlay, folder: Path) -> dict[str, Any]:
    """The process and what it knows, the sentence first."""
    facts = process_file.holder(folder)
    if facts is None:
        raise LumarisError("not_running", "The overlay process has just ended.")
    reach = await overlay.reachability()
    sellers = await _sellers(overlay)
    return {
        "status": f"Running: {reach.peers} peers, {len(sellers)} adverts. {sentence(reach)}",
        "pid": facts.pid,
        "uptime_s": max(0, int(time.time()) - facts.started_at),
        "memory_bytes": process_file.resident_bytes(facts.pid),
        "memory_bytes_max": facts.memory_bytes_max,
        "peer": overlay.peer_id,
        "network": facts.network,
        "peers": reach.peers,
        "adverts": len(sellers),
        "reachability": reach.verdict,
        "addresses": list(reach.addresses),
        "linger_s": facts.linger_s,
        "socket": str(folder / SOCKET_NAME),
    }


def sentence(reach: Reachability) -> str:
    """Who can reach us, in words."""
    if reach.verdict == "public":
        return f"Reachable: {len(reach.confirmed_by)} peers dialled this machine and got through."
    if reach.verdict == "private" and reach.relays:
        return f"Behind a NAT or firewall; reachable through {len(reach.relays)} relays."
    if reach.verdict == "private":
        return "Behind a NAT or firewall; others cannot reach this machine."
    return "Whether others can reach this machine is not known yet."


# --- trying the network ---

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
    offset_s = round(statistics.median(offsets), 3) if offsets else None
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
        "clock_offset_s": round(statistics.median(r.clock_offset_s for r in replies), 3),
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
    found: set[str] = set()
    if whole or len(name) >= _SUFFIX_CHARS_MIN:
        with trio.move_on_after(_SETTLE_S):
            while not found:
                known = {*await _sellers(overlay), *(info.peer for info in await overlay.peers())}
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


async def _sellers(overlay: Overlay) -> set[str]:
    """Whose adverts the process holds."""
    sellers: set[str] = set()
    with trio.move_on_after(_ADVERTS_S):
        async with overlay.adverts() as events:
            while True:
                with trio.move_on_after(_QUIET_S) as quiet:
                    event = await events.receive()
                if quiet.cancelled_caught:
                    break
                if event.envelope is not None:
                    sellers.add(event.seller)
                else:
                    sellers.discard(event.seller)
    return sellers


def _ms(seconds: float) -> float:
    return round(seconds * 1000, 3)
