"""Peers on the local network by multicast DNS (libp2p's own form), where the owner wants it.

Each host tells the addresses that its neighbours can dial and listens for theirs. Names are of one
network of ours (`_p2p-<hash>._udp.local.`), so other libp2p programs nearby are not bothered. What
is heard is only a hint: whoever answers there proves its key and shows its certificate.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import secrets
from collections.abc import Callable
from functools import partial
from typing import Any

import trio
from zeroconf import ServiceBrowser, ServiceInfo, ServiceListener, Zeroconf

from lumaris_overlay.libp2p.addresses import endpoint_of, scope_of
from lumaris_overlay.tasks import shielded
from lumaris_protocol.limits import ADDRESS_CHARS_MAX, ADDRESSES_MAX

logger = logging.getLogger(__name__)

_HEARD_MAX = 256  # peers of one local network, in the channel between zeroconf's thread and ours
_LOOKUP_MS = 2_000
_STOP_S = 3.0
_KEY = b"dnsaddr"


def service_type(network: str) -> str:
    """The DNS service type of one network of ours; at most 15 characters are allowed."""
    tag = hashlib.sha256(network.encode()).hexdigest()[:8]
    return f"_p2p-{tag}._udp.local."


def tellable(addresses: list[str]) -> list[str]:
    """The addresses that a neighbour may dial: direct ones, each with its peer id."""
    out = []
    for address in addresses:
        found = endpoint_of(address)
        if found is not None and "/p2p/" in address and scope_of(found[0]) != "any":
            out.append(address)
    return out[:ADDRESSES_MAX]


class _Heard(ServiceListener):
    """Called in zeroconf's thread for each service; looks it up there and passes it on."""

    def __init__(self, own: str, tell: Callable[[list[str]], None]) -> None:
        self._own, self._tell = own, tell

    def add_service(self, zc: Zeroconf, type_: str, name: str) -> None:
        """A peer has appeared."""
        if name == self._own:
            return
        info = zc.get_service_info(type_, name, _LOOKUP_MS)
        if info is not None:
            self._tell(addresses_in(info.properties))

    def update_service(self, zc: Zeroconf, type_: str, name: str) -> None:
        """A peer has moved."""
        self.add_service(zc, type_, name)

    def remove_service(self, zc: Zeroconf, type_: str, name: str) -> None:
        """A peer has left: its connection says so better."""


def addresses_in(properties: dict[bytes, bytes | None]) -> list[str]:
    """The addresses of a peer's TXT record, bounded and checked as any stranger's word."""
    found = []
    for key, value in list(properties.items())[: 2 * ADDRESSES_MAX]:
        if key.startswith(_KEY) and value and len(value) <= ADDRESS_CHARS_MAX:
            with contextlib.suppress(UnicodeDecodeError):
                found.append(value.decode("ascii"))
    return tellable(found)


async def run_mdns(
    network: str,
    interface_ips: list[str],
    addresses: list[str],
    heard: Callable[[list[str]], Any],
) -> None:
    """Tell and listen until cancelled. `heard` gets one peer's addresses and returns at once.

    A machine without multicast is logged and left alone.
    """
    told = tellable(addresses)
    if not told:
        return
    kind = service_type(network)
    name = f"{secrets.token_hex(16)}.{kind}"
    ports = [found[1] for found in map(endpoint_of, told) if found is not None]
    keys = [_KEY, *(_KEY + str(n).encode() for n in range(2, len(told) + 1))]
    info = ServiceInfo(
        kind,
        name,
        port=ports[0],
        properties=dict(zip(keys, (each.encode() for each in told), strict=True)),
        server=f"{secrets.token_hex(8)}.local.",
        parsed_addresses=interface_ips,
    )
    token = trio.lowlevel.current_trio_token()
    out, into = trio.open_memory_channel[list[str]](_HEARD_MAX)

    def tell(found: list[str]) -> None:
        def put() -> None:
            with contextlib.suppress(trio.WouldBlock, trio.BrokenResourceError):
                out.send_nowait(found)

        with contextlib.suppress(trio.RunFinishedError):
            token.run_sync_soon(put)

    try:
        zeroconf = await trio.to_thread.run_sync(_open, interface_ips, info)
    except OSError as error:
        logger.warning("mdns event=unavailable error=%s", error)
        return
    try:
        browser = await trio.to_thread.run_sync(
            partial(ServiceBrowser, zeroconf, kind, listener=_Heard(name, tell))
        )
        try:
            async for found in into:
                if found:
                    heard(found)
        finally:
            with shielded(_STOP_S):
                await trio.to_thread.run_sync(browser.cancel, abandon_on_cancel=True)
    finally:
        out.close()
        into.close()
        with shielded(_STOP_S):
            await trio.to_thread.run_sync(_close, zeroconf, abandon_on_cancel=True)


def _open(interface_ips: list[str], info: ServiceInfo) -> Zeroconf:
    zeroconf = Zeroconf(interfaces=interface_ips)
    try:
        zeroconf.register_service(info, cooperating_responders=True)
    except Exception:
        zeroconf.close()
        raise
    return zeroconf


def _close(zeroconf: Zeroconf) -> None:
    zeroconf.unregister_all_services()
    zeroconf.close()
