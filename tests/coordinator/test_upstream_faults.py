"""Ten faults that markets of this kind were seen to have, tried here through what strangers reach.

Every test does the honest thing first, so none passes because all is refused. Those about money
ask the coordinator over HTTP on both databases; those about work run a whole market.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest
import trio
from msgspec import structs

from lumaris.buyer import Buyer
from lumaris.jobs import JobRequest, LogLine
from lumaris_coordinator.identity.store import account_of
from lumaris_node.capability.meter import Gpus
from lumaris_protocol import agreements, codec, pricing
from lumaris_protocol.errors import LumarisError
from lumaris_protocol.frames import Kind
from lumaris_protocol.limits import GIB, MIB
from lumaris_protocol.machines.seller import SellerSession
from lumaris_protocol.messages.advert import Gpu, Resources
from lumaris_protocol.messages.execution import Usage
from lumaris_protocol.messages.payment import Settle
from lumaris_protocol.protocols import SESSION
from tests import market as whole
from tests.coordinator.builders import NETWORK, Market, Party
from tests.coordinator.court import (
    BOND,
    FUNDS,
    HOUR,
    OPENER_BOND,
    PAID,
    PRICE,
    Court,
    balance,
    bond_of,
    code,
    lock_bond,
)
from tests.coordinator.escrows import state_of
from tests.coordinator.faults.tenants import paid_out
from tests.coordinator.test_money import payout_request
from tests.coordinator.test_users import get, link, peer_link, post, quick, sign_up
from tests.dispute_builders import Work
from tests.market import eventually
from tests.node.test_hostile import Attack, sent

STORES = ("sqlite", "postgres")
pytestmark = pytest.mark.slow


@pytest.fixture
async def world(tmp_path: Path, compiled: Path) -> AsyncIterator[whole.Market]:
    """Nodes and buyers too, in this process."""
    async with whole.open_market(tmp_path, compiled) as found:
        yield found


@pytest.fixture
async def parties(market: Market) -> tuple[Party, Party]:
    """A buyer and a bonded seller with money."""
    buyer, seller = await market.party("buyer", FUNDS), await market.party("seller", FUNDS)
    await lock_bond(market, seller, BOND)
    return buyer, seller


async def session(market: Market, parties: tuple[Party, Party], **changes: Any) -> Court:
    """One granted session between the two."""
    buyer, seller = parties
    deal = market.deal(buyer, seller, **changes)
    grant = await market.grant(deal)
    contract = agreements.join(deal.signed_by(buyer), deal.signed_by(seller), network=NETWORK)
    work = Work(contract, buyer.session_key, seller.session_key, NETWORK)
    return Court(market, buyer, seller, deal, grant, work)


async def claim(court: Court, claimant: Party, total: int, **changes: Any) -> httpx.Response:
    grant = changes.pop("grant", court.grant)
    return await court.market.settle(court.deal.claim(claimant, grant, total, **changes))


async def ruled(court: Court, dispute: str) -> dict[str, Any]:
    """The ruling after both sides have shown what they have."""
    for party in (court.seller, court.buyer):
        assert (await court.add(dispute, party, done=True)).status_code == 200
    return await court.settles(dispute)


async def wallets(court: Court) -> tuple[int, int]:
    """(the buyer's, the seller's), also when their tokens have expired."""
    found = []
    for party in (court.buyer, court.seller):
        account = await court.market.coordinator.store.read(partial(account_of, peer=party.peer))
        found.append(await balance(court.market, f"{account}:TEST"))
    return found[0], found[1]


def net(amount: int) -> int:
    """What a seller has of a payment."""
    return amount - amount * 500 // 10_000


# --- 1: work that failed is paid ---


async def test_1_failed_work_is_not_awarded(market: Market, parties: tuple[Party, Party]) -> None:
    """A seller without a sandbox reports what never ran as done, and asks for its price."""
    honest = await session(market, parties)
    shown = (honest.work.order(), honest.work.delivery())
    dispute = await honest.opened(honest.seller, "unpaid_delivery", evidence=shown, amount=PRICE)
    assert (await ruled(honest, dispute))["award_nanos"] == PRICE

    failures: tuple[dict[str, Any] | None, ...] = ({"exit_status": 1}, {"exit_status": 125}, None)
    for failure in failures:
        court = await session(market, parties)
        before = await wallets(court)
        refused = await claim(court, court.seller, PRICE, voucher=None)
        assert code(refused) == "claim_unproven"
        work = court.work
        end = work.event(reason="platform_error") if failure is None else work.delivery(**failure)
        shown = (work.order(), end)
        dispute = await court.opened(court.seller, "unpaid_delivery", evidence=shown, amount=PRICE)
        ruling = await ruled(court, dispute)
        assert ruling["award_nanos"] == 0, ruling
        buyer, seller = await wallets(court)
        assert buyer >= before[0]
        assert seller <= before[1]
        settled = await claim(court, court.seller, 0)
        assert settled.status_code == 200
        assert (await wallets(court))[0] >= before[0] + court.deal.cap, "all of it came back"


@pytest.mark.planet
async def test_1_a_seller_whose_sandbox_is_gone_is_not_paid(world: whole.Market) -> None:
    seller = await world.seller()
    async with world.buyer() as buyer:
        honest = await buyer.run(world.request(whole.HELLO))
        assert honest.ok
        assert honest.cost_nanos > 0

        async def unavailable(*_: object) -> None:
            raise LumarisError("platform_error", "There is no sandbox here.")

        executor = seller.node._tiers.executors["wasm"]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(executor, "start", unavailable)
            failed = await buyer.run(world.request(whole.HELLO))
        assert not failed.ok
        assert failed.cost_nanos == 0
        await world.assert_at_rest(buyer, cost_nanos=honest.cost_nanos)


# --- 2: a signed proof is good for another job ---


async def test_2_proofs_are_of_one_session(market: Market, parties: tuple[Party, Party]) -> None:
    first, second = await session(market, parties), await session(market, parties)
    before = await wallets(first)
    cap, seller = first.deal.cap, first.seller
    paid = await claim(first, seller, PAID)
    assert paid.status_code == 200
    after = (before[0] + cap - PAID, before[1] + net(PAID))
    assert await wallets(first) == after

    assert (await claim(first, seller, PAID)).status_code == 200, "the same claim again"
    more = await claim(first, seller, PAID + 1)
    assert code(more) == "already_settled"
    replayed = await claim(second, seller, PAID, voucher=first.deal.voucher(PAID))
    assert code(replayed) == "voucher_foreign"
    assert code(await claim(second, seller, PAID, grant=first.grant)) == "grant_invalid"
    closes = first.deal.closes(PAID)
    assert (await claim(second, seller, PAID, voucher=None, closes=closes)).status_code >= 400
    work = (first.work.order(), first.work.delivery())
    opened = await second.open(seller, "unpaid_delivery", evidence=work, amount=PRICE)
    assert code(opened) == "evidence_foreign"
    assert await wallets(first) == after
    assert (await state_of(market, second.deal, second.buyer))["state"] == "held"
    assert (await market.audit())["balanced"]


# --- 3: one machine takes the job of another ---


async def test_3_a_machine_has_only_its_own_jobs(
    market: Market, parties: tuple[Party, Party]
) -> None:
    """Both machines belong to one user, whose word does not stand for a machine's key."""
    quick(market)
    user, token = await sign_up(market, "owner")
    other = await market.party("machine-a", FUNDS)
    for party in (other, parties[1]):
        assert (await link(market, token, peer_link(market, party, user))).status_code == 200
    court = await session(market, parties)
    before = await balance(market, f"{(await market.account(other))['account']}:TEST")
    by_other = court.deal.signed_by(other)
    forgeries: tuple[dict[str, Any], ...] = (
        {"party": other.peer, "signer": other},
        {"signer": other},
        {"party": other.peer, "signer": court.seller},
        {"party": other.peer, "signer": other, "agreement_by_seller": by_other},
    )
    for changes in forgeries:
        refused = await market.settle(_forged(court, **changes))
        assert code(refused) == "wrong_signer", changes
    proof = (court.work.order(), court.work.delivery(key=other.session_key))
    opened = await court.open(court.seller, "unpaid_delivery", evidence=proof, amount=PRICE)
    assert code(opened) == "evidence_foreign"
    assert await balance(market, f"{(await market.account(other))['account']}:TEST") == before
    _, seller = await wallets(court)
    assert (await claim(court, court.seller, PAID)).status_code == 200, "its own machine"
    assert (await wallets(court))[1] == seller + net(PAID)


def _forged(court: Court, **changes: Any) -> bytes:
    """The seller's claim with other fields, or another signer."""
    deal, signer = court.deal, changes.pop("signer")
    honest = codec.open_signed(
        deal.claim(court.seller, court.grant, PAID), Settle, network=NETWORK
    ).message
    return codec.sign(structs.replace(honest, **changes), signer.key, NETWORK).data


@pytest.mark.planet
async def test_3_a_job_is_started_on_its_machine_only(world: whole.Market) -> None:
    booked = await world.seller("booked")
    async with world.buyer() as buyer:
        attack = Attack(world, booked, buyer)
        machine, grant = await attack.agreed()
        opening = sent(machine.open(grant))
        other = await world.seller("other")
        assert await Attack(world, other, buyer).say(SESSION, opening) == "quote_unknown"
        assert not other.node._sessions.hosts
        stream = await attack.stream(SESSION)
        await stream.send(Kind.ENVELOPE, opening)
        machine.receive(await stream.expect(Kind.ENVELOPE), now=trio.current_time())
        assert len(booked.node._sessions.hosts) == 1
        await stream.aclose()
        await booked.assert_idle()


# --- 4: what was never started is paid when its window ends ---


async def test_4_a_session_never_started_costs_nothing(
    market: Market, parties: tuple[Party, Party]
) -> None:
    ran, idle = await session(market, parties), await session(market, parties)
    buyer, seller = await wallets(ran)
    assert (await claim(ran, ran.buyer, PAID)).status_code == 202  # its seller stays silent
    cap = idle.deal.cap
    assert code(await claim(idle, idle.seller, cap, voucher=None)) == "claim_unproven"
    forged = idle.deal.voucher(cap, signer=idle.seller.session_key)
    assert code(await claim(idle, idle.seller, cap, voucher=forged)) == "wrong_signer"
    assert code(await claim(idle, idle.seller, cap, closes=idle.deal.closes(1))) == "claim_unproven"
    market.clock.now = ran.deal.agreement.ends_at + market.coordinator.settings.settle_window_s
    await market.coordinator.run_chores()
    assert await wallets(ran) == (buyer, seller), "the last second of both windows"
    market.clock.now += 1
    await market.coordinator.run_chores()
    assert await wallets(ran) == (buyer + 2 * cap - PAID, seller + net(PAID))
    late = await claim(idle, idle.seller, cap)
    assert code(late) == "already_settled"
    assert (await market.audit())["balanced"]


# --- 5: a minute is billed as an hour ---

MINUTE_MS, LEASE_S = 60_000, 6 * HOUR


async def test_5_an_hour_taken_for_a_minute_is_given_back(
    market: Market, parties: tuple[Party, Party]
) -> None:
    """The whole lease of six hours was reserved, and a minute of it used."""
    lease = {"ends_at": market.now + LEASE_S}
    honest = await session(market, parties, changes=lease)
    terms = honest.deal.agreement.terms
    minute, hour = (int(pricing.order_nanos(terms, ms)) for ms in (MINUTE_MS, 60 * MINUTE_MS))
    for taken in (minute, hour):
        court = await session(market, parties, changes=lease)
        assert (await claim(court, court.seller, taken)).status_code == 200
        buyer, _ = await wallets(court)
        bond = await bond_of(market, court.seller)
        dispute = await court.opened(court.buyer, "not_delivered", amount=taken)
        shown = (court.work.order(), court.work.delivery(wall_ms=MINUTE_MS))
        assert (await court.add(dispute, court.seller, *shown, done=True)).status_code == 200
        assert (await court.add(dispute, court.buyer, done=True)).status_code == 200
        ruling = await court.settles(dispute)
        if taken == minute:
            assert (ruling["rule"], ruling["fault"]) == ("delivered", "buyer")
            continue
        assert (ruling["rule"], ruling["fault"]) == ("not_delivered", "seller")
        assert ruling["refund_nanos"] == hour - minute
        assert (await wallets(court))[0] == buyer + hour - minute + ruling["victim_nanos"]
        assert await bond_of(market, court.seller) == bond - ruling["collected_nanos"]


@pytest.mark.planet
async def test_5_a_buyer_pays_for_the_time_that_it_used(world: whole.Market) -> None:
    """Time counts from the order's own start, and more of it than was seen is not vouchered."""
    seller = await world.seller()
    async with world.buyer() as buyer:
        first = await buyer.run(world.request(whole.HELLO))
        world.clock.ahead_s += 120  # the session waits: that is nobody's work
        second = await buyer.run(world.request(whole.HELLO))
        assert second.session == first.session
        (host,) = seller.node._sessions.hosts
        terms = host.machine.terms
        for result in (first, second):
            assert result.cost_nanos == pricing.order_nanos(terms, result.wall_ms) > 0
        honest = SellerSession.delivered

        def an_hour(self: SellerSession, n: int, *, usage: Usage, **more: Any) -> Any:
            return honest(self, n, usage=structs.replace(usage, wall_ms=60 * MINUTE_MS), **more)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(SellerSession, "delivered", an_hour)
            patch.setattr(SellerSession, "over_limit", lambda *_: False)
            billed = await buyer.run(world.request(whole.HELLO))
        assert (billed.reason, billed.cost_nanos) == ("overcharged", 0)
        await world.assert_at_rest(buyer, cost_nanos=first.cost_nanos + second.cost_nanos)


# --- 6: what was stopped runs on ---


async def stopped(buyer: Buyer, request: JobRequest) -> None:
    """Run a job until it prints, then stop it."""
    said = trio.Event()
    with trio.fail_after(whole.WAIT_S), trio.CancelScope() as scope:
        async with trio.open_nursery() as nursery:

            async def stop() -> None:
                await said.wait()
                scope.cancel()

            nursery.start_soon(stop)
            await buyer.run(
                request, observe=lambda event: said.set() if isinstance(event, LogLine) else None
            )
    assert scope.cancelled_caught


@pytest.mark.planet
async def test_6_stopping_stops(world: whole.Market) -> None:
    """Nothing of a job is left at the seller, and an ended session gives it no more work."""
    seller = await world.seller()
    async with world.buyer() as buyer:
        honest = await buyer.run(world.request(whole.HELLO))
        assert honest.ok
        runs = seller.node._sessions.hosts
        await stopped(buyer, world.request(whole.WAIT))
        await eventually(lambda: all(host._run is None for host in runs), "the guest is gone")
        await buyer.pool.close_all()
        await seller.assert_idle()

        attack = Attack(world, seller, buyer)
        machine, grant = await attack.agreed()
        opening = sent(machine.open(grant))
        stream = await attack.stream(SESSION)
        await stream.send(Kind.ENVELOPE, opening)
        machine.receive(await stream.expect(Kind.ENVELOPE), now=trio.current_time())
        await stream.aclose()
        await seller.assert_idle()
        assert await attack.say(SESSION, opening) == "quote_unknown", "the rental is over"
        assert not seller.node._sessions.hosts
        await world.assert_at_rest(buyer, cost_nanos=honest.cost_nanos)


# --- 7: a machine that dies near the end has worked for nothing ---


async def test_7_a_dead_machine_is_paid_for_what_it_did(
    market: Market, parties: tuple[Party, Party]
) -> None:
    """It stopped after 5.9 of 6 hours: what was vouchered is the seller's, whoever is silent."""
    lease = {"ends_at": market.now + LEASE_S}
    back, gone, robbed = [await session(market, parties, changes=lease) for _ in range(3)]
    cap = back.deal.cap
    done = cap * 59 // 60
    buyer, seller = await wallets(back)
    assert (await claim(back, back.seller, done)).status_code == 200, "after its restart"
    assert await wallets(back) == (buyer + cap - done, seller + net(done))

    assert (await claim(gone, gone.buyer, done)).status_code == 202, "it never comes back"
    assert (await claim(robbed, robbed.buyer, 0)).status_code == 202, "the buyer denies all"
    assert await wallets(back) == (buyer + cap - done, seller + net(done)), "nothing returns yet"
    market.clock.now += LEASE_S
    late = await claim(robbed, robbed.seller, done)
    assert late.status_code == 200, late.text
    market.clock.now += market.coordinator.settings.settle_window_s + 1
    await market.coordinator.run_chores()
    assert await wallets(back) == (buyer + 3 * (cap - done), seller + 3 * net(done))
    assert (await market.audit())["balanced"]


# --- 8: capacity is not given back ---


@pytest.mark.planet
async def test_8_capacity_comes_back_however_a_job_ends(world: whole.Market) -> None:
    """A machine with room for one job at a time has it again after each."""
    room = Resources(cpu_millis=1000, memory_bytes=64 * MIB, disk_bytes=64 * MIB)
    seller = await world.seller(total=room)
    for name in ("one", "two"):
        async with world.buyer(name) as buyer:
            for what, ok in ((whole.HELLO, True), (whole.EXIT_3, False), (whole.TRAP, False)):
                result = await buyer.run(world.request(what))
                assert result.ok == ok, result
            await stopped(buyer, world.request(whole.WAIT))
            assert (await buyer.run(world.request(whole.HELLO))).ok
            await buyer.pool.close_all()
            await seller.assert_idle()
            assert seller.quotes.free == room
            world.network.kill(world.hosts[buyer.key.peer_id])  # and one that just goes away
    async with world.buyer("three") as buyer:
        result = await buyer.run(world.request(whole.HELLO))
        assert result.ok
        await world.assert_at_rest(buyer, cost_nanos=result.cost_nanos)
    assert seller.quotes.free == room


# --- 9: one key is many accounts, and any device it names ---


async def test_9_a_key_is_one_peer_of_one_user(
    market: Market, parties: tuple[Party, Party]
) -> None:
    quick(market)
    machine = parties[1]
    one, first = await sign_up(market, "one")
    two, second = await sign_up(market, "two")
    signed = peer_link(market, machine, one)
    assert (await link(market, first, signed)).json() == {"peers": [machine.peer]}
    account = (await market.account(machine))["account"]
    again = await market.register(machine)
    assert again["account"] == account, "the same key is the same account"
    refused = await link(market, second, peer_link(market, machine, two))
    assert code(refused) == "already_linked"
    assert code(await link(market, second, signed)) == "forbidden"
    assert (await get(market, "/v1/users/me", second)).json()["peers"] == []
    assert (await get(market, "/v1/bonds/me", second)).json() == {"bonds": []}
    assert (await get(market, "/v1/users/me", first)).json()["peers"] == [machine.peer]
    answer = await market.client.delete(
        f"/v1/users/me/peers/{machine.peer}", headers={"authorization": f"Bearer {first}"}
    )
    assert answer.status_code == 204
    assert code(await link(market, first, signed)) == "replayed"


@pytest.mark.planet
async def test_9_a_device_that_is_not_there_earns_nothing(world: whole.Market) -> None:
    """A seller may claim any device; an order for it finds none, and is not paid."""
    claimed = Gpu(model="NVIDIA H200", vram_bytes=141 * GIB, count=1)
    room = Resources(cpu_millis=2000, memory_bytes=256 * MIB, disk_bytes=256 * MIB, gpus=(claimed,))
    seller = await world.seller(total=room)
    seller.node._sessions._gpus = Gpus(())
    async with world.buyer() as buyer:
        honest = await buyer.run(world.request(whole.HELLO))
        assert honest.ok
        needs_of = buyer.pool.needs

        def needs(*arguments: Any) -> Any:
            found = needs_of(*arguments)
            return structs.replace(
                found, resources=structs.replace(found.resources, gpus=(claimed,))
            )

        buyer.pool.needs = needs  # type: ignore[method-assign, assignment]
        with pytest.raises(LumarisError) as caught:
            await buyer.run(world.request(whole.HELLO))
        assert caught.value.code == "no_capacity"
        world.clock.ahead_s += 60
        await world.assert_at_rest(buyer, cost_nanos=honest.cost_nanos)


# --- 10: anybody can freeze a seller's money ---


async def test_10_a_strangers_word_freezes_nothing(
    market: Market, parties: tuple[Party, Party]
) -> None:
    """A party's claim holds its stake with a bond of the party's own, and payouts go on."""
    quick(market)
    court = await session(market, parties)
    stranger = await market.party("stranger", FUNDS)
    user, token = await sign_up(market, "stranger")
    assert (await link(market, token, peer_link(market, stranger, user))).status_code == 200
    assert (await claim(court, court.seller, PAID)).status_code == 200
    before, bond = await wallets(court), await bond_of(market, court.seller)

    bearer = {"authorization": f"Bearer {token}", "content-type": "application/octet-stream"}
    for body in (
        court.opening(stranger, "not_delivered"),
        court.opening(court.buyer, "not_delivered", signer=stranger.key),
        court.opening(stranger, "equivocation", amount=0),
    ):
        answer = await market.client.post("/v1/disputes", content=body, headers=bearer)
        assert 400 <= answer.status_code < 500, answer.text
    target = [{"peer": court.seller.peer, "serial": 0}]
    answer = await post(market, "/v1/operator/revocations", token, revoked=target)
    assert code(answer) == "forbidden"
    assert (await wallets(court), await bond_of(market, court.seller)) == (before, bond)

    await court.opened(court.buyer, "not_delivered")
    assert await wallets(court) == (before[0] - OPENER_BOND, before[1]), "the claim has its price"
    held = bond - await bond_of(market, court.seller)
    assert 0 < held <= PAID * 11 // 10
    body = payout_request(court.seller, market.peer, before[1], issued_at=market.now)
    asked = await market.client.post("/v1/payouts", content=body)
    assert asked.status_code == 200, asked.text
    await paid_out(market, court.seller, asked.json()["payout"])
    assert (await wallets(court))[1] == 0
    assert (await market.audit())["balanced"]
