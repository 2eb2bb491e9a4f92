"""What an index peer is asked for when a buyer does not follow the shard itself.

A filter lets through every advert that may fit and leaves out most that cannot; the buyer's own
matching decides. It is applied by the index peer, and again by the asker to what comes back.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import msgspec
from msgspec import Meta

from lumaris_protocol import limits
from lumaris_protocol.messages.advert import Advert, Gpu, Tier
from lumaris_protocol.messages.base import Count, Name
from lumaris_protocol.messages.negotiation import Requirements
from lumaris_protocol.messages.shard_map import ResourceClass
from lumaris_protocol.shards import class_of


class AdvertFilter(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """Lower bounds on what is free, and names. What is left out admits everything."""

    regions: Annotated[tuple[Name, ...], Meta(max_length=limits.REGIONS_MAX)] = ()
    tier: Tier | None = None
    cpu_millis: Count = 0
    memory_bytes: Count = 0
    gpu: Annotated[str, Meta(max_length=limits.NAME_CHARS_MAX)] | None = None


@dataclass(frozen=True)
class AdvertFacts:
    """The part of an advert that filters and shards look at."""

    region: str
    kind: ResourceClass
    tiers: tuple[Tier, ...]
    cpu_millis: int
    memory_bytes: int
    gpus: tuple[str, ...]


def facts_of(advert: Advert) -> AdvertFacts:
    """What a directory keeps beside the document."""
    return AdvertFacts(
        region=advert.region,
        kind=class_of(advert.total),
        tiers=tuple(runtime.tier for runtime in advert.runtimes),
        cpu_millis=advert.free.cpu_millis,
        memory_bytes=advert.free.memory_bytes,
        gpus=tuple(gpu.model for gpu in advert.free.gpus),
    )


def filter_of(needs: Requirements) -> AdvertFilter:
    """The filter that every advert fitting these requirements passes."""
    wanted = needs.resources
    first: Gpu | None = wanted.gpus[0] if wanted.gpus else None
    return AdvertFilter(
        regions=needs.regions,
        tier=needs.tier,
        cpu_millis=wanted.cpu_millis,
        memory_bytes=wanted.memory_bytes,
        # Without a model any will do.
        gpu=(first.model or None) if first is not None else None,
    )


def passes(wanted: AdvertFilter, facts: AdvertFacts) -> bool:
    """Whether an advert with these facts is among what was asked for."""
    return (
        (not wanted.regions or facts.region in wanted.regions)
        and (wanted.tier is None or wanted.tier in facts.tiers)
        and facts.cpu_millis >= wanted.cpu_millis
        and facts.memory_bytes >= wanted.memory_bytes
        and (wanted.gpu is None or wanted.gpu in facts.gpus)
    )
