"""Who may begin a handshake. One costs us milliseconds, and a stranger's key is free.

Each beginning takes from the allowance of the network that it comes from, before a byte is read;
whoever turns out to be a member gives it back. A network with a member of ours in it has a larger
allowance, so that members behind one NAT with a hostile neighbour still come in. Networks are cheap
for some: all the others of one site share an allowance, and all sites together another, of which a
part is kept for the parts of the internet that nobody came from lately.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import trio

from lumaris_overlay.networks import network_of
from lumaris_overlay.validate import TokenBuckets
from lumaris_protocol import limits

_NETWORKS_MAX = 4_096
# Looking through our connections costs some milliseconds when there are hundreds.
_LOOK_S = 1.0
_EVERYBODY = ""
# An owner has one of these (IPv4, IPv6), each full of networks; and the next larger block.
_SITE_BITS = (24, 48)
_BLOCK_BITS = (16, 32)
_BLOCK_SEEN_S = 60.0


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
        self._sites = TokenBuckets(
            per_s=limits.NEWCOMERS_PER_S_PER_SITE,
            burst=limits.NEWCOMERS_BURST_PER_SITE,
            names_max=_NETWORKS_MAX,
        )
        kept_per_s, kept = limits.NEWCOMERS_RESERVED_PER_S, limits.NEWCOMERS_RESERVED_BURST
        self._all = TokenBuckets(
            per_s=limits.NEWCOMERS_PER_S - kept_per_s,
            burst=limits.NEWCOMERS_BURST - kept,
            names_max=1,
        )
        self._kept = TokenBuckets(per_s=kept_per_s, burst=kept, names_max=1)
        self._blocks = TokenBuckets(per_s=1 / _BLOCK_SEEN_S, burst=1, names_max=_NETWORKS_MAX)
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
            taken = (
                (self._few, network),
                (self._sites, network_of(ip, _SITE_BITS)),
                (self._shared(ip, now), _EVERYBODY),
            )
        for number, (buckets, name) in enumerate(taken):
            if not buckets.take(name, now):
                _give_back(taken[:number], now)
                self.refused += 1
                return None
        return Beginning(taken, self._returns)

    def _shared(self, ip: str, now: float) -> TokenBuckets:
        """The allowance of all together: the kept part where that is used up and this is news."""
        # Refused ones count as seen too, or a flood would be news again and again.
        if not self._blocks.take(network_of(ip, _BLOCK_BITS), now):
            return self._all
        if not self._all.take(_EVERYBODY, now):
            return self._kept
        _give_back(((self._all, _EVERYBODY),), now)
        return self._all

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
