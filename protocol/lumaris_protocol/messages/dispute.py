"""A dispute: what a party claims, what it shows, and the coordinator's ruling on it.

Evidence is a list of signed documents that exist without the dispute: both copies of an agreement,
and orders, events, deliveries, acceptances, cancels, vouchers, closes and claims of its session;
of a checker or a replica its own agreement, order and delivery. Nothing else is admissible.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from msgspec import Meta

from lumaris_protocol import limits
from lumaris_protocol.messages.base import (
    Amount,
    Count,
    Currency,
    Digest,
    Document,
    Id,
    Message,
    Name,
    Part,
    Peer,
    Time,
)
from lumaris_protocol.messages.execution import OrderNumber

DisputeClaim = Literal[
    "equivocation",
    "forged_voucher",
    "stale_voucher",
    "not_delivered",
    "unpaid_delivery",
    "wrong_result",
]
Fault = Literal["buyer", "seller", "neither"]
# Why a ruling came when it did: the evidence sufficed, both sides were done, time ran out, or both
# agreed.
Ended = Literal["evidence", "done", "deadline", "agreed"]
# The largest document of a session is a work order.
EvidenceDocument = Annotated[bytes, Meta(max_length=limits.SESSION_DOCUMENT_BYTES_MAX)]
Evidence = Annotated[tuple[EvidenceDocument, ...], Meta(max_length=limits.EVIDENCE_DOCUMENTS_MAX)]
Round = Annotated[int, Meta(ge=0, le=limits.CHECKERS_MAX - 1)]
DisputedOrder = Annotated[int, Meta(ge=0, le=limits.SEQ_MAX)]


class DisputeOpen(Message, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A party's claim, signed with its identity key.

    `dispute` follows from agreement, opener, claim and `order` (`rulings.dispute_id`). `order` is
    the order that the claim is about, 0 where it is about the whole session. `amount_nanos` is the
    most that the opener asks for, and what its bond is reckoned from.
    """

    TYPE: ClassVar[str] = "dispute_open"
    SIZE_MAX: ClassVar[int] = limits.DISPUTE_DOCUMENT_BYTES_MAX
    dispute: Id
    coordinator: Peer
    opener: Peer
    agreement_by_buyer: Document
    agreement_by_seller: Document
    grant: Document
    claim: DisputeClaim
    order: DisputedOrder
    amount_nanos: Amount
    evidence: Evidence
    issued_at: Time


class DisputeEvidence(Message, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """More evidence of a party. With `done` it has no more to show; `n` counts its own from 0."""

    TYPE: ClassVar[str] = "dispute_evidence"
    SIZE_MAX: ClassVar[int] = limits.DISPUTE_DOCUMENT_BYTES_MAX
    dispute: Id
    agreement_hash: Digest
    party: Peer
    n: Annotated[int, Meta(ge=0, le=limits.EVIDENCE_BUNDLES_MAX - 1)]
    evidence: Evidence
    done: bool
    issued_at: Time


class DisputeWithdraw(Message, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The opener takes its claim back."""

    TYPE: ClassVar[str] = "dispute_withdraw"
    dispute: Id
    agreement_hash: Digest
    party: Peer
    issued_at: Time


class DisputeSplit(Message, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """An end both parties agree to: each signs the very same payload bytes.

    `award_nanos` of the frozen remainder go to the seller (less the agreed fee), `refund_nanos` out
    of the seller's own account to the buyer.
    """

    TYPE: ClassVar[str] = "dispute_split"
    dispute: Id
    agreement_hash: Digest
    award_nanos: Amount
    refund_nanos: Amount
    issued_at: Time


class Candidate(Part, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A seller that may be drawn as checker; `weight_nanos` is its bond under the draw's cap."""

    peer: Peer
    weight_nanos: Annotated[int, Meta(ge=1, le=limits.NANOS_MAX)]


class CheckerList(Message, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Among whom a checker will be drawn, logged before the chance of the draw is known.

    `round` is that of the first draw from it, counted from 0.
    """

    TYPE: ClassVar[str] = "checker_list"
    dispute: Id
    round: Round
    candidates: Annotated[
        tuple[Candidate, ...], Meta(min_length=1, max_length=limits.CHECKER_CANDIDATES_MAX)
    ]
    issued_at: Time


class CheckerDraw(Message, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The coordinator's draw of a checker, which anyone can repeat (`rulings.draw`).

    `list_hash` names the signed CheckerList, and `checkpoint` is the first signed head of the
    receipts log that holds it: its root is the draw's chance. Who was drawn before is left out.
    """

    TYPE: ClassVar[str] = "checker_draw"
    dispute: Id
    round: Round
    list_hash: Digest
    checkpoint: Annotated[str, Meta(max_length=limits.CHECKPOINT_CHARS_MAX)]
    checker: Peer
    check_by: Time
    issued_at: Time


class Facts(Part, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What only the coordinator knows of a case, stated under its signature.

    `paid_nanos` were paid to the seller before the ruling, `claimed_nanos` of them on its own
    documents (a claim, an award of a dispute that it opened), and `refunded_nanos` were given back
    by earlier rulings on the agreement; `refunded_orders` are the orders whose results those found
    wrong, which are worth nothing since. `remainder_nanos` are frozen. `bond_nanos` is the opener's
    bond and `stake_nanos` the respondent's part, both held by the dispute. `ends_at` is the
    agreement's end as amended. `checkers` were drawn, in this order.
    """

    paid_nanos: Amount
    claimed_nanos: Amount
    refunded_nanos: Amount = 0
    refunded_orders: Annotated[
        tuple[OrderNumber, ...], Meta(max_length=limits.REFUNDED_ORDERS_MAX)
    ] = ()
    remainder_nanos: Amount
    bond_nanos: Amount
    stake_nanos: Amount
    ended: Ended
    opened_at: Time
    evidence_until: Time
    ends_at: Time
    checkers: Annotated[tuple[Peer, ...], Meta(max_length=limits.CHECKERS_MAX)] = ()


class Ruling(Message, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The coordinator's decision, which follows from the evidence and `facts` alone.

    `award_nanos` of the frozen remainder go to the seller, the rest of it back to the buyer.
    `slash_nanos` is what the loser owes of its stake or bond and `collected_nanos` what was there;
    of that `refund_nanos` make the buyer whole and `victim_nanos` (at most half of what is left)
    go to the other side, the rest to the fees. In a split the seller's account pays `refund_nanos`
    and what is collected comes out of the opener's bond. `evidence_root` is the RFC 6962 root over
    the opening and every evidence bundle, in the order of their arrival.
    """

    TYPE: ClassVar[str] = "ruling"
    dispute: Id
    agreement_hash: Digest
    claim: DisputeClaim
    order: DisputedOrder
    opener: Peer
    buyer: Peer
    seller: Peer
    currency: Currency
    fault: Fault
    rule: Name
    award_nanos: Amount
    refund_nanos: Amount
    slash_nanos: Amount
    collected_nanos: Amount
    victim_nanos: Amount
    bond_returned: bool
    evidence_root: Digest
    documents: Count
    facts: Facts
    issued_at: Time
