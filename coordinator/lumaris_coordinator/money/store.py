"""Rows of payouts. Every move of state goes through `advance`, by the table of the port."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, Final

from lumaris_coordinator.money.port import PAYOUT
from lumaris_coordinator.store.port import Connection, all_rows, first
from lumaris_protocol.machines.table import Machine


@dataclass(frozen=True)
class Payout:
    """One row. `account` is the wallet it was taken from, `held_in` where it waits."""

    id: str
    number: int
    party: str
    account: str
    held_in: str
    adapter: str
    currency: str
    amount: int
    state: str
    version: int
    reference: str
    reason: str
    requested_at: int
    tries: int
    next_at: int

    def view(self) -> dict[str, Any]:
        """The payout as its owner sees it."""
        return {
            "payout": self.id,
            "number": self.number,
            "adapter": self.adapter,
            "currency": self.currency,
            "amount_nanos": self.amount,
            "state": self.state,
            "reference": self.reference,
            "reason": self.reason,
            "requested_at": self.requested_at,
        }


_SELECT: Final = "SELECT " + ", ".join(field.name for field in fields(Payout)) + " FROM payout"


def find(connection: Connection, payout: str) -> Payout | None:
    """A payout by its id."""
    row = first(connection, _SELECT + " WHERE id = ?", (payout,))
    return Payout(*row) if row else None


def of_account(connection: Connection, account: str, *, after: int, limit: int) -> list[Payout]:
    """An account's payouts with a number above `after`, oldest first."""
    sql = _SELECT + " WHERE account = ? AND number > ? ORDER BY number LIMIT ?"
    return [Payout(*row) for row in all_rows(connection, sql, (account, after, limit))]


def number_of_account(connection: Connection, account: str) -> int:
    """How many payouts an account ever had."""
    row = first(connection, "SELECT count(*) FROM payout WHERE account = ?", (account,))
    return int(row[0]) if row else 0


def open_of_account(connection: Connection, account: str) -> int:
    """How many of an account's payouts have not come to rest."""
    sql = "SELECT count(*) FROM payout WHERE account = ? AND state NOT IN ('paid', 'returned')"
    row = first(connection, sql, (account,))
    return int(row[0]) if row else 0


def due(connection: Connection, *, now: int, limit: int) -> list[Payout]:
    """Payouts whose provider is to be asked now."""
    sql = _SELECT + " WHERE state IN ('held', 'sent') AND next_at <= ? ORDER BY next_at LIMIT ?"
    return [Payout(*row) for row in all_rows(connection, sql, (now, limit))]


def sent(connection: Connection, *, adapter: str, currency: str, limit: int) -> list[Payout]:
    """Payouts that the provider may have paid before we heard of it."""
    sql = _SELECT + " WHERE state = 'sent' AND adapter = ? AND currency = ? LIMIT ?"
    return [Payout(*row) for row in all_rows(connection, sql, (adapter, currency, limit))]


def insert(
    connection: Connection,
    *,
    payout: str,
    party: str,
    account: str,
    held_in: str,
    adapter: str,
    currency: str,
    amount: int,
    now: int,
) -> Payout:
    """Add a requested payout."""
    connection.execute(
        "INSERT INTO payout (id, number, party, account, held_in, adapter, currency, amount, state,"
        " requested_at) VALUES (?, (SELECT coalesce(max(number), 0) + 1 FROM payout),"
        " ?, ?, ?, ?, ?, ?, ?, ?)",
        (payout, party, account, held_in, adapter, currency, amount, PAYOUT.initial, now),
    )
    return _found(connection, payout)


def advance(
    connection: Connection,
    payout: Payout,
    fact: str,
    *,
    now: int,
    reference: str = "",
    reason: str = "",
) -> Payout:
    """Take one fact as the table says; the payout after it. Raises InvalidTransition."""
    machine = Machine(PAYOUT, payout.state)
    machine.take(fact)
    changed = connection.execute(
        "UPDATE payout SET state = ?, version = version + 1, reference = ?, reason = ?"
        " WHERE id = ? AND version = ?",
        (
            machine.state,
            reference or payout.reference,
            reason or payout.reason,
            payout.id,
            payout.version,
        ),
    )
    assert changed.rowcount == 1, "the one writer saw another version"
    connection.execute(
        "INSERT INTO payout_event (payout, n, fact, before, after, at) VALUES (?, ?, ?, ?, ?, ?)",
        (payout.id, payout.version + 1, fact, payout.state, machine.state, now),
    )
    return _found(connection, payout.id)


def postpone(connection: Connection, payout: str, *, next_at: int) -> None:
    """The provider could not be asked, or has not decided: ask again later."""
    connection.execute(
        "UPDATE payout SET tries = tries + 1, next_at = ? WHERE id = ?", (next_at, payout)
    )


def differing(connection: Connection, adapters: Sequence[tuple[str, str]]) -> set[tuple[str, str]]:
    """Which (adapter, currency) differed from the ledger when they were last compared."""
    found = set()
    for adapter, currency in adapters:
        row = newest_comparison(connection, adapter, currency)
        if row is not None and row["difference_nanos"] != 0:
            found.add((adapter, currency))
    return found


_COMPARED: Final = (
    "id",
    "adapter",
    "currency",
    "day",
    "provider_nanos",
    "ledger_nanos",
    "pending_nanos",
    "difference_nanos",
    "at",
)


def newest_comparison(connection: Connection, adapter: str, currency: str) -> dict[str, Any] | None:
    """The last comparison of an adapter with the ledger."""
    row = first(
        connection,
        f"SELECT {', '.join(_COMPARED)} FROM reconciliation"
        " WHERE adapter = ? AND currency = ? ORDER BY id DESC LIMIT 1",
        (adapter, currency),
    )
    return dict(zip(_COMPARED, row, strict=True)) if row else None


def comparisons(connection: Connection, *, before: int, limit: int) -> list[dict[str, Any]]:
    """Comparisons with a number below `before`, newest first."""
    rows = all_rows(
        connection,
        f"SELECT {', '.join(_COMPARED)} FROM reconciliation WHERE id < ? ORDER BY id DESC LIMIT ?",
        (before, limit),
    )
    return [dict(zip(_COMPARED, row, strict=True)) for row in rows]


def _found(connection: Connection, payout: str) -> Payout:
    found = find(connection, payout)
    assert found is not None
    return found
