"""Downtime: while the coordinator was away nobody could settle, so every deadline waits for it."""

from __future__ import annotations

from lumaris_coordinator.bounds import CHORES_EVERY_S
from lumaris_coordinator.escrow.store import extend_open
from lumaris_coordinator.ledger.bonds import extend_releases
from lumaris_coordinator.store.port import Connection, first


def beat(connection: Connection, *, now: int) -> None:
    """Note that the coordinator is up. It never goes back, so a clock set back adds no downtime."""
    connection.execute(
        "INSERT INTO setting (name, value) VALUES ('heartbeat', ?)"
        " ON CONFLICT (name) DO UPDATE SET value = excluded.value"
        " WHERE CAST(setting.value AS BIGINT) < CAST(excluded.value AS BIGINT)",
        (str(now),),
    )


def resume(connection: Connection, *, now: int) -> int:
    """A beat after some that could not be written: an outage in which nobody else was up either
    counts as downtime; how many seconds."""
    row = first(connection, "SELECT CAST(value AS BIGINT) FROM setting WHERE name = 'heartbeat'")
    if row is not None and now - int(row[0]) > 2 * CHORES_EVERY_S:
        return add_downtime(connection, now=now)
    beat(connection, now=now)
    return 0


def add_downtime(connection: Connection, *, now: int) -> int:
    """At start: extend open deadlines by the seconds since the last heartbeat; how many."""
    row = first(connection, "SELECT CAST(value AS BIGINT) FROM setting WHERE name = 'heartbeat'")
    gap = max(0, now - int(row[0])) if row else 0
    if gap:
        connection.execute(
            "INSERT INTO downtime (id, since, until)"
            " VALUES ((SELECT coalesce(max(id), 0) + 1 FROM downtime), ?, ?)",
            (now - gap, now),
        )
        extend_open(connection, seconds=gap)
        extend_releases(connection, seconds=gap)
    beat(connection, now=now)
    return gap
