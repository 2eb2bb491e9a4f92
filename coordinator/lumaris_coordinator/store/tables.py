"""What belongs to the program itself: settings, and when it was away."""

from __future__ import annotations

from typing import Final

from lumaris_coordinator.store.port import Migration

MIGRATIONS: Final = (
    Migration(
        "store_0001",
        (
            "CREATE TABLE setting (name TEXT PRIMARY KEY, value TEXT NOT NULL)",
            """CREATE TABLE downtime (
                id INTEGER PRIMARY KEY,
                since INTEGER NOT NULL,
                until INTEGER NOT NULL CHECK (until > since)
            )""",
        ),
        append_only=("downtime",),
    ),
)
