"""Papers padded with blanks: what is taken always fits the claim that pays for it."""

from __future__ import annotations

from typing import Any

import pytest
from msgspec.structs import replace as changed

from lumaris_protocol import agreements, codec, envelope, settlement
from lumaris_protocol.agreements import Contract
from lumaris_protocol.errors import EnvelopeError
from lumaris_protocol.keys import KeyPair
from lumaris_protocol.limits import AGREEMENT_BYTES_MAX, EGRESS_RULES_MAX, GPUS_MAX, KIB
from lumaris_protocol.machines.chain import SendChain
from lumaris_protocol.machines.seller import SellerSession
from lumaris_protocol.messages.advert import Gpu, Resources
from lumaris_protocol.messages.base import Message
from lumaris_protocol.messages.budget import BudgetGrant, GrantRequest
from lumaris_protocol.messages.execution import Acceptance, Cancel, SessionOpen
from lumaris_protocol.messages.negotiation import Agreement
from lumaris_protocol.messages.payment import Close, Settle, Voucher
from lumaris_protocol.settlement import Papers
from tests.dispute_builders import opening
from tests.protocol import parties as p

PADDED = (Agreement, BudgetGrant, Voucher, Close, Acceptance, Cancel)


def padded(message: Message, key: KeyPair, size: int) -> bytes:
    """A signed message of exactly this size, by blanks before its last brace."""
    payload = codec.encode_payload(message)
    short = len(envelope.seal(key, p.NETWORK, message.TYPE, payload[:-1] + b" " * KIB + b"}"))
    payload = payload[:-1] + b" " * (size - short + KIB) + b"}"
    data = envelope.seal(key, p.NETWORK, message.TYPE, payload)
    assert len(data) == size
    return data


def said(kind: type[Message], contract: Contract, **fields: Any) -> Message:
    chain = {"session": contract.agreement.session, "seq": 3, "prev": contract.hash}
    return kind(**chain, **fields)


def close(contract: Contract) -> Message:
    return said(Close, contract, total_nanos=500, orders_accepted=1, reason="closed")


def largest() -> tuple[Contract, Papers]:
    """Every paper of a session as large as it is taken."""
    text = p.contract().agreement
    copies = [padded(text, key, Agreement.SIZE_MAX) for key in (p.BUYER, p.SELLER)]
    contract = agreements.join(*copies, network=p.NETWORK)
    voucher = said(Voucher, contract, total_nanos=900)
    grant = padded(p.grant(contract).message, p.COORDINATOR, BudgetGrant.SIZE_MAX)
    closes = tuple(
        padded(close(contract), key, Close.SIZE_MAX) for key in (p.BUYER_SESSION, p.SELLER_SESSION)
    )
    papers = Papers(
        session=text.session,
        by_buyer=contract.by_buyer,
        by_seller=contract.by_seller,
        grant=grant,
        voucher=padded(voucher, p.BUYER_SESSION, Voucher.SIZE_MAX),
        total_nanos=500,
        closes=closes,
    )
    return contract, papers


def test_the_largest_papers_fit_every_document_that_encloses_them() -> None:
    contract, papers = largest()
    coordinator = contract.agreement.coordinator
    for key in (p.BUYER, p.SELLER):
        data = settlement.claim(papers, key, network=p.NETWORK, coordinator=coordinator, now=p.NOW)
        settle = codec.open_signed(data, Settle, network=p.NETWORK)
        claim = settlement.open_claim(settle, network=p.NETWORK, coordinator=coordinator)
        assert (claim.fact, claim.total_nanos) == ("both_closed", 500)
    request = GrantRequest(
        buyer=p.BUYER.peer_id,
        coordinator=coordinator,
        agreement_by_buyer=contract.by_buyer,
        agreement_by_seller=contract.by_seller,
        issued_at=p.NOW,
    )
    codec.sign(request, p.BUYER, p.NETWORK)
    assert papers.grant is not None
    opening(contract, papers.grant, p.BUYER, "not_delivered", network=p.NETWORK)


@pytest.mark.parametrize("kind", PADDED, ids=lambda kind: kind.TYPE)
def test_one_byte_more_is_refused(kind: type[Message]) -> None:
    contract = p.contract()
    messages: dict[type[Message], tuple[Message, KeyPair]] = {
        Agreement: (contract.agreement, p.BUYER),
        BudgetGrant: (p.grant(contract).message, p.COORDINATOR),
        Voucher: (said(Voucher, contract, total_nanos=1), p.BUYER_SESSION),
        Close: (close(contract), p.BUYER_SESSION),
        Acceptance: (said(Acceptance, contract, n=1, accepted=True, total_nanos=1), p.BUYER),
        Cancel: (said(Cancel, contract, n=1), p.BUYER),
    }
    message, key = messages[kind]
    codec.open_signed(padded(message, key, kind.SIZE_MAX), kind, network=p.NETWORK)
    with pytest.raises(EnvelopeError) as refused:
        codec.open_signed(padded(message, key, kind.SIZE_MAX + 1), kind, network=p.NETWORK)
    assert refused.value.code == "oversize"


def test_a_seller_takes_no_voucher_that_it_could_not_claim() -> None:
    contract, now = p.contract(), float(p.NOW)
    seller = SellerSession(contract, p.SELLER_SESSION, network=p.NETWORK)
    chain = SendChain(
        p.BUYER_SESSION, network=p.NETWORK, session=contract.agreement.session, root=contract.hash
    )
    opened = chain.sign(SessionOpen, agreement_hash=contract.hash, grant=p.grant(contract).data)
    seller.receive(opened.data, now=now)
    voucher = Voucher(
        session=contract.agreement.session, seq=1, prev=opened.hash, total_nanos=1_000
    )
    with pytest.raises(EnvelopeError) as refused:
        seller.receive(padded(voucher, p.BUYER_SESSION, 8 * KIB), now=now)
    assert refused.value.code == "oversize"
    assert seller.tab.vouchered_nanos == 0


def test_the_longest_honest_agreement_fits() -> None:
    """Control characters are the longest that a GPU's name can become in JSON."""
    gpus = tuple(
        Gpu(model="\x01" * 64, vram_bytes=1 << 50, count=GPUS_MAX) for _ in range(GPUS_MAX)
    )
    text = changed(
        p.contract().agreement,
        resources=Resources(cpu_millis=1 << 52, gpus=gpus),
        egress=(f"{'a' * 250}:12345",) * EGRESS_RULES_MAX,
    )
    assert len(p.sign_contract(text).by_buyer) + KIB < AGREEMENT_BYTES_MAX
