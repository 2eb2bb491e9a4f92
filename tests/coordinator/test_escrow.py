"""Grants and settlements: every row of the table, every refusal, every repetition."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import trio

from lumaris_coordinator.bounds import CAP_NANOS_MIN
from lumaris_coordinator.escrow import service
from lumaris_coordinator.store import sqlite
from lumaris_coordinator.store.sqlite import Connection
from lumaris_protocol import agreements, codec, envelope, receipts
from lumaris_protocol.ids import derive_id
from lumaris_protocol.machines.escrow import ESCROW
from lumaris_protocol.messages.receipt import Receipt
from tests.coordinator.builders import CAP, NETWORK, START, Clock, Deal, Market, Party, key_of
from tests.coordinator.conftest import open_market

FUNDS = 5 * CAP


async def setting(market: Market) -> tuple[Deal, bytes]:
    """A granted deal between a funded buyer and a seller."""
    buyer, seller = await market.party("buyer", FUNDS), await market.party("seller")
    deal = market.deal(buyer, seller)
    return deal, await market.grant(deal)


def receipt_of(body: bytes) -> Receipt:
    bundle = receipts.decode_bundle(body)
    return codec.open_signed(bundle.receipt, Receipt, network=NETWORK).message


async def state_of(market: Market, deal: Deal, party: Party) -> dict[str, Any]:
    answer = await market.client.get(f"/v1/escrows/{deal.session}", headers=market.bearer(party))
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


async def test_grant_holds_the_cap(market: Market) -> None:
    deal, data = await setting(market)
    contract = agreements.join(
        deal.signed_by(deal.buyer), deal.signed_by(deal.seller), network=NETWORK
    )
    grant = agreements.open_grant(
        data, contract, network=NETWORK, coordinator=market.peer, now=market.now
    )
    assert grant.message.cap_nanos == CAP
    assert grant.message.settle_by == deal.agreement.ends_at + 30 * 24 * 3600
    account = await market.account(deal.buyer)
    assert (account["free_nanos"], account["held_nanos"]) == (FUNDS - CAP, CAP)
    assert account["sessions_open"] == 1
    assert (await market.audit())["balanced"]


async def test_same_agreement_same_grant_even_at_once(market: Market) -> None:
    buyer, seller = await market.party("buyer", FUNDS), await market.party("seller")
    deal = market.deal(buyer, seller)
    bodies: list[bytes] = []

    async def ask() -> None:
        bodies.append(await market.grant(deal))

    async with trio.open_nursery() as nursery:
        for _ in range(16):
            nursery.start_soon(ask)
    assert len(bodies) == 16
    assert len(set(bodies)) == 1
    assert await market.free(buyer) == FUNDS - CAP
    market.clock.now += 24 * 3600 - 1  # long after `start_by`: the lost answer can still be had
    assert await market.grant(deal) == bodies[0]


async def test_a_lost_answer_is_had_again_whatever_the_time_and_the_terms(tmp_path: Path) -> None:
    clock, state = Clock(), tmp_path / "state"
    async with open_market(state, clock=clock) as market:
        deal, data = await setting(market)
    clock.now += 3_600 + 1_000  # the agreement itself is over
    async with open_market(state, clock=clock, fee_bps=100) as market:
        request = deal.grant_request(issued_at=market.now)
        answer = await market.client.post("/v1/grants", content=request)
        assert (answer.status_code, answer.content) == (200, data)
        later = market.deal(deal.buyer, deal.seller)
        answer = await market.client.post("/v1/grants", content=later.grant_request())
        assert answer.json()["code"] == "terms_refused"  # new ones are held to the new fee
        assert (await market.audit())["balanced"]


async def test_open_escrows_of_a_buyer_are_bounded(
    market: Market, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service, "ESCROWS_OPEN_PER_BUYER_MAX", 3)
    buyer, seller = await market.party("buyer", FUNDS), await market.party("seller", FUNDS)
    deals = [market.deal(buyer, seller, cap=CAP_NANOS_MIN) for _ in range(4)]
    grants = [await market.grant(deal) for deal in deals[:3]]
    assert (await market.settle(deals[0].claim(buyer, grants[0], 100))).status_code == 202
    answer = await market.client.post("/v1/grants", content=deals[3].grant_request())
    assert (answer.status_code, answer.json()["code"]) == (429, "too_many_holds")
    assert await market.free(buyer) == FUNDS - 3 * CAP_NANOS_MIN
    assert await market.grant(deals[0]) == grants[0]  # a repetition opens nothing
    await market.grant(market.deal(seller, buyer))  # and another buyer has its own bound
    assert (await market.settle(deals[0].claim(seller, grants[0], 100))).status_code == 200
    await market.grant(deals[3])
    assert (await market.audit())["balanced"]


async def test_counting_a_buyers_open_escrows_reads_the_open_ones_only(market: Market) -> None:
    for what in ("count(*)", "coalesce(sum(cap), 0), count(*)"):
        plan = sqlite.all_rows(
            market.coordinator.store.reader,
            f"EXPLAIN QUERY PLAN SELECT {what} FROM escrow"
            " WHERE buyer = ? AND state IN ('held', 'claimed')",
            ("x",),
        )
        assert "COVERING INDEX escrow_open_by_buyer" in plan[0][3]


async def prepare(market: Market, deal: Deal, grant: bytes, state: str) -> None:
    """Bring an escrow to a state."""
    if state == "claimed":
        answer = await market.settle(deal.claim(deal.buyer, grant, 3_000))
        assert answer.status_code == 202
    elif state == "settled":
        answer = await market.settle(deal.claim(deal.seller, grant, 4_000))
        assert answer.status_code == 200
    elif state == "expired":
        market.clock.now = START + 3_600 + 30 * 24 * 3600 + 1
        await market.coordinator.escrows.expire_due()
        await market.register(deal.buyer)
        await market.register(deal.seller)


# state, fact -> the next state, paid, outcome; None is a refusal.
ROWS: dict[tuple[str, str], tuple[str, int, str] | None] = {
    ("held", "seller_claim"): ("settled", 5_000, "claimed"),
    ("held", "both_closed"): ("settled", 5_000, "closed"),
    ("held", "buyer_claim"): ("claimed", 0, ""),
    ("held", "window_ended"): ("expired", 0, "expired"),
    ("claimed", "seller_claim"): ("settled", 5_000, "claimed"),
    ("claimed", "both_closed"): ("settled", 5_000, "closed"),
    ("claimed", "buyer_claim"): ("claimed", 0, ""),
    ("claimed", "window_ended"): ("expired", 3_000, "expired"),
    ("settled", "seller_claim"): None,
    ("settled", "buyer_claim"): None,
    ("settled", "both_closed"): None,
    ("expired", "seller_claim"): None,
    ("expired", "buyer_claim"): None,
    ("expired", "both_closed"): None,
}


def test_every_row_of_the_table_is_listed_here() -> None:
    assert set(ROWS) == {(row.state, row.fact) for row in ESCROW.rows}


@pytest.mark.parametrize(("state", "fact"), list(ROWS))
async def test_row(market: Market, state: str, fact: str) -> None:
    deal, grant = await setting(market)
    await prepare(market, deal, grant, state)
    before = await market.free(deal.seller)
    expected = ROWS[state, fact]
    if fact == "window_ended":
        await prepare(market, deal, grant, "expired")
    else:
        party = deal.buyer if fact == "buyer_claim" else deal.seller
        body = deal.claim(party, grant, 5_000, closed=fact == "both_closed")
        answer = await market.settle(body)
        if expected is None:
            assert (answer.status_code, answer.json()["code"]) == (409, "already_settled")
            assert answer.json()["money_moved"] is False
        else:
            assert answer.status_code == (202 if fact == "buyer_claim" else 200)
    found = await state_of(market, deal, deal.buyer)
    assert (await market.audit())["balanced"]
    if expected is None:
        assert found["state"] == state
        assert await market.free(deal.seller) == before
        return
    assert (found["state"], found["paid_nanos"]) == expected[:2]
    if expected[2]:
        paid = expected[1]
        assert await market.free(deal.seller) == before + paid - paid * 500 // 10_000
        assert await market.free(deal.buyer) == FUNDS - paid
        answer = await market.client.get(
            f"/v1/receipts/{found['receipt']}", headers=market.bearer(deal.seller)
        )
        receipt = receipt_of(answer.content)
        assert (receipt.outcome, receipt.paid_nanos) == (expected[2], paid)


async def test_settling_again_returns_the_same_receipt(market: Market) -> None:
    deal, grant = await setting(market)
    body = deal.claim(deal.seller, grant, 5_000)
    answers: list[bytes] = []

    async def ask() -> None:
        answer = await market.settle(body)
        assert answer.status_code == 200
        answers.append(receipts.decode_bundle(answer.content).receipt)

    async with trio.open_nursery() as nursery:
        for _ in range(16):
            nursery.start_soon(ask)
    assert len(set(answers)) == 1
    buyers = await market.settle(deal.claim(deal.buyer, grant, 5_000))
    assert receipts.decode_bundle(buyers.content).receipt == answers[0]
    assert await market.free(deal.seller) == 4_750
    assert market.coordinator.log.head.size == 1


async def test_seller_gets_the_higher_voucher_that_the_buyer_showed(market: Market) -> None:
    deal, grant = await setting(market)
    assert (await market.settle(deal.claim(deal.buyer, grant, 9_000))).status_code == 202
    first = await market.settle(deal.claim(deal.seller, grant, 5_000))
    assert receipt_of(first.content).paid_nanos == 9_000
    again = await market.settle(deal.claim(deal.seller, grant, 5_000))
    assert receipt_of(again.content).paid_nanos == 9_000
    report = receipts.verify_bundle(first.content, trusted=frozenset({market.peer}))
    assert report.verdict == "valid", report.checks


async def test_a_lower_claim_of_the_buyer_changes_nothing(market: Market) -> None:
    deal, grant = await setting(market)
    for total in (9_000, 4_000, 9_000):
        answer = await market.settle(deal.claim(deal.buyer, grant, total))
        assert answer.json()["vouchered_nanos"] == 9_000
    assert len((await state_of(market, deal, deal.seller))["events"]) == 2


async def test_claim_after_the_window_finds_it_ended(market: Market) -> None:
    deal, grant = await setting(market)
    market.clock.now = START + 3_600 + 30 * 24 * 3600 + 1
    answer = await market.settle(deal.claim(deal.seller, grant, 5_000))
    assert answer.json()["code"] == "already_settled"
    await market.register(deal.buyer)
    assert await market.free(deal.buyer) == FUNDS
    assert (await state_of(market, deal, deal.buyer))["state"] == "expired"


async def test_downtime_extends_every_open_deadline(tmp_path: Path) -> None:
    clock = Clock()
    async with open_market(tmp_path / "state", clock=clock) as market:
        deal, grant = await setting(market)
    clock.now += 40 * 24 * 3600  # away for longer than the whole window
    async with open_market(tmp_path / "state", clock=clock) as market:
        await market.coordinator.run_chores()
        answer = await market.settle(deal.claim(deal.seller, grant, 5_000))
        assert answer.status_code == 200, answer.text
        assert (await market.audit())["balanced"]


async def test_a_session_of_nothing(market: Market) -> None:
    buyer, seller = await market.party("buyer", FUNDS), await market.party("seller")
    deal = market.deal(buyer, seller, cap=CAP_NANOS_MIN)
    grant = await market.grant(deal)
    answer = await market.settle(deal.claim(seller, grant, 0))
    assert receipt_of(answer.content).refund_nanos == CAP_NANOS_MIN
    assert await market.free(buyer) == FUNDS
    assert (await market.audit())["balanced"]


async def test_escrow_is_shown_to_its_parties_only(market: Market) -> None:
    deal, _ = await setting(market)
    eve = await market.party("eve")
    for headers, status in ((market.bearer(eve), 404), ({}, 401)):
        answer = await market.client.get(f"/v1/escrows/{deal.session}", headers=headers)
        assert answer.status_code == status


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


GRANT_CASES = list(refused_grants(Deal(Party("buyer"), Party("seller"), key_of("c").peer_id)))


@pytest.mark.parametrize("case", GRANT_CASES)
async def test_grant_refused(market: Market, case: str) -> None:
    deal, _ = await setting(market)
    body, status, code = refused_grants(deal)[case]
    answer = await market.client.post("/v1/grants", content=body)
    assert (answer.status_code, answer.json()["code"]) == (status, code), answer.text
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


CLAIM_CASES = list(
    refused_claims(Deal(Party("buyer"), Party("seller"), key_of("c").peer_id), b"grant")
)


@pytest.mark.parametrize("case", CLAIM_CASES)
async def test_claim_refused(market: Market, case: str) -> None:
    deal, grant = await setting(market)
    body, status, code = refused_claims(deal, grant)[case]
    answer = await market.settle(body)
    assert (answer.status_code, answer.json()["code"]) == (status, code), answer.text
    assert answer.json()["money_moved"] is False
    assert (await state_of(market, deal, deal.buyer))["state"] == "held"
    assert await market.free(deal.seller) == 0
    assert (await market.audit())["balanced"]


async def test_one_voucher_is_not_paid_twice_through_two_agreements(market: Market) -> None:
    deal, grant = await setting(market)
    twin = market.deal(deal.buyer, deal.seller, changes={"session": deal.session})
    answer = await market.client.post("/v1/grants", content=twin.grant_request())
    assert answer.json()["code"] == "already_granted"
    assert (await market.settle(deal.claim(deal.seller, grant, 5_000))).status_code == 200
    answer = await market.settle(twin.claim(deal.seller, grant, 5_000))
    assert answer.json()["code"] == "grant_invalid"
    assert await market.free(deal.seller) == 4_750


async def test_a_damaged_escrow_does_not_keep_the_others_from_ending(
    market: Market, caplog: pytest.LogCaptureFixture
) -> None:
    buyer, seller = await market.party("buyer", FUNDS), await market.party("seller")
    deals = [market.deal(buyer, seller, cap=CAP_NANOS_MIN + n) for n in range(3)]
    for deal in deals:
        await market.grant(deal)

    def damage(connection: Connection) -> None:
        connection.execute(
            "UPDATE escrow SET by_seller = x'00' WHERE agreement_hash = ?", (deals[0].hash,)
        )

    await market.coordinator.store.submit(damage)
    market.clock.now = START + 3_600 + 30 * 24 * 3600 + 1
    await market.coordinator.run_chores()
    await market.register(buyer)
    states = [(await state_of(market, deal, buyer))["state"] for deal in deals]
    assert states == ["held", "expired", "expired"]
    assert [deals[0].hash in record.getMessage() for record in caplog.records] == [True]
    assert await market.free(buyer) == FUNDS - CAP_NANOS_MIN
    assert (await market.audit())["balanced"]
