"""The ledger: what a durable operation costs, on both databases and over HTTP.

    python benchmarks/ledger.py [--json] [--quick] [--only PART,PART] [--dsn URL] [--folder DIR]

Parts: sqlite, postgres, http, crypto, writes, storm (by far the longest: 100,000 operations). Every
store figure stands beside the disk's own fdatasync in the same rounds, and every bar is a ratio of
neighbours in time: rates alone say more of the machine than of the program. Without --dsn a
PostgreSQL server of its own is started (as root it runs as the user postgres); the database that is
named must be empty.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

# Started as a file, this folder is on the path and the one above is not.
sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.parts.ledger_crypto import measure_crypto
from benchmarks.parts.ledger_http import measure_http, measure_storm, measure_writes
from benchmarks.parts.ledger_server import private_server
from benchmarks.parts.ledger_store import World, measure_postgres, measure_sqlite
from benchmarks.parts.report import Report

PARTS: dict[str, Callable[[World], None]] = {
    "sqlite": measure_sqlite,
    "postgres": measure_postgres,
    "http": measure_http,
    "crypto": measure_crypto,
    "writes": measure_writes,
    "storm": measure_storm,
}
# As the program sets it: the event loop and the writer's thread share the interpreter.
SWITCH_INTERVAL_S = 0.0002


def main() -> None:
    """Run the parts and print a table, or one JSON object."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--quick", action="store_true", help="one short round of each")
    parser.add_argument("--only", default=",".join(PARTS), help="parts, separated by commas")
    parser.add_argument("--dsn", default="", help="an empty PostgreSQL database")
    parser.add_argument("--folder", type=Path, help="on the disk to be measured; default: here")
    options = parser.parse_args()
    wanted = options.only.split(",")
    if unknown := set(wanted) - PARTS.keys():
        parser.error(f"unknown parts: {', '.join(sorted(unknown))}")
    logging.basicConfig(level=logging.ERROR)
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    row, began = Report(as_json=options.json, widths=(50, 12, 6, 10)), time.perf_counter()
    folder = options.folder or Path.cwd()
    with tempfile.TemporaryDirectory(prefix="lumaris-bench-", dir=folder) as name:
        seconds, rounds = (0.5, 1) if options.quick else (2.0, 3)
        world = World(Path(name), row, seconds, rounds, options.dsn)
        row("machine: processes that want one of its cores", os.getloadavg()[0], "")
        for part in wanted:
            run(part, world)
    row("the whole run", time.perf_counter() - began, "s")
    row.finish()


def run(part: str, world: World) -> None:
    """One part; that of PostgreSQL with a server, or a row that says there is none."""
    if part != "postgres" or world.dsn:
        PARTS[part](world)
        return
    with private_server() as world.dsn:
        if world.dsn:
            PARTS[part](world)
        else:
            world.row("PostgreSQL: not installed (Debian package postgresql)", 0, "")


if __name__ == "__main__":
    main()
