"""What is said to the coordinator before a session, and its answer: the money is held."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from msgspec import Meta

from lumaris_protocol import limits
from lumaris_protocol.messages.base import (
    Address,
    Amount,
    Count,
    Currency,
    Digest,
    Document,
    Id,
    Message,
    Nonce,
    Peer,
    SmallDocument,
    Time,
)


class Registration(Message, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A peer proves its key by signing the coordinator's challenge."""

    TYPE: ClassVar[str] = "registration"
    peer: Peer
    coordinator: Peer
    challenge: Nonce
    roles: Annotated[tuple[Literal["buyer", "seller"], ...], Meta(min_length=1, max_length=2)]
    addresses: Annotated[tuple[Address, ...], Meta(max_length=limits.ADDRESSES_MAX)] = ()
    issued_at: Time


class CreditRequest(Message, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A peer asks for test credit; `nonce` makes a repeated request the same request."""

    TYPE: ClassVar[str] = "credit_request"
    peer: Peer
    coordinator: Peer
    amount_nanos: Amount
    nonce: Nonce
    issued_at: Time


class GrantRequest(Message, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The buyer asks to hold an agreement's cap. Both signed agreements are inside."""

    TYPE: ClassVar[str] = "grant_request"
    buyer: Peer
    coordinator: Peer
    agreement_by_buyer: Document
    agreement_by_seller: Document
    issued_at: Time


class BudgetGrant(Message, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The coordinator holds `cap_nanos` of the buyer's money for this one agreement.

    The seller may settle until `settle_by`; what is not claimed by then returns to the buyer.
    """

    TYPE: ClassVar[str] = "budget_grant"
    SIZE_MAX: ClassVar[int] = limits.MONEY_BYTES_MAX
    grant: Id
    agreement_hash: Digest
    session: Id
    buyer: Peer
    seller: Peer
    currency: Currency
    cap_nanos: Amount
    serial: Count
    issued_at: Time
    not_after: Time
    settle_by: Time


class AmendRequest(Message, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The buyer asks to hold what an Amendment adds. Its signed copies are inside; the answer is
    a BudgetGrant with the same id, the new cap and end, and a higher serial."""

    TYPE: ClassVar[str] = "amend_request"
    buyer: Peer
    coordinator: Peer
    agreement_hash: Digest
    amendment_by_buyer: SmallDocument
    amendment_by_seller: SmallDocument | None = None
    issued_at: Time


class BondRequest(Message, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A peer locks money that answers for its conduct, or asks for it back.

    `nonce` makes a repeated request the same request. A release is paid after the coordinator's
    waiting time, and not while a dispute against the peer is open.
    """

    TYPE: ClassVar[str] = "bond_request"
    peer: Peer
    coordinator: Peer
    action: Literal["lock", "release"]
    amount_nanos: Amount
    currency: Currency
    nonce: Nonce
    issued_at: Time
