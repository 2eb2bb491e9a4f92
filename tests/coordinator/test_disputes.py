"""Disputes end to end: what is refused, what is ruled, and where the money goes."""

from __future__ import annotations

import pytest

from lumaris_protocol import agreements, settlement
from lumaris_protocol.ids import derive_id, digest
from lumaris_protocol.limits import (
    DISPUTE_BOND_NANOS_MIN,
    DISPUTE_DOCUMENT_BYTES_MAX,
    EVIDENCE_BUNDLES_MAX,
)
from tests.coordinator.builders import NETWORK, Market, Party
from tests.coordinator.court import (
    HOUR,
    OPENER_BOND,
    PAID,
    PRICE,
    Court,
    bond_of,
    code,
    court_of,
    held_by,
    lock_bond,
)
from tests.dispute_builders import opening, split, withdrawal


@pytest.fixture
async def court(market: Market) -> Court:
    return await court_of(market)


# --- what is ruled ---


async def test_a_silent_seller_gives_back_what_it_took(court: Court) -> None:
    await court.claimed()
    before = await court.money()
    dispute = await court.opened(court.buyer, "not_delivered")
    found = await court.show(dispute)
    assert (found["state"], found["stake_nanos"]) == ("opened", 110_000)
    assert await held_by(court.market, dispute) == OPENER_BOND + 110_000
    await court.passes(72 * HOUR)
    assert (await court.show(dispute))["state"] == "opened"  # its last second
    await court.passes(1)
    ruling = await court.settles(dispute)
    assert (ruling["fault"], ruling["rule"]) == ("seller", "not_delivered")
    after = await court.money()
    assert after == (before[0] + PAID + 5_000, before[1], before[2] - 110_000)


async def test_a_refuted_claim_costs_its_bond_and_ends_early(court: Court) -> None:
    await court.claimed(PRICE)
    before = await court.money()
    dispute = await court.opened(court.buyer, "not_delivered", amount=PRICE)
    work = court.work
    answer = await court.add(dispute, court.seller, work.order(), work.delivery(), done=True)
    assert answer.json()["state"] == "evidence"
    answer = await court.add(dispute, court.buyer, done=True)
    assert answer.json()["state"] == "settled"
    ruling = await court.settles(dispute)
    assert (ruling["fault"], ruling["rule"]) == ("buyer", "delivered")
    after = await court.money()
    assert after == (before[0] - OPENER_BOND, before[1] + OPENER_BOND // 2, before[2])


async def test_an_unpaid_delivery_is_paid_from_what_is_frozen(court: Court) -> None:
    work = court.work
    shown = (work.order(), work.delivery())
    dispute = await court.opened(court.seller, "unpaid_delivery", evidence=shown, amount=5_000)
    buyer, seller, bond = await court.money()
    await court.passes(72 * HOUR + 1)
    ruling = await court.settles(dispute)
    assert (ruling["rule"], ruling["award_nanos"], ruling["collected_nanos"]) == (
        "unpaid",
        PRICE,
        0,
    )
    fee = PRICE * 500 // 10_000
    assert await court.money() == (buyer, seller + OPENER_BOND + PRICE - fee, bond)
    answer = await court.market.settle(court.deal.claim(court.seller, court.grant, 0))
    assert answer.status_code == 200
    assert (await court.market.audit())["balanced"]


async def test_vouchers_stay_good_through_a_dispute(court: Court) -> None:
    dispute = await court.opened(court.seller, "unpaid_delivery")
    voucher = court.deal.claim(court.seller, court.grant, PAID)
    assert (await court.market.settle(voucher)).status_code == 202
    work = court.work
    await court.add(dispute, court.seller, work.order(), work.delivery(), done=True)
    await court.add(dispute, court.buyer, done=True)
    ruling = await court.settles(dispute)
    assert (ruling["rule"], ruling["fault"], ruling["award_nanos"]) == ("paid", "seller", 0)
    assert (await court.market.settle(voucher)).status_code == 200


async def test_a_buyer_that_claims_less_than_it_vouchered(court: Court) -> None:
    await lock_bond(court.market, court.buyer, 5_000_000)
    market, deal, work = court.market, court.deal, court.work
    low = deal.claim(court.buyer, court.grant, 10)
    assert (await market.settle(low)).status_code == 202
    shown = (low, work.voucher(9_010, seq=5))
    dispute = await court.opened(court.seller, "stale_voucher", evidence=shown)
    ruling = await court.settles(dispute)
    assert (ruling["fault"], ruling["award_nanos"]) == ("buyer", 9_000)
    assert ruling["collected_nanos"] == ruling["slash_nanos"] == 900
    assert await bond_of(market, court.buyer) == 5_000_000 - 900


async def test_equivocation_is_ruled_on_at_once_and_once(court: Court) -> None:
    before = await court.money()
    shown = (court.work.delivery(), court.work.delivery(output="other"))
    body = court.opening(court.buyer, "equivocation", evidence=shown, amount=0)
    first = await court.open(court.buyer, "equivocation", body=body)
    assert first.json()["state"] == "settled"
    assert (await court.open(court.buyer, "equivocation", body=body)).json() == first.json()
    ruling = await court.settles(first.json()["dispute"])
    lost = court.deal.cap
    assert (ruling["rule"], ruling["slash_nanos"]) == ("equivocation", lost)
    assert await court.money() == (before[0] + lost // 2, before[1], before[2] - lost)
    other = await court.open(court.buyer, "equivocation", evidence=shown, amount=1)
    assert code(other) == "dispute_open"


async def test_a_forged_voucher_is_ruled_on_at_once(court: Court) -> None:
    forged = court.deal.voucher(PAID, signer=court.seller.session_key)
    papers = settlement.Papers(
        court.deal.session,
        court.contract.by_buyer,
        court.contract.by_seller,
        court.grant,
        forged,
        PAID,
    )
    settle = settlement.claim(
        papers, court.seller.key, network=NETWORK, coordinator=court.market.peer, now=0
    )
    assert code(await court.market.settle(settle)) in ("wrong_signer", "bad_signature")
    dispute = await court.opened(court.buyer, "forged_voucher", evidence=(settle,), amount=0)
    assert (await court.settles(dispute))["fault"] == "seller"


async def test_a_seller_without_a_bond_owes_what_cannot_be_collected(market: Market) -> None:
    court = await court_of(market, bond=0)
    await court.claimed()
    buyer, _, _ = await court.money()
    dispute = await court.opened(court.buyer, "not_delivered")
    await court.passes(72 * HOUR + 1)
    ruling = await court.settles(dispute)
    assert (ruling["slash_nanos"], ruling["collected_nanos"]) == (110_000, 0)
    assert (await court.money())[0] == buyer


# --- what ends it by agreement ---


async def test_a_withdrawal_before_any_answer_costs_the_least_bond(court: Court) -> None:
    await court.claimed()
    before, client = await court.money(), court.market.client
    dispute = await court.opened(court.buyer, "not_delivered")
    path = f"/v1/disputes/{dispute}/withdraw"
    body = withdrawal(court.contract, dispute, court.seller.key, network=NETWORK)
    assert code(await client.post(path, content=body)) == "forbidden"
    body = withdrawal(court.contract, dispute, court.buyer.key, network=NETWORK)
    answer = await client.post(path, content=body)
    assert answer.json()["state"] == "withdrawn"
    assert (await client.post(path, content=body)).json() == answer.json()
    assert await court.replay(dispute) == "valid"
    buyer, seller, bond = before
    lost = DISPUTE_BOND_NANOS_MIN
    assert await court.money() == (buyer - lost, seller + lost // 2, bond)
    assert (await court.market.audit())["balanced"]


async def test_a_late_withdrawal_costs_the_bond(court: Court) -> None:
    dispute = await court.opened(court.seller, "unpaid_delivery")
    await court.add(dispute, court.buyer, court.work.word(accepted=False))
    buyer, seller, bond = await court.money()
    body = withdrawal(court.contract, dispute, court.seller.key, network=NETWORK)
    path = f"/v1/disputes/{dispute}/withdraw"
    answer = await court.market.client.post(path, content=body)
    assert answer.json()["state"] == "withdrawn"
    assert await court.money() == (buyer + OPENER_BOND // 2, seller, bond)
    assert await court.replay(dispute) == "valid"
    assert code(await court.add(dispute, court.seller)) == "dispute_closed"
    assert (await court.market.audit())["balanced"]


async def test_a_split_that_both_signed(court: Court) -> None:
    dispute = await court.opened(court.seller, "unpaid_delivery", amount=5_000)
    path, client = f"/v1/disputes/{dispute}/split", court.market.client

    def half(party: Party, award: int, refund: int = 0) -> bytes:
        return split(
            court.contract, dispute, party.key, award=award, refund=refund, network=NETWORK
        )

    cap = court.deal.cap
    answer = await client.post(path, content=half(court.seller, cap + 1))
    assert answer.json()["state"] == "opened"
    assert code(await client.post(path, content=half(court.buyer, cap + 1))) == "over_cap"
    assert (await client.post(path, content=half(court.buyer, 700))).json()["state"] == "opened"
    body = half(court.seller, 700)
    assert (await client.post(path, content=body)).json()["state"] == "settled"
    assert (await client.post(path, content=body)).json()["state"] == "settled"
    ruling = await court.settles(dispute)
    assert (ruling["rule"], ruling["award_nanos"], ruling["bond_returned"]) == ("split", 700, False)
    assert code(await client.post(path, content=half(court.buyer, 8))) == "dispute_closed"


async def test_a_split_refunds_from_the_sellers_account(court: Court) -> None:
    await court.claimed()
    buyer, seller, bond = await court.money()
    dispute = await court.opened(court.buyer, "not_delivered")
    for party in (court.buyer, court.seller):
        body = split(court.contract, dispute, party.key, award=0, refund=40_000, network=NETWORK)
        await court.market.client.post(f"/v1/disputes/{dispute}/split", content=body)
    assert (await court.settles(dispute))["refund_nanos"] == 40_000
    cost = DISPUTE_BOND_NANOS_MIN
    assert await court.money() == (buyer + 40_000 - cost, seller - 40_000 + cost // 2, bond)


# --- what is refused ---


async def test_claims_that_cannot_be_made_move_nothing(court: Court) -> None:
    buyer, seller = court.buyer, court.seller
    before = await court.money()
    cap = court.deal.cap
    assert code(await court.open(buyer, "not_delivered")) == "not_disputable"  # nothing taken yet
    assert code(await court.open(buyer, "unpaid_delivery")) == "not_disputable"
    assert code(await court.open(buyer, "equivocation")) == "evidence_insufficient"
    assert code(await court.open(seller, "stale_voucher")) == "evidence_insufficient"
    assert code(await court.open(seller, "unpaid_delivery", amount=cap + 1)) == "over_cap"
    work = court.work
    stranger = (work.delivery(), work.delivery(key=buyer.session_key))
    answer = await court.open(buyer, "equivocation", evidence=stranger)
    assert code(answer) == "evidence_foreign"
    forged = court.opening(buyer, "equivocation", signer=seller.key)
    assert code(await court.open(buyer, "equivocation", body=forged)) == "wrong_signer"
    later = court.opening(buyer, "equivocation", issued_at=court.market.now + 61)
    assert code(await court.open(buyer, "equivocation", body=later)) == "not_yet_valid"
    assert code(await court.open(buyer, "x", body=b"junk")) == "malformed"
    await court.claimed()
    assert code(await court.open(seller, "unpaid_delivery")) == "not_disputable"  # nothing held
    no_order = await court.open(buyer, "wrong_result", order=1)
    assert code(no_order) == "evidence_insufficient"
    stdin = (work.order(stdin=True), work.delivery())
    answer = await court.open(buyer, "wrong_result", order=1, evidence=stdin)
    assert code(answer) == "not_disputable"
    assert (await court.market.audit())["balanced"]
    assert (await court.money())[0] == before[0] + cap - PAID  # what the settlement returned


async def test_an_agreement_without_a_grant_here(court: Court) -> None:
    deal = court.market.deal(court.buyer, court.seller)
    text = [deal.signed_by(party) for party in (court.buyer, court.seller)]
    contract = agreements.join(*text, network=NETWORK)
    body = opening(contract, court.grant, court.buyer.key, "equivocation", network=NETWORK)
    assert code(await court.open(court.buyer, "x", body=body)) == "not_found"


async def test_an_opener_without_its_bond(market: Market) -> None:
    court = await court_of(market)
    await court.claimed()
    await lock_bond(market, court.buyer, await market.free(court.buyer))
    assert code(await court.open(court.buyer, "not_delivered")) == "no_funds"


async def test_a_settlement_can_be_disputed_for_a_while(court: Court) -> None:
    await court.claimed()
    court.market.clock.now += 7 * 24 * HOUR + 1
    assert code(await court.open(court.buyer, "not_delivered")) == "not_disputable"
    court.market.clock.now -= 1
    await court.opened(court.buyer, "not_delivered")


async def test_evidence_that_is_not_taken(court: Court) -> None:
    await court.claimed()
    dispute = await court.opened(court.buyer, "not_delivered")
    outsider = await court.market.party("outsider")
    assert code(await court.add(dispute, outsider)) == "not_found"
    unknown = dispute[:-1] + ("a" if dispute[-1] != "a" else "b")
    assert code(await court.add(unknown, court.buyer)) == "not_found"
    assert code(await court.add(dispute, court.seller, n=1)) == "out_of_sequence"
    foreign = await court.add(dispute, court.seller, agreement_hash=digest(b"other"))
    assert code(foreign) == "evidence_foreign"
    other = court.work.delivery(session=derive_id("session", b"other"))
    assert code(await court.add(dispute, court.seller, other)) == "evidence_foreign"
    assert code(await court.add(dispute, court.seller, b"junk")) == "malformed"
    for n in range(EVIDENCE_BUNDLES_MAX):
        assert (await court.add(dispute, court.seller, n=n)).status_code == 200
    assert code(await court.add(dispute, court.seller, n=0, done=True)) == "dispute_closed"
    first = await court.add(dispute, court.buyer, done=True)
    assert first.status_code == 200
    assert (await court.add(dispute, court.buyer, done=True)).json() == first.json()  # the same
    assert code(await court.add(dispute, court.buyer, n=1)) == "dispute_closed"


async def test_the_largest_order_is_evidence_and_more_is_not(court: Court) -> None:
    await court.claimed()
    dispute = await court.opened(court.buyer, "not_delivered")
    environment = dict.fromkeys("ABCDE", "x" * 30_000)
    largest = court.work.order(environment=environment)
    assert (await court.add(dispute, court.seller, largest)).status_code == 200
    body = bytes(DISPUTE_DOCUMENT_BYTES_MAX + 1)
    path = f"/v1/disputes/{dispute}/evidence"
    answer = await court.market.client.post(path, content=body)
    assert (answer.status_code, code(answer)) == (413, "oversize")
    more = await court.add(dispute, court.seller, largest, largest, n=1)
    assert more.status_code == 200
    assert code(await court.add(dispute, court.seller, largest, n=2)) == "oversize"


async def test_both_parties_are_told_of_every_move(court: Court) -> None:
    await court.claimed()
    dispute = await court.opened(court.buyer, "not_delivered")
    for party in (court.seller, court.buyer):
        await court.add(dispute, party, done=True)
    rows = await court.market.coordinator.store.read(
        lambda connection: connection.execute(
            "SELECT kind, party FROM event JOIN event_party ON event = event.id WHERE ref = ?",
            (dispute,),
        ).fetchall()
    )
    kinds = ["dispute.opened", "dispute.evidence", "dispute.evidence", "dispute.ruled"]
    for party in (court.buyer, court.seller):
        assert [kind for kind, peer in rows if peer == party.peer] == kinds
