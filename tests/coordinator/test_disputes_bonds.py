"""Several disputes over one bond: whoever came first is served first, and nobody comes between."""

from __future__ import annotations

import pytest

from lumaris_coordinator.disputes import liens
from lumaris_coordinator.store.port import all_rows
from lumaris_protocol.limits import DISPUTE_BOND_NANOS_MIN
from tests.coordinator.builders import Market, bond_request
from tests.coordinator.court import (
    BOND,
    FUNDS,
    HOUR,
    PAID,
    PRICE,
    Court,
    bond_of,
    court_of,
    lock_bond,
)
from tests.coordinator.test_disputes_checks import by_peer, disputed, result_court, run_elsewhere
from tests.coordinator.test_disputes_hostile import another, withdrawn

STORES = ("sqlite", "postgres")
OWED = PAID * 11 // 10  # the refund, and a tenth


async def parked(court: Court) -> tuple[Court, str]:
    """An accomplice, which really paid as much, has a dispute that holds the whole bond."""
    puppet = await another(court, await court.market.party("puppet", FUNDS))
    await puppet.claimed(BOND)
    return puppet, await puppet.opened(puppet.buyer, "not_delivered", amount=BOND)


async def proven(court: Court) -> str:
    """A dispute of the buyer that both have nothing more to show in, with nothing delivered."""
    dispute = await court.opened(court.buyer, "not_delivered")
    for party in (court.seller, court.buyer):
        await court.add(dispute, party, done=True)
    return dispute


async def test_what_others_hold_is_collected_when_it_comes_back(market: Market) -> None:
    """A seller's accomplice could else hold the bond over the ruling of its victim."""
    court = await court_of(market)
    await court.claimed()
    puppet, first = await parked(court)
    dispute = await proven(court)
    ruling = await court.settles(dispute)
    assert (ruling["collected_nanos"], ruling["slash_nanos"]) == (0, OWED)
    assert (await court.show(dispute))["owed_nanos"] == OWED
    before = await court.money()
    await withdrawn(puppet, first, puppet.buyer)
    buyer, seller, bond = await court.money()
    half = (OWED - PAID) // 2
    assert (buyer - before[0], bond) == (PAID + half, BOND - OWED)
    assert seller - before[1] == DISPUTE_BOND_NANOS_MIN // 2  # for its withdrawal
    assert (await court.show(dispute))["owed_nanos"] == 0
    await court.settles(dispute)
    rows = await market.coordinator.store.read(
        lambda connection: all_rows(
            connection,
            "SELECT party FROM event JOIN event_party ON event = event.id"
            " WHERE ref = ? AND kind = 'dispute.collected'",
            (dispute,),
        )
    )
    assert {row[0] for row in rows} == {court.buyer.peer, court.seller.peer}


async def test_who_comes_later_gets_what_is_left(market: Market) -> None:
    court = await court_of(market)
    await court.claimed()
    puppet, first = await parked(court)
    dispute = await court.opened(court.buyer, "not_delivered")
    late = await another(court, await market.party("late", FUNDS))
    await late.claimed(FUNDS // 2)
    await withdrawn(puppet, first, puppet.buyer)
    second = await late.opened(late.buyer, "not_delivered", amount=FUNDS // 2)
    assert (await late.show(second, late.buyer))["stake_nanos"] == BOND - OWED
    await court.passes(72 * HOUR + 1)
    assert (await court.settles(dispute))["collected_nanos"] == OWED
    assert (await late.settles(second))["collected_nanos"] == BOND - OWED
    assert await bond_of(market, court.seller) == 0


async def test_what_comes_to_the_bond_is_for_whom_came_first(market: Market) -> None:
    court = await court_of(market, bond=0)
    await court.claimed()
    dispute = await court.opened(court.buyer, "not_delivered")
    await lock_bond(market, court.seller, 1_000_000)
    late = await another(court, await market.party("late", FUNDS))
    await late.claimed(10_000_000)
    second = await late.opened(late.buyer, "not_delivered", amount=10_000_000)
    assert (await late.show(second, late.buyer))["stake_nanos"] == 1_000_000 - OWED
    for party in (late.seller, late.buyer):
        await late.add(second, party, done=True)
    assert (await late.settles(second))["collected_nanos"] == 1_000_000 - OWED
    assert (await late.show(second))["owed_nanos"] == OWED, "which the earlier one may not need"
    await court.passes(72 * HOUR + 1)
    assert (await court.settles(dispute))["collected_nanos"] == OWED
    assert await bond_of(market, court.seller) == 0


async def test_money_reserved_for_an_accomplice_is_not_lost_to_the_victim(market: Market) -> None:
    """Two accomplices: one gives the bond back, the other could still take it and then does not."""
    court = await court_of(market)
    await court.claimed()
    puppet, first = await parked(court)
    other = await another(court, await market.party("other", FUNDS))
    await other.claimed(BOND)
    second = await other.opened(other.buyer, "not_delivered", amount=BOND)
    await withdrawn(puppet, first, puppet.buyer)
    dispute = await proven(court)
    assert (await court.settles(dispute))["collected_nanos"] == 0
    assert (await court.show(dispute))["owed_nanos"] == OWED
    await withdrawn(other, second, other.buyer)
    assert (await court.show(dispute))["owed_nanos"] == 0
    assert await bond_of(market, court.seller) == BOND - OWED


async def test_a_release_comes_after_what_is_owed(
    market: Market, monkeypatch: pytest.MonkeyPatch
) -> None:
    court = await court_of(market)
    await court.claimed()
    release = bond_request(court.seller, market.peer, "release", BOND, now=market.now)
    assert (await market.client.post("/v1/bonds", content=release)).status_code == 200
    await court.passes(market.coordinator.settings.bond_release_s - HOUR)
    puppet, first = await parked(court)
    dispute = await proven(court)
    await court.passes(2 * HOUR)
    with monkeypatch.context() as none_served:
        none_served.setattr(liens, "LIENS_PER_ROUND_MAX", 0)
        await withdrawn(puppet, first, puppet.buyer)
        await court.passes(1)
        assert await bond_of(market, court.seller) == BOND
    headers = market.bearer(court.seller)
    (bond,) = (await market.client.get("/v1/bonds/me", headers=headers)).json()["bonds"]
    assert (bond["locked_nanos"], bond["owed_nanos"]) == (BOND, OWED)
    seller = await market.free(court.seller)
    await court.passes(1)
    assert (await court.show(dispute))["owed_nanos"] == 0
    assert await bond_of(market, court.seller) == 0
    assert await market.free(court.seller) == seller + BOND - OWED


async def test_one_payment_is_given_back_once(market: Market) -> None:
    """What one ruling is owed, the next one on the same agreement collects: it is owed no more."""
    bond, penalty = 1_000_000, PRICE // 10
    court = await result_court(market, checkers=1, bond=bond)
    puppet = await another(court, await market.party("puppet", FUNDS))
    await puppet.claimed(908_172)
    parked = await puppet.opened(puppet.buyer, "not_delivered", amount=908_172)
    wrong = await disputed(court)
    assert (await court.show(wrong))["stake_nanos"] == PRICE + 1
    nothing = await court.opened(court.buyer, "not_delivered", amount=PRICE)
    for party in (court.seller, court.buyer):
        await court.add(nothing, party, done=True)
    assert (await court.settles(nothing))["collected_nanos"] == 0
    assert (await court.show(nothing))["owed_nanos"] == PRICE + penalty
    await court.passes(1)
    (peer,) = (await court.show(wrong))["checkers"]
    await court.add(wrong, court.buyer, *run_elsewhere(court, by_peer(court, peer), "b"))
    assert (await court.settles(wrong))["refund_nanos"] == PRICE
    assert (await court.show(nothing))["owed_nanos"] == penalty
    await withdrawn(puppet, parked, puppet.buyer)
    assert await bond_of(market, court.seller) == bond - 2 * PRICE - penalty
    assert (await market.audit())["balanced"]


async def test_a_bond_that_is_gone_stays_owed(market: Market) -> None:
    """The accomplice takes it all by a ruling: the next money of this bond is the victim's."""
    court = await court_of(market)
    await court.claimed()
    puppet, first = await parked(court)
    dispute = await proven(court)
    for party in (puppet.seller, puppet.buyer):
        await puppet.add(first, party, done=True)
    assert (await puppet.settles(first))["collected_nanos"] == BOND
    assert (await puppet.show(first))["owed_nanos"] == 0, "no other dispute held what it missed"
    assert (await court.show(dispute))["owed_nanos"] == OWED
    buyer, *_ = await court.money()
    await lock_bond(market, court.seller, 1_000_000)
    assert await bond_of(market, court.seller) == 1_000_000 - OWED
    assert (await court.money())[0] == buyer + PAID + (OWED - PAID) // 2
    assert (await market.audit())["balanced"]


async def test_what_two_rulings_are_owed_is_no_more_than_was_there(market: Market) -> None:
    court = await court_of(market)
    puppet, first = await parked(court)
    for name, owed in (("one", BOND), ("two", 0)):
        victim = await another(court, await market.party(name, FUNDS))
        await victim.claimed(BOND)
        dispute = await victim.opened(victim.buyer, "not_delivered", amount=BOND)
        for party in (victim.seller, victim.buyer):
            await victim.add(dispute, party, done=True)
        assert (await victim.show(dispute, victim.buyer))["owed_nanos"] == owed
    await withdrawn(puppet, first, puppet.buyer)
    assert await bond_of(market, court.seller) == 0
    assert (await market.audit())["balanced"]
