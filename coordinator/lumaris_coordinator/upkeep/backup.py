"""A backup: one file that holds every table, whichever database it came from.

It is written from one snapshot while the coordinator serves, and can be read back into an empty
database of either kind. Lines of JSON: a head, then for each table its columns and its rows, then
a foot with the number of rows and the SHA-256 of everything before it. Bytes are {"b64": …}.

The keys are not in it: who has a backup cannot sign for the coordinator.
"""

from __future__ import annotations

import base64
import hashlib
import os
import re
import secrets
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Final

import msgspec

from lumaris_coordinator.bounds import BACKUP_LINE_BYTES_MAX, RESTORE_SKIPS
from lumaris_coordinator.identity.revocations import FLOOR
from lumaris_coordinator.store.backend import Backend
from lumaris_coordinator.store.port import Connection, Migration, first
from lumaris_coordinator.upkeep.freeze import set_frozen
from lumaris_protocol.errors import LumarisError

FORMAT: Final = "lumaris-backup/1"
# What others know by its number: who saw it before a loss must not take something else for it.
_NUMBERS: Final = {
    "event": ("id",),
    "event_party": ("event",),
    "webhook": ("seen",),
    "webhook_delivery": ("event",),
    "revocation": ("seq",),
}
_TOKENS: Final = "token"
_CREATE: Final = re.compile(r"\s*CREATE TABLE (\w+)")


class Head(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What the backup is of. `log_size` counts the leaves of the receipts log."""

    format: str
    made_at: int
    network: str
    coordinator: str
    log_size: int
    migrations: tuple[str, ...]


class _Table(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    table: str
    columns: tuple[str, ...]


class _Foot(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    rows: int
    sha256: str


@dataclass(frozen=True)
class Summary:
    """What was written or read back."""

    head: Head
    rows: int
    sha256: str


def tables_of(migrations: Sequence[Migration]) -> list[str]:
    """Every table of a schema, in the order in which rows may name each other."""
    found = (
        _CREATE.match(statement) for migration in migrations for statement in migration.statements
    )
    return [match[1] for match in found if match]


def write(
    backend: Backend,
    connection: Connection,
    file: Path,
    *,
    migrations: Sequence[Migration],
    now: int,
) -> Summary:
    """Write what a snapshot sees to a new file that appears whole or not at all.

    Raises LumarisError `not_writable`, also when the file exists.
    """
    # Nobody can have put a file or a link there before, and none that came since is replaced.
    draft = file.with_name(f"{file.name}.{secrets.token_hex(8)}")
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        if os.path.lexists(file):
            raise FileExistsError
        descriptor = os.open(draft, flags, 0o600)
        try:
            with os.fdopen(descriptor, "wb") as out:
                found = _dump(backend, connection, out, migrations=migrations, now=now)
                out.flush()
                os.fsync(out.fileno())
            os.link(draft, file)
        finally:
            draft.unlink(missing_ok=True)
        _sync_folder(file.parent)
    except FileExistsError:
        raise LumarisError(
            "not_writable", f"{file} exists already.", hint="Name a new file: none is replaced."
        ) from None
    except OSError as error:
        raise LumarisError("not_writable", f"{file}: {error.strerror}") from None
    return found


def _sync_folder(folder: Path) -> None:
    """A power cut must not lose the name of a file that was reported as written."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _dump(
    backend: Backend,
    connection: Connection,
    out: IO[bytes],
    *,
    migrations: Sequence[Migration],
    now: int,
) -> Summary:
    digest, rows = hashlib.sha256(), 0

    def put(value: object) -> None:
        line = msgspec.json.encode(value) + b"\n"
        digest.update(line)
        out.write(line)

    head = Head(
        FORMAT,
        now,
        network=_setting(connection, "network"),
        coordinator=_setting(connection, "coordinator"),
        log_size=_log_size(connection),
        migrations=tuple(migration.name for migration in migrations),
    )
    put(head)
    for table in tables_of(migrations):
        columns = backend.columns(connection, table)
        put(_Table(table, tuple(columns)))
        # Names come from our own schema.
        for row in backend.rows(connection, f"SELECT {', '.join(columns)} FROM {table}"):  # noqa: S608
            put([_packed(value) for value in row])
            rows += 1
    foot = _Foot(rows, digest.hexdigest())
    out.write(msgspec.json.encode(foot) + b"\n")
    return Summary(head, rows, foot.sha256)


def verify(file: Path) -> Summary:
    """Read a backup through without using it.

    Raises LumarisError `backup_invalid` for one that is damaged or cut off.
    """
    rows, digest, head = 0, hashlib.sha256(), None
    for line in _lines(file):
        found = _decoded(line)
        if head is None:
            head = _convert(found, Head)
            if head.format != FORMAT:
                raise _invalid(file, f"it has the format {head.format[:40]}")
        elif isinstance(found, list):
            rows += 1
        elif "sha256" in found:
            foot = _convert(found, _Foot)
            if foot != _Foot(rows, digest.hexdigest()):
                break
            return Summary(head, rows, foot.sha256)
        digest.update(line)
    raise _invalid(file, "it is damaged or not whole")


def restore(
    backend: Backend,
    file: Path,
    *,
    migrations: Sequence[Migration],
    network: str,
    coordinator: str,
) -> Summary:
    """Read a backup into an empty database: all of it or nothing, frozen and without tokens.

    What happened after the backup is gone from the data and not from the world: tokens may have
    been ended since, and numbers of events and revocations were given that must not be given again.
    Raises LumarisError: `backup_invalid`, `not_writable`, `already_running`, or `config_invalid`
    when it is of another network or coordinator than this one, whose key is at hand.
    """
    summary = verify(file)
    _require_same("network", summary.head.network, network, "Is its coordinator.toml there?")
    hint = "Put its coordinator.key and its folder keys into the folder first."
    _require_same("coordinator", summary.head.coordinator, coordinator, hint)
    names = {migration.name for migration in migrations}
    if not names.issuperset(summary.head.migrations):
        raise _invalid(file, "a newer version made it")
    with backend.exclusive():
        # The schema of the time when it was made; what came since is applied to its rows.
        then = [one for one in migrations if one.name in summary.head.migrations]
        backend.migrate(then)
        with closing(backend.writer()) as connection:
            connection.execute("BEGIN IMMEDIATE")
            _require_empty(backend, connection, then)
            try:
                _load(backend, connection, file, then)
                _stand_still(connection)
                connection.execute("COMMIT")
            except (LumarisError, OSError):
                raise
            except Exception as error:
                # A checksum is no signature: the rows may be anything that somebody wrote.
                if backend.failed(error):
                    raise LumarisError("not_writable", f"{backend.place}: {error}") from None
                raise _invalid(file, "its rows do not fit its tables") from None
        backend.migrate(migrations)
    return summary


def _require_same(what: str, found: str, expected: str, hint: str) -> None:
    if found not in ("", expected):  # "": it had never started
        raise LumarisError(
            "config_invalid",
            f"The backup is of {what} {found}, the folder is of {expected}.",
            hint=hint,
        )


def _stand_still(connection: Connection) -> None:
    """Nothing new before somebody has looked at what came back; no number twice."""
    set_frozen(connection, True)
    connection.execute(
        "INSERT INTO setting (name, value) VALUES (?, ?)"
        " ON CONFLICT (name) DO UPDATE SET value ="
        " CAST(CAST(setting.value AS BIGINT) + CAST(excluded.value AS BIGINT) AS TEXT)",
        (FLOOR, str(RESTORE_SKIPS)),
    )


def _load(
    backend: Backend, connection: Connection, file: Path, migrations: Sequence[Migration]
) -> None:
    known, sql = set(tables_of(migrations)), ""
    part: _Table | None = None
    shifted: tuple[int, ...] = ()
    for line in _lines(file):
        found = _decoded(line)
        if isinstance(found, list):
            if part is None:
                raise _invalid(file, "it has rows of no table")
            if part.table == _TOKENS:
                continue
            values = [_unpacked(value) for value in found]
            for place in shifted:
                values[place] += RESTORE_SKIPS
            connection.execute(sql, values)
        elif "table" in found:
            part = _convert(found, _Table)
            # What names a table or a column here is one of our own before it is put into SQL.
            if part.table not in known or sorted(part.columns) != sorted(
                backend.columns(connection, part.table)
            ):
                raise _invalid(file, f"its table {part.table[:40]} is not of this schema")
            marks = ", ".join("?" * len(part.columns))
            names = ", ".join(part.columns)
            sql = f"INSERT INTO {part.table} ({names}) VALUES ({marks})"  # noqa: S608
            shifted = tuple(map(part.columns.index, _NUMBERS.get(part.table, ())))


def _require_empty(
    backend: Backend, connection: Connection, migrations: Sequence[Migration]
) -> None:
    for table in tables_of(migrations):
        if first(connection, f"SELECT 1 FROM {table} LIMIT 1") is not None:  # noqa: S608
            raise LumarisError(
                "not_writable",
                f"{backend.place} is not empty.",
                hint="Restore into a new state directory or database.",
            )


def _lines(file: Path) -> Iterator[bytes]:
    try:
        with file.open("rb") as text:
            while line := text.readline(BACKUP_LINE_BYTES_MAX):
                yield line
    except OSError as error:
        raise _invalid(file, error.strerror or "it cannot be read") from None


def _decoded(line: bytes) -> Any:
    try:
        found = msgspec.json.decode(line)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return {}
    return found if isinstance(found, list | dict) else {}


def _convert(found: Any, kind: Any) -> Any:
    try:
        return msgspec.convert(found, kind)
    except msgspec.ValidationError as error:
        raise LumarisError("backup_invalid", str(error)) from None


def _packed(value: object) -> object:
    if isinstance(value, bytes | bytearray | memoryview):
        return {"b64": base64.b64encode(value).decode()}
    return value


def _unpacked(value: Any) -> Any:
    return base64.b64decode(value["b64"]) if isinstance(value, dict) else value


def _setting(connection: Connection, name: str) -> str:
    row = first(connection, "SELECT value FROM setting WHERE name = ?", (name,))
    return str(row[0]) if row else ""


def _log_size(connection: Connection) -> int:
    row = first(connection, "SELECT coalesce(max(size), 0) FROM checkpoint")
    return int(row[0]) if row else 0


def _invalid(file: Path, why: str) -> LumarisError:
    return LumarisError("backup_invalid", f"{file}: {why}.")
