"""What the store asks of a kind of database: sessions, the schema, and who else is there."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Protocol, TypeVar

from lumaris_coordinator.store.port import Connection, Migration, Row

T = TypeVar("T")


class Backend(Protocol):
    """SQLite in one file, or a database of a PostgreSQL server."""

    @property
    def shared(self) -> bool:
        """Whether other replicas may write as well."""
        ...

    @property
    def place(self) -> str:
        """Where it is, in words without a password."""
        ...

    def exclusive(self) -> AbstractContextManager[None]:
        """Be the one program that may serve, where there can be only one.

        Raises LumarisError `already_running` or `not_writable`.
        """
        ...

    def migrate(self, migrations: Sequence[Migration]) -> list[str]:
        """Apply what is missing; the names of that. Raises LumarisError `not_writable`."""
        ...

    def writer(self) -> Connection:
        """A session that may write. `BEGIN IMMEDIATE` waits for every other writer."""
        ...

    def snapshot(self) -> AbstractContextManager[Connection]:
        """A session that cannot write, and sees the data of one moment for as long as it lives."""
        ...

    def rows(self, connection: Connection, sql: str) -> Iterator[Row]:
        """The rows of a query inside a snapshot, a bounded number of them in memory."""
        ...

    def columns(self, connection: Connection, table: str) -> list[str]:
        """The columns of a table, in their order; none for a table that is not there."""
        ...

    def replicas(self, connection: Connection) -> int:
        """How many other programs hold a writing session."""
        ...

    def failed(self, error: Exception) -> bool:
        """Whether an error is the database's own: no statement of this transaction counts."""
        ...

    def free_bytes(self) -> int | None:
        """Free space where the data is; None where it cannot be known from here."""
        ...

    def open(self) -> None:
        """Be ready for `read` and `scan`."""
        ...

    def close(self) -> None:
        """Let go of everything `open` and the reads have taken."""
        ...

    async def read(self, look: Callable[[Connection], T]) -> T:
        """What `look` finds in committed data."""
        ...

    async def scan(self, look: Callable[[Connection], T]) -> T:
        """What `look` finds in a snapshot."""
        ...

    async def listen(self, told: Callable[[], None]) -> None:
        """Call `told` in the event loop whenever another replica has committed. Returns at once
        where there are no others."""
        ...
