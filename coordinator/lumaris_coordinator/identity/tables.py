"""Peers, their certificates and their tokens."""

from __future__ import annotations

from typing import Final

from lumaris_coordinator.store.port import Migration

MIGRATIONS: Final = (
    Migration(
        "identity_0001",
        (
            """CREATE TABLE peer (
                peer TEXT PRIMARY KEY,
                number INTEGER NOT NULL UNIQUE,
                account TEXT NOT NULL UNIQUE,
                seller INTEGER NOT NULL CHECK (seller IN (0, 1)),
                addresses TEXT NOT NULL,
                serial INTEGER NOT NULL UNIQUE,
                certificate BLOB NOT NULL,
                registered_at INTEGER NOT NULL,
                expires_at INTEGER NOT NULL
            )""",
            "CREATE INDEX peer_by_time ON peer (registered_at) WHERE seller = 1",
            """CREATE TABLE used_challenge (
                challenge TEXT PRIMARY KEY,
                expires_at INTEGER NOT NULL
            )""",
            """CREATE TABLE token (
                id INTEGER PRIMARY KEY,
                hash BLOB NOT NULL UNIQUE,
                peer TEXT NOT NULL REFERENCES peer (peer),
                expires_at INTEGER NOT NULL
            )""",
            "CREATE INDEX token_by_peer ON token (peer)",
        ),
    ),
)
