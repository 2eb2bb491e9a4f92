"""What a buyer does on a market of several sellers, and how it recovers from its own death."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import trio
from msgspec import structs

from lumaris.buyer import Buyer
from lumaris.images import resolve
from lumaris.jobs import LogLine
from lumaris.pool import LEASE_S
from lumaris_overlay.framed_stream import FramedStream
from lumaris_overlay.ports import Overlay
from lumaris_protocol import matching
from lumaris_protocol.effects import Send
from lumaris_protocol.errors import LumarisError
from lumaris_protocol.frames import Kind
from lumaris_protocol.limits import MIB, QUOTE_HOLD_S_MAX, QUOTES_HELD_PER_BUYER_MAX
from lumaris_protocol.machines.buyer import BuyerSession
from lumaris_protocol.messages.advert import Resources
from lumaris_protocol.messages.negotiation import Requirements
from lumaris_protocol.protocols import SESSION
from tests import market as m
from tests.market import CREDIT, Market, eventually, eventually_async

pytestmark = [pytest.mark.slow, pytest.mark.planet]

SMALL = Resources(cpu_millis=1000, memory_bytes=64 * MIB, disk_bytes=64 * MIB)


# --- choosing ---


async def test_a_map_outlives_one_of_its_sellers(market: Market):
    sellers = [await market.seller(f"seller{n}") for n in range(3)]
    async with market.buyer() as buyer:
        requests = [market.request(m.after(m.HELLO, 2), attempts=3) for _ in range(12)]
        done: list[int] = []

        def on_result(index: int, _: object) -> None:
            done.append(index)
            if len(done) == 2:
                market.vanish(sellers[0])

        results = await buyer.map(
            requests, sellers=3, budget_nanos=CREDIT // 10, on_result=on_result
        )
        assert [result.reason for result in results] == ["succeeded"] * 12
        assert {result.stdout for result in results} == {b"hello\n"}
        assert sorted(done) == list(range(12))
        assert len({result.seller for result in results}) >= 2
        await sellers[0].assert_settled()
        vouchered = sum(row["total_nanos"] for row in await buyer.store.sessions(100))
        # An order that was delivered but whose acceptance was lost on the way is not paid.
        assert vouchered <= sum(result.cost_nanos for result in results)
        # A voucher that was on its way to the dead seller may not have arrived.
        await market.assert_at_rest(buyer, cost_nanos=vouchered, lost_nanos=vouchered)


async def test_a_second_map_uses_the_session_that_the_first_left(market: Market):
    request = market.request(m.HELLO)
    whole = Resources(
        cpu_millis=request.cpu_millis,
        memory_bytes=request.memory_bytes,
        disk_bytes=request.disk_bytes,
    )
    await market.seller(total=whole)  # room for one session
    async with market.buyer() as buyer:
        maps = [await buyer.map([request] * 3, budget_nanos=CREDIT // 10) for _ in range(2)]
        results = [result for results in maps for result in results]
        assert [result.reason for result in results] == ["succeeded"] * 6
        assert len({result.session for result in results}) == 1
        with pytest.raises(LumarisError):  # what is left of its cap could cost more than this
            await buyer.map([request], budget_nanos=1)
        cost_nanos = sum(result.cost_nanos for result in results)
        await market.assert_at_rest(buyer, cost_nanos=cost_nanos)


async def test_a_map_with_nobody_to_run_it(market: Market):
    await market.seller()
    async with market.buyer() as buyer:
        request = market.request(m.HELLO, memory_bytes=1 << 40)
        with pytest.raises(LumarisError) as caught:
            await buyer.map([request, request], budget_nanos=CREDIT // 10)
        assert caught.value.code == "no_offers"
        with pytest.raises(LumarisError) as caught:
            await buyer.map([market.request(m.HELLO)], budget_nanos=0)
        assert caught.value.code == "budget_exceeded"


async def test_quotes_not_taken_are_given_back_at_once(market: Market):
    """Three sellers are asked, one is bought from: the others must not stay held."""
    sellers = [await market.seller(f"seller{n}", total=SMALL) for n in range(3)]
    async with market.buyer() as buyer:
        result = await buyer.run(market.request(m.HELLO))
        assert result.ok
        with trio.fail_after(QUOTE_HOLD_S_MAX / 2):
            for seller in sellers:
                if seller.peer != result.seller:
                    await seller.assert_idle()
        await market.assert_at_rest(buyer, cost_nanos=result.cost_nanos)


CAP = 100_000_000


async def test_refused_quotes_say_why(market: Market):
    seller = await market.seller(total=SMALL, lease_s_max=3600)
    async with market.buyer() as buyer:
        needs = await needs_of(market, buyer)
        report = await buyer.market.search(needs, lease_s=LEASE_S)

        async def refusal(needs: Requirements, lease_s: int = LEASE_S, cap_nanos: int = CAP) -> str:
            with pytest.raises(LumarisError) as caught:
                await buyer.market.quotes(
                    needs, report, lease_s=lease_s, cap_nanos=cap_nanos, verification="det"
                )
            return caught.value.code

        assert await refusal(needs, cap_nanos=1) == "budget_exceeded"
        assert await refusal(needs, 3601) == "duration_long"
        assert await refusal(with_cpu(needs, 1001)) == "no_capacity"
        assert await refusal(with_cpu(needs, 0)) == "cpu_short"
        assert await refusal(structs.replace(needs, currency="EUR")) == "price_high"
        seller.quotes.accepting = False
        assert await refusal(needs) == "not_accepting"
        seller.quotes.accepting = True
        held = [
            await buyer.market.quotes(
                with_cpu(needs, 10), report, lease_s=60, cap_nanos=CAP, verification="det"
            )
            for _ in range(QUOTES_HELD_PER_BUYER_MAX)
        ]
        assert await refusal(with_cpu(needs, 10)) == "too_many_holds"
        for [offered] in held:
            await offered.decline()
        await seller.assert_idle()
        assert seller.node._desk.counts["too_many_holds"] == 1


def with_cpu(needs: Requirements, cpu_millis: int) -> Requirements:
    return structs.replace(needs, resources=structs.replace(needs.resources, cpu_millis=cpu_millis))


async def needs_of(market: Market, buyer: Buyer) -> Requirements:
    request = market.request(m.HELLO)
    return buyer.pool.needs(request, await resolve(request.image))


async def test_declined_by_the_user(market: Market):
    seller = await market.seller()
    async with market.buyer() as buyer:

        async def decline(plan: object) -> bool:
            return False

        with pytest.raises(LumarisError) as caught:
            await buyer.run(market.request(m.HELLO), approve=decline)
        assert caught.value.code == "declined"
        await seller.assert_idle()
        assert market.requests("POST /v1/grants") == 0
        await market.assert_at_rest(buyer, cost_nanos=0)


async def test_nobody_sells(market: Market, monkeypatch):
    monkeypatch.setattr("lumaris.market._FIRST_SELLER_S", 0.1)
    async with market.buyer() as buyer:
        with pytest.raises(LumarisError) as caught:
            await buyer.run(market.request(m.HELLO))
        assert caught.value.code == "no_sellers"


# --- recovery: the buyer dies between two steps, and the next one cleans up ---


@asynccontextmanager
async def contract_of(market: Market, buyer: Buyer) -> AsyncIterator[BuyerSession]:
    """An agreement as `Pool` makes it, stored; the session's machine before its opening."""
    needs = await needs_of(market, buyer)
    report = matching.match(needs, buyer.market.adverts, lease_s=LEASE_S)
    [offered] = await buyer.market.quotes(
        needs, report, lease_s=LEASE_S, cap_nanos=1_000_000, verification="det"
    )
    contract, key = await buyer.market.agree(offered)
    await buyer.store.add_session(contract, now=0)
    yield BuyerSession(contract, key, network=m.NETWORK, now=trio.current_time())


async def grant_for(buyer: Buyer, machine: BuyerSession) -> bytes:
    return await buyer._settling.grant(machine.contract.by_buyer, machine.contract.by_seller)


async def test_died_between_agreement_and_grant(market: Market):
    await market.seller()
    async with market.buyer() as buyer, contract_of(market, buyer):
        await buyer.pool.settle()  # too early: the coordinator might still give a grant
        assert (await buyer.store.sessions(1))[0]["state"] == "agreed"
        market.clock.ahead_s = 40  # past start_by, but within what clocks may differ by
        await buyer.pool.settle()
        assert (await buyer.store.sessions(1))[0]["state"] == "agreed"
        assert (await buyer.account()).held_nanos == 0
    market.clock.ahead_s = 200
    async with market.buyer(credit=0) as buyer:
        [item] = await buyer.store.sessions(1)
        await buyer.pool.settle()
        assert (await buyer.store.sessions(1))[0]["state"] == "settled", item
        await market.assert_at_rest(buyer, cost_nanos=0)


async def test_the_answer_with_the_grant_was_lost(market: Market):
    """The coordinator holds money that the buyer knows nothing of; it comes back all the same."""
    seller = await market.seller()
    async with market.buyer() as buyer, contract_of(market, buyer) as machine:
        market.line.lose_answers = True
        with pytest.raises(LumarisError):
            await grant_for(buyer, machine)
        market.line.lose_answers = False
        assert (await buyer.account()).held_nanos == 1_000_000
    market.clock.ahead_s = 200
    seller.node._desk.expire()
    async with market.buyer(credit=0) as buyer:
        # It learns of the grant, shows it to the seller, and that settles for nothing.
        await market.assert_at_rest(buyer, cost_nanos=0)


async def test_the_opening_never_reached_the_seller(market: Market):
    seller = await market.seller()
    async with market.buyer() as buyer, contract_of(market, buyer) as machine:
        grant = await grant_for(buyer, machine)
        [opening] = machine.open(grant)
        assert isinstance(opening, Send)
        await buyer.store.keep_grant(machine.contract.agreement.session, grant, opening.data)
        market.clock.ahead_s = 200
        seller.node._desk.expire()
        assert not seller.quotes.holds
    async with market.buyer(credit=0) as buyer:
        await seller.assert_settled()
        await market.assert_at_rest(buyer, cost_nanos=0)
    assert (await seller.node._store.summary())["earned_nanos"] == 0


async def test_a_seller_is_shown_a_grant_after_its_own_restart(market: Market):
    seller = await market.seller()
    async with market.buyer() as buyer, contract_of(market, buyer) as machine:
        grant = await grant_for(buyer, machine)
        [opening] = machine.open(grant)
        assert isinstance(opening, Send)
        await buyer.store.keep_grant(machine.contract.agreement.session, grant, opening.data)
        seller.node.stop()
        await seller.gone.wait()
        market.sellers.clear()
        again = await market.seller()
        await eventually(lambda: len(buyer.market.adverts) == 1, "the seller is seen again")
        await buyer.pool.settle()
        await again.assert_settled()
        await market.assert_at_rest(buyer, cost_nanos=0)


async def test_died_with_a_voucher_given(market: Market):
    seller = await market.seller()
    async with market.buyer() as buyer:
        result = await buyer.run(market.request(m.HELLO))
        assert result.ok

        async def arrived() -> bool:
            summary = await seller.node._store.summary()
            return summary["pending_nanos"] == result.cost_nanos

        await eventually_async(arrived, "the voucher is stored")
        market.network.kill(market.hosts[buyer.key.peer_id])
        await seller.assert_idle()
        await seller.assert_settled()
        await buyer.store.set_state(result.session, "open")
    async with market.buyer(credit=0) as buyer:
        await market.assert_at_rest(buyer, cost_nanos=result.cost_nanos)
        assert await buyer.store.receipt(result.session) is not None


async def test_a_lapsed_agreement_cannot_be_settled_with_another_grant(market: Market):
    """What a stranger shows for an agreement that waits for its grant changes nothing."""
    seller = await market.seller()
    async with market.buyer() as buyer, contract_of(market, buyer) as machine:
        [opening] = machine.open(b"no grant at all")
        assert isinstance(opening, Send)
        market.clock.ahead_s = 60
        assert await shown(market.hosts[buyer.key.peer_id], seller.peer, opening.data) == (
            "malformed"
        )
        assert (await seller.node._store.summary())["sessions_agreed"] == 1
        assert await seller.node._store.unsettled() == []


async def shown(overlay: Overlay, seller: str, opening: bytes) -> str:
    """The code with which the seller refuses an opening."""
    stream = FramedStream(await overlay.open_stream(seller, SESSION))
    await stream.send(Kind.ENVELOPE, opening)
    with pytest.raises(LumarisError) as caught:
        await stream.expect(Kind.ENVELOPE)
    await stream.aclose()
    return caught.value.code


async def test_jobs_are_written_behind_and_orphans_are_named(market: Market, monkeypatch):
    await market.seller()
    async with market.buyer() as buyer:
        said = trio.Event()
        async with trio.open_nursery() as nursery:

            def observe(event: object) -> None:
                if isinstance(event, LogLine):
                    said.set()

            async def run() -> None:
                await buyer.run(market.request(m.WAIT), observe=observe)

            nursery.start_soon(run)
            await said.wait()

            async def written() -> bool:
                return bool(await buyer.store.jobs(1))

            await eventually_async(written, "the row is written")
            await buyer.store.end_orphan_jobs(now=1)
            assert (await buyer.store.jobs(10))[0]["state"] == "running", "its program lives"
            monkeypatch.setattr("lumaris.store.processes.alive", lambda owner: False)
            await buyer.store.end_orphan_jobs(now=1)
            nursery.cancel_scope.cancel()
        [row] = await buyer.store.jobs(10)
        assert (row["state"], row["reason"]) == ("failed", "buyer_lost")
        await buyer.records.flush()
        assert (buyer.profile.jobs / row["job"] / "stdout").read_bytes(), "what came is kept"
        await buyer.records.flush()
        [row] = await buyer.store.jobs(10)
        assert (row["state"], row["reason"]) == ("failed", "cancelled")
