"""A private PostgreSQL server for the tests, and a fresh database for each of them.

It listens on a Unix socket in a folder of its own and syncs every commit, as a real one does. The
database of a test that is over is emptied for the next, which takes a tenth of making one.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

import psycopg
import pytest

from lumaris_coordinator.store import sqlite
from lumaris_coordinator.store.server import PostgresServer
from lumaris_coordinator.tables import MIGRATIONS

INTEGRITY = (sqlite.driver.IntegrityError, psycopg.IntegrityError)
_HOMES = (*sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True), Path("/usr/bin"))
_CONFIG = {
    "listen_addresses": "",
    "fsync": "on",
    "max_connections": "60",
    "shared_buffers": "16MB",
    "max_wal_size": "256MB",
    "autovacuum": "off",
    "logging_collector": "off",
}


def programs() -> Path | None:
    """The folder of `initdb` and `postgres`, where there is one."""
    return next((home for home in _HOMES if (home / "initdb").exists()), None)


@dataclass
class Server:
    """A running server."""

    home: Path
    folder: Path
    process: subprocess.Popen[bytes] | None = None
    _numbers: Iterator[int] = field(default_factory=lambda: count(1))
    _used: dict[bool, list[str]] = field(default_factory=lambda: {True: [], False: []})

    def dsn(self, name: str) -> str:
        """The address of a database."""
        return f"postgresql://postgres@/{name}?host={self.folder}"

    def initialise(self) -> None:
        """Make the server's files."""
        arguments = ["-A", "trust", "-U", "postgres", "-E", "UTF8", "--locale=C", "--no-sync"]
        command = [str(self.home / "initdb"), "-D", str(self.folder / "data"), *arguments]
        subprocess.run(command, check=True, capture_output=True, cwd=self.folder, **_as_owner())

    def start(self) -> None:
        """Start, and wait until it answers."""
        settings = {**_CONFIG, "unix_socket_directories": str(self.folder)}
        options = [part for item in settings.items() for part in ("-c", "=".join(item))]
        with (self.folder / "log").open("ab") as log:
            self.process = subprocess.Popen(
                [str(self.home / "postgres"), "-D", str(self.folder / "data"), *options],
                stdout=log,
                stderr=log,
                cwd=self.folder,
                **_as_owner(),
            )
        deadline = time.monotonic() + 30
        while True:
            try:
                psycopg.connect(self.dsn("postgres")).close()
                return
            except psycopg.OperationalError:
                if time.monotonic() > deadline or self.process.poll() is not None:
                    raise
                time.sleep(0.02)

    def restart(self) -> None:
        """Cut every session in whatever it does, and recover as after a crash."""
        try:
            self.stop()
        finally:
            self.start()

    def stop(self) -> None:
        """End it at once, without a checkpoint."""
        assert self.process is not None
        # PostgreSQL's immediate shutdown: its children end with it.
        self.process.send_signal(signal.SIGQUIT)
        self.process.wait(30)
        self.process = None

    def run(self, sql: str) -> None:
        """One statement outside the databases of the tests."""
        with psycopg.connect(self.dsn("postgres"), autocommit=True) as connection:
            connection.execute(sql)

    @contextmanager
    def database(self, *, empty: bool = False) -> Iterator[str]:
        """The address of a database of the caller's own: with the schema and no rows, or without
        anything at all."""
        used = self._used[empty].pop() if self._used[empty] else ""
        name = used or f"lumaris_{next(self._numbers)}"
        if not used:
            self.run(f"CREATE DATABASE {name}")
        if not used and not empty:
            PostgresServer(self.dsn(name)).migrate(MIGRATIONS)
        try:
            yield self.dsn(name)
        finally:
            if self.process is not None:
                self._clear(name, empty=empty)
                self._used[empty].append(name)

    def _clear(self, name: str, *, empty: bool) -> None:
        """End what a test left running, and delete all rows as one who may, or all tables."""
        with psycopg.connect(self.dsn(name), autocommit=True) as connection:
            connection.execute(
                "SELECT pg_terminate_backend(pid, 10000) FROM pg_stat_activity"
                " WHERE datname = current_database() AND pid <> pg_backend_pid()"
            )
            if empty:
                connection.execute("DROP SCHEMA public CASCADE; CREATE SCHEMA public")
                return
            tables = connection.execute(
                "SELECT tablename FROM pg_tables"
                " WHERE schemaname = 'public' AND tablename <> 'migration'"
            ).fetchall()
            deletes = "; ".join(f"DELETE FROM {table}" for (table,) in tables)
            sql = f"BEGIN; SET LOCAL session_replication_role = replica; {deletes}; COMMIT"
            connection.execute(sql, prepare=False)


def _as_owner() -> dict[str, Any]:
    """The server refuses to run as root."""
    return {"user": "postgres", "group": "postgres"} if os.geteuid() == 0 else {}


@contextmanager
def running_server() -> Iterator[Server]:
    """A server for as long as the block runs; without its programs the test is skipped, or fails
    where required."""
    home = programs()
    if home is None:
        reason = "needs PostgreSQL (Debian package postgresql)"
        if os.environ.get("LUMARIS_REQUIRE_POSTGRES") == "1":
            pytest.fail(reason)
        pytest.skip(reason)
    # The path of a Unix socket is short, and the folders of pytest are closed to other users.
    folder = Path(tempfile.mkdtemp(prefix="lumaris-pg-"))
    if os.geteuid() == 0:
        shutil.chown(folder, "postgres", "postgres")
    server = Server(home, folder)
    try:
        server.initialise()
        server.start()
        yield server
    finally:
        if server.process is not None:
            server.stop()
        shutil.rmtree(folder, ignore_errors=True)
