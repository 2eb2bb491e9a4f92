"""Cases between the protocol tests' parties: work, evidence, and what the coordinator knows."""

from __future__ import annotations

from typing import Any

from msgspec.structs import replace as changed

from lumaris_protocol import agreements, codec, pricing, rulings, settlement
from lumaris_protocol.agreements import Contract
from lumaris_protocol.keys import KeyPair
from lumaris_protocol.messages.dispute import DisputeOpen, Facts
from lumaris_protocol.rulings import Case, Decision, Dossier
from tests.dispute_builders import Work, opening
from tests.protocol import parties as p

PRICE = pricing.order_nanos(p.TERMS, 1_000)  # an order of one second
CAP, EXPOSURE = p.TERMS.cap_nanos, p.TERMS.exposure_nanos
CHECKER, CHECKER_SESSION = p.key_of("checker"), p.key_of("checker session")


def contract(**changes: Any) -> Contract:
    text = p.agreement(p.request(), p.quote(p.request()))
    return p.sign_contract(changed(text, **changes))


def work(agreed: Contract | None = None) -> Work:
    return Work(agreed or contract(), p.BUYER_SESSION, p.SELLER_SESSION, p.NETWORK)


def other_work(
    seller: KeyPair, session: KeyPair, *, buyer: KeyPair = p.BUYER, **terms: Any
) -> Work:
    """A session that a party bought elsewhere: of a checker or a replica."""
    ours = contract().agreement
    text = changed(
        ours,
        session=p.id_of("session", seller.peer_id),
        seller=seller.peer_id,
        buyer=buyer.peer_id,
        seller_session_key=session.peer_id,
        **terms,
    )
    by_buyer = codec.sign(text, buyer, p.NETWORK).data
    by_seller = codec.sign(text, seller, p.NETWORK).data
    agreed = agreements.join(by_buyer, by_seller, network=p.NETWORK)
    return Work(agreed, p.BUYER_SESSION, session, p.NETWORK)


def facts(**changes: Any) -> Facts:
    fields: dict[str, Any] = {
        "paid_nanos": 0,
        "remainder_nanos": 0,
        "bond_nanos": 1_000_000,
        "stake_nanos": CAP,
        "ended": "deadline",
        "opened_at": p.NOW,
        "evidence_until": p.NOW + 3_600,
        "ends_at": contract().agreement.ends_at,
    }
    fields |= changes
    return Facts(**({"claimed_nanos": fields["paid_nanos"]} | fields))


def case(
    made: Work,
    claim: Any,
    *,
    by: KeyPair = p.BUYER,
    buyer: tuple[bytes, ...] = (),
    seller: tuple[bytes, ...] = (),
    order: int = 0,
    amount: int = CAP,
    **known: Any,
) -> Case:
    """A case with the evidence that each side showed."""
    agreed = made.contract
    data = opening(
        agreed, p.grant(agreed).data, by, claim, network=p.NETWORK, order=order, amount=amount
    )
    opened = codec.open_signed(data, DisputeOpen, network=p.NETWORK).message
    dossier = Dossier(agreed, network=p.NETWORK)
    dossier.add(buyer, party=p.BUYER.peer_id)
    dossier.add(seller, party=p.SELLER.peer_id)
    return Case(agreed, opened, dossier, facts(**known))


def ruled(made: Work, claim: Any, **more: Any) -> Decision:
    return rulings.rule(case(made, claim, **more))


def claim_of(made: Work, key: KeyPair, total: int, voucher: bytes | None) -> bytes:
    agreed = made.contract
    papers = settlement.Papers(
        agreed.agreement.session,
        agreed.by_buyer,
        agreed.by_seller,
        p.grant(agreed).data,
        voucher,
        total,
    )
    coordinator = agreed.agreement.coordinator
    return settlement.claim(papers, key, network=p.NETWORK, coordinator=coordinator, now=p.NOW)
