"""Sessions of a PostgreSQL server that speak the store's own SQL.

The rooms write the subset that both databases share. What differs is bridged here: how parameters
are written, that sums and truth values are plain integers, and what `BEGIN IMMEDIATE` means.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, Final

import psycopg
from psycopg import conninfo
from psycopg.abc import AdaptContext, Buffer
from psycopg.adapt import AdaptersMap, Loader
from psycopg.types.numeric import Int8Dumper
from psycopg.types.string import StrDumperUnknown

from lumaris_coordinator.bounds import DATABASE_CONNECT_S_MAX, LOCK_WAIT_S, WRITE_S_MAX
from lumaris_coordinator.store.pipeline import Session, text_of
from lumaris_coordinator.store.port import Connection as PortConnection
from lumaris_coordinator.store.port import Cursor, first
from lumaris_protocol.errors import LumarisError

CHANNEL: Final = "lumaris"
# Advisory locks are numbers that all programs on a database share; these spell "lumaris".
_SPACE: Final = 0x6C75_6D61
BATCH_LOCK: Final = (_SPACE << 32) | 1
SCHEMA_LOCK: Final = (_SPACE << 32) | 2
PRESENCE: Final = 3
_TOKENS: Final = re.compile(r"'(?:[^']|'')*'|\?(\d*)")
_OPTIONS: Final[dict[str, Any]] = {
    "application_name": "lumaris-coordinator",
    "connect_timeout": DATABASE_CONNECT_S_MAX,
    # A server that vanished without a word is noticed while the callers still wait.
    "keepalives_idle": 10,
    "keepalives_interval": 5,
    "keepalives_count": 3,
    "tcp_user_timeout": int(WRITE_S_MAX * 1_000),
}


class Connection:
    """One session that waits for every statement: a reader's, or one that changes the schema."""

    def __init__(self, inner: psycopg.Connection[Any]) -> None:
        self.inner = inner

    def execute(self, sql: str, values: Sequence[object] = (), /) -> Cursor:
        """Run one statement of the shared subset."""
        return self.inner.execute(_literal(translate(sql)), values or None)

    def close(self) -> None:
        """End the session."""
        self.inner.close()


def connect(dsn: str, *, read_only: bool = False) -> Connection:
    """A session in autocommit mode. Raises psycopg.Error."""
    return Connection(_connect(dsn, read_only=read_only))


def write(dsn: str, name: str) -> Session:
    """A writer's session, whose batches exclude those of every other writer on the database. It
    tells the others of them under its `name`. Raises psycopg.Error."""
    inner = _connect(dsn, read_only=False)
    try:
        inner.execute(_literal(f"SELECT pg_advisory_lock_shared({_SPACE}, {PRESENCE})"))
        return Session(
            inner,
            begin=(
                "BEGIN ISOLATION LEVEL READ COMMITTED",
                f"SELECT pg_advisory_xact_lock({BATCH_LOCK})",
            ),
            commit=(f"SELECT pg_notify('{CHANNEL}', '{name}')", "COMMIT"),
            translate=translate,
        )
    except BaseException:
        inner.close()
        raise


def _connect(dsn: str, *, read_only: bool) -> psycopg.Connection[Any]:
    inner = psycopg.connect(
        dsn, autocommit=True, cursor_factory=psycopg.RawCursor, context=_adapters(), **_OPTIONS
    )
    try:
        for setting, value in _session(read_only=read_only).items():
            inner.execute(_literal(f"SET {setting} = '{value}'"), prepare=False)
    except BaseException:
        inner.close()
        raise
    return inner


def _session(*, read_only: bool) -> dict[str, str]:
    wait = f"{int(WRITE_S_MAX * 1_000)}ms"
    if read_only:
        return {"default_transaction_read_only": "on", "statement_timeout": wait}
    return {
        # What is acknowledged survives a power cut, whatever the server's own default.
        "synchronous_commit": "on",
        # A replica that stops in mid-batch must not keep the others from writing.
        "idle_in_transaction_session_timeout": wait,
        "lock_timeout": wait,
        "statement_timeout": wait,
    }


def others(connection: PortConnection) -> int:
    """How many other sessions are writers."""
    row = first(
        connection,
        "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND granted"
        " AND classid = ? AND objid = ? AND objsubid = 2"
        " AND database = (SELECT oid FROM pg_database WHERE datname = current_database())"
        " AND pid <> pg_backend_pid()",
        (_SPACE, PRESENCE),
    )
    return int(row[0]) if row else 0


@lru_cache(maxsize=4_096)
def translate(sql: str) -> str:
    """`?` and `?2` as `$1` and `$2`; what stands in quotes is left alone. A bare `?` is one more
    than the largest before it, as in SQLite."""
    largest = 0

    def number(found: re.Match[str]) -> str:
        nonlocal largest
        if found[0].startswith("'"):
            return found[0]
        n = int(found[1]) if found[1] else largest + 1
        largest = max(largest, n)
        return f"${n}"

    return _TOKENS.sub(number, sql)


def failed(error: Exception) -> bool:
    """Whether the server or the way to it failed: not what was asked, but what should answer."""
    return isinstance(error, psycopg.OperationalError | psycopg.InterfaceError)


def checked(dsn: str) -> str:
    """A usable address. Raises LumarisError `config_invalid`, without a word of what it held."""
    try:
        if dsn.partition("://")[0] not in ("postgresql", "postgres"):
            raise ValueError
        conninfo.conninfo_to_dict(dsn)
    except (ValueError, psycopg.Error):
        raise LumarisError(
            "config_invalid", "The setting database is not the address of a PostgreSQL database."
        ) from None
    return dsn


def place(dsn: str) -> str:
    """Where an address leads, without user and password."""
    found = conninfo.conninfo_to_dict(dsn)
    name = found.get("dbname") or found.get("user") or ""
    host, port = found.get("host") or "localhost", found.get("port") or 5432
    return f"PostgreSQL {name} at {host}:{port}"


def not_writable(dsn: str, error: Exception) -> LumarisError:
    """The refusal for a database that cannot be used. The server's words, never the address."""
    text = " ".join(str(error).split())
    secret = conninfo.conninfo_to_dict(dsn).get("password")
    if secret:
        text = text.replace(str(secret), "…")
    return LumarisError("not_writable", f"{place(dsn)}: {text}")


def _literal(sql: str) -> Any:
    """The driver's types want SQL to be a literal; ours are, before `translate`."""
    return sql


class _Integer(Loader):
    """A sum of integers is an integer."""

    def load(self, data: Buffer) -> int:
        return int(bytes(data))


class _Truth(Loader):
    """SQLite knows 1 and 0."""

    def load(self, data: Buffer) -> int:
        return int(bytes(data) == b"t")


class _TruthDumper(Int8Dumper):
    """True is 1."""

    def dump(self, obj: Any) -> Buffer | None:
        return b"1" if obj else b"0"


class _Text(StrDumperUnknown):
    """What the server cannot keep is refused as what was asked, before it is sent."""

    def dump(self, obj: str) -> Buffer | None:
        return text_of(obj)


@lru_cache(maxsize=1)
def _adapters() -> AdaptContext:
    found = AdaptersMap(psycopg.adapters)
    # One type for every whole number, so that a statement is prepared once and not once per size.
    found.register_dumper(int, Int8Dumper)
    found.register_dumper(bool, _TruthDumper)
    found.register_dumper(str, _Text)
    found.register_loader("numeric", _Integer)
    found.register_loader("bool", _Truth)
    return _Context(found)


class _Context:
    """What the driver takes adapters from."""

    connection = None

    def __init__(self, adapters: AdaptersMap) -> None:
        self.adapters = adapters


# How long a session waits for the schema's lock: another replica may be migrating.
MIGRATE_WAIT_S: Final = 12 * LOCK_WAIT_S
