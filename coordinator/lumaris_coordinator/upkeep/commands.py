"""The upkeep commands over one configuration: what the command line calls."""

from __future__ import annotations

import time
from contextlib import closing
from pathlib import Path

from lumaris_coordinator.config import Settings
from lumaris_coordinator.identity.keys import KeyRing
from lumaris_coordinator.receipts.log import log_of
from lumaris_coordinator.store.backend import Backend
from lumaris_coordinator.store.file import SqliteFile
from lumaris_coordinator.store.store import backend_of
from lumaris_coordinator.tables import MIGRATIONS
from lumaris_coordinator.upkeep import backup as backups
from lumaris_coordinator.upkeep import check as checks
from lumaris_coordinator.upkeep.backup import Summary
from lumaris_coordinator.upkeep.check import Report
from lumaris_coordinator.upkeep.freeze import is_frozen, set_frozen
from lumaris_protocol.errors import LumarisError


def prepare(settings: Settings) -> str:
    """Make the keys and the database of a new coordinator; its peer id.

    Raises LumarisError: `not_writable`, `unsafe_key_file`, `already_running`.
    """
    keys = KeyRing(settings.state, network=settings.network, clock=time.time)
    migrate(settings)
    return keys.first.peer_id


def migrate(settings: Settings) -> list[str]:
    """Bring the schema up to date; the migrations that were missing.

    Raises LumarisError `already_running` or `not_writable`.
    """
    backend = backend_of(settings.state, settings.database)
    with backend.exclusive():
        return backend.migrate(MIGRATIONS)


def backup(settings: Settings, file: Path) -> Summary:
    """Write everything to a new file while the coordinator serves.

    Raises LumarisError: `not_found` without data, `not_writable`.
    """
    return backups.write(_existing(settings), file, migrations=MIGRATIONS, now=int(time.time()))


def restore(settings: Settings, file: Path) -> tuple[Summary, Report]:
    """Read a backup into an empty state or database, and check what came of it.

    Raises LumarisError: `backup_invalid`, `not_writable`, `already_running`.
    """
    backend = backend_of(settings.state, settings.database)
    summary = backups.restore(backend, file, migrations=MIGRATIONS)
    return summary, check(settings)


def check(settings: Settings) -> Report:
    """Hold the books against each other, from one snapshot, while the coordinator serves.

    Raises LumarisError: `not_found` without data, `not_writable`.
    """
    backend = _existing(settings)
    keys = KeyRing(settings.state, network=settings.network, clock=time.time)
    log = log_of(settings.network, keys)
    with backend.snapshot() as connection:
        return checks.check(connection, log)


def freeze(settings: Settings, on: bool | None) -> bool:
    """Turn the switch, or leave it for None; whether it is on. Holds at once, for every replica.

    Raises LumarisError: `not_found` without data, `not_writable`.
    """
    backend = _existing(settings)
    with closing(backend.writer()) as connection:
        if on is not None:
            connection.execute("BEGIN IMMEDIATE")
            set_frozen(connection, on)
            connection.execute("COMMIT")
        return is_frozen(connection)


def _existing(settings: Settings) -> Backend:
    """A database that is there: looking at one must not make it."""
    backend = backend_of(settings.state, settings.database)
    if isinstance(backend, SqliteFile) and not backend.path.exists():
        raise LumarisError("not_found", f"There is no {backend.path}.")
    return backend
