"""Where a peer can be reached and what it does for others, in its own signed words."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from msgspec import Meta

from lumaris_protocol import limits
from lumaris_protocol.messages.base import Address, Count, Message, Peer, SmallDocument, Time
from lumaris_protocol.messages.shard_map import ShardId

Service = Literal["index", "relay"]


class Endpoint(Message, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A peer's addresses and services. Of two, the one issued later counts, then the higher `seq`.

    `shards` are those whose directory an index peer holds.
    """

    TYPE: ClassVar[str] = "endpoint"
    SIZE_MAX: ClassVar[int] = limits.ADVERT_BYTES_MAX
    peer: Peer
    seq: Count
    addresses: Annotated[tuple[Address, ...], Meta(max_length=limits.ADDRESSES_MAX)]
    services: Annotated[tuple[Service, ...], Meta(max_length=2)] = ()
    shards: Annotated[tuple[ShardId, ...], Meta(max_length=limits.ENDPOINT_SHARDS_MAX)] = ()
    issued_at: Time
    expires_at: Time
    certificate: SmallDocument
