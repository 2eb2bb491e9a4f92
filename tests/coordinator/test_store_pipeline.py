"""A writer on PostgreSQL waits only for what is asked, and still answers each operation truly."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from functools import partial
from typing import Any

import psycopg
import pytest
import trio

from lumaris_coordinator.store import pipeline, postgres
from lumaris_coordinator.store.pipeline import Session
from lumaris_coordinator.store.port import Connection, Late, all_rows, first
from lumaris_coordinator.store.writer import Writer
from lumaris_protocol.errors import LumarisError
from tests.coordinator.postgres import Server

Operation = Callable[[Connection], Any]


@pytest.fixture
def dsn(postgres_server: Server) -> Iterator[str]:
    with postgres_server.database(empty=True) as found:
        with closing(postgres.connect(found)) as connection:
            connection.execute(
                "CREATE TABLE entry (n BIGINT PRIMARY KEY, text TEXT, body BYTEA, CHECK (n >= 0))"
            )
        yield found


@pytest.fixture
def session(dsn: str) -> Iterator[Session]:
    with closing(postgres.write(dsn, "test")) as found:
        yield found


def add(connection: Connection, n: int) -> None:
    connection.execute("INSERT INTO entry (n) VALUES (?)", (n,))


def entries(connection: Connection) -> list[int]:
    return [int(n) for (n,) in all_rows(connection, "SELECT n FROM entry ORDER BY n")]


def in_batch(session: Session, n: int) -> None:
    session.execute("SAVEPOINT operation")
    add(session, n)
    session.execute("RELEASE operation")


def commit(session: Session) -> None:
    session.execute("COMMIT")


def kept(dsn: str) -> list[int]:
    with closing(postgres.connect(dsn)) as connection:
        return entries(connection)


class Hook:
    """Sees what a batch leaves behind."""

    def __init__(self) -> None:
        self.seen: list[list[int]] = []

    def opened(self, connection: Connection) -> None:
        """The connection is new."""

    def followed(self, connection: Connection) -> None:
        """Others may have written."""

    def before_commit(self, connection: Connection, _now: int) -> None:
        self.seen.append(entries(connection))

    def committed(self) -> None:
        """It is durable."""


async def one_batch(dsn: str, operations: list[Operation]) -> tuple[list[object], Hook, int]:
    """What each of them was told, what the hook saw, and the round trips of the batch."""
    hook, opened = Hook(), list[Session]()

    def connect() -> Connection:
        opened.append(postgres.write(dsn, "test"))
        return opened[0]

    writer = Writer(connect, hooks=(hook,), clock=lambda: 0.0, failed=postgres.failed)
    told: list[object] = [None] * len(operations)
    release, entered = threading.Event(), threading.Event()

    def hold(_connection: Connection) -> None:
        entered.set()
        assert release.wait(10)

    async def ask(index: int, operation: Operation) -> None:
        try:
            told[index] = await writer.submit(operation)
        except (psycopg.Error, LumarisError) as error:
            told[index] = type(error).__name__

    with trio.fail_after(20):
        async with writer.running(), trio.open_nursery() as nursery:
            nursery.start_soon(writer.submit, hold)
            await trio.to_thread.run_sync(entered.wait, 10)
            for index, operation in enumerate(operations):
                nursery.start_soon(ask, index, operation)
                while writer.depth <= index:
                    await trio.lowlevel.checkpoint()
            before = opened[0].round_trips
            release.set()
    assert (writer.stats.failed_batches, len(opened)) == (0, 1)
    return told, hook, opened[0].round_trips - before


async def test_a_batch_of_writes_is_a_few_round_trips(dsn: str) -> None:
    told, hook, trips = await one_batch(dsn, [partial(add, n=n) for n in range(100)])
    assert told == [None] * 100
    assert hook.seen == [[], list(range(100))]
    # The rest of the first batch, and: begin, barrier, hook, commit; then the end of the session.
    assert trips <= 3 + 4 + 2


async def test_a_late_error_is_told_to_its_own_operation(dsn: str) -> None:
    """Nobody waited for the failed statements; what followed each of them has happened once."""

    def numbered(connection: Connection, n: int) -> int:
        add(connection, n)
        return n

    numbers = [0, 1, 1, 2, -1, 3, 3, 4]
    told, hook, _trips = await one_batch(dsn, [partial(numbered, n=n) for n in numbers])
    assert told == [0, 1, "UniqueViolation", 2, "CheckViolation", 3, "UniqueViolation", 4]
    assert hook.seen == [[], [0, 1, 2, 3, 4]]
    assert kept(dsn) == [0, 1, 2, 3, 4]


async def test_many_failures_do_not_repeat_the_batch_each(dsn: str) -> None:
    runs = 0

    def fail(connection: Connection) -> None:
        nonlocal runs
        runs += 1
        add(connection, -1)

    told, _hook, _trips = await one_batch(dsn, [fail] * 50)
    assert told == ["CheckViolation"] * 50
    assert runs <= 2 * 50


async def test_whoever_reads_after_an_earlier_failure_runs_again(dsn: str) -> None:
    """Also one that swallows every exception, and one that was about to refuse."""

    def stubborn(connection: Connection) -> list[int]:
        with suppress(Exception):
            entries(connection)
        return entries(connection)

    def refuse(connection: Connection) -> None:
        add(connection, 9)
        if entries(connection) != [0, 9]:
            raise LumarisError("internal")
        raise LumarisError("no_funds")

    told, hook, _trips = await one_batch(
        dsn, [partial(add, n=0), partial(add, n=0), stubborn, partial(add, n=0), refuse]
    )
    assert told == [None, "UniqueViolation", [0], "UniqueViolation", "LumarisError"]
    assert hook.seen == [[], [0]]


async def test_the_first_error_of_an_operation_counts(dsn: str) -> None:
    """As on a database that answers each statement: the refusal came after the error."""

    def twice(connection: Connection) -> None:
        add(connection, -1)
        raise LumarisError("no_funds")

    def ignoring(connection: Connection) -> str:
        with suppress(psycopg.Error):
            add(connection, -1)
            entries(connection)
        return "done"

    told, _hook, _trips = await one_batch(dsn, [twice, ignoring, partial(add, n=1)])
    assert told == ["CheckViolation", "CheckViolation", None]
    assert kept(dsn) == [1]


def test_an_error_is_late_only_after_its_operation(session: Session) -> None:
    session.execute("BEGIN IMMEDIATE")
    session.execute("SAVEPOINT operation")
    add(session, -1)
    with pytest.raises(psycopg.errors.CheckViolation):
        session.settle()
    session.execute("ROLLBACK TO operation")
    session.execute("RELEASE operation")
    in_batch(session, 1)
    in_batch(session, 1)
    in_batch(session, 2)
    for ask in (entries, entries, commit):  # until somebody deals with it
        with pytest.raises(Late) as caught:
            ask(session)
        assert caught.value.ago == 1
    session.execute("ROLLBACK TO operation")
    session.execute("RELEASE operation")
    assert entries(session) == [1]
    session.execute("ROLLBACK")
    assert entries(session) == []


def test_a_failed_transaction_is_not_committed(session: Session, dsn: str) -> None:
    session.execute("BEGIN IMMEDIATE")
    add(session, 1)
    add(session, -1)
    with pytest.raises(psycopg.errors.CheckViolation):
        session.execute("COMMIT")
    session.execute("ROLLBACK")
    add(session, 2)  # outside a transaction nothing is late
    assert kept(dsn) == [2]
    with pytest.raises(psycopg.errors.UniqueViolation):
        add(session, 2)
    assert entries(session) == [2]


def test_what_is_on_the_way_is_bounded(
    session: Session, dsn: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline, "PIPELINE_BYTES_MAX", 1_000)
    monkeypatch.setattr(pipeline, "PREPARED_MAX", 5)
    sql = "INSERT INTO entry (n, body) VALUES (?, ?)"
    session.execute("BEGIN IMMEDIATE")
    before = session.round_trips
    for n in range(10):
        session.execute(sql, (n, bytes(600)))
    assert session.round_trips - before == 5
    for n in range(10, 20):  # more kinds of statement than are prepared
        session.execute(f"INSERT INTO entry (n, text) VALUES (?, '{n}')", (n,))
    session.execute("COMMIT")
    assert kept(dsn) == list(range(20))


def test_answers_larger_than_every_buffer(session: Session) -> None:
    """Neither side waits for the other to read first."""
    session.execute("BEGIN IMMEDIATE")
    large = [
        session.execute("SELECT repeat('x', 1000000), ?", (bytes(1_000_000),)) for _ in range(3)
    ]
    assert [len(row[0]) for cursor in large for row in cursor] == [1_000_000] * 3
    session.execute("ROLLBACK")


@pytest.mark.parametrize(
    "value", [None, "", "é'?", 0, -(2**63), 2**63 - 1, b"", bytes(range(256)), True, 0.1]
)
def test_values(session: Session, value: object) -> None:
    casts = {str: "TEXT", int: "BIGINT", bytes: "BYTEA", float: "float8", bool: "BIGINT"}
    cast = casts.get(type(value), "TEXT")
    assert first(session, f"SELECT CAST(? AS {cast})", (value,)) == (value,)


@pytest.mark.parametrize(
    ("value", "error"),
    [("a\0b", "NUL"), ("\ud800", "Unicode"), (2**63, "out of range"), (object(), "object")],
)
def test_no_values(session: Session, value: object, error: str) -> None:
    with pytest.raises((psycopg.Error, LumarisError), match=error):
        all_rows(session, "SELECT CAST(? AS BIGINT)", (value,))
    assert entries(session) == []


def test_a_session_that_was_ended_says_so(session: Session, dsn: str) -> None:
    session.execute("BEGIN IMMEDIATE")
    add(session, 1)
    with psycopg.connect(dsn, autocommit=True) as other:
        other.execute("SELECT pg_terminate_backend(%s, 10000)", (session.inner.info.backend_pid,))
    for _ in range(2):
        with pytest.raises(psycopg.OperationalError) as caught:
            entries(session)
        assert postgres.failed(caught.value)
    assert kept(dsn) == []
