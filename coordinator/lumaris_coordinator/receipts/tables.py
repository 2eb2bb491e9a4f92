"""The receipts log."""

from __future__ import annotations

from typing import Final

from lumaris_coordinator.store.port import Migration

MIGRATIONS: Final = (
    Migration(
        "receipts_0001",
        (
            """CREATE TABLE receipt (
                leaf INTEGER PRIMARY KEY,
                id TEXT NOT NULL UNIQUE,
                agreement_hash TEXT NOT NULL UNIQUE REFERENCES escrow (agreement_hash),
                envelope BLOB NOT NULL
            )""",
            """CREATE TABLE checkpoint (
                size INTEGER PRIMARY KEY,
                note TEXT NOT NULL,
                at INTEGER NOT NULL
            )""",
        ),
        append_only=("receipt", "checkpoint"),
    ),
)
