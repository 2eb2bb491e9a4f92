"""The store in a PostgreSQL database, which several replicas may share.

One batch at a time is written over all replicas (an advisory lock), so everything that holds for
the one writer of an SQLite file holds here. Reads run in a few threads, each with a session of its
own; one that died with the server is replaced and the read repeated once.
"""

from __future__ import annotations

import logging
import re
import secrets
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any, Final, TypeVar, cast

import anyio
import anyio.to_thread
import psycopg

from lumaris_coordinator.bounds import DATABASE_READERS_MAX, WRITER_REST_S, WRITER_REST_S_MAX
from lumaris_coordinator.store import postgres
from lumaris_coordinator.store.port import Connection, Migration, Row, all_rows
from lumaris_protocol.errors import LumarisError

log = logging.getLogger(__name__)

T = TypeVar("T")

_TYPES: Final = {"INTEGER": "BIGINT", "BLOB": "BYTEA"}
_APPLIED: Final = "CREATE TABLE IF NOT EXISTS migration (name TEXT PRIMARY KEY)"
_REFUSE: Final = """CREATE OR REPLACE FUNCTION append_only() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    RAISE EXCEPTION '% is append-only', TG_TABLE_NAME
        USING ERRCODE = 'integrity_constraint_violation';
END $$"""


class PostgresServer:
    """The backend that replicas share."""

    shared = True

    def __init__(self, dsn: str) -> None:
        self._dsn = postgres.checked(dsn)
        # Tells our own notices from those of the others.
        self._name = secrets.token_hex(8)
        self._idle: deque[postgres.Connection] = deque()
        self._open = False
        self._guard = threading.Lock()
        self._limiter: anyio.CapacityLimiter | None = None

    @property
    def place(self) -> str:
        """Host and database."""
        return postgres.place(self._dsn)

    def exclusive(self) -> AbstractContextManager[None]:
        """There may be many."""
        return nullcontext()

    def migrate(self, migrations: Sequence[Migration]) -> list[str]:
        """Apply what is missing. A replica that starts at the same time waits for this one."""
        try:
            connection = postgres.connect(self._dsn)
        except psycopg.Error as error:
            raise postgres.not_writable(self._dsn, error) from None
        try:
            connection.execute(f"SET lock_timeout = '{int(postgres.MIGRATE_WAIT_S * 1_000)}ms'")
            connection.execute("SET statement_timeout = 0")
            connection.execute(f"SELECT pg_advisory_lock({postgres.SCHEMA_LOCK})")
            return _migrate(connection, migrations)
        except psycopg.Error as error:
            raise postgres.not_writable(self._dsn, error) from None
        finally:
            connection.close()

    def writer(self) -> Connection:
        """The session of the writer's thread; it marks this replica as present."""
        try:
            return postgres.write(self._dsn, self._name)
        except psycopg.Error as error:
            raise postgres.not_writable(self._dsn, error) from None

    @contextmanager
    def snapshot(self) -> Iterator[Connection]:
        """A session of its own inside a repeatable read."""
        try:
            connection = postgres.connect(self._dsn, read_only=True)
        except psycopg.Error as error:
            raise postgres.not_writable(self._dsn, error) from None
        try:
            connection.execute("SET statement_timeout = 0")
            connection.execute("BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY")
            yield connection
        finally:
            connection.close()

    def rows(self, connection: Connection, sql: str) -> Iterator[Row]:
        """Through a cursor on the server, some rows at a time."""
        inner = cast("postgres.Connection", connection).inner
        with psycopg.RawServerCursor(inner, "rows") as cursor:
            cursor.execute(cast("Any", postgres.translate(sql)))
            yield from cursor

    def columns(self, connection: Connection, table: str) -> list[str]:
        """The columns of a table."""
        found = all_rows(
            connection,
            "SELECT column_name FROM information_schema.columns"
            " WHERE table_schema = current_schema() AND table_name = ? ORDER BY ordinal_position",
            (table,),
        )
        return [str(row[0]) for row in found]

    def replicas(self, connection: Connection) -> int:
        """Other writing sessions."""
        return postgres.others(connection)

    def failed(self, error: Exception) -> bool:
        """As `postgres.failed`."""
        return postgres.failed(error)

    def free_bytes(self) -> int | None:
        """The server's disk is not seen from here."""
        return None

    def open(self) -> None:
        """Reads are served from now on."""
        self._open = True
        self._limiter = anyio.CapacityLimiter(DATABASE_READERS_MAX)

    def close(self) -> None:
        """Close the readers; one that is still busy is closed when it is done."""
        with self._guard:
            self._open = False
            idle, self._idle = self._idle, deque()
        for connection in idle:
            connection.close()

    async def read(self, look: Callable[[Connection], T]) -> T:
        """In a thread. Raises LumarisError `busy` while the server is away."""
        assert self._open, "the store is not running"
        return await anyio.to_thread.run_sync(self._read, look, limiter=self._limiter)

    def _read(self, look: Callable[[Connection], T]) -> T:
        """Sessions that are idle may have died with the server; a new one has not."""
        with self._guard:
            known = self._idle.pop() if self._idle else None
        if known is not None:
            try:
                return self._look(known, look)
            except (psycopg.OperationalError, psycopg.InterfaceError):
                log.debug("a reader's session has ended; the read is repeated", exc_info=True)
        try:
            return self._look(postgres.connect(self._dsn, read_only=True), look)
        except (psycopg.OperationalError, psycopg.InterfaceError) as error:
            log.warning("a read failed: %s", postgres.not_writable(self._dsn, error).message)
            raise LumarisError("busy", "The database does not answer.") from None

    def _look(self, connection: postgres.Connection, look: Callable[[Connection], T]) -> T:
        try:
            return look(connection)
        finally:
            with self._guard:
                keep = self._open and not connection.inner.closed
                if keep:
                    self._idle.append(connection)
            if not keep:
                connection.close()

    async def scan(self, look: Callable[[Connection], T]) -> T:
        """In a thread, in a session that lives as long as the scan."""
        return await anyio.to_thread.run_sync(self._scan, look, limiter=self._limiter)

    def _scan(self, look: Callable[[Connection], T]) -> T:
        with self.snapshot() as connection:
            return look(connection)

    async def listen(self, told: Callable[[], None]) -> None:
        """Follow the notices of the others, through every restart of the server."""
        rest = WRITER_REST_S
        while True:
            try:
                async with _listening(self._dsn) as connection:
                    rest = WRITER_REST_S
                    told()  # whatever was committed while nobody listened
                    while True:
                        await anyio.wait_readable(connection.fileno())
                        if any(name != self._name for name in _heard(connection)):
                            told()
            except psycopg.Error:
                log.debug("the notices are lost; listening again in %.2f s", rest, exc_info=True)
            await anyio.sleep(rest)
            rest = min(2 * rest, WRITER_REST_S_MAX)


class _listening:  # noqa: N801 - used as a function
    """A session that hears the notices."""

    def __init__(self, dsn: str) -> None:
        self._dsn = dsn
        self._connection: postgres.Connection | None = None

    async def __aenter__(self) -> psycopg.Connection[Any]:
        connect = partial(postgres.connect, self._dsn, read_only=True)
        self._connection = await anyio.to_thread.run_sync(connect)
        try:
            self._connection.execute(f"LISTEN {postgres.CHANNEL}")
        except BaseException:
            self._connection.close()
            raise
        return self._connection.inner

    async def __aexit__(self, *_: object) -> None:
        if self._connection is not None:
            self._connection.close()


def _heard(connection: psycopg.Connection[Any]) -> list[str]:
    """The names in the notices that have arrived. Raises psycopg.Error when the session is dead."""
    connection.pgconn.consume_input()
    names = []
    while (notice := connection.pgconn.notifies()) is not None:
        names.append(bytes(notice.extra).decode())
    return names


def _migrate(connection: postgres.Connection, migrations: Sequence[Migration]) -> list[str]:
    connection.execute(_APPLIED)
    done = {str(row[0]) for row in all_rows(connection, "SELECT name FROM migration")}
    if not done.issubset(migration.name for migration in migrations):
        raise LumarisError("config_invalid", "A newer version made the database.")
    applied = [migration for migration in migrations if migration.name not in done]
    for migration in applied:
        connection.execute("BEGIN")
        if migration.append_only:
            connection.execute(_REFUSE)
        for statement in migration.statements:
            connection.execute(ddl(statement))
        for table in migration.append_only:
            connection.execute(
                f"CREATE TRIGGER {table}_append_only BEFORE UPDATE OR DELETE OR TRUNCATE"
                f" ON {table} FOR EACH STATEMENT EXECUTE FUNCTION append_only()"
            )
        connection.execute("INSERT INTO migration (name) VALUES (?)", (migration.name,))
        connection.execute("COMMIT")
    return [migration.name for migration in applied]


def ddl(statement: str) -> str:
    """A statement of the schema in PostgreSQL's types."""
    return re.sub(r"\b(INTEGER|BLOB)\b", lambda found: _TYPES[found[0]], statement)
