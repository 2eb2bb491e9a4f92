"""The group-commit writer: batches, savepoints, refusal when full, and failing disks."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import trio

from lumaris_coordinator import bounds
from lumaris_coordinator.store import sqlite
from lumaris_coordinator.store import writer as writers
from lumaris_coordinator.store.file import SqliteFile
from lumaris_coordinator.store.port import Connection, all_rows
from lumaris_coordinator.store.writer import Writer
from lumaris_protocol import receipts
from lumaris_protocol.errors import LumarisError
from tests.coordinator.builders import Market


class Faulty:
    """A connection on which one kind of statement fails as long as `broken` is set."""

    def __init__(self, inner: Connection, broken: threading.Event, start: str = "COMMIT") -> None:
        self._inner, self._broken, self._start = inner, broken, start

    def execute(self, sql: str, values: Any = ()) -> Any:
        if sql.startswith(self._start) and self._broken.is_set():
            raise disk_error()
        return self._inner.execute(sql, values)

    def close(self) -> None:
        self._inner.close()


def disk_error() -> Exception:
    """As SQLite reports that the disk could not be read or written."""
    error = sqlite.driver.OperationalError("disk I/O error")
    error.sqlite_errorcode = 10  # SQLITE_IOERR
    return error


def writer_on(
    path: Path, broken: threading.Event | None = None, start: str = "COMMIT", **options: Any
) -> Writer:
    def connect() -> Connection:
        connection = sqlite.connect(path)
        connection.execute("CREATE TABLE IF NOT EXISTS entry (n INTEGER PRIMARY KEY) STRICT")
        return Faulty(connection, broken, start) if broken else connection

    failed = SqliteFile(path.parent).failed
    return Writer(connect, clock=lambda: 0.0, failed=failed, **options)


async def test_a_commit_that_fails_in_a_settlement_leaves_no_trace(market: Market) -> None:
    buyer, seller = await market.party("buyer", 1_000_000), await market.party("seller")
    deal = market.deal(buyer, seller, cap=1_000)
    claim = deal.claim(seller, await market.grant(deal), 600)
    writer, broken = market.coordinator.store.writer, threading.Event()
    assert writer._connection is not None
    writer._connection = cast("Connection", Faulty(writer._connection, broken))
    broken.set()
    answer = await market.settle(claim)
    assert (answer.status_code, answer.json()["code"]) == (503, "busy")
    assert "not known whether" in answer.json()["detail"]
    assert answer.json()["hint"].startswith("Repeat the same request")
    head = await market.coordinator.store.read(market.coordinator.log.head)
    assert head.size == 0
    assert await market.free(seller) == 0
    answer = await market.settle(claim)  # over a new connection, which does commit
    assert answer.status_code == 200
    trusted = frozenset({market.peer})
    assert receipts.verify_bundle(answer.content, trusted=trusted).verdict == "valid"
    assert await market.free(seller) == 570
    assert (await market.audit())["balanced"]


def adding(n: int) -> Callable[[Connection], int]:
    def operation(connection: Connection) -> int:
        connection.execute("INSERT INTO entry (n) VALUES (?)", (n,))
        return n

    return operation


def entries(path: Path) -> list[int]:
    connection = sqlite.connect(path, read_only=True)
    try:
        return [row[0] for row in connection.execute("SELECT n FROM entry ORDER BY n")]
    finally:
        connection.close()


async def blocked(writer: Writer, release: threading.Event, nursery: trio.Nursery) -> None:
    """Hold the writer inside an operation until `release`, so that what follows queues up."""
    entered = threading.Event()

    def operation(_connection: Connection) -> None:
        entered.set()
        assert release.wait(10)

    nursery.start_soon(writer.submit, operation)
    assert await trio.to_thread.run_sync(entered.wait, 10)


async def wait_until(condition: Callable[[], bool]) -> None:
    with trio.fail_after(10):
        while not condition():
            await trio.sleep(0.001)


async def test_what_waits_is_one_batch_and_one_failure_is_its_own(tmp_path: Path) -> None:
    writer = writer_on(tmp_path / "db")
    results: dict[int, Any] = {}

    async def add(n: int) -> None:
        try:
            results[n] = await writer.submit(adding(n % 9))
        except sqlite.driver.IntegrityError as error:
            results[n] = error

    async with writer.running():
        release = threading.Event()
        async with trio.open_nursery() as nursery:
            await blocked(writer, release, nursery)
            for n in range(10):
                nursery.start_soon(add, n)
            await wait_until(lambda: writer.depth == 10)
            release.set()
        assert writer.stats.commits == 2
        assert writer.stats.batch_largest == 10
    assert entries(tmp_path / "db") == list(range(9))
    assert sum(isinstance(value, Exception) for value in results.values()) == 1


async def test_batches_are_bounded(tmp_path: Path) -> None:
    writer = writer_on(tmp_path / "db", batch_max=4)
    async with writer.running():
        release = threading.Event()
        async with trio.open_nursery() as nursery:
            await blocked(writer, release, nursery)
            for n in range(10):
                nursery.start_soon(writer.submit, adding(n))
            await wait_until(lambda: writer.depth == 10)
            release.set()
        assert (writer.stats.commits, writer.stats.batch_largest) == (4, 4)


async def test_a_full_queue_refuses_at_once(tmp_path: Path) -> None:
    writer = writer_on(tmp_path / "db", queue_max=2)
    async with writer.running():
        release = threading.Event()
        async with trio.open_nursery() as nursery:
            await blocked(writer, release, nursery)
            nursery.start_soon(writer.submit, adding(1))
            nursery.start_soon(writer.submit, adding(2))
            await wait_until(lambda: writer.depth == 2)
            with pytest.raises(LumarisError, match="busy"):
                await writer.submit(adding(3))
            release.set()
    assert entries(tmp_path / "db") == [1, 2]


async def test_a_failed_commit_acknowledges_nobody_and_the_writer_recovers(tmp_path: Path) -> None:
    broken = threading.Event()
    writer = writer_on(tmp_path / "db", broken)
    async with writer.running():
        await writer.submit(adding(1))
        broken.set()
        for n in (2, 3):
            with pytest.raises(LumarisError, match="could not be confirmed"):
                await writer.submit(adding(n))
        assert not writer.alive
        broken.clear()
        assert await writer.submit(adding(4)) == 4
        assert writer.alive
    assert entries(tmp_path / "db") == [1, 4]
    assert writer.stats.failed_batches == 2


async def test_a_disk_error_in_an_operation_fails_its_whole_batch(tmp_path: Path) -> None:
    """SQLite may have rolled everything back by then, so nothing of the batch may be believed."""
    broken = threading.Event()
    writer = writer_on(tmp_path / "db", broken, "INSERT")
    outcomes: list[str] = []

    async def run(operation: Callable[[Connection], Any]) -> None:
        try:
            await writer.submit(operation)
        except LumarisError as error:
            outcomes.append(error.code)

    async with writer.running():
        release = threading.Event()
        async with trio.open_nursery() as nursery:
            await blocked(writer, release, nursery)
            nursery.start_soon(run, lambda _connection: None)
            nursery.start_soon(run, adding(1))
            await wait_until(lambda: writer.depth == 2)
            broken.set()
            release.set()
        assert outcomes == ["busy", "busy"]
        broken.clear()
        await writer.submit(adding(2))
    assert entries(tmp_path / "db") == [2]


async def test_a_batch_that_cannot_begin_is_tried_again(tmp_path: Path) -> None:
    """As when a database server restarts: the caller waits, and is served."""
    broken = threading.Event()
    writer = writer_on(tmp_path / "db", broken, "BEGIN")
    async with writer.running():
        broken.set()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(writer.submit, adding(1))
            await wait_until(lambda: writer.stats.failed_batches >= 2)
            assert not writer.alive
            broken.clear()
        assert writer.alive
    assert entries(tmp_path / "db") == [1]


async def test_it_recovers_by_itself(tmp_path: Path) -> None:
    broken = threading.Event()
    writer = writer_on(tmp_path / "db", broken, probe=adding(100))
    async with writer.running():
        broken.set()
        with pytest.raises(LumarisError, match="could not be confirmed"):
            await writer.submit(adding(1))
        assert not writer.alive
        broken.clear()
        await wait_until(lambda: writer.alive)
    assert entries(tmp_path / "db") == [100]


@pytest.mark.slow
async def test_a_full_disk_loses_nothing_acknowledged_and_space_heals_it(tmp_path: Path) -> None:
    pages: list[int] = []

    def connect() -> Connection:
        connection = sqlite.connect(tmp_path / "db")
        connection.execute("CREATE TABLE IF NOT EXISTS entry (n INTEGER PRIMARY KEY, body BLOB)")
        if pages:
            connection.execute(f"PRAGMA max_page_count = {pages[0]}")
        return connection

    def add_much(n: int) -> Callable[[Connection], None]:
        def operation(connection: Connection) -> None:
            sql = "INSERT INTO entry (n, body) VALUES (?, zeroblob(40000))"
            connection.execute(sql, (n,))

        return operation

    failed = SqliteFile(tmp_path).failed
    writer = Writer(connect, clock=lambda: 0.0, failed=failed, probe=add_much(10_000))
    pages.append(40)
    kept = []
    async with writer.running():
        for n in range(8):
            try:
                await writer.submit(add_much(n))
            except LumarisError as error:
                assert error.code == "busy"  # noqa: PT017 - one of two outcomes
            else:
                kept.append(n)
        assert 0 < len(kept) < 8
        assert not writer.alive
        assert entries(tmp_path / "db") == kept
        pages.clear()
        await wait_until(lambda: writer.alive)
        await writer.submit(add_much(8))
    assert entries(tmp_path / "db") == [*kept, 8, 10_000]


async def test_a_queue_that_stands_still_refuses_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writers, "WRITER_STALLED_S", -1.0)
    few = bounds.WRITER_STALLED_QUEUE_MAX
    writer = writer_on(tmp_path / "db")
    async with writer.running():
        release = threading.Event()
        async with trio.open_nursery() as nursery:
            await blocked(writer, release, nursery)
            for n in range(few):
                nursery.start_soon(writer.submit, adding(n))
            await wait_until(lambda: writer.depth == few)
            with pytest.raises(LumarisError, match="busy"):
                await writer.submit(adding(few))
            release.set()
    assert entries(tmp_path / "db") == list(range(few))


async def test_readiness_tells_of_writes_and_space(
    market: Market, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer = (await market.client.get("/readyz")).json()
    assert answer["ready"]
    assert market.coordinator.settings.database or answer["free_bytes"] > 0
    assert answer["last_commit_s"] >= 0
    monkeypatch.setattr(market.coordinator.store.backend, "free_bytes", lambda: 1_000)
    refused = await market.client.get("/readyz")
    assert (refused.status_code, refused.json()["code"]) == (503, "busy")
    assert "1000 bytes" in refused.json()["detail"]
    monkeypatch.undo()
    writer, broken = market.coordinator.store.writer, threading.Event()
    assert writer._connection is not None
    writer._connection = cast("Connection", Faulty(writer._connection, broken))
    broken.set()
    connect = writer._connect
    monkeypatch.setattr(writer, "_connect", lambda: Faulty(connect(), broken))
    with pytest.raises(LumarisError):
        await market.coordinator._beat()
    refused = await market.client.get("/readyz")
    assert (refused.status_code, refused.json()["detail"]) == (
        503,
        "The store does not take writes.",
    )
    broken.clear()
    with trio.fail_after(10):
        while (await market.client.get("/readyz")).status_code != 200:
            await trio.sleep(0.01)


@pytest.mark.parametrize(("seconds", "away"), [(60, []), (600, [(600,)])])
async def test_an_outage_of_the_store_is_downtime(
    market: Market, monkeypatch: pytest.MonkeyPatch, seconds: int, away: list[tuple[int]]
) -> None:
    """Nobody could settle while nothing could be written. A moment is none."""
    coordinator, writer = market.coordinator, market.coordinator.store.writer
    await coordinator._beat()
    broken, connect = threading.Event(), writer._connect
    broken.set()
    monkeypatch.setattr(writer, "_connect", lambda: Faulty(connect(), broken))
    assert writer._connection is not None
    writer._connection = Faulty(writer._connection, broken)
    market.clock.now += seconds
    with pytest.raises(LumarisError, match="busy"):
        await coordinator._beat()
    broken.clear()
    for _ in range(2):
        await coordinator._beat()
    sql = "SELECT until - since FROM downtime"
    assert await coordinator.store.read(lambda connection: all_rows(connection, sql)) == away


async def test_an_operation_that_ends_the_transaction_fails_its_batch(tmp_path: Path) -> None:
    def rogue(connection: Connection) -> None:
        connection.execute("ROLLBACK")
        raise RuntimeError

    writer = writer_on(tmp_path / "db")
    async with writer.running():
        with pytest.raises(LumarisError, match="busy"):
            await writer.submit(rogue)
        await writer.submit(adding(1))
    assert entries(tmp_path / "db") == [1]


async def test_what_was_queued_before_the_end_is_written(tmp_path: Path) -> None:
    writer = writer_on(tmp_path / "db")
    async with trio.open_nursery() as nursery:
        async with writer.running():
            release = threading.Event()
            await blocked(writer, release, nursery)
            nursery.start_soon(writer.submit, adding(1))
            await wait_until(lambda: writer.depth == 1)
            release.set()
        with pytest.raises(LumarisError, match="shutting down"):
            await writer.submit(adding(2))
    assert entries(tmp_path / "db") == [1]


def test_writes_are_durable_and_readers_cannot_write(tmp_path: Path) -> None:
    writer = sqlite.connect(tmp_path / "db")
    assert writer.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    assert writer.execute("PRAGMA synchronous").fetchone() == (2,)
    assert writer.execute("PRAGMA foreign_keys").fetchone() == (1,)
    reader = sqlite.connect(tmp_path / "db", read_only=True)
    with pytest.raises(sqlite.driver.OperationalError, match="readonly"):
        reader.execute("CREATE TABLE t (n)")
    reader.close()
    writer.close()


@pytest.mark.parametrize(
    ("version", "affected"),
    [
        ((3, 6, 23), False),
        ((3, 40, 1), True),
        ((3, 44, 5), True),
        ((3, 44, 6), False),
        ((3, 45, 0), True),
        ((3, 50, 6), True),
        ((3, 50, 7), False),
        ((3, 51, 0), True),
        ((3, 51, 2), True),
        ((3, 51, 3), False),
        ((3, 53, 4), False),
    ],
)
def test_versions_with_the_wal_reset_bug(version: tuple[int, int, int], affected: bool) -> None:
    assert sqlite.wal_reset_bug(version) is affected


def test_one_process_per_directory(tmp_path: Path) -> None:
    lock = tmp_path / "lock"
    with (
        sqlite.exclusive(lock),
        pytest.raises(LumarisError, match="already_running"),
        sqlite.exclusive(lock),
    ):
        pass
    with sqlite.exclusive(lock):
        pass


def test_a_file_that_is_no_database(tmp_path: Path) -> None:
    (tmp_path / "db").write_bytes(b"not a database" * 100)
    with pytest.raises(LumarisError, match="not_writable"):
        sqlite.connect(tmp_path / "db")
    with pytest.raises(LumarisError, match="not_writable"):
        sqlite.connect(tmp_path / "missing" / "db")
