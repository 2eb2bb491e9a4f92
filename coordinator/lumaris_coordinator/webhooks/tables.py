"""Webhook endpoints and their last deliveries."""

from __future__ import annotations

from typing import Final

from lumaris_coordinator.store.port import Migration

MIGRATIONS: Final = (
    Migration(
        "webhooks_0001",
        (
            """CREATE TABLE webhook (
                id TEXT PRIMARY KEY,
                principal TEXT NOT NULL,
                url TEXT NOT NULL,
                kinds TEXT NOT NULL,
                secret BLOB NOT NULL,
                state TEXT NOT NULL CHECK (state IN ('active', 'disabled')),
                reason TEXT NOT NULL DEFAULT '',
                seen INTEGER NOT NULL,
                failures INTEGER NOT NULL DEFAULT 0,
                failing_since INTEGER,
                due_at INTEGER,
                lease TEXT NOT NULL DEFAULT '',
                lease_until INTEGER NOT NULL DEFAULT 0,
                version INTEGER NOT NULL DEFAULT 1,
                created_at INTEGER NOT NULL
            )""",
            "CREATE INDEX webhook_by_principal ON webhook (principal)",
            "CREATE INDEX webhook_due ON webhook (due_at) WHERE due_at IS NOT NULL",
            """CREATE TABLE webhook_delivery (
                webhook TEXT NOT NULL,
                number INTEGER NOT NULL,
                event INTEGER NOT NULL,
                attempt INTEGER NOT NULL,
                at INTEGER NOT NULL,
                outcome TEXT NOT NULL,
                status INTEGER,
                took_ms INTEGER NOT NULL,
                PRIMARY KEY (webhook, number)
            )""",
        ),
    ),
)
