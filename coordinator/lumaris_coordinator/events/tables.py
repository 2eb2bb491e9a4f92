"""Events, whom they concern, and the answers kept for repeated requests. All of these are pruned:
what has happened stands in the ledger and with the escrows for ever."""

from __future__ import annotations

from typing import Final

from lumaris_coordinator.store.port import Migration

MIGRATIONS: Final = (
    Migration(
        "events_0001",
        (
            """CREATE TABLE event (
                id INTEGER PRIMARY KEY,
                kind TEXT NOT NULL,
                ref TEXT NOT NULL,
                at INTEGER NOT NULL,
                body TEXT NOT NULL
            )""",
            """CREATE TABLE event_party (
                party TEXT NOT NULL,
                event INTEGER NOT NULL REFERENCES event (id),
                PRIMARY KEY (party, event)
            )""",
            "CREATE INDEX event_party_by_event ON event_party (event)",
            """CREATE TABLE idempotency (
                principal TEXT NOT NULL,
                key_hash BLOB NOT NULL,
                number INTEGER NOT NULL,
                request_hash BLOB NOT NULL,
                status INTEGER NOT NULL,
                body BLOB NOT NULL,
                at INTEGER NOT NULL,
                PRIMARY KEY (principal, key_hash),
                UNIQUE (principal, number)
            )""",
            "CREATE INDEX idempotency_by_time ON idempotency (at)",
        ),
    ),
)
