"""Rows of peers, tokens and challenges."""

from __future__ import annotations

from typing import Final

from lumaris_coordinator.bounds import TOKENS_PER_HOLDER_MAX
from lumaris_coordinator.store.port import Connection, all_rows, first
from lumaris_protocol.errors import LumarisError


def use_challenge(connection: Connection, challenge: str, *, expires_at: int) -> None:
    """Mark a challenge as used. Raises LumarisError `replayed` when it was."""
    cursor = connection.execute(
        "INSERT INTO used_challenge (challenge, expires_at) VALUES (?, ?)"
        " ON CONFLICT (challenge) DO NOTHING",
        (challenge, expires_at),
    )
    if cursor.rowcount != 1:
        raise LumarisError("replayed", "The challenge was answered before.")


def next_serial(connection: Connection) -> int:
    """The serial of the next certificate; the newest registration always holds the highest."""
    row = first(connection, "SELECT coalesce(max(serial), 0) + 1 FROM peer")
    return int(row[0]) if row else 1


def account_of(connection: Connection, peer: str) -> str | None:
    """The account that a peer owns."""
    row = first(connection, "SELECT account FROM peer WHERE peer = ?", (peer,))
    return str(row[0]) if row else None


def is_full(connection: Connection, *, peers_max: int) -> bool:
    """Whether the table of peers has reached its bound. Numbers are dense: no peer is deleted."""
    row = first(connection, "SELECT coalesce(max(number), 0) FROM peer")
    return row is not None and row[0] >= peers_max


def save_peer(
    connection: Connection,
    *,
    peer: str,
    account: str,
    seller: bool,
    addresses: str,
    serial: int,
    certificate: bytes,
    now: int,
    expires_at: int,
) -> None:
    """Insert or renew a peer. Its account never changes."""
    connection.execute(
        "INSERT INTO peer (number, peer, account, seller, addresses, serial, certificate,"
        " registered_at, expires_at) VALUES ((SELECT coalesce(max(number), 0) + 1 FROM peer),"
        " ?, ?, ?, ?, ?, ?, ?, ?)"
        " ON CONFLICT (peer) DO UPDATE SET seller = excluded.seller,"
        " addresses = excluded.addresses, serial = excluded.serial,"
        " certificate = excluded.certificate, registered_at = excluded.registered_at,"
        " expires_at = excluded.expires_at",
        (peer, account, int(seller), addresses, serial, certificate, now, expires_at),
    )


def save_token(connection: Connection, *, token_hash: bytes, holder: str, expires_at: int) -> None:
    """Add a peer's or user's token and drop its oldest ones beyond the bound."""
    connection.execute(
        "INSERT INTO token (id, hash, holder, expires_at)"
        " VALUES ((SELECT coalesce(max(id), 0) + 1 FROM token), ?, ?, ?)",
        (token_hash, holder, expires_at),
    )
    connection.execute(
        "DELETE FROM token WHERE holder = ?1 AND id NOT IN"
        " (SELECT id FROM token WHERE holder = ?1 ORDER BY id DESC LIMIT ?2)",
        (holder, TOKENS_PER_HOLDER_MAX),
    )


def holder_of(connection: Connection, token_hash: bytes, *, now: int) -> str | None:
    """The peer id or user id of an unexpired token."""
    row = first(
        connection,
        "SELECT holder FROM token WHERE hash = ? AND expires_at > ?",
        (token_hash, now),
    )
    return str(row[0]) if row else None


def end_token(connection: Connection, holder: str, token_hash: bytes) -> bool:
    """End one token of a peer or user; whether there was one."""
    sql = "DELETE FROM token WHERE holder = ? AND hash = ?"
    return connection.execute(sql, (holder, token_hash)).rowcount == 1


def end_tokens(connection: Connection, holder: str, *, but: bytes = b"") -> None:
    """End a peer's or user's tokens, all `but` the one of that hash."""
    connection.execute("DELETE FROM token WHERE holder = ? AND hash <> ?", (holder, but))


def member(connection: Connection, peer: str) -> str | None:
    """The account of a peer that may begin something new; None when it never registered.

    Raises LumarisError `revoked`.
    """
    row = first(connection, "SELECT account, revoked_at FROM peer WHERE peer = ?", (peer,))
    if row is None:
        return None
    if row[1]:
        raise LumarisError("revoked", f"The peer {peer} was revoked.")
    return str(row[0])


def revoked_account(connection: Connection, peer: str) -> str:
    """The account of a revoked peer. Raises LumarisError `not_found` for any other."""
    sql = "SELECT account FROM peer WHERE peer = ? AND revoked_at > 0"
    row = first(connection, sql, (peer,))
    if row is None:
        raise LumarisError("not_found", "There is no such revoked peer.")
    return str(row[0])


_SELLING: Final = "seller = 1 AND expires_at > ? AND addresses <> '[]' AND revoked_at = 0"


def sellers(connection: Connection, *, now: int, limit: int) -> list[str]:
    """The addresses (JSON lists) of some sellers whose certificate is valid, by chance: whoever
    registers last or most often must not choose them."""
    sql = f"SELECT addresses FROM peer WHERE {_SELLING} ORDER BY random() LIMIT ?"
    return [str(row[0]) for row in all_rows(connection, sql, (now, limit))]


def bonded_sellers(connection: Connection, *, now: int, currency: str, limit: int) -> list[str]:
    """As `sellers`, of those that have a bond."""
    rows = all_rows(
        connection,
        "SELECT addresses FROM peer JOIN account ON account.id = 'bond:' || peer || ':' || ?"
        f" WHERE balance > 0 AND {_SELLING} ORDER BY random() LIMIT ?",
        (currency, now, limit),
    )
    return [str(row[0]) for row in rows]


_PRUNE: Final = tuple(
    f"DELETE FROM {table} WHERE {key} IN"
    f" (SELECT {key} FROM {table} WHERE expires_at <= ? ORDER BY expires_at LIMIT ?)"
    for table, key in (("token", "id"), ("api_key", "id"), ("used_challenge", "challenge"))
)


def prune(connection: Connection, *, now: int, limit: int) -> bool:
    """Forget expired tokens and keys, and used challenges that could not be used again anyway, some
    of each; whether there may be more."""
    gone = [connection.execute(sql, (now, limit)).rowcount for sql in _PRUNE]
    return max(gone) >= limit
