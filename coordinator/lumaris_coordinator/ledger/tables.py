"""Accounts and what moves between them."""

from __future__ import annotations

from typing import Final

from lumaris_coordinator.store.port import Migration

MIGRATIONS: Final = (
    Migration(
        "ledger_0001",
        (
            """CREATE TABLE account (
                id TEXT PRIMARY KEY,
                owner TEXT NOT NULL,
                kind TEXT NOT NULL CHECK (
                kind IN ('peer', 'user', 'escrow', 'bond', 'dispute', 'fees', 'external')
            ),
                currency TEXT NOT NULL,
                balance INTEGER NOT NULL DEFAULT 0,
                may_negative INTEGER NOT NULL DEFAULT 0 CHECK (may_negative IN (0, 1)),
                credited INTEGER NOT NULL DEFAULT 0 CHECK (credited >= 0),
                credits INTEGER NOT NULL DEFAULT 0 CHECK (credits >= 0),
                UNIQUE (id, currency),
                CHECK (balance >= 0 OR may_negative = 1)
            )""",
            "CREATE INDEX account_by_owner ON account (owner, currency)",
            """CREATE TABLE txn (
                id INTEGER PRIMARY KEY,
                kind TEXT NOT NULL,
                ref TEXT NOT NULL,
                at INTEGER NOT NULL
            )""",
            """CREATE TABLE transfer (
                id INTEGER PRIMARY KEY,
                txn INTEGER NOT NULL REFERENCES txn (id),
                debit TEXT NOT NULL,
                credit TEXT NOT NULL,
                currency TEXT NOT NULL,
                amount INTEGER NOT NULL CHECK (amount > 0),
                FOREIGN KEY (debit, currency) REFERENCES account (id, currency),
                FOREIGN KEY (credit, currency) REFERENCES account (id, currency),
                CHECK (debit <> credit)
            )""",
            "CREATE INDEX transfer_by_debit ON transfer (debit)",
            "CREATE INDEX transfer_by_credit ON transfer (credit)",
            """CREATE TABLE credit (
                account TEXT NOT NULL REFERENCES account (id),
                nonce TEXT NOT NULL,
                amount INTEGER NOT NULL CHECK (amount > 0),
                txn INTEGER NOT NULL REFERENCES txn (id),
                PRIMARY KEY (account, nonce)
            )""",
            """CREATE TABLE bond_request (
                peer TEXT NOT NULL,
                nonce TEXT NOT NULL,
                document TEXT NOT NULL,
                answer BLOB NOT NULL,
                at INTEGER NOT NULL,
                PRIMARY KEY (peer, nonce)
            )""",
            "CREATE INDEX bond_request_by_time ON bond_request (at)",
            """CREATE TABLE bond_release (
                id INTEGER PRIMARY KEY,
                peer TEXT NOT NULL,
                currency TEXT NOT NULL,
                amount INTEGER NOT NULL CHECK (amount > 0),
                due INTEGER NOT NULL,
                paid INTEGER
            )""",
            "CREATE INDEX bond_release_open ON bond_release (due) WHERE paid IS NULL",
            "CREATE INDEX bond_release_by_peer ON bond_release (peer, currency) WHERE paid IS NULL",
        ),
        append_only=("txn", "transfer"),
    ),
)
