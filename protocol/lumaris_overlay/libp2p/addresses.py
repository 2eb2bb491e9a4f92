"""What an address is, and which addresses a host tells others. Pure functions over texts."""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence
from typing import Literal

from lumaris_overlay.ports import Verdict
from lumaris_protocol.errors import LumarisError
from lumaris_protocol.limits import ADDRESS_CHARS_MAX, ADDRESSES_MAX

Scope = Literal["any", "loopback", "private", "public"]

CIRCUIT = "/p2p-circuit"
# Where no stranger can dial us: RFC 1918, RFC 3927, RFC 4193, RFC 4291 and carrier NAT, RFC 6598.
# `ipaddress.is_private` also counts the documentation networks, which test beds use as public.
_PRIVATE = tuple(
    ipaddress.ip_network(text)
    for text in (
        "10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "169.254.0.0/16", "100.64.0.0/10",
        "fc00::/7", "fe80::/10",
    )
)  # fmt: skip
# Peers of one provider's network see the same path to us; half an address tells them apart.
_SUBNET_BITS = {4: 16, 6: 32}


def scope_of(ip: str) -> Scope:
    """Who can reach an IP. Raises ValueError when it is not one."""
    found = _ip(ip)
    if found.is_unspecified:
        return "any"
    if found.is_loopback:
        return "loopback"
    return "private" if any(found in network for network in _PRIVATE) else "public"


def subnet_of(ip: str) -> str:
    """The network that an IP's neighbours share with it. Raises ValueError when it is no IP."""
    found = _ip(ip)
    bits = _SUBNET_BITS[found.version]
    return str(ipaddress.ip_network(f"{found}/{bits}", strict=False))


def same_ip(one: str, other: str) -> bool:
    """Whether two texts name one IP. False when either names none."""
    try:
        return _ip(one) == _ip(other)
    except ValueError:
        return False


def endpoint_of(address: str) -> tuple[str, int] | None:
    """IP and TCP port of a direct address `/ip4/…/tcp/…[/p2p/…]`; None for any other."""
    parts = address.split("/")
    if len(parts) not in (5, 7) or parts[0] or parts[3] != "tcp":
        return None
    if parts[1] not in ("ip4", "ip6") or (len(parts) == 7 and parts[5] != "p2p"):
        return None
    try:
        version = ipaddress.ip_address(parts[2]).version
    except ValueError:
        return None
    if f"ip{version}" != parts[1] or not parts[4].isdecimal() or not parts[4].isascii():
        return None
    port = int(parts[4])
    return (parts[2], port) if 0 < port <= 65_535 else None


def address_of(ip: str, port: int) -> str:
    """The address of an IP and a TCP port. Raises ValueError when it is no IP."""
    found = _ip(ip)
    return f"/ip{found.version}/{found}/tcp/{port}"


def split_circuit(address: str) -> tuple[str, str] | None:
    """The relay's address (with its peer id) and the peer behind it; None when it is no circuit."""
    relay, found, target = address.partition(f"{CIRCUIT}/p2p/")
    if not found or not target or "/" in target or "/p2p/" not in relay or CIRCUIT in relay:
        return None
    return relay, target


def checked_announce(configured: Sequence[str]) -> tuple[str, ...]:
    """The addresses that an owner wants told. Raises LumarisError `config_invalid`."""
    for address in configured:
        found = endpoint_of(address)
        if found is None or "/p2p/" in address or scope_of(found[0]) == "any":
            raise LumarisError(
                "config_invalid", f"announce: {address!r} is not /ip4/IP/tcp/PORT with one IP."
            )
    if len(configured) > ADDRESSES_MAX:
        raise LumarisError("config_invalid", f"announce: more than {ADDRESSES_MAX} addresses.")
    return tuple(configured)


def announced(
    *,
    listening: Sequence[str],
    configured: Sequence[str] = (),
    own_ips: Sequence[str] = (),
    observed: Sequence[str] = (),
    confirmed: Sequence[str] = (),
    circuits: Sequence[str] = (),
    verdict: Verdict = "unknown",
) -> tuple[str, ...]:
    """What others are told, best first; without the peer id at the end.

    `own_ips` stand in for a wildcard that we listen on. Addresses that only our own network can
    dial are told as long as nobody has seen us at a public one: beyond it they lead nowhere, or
    to somebody else.
    """
    outside = any(
        scope_of(found[0]) == "public" for found in map(endpoint_of, observed) if found is not None
    )
    told = dict.fromkeys(configured)
    for address in listening:
        found = endpoint_of(address)
        if found is None:
            continue
        ip, port = found
        wild = scope_of(ip) == "any"
        own = [o for o in own_ips if ipaddress.ip_address(o).version == _ip(ip).version]
        for each in own if wild else [ip]:
            scope = scope_of(each)
            if scope != "any" and (verdict != "private" if scope == "public" else not outside):
                told[address_of(each, port)] = None
    told |= dict.fromkeys(confirmed)
    if verdict == "private":
        told |= dict.fromkeys(circuits)
    return tuple(each for each in told if len(each) <= ADDRESS_CHARS_MAX)[:ADDRESSES_MAX]


def _ip(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    found = ipaddress.ip_address(text)
    # A socket for both families shows IPv4 peers as ::ffff:a.b.c.d.
    mapped = found.ipv4_mapped if isinstance(found, ipaddress.IPv6Address) else None
    return mapped or found
