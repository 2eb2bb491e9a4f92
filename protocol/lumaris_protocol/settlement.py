"""What a claim on a grant is worth: the rules of settlement, free of any store.

The coordinator applies them to decide, the parties apply them to know what will be decided, and a
receipt is verified with them years later.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Literal

from lumaris_protocol import agreements, codec
from lumaris_protocol.agreements import Contract
from lumaris_protocol.codec import Signed
from lumaris_protocol.errors import RefusedError
from lumaris_protocol.ids import derive_id
from lumaris_protocol.keys import KeyPair
from lumaris_protocol.messages.budget import BudgetGrant
from lumaris_protocol.messages.negotiation import Agreement
from lumaris_protocol.messages.payment import Close, Settle, Voucher
from lumaris_protocol.messages.receipt import Outcome, Receipt
from lumaris_protocol.money import split_fee

ClaimFact = Literal["seller_claim", "buyer_claim", "both_closed"]

GUARANTEES = (
    "Buyer and seller signed this agreement before any work began.",
    "The coordinator held the cap before the session and paid no more than the buyer vouchered.",
    "The receipt stands in the coordinator's append-only log under the enclosed checkpoint.",
)
NOT_GUARANTEED = {
    "det": ("That the result is correct: it can be settled by running the order again.",),
    "repl": ("That the result is correct beyond the agreement of the named replicas.",),
    "evid": ("That the result is correct: only the signed evidence of both sides stands for it.",),
}


@dataclass(frozen=True)
class Papers:
    """What a party holds of one session: with a grant, everything a claim needs."""

    session: str
    by_buyer: bytes
    by_seller: bytes
    grant: bytes | None
    voucher: bytes | None
    total_nanos: int
    closes: tuple[bytes, ...] = field(default=(), kw_only=True)


@dataclass(frozen=True)
class Claim:
    """A checked claim: which fact it is for the escrow, and the amount it proves.

    With the two `closes` the total is theirs, which may be less than the voucher's.
    """

    fact: ClaimFact
    total_nanos: int
    contract: Contract
    grant: Signed[BudgetGrant]
    voucher: Signed[Voucher] | None
    closes: tuple[bytes, ...] = ()

    @property
    def vouchered_nanos(self) -> int:
        """The total of the enclosed voucher."""
        return self.voucher.message.total_nanos if self.voucher is not None else 0


def open_voucher(
    data: bytes, agreement: Agreement, *, network: str, cap_nanos: int | None = None
) -> Signed[Voucher]:
    """Check a voucher against its agreement, or against the higher cap of a later grant.

    Raises EnvelopeError, or RefusedError `voucher_foreign` or `over_cap`.
    """
    voucher = codec.open_signed(data, Voucher, network=network, signer=agreement.buyer_session_key)
    if voucher.message.session != agreement.session:
        raise RefusedError("voucher_foreign")
    cap = agreement.terms.cap_nanos if cap_nanos is None else cap_nanos
    if voucher.message.total_nanos > cap:
        raise RefusedError("over_cap")
    return voucher


def claim(papers: Papers, key: KeyPair, *, network: str, coordinator: str, now: int) -> bytes:
    """A party's signed claim. Raises ValueError for papers without a grant: nothing was held."""
    if papers.grant is None:
        raise ValueError("a session without a grant cannot be claimed")
    settle = Settle(
        session=papers.session,
        party=key.peer_id,
        coordinator=coordinator,
        total_nanos=papers.total_nanos,
        agreement_by_buyer=papers.by_buyer,
        agreement_by_seller=papers.by_seller,
        grant=papers.grant,
        voucher=papers.voucher,
        closes=papers.closes,
        issued_at=now,
    )
    return codec.sign(settle, key, network).data


def open_claim(
    settle: Signed[Settle], *, network: str, coordinator: str, known: Collection[bytes] = ()
) -> Claim:
    """Check everything a claim encloses; documents `known` had their signatures checked before.

    Raises EnvelopeError or RefusedError; pays nothing.
    """
    message = settle.message
    contract = agreements.join(
        message.agreement_by_buyer, message.agreement_by_seller, network=network, known=known
    )
    agreement = contract.agreement
    if settle.signer != message.party or message.party not in (agreement.buyer, agreement.seller):
        raise RefusedError("wrong_signer", "Only the agreement's parties can settle it.")
    if message.session != agreement.session or message.coordinator != coordinator:
        raise RefusedError("wrong_domain", "The claim names another session or coordinator.")
    grant = agreements.open_grant(
        message.grant, contract, network=network, coordinator=coordinator, now=None, known=known
    )
    voucher = None
    if message.voucher is not None:
        voucher = open_voucher(
            message.voucher, agreement, network=network, cap_nanos=grant.message.cap_nanos
        )
    proven = voucher.message.total_nanos if voucher is not None else 0
    fact: ClaimFact = "seller_claim" if message.party == agreement.seller else "buyer_claim"
    closes: tuple[bytes, ...] = ()
    if len(message.closes) == 2:
        fact, closes = "both_closed", message.closes
        if open_closes(closes, agreement, network=network) != message.total_nanos:
            raise RefusedError("claim_unproven", "The co-signed end names another total.")
    if message.total_nanos != proven and not (closes and message.total_nanos < proven):
        raise RefusedError("claim_unproven", "The claimed total is not the voucher's.")
    return Claim(fact, message.total_nanos, contract, grant, voucher, closes)


def open_closes(closes: tuple[bytes, ...], agreement: Agreement, *, network: str) -> int:
    """The total that buyer and seller both closed the session with.

    Raises EnvelopeError or RefusedError.
    """
    signers = (agreement.buyer_session_key, agreement.seller_session_key)
    if len(closes) != len(signers):
        raise RefusedError("claim_unproven", "A co-signed end has two documents.")
    totals = set()
    for data, signer in zip(closes, signers, strict=True):
        close = codec.open_signed(data, Close, network=network, signer=signer).message
        if close.session != agreement.session:
            raise RefusedError("claim_unproven", "The co-signed end is another session's.")
        totals.add(close.total_nanos)
    if len(totals) != 1:
        raise RefusedError("claim_unproven", "The two sides closed with different totals.")
    return totals.pop()


def make_receipt(
    contract: Contract,
    *,
    cap_nanos: int,
    paid_nanos: int,
    voucher_hash: str | None,
    outcome: Outcome,
    now: int,
) -> Receipt:
    """The receipt that follows from a settlement. Raises ValueError when it would overpay."""
    agreement = contract.agreement
    if not 0 <= paid_nanos <= cap_nanos:
        raise ValueError("a settlement cannot pay more than the cap")
    seller_nanos, fee_nanos = split_fee(paid_nanos, fee_bps=agreement.fee_bps)
    return Receipt(
        receipt=derive_id("receipt", contract.hash.encode()),
        session=agreement.session,
        agreement_hash=contract.hash,
        voucher_hash=voucher_hash,
        buyer=agreement.buyer,
        seller=agreement.seller,
        currency=agreement.terms.currency,
        cap_nanos=cap_nanos,
        paid_nanos=paid_nanos,
        seller_nanos=seller_nanos,
        fee_nanos=fee_nanos,
        refund_nanos=cap_nanos - paid_nanos,
        fee_bps=agreement.fee_bps,
        outcome=outcome,
        verification=agreement.verification,
        guarantees=GUARANTEES,
        not_guaranteed=NOT_GUARANTEED[agreement.verification],
        issued_at=now,
    )
