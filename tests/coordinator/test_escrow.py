"""Grants and settlements: what is held, what is paid, and every repetition."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TypeVar

import msgspec
import pytest
import trio

from lumaris_coordinator.bounds import CAP_NANOS_MIN
from lumaris_coordinator.escrow import grants as granting
from lumaris_coordinator.store.port import Connection, all_rows
from lumaris_protocol import agreements, receipts
from lumaris_protocol import coordinator_api as api
from tests.coordinator.builders import (
    CAP,
    NETWORK,
    START,
    Clock,
    Market,
    bond_request,
)
from tests.coordinator.conftest import open_market
from tests.coordinator.escrows import (
    FUNDS,
    receipt_of,
    setting,
    state_of,
)

T = TypeVar("T")
STORES = ("sqlite", "postgres")


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
    monkeypatch.setattr(granting, "ESCROWS_OPEN_PER_BUYER_MAX", 3)
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


async def test_counting_a_buyers_open_escrows_reads_the_open_ones_only(tmp_path: Path) -> None:
    """On SQLite: PostgreSQL reads a small table whole, whatever its indexes."""
    async with open_market(tmp_path / "state") as market:
        for what, group in (
            ("count(*)", ""),
            ("currency, sum(cap - paid - returned), count(*)", " GROUP BY currency"),
        ):
            sql = (
                f"EXPLAIN QUERY PLAN SELECT {what} FROM escrow"
                f" WHERE buyer IN (?) AND state IN ('held', 'claimed', 'disputed'){group}"
            )
            plan = await market.coordinator.store.read(partial(all_rows, sql=sql, values=("x",)))
            assert "COVERING INDEX escrow_open_by_buyer" in plan[0][3]


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
    assert (await market.audit())["transfers"] == 5  # credit, hold, seller, fee, refund


async def test_seller_gets_the_higher_voucher_that_the_buyer_showed(market: Market) -> None:
    deal, grant = await setting(market)
    assert (await market.settle(deal.claim(deal.buyer, grant, 9_000))).status_code == 202
    first = await market.settle(deal.claim(deal.seller, grant, 5_000))
    assert receipt_of(first.content).paid_nanos == 9_000
    again = await market.settle(deal.claim(deal.seller, grant, 5_000))
    assert receipt_of(again.content).paid_nanos == 9_000
    report = receipts.verify_bundle(first.content, trusted=frozenset({market.peer}))
    assert report.verdict == "valid", report.checks


async def test_both_may_close_for_less_than_was_vouchered(market: Market) -> None:
    deal, grant = await setting(market)
    claims = {
        "more than the voucher": (5_001, deal.closes(5_001)),
        "another total than both closed with": (4_000, deal.closes(3_999)),
        "without the closes": (4_000, ()),
    }
    for total, closes in claims.values():
        body = deal.claim(deal.buyer, grant, 5_000, total_nanos=total, closes=closes)
        assert (await market.settle(body)).json()["code"] == "claim_unproven"
    assert (await market.settle(deal.claim(deal.buyer, grant, 6_000))).status_code == 202
    bodies = [
        deal.claim(party, grant, 5_000, total_nanos=4_000, closes=deal.closes(4_000))
        for party in (deal.seller, deal.buyer)
    ]
    first, again = [await market.settle(body) for body in bodies]
    assert first.status_code == 200, first.text
    receipt = receipt_of(first.content)
    assert (receipt.outcome, receipt.paid_nanos) == ("closed", 4_000)
    assert receipt_of(again.content) == receipt
    report = receipts.verify_bundle(first.content, trusted=frozenset({market.peer}))
    assert report.verdict == "valid", report.checks
    without = msgspec.structs.replace(receipts.decode_bundle(first.content), closes=())
    report = receipts.verify_bundle(
        receipts.encode_bundle(without), trusted=frozenset({market.peer})
    )
    assert report.verdict == "invalid"
    assert await market.free(deal.buyer) == FUNDS - 4_000
    assert (await market.audit())["balanced"]


async def test_escrows_come_in_pages(market: Market) -> None:
    buyer, seller = await market.party("buyer", FUNDS), await market.party("seller")
    deals = [market.deal(buyer, seller, cap=CAP_NANOS_MIN) for _ in range(5)]
    granted = [await market.grant(deal) for deal in deals]
    assert (await market.settle(deals[2].claim(seller, granted[2], 100))).status_code == 200
    for party, state, expected in (
        (buyer, "", deals),
        (seller, "&state=held", [*deals[:2], *deals[3:]]),
        (seller, "&state=settled", deals[2:3]),
        (await market.party("eve"), "", []),
    ):
        seen, after = [], 0
        while after is not None:
            answer = await market.client.get(
                f"/v1/escrows?after={after}&limit=2{state}", headers=market.bearer(party)
            )
            page = answer.json()
            seen += [escrow["session"] for escrow in page["escrows"]]
            after = page["next"]
        assert seen == [deal.session for deal in expected]
    for query in ("limit=0", "limit=101", "after=-1", "state=lost"):
        answer = await market.client.get(f"/v1/escrows?{query}", headers=market.bearer(buyer))
        assert answer.json()["code"] == "malformed"


async def test_the_runway_ends_with_the_money_or_the_lease(market: Market) -> None:
    buyer, seller = await market.party("buyer", FUNDS), await market.party("seller")
    deals = [market.deal(buyer, seller, cap=cap) for cap in (90_000, CAP)]  # 1,000 nanos a second
    for deal in deals:
        await market.grant(deal)
    market.clock.now += 10
    found = [(await state_of(market, deal, buyer))["runway_s"] for deal in deals]
    assert found == [90, 3_590]


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


async def test_the_shared_interface_amends_and_lists(market: Market) -> None:
    buyer, seller = await market.party("buyer", FUNDS), await market.party("seller")
    deal, token = market.deal(buyer, seller), market.tokens["buyer"]

    async def call(request: api.Request[T]) -> T:
        answer = await market.client.request(
            request.method, request.path, content=request.body, headers=request.headers
        )
        return request.read(answer.status_code, answer.content)

    await call(api.grant(deal.grant_request()))
    later = await call(api.amend(deal.amend_request(1, cap=2 * CAP)))
    assert await market.grant(deal) == later
    (shown,) = (await call(api.escrows(token, state="held"))).escrows
    assert shown == await call(api.escrow(deal.session, token))
    assert (shown.cap_nanos, shown.held_nanos, shown.version) == (2 * CAP, 2 * CAP, 1)
    locked = await call(api.bond(bond_request(buyer, market.peer, "lock", CAP, now=market.now)))
    assert [bond.locked_nanos for bond in locked.bonds] == [CAP]
    assert (await call(api.bonds(token))).bonds[0].peer == buyer.peer
    (wallet,) = (await call(api.account(token))).wallets
    assert (wallet.free_nanos, wallet.held_nanos) == (FUNDS - 3 * CAP, 2 * CAP)
    path = f"/v1/escrows/{deal.session}"
    first = await market.client.get(path, headers=market.bearer(buyer))
    headers = {**market.bearer(buyer), "if-none-match": first.headers["etag"]}
    assert (await market.client.get(path, headers=headers)).status_code == 304
    await market.settle(deal.claim(buyer, later, 100))
    assert (await market.client.get(path, headers=headers)).status_code == 200


async def test_escrow_is_shown_to_its_parties_only(market: Market) -> None:
    deal, _ = await setting(market)
    eve = await market.party("eve")
    for headers, status in ((market.bearer(eve), 404), ({}, 401)):
        answer = await market.client.get(f"/v1/escrows/{deal.session}", headers=headers)
        assert answer.status_code == status


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
            "UPDATE escrow SET by_seller = ? WHERE agreement_hash = ?", (b"\0", deals[0].hash)
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
