"""What the coordinator's rooms ask of a database, whichever it is.

Statements are written in the subset that SQLite and PostgreSQL share: `?` and `?1` parameters,
`INTEGER`, `TEXT` and `BLOB` columns, conditions that compare (`seller = 1`), and numbers that the
statement itself makes (`(SELECT coalesce(max(id), 0) + 1 FROM txn)`): one batch is written at a
time, so they have no gaps.

A writer's statement may be sent without waiting for its answer: it has happened for certain only
once something of it or after it was read, and its error may be raised as late as that. So an
operation lets the errors of its statements pass, and asks for `rowcount` or rows where it must
know.
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


class Late(BaseException):
    """A statement of an operation failed, and that was noticed only after the operation.

    `ago` operations before the newest; since the failed statement nothing has happened. Cleared by
    `ROLLBACK TO operation`, which goes back to the beginning of the failed one. No Exception, so
    that no operation takes it for an error of its own.
    """

    def __init__(self, ago: int, cause: Exception) -> None:
        super().__init__(f"a statement failed {ago} operations ago: {cause}")
        self.ago, self.cause = ago, cause


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
