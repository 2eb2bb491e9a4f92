"""The peers a host knows for the DHT: at most twenty at each distance, the oldest first."""

from __future__ import annotations

import heapq
import random

from lumaris_overlay.libp2p.dht_wire import Named, place_of

_BUCKET_SIZE = 20  # Kademlia's k, as in libp2p
# A full bucket keeps its old members, which are likeliest to stay; unless not heard of this long.
_STALE_S = 3600.0


class RoutingTable:
    """Peers by distance from us. Time is an argument: any clock that does not go back."""

    def __init__(self, me: str) -> None:
        self._me = place_of(me)
        self._buckets: dict[int, dict[str, tuple[float, Named]]] = {}

    def __len__(self) -> int:
        return sum(len(bucket) for bucket in self._buckets.values())

    def __contains__(self, peer: str) -> bool:
        return peer in self._buckets.get(self._distance_bits(peer), {})

    def seen(self, peer: str, addresses: tuple[str, ...], now: float) -> bool:
        """Note that a peer is alive; whether it is in the table now."""
        bits = self._distance_bits(peer)
        if not bits:
            return False  # ourselves
        bucket = self._buckets.setdefault(bits, {})
        held = bucket.pop(peer, None)
        if held is None and len(bucket) >= _BUCKET_SIZE:
            oldest = next(iter(bucket))
            if now - bucket[oldest][0] < _STALE_S:
                return False
            del bucket[oldest]
        if not addresses and held is not None:
            addresses = held[1].addresses
        bucket[peer] = (now, Named(peer, addresses))
        return True

    def addresses_of(self, peer: str) -> tuple[str, ...]:
        """Where a peer was when it was last seen."""
        held = self._buckets.get(self._distance_bits(peer), {}).get(peer)
        return () if held is None else held[1].addresses

    def drop(self, peer: str) -> None:
        """Forget a peer that does not answer."""
        self._buckets.get(self._distance_bits(peer), {}).pop(peer, None)

    def closest(self, place: int, count: int) -> list[Named]:
        """The `count` peers nearest to a place, nearest first."""
        return heapq.nsmallest(count, self._all(), key=lambda n: place_of(n.peer) ^ place)

    def starts(self, place: int, count: int, rng: random.Random) -> list[Named]:
        """Where a look-up begins: half nearest to the place, half anywhere.

        Those nearest could all be of one hand that chose its keys near the place.
        """
        near = self.closest(place, count // 2)
        rest = sorted(set(self._all()) - set(near), key=lambda named: named.peer)
        return near + rng.sample(rest, min(count - len(near), len(rest)))

    def _all(self) -> list[Named]:
        return [named for bucket in self._buckets.values() for _, named in bucket.values()]

    def _distance_bits(self, peer: str) -> int:
        return (self._me ^ place_of(peer)).bit_length()
