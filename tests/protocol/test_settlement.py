"""What may be paid: a co-signed lower end, amendments, and rulings, as a receipt file proves it."""

from __future__ import annotations

from typing import Any

import pytest

from lumaris_protocol import agreements, codec, merkle, notes, receipts, settlement
from lumaris_protocol.agreements import Bounds, Contract
from lumaris_protocol.errors import LumarisError
from lumaris_protocol.keys import KeyPair
from lumaris_protocol.limits import AMENDMENTS_MAX
from lumaris_protocol.messages.dispute import Facts, Ruling
from lumaris_protocol.messages.payment import Amendment, Close
from lumaris_protocol.messages.receipt import LogProof, ReceiptBundle
from tests.protocol import parties as p

CONTRACT, OTHER = p.contract(), p.contract(name="2")
CAP, ENDS_AT = CONTRACT.agreement.terms.cap_nanos, CONTRACT.agreement.ends_at
BASE = Bounds(0, CAP, ENDS_AT)


def closes(total: int, *, of: Contract = CONTRACT, seller: int | None = None) -> tuple[bytes, ...]:
    """Both sides' Close; the seller's may name another total."""
    totals = ((p.BUYER_SESSION, total), (p.SELLER_SESSION, total if seller is None else seller))
    return tuple(
        codec.sign(
            Close(
                session=of.agreement.session, seq=9, prev=of.hash, total_nanos=nanos,
                orders_accepted=1, reason="closed",
            ),
            key,
            p.NETWORK,
        ).data
        for key, nanos in totals
    )  # fmt: skip


def amendment(
    n: int, cap: int, longer_s: int = 0, *, key: KeyPair = p.BUYER, **changes: Any
) -> bytes:
    fields: dict[str, Any] = {
        "agreement_hash": CONTRACT.hash,
        "session": CONTRACT.agreement.session,
        "n": n,
        "cap_nanos": cap,
        "ends_at": ENDS_AT + longer_s,
        "issued_at": p.NOW,
    }
    return codec.sign(Amendment(**(fields | changes)), key, p.NETWORK).data


def both(n: int, cap: int, longer_s: int) -> tuple[bytes, bytes]:
    return amendment(n, cap, longer_s), amendment(n, cap, longer_s, key=p.SELLER)


def ruling(nanos: int, *, name: str = "1", key: KeyPair = p.COORDINATOR, **changes: Any) -> bytes:
    facts = Facts(
        paid_nanos=0, claimed_nanos=0, remainder_nanos=CAP, bond_nanos=0, stake_nanos=0,
        ended="done", opened_at=p.NOW, evidence_until=p.NOW, ends_at=p.NOW,
    )  # fmt: skip
    fields: dict[str, Any] = {
        "dispute": p.id_of("dispute", name), "agreement_hash": CONTRACT.hash,
        "claim": "unpaid_delivery", "order": 1, "opener": p.SELLER.peer_id,
        "buyer": p.BUYER.peer_id, "seller": p.SELLER.peer_id, "currency": "TEST",
        "fault": "buyer", "rule": "delivered", "award_nanos": nanos, "refund_nanos": 0,
        "slash_nanos": 0, "collected_nanos": 0, "victim_nanos": 0, "bond_returned": True,
        "evidence_root": p.digest_of("evidence"), "documents": 1, "facts": facts,
        "issued_at": p.NOW,
    }  # fmt: skip
    return codec.sign(Ruling(**(fields | changes)), key, p.NETWORK).data


def checked(
    outcome: Any,
    paid: int,
    vouchered: int,
    *,
    cap: int = CAP,
    longer_s: int = 0,
    enclosed: dict[str, Any] | None = None,
) -> str:
    """The verdict on a logged receipt: `valid`, or the check that does not hold."""
    voucher = p.voucher(CONTRACT, vouchered)
    text = settlement.make_receipt(
        CONTRACT, cap_nanos=cap, paid_nanos=paid, voucher_hash=voucher.hash, outcome=outcome,
        now=p.NOW + 100,
    )  # fmt: skip
    receipt = codec.sign(text, p.COORDINATOR, p.NETWORK)
    tree = merkle.Tree([merkle.leaf_hash(merkle.commitment(p.SALT, receipt.data))])
    checkpoint = merkle.Checkpoint(notes.log_origin(p.NETWORK), 1, tree.root())
    fields: dict[str, Any] = {
        "format": "lumaris-receipt/1",
        "network": p.NETWORK,
        "receipt": receipt.data,
        "agreement_by_buyer": CONTRACT.by_buyer,
        "agreement_by_seller": CONTRACT.by_seller,
        "grant": p.grant(CONTRACT, cap_nanos=cap, not_after=ENDS_AT + longer_s).data,
        "voucher": voucher.data,
        "salt": p.SALT,
        "proof": LogProof(index=0, size=1, hashes=()),
        "checkpoint": merkle.sign_checkpoint(checkpoint, p.COORDINATOR),
    }
    data = receipts.encode_bundle(ReceiptBundle(**(fields | (enclosed or {}))))
    report = receipts.verify_bundle(data, trusted=frozenset({p.COORDINATOR.peer_id}))
    if report.verdict == "invalid":
        return report.checks[-1].name
    return report.verdict


@pytest.mark.parametrize(
    ("outcome", "paid", "enclosed", "expected"),
    [
        ("closed", 400, {"closes": closes(400)}, "valid"),
        ("closed", 500, {"closes": closes(500)}, "valid"),
        ("closed", 0, {"closes": closes(0)}, "valid"),
        ("closed", 501, {"closes": closes(501)}, "voucher"),
        ("closed", 499, {"closes": closes(400)}, "voucher"),
        ("closed", 500, {}, "voucher"),
        ("closed", 400, {"closes": closes(400, seller=399)}, "voucher"),
        ("closed", 400, {"closes": closes(400, of=OTHER)}, "voucher"),
        ("closed", 400, {"closes": closes(400)[::-1]}, "voucher"),
        ("closed", 400, {"closes": closes(400)[:1] * 2}, "voucher"),
        ("closed", 400, {"closes": closes(400)[:1]}, "voucher"),
        ("claimed", 400, {"closes": closes(400)}, "voucher"),
        ("claimed", 400, {}, "voucher"),
        ("claimed", 500, {"rulings": (ruling(0),)}, "voucher"),
        ("ruled", 500, {}, "voucher"),
        ("ruled", 500, {"rulings": (ruling(0),)}, "valid"),
        ("ruled", 700, {"rulings": (ruling(200),)}, "valid"),
        ("ruled", 701, {"rulings": (ruling(200),)}, "voucher"),
        ("ruled", 499, {"rulings": (ruling(200),)}, "voucher"),
        ("ruled", 900, {"rulings": (ruling(200), ruling(200, name="2"))}, "valid"),
        ("ruled", 900, {"rulings": (ruling(200), ruling(200))}, "voucher"),
        ("ruled", 700, {"rulings": (ruling(200, agreement_hash=OTHER.hash),)}, "voucher"),
        ("ruled", 700, {"rulings": (ruling(200, key=p.SELLER),)}, "voucher"),
    ],
)
def test_what_is_paid_follows_from_the_documents(
    outcome: str, paid: int, enclosed: dict[str, Any], expected: str
) -> None:
    assert checked(outcome, paid, 500, enclosed=enclosed) == expected


@pytest.mark.parametrize(
    ("amendments", "expected"),
    [
        ((*both(1, CAP + 500, 60),), "valid"),
        ((amendment(1, CAP + 100), *both(2, CAP + 500, 60)), "valid"),
        ((*both(1, CAP + 500, 59), *both(3, CAP + 500, 60)), "valid"),
        ((), "grant"),
        ((amendment(1, CAP + 500, 60),), "grant"),
        ((*both(1, CAP + 499, 60),), "grant"),
        ((*both(1, CAP + 500, 61),), "grant"),
        ((*both(2, CAP + 500, 60), amendment(1, CAP + 500, 60)), "grant"),
        ((*both(1, CAP + 500, 60)[::-1],), "grant"),
    ],
)
def test_the_cap_follows_from_the_amendments(amendments: tuple[bytes, ...], expected: str) -> None:
    enclosed = {"amendments": amendments}
    found = checked("claimed", CAP + 400, CAP + 400, cap=CAP + 500, longer_s=60, enclosed=enclosed)
    assert found == expected


def test_the_fullest_file_fits() -> None:
    pairs = [copy for n in range(1, AMENDMENTS_MAX + 1) for copy in both(n, CAP + n, n)]
    enclosed = {
        "amendments": tuple(pairs),
        "rulings": tuple(ruling(1, name=str(n)) for n in range(16)),
    }
    found = checked(
        "ruled", CAP, CAP - 16, cap=CAP + AMENDMENTS_MAX, longer_s=AMENDMENTS_MAX, enclosed=enclosed
    )
    assert found == "valid"


def test_an_amendment_gives_the_bounds_that_follow() -> None:
    first = agreements.amend(CONTRACT, BASE, amendment(1, CAP + 1), None, network=p.NETWORK)
    assert first == Bounds(1, CAP + 1, ENDS_AT)
    later = agreements.amend(CONTRACT, first, *both(5, CAP + 1, 60), network=p.NETWORK)
    assert later == Bounds(5, CAP + 1, ENDS_AT + 60)


@pytest.mark.parametrize(
    ("by_buyer", "by_seller", "code"),
    [
        (amendment(1, CAP - 1), None, "amendment_refused"),
        (amendment(1, CAP), None, "amendment_refused"),
        (amendment(1, CAP + 1, -1), None, "amendment_refused"),
        (amendment(1, CAP + 1, 60), None, "amendment_refused"),
        (*both(1, CAP, 24 * 3600), "amendment_refused"),
        (amendment(1, CAP + 1, agreement_hash=OTHER.hash), None, "amendment_refused"),
        (amendment(1, CAP + 1, session=OTHER.agreement.session), None, "amendment_refused"),
        (amendment(1, CAP + 1), amendment(1, CAP + 2, key=p.SELLER), "terms_changed"),
        (amendment(1, CAP + 1, key=p.SELLER), None, "wrong_signer"),
        (amendment(1, CAP + 1), amendment(1, CAP + 1), "wrong_signer"),
        (amendment(1, CAP + 1, key=p.BUYER_SESSION), None, "wrong_signer"),
        (p.voucher(CONTRACT, 1).data, None, "wrong_type"),
    ],
)
def test_amendments_that_do_not_follow(by_buyer: bytes, by_seller: bytes | None, code: str) -> None:
    with pytest.raises(LumarisError) as caught:
        agreements.amend(CONTRACT, BASE, by_buyer, by_seller, network=p.NETWORK)
    assert caught.value.code == code
