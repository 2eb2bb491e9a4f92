"""Rows of users, their API keys and the peers they own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

from msgspec import Meta

from lumaris_coordinator.bounds import OPERATORS_MAX
from lumaris_coordinator.identity.caller import Caller
from lumaris_coordinator.store.port import Connection, all_rows, first
from lumaris_coordinator.webhooks import store as webhooks

UserName = Annotated[
    str, Meta(min_length=3, max_length=64, pattern=r"^[A-Za-z0-9][A-Za-z0-9._@+-]*\Z")
]


@dataclass(frozen=True)
class User:
    """Somebody with a name. An operator has no password: it logs in with nothing but keys."""

    id: str
    name: str
    password: str
    operator: bool
    created_at: int


@dataclass(frozen=True)
class ApiKey:
    """One key of a user. `replaced`: another one was made in its place, it ends soon."""

    id: str
    holder: str
    hash: bytes
    name: str
    scopes: tuple[str, ...]
    rate: int
    created_at: int
    expires_at: int
    used_at: int
    replaced: bool

    def shown(self) -> dict[str, Any]:
        """What its owner is told of it; never the secret."""
        return {
            "id": self.id,
            "name": self.name,
            "scopes": list(self.scopes),
            "rate_per_s": self.rate,
            "created_at": self.created_at,
            "expires_at": self.expires_at,
            "last_used_at": self.used_at or None,
            "replaced": self.replaced,
        }


_USER = "SELECT id, name, password, operator, created_at FROM users"
_KEY = (
    "SELECT id, holder, hash, name, scopes, rate, created_at, expires_at, used_at, replaced"
    " FROM api_key"
)


def find(connection: Connection, user: str) -> User | None:
    """A user by its id."""
    return _user(first(connection, f"{_USER} WHERE id = ?", (user,)))


def by_name(connection: Connection, name: str) -> User | None:
    """A user by its name."""
    return _user(first(connection, f"{_USER} WHERE name = ?", (name,)))


def insert(connection: Connection, user: User) -> None:
    """Add a user; the name must be free."""
    connection.execute(
        "INSERT INTO users (id, number, name, password, operator, created_at) VALUES"
        " (?, (SELECT coalesce(max(number), 0) + 1 FROM users), ?, ?, ?, ?)",
        (user.id, user.name, user.password, int(user.operator), user.created_at),
    )


def count(connection: Connection) -> int:
    """How many users there are, operators not counted."""
    row = first(connection, "SELECT count(*) FROM users WHERE operator = 0")
    return int(row[0]) if row else 0


def page(connection: Connection, after: int, limit: int) -> list[tuple[str, int, int]]:
    """(id, number, made at) of users with a number above `after`, operators left out."""
    rows = all_rows(
        connection,
        "SELECT id, number, created_at FROM users WHERE number > ? AND operator = 0"
        " ORDER BY number LIMIT ?",
        (after, limit),
    )
    return [(str(user), int(number), int(at)) for user, number, at in rows]


def forget(connection: Connection, user: str, *, before: int) -> bool:
    """Delete a user from before a time who has no token, key or peer and never had any money;
    whether it was so."""
    gone = connection.execute(
        "DELETE FROM users WHERE id = ?1 AND created_at <= ?2 AND operator = 0"
        " AND NOT EXISTS (SELECT 1 FROM token WHERE holder = ?1)"
        " AND NOT EXISTS (SELECT 1 FROM api_key WHERE holder = ?1)"
        " AND NOT EXISTS (SELECT 1 FROM peer WHERE owner = ?1)"
        " AND NOT EXISTS (SELECT 1 FROM account JOIN transfer"
        " ON transfer.debit = account.id OR transfer.credit = account.id WHERE account.owner = ?1)",
        (user, before),
    )
    if gone.rowcount != 1:
        return False
    connection.execute("DELETE FROM account WHERE owner = ?", (user,))
    for webhook in webhooks.of_principal(connection, user):
        webhooks.delete(connection, webhook.id)
    return True


def set_password(connection: Connection, user: str, password: str) -> None:
    """Replace a user's password."""
    connection.execute("UPDATE users SET password = ? WHERE id = ?", (password, user))


def peers_of(connection: Connection, user: str) -> list[str]:
    """The peers that a user owns."""
    rows = all_rows(connection, "SELECT peer FROM peer WHERE owner = ? ORDER BY peer", (user,))
    return [str(row[0]) for row in rows]


def caller(connection: Connection, user: User, scopes: frozenset[str]) -> Caller:
    """A user as the one who asks."""
    return Caller(
        kind="operator" if user.operator else "user",
        id=user.id,
        peer="",
        account=user.id,
        peers=frozenset(peers_of(connection, user.id)),
        scopes=scopes,
        counted_as=user.id,
    )


def owner_of(connection: Connection, peer: str) -> tuple[str | None, int] | None:
    """(owner, when that last changed) of a registered peer."""
    row = first(connection, "SELECT owner, linked_at FROM peer WHERE peer = ?", (peer,))
    return (row[0], int(row[1])) if row else None


def set_owner(connection: Connection, peer: str, owner: str | None, *, now: int) -> None:
    """Link a peer to a user, or to nobody."""
    connection.execute(
        "UPDATE peer SET owner = ?, linked_at = ? WHERE peer = ?", (owner, now, peer)
    )


def find_key(connection: Connection, name: str, *, now: int) -> ApiKey | None:
    """An unexpired key by its id."""
    return _key(first(connection, f"{_KEY} WHERE id = ? AND expires_at > ?", (name, now)))


def keys_of(connection: Connection, user: str, *, now: int) -> list[ApiKey]:
    """A user's unexpired keys, oldest first: at most twice API_KEYS_PER_USER_MAX."""
    rows = all_rows(
        connection, f"{_KEY} WHERE holder = ? AND expires_at > ? ORDER BY number", (user, now)
    )
    return [key for row in rows if (key := _key(row)) is not None]


def insert_key(connection: Connection, key: ApiKey) -> None:
    """Add a key."""
    connection.execute(
        "INSERT INTO api_key (id, number, holder, hash, name, scopes, rate, created_at, expires_at)"
        " VALUES (?, (SELECT coalesce(max(number), 0) + 1 FROM api_key), ?, ?, ?, ?, ?, ?, ?)",
        (
            key.id,
            key.holder,
            key.hash,
            key.name,
            " ".join(key.scopes),
            key.rate,
            key.created_at,
            key.expires_at,
        ),
    )


def replace_key(connection: Connection, name: str, *, ends: int) -> None:
    """Another key was made in its place: let it end no later than that."""
    connection.execute(
        "UPDATE api_key SET replaced = 1,"
        " expires_at = CASE WHEN expires_at < ?1 THEN expires_at ELSE ?1 END WHERE id = ?2",
        (ends, name),
    )


def key_used(connection: Connection, name: str, *, now: int) -> None:
    """Note that a key was used."""
    connection.execute("UPDATE api_key SET used_at = ? WHERE id = ?", (now, name))


def operators(connection: Connection) -> list[User]:
    """The operators, oldest first: no more than somebody with the keys has made."""
    rows = all_rows(connection, f"{_USER} WHERE operator = 1 ORDER BY number LIMIT {OPERATORS_MAX}")
    return [user for row in rows if (user := _user(row)) is not None]


def end_keys(connection: Connection, user: str) -> int:
    """End every key of a user; how many there were."""
    return connection.execute("DELETE FROM api_key WHERE holder = ?", (user,)).rowcount


def delete_key(connection: Connection, name: str, user: str) -> bool:
    """End a user's key; whether there was one."""
    cursor = connection.execute("DELETE FROM api_key WHERE id = ? AND holder = ?", (name, user))
    return cursor.rowcount == 1


def _user(row: tuple[Any, ...] | None) -> User | None:
    return User(row[0], row[1], row[2], bool(row[3]), row[4]) if row else None


def _key(row: tuple[Any, ...] | None) -> ApiKey | None:
    if row is None:
        return None
    name, holder, digest, label, scopes, *numbers = row
    rate, created_at, expires_at, used_at, replaced = numbers
    return ApiKey(
        id=name,
        holder=holder,
        hash=bytes(digest),
        name=label,
        scopes=tuple(str(scopes).split()),
        rate=rate,
        created_at=created_at,
        expires_at=expires_at,
        used_at=used_at,
        replaced=bool(replaced),
    )
