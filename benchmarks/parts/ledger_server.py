"""A PostgreSQL server of the benchmark's own."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psycopg

_HOMES = (*sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True), Path("/usr/bin"))
_START_S = 30.0


@contextmanager
def private_server() -> Iterator[str]:
    """The address of a fresh database that syncs every commit; "" where there is no server."""
    home = next((home for home in _HOMES if (home / "initdb").exists()), None)
    if home is None:
        yield ""
        return
    folder = Path(tempfile.mkdtemp(prefix="lumaris-pg-"))  # a socket's path is short
    # The server refuses to run as root.
    owner: dict[str, Any] = {"user": "postgres", "group": "postgres"} if not os.geteuid() else {}
    if owner:
        shutil.chown(folder, **owner)
    try:
        subprocess.run(
            [home / "initdb", "-D", folder / "data", "-A", "trust", "-U", "postgres", "-E", "UTF8"],
            check=True,
            capture_output=True,
            cwd=folder,
            **owner,
        )
        options = {
            "listen_addresses": "",
            "unix_socket_directories": folder,
            "max_connections": 300,
            "shared_buffers": "128MB",
        }
        words = [word for name, value in options.items() for word in ("-c", f"{name}={value}")]
        process = subprocess.Popen(
            [home / "postgres", "-D", folder / "data", *words],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            cwd=folder,
            **owner,
        )
        try:
            dsn = f"postgresql://postgres@/postgres?host={folder}"
            _wait_for(dsn)
            yield dsn
        finally:
            process.send_signal(signal.SIGINT)
            process.wait(_START_S)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _wait_for(dsn: str) -> None:
    deadline = time.monotonic() + _START_S
    while True:
        try:
            psycopg.connect(dsn).close()
            return
        except psycopg.OperationalError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)
