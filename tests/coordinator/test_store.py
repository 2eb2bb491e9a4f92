"""The store's port means the same on SQLite and on PostgreSQL."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from functools import partial
from pathlib import Path

import pytest

from lumaris_coordinator.store.port import Connection, Migration, all_rows, first
from lumaris_coordinator.store.store import Store, backend_of
from lumaris_protocol.errors import LumarisError
from tests.coordinator.postgres import INTEGRITY, Server

STORES = ("sqlite", "postgres")
MIGRATIONS = (
    Migration("first", ("CREATE TABLE setting (name TEXT PRIMARY KEY, value TEXT NOT NULL)",)),
    Migration(
        "second",
        (
            """CREATE TABLE thing (
                id INTEGER PRIMARY KEY,
                name TEXT NOT NULL UNIQUE,
                amount INTEGER NOT NULL CHECK (amount >= 0),
                body BLOB
            )""",
            "CREATE TABLE line (id INTEGER PRIMARY KEY, text TEXT NOT NULL)",
        ),
        append_only=("line",),
    ),
)


@pytest.fixture
def database(request: pytest.FixtureRequest) -> Iterator[str]:
    """Without the coordinator's schema: this module has its own."""
    if request.param == "sqlite":
        yield ""
        return
    server: Server = request.getfixturevalue("postgres_server")
    with server.database(empty=True) as dsn:
        yield dsn


@pytest.fixture
def store(tmp_path: Path, database: str) -> Store:
    found = Store(tmp_path, migrations=MIGRATIONS, clock=lambda: 0.0, database=database)
    assert set(found.prepare()) >= {"second"}
    assert found.prepare() == []
    return found


@pytest.fixture
def connection(store: Store) -> Iterator[Connection]:
    with closing(store.connect_writer()) as found:
        yield found


def add(connection: Connection, name: str, amount: int, body: bytes | None = None) -> int:
    row = first(
        connection,
        "INSERT INTO thing (id, name, amount, body)"
        " VALUES ((SELECT coalesce(max(id), 0) + 1 FROM thing), ?, ?, ?) RETURNING id",
        (name, amount, body),
    )
    assert row is not None
    return int(row[0])


def test_values_come_back_as_they_went_in(connection: Connection) -> None:
    big, body = 2**62, bytes(range(256))
    assert [add(connection, "é ? 'x' %s $1", big, body), add(connection, "b", 0)] == [1, 2]
    rows = all_rows(connection, "SELECT name, amount, body, amount = 0 FROM thing ORDER BY id")
    assert rows == [("é ? 'x' %s $1", big, body, 0), ("b", 0, None, 1)]
    assert all(type(value) is int for value in (rows[0][1], rows[0][3]))
    (total,) = first(connection, "SELECT sum(amount) FROM thing") or ()
    assert (total, type(total)) == (big, int)


def test_parameters_by_number_and_in_quotes(connection: Connection) -> None:
    add(connection, "a", 5)
    sql = "UPDATE thing SET amount = amount - ?1 WHERE name = ?2 AND amount >= ?1"
    assert connection.execute(sql, (3, "a")).rowcount == 1
    assert connection.execute(sql, (3, "a")).rowcount == 0
    found = first(connection, "SELECT '?', '''?1', ?, ?1, ?", ("x", "y"))
    assert found == ("?", "'?1", "x", "x", "y")
    assert first(connection, "SELECT count(*) FROM thing WHERE amount = ?", (True + 1,)) == (1,)


def test_a_savepoint_undoes_one_operation(connection: Connection) -> None:
    connection.execute("BEGIN IMMEDIATE")
    add(connection, "a", 1)
    connection.execute("SAVEPOINT operation")
    with pytest.raises(INTEGRITY):
        add(connection, "a", 1)
    connection.execute("ROLLBACK TO operation")
    connection.execute("RELEASE operation")
    add(connection, "b", 1)
    connection.execute("COMMIT")
    assert all_rows(connection, "SELECT id, name FROM thing ORDER BY id") == [(1, "a"), (2, "b")]


@pytest.mark.parametrize("sql", ["UPDATE line SET text = 'b'", "DELETE FROM line"])
def test_what_is_append_only_stays(connection: Connection, sql: str) -> None:
    connection.execute("INSERT INTO line (id, text) VALUES (1, 'a')")
    with pytest.raises(INTEGRITY, match="append-only"):
        connection.execute(sql)
    assert all_rows(connection, "SELECT text FROM line") == [("a",)]


async def test_reads_see_commits_and_cannot_write(store: Store) -> None:
    names = "SELECT name FROM thing ORDER BY id"
    async with store.running():
        await store.submit(partial(add, name="a", amount=1))
        assert await store.read(partial(all_rows, sql=names)) == [("a",)]
        assert await store.scan(partial(all_rows, sql=names)) == [("a",)]
        for look in (store.read, store.scan):
            with pytest.raises(Exception, match=r"read-?only"):
                await look(partial(add, name="b", amount=1))
        assert store.health().writes
        assert store.health().last_commit_s < 60
    with pytest.raises(LumarisError, match="shutting down"):
        await store.submit(partial(add, name="c", amount=1))


def test_a_snapshot_stands_still(store: Store, connection: Connection) -> None:
    add(connection, "a", 1)
    with store.backend.snapshot() as frozen:
        assert store.backend.columns(frozen, "thing") == ["id", "name", "amount", "body"]
        assert store.backend.columns(frozen, "nothing") == []
        first(frozen, "SELECT count(*) FROM thing")
        add(connection, "b", 1)
        assert list(store.backend.rows(frozen, "SELECT id FROM thing")) == [(1,)]


async def test_the_bus_wakes_after_a_commit(store: Store) -> None:
    async with store.running():
        before = store.bus.count
        await store.submit(partial(add, name="a", amount=1))
        assert await store.bus.woken(before) > before


def test_a_newer_database_is_left_alone(store: Store) -> None:
    with pytest.raises(LumarisError, match="newer version"):
        store.backend.migrate(MIGRATIONS[:1])


@pytest.mark.parametrize("address", ["mysql://x:secret@y/z", "postgresql://[:secret", "secret"])
def test_a_bad_address_is_not_repeated(tmp_path: Path, address: str) -> None:
    with pytest.raises(LumarisError, match="config_invalid") as caught:
        backend_of(tmp_path, address)
    assert "secret" not in str(caught.value)


def test_a_database_that_cannot_be_reached(tmp_path: Path) -> None:
    dsn = f"postgresql://ann:secret@/lumaris?host={tmp_path}"
    with pytest.raises(LumarisError, match="not_writable") as caught:
        backend_of(tmp_path, dsn).migrate(MIGRATIONS)
    assert "secret" not in str(caught.value)
