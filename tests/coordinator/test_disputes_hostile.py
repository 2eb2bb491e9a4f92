"""Parties that mean harm: at what price they may dispute, and that nobody chooses who checks."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from lumaris_protocol import agreements, codec, dispute_file
from lumaris_protocol.limits import DISPUTE_BOND_NANOS_MIN
from lumaris_protocol.messages.dispute import CheckerDraw, CheckerList
from tests.coordinator.builders import NETWORK, Market, Party, bond_request
from tests.coordinator.court import (
    BOND,
    FUNDS,
    HOUR,
    PAID,
    PRICE,
    Court,
    bond_of,
    code,
    court_of,
    held_by,
    lock_bond,
)
from tests.coordinator.test_disputes_checks import by_peer, disputed, result_court, run_elsewhere
from tests.coordinator.test_keys import rotate
from tests.dispute_builders import Work, bundle, padded, split, withdrawal

CAP = 50_000_000


async def another(court: Court, buyer: Party, *, cap: int = CAP) -> Court:
    """A session of another buyer with the same seller."""
    market, seller = court.market, court.seller
    deal = market.deal(buyer, seller, cap=cap)
    grant = await market.grant(deal)
    contract = agreements.join(deal.signed_by(buyer), deal.signed_by(seller), network=NETWORK)
    work = Work(contract, buyer.session_key, seller.session_key, NETWORK)
    return Court(market, buyer, seller, deal, grant, work)


async def split_by_both(court: Court, dispute: str, *, refund: int) -> httpx.Response:
    """The answer to the second copy, or to the first where that is refused."""
    path = f"/v1/disputes/{dispute}/split"
    first, second = (
        split(court.contract, dispute, party.key, award=0, refund=refund, network=NETWORK)
        for party in (court.buyer, court.seller)
    )
    answer = await court.market.client.post(path, content=first)
    if answer.is_error:
        return answer
    return await court.market.client.post(path, content=second)


async def withdrawn(court: Court, dispute: str, party: Party) -> Any:
    body = withdrawal(court.contract, dispute, party.key, network=NETWORK)
    return await court.market.client.post(f"/v1/disputes/{dispute}/withdraw", content=body)


async def escrow_of(court: Court) -> dict[str, Any]:
    path = f"/v1/escrows/{court.deal.session}"
    answer = await court.market.client.get(path, headers=court.market.bearer(court.buyer))
    found: dict[str, Any] = answer.json()
    return found


async def window_ends(court: Court) -> None:
    await court.passes((await escrow_of(court))["settle_by"] - court.market.now + 1)


# --- what is at stake ---


async def test_nothing_is_held_for_money_that_was_never_paid(market: Market) -> None:
    """A session that cost nothing would lock an honest seller's whole bond for three days."""
    court = await court_of(market)
    puppet = await another(court, await market.party("puppet", FUNDS))
    await puppet.claimed(0)
    answer = await puppet.open(puppet.buyer, "not_delivered", amount=CAP)
    assert code(answer) == "not_disputable"
    few = await another(court, await market.party("few", FUNDS))
    await few.claimed(1_000)
    dispute = await few.opened(few.buyer, "not_delivered", amount=CAP)
    assert (await few.show(dispute))["stake_nanos"] == 1_100
    assert await bond_of(market, court.seller) == BOND - 1_100


async def test_a_withdrawal_costs_whoever_held_the_other_sides_money(market: Market) -> None:
    court = await court_of(market)
    await court.claimed(10_000_000)
    buyer, seller, bond = await court.money()
    dispute = await court.opened(court.buyer, "not_delivered", amount=10_000_000)
    assert await held_by(market, dispute) == 1_200_000 + 11_000_000
    assert (await withdrawn(court, dispute, court.buyer)).json()["state"] == "withdrawn"
    least = DISPUTE_BOND_NANOS_MIN
    assert await court.money() == (buyer - least, seller + least // 2, bond)
    assert await held_by(market, dispute) == 0
    assert await court.replay(dispute) == "valid"
    assert (await market.audit())["balanced"]


async def test_a_split_does_not_bring_a_bond_away(market: Market) -> None:
    """Two accomplices would have it in three requests, where its release takes days."""
    court = await court_of(market)
    await court.claimed(10_000_000)
    before, cost = await court.money(), DISPUTE_BOND_NANOS_MIN
    dispute = await court.opened(court.buyer, "not_delivered", amount=10_000_000)
    assert code(await split_by_both(court, dispute, refund=BOND)) == "over_cap"
    assert (await split_by_both(court, dispute, refund=9_000_000)).json()["state"] == "settled"
    ruling = await court.settles(dispute)
    assert (ruling["refund_nanos"], ruling["collected_nanos"]) == (9_000_000, cost)
    buyer, seller, bond = before
    paid = 9_000_000 - cost
    assert await court.money() == (buyer + paid, seller - 9_000_000 + cost // 2, bond)


async def test_a_split_that_the_seller_cannot_pay(market: Market) -> None:
    court = await court_of(market)
    await court.claimed(PAID)
    dispute = await court.opened(court.buyer, "not_delivered")
    await lock_bond(market, court.seller, await market.free(court.seller))
    assert code(await split_by_both(court, dispute, refund=PAID)) == "no_funds"
    assert (await court.show(dispute))["state"] == "opened"


async def test_a_bond_parked_elsewhere_answers_at_the_ruling(market: Market) -> None:
    court = await result_court(market, checkers=2)
    puppet = await another(court, await market.party("puppet", FUNDS))
    await puppet.claimed(BOND)
    parked = await puppet.opened(puppet.buyer, "not_delivered", amount=BOND)
    dispute = await disputed(court)
    assert (await court.show(dispute))["stake_nanos"] == 0
    await withdrawn(puppet, parked, puppet.buyer)
    release = bond_request(court.seller, market.peer, "release", BOND, now=market.now)
    assert (await market.client.post("/v1/bonds", content=release)).status_code == 200
    await court.passes(1)
    (peer,) = (await court.show(dispute))["checkers"]
    await court.add(dispute, court.buyer, *run_elsewhere(court, by_peer(court, peer), "b"))
    ruling = await court.settles(dispute)
    assert (ruling["refund_nanos"], ruling["collected_nanos"]) == (PRICE, 2 * PRICE)
    assert await bond_of(market, court.seller) == BOND - 2 * PRICE


async def test_a_result_holds_no_more_than_its_orders_price(market: Market) -> None:
    """Sixteen orders of a puppet would park a bond of 32 times what was paid."""
    court = await court_of(market)
    await court.claimed(PAID)
    work, stakes = court.work, []
    for n in range(1, 5):
        wall_ms = 1_000 if n < 3 else 60_000
        shown = (work.order(n), work.delivery(n, wall_ms=wall_ms))
        name = await court.opened(court.buyer, "wrong_result", order=n, evidence=shown, amount=PAID)
        stakes.append((await court.show(name))["stake_nanos"])
    minute = PRICE + 59_000
    assert stakes[:3] == [2 * PRICE, 2 * PRICE, 2 * minute]
    assert sum(stakes) == 2 * PAID
    name = await court.opened(court.buyer, "not_delivered", amount=PAID)
    assert (await court.show(name))["stake_nanos"] == 0, "it is held by the others"
    assert await bond_of(market, court.seller) == BOND - 2 * PAID
    await court.passes(72 * HOUR + 1)
    buyer = await market.free(court.buyer)
    assert (await court.settles(name))["rule"] == "not_delivered"
    assert buyer == await market.free(court.buyer)


async def test_blanks_are_no_evidence(market: Market) -> None:
    """Of eight padded bundles a dispute file had no room for the other side's answer."""
    court = await court_of(market)
    await court.claimed()
    body = padded(
        court.opening(court.buyer, "not_delivered"), court.buyer.key, 5_000, network=NETWORK
    )
    assert code(await court.open(court.buyer, "not_delivered", body=body)) == "oversize"
    dispute = await court.opened(court.buyer, "not_delivered")
    body = padded(
        bundle(court.contract, dispute, court.buyer.key, network=NETWORK),
        court.buyer.key,
        5_000,
        network=NETWORK,
    )
    path = f"/v1/disputes/{dispute}/evidence"
    assert code(await market.client.post(path, content=body)) == "oversize"
    assert len((await court.show(dispute))["evidence"]) == 1


# --- what can be disputed ---


async def test_what_was_taken_without_a_claim_can_be_disputed(market: Market) -> None:
    """An award and the vouchers that the seller showed for it are its own taking."""
    court = await court_of(market)
    order, delivery = court.work.order(), court.work.delivery(output="made up")
    shown = (order, delivery, court.work.voucher(PRICE))
    unpaid = await court.opened(court.seller, "unpaid_delivery", amount=PRICE, evidence=shown)
    for party in (court.seller, court.buyer):
        await court.add(unpaid, party, done=True)
    await court.settles(unpaid)
    await window_ends(court)
    found = await escrow_of(court)
    assert (found["state"], found["paid_nanos"]) == ("expired", PRICE)
    dispute = await court.opened(
        court.buyer, "wrong_result", order=1, amount=PRICE, evidence=(order, delivery)
    )
    assert (await court.show(dispute))["stake_nanos"] == 2 * PRICE


async def test_a_voucher_that_only_the_buyer_showed(market: Market) -> None:
    """It came to the seller all the same: it gives back what it got, and owes nothing beyond."""
    court = await court_of(market)
    assert (await market.settle(court.deal.claim(court.buyer, court.grant, PAID))).is_success
    await window_ends(court)
    buyer, seller, bond = await court.money()
    dispute = await court.opened(court.buyer, "not_delivered", amount=PAID)
    for party in (court.seller, court.buyer):
        await court.add(dispute, party, done=True)
    ruling = await court.settles(dispute)
    got = PAID - PAID * 500 // 10_000
    assert (ruling["refund_nanos"], ruling["slash_nanos"]) == (got, got)
    assert await court.money() == (buyer + got, seller, bond - got)
    more = await court.open(
        court.buyer, "wrong_result", order=1, evidence=(court.work.order(), court.work.delivery())
    )
    assert code(more) == "not_disputable"  # all of it was given back


async def test_what_a_party_opens_about_one_agreement_is_bounded(
    market: Market, monkeypatch: pytest.MonkeyPatch
) -> None:
    court = await result_court(market)
    monkeypatch.setattr("lumaris_coordinator.disputes.opening.DISPUTES_PER_PARTY_MAX", 1)
    dispute = await court.opened(court.buyer, "not_delivered", amount=PRICE)
    await withdrawn(court, dispute, court.buyer)
    shown = (court.work.order(), court.work.delivery())
    answer = await court.open(court.buyer, "wrong_result", order=1, evidence=shown, amount=PRICE)
    assert code(answer) == "too_many_holds"
    kept = await market.coordinator.store.read(
        lambda c: c.execute("SELECT count(*) FROM dispute_bundle").fetchall()
    )
    assert kept[0][0] == 0  # the opening stands in the log, once


# --- who checks ---


async def test_nobody_changes_a_list_after_its_chance_is_known(market: Market) -> None:
    """Whoever knows the root would find the weight that makes the draw fall on its own peer."""
    court = await result_court(market, checkers=3)
    puppet = await market.party("puppet", 90_000_000)
    dispute = await disputed(court)
    await lock_bond(market, puppet, 80_000_000)  # after the list: it is not on it
    await court.passes(1)
    await court.passes(24 * HOUR + 1)
    listed = await market.coordinator.store.read(
        lambda c: c.execute("SELECT count(*) FROM dispute_list").fetchall()
    )
    assert listed[0][0] == 2
    assert len((await court.show(dispute))["checkers"]) == 1  # fixed first, and drawn from later
    await lock_bond(market, puppet, 9_000_000)
    await court.passes(1)
    entries = dispute_file.decode(await court.file(dispute)).draws
    lists = [codec.open_signed(e.candidates, CheckerList, network=NETWORK) for e in entries]
    weights = [{c.peer: c.weight_nanos for c in one.message.candidates} for one in lists]
    assert puppet.peer not in weights[0]
    assert weights[1][puppet.peer] == 80_000_000
    roots = {
        codec.open_signed(e.draw, CheckerDraw, network=NETWORK).message.checkpoint for e in entries
    }
    assert len(roots) == 2


async def test_a_check_counts_whoever_paid_for_it(market: Market) -> None:
    """The opener cannot keep back the results that refute it."""
    court = await result_court(market, checkers=3)
    dispute = await disputed(court)
    await court.passes(1)
    (peer,) = (await court.show(dispute))["checkers"]
    mirrored = Court(market, court.seller, court.buyer, court.deal, court.grant, court.work)
    shown = run_elsewhere(mirrored, by_peer(court, peer), "a")
    answer = await court.add(dispute, court.seller, *shown)
    assert answer.json()["state"] == "settled"
    ruling = await court.settles(dispute)
    assert (ruling["rule"], ruling["bond_returned"]) == ("result_equal", False)


async def test_other_sessions_are_those_of_drawn_checkers(market: Market) -> None:
    """Agreements with nobody would fill the room for the checker's."""
    court = await result_court(market, checkers=1)
    dispute = await disputed(court)
    await court.passes(1)
    deal = market.deal(court.seller, Party("nobody"))
    junk = (deal.signed_by(court.seller), deal.signed_by(Party("nobody")))
    assert code(await court.add(dispute, court.seller, *junk)) == "evidence_foreign"
    (peer,) = (await court.show(dispute))["checkers"]
    answer = await court.add(dispute, court.buyer, *run_elsewhere(court, by_peer(court, peer), "b"))
    assert answer.json()["state"] == "settled"


async def test_a_checker_under_a_newer_key_of_the_coordinator(market: Market) -> None:
    court = await result_court(market, checkers=1)
    dispute, old = await disputed(court), market.peer
    await court.passes(1)
    (peer,) = (await court.show(dispute))["checkers"]
    rotate(market)
    await market.coordinator.run_chores()
    assert market.peer != old
    await court.add(dispute, court.buyer, *run_elsewhere(court, by_peer(court, peer), "b"))
    assert (await court.show(dispute))["ruling"]["rule"] == "result_differs"
    report = dispute_file.verify(await court.file(dispute), trusted=frozenset({old, market.peer}))
    assert report.verdict == "valid"


# --- time and load ---


async def test_disputes_that_wait_for_nobody_do_not_starve_others(
    market: Market, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two that no seller can check come first in every round of two; the third still ends."""
    monkeypatch.setattr("lumaris_coordinator.disputes.service.DISPUTES_PER_ROUND_MAX", 2)
    court = await court_of(market)
    await court.claimed(3 * PRICE)
    for n in (1, 2):
        shown = (court.work.order(n), court.work.delivery(n))
        await court.opened(court.buyer, "wrong_result", order=n, evidence=shown, amount=PRICE)
    last = await court.opened(court.buyer, "not_delivered", amount=PRICE)
    for _ in range(3):
        await court.passes(1)
    assert await market.coordinator.disputes.run_chores() == 0  # nothing is due for a while
    await court.passes(72 * HOUR + 1)
    await court.passes(1)
    assert (await court.show(last))["state"] == "settled"


async def test_what_is_refused_costs_the_writer_nothing(
    market: Market, monkeypatch: pytest.MonkeyPatch
) -> None:
    court = await result_court(market)
    poor = await another(court, await market.party("poor", CAP), cap=CAP)
    dispute = await court.opened(court.buyer, "not_delivered", amount=PRICE)
    await withdrawn(court, dispute, court.buyer)

    def opened(*_: Any, **__: Any) -> None:
        raise AssertionError("documents were opened")

    for name in ("papers_of", "open_papers"):
        monkeypatch.setattr(f"lumaris_coordinator.disputes.service.{name}", opened)
    before = market.coordinator.store.writer.stats.operations
    assert code(await court.add(dispute, court.seller)) == "dispute_closed"
    assert code(await withdrawn(court, dispute, court.seller)) == "forbidden"
    assert code(await split_by_both(court, dispute, refund=0)) == "dispute_closed"
    assert code(await poor.open(poor.buyer, "equivocation", amount=0)) == "no_funds"
    assert code(await poor.open(poor.buyer, "equivocation", amount=CAP + 1)) == "over_cap"
    assert market.coordinator.store.writer.stats.operations == before


async def test_one_peers_documents_have_a_rate(
    market: Market, monkeypatch: pytest.MonkeyPatch
) -> None:
    court = await court_of(market)
    monkeypatch.setattr(market.coordinator.disputes._rates, "_burst", 2)
    for _ in range(2):
        assert code(await court.open(court.buyer, "equivocation")) == "evidence_insufficient"
    answer = await court.open(court.buyer, "equivocation")
    assert (answer.status_code, code(answer)) == (429, "rate_limited")
    await court.opened(court.seller, "unpaid_delivery")  # another peer's are its own
    market.clock.now += 1
    assert code(await court.open(court.buyer, "equivocation")) == "evidence_insufficient"


async def test_evidence_that_comes_while_other_evidence_is_opened(
    market: Market, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was opened before is opened again; nothing is ruled on without it."""
    court = await result_court(market)
    dispute = await court.opened(court.buyer, "not_delivered", amount=PRICE)
    service_of, waits = market.coordinator.disputes, [True]
    papers = service_of._papers

    async def slowly(*values: Any) -> Any:
        found = await papers(*values)
        if waits:
            waits.clear()
            await court.add(dispute, court.seller, court.work.order(), court.work.delivery())
        return found

    monkeypatch.setattr(service_of, "_papers", slowly)
    assert (await court.add(dispute, court.buyer, done=True)).status_code == 200
    found = await court.show(dispute)
    assert [entry["by"] for entry in found["evidence"]] == [
        court.buyer.peer,
        court.seller.peer,
        court.buyer.peer,
    ]
    await court.add(dispute, court.seller, n=1, done=True)
    assert (await court.settles(dispute))["rule"] == "delivered"
