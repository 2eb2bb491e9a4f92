"""Escrows, their history, and what their parties added to them."""

from __future__ import annotations

from typing import Final

from lumaris_coordinator.store.port import Migration

MIGRATIONS: Final = (
    Migration(
        "escrow_0001",
        (
            """CREATE TABLE escrow (
                agreement_hash TEXT PRIMARY KEY,
                number INTEGER NOT NULL UNIQUE,
                session TEXT NOT NULL,
                buyer TEXT NOT NULL REFERENCES peer (peer),
                seller TEXT NOT NULL REFERENCES peer (peer),
                account TEXT NOT NULL UNIQUE REFERENCES account (id),
                currency TEXT NOT NULL,
                cap INTEGER NOT NULL CHECK (cap >= 0),
                paid INTEGER NOT NULL DEFAULT 0 CHECK (paid BETWEEN 0 AND cap),
                returned INTEGER NOT NULL DEFAULT 0 CHECK (returned BETWEEN 0 AND cap - paid),
                state TEXT NOT NULL,
                version INTEGER NOT NULL DEFAULT 0,
                not_after INTEGER NOT NULL,
                settle_by INTEGER NOT NULL CHECK (settle_by >= not_after),
                serial INTEGER NOT NULL UNIQUE,
                by_buyer BLOB NOT NULL,
                by_seller BLOB NOT NULL,
                budget_grant BLOB NOT NULL,
                voucher BLOB,
                voucher_total INTEGER NOT NULL DEFAULT 0 CHECK (voucher_total BETWEEN 0 AND cap),
                claimed_total INTEGER,
                close_by_buyer BLOB,
                close_by_seller BLOB,
                disputes INTEGER NOT NULL DEFAULT 0 CHECK (disputes >= 0),
                granted_at INTEGER NOT NULL,
                UNIQUE (buyer, session)
            )""",
            "CREATE INDEX escrow_by_session ON escrow (session)",
            "CREATE INDEX escrow_by_buyer ON escrow (buyer, number)",
            "CREATE INDEX escrow_by_seller ON escrow (seller, number)",
            "CREATE INDEX escrow_open ON escrow (settle_by) WHERE state IN ('held', 'claimed')",
            """CREATE TABLE escrow_event (
                agreement_hash TEXT NOT NULL REFERENCES escrow (agreement_hash),
                n INTEGER NOT NULL,
                fact TEXT NOT NULL,
                before TEXT NOT NULL,
                after TEXT NOT NULL,
                evidence TEXT NOT NULL,
                at INTEGER NOT NULL,
                PRIMARY KEY (agreement_hash, n)
            )""",
            """CREATE INDEX escrow_open_by_buyer ON escrow
            (buyer, state, currency, cap, paid, returned)
            WHERE state IN ('held', 'claimed', 'disputed')""",
            """CREATE TABLE amendment (
                agreement_hash TEXT NOT NULL REFERENCES escrow (agreement_hash),
                n INTEGER NOT NULL CHECK (n > 0),
                by_buyer BLOB NOT NULL,
                by_seller BLOB,
                budget_grant BLOB NOT NULL,
                at INTEGER NOT NULL,
                PRIMARY KEY (agreement_hash, n)
            )""",
            # Claims that may be evidence for the other side: one that was taken and one that was
            # refused, of each party.
            """CREATE TABLE escrow_claim (
                agreement_hash TEXT NOT NULL REFERENCES escrow (agreement_hash),
                party TEXT NOT NULL,
                taken INTEGER NOT NULL CHECK (taken IN (0, 1)),
                document BLOB NOT NULL,
                at INTEGER NOT NULL,
                PRIMARY KEY (agreement_hash, party, taken)
            )""",
            """CREATE TABLE escrow_ruling (
                agreement_hash TEXT NOT NULL REFERENCES escrow (agreement_hash),
                n INTEGER NOT NULL,
                ruling BLOB NOT NULL,
                award INTEGER NOT NULL CHECK (award >= 0),
                PRIMARY KEY (agreement_hash, n)
            )""",
        ),
        append_only=("escrow_event", "amendment", "escrow_ruling"),
    ),
)
