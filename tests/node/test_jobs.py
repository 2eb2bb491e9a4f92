"""How jobs end, from the buyer's order to the ledger: the reason, the cost, what is left behind."""

from __future__ import annotations

import threading

import pytest
import trio

from lumaris import images
from lumaris.images import Image
from lumaris.jobs import JobResult, LogLine
from lumaris_node.workspace import LeaseWorkspace
from lumaris_protocol.errors import LumarisError
from tests import market as m
from tests.market import Market

pytestmark = [pytest.mark.slow, pytest.mark.planet]


async def test_files_in_and_out(market: Market, tmp_path):
    (tmp_path / "words").write_bytes(b"some words")
    seller = await market.seller(modules=tmp_path / "own")
    async with market.buyer() as buyer:
        result = await buyer.run(market.request(m.COPY, inputs={"a": tmp_path / "words"}))
        assert (result.reason, result.exit_status, result.stdout) == ("succeeded", 0, b"hello\n")
        assert result.artifacts["b"].file.read_bytes() == b"some words"
        assert result.cost_nanos > 0
        await market.assert_at_rest(buyer, cost_nanos=result.cost_nanos)
    summary = await seller.node._store.summary()
    assert summary["earned_nanos"] == result.cost_nanos - result.cost_nanos * 500 // 10_000


@pytest.mark.parametrize(
    ("what", "changes", "reason", "exit_status"),
    [
        (m.EXIT_3, {}, "exit_nonzero", 3),
        (m.TRAP, {}, "killed_trap", None),
        (m.SPIN, {"fuel": 1_000_000}, "killed_fuel", None),
        (m.MEMORY, {}, "killed_memory", None),
        (m.SPIN, {"wall_s": 1}, "killed_deadline", None),
        (m.LOG_FLOOD, {}, "killed_log", None),
        (m.DISK_FLOOD, {}, "killed_disk", None),
    ],
)
async def test_a_failed_job_costs_nothing(market: Market, what, changes, reason, exit_status):
    await market.seller()
    async with market.buyer() as buyer:
        result = await buyer.run(market.request(what, **changes))
        assert (result.reason, result.exit_status) == (reason, exit_status), result.detail
        assert result.cost_nanos == 0
        again = await buyer.run(market.request(m.HELLO))
        assert again.ok, again
        assert again.session == result.session
        await market.assert_at_rest(buyer, cost_nanos=again.cost_nanos)


async def test_bytes_that_are_no_module(market: Market, tmp_path):
    await market.seller()
    (tmp_path / "bad.wasm").write_bytes(b"\0asm and then nothing that makes sense")
    async with market.buyer() as buyer:
        result = await buyer.run(market.request(m.HELLO, image=str(tmp_path / "bad.wasm")))
        assert (result.reason, result.cost_nanos) == ("bad_image", 0)
        assert "not accepted" in result.detail
        await market.assert_at_rest(buyer, cost_nanos=0)


async def test_a_module_that_nobody_has(market: Market, monkeypatch):
    await market.seller()

    async def resolve(_name: str, _command: object, **_: object) -> Image:
        return Image("wasm", "sha256:" + "0" * 64)

    monkeypatch.setattr(images, "resolve", resolve)
    async with market.buyer() as buyer:
        result = await buyer.run(market.request(m.HELLO))
        assert (result.reason, result.cost_nanos) == ("bad_image", 0)
        assert "Neither side" in result.detail
        await market.assert_at_rest(buyer, cost_nanos=0)


async def test_an_input_that_changes_on_the_way(market: Market, tmp_path):
    """The seller refuses bytes that are not those of the order; the buyer is told why."""
    await market.seller()
    source = tmp_path / "a"
    source.write_bytes(b"before")

    def change(event) -> None:
        if getattr(event, "state", "") == "ordered":
            source.write_bytes(b"behind")

    async with market.buyer() as buyer:
        request = market.request(m.COPY, inputs={"a": source})
        result = await buyer.run(request, observe=change)
        assert (result.reason, result.cost_nanos) == ("output_mismatch", 0)
        await market.assert_at_rest(buyer, cost_nanos=0)


async def test_a_command_that_is_too_long(market: Market):
    await market.seller()
    async with market.buyer() as buyer:
        with pytest.raises(LumarisError) as caught:
            await buyer.run(market.request(m.HELLO, command=("guest", "h", "x" * 40_000)))
        assert caught.value.code == "bad_command"
        assert (await buyer.run(market.request(m.HELLO))).ok


async def test_cancelled_by_the_caller(market: Market):
    await market.seller()
    async with market.buyer() as buyer:
        said = trio.Event()
        with trio.CancelScope() as scope:
            async with trio.open_nursery() as nursery:

                async def stop() -> None:
                    await said.wait()
                    scope.cancel()

                nursery.start_soon(stop)
                await buyer.run(
                    market.request(m.WAIT),
                    observe=lambda event: said.set() if isinstance(event, LogLine) else None,
                )
        assert scope.cancelled_caught
        result = await buyer.run(market.request(m.HELLO))
        assert result.ok
        await market.assert_at_rest(buyer, cost_nanos=result.cost_nanos)


async def test_the_whole_life_of_a_buyer_costs_few_requests(market: Market):
    """Law 1: the coordinator is asked once for a grant and once to settle, however many jobs."""
    await market.seller()
    async with market.buyer() as buyer:
        results = [await buyer.run(market.request(m.HELLO)) for _ in range(5)]
        assert all(result.ok for result in results)
        assert len({result.session for result in results}) == 1
        assert market.requests("POST /v1/grants") == 1
        assert market.requests("POST /v1/settle") == 0
        await market.assert_at_rest(buyer, cost_nanos=sum(r.cost_nanos for r in results))
    assert market.requests("POST /v1/grants") == 1


async def test_capacity_is_free_before_the_files_are_gone(market: Market, monkeypatch):
    """What a disk takes to remove a lease's files holds up no other buyer."""
    removing, close = threading.Event(), LeaseWorkspace.close

    def close_later(workspace: LeaseWorkspace) -> None:
        removing.wait(30)
        close(workspace)

    monkeypatch.setattr(LeaseWorkspace, "close", close_later)
    seller = await market.seller()
    async with market.buyer() as buyer:
        try:
            assert (await buyer.run(market.request(m.HELLO))).ok
            assert seller.node._desk.quotes.holds
            await buyer.pool.close_all()
            with trio.fail_after(20):
                while seller.node._desk.quotes.holds:
                    await trio.sleep(0.01)
        finally:
            removing.set()


async def test_two_orders_at_once_are_two_sessions(market: Market):
    seller = await market.seller()
    async with market.buyer() as buyer:
        results: list[JobResult] = []

        async def one() -> None:
            results.append(await buyer.run(market.request(m.after(m.HELLO, 3))))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(one)
            nursery.start_soon(one)
        assert all(result.ok for result in results)
        assert len({result.session for result in results}) == 2
        assert len(seller.node._sessions.hosts) == 2
        await market.assert_at_rest(buyer, cost_nanos=sum(r.cost_nanos for r in results))
