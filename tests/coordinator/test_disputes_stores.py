"""The statements of disputes on both kinds of store: each way to open, show, draw and end."""

from __future__ import annotations

import pytest

from lumaris_protocol import agreements, coordinator_api, receipts, settlement
from lumaris_protocol.limits import DISPUTE_BOND_NANOS_MIN
from tests.coordinator.builders import NETWORK, Market, Party
from tests.coordinator.court import HOUR, PRICE, Court, code, court_of, lock_bond
from tests.dispute_builders import Work, split, withdrawal

STORES = ("sqlite", "postgres")


@pytest.mark.slow
async def test_a_dispute_on_every_store(market: Market) -> None:
    court = await court_of(market)
    client, work = market.client, court.work
    shown = (work.order(), work.delivery())
    unpaid = await court.opened(court.seller, "unpaid_delivery", evidence=shown, amount=5_000)
    put_down = (await court.show(unpaid))["bond_nanos"]
    assert [await _disputed(court, one) for one in (court.seller, court.buyer)] == [put_down, 0]
    for party in (court.seller, court.buyer):
        body = split(court.contract, unpaid, party.key, award=7, refund=0, network=NETWORK)
        await client.post(f"/v1/disputes/{unpaid}/split", content=body)
    await court.settles(unpaid)
    assert await _disputed(court, court.seller) == 0
    await court.claimed(PRICE)
    await market.party("sybil")
    checker = await market.party("checker", 5_000_000)
    await lock_bond(market, checker, 1_000_000)
    wrong = await court.opened(court.buyer, "wrong_result", order=1, evidence=shown, amount=PRICE)
    missing = await court.opened(court.buyer, "not_delivered", amount=PRICE)
    await court.passes(1)
    assert (await court.show(wrong))["checkers"] == [checker.peer]
    assert code(await court.add(missing, Party("sybil"))) == "not_found"
    await court.add(missing, court.seller, *shown)
    body = withdrawal(court.contract, missing, court.buyer.key, network=NETWORK)
    answer = await client.post(f"/v1/disputes/{missing}/withdraw", content=body)
    assert answer.json()["state"] == "withdrawn"
    await court.passes(72 * HOUR + 1)
    await court.passes(1)
    assert (await court.settles(wrong))["rule"] == "check_missing"
    found = await client.get("/v1/disputes", headers=market.bearer(court.seller))
    page = coordinator_api.disputes("").read(found.status_code, found.content)
    assert [row.dispute for row in page.disputes] == [unpaid, wrong, missing]
    found = await client.get(f"/v1/disputes/{wrong}", headers=market.bearer(court.seller))
    detail = coordinator_api.dispute(wrong, "").read(found.status_code, found.content)
    assert detail.ruling is not None
    assert (detail.ruling.rule, detail.checkers) == ("check_missing", [checker.peer])


async def test_only_what_is_asked_stays_frozen(market: Market) -> None:
    """A claim over one order would keep all of a large escrow for three days."""
    court = await court_of(market)
    client, work = market.client, court.work
    path = f"/v1/escrows/{court.deal.session}"
    cap = court.deal.cap
    window = (await client.get(path, headers=market.bearer(court.buyer))).json()["settle_by"]
    await court.passes(window - market.now - 1)
    before = await market.free(court.buyer)
    shown = (work.order(), work.delivery(), work.voucher(300))
    dispute = await court.opened(court.seller, "unpaid_delivery", evidence=shown, amount=PRICE)
    await court.passes(1)
    assert await market.free(court.buyer) == before  # vouchers may still come for all of it
    await court.passes(1)
    kept = PRICE + 300
    found = (await client.get(path, headers=market.bearer(court.buyer))).json()
    assert (found["state"], found["held_nanos"]) == ("disputed", kept)
    assert await market.free(court.buyer) == before + cap - kept
    assert (await market.audit())["balanced"]
    late = court.deal.claim(court.seller, court.grant, cap)  # a voucher for what is back
    assert (await market.settle(late)).status_code in (200, 202)
    await court.passes(72 * HOUR)
    ruling = await court.settles(dispute)
    assert ruling["award_nanos"] == PRICE
    assert await market.free(court.buyer) == before + cap - PRICE
    found = (await client.get(path, headers=market.bearer(court.seller))).json()
    assert (found["paid_nanos"], found["held_nanos"]) == (PRICE, 0)
    answer = await client.get(
        f"/v1/receipts/{found['receipt']}", headers=market.bearer(court.seller)
    )
    report = receipts.verify_bundle(answer.content, trusted=frozenset({market.peer}))
    assert report.verdict == "valid", report.checks


async def test_money_of_withdrawn_split_and_returned_claims(market: Market) -> None:
    """The least bond for a withdrawal, a split out of the seller's account, and a ruling that finds
    more in the bond than the dispute held."""
    court = await court_of(market, bond=0)
    await court.claimed(10_000)
    buyer, seller, _ = await court.money()
    dispute = await court.opened(court.buyer, "not_delivered", amount=5_000)
    body = withdrawal(court.contract, dispute, court.buyer.key, network=NETWORK)
    await market.client.post(f"/v1/disputes/{dispute}/withdraw", content=body)
    lost = DISPUTE_BOND_NANOS_MIN
    assert (await court.money())[:2] == (buyer - lost, seller + lost // 2)
    shown = (court.work.order(), court.work.delivery())
    dispute = await court.opened(court.buyer, "wrong_result", order=1, evidence=shown, amount=PRICE)
    for party in (court.seller, court.buyer):
        body = split(court.contract, dispute, party.key, award=0, refund=600, network=NETWORK)
        await market.client.post(f"/v1/disputes/{dispute}/split", content=body)
    await court.settles(dispute)
    buyer, seller = buyer - 2 * lost + 600, seller + lost - 600
    assert (await court.money())[:2] == (buyer, seller)
    other = await another(court)
    await other.claimed(10_000)
    buyer, seller, _ = await other.money()
    dispute = await other.opened(other.buyer, "not_delivered", amount=10_000)
    assert (await other.show(dispute))["stake_nanos"] == 0
    await lock_bond(market, court.seller, 1_000_000)
    await court.passes(72 * HOUR + 1)
    assert (await other.settles(dispute))["collected_nanos"] == 11_000
    assert await other.money() == (buyer + 10_500, seller - 1_000_000, 1_000_000 - 11_000)


async def _disputed(court: Court, party: Party) -> int:
    headers = court.market.bearer(party)
    found = (await court.market.client.get("/v1/accounts/me", headers=headers)).json()
    assert found["wallets"][0]["disputed_nanos"] == found["disputed_nanos"]
    return int(found["disputed_nanos"])


async def test_claims_that_are_evidence_for_the_other_side(market: Market) -> None:
    """Neither claim reaches the other side's session: the coordinator shows it what it was sent."""
    court = await court_of(market)
    path = f"/v1/escrows/{court.deal.session}/claims"
    low = court.deal.claim(court.buyer, court.grant, 10)
    assert (await market.settle(low)).status_code == 202
    forged = []
    for total in (500, 600):
        papers = settlement.Papers(
            court.deal.session,
            court.contract.by_buyer,
            court.contract.by_seller,
            court.grant,
            court.deal.voucher(total, signer=court.seller.session_key),
            total,
        )
        forged.append(
            settlement.claim(
                papers, court.seller.key, network=NETWORK, coordinator=market.peer, now=total
            )
        )
        assert code(await market.settle(forged[-1])) in ("wrong_signer", "bad_signature")
    stranger = await market.client.get(path, headers=market.bearer(await market.party("eve")))
    assert code(stranger) == "not_found"
    seen = {}
    for party in (court.buyer, court.seller):
        answer = await market.client.get(path, headers=market.bearer(party))
        request = coordinator_api.escrow_claims(court.deal.session, "")
        found = request.read(answer.status_code, answer.content)
        assert (found.paid_nanos, found.buyer_bond_nanos, found.checkers) == (0, 0, 0)
        assert found.seller_bond_nanos == (await court.money())[2]
        seen = {(one.by, one.taken): one.document for one in found.claims}
        # Of what is refused the first is kept: nobody is made to write by sending more of it.
        assert seen == {(court.buyer.peer, True): low, (court.seller.peer, False): forged[0]}
    stale = (seen[court.buyer.peer, True], court.work.voucher(900))
    dispute = await court.opened(court.seller, "stale_voucher", evidence=stale, amount=900)
    assert (await court.settles(dispute))["rule"] == "stale_voucher"
    shown = (seen[court.seller.peer, False],)
    dispute = await court.opened(court.buyer, "forged_voucher", evidence=shown, amount=0)
    assert (await court.settles(dispute))["rule"] == "forged_voucher"


async def another(court: Court) -> Court:
    """Another session of the same parties."""
    market, buyer, seller = court.market, court.buyer, court.seller
    deal = market.deal(buyer, seller)
    grant = await market.grant(deal)
    contract = agreements.join(deal.signed_by(buyer), deal.signed_by(seller), network=NETWORK)
    work = Work(contract, buyer.session_key, seller.session_key, NETWORK)
    return Court(market, buyer, seller, deal, grant, work)
