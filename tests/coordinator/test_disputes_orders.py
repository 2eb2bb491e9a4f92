"""Orders signed after the fact, payments given back twice, and leases that were made longer."""

from __future__ import annotations

import pytest
from msgspec.structs import replace as changed

from lumaris_protocol import agreements
from tests.coordinator.builders import NETWORK, Market
from tests.coordinator.court import HOUR, PRICE, bond_of, code, court_of, lock_bond
from tests.coordinator.test_disputes_checks import by_peer, result_court, run_elsewhere
from tests.dispute_builders import LIMITS, Work


async def test_an_order_that_the_seller_never_got_disputes_nothing(market: Market) -> None:
    court = await result_court(market)
    await lock_bond(market, court.buyer, 1_000_000)
    real, made = court.work.order(command="real"), court.work.delivery()
    fake = court.work.order(command="fake", seq=4_711)
    fields = {"order": 1, "amount": PRICE}
    refused = await court.open(court.buyer, "wrong_result", evidence=(fake, made), **fields)
    assert code(refused) == "evidence_insufficient"
    name = await court.opened(court.seller, "equivocation", evidence=(real, fake), amount=0)
    assert (await court.settles(name))["fault"] == "buyer"
    assert await bond_of(market, court.buyer) == 0


async def test_a_checker_is_compared_by_the_order_that_it_got(market: Market) -> None:
    court = await result_court(market, checkers=3)
    shown = (court.work.order(command="real"), court.work.delivery())
    dispute = await court.opened(court.buyer, "wrong_result", order=1, amount=PRICE, evidence=shown)
    await court.passes(1)
    (peer,) = (await court.show(dispute))["checkers"]
    checker = by_peer(court, peer)
    deal = market.deal(court.buyer, checker)
    copies = [deal.signed_by(party) for party in (court.buyer, checker)]
    contract = agreements.join(*copies, network=NETWORK)
    work = Work(contract, court.buyer.session_key, checker.session_key, NETWORK)
    work.order(command="another")  # what the checker got and ran
    result = work.delivery(output="of another")
    afterwards = work.order(command="real", seq=4_711)
    answer = await court.add(dispute, court.buyer, *work.agreements, afterwards, result)
    assert answer.json()["state"] == "checking"


async def test_a_cheap_order_signed_afterwards_takes_nothing_back(market: Market) -> None:
    court = await court_of(market)
    real, made = court.work.order(), court.work.delivery()
    await court.claimed(PRICE)
    fake = court.work.order(seq=99, limits=changed(LIMITS, cost_nanos=1))
    dispute = await court.opened(court.buyer, "not_delivered", amount=PRICE, evidence=(fake,))
    await court.add(dispute, court.seller, real, made, done=True)
    await court.add(dispute, court.buyer, done=True)
    ruling = await court.settles(dispute)
    assert (ruling["fault"], ruling["rule"]) == ("buyer", "equivocation")
    assert ruling["refund_nanos"] == 0


@pytest.mark.slow
async def test_one_payment_is_given_back_once(market: Market) -> None:
    """As not delivered, because it was late, and as a wrong result."""
    court = await result_court(market, checkers=3)
    shown = (court.work.order(), court.work.delivery(output="a", wall_ms=70_000))
    late = await court.opened(court.buyer, "not_delivered", amount=PRICE, evidence=shown)
    wrong = await court.opened(court.buyer, "wrong_result", amount=PRICE, order=1, evidence=shown)
    await court.passes(1)
    (peer,) = (await court.show(wrong))["checkers"]
    await court.add(wrong, court.buyer, *run_elsewhere(court, by_peer(court, peer), "b"))
    assert (await court.settles(wrong))["refund_nanos"] == PRICE
    await court.passes(72 * HOUR + 1)
    ruling = await court.settles(late)
    assert (ruling["fault"], ruling["rule"], ruling["refund_nanos"]) == ("neither", "refunded", 0)


async def test_work_inside_a_lease_that_both_made_longer_is_not_late(market: Market) -> None:
    court = await court_of(market)
    request = court.deal.amend_request(1, cap=court.deal.cap, longer_s=7_200, by_seller=True)
    assert (await market.amend(request)).status_code == 200
    await court.claimed(PRICE)
    end = court.contract.agreement.ends_at
    shown = (court.work.order(), court.work.event(state="running", at=end + 3_000))
    dispute = await court.opened(court.buyer, "not_delivered", amount=PRICE, evidence=shown)
    await court.add(dispute, court.seller, court.work.delivery(), done=True)
    await court.add(dispute, court.buyer, done=True)
    assert (await court.settles(dispute))["rule"] == "delivered"


async def test_a_close_of_the_buyer_defends_what_it_paid(market: Market) -> None:
    court = await court_of(market)
    total = 100 * PRICE
    claim = court.deal.claim(court.seller, court.grant, total, closed=True)
    assert (await market.settle(claim)).status_code == 200
    dispute = await court.opened(court.buyer, "not_delivered", amount=total)
    shown = (*court.deal.closes(total), court.deal.voucher(total))
    await court.add(dispute, court.seller, *shown, done=True)
    await court.add(dispute, court.buyer, done=True)
    assert (await court.settles(dispute))["rule"] == "delivered"
