"""Which sellers a newcomer is told of: no one party should be all that it meets first."""

from __future__ import annotations

import json
from collections.abc import Iterable
from ipaddress import ip_address
from typing import Final

from lumaris_coordinator.bounds import BOOTSTRAP_ADDRESSES_MAX, BOOTSTRAP_ADDRESSES_PER_PEER
from lumaris_overlay.networks import is_public, network_of

# What one party has cheaply: a host's IPv4 network, and what a provider assigns of IPv6.
_NETWORK: Final = (24, 48)


def choose(bonded: Iterable[str], others: Iterable[str]) -> list[str]:
    """Addresses out of sellers' lists (JSON), in the order given: those with a bond first, one
    seller of each network.

    Where any is public, those inside of somebody's own network are left out; in a market that has
    no public ones at all, they are what there is.
    """
    found = [json.loads(text) for text in dict.fromkeys((*bonded, *others))]
    public = [[one for one in each if _is_open(one)] for each in found]
    if any(public):
        found = public
    seen: set[str] = set()
    chosen: list[str] = []
    for addresses in found:
        networks = {_place(address) for address in addresses} - {""}
        if networks & seen:
            continue
        seen |= networks
        chosen += addresses[:BOOTSTRAP_ADDRESSES_PER_PEER]
    return list(dict.fromkeys(chosen))[:BOOTSTRAP_ADDRESSES_MAX]


def _host(address: str) -> tuple[str, str]:
    """The kind and the host that an address (`/ip4/…/tcp/…`) begins with."""
    _, _, rest = address.partition("/")
    kind, _, rest = rest.partition("/")
    return kind, rest.partition("/")[0]


def _is_open(address: str) -> bool:
    kind, host = _host(address)
    return is_public(host) if kind in ("ip4", "ip6") else kind.startswith("dns")


def _place(address: str) -> str:
    """The network or the domain that an address is in; "" for this machine, where all may be."""
    kind, host = _host(address)
    try:
        if ip_address(host).is_loopback:
            return ""
    except ValueError:
        return ".".join(host.lower().rsplit(".", 2)[-2:]) if kind.startswith("dns") else address
    return network_of(host, _NETWORK)
