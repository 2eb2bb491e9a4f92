"""What makes two signed documents one agreement, a grant its cover, a claim worth its amount."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from lumaris_protocol import agreements, codec, settlement
from lumaris_protocol.agreements import Contract
from lumaris_protocol.codec import Signed
from lumaris_protocol.errors import LumarisError
from lumaris_protocol.keys import KeyPair
from lumaris_protocol.limits import CERTIFICATE_LIFETIME_S_MAX, SESSION_KEY_LIFETIME_S_MAX
from lumaris_protocol.messages.negotiation import Agreement
from lumaris_protocol.messages.payment import Close, Settle
from tests.protocol import parties as p

TEXT = p.contract().agreement


def signed(text: Agreement, key: KeyPair, network: str = p.NETWORK) -> bytes:
    return codec.sign(text, key, network).data


def code_of(call: Any, *args: Any, **named: Any) -> str:
    with pytest.raises(LumarisError) as caught:
        call(*args, **named)
    return caught.value.code


# --- join ---


def test_a_contract_has_both_signatures_over_one_payload() -> None:
    contract = p.contract()
    assert agreements.payload_hash(contract.by_buyer) == contract.hash
    assert agreements.payload_hash(contract.by_seller) == contract.hash
    assert contract.agreement.ends_at == p.NOW + 3600


@pytest.mark.parametrize(
    ("by_buyer", "by_seller", "code"),
    [
        (signed(TEXT, p.BUYER), signed(TEXT, p.BUYER), "wrong_signer"),
        (signed(TEXT, p.SELLER), signed(TEXT, p.BUYER), "wrong_signer"),
        (signed(TEXT, p.BUYER), signed(TEXT, p.STRANGER), "wrong_signer"),
        (signed(TEXT, p.BUYER_SESSION), signed(TEXT, p.SELLER), "wrong_signer"),
        (signed(TEXT, p.BUYER), signed(TEXT, p.SELLER, "othernet"), "bad_signature"),
        (signed(TEXT, p.BUYER), p.request().data, "wrong_type"),
        (signed(TEXT, p.BUYER), b"", "malformed"),
        (
            signed(TEXT, p.BUYER),
            signed(msgspec.structs.replace(TEXT, fee_bps=0), p.SELLER),
            "terms_changed",
        ),
    ],
)
def test_what_is_no_contract(by_buyer: bytes, by_seller: bytes, code: str) -> None:
    assert code_of(agreements.join, by_buyer, by_seller, network=p.NETWORK) == code


@pytest.mark.parametrize("length", [0, -5, SESSION_KEY_LIFETIME_S_MAX + 1])
def test_session_keys_live_a_day_at_most(length: int) -> None:
    text = msgspec.structs.replace(TEXT, ends_at=TEXT.issued_at + length)
    assert code_of(p.sign_contract, text) == "malformed"


def test_nobody_deals_with_oneself() -> None:
    text = msgspec.structs.replace(TEXT, seller=TEXT.buyer)
    both = signed(text, p.BUYER)
    assert code_of(agreements.join, both, both, network=p.NETWORK) == "wrong_signer"


def test_ids_follow_from_the_quote() -> None:
    one, two = p.contract(name="1").agreement, p.contract(name="2").agreement
    assert one.session != two.session
    assert one.agreement != two.agreement
    asked = p.request("1")
    assert agreements.session_id(asked, p.quote(asked)) == one.session


# --- grants ---


def open_grant(data: bytes, contract: Contract, now: float | None = p.NOW) -> Any:
    return agreements.open_grant(
        data, contract, network=p.NETWORK, coordinator=p.COORDINATOR.peer_id, now=now
    )


def test_a_grant_covers_its_contract() -> None:
    contract = p.contract()
    assert open_grant(p.grant(contract).data, contract).message.serial == 7
    more = p.grant(contract, cap_nanos=contract.agreement.terms.cap_nanos + 1)
    assert open_grant(more.data, contract)


@pytest.mark.parametrize(
    "changes",
    [
        {"agreement_hash": p.digest_of("x")},
        {"session": p.id_of("session", "x")},
        {"buyer": p.STRANGER.peer_id},
        {"seller": p.STRANGER.peer_id},
        {"currency": "EUR"},
        {"cap_nanos": p.TERMS.cap_nanos - 1},
        {"not_after": p.NOW + 3599},
        {"settle_by": p.NOW + 3599},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_a_grant_for_anything_else_covers_nothing(changes: dict[str, Any]) -> None:
    contract = p.contract()
    assert code_of(open_grant, p.grant(contract, **changes).data, contract) == "grant_invalid"


def test_a_grant_is_the_coordinators_and_current() -> None:
    contract = p.contract()
    own = p.grant(contract, key=p.BUYER)
    assert code_of(open_grant, own.data, contract) == "wrong_signer"
    grant = p.grant(contract)
    assert code_of(open_grant, grant.data, contract, now=p.NOW + 3661) == "expired"
    assert code_of(open_grant, grant.data, contract, now=p.NOW - 61) == "not_yet_valid"
    assert open_grant(grant.data, contract, now=None)


# --- certificates ---


def open_certificate(data: bytes, *, now: float = p.NOW, role: Any = "seller") -> Any:
    return agreements.open_certificate(
        data,
        network=p.NETWORK,
        coordinators=frozenset({p.COORDINATOR.peer_id}),
        peer=p.SELLER.peer_id,
        role=role,
        now=now,
    )


def test_a_certificate_is_for_one_peer_and_its_roles() -> None:
    good = p.certificate(p.SELLER, "seller")
    assert open_certificate(good.data).message.peer == p.SELLER.peer_id
    assert code_of(open_certificate, good.data, role="buyer") == "not_certified"
    other = p.certificate(p.STRANGER, "seller")
    assert code_of(open_certificate, other.data) == "not_certified"
    own = codec.sign(good.message, p.SELLER, p.NETWORK)
    assert code_of(open_certificate, own.data) == "not_certified"
    assert code_of(open_certificate, good.data, now=p.NOW + 24 * 3600 + 61) == "expired"
    long = p.certificate(
        p.SELLER, "seller", issued_at=p.NOW, expires_at=p.NOW + CERTIFICATE_LIFETIME_S_MAX + 1
    )
    assert code_of(open_certificate, long.data) == "not_certified"


# --- claims ---


def closes(contract: Contract, total_nanos: int, **changes: Any) -> tuple[bytes, bytes]:
    fields: dict[str, Any] = {
        "session": contract.agreement.session,
        "seq": 2,
        "prev": contract.hash,
        "total_nanos": total_nanos,
        "orders_accepted": 1,
        "reason": "closed",
    }
    text = Close(**(fields | changes))
    by_buyer = codec.sign(text, p.BUYER_SESSION, p.NETWORK).data
    return by_buyer, codec.sign(text, p.SELLER_SESSION, p.NETWORK).data


def settle(contract: Contract, key: KeyPair = p.SELLER, **changes: Any) -> Signed[Settle]:
    fields: dict[str, Any] = {
        "session": contract.agreement.session,
        "party": key.peer_id,
        "coordinator": p.COORDINATOR.peer_id,
        "total_nanos": 500,
        "agreement_by_buyer": contract.by_buyer,
        "agreement_by_seller": contract.by_seller,
        "grant": p.grant(contract).data,
        "voucher": p.voucher(contract, 500).data,
        "issued_at": p.NOW,
    }
    return codec.sign(Settle(**(fields | changes)), key, p.NETWORK)


def open_claim(claim: Signed[Settle]) -> settlement.Claim:
    return settlement.open_claim(claim, network=p.NETWORK, coordinator=p.COORDINATOR.peer_id)


def test_a_claim_proves_its_amount() -> None:
    contract = p.contract()
    claim = open_claim(settle(contract))
    assert (claim.fact, claim.total_nanos) == ("seller_claim", 500)
    assert open_claim(settle(contract, p.BUYER)).fact == "buyer_claim"
    nothing = open_claim(settle(contract, total_nanos=0, voucher=None))
    assert (nothing.total_nanos, nothing.voucher) == (0, None)
    both = open_claim(settle(contract, p.BUYER, closes=closes(contract, 500)))
    assert both.fact == "both_closed"
    one = closes(contract, 500)[:1]
    assert open_claim(settle(contract, p.BUYER, closes=one)).fact == "buyer_claim"


OTHER = p.contract(name="2")


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"party": p.STRANGER.peer_id}, "wrong_signer"),
        ({"party": p.BUYER.peer_id}, "wrong_signer"),
        ({"session": p.id_of("session", "x")}, "wrong_domain"),
        ({"coordinator": p.STRANGER.peer_id}, "wrong_domain"),
        ({"total_nanos": 501}, "claim_unproven"),
        ({"total_nanos": 0}, "claim_unproven"),
        ({"voucher": None}, "claim_unproven"),
        ({"voucher": p.voucher(OTHER, 500).data}, "voucher_foreign"),
        ({"voucher": b"junk"}, "malformed"),
        ({"voucher": p.voucher(p.contract(), p.TERMS.cap_nanos + 1).data}, "over_cap"),
        ({"grant": p.grant(OTHER).data}, "grant_invalid"),
        ({"grant": p.grant(p.contract(), key=p.SELLER).data}, "wrong_signer"),
        ({"agreement_by_buyer": OTHER.by_buyer}, "terms_changed"),
        (
            {"agreement_by_buyer": OTHER.by_buyer, "agreement_by_seller": OTHER.by_seller},
            "wrong_domain",
        ),
        ({"closes": closes(p.contract(), 499)}, "claim_unproven"),
        ({"closes": closes(p.contract(), 500)[::-1]}, "wrong_signer"),
        ({"closes": closes(p.contract(), 500, session=OTHER.agreement.session)}, "claim_unproven"),
    ],
)
def test_a_claim_that_proves_nothing_is_refused(changes: dict[str, Any], code: str) -> None:
    assert code_of(open_claim, settle(p.contract(), **changes)) == code


def test_a_voucher_of_the_identity_key_is_not_one() -> None:
    contract = p.contract()
    text = p.voucher(contract, 500).message
    forged = codec.sign(text, p.BUYER, p.NETWORK).data
    assert code_of(open_claim, settle(contract, voucher=forged)) == "wrong_signer"


def test_a_stranger_cannot_settle_even_in_its_own_name() -> None:
    assert code_of(open_claim, settle(p.contract(), p.STRANGER)) == "wrong_signer"


@pytest.mark.parametrize("verification", ["det", "repl", "evid"])
def test_a_receipt_adds_up(verification: Any) -> None:
    contract = p.sign_contract(msgspec.structs.replace(TEXT, verification=verification))
    receipt = settlement.make_receipt(
        contract,
        cap_nanos=1_000_000,
        paid_nanos=123_457,
        voucher_hash=None,
        outcome="closed",
        now=p.NOW,
    )
    assert receipt.paid_nanos == receipt.seller_nanos + receipt.fee_nanos
    assert receipt.cap_nanos == receipt.paid_nanos + receipt.refund_nanos
    assert receipt.fee_nanos == 123_457 * 250 // 10_000
    assert receipt.not_guaranteed == settlement.NOT_GUARANTEED[verification]


@pytest.mark.parametrize("paid", [-1, 1_000_001])
def test_a_receipt_never_overpays(paid: int) -> None:
    with pytest.raises(ValueError, match="more than the cap"):
        settlement.make_receipt(
            p.contract(),
            cap_nanos=1_000_000,
            paid_nanos=paid,
            voucher_hash=None,
            outcome="closed",
            now=p.NOW,
        )
