"""Deposits, payouts, and what the comparison of the books found."""

from __future__ import annotations

from typing import Final

from lumaris_coordinator.store.port import Migration

MIGRATIONS: Final = (
    Migration(
        "money_0001",
        (
            """CREATE TABLE deposit (
                adapter TEXT NOT NULL,
                currency TEXT NOT NULL,
                event TEXT NOT NULL,
                account TEXT NOT NULL REFERENCES account (id),
                amount INTEGER NOT NULL CHECK (amount > 0),
                state TEXT NOT NULL CHECK (state IN ('seen', 'credited', 'void')),
                txn INTEGER REFERENCES txn (id),
                seen_at INTEGER NOT NULL,
                PRIMARY KEY (adapter, currency, event),
                CHECK ((state = 'credited') = (txn IS NOT NULL))
            )""",
            """CREATE TABLE deposit_cursor (
                adapter TEXT NOT NULL,
                currency TEXT NOT NULL,
                position TEXT NOT NULL,
                PRIMARY KEY (adapter, currency)
            )""",
            """CREATE TABLE payout (
                id TEXT PRIMARY KEY,
                number INTEGER NOT NULL UNIQUE,
                party TEXT NOT NULL,
                account TEXT NOT NULL REFERENCES account (id),
                held_in TEXT NOT NULL UNIQUE REFERENCES account (id),
                adapter TEXT NOT NULL,
                currency TEXT NOT NULL,
                amount INTEGER NOT NULL CHECK (amount > 0),
                state TEXT NOT NULL CHECK (
                    state IN ('requested', 'held', 'sent', 'paid', 'failed', 'returned')
                ),
                version INTEGER NOT NULL DEFAULT 0,
                reference TEXT NOT NULL DEFAULT '',
                reason TEXT NOT NULL DEFAULT '',
                requested_at INTEGER NOT NULL,
                tries INTEGER NOT NULL DEFAULT 0,
                next_at INTEGER NOT NULL DEFAULT 0
            )""",
            "CREATE INDEX payout_by_account ON payout (account, number)",
            "CREATE INDEX payout_by_state ON payout (state, next_at)",
            """CREATE TABLE payout_event (
                payout TEXT NOT NULL REFERENCES payout (id),
                n INTEGER NOT NULL,
                fact TEXT NOT NULL,
                before TEXT NOT NULL,
                after TEXT NOT NULL,
                at INTEGER NOT NULL,
                PRIMARY KEY (payout, n)
            )""",
            """CREATE TABLE reconciliation (
                id INTEGER PRIMARY KEY,
                adapter TEXT NOT NULL,
                currency TEXT NOT NULL,
                day INTEGER NOT NULL,
                provider_nanos INTEGER NOT NULL,
                ledger_nanos INTEGER NOT NULL,
                pending_nanos INTEGER NOT NULL,
                difference_nanos INTEGER NOT NULL,
                at INTEGER NOT NULL,
                CHECK (difference_nanos = provider_nanos - ledger_nanos - pending_nanos)
            )""",
            "CREATE INDEX reconciliation_newest ON reconciliation (adapter, currency, id)",
            # The books of the provider inside: what it was told to pay.
            """CREATE TABLE test_credit_payout (
                id TEXT PRIMARY KEY,
                currency TEXT NOT NULL,
                amount INTEGER NOT NULL CHECK (amount > 0)
            )""",
            "CREATE INDEX credit_by_txn ON credit (txn)",
        ),
        append_only=("payout_event", "reconciliation", "test_credit_payout"),
    ),
)
