"""The upkeep commands over one configuration: what the command line calls."""

from __future__ import annotations

import time
from contextlib import closing
from pathlib import Path

from lumaris_coordinator.authority import Authority
from lumaris_coordinator.config import Settings
from lumaris_coordinator.identity import shared_list
from lumaris_coordinator.identity.keys import KeyRing
from lumaris_coordinator.receipts.log import log_of
from lumaris_coordinator.store.store import backend_of
from lumaris_coordinator.tables import MIGRATIONS
from lumaris_coordinator.upkeep import backup as backups
from lumaris_coordinator.upkeep import check as checks
from lumaris_coordinator.upkeep import folder
from lumaris_coordinator.upkeep.backup import Summary
from lumaris_coordinator.upkeep.check import Report
from lumaris_coordinator.upkeep.freeze import is_frozen, set_frozen
from lumaris_overlay.private_files import make_private_folder


def prepare(settings: Settings) -> str:
    """Make the keys and the database of a new coordinator; its peer id.

    Raises LumarisError: `not_writable`, `unsafe_key_file`, `already_running`, or `config_invalid`
    when the database holds another coordinator.
    """
    backend = backend_of(settings.state, settings.database)
    folder.require_database(settings.state, backend)
    make_private_folder(settings.state)
    keys = KeyRing(settings.state, network=settings.network)
    if settings.tls_names or settings.mutual_tls:
        # What callers have to trust is there before the first of them comes.
        Authority(settings.state, now=int(time.time()))
    with backend.exclusive():
        backend.migrate(MIGRATIONS)
        with folder.telling(backend), closing(backend.writer()) as connection:
            connection.execute("BEGIN IMMEDIATE")
            folder.claim(connection, settings, keys.first.peer_id)
            shared_list.exchange(connection, keys.list, network=settings.network)
            connection.execute("COMMIT")
    folder.bind(settings.state, backend)
    return keys.first.peer_id


def migrate(settings: Settings) -> list[str]:
    """Bring the schema up to date; the migrations that were missing.

    Raises LumarisError: `already_running`, `not_writable`, `config_invalid` for another database.
    """
    backend = backend_of(settings.state, settings.database)
    folder.require_database(settings.state, backend)
    with backend.exclusive():
        return backend.migrate(MIGRATIONS)


def backup(settings: Settings, file: Path) -> Summary:
    """Write everything to a new file while the coordinator serves.

    Raises LumarisError: `not_found` without data or keys, `not_writable`, `busy`, `config_invalid`.
    """
    with folder.opened(settings) as (backend, connection):
        return backups.write(backend, connection, file, migrations=MIGRATIONS, now=int(time.time()))


def restore(settings: Settings, file: Path) -> tuple[Summary, Report]:
    """Read a backup into an empty state or database, frozen, and check what came of it.

    Raises LumarisError: `backup_invalid`, `not_writable`, `already_running`, `not_found` without
    keys, `config_invalid` with those of another coordinator or network.
    """
    keys = folder.keys_of(settings)
    backend = backend_of(settings.state, settings.database)
    folder.require_database(settings.state, backend)
    summary = backups.restore(
        backend,
        file,
        migrations=MIGRATIONS,
        network=settings.network,
        coordinator=keys.first.peer_id,
    )
    if summary.head.coordinator:
        folder.bind(settings.state, backend)
    return summary, check(settings)


def check(settings: Settings) -> Report:
    """Hold the books against each other, from one snapshot, while the coordinator serves.

    Raises LumarisError: `not_found` without data or keys, `not_writable`, `busy`, `config_invalid`.
    """
    log = log_of(settings.network, folder.keys_of(settings))
    with folder.opened(settings) as (_, connection):
        return checks.check(connection, log)


def freeze(settings: Settings, on: bool | None) -> bool:
    """Turn the switch, or leave it for None; whether it is on. Holds at once, for every replica.

    Raises LumarisError: `not_found` without data or keys, `not_writable`, `busy`, `config_invalid`.
    """
    with folder.opened(settings, write=on is not None) as (_, connection):
        if on is not None:
            set_frozen(connection, on)
        return is_frozen(connection)


def place(settings: Settings) -> str:
    """Which database the commands work on, in words without a password.

    Raises LumarisError `config_invalid` or `missing_extra`.
    """
    return backend_of(settings.state, settings.database).place
