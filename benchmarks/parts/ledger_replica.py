"""One coordinator's writer in a process of its own: `DSN CLIENTS SECONDS`, begun by a line."""

from __future__ import annotations

import sys

from benchmarks.parts.ledger_store import group_rate
from lumaris_coordinator.store import postgres


def main() -> None:
    """Say that it is ready, wait for a line, and print the rate."""
    dsn, clients, seconds = sys.argv[1:]
    print("ready", flush=True)
    sys.stdin.readline()
    name = "replica"
    print(group_rate(lambda: postgres.write(dsn, name), int(clients), float(seconds), hot=True))


if __name__ == "__main__":
    main()
