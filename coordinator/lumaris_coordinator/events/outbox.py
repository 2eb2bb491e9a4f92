"""The outbox: one row per event, written in the transaction of the change that it tells of.

The number of an event is its place in the order of all events and has no gaps, so a reader that
knows the last number it saw has missed nothing before it.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, Final

import msgspec

from lumaris_coordinator.bounds import EVENT_BODY_BYTES_MAX, EVENT_PARTIES_MAX
from lumaris_coordinator.store.port import Connection, Row, all_rows, first

KINDS: Final = frozenset(
    (
        "account.credited",
        "account.debited",
        "escrow.held",
        "escrow.claimed",
        "escrow.disputed",
        "escrow.amended",
        "escrow.settled",
        "escrow.expired",
        "bond.locked",
        "bond.released",
        "dispute.opened",
        "dispute.evidence",
        "dispute.checking",
        "dispute.ruled",
        "dispute.collected",
        "dispute.withdrawn",
        "payout.requested",
        "payout.paid",
        "peer.revoked",
    )
)


@dataclass(frozen=True)
class Event:
    """One event and the peers and users whom it concerns. `body` is JSON text."""

    id: int
    kind: str
    ref: str
    at: int
    body: str
    parties: frozenset[str] = frozenset()

    def encode(self) -> bytes:
        """The event as a subscriber sees it; who else it concerns is not told."""
        return msgspec.json.encode(
            {
                "id": self.id,
                "type": self.kind,
                "at": self.at,
                "ref": self.ref,
                "data": msgspec.Raw(self.body.encode()),
            }
        )


def emit(
    connection: Connection,
    kind: str,
    *,
    ref: str,
    parties: Sequence[str],
    body: dict[str, Any],
    now: int,
) -> int:
    """Tell the parties (peer ids or usr_ ids) of a change, in its own transaction; the event's id.

    `ref` names the thing that changed (an agreement hash, an account, a dispute id).
    """
    assert kind in KINDS, kind
    told = sorted(set(parties))
    text = msgspec.json.encode(body).decode()
    assert len(told) <= EVENT_PARTIES_MAX, kind
    assert len(text) <= EVENT_BODY_BYTES_MAX, kind
    row = first(
        connection,
        "INSERT INTO event (id, kind, ref, at, body)"
        " VALUES ((SELECT coalesce(max(id), 0) + 1 FROM event), ?, ?, ?, ?) RETURNING id",
        (kind, ref, now, text),
    )
    assert row is not None
    number = int(row[0])
    if told:
        rows = ", ".join(["(?, ?)"] * len(told))
        connection.execute(
            f"INSERT INTO event_party (party, event) VALUES {rows}",  # noqa: S608 - our own text
            [value for party in told for value in (party, number)],
        )
    return number


def head(connection: Connection) -> int:
    """The number of the newest event, 0 when there is none."""
    row = first(connection, "SELECT coalesce(max(id), 0) FROM event")
    return int(row[0]) if row else 0


def newer(connection: Connection, *, after: int, limit: int) -> list[Event]:
    """The events above `after`, oldest first, with their parties."""
    rows = all_rows(
        connection,
        "SELECT id, kind, ref, at, body FROM event WHERE id > ? ORDER BY id LIMIT ?",
        (after, limit),
    )
    if not rows:
        return []
    parties: dict[int, set[str]] = {}
    for number, party in all_rows(
        connection,
        "SELECT event, party FROM event_party WHERE event BETWEEN ? AND ?",
        (rows[0][0], rows[-1][0]),
    ):
        parties.setdefault(number, set()).add(party)
    return [_event(row, parties.get(row[0], set())) for row in rows]


def newer_of(
    connection: Connection, parties: Collection[str], *, after: int, limit: int
) -> list[Event]:
    """The events above `after` that concern any of the parties, oldest first."""
    if not parties:
        return []
    # One short range per party, so that the cost does not grow with what the parties ever did.
    one = (
        "SELECT event FROM (SELECT event FROM event_party"
        " WHERE party = ? AND event > ? ORDER BY event LIMIT ?) AS one"
    )
    values: list[object] = []
    for party in sorted(parties):
        values += (party, after, limit)
    rows = all_rows(
        connection,
        "SELECT id, kind, ref, at, body FROM event WHERE id IN ("  # noqa: S608 - our own text
        + " UNION ".join([one] * len(parties))
        + ") ORDER BY id LIMIT ?",
        (*values, limit),
    )
    return [_event(row) for row in rows]


def _event(row: Row, parties: Collection[str] = ()) -> Event:
    number, kind, ref, at, body = row
    return Event(number, kind, ref, at, body, frozenset(parties))
