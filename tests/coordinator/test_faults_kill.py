"""kill -9 at each point of a commit: what was acknowledged is there, what was not is there whole
or not at all, and repeating every request leads to the same end."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import httpx
import pytest
import trio

from lumaris_coordinator import Settings
from tests.coordinator.builders import NETWORK, Clock, Market, Party
from tests.coordinator.conftest import open_market
from tests.coordinator.faults.invariants import Told, hold, states
from tests.coordinator.faults.victim import POINTS, Point, Victim, victim
from tests.coordinator.postgres import Server
from tests.coordinator.test_upkeep import tamper

pytestmark = [
    pytest.mark.planet,
    pytest.mark.slow,
    # The client library leaves the body's generator open when the connection breaks under it.
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]
STORES = ("sqlite", "postgres")

TOLD, SENT = 2, 4


def at(dying: Victim, client: httpx.AsyncClient, tokens: dict[str, str]) -> Market:
    """The market that the dying program serves."""
    return Market(cast("Any", dying), client, Clock(), tokens)


@pytest.mark.parametrize("point", POINTS)
async def test_kill_9(tmp_path: Path, database: str, point: Point) -> None:
    settings = Settings(state=tmp_path / "state", network=NETWORK, database=database, overlay=False)
    told = Told()
    async with open_market(settings.state, database=database) as market:
        claims = await told.claims(market, TOLD + SENT)
        await told.settle_all(market, claims[:TOLD])
        tokens = market.tokens
    with victim(settings, point, tmp_path / "armed") as dying:
        async with httpx.AsyncClient(base_url=dying.url, timeout=30) as client:
            market = at(dying, client, tokens)
            dying.arm()
            if point == "before publication":
                await settle_unheard(market, told, claims[TOLD:])
                dying.kill()
            else:
                await told.settle_all(market, claims[TOLD:])
        assert dying.died()

    answered = len(told.receipts) - TOLD
    kept = states(settings, claims[TOLD:], told).count("settled")
    assert answered == (SENT if point == "before publication" else 0)
    if point == "after COMMIT":
        assert kept > 0
    else:
        assert kept == answered
    hold(settings, told, coordinator=dying.peer_id)

    async with open_market(settings.state, database=database) as market:
        await told.again(market, claims)
        market.tokens = tokens
        events = await market.client.get("/v1/events/page", headers=market.bearer(Party("seller")))
        kinds = [event["type"] for event in events.json()["events"]]
        assert kinds.count("escrow.settled") == len(claims)
    hold(settings, told, coordinator=dying.peer_id)


async def settle_unheard(market: Market, told: Told, claims: list[bytes]) -> None:
    """Settle while somebody listens, who hears nothing of it."""
    headers = market.bearer(Party("seller"))
    async with market.client.stream("GET", "/v1/events", headers=headers) as stream:
        chunks = stream.aiter_bytes()
        assert await anext(chunks) == b": alive\n\n"
        await told.settle_all(market, claims)
        with trio.move_on_after(0.05):
            pytest.fail(f"published: {await anext(chunks)!r}")


@pytest.fixture
def shared(postgres_server: Server) -> Iterator[str]:
    """A database that several programs use."""
    with postgres_server.database() as dsn:
        yield dsn


async def test_a_replica_killed_in_mid_batch_holds_up_no_other(tmp_path: Path, shared: str) -> None:
    """It dies with the lock of the batch in its hands; whoever asked it asks another one."""
    settings = Settings(state=tmp_path / "state", network=NETWORK, database=shared, overlay=False)
    told = Told()
    async with open_market(settings.state, database=shared) as market:
        claims = await told.claims(market, TOLD + SENT)
        with victim(settings, "before COMMIT", tmp_path / "armed") as dying:
            async with httpx.AsyncClient(base_url=dying.url, timeout=30) as client:
                dying.arm()
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(
                        told.settle_all, at(dying, client, market.tokens), claims[TOLD:]
                    )
                    nursery.start_soon(told.settle_all, market, claims[:TOLD])
                assert dying.died()
        assert set(told.receipts) == set(claims[:TOLD])
        await told.again(market, claims)
    hold(settings, told, coordinator=dying.peer_id)


async def test_a_database_that_restarts_among_settlements_loses_none(
    tmp_path: Path, postgres_server: Server, shared: str
) -> None:
    told = Told()
    async with open_market(tmp_path / "state", database=shared) as market:
        claims = await told.claims(market, 30)
        settings, restarted = market.coordinator.settings, trio.Event()

        async def restart() -> None:
            await trio.to_thread.run_sync(postgres_server.restart)
            restarted.set()

        async def settle(mine: list[bytes]) -> None:
            """One after the other, and once more from the start, until it has restarted."""
            while not restarted.is_set() or not told.receipts.keys() >= set(mine):
                for claim in mine:
                    await told.settle(market, claim)

        async with trio.open_nursery() as nursery:
            for number in range(3):
                nursery.start_soon(settle, claims[number::3])
            await settled(told, 5)
            nursery.start_soon(restart)
        assert {answer.json()["code"] for answer in told.refused} <= {"busy"}
        await told.again(market, claims)
        hold(settings, told, coordinator=market.peer)


async def settled(told: Told, number: int) -> None:
    with trio.fail_after(20):
        while len(told.receipts) < number:
            await trio.sleep(0.001)


# What nobody may do to the books, and by which words the check of these tests tells of it.
LIES = {
    "UPDATE account SET balance = balance + 1 WHERE kind = 'fees'": "add up to",
    "UPDATE escrow SET state = 'claimed'": "did not give",
    "UPDATE escrow SET cap = cap + 1": "did not get its cap",
    "UPDATE escrow SET paid = paid - 1": "is not what the receipt says",
    "UPDATE escrow SET state = 'expired'": "did not move to expired",
    "UPDATE escrow_event SET after = 'expired' WHERE n = 1": "moved from held to expired",
    "DELETE FROM event WHERE kind = 'escrow.settled'": "not one event for each move",
    "DELETE FROM txn WHERE id = 2": "gaps",
    "UPDATE leaf SET commitment = randomblob(32) WHERE leaf = 1": "of another document",
    "UPDATE checkpoint SET note = (SELECT note FROM checkpoint WHERE size = 3)": "another tree",
    "DELETE FROM checkpoint WHERE size = 3": "leaves without a head",
    "UPDATE escrow SET budget_grant = by_buyer": "a grant that was acknowledged",
}


async def test_the_check_of_these_tests_sees_what_is_wrong(tmp_path: Path) -> None:
    told = Told()
    async with open_market(tmp_path / "state") as market:
        claims = await told.claims(market, 3)
        for claim in claims:
            await told.settle(market, claim)
    settings, peer = market.coordinator.settings, market.peer
    hold(settings, told, coordinator=peer)
    file = settings.state / "coordinator.db"
    good = file.read_bytes()
    for lie, words in LIES.items():
        tamper(settings, lie)
        with pytest.raises(AssertionError, match=words):
            hold(settings, told, coordinator=peer)
        file.write_bytes(good)
    missing = Told(receipts={b"": b"never kept"})
    with pytest.raises(AssertionError, match="a receipt that was acknowledged"):
        hold(settings, missing, coordinator=peer)
