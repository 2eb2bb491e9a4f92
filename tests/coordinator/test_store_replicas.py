"""Several replicas on one PostgreSQL: one batch at a time, one log, and a server that restarts."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

import psycopg
import pytest
import trio

from lumaris_coordinator.escrow.chores import beat
from lumaris_coordinator.receipts.tree import Head
from lumaris_coordinator.store.port import Connection, all_rows, first
from lumaris_coordinator.store.store import Store
from lumaris_coordinator.tables import MIGRATIONS
from lumaris_protocol.errors import LumarisError
from tests.coordinator.builders import Clock, Market
from tests.coordinator.conftest import open_market
from tests.coordinator.postgres import Server

KEPT = 400


@pytest.fixture
def dsn(postgres_server: Server) -> Iterator[str]:
    with postgres_server.database() as found:
        yield found


@asynccontextmanager
async def replica(tmp_path: Path, dsn: str) -> AsyncIterator[Store]:
    """A store that follows the others."""
    store = Store(tmp_path, migrations=MIGRATIONS, clock=lambda: 0.0, database=dsn)
    async with store.running(), trio.open_nursery() as nursery:
        nursery.start_soon(store.follow)
        yield store
        nursery.cancel_scope.cancel()


def count_up(connection: Connection, by: int = 1) -> int:
    """A read followed by a write: two at a time would lose one."""
    row = first(connection, "SELECT value FROM setting WHERE name = 'count'")
    value = int(row[0]) + by if row else by
    connection.execute(
        "INSERT INTO setting (name, value) VALUES ('count', ?)"
        " ON CONFLICT (name) DO UPDATE SET value = excluded.value",
        (str(value),),
    )
    return value


async def until(condition: Callable[[], bool]) -> None:
    with trio.fail_after(20):
        while not condition():
            await trio.sleep(0.005)


@pytest.mark.slow
async def test_two_replicas_write_one_batch_at_a_time(tmp_path: Path, dsn: str) -> None:
    seen: list[int] = []

    async def work(store: Store) -> None:
        seen.append(await store.submit(count_up))

    async with (
        replica(tmp_path, dsn) as one,
        replica(tmp_path, dsn) as two,
        trio.open_nursery() as nursery,
    ):
        for _ in range(KEPT // 2):
            nursery.start_soon(work, one)
            nursery.start_soon(work, two)
    assert sorted(seen) == list(range(1, KEPT + 1))


async def test_a_commit_wakes_the_other_replica(tmp_path: Path, dsn: str) -> None:
    async with replica(tmp_path, dsn) as one, replica(tmp_path, dsn) as two:
        before = await two.bus.woken(0)  # it listens
        with trio.fail_after(20):
            await one.submit(count_up)
            await two.bus.woken(before)
        row = await two.read(partial(first, sql="SELECT value FROM setting"))
        assert row == ("1",)


@pytest.mark.slow
async def test_a_replica_that_lost_its_line_hears_of_commits_again(
    tmp_path: Path, dsn: str
) -> None:
    async with replica(tmp_path, dsn) as one, replica(tmp_path, dsn) as two:
        heard = await two.bus.woken(0)  # it listens
        with trio.fail_after(20):
            with psycopg.connect(dsn, autocommit=True) as other:
                other.execute(
                    "SELECT pg_terminate_backend(pid, 10000) FROM pg_stat_activity"
                    " WHERE datname = current_database() AND pid <> pg_backend_pid()"
                )
            heard = await two.bus.woken(heard)  # it listens again: something may have been missed
            await one.submit(count_up)
            await two.bus.woken(heard)


async def test_a_replica_knows_of_the_others(tmp_path: Path, dsn: str) -> None:
    async with replica(tmp_path, dsn) as one:
        assert await one.submit(one.others) == 0
        async with replica(tmp_path, dsn) as two:
            assert (await one.submit(one.others), await two.submit(two.others)) == (1, 1)
        assert await one.submit(one.others) == 0


async def head_of(market: Market) -> Head:
    return await market.coordinator.store.read(market.coordinator.log.head)


async def settle_one(market: Market, name: str) -> bytes:
    buyer, seller = await market.party(f"{name}-buyer", 1_000_000), await market.party("seller")
    deal = market.deal(buyer, seller, cap=1_000)
    answer = await market.settle(deal.claim(seller, await market.grant(deal), 600))
    assert answer.status_code == 200, answer.text
    return answer.content


@pytest.mark.slow
async def test_replicas_share_one_log(tmp_path: Path, dsn: str) -> None:
    """They append in turn; the head of each follows, and downtime is when none was up."""
    clock = Clock()
    state = tmp_path / "state"
    async with open_market(state, clock=clock, database=dsn) as one:
        clock.now += 30  # the first one has not beaten since, but it is up
        async with open_market(state, clock=clock, database=dsn) as two:
            for size, market in enumerate((one, two, two, one), start=1):
                await settle_one(market, str(size))
                heads = [await head_of(market) for market in (one, two)]
                assert [head.size for head in heads] == [size, size]
                assert heads[0].note == heads[1].note
            assert (await two.audit())["balanced"]
            look = partial(all_rows, sql="SELECT since FROM downtime")
            assert await one.coordinator.store.read(look) == []
    clock.now += 7
    async with open_market(state, clock=clock, database=dsn) as three:
        look = partial(all_rows, sql="SELECT until - since FROM downtime")
        assert await three.coordinator.store.read(look) == [(7,)]
        assert (await head_of(three)).size == 4


@pytest.mark.slow
def test_replicas_that_start_at_once_migrate_once(postgres_server: Server) -> None:
    async def migrate(store: Store) -> None:
        done.append(await trio.to_thread.run_sync(store.prepare))

    async def both() -> None:
        async with trio.open_nursery() as nursery:
            for _ in range(3):
                nursery.start_soon(
                    migrate,
                    Store(Path(), migrations=MIGRATIONS, clock=lambda: 0.0, database=dsn),
                )

    done: list[list[str]] = []
    with postgres_server.database(empty=True) as dsn:
        trio.run(both)
    assert sorted(map(len, done)) == [0, 0, len(MIGRATIONS)]


async def test_a_lost_session_between_batches_is_not_noticed(tmp_path: Path, dsn: str) -> None:
    async with replica(tmp_path, dsn) as store:
        assert await store.submit(count_up) == 1
        assert await store.read(all_counts) == [("1",)]
        with psycopg.connect(dsn, autocommit=True) as other:
            other.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
                " WHERE datname = current_database() AND pid <> pg_backend_pid()"
            )
        assert await store.read(all_counts) == [("1",)]
        assert await store.submit(count_up) == 2


def all_counts(connection: Connection) -> list[tuple[object, ...]]:
    return all_rows(connection, "SELECT value FROM setting WHERE name = 'count'")


@pytest.mark.planet
@pytest.mark.slow
async def test_a_server_that_restarts_in_mid_batch_loses_no_acknowledged_write(
    tmp_path: Path, postgres_server: Server, dsn: str
) -> None:
    """Callers wait, are told that nothing is sure, or are served; nobody is told a lie."""
    acknowledged: set[int] = set()
    tried = 0
    async with replica(tmp_path, dsn) as store:
        stopping = trio.Event()

        async def write(n: int) -> None:
            operation = partial(keep, n=n)
            for _ in range(50):
                try:
                    await store.submit(operation)
                except LumarisError as error:
                    assert error.code == "busy"  # noqa: PT017 - one of two outcomes
                else:
                    acknowledged.add(n)
                    return

        async def restart() -> None:
            await until(lambda: len(acknowledged) > 20)
            await trio.to_thread.run_sync(postgres_server.restart)
            stopping.set()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(restart)
            while not stopping.is_set():
                async with trio.open_nursery() as some:
                    for _ in range(8):
                        some.start_soon(write, tried)
                        tried += 1
        assert await store.submit(count_up) >= 1
        assert store.health().writes
        rows = await store.read(partial(all_rows, sql="SELECT name FROM setting"))
    kept = {int(name[2:]) for (name,) in rows if name.startswith("n/")}
    assert acknowledged <= kept
    assert len(acknowledged) == tried


def keep(connection: Connection, n: int) -> None:
    connection.execute(
        "INSERT INTO setting (name, value) VALUES (?, '') ON CONFLICT (name) DO NOTHING",
        (f"n/{n}",),
    )


def test_the_heartbeat_never_goes_back(dsn: str) -> None:
    store = Store(Path(), migrations=MIGRATIONS, clock=lambda: 0.0, database=dsn)
    connection = store.connect_writer()
    for now in (100, 90):
        beat(connection, now=now)
    sql = "SELECT value FROM setting WHERE name = 'heartbeat'"
    assert first(connection, sql) == ("100",)
    connection.close()
