"""The coordinator's word on how a session ended, and the file that proves it offline."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from msgspec import Meta

from lumaris_protocol import limits
from lumaris_protocol.messages.advert import Verification
from lumaris_protocol.messages.base import (
    Amount,
    Count,
    Currency,
    Digest,
    Document,
    Id,
    Message,
    Part,
    Peer,
    SmallDocument,
    Text,
    Time,
)
from lumaris_protocol.messages.negotiation import FeeBps

# How a session's money came to rest.
Outcome = Literal["closed", "claimed", "expired", "ruled"]
LOG_PROOF_HASHES_MAX = 64  # a tree of 2**64 leaves is 64 deep


class Receipt(Message, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What was held, paid, charged and returned. paid = seller + fee; cap = paid + refund."""

    TYPE: ClassVar[str] = "receipt"
    receipt: Id
    session: Id
    agreement_hash: Digest
    voucher_hash: Digest | None
    buyer: Peer
    seller: Peer
    currency: Currency
    cap_nanos: Amount
    paid_nanos: Amount
    seller_nanos: Amount
    fee_nanos: Amount
    refund_nanos: Amount
    fee_bps: FeeBps
    outcome: Outcome
    verification: Verification
    guarantees: Annotated[tuple[Text, ...], Meta(max_length=16)]
    not_guaranteed: Annotated[tuple[Text, ...], Meta(max_length=16)]
    issued_at: Time


class LogProof(Part, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """An RFC 6962 inclusion proof of leaf `index` in the tree of the checkpoint."""

    index: Count
    size: Count
    hashes: Annotated[tuple[Digest, ...], Meta(max_length=LOG_PROOF_HASHES_MAX)]


class ReceiptBundle(Part, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A receipt file: everything needed to verify it without asking anyone.

    `closes` are the co-signed end of an outcome "closed", `amendments` each signed copy in order,
    and `rulings` those of an outcome "ruled", which may add to the voucher. The log's leaf is the
    SHA-256 of `salt` and the receipt, so the public log tells nothing of a receipt it holds.
    """

    format: Literal["lumaris-receipt/1"]
    network: Annotated[
        str, Meta(min_length=1, max_length=limits.NAME_CHARS_MAX, pattern=r"^[^/]+\Z")
    ]
    receipt: Document
    agreement_by_buyer: Document
    agreement_by_seller: Document
    grant: Document
    voucher: Document | None
    closes: Annotated[tuple[Document, ...], Meta(max_length=2)] = ()
    amendments: Annotated[
        tuple[SmallDocument, ...], Meta(max_length=2 * limits.AMENDMENTS_MAX)
    ] = ()
    rulings: Annotated[tuple[Document, ...], Meta(max_length=limits.DISPUTES_PER_ESCROW_MAX)] = ()
    salt: Annotated[bytes, Meta(min_length=32, max_length=32)]
    proof: LogProof
    checkpoint: Annotated[str, Meta(max_length=limits.CHECKPOINT_CHARS_MAX)]
