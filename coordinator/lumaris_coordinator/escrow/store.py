"""Rows of escrows. Every move of state goes through `advance`, by the protocol's table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Final

from lumaris_coordinator.bounds import ESCROW_EVENTS_SHOWN_MAX
from lumaris_coordinator.store.port import Connection, all_rows, first
from lumaris_protocol.agreements import Contract
from lumaris_protocol.codec import Signed
from lumaris_protocol.machines.escrow import ESCROW
from lumaris_protocol.machines.table import Machine
from lumaris_protocol.messages.budget import BudgetGrant
from lumaris_protocol.messages.payment import Voucher


@dataclass(frozen=True)
class Escrow:
    """One row, and the accounts of its parties. Amounts are nanos; the documents are kept as they
    were signed.

    `number` counts escrows, `version` the moves of this one. `claimed_total` is what a final claim
    asked, or what the seller claimed while `disputes` were open; `returned` went back to the buyer
    while they still were.
    """

    agreement_hash: str
    number: int
    session: str
    buyer: str
    seller: str
    account: str
    currency: str
    cap: int
    paid: int
    returned: int
    state: str
    version: int
    not_after: int
    settle_by: int
    by_buyer: bytes
    by_seller: bytes
    budget_grant: bytes
    voucher: bytes | None
    voucher_total: int
    claimed_total: int | None
    close_by_buyer: bytes | None
    close_by_seller: bytes | None
    disputes: int
    granted_at: int
    buyer_owner: str
    seller_owner: str

    @property
    def final(self) -> bool:
        """Whether the money has come to rest."""
        return self.state in ESCROW.final

    @property
    def remainder(self) -> int:
        """What is still held."""
        return 0 if self.final else self.payable - self.paid

    @property
    def payable(self) -> int:
        """The most that the seller can be paid in all."""
        return self.cap - self.returned

    @property
    def closes(self) -> tuple[bytes, ...]:
        """The co-signed end, when there is one."""
        if self.close_by_buyer is None or self.close_by_seller is None:
            return ()
        return (self.close_by_buyer, self.close_by_seller)


@dataclass(frozen=True)
class Amended:
    """One amendment as it was signed, and the grant it led to."""

    n: int
    by_buyer: bytes
    by_seller: bytes | None
    budget_grant: bytes


@dataclass(frozen=True)
class Event:
    """One move of an escrow; `evidence` is the hash of the document that caused it."""

    n: int
    fact: str
    before: str
    after: str
    evidence: str
    at: int


# Found by their peers: a peer's account never changes.
_OWNERS: Final = (
    "(SELECT peer.account FROM peer WHERE peer.peer = escrow.buyer)",
    "(SELECT peer.account FROM peer WHERE peer.peer = escrow.seller)",
)
_COLUMNS: Final = (*[field.name for field in fields(Escrow)][: -len(_OWNERS)], *_OWNERS)
_SELECT: Final = f"SELECT {', '.join(_COLUMNS)} FROM escrow"
# A ruling is the second move at the earliest, after the dispute that it ends.
_MOVES_OF_A_RULING: Final = 2


def find(connection: Connection, agreement_hash: str) -> Escrow | None:
    """The escrow of an agreement."""
    row = first(connection, _SELECT + " WHERE agreement_hash = ?", (agreement_hash,))
    return Escrow(*row) if row else None


def documents(connection: Connection, agreement_hash: str) -> tuple[bytes, ...]:
    """What an escrow was granted with, as its signatures were checked then; nothing without one."""
    row = first(
        connection,
        "SELECT by_buyer, by_seller, budget_grant FROM escrow WHERE agreement_hash = ?",
        (agreement_hash,),
    )
    return row if row is not None else ()


def find_of_parties(connection: Connection, session: str, peers: Sequence[str]) -> Escrow | None:
    """The newest escrow of a session that one of the peers is a party of."""
    if not peers:
        return None
    marks = ", ".join("?" * len(peers))
    row = first(
        connection,
        f"{_SELECT} WHERE session = ? AND (buyer IN ({marks}) OR seller IN ({marks}))"
        " ORDER BY number DESC LIMIT 1",
        (session, *peers, *peers),
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
        "SELECT count(*) FROM escrow WHERE buyer = ? AND state IN ('held', 'claimed', 'disputed')",
        (buyer,),
    )
    return int(row[0]) if row else 0


def held_of_buyers(connection: Connection, buyers: Sequence[str]) -> dict[str, tuple[int, int]]:
    """(nanos, escrows) that the buyers' open sessions hold, by currency."""
    if not buyers:
        return {}
    marks = ", ".join("?" * len(buyers))
    rows = all_rows(
        connection,
        "SELECT currency, sum(cap - paid - returned), count(*) FROM escrow"
        f" WHERE buyer IN ({marks}) AND state IN ('held', 'claimed', 'disputed')"
        " GROUP BY currency",
        tuple(buyers),
    )
    return {str(currency): (int(held), int(number)) for currency, held, number in rows}


def page_of_parties(
    connection: Connection,
    peers: Sequence[str],
    *,
    after: int,
    limit: int,
    state: str | None = None,
) -> list[Escrow]:
    """Escrows that one of the peers is a party of, with a number above `after`, oldest first."""
    if not peers:
        return []
    marks = ", ".join("?" * len(peers))
    only = " AND state = ?" if state is not None else ""
    rows = all_rows(
        connection,
        f"{_SELECT} WHERE number > ? AND (buyer IN ({marks}) OR seller IN ({marks})){only}"
        " ORDER BY number LIMIT ?",
        (after, *peers, *peers, *(() if state is None else (state,)), limit),
    )
    return [Escrow(*row) for row in rows]


def next_serial(connection: Connection) -> int:
    """The serial of the next grant; a later grant of the same money has a higher one."""
    row = first(connection, "SELECT coalesce(max(serial), 0) + 1 FROM escrow")
    return int(row[0]) if row else 1


def insert(
    connection: Connection, contract: Contract, grant: Signed[BudgetGrant], account: str
) -> Escrow:
    """Add a held escrow with its first event."""
    message = grant.message
    connection.execute(
        "INSERT INTO escrow (agreement_hash, number, session, buyer, seller, account, currency,"
        " cap, state, not_after, settle_by, serial, by_buyer, by_seller, budget_grant, granted_at)"
        " VALUES (?, (SELECT coalesce(max(number), 0) + 1 FROM escrow),"
        " ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
        (
            contract.hash,
            message.session,
            message.buyer,
            message.seller,
            account,
            message.currency,
            message.cap_nanos,
            ESCROW.initial,
            message.not_after,
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
    return _found(connection, contract.hash)


@dataclass(frozen=True)
class Change:
    """What a move changes beside the state; None leaves it as it is. `paid` is the new total."""

    paid: int | None = None
    voucher: Signed[Voucher] | None = None
    claimed_total: int | None = None
    closes: tuple[bytes, bytes] | None = None
    disputes: int | None = None
    returned: int | None = None

    def apply(self, escrow: Escrow, state: str) -> Escrow:
        """The row after the move."""
        found: dict[str, Any] = {"state": state, "version": escrow.version + 1}
        if self.paid is not None:
            found["paid"] = self.paid
        if self.voucher is not None:
            found["voucher"] = self.voucher.data
            found["voucher_total"] = self.voucher.message.total_nanos
        if self.claimed_total is not None:
            found["claimed_total"] = self.claimed_total
        if self.closes is not None:
            found["close_by_buyer"], found["close_by_seller"] = self.closes
        if self.disputes is not None:
            found["disputes"] = self.disputes
        if self.returned is not None:
            found["returned"] = self.returned
        return replace(escrow, **found)


NO_CHANGE: Final = Change()


def advance(
    connection: Connection,
    escrow: Escrow,
    fact: str,
    *,
    evidence: str,
    now: int,
    change: Change = NO_CHANGE,
) -> Escrow:
    """Take one fact as the table says, with all that it changes; the escrow after it.

    Raises ViolationError for a fact that the table refuses.
    """
    machine = Machine(ESCROW, escrow.state)
    machine.take(fact)
    after = change.apply(escrow, machine.state)
    changed = connection.execute(
        "UPDATE escrow SET state = ?, version = ?, paid = ?, voucher = ?, voucher_total = ?,"
        " claimed_total = ?, close_by_buyer = ?, close_by_seller = ?, disputes = ?, returned = ?"
        " WHERE agreement_hash = ? AND version = ?",
        (
            after.state,
            after.version,
            after.paid,
            after.voucher,
            after.voucher_total,
            after.claimed_total,
            after.close_by_buyer,
            after.close_by_seller,
            after.disputes,
            after.returned,
            escrow.agreement_hash,
            escrow.version,
        ),
    )
    assert changed.rowcount == 1, "the one writer saw another version"
    event = Event(after.version, fact, escrow.state, after.state, evidence, now)
    _note(connection, escrow.agreement_hash, event)
    return after


def amendments(connection: Connection, agreement_hash: str) -> list[Amended]:
    """All amendments of an agreement, oldest first: at most AMENDMENTS_MAX."""
    rows = all_rows(
        connection,
        "SELECT n, by_buyer, by_seller, budget_grant FROM amendment"
        " WHERE agreement_hash = ? ORDER BY n",
        (agreement_hash,),
    )
    return [Amended(*row) for row in rows]


def amend(
    connection: Connection,
    escrow: Escrow,
    amended: Amended,
    grant: Signed[BudgetGrant],
) -> Escrow:
    """Keep an amendment, and hold the escrow to its grant from now on; the escrow after it."""
    message = grant.message
    connection.execute(
        "INSERT INTO amendment (agreement_hash, n, by_buyer, by_seller, budget_grant, at)"
        " VALUES (?, ?, ?, ?, ?, ?)",
        (
            escrow.agreement_hash,
            amended.n,
            amended.by_buyer,
            amended.by_seller,
            amended.budget_grant,
            message.issued_at,
        ),
    )
    connection.execute(
        "UPDATE escrow SET cap = ?, not_after = ?, settle_by = ?, serial = ?, budget_grant = ?"
        " WHERE agreement_hash = ?",
        (
            message.cap_nanos,
            message.not_after,
            message.settle_by,
            message.serial,
            grant.data,
            escrow.agreement_hash,
        ),
    )
    return _found(connection, escrow.agreement_hash)


def add_ruling(connection: Connection, agreement_hash: str, ruling: bytes, *, award: int) -> None:
    """Keep a ruling on the escrow, with what it gave the seller before the fee."""
    connection.execute(
        "INSERT INTO escrow_ruling (agreement_hash, n, ruling, award) VALUES (?1,"
        " (SELECT coalesce(max(n), 0) + 1 FROM escrow_ruling WHERE agreement_hash = ?1), ?2, ?3)",
        (agreement_hash, ruling, award),
    )


def awarded(connection: Connection, agreement_hash: str) -> int:
    """What rulings gave the seller, before the fee."""
    row = first(
        connection,
        "SELECT CAST(coalesce(sum(award), 0) AS BIGINT) FROM escrow_ruling"
        " WHERE agreement_hash = ?",
        (agreement_hash,),
    )
    return int(row[0]) if row else 0


def rulings(connection: Connection, escrow: Escrow) -> tuple[bytes, ...]:
    """The rulings on an escrow, oldest first: at most DISPUTES_PER_ESCROW_MAX."""
    if escrow.version < _MOVES_OF_A_RULING:
        return ()
    rows = all_rows(
        connection,
        "SELECT ruling FROM escrow_ruling WHERE agreement_hash = ? ORDER BY n",
        (escrow.agreement_hash,),
    )
    return tuple(row[0] for row in rows)


def disputes_ever(connection: Connection, agreement_hash: str) -> int:
    """How many disputes were ever opened on an escrow."""
    row = first(
        connection,
        "SELECT count(*) FROM escrow_event WHERE agreement_hash = ? AND fact = 'dispute_opened'",
        (agreement_hash,),
    )
    return int(row[0]) if row else 0


@dataclass(frozen=True)
class Enclosed:
    """What a receipt file carries beside the agreement, the grant and the voucher."""

    closes: tuple[bytes, ...]
    amendments: tuple[bytes, ...]
    rulings: tuple[bytes, ...]


def enclosed(connection: Connection, escrow: Escrow) -> Enclosed:
    """The documents that a settled escrow's receipt follows from. A co-signed end stands over
    the rulings before it, and an escrow of one move was settled by that."""
    known = amendments(connection, escrow.agreement_hash) if escrow.version > 1 else []
    copies = (copy for one in known for copy in (one.by_buyer, one.by_seller) if copy is not None)
    ruled = () if escrow.closes else rulings(connection, escrow)
    return Enclosed(escrow.closes, tuple(copies), ruled)


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
        "UPDATE escrow SET settle_by = settle_by + ?"
        " WHERE state IN ('held', 'claimed', 'disputed')",
        (seconds,),
    )


def events(connection: Connection, agreement_hash: str) -> list[dict[str, Any]]:
    """The escrow's history: repeated claims are no events, and only rising vouchers add to it."""
    rows = all_rows(
        connection,
        "SELECT n, fact, after, evidence, at FROM escrow_event WHERE agreement_hash = ?"
        " ORDER BY n LIMIT ?",
        (agreement_hash, ESCROW_EVENTS_SHOWN_MAX),
    )
    names = ("n", "fact", "state", "evidence", "at")
    return [dict(zip(names, row, strict=True)) for row in rows]


def _found(connection: Connection, agreement_hash: str) -> Escrow:
    found = find(connection, agreement_hash)
    assert found is not None
    return found


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
