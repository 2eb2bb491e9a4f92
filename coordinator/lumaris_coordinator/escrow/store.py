"""Rows of escrows. Every move of state goes through `advance`, by the protocol's table."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, Final

from lumaris_coordinator.store.port import Connection, all_rows, first
from lumaris_protocol.agreements import Contract
from lumaris_protocol.codec import Signed
from lumaris_protocol.machines.escrow import ESCROW
from lumaris_protocol.machines.table import Machine
from lumaris_protocol.messages.budget import BudgetGrant
from lumaris_protocol.messages.payment import Voucher


@dataclass(frozen=True)
class Escrow:
    """One row. Amounts are nanos; the documents are kept as they were signed."""

    agreement_hash: str
    session: str
    buyer: str
    seller: str
    account: str
    cap: int
    paid: int
    state: str
    version: int
    settle_by: int
    by_buyer: bytes
    by_seller: bytes
    budget_grant: bytes
    voucher: bytes | None
    voucher_total: int
    claimed_total: int | None
    granted_at: int

    @property
    def final(self) -> bool:
        """Whether the money has come to rest."""
        return self.state in ESCROW.final


@dataclass(frozen=True)
class Event:
    """One move of an escrow; `evidence` is the hash of the document that caused it."""

    n: int
    fact: str
    before: str
    after: str
    evidence: str
    at: int


_SELECT: Final = "SELECT " + ", ".join(field.name for field in fields(Escrow)) + " FROM escrow"


def find(connection: Connection, agreement_hash: str) -> Escrow | None:
    """The escrow of an agreement."""
    row = first(connection, _SELECT + " WHERE agreement_hash = ?", (agreement_hash,))
    return Escrow(*row) if row else None


def find_of_party(connection: Connection, session: str, peer: str) -> Escrow | None:
    """The newest escrow of a session that the peer is a party of."""
    row = first(
        connection,
        _SELECT + " WHERE session = ?1 AND ?2 IN (buyer, seller) ORDER BY granted_at DESC LIMIT 1",
        (session, peer),
    )
    return Escrow(*row) if row else None


def session_taken(connection: Connection, *, buyer: str, session: str) -> bool:
    """Whether the buyer has an escrow for another agreement of this session."""
    sql = "SELECT 1 FROM escrow WHERE buyer = ? AND session = ?"
    return first(connection, sql, (buyer, session)) is not None


def open_of_buyer(connection: Connection, buyer: str) -> int:
    """How many of a buyer's escrows still hold money."""
    row = first(
        connection,
        "SELECT count(*) FROM escrow WHERE buyer = ? AND state IN ('held', 'claimed')",
        (buyer,),
    )
    return int(row[0]) if row else 0


def next_serial(connection: Connection) -> int:
    """The serial of the next grant."""
    row = first(connection, "SELECT coalesce(max(serial), 0) + 1 FROM escrow")
    return int(row[0]) if row else 1


def insert(
    connection: Connection, contract: Contract, grant: Signed[BudgetGrant], *, account: str
) -> None:
    """Add a held escrow with its first event."""
    message = grant.message
    connection.execute(
        "INSERT INTO escrow (agreement_hash, session, buyer, seller, account, cap, state,"
        " settle_by, serial, by_buyer, by_seller, budget_grant, granted_at)"
        " VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
        (
            contract.hash,
            message.session,
            message.buyer,
            message.seller,
            account,
            message.cap_nanos,
            ESCROW.initial,
            message.settle_by,
            message.serial,
            contract.by_buyer,
            contract.by_seller,
            grant.data,
            message.issued_at,
        ),
    )
    event = Event(0, "granted", "", ESCROW.initial, grant.hash, message.issued_at)
    _note(connection, contract.hash, event)


def advance(
    connection: Connection, escrow: Escrow, fact: str, *, evidence: str, now: int
) -> Escrow:
    """Take one fact as the table says; the escrow after it.

    Raises ViolationError for a fact that the table refuses.
    """
    machine = Machine(ESCROW, escrow.state)
    machine.take(fact)
    changed = connection.execute(
        "UPDATE escrow SET state = ?, version = version + 1"
        " WHERE agreement_hash = ? AND version = ?",
        (machine.state, escrow.agreement_hash, escrow.version),
    )
    assert changed.rowcount == 1, "the one writer saw another version"
    event = Event(escrow.version + 1, fact, escrow.state, machine.state, evidence, now)
    _note(connection, escrow.agreement_hash, event)
    found = find(connection, escrow.agreement_hash)
    assert found is not None
    return found


def record_voucher(connection: Connection, escrow: Escrow, voucher: Signed[Voucher]) -> None:
    """Keep the voucher that counts."""
    connection.execute(
        "UPDATE escrow SET voucher = ?, voucher_total = ? WHERE agreement_hash = ?",
        (voucher.data, voucher.message.total_nanos, escrow.agreement_hash),
    )


def save_settlement(connection: Connection, escrow: Escrow) -> None:
    """Keep what a final state paid, on which claim, with which voucher."""
    connection.execute(
        "UPDATE escrow SET paid = ?, claimed_total = ?, voucher = ?, voucher_total = ?"
        " WHERE agreement_hash = ?",
        (
            escrow.paid,
            escrow.claimed_total,
            escrow.voucher,
            escrow.voucher_total,
            escrow.agreement_hash,
        ),
    )


def due(connection: Connection, *, now: int, limit: int) -> list[str]:
    """Agreements whose settle window has ended, the longest first."""
    rows = all_rows(
        connection,
        "SELECT agreement_hash FROM escrow WHERE state IN ('held', 'claimed') AND settle_by < ?"
        " ORDER BY settle_by LIMIT ?",
        (now, limit),
    )
    return [str(row[0]) for row in rows]


def extend_open(connection: Connection, *, seconds: int) -> None:
    """Move every open deadline by some downtime."""
    connection.execute(
        "UPDATE escrow SET settle_by = settle_by + ? WHERE state IN ('held', 'claimed')",
        (seconds,),
    )


def events(connection: Connection, agreement_hash: str) -> list[dict[str, Any]]:
    """The escrow's history. A session has few events: repeated claims move nothing."""
    rows = all_rows(
        connection,
        "SELECT n, fact, after, evidence, at FROM escrow_event WHERE agreement_hash = ?"
        " ORDER BY n LIMIT 100",
        (agreement_hash,),
    )
    names = ("n", "fact", "state", "evidence", "at")
    return [dict(zip(names, row, strict=True)) for row in rows]


def _note(connection: Connection, agreement_hash: str, event: Event) -> None:
    connection.execute(
        "INSERT INTO escrow_event (agreement_hash, n, fact, before, after, evidence, at)"
        " VALUES (?, ?, ?, ?, ?, ?, ?)",
        (
            agreement_hash,
            event.n,
            event.fact,
            event.before,
            event.after,
            event.evidence,
            event.at,
        ),
    )
