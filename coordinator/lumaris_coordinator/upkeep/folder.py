"""What ties a state folder to its owner and to its database.

The address of the database comes from outside (a file, the environment), so a command that was
called without it would find an empty file beside the keys of a market that lives on a server: a
second ledger under one key. The first use of a database is therefore kept in the folder, and from
then on the folder is used with that database, and with no keys but its own.
"""

from __future__ import annotations

import os
import pwd
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from lumaris_coordinator.config import Settings
from lumaris_coordinator.identity.keys import FIRST_KEY, KeyRing, is_whole
from lumaris_coordinator.store.backend import Backend
from lumaris_coordinator.store.file import SqliteFile
from lumaris_coordinator.store.port import Connection, first
from lumaris_coordinator.store.store import backend_of
from lumaris_overlay.private_files import read_key, write_private_file
from lumaris_protocol.errors import LumarisError

MARKER: Final = "coordinator.database"
_MARKER_BYTES_MAX: Final = 4_096
_ANYBODY: Final = 0o077


def require_owner(state: Path) -> None:
    """Files that another user makes here, root as well, are closed to the program that serves.

    Raises LumarisError `config_invalid`.
    """
    try:
        owner = state.stat().st_uid
    except OSError:  # it is made, or missed, by whoever needs it
        return
    if owner != os.geteuid():
        name = _name_of(owner)
        raise LumarisError(
            "config_invalid",
            f"{state} belongs to the user {name}.",
            hint=f"Run the command as that user: runuser -u {name} -- …",
        )


def require_private(state: Path) -> None:
    """A folder for keys that was there before is closed to others, or refused when it holds things.

    Raises LumarisError `unsafe_key_file` or `not_writable`.
    """
    try:
        if not state.exists() or not state.stat().st_mode & _ANYBODY:
            return
        if any(state.iterdir()):
            raise LumarisError(
                "unsafe_key_file",
                f"Other users can enter {state}, and it is not empty.",
                hint=f"chmod 700 {state}, or choose another folder.",
            )
        state.chmod(0o700)
    except OSError as error:
        raise LumarisError("not_writable", f"{state}: {error.strerror}") from None


def bound_to(state: Path) -> str:
    """The database that the folder was first used with; "" before that."""
    try:
        with (state / MARKER).open("rb") as file:
            return file.read(_MARKER_BYTES_MAX).decode(errors="replace").strip()
    except FileNotFoundError:
        return ""
    except OSError as error:
        raise LumarisError("config_invalid", f"{state / MARKER}: {error.strerror}") from None


def require_database(state: Path, backend: Backend) -> None:
    """Whether the folder may be used with this database. Raises LumarisError `config_invalid`."""
    known, name = bound_to(state), _place(backend)
    if known and known != name:
        raise LumarisError(
            "config_invalid",
            f"{state} belongs to the database {known}, and {name} was named.",
            hint="Name its database in coordinator.toml or LUMARIS_COORDINATOR_DATABASE; if it was"
            f" moved on purpose, write its new place into {state / MARKER}.",
        )


def bind(state: Path, backend: Backend) -> None:
    """Keep which database the folder is used with. Raises LumarisError `not_writable`."""
    if bound_to(state) == _place(backend):
        return
    try:
        write_private_file(state / MARKER, f"{_place(backend)}\n".encode())
    except OSError as error:
        raise LumarisError("not_writable", f"{state / MARKER}: {error.strerror}") from None


def claim(connection: Connection, settings: Settings, coordinator: str) -> None:
    """An operation: the data is of this network, key and currency from now on. In a folder that was
    used before it must have been.

    Raises LumarisError `config_invalid` for the data of another, or where the own is gone.
    """
    bound = bound_to(settings.state)
    for name, value in (
        ("network", settings.network),
        ("coordinator", coordinator),
        ("currency", settings.currency),
    ):
        row = first(connection, "SELECT value FROM setting WHERE name = ?", (name,))
        if row is None and bound:
            raise LumarisError(
                "config_invalid",
                f"{bound} holds nothing of this coordinator any more.",
                hint="Find its data, or restore a backup into a new folder with these keys.",
            )
        if row is not None and row[0] != value:
            raise LumarisError(
                "config_invalid", f"The state belongs to {name} {row[0]}, not {value}."
            )
        connection.execute(
            "INSERT INTO setting (name, value) VALUES (?, ?) ON CONFLICT DO NOTHING",
            (name, value),
        )


def keys_of(settings: Settings) -> KeyRing:
    """Keys that are there: data without its keys is another coordinator's.

    Raises LumarisError: `not_found`, `unsafe_key_file`, `config_invalid`.
    """
    if not is_whole(settings.state):
        raise LumarisError(
            "not_found",
            f"{settings.state} does not hold the keys of a coordinator.",
            hint="Is --state its folder? Then put its coordinator.key and its folder keys there.",
        )
    return KeyRing(settings.state, network=settings.network)


def existing(settings: Settings) -> Backend:
    """The folder's database, which is there: looking at one must not make it.

    Raises LumarisError: `not_found`, or `config_invalid` for another one.
    """
    backend = backend_of(settings.state, settings.database)
    require_database(settings.state, backend)
    if isinstance(backend, SqliteFile) and not backend.path.exists():
        raise LumarisError(
            "not_found",
            f"There is no {backend.path}.",
            hint="Is --state its folder? `lumaris coordinator init` makes a new one.",
        )
    return backend


@contextmanager
def opened(settings: Settings, *, write: bool = False) -> Iterator[tuple[Backend, Connection]]:
    """A session with the folder's data, of one moment, or in one transaction that is kept at the
    end of the block.

    Raises LumarisError: `not_found`, `not_writable`, `busy` while somebody else holds it, or
    `config_invalid` for the data of another coordinator.
    """
    backend = existing(settings)
    key = read_key(settings.state / FIRST_KEY)
    with telling(backend):
        if not write:
            with backend.snapshot() as connection:
                _require_ours(backend, connection, key.peer_id)
                yield backend, connection
            return
        connection = backend.writer()
        try:
            connection.execute("BEGIN IMMEDIATE")
            _require_ours(backend, connection, key.peer_id)
            yield backend, connection
            connection.execute("COMMIT")
        finally:
            connection.close()


@contextmanager
def telling(backend: Backend) -> Iterator[None]:
    """The database's own errors as a refusal. Raises LumarisError `busy`."""
    try:
        yield
    except Exception as error:
        if not backend.failed(error):
            raise
        raise LumarisError(
            "busy", f"{backend.place} does not answer, or somebody else holds it."
        ) from None


def _require_ours(backend: Backend, connection: Connection, coordinator: str) -> None:
    if not backend.columns(connection, "setting"):
        raise LumarisError(
            "not_found",
            f"{backend.place} holds no data of a coordinator.",
            hint="Is the address right? `lumaris coordinator init` makes the tables.",
        )
    row = first(connection, "SELECT value FROM setting WHERE name = 'coordinator'")
    if row is not None and row[0] != coordinator:
        raise LumarisError(
            "config_invalid",
            f"The data in {backend.place} is of coordinator {row[0]}, the keys beside it are of"
            f" {coordinator}.",
        )


def _place(backend: Backend) -> str:
    """A file moves with its folder."""
    return backend.place if backend.shared else "file"


def _name_of(user: int) -> str:
    try:
        return pwd.getpwuid(user).pw_name
    except KeyError:
        return f"#{user}"
