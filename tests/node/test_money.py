"""Who pays what when a side stops playing: vouchers, exposure, the coordinator away, restarts."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import trio

from lumaris.buyer import Buyer
from lumaris.jobs import JobResult, LogLine
from lumaris_node.config import Price
from lumaris_protocol import pricing
from lumaris_protocol.errors import LumarisError
from lumaris_protocol.ids import derive_id
from lumaris_protocol.messages.payment import Voucher
from tests import market as m
from tests.market import CREDIT, Market, Seller, eventually, eventually_async

pytestmark = [pytest.mark.slow, pytest.mark.planet]

# One credit an hour for a core: half of the short exposure is used up in half a second.
DEAR = Price(start="0.000001", cpu_core_hour="0.36", memory_gib_hour="0")


@pytest.fixture
def short_exposure(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sellers carry one second of unpaid work instead of ten."""
    monkeypatch.setattr(pricing, "EXPOSURE_S", 1)
    monkeypatch.setattr(pricing, "EXPOSURE_STARTS", 1)


class Job:
    """A job under way in the background."""

    def __init__(self) -> None:
        self.said, self.ended = trio.Event(), trio.Event()
        self.result: JobResult | None = None
        self.error: LumarisError | None = None

    async def run(self, buyer: Buyer, request) -> None:
        try:
            self.result = await buyer.run(request, observe=self._observe)
        except LumarisError as error:
            self.error = error
        self.ended.set()

    def _observe(self, event: object) -> None:
        if isinstance(event, LogLine):
            self.said.set()


async def run_until(market: Market, buyer: Buyer, request, act: Callable[[], object]) -> Job:
    """Start a job, act once it prints, wait for its end."""
    job = Job()
    with trio.fail_after(m.WAIT_S):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(job.run, buyer, request)
            await job.said.wait()
            act()
            await job.ended.wait()
    return job


async def paid(buyer: Buyer) -> int:
    """The sum of what was vouchered."""
    return sum(row["total_nanos"] for row in await buyer.store.sessions(100))


async def settled_at_coordinator(market: Market, buyer: Buyer) -> None:
    """The coordinator holds nothing of the buyer any more."""

    async def clear() -> bool:
        return (await buyer.account()).held_nanos == 0

    await eventually_async(clear, "nothing is held")


async def test_a_seller_that_vanishes_before_delivery_is_not_paid(market: Market):
    seller = await market.seller()
    async with market.buyer() as buyer:
        job = await run_until(market, buyer, market.request(m.WAIT), lambda: market.vanish(seller))
        assert job.result is not None
        assert (job.result.reason, job.result.cost_nanos) == ("seller_lost", 0)
        assert await paid(buyer) == 0
        await seller.assert_idle()
        await seller.assert_settled()  # for nothing, which frees the buyer's money at once
        await settled_at_coordinator(market, buyer)
        await market.assert_at_rest(buyer, cost_nanos=0)


async def test_a_seller_that_vanishes_before_ready(market: Market, monkeypatch):
    seller = await market.seller()

    async def vanish(*_: object) -> None:
        market.vanish(seller)

    monkeypatch.setattr(seller.node._sessions, "_run", vanish)
    async with market.buyer() as buyer:
        with pytest.raises(LumarisError) as caught:
            await buyer.run(market.request(m.HELLO))
        assert caught.value.code == "seller_lost"
        assert await paid(buyer) == 0
        market.clock.ahead_s = 60  # the agreement lapses
        await seller.assert_idle()
        await market.assert_balanced(buyer)


async def test_work_moves_to_another_seller(market: Market):
    one = await market.seller("one")
    async with market.buyer() as buyer:
        await buyer.run(market.request(m.HELLO))  # so that the first has the session
        other = await market.seller("other")
        await eventually(lambda: len(buyer.market.adverts) == 2, "both are seen")
        job = await run_until(
            market,
            buyer,
            market.request(m.WAIT, wall_s=1, attempts=2),
            lambda: market.vanish(one),
        )
        assert job.result is not None
        assert (job.result.reason, job.result.seller) == ("killed_deadline", other.peer)
        assert (job.result.attempts, job.result.cost_nanos) == (2, 0)


async def test_a_failed_job_costs_what_was_vouchered(market: Market, short_exposure):
    await market.seller(price=DEAR)
    async with market.buyer() as buyer:
        request = market.request(m.after(m.EXIT_3, 15), max_cost_nanos=CREDIT // 10)
        result = await buyer.run(request)
        assert result.reason == "exit_nonzero"
        vouchered = await paid(buyer)
        assert 0 < vouchered < result.wall_ms * 100_000
        assert result.cost_nanos == vouchered
        await market.assert_at_rest(buyer, cost_nanos=vouchered)


async def test_a_job_that_reaches_its_cap_ends_there(market: Market, short_exposure):
    await market.seller(price=DEAR)
    async with market.buyer() as buyer:
        result = await buyer.run(market.request(m.WAIT, max_cost_nanos=60_000))
        assert result.reason == "budget_exceeded"
        assert result.cost_nanos <= 60_000
        await market.assert_at_rest(buyer, cost_nanos=result.cost_nanos)


async def test_a_job_that_passes_its_cap_between_two_meterings(market: Market, monkeypatch):
    """The buyer must not take an honest seller for one that overcharges."""
    await market.seller(price=DEAR)
    monkeypatch.setattr("lumaris_node.session._METER_S", 30)
    async with market.buyer() as buyer:
        request = market.request(m.after(m.HELLO, 5), max_cost_nanos=20_000)
        result = await buyer.run(request)
        assert (result.reason, result.cost_nanos) == ("budget_exceeded", 0)
        await market.assert_at_rest(buyer, cost_nanos=0)


async def test_a_buyer_that_vanishes_pays_what_it_vouchered(market: Market, short_exposure):
    seller = await market.seller(price=DEAR)
    async with market.buyer() as buyer:
        job = Job()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(job.run, buyer, market.request(m.WAIT, max_cost_nanos=CREDIT // 10))

            async def has_voucher() -> bool:
                return (await seller.node._store.summary())["pending_nanos"] > 0

            await eventually_async(has_voucher, "a voucher arrived")
            market.network.kill(market.hosts[buyer.key.peer_id])
            await job.ended.wait()
        await seller.assert_idle()
        await seller.assert_settled()
        vouchered = await paid(buyer)
        assert vouchered > 0
        account = await buyer.account()
        assert (account.free_nanos, account.held_nanos) == (CREDIT - vouchered, 0)
        await market.assert_at_rest(buyer, cost_nanos=vouchered)


async def test_a_buyer_that_stops_paying_is_frozen_and_left(
    market: Market, short_exposure, monkeypatch
):
    seller = await market.seller(price=DEAR)
    async with market.buyer() as buyer:
        monkeypatch.setattr("lumaris_protocol.machines.buyer.BuyerSession._voucher", no_voucher)
        job = Job()
        with trio.fail_after(m.WAIT_S):
            async with trio.open_nursery() as nursery:
                request = market.request(m.WAIT, max_cost_nanos=CREDIT // 10)
                nursery.start_soon(job.run, buyer, request)
                await eventually(lambda: "stopped" in guest_states(seller), "the job is frozen")
                market.clock.ahead_s = 31
                await job.ended.wait()
        assert job.result is not None
        assert (job.result.reason, job.result.cost_nanos) == ("unpaid", 0)
        assert "stopped" not in guest_states(seller)
        await market.assert_at_rest(buyer, cost_nanos=0)


def no_voucher(_self: object, _total_nanos: int) -> list[Voucher]:
    return []


def guest_states(seller: Seller) -> list[str]:
    """The states of the zygote's children: the guests and a spare."""
    pid = seller.node._tiers.executors["wasm"].zygote_pid  # type: ignore[attr-defined]
    if pid is None:
        return []
    return [child.status() for child in psutil.Process(pid).children(recursive=True)]


async def test_the_coordinator_is_down_at_settlement(market: Market, monkeypatch):
    monkeypatch.setattr("lumaris_node.settle._RETRY_S_MAX", 0.5)
    seller = await market.seller()
    async with market.buyer() as buyer:
        result = await buyer.run(market.request(m.HELLO))
        market.line.down = True
        again = await buyer.run(market.request(m.HELLO))
        assert again.ok, "an open session needs no coordinator"
        await buyer.pool.close_all()
        await seller.assert_idle()
        await eventually(
            lambda: seller.node._settler.last_error == "coordinator_unreachable", "it was tried"
        )
        assert len(await buyer.store.unsettled()) == 1
        market.line.down = False
        await market.assert_at_rest(buyer, cost_nanos=result.cost_nanos + again.cost_nanos)


async def test_no_grant_without_the_coordinator(market: Market):
    seller = await market.seller()
    async with market.buyer() as buyer:
        market.line.down = True
        with pytest.raises(LumarisError) as caught:
            await buyer.run(market.request(m.HELLO))
        assert caught.value.code == "coordinator_unreachable"
        market.line.down = False
        assert (await buyer.run(market.request(m.HELLO))).ok
        market.clock.ahead_s = 60
        await buyer.pool.close_all()
        await seller.assert_idle()


async def test_a_budget_that_the_account_does_not_cover(market: Market):
    await market.seller()
    async with market.buyer(credit=1_000_000) as buyer:
        with pytest.raises(LumarisError) as caught:
            await buyer.run(market.request(m.HELLO, max_cost_nanos=2_000_000))
        assert (caught.value.code, caught.value.money_moved) == ("no_funds", False)
        market.clock.ahead_s = 60
        await market.assert_at_rest(buyer, cost_nanos=0, credit=1_000_000)


async def test_a_killed_seller_settles_after_its_restart(market: Market, short_exposure):
    """kill -9 in mid-run: what is on its disk is enough to be paid what was vouchered."""
    seller = await market.seller(price=DEAR)
    async with market.buyer() as buyer:
        job = Job()
        async with trio.open_nursery() as nursery:
            request = market.request(m.WAIT, max_cost_nanos=CREDIT // 10)
            nursery.start_soon(job.run, buyer, request)

            async def has_voucher() -> bool:
                return (await seller.node._store.summary())["pending_nanos"] > 0

            await eventually_async(has_voucher, "a voucher arrived")
            disk = copy_of_disk(seller, market.folder / "after")
            market.line.down = True
            market.vanish(seller)
            seller.scope.cancel()
            await job.ended.wait()
            await seller.gone.wait()
        market.sellers.clear()
        market.line.down = False
        restarted = await market.seller(disk.name, price=DEAR)
        assert restarted.peer == seller.peer
        await restarted.assert_settled()
        await restarted.assert_idle()
        assert job.result is not None
        assert (job.result.reason, job.result.cost_nanos) == ("seller_lost", await paid(buyer))
        # The last voucher may have been on its way; the coordinator pays the one that arrived.
        summary = await restarted.node._store.summary()
        fee = CREDIT - (await buyer.account()).free_nanos - summary["earned_nanos"]
        assert 0 < summary["earned_nanos"] <= await paid(buyer)
        assert 0 <= fee <= summary["earned_nanos"] * 6 // 100
        await settled_at_coordinator(market, buyer)
        await market.assert_balanced(buyer)


def copy_of_disk(seller: Seller, target: Path) -> Path:
    """What a power cut at this moment would leave."""
    target.mkdir(mode=0o700)
    (target / "node.key").touch(mode=0o600)
    (target / "node.key").write_bytes((seller.state / "node.key").read_bytes())
    (target / "volumes" / derive_id("session", b"leftover")).mkdir(parents=True)
    with sqlite3.connect(seller.state / "node.db") as source:
        copy = sqlite3.connect(target / "node.db")
        source.backup(copy)
        copy.close()
    source.close()
    return target


async def test_shutting_down_pays_and_settles(market: Market, short_exposure):
    seller = await market.seller(price=DEAR)
    async with market.buyer() as buyer:
        job = await run_until(
            market,
            buyer,
            market.request(m.WAIT, max_cost_nanos=CREDIT // 10),
            seller.node.stop,
        )
        assert job.result is not None
        assert job.result.reason == "shutting_down"
        await seller.gone.wait()
        await market.assert_at_rest(buyer, cost_nanos=job.result.cost_nanos)


async def break_down(market: Market, seller: Seller, buyer: Buyer) -> JobResult:
    """A job that was vouchered for is failed by the seller's platform; how it ended."""
    job = Job()
    async with trio.open_nursery() as nursery:
        request = market.request(m.WAIT, max_cost_nanos=CREDIT // 10, attempts=1)
        nursery.start_soon(job.run, buyer, request)

        async def has_voucher() -> bool:
            return (await seller.node._store.summary())["pending_nanos"] > 0

        await eventually_async(has_voucher, "a voucher arrived")
        (host,) = seller.node._sessions.hosts
        assert host._run is not None
        host._run.abort()
        await job.ended.wait()
    assert job.result is not None
    assert (job.result.reason, job.result.cost_nanos) == ("platform_error", 0)
    return job.result


async def test_a_job_that_the_platform_fails_costs_nothing(market: Market, short_exposure):
    seller = await market.seller(price=DEAR)
    async with market.buyer() as buyer:
        await break_down(market, seller, buyer)
        assert await paid(buyer) > 0
        await market.assert_at_rest(buyer, cost_nanos=0)


async def test_what_was_vouchered_for_it_pays_the_next_job(market: Market, short_exposure):
    seller = await market.seller(price=DEAR)
    async with market.buyer() as buyer:
        failed = await break_down(market, seller, buyer)
        vouchered = await paid(buyer)
        result = await buyer.run(market.request(m.HELLO, max_cost_nanos=CREDIT // 10))
        assert (result.reason, result.session) == ("succeeded", failed.session)
        assert 0 < result.cost_nanos < vouchered == await paid(buyer)
        await market.assert_at_rest(buyer, cost_nanos=result.cost_nanos)


async def test_a_seller_that_ends_it_gives_back_what_its_platform_failed(
    market: Market, short_exposure
):
    seller = await market.seller(price=DEAR)
    async with market.buyer() as buyer:
        await break_down(market, seller, buyer)
        seller.node.stop()
        await seller.gone.wait()
        await market.assert_at_rest(buyer, cost_nanos=0)
