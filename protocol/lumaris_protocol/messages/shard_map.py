"""How the market is divided: which shard of the gossip carries which sellers."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from msgspec import Meta

from lumaris_protocol import limits
from lumaris_protocol.messages.base import Count, Message, Name, Part, Time

ResourceClass = Literal["cpu", "gpu"]
ShardId = Annotated[int, Meta(ge=0, le=limits.SHARD_ID_MAX)]


class Shard(Part, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One topic's sellers. Without regions it is the catch-all of its classes: the regions that no
    other shard names."""

    id: ShardId
    regions: Annotated[tuple[Name, ...], Meta(max_length=limits.SHARD_REGIONS_MAX)] = ()
    classes: Annotated[tuple[ResourceClass, ...], Meta(min_length=1, max_length=2)]


class ShardMap(Message, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The coordinator's division of the market. The highest `version` counts, also when it has
    expired: expiry only says until when it may be handed to someone new."""

    TYPE: ClassVar[str] = "shard_map"
    SIZE_MAX: ClassVar[int] = limits.SHARD_MAP_BYTES_MAX
    network: Name
    version: Count
    shards: Annotated[tuple[Shard, ...], Meta(min_length=1, max_length=limits.SHARDS_MAX)]
    issued_at: Time
    expires_at: Time
