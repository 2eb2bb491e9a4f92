"""Rows of webhooks and of what was delivered. Runs inside the writer's savepoint or a read."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from lumaris_coordinator.bounds import WEBHOOK_DELIVERIES_KEPT, WEBHOOK_LEASE_S
from lumaris_coordinator.store.port import Connection, Row, all_rows, first

_COLUMNS = (
    "id, principal, url, kinds, secret, state, reason, seen, failures, failing_since,"
    " version, created_at"
)

# Both databases take some thousand values a statement.
_AT_ONCE = 500


@dataclass(frozen=True)
class Webhook:
    """One endpoint. `seen` is the last event that needs no delivery any more."""

    id: str
    principal: str
    url: str
    kinds: tuple[str, ...]
    secret: bytes
    state: str
    reason: str
    seen: int
    failures: int
    failing_since: int | None
    version: int
    created_at: int

    def wants(self, kind: str) -> bool:
        """Whether it asked for events of this kind; without a list it gets all."""
        return not self.kinds or kind in self.kinds

    def shown(self) -> dict[str, Any]:
        """The endpoint as its owner sees it. The secret is told once, when it is made."""
        return {
            "id": self.id,
            "url": self.url,
            "kinds": list(self.kinds),
            "state": self.state,
            "reason": self.reason,
            "seen": self.seen,
            "failures": self.failures,
            "failing_since": self.failing_since,
            "created_at": self.created_at,
        }


def _webhook(row: Row) -> Webhook:
    values = list(row)
    values[3] = tuple(row[3].split())
    values[4] = bytes(row[4])
    return Webhook(*values)


def count(connection: Connection, principal: str | None = None) -> int:
    """How many there are, of a principal or in all."""
    where, values = ("", ()) if principal is None else (" WHERE principal = ?", (principal,))
    row = first(connection, f"SELECT count(*) FROM webhook{where}", values)
    return int(row[0]) if row else 0


def insert(connection: Connection, webhook: Webhook) -> None:
    """Keep a new endpoint."""
    connection.execute(
        "INSERT INTO webhook (id, principal, url, kinds, secret, state, seen, created_at)"
        " VALUES (?, ?, ?, ?, ?, 'active', ?, ?)",
        (
            webhook.id,
            webhook.principal,
            webhook.url,
            " ".join(webhook.kinds),
            webhook.secret,
            webhook.seen,
            webhook.created_at,
        ),
    )


def find(connection: Connection, webhook: str) -> Webhook | None:
    """One endpoint."""
    row = first(
        connection,
        f"SELECT {_COLUMNS} FROM webhook WHERE id = ?",
        (webhook,),
    )
    return _webhook(row) if row else None


def of_principal(connection: Connection, principal: str) -> list[Webhook]:
    """A principal's endpoints, oldest first."""
    rows = all_rows(
        connection,
        f"SELECT {_COLUMNS} FROM webhook WHERE principal = ? ORDER BY created_at, id",
        (principal,),
    )
    return [_webhook(row) for row in rows]


def delete(connection: Connection, webhook: str) -> None:
    """Forget an endpoint and its deliveries."""
    connection.execute("DELETE FROM webhook_delivery WHERE webhook = ?", (webhook,))
    connection.execute("DELETE FROM webhook WHERE id = ?", (webhook,))


def rewind(connection: Connection, webhook: str, *, after: int, now: int) -> None:
    """Begin again after an event: active, due at once, and whoever is at it has lost its lease."""
    connection.execute(
        "UPDATE webhook SET state = 'active', reason = '', seen = ?, failures = 0,"
        " failing_since = NULL, due_at = ?, lease = '', lease_until = 0, version = version + 1"
        " WHERE id = ?",
        (after, now, webhook),
    )


def idle_behind(connection: Connection, *, head: int) -> dict[str, str]:
    """Active endpoints that nobody is known to be at and that may have missed events, with their
    principals."""
    rows = all_rows(
        connection,
        "SELECT id, principal FROM webhook WHERE state = 'active' AND due_at IS NULL AND seen < ?",
        (head,),
    )
    return {str(name): str(principal) for name, principal in rows}


def due(connection: Connection, *, now: int, limit: int) -> dict[str, str]:
    """Endpoints whose next attempt is due, or whose process went away in the middle of one, with
    their principals."""
    rows = all_rows(
        connection,
        "SELECT id, principal FROM webhook WHERE due_at <= ? AND state = 'active'"
        " ORDER BY due_at LIMIT ?",
        (now, limit),
    )
    return {str(name): str(principal) for name, principal in rows}


def of_principals(connection: Connection, principals: Collection[str]) -> dict[str, str]:
    """The active endpoints of any of the principals, each with its own."""
    found: dict[str, str] = {}
    names = sorted(principals)
    for start in range(0, len(names), _AT_ONCE):
        part = names[start : start + _AT_ONCE]
        marks = ", ".join("?" * len(part))
        rows = all_rows(
            connection,
            f"SELECT id, principal FROM webhook WHERE state = 'active' AND principal IN ({marks})",
            tuple(part),
        )
        found.update((str(name), str(principal)) for name, principal in rows)
    return found


def is_free(connection: Connection, webhook: str, *, now: int) -> bool:
    """Whether `take` would give it."""
    row = first(
        connection,
        "SELECT 1 FROM webhook WHERE id = ? AND state = 'active' AND lease_until <= ?"
        " AND (failures = 0 OR due_at <= ?)",
        (webhook, now, now),
    )
    return row is not None


def is_due(connection: Connection, webhook: str, *, now: int) -> bool:
    """Whether its time has come, for a delivery or to look for one."""
    row = first(connection, "SELECT 1 FROM webhook WHERE id = ? AND due_at <= ?", (webhook, now))
    return row is not None


def take(connection: Connection, webhook: str, *, lease: str, now: int) -> Webhook | None:
    """Lease an endpoint that is due: while it lasts nobody else delivers to it. Its due time is
    the lease's end, so that the work of a process that dies is taken up then."""
    row = first(
        connection,
        "UPDATE webhook SET lease = ?1, lease_until = ?2, due_at = ?2"
        " WHERE id = ?3 AND state = 'active' AND lease_until <= ?4"
        f" AND (failures = 0 OR due_at <= ?4) RETURNING {_COLUMNS}",
        (lease, now + WEBHOOK_LEASE_S, webhook, now),
    )
    return _webhook(row) if row else None


def advance(
    connection: Connection, webhook: str, *, lease: str, before: int, seen: int, now: int
) -> bool:
    """An event was delivered, or was none of its own: go on after it. False when the lease or the
    place is not ours any more."""
    cursor = connection.execute(
        "UPDATE webhook SET seen = ?1, failures = 0, failing_since = NULL,"
        " lease_until = ?2, due_at = ?2 WHERE id = ?3 AND lease = ?4 AND seen = ?5",
        (seen, now + WEBHOOK_LEASE_S, webhook, lease, before),
    )
    return cursor.rowcount == 1


def put_off(
    connection: Connection, webhook: str, *, lease: str, due_at: int | None, now: int, failed: bool
) -> None:
    """Give the lease back; the next attempt is at `due_at`, None when nothing waits."""
    connection.execute(
        "UPDATE webhook SET lease = '', lease_until = 0, due_at = ?1, failures = failures + ?2,"
        " failing_since = CASE WHEN ?2 = 1 THEN coalesce(failing_since, ?3) ELSE failing_since END"
        " WHERE id = ?4 AND lease = ?5",
        (due_at, int(failed), now, webhook, lease),
    )


def disable(connection: Connection, webhook: str, *, lease: str, reason: str) -> None:
    """Deliver nothing more until its owner replays; the events stay where they are."""
    connection.execute(
        "UPDATE webhook SET state = 'disabled', reason = ?, due_at = NULL, lease = '',"
        " lease_until = 0, failures = failures + 1, version = version + 1"
        " WHERE id = ? AND lease = ?",
        (reason, webhook, lease),
    )


def disable_all(connection: Connection, principal: str, *, reason: str) -> None:
    """Deliver nothing more to any endpoint of a principal; whoever is at one has lost its lease."""
    connection.execute(
        "UPDATE webhook SET state = 'disabled', reason = ?, due_at = NULL, lease = '',"
        " lease_until = 0, version = version + 1 WHERE principal = ? AND state = 'active'",
        (reason, principal),
    )


def add_delivery(
    connection: Connection,
    webhook: str,
    *,
    event: int,
    attempt: int,
    at: int,
    outcome: str,
    status: int | None,
    took_ms: int,
) -> None:
    """Note an attempt, and forget the oldest beyond the bound."""
    row = first(
        connection,
        "INSERT INTO webhook_delivery"
        " (webhook, number, event, attempt, at, outcome, status, took_ms) VALUES (?1,"
        " (SELECT coalesce(max(number), 0) + 1 FROM webhook_delivery WHERE webhook = ?1),"
        " ?2, ?3, ?4, ?5, ?6, ?7) RETURNING number",
        (webhook, event, attempt, at, outcome, status, took_ms),
    )
    assert row is not None
    connection.execute(
        "DELETE FROM webhook_delivery WHERE webhook = ? AND number <= ?",
        (webhook, int(row[0]) - WEBHOOK_DELIVERIES_KEPT),
    )


def deliveries(connection: Connection, webhook: str) -> list[dict[str, Any]]:
    """The last attempts, newest first."""
    rows = all_rows(
        connection,
        "SELECT number, event, attempt, at, outcome, status, took_ms FROM webhook_delivery"
        " WHERE webhook = ? ORDER BY number DESC LIMIT ?",
        (webhook, WEBHOOK_DELIVERIES_KEPT),
    )
    names = ("number", "event", "attempt", "at", "outcome", "status", "took_ms")
    return [dict(zip(names, row, strict=True)) for row in rows]


def backlog(connection: Connection) -> dict[str, int]:
    """Endpoints by condition, for the metrics."""
    row = first(
        connection,
        "SELECT count(*), coalesce(sum(CASE WHEN due_at IS NOT NULL THEN 1 ELSE 0 END), 0),"
        " coalesce(sum(CASE WHEN state = 'active' AND failures > 0 THEN 1 ELSE 0 END), 0),"
        " coalesce(sum(CASE WHEN state = 'disabled' THEN 1 ELSE 0 END), 0) FROM webhook",
    )
    assert row is not None
    return dict(zip(("all", "busy", "failing", "disabled"), map(int, row), strict=True))
