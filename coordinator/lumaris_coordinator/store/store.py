"""The store as the coordinator sees it: `submit` to write, `read` and `scan` to look."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from lumaris_coordinator.bounds import DISK_FREE_BYTES_MIN
from lumaris_coordinator.store.backend import Backend
from lumaris_coordinator.store.bus import Bus
from lumaris_coordinator.store.file import SqliteFile
from lumaris_coordinator.store.port import Connection, Migration
from lumaris_coordinator.store.writer import BatchHook, Operation, Writer
from lumaris_protocol.errors import LumarisError

T = TypeVar("T")


@dataclass(frozen=True)
class Health:
    """How the store does. `free_bytes` is None where the disk is not seen from here."""

    writes: bool
    queue_depth: int
    last_commit_s: float
    free_bytes: int | None

    @property
    def ready(self) -> bool:
        """Whether requests should be sent here."""
        return self.writes and (self.free_bytes is None or self.free_bytes >= DISK_FREE_BYTES_MIN)


def backend_of(state: Path, database: str) -> Backend:
    """Where the data is: "" for a file in the state directory, or the address of a PostgreSQL.

    Raises LumarisError: `config_invalid` for another address, `missing_extra` without its driver.
    """
    if not database:
        return SqliteFile(state)
    try:
        from lumaris_coordinator.store.server import PostgresServer
    except ImportError:
        raise LumarisError(
            "missing_extra",
            "PostgreSQL needs the extra `postgres`.",
            hint="Install it: pip install 'lumaris[postgres]'.",
        ) from None
    return PostgresServer(database)


class Store:
    """One database, one writer, and readers that do not wait for it."""

    def __init__(
        self,
        state: Path,
        *,
        migrations: Sequence[Migration],
        hooks: Sequence[BatchHook] = (),
        clock: Callable[[], float],
        database: str = "",
    ) -> None:
        self.backend = backend_of(state, database)
        self.writer = Writer(
            self.connect_writer,
            hooks=hooks,
            clock=clock,
            failed=self.backend.failed,
            follows=self.backend.shared,
            local=not self.backend.shared,
            probe=_probe,
        )
        self._migrations = tuple(migrations)

    @property
    def bus(self) -> Bus:
        """Wakes whoever follows a table, after every commit of any replica."""
        return self.writer.bus

    def connect_writer(self) -> Connection:
        """A connection that may write."""
        return self.backend.writer()

    def prepare(self) -> list[str]:
        """Bring the schema up to date; the migrations that were missing.

        Raises LumarisError `not_writable`.
        """
        return self.backend.migrate(self._migrations)

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Lock, migrate, open. Raises LumarisError `already_running` or `not_writable`."""
        with self.backend.exclusive():
            self.prepare()
            self.backend.open()
            try:
                async with self.writer.running():
                    yield
            finally:
                self.backend.close()

    async def follow(self) -> None:
        """Hear of what other replicas commit, until cancelled. Returns at once where there are
        none."""
        await self.backend.listen(self.writer.follow)

    async def read(self, look: Callable[[Connection], T]) -> T:
        """What `look` finds in committed data: point reads. It may run in another thread and, after
        a restart of the database, twice."""
        return await self.backend.read(look)

    async def scan(self, look: Callable[[Connection], T]) -> T:
        """What `look` finds in one snapshot, in a thread of its own: for what may take long."""
        return await self.backend.scan(look)

    async def submit(self, operation: Operation[T]) -> T:
        """As `Writer.submit`."""
        return await self.writer.submit(operation)

    def others(self, connection: Connection) -> int:
        """How many other replicas are up. Inside an operation."""
        return self.backend.replicas(connection)

    def health(self) -> Health:
        """How it does now."""
        writer = self.writer
        return Health(
            writes=writer.alive,
            queue_depth=writer.depth,
            last_commit_s=time.monotonic() - writer.stats.committed_at,
            free_bytes=self.backend.free_bytes(),
        )


def _probe(connection: Connection) -> None:
    """Something that must reach the disk."""
    connection.execute(
        "INSERT INTO setting (name, value) VALUES ('probe', '1')"
        " ON CONFLICT (name) DO UPDATE SET value ="
        " CAST((CAST(setting.value AS BIGINT) + 1) % 1000000 AS TEXT)"
    )
