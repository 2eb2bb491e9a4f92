"""Disputes, their evidence as it was signed, and the draws of checkers."""

from __future__ import annotations

from typing import Final

from lumaris_coordinator.store.port import Migration

MIGRATIONS: Final = (
    Migration(
        "disputes_0001",
        (
            """CREATE TABLE dispute (
                id TEXT PRIMARY KEY,
                number INTEGER NOT NULL UNIQUE,
                agreement_hash TEXT NOT NULL REFERENCES escrow (agreement_hash),
                buyer TEXT NOT NULL REFERENCES peer (peer),
                seller TEXT NOT NULL REFERENCES peer (peer),
                opener TEXT NOT NULL REFERENCES peer (peer),
                opened TEXT NOT NULL,
                claim TEXT NOT NULL,
                order_n INTEGER NOT NULL,
                currency TEXT NOT NULL,
                amount INTEGER NOT NULL CHECK (amount >= 0),
                bond INTEGER NOT NULL CHECK (bond >= 0),
                stake INTEGER NOT NULL CHECK (stake >= 0),
                wanted INTEGER NOT NULL DEFAULT 0 CHECK (wanted >= 0),
                refund_max INTEGER NOT NULL CHECK (refund_max >= 0),
                vouchered INTEGER NOT NULL CHECK (vouchered >= 0),
                frozen INTEGER NOT NULL CHECK (frozen IN (0, 1)),
                state TEXT NOT NULL,
                version INTEGER NOT NULL DEFAULT 0,
                opened_at INTEGER NOT NULL,
                evidence_until INTEGER NOT NULL,
                check_until INTEGER,
                due_at INTEGER NOT NULL,
                split_by_buyer BLOB,
                split_by_seller BLOB,
                withdrawal BLOB,
                ruling BLOB,
                fault TEXT NOT NULL DEFAULT '',
                refunded INTEGER NOT NULL DEFAULT 0 CHECK (refunded >= 0),
                owed INTEGER NOT NULL DEFAULT 0 CHECK (owed >= owed_refund),
                owed_refund INTEGER NOT NULL DEFAULT 0 CHECK (owed_refund >= 0),
                ended_at INTEGER
            )""",
            "CREATE INDEX dispute_by_agreement ON dispute (agreement_hash, opener)",
            "CREATE INDEX dispute_by_buyer ON dispute (buyer, number)",
            "CREATE INDEX dispute_by_seller ON dispute (seller, number)",
            """CREATE INDEX dispute_open ON dispute (due_at, number)
            WHERE state IN ('opened', 'evidence', 'checking')""",
            """CREATE INDEX dispute_open_by_opener ON dispute (opener)
            WHERE state IN ('opened', 'evidence', 'checking')""",
            """CREATE INDEX dispute_open_by_buyer ON dispute (buyer)
            WHERE state IN ('opened', 'evidence', 'checking')""",
            """CREATE INDEX dispute_open_by_seller ON dispute (seller)
            WHERE state IN ('opened', 'evidence', 'checking')""",
            "CREATE INDEX dispute_owed_by_buyer ON dispute (buyer) WHERE owed > 0",
            "CREATE INDEX dispute_owed_by_seller ON dispute (seller) WHERE owed > 0",
            # The opening is kept in the log, once.
            """CREATE TABLE dispute_bundle (
                dispute TEXT NOT NULL REFERENCES dispute (id),
                n INTEGER NOT NULL CHECK (n > 0),
                party TEXT NOT NULL,
                done INTEGER NOT NULL CHECK (done IN (0, 1)),
                hash TEXT NOT NULL,
                envelope BLOB NOT NULL,
                at INTEGER NOT NULL,
                PRIMARY KEY (dispute, n)
            )""",
            # By the hash of the signed list, which is kept in the log.
            """CREATE TABLE dispute_list (
                dispute TEXT NOT NULL REFERENCES dispute (id),
                round INTEGER NOT NULL CHECK (round >= 0),
                hash TEXT NOT NULL,
                PRIMARY KEY (dispute, round)
            )""",
            """CREATE TABLE dispute_draw (
                dispute TEXT NOT NULL REFERENCES dispute (id),
                round INTEGER NOT NULL CHECK (round >= 0),
                checker TEXT NOT NULL REFERENCES peer (peer),
                envelope BLOB NOT NULL,
                PRIMARY KEY (dispute, round)
            )""",
            # Candidates of a draw are read in the order of their bonds, not out of all peers.
            """CREATE INDEX account_bond ON account (currency, balance)
            WHERE kind = 'bond' AND balance > 0""",
            """CREATE TABLE dispute_event (
                dispute TEXT NOT NULL REFERENCES dispute (id),
                n INTEGER NOT NULL,
                fact TEXT NOT NULL,
                before TEXT NOT NULL,
                after TEXT NOT NULL,
                evidence TEXT NOT NULL,
                at INTEGER NOT NULL,
                PRIMARY KEY (dispute, n)
            )""",
        ),
        append_only=("dispute_bundle", "dispute_list", "dispute_draw", "dispute_event"),
    ),
)
