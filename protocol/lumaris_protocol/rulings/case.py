"""A case: what a ruling is made from, and what it comes to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from lumaris_protocol import merkle
from lumaris_protocol.agreements import Contract, is_repeatable
from lumaris_protocol.errors import RefusedError
from lumaris_protocol.ids import derive_id
from lumaris_protocol.limits import (
    DISPUTE_BOND_BPS,
    DISPUTE_BOND_NANOS_MIN,
    FEE_BPS_MAX,
    PENALTY_BPS,
    PENALTY_WRONG_BPS,
)
from lumaris_protocol.messages.dispute import DisputeClaim, DisputeOpen, Facts, Fault
from lumaris_protocol.messages.negotiation import Agreement
from lumaris_protocol.money import split_fee
from lumaris_protocol.rulings.evidence import Dossier, Session

# Ruled on the opening's own evidence, or not opened at all.
INSTANT: Final = frozenset(("equivocation", "forged_voucher", "stale_voucher"))
# Proven fraud costs the respondent all that it staked on the agreement, whatever was asked.
FRAUD: Final = frozenset(("equivocation", "forged_voucher"))
# About money that the escrow still holds: it is frozen until the ruling.
FREEZES: Final = frozenset(("stale_voucher", "unpaid_delivery"))
# About money that the seller was paid.
REFUNDS: Final = frozenset(("not_delivered", "wrong_result"))
_ONLY: Final[dict[str, Fault]] = {
    "stale_voucher": "seller",
    "unpaid_delivery": "seller",
    "not_delivered": "buyer",
    "wrong_result": "buyer",
}


@dataclass(frozen=True)
class Case:
    """The agreement, the claim, the opened evidence, and the coordinator's facts."""

    contract: Contract
    opened: DisputeOpen
    dossier: Dossier
    facts: Facts

    @property
    def agreement(self) -> Agreement:
        """The disputed agreement."""
        return self.contract.agreement

    @property
    def session(self) -> Session:
        """Its session's admitted documents."""
        return self.dossier.main

    @property
    def opener(self) -> Fault:
        """The side that opened the dispute."""
        return side_of(self.agreement, self.opened.opener)

    @property
    def respondent(self) -> Fault:
        """The other side."""
        return other_side(self.opener)

    @property
    def refundable(self) -> int:
        """The most that the seller can still be made to give back."""
        facts = self.facts
        return refundable(
            paid=facts.paid_nanos,
            claimed=facts.claimed_nanos,
            refunded=facts.refunded_nanos,
            fee_bps=self.agreement.fee_bps,
        )


@dataclass(frozen=True)
class Finding:
    """What a rule finds, before it is known what money there is. Amounts are nanos.

    `refund` is due to the buyer out of the seller's stake, `penalty` from the respondent beside it.
    `cost` is what the opener pays of its bond where nobody is at fault.
    """

    fault: Fault
    rule: str
    award: int = 0
    refund: int = 0
    penalty: int = 0
    cost: int = 0


@dataclass(frozen=True)
class Decision:
    """A finding against the money that is there: what the ruling says and what is paid.

    `fees_nanos` is the part of what was collected that no party gets.
    """

    fault: Fault
    rule: str
    award_nanos: int
    refund_nanos: int
    slash_nanos: int
    collected_nanos: int
    victim_nanos: int
    fees_nanos: int
    bond_returned: bool


def dispute_id(agreement_hash: str, *, opener: str, claim: DisputeClaim, order: int) -> str:
    """A dispute's id: one party makes one claim about one order once."""
    return derive_id("dispute", f"{agreement_hash}\n{opener}\n{claim}\n{order}".encode())


def evidence_root(opened: bytes, bundles: Sequence[bytes]) -> str:
    """The name of all that was shown: the RFC 6962 root over the opening and the bundles."""
    tree = merkle.Tree(merkle.leaf_hash(data) for data in (opened, *bundles))
    return merkle.digest_of_hash(tree.root())


def side_of(agreement: Agreement, peer: str) -> Fault:
    """Which side of an agreement a peer is; `neither` for a stranger."""
    if peer == agreement.buyer:
        return "buyer"
    return "seller" if peer == agreement.seller else "neither"


def other_side(side: Fault) -> Fault:
    """The opposite side."""
    return "seller" if side == "buyer" else "buyer"


def opener_bond(amount_nanos: int) -> int:
    """What the opener must deposit for asking this much."""
    return max(DISPUTE_BOND_NANOS_MIN, -(-amount_nanos * DISPUTE_BOND_BPS // FEE_BPS_MAX))


def refundable(*, paid: int, claimed: int, refunded: int, fee_bps: int) -> int:
    """What of a payment can be asked back, in nanos.

    All that the seller took on its own documents. Of a voucher that only the buyer showed, what
    came to the seller after the fee: it may never have seen that voucher.
    """
    unclaimed = split_fee(paid, fee_bps=fee_bps)[0] - split_fee(claimed, fee_bps=fee_bps)[0]
    return max(0, claimed + unclaimed - refunded)


def stake_max(opened: DisputeOpen, agreement: Agreement, *, refundable: int, price: int) -> int:
    """The most that the respondent can lose, which is what of its bond the dispute holds.

    `price` is what the disputed result costs by its papers, 0 where none is disputed.
    """
    terms, amount = agreement.terms, opened.amount_nanos
    if opened.claim in FRAUD:
        return terms.cap_nanos
    if opened.claim == "unpaid_delivery":
        return penalty(min(amount, terms.exposure_nanos))
    if opened.claim == "stale_voucher":
        return penalty(amount)
    part = refund_max(opened, refundable=refundable, price=price)
    return part + penalty(part, wrong=opened.claim == "wrong_result")


def refund_max(opened: DisputeOpen, *, refundable: int, price: int) -> int:
    """The most of a payment that a dispute can give back. Parameters as of `stake_max`."""
    if opened.claim not in REFUNDS:
        return 0
    most = min(opened.amount_nanos, max(0, refundable))
    return min(most, price) if opened.claim == "wrong_result" else most


def penalty(amount_nanos: int, *, wrong: bool = False) -> int:
    """What is owed beside an amount at fault."""
    return amount_nanos * (PENALTY_WRONG_BPS if wrong else PENALTY_BPS) // FEE_BPS_MAX


def check_opening(opened: DisputeOpen, contract: Contract) -> None:
    """The parts of an opening that need no evidence. Raises RefusedError."""
    agreement = contract.agreement
    if side_of(agreement, opened.opener) == "neither":
        raise RefusedError("wrong_signer", "Only the agreement's parties can dispute it.")
    if opened.coordinator != agreement.coordinator:
        raise RefusedError("wrong_domain", "The dispute names another coordinator.")
    expected = dispute_id(
        contract.hash, opener=opened.opener, claim=opened.claim, order=opened.order
    )
    if opened.dispute != expected:
        raise RefusedError("malformed", "The dispute's id does not follow from its claim.")
    check_claim(agreement, opened.claim, order=opened.order, opener=opened.opener)


def check_claim(agreement: Agreement, claim: str, *, order: int, opener: str) -> None:
    """Whether a party may make such a claim under an agreement. Raises RefusedError."""
    side = side_of(agreement, opener)
    if side != _ONLY.get(claim, side):
        raise RefusedError("not_disputable", f"The {side} cannot claim {claim}.")
    if (order > 0) != (claim == "wrong_result"):
        raise RefusedError("not_disputable", "An order is named by wrong_result, and only there.")
    checkable = agreement.verification != "evid" and not agreement.egress
    checkable = checkable and is_repeatable(agreement.tier, agreement.verification)
    if claim == "wrong_result" and not checkable:
        raise RefusedError(
            "not_disputable",
            "Results are not checkable under this agreement: only its signed evidence stands.",
        )
