"""Which shard of the gossip a seller's adverts are in, and which ones a buyer must follow.

A shard is a set of regions and resource classes. A map is good when every pair of a region and a
class, also of regions nobody has thought of, belongs to exactly one shard; `check` holds it to
that, and then `shard_of` always has an answer. Pure: time is an argument.

A new map moves sellers between topics while not everybody has it yet, so for one refresh period a
seller is found where either map puts it (`ShardPlan`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass
from functools import cached_property
from typing import Final

from lumaris_protocol import codec
from lumaris_protocol.codec import Signed
from lumaris_protocol.errors import EnvelopeError
from lumaris_protocol.limits import ADVERT_REFRESH_S, SHARD_MAP_LIFETIME_S_MAX
from lumaris_protocol.messages.advert import Advert, Resources
from lumaris_protocol.messages.negotiation import Requirements
from lumaris_protocol.messages.shard_map import ResourceClass, Shard, ShardMap

CLASSES: Final[tuple[ResourceClass, ...]] = ("cpu", "gpu")
# Everybody hears of a seller within one refresh; jitter and clocks add a little.
OVERLAP_S: Final = 1.25 * ADVERT_REFRESH_S


def default_map(network: str) -> ShardMap:
    """The undivided market: one shard, older than every signed map."""
    shard = Shard(id=0, classes=CLASSES)
    return ShardMap(network=network, version=0, shards=(shard,), issued_at=0, expires_at=0)


def class_of(resources: Resources) -> ResourceClass:
    """The class that these resources are traded in."""
    return "gpu" if resources.gpus else "cpu"


def check(found: ShardMap) -> None:
    """Raises EnvelopeError `map_invalid` unless each region and class has exactly one shard."""
    ids = Counter(shard.id for shard in found.shards)
    if max(ids.values()) > 1:
        raise EnvelopeError("map_invalid", "A shard id stands twice.")
    covered = Counter(
        (region, kind)
        for shard in found.shards
        for region in shard.regions or ("",)  # "" is no region's name: the catch-all
        for kind in shard.classes
    )
    for (region, kind), times in covered.items():
        if times > 1:
            raise EnvelopeError(
                "map_invalid", f"{region or 'The rest'} ({kind}) is in {times} shards."
            )
    for kind in CLASSES:
        if ("", kind) not in covered:
            raise EnvelopeError(
                "map_invalid", f"No shard takes the regions that none names ({kind})."
            )


def open_map(
    data: bytes, known: ShardMap, *, network: str, signers: Collection[str], now: float
) -> Signed[ShardMap]:
    """A newer map than `known`, or the same one signed again.

    Raises EnvelopeError: `map_stale` for an older or altered one, `map_invalid` for one that does
    not cover the market, `not_certified` for an unknown signer, or what else is wrong with it.
    """
    signed = open_kept(data, network=network, signers=signers)
    found = signed.message
    codec.check_times(
        issued_at=found.issued_at, expires_at=found.expires_at, now=now, what="shard map"
    )
    if found.expires_at - found.issued_at > SHARD_MAP_LIFETIME_S_MAX:
        raise EnvelopeError("malformed", "The shard map lives longer than it may.")
    if found.version < known.version or (
        found.version == known.version and found.shards != known.shards
    ):
        raise EnvelopeError(
            "map_stale", f"Version {found.version}, where {known.version} is known."
        )
    return signed


def open_kept(data: bytes, *, network: str, signers: Collection[str]) -> Signed[ShardMap]:
    """A map that was accepted before, whatever the time is now. Raises EnvelopeError."""
    signed = codec.open_signed(data, ShardMap, network=network)
    if signed.signer not in signers:
        raise EnvelopeError("not_certified", "The shard map is from an unknown coordinator.")
    if signed.message.network != network:
        raise EnvelopeError("wrong_domain", "The shard map is of another network.")
    check(signed.message)
    return signed


def places(found: ShardMap) -> dict[tuple[str, ResourceClass], int]:
    """The shard of each named region and class, and of the rest under the region ""."""
    return {
        (region, kind): shard.id
        for shard in found.shards
        for region in shard.regions or ("",)
        for kind in shard.classes
    }


def shard_of(found: ShardMap, region: str, kind: ResourceClass) -> int:
    """The one shard of sellers of this class there. The map has been checked."""
    return _look_up(places(found), region, kind)


def shards_for(found: ShardMap, needs: Requirements) -> tuple[int, ...]:
    """The shards whose sellers may fit, the likely ones first.

    A seller with GPUs can also do without them, so its shard comes after the plain ones.
    """
    kinds: tuple[ResourceClass, ...] = ("gpu",) if needs.resources.gpus else CLASSES
    if needs.regions:
        chosen = [shard_of(found, region, kind) for kind in kinds for region in needs.regions]
    else:
        chosen = [shard.id for kind in kinds for shard in found.shards if kind in shard.classes]
    return tuple(dict.fromkeys(chosen))


def _look_up(found: dict[tuple[str, ResourceClass], int], region: str, kind: ResourceClass) -> int:
    number = found.get((region, kind))
    return found["", kind] if number is None else number


@dataclass(frozen=True)
class ShardPlan:
    """The map in force, and for a while the one before it."""

    current: ShardMap
    previous: ShardMap | None = None
    overlap_until: float = 0.0

    def next(self, newer: ShardMap, now: float) -> ShardPlan:
        """The plan once `newer` is known. A map signed again changes nothing but its dates."""
        if newer.shards == self.current.shards:
            return ShardPlan(newer, self.previous, self.overlap_until)
        return ShardPlan(newer, self.current, now + OVERLAP_S)

    def maps(self, now: float) -> tuple[ShardMap, ...]:
        """The maps that count now, the newest first."""
        if self.previous is None or now >= self.overlap_until:
            return (self.current,)
        return (self.current, self.previous)

    def of_seller(self, region: str, kind: ResourceClass, now: float) -> tuple[int, ...]:
        """Where a seller is published, and where its adverts are taken."""
        first = _look_up(self._current_places, region, kind)
        if self.previous is None or now >= self.overlap_until:
            return (first,)
        second = _look_up(self._previous_places, region, kind)
        return (first,) if first == second else (first, second)

    @cached_property
    def _current_places(self) -> dict[tuple[str, ResourceClass], int]:
        return places(self.current)

    @cached_property
    def _previous_places(self) -> dict[tuple[str, ResourceClass], int]:
        return places(self.previous or self.current)

    def of_advert(self, advert: Advert, now: float) -> tuple[int, ...]:
        """The topics in which this advert may stand."""
        return self.of_seller(advert.region, class_of(advert.total), now)

    def for_buyer(self, needs: Requirements, now: float) -> tuple[int, ...]:
        """The shards to follow or ask. Those of the newest map come first."""
        return tuple(
            dict.fromkeys(shard for each in self.maps(now) for shard in shards_for(each, needs))
        )
