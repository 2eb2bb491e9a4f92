"""What the coordinator's rooms ask of a database, whichever it is.

Statements are written in the subset that SQLite and PostgreSQL share: `?` and `?1` parameters,
`INTEGER`, `TEXT` and `BLOB` columns, conditions that compare (`seller = 1`), and numbers that the
statement itself makes (`(SELECT coalesce(max(id), 0) + 1 FROM txn)`): one batch is written at a
time, so they have no gaps.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

Row = tuple[Any, ...]


class Cursor(Protocol):
    """What a statement found or changed."""

    @property
    def rowcount(self) -> int:
        """How many rows an UPDATE, INSERT or DELETE touched."""
        ...

    def fetchall(self) -> list[Any]:
        """All rows that are left."""
        ...

    def __iter__(self) -> Iterator[Any]: ...


class Connection(Protocol):
    """One session with the database."""

    def execute(self, sql: str, values: Sequence[object] = ..., /) -> Cursor:
        """Run one statement."""
        ...

    def close(self) -> None:
        """End the session; an open transaction is rolled back."""
        ...


@dataclass(frozen=True)
class Migration:
    """One step of the schema: applied once, whole or not at all, and never changed afterwards.

    Rows of the tables named in `append_only` can be added, and neither changed nor deleted.
    """

    name: str
    statements: tuple[str, ...]
    append_only: tuple[str, ...] = ()


def first(connection: Connection, sql: str, values: Sequence[object] = ()) -> Row | None:
    """The first row of a query; the statement is finished, so no read transaction stays open."""
    rows = connection.execute(sql, values).fetchall()
    return rows[0] if rows else None


def all_rows(connection: Connection, sql: str, values: Sequence[object] = ()) -> list[Row]:
    """Every row of a query, which the query itself must bound."""
    return connection.execute(sql, values).fetchall()
