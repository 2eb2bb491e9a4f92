"""Several disputes over one bond: whoever came first is served first, and nobody comes between."""

from __future__ import annotations

from tests.coordinator.builders import Market
from tests.coordinator.court import (
    BOND,
    FUNDS,
    HOUR,
    PAID,
    Court,
    bond_of,
    court_of,
    held_by,
    lock_bond,
)
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


async def test_a_ruling_waits_for_the_bond(market: Market) -> None:
    """A seller's accomplice could else hold the bond until the victim's ruling has come short."""
    court = await court_of(market)
    await court.claimed()
    puppet, first = await parked(court)
    dispute = await proven(court)
    found = await court.show(dispute)
    assert (found["state"], found["stake_nanos"], found["waits"]) == ("evidence", 0, True)
    assert not (await puppet.show(first, puppet.buyer))["waits"]
    late = await another(court, await market.party("late", FUNDS))
    await late.claimed(10_000_000)
    await withdrawn(puppet, first, puppet.buyer)
    second = await late.opened(late.buyer, "not_delivered", amount=BOND)  # before anybody is woken
    assert (await late.show(second, late.buyer))["stake_nanos"] == 11_000_000
    assert await bond_of(market, court.seller) == BOND - 11_000_000
    await court.passes(1)
    ruling = await court.settles(dispute)
    assert (ruling["collected_nanos"], ruling["slash_nanos"]) == (OWED, OWED)
    assert not (await court.show(dispute))["waits"]
    assert await bond_of(market, court.seller) == BOND - 11_000_000 - OWED


async def test_who_comes_later_gets_what_is_left(market: Market) -> None:
    court = await court_of(market)
    await court.claimed()
    puppet, first = await parked(court)
    dispute = await proven(court)
    late = await another(court, await market.party("late", FUNDS))
    await late.claimed(FUNDS // 2)
    await withdrawn(puppet, first, puppet.buyer)
    second = await late.opened(late.buyer, "not_delivered", amount=FUNDS // 2)
    assert (await late.show(second, late.buyer))["stake_nanos"] == BOND - OWED
    await court.passes(1)
    assert (await court.settles(dispute))["collected_nanos"] == OWED
    assert await bond_of(market, court.seller) == 0
    assert await held_by(market, second) == BOND - OWED + FUNDS // 2 * 12 // 100


async def test_what_comes_to_the_bond_is_for_whom_came_first(market: Market) -> None:
    court = await court_of(market, bond=0)
    await court.claimed()
    dispute = await court.opened(court.buyer, "not_delivered")
    await lock_bond(market, court.seller, 1_000_000)
    late = await another(court, await market.party("late", FUNDS))
    await late.claimed(10_000_000)
    second = await late.opened(late.buyer, "not_delivered", amount=10_000_000)
    assert (await late.show(second, late.buyer))["stake_nanos"] == 1_000_000 - OWED
    await court.passes(72 * HOUR + 1)
    assert (await court.settles(dispute))["collected_nanos"] == OWED
    await late.passes(1)
    assert (await late.settles(second))["collected_nanos"] == 1_000_000 - OWED
    assert await bond_of(market, court.seller) == 0


async def test_nobody_waits_for_a_bond_that_is_gone(market: Market) -> None:
    """The earlier dispute takes it all: the later one ends with what there is, which is nothing."""
    court = await court_of(market)
    await court.claimed()
    puppet, first = await parked(court)
    dispute = await proven(court)
    for party in (puppet.seller, puppet.buyer):
        await puppet.add(first, party, done=True)
    assert (await puppet.settles(first))["collected_nanos"] == BOND
    await court.passes(1)
    ruling = await court.settles(dispute)
    assert (ruling["rule"], ruling["collected_nanos"]) == ("not_delivered", 0)


async def test_a_ruling_that_waits_can_be_taken_back(market: Market) -> None:
    court = await court_of(market)
    await court.claimed()
    puppet, first = await parked(court)
    dispute = await proven(court)
    assert (await withdrawn(court, dispute, court.buyer)).json()["state"] == "withdrawn"
    await withdrawn(puppet, first, puppet.buyer)
    await court.passes(1)
    assert await bond_of(market, court.seller) == BOND
    assert (await market.audit())["balanced"]


async def test_a_claim_that_is_not_proven_does_not_wait(market: Market) -> None:
    court = await court_of(market)
    await court.claimed()
    await parked(court)
    dispute = await court.opened(court.buyer, "not_delivered")
    work = court.work
    await court.add(dispute, court.seller, work.order(), work.delivery(wall_ms=PAID * 1_000))
    for party in (court.seller, court.buyer):
        await court.add(dispute, party, done=True)
    found = await court.show(dispute)
    assert not found["waits"]
    assert found["state"] == "settled" or found["ruling"] is None, found
