"""The buyer's overlay process, for its user: start it, look at it, end it.

Commands and programs share one process for each state folder. It starts by itself when needed, so
none of this is a must; `up` only makes the next command quick.
"""

from __future__ import annotations

import ipaddress
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import trio

from lumaris import membership
from lumaris.coordinator import open_link
from lumaris.profile import Profile
from lumaris_overlay import process_file
from lumaris_overlay.ports import Overlay, Reachability
from lumaris_overlay.private_files import load_or_create_key
from lumaris_overlay.socket import open_socket_overlay
from lumaris_overlay.supervisor import SOCKET_NAME, attach_or_spawn, end_shared, identify
from lumaris_protocol.errors import LumarisError

# The directory is told at once, one advert after the other; then there is silence.
_QUIET_S, _ADVERTS_S = 0.25, 3.0


@asynccontextmanager
async def attached(profile: Profile) -> AsyncIterator[Overlay]:
    """The buyer's overlay process, started when there is none. Raises LumarisError."""
    key = load_or_create_key(profile.key_file)
    link = open_link(profile)
    try:
        standing = await membership.enter(link, key, profile)
        async with attach_or_spawn(membership.overlay_config(profile, standing)) as overlay:
            await membership.present(overlay, link, key, profile, standing)
            yield overlay
    finally:
        with trio.CancelScope(shield=True):
            await link.aclose()


@asynccontextmanager
async def running(folder: Path, *, starts: str = "lumaris daemon up") -> AsyncIterator[Overlay]:
    """The process of an overlay folder, which must run; `starts` is the command that starts it.

    Raises LumarisError `not_running` or `overlay_failed`.
    """
    facts = process_file.holder(folder)
    if facts is None:
        raise LumarisError(
            "not_running",
            f"No overlay process runs for {folder.parent}.",
            hint=f"`{starts}` starts it.",
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
    sellers = await sellers_of(overlay)
    return {
        "status": f"Running: {count_of(reach.peers, 'peer')}, {count_of(len(sellers), 'advert')}."
        f" {sentence(reach)}",
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
    if not reach.peers:
        return "No peer is connected."
    if reach.verdict == "public":
        asked = count_of(len(reach.confirmed_by), "peer")
        if not any(_is_public(address) for address in reach.addresses):
            return f"Reachable from this network: {asked} got through. Not tried from outside it."
        return f"Reachable: {asked} dialled this machine and got through."
    if reach.verdict == "private" and reach.relays:
        return f"Behind a NAT or firewall; reached through {count_of(len(reach.relays), 'relay')}."
    if reach.verdict == "private":
        return "Behind a NAT or firewall; others cannot reach this machine."
    return "Whether others can reach this machine is not known yet."


def count_of(number: int, noun: str) -> str:
    """A number of things, in words."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _is_public(address: str) -> bool:
    try:
        return ipaddress.ip_address(address.split("/")[2]).is_global
    except (ValueError, IndexError):
        return False


async def sellers_of(overlay: Overlay) -> set[str]:
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
