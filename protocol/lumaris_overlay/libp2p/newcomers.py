"""Who may begin a handshake. One costs us milliseconds, and a stranger's key is free.

Each beginning takes from the allowance of the network that it comes from, before a byte is read;
whoever turns out to be a member gives it back. A network with a member of ours in it has a larger
allowance, so that members behind one NAT with a hostile neighbour still come in; all the others
together have one more, since networks are cheap for some.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Callable, Iterable

import trio

from lumaris_overlay.validate import TokenBuckets
from lumaris_protocol import limits

_NETWORKS_MAX = 4_096
# Looking through our connections costs some milliseconds when there are hundreds.
_LOOK_S = 1.0
_EVERYBODY = ""
_IPV6_NETWORK_BITS = 64


def network_of(ip: str) -> str:
    """The network that one customer has: an IPv4 address, or the /64 of an IPv6 address."""
    try:
        address = ipaddress.ip_address(ip.partition("%")[0])
    except ValueError:
        return ip
    if isinstance(address, ipaddress.IPv4Address):
        return str(address)
    if address.ipv4_mapped is not None:
        return str(address.ipv4_mapped)
    return str(ipaddress.ip_network((int(address), _IPV6_NETWORK_BITS), strict=False))


class Newcomers:
    """Counts beginnings by network. `member_ips` gives the addresses of the connected members."""

    def __init__(self, member_ips: Callable[[], Iterable[str]] = tuple) -> None:
        self._member_ips = member_ips
        per_s, burst = limits.NEWCOMERS_PER_S_PER_IP, limits.NEWCOMERS_BURST_PER_IP
        more = limits.NEWCOMERS_MEMBER_FACTOR
        self._few = TokenBuckets(per_s=per_s, burst=burst, names_max=_NETWORKS_MAX)
        self._many = TokenBuckets(
            per_s=more * per_s, burst=more * burst, names_max=limits.OVERLAY_CONNECTIONS_MAX
        )
        self._all = TokenBuckets(
            per_s=limits.NEWCOMERS_PER_S, burst=limits.NEWCOMERS_BURST, names_max=1
        )
        self._returns = TokenBuckets(
            per_s=limits.RETURNS_PER_S_PER_PEER,
            burst=limits.RETURNS_BURST_PER_PEER,
            names_max=limits.OVERLAY_CONNECTIONS_MAX,
        )
        self._known: frozenset[str] = frozenset()
        self._looked_at = -_LOOK_S
        self.refused = 0

    def admit(self, ip: str) -> Beginning | None:
        """The beginning of a handshake; None when this network has had enough of them."""
        network, now = network_of(ip), trio.current_time()
        taken: tuple[tuple[TokenBuckets, str], ...]
        if self._has_member(network, now):
            taken = ((self._many, network),)
        else:
            taken = ((self._few, network), (self._all, _EVERYBODY))
        for number, (buckets, name) in enumerate(taken):
            if not buckets.take(name, now):
                _give_back(taken[:number], now)
                self.refused += 1
                return None
        return Beginning(taken, self._returns)

    def _has_member(self, network: str, now: float) -> bool:
        if now - self._looked_at >= _LOOK_S:
            self._looked_at = now
            self._known = frozenset(network_of(ip) for ip in self._member_ips())
        return network in self._known


class Beginning:
    """One handshake that was let begin."""

    def __init__(self, taken: tuple[tuple[TokenBuckets, str], ...], returns: TokenBuckets) -> None:
        self._taken, self._returns = taken, returns

    def was_member(self, peer: str) -> None:
        """It cost its network nothing, unless this member comes again and again."""
        now = trio.current_time()
        if self._returns.take(peer, now):
            _give_back(self._taken, now)
            self._taken = ()


def _give_back(taken: tuple[tuple[TokenBuckets, str], ...], now: float) -> None:
    for buckets, name in taken:
        buckets.take(name, now, -1)
