"""The tables, as named migrations. What must never change is guarded by triggers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from sqlite_utils import Database
from sqlite_utils.migrations import Migrations

if TYPE_CHECKING:
    from lumaris_coordinator.store.sqlite import Connection

_MIGRATIONS: Final = Migrations("lumaris_coordinator")

_TABLES: Final = (
    "CREATE TABLE setting (name TEXT PRIMARY KEY, value TEXT NOT NULL) STRICT, WITHOUT ROWID",
    """CREATE TABLE account (
        id TEXT PRIMARY KEY,
        kind TEXT NOT NULL CHECK (kind IN ('peer', 'escrow', 'fees', 'external')),
        currency TEXT NOT NULL,
        balance INTEGER NOT NULL DEFAULT 0,
        may_negative INTEGER NOT NULL DEFAULT 0 CHECK (may_negative IN (0, 1)),
        CHECK (balance >= 0 OR may_negative)
    ) STRICT, WITHOUT ROWID""",
    """CREATE TABLE txn (
        id INTEGER PRIMARY KEY,
        kind TEXT NOT NULL,
        ref TEXT NOT NULL,
        at INTEGER NOT NULL
    ) STRICT""",
    """CREATE TABLE transfer (
        id INTEGER PRIMARY KEY,
        txn INTEGER NOT NULL REFERENCES txn (id),
        debit TEXT NOT NULL REFERENCES account (id),
        credit TEXT NOT NULL REFERENCES account (id),
        amount INTEGER NOT NULL CHECK (amount > 0),
        CHECK (debit <> credit)
    ) STRICT""",
    "CREATE INDEX transfer_by_debit ON transfer (debit)",
    "CREATE INDEX transfer_by_credit ON transfer (credit)",
    """CREATE TABLE peer (
        peer TEXT PRIMARY KEY,
        account TEXT NOT NULL UNIQUE REFERENCES account (id),
        seller INTEGER NOT NULL CHECK (seller IN (0, 1)),
        addresses TEXT NOT NULL,
        serial INTEGER NOT NULL UNIQUE,
        certificate BLOB NOT NULL,
        registered_at INTEGER NOT NULL,
        expires_at INTEGER NOT NULL
    ) STRICT""",
    "CREATE INDEX peer_by_time ON peer (registered_at) WHERE seller",
    """CREATE TABLE used_challenge (
        challenge TEXT PRIMARY KEY,
        expires_at INTEGER NOT NULL
    ) STRICT, WITHOUT ROWID""",
    """CREATE TABLE token (
        id INTEGER PRIMARY KEY,
        hash BLOB NOT NULL UNIQUE,
        peer TEXT NOT NULL REFERENCES peer (peer),
        expires_at INTEGER NOT NULL
    ) STRICT""",
    "CREATE INDEX token_by_peer ON token (peer)",
    """CREATE TABLE credit (
        account TEXT NOT NULL REFERENCES account (id),
        nonce TEXT NOT NULL,
        amount INTEGER NOT NULL CHECK (amount > 0),
        txn INTEGER NOT NULL REFERENCES txn (id),
        PRIMARY KEY (account, nonce)
    ) STRICT, WITHOUT ROWID""",
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
    ) STRICT""",
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
    ) STRICT""",
    """CREATE TABLE receipt (
        leaf INTEGER PRIMARY KEY,
        id TEXT NOT NULL UNIQUE,
        agreement_hash TEXT NOT NULL UNIQUE REFERENCES escrow (agreement_hash),
        envelope BLOB NOT NULL
    ) STRICT""",
    """CREATE TABLE checkpoint (
        size INTEGER PRIMARY KEY,
        note TEXT NOT NULL,
        at INTEGER NOT NULL
    ) STRICT""",
    """CREATE TABLE downtime (
        id INTEGER PRIMARY KEY,
        since INTEGER NOT NULL,
        until INTEGER NOT NULL CHECK (until > since)
    ) STRICT""",
)
_APPEND_ONLY: Final = ("txn", "transfer", "escrow_event", "receipt", "checkpoint", "downtime")


@_MIGRATIONS(name="0001_tables")
def _tables(database: Database) -> None:
    for statement in _TABLES:
        database.execute(statement)


@_MIGRATIONS(name="0002_append_only")
def _append_only(database: Database) -> None:
    for table in _APPEND_ONLY:
        for verb in ("UPDATE", "DELETE"):
            database.execute(
                f"CREATE TRIGGER {table}_no_{verb.lower()} BEFORE {verb} ON {table} "
                f"BEGIN SELECT RAISE(ABORT, '{table} is append-only'); END"
            )


@_MIGRATIONS(name="0003_credited")
def _credited(database: Database) -> None:
    """Keep each account's credit on its row: summing its history would stop the writer."""
    for column in ("credited", "credits"):
        database.execute(
            f"ALTER TABLE account ADD COLUMN {column} INTEGER NOT NULL DEFAULT 0"
            f" CHECK ({column} >= 0)"
        )
    database.execute(
        "UPDATE account SET credited = given.amount, credits = given.number FROM"
        " (SELECT account, sum(amount) AS amount, count(*) AS number FROM credit GROUP BY account)"
        " AS given WHERE given.account = account.id"
    )


@_MIGRATIONS(name="0004_open_by_buyer")
def _open_by_buyer(database: Database) -> None:
    database.execute(
        "CREATE INDEX escrow_open_by_buyer ON escrow (buyer, state, cap)"
        " WHERE state IN ('held', 'claimed')"
    )


def migrate(connection: Connection) -> None:
    """Bring the tables to this version. Each migration is one transaction."""
    _MIGRATIONS.apply(Database(connection))
