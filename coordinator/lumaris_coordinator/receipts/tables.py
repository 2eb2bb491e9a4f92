"""The receipts log: leaves, what they stand for, full tiles, signed heads and cosignatures."""

from __future__ import annotations

from typing import Final

from lumaris_coordinator.store.port import Migration

MIGRATIONS: Final = (
    Migration(
        "receipts_0001",
        (
            """CREATE TABLE leaf (
                leaf INTEGER PRIMARY KEY,
                commitment BLOB NOT NULL
            )""",
            """CREATE TABLE receipt (
                leaf INTEGER PRIMARY KEY REFERENCES leaf (leaf),
                id TEXT NOT NULL UNIQUE,
                agreement_hash TEXT NOT NULL UNIQUE REFERENCES escrow (agreement_hash),
                salt BLOB NOT NULL,
                envelope BLOB NOT NULL
            )""",
            """CREATE TABLE logged (
                leaf INTEGER PRIMARY KEY REFERENCES leaf (leaf),
                hash TEXT NOT NULL UNIQUE,
                salt BLOB NOT NULL,
                envelope BLOB NOT NULL
            )""",
            """CREATE TABLE tile (
                level INTEGER NOT NULL,
                n INTEGER NOT NULL,
                hashes BLOB NOT NULL,
                root BLOB NOT NULL,
                PRIMARY KEY (level, n)
            )""",
            """CREATE TABLE checkpoint (
                size INTEGER PRIMARY KEY,
                note TEXT NOT NULL,
                at INTEGER NOT NULL
            )""",
            """CREATE TABLE cosignature (
                size INTEGER NOT NULL REFERENCES checkpoint (size),
                witness TEXT NOT NULL,
                line TEXT NOT NULL,
                at INTEGER NOT NULL,
                PRIMARY KEY (size, witness)
            )""",
            "CREATE INDEX cosignature_by_witness ON cosignature (witness, size)",
        ),
        append_only=("leaf", "receipt", "logged", "tile", "checkpoint", "cosignature"),
    ),
)
