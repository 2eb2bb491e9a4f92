"""Bringing an SQLite file to this version's schema."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from sqlite_utils import Database
from sqlite_utils.migrations import Migrations

from lumaris_coordinator.store.port import Migration
from lumaris_protocol.errors import LumarisError

if TYPE_CHECKING:
    from lumaris_coordinator.store.sqlite import Connection

_SET = "lumaris_coordinator"


def migrate(connection: Connection, migrations: Sequence[Migration]) -> list[str]:
    """Apply what is not applied yet; the names of that. Each migration is one transaction."""
    steps = Migrations(_SET)
    for migration in migrations:
        steps(name=migration.name)(_step(migration))
    database = Database(connection)
    if {step.name for step in steps.applied(database)} - {step.name for step in migrations}:
        raise LumarisError("config_invalid", "A newer version made the database.")
    missing = [step.name for step in steps.pending(database)]
    steps.apply(database)
    return missing


def _step(migration: Migration) -> Callable[[Database], None]:
    def apply(database: Database) -> None:
        for statement in _statements(migration):
            database.execute(statement)

    return apply


def _statements(migration: Migration) -> Iterator[str]:
    for statement in migration.statements:
        strict = statement.lstrip().startswith("CREATE TABLE")
        yield f"{statement} STRICT" if strict else statement
    for table in migration.append_only:
        for verb in ("UPDATE", "DELETE"):
            yield (
                f"CREATE TRIGGER {table}_no_{verb.lower()} BEFORE {verb} ON {table} "
                f"BEGIN SELECT RAISE(ABORT, '{table} is append-only'); END"
            )
