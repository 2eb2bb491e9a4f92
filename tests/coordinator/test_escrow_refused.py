"""Grant requests and claims that must be refused, and move nothing."""

from __future__ import annotations

from typing import Any

from lumaris_coordinator.bounds import CAP_NANOS_MIN
from lumaris_protocol import envelope
from lumaris_protocol.ids import derive_id
from tests.coordinator.builders import (
    CAP,
    NETWORK,
    Deal,
    Market,
    Party,
)
from tests.coordinator.escrows import (
    FUNDS,
    setting,
    state_of,
)


def refused_grants(deal: Deal) -> dict[str, tuple[bytes, int, str]]:
    """Grant requests that must be refused: body, status, code."""
    eve = Party("eve")

    def changed(**changes: Any) -> bytes:
        return Deal(
            deal.buyer, deal.seller, changes.pop("coordinator", deal.coordinator),
            cap=changes.pop("cap", CAP), now=deal.now, fee_bps=changes.pop("fee_bps", 500),
            network=changes.pop("network", NETWORK), changes=changes,
        ).grant_request()  # fmt: skip

    genuine = deal.grant_request()
    flipped = bytearray(genuine)
    flipped[-1] ^= 1
    payload = envelope.decode(genuine).payload[:-1] + b',"tip_nanos":1}'
    unknown = envelope.seal(deal.buyer.key, NETWORK, "grant_request", payload)
    return {
        "random bytes": (b"\x07" * 500, 400, "malformed"),
        "empty": (b"", 400, "malformed"),
        "forged": (bytes(flipped), 400, "bad_signature"),
        "by the seller": (deal.grant_request(signer=deal.seller), 400, "wrong_signer"),
        "by a stranger": (deal.grant_request(signer=eve, buyer=eve.peer), 400, "wrong_signer"),
        "one signature": (
            deal.grant_request(agreement_by_seller=deal.signed_by(deal.buyer)),
            400,
            "wrong_signer",
        ),
        "two agreements": (
            deal.grant_request(
                agreement_by_seller=Deal(
                    deal.buyer, deal.seller, deal.coordinator, cap=CAP + 1, number=deal.number
                ).signed_by(deal.seller)
            ),
            422,
            "terms_changed",
        ),
        "another network": (changed(network="other"), 400, "bad_signature"),
        "another coordinator": (changed(coordinator=eve.peer), 400, "wrong_domain"),
        "another fee": (changed(fee_bps=0), 422, "terms_refused"),
        "another currency": (changed(currency="EUR"), 422, "terms_refused"),
        "a check that cannot be": (changed(tier="container"), 422, "terms_refused"),
        "a cap of nothing": (changed(cap=0), 422, "terms_refused"),
        "a cap below the least": (changed(cap=CAP_NANOS_MIN - 1), 422, "terms_refused"),
        "with oneself": (
            Deal(deal.buyer, deal.buyer, deal.coordinator, now=deal.now).grant_request(),
            400,
            "wrong_signer",
        ),
        "over the funds": (changed(cap=FUNDS + 1), 402, "no_funds"),
        "start passed": (changed(issued_at=deal.now - 200, start_by=deal.now - 61), 400, "expired"),
        "from the future": (
            changed(issued_at=deal.now + 61, start_by=deal.now + 71),
            400,
            "not_yet_valid",
        ),
        "too long": (changed(ends_at=deal.now + 24 * 3600 + 1), 400, "malformed"),
        "session twice": (changed(session=deal.session), 409, "already_granted"),
        "oversize document": (genuine + b"\0" * (64 * 1024), 413, "oversize"),
        "oversize body": (b"\0" * (5 * 64 * 1024 + 1), 413, "oversize"),
        "wrong type": (deal.voucher(1), 400, "wrong_type"),
        "unknown field": (unknown, 400, "unknown_field"),
    }


async def test_grants_refused(market: Market) -> None:
    deal, _ = await setting(market)
    for case, (body, status, code) in refused_grants(deal).items():
        answer = await market.client.post("/v1/grants", content=body)
        assert (answer.status_code, answer.json()["code"]) == (status, code), (case, answer.text)
        assert answer.json()["money_moved"] is False
    assert await market.free(deal.buyer) == FUNDS - CAP
    assert await market.free(deal.seller) == 0
    assert (await market.audit())["balanced"]


async def test_grant_needs_registered_parties(market: Market) -> None:
    buyer = await market.party("buyer", FUNDS)
    answer = await market.client.post(
        "/v1/grants", content=market.deal(buyer, Party("nobody")).grant_request()
    )
    assert answer.json()["code"] == "not_certified"
    assert await market.free(buyer) == FUNDS


def refused_claims(deal: Deal, grant: bytes) -> dict[str, tuple[bytes, int, str]]:
    """Claims that must be refused: body, status, code."""
    eve, seller = Party("eve"), deal.seller
    other = Deal(deal.buyer, seller, deal.coordinator, now=deal.now)

    def claim(total: int = 5_000, **changes: Any) -> bytes:
        return deal.claim(
            changes.pop("party", seller), changes.pop("grant", grant), total, **changes
        )

    genuine = claim()
    flipped = bytearray(genuine)
    flipped[-1] ^= 1
    forged_voucher = deal.voucher(5_000, signer=seller.session_key)
    forged_grant = bytearray(grant)
    forged_grant[-1] ^= 1
    return {
        "random bytes": (b"\x07" * 500, 400, "malformed"),
        "forged": (bytes(flipped), 400, "bad_signature"),
        "by a stranger": (claim(party=eve), 400, "wrong_signer"),
        "by another key": (claim(signer=eve), 400, "wrong_signer"),
        "over the cap": (claim(CAP + 1), 422, "over_cap"),
        "more than vouchered": (claim(total_nanos=5_001), 422, "claim_unproven"),
        "no voucher": (claim(voucher=None), 422, "claim_unproven"),
        "forged voucher": (claim(voucher=forged_voucher), 400, "wrong_signer"),
        "voucher of another session": (
            claim(voucher=other.voucher(5_000)),
            422,
            "voucher_foreign",
        ),
        "forged grant": (claim(grant=bytes(forged_grant)), 400, "bad_signature"),
        "another session": (
            claim(session=derive_id("session", b"x")),
            400,
            "wrong_domain",
        ),
        "another coordinator": (claim(coordinator=eve.peer), 400, "wrong_domain"),
        "closes of another total": (claim(closes=deal.closes(4_000)), 422, "claim_unproven"),
        "one side's closes": (
            claim(closes=(deal.closes(5_000)[0],) * 2),
            400,
            "wrong_signer",
        ),
        "from the future": (claim(issued_at=deal.now + 61), 400, "not_yet_valid"),
        "oversize": (genuine + b"\0" * (64 * 1024), 413, "oversize"),
        "wrong type": (deal.grant_request(), 400, "wrong_type"),
        "another agreement": (
            other.claim(seller, grant, 5_000),
            422,
            "grant_invalid",
        ),
    }


async def test_claims_refused(market: Market) -> None:
    deal, grant = await setting(market)
    for case, (body, status, code) in refused_claims(deal, grant).items():
        answer = await market.settle(body)
        assert (answer.status_code, answer.json()["code"]) == (status, code), (case, answer.text)
        assert answer.json()["money_moved"] is False
    assert (await state_of(market, deal, deal.buyer))["state"] == "held"
    assert await market.free(deal.seller) == 0
    assert (await market.audit())["balanced"]
