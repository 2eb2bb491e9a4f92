"""What an address is, which a host tells others, and which it dials at a stranger's word.

Pure: texts, and time as an argument.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Collection, Iterable, Sequence
from typing import Literal

from lumaris_overlay.networks import network_of
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
_THIS_NETWORK = ipaddress.ip_network("0.0.0.0/8")
# Peers of one provider's network see the same path to us; half an address tells them apart.
_SUBNET_BITS = (16, 32)
# What one stranger's word may cost a third party: two connections, and each port one a minute.
DIALS_MAX = 2
_DIAL_AGAIN_S = 60.0
_PACED_MAX = 4_096


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
    return network_of(str(_ip(ip)), _SUBNET_BITS)


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


def on_one_ip(addresses: Iterable[str]) -> bool:
    """Whether all are circuits or direct TCP addresses, and the direct ones have one IP."""
    ips = set()
    for address in addresses:
        found = endpoint_of(address)
        if found is not None:
            ips.add(_ip(found[0]))
        elif split_circuit(address) is None:
            return False
    return len(ips) <= 1


def dialable(
    named: Iterable[str], *, own: Iterable[str], relays: Collection[str] = ()
) -> tuple[str, ...]:
    """Which of the addresses that a stranger named we dial.

    At most two direct ones, on one IP, and circuits through `relays`, to which we are connected.
    `own` is what we announce: only who announces no public address dials inside its own network.
    """
    scopes = _scopes_dialled(own)
    direct: dict[str, None] = {}
    circuits: dict[str, None] = {}
    ip = None
    for address in named:
        found = endpoint_of(address)
        if found is not None:
            if _is_host(found[0], scopes) and (ip is None or same_ip(ip, found[0])):
                ip = found[0]
                direct[address] = None
            continue
        parts = split_circuit(address)
        relay = parts[0].rpartition("/")[2] if parts is not None else ""
        if parts is not None and relay in relays:
            # Without the relay's address: if it leaves meanwhile, nobody is dialled there.
            circuits[f"/p2p/{relay}{CIRCUIT}/p2p/{parts[1]}"] = None
    return (*list(direct)[:DIALS_MAX], *circuits)


class DialPace:
    """One dial a minute to an IP and port that strangers named, whoever they say is there."""

    def __init__(self) -> None:
        self._dialled: dict[tuple[str, int], float] = {}

    def admit(self, named: Iterable[str], now: float) -> tuple[str, ...]:
        """Those that may be dialled now; `now` is any clock that does not go back."""
        return tuple(address for address in named if self._admits(address, now))

    def answered(self, named: Sequence[str]) -> None:
        """The peer answered at one of these: it is no third party where there was but one."""
        found = {each for each in map(endpoint_of, named) if each is not None}
        if len(found) == 1:
            self._dialled.pop(found.pop(), None)

    def _admits(self, address: str, now: float) -> bool:
        found = endpoint_of(address)
        if found is None:
            return True
        then = self._dialled.get(found)
        if then is not None and now - then < _DIAL_AGAIN_S:
            return False
        self._dialled.pop(found, None)
        while len(self._dialled) >= _PACED_MAX:
            del self._dialled[next(iter(self._dialled))]
        self._dialled[found] = now
        return True


def _scopes_dialled(own: Iterable[str]) -> set[Scope]:
    # An own circuit ends in "/p2p-circuit"; what counts is where its relay is.
    found = [endpoint_of(address.partition(CIRCUIT)[0]) for address in own]
    scopes: set[Scope] = {scope_of(each[0]) for each in found if each is not None}
    return {"public"} if "public" in scopes else {"public", *scopes}


def _is_host(ip: str, scopes: Collection[Scope]) -> bool:
    scope, found = scope_of(ip), _ip(ip)
    if scope != "public":
        return scope in scopes
    return not (found.is_multicast or found.is_reserved or found in _THIS_NETWORK)


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
