"""Money in a session: vouchers, the co-signed end, and the claim to the coordinator."""

from __future__ import annotations

from typing import Annotated, ClassVar, Final

from msgspec import Meta

from lumaris_protocol import limits
from lumaris_protocol.messages.base import (
    Amount,
    Count,
    Digest,
    Document,
    Id,
    Message,
    Peer,
    SessionMessage,
    Time,
)

# The reason in the Close of a buyer that ends a session by its own will. Under another reason its
# Close only takes what the seller offers at its end, and says nothing of what was owed.
BUYER_CLOSES: Final = "closed"


class Voucher(SessionMessage, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The buyer owes `total_nanos` for the whole session; only the highest counts, for good."""

    TYPE: ClassVar[str] = "voucher"
    SIZE_MAX: ClassVar[int] = limits.MONEY_BYTES_MAX
    total_nanos: Amount


class Close(SessionMessage, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One side ends the session. Two of these with the same total release the rest at once.

    Of the buyer, with the reason `closed`, it is its word of what it owed for the whole session.
    """

    TYPE: ClassVar[str] = "close"
    SIZE_MAX: ClassVar[int] = limits.MONEY_BYTES_MAX
    total_nanos: Amount
    orders_accepted: Count
    reason: Annotated[str, Meta(max_length=limits.NAME_CHARS_MAX)]


class Amendment(Message, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """More money or more time for an agreement, as the parties' identity keys sign it.

    The buyer signs each; the seller signs the very same payload whenever `ends_at` changes. Both
    values are absolute, `n` counts up from 1, and nothing is ever lowered.
    """

    TYPE: ClassVar[str] = "amendment"
    SIZE_MAX: ClassVar[int] = limits.ADVERT_BYTES_MAX
    agreement_hash: Digest
    session: Id
    n: Annotated[int, Meta(ge=1, le=limits.AMENDMENTS_MAX)]
    cap_nanos: Amount
    ends_at: Time
    issued_at: Time


class Settle(Message, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A party's claim on a grant, signed with its identity key; idempotent by (session, total).

    The seller's claim is final: it needs the highest voucher it holds, or none for nothing. The
    buyer's alone is final only with both `closes`; otherwise it waits for the settle window.
    `total_nanos` is the voucher's total, or with both `closes` theirs, which may be less.
    """

    TYPE: ClassVar[str] = "settle"
    session: Id
    party: Peer
    coordinator: Peer
    total_nanos: Amount
    agreement_by_buyer: Document
    agreement_by_seller: Document
    grant: Document
    voucher: Document | None
    closes: Annotated[tuple[Document, ...], Meta(max_length=2)] = ()
    issued_at: Time
