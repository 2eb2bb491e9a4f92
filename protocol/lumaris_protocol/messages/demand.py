"""A buyer's question to everybody, for what its own directory does not show."""

from __future__ import annotations

from typing import Annotated, ClassVar

from msgspec import Meta

from lumaris_protocol import limits
from lumaris_protocol.messages.base import Address, Id, Message, Peer, Seconds, SmallDocument, Time
from lumaris_protocol.messages.negotiation import Requirements


class Demand(Message, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Who can serve this, answer with your advert. It binds nobody: the ordinary quote follows.

    `requirements.excluded` is empty: whom a buyer avoids is its own business. `addresses` are the
    buyer's own and end with its peer id.
    """

    TYPE: ClassVar[str] = "demand"
    SIZE_MAX: ClassVar[int] = limits.DEMAND_BYTES_MAX
    demand: Id
    buyer: Peer
    certificate: SmallDocument
    requirements: Requirements
    lease_s: Seconds
    answers_max: Annotated[int, Meta(ge=1, le=limits.TENDERS_MAX)]
    addresses: Annotated[tuple[Address, ...], Meta(max_length=limits.DEMAND_ADDRESSES_MAX)] = ()
    issued_at: Time
    expires_at: Time
