"""Users, peers, their certificates, tokens and keys, and what was revoked."""

from __future__ import annotations

from typing import Final

from lumaris_coordinator.store.port import Migration

MIGRATIONS: Final = (
    Migration(
        "identity_0001",
        (
            """CREATE TABLE users (
                id TEXT PRIMARY KEY,
                number INTEGER NOT NULL UNIQUE,
                name TEXT NOT NULL UNIQUE,
                password TEXT NOT NULL,
                operator INTEGER NOT NULL CHECK (operator IN (0, 1)),
                created_at INTEGER NOT NULL
            )""",
            """CREATE TABLE peer (
                peer TEXT PRIMARY KEY,
                number INTEGER NOT NULL UNIQUE,
                account TEXT NOT NULL UNIQUE,
                seller INTEGER NOT NULL CHECK (seller IN (0, 1)),
                addresses TEXT NOT NULL,
                serial INTEGER NOT NULL UNIQUE,
                certificate BLOB NOT NULL,
                registered_at INTEGER NOT NULL,
                expires_at INTEGER NOT NULL,
                owner TEXT REFERENCES users (id),
                linked_at INTEGER NOT NULL DEFAULT 0,
                revoked_at INTEGER NOT NULL DEFAULT 0
            )""",
            "CREATE INDEX peer_by_time ON peer (registered_at) WHERE seller = 1",
            "CREATE INDEX peer_by_owner ON peer (owner)",
            """CREATE TABLE used_challenge (
                challenge TEXT PRIMARY KEY,
                expires_at INTEGER NOT NULL
            )""",
            """CREATE TABLE token (
                id INTEGER PRIMARY KEY,
                hash BLOB NOT NULL UNIQUE,
                holder TEXT NOT NULL,
                expires_at INTEGER NOT NULL
            )""",
            "CREATE INDEX token_by_holder ON token (holder)",
            "CREATE INDEX token_by_end ON token (expires_at)",
            "CREATE INDEX used_challenge_by_end ON used_challenge (expires_at)",
            """CREATE TABLE api_key (
                id TEXT PRIMARY KEY,
                number INTEGER NOT NULL UNIQUE,
                holder TEXT NOT NULL REFERENCES users (id),
                hash BLOB NOT NULL,
                name TEXT NOT NULL,
                scopes TEXT NOT NULL,
                rate INTEGER NOT NULL CHECK (rate > 0),
                created_at INTEGER NOT NULL,
                expires_at INTEGER NOT NULL,
                used_at INTEGER NOT NULL DEFAULT 0,
                replaced INTEGER NOT NULL DEFAULT 0 CHECK (replaced IN (0, 1))
            )""",
            "CREATE INDEX api_key_by_holder ON api_key (holder)",
            """CREATE TABLE revocation (
                seq INTEGER PRIMARY KEY,
                peer TEXT NOT NULL,
                serial INTEGER NOT NULL,
                at INTEGER NOT NULL,
                reason TEXT NOT NULL,
                UNIQUE (peer, serial, at)
            )""",
        ),
        append_only=("revocation",),
    ),
)
