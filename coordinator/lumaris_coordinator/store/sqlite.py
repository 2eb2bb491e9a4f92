"""Opening SQLite the one way that is safe here.

WAL with synchronous=FULL, so what is acknowledged survives a power cut; foreign keys on; explicit
transactions only. pysqlite3 is preferred, because the stdlib's SQLite is often one with the
WAL-reset bug (3.7.0 to 3.51.2; fixed in 3.51.3, 3.50.7 and 3.44.6).
"""

from __future__ import annotations

import fcntl
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from lumaris_coordinator.bounds import LOCK_WAIT_S
from lumaris_protocol.errors import LumarisError

if TYPE_CHECKING:
    import sqlite3 as driver
    from sqlite3 import Connection
else:
    try:
        import pysqlite3.dbapi2 as driver
    except ImportError:
        import sqlite3 as driver
    Connection = driver.Connection

__all__ = [
    "Connection",
    "connect",
    "driver",
    "exclusive",
    "not_writable",
    "wal_reset_bug",
    "warn_of_bad_version",
]

log = logging.getLogger(__name__)


def wal_reset_bug(version: tuple[int, int, int]) -> bool:
    """Whether an SQLite version can lose a commit when a checkpoint races a WAL reset."""
    fixed = version >= (3, 51, 3) or (3, 50, 7) <= version < (3, 51, 0)
    fixed = fixed or (3, 44, 6) <= version < (3, 45, 0)
    return version >= (3, 7, 0) and not fixed


def connect(path: Path, *, read_only: bool = False) -> Connection:
    """A connection in autocommit mode. A reader sees committed data only and cannot write.

    Raises LumarisError `not_writable` when the file cannot be opened or is no database.
    """
    try:
        connection = driver.connect(
            path, isolation_level=None, check_same_thread=False, timeout=LOCK_WAIT_S
        )
    except driver.Error as error:
        raise not_writable(path, error) from None
    try:
        connection.execute("PRAGMA foreign_keys = ON")
        if read_only:
            connection.execute("PRAGMA query_only = ON")
        else:
            connection.execute("PRAGMA journal_mode = WAL")
            connection.execute("PRAGMA synchronous = FULL")
    except driver.Error as error:
        connection.close()
        raise not_writable(path, error) from None
    return connection


def make_private(path: Path) -> None:
    """Make the file, or keep others out of one of ours: SQLite gives its other files the same mode.
    What cannot be done here is told when the file is opened."""
    with suppress(OSError):
        try:
            os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
        except FileExistsError:
            # Never opened and closed: that would drop the locks of a connection in this process.
            if path.stat().st_mode & 0o077:
                path.chmod(0o600)


def not_writable(path: Path, error: Exception) -> LumarisError:
    """The refusal for a file that cannot be used as the database."""
    return LumarisError("not_writable", f"{path}: {error}")


@contextmanager
def exclusive(path: Path) -> Iterator[None]:
    """Hold the lock file: two processes on one database would each believe to be its writer.

    Raises LumarisError: `already_running` or `not_writable`. The kernel drops the lock with the
    process, however that ends.
    """
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise LumarisError("not_writable", f"{path}: {error.strerror}") from None
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise LumarisError(
                "already_running", f"Another coordinator uses {path.parent}."
            ) from None
        yield
    finally:
        os.close(descriptor)


def warn_of_bad_version() -> None:
    """Log once at start when this SQLite has the WAL-reset bug."""
    version = driver.sqlite_version_info
    if wal_reset_bug(version[:3]):
        log.warning(
            "SQLite %s has the WAL-reset bug; install pysqlite3 to get a fixed one",
            driver.sqlite_version,
        )
