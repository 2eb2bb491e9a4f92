"""Escrows and their history."""

from __future__ import annotations

from typing import Final

from lumaris_coordinator.store.port import Migration

MIGRATIONS: Final = (
    Migration(
        "escrow_0001",
        (
            """CREATE TABLE escrow (
                agreement_hash TEXT PRIMARY KEY,
                session TEXT NOT NULL,
                buyer TEXT NOT NULL REFERENCES peer (peer),
                seller TEXT NOT NULL REFERENCES peer (peer),
                account TEXT NOT NULL UNIQUE REFERENCES account (id),
                cap INTEGER NOT NULL CHECK (cap >= 0),
                paid INTEGER NOT NULL DEFAULT 0 CHECK (paid BETWEEN 0 AND cap),
                state TEXT NOT NULL,
                version INTEGER NOT NULL DEFAULT 0,
                settle_by INTEGER NOT NULL,
                serial INTEGER NOT NULL UNIQUE,
                by_buyer BLOB NOT NULL,
                by_seller BLOB NOT NULL,
                budget_grant BLOB NOT NULL,
                voucher BLOB,
                voucher_total INTEGER NOT NULL DEFAULT 0 CHECK (voucher_total BETWEEN 0 AND cap),
                claimed_total INTEGER,
                granted_at INTEGER NOT NULL,
                UNIQUE (buyer, session)
            )""",
            "CREATE INDEX escrow_by_session ON escrow (session)",
            "CREATE INDEX escrow_open ON escrow (settle_by) WHERE state IN ('held', 'claimed')",
            """CREATE TABLE escrow_event (
                id INTEGER PRIMARY KEY,
                agreement_hash TEXT NOT NULL REFERENCES escrow (agreement_hash),
                n INTEGER NOT NULL,
                fact TEXT NOT NULL,
                before TEXT NOT NULL,
                after TEXT NOT NULL,
                evidence TEXT NOT NULL,
                at INTEGER NOT NULL,
                UNIQUE (agreement_hash, n)
            )""",
            """CREATE INDEX escrow_open_by_buyer ON escrow (buyer, state, cap)
            WHERE state IN ('held', 'claimed')""",
        ),
        append_only=("escrow_event",),
    ),
)
