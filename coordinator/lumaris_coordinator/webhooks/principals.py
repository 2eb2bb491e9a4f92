"""Whose events a principal receives when it is not there to ask."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from lumaris_coordinator.bounds import PEERS_PER_USER_MAX
from lumaris_coordinator.store.port import Connection, all_rows

# Both databases take some thousand values a statement.
_AT_ONCE = 500


def parties_of_principal(connection: Connection, principal: str) -> frozenset[str]:
    """The principal itself, and the peers that a user owns."""
    rows = all_rows(
        connection, "SELECT peer FROM peer WHERE owner = ? LIMIT ?", (principal, PEERS_PER_USER_MAX)
    )
    return frozenset((principal, *(str(row[0]) for row in rows)))


def principals_of_parties(connection: Connection, parties: Collection[str]) -> frozenset[str]:
    """The parties themselves, and the users that own them."""
    found, names = set(parties), sorted(parties)
    for start in range(0, len(names), _AT_ONCE):
        found |= _owners(connection, names[start : start + _AT_ONCE])
    return frozenset(found)


def _owners(connection: Connection, peers: Sequence[str]) -> set[str]:
    marks = ", ".join("?" * len(peers))
    rows = all_rows(
        connection,
        f"SELECT DISTINCT owner FROM peer"  # noqa: S608 - our own text
        f" WHERE owner IS NOT NULL AND peer IN ({marks})",
        tuple(peers),
    )
    return {str(row[0]) for row in rows}
